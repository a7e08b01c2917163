"""Pruning, growth and carried optimizer state beside peers."""
