"""The portable language model: embedding with image features, layers with a growing KV cache, last-token logits.

The KV cache is append-only. The rows of a batch may have prompts of different lengths, padded on the right. The cache
has entries for the padding, and a mask excludes them from attention.

For calibration, quantization/layer.py computes the inputs of both `c_proj` with `Attention.mix` and `Layer.gate`.
"""

from __future__ import annotations

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.modeling import ops
from paddlemix_qwenvl_plugin.modeling.layers import Linear, RMSNorm, attend, parameter_attr
from paddlemix_qwenvl_plugin.modeling.rotary import query_scale, rotary_tables, rotate

# Finite, since chunk_mask multiplies it by 0. exp(MASKED) is 0 in float32.
MASKED = -1e9


class Attention(nn.Layer):
    """Multi-head attention over the cache and the new tokens."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.c_attn = Linear(f"{name}.c_attn", config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Linear(f"{name}.c_proj", config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: paddle.Tensor, position: Position, cache: tuple[paddle.Tensor, paddle.Tensor] | None
    ) -> tuple[paddle.Tensor, tuple[paddle.Tensor, paddle.Tensor]]:
        """[B, S, hidden] -> [B, S, hidden], and the cache with the chunk's keys and values appended."""
        mixed, cache = self.mix(x, position, cache)
        return self.c_proj(mixed), cache

    def mix(
        self, x: paddle.Tensor, position: Position, cache: tuple[paddle.Tensor, paddle.Tensor] | None
    ) -> tuple[paddle.Tensor, tuple[paddle.Tensor, paddle.Tensor]]:
        """Attention before its output projection `c_proj`, and the cache with the chunk's keys and values appended."""
        qkv = self.c_attn(x).reshape([0, 0, 3 * self.heads, self.head_dim])
        query, key, value = paddle.split(qkv, 3, axis=2)
        query = rotate(query.astype("float32"), position.cos, position.sin) * position.query_scale
        key = rotate(key.astype("float32"), position.cos, position.sin)
        query, key, value = (tensor.astype(x.dtype).transpose([0, 2, 1, 3]) for tensor in (query, key, value))
        if cache is not None:
            key = paddle.concat([cache[0], key], axis=2)
            value = paddle.concat([cache[1], value], axis=2)
        return attend(query, key, value, position.mask), (key, value)


class Layer(nn.Layer):
    """Pre-norm decoder layer; the MLP is c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        hidden, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = RMSNorm(f"{name}.ln_1", hidden, epsilon)
        self.attn = Attention(f"{name}.attn", config)
        self.ln_2 = RMSNorm(f"{name}.ln_2", hidden, epsilon)
        self.w1 = Linear(f"{name}.mlp.w1", hidden, config.mlp_width, bias=False)
        self.w2 = Linear(f"{name}.mlp.w2", hidden, config.mlp_width, bias=False)
        self.c_proj = Linear(f"{name}.mlp.c_proj", config.mlp_width, hidden, bias=False)

    def forward(
        self, x: paddle.Tensor, position: Position, cache: tuple[paddle.Tensor, paddle.Tensor] | None
    ) -> tuple[paddle.Tensor, tuple[paddle.Tensor, paddle.Tensor]]:
        """[B, S, hidden] -> [B, S, hidden], and the cache with the chunk's keys and values appended."""
        mixed, cache = self.attn(self.ln_1(x), position, cache)
        x = x + mixed
        return x + self.c_proj(self.gate(self.ln_2(x))), cache

    def gate(self, normed: paddle.Tensor) -> paddle.Tensor:
        """[B, S, hidden] -> [B, S, mlp_width], the input of the MLP's `c_proj`."""
        return self.w1(normed) * nn.functional.silu(self.w2(normed))


class Position:
    """Position-dependent inputs of every layer: rotary tables, query scale and mask."""

    def __init__(
        self, positions: paddle.Tensor, prompt_len: paddle.Tensor, mask: paddle.Tensor, config: ModelConfig
    ) -> None:
        self.cos, self.sin = rotary_tables(positions, prompt_len, config)
        self.query_scale = query_scale(positions, config)
        self.mask = mask


