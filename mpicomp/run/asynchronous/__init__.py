"""Runs with asynchronous algorithms."""
