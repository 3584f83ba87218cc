"""The weights in a stage's parameter file: names, shapes and storage types, derived from its config.

The engine requires the same names and shapes (csrc/core/weights.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs
from paddlemix_qwenvl_plugin.engine.quantize import ORDER, has_order, quantized

# Position table resized to the patch grid -> table of the checkpoint from which it is resized.
TABLES = {
    "visual.positional_embedding": "visual.positional_embedding",
    "visual.attn_pool.key_pos_embed": "visual.attn_pool.pos_embed",
}


class Weight(NamedTuple):
    """Shape of a weight's values (a matrix is [out, in]) and their storage type (a key of library.DTYPES)."""

    shape: tuple[int, ...]
    dtype: str


def stage_weights(
    config: ModelConfig, stage: str, dtype: str, quant_type: Optional[str] = None
) -> dict[str, Weight]:
    """List the weights of a stage, "vision" or "language", by canonical name.

    In the order of `parameter_shapes`; with act-order, the column order of each quantized matrix follows the matrix.
    """
    specs = vision_specs(config) if stage == "vision" else language_specs(config)
    kinds = quantized(specs, quant_type)
    weights = {}
    for name, shape in parameter_shapes(specs, config).items():
        weights[name] = Weight(shape, kinds.get(name, dtype))
        if name in kinds and has_order(quant_type):
            weights[name + ORDER] = Weight(shape[1:], "int32")
    return weights


def parameter_shapes(specs: Mapping[str, TensorSpec], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a stage's parameters in the engine's layout (matrices [out, in]).

    In the order of the specs; the vision stage's last entry is key_pos_embed, which has no spec.
    """
    shapes = {name: spec.shape[::-1] if spec.linear else spec.shape for name, spec in specs.items()}
    for table, source in TABLES.items():
        if source in specs:
            shapes[table] = (config.visual.grid**2, specs[source].shape[1])
    return shapes
