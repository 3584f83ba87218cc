"""Examples with the demo model: the answers are true of the drawn scenes, and the output is as documented."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import needs_compiler
from PIL import Image

from paddlemix_qwenvl_plugin.checkpoint.config import load_config
from paddlemix_qwenvl_plugin.checkpoint.tensors import language_specs, vision_specs
from paddlemix_qwenvl_plugin.demo import MODEL
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS, Question
from paddlemix_qwenvl_plugin.demo.score import mark
from paddlemix_qwenvl_plugin.demo.world.captions import caption_text
from paddlemix_qwenvl_plugin.demo.world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, Thing
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.serve.demo_model import demo_stages

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo_model")
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))

QUESTIONS_BY_NAME: dict[str, Question] = {question.name: question for question in QUESTIONS}
# Image file -> the scene from which it was drawn.
SCENES: dict[str, Scene] = {
    path.name: scene for question in QUESTIONS for path, scene in zip(question.images, question.sample.scenes)
}
# Boxes are in thousandths of the images' 256 pixels.
PIXELS_PER_UNIT = 0.256
NUMBERS = ("no", "one", "two", "three", "four")

Run = Callable[[str], str]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(REPO), str(EXAMPLES)))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of the scripts that `run` runs."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Function that runs a script without arguments and returns its stdout; a second call returns the same text."""
    return functools.cache(lambda name: run_script(name, folder))


