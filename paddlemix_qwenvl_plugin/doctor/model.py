"""Check of a model folder: the checkpoint of `qwenvl doctor --model_name_or_path`."""

from __future__ import annotations

from pathlib import Path

from paddlemix_qwenvl_plugin.doctor.probe import ask
from paddlemix_qwenvl_plugin.doctor.report import Check
from paddlemix_qwenvl_plugin.util.errors import UsageError

# Keys of questions.model's result.
_FACTS = (
    "scheme",
    "dtype",
    "parameters",
    "language_layers",
    "hidden_size",
    "vocab_size",
    "vision_layers",
    "tokenizer",
)
_TIMEOUT = 1800.0  # seconds; ample for a large checkpoint on a slow disk


def check_model(folder: Path) -> Check:
    """Check in a separate process that a model folder can be opened, and report its contents.

    Raises:
        UsageError: the folder does not exist, or has no config.json or no weights.
    """
    answer = ask("model", str(folder), timeout=_TIMEOUT)
    facts = answer.value
    data = {"path": str(folder), **{name: facts.get(name) for name in _FACTS}, "cause": answer.cause}
    if answer.cause is not None:
        if answer.usage:
            raise UsageError(answer.cause)
        return Check("model", "problem", f"model: {answer.cause}", data=data)
    message = (
        f"model {folder}: {facts['scheme']} names, {facts['dtype']}, {facts['parameters']:,} parameters, "
        f"{facts['language_layers']} language layers of {facts['hidden_size']}, "
        f"{facts['vision_layers']} vision layers"
    )
    if facts["tokenizer"] is None:
        return Check(
            "model", "note", f"{message}; it has no qwen.tiktoken, which generation needs", data=data
        )
    return Check("model", "ok", message, data=data)
