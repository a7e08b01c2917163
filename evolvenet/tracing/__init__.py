"""Finds which tensor axes are one width, by running the model under labels; verifies it. May import from `execution` down."""
