"""Data sets, where they come from, and which rank gets which samples."""
