"""Small complete programs; each runs in minutes on a CPU, and in seconds with `--tiny`, as the tests run it."""
