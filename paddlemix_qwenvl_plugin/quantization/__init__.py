"""Calibrated quantization of the language model's matrices: `qwenvl quantize`."""