def run_script(name: str, folder: Path, *arguments: str) -> str:
    """Run a script in a folder and return its stdout."""
    completed = run_process(name, folder, *arguments)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def run_process(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder and return the ended process."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def documented_output(name: str) -> str:
    """Return the output that a script's docstring shows, the indented block after "prints"."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text("utf-8"))) or ""
    block = re.search(r"prints\n\n((?:    .*\n|\n)+)", f"{docstring}\n")
    assert block, name
    return "\n".join(line[4:] for line in block[1].rstrip().splitlines())


def without_numbers(text: str) -> list[str]:
    """Split a text into lines, with # for numbers and with single spaces: numbers and columns differ by machine."""
    return [" ".join(re.sub(r"[\d.]*\d", "#", line).split()) for line in text.splitlines()]


def things(image: str, kind: str) -> list[Thing]:
    """List the things of a kind in the scene of an image."""
    return [thing for thing in SCENES[image].things if thing.kind == kind]


def has_right_box(image: str, question: str, expected: str, answer: str) -> bool:
    """Whether an answer has the expected words and one box, with the expected <ref> and an IoU of at least 0.5."""
    score = mark(Sample((SCENES[image],), (Turn("box", "en", question, expected),), "chat"), answer)
    # `mark` ignores boxes after the expected ones.
    one_box = score.boxes == len(parse_boxes(answer).boxes) == 1
    return one_box and score.boxes_right == 1 and score.words_right


def text_with_box(ref: str, thing: Thing) -> str:
    """Write a <ref> and the <box> of a thing."""
    return "<ref>{}</ref><box>({},{}),({},{})</box>".format(ref, *thing.box)


def test_there_are_eleven_short_scripts_and_two_notebooks() -> None:
    assert (len(SCRIPTS), len(NOTEBOOKS)) == (11, 2)
    for name in SCRIPTS:
        assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) < 60, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_prints_the_documented_output(name: str, run: Run) -> None:
    if name == "quantize" and shutil.which("c++") is None:
        pytest.skip("the engine needs a C++17 compiler: apt-get install g++")
    assert without_numbers(run(name)) == without_numbers(documented_output(name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_readme_shows_the_output(name: str) -> None:
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    assert f"```console\n$ python examples/{name}.py\n{documented_output(name)}\n```" in readme


def test_readme_links_resolve() -> None:
    readme = (EXAMPLES / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", readme)
    assert len(links) > 5
    for target, fragment in links:
        text = (EXAMPLES / target).read_text("utf-8")
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert not fragment or fragment in [title.lower().replace(" ", "-") for title in titles], target


def test_other_stages_and_images(tmp_path: Path) -> None:
    shutil.copyfile(QUESTIONS_BY_NAME["read"].images[0], tmp_path / "sign.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    flags = [
        str(tmp_path),
        "--model",
        *map(str, demo_stages(print)),
        "--prompt",
        "Generate the caption in Chinese:",
    ]
    assert run_script("caption_folder", tmp_path, *flags).split() == [
        "sign.PNG",
        caption_text(SCENES["read.png"], "zh"),
    ]


def test_caption_folder(run: Run) -> None:
    captions = dict(line.split(maxsplit=1) for line in run("caption_folder").splitlines())
    assert captions == {name: caption_text(scene, "en") for name, scene in SCENES.items()}


def test_find_and_crop(run: Run, folder: Path) -> None:
    question = QUESTIONS_BY_NAME["locate"]
    answer = run("find_and_crop").splitlines()[0]
    assert has_right_box("locate.png", question.turn.question, question.turn.answer, answer)
    # The cell 4 is the middle of the 3 x 3 grid.
    (heart,) = [thing for thing in things("locate.png", "heart") if thing.cell == 4]
    with Image.open(folder / "out" / "find_and_crop" / "crop-1.png") as crop:
        size = [(high - low) * PIXELS_PER_UNIT for low, high in zip(heart.bounds[:2], heart.bounds[2:])]
        assert crop.size == pytest.approx(size, abs=6)
        # More than a third of the crop has the heart's colour, within 16 levels; images have noise of at most 8.
        has_colour = np.abs(np.asarray(crop).astype(int) - heart.rgb).max(axis=2) <= 16
        assert has_colour.mean() > 0.35
    with Image.open(folder / "out" / "find_and_crop" / "boxes.png") as drawn:
        assert drawn.size == (256, 256)


def test_read_form(run: Run) -> None:
    (text,), (star,), (circle,) = (things("relation.png", kind) for kind in ("text", "star", "circle"))
    assert json.loads(run("read_form")) == {
        "title": f"It says {text.text}.",
        "colour of the title": f"The text is {text.colour}.",
        "shapes": f"There are {NUMBERS[len(SCENES['relation.png'].shapes)]} shapes.",
        "colour of the star": f"The star is {star.colour}.",
        "size of the circle": f"The circle is {circle.size}.",
    }


def test_compare_images(run: Run) -> None:
    first, second = SCENES["pair-1.png"], SCENES["pair-2.png"]
    # The answer in a line follows the question after several spaces, or after its question mark and a space.
    answers = [
        re.split(r"  +|(?<=\?) ", line, maxsplit=1)[1].strip() for line in run("compare_images").splitlines()
    ]
    numbers_with_red_circle = [
        number
        for number, scene in enumerate((first, second), 1)
        if any((thing.kind, thing.colour) == ("circle", "red") for thing in scene.things)
    ]
    (star,) = things("pair-2.png", "star")
    assert len(numbers_with_red_circle) == 1
    assert answers == [
        caption_text(first, "en"),
        caption_text(second, "en"),
        f"Picture {numbers_with_red_circle[0]}.",
        f"Picture {1 if len(first.shapes) > len(second.shapes) else 2}.",
        f"The star is {star.colour}.",
    ]


def test_chat(run: Run) -> None:
    answers = run("chat").splitlines()[1::2]
    hearts = things("locate.png", "heart")
    (lowest,) = [heart for heart in hearts if heart.cell == 8]
    (yellow,) = [heart for heart in hearts if heart.colour == "yellow"]
    assert answers[0] == f"There are {NUMBERS[len(hearts)]} hearts."
    assert answers[1] == f"The heart at the bottom right is {lowest.colour}."
    assert has_right_box("locate.png", "", text_with_box("the yellow heart", yellow), answers[2])
    assert answers[3] == "No, there is not."
    assert not things("locate.png", "star")


def test_stream(run: Run) -> None:
    # NAME [LEFT, TOP, RIGHT, BOTTOM]
    names_and_boxes = re.findall(r"([^\[]+) \[([^\]]+)\]", run("stream"))
    scene = SCENES["pair-2.png"]
    assert len(names_and_boxes) == len(scene.things)
    for (name, box), thing in zip(names_and_boxes, scene.things):
        assert name.endswith(f'"{thing.text}"' if thing.text else f"{thing.size} {thing.colour} {thing.kind}")
        expected = [value * PIXELS_PER_UNIT for value in thing.bounds]
        assert [int(value) for value in box.split(",")] == pytest.approx(expected, abs=8)


def test_serve_and_call(run: Run) -> None:
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    answer, box = run("serve_and_call").splitlines()
    question = QUESTIONS_BY_NAME["locate"]
    assert has_right_box("locate.png", question.turn.question, question.turn.answer, answer)
    thousandths, pixels = (
        [float(number) for number in re.findall(r"[\d.]*\d", text)] for text in (answer, box)
    )
    assert pixels == pytest.approx([value * PIXELS_PER_UNIT for value in thousandths])


def test_serve_and_call_asks_the_server_for_the_name_of_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    monkeypatch.setenv("QWENVL_SERVE_SERVED_MODEL_NAME", "other")
    assert "<box>" in run_script("serve_and_call", folder)


def test_serve_and_call_prints_the_error_of_the_server(folder: Path) -> None:
    """Here of a file that is no image; a base model, which answers no chat requests, gives another error."""
    pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
    completed = run_process("serve_and_call", folder, "--image", str(EXAMPLES / "README.md"))
    assert completed.returncode == 1
    assert "check that it is a whole PNG, JPEG or WebP image" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_batch(run: Run) -> None:
    *rows, summary = run("batch").splitlines()
    answers = [json.loads(row)["answer"] for row in rows]
    purple_shapes = [thing for thing in SCENES["count.png"].shapes if thing.colour == "purple"]
    triangles = things("caption.png", "triangle")
    (circle,) = things("relation.png", "circle")
    (heart,) = things("count.png", "heart")
    assert heart.cell == 0
    texts = [thing.text for thing in SCENES["read.png"].things]
    (text,) = things("grounded.png", "text")
    assert answers == [
        caption_text(SCENES["pair-1.png"], "en"),
        f"There are {NUMBERS[len(triangles)]} triangles.",
        f"There are {NUMBERS[len(purple_shapes)]} purple shapes.",
        "The blue heart is at the top left.",
        f"It says {' and '.join(texts)}.",
        f"It says {text.text}.",
        f"The circle is {circle.colour}.",
        "有四个心形。",
    ]
    assert len(things("chinese.png", "heart")) == 4
    assert summary.startswith("8 answers, ")


@needs_compiler
def test_quantize(run: Run) -> None:
    rows = [re.fullmatch(r"(\w+) +([\d.]+) MB  (.+)", line) for line in run("quantize").splitlines()]
    assert all(rows)
    names, sizes, answers = zip(*(row.groups() for row in rows if row))
    assert names == ("bfloat16", "weight_only_int8", "weight_only_int4")
    assert set(answers) == {QUESTIONS_BY_NAME["relation"].turn.answer}
    assert float(sizes[0]) > float(sizes[1]) > float(sizes[2])


def test_lora(run: Run) -> None:
    (circle,) = things("relation.png", "circle")
    assert circle.colour == "brown"
    assert [line.split(maxsplit=1) for line in run("lora").splitlines()] == [
        ["base", "The circle is brown."],
        ["lora", "The circle is blue."],
    ]


def test_export_and_open(run: Run, folder: Path) -> None:
    output = run("export_and_open")
    assert output.endswith("from one checkpoint: True\n")
    config = load_config(MODEL)
    for stage, specs in (("vision", vision_specs(config)), ("language", language_specs(config))):
        n_values = sum(int(np.prod(spec.shape)) for spec in specs.values())
        (megabytes,) = re.findall(rf"^{stage}: ([\d.]+) MB of float16", output, re.MULTILINE)
        assert float(megabytes) == pytest.approx(2e-6 * n_values, rel=0.03)
    exported = folder / "out" / "export_and_open"
    assert (exported / "vision" / "vision.manifest.json").is_file()
    assert (exported / "text" / "qwen.pdiparams").is_file()


@needs_compiler
@pytest.mark.skipif(shutil.which("make") is None, reason="the C example needs make: apt-get install make")
def test_c_program(tmp_path: Path) -> None:
    completed = subprocess.run(
        ["make", "-C", str(EXAMPLES / "c"), "run", f"PYTHON={sys.executable}", f"OUT={tmp_path}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert "warning" not in completed.stderr
    device, caption = [line for line in completed.stdout.splitlines() if not line.startswith("make")]
    assert re.fullmatch(r"cpu \w+, \d+ threads?", device)
    assert caption == "A large red circle."


def run_notebook(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook and return the stdout of its cells."""
    nbclient = pytest.importorskip(
        "nbclient", reason="notebooks need nbclient and ipykernel: the extra `dev`"
    )
    import nbformat

    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name: str) -> None:
    for cell in json.loads((EXAMPLES / f"{name}.ipynb").read_text("utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_getting_started(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_notebook("getting_started", monkeypatch).splitlines()
    assert lines[0] == f"There are {NUMBERS[len(things('locate.png', 'heart'))]} hearts."
    assert lines[1].startswith("stop ")
    turn = QUESTIONS_BY_NAME["locate"].turn
    assert has_right_box("locate.png", turn.question, turn.answer, lines[2])
    # Each line begins with a segment as a Python string.
    segments = [ast.literal_eval(re.match(r"('.*?'|\".*?\") ", f"{line} ")[1]) for line in lines[4:]]
    score = mark(QUESTIONS_BY_NAME["grounded"].sample, "".join(segments))
    assert score.words_right
    assert score.boxes_right == score.boxes == len(SCENES["grounded.png"].things)


@needs_compiler
def test_under_the_hood(monkeypatch: pytest.MonkeyPatch) -> None:
    output = run_notebook("under_the_hood", monkeypatch)
    assert " tokens, 256 of them image slots\n" in output
    # Three answers of one batch, each after its number of tokens.
    lengths = [int(length) for length in re.findall(r"^(\d+) (?:There|No,|A) ", output, re.MULTILINE)]
    assert f"There are {NUMBERS[len(things('locate.png', 'heart'))]} hearts." in output
    assert caption_text(SCENES["locate.png"], "en") in output
    n_steps, n_tokens = map(int, re.findall(r"(\d+) steps for (\d+) tokens", output)[0])
    assert len(lengths) == 3
    assert n_tokens == sum(lengths)
    # The requests run together, with at most a few more steps for their prompts.
    assert max(lengths) <= n_steps <= max(lengths) + 3
    n_cached, n_prompt = map(int, re.findall(r"(\d+) of (\d+) prompt tokens were in the cache", output)[0])
    assert 256 <= n_cached < n_prompt
    assert "1 image encoded in all, 0 of " in output
    # A matrix of 384 x 256 in float32; in int8 with a float32 scale per row; in int4 with a scale of 2 bytes per group
    # of 64.
    sizes = [int(size) for size in re.findall(r": (\d+) bytes", output)]
    assert sizes == [4 * 384 * 256, 384 * (256 + 4), 384 * (256 // 2 + 2 * 256 // 64)]
    int8, int4 = (float(error) for error in re.findall(r"relative error ([\d.]+)", output))
    assert 0 < int8 < 0.02 < int4 < 0.2
