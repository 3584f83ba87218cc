"""User interface of `qwenvl chat`, for terminals and pipes."""
