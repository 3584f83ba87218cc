"""Helpers that are independent of the model, used by all other packages."""
