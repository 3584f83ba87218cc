"""Benchmark of the loop on the demo model: overhead over the engine, speed-up of a batch, cost of a second question.

Run: python benchmarks/loop.py
Needs the plugin and a C++ compiler; takes two minutes. Each figure is the best of several rounds. With --busy N, only
the engine is measured, with one and with two threads, while N other processes use the CPU; these figures are medians,
and include the time of the prompt.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
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
from paddlemix_qwenvl_plugin.engine import library
from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.loop import Loop

# (dtype, quant_type) of the exports.
STORAGE: list[tuple[str, Optional[str]]] = [
    ("float32", None),
    ("bfloat16", None),
    ("float16", None),
    ("bfloat16", "weight_only_int8"),
    ("bfloat16", "weight_only_int4"),
]

# For the time per token: the prompt, and the number of decode steps.
PROMPT, DECODE_STEPS = list(range(200, 232)), 200

# Prompts of 4 to 59 tokens and completions of 16 to 242 tokens, in a deterministic mix.
PROMPTS = [[200 + (7 * n + i) % 300 for i in range(4 + 5 * n % 60)] for n in range(64)]
COMPLETION_TOKENS = [16 + 37 * n % 240 for n in range(64)]


class CRequest(ctypes.Structure):
    """The C struct qvl_request without its last member, `adapter`, which is optional."""

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


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def engine_seconds(model: QwenVL, n_new: int) -> float:
    """Time of a call of the engine's qvl_generate for PROMPT in seconds, greedy, without a callback."""
    executor = model._loop._executor
    assert isinstance(executor, EngineExecutor)
    prompt, tokens, result = (c_int32 * len(PROMPT))(*PROMPT), (c_int32 * n_new)(), (c_int32 * 4)()
    request = CRequest(len(PROMPT), 0, ctypes.addressof(prompt), None, n_new)
    # The parameters of qvl_generate in csrc/include/qwenvl.h: (C type, argument).
    parameters = [
        (c_void_p, executor._language.handle),  # engine
        (c_void_p, None),  # pool
        (c_int32, 1),  # n
        (c_void_p, ctypes.addressof(request)),  # requests
        (c_uint32, ctypes.sizeof(request)),  # request_size
        (c_int32, 0),  # n_end
        (c_void_p, None),  # end_ids
        (c_void_p, None),  # on_step
        (c_void_p, None),  # user
        (c_int64, n_new),  # stride
        (c_void_p, ctypes.addressof(tokens)),  # tokens
        (c_void_p, ctypes.addressof(result)),  # results
        (c_void_p, None),  # stream
        (c_void_p, None),  # error
    ]
    generate = library.load().qvl_generate
    generate.argtypes = [c_type for c_type, _ in parameters]
    arguments = [argument for _, argument in parameters]

    def run() -> None:
        assert generate(*arguments) == 0

    return seconds(run)


def loop_seconds(model: QwenVL, n_new: int) -> float:
    """Time of the completion that `engine_seconds` times, but through the loop, with its text streamed, in seconds."""
    options = GenerationOptions(max_new_tokens=n_new)
    model._loop = Loop(model._loop._executor)  # without the prefix cache of the last round
    stream = model.start(Prompt(PROMPT, []), [], [], options, None)
    elapsed = seconds(lambda: list(stream))
    assert len(stream.answer.token_ids) == n_new
    return elapsed


def ms_per_token(measure: Callable[[QwenVL, int], float], model: QwenVL) -> float:
    """Time per decode step in milliseconds.

    It is the difference between a completion of DECODE_STEPS + 1 tokens and one of a single token, divided by
    DECODE_STEPS.
    """
    prompt = best(lambda: measure(model, 1))
    completion = best(lambda: measure(model, DECODE_STEPS + 1))
    return 1e3 * (completion - prompt) / DECODE_STEPS


def open_demo(folder: Path, dtype: str, quant_type: Optional[str]) -> QwenVL:
    export_vision(MODEL, folder / "vision", dtype)
    export_language(MODEL, folder, "qwen", dtype, quant_type=quant_type)
    model = QwenVL.from_exported(folder / "vision", folder / "qwen")
    model.load()
    return model


