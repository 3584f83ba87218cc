"""How good answers are: on the demo world, and on the formats of common data sets (docs/eval.md)."""
