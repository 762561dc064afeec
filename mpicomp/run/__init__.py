"""A configured run: set up, train, record, stop and continue."""
