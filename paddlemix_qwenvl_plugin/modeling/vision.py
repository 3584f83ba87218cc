"""Vision transformer (without class token) and resampler: images -> features.

Parameter names are canonical (checkpoint/tensors.py), except `key_pos_embed`, which is the resampler's `pos_embed`
resized to the patch grid. It and the vision tower's `positional_embedding` are resized when the weights are loaded
(weights.py), since a model has one image size.
"""

from __future__ import annotations

import math

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.checkpoint.config import RESAMPLER_HEAD_DIM, ModelConfig, VisionConfig
from paddlemix_qwenvl_plugin.modeling import ops
from paddlemix_qwenvl_plugin.modeling.layers import LayerNorm, Linear, attend, cast_like, parameter_attr


class Attention(nn.Layer):
    """Self-attention. The joint projection yields [heads, 3 * head_dim]: query, key and value of each head."""

    def __init__(self, name: str, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.width // config.heads
        self.in_proj = Linear(f"{name}.in_proj", config.width, 3 * config.width)
        self.out_proj = Linear(f"{name}.out_proj", config.width, config.width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[N, patches, width] -> [N, patches, width]."""
        qkv = self.in_proj(x).reshape([0, 0, self.heads, 3 * self.head_dim]).transpose([0, 2, 1, 3])
        query, key, value = paddle.split(qkv, 3, axis=-1)
        return self.out_proj(attend(query / math.sqrt(self.head_dim), key, value))


class Block(nn.Layer):
    """Pre-norm transformer block with an exact-GELU MLP."""

    def __init__(self, name: str, config: VisionConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(f"{name}.ln_1", config.width)
        self.attn = Attention(f"{name}.attn", config)
        self.ln_2 = LayerNorm(f"{name}.ln_2", config.width)
        self.c_fc = Linear(f"{name}.mlp.c_fc", config.width, config.mlp_width)
        self.c_proj = Linear(f"{name}.mlp.c_proj", config.mlp_width, config.width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[N, patches, width] -> [N, patches, width]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(ops.gelu(self.c_fc(self.ln_2(x))))


class Resampler(nn.Layer):
    """Cross-attention of `n_queries` learned queries over the patches."""

    def __init__(self, name: str, config: VisionConfig) -> None:
        super().__init__()
        out, n_patches = config.output_dim, config.grid**2
        self.out = out
        self.heads = out // RESAMPLER_HEAD_DIM
        same_width = config.width == out
        self.kv_proj = (
            nn.Identity() if same_width else Linear(f"{name}.kv_proj", config.width, out, bias=False)
        )
        self.ln_kv = LayerNorm(f"{name}.ln_kv", out)
        self.ln_q = LayerNorm(f"{name}.ln_q", out)
        self.query = self._table(f"{name}.query", [config.n_queries, out])
        self.pos_embed = self._table(f"{name}.pos_embed", [config.n_queries, out])
        self.key_pos_embed = self._table(f"{name}.key_pos_embed", [n_patches, out])
        self.in_proj_weight = self._table(f"{name}.attn.in_proj_weight", [3 * out, out])
        self.in_proj_bias = self._table(f"{name}.attn.in_proj_bias", [3 * out])
        self.out_proj = Linear(f"{name}.attn.out_proj", out, out)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[N, patches, width] -> [N, n_queries, output_dim]."""
        patches = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(cast_like(self.query, x)) + cast_like(self.pos_embed, x)).unsqueeze(0)
        keys = patches + cast_like(self.key_pos_embed, x)
        # The queries have batch size 1: matmul broadcasts them over the images.
        query, key, value = (
            self._project(tensor, part) for part, tensor in enumerate((query, keys, patches))
        )
        return self.out_proj(attend(query / math.sqrt(RESAMPLER_HEAD_DIM), key, value))

    def _project(self, x: paddle.Tensor, part: int) -> paddle.Tensor:
        """[B, T, out] -> [B, heads, T, head_dim] through part 0, 1 or 2 (query, key, value) of the joint projection."""
        rows = slice(part * self.out, (part + 1) * self.out)
        weight, bias = cast_like(self.in_proj_weight[rows], x), cast_like(self.in_proj_bias[rows], x)
        projected = ops.matmul(x, weight, transpose_y=True) + bias
        return projected.reshape([0, 0, self.heads, RESAMPLER_HEAD_DIM]).transpose([0, 2, 1, 3])

    def _table(self, name: str, shape: list[int]) -> paddle.Tensor:
        return self.create_parameter(shape, attr=parameter_attr(name))


class VisionModel(nn.Layer):
    """Vision stage: images [N, 3, image_size, image_size] float32 -> features [N, n_queries, hidden] float32.

    `dtype`: compute type of the activations.
    """

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        super().__init__()
        vision = config.visual
        self.dtype = dtype
        self.patch_size = vision.patch_size
        self.conv1 = self.create_parameter(
            [vision.width, 3, vision.patch_size, vision.patch_size],
            attr=parameter_attr("visual.conv1.weight"),
        )
        self.positional_embedding = self.create_parameter(
            [vision.grid**2, vision.width], attr=parameter_attr("visual.positional_embedding")
        )
        self.ln_pre = LayerNorm("visual.ln_pre", vision.width)
        self.blocks = nn.LayerList(
            [Block(f"visual.transformer.resblocks.{i}", vision) for i in range(vision.layers)]
        )
        self.attn_pool = Resampler("visual.attn_pool", vision)
        self.ln_post = LayerNorm("visual.ln_post", vision.output_dim)
        # [out, in]: the transpose of the checkpoint's (weights.py).
        self.proj = self.create_parameter([vision.output_dim] * 2, attr=parameter_attr("visual.proj"))

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        """Images -> features."""
        images = images.astype(self.dtype)
        patches = nn.functional.conv2d(images, cast_like(self.conv1, images), stride=self.patch_size)
        tokens = patches.flatten(2).transpose([0, 2, 1])
        x = self.ln_pre(tokens + cast_like(self.positional_embedding, tokens))
        for block in self.blocks:
            x = block(x)
        features = ops.matmul(self.ln_post(self.attn_pool(x)), cast_like(self.proj, x), transpose_y=True)
        return features.astype("float32")
