"""Log probabilities in OpenAI's forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.serve.openai.completion_text import PlacedToken

# What OpenAI writes for a token that cannot be: JSON has no infinity.
_LEAST = -9999.0


def of_chat(tokenizer: QwenTokenizer, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of its chunk."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        said = tokenizer.token_bytes(token_id)
        return {
            "token": said.decode("utf-8", "replace"),
            "logprob": max(logprob, _LEAST),
            "bytes": list(said),
        }

    content = [
        {**entry(token.id, _of(token.logprob)), "top_logprobs": [entry(*other) for other in token.top]}
        for token, _ in tokens
    ]
    return {"content": content, "refusal": None}


def of_text(tokenizer: QwenTokenizer, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
    """The `logprobs` of a text choice, or of its chunk; offsets count the completion's characters."""

    def name(token_id: int) -> str:
        """Tokens that are parts of characters stay different ones, as OpenAI writes them."""
        said = tokenizer.token_bytes(token_id)
        try:
            return said.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)

    return {
        "tokens": [name(token.id) for token, _ in tokens],
        "token_logprobs": [max(_of(token.logprob), _LEAST) for token, _ in tokens],
        "top_logprobs": [
            {name(token_id): max(logprob, _LEAST) for token_id, logprob in token.top} for token, _ in tokens
        ],
        "text_offset": [start for _, start in tokens],
    }


def _of(logprob: object) -> float:
    if not isinstance(logprob, float):
        raise AssertionError("the engine gave a token without the log probability that was asked for")
    return logprob
