r"""Train the demo model.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \
        -m tools.train_demo.train --steps 12000 --minutes 20 --evaluate 3000 --out weights.npz

Cost: 17 minutes on two H100 GPUs with 32 CPU cores. With one GPU, or none, omit `torch.distributed.run` and its
arguments up to `-m`; a step then has half of the rows. Needs PyTorch 2.6 or newer, tiktoken and Pillow. Downloads
nothing: the images are drawn during training. Config and vocabulary are those in paddlemix_qwenvl_plugin/demo/model.
Seeded, but not bit-reproducible: the images available at a step depend on the speed of drawing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from paddlemix_qwenvl_plugin.demo.score import mark, score
from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
from paddlemix_qwenvl_plugin.evaluation.rates import table
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from tools.train_demo.decode import answers
from tools.train_demo.model import QwenVL
from tools.train_demo.optimiser import optimisers, schedule
from tools.train_demo.rows import ONE, TWO
from tools.train_demo.shards import Feed

FOLDER = Path(__file__).resolve().parents[2] / "paddlemix_qwenvl_plugin" / "demo" / "model"

# First held-out sample used in training. Evaluation uses those from 0 on.
VALIDATION = 10**6


def main() -> None:
    options = _options()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(options.seed)
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    tokenizer = QwenTokenizer.from_folder(FOLDER)
    feed = Feed(
        FOLDER, config["visual"]["image_size"], rank * options.shards, options.shards, options.workers
    )
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = True
    model, scored = QwenVL(config).to(device), QwenVL(config).to(device)
    feed.start(device, wait_for=options.wait_for)
    began = time.perf_counter()
    if options.compile:  # per block: a tenth of the compile time of the complete graph
        for block in [*model.h, *model.visual.transformer["resblocks"]]:
            block.compile(dynamic=False)
    chosen = optimisers(model, options.lr)
    base = [group["lr"] for one in chosen for group in one.param_groups]
    random = torch.Generator().manual_seed(options.seed * ranks + rank)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses: list[torch.Tensor] = []
    for step in range(options.steps):
        # On a slow machine the schedule ends at the time limit, with fewer steps.
        if step % 10 == 0:
            elapsed = _everywhere(time.perf_counter() - began, device)
        progress = max(step / options.steps, elapsed / (60 * options.minutes))
        last = progress >= 1 or step + 1 == options.steps
        factor = schedule(step, progress)
        groups = [group for one in chosen for group in one.param_groups]
        for group, lr in zip(groups, base):
            group["lr"] = lr * factor
        # Rows with one image and rows with two: two batch shapes per step.
        for name, size, rows, weight in (
            ("one", ONE, options.rows, 0.85),
            ("two", TWO, options.rows // 8, 0.15),
        ):
            batch = feed.batch(name, size, rows, random)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(*batch)
            (weight * loss).backward()
            losses.append(loss.detach())
        if ranks > 1:
            _average_gradients(model, ranks)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in chosen:
            one.step()
            one.zero_grad(set_to_none=True)
        # The saved weights are the average over the last few hundred steps.
        blend = 1 - min(0.998, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], blend)
        if (step + 1) % options.report == 0 and rank == 0:
            recent = torch.stack(losses).float().view(-1, 2).mean(0).tolist()
            losses.clear()
            print(
                f"step {step + 1} loss {recent[0]:.4f} {recent[1]:.4f} seconds {elapsed:.0f} shards {feed.ready}",
                flush=True,
            )
        if last:
            feed.close()
        if (last or (step + 1) % options.evaluate == 0) and rank == 0:
            save(average, options.out)
            scored.load_state_dict(average)
            _score(scored, tokenizer, options.samples * (4 if last else 1), show=40 if last else 0)
        if last:
            break
    if ranks > 1:
        distributed.destroy_process_group()


def _everywhere(seconds: float, device: torch.device) -> float:
    """Broadcast the value of the first process."""
    if not distributed.is_initialized():
        return seconds
    value = torch.tensor(seconds, device=device)
    distributed.broadcast(value, 0)
    return float(value)


def _average_gradients(model: QwenVL, ranks: int) -> None:
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / ranks
    distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])


def save(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Save weights as float16 with canonical names."""
    with file.open("wb") as out:
        np.savez(out, **{name: value.detach().cpu().half().numpy() for name, value in weights.items()})


def _score(model: QwenVL, tokenizer: QwenTokenizer, n: int, show: int) -> None:
    """Print the rates over `n` validation samples and up to `show` wrong answers."""
    samples = [held_out(VALIDATION + number) for number in range(n)]
    with torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).is_cuda):
        found = answers(model, tokenizer, samples)
    marks = [mark(sample, answer) for sample, answer in zip(samples, found)]
    print(table(score(marks)), flush=True)
    wrong = [i for i, one in enumerate(marks) if not one.words_right or one.boxes_right < one.boxes]
    for i in wrong[:show]:
        turn = samples[i].turns[0]
        print(f"{turn.question!r}\n   want {turn.answer}\n   got  {found[i]}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="time limit; ends with fewer steps")
    parser.add_argument("--out", type=Path, required=True, help="weights, .npz")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=224, help="one-image rows per step")
    parser.add_argument("--shards", type=int, default=2000, help="number of shards, 512 images each")
    parser.add_argument("--wait_for", type=int, default=12, help="shards to wait for before the first step")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=100, help="steps between reports")
    parser.add_argument("--evaluate", type=int, default=10**9, help="steps between evaluations")
    parser.add_argument(
        "--samples", type=int, default=256, help="samples per evaluation; four times as many in the last"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