def overhead(folder: Path) -> None:
    print(
        "| storage type | engine only (`qvl_generate`), ms per token | loop, with detokenization | overhead |\n"
        "| --- | --- | --- | --- |"
    )
    for dtype, quant_type in STORAGE:
        model = open_demo(folder, dtype, quant_type)
        engine, loop = ms_per_token(engine_seconds, model), ms_per_token(loop_seconds, model)
        print(f"| {quant_type or dtype} | {engine:.3f} | {loop:.3f} | {loop - engine:.3f} |", flush=True)


def batch(folder: Path) -> None:
    print(
        "\n| storage type | one after another, tokens/s | 64 at once | speed-up |\n| --- | --- | --- | --- |"
    )
    n_tokens = sum(COMPLETION_TOKENS)
    for dtype, quant_type in STORAGE:
        model = open_demo(folder, dtype, quant_type)
        sequential, concurrent = (best(partial(run_all, model, window), 3) for window in (1, 64))
        rates = f"{n_tokens / sequential:.0f} | {n_tokens / concurrent:.0f} | {sequential / concurrent:.1f}"
        print(f"| {quant_type or dtype} | {rates} |", flush=True)


def run_all(model: QwenVL, window: int) -> float:
    """Time of the 64 requests of PROMPTS in seconds, without stop tokens, with at most `window` concurrently."""
    model._loop = Loop(model._loop._executor)  # without the prefix cache of the last round
    streams = (
        model.start(Prompt(ids, []), [], [], GenerationOptions(max_new_tokens=n), None)
        for ids, n in zip(PROMPTS, COMPLETION_TOKENS)
    )
    return seconds(lambda: list(model.finish_all(streams, window)))


def second_question(folder: Path) -> None:
    model = open_demo(folder, "float32", None)
    image = {"image": str(QUESTIONS[0].images[0])}
    options = GenerationOptions(max_new_tokens=1)

    def time_to_first_token(text: str) -> float:
        return seconds(lambda: model.ask(Request([image, {"text": text}], options, chat=True)).finish())

    time_to_first_token("What is this?")  # warm-up
    first_times, second_times = [], []
    for n in range(9):
        model._loop = Loop(model._loop._executor)  # without the caches of the last round
        first_times.append(time_to_first_token(f"What is this? {n}"))
        second_times.append(time_to_first_token(f"How many shapes are there? {n}"))
    print(
        f"\ntime to first token: a question about an image {1e3 * min(first_times):.1f} ms; "
        f"a second question about the same image {1e3 * min(second_times):.1f} ms"
    )


def engine_on_busy_cpu(folder: Path, n_processes: int) -> None:
    print(f"\nengine only, ms per token, while {n_processes} other processes use the CPU\n")
    print("| storage type | 1 thread | 2 threads |\n| --- | --- | --- |")
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_processes)]
    try:
        for dtype, quant_type in STORAGE:
            open_demo(folder, dtype, quant_type)  # for its exports, which the processes below open
            figures = []
            for threads in ("1", "2"):
                command = [sys.executable, __file__, "--engine_only", str(folder)]
                environment = {**os.environ, "OMP_NUM_THREADS": threads}
                process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                figures.append(float(process.stdout.split()[-1]))
            print(f"| {quant_type or dtype} | {figures[0]:.3f} | {figures[1]:.3f} |", flush=True)
    finally:
        for process in load:
            process.kill()


def print_engine_only(folder: Path) -> None:
    """Print the milliseconds per token of the engine on the export in `folder`: the median of nine repetitions."""
    model = QwenVL.from_exported(folder / "vision", folder / "qwen")
    model.load()
    engine_seconds(model, DECODE_STEPS)  # warm-up
    print(1e3 * statistics.median(engine_seconds(model, DECODE_STEPS) for _ in range(9)) / DECODE_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="processes that use the CPU at the same time"
    )
    # Internal: folder of an export, for the processes that --busy measures.
    parser.add_argument("--engine_only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine_only:
        print_engine_only(arguments.engine_only)
        return
    with tempfile.TemporaryDirectory() as name:
        if arguments.busy:
            engine_on_busy_cpu(Path(name), arguments.busy)
            return
        overhead(Path(name))
        batch(Path(name))
        second_question(Path(name))


if __name__ == "__main__":
    main()
