"""The flags that commands share."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

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


def evaluated(function: Callable[..., Any], **makers: Callable[..., Any]) -> Callable[..., Any]:
    """The command with its annotations as objects: before Python 3.10 typer does not look into those that are text.

    A parameter that `makers` has is no flag: in its place come the flags of its maker, and it gets the maker with them.
    """
    flags = {name: _flags(make) for name, make in makers.items()}

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        for name, make in makers.items():
            given[name] = functools.partial(make, **{flag.name: given.pop(flag.name) for flag in flags[name]})
        return function(**given)

    parameters = [flag for made in flags.values() for flag in made] + _flags(function, makers)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {flag.name: flag.annotation for flag in parameters}
    return command


def _flags(function: Callable[..., Any], but: Collection[str] = ()) -> list[inspect.Parameter]:
    """The parameters of a function of this package that typer makes flags of."""
    # Not get_type_hints, which makes an Optional of what has None for its default, around what typer looks for.
    names = vars(sys.modules[function.__module__])
    return [
        flag.replace(annotation=eval(flag.annotation, names), kind=inspect.Parameter.KEYWORD_ONLY)
        for flag in inspect.signature(function).parameters.values()
        if flag.name not in but
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
) -> QwenVL:
    """The predictor that these flags ask for."""
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    limits = _limits(allow_http, allow_private_http)
    model = QwenVL.from_exported(
        first_model_path, second_model_path, model, device, allow_http, limits, verify, gpu_memory
    )
    if picture_label is not None:
        model.tokenizer.picture_label = picture_label
    return model


def open_model_or_server(
    first_model_path: Annotated[
        Optional[Path], typer.Option("--first_model_path", help="Exported vision stage (prefix).")
    ] = None,
    second_model_path: Annotated[
        Optional[Path], typer.Option("--second_model_path", help="Exported language stage (prefix).")
    ] = None,
    url: Annotated[
        Optional[str],
        typer.Option("--url", help="Ask this server (qwenvl serve) in place of exported stages."),
    ] = None,
    api_key_file: Annotated[
        Optional[Path],
        typer.Option(
            "--api_key_file", help="File with the server's API key; default: the variable QWENVL_API_KEY."
        ),
    ] = None,
    model: ModelFolder = None,
    device: Device = "cpu",
    gpu_memory: GpuMemory = 0.9,
    picture_label: PictureLabel = None,
    allow_http: AllowHttp = False,
    allow_private_http: AllowPrivateHttp = False,
    verify: Verify = False,
) -> Model[Any]:
    """The predictor that these flags ask for, or the model of a server."""
    if url is None:
        if api_key_file is not None:
            raise UsageError("--api_key_file: goes with --url; give both")
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
        )
    for flag, given in (
        ("first_model_path", first_model_path is not None),
        ("second_model_path", second_model_path is not None),
        ("model_name_or_path", model is not None),
        ("device", device != "cpu"),
        ("gpu_memory", gpu_memory != 0.9),
        ("picture_label", picture_label is not None),
        ("verify", verify),
    ):
        if given:
            raise UsageError(f"--{flag}: is for exported stages; leave it out, or --url")
    from paddlemix_qwenvl_plugin.remote.access import check_url, read_key
    from paddlemix_qwenvl_plugin.remote.model import ServerModel
    from paddlemix_qwenvl_plugin.remote.server import Server

    server = Server(check_url(url), read_key(api_key_file))
    return ServerModel(server, allow_http, _limits(allow_http, allow_private_http))


def _limits(allow_http: bool, allow_private_http: bool) -> Optional[ImageLimits]:
    from paddlemix_qwenvl_plugin.processing.images import ImageLimits

    if not allow_private_http:
        return None
    if not allow_http:
        raise UsageError("--allow_private_http: goes with --allow_http; give both")
    return ImageLimits(allow_private=True)


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
    return made_flags(parameters)


def made_flags(parameters: Sequence[inspect.Parameter]) -> list[Any]:
    """The flags that typer makes of the parameters of a function, for a command that makes its flags when it is asked
    for them.
    """

    def command() -> None: ...

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [*typer.main.get_command(app).params]
