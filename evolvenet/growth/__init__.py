"""New units: where they start, and whether the loss asks for them. May import from `pruning` down."""
