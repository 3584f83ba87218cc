"""Flags shared by commands."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from paddlemix_qwenvl_plugin.cli.ray_options import with_ray_default
from paddlemix_qwenvl_plugin.util.errors import UsageError

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.processing.images import ImageLimits
    from paddlemix_qwenvl_plugin.runtime.model import Model
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

FirstModelPath = Annotated[Path, typer.Option("--first_model_path", help="Exported vision stage (prefix).")]
SecondModelPath = Annotated[
    Path, typer.Option("--second_model_path", help="Exported language stage (prefix).")
]
ModelFolder = Annotated[
    Optional[Path],
    typer.Option("--model_name_or_path", help="Tokenizer folder; default: the language stage's folder."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, gpu or gpu:N.")]
GpuMemory = Annotated[
    float,
    typer.Option(
        "--gpu_memory", help="Share that the KV cache may take of the GPU memory left by the weights."
    ),
]
QuantType = Annotated[
    Optional[str],
    typer.Option(
        "--quant_type",
        help="Quantization of the language model: weight_only_int8 or weight_only_int4; needs the engine.",
    ),
]
PictureLabel = Annotated[
    Optional[str],
    typer.Option(
        "--picture_label",
        help='Text before an image, {} for its number; default: the model\'s, "Picture {}: ".',
    ),
]
AllowHttp = Annotated[bool, typer.Option("--allow_http", help="Allow images from http(s) URLs.")]

AllowPrivateHttp = Annotated[
    bool,
    typer.Option("--allow_private_http", help="With --allow_http: allow addresses that are not public."),
]

Adapters = Annotated[
    Optional[list[str]],
    typer.Option(
        "--adapter",
        metavar="NAME=FOLDER",
        help="LoRA adapter, kept apart from the weights; may be repeated in qwenvl batch.",
    ),
]

Verify = Annotated[
    bool,
    typer.Option("--verify", help="Verify all files of the stages first."),
]


def with_flags(function: Callable[..., Any], **factories: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flags of the functions that make its arguments; evaluate its string annotations.

    A factory is a function that makes an object from flags, such as `open_model`, which makes a model. `factories` maps
    a parameter of the command to its factory, whose flags take the parameter's place on the command line. The command
    gets, as that parameter, a functools.partial of the factory with the values of the flags as keywords, and calls it
    without arguments; `batch_on_ray` also changes the keywords.

    The annotations are evaluated because on Python 3.9 typer does not find the options in strings (see `_flags`).
    """
    flags = {name: _flags(factory) for name, factory in factories.items()}

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        for name, factory in factories.items():
            values = {flag.name: arguments.pop(flag.name) for flag in flags[name]}
            arguments[name] = functools.partial(factory, **values)
        return function(**arguments)

    parameters = [flag for group in flags.values() for flag in group] + _flags(function, factories)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {flag.name: flag.annotation for flag in parameters}
    return command


def _flags(function: Callable[..., Any], excluded: Collection[str] = ()) -> list[inspect.Parameter]:
    """Parameters of a function of this package, with evaluated annotations, for typer to convert to flags."""
    # Not get_type_hints: it wraps annotations of parameters with default None in Optional, which hides them from typer.
    namespace = vars(sys.modules[function.__module__])
    return [
        flag.replace(annotation=eval(flag.annotation, namespace), kind=inspect.Parameter.KEYWORD_ONLY)
        for flag in inspect.signature(function).parameters.values()
        if flag.name not in excluded
    ]


def open_model(
    first_model_path: FirstModelPath,
    second_model_path: SecondModelPath,
    model: ModelFolder = None,
    device: Device = "cpu",
    gpu_memory: GpuMemory = 0.9,
    picture_label: PictureLabel = None,
    allow_http: AllowHttp = False,
    allow_private_http: AllowPrivateHttp = False,
    verify: Verify = False,
    adapter: Adapters = None,
) -> QwenVL:
    """Open the exported stages that the flags of `qwenvl predict` name."""
    from paddlemix_qwenvl_plugin.runtime.adapters import split_adapters
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    limits = _limits(allow_http, allow_private_http)
    opened = QwenVL.from_exported(
        first_model_path,
        second_model_path,
        model,
        device,
        allow_http,
        limits,
        verify,
        gpu_memory,
        split_adapters(adapter or ()),
    )
    if picture_label is not None:
        opened.tokenizer.picture_label = picture_label
    return opened


