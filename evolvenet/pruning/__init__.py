"""Which units go, and how the consumers are refitted so that the outputs stay. May import from `measurement` down."""
