"""A tiny model with random weights: a fast stand-in for tests and recipes."""
