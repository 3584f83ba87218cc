"""`qwenvl eval`: accuracy of a model's answers."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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

app = typer.Typer(name="eval", help="Measure the accuracy of a model's answers.")

_Data = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Data set, one row per line.")]
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


@dataclass(frozen=True)
class _RunFlags:
    """Flags common to all tasks."""

    first_model_path: _First = None
    second_model_path: _Second = None
    model: flags.ModelFolder = None
    device: flags.Device = "cpu"
    output: _Output = None
    predictions: _Predictions = None
    as_json: _Json = False

    @property
    def has_model_flags(self) -> bool:
        """Whether a flag names an exported stage or the tokenizer folder."""
        return (self.first_model_path, self.second_model_path, self.model) != (None, None, None)

    def check(self) -> None:
        """Raise UsageError for conflicting flags and for a target that must not be overwritten."""
        if self.has_model_flags and self.predictions is not None:
            raise UsageError(
                "--predictions runs no model: "
                "leave out --first_model_path, --second_model_path and --model_name_or_path"
            )
        if self.output is not None:
            from paddlemix_qwenvl_plugin.evaluation.rows import is_scored

            check_target(self.output, is_scored)

    def open(self) -> QwenVL:
        from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

        if self.first_model_path is None or self.second_model_path is None:
            raise UsageError("give --first_model_path and --second_model_path, or --predictions")
        model = QwenVL.from_exported(self.first_model_path, self.second_model_path, self.model, self.device)
        model.load()
        return model

    def answers(self, data: Path, rows: Mapping[Id, Row], options: GenerationOptions) -> dict[Id, str]:
        """Answer each row, from the predictions file or with the model."""
        from paddlemix_qwenvl_plugin.evaluation import ask
        from paddlemix_qwenvl_plugin.evaluation.rows import check_images, read_predictions
        from paddlemix_qwenvl_plugin.util.progress import track

        self.check()
        if self.predictions is not None:
            return read_predictions(self.predictions, rows)
        check_images(data, rows)
        answers = ask.answers(self.open(), (row.prompt() for row in rows.values()), options)
        return dict(zip(rows, track(answers, "rows answered", len(rows))))

    def write(self, texts: Mapping[Id, str], scores: Mapping[Id, float]) -> None:
        from paddlemix_qwenvl_plugin.evaluation.rows import write_predictions

        if self.output is not None:
            lines = ({"id": key, "text": texts[key], "score": scores[key]} for key in texts)
            write_predictions(self.output, lines)


# Decorator of a task's command: the flags of _RunFlags replace its parameter `read_flags`, which returns their values.
_task = functools.partial(flags.with_flags, read_flags=_RunFlags)


@app.command()
@_task
def demo(
    read_flags: Callable[[], _RunFlags],
    n: int = typer.Option(1000, "--n", min=1, help="Number of samples."),
    first: int = typer.Option(0, "--first", min=0, help="Index of the first sample."),
    dtype: Optional[str] = typer.Option(
        None, "--dtype", help="Storage type of the export: float32, float16 or bfloat16; default: float32."
    ),
    quant_type: flags.QuantType = None,
    export_to: Optional[Path] = typer.Option(
        None, "--export_to", metavar="DIR", help="Keep the export in this folder."
    ),
) -> None:
    """Evaluate on held-out synthetic images of shapes and words.

    Exports the bundled demo model first, unless exported stages or --predictions are given.
    """
    from paddlemix_qwenvl_plugin.demo import score as task
    from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
    from paddlemix_qwenvl_plugin.evaluation.rates import table
    from paddlemix_qwenvl_plugin.evaluation.rows import read_predictions, write_predictions
    from paddlemix_qwenvl_plugin.util.progress import track

    run_flags = read_flags()
    export_flags = (dtype, quant_type, export_to)
    if (run_flags.has_model_flags or run_flags.predictions) and any(
        flag is not None for flag in export_flags
    ):
        raise UsageError(
            "--dtype, --quant_type and --export_to are for the export of the demo model: "
            "give none with exported stages or with --predictions"
        )
    run_flags.check()
    samples = {number: held_out(number) for number in range(first, first + n)}
    if run_flags.predictions is not None:
        texts: Mapping[Id, str] = read_predictions(run_flags.predictions, samples)
    else:
        with contextlib.ExitStack() as stack:
            if not run_flags.has_model_flags:
                folder = export_to or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwenvl-")))
                run_flags = _export_demo_model(run_flags, folder, dtype or "float32", quant_type)
            answers = task.answers(run_flags.open(), samples.values())
            texts = dict(zip(samples, track(answers, "samples answered", n)))
    marks = {number: task.mark(sample, texts[number]) for number, sample in samples.items()}
    if run_flags.output is not None:
        write_predictions(
            run_flags.output,
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
    if run_flags.as_json:
        figures = {name: {**rate.as_dict(), "goal": task.GOALS.get(name)} for name, rate in rates.items()}
        print(json.dumps(figures))
    else:
        print(table(rates, task.GOALS))


def _export_demo_model(
    run_flags: _RunFlags, folder: Path, dtype: str, quant_type: Optional[str]
) -> _RunFlags:
    from paddlemix_qwenvl_plugin.demo.run import MODEL
    from paddlemix_qwenvl_plugin.export.export import export_language, export_vision

    vision = folder / "vision" / "vision"
    export_vision(MODEL, vision, dtype)
    export_language(MODEL, folder / "text", "qwen", dtype, quant_type=quant_type)
    return replace(run_flags, first_model_path=vision, second_model_path=folder / "text" / "qwen")


@app.command()
@_task
def grounding(read_flags: Callable[[], _RunFlags], data: _Data) -> None:
    """Referring expressions, as in RefCOCO: boxes with an IoU of at least 0.5."""
    from paddlemix_qwenvl_plugin.evaluation import grounding as task
    from paddlemix_qwenvl_plugin.evaluation.overlap import IOU
    from paddlemix_qwenvl_plugin.evaluation.rates import Rate, table
    from paddlemix_qwenvl_plugin.evaluation.rows import read_rows

    run_flags, rows = read_flags(), read_rows(data, task.GroundingRow)
    texts = run_flags.answers(data, rows, task.OPTIONS)
    overlaps = {row_id: task.overlap(row, texts[row_id]) for row_id, row in rows.items()}
    run_flags.write(texts, overlaps)
    rate = Rate(sum(overlap >= IOU for overlap in overlaps.values()), len(overlaps))
    print(json.dumps(rate.as_dict()) if run_flags.as_json else table({"IoU of at least 0.5": rate}))


@app.command()
@_task
def vqa(
    read_flags: Callable[[], _RunFlags],
    data: _Data,
    metric: str = typer.Option("vqa", "--metric", help="vqa (VQA accuracy), exact (exact match) or anls."),
    max_new_tokens: Optional[int] = typer.Option(
        None, "--max_new_tokens", help="Default: 10; with --metric anls 100."
    ),
) -> None:
    """Questions with short answers, as in VQAv2, OK-VQA, TextVQA and DocVQA."""
    from paddlemix_qwenvl_plugin.evaluation import vqa as task
    from paddlemix_qwenvl_plugin.evaluation.rows import read_rows

    run_flags, rows = read_flags(), read_rows(data, task.VqaRow)
    task.check(data, rows, metric)
    limit = task.MAX_NEW_TOKENS[metric] if max_new_tokens is None else max_new_tokens
    texts = run_flags.answers(data, rows, task.options(limit))
    scores = {row_id: task.METRICS[metric](texts[row_id], row.answers) for row_id, row in rows.items()}
    run_flags.write(texts, scores)
    mean = sum(scores.values()) / len(scores)
    if run_flags.as_json:
        print(json.dumps({"metric": metric, "n": len(scores), "value": mean}))
    else:
        print(f"{metric}  {100 * mean:.2f}  ({len(scores)} questions)")


@app.command()
@_task
def captions(read_flags: Callable[[], _RunFlags], data: _Data) -> None:
    """Captions, as in COCO, Flickr30K and NoCaps: CIDEr, BLEU-4 and ROUGE-L."""
    from paddlemix_qwenvl_plugin.evaluation import captions as task
    from paddlemix_qwenvl_plugin.evaluation.rows import read_rows

    run_flags, rows = read_flags(), read_rows(data, task.CaptionRow)
    task.check_libraries()
    texts = run_flags.answers(data, rows, task.OPTIONS)
    scores = task.score(rows, texts)
    run_flags.write(texts, scores.cider)
    if run_flags.as_json:
        print(json.dumps({"n": len(rows), **scores.values}))
    else:
        for name, value in scores.values.items():
            print(f"{name:8} {100 * value:6.2f}")
        print(f"({len(rows)} images)")
