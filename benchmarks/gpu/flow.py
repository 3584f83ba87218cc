"""Time that Python and Paddle add to the engine's time on a GPU, in the 7B geometry with random weights in bfloat16.

Run: python benchmarks/gpu/flow.py FOLDER
Needs the plugin, a CPU build of Paddle, PyTorch for CUDA, 24 GB of GPU memory, and 19 GB for FOLDER, which must not
exist: it is created, and deleted at the end. Choose one in memory, if possible. Exporting takes two minutes. Paddle
needs no GPU build, because the engine computes on the GPU.

Measures the time to a complete caption of 64 tokens for one image through several interfaces: the C interface, with its
tensors in GPU memory, as in ours.py; the loop that `QwenVL.generate` runs; `QwenVL.encode_images`, then `generate_ids`;
the exported programs in Paddle Inference. The C interface, `QwenVL` and Paddle Inference have a process each. Figures
are medians after warm-up, with a new image and a new prompt each time. A line warns if its interface generates other
tokens than the C interface.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
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

# Tokens of the prompt, image slots among them, and tokens of the completion.
PROMPT, QUERIES, NEW_TOKENS = 284, 256, 64
TEXT_TOKENS = 151643  # ids of text tokens are smaller; the others are stop tokens and other special tokens
IMAGE_START, IMAGE_END, IMAGE_PAD = 151857, 151858, 151859
RUNS = 7  # timed requests per interface, after two for warm-up


# ---- the exported model ----------------------------------------------------------------------------------


def parameters(weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, bfloat16 bits) of random weights; special tokens have the logit 0, which is never the largest."""
    # A prime number of values, so that the rows of a matrix differ.
    pattern = np.random.default_rng(0).standard_normal(1048573).astype(np.float32)
    for name, weight in weights.items():
        is_matrix = len(weight.shape) > 1 and name != "wte.weight"
        # Keeps activations small.
        scale = 0.5 / np.sqrt(np.prod(weight.shape[1:])) if is_matrix else 1.0
        bits = ((pattern * np.float32(scale)).view(np.uint32) >> 16).astype(np.uint16)
        values = np.resize(bits, weight.shape)
        if name == "lm_head.weight":
            values[TEXT_TOKENS:] = 0
        yield name, values


def export(folder: Path, name: str) -> None:
    """Write an exported stage with engine programs and random weights, without a checkpoint."""
    from seven_b import CONFIG

    from paddlemix_qwenvl_plugin.artifact.contract import stock_inputs, vision_inputs
    from paddlemix_qwenvl_plugin.artifact.weights import stage_weights
    from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
    from paddlemix_qwenvl_plugin.export import export as export_module
    from paddlemix_qwenvl_plugin.modeling.engine_stage import EngineGeneration, EngineVision

    config = parse_config(CONFIG, "random weights")
    weights = stage_weights(config, name, "bfloat16")
    model, inputs = (EngineVision, vision_inputs) if name == "vision" else (EngineGeneration, stock_inputs)
    program = export_module.Program(
        "", functools.partial(model, weights=weights), inputs, export_module._on_all
    )
    stage = export_module._Stage(
        name, portable=[], engine=[program], parameters=lambda *_: parameters(weights), companions=()
    )
    stub_checkpoint = SimpleNamespace(
        folder=folder,
        config=config,
        fingerprint=lambda: "random weights",
        merge=SimpleNamespace(adapters=()),
    )
    prefix = folder / ("vision" if name == "vision" else "qwen")
    export_module._export(stub_checkpoint, prefix, "bfloat16", quant_type=None, engine="fused", stage=stage)
    (folder / "config.json").write_text(json.dumps(CONFIG))


# ---- the interfaces --------------------------------------------------------------------------------------


