"""`qwenvl predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from paddlemix_qwenvl_plugin.cli.options import only_adapter
from paddlemix_qwenvl_plugin.util import standard_input
from paddlemix_qwenvl_plugin.util.errors import UsageError, one_line
from paddlemix_qwenvl_plugin.util.files import check_target, write_beside, write_text
from paddlemix_qwenvl_plugin.util.text import json_line, without_controls

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

_MAX_ANSWER_BYTES = 1 << 26  # a larger file is not an earlier answer
_DRAW_FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# main.py replaces the parameter open_model by flags; context.obj has the GenerationOptions (options.py).
def predict(
    context: typer.Context,
    open_model: Callable[[], QwenVL],
    image: Optional[list[str]] = typer.Option(
        None, "--image", help="Image: path, data URL, http(s) URL or - (standard input); may be repeated."
    ),
    prompt: str = typer.Option("", "--prompt", help="Question or instruction; - reads standard input."),
    chat: Optional[bool] = typer.Option(
        None, "--chat/--no_chat", help="Use the chat prompt (Qwen-VL-Chat); default: per the model folder."
    ),
    system: str = typer.Option("You are a helpful assistant.", "--system", help="System message (chat)."),
    as_json: bool = typer.Option(False, "--json", help="Print the whole answer as JSON."),
    output: Optional[Path] = typer.Option(
        None, "--output", help="Also write the answer as JSON to this file; - is --json."
    ),
    draw: Optional[Path] = typer.Option(
        None, "--draw", help="Write the last image with drawn boxes to this file."
    ),
    real_time_save: Optional[Path] = typer.Option(
        None, "--real_time_save", help="Also write the tokens as real_time_save.* files to this folder."
    ),
) -> None:
    """Answer a prompt about images with the exported stages."""
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
    if output is not None or draw is not None:
        _check_targets(output, draw, sources)
    if real_time_save is not None and not real_time_save.is_dir():
        raise UsageError(f"{real_time_save}: no such folder")
    if draw is not None and draw.suffix.lower() not in _DRAW_FORMATS:
        raise UsageError(f"--draw {draw}: not an image format; name it .png or .jpg")
    model = open_model()
    if prompt == "-":
        prompt = standard_input.read_text()
    sources = [standard_input.read_bytes() if source == "-" else source for source in sources]
    parts: list[dict[str, Any]] = [{"image": source} for source in sources]
    if draw is not None:  # loaded once, for the prompt and for drawing
        parts[-1]["image"] = model.load_images(sources[-1:])[0]
    request = Request(
        parts + ([{"text": prompt}] if prompt else []),
        options,
        chat=chat,
        system=system,
        adapter=only_adapter(model),
    )
    stream = model.ask(request)
    streamed = not as_json and sys.stdout.isatty()
    if streamed:
        for segment in stream:
            print(without_controls(segment.text), end="", flush=True)
        print()
    answer = stream.finish()
    result = answer.as_dict()
    if output is not None:
        write_text(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if real_time_save is not None:
        from paddlemix_qwenvl_plugin.runtime.real_time_save import write_tokens

        write_tokens(real_time_save, [answer.token_ids], model.tokenizer.eod_id)
    if draw is not None:
        from paddlemix_qwenvl_plugin.processing.drawing import draw_boxes, save_drawn

        write_beside(draw, partial(save_drawn, draw_boxes(parts[-1]["image"], answer.boxes)))
    if not streamed:
        # JSON escapes replace characters that the output's encoding lacks.
        utf_8 = sys.stdout.encoding.lower().replace("_", "-") == "utf-8"
        print(json_line(result, ensure_ascii=not utf_8) if as_json else without_controls(answer.text))
    for problem in answer.problems:
        print(f"qwenvl: {one_line(problem)}", file=sys.stderr)


def _check_targets(output: Optional[Path], draw: Optional[Path], sources: Sequence[str]) -> None:
    """Refuse a target that is an input image or an existing file of another program, and one file for both targets."""
    from paddlemix_qwenvl_plugin.processing.drawing import is_drawn

    for target, may_replace in ((output, _is_answer), (draw, is_drawn)):
        if target is None:
            continue
        if any(_is_same_file(target, source) for source in sources):
            raise UsageError(f"{target}: is an input image; name another file")
        check_target(target, may_replace)
    if output is not None and draw is not None and output.resolve() == draw.resolve():
        raise UsageError(f"--output and --draw: both name {draw}; give two files")


def _is_same_file(target: Path, source: str) -> bool:
    from paddlemix_qwenvl_plugin.processing.images import local_path

    path = local_path(source)
    try:
        return path is not None and target.samefile(path)
    except (OSError, ValueError):  # no such target yet, or a missing or invalid image, reported when opened
        return False


def _is_answer(path: Path) -> bool:
    """Whether a file has the fields of an answer, as --output writes them."""
    try:
        data = json.loads(path.read_text("utf-8")) if path.stat().st_size < _MAX_ANSWER_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"text", "boxes", "token_ids", "finish_reason"} <= set(data)
