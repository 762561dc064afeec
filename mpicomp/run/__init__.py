"""A configured run: set up, train, record, stop, go on."""
