"""Batch jobs: rows of a JSONL file in, a row of results for each out."""
