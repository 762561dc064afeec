"""Methods whose ranks mix their models with those of their neighbors."""
