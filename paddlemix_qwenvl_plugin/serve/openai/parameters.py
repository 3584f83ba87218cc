"""The parameters that chat completions and completions share."""

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
    include_usage: Annotated[
        Optional[bool], Field(description="Send the usage in a last chunk, without choices.")
    ] = None
    include_obfuscation: Annotated[Optional[bool], Field(description="Accepted; chunks are not padded.")] = (
        None
    )


class SamplingParameters(Schema):
    """How to pick tokens and when to stop.

    Greedy unless temperature, top_p or top_k is given, as everywhere in this package: boxes are at their best so, and
    the same question has the same answer. Then temperature and top_p are 1 where they are not given, as OpenAI's.
    """

    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"logit_bias": ()}

    model: Annotated[str, Field(description="A name that /v1/models lists.")]
    max_tokens: Annotated[
        Optional[int], Field(ge=1, description="Most tokens of a completion; default: the server's.")
    ] = None
    min_tokens: Annotated[
        Optional[int], Field(ge=0, description="Fewest tokens before a stop token may end a completion.")
    ] = None
    temperature: Annotated[
        Optional[float],
        Field(ge=0, le=2, description="0, or none of this, top_p and top_k: the likeliest token."),
    ] = None
    top_p: Annotated[
        Optional[float], Field(ge=0, le=1, description="Sample among the likeliest that make up this much.")
    ] = None
    top_k: Annotated[
        Optional[int], Field(ge=-1, description="Sample among this many likeliest; 0 and -1: among all.")
    ] = None
    presence_penalty: Annotated[
        Optional[float], Field(ge=-2, le=2, description="Taken off the logit of a generated token once.")
    ] = None
    frequency_penalty: Annotated[
        Optional[float], Field(ge=-2, le=2, description="Taken off such a logit for each time.")
    ] = None
    repetition_penalty: Annotated[
        Optional[float], Field(ge=0.01, le=100, description="Divides the logits of generated tokens.")
    ] = None
    seed: Annotated[
        Optional[int],
        Field(
            ge=-(2**63),
            lt=2**64,
            description="Of the sampling, a different one derived for each choice; default: fresh randomness.",
        ),
    ] = None
    stop: Annotated[
        Optional[Union[StopString, Annotated[list[StopString], Field(max_length=4)]]],
        Field(description="The completion ends before the first of these strings that is complete in it."),
    ] = None
    n: Annotated[
        Optional[int],
        Field(ge=1, le=128, description="Completions of a prompt; all the same without a temperature."),
    ] = None
    stream: Annotated[Optional[bool], Field(description="Send the completion in events.")] = None
    stream_options: Optional[StreamOptions] = None
    user: Annotated[Optional[str], Field(description="Accepted and not used.")] = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, settings: ServeSettings) -> GenerationOptions:
        """These parameters within the server's limits.

        Raises:
            ApiError: one is over its limit, or needs another one.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options: only with stream: true", param="stream_options", code="invalid_value"
            )
        if (self.n or 1) > settings.max_choices:
            raise too_large("n", self.n, settings.max_choices)
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k if self.top_k and self.top_k > 0 else None,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        most = self._max_new_tokens(settings)
        if (self.min_tokens or 0) > most:
            raise ApiError(
                400,
                f"min_tokens: {self.min_tokens} is more than the most tokens of this completion, {most}",
                param="min_tokens",
                code="invalid_value",
            )
        return GenerationOptions.of(
            {"max_new_tokens": most, "min_new_tokens": self.min_tokens or 0, **chosen}
        )

    @property
    def asked_max_tokens(self) -> tuple[str, Optional[int]]:
        """Most tokens of a completion, if the request says so, and the parameter that does."""
        return "max_tokens", self.max_tokens

    def _max_new_tokens(self, settings: ServeSettings) -> int:
        param, asked = self.asked_max_tokens
        if asked is None:
            return min(settings.default_max_new_tokens, settings.max_new_tokens)
        if asked > settings.max_new_tokens:
            raise too_large(param, asked, settings.max_new_tokens)
        return asked


def too_large(what: str, value: object, limit: int, param: Optional[str] = None) -> ApiError:
    """The error of a value over its limit."""
    return ApiError(
        400,
        f"{what}: {value} is too large, this server allows {limit}",
        param=param or what,
        code="invalid_value",
    )
