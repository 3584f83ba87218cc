"""Cases of docs/errors.md for `quantize`; error_cases.py explains what a case is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from error_cases import Bench, Case, case, cases

ROW = {"id": 0, "prompt": "What is it?"}  # of calibration data


def quantize(*rows: Any, flags: tuple[str, ...] = ("--bits", "8"), out: str = "new") -> Case:
    """`quantize` with these calibration rows and eight valid rows; a str is a line of the file as it is."""

    def prepare(bench: Bench) -> list[str]:
        bench.model()
        all_rows = [*rows, *({**ROW, "id": i} for i in range(8))]
        lines = [row if isinstance(row, str) else json.dumps(row) for row in all_rows]
        Path("rows.jsonl").write_text("\n".join(lines))
        return ["quantize", "model", out, *flags, "--data", "rows.jsonl"]

    return prepare


@case("`quantize` from a folder that is not there")
def no_model(bench: Bench) -> list[str]:
    return ["quantize", "model", "new", "--bits", "4"]


@case("`quantize --data` with seven rows")
def few_rows(bench: Bench) -> list[str]:
    arguments = quantize()(bench)
    Path("rows.jsonl").write_text("\n".join(json.dumps({**ROW, "id": i}) for i in range(7)))
    return arguments


@case("`quantize --data` that is not there")
def no_rows(bench: Bench) -> list[str]:
    bench.model()
    return ["quantize", "model", "new", "--bits", "4", "--data", "rows.jsonl"]


@case("the width of the MLP is not a multiple of `--group_size`")
def odd_mlp_width(bench: Bench) -> list[str]:
    arguments = quantize()(bench)
    weights = bench.weights()
    width = 528  # not a multiple of 64, the group size with 8 bits
    bench.config(intermediate_size=2 * width)
    for name, values in weights.items():
        if ".mlp.w" in name and name.startswith("transformer.llm"):
            weights[name] = values.repeat(2, axis=1)[:, :width].copy()
        elif ".mlp.c_proj" in name and name.startswith("transformer.llm"):
            weights[name] = values.repeat(2, axis=0)[:width].copy()
    bench.save(weights)
    return arguments


@case("`quantize` without the vocabulary")
def no_vocabulary(bench: Bench) -> list[str]:
    arguments = quantize()(bench)
    Path("model/qwen.tiktoken").unlink()
    return arguments


@case("a folder with the name of `quantize`'s partial one")
def foreign_partial(bench: Bench) -> list[str]:
    arguments = quantize()(bench)
    Path("new.partial").mkdir()
    return arguments


@case("`quantize` after an interrupted run with other flags")
def other_settings(bench: Bench) -> list[str]:
    arguments = quantize()(bench)
    Path("new.partial").mkdir()
    Path("new.partial/job.json").write_text('{"bits": 4}')
    return arguments


@case("an image of a calibration row is text")
def no_image(bench: Bench) -> list[str]:
    arguments = quantize({**ROW, "id": "a", "image": "dog.png"})(bench)
    Path("dog.png").write_text("a dog")
    return arguments


@case("calibration rows that are too long together")
def long_rows(bench: Bench) -> list[str]:
    arguments = quantize(*({**ROW, "id": f"a{i}", "prompt": "x1" * 6000} for i in range(9)))(bench)
    # Each row fits into this context, but the first eight, the smallest number that is accepted, have more than 65,536
    # tokens together.
    bench.config(max_position_embeddings=32768)
    return arguments


@case("no more room on the disk during `quantize`")
def full_disk(bench: Bench) -> list[str]:
    arguments = quantize()(bench)
    bench.max_file_bytes = 10_000
    return arguments


cases(
    {
        "`quantize --bits 3`": quantize(flags=("--bits", "3")),
        "`quantize` without `--bits`": quantize(flags=()),
        "`quantize --group_size 16`": quantize(flags=("--bits", "4", "--group_size", "16")),
        "`quantize` to a folder that exists": quantize(out="model"),
        "a calibration row that is not JSON": quantize("{"),
        "a calibration row with an unknown key": quantize({**ROW, "img": "dog.png"}),
        "a calibration row whose answer is a number": quantize({**ROW, "answer": 3}),
        "a calibration row with an image that is not there": quantize({**ROW, "image": "dog.png"}),
        "a calibration row that is longer than the context": quantize({**ROW, "prompt": "ab " * 9000}),
    }
)
