"""Layers replaced by chains of smaller ones, and the choice of their ranks. May import nothing above `growth`."""
