"""The engine (csrc/): building it on first use, its C interface, and its operators for Paddle."""
