"""Python side of the engine (csrc/): build on first use, C interface, operators for Paddle."""
