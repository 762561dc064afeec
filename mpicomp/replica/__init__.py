"""The model of one rank and its place among the other ranks: everything that a training script of your own needs."""
