"""Batch jobs: a JSONL file of requests to a JSONL file of results."""