def open_model_or_server(
    first_model_path: Annotated[
        Optional[Path], typer.Option("--first_model_path", help="Exported vision stage (prefix).")
    ] = None,
    second_model_path: Annotated[
        Optional[Path], typer.Option("--second_model_path", help="Exported language stage (prefix).")
    ] = None,
    url: Annotated[
        Optional[str],
        typer.Option("--url", help="Use this server (qwenvl serve) instead of exported stages."),
    ] = None,
    api_key_file: Annotated[
        Optional[Path],
        typer.Option(
            "--api_key_file", help="File with the server's API key; default: variable QWENVL_API_KEY."
        ),
    ] = None,
    model: ModelFolder = None,
    device: Device = "cpu",
    gpu_memory: GpuMemory = 0.9,
    picture_label: PictureLabel = None,
    allow_http: AllowHttp = False,
    allow_private_http: AllowPrivateHttp = False,
    verify: Verify = False,
    adapter: Adapters = None,
) -> Model[Any]:
    """Open the exported stages that the flags of `qwenvl chat` or `qwenvl batch` name, or the model of a server."""
    if url is None:
        if api_key_file is not None:
            raise UsageError("--api_key_file: requires --url; give both")
        if first_model_path is None or second_model_path is None:
            raise UsageError("give --first_model_path and --second_model_path, or the --url of a server")
        return open_model(
            first_model_path,
            second_model_path,
            model,
            device,
            gpu_memory,
            picture_label,
            allow_http,
            allow_private_http,
            verify,
            adapter,
        )
    for flag, is_set in (
        ("first_model_path", first_model_path is not None),
        ("second_model_path", second_model_path is not None),
        ("model_name_or_path", model is not None),
        ("device", device != "cpu"),
        ("gpu_memory", gpu_memory != 0.9),
        ("picture_label", picture_label is not None),
        ("verify", verify),
        ("adapter", bool(adapter)),
    ):
        if is_set:
            raise UsageError(f"--{flag}: applies to exported stages only; remove it, or remove --url")
    from paddlemix_qwenvl_plugin.remote.access import check_url, read_key
    from paddlemix_qwenvl_plugin.remote.model import ServerModel
    from paddlemix_qwenvl_plugin.remote.server import Server

    server = Server(check_url(url), read_key(api_key_file))
    return ServerModel(server, allow_http, _limits(allow_http, allow_private_http))


def only_adapter(model: QwenVL | Model[Any]) -> Optional[str]:
    """Name of the only adapter of --adapter, for commands that accept one; None without --adapter or on a server.

    Raises:
        UsageError: several adapters were given.
    """
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    if not isinstance(model, QwenVL):
        return None
    if len(model.adapters) > 1:
        raise UsageError(
            "--adapter: this command answers with one adapter; give one (qwenvl batch takes several)"
        )
    return next(iter(model.adapters), None)


def _limits(allow_http: bool, allow_private_http: bool) -> Optional[ImageLimits]:
    from paddlemix_qwenvl_plugin.processing.images import ImageLimits

    if not allow_private_http:
        return None
    if not allow_http:
        raise UsageError("--allow_private_http: requires --allow_http; give both")
    return ImageLimits(allow_private=True)


class GenerationCommand(TyperCommand):
    """Command with a flag for each field of GenerationOptions; the options are in its context's `obj`.

    The flags are created on first use of the command: importing pydantic is too slow for `qwenvl --help`.
    """

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters, with the generation flags."""
        return [*super().get_params(ctx), *_generation_flags()]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; `--ray` of `qwenvl batch` may omit its address."""
        return super().parse_args(ctx, with_ray_default(args))

    def invoke(self, ctx: Any) -> Any:
        """Store the GenerationOptions in the context and run the command."""
        from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions, described

        ctx.obj = GenerationOptions.of({name: ctx.params.pop(name) for name in described()})
        return super().invoke(ctx)


@functools.cache
def _generation_flags() -> list[Any]:
    from paddlemix_qwenvl_plugin.runtime.options import allowed, described

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
    return click_parameters(parameters)


def click_parameters(parameters: Sequence[inspect.Parameter]) -> list[Any]:
    """Convert function parameters to click parameters with typer, for commands that create their flags on first use."""

    def command() -> None: ...

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [*typer.main.get_command(app).params]
