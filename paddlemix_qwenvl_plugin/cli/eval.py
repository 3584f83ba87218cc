"""`qwenvl eval`: how good a model's answers are."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from paddlemix_qwenvl_plugin.cli import options as flags
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.files import check_target

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.evaluation.rows import Id, Row
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

app = typer.Typer(name="eval", help="Measure how good a model's answers are.")

_Data = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="The data set, a row on each line.")]
_First = Annotated[Optional[Path], typer.Option("--first_model_path", help="Exported vision stage (prefix).")]
_Second = Annotated[
    Optional[Path], typer.Option("--second_model_path", help="Exported language stage (prefix).")
]
_Output = Annotated[
    Optional[Path],
    typer.Option("--output", metavar="FILE", help="Write the answers and their scores as JSONL."),
]
_Predictions = Annotated[
    Optional[Path],
    typer.Option("--predictions", metavar="FILE", help="Score the answers in this JSONL file; run no model."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


@app.command()
@flags.evaluated
def demo(
    n: int = typer.Option(1000, "--n", min=1, help="How many samples."),
    first: int = typer.Option(0, "--first", min=0, help="Number of the first sample."),
    dtype: Optional[str] = typer.Option(
        None, "--dtype", help="Of the export: float32, float16 or bfloat16; default: float32."
    ),
    quant_type: flags.QuantType = None,
    export_to: Optional[Path] = typer.Option(
        None, "--export_to", metavar="DIR", help="Keep the export in this folder."
    ),
    first_model_path: _First = None,
    second_model_path: _Second = None,
    model: flags.ModelFolder = None,
    device: flags.Device = "cpu",
    output: _Output = None,
    predictions: _Predictions = None,
    as_json: _Json = False,
) -> None:
    """Ask about drawn pictures that the demo model has not seen.

    Exports the shipped demo model first, unless exported stages are given.
    """
    from paddlemix_qwenvl_plugin.demo import score as task
    from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
    from paddlemix_qwenvl_plugin.evaluation.rates import table
    from paddlemix_qwenvl_plugin.evaluation.rows import read_predictions, write_predictions
    from paddlemix_qwenvl_plugin.util.progress import track

    stages = _Stages(first_model_path, second_model_path, model, device)
    of_export = (dtype, quant_type, export_to)
    if (stages.given or predictions is not None) and any(flag is not None for flag in of_export):
        raise UsageError(
            "--dtype, --quant_type and --export_to are for the export of the demo model: "
            "give none with exported stages or with --predictions"
        )
    _check(stages, predictions, output)
    samples = {number: held_out(number) for number in range(first, first + n)}
    if predictions is not None:
        texts: Mapping[Id, str] = read_predictions(predictions, samples)
    else:
        with contextlib.ExitStack() as stack:
            if not stages.given:
                folder = export_to or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwenvl-")))
                stages = _export_demo_model(folder, dtype or "float32", quant_type, device)
            pair = stages.open()
            answers = task.answers(pair, samples.values())
            texts = dict(zip(samples, track(answers, "samples answered", n)))
    marks = {number: task.mark(sample, texts[number]) for number, sample in samples.items()}
    if output is not None:
        write_predictions(
            output,
            (
                {
                    "id": number,
                    "text": texts[number],
                    "question": sample.turns[0].question,
                    "wanted": sample.turns[0].answer,
                    "words_right": marks[number].words_right,
                    "boxes_right": f"{marks[number].boxes_right} of {marks[number].boxes}",
                }
                for number, sample in samples.items()
            ),
        )
    rates = task.score(list(marks.values()))
    if as_json:
        figures = {name: {**rate.as_dict(), "goal": task.GOALS.get(name)} for name, rate in rates.items()}
        print(json.dumps(figures))
    else:
        print(table(rates, task.GOALS))


@app.command()
@flags.evaluated
def grounding(
    data: _Data,
    first_model_path: _First = None,
    second_model_path: _Second = None,
    model: flags.ModelFolder = None,
    device: flags.Device = "cpu",
    output: _Output = None,
    predictions: _Predictions = None,
    as_json: _Json = False,
) -> None:
    """Referring expressions, as in RefCOCO: is the box right?"""
    from paddlemix_qwenvl_plugin.evaluation import grounding as task
    from paddlemix_qwenvl_plugin.evaluation.overlap import IOU
    from paddlemix_qwenvl_plugin.evaluation.rates import Rate, table
    from paddlemix_qwenvl_plugin.evaluation.rows import read_rows

    rows = read_rows(data, task.GroundingRow)
    stages = _Stages(first_model_path, second_model_path, model, device)
    texts = _answers(data, rows, task.OPTIONS, stages, predictions, output)
    overlaps = {row_id: task.overlap(row, texts[row_id]) for row_id, row in rows.items()}
    _write(output, texts, overlaps)
    rate = Rate(sum(overlap >= IOU for overlap in overlaps.values()), len(overlaps))
    print(json.dumps(rate.as_dict()) if as_json else table({"IoU of at least 0.5": rate}))


@app.command()
@flags.evaluated
def vqa(
    data: _Data,
    metric: str = typer.Option("vqa", "--metric", help="vqa (VQA accuracy), exact (exact match) or anls."),
    max_new_tokens: Optional[int] = typer.Option(
        None, "--max_new_tokens", help="Default: 10; with --metric anls 100."
    ),
    first_model_path: _First = None,
    second_model_path: _Second = None,
    model: flags.ModelFolder = None,
    device: flags.Device = "cpu",
    output: _Output = None,
    predictions: _Predictions = None,
    as_json: _Json = False,
) -> None:
    """Questions with short answers, as in VQAv2, OK-VQA, TextVQA and DocVQA."""
    from paddlemix_qwenvl_plugin.evaluation import vqa as task
    from paddlemix_qwenvl_plugin.evaluation.rows import read_rows

    rows = read_rows(data, task.VqaRow)
    task.check(data, rows, metric)
    stages = _Stages(first_model_path, second_model_path, model, device)
    room = task.MAX_NEW_TOKENS[metric] if max_new_tokens is None else max_new_tokens
    texts = _answers(data, rows, task.options(room), stages, predictions, output)
    scores = {row_id: task.METRICS[metric](texts[row_id], row.answers) for row_id, row in rows.items()}
    _write(output, texts, scores)
    mean = sum(scores.values()) / len(scores)
    if as_json:
        print(json.dumps({"metric": metric, "n": len(scores), "value": mean}))
    else:
        print(f"{metric}  {100 * mean:.2f}  ({len(scores)} questions)")


@app.command()
@flags.evaluated
def captions(
    data: _Data,
    first_model_path: _First = None,
    second_model_path: _Second = None,
    model: flags.ModelFolder = None,
    device: flags.Device = "cpu",
    output: _Output = None,
    predictions: _Predictions = None,
    as_json: _Json = False,
) -> None:
    """Captions, as in COCO, Flickr30K and NoCaps: CIDEr, BLEU-4 and ROUGE-L."""
    from paddlemix_qwenvl_plugin.evaluation import captions as task
    from paddlemix_qwenvl_plugin.evaluation.rows import read_rows

    rows = read_rows(data, task.CaptionRow)
    task.check_libraries()
    stages = _Stages(first_model_path, second_model_path, model, device)
    texts = _answers(data, rows, task.OPTIONS, stages, predictions, output)
    scores = task.score(rows, texts)
    _write(output, texts, scores.cider)
    if as_json:
        print(json.dumps({"n": len(rows), **scores.values}))
    else:
        for name, value in scores.values.items():
            print(f"{name:8} {100 * value:6.2f}")
        print(f"({len(rows)} pictures)")


@dataclass(frozen=True)
class _Stages:
    """The flags that name exported stages, and where they run."""

    vision: Optional[Path]
    language: Optional[Path]
    model: Optional[Path]
    device: str

    @property
    def given(self) -> bool:
        return (self.vision, self.language, self.model) != (None, None, None)

    def open(self) -> QwenVL:
        from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

        if self.vision is None or self.language is None:
            raise UsageError("give --first_model_path and --second_model_path, or --predictions")
        pair = QwenVL.from_exported(self.vision, self.language, self.model, self.device)
        pair.load()
        return pair


def _export_demo_model(folder: Path, dtype: str, quant_type: Optional[str], device: str) -> _Stages:
    from paddlemix_qwenvl_plugin.demo.run import MODEL
    from paddlemix_qwenvl_plugin.export.export import export_language, export_vision

    stages = _Stages(folder / "vision" / "vision", folder / "text" / "qwen", None, device)
    export_vision(MODEL, folder / "vision" / "vision", dtype)
    export_language(MODEL, folder / "text", "qwen", dtype, quant_type=quant_type)
    return stages


def _check(stages: _Stages, predictions: Optional[Path], output: Optional[Path]) -> None:
    if stages.given and predictions is not None:
        raise UsageError("--predictions runs no model: leave out the exported stages")
    if output is not None:
        from paddlemix_qwenvl_plugin.evaluation.rows import is_scored

        check_target(output, is_scored)


def _answers(
    data: Path,
    rows: Mapping[Id, Row],
    options: GenerationOptions,
    stages: _Stages,
    predictions: Optional[Path],
    output: Optional[Path],
) -> dict[Id, str]:
    """The answer to each row: out of a file, or of the model."""
    from paddlemix_qwenvl_plugin.evaluation import ask
    from paddlemix_qwenvl_plugin.evaluation.rows import check_pictures, read_predictions
    from paddlemix_qwenvl_plugin.util.progress import track

    _check(stages, predictions, output)
    if predictions is not None:
        return read_predictions(predictions, rows)
    check_pictures(data, rows)
    answers = ask.answers(stages.open(), (row.asked() for row in rows.values()), options)
    return dict(zip(rows, track(answers, "rows answered", len(rows))))


def _write(output: Optional[Path], texts: Mapping[Id, str], scores: Mapping[Id, float]) -> None:
    from paddlemix_qwenvl_plugin.evaluation.rows import write_predictions

    if output is not None:
        write_predictions(output, ({"id": key, "text": texts[key], "score": scores[key]} for key in texts))
