"""Many machines: `qwenvl batch --ray` and `qwenvl serve --ray`, on Ray."""
