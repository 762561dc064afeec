"""Trainers of other libraries on MPI ranks: one file for each; it needs that library installed."""
