"""Sums of compressed messages over a star or a ring."""
