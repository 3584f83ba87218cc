"""Portable form of the language stage: generation in Paddle operators, as a complete `while` loop or step by step.

The semantics are those of upstream's stock graph (order of penalties, stop flags, positions), with two corrections.
Dynamic NTK and logn, which the stock graph lacks, are applied. The last of `max_length` tokens is returned; the stock
graph's operators overwrite it with the stop token. Source of the formulas: PaddleNLP's generation operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.modeling import ops
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel

# Logit of a forbidden token, as in upstream.
FORBIDDEN = -1e10


class StockGeneration(nn.Layer):
    """Generation of complete completions, with the stock predictor's inputs and outputs and an output `tokens`.

    Exported as the stock program; PaddleNLP's dynamic predictor runs it without an export
    (upstream/inference_model.py).
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = model.config.vocab_size

    def forward(
        self,
        input_ids: paddle.Tensor,
        image_features: paddle.Tensor,
        img_pos: paddle.Tensor,
        attention_mask: paddle.Tensor,
        position_ids: paddle.Tensor,
        penalty_score: paddle.Tensor,
        frequency_score: paddle.Tensor,
        presence_score: paddle.Tensor,
        min_length: paddle.Tensor,
        max_length: paddle.Tensor,
        temperature: paddle.Tensor,
        top_p: paddle.Tensor,
        eos_token_id: paddle.Tensor,
        seq_len_encoder: paddle.Tensor,
        seq_len_decoder: paddle.Tensor,
        step_idx: paddle.Tensor,
        stop_flags: paddle.Tensor,
        tgt_ids: paddle.Tensor,
        tgt_pos: paddle.Tensor,
        tgt_generation_mask: paddle.Tensor,
        pre_ids: paddle.Tensor,
        stop_nums: paddle.Tensor,
        cache_kvs: list[paddle.Tensor],
    ) -> tuple[paddle.Tensor, ...]:
        """Generate until `stop_nums` rows have stopped. Shapes and dtypes: artifact/contract.py.

        Some inputs are part of the contract, but are not read: the masks, which follow from the lengths, and `pre_ids`,
        `tgt_ids` and the caches, workspace of the stock graph with arbitrary values.

        Returns:
            next_tokens int64 [B, 1], step_idx int64 [B, 1], stop_flags int32 [B, 1], seq_len_decoder int32 [B, 1],
            tgt_pos int64 [B, 1], and tokens int64 [B, max(max_length)], -1 after the end of a row.
        """
        vocabulary = ops.iota(self.vocab_size)
        matches = (vocabulary.unsqueeze(0) == eos_token_id.unsqueeze(1)).astype("int32")
        is_stop = ops.total(matches, 0).flatten() > 0  # [vocab_size]
        n_tokens = paddle.shape(input_ids)[1]
        columns = paddle.arange(max_length.max(), dtype="int64").unsqueeze(0)  # of the output `tokens`

        def pick(logits: paddle.Tensor, counts: paddle.Tensor, n_done: paddle.Tensor) -> paddle.Tensor:
            forbidden = (n_done < min_length).astype("float32") * is_stop.astype("float32").unsqueeze(0)
            logits = paddle.where(forbidden > 0, paddle.full_like(logits, FORBIDDEN), logits)
            logits = penalise(logits, counts, penalty_score, frequency_score, presence_score)
            return sample(logits, temperature, top_p)

        def advance(logits: paddle.Tensor, state: list[Any]) -> list[Any]:
            """Choose one token per row from the logits and update the state of the rows, described at `state`."""
            step, token, n_done, stopped, length, position, counts, tokens = state
            picked = pick(logits, counts, n_done)
            token = paddle.where(stopped, token, picked)
            running = ops.logical_not(stopped)
            is_written = ops.logical_and(columns == step, running)
            tokens = paddle.where(is_written, token, tokens)
            one_hot = (vocabulary.unsqueeze(0) == token).astype("int64")
            counts = counts + one_hot * running.astype("int64")
            n_done = n_done + running.astype("int64")
            is_stop_token = paddle.gather(is_stop.astype("int32"), token.flatten()).reshape([-1, 1]) > 0
            stopped = ops.logical_or(stopped, ops.logical_or(is_stop_token, n_done >= max_length))
            length = paddle.where(stopped, paddle.zeros_like(length), length)
            position = position + running.astype("int64")
            return [step + 1, token, n_done, stopped, length, position, counts, tokens]

        embeddings = self.model.embed(input_ids, image_features, img_pos)
        logits, caches = self.model(embeddings, position_ids, seq_len_encoder, seq_len_encoder)
        indices = paddle.arange(n_tokens, dtype="int64").unsqueeze(0)
        prompt_valid = indices < seq_len_encoder.astype("int64")  # False for padding
        zeros = paddle.zeros_like(tgt_pos)  # [B, 1]
        state = [
            paddle.zeros([1], dtype="int64"),  # step
            zeros,  # token
            step_idx,  # n_done: number of generated tokens
            ops.logical_or(stop_flags, max_length < 1),  # stopped
            seq_len_decoder,  # length: number of cached tokens; 0 after the end of the row
            tgt_pos,  # position of the row's last token
            paddle.zeros([1, self.vocab_size], dtype="int64") + zeros,  # counts [B, vocab_size]
            columns * 0 + zeros - 1,  # tokens [B, max(max_length)]
        ]
        state = advance(logits, state)
        flat_caches = [tensor for cache in caches for tensor in cache]

        def unfinished(*loop: paddle.Tensor) -> paddle.Tensor:
            stopped = loop[3]
            return ops.total(stopped.astype("int64")) < stop_nums

        def decode(*loop: paddle.Tensor) -> list[paddle.Tensor]:
            # The 8 tensors of `state`, the validity of the cache entries, and the layers' keys and values.
            state, cache_valid, flat = list(loop[:8]), loop[8], loop[9:]
            token, stopped, length, position = state[1], state[3], state[4], state[5]
            layer_caches = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
            ones = paddle.ones_like(token)  # number of new tokens of each row
            logits, caches = self.model(
                self.model.embed_tokens(token),
                position,
                seq_len_encoder,
                ones,
                cache_valid=cache_valid,
                caches=layer_caches,
            )
            state[4] = paddle.where(stopped, length, length + 1)
            state = advance(logits, state)
            cache_valid = paddle.concat([cache_valid, ones.astype("bool")], axis=1)
            return [*state, cache_valid, *(tensor for cache in caches for tensor in cache)]

        loop = repeat(unfinished, decode, [*state, prompt_valid, *flat_caches])
        _, token, n_done, stopped, length, position, _, tokens = loop[:8]
        return token, n_done, stopped.astype("int32"), length, position, tokens


