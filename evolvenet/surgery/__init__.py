"""Index maps applied to modules, optimizers and checkpoints. May import `linalg` and `graph`."""
