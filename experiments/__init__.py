"""Experiments with EvolveNet: data sets, models, training runs, comparisons with peers, coverage, benchmarks."""

import evolvenet  # noqa: F401  (before Lightning imports torchvision, which it patches)
