"""Helpers without knowledge of the model, for every other package."""
