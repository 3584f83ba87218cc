"""The engine (csrc/) as custom operators of the installed Paddle: built on first use, then loaded from a cache."""
