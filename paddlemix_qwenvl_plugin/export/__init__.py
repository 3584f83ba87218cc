"""Export of a checkpoint: programs, parameter file, manifest."""

from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle

require_paddle()