class LanguageModel(nn.Layer):
    """Language model: token ids and image features -> logits.

    `forward` takes the embeddings of a chunk of each row: a complete prompt, the next chunk of a prompt, or the last
    generated token. `dtype` is the type of the activations and the KV cache.
    """

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.wte = self.create_parameter(
            [config.vocab_size, config.hidden_size], attr=parameter_attr("wte.weight")
        )
        self.layers = nn.LayerList([Layer(f"h.{i}", config) for i in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm("ln_f", config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = Linear("lm_head", config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        embeddings: paddle.Tensor,
        positions: paddle.Tensor,
        prompt_len: paddle.Tensor,
        seq_len: paddle.Tensor,
        cache_valid: paddle.Tensor | None = None,
        caches: list[tuple[paddle.Tensor, paddle.Tensor]] | None = None,
    ) -> tuple[paddle.Tensor, list[tuple[paddle.Tensor, paddle.Tensor]]]:
        """Run the layers on embeddings: logits of each row's last token, and the caches with the chunk appended.

        Args:
            embeddings: [B, S, hidden], from `embed` or `embed_tokens`; rows shorter than S are padded on the right.
            positions: int64 [B, S], the 0-based position of each token in its row.
            prompt_len: integer [B, 1], length of the complete prompt, which sets the rotary base.
            seq_len: integer [B, 1], number of the row's new tokens, at least 1; the rest of S is padding.
            cache_valid: bool [B, P], which of the P cache entries hold a token of the row, not padding; None without a
                cache.
            caches: per layer (key, value), each [B, heads, P, head_dim].

        Returns:
            float32 logits [B, vocab_size] of each row's last token, and the caches with P + S entries.
        """
        position = Position(positions, prompt_len, chunk_mask(positions, cache_valid), self.config)
        x, new_caches = embeddings, []
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, position, caches[i] if caches is not None else None)
            new_caches.append(cache)
        return self._logits(x, seq_len), new_caches

    def embed_tokens(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """Embed token ids: int64 [B, S] -> [B, S, hidden]."""
        return nn.functional.embedding(input_ids, self.wte).astype(self.dtype)

    def embed(
        self, input_ids: paddle.Tensor, image_features: paddle.Tensor, img_pos: paddle.Tensor
    ) -> paddle.Tensor:
        """Embed tokens, with the features of each image between its `<img>` and `</img>`.

        Args:
            input_ids: int64 [B, S].
            image_features: float32 [N, n_queries, hidden].
            img_pos: int64 [N, 3]: batch row, index of `<img>`, index of `</img>`. A negative row marks an
                absent image (Paddle programs cannot take empty tensors).

        Returns:
            [B, S, hidden].
        """
        hidden = self.config.hidden_size
        tokens = self.embed_tokens(input_ids)
        # Scatter runs in float32, which every Paddle device supports. The features of absent images go to an extra last
        # row, which is dropped.
        extra_row = paddle.zeros([1, hidden], dtype="float32")
        flat = paddle.concat([tokens.astype("float32").reshape([-1, hidden]), extra_row], axis=0)
        shape = paddle.shape(input_ids).astype("int64")
        row, start = img_pos[:, 0:1], img_pos[:, 1:2]
        slots = ops.iota(self.config.visual.n_queries).unsqueeze(0)
        index = row * shape[1] + start + 1 + slots
        index = paddle.where(row < 0, paddle.zeros_like(index) + shape[0] * shape[1], index)
        flat = paddle.scatter(flat, index.flatten(), image_features.astype("float32").reshape([-1, hidden]))
        return (
            flat[:-1].reshape(paddle.concat([shape, paddle.full([1], hidden, "int64")])).astype(tokens.dtype)
        )

    def _logits(self, x: paddle.Tensor, seq_len: paddle.Tensor) -> paddle.Tensor:
        shape = paddle.shape(x).astype("int64")
        row_starts = paddle.arange(shape[0], dtype="int64") * shape[1]
        last = row_starts + seq_len.astype("int64").flatten() - 1
        rows = paddle.gather(x.reshape([-1, self.config.hidden_size]), last)
        return self.lm_head(self.ln_f(rows)).astype("float32")


def chunk_mask(positions: paddle.Tensor, cache_valid: paddle.Tensor | None) -> paddle.Tensor:
    """Attention mask: 0 where a token of the chunk attends, MASKED elsewhere.

    float32 [B, 1, S, P + S] for S tokens per row after P cache entries; without a cache [1, 1, S, S], the same for all
    rows.

    Within the chunk the mask is causal, so that only padding attends to the padding, which is on the right.
    """
    n_tokens = paddle.shape(positions)[1]
    order = paddle.arange(n_tokens, dtype="int64")
    visible = (order.unsqueeze(1) >= order.unsqueeze(0)).astype("float32").unsqueeze(0)
    if cache_valid is not None:
        past = cache_valid.astype("float32").unsqueeze(1)
        rows = paddle.zeros_like(positions, dtype="float32").unsqueeze(-1)
        visible = paddle.concat([past + rows, visible + rows], axis=-1)
    return ((visible - 1.0) * -MASKED).unsqueeze(1)