def request(seed: int) -> tuple[Any, Any]:
    """Random request: an image, float32 [1, 3, 448, 448], and a prompt that begins with it, int64 [1, PROMPT]."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, TEXT_TOKENS, [1, PROMPT])
    ids[0, : QUERIES + 2] = IMAGE_PAD
    ids[0, [0, QUERIES + 1]] = IMAGE_START, IMAGE_END
    return random.standard_normal([1, 3, 448, 448], np.float32), ids


def report(interface: str, answer: Callable[[Any, Any], list[int]], first_seed: int = 1) -> None:
    """Print the median and minimum time of `answer`, and the tokens of a request that is the same for all interfaces.

    Args:
        answer: returns the completion of a request.
        first_seed: seed of the second warm-up request; the timed requests have the next seeds. Calls of `report` in one
            process need different seeds, since caches would shorten a repeated request.
    """
    tokens = answer(*request(0))
    times = []
    for seed in range(first_seed, first_seed + RUNS + 1):
        pixels, ids = request(seed)
        start = time.perf_counter()
        answer(pixels, ids)
        times.append(1e3 * (time.perf_counter() - start))
    # The first time is a further warm-up, which is left out.
    median, minimum = statistics.median(times[1:]), min(times[1:])
    print(json.dumps({"interface": interface, "ms": median, "minimum": minimum, "tokens": tokens}))


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
    n_blocks = math.ceil((PROMPT + NEW_TOKENS) / BLOCK)
    features = torch.empty(1, QUERIES, Sizes().hidden, device="cuda")
    tokens = torch.empty(NEW_TOKENS, 1, device="cuda", dtype=torch.int32)

    def answer(pixels: Any, ids: Any) -> list[int]:
        images, prompt = torch.from_numpy(pixels).cuda(), torch.from_numpy(ids.astype(np.int32)).cuda()
        library.call(
            *("qvl_encode_images", vision.handle, 1, images.data_ptr(), features.data_ptr()), stream()
        )
        steps.run(prompt, tokens[0], n_new=PROMPT, n_past=0, prompt_len=PROMPT, features=features)
        for i in range(1, NEW_TOKENS):
            steps.run(tokens[i - 1], tokens[i], n_new=1, n_past=PROMPT + i - 1, prompt_len=PROMPT)
        completion: list[int] = tokens[:, 0].tolist()
        return completion

    with torch.cuda.stream(torch.cuda.Stream()), language.pool(n_blocks, BLOCK, BFLOAT16) as pool:
        steps = Steps(language, pool, np.arange(n_blocks)[None])
        report("C interface", answer)


def python(folder: Path) -> None:
    from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
    from paddlemix_qwenvl_plugin.runtime.generation import ImageInput

    start = time.perf_counter()
    vl = QwenVL.from_exported(folder / "vision", folder / "qwen", device="gpu")
    vl._loop.load(vision=True)
    print(f"opened both stages in {time.perf_counter() - start:.1f} s", file=sys.stderr)

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

    report("QwenVL.generate", generate)
    report("QwenVL.encode_images and generate_ids", generate_ids, first_seed=100)


def paddle_inference(folder: Path) -> None:
    import paddle
    from seven_b import CONFIG
    from stock_inputs import stock_feed

    from paddlemix_qwenvl_plugin.runtime.programs import Stage

    stages = [
        Stage(folder / name, stage, "gpu") for name, stage in (("vision", "vision"), ("qwen", "language"))
    ]
    vision, language = (stage.open() for stage in stages)
    # The KV caches, inputs that the programs declare but the engine does not read. They are created once, and
    # stock_feed creates the other inputs, as for a model without layers.
    cache = [language.zeros([2, 1, 32, 1024, 128], "bfloat16") for _ in range(32)]
    without_layers = {**CONFIG, "num_hidden_layers": 0}
    image_positions = np.array([[0, 0, QUERIES + 1]])

    def answer(pixels: Any, ids: Any) -> list[int]:
        [features] = vision([pixels])
        inputs = stock_feed(without_layers, ids, np.empty(0), image_positions, NEW_TOKENS, mask_axes=2)
        feed = [paddle.to_tensor(array, place=paddle.CPUPlace()) for array in inputs]
        feed[1] = features
        for mask in (3, 19):  # indices of the attention masks
            feed[mask] = feed[mask].astype("bfloat16")
        tokens: list[int] = language([*feed, *cache])[-1].numpy().ravel().tolist()
        return tokens

    report("Paddle Inference", answer)


PARTS = {"engine": engine, "python": python, "paddle": paddle_inference}


def run(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the exported stages")
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="measure only the interfaces of this part, with the stages of an existing FOLDER",
    )
    parser.add_argument(
        "--export",
        choices=("vision", "language", "both"),
        help="only export, without deleting FOLDER, which must exist for `vision` and `language`, and not for `both`",
    )
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
    """Measure all interfaces, and print their times and overheads."""
    figures = [json.loads(line) for part in PARTS for line in run(str(folder), "--part", part).splitlines()]
    baseline = figures[0]  # the C interface
    for figure in figures:
        overhead = figure["ms"] / baseline["ms"] - 1
        warning = "" if figure["tokens"] == baseline["tokens"] else ", DIFFERENT TOKENS"
        print(
            f"{figure['interface']}: median {figure['ms']:.1f} ms ({100 * overhead:+.1f} %), "
            f"minimum {figure['minimum']:.1f} ms{warning}"
        )


if __name__ == "__main__":
    main()
