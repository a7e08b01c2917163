"""What EvolveNet is tried on: data sets, models, a plain LightningModule, and the running of one experiment."""

import evolvenet  # noqa: F401  (before anything here imports Lightning: it mends PyPI's torchvision)
