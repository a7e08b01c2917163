"""One experiment from start to end, its callbacks, and sweeps."""
