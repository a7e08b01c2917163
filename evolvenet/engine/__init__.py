"""The training-time loop: observe, measure, decide, change, verify, undo. May import from `policies` down."""
