"""Check that a model fits into a GPU's memory before its weights are copied."""

from __future__ import annotations

from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.machine import GIB

# Size of a quantized language stage relative to half precision. Both types leave the embedding unquantized; int4 has
# 8 bits for c_attn and lm_head.
_RELATIVE_SIZES = (("weight_only_int8", 0.55), ("weight_only_int4", 0.4))


def check_share(share: float) -> None:
    """Raise UsageError unless `share` is a valid share of GPU memory, over 0 up to 1."""
    if not 0 < share <= 1:
        raise UsageError(f"--gpu_memory {share:g}: must be over 0, up to 1")


def check_room(vision: Stage, language: Stage, free: int, share: float) -> None:
    """Check that the weights and the KV cache of one request of the full context fit into GPU memory.

    For the engine; the portable graph is not checked.

    Args:
        vision: the vision stage.
        language: the language stage.
        free: free bytes of GPU memory.
        share: share that the KV cache may take of the memory left by the weights.

    Raises:
        QwenVLError: they do not fit; the message suggests a quantization with which they would, if there is one.
    """
    config = language.manifest.config
    # Keys and values, each of 2 bytes per element; divided by the share, the memory that the weights must leave.
    cache = 4 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings / share

    def fits(factor: float) -> bool:
        """Whether the model fits if the language stage has `factor` times its size."""
        return _bytes(vision) + factor * _bytes(language) + cache <= free

    if fits(1):
        return
    smaller = [
        name for name, factor in _RELATIVE_SIZES if language.manifest.quant_type is None and fits(factor)
    ]
    advice = f"export with --quant_type {smaller[0]}" if smaller else "use a larger GPU or --device cpu"
    needed = (_bytes(vision) + _bytes(language) + cache) / GIB
    raise QwenVLError(
        f"{language.params}: needs {needed:.1f} GiB of GPU memory with the KV cache of one request, "
        f"and {free / GIB:.1f} GiB are free; free some, or {advice}"
    )


def _bytes(stage: Stage) -> float:
    """Size of a stage's weights on a GPU; those of an unquantized float32 stage are stored in half precision there."""
    size = stage.params.stat().st_size
    full_precision = stage.manifest.dtype == "float32" and stage.manifest.quant_type is None
    return size / 2 if full_precision else size
