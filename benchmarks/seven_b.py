"""Benchmark of the 7B geometry with random weights: time and peak memory of export and answers.

The model has all layers: 32 of the language model, 48 of the vision tower.

Run: python benchmarks/seven_b.py --quant_type weight_only_int4 --folder FOLDER
or, only for the export of a GPTQ checkpoint: python benchmarks/seven_b.py --gptq --folder FOLDER
Needs the plugin, a C++ compiler, 36 GB of free disk (19 GB for the bfloat16 checkpoint that it creates) and 24 GiB
of memory. With weight_only_int8 it takes about 10 minutes on two CPUs (computed from the times in docs/benchmarks.md).
FOLDER is created, and deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.engine.quantize import QUANT_TYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from geometry_7b import CONFIG as ONE_LAYER
from geometry_7b import write_gptq, write_model

CONFIG: dict[str, Any] = {
    **ONE_LAYER,
    "num_hidden_layers": 32,
    "visual": {**ONE_LAYER["visual"], "layers": 48},
}

# Program of a process that runs `code` and prints its time and peak memory as a JSON object on the last line.
MEASURED = """
import json, re, time
from pathlib import Path
start = time.perf_counter()
report = {{}}
{code}
report["seconds"] = time.perf_counter() - start
# Not ru_maxrss, whose initial value is the parent's.
report["peak_gib"] = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
print(json.dumps(report))
"""

EXPORT = """
from paddlemix_qwenvl_plugin import export_{stage}
export_{stage}({arguments})
"""

# Run in two processes at the same time, on cached files. Generating a token reads all weights of the language stage
# except most embeddings; the sleep lets the slower process do so before the faster one reads its memory figures. The
# proportional set size (Pss) counts a page that n processes share as 1/n of a page in each.
SHARED = """
from paddlemix_qwenvl_plugin import QwenVL
vl = QwenVL.from_exported({vision!r}, {language!r})
vl._loop.load(vision=True)
report["open"] = time.perf_counter() - start
vl.generate_ids([[1, 2, 3]], max_new_tokens=1, eos_token_ids=())
time.sleep(20)
with open("/proc/self/smaps_rollup") as file:
    for line in file:
        if line.startswith(("Rss:", "Pss:")):
            report[line[:3] + "_gib"] = int(line.split()[1]) / 2**20
"""

# A prompt of 300 tokens with an image, and one new token; then twice the same prompt, now in the prefix cache, with 1
# and 33 new tokens.
ANSWER = """
import numpy as np
from paddlemix_qwenvl_plugin import QwenVL
vl = QwenVL.from_exported({vision!r}, {language!r})
vl._loop.load(vision=True)
pixels = np.random.default_rng(0).standard_normal((1, 3, 448, 448)).astype("float32")
report["open"] = time.perf_counter() - start
begin = time.perf_counter()
features = vl.encode_images(pixels)
report["encode_images"] = time.perf_counter() - begin
assert features.shape == (1, 256, 4096) and np.isfinite(features).all()
ids = [151857, *[151859] * 256, 151858, *range(1000, 1042)]
for name, n in (("prompt", 1), ("prompt_again", 1), ("33_tokens", 33)):
    begin = time.perf_counter()
    [tokens] = vl.generate_ids([ids], features, max_new_tokens=n, eos_token_ids=())
    report[name] = time.perf_counter() - begin
report["ms_a_token"] = 1000 * (report["33_tokens"] - report["prompt_again"]) / 32
"""

# 64 requests of different lengths without images and stop tokens: every eighth of them sequentially, then all
# concurrently.
AT_ONCE = """
from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
vl = QwenVL.from_exported({vision!r}, {language!r})
requests = [([1000 + (7 * n + i) % 3000 for i in range(4 + 5 * n % 60)], 16 + 37 * n % 112) for n in range(64)]
def tokens_per_second(batch):
    generations = [vl.generation(ids, [], [], GenerationOptions(max_new_tokens=n)) for ids, n in batch]
    begin = time.perf_counter()
    for generation in generations:
        vl._loop.submit(generation)
    while any(not generation.finished for generation in generations):
        vl._loop.step()
    return sum(n for _, n in batch) / (time.perf_counter() - begin)
tokens_per_second([([1, 2, 3], 2)])  # warm-up
alone = requests[::8]
alone_seconds = sum(n / tokens_per_second([(ids, n)]) for ids, n in alone)
report["alone_tokens_s"] = sum(n for _, n in alone) / alone_seconds
report["at_once_tokens_s"] = tokens_per_second(requests)
report["speed_up"] = report["at_once_tokens_s"] / report["alone_tokens_s"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--quant_type", choices=QUANT_TYPES, help="quantization of the language stage")
    weights.add_argument(
        "--gptq", action="store_true", help="a GPTQ checkpoint of 4 bits in groups of 128, with act-order"
    )
    parser.add_argument("--folder", type=Path, required=True, help="working folder; must not exist")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir()
    try:
        if arguments.gptq:
            export_gptq(folder)
            return
        start = time.perf_counter()
        write_model(folder / "model", CONFIG, "bfloat16")
        print(f"created the checkpoint in {time.perf_counter() - start:.0f} s")
        model, vision, language = str(folder / "model"), str(folder / "vision"), str(folder / "text")
        # (stage, positional arguments of its export function)
        for stage, export_arguments in (
            ("vision", [model, vision, "bfloat16", "fused"]),
            ("language", [model, language, "qwen", "bfloat16", "fused", arguments.quant_type]),
        ):
            report = run(EXPORT.format(stage=stage, arguments=", ".join(map(repr, export_arguments))))
            print(f"export-{stage}: {line(report)}")
        shutil.rmtree(folder / "model")
        sizes = {path.name: path.stat().st_size / 1e9 for path in folder.rglob("*.pdiparams")}
        print(", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items()))
        stages = {"vision": vision, "language": language + "/qwen"}
        print(f"answer: {line(run(ANSWER.format(**stages)))}")
        print(f"64 requests: {line(run(AT_ONCE.format(**stages)))}")
        with ThreadPoolExecutor(2) as pool:
            for report in pool.map(run, [SHARED.format(**stages)] * 2):
                print(f"each of two processes: {line(report)}")
    finally:
        shutil.rmtree(folder)


def export_gptq(folder: Path) -> None:
    model, language = str(write_gptq(folder / "model", CONFIG)), str(folder / "text")
    report = run(EXPORT.format(stage="language", arguments=f"{model!r}, {language!r}, 'qwen', 'float16'"))
    size = (folder / "text" / "qwen.pdiparams").stat().st_size / 1e9
    print(f"export-language of GPTQ, {size:.2f} GB: {line(report)}")


def run(code: str) -> dict[str, float]:
    """Run code in a measured process, and return its report."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURED.format(code=code)], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(process.stderr[-3000:])
    report: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return report


def line(report: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in report.items())


if __name__ == "__main__":
    main()
