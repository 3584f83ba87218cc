"""Tiny model with random weights, for tests and recipes."""
