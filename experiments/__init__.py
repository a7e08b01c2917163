"""What EvolveNet is tried on: data sets, models, a plain LightningModule, and the running of one experiment."""
