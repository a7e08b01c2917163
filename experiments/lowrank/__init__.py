"""Low rank, measured."""
