"""Calibrated quantization of the language model's matrices: `qwenvl quantize`."""

from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle

require_paddle()
