"""Runs the user's model without side effects, and records its calls and weight ops. May import from `surgery` down."""
