"""New units: their initial weights, and a held-out test of whether they lower the loss. May import from `pruning` down."""
