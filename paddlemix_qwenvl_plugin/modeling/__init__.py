"""Qwen-VL in Paddle layers: the reference implementation and the portable graphs."""

from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle

require_paddle()