class Step(nn.Layer):
    """Step program: one forward pass over a chunk of each row; the caller, the portable executor, runs the loop."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: paddle.Tensor,
        image_features: paddle.Tensor,
        img_pos: paddle.Tensor,
        seq_len: paddle.Tensor,
        past_len: paddle.Tensor,
        prompt_len: paddle.Tensor,
        cache_valid: paddle.Tensor,
        cache_kvs: list[paddle.Tensor],
    ) -> tuple[paddle.Tensor, ...]:
        """Run one step. Shapes and dtypes: artifact/contract.py.

        Returns:
            logits float32 [B, vocab_size] of each row's last token, then the keys and values of every layer, each
            [B, heads, P + S, head_dim] for P entries of the given cache and S new tokens.
        """
        indices = paddle.arange(paddle.shape(input_ids)[1], dtype="int64").unsqueeze(0)
        logits, caches = self.model(
            self.model.embed(input_ids, image_features, img_pos),
            past_len + indices,
            prompt_len,
            seq_len,
            cache_valid,
            [(cache_kvs[i], cache_kvs[i + 1]) for i in range(0, len(cache_kvs), 2)],
        )
        return (logits, *(tensor for cache in caches for tensor in cache))


def repeat(condition: Callable[..., Any], body: Callable[..., list[Any]], loop: list[Any]) -> list[Any]:
    """Run a while loop. In dynamic mode it runs in Python, since Paddle's while_loop rejects tensors that grow."""
    if not paddle.in_dynamic_mode():
        looped: list[Any] = paddle.static.nn.while_loop(condition, body, loop)
        return looped
    while bool(condition(*loop)):
        loop = body(*loop)
    return loop


def penalise(
    logits: paddle.Tensor,
    counts: paddle.Tensor,
    repetition: paddle.Tensor,
    frequency: paddle.Tensor,
    presence: paddle.Tensor,
) -> paddle.Tensor:
    """Apply the repetition, frequency and presence penalties to the logits of generated tokens.

    Args:
        logits: float32 [B, V].
        counts: int64 [B, V], how often each token was generated in the row.
        repetition, frequency, presence: float32 [B, 1]; 1, 0, 0 leave the logits unchanged.
    """
    scaled = paddle.where(logits < 0, logits * repetition, logits / repetition)
    lowered = scaled - counts.astype("float32") * frequency - presence
    return paddle.where(counts > 0, lowered, logits)


def sample(logits: paddle.Tensor, temperature: paddle.Tensor, top_p: paddle.Tensor) -> paddle.Tensor:
    """Sample one token per row from the smallest set of tokens whose probabilities reach top_p (0: greedy).

    Args:
        logits: float32 [B, V].
        temperature, top_p: float32 [B, 1].

    Returns:
        int64 [B, 1].
    """
    # Greedy and sampled tokens are both computed: the sort takes too little time to justify a conditional block.
    probabilities = nn.functional.softmax(logits / paddle.clip(temperature, min=1e-6), axis=-1)
    order = paddle.argsort(probabilities, axis=-1, descending=True)
    sorted_probabilities = paddle.take_along_axis(probabilities, order, axis=-1)
    more_likely = paddle.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    kept = paddle.where(more_likely < top_p, sorted_probabilities, paddle.zeros_like(sorted_probabilities))
    cumulative = paddle.cumsum(kept, axis=-1)
    drawn = paddle.rand(paddle.shape(top_p), dtype="float32") * cumulative[:, -1:]
    index = paddle.clip(ops.total((cumulative <= drawn).astype("int64"), -1), max=logits.shape[-1] - 1)
    return paddle.where(top_p > 0, paddle.take_along_axis(order, index, axis=-1), ops.argmax(logits))
