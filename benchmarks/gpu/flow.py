"""Overhead of Python and Paddle over the engine on a GPU, at the 7B geometry with random weights in bfloat16.

Run: python benchmarks/gpu/flow.py FOLDER
Needs the plugin, a CPU build of Paddle, PyTorch for CUDA, 24 GB of GPU memory, and room for 19 GB in FOLDER, which is
created and deleted at the end, preferably in memory. Exporting takes two minutes.

Time to a complete caption of 64 tokens with one image: through the C interface alone (its tensors in GPU memory, as in
ours.py); through `QwenVL`, by `generate` and by `encode_images` and `generate_ids`; and through the exported programs
in Paddle Inference; each in a separate process. Medians after warm-up, with a new image and a new prompt each time. All
must give the same tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
TESTS = FOLDER.parents[1] / "tests"
sys.path += [str(FOLDER.parent), str(TESTS), str(TESTS / "csrc")]

PROMPT, QUERIES, NEW_TOKENS = 284, 256, 64
WORDS = 151643  # tokens below are text; those above are stop tokens or special
RUNS = 7


# ---- the exported model ----------------------------------------------------------------------------------


def parameters(weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, bfloat16 bits) of random weights; special tokens are never the likeliest."""
    pattern = (np.random.default_rng(0).standard_normal(1048573)).astype(np.float32)
    for name, weight in weights.items():
        matrix = len(weight.shape) > 1 and name != "wte.weight"
        scale = 0.5 / np.sqrt(np.prod(weight.shape[1:])) if matrix else 1.0
        bits = ((pattern * np.float32(scale)).view(np.uint32) >> 16).astype(np.uint16)
        values = np.resize(bits, weight.shape)
        if name == "lm_head.weight":
            values[WORDS:] = 0
        yield name, values


def export(folder: Path, name: str) -> None:
    """Write a stage like the export of a checkpoint: the programs of the engine with random weights."""
    from seven_b import CONFIG

    from paddlemix_qwenvl_plugin.artifact.contract import stock_inputs, vision_inputs
    from paddlemix_qwenvl_plugin.artifact.weights import stage_weights
    from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
    from paddlemix_qwenvl_plugin.export import export as exporting
    from paddlemix_qwenvl_plugin.modeling.engine_stage import EngineGeneration, EngineVision

    config = parse_config(CONFIG, "made up")
    weights = stage_weights(config, name, "bfloat16")
    model, inputs = (EngineVision, vision_inputs) if name == "vision" else (EngineGeneration, stock_inputs)
    program = exporting.Program("", functools.partial(model, weights=weights), inputs, exporting._on_all)
    stage = exporting._Stage(name, [], [program], lambda *_: parameters(weights), ())
    made_up = SimpleNamespace(folder=folder, config=config, fingerprint=lambda: "made up")
    prefix = folder / ("vision" if name == "vision" else "qwen")
    exporting._export(made_up, prefix, "bfloat16", None, "fused", stage)
    (folder / "config.json").write_text(json.dumps(CONFIG))


# ---- the three ways --------------------------------------------------------------------------------------


