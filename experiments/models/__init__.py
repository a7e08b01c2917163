"""The networks that the experiments train. They do not import EvolveNet."""
