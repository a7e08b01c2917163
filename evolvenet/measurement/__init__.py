"""Spectra, second moments and costs of widths. May import from `tracing` down."""
