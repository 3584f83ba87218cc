"""The flags that commands share."""

from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Callable, Optional, TypeVar

import typer
from typer.core import TyperCommand

from paddlemix_qwenvl_plugin.util.errors import UsageError

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

F = TypeVar("F", bound=Callable[..., Any])

FirstModelPath = Annotated[Path, typer.Option("--first_model_path", help="Exported vision stage (prefix).")]
SecondModelPath = Annotated[
    Path, typer.Option("--second_model_path", help="Exported language stage (prefix).")
]
ModelFolder = Annotated[
    Optional[Path],
    typer.Option(
        "--model_name_or_path", help="Folder with the tokenizer; default: beside the language stage."
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, gpu or gpu:N.")]
GpuMemory = Annotated[
    float,
    typer.Option(
        "--gpu_memory", help="Share of the GPU memory beside the weights that the KV cache may take."
    ),
]
QuantType = Annotated[
    Optional[str],
    typer.Option(
        "--quant_type",
        help="Of the language model: weight_only_int8 or weight_only_int4; needs the engine.",
    ),
]
PictureLabel = Annotated[
    Optional[str],
    typer.Option(
        "--picture_label",
        help='Text before a picture, {} for its number; default: the model\'s, "Picture {}: ".',
    ),
]
AllowHttp = Annotated[bool, typer.Option("--allow_http", help="Let pictures come from http(s) URLs.")]

AllowPrivateHttp = Annotated[
    bool,
    typer.Option("--allow_private_http", help="And from addresses that are not public, as in this network."),
]


Verify = Annotated[
    bool,
    typer.Option("--verify", help="Read all files of the stages first, and compare them with the export."),
]


def evaluated(function: F) -> F:
    """The command with its annotations as objects: before Python 3.10 typer does not look into those that are text."""
    # Not get_type_hints, which makes an Optional of what has None for its default, around what typer looks for.
    names = vars(sys.modules[function.__module__])
    function.__annotations__ = {name: eval(text, names) for name, text in function.__annotations__.items()}
    return function


def open_model(
    vision: Path,
    language: Path,
    model: Optional[Path],
    device: str,
    picture_label: Optional[str],
    allow_http: bool,
    allow_private_http: bool,
    verify: bool,
    gpu_memory: float,
) -> QwenVL:
    """The predictor that these flags ask for."""
    from paddlemix_qwenvl_plugin.processing.images import ImageLimits
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    limits = None
    if allow_private_http:
        if not allow_http:
            raise UsageError("--allow_private_http: goes with --allow_http; give both")
        limits = ImageLimits(allow_private=True)
    pair = QwenVL.from_exported(vision, language, model, device, allow_http, limits, verify, gpu_memory)
    if picture_label is not None:
        pair.tokenizer.picture_label = picture_label
    return pair


class GenerationCommand(TyperCommand):
    """A command with a flag for each field of GenerationOptions; it finds the options in its context's `obj`.

    The flags are made when the command is asked for: pydantic takes too long to load for `qwenvl --help`.
    """

    def get_params(self, ctx: Any) -> Any:
        return [*super().get_params(ctx), *_generation_flags()]

    def invoke(self, ctx: Any) -> Any:
        from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions, described

        ctx.obj = GenerationOptions.of({name: ctx.params.pop(name) for name in described()})
        return super().invoke(ctx)


@functools.cache
def _generation_flags() -> list[Any]:
    from paddlemix_qwenvl_plugin.runtime.options import allowed, described

    def command() -> None: ...

    parameters = []
    for name, field in described().items():
        text = f"{(field.description or '').rstrip('.')} ({allowed(field)})."
        option = typer.Option(f"--{name}", help=text, rich_help_panel="Generation")
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[field.annotation, option],  # type: ignore[name-defined]
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [*typer.main.get_command(app).params]
