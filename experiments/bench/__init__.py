"""What tracing and events cost, and on which machine."""
