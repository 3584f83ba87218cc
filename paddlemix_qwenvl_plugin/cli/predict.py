"""`qwenvl predict`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from paddlemix_qwenvl_plugin.cli import options as flags
from paddlemix_qwenvl_plugin.util import standard_input
from paddlemix_qwenvl_plugin.util.errors import UsageError, one_line
from paddlemix_qwenvl_plugin.util.files import check_target, write_beside, write_text
from paddlemix_qwenvl_plugin.util.text import json_line, without_controls

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

_DRAW_FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def predict(
    context: typer.Context,
    first_model_path: flags.FirstModelPath,
    second_model_path: flags.SecondModelPath,
    model: flags.ModelFolder = None,
    image: Optional[list[str]] = typer.Option(
        None, "--image", help="Picture: path, data URL, http(s) URL or - (standard input); may be repeated."
    ),
    prompt: str = typer.Option("", "--prompt", help="Question or instruction; - reads standard input."),
    chat: Optional[bool] = typer.Option(
        None, "--chat/--no_chat", help="Use the chat form (Qwen-VL-Chat); default: as the model folder says."
    ),
    system: str = typer.Option("You are a helpful assistant.", "--system", help="System message (chat)."),
    device: flags.Device = "cpu",
    picture_label: flags.PictureLabel = None,
    allow_http: flags.AllowHttp = False,
    allow_private_http: flags.AllowPrivateHttp = False,
    verify: flags.Verify = False,
    as_json: bool = typer.Option(False, "--json", help="Print the whole answer as JSON."),
    output: Optional[Path] = typer.Option(
        None, "--output", help="Also write the answer as JSON to this file; - is --json."
    ),
    draw: Optional[Path] = typer.Option(
        None, "--draw", help="Draw the boxes on the last picture, to this file."
    ),
    real_time_save: Optional[Path] = typer.Option(
        None, "--real_time_save", help="Also write the tokens as real_time_save.* files to this folder."
    ),
) -> None:
    """Ask about pictures through both exported stages."""
    from paddlemix_qwenvl_plugin.runtime.request import Request

    options: GenerationOptions = context.obj
    sources: list[Any] = image or []
    if [prompt, *sources].count("-") > 1:
        raise UsageError("-: standard input can be read once; give one --image or the --prompt there")
    if output == Path("-"):
        as_json, output = True, None
    if not sources and not prompt:
        raise UsageError("nothing to ask: give --prompt, --image or both")
    if draw is not None and not sources:
        raise UsageError("--draw needs an --image to draw on")
    for file in (output, draw):
        if file is not None:
            check_target(file)
    if real_time_save is not None and not real_time_save.is_dir():
        raise UsageError(f"{real_time_save}: no such folder")
    if draw is not None and draw.suffix.lower() not in _DRAW_FORMATS:
        raise UsageError(f"--draw {draw}: not a picture format; name it .png or .jpg")
    pair = flags.open_model(
        first_model_path,
        second_model_path,
        model,
        device,
        picture_label,
        allow_http,
        allow_private_http,
        verify,
    )
    if prompt == "-":
        prompt = standard_input.read_text()
    sources = [standard_input.read_bytes() if source == "-" else source for source in sources]
    parts: list[dict[str, Any]] = [{"image": source} for source in sources]
    if draw is not None:  # opened once, to ask about it and to draw on it
        parts[-1]["image"] = pair.load_images(sources[-1:])[0]
    request = Request(parts + ([{"text": prompt}] if prompt else []), options, chat=chat, system=system)
    stream = pair.ask(request)
    streamed = not as_json and sys.stdout.isatty()
    if streamed:
        for piece in stream:
            print(without_controls(piece.text), end="", flush=True)
        print()
    answer = stream.finish()
    result = answer.as_dict()
    if output is not None:
        write_text(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if real_time_save is not None:
        from paddlemix_qwenvl_plugin.runtime.real_time_save import write_tokens

        write_tokens(real_time_save, [answer.token_ids], pair.tokenizer.eod_id)
    if draw is not None:
        from paddlemix_qwenvl_plugin.processing.drawing import draw_boxes

        write_beside(draw, draw_boxes(parts[-1]["image"], answer.boxes).save)
    if not streamed:
        print(json_line(result) if as_json else without_controls(answer.text))
    for problem in answer.problems:
        print(f"qwenvl: {one_line(problem)}", file=sys.stderr)
