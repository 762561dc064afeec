"""Storing the state of a run."""
