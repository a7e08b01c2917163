"""Immutable data about widths: which tensor axes belong to which width, and how its units are renumbered. May import `linalg`."""
