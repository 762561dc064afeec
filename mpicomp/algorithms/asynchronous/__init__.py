"""Methods whose ranks do not wait for each other."""
