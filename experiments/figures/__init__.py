"""The figures of README and documentation, drawn from measured runs and result pages: `python -m experiments.figures`."""
