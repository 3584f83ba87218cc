"""Evaluation of answers: the demo world, and data sets in common formats (docs/eval.md)."""
