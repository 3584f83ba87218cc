"""Run the demo: export the shipped model, ask the bundled questions, write a page and a contact sheet."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Optional

from filelock import FileLock
from PIL import Image

from paddlemix_qwenvl_plugin.checkpoint.tensors import language_specs, vision_specs
from paddlemix_qwenvl_plugin.demo import MODEL as MODEL
from paddlemix_qwenvl_plugin.demo.page import html_page
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS, Question
from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.demo.score import request
from paddlemix_qwenvl_plugin.demo.sheet import contact_sheet
from paddlemix_qwenvl_plugin.engine.build import library_state
from paddlemix_qwenvl_plugin.engine.select import engine_available, engine_choice
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, make_folder, one_line
from paddlemix_qwenvl_plugin.util.files import write_beside

PAGE, SHEET, ANSWERS = "index.html", "sheet.png", "answers.json"

# Files and folders that a demo writes, and the marker file of a demo folder.
_NAMES = (PAGE, SHEET, ANSWERS, "images", "vision", "text")
_MARKER = ".qwenvl-demo"


def run_demo(out: Path, say: Callable[[str], None], model: Optional[Path] = None) -> Run:
    """Write index.html, sheet.png, answers.json, images/ and the stages vision/vision and text/qwen to `out`.

    Files of an earlier demo are replaced, other files are kept.

    Args:
        out: output folder, created if missing.
        say: called with each progress line.
        model: model folder; None: the shipped model.

    Raises:
        UsageError: `out` cannot be created, or contains files of these names that no demo wrote.
        QwenVLError: the model folder has no model.safetensors, or an export or a question fails.
    """
    model = model or MODEL
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise QwenVLError(f"{weights}: the demo model's weights are missing; install the package again")
    _prepare_folder(out)
    with _locked(out):
        return _run(out, say, model)


def _run(out: Path, say: Callable[[str], None], model: Path) -> Run:
    _build_engine(say)
    start = time.perf_counter()
    manifest = export_vision(model, out / "vision" / "vision")
    vision_seconds = time.perf_counter() - start
    say(f"Exported the vision stage in {vision_seconds:.1f} s.")
    export_language(model, out / "text", "qwen")
    export_seconds = time.perf_counter() - start
    say(f"Exported the language stage in {export_seconds - vision_seconds:.1f} s.")
    vl = QwenVL.from_exported(out / "vision" / "vision", out / "text" / "qwen")
    vl.load()
    results = []
    for number, question in enumerate(QUESTIONS, start=1):
        say("")
        say(f"{number}/{len(QUESTIONS)} {question.title} ({', '.join(p.name for p in question.images)})")
        say(f"    Q  {question.turn.question}")
        results.append(_ask(vl, question))
        for line in _answer_lines(results[-1]):
            say(f"    {line}")
    specs = {**vision_specs(manifest.config), **language_specs(manifest.config)}
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    run = Run(tuple(results), parameters, export_seconds)
    _write(out, run)
    return run


def _prepare_folder(out: Path) -> None:
    """Create the output folder; refuse one with files in _NAMES that no demo wrote."""
    make_folder(out)
    marker, page = out / _MARKER, out / PAGE
    # Earlier versions wrote no marker file; the page is the last file that they wrote.
    is_demo = marker.exists() or (page.is_file() and b"<title>qwenvl demo:" in page.read_bytes()[:4096])
    if not is_demo:
        for name in _NAMES:
            if os.path.lexists(out / name):
                raise UsageError(f"{out / name}: exists, and no demo wrote it; name another folder")
    marker.touch()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder: a concurrent demo would replace the exports while this one reads them."""
    lock = out / ".qwenvl-demo.lock"
    with FileLock(lock):
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows does not remove open files
                lock.unlink()


def _build_engine(say: Callable[[str], None]) -> None:
    """Build the engine if needed, so that the build does not count as export time."""
    ready = library_state()[0] in ("shipped", "built")
    start = time.perf_counter()
    if engine_available(engine_choice(), operators=True) and not ready:
        say(f"Built the engine in {time.perf_counter() - start:.1f} s.")


def _ask(vl: QwenVL, question: Question) -> Result:
    images = []
    for path in question.images:
        # Opened here: a prompt limits a path to 256 bytes, and the installation path may be longer.
        with Image.open(path) as file:
            images.append(file.convert("RGB"))
    return Result(question, vl.ask(request(question.sample, images)).finish())


def _answer_lines(result: Result) -> list[str]:
    answer = result.answer
    lines = [f"A  {one_line(parse_boxes(answer.text).text)}"]
    for box in answer.boxes:
        corners = " ".join(f"({x},{y})" for x, y in box.points)
        lines.append(f"   {box.kind} {corners}  {one_line(box.ref or '')}".rstrip())
    verdict = "right" if result.right else f"WRONG, expected: {result.question.turn.answer}"
    rate = answer.timings["tokens_per_second"]
    lines.append(f"   {verdict}; {result.seconds:.2f} s, {rate:.0f} tokens per second")
    return lines


def _write(out: Path, run: Run) -> None:
    answers = json.dumps(run.as_dict(), ensure_ascii=False, indent=1) + "\n"
    sheet = contact_sheet(run.results)
    page = html_page(run, out)
    make_folder(out / "images")
    for image in (path for result in run.results for path in result.question.images):
        write_beside(out / "images" / image.name, partial(shutil.copyfile, image))
    write_beside(out / ANSWERS, lambda path: path.write_text(answers, "utf-8"))
    write_beside(out / SHEET, lambda path: sheet.save(path, optimize=True))
    write_beside(out / PAGE, lambda path: path.write_text(page, "utf-8"))
