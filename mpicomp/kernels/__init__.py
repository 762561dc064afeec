"""Fast versions of single operations on flat tensors: one function an operation, the same signature in each version."""
