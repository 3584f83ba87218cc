"""Request parameters shared by chat completions and completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Optional, Union

from pydantic import Field

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.schema import Schema
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Schema):
    """Options of a streamed response."""

    include_usage: Annotated[
        Optional[bool], Field(description="Send the usage in a last chunk without choices.")
    ] = None
    include_obfuscation: Annotated[Optional[bool], Field(description="Ignored: chunks are not padded.")] = (
        None
    )


class SamplingParameters(Schema):
    """Sampling parameters and stop conditions.

    Without temperature, top_p and top_k, sampling is greedy, as everywhere in this package: greedy boxes are the most
    accurate, and the same question gets the same answer. If one of these parameters is set, temperature and top_p
    default to 1, as in OpenAI's API. A top_k of 0 or -1 counts as not set.
    """

    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"logit_bias": ()}  # see Schema

    model: Annotated[str, Field(description="A name that /v1/models lists.")]
    max_tokens: Annotated[
        Optional[int], Field(ge=1, description="Maximum tokens of a completion; default: the server's.")
    ] = None
    min_tokens: Annotated[
        Optional[int], Field(ge=0, description="Minimum tokens before a stop token may end a completion.")
    ] = None
    temperature: Annotated[
        Optional[float],
        Field(
            ge=0,
            le=2,
            description="Sampling temperature. Greedy if 0, or if top_p and top_k are not set either.",
        ),
    ] = None
    top_p: Annotated[
        Optional[float],
        Field(ge=0, le=1, description="Sample from the most likely tokens with this total probability."),
    ] = None
    top_k: Annotated[
        Optional[int],
        Field(ge=-1, description="Sample from this number of most likely tokens; 0 and -1: from all."),
    ] = None
    presence_penalty: Annotated[
        Optional[float],
        Field(ge=-2, le=2, description="Subtracted once from the logit of a generated token."),
    ] = None
    frequency_penalty: Annotated[
        Optional[float],
        Field(ge=-2, le=2, description="Subtracted from a token's logit for each of its occurrences."),
    ] = None
    repetition_penalty: Annotated[
        Optional[float],
        Field(
            ge=0.01,
            le=100,
            description="Divides positive logits of generated tokens, multiplies negative ones.",
        ),
    ] = None
    seed: Annotated[
        Optional[int],
        Field(
            ge=-(2**63),
            lt=2**64,
            description="Seed of the sampling; each choice derives its own. Default: random.",
        ),
    ] = None
    stop: Annotated[
        Optional[Union[StopString, Annotated[list[StopString], Field(max_length=4)]]],
        Field(description="Stop strings: the completion ends before the first one that it contains."),
    ] = None
    n: Annotated[
        Optional[int],
        Field(ge=1, le=128, description="Number of completions of a prompt; identical if greedy."),
    ] = None
    stream: Annotated[Optional[bool], Field(description="Stream the completion as server-sent events.")] = (
        None
    )
    stream_options: Optional[StreamOptions] = None
    user: Annotated[Optional[str], Field(description="Ignored.")] = None

    @property
    def stop_strings(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, settings: ServeSettings) -> GenerationOptions:
        """Convert the parameters to GenerationOptions within the server's limits.

        Raises:
            ApiError: a parameter exceeds its limit or requires another parameter.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options: only with stream: true", param="stream_options", code="invalid_value"
            )
        if (self.n or 1) > settings.max_choices:
            raise too_large("n", self.n, settings.max_choices)
        parameters = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k if self.top_k and self.top_k > 0 else None,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            # OpenAI's seeds may be negative, those of GenerationOptions may not.
            "seed": None if self.seed is None else self.seed % 2**64,
        }
        set_parameters = {name: value for name, value in parameters.items() if value is not None}
        limit = self._max_new_tokens(settings)
        if (self.min_tokens or 0) > limit:
            raise ApiError(
                400,
                f"min_tokens: {self.min_tokens} exceeds the maximum tokens of this completion, {limit}",
                param="min_tokens",
                code="invalid_value",
            )
        return GenerationOptions.of(
            {"max_new_tokens": limit, "min_new_tokens": self.min_tokens or 0, **set_parameters}
        )

    @property
    def requested_max_tokens(self) -> tuple[str, Optional[int]]:
        """Parameter name and value of the requested maximum tokens of a completion."""
        return "max_tokens", self.max_tokens

    def _max_new_tokens(self, settings: ServeSettings) -> int:
        """Maximum tokens of a completion: the request's, else the server's default."""
        param, requested = self.requested_max_tokens
        if requested is None:
            return min(settings.default_max_new_tokens, settings.max_new_tokens)
        if requested > settings.max_new_tokens:
            raise too_large(param, requested, settings.max_new_tokens)
        return requested


def too_large(name: str, value: object, limit: int, param: Optional[str] = None) -> ApiError:
    """Create the error of a value over its limit; `param` is by default the `name` in the message."""
    return ApiError(
        400,
        f"{name}: {value} is too large, this server allows {limit}",
        param=param or name,
        code="invalid_value",
    )
