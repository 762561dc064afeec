"""Methods that add up compressed gradients of all ranks, which hold the same model."""
