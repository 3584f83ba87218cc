"""Log probabilities in OpenAI's formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.serve.openai.completion_text import PlacedToken

# OpenAI's value for a very unlikely token; here for one of probability 0, since JSON has no infinity.
_MIN_LOGPROB = -9999.0


def of_chat(tokenizer: QwenTokenizer, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice or of its chunk."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = tokenizer.token_bytes(token_id)
        return {
            "token": token_bytes.decode("utf-8", "replace"),
            "logprob": max(logprob, _MIN_LOGPROB),
            "bytes": list(token_bytes),
        }

    content = [
        {
            **entry(token.id, _required(token.logprob)),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.top],
        }
        for token, _ in tokens
    ]
    return {"content": content, "refusal": None}


def of_text(tokenizer: QwenTokenizer, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
    """Return the `logprobs` of a text choice or of its chunk; `text_offset` counts characters of the completion."""

    def name(token_id: int) -> str:
        """Write a token as OpenAI does: a token that is no valid UTF-8 as escaped bytes, so that names are unique."""
        token_bytes = tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    return {
        "tokens": [name(token.id) for token, _ in tokens],
        "token_logprobs": [max(_required(token.logprob), _MIN_LOGPROB) for token, _ in tokens],
        "top_logprobs": [
            {name(token_id): max(logprob, _MIN_LOGPROB) for token_id, logprob in token.top}
            for token, _ in tokens
        ],
        "text_offset": [start for _, start in tokens],
    }


def _required(logprob: object) -> float:
    if not isinstance(logprob, float):
        raise AssertionError("the engine returned a token without the requested log probability")
    return logprob
