"""Qwen-VL in PyTorch for training the demo model: the numerics of `paddlemix_qwenvl_plugin/modeling`.

The patch grid must be 16 x 16 with 256 queries, so that no position table is resized; sequences must be within
`seq_length`, where dynamic NTK and logn have no effect. tests/demo/world compares the results with those of `modeling`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_POSITIONS = 256  # patches, and queries
# Normalisation of the pixels, by channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        x_float32 = x.float()
        scale = torch.rsqrt(x_float32.square().mean(-1, keepdim=True) + self.epsilon)
        return (x_float32 * scale).to(x.dtype) * self.weight


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        # The output of in_proj has the layout [heads][q, k, v][head_dim].
        qkv = self.in_proj(x).view(n, t, self.heads, 3 * width // self.heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return self.out_proj(mixed.transpose(1, 2).reshape(n, t, width))


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp), "c_proj": nn.Linear(mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class ResamplerAttention(nn.Module):
    """Multi-head cross-attention with heads of 128; one matrix holds the projections of query, key and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 128
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).view(x.shape[0], x.shape[1], self.heads, 128).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases)
        )
        mixed = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    def __init__(self, n_queries: int, width: int, out: int) -> None:
        super().__init__()
        self.kv_proj = nn.Linear(width, out, bias=False)
        self.ln_kv = nn.LayerNorm(out, eps=1e-6)
        self.ln_q = nn.LayerNorm(out, eps=1e-6)
        self.query = nn.Parameter(torch.empty(n_queries, out))
        self.pos_embed = nn.Parameter(torch.empty(n_queries, out))
        self.attn = ResamplerAttention(out)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).unsqueeze(0)
        return self.attn(query, patches + self.pos_embed, patches)


class Vision(nn.Module):
    """Vision model: uint8 [N, side, side, 3] -> [N, 256, hidden]."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, patch, out = sizes["width"], sizes["patch_size"], sizes["output_dim"]
        if (sizes["image_size"] // patch) ** 2 != N_POSITIONS or sizes["n_queries"] != N_POSITIONS:
            raise ValueError("the patch grid and the queries must be 16 x 16")
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(N_POSITIONS, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        blocks = [
            VisionBlock(width, sizes["heads"], int(width * sizes["mlp_ratio"]))
            for _ in range(sizes["layers"])
        ]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.attn_pool = Resampler(N_POSITIONS, width, out)
        self.ln_post = nn.LayerNorm(out, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(out, out))
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.features((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)

    def features(self, pixels: Tensor) -> Tensor:
        """Compute features from normalised pixels, float32 [N, 3, side, side]."""
        tokens = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = self.ln_pre(tokens + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, hidden = x.shape
        query, key, value = self.c_attn(x).view(b, t, 3, self.heads, -1).unbind(2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return self.c_proj(mixed.transpose(1, 2).reshape(b, t, hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, mlp = config["hidden_size"], config["intermediate_size"] // 2
        self.ln_1 = RMSNorm(hidden, config["layer_norm_epsilon"])
        self.attn = Attention(hidden, config["num_attention_heads"])
        self.ln_2 = RMSNorm(hidden, config["layer_norm_epsilon"])
        self.mlp = nn.ModuleDict(
            {
                "w1": nn.Linear(hidden, mlp, bias=False),
                "w2": nn.Linear(hidden, mlp, bias=False),
                "c_proj": nn.Linear(mlp, hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos, sin)
        y = self.ln_2(x)
        return x + self.mlp["c_proj"](self.mlp["w1"](y) * F.silu(self.mlp["w2"](y)))


class QwenVL(nn.Module):
    """Qwen-VL. Its parameters have canonical names: Hugging Face's without the prefix `transformer.`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.wte = nn.Embedding(vocab, hidden)
        self.h = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.ln_f = RMSNorm(hidden, config["layer_norm_epsilon"])
        self.visual = Vision(config["visual"])
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        exponents = torch.arange(0, config["kv_channels"], 2) / config["kv_channels"]
        angles = torch.arange(config["seq_length"])[:, None] * config["rotary_emb_base"] ** -exponents
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None], persistent=False)
        self._initialise(config["num_hidden_layers"], config["visual"]["layers"])

    def hidden(self, ids: Tensor, features: Tensor, starts: Tensor) -> Tensor:
        """Compute normalised hidden states [batch, tokens, hidden].

        Args:
            ids: [batch, tokens].
            features: image features, [batch * images, 256, hidden].
            starts: positions of `<img>`, [batch, images].
        """
        batch, length = ids.shape
        x = self.wte(ids)
        slots = starts[:, :, None] + 1 + torch.arange(features.shape[1], device=ids.device)
        index = slots.view(batch, -1, 1).expand(-1, -1, x.shape[-1])
        x = x.scatter(1, index, features.reshape(batch, -1, x.shape[-1]).to(x.dtype))
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        for layer in self.h:
            x = layer(x, cos, sin)
        return self.ln_f(x)

    def loss(self, images: Tensor, ids: Tensor, starts: Tensor, at: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens after the positions `at`.

        Args:
            images: as for Vision, those of a row one after another, [batch * images, side, side, 3].
            ids, starts: as for `hidden`.
            at: [batch, maximum number of learned tokens], padded with -1.
        """
        hidden = self.hidden(ids, self.visual(images), starts)
        index = at.clamp(min=0)
        logits = self.lm_head(hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1])))
        targets = ids.gather(1, index + 1).masked_fill(at < 0, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def _initialise(self, layers: int, vision_layers: int) -> None:
        """Initialise matrices with variance 1 / inputs, and those named c_proj or out_proj with 1 / (2 * depth) of it.

        The depth is `vision_layers` for the matrices of vision blocks, else `layers`. All c_proj and out_proj are the
        last matrices of residual branches, except for the resampler's out_proj. The embedding of tokens and the
        position tables have their own initial values.
        """
        for name, tensor in self.named_parameters():
            if tensor.dim() == 1:
                continue
            depth = vision_layers if "resblocks" in name else layers
            scale = (2 * depth) ** -0.5 if name.endswith(("c_proj.weight", "out_proj.weight")) else 1.0
            inputs = tensor[0].numel()
            nn.init.normal_(tensor, std=scale * inputs**-0.5)
        nn.init.normal_(self.wte.weight, std=0.3)
        for name in ("visual.positional_embedding", "visual.attn_pool.pos_embed"):
            table = self.get_parameter(name)
            table.data.copy_(sincos(16, table.shape[1]))


def sincos(side: int, width: int) -> Tensor:
    """Position table [side * side, width]: sines and cosines of the row, then of the column."""
    n_frequencies = width // 4
    frequencies = math.pi / 2 ** torch.linspace(0, math.log2(side), n_frequencies)
    positions = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    parts = []
    for coordinate in (rows, columns):
        angles = coordinate.flatten()[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)
