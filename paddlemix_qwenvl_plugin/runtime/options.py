"""Sampling parameters and length limits of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Callable, Optional

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from paddlemix_qwenvl_plugin.util.errors import UsageError


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class GenerationOptions:
    """Sampling parameters and length limits of a generation.

    Greedy if none of `temperature`, `top_p` and `top_k` is given, or with temperature 0, top-p 0 or top-k 1. The order
    of operations on the logits is upstream's: stop tokens are forbidden until there are `min_new_tokens` tokens; then
    penalties, temperature, top-k and top-p. Penalties count generated tokens only. Every row of a batch has a separate
    random generator seeded with `seed`, so that for a given seed, a row generates the same tokens alone and in a batch.

    The command line's flags, defaults and help texts are generated from these fields (cli/options.py). The ranges of
    temperature, top-p and penalties lie within the engine's (csrc/core/checks.cc). `top_k` may exceed the size of the
    vocabulary, and `seed` counts modulo 2^64.

    Raises:
        UsageError: an unknown option, or a value of a wrong type or out of range; the message names the option.
    """

    max_new_tokens: Annotated[int, Field(ge=1, description="Maximum number of generated tokens.")] = 512
    min_new_tokens: Annotated[
        int, Field(ge=0, description="Number of generated tokens before a stop token may end an answer.")
    ] = 0
    temperature: Annotated[
        Optional[float],
        Field(
            ge=0, le=100, description="Sampling temperature; greedy if neither this, top_p nor top_k is set."
        ),
    ] = None
    top_p: Annotated[
        Optional[float],
        Field(
            ge=0, le=1, description="Sample from the most likely tokens up to this cumulative probability."
        ),
    ] = None
    top_k: Annotated[
        Optional[int], Field(ge=1, description="Sample from this number of the most likely tokens.")
    ] = None
    repetition_penalty: Annotated[
        float,
        Field(
            ge=0.01,
            le=100,
            description="Divides positive logits of tokens generated so far, multiplies negative ones.",
        ),
    ] = 1.0
    frequency_penalty: Annotated[
        float,
        Field(ge=-100, le=100, description="Subtracted from a token's logit for each of its occurrences."),
    ] = 0.0
    presence_penalty: Annotated[
        float, Field(ge=-100, le=100, description="Subtracted once from the logit of a generated token.")
    ] = 0.0
    seed: Annotated[Optional[int], Field(ge=0, description="Seed of the sampling; random by default.")] = None

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_errors(cls, values: Any, validate: Callable[[Any], GenerationOptions]) -> GenerationOptions:
        try:
            options = validate(values)
        except ValidationError as error:
            raise UsageError(_problem_line(error)) from None
        if options.min_new_tokens > options.max_new_tokens:
            allowed = f"at most max_new_tokens ({options.max_new_tokens})"
            raise UsageError(
                f"min_new_tokens: {options.min_new_tokens} is out of range; it must be {allowed}"
            )
        return options

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """Create options from keyword arguments."""
        return cls(**values)

    def within(self, room: int) -> GenerationOptions:
        """A copy of the options with at most `room` new tokens."""
        if self.max_new_tokens <= room:
            return self
        return replace(self, max_new_tokens=room, min_new_tokens=min(self.min_new_tokens, room))

    @property
    def greedy(self) -> bool:
        """Whether every generated token is the most likely one."""
        sampling = (self.temperature, self.top_p, self.top_k)
        return sampling == (None, None, None) or self.temperature == 0 or self.top_p == 0 or self.top_k == 1


def described() -> dict[str, FieldInfo]:
    """The options' fields by name: type, default, description and limits."""
    return dict(GenerationOptions.__pydantic_fields__)  # type: ignore[attr-defined]


def allowed(field: FieldInfo) -> str:
    """Describe the range of a field's values, of an option or of a server setting: "at least 1", "0 to 100"."""
    limits = {
        name: getattr(limit, name)
        for limit in field.metadata
        for name in ("ge", "gt", "le")
        if hasattr(limit, name)
    }
    if "le" not in limits:
        return f"at least {limits['ge']}" if "ge" in limits else f"over {limits['gt']}"
    if "gt" in limits:
        return f"over {limits['gt']}, up to {limits['le']}"
    return f"{limits['ge']} to {limits['le']}"


def _problem_line(error: ValidationError) -> str:
    """Format the first invalid option as one line; unknown options take precedence."""
    problems = error.errors(include_url=False)
    unknown = next(
        (problem for problem in problems if problem["type"] == "unexpected_keyword_argument"), None
    )
    problem = unknown or problems[0]
    name, value = problem["loc"][0], problem["input"]
    if unknown is not None:
        names = ", ".join(sorted(field.name for field in fields(GenerationOptions)))
        return f"{name}: unknown option; known are {names}"
    if problem["type"] in ("int_type", "float_type"):
        return f"{name}: {value!r} is not a{' whole' if problem['type'] == 'int_type' else ''} number"
    return f"{name}: {value} is out of range; it must be {allowed(described()[str(name)])}"
