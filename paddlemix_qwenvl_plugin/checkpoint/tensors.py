"""The tensors of a model: canonical names, shapes in Paddle's layout, and the weights that Hugging Face transposes.

The canonical names are Hugging Face's without the leading `transformer.`; a linear weight is [in, out].
"""

from __future__ import annotations

from dataclasses import dataclass

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a tensor; `linear` marks a weight that Hugging Face stores transposed, as [out, in]."""

    shape: tuple[int, ...]
    linear: bool = False


def language_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """The language model's tensors, in the order of the forward pass."""
    hidden, mlp = config.hidden_size, config.mlp_width
    specs = {"wte.weight": TensorSpec((config.vocab_size, hidden))}
    for i in range(config.num_hidden_layers):
        layer = f"h.{i}."
        specs[layer + "ln_1.weight"] = TensorSpec((hidden,))
        specs[layer + "attn.c_attn.weight"] = TensorSpec((hidden, 3 * hidden), linear=True)
        specs[layer + "attn.c_attn.bias"] = TensorSpec((3 * hidden,))
        specs[layer + "attn.c_proj.weight"] = TensorSpec((hidden, hidden), linear=True)
        specs[layer + "ln_2.weight"] = TensorSpec((hidden,))
        specs[layer + "mlp.w1.weight"] = TensorSpec((hidden, mlp), linear=True)
        specs[layer + "mlp.w2.weight"] = TensorSpec((hidden, mlp), linear=True)
        specs[layer + "mlp.c_proj.weight"] = TensorSpec((mlp, hidden), linear=True)
    specs["ln_f.weight"] = TensorSpec((hidden,))
    specs["lm_head.weight"] = TensorSpec((hidden, config.vocab_size), linear=True)
    return specs


def vision_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """The tensors of the vision tower and the resampler, in the order of the forward pass."""
    vision = config.visual
    width, out, mlp = vision.width, vision.output_dim, vision.mlp_width
    specs = {
        "visual.conv1.weight": TensorSpec((width, 3, vision.patch_size, vision.patch_size)),
        # One row per patch of a 16 x 16 grid, as in every published checkpoint. Checkpoint replaces this shape if a
        # checkpoint has another square grid. The export resizes the grid to that of the image's patches.
        "visual.positional_embedding": TensorSpec((256, width)),
    }
    specs.update(_norm("visual.ln_pre", width))
    for i in range(vision.layers):
        block = f"visual.transformer.resblocks.{i}."
        specs.update(_norm(block + "ln_1", width))
        specs.update(_linear(block + "attn.in_proj", width, 3 * width))
        specs.update(_linear(block + "attn.out_proj", width, width))
        specs.update(_norm(block + "ln_2", width))
        specs.update(_linear(block + "mlp.c_fc", width, mlp))
        specs.update(_linear(block + "mlp.c_proj", mlp, width))
    pool = "visual.attn_pool."
    if width != out:
        specs[pool + "kv_proj.weight"] = TensorSpec((width, out), linear=True)
    specs.update(_norm(pool + "ln_kv", out))
    specs[pool + "query"] = TensorSpec((vision.n_queries, out))
    specs.update(_norm(pool + "ln_q", out))
    specs[pool + "pos_embed"] = TensorSpec((vision.n_queries, out))
    specs[pool + "attn.in_proj_weight"] = TensorSpec((out, 3 * out), linear=True)
    specs[pool + "attn.in_proj_bias"] = TensorSpec((3 * out,))
    specs.update(_linear(pool + "attn.out_proj", out, out))
    specs.update(_norm("visual.ln_post", out))
    specs["visual.proj"] = TensorSpec((out, out))
    return specs


def _norm(name: str, width: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((width,)), f"{name}.bias": TensorSpec((width,))}


def _linear(name: str, n_in: int, n_out: int) -> dict[str, TensorSpec]:
    return {
        f"{name}.weight": TensorSpec((n_in, n_out), linear=True),
        f"{name}.bias": TensorSpec((n_out,)),
    }
