"""The edge to Lightning: `WidthEvolution`. May import everything but the other edges."""
