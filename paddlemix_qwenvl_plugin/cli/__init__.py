"""The `qwenvl` command line."""
