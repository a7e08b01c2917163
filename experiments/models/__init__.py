"""The networks that the experiments train. They know nothing of EvolveNet."""
