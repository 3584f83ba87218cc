"""The model in plain Paddle layers: the reference, and the portable graphs."""

from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle

require_paddle()
