"""A run: configuration, data, models, the flat model, the loop and its metrics."""
