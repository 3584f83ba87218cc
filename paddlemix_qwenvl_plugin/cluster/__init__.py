"""Batch jobs and serving on a Ray cluster: `qwenvl batch --ray` and `qwenvl serve --ray`."""
