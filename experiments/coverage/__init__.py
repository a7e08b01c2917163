"""Which models can be traced, pruned and grown: `python -m experiments.coverage`."""
