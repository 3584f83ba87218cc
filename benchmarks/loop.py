"""Benchmark of the loop on the demo model: overhead over the bare engine, gain of a batch, cost of a second question.

Run: python benchmarks/loop.py
Needs the plugin and a C++ compiler; two minutes. Each figure is the best of several rounds. With --busy N, N processes
compute at the same time, and one thread is measured as well as two.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from functools import partial
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL, Request, export_language, export_vision
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.engine import library as c
from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.loop import Loop

STORAGE: list[tuple[str, Optional[str]]] = [
    ("float32", None),
    ("bfloat16", None),
    ("float16", None),
    ("bfloat16", "weight_only_int8"),
    ("bfloat16", "weight_only_int4"),
]

PROMPT, TOKENS = list(range(200, 232)), 200

PROMPTS = [[200 + (7 * n + i) % 300 for i in range(4 + 5 * n % 60)] for n in range(64)]
LENGTHS = [16 + 37 * n % 240 for n in range(64)]


class CRequest(ctypes.Structure):
    """The C struct qvl_request."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("n_spans", c_int32),
        ("tokens", c_void_p),
        ("spans", c_void_p),
        ("max_new", c_int32),
        ("min_new", c_int32),
        ("sampling", c_void_p),
        ("span_size", c_uint32),
        ("reserved", c_uint32),
    ]


def best(measure: Callable[[], float], rounds: int = 7) -> float:
    return min(measure() for _ in range(rounds))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare(model: QwenVL, n_new: int) -> float:
    """Time of qvl_generate in seconds, greedy, without a callback."""
    executor = model._loop._executor
    assert isinstance(executor, EngineExecutor)
    generate = c.load().qvl_generate
    generate.argtypes = [
        c_void_p,
        c_void_p,
        c_int32,
        c_void_p,
        c_uint32,
        c_int32,
        c_void_p,
        c_void_p,
        c_void_p,
    ]
    generate.argtypes += [c_int64, c_void_p, c_void_p, c_void_p, c_void_p]
    ids, tokens, result = (c_int32 * len(PROMPT))(*PROMPT), (c_int32 * n_new)(), (c_int32 * 4)()
    request = CRequest(len(PROMPT), 0, ctypes.addressof(ids), None, n_new)
    arguments = (
        executor._language.handle,
        None,
        1,
        ctypes.byref(request),
        ctypes.sizeof(request),
        0,
        None,
        None,
    )
    rest = (None, n_new, ctypes.addressof(tokens), ctypes.addressof(result), None, None)

    def run() -> None:
        assert generate(*arguments, *rest) == 0

    return seconds(run)


def streamed(model: QwenVL, n_new: int) -> float:
    """Time of the same generation through the loop in seconds, its text streamed."""
    options = GenerationOptions(max_new_tokens=n_new)
    model._loop = Loop(model._loop._executor)  # without the prefix cache of the last round
    stream = model.start(Prompt(PROMPT, []), [], [], options, None)
    taken = seconds(lambda: list(stream))
    assert len(stream.answer.token_ids) == n_new
    return taken


def per_token(measure: Callable[[QwenVL, int], float], model: QwenVL) -> float:
    """Milliseconds per decode step, without the prompt."""
    return 1e3 * (best(lambda: measure(model, TOKENS + 1)) - best(lambda: measure(model, 1))) / TOKENS


def open_demo(folder: Path, dtype: str, quant_type: Optional[str]) -> QwenVL:
    export_vision(MODEL, folder / "vision", dtype)
    export_language(MODEL, folder, "qwen", dtype, quant_type=quant_type)
    model = QwenVL.from_exported(folder / "vision", folder / "qwen")
    model.load()
    return model


def overhead(folder: Path) -> None:
    print(
        "| stored as | bare engine, ms per token | loop, text included | it adds |\n| --- | --- | --- | --- |"
    )
    for dtype, quant_type in STORAGE:
        model = open_demo(folder, dtype, quant_type)
        engine, loop = per_token(bare, model), per_token(streamed, model)
        print(f"| {quant_type or dtype} | {engine:.3f} | {loop:.3f} | {loop - engine:.3f} |", flush=True)


def batch(folder: Path) -> None:
    print("\n| stored as | one after another, tokens/s | 64 at once | times |\n| --- | --- | --- | --- |")
    for dtype, quant_type in STORAGE:
        model = open_demo(folder, dtype, quant_type)
        alone, together = (best(partial(run_all, model, window), 3) for window in (1, 64))
        rates = f"{sum(LENGTHS) / alone:.0f} | {sum(LENGTHS) / together:.0f} | {alone / together:.1f}"
        print(f"| {quant_type or dtype} | {rates} |", flush=True)


def run_all(model: QwenVL, window: int) -> float:
    """Time of 64 requests of different lengths in seconds."""
    model._loop = Loop(model._loop._executor)
    streams = (
        model.start(Prompt(ids, []), [], [], GenerationOptions(max_new_tokens=n), None)
        for ids, n in zip(PROMPTS, LENGTHS)
    )
    return seconds(lambda: list(model.finish_all(streams, window)))


def second_question(folder: Path) -> None:
    model = open_demo(folder, "float32", None)
    image = {"image": str(QUESTIONS[0].images[0])}
    options = GenerationOptions(max_new_tokens=1)

    def ask(text: str) -> float:
        return seconds(lambda: model.ask(Request([image, {"text": text}], options, chat=True)).finish())

    ask("What is this?")
    firsts, seconds_ = [], []
    for n in range(9):
        model._loop = Loop(model._loop._executor)
        firsts.append(ask(f"What is this? {n}"))
        seconds_.append(ask(f"How many shapes are there? {n}"))
    first, second = 1e3 * min(firsts), 1e3 * min(seconds_)
    print(f"\nTo the first token {first:.1f} ms; of a second question about the image {second:.1f} ms")


def busy(folder: Path, n: int) -> None:
    print(f"\n{n} processes compute beside it: bare engine, ms per token, with 1 and 2 threads")
    burn = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        for dtype, quant_type in STORAGE:
            open_demo(folder, dtype, quant_type)
            figures = []
            for threads in ("1", "2"):
                command = [sys.executable, __file__, "--one", str(folder)]
                environment = {**os.environ, "OMP_NUM_THREADS": threads}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                figures.append(float(done.stdout.split()[-1]))
            print(f"| {quant_type or dtype} | {figures[0]:.3f} | {figures[1]:.3f} |", flush=True)
    finally:
        for process in burn:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    parser.add_argument(
        "--one", type=Path, help=argparse.SUPPRESS
    )  # folder of an export: bare engine, median
    arguments = parser.parse_args()
    if arguments.one:
        model = QwenVL.from_exported(arguments.one / "vision", arguments.one / "qwen")
        model.load()
        bare(model, TOKENS)
        print(1e3 * sorted(bare(model, TOKENS) for _ in range(9))[4] / TOKENS)
        return
    with tempfile.TemporaryDirectory() as name:
        if arguments.busy:
            busy(Path(name), arguments.busy)
            return
        overhead(Path(name))
        batch(Path(name))
        second_question(Path(name))


if __name__ == "__main__":
    main()