def request(seed: int) -> tuple[Any, Any]:
    """An image, float32 [1, 3, 448, 448], and a prompt with it, int64 [1, PROMPT]."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, WORDS, [1, PROMPT])
    ids[0, : QUERIES + 2] = 151859
    ids[0, [0, QUERIES + 1]] = 151857, 151858
    return random.standard_normal([1, 3, 448, 448], np.float32), ids


def report(way: str, answer: Callable[[Any, Any], list[int]], first: int = 1) -> None:
    """Print the median milliseconds of `answer`, and the tokens of a request common to all ways.

    `first`: seed of the first of the other requests; no request repeats in a process, whose caches would serve it.
    """
    tokens = answer(*request(0))
    taken = []
    for seed in range(first, first + RUNS + 1):
        pixels, ids = request(seed)
        start = time.perf_counter()
        answer(pixels, ids)
        taken.append(1e3 * (time.perf_counter() - start))
    milliseconds = statistics.median(taken[1:])
    print(json.dumps({"way": way, "ms": milliseconds, "least": min(taken), "tokens": tokens}))


def engine(folder: Path) -> None:
    import torch
    from engine import BFLOAT16, LANGUAGE, VISION, Engine, Library, Weights
    from model import Sizes
    from ours import BLOCK, Steps, config_of, stream

    from paddlemix_qwenvl_plugin.engine import build, gpu

    gpu.load(0)
    library = Library(build.library())
    vision = Engine(library, config_of(Sizes(), VISION), Weights(library, folder / "vision.pdiparams"))
    language = Engine(library, config_of(Sizes(), LANGUAGE), Weights(library, folder / "qwen.pdiparams"))
    n_blocks = -(-(PROMPT + NEW_TOKENS) // BLOCK)
    features = torch.empty(1, QUERIES, Sizes().hidden, device="cuda")
    tokens = torch.empty(NEW_TOKENS, 1, device="cuda", dtype=torch.int32)

    def answer(pixels: Any, ids: Any) -> list[int]:
        images, prompt = torch.from_numpy(pixels).cuda(), torch.from_numpy(ids.astype(np.int32)).cuda()
        library.call(
            *("qvl_encode_images", vision.handle, 1, images.data_ptr(), features.data_ptr()), stream()
        )
        steps.run(prompt, tokens[0], PROMPT, 0, PROMPT, features)
        for i in range(1, NEW_TOKENS):
            steps.run(tokens[i - 1], tokens[i], 1, PROMPT + i - 1, PROMPT)
        found: list[int] = tokens[:, 0].tolist()
        return found

    with torch.cuda.stream(torch.cuda.Stream()), language.pool(n_blocks, BLOCK, BFLOAT16) as pool:
        steps = Steps(language, pool, np.arange(n_blocks)[None])
        report("engine", answer)


def python(folder: Path) -> None:
    from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
    from paddlemix_qwenvl_plugin.runtime.generation import ImageInput

    start = time.perf_counter()
    vl = QwenVL.from_exported(folder / "vision", folder / "qwen", device="gpu")
    vl._loop.load(vision=True)
    print(f"opened for QwenVL in {time.perf_counter() - start:.1f} s", file=sys.stderr)

    def generate(pixels: Any, ids: Any) -> list[int]:
        options = GenerationOptions(max_new_tokens=NEW_TOKENS)
        generation = vl.generation(ids[0].tolist(), [ImageInput.of(pixels[0])], [], options)
        vl._loop.submit(generation)
        while not generation.finished:
            vl._loop.step()
        return generation.tokens

    def generate_ids(pixels: Any, ids: Any) -> list[int]:
        features = vl.encode_images(pixels)
        return vl.generate_ids(ids, features, max_new_tokens=NEW_TOKENS, eos_token_ids=())[0]

    report("QwenVL, as generate", generate)
    report("QwenVL, encode_images and generate_ids", generate_ids, 100)


def paddle(folder: Path) -> None:
    import paddle as p
    from seven_b import CONFIG
    from stock_inputs import stock_feed

    from paddlemix_qwenvl_plugin.runtime.programs import Stage

    stages = [
        Stage(folder / name, stage, "gpu") for name, stage in (("vision", "vision"), ("qwen", "language"))
    ]
    vision, language = (stage.open() for stage in stages)
    # The caches that the programs declare and the engine does not read; the other inputs are small.
    cache = [language.zeros([2, 1, 32, 1024, 128], "bfloat16") for _ in range(32)]
    small = {**CONFIG, "num_hidden_layers": 0}
    place = np.array([[0, 0, QUERIES + 1]])

    def answer(pixels: Any, ids: Any) -> list[int]:
        [features] = vision([pixels])
        rest = stock_feed(small, ids, np.empty(0), place, NEW_TOKENS, mask_axes=2)
        feed = [p.to_tensor(each, place=p.CPUPlace()) for each in rest]
        feed[1] = features
        for mask in (3, 19):
            feed[mask] = feed[mask].astype("bfloat16")
        tokens: list[int] = language([*feed, *cache])[-1].numpy().ravel().tolist()
        return tokens

    report("Paddle Inference", answer)


PARTS = {"engine": engine, "python": python, "paddle": paddle}


def run(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--part", choices=PARTS, help="one way alone, on an existing FOLDER")
    parser.add_argument("--export", choices=("vision", "language", "both"), help="write FOLDER and keep it")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.part:
        PARTS[arguments.part](folder)
        return
    if arguments.export in ("vision", "language"):
        export(folder, arguments.export)
        return
    folder.mkdir()
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda stage: run(str(folder), "--export", stage), ("vision", "language")))
        if not arguments.export:
            compare(folder)
    finally:
        if not arguments.export:
            shutil.rmtree(folder)


def compare(folder: Path) -> None:
    figures = [json.loads(line) for part in PARTS for line in run(str(folder), "--part", part).splitlines()]
    for figure in figures:
        over = figure["ms"] / figures[0]["ms"] - 1
        same = "" if figure["tokens"] == figures[0]["tokens"] else ", OTHER TOKENS"
        print(
            f"{figure['way']}: {figure['ms']:.1f} ms, at least {figure['least']:.1f}, engine {100 * over:+.1f} %{same}"
        )


if __name__ == "__main__":
    main()
