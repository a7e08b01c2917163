"""From measurements to new sizes, pure functions. May import from `growth` down."""
