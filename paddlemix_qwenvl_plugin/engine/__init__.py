"""The engine (csrc/) from Python: builds on first use, its C interface, and its operators for Paddle."""
