"""The model of one rank among those of the others: what a training script of one's own needs."""
