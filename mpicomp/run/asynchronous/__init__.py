"""A run whose ranks do not wait for each other."""
