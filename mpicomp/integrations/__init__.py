"""Trainers of other libraries on MPI ranks: a short file for each, which needs that library installed."""
