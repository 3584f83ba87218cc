r"""Train the demo model.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \
        -m tools.train_demo.train --steps 12000 --minutes 20 --evaluate 3000 --out weights.npz

Takes 17 minutes on two H100 GPUs with 32 CPU cores. With one GPU, or none, begin the command with
`python -m tools.train_demo.train`; a step then has half as many rows. Needs PyTorch 2.6 or newer, tiktoken and Pillow.
Downloads nothing: the images are drawn during training. Config and vocabulary are those in
paddlemix_qwenvl_plugin/demo/model; export_checkpoint.py writes the trained weights there. The random numbers have fixed
seeds, but the weights differ in each run, since the images that are available at a step depend on the speed of drawing.
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
from tools.train_demo.shards import Feed

FOLDER = Path(__file__).resolve().parents[2] / "paddlemix_qwenvl_plugin" / "demo" / "model"

# Number of the first held-out sample for validation during training; `qwenvl eval demo` uses those from 0 on.
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
    model = QwenVL(config).to(device)
    average_model = QwenVL(config).to(device)  # with the averaged weights, for validation
    feed.start(device, wait_for=options.wait_for)
    start = time.perf_counter()
    if options.compile:
        # Each block separately, which takes a tenth of the compile time of the complete model.
        for block in [*model.h, *model.visual.transformer["resblocks"]]:
            block.compile(dynamic=False)
    model_optimisers = optimisers(model, options.lr)
    groups = [group for optimiser in model_optimisers for group in optimiser.param_groups]
    initial_rates = [group["lr"] for group in groups]
    random = torch.Generator().manual_seed(options.seed * ranks + rank)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses: list[torch.Tensor] = []
    for step in range(options.steps):
        # On a slow machine the schedule ends at the time limit, with fewer steps.
        if step % 10 == 0:
            elapsed = _broadcast(time.perf_counter() - start, device)
        progress = max(step / options.steps, elapsed / (60 * options.minutes))
        last = progress >= 1 or step + 1 == options.steps
        factor = schedule(step, progress)
        for group, lr in zip(groups, initial_rates):
            group["lr"] = lr * factor
        # Rows with one image and rows with two: two batch shapes per step.
        for name, rows, loss_weight in (("one", options.rows, 0.85), ("two", options.rows // 8, 0.15)):
            batch = feed.batch(name, rows, random)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(*batch)
            (loss_weight * loss).backward()
            if rank == 0:  # which reports the losses
                losses.append(loss.detach())
        if ranks > 1:
            _average_gradients(model, ranks)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in model_optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        # The saved weights are an exponential moving average, with a time constant of 500 steps after the first 5,000.
        weight = 1 - min(0.998, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], weight)
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
            average_model.load_state_dict(average)
            _validate(average_model, tokenizer, options.samples * (4 if last else 1), show=40 if last else 0)
        if last:
            break
    if ranks > 1:
        distributed.destroy_process_group()


def _broadcast(seconds: float, device: torch.device) -> float:
    """Return the value of the first process in all processes."""
    if not distributed.is_initialized():
        return seconds
    value = torch.tensor(seconds, device=device)
    distributed.broadcast(value, 0)
    return float(value)


def _average_gradients(model: QwenVL, ranks: int) -> None:
    """Replace the gradients by their mean over all processes, in one all-reduce."""
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / ranks
    distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])


def save(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Save weights as float16 with canonical names."""
    with file.open("wb") as out:
        np.savez(out, **{name: value.detach().cpu().half().numpy() for name, value in weights.items()})


def _validate(model: QwenVL, tokenizer: QwenTokenizer, n: int, show: int) -> None:
    """Answer `n` validation samples; print the rates of right answers, and up to `show` wrong answers."""
    samples = [held_out(VALIDATION + number) for number in range(n)]
    with torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).is_cuda):
        texts = answers(model, tokenizer, samples)
    marks = [mark(sample, text) for sample, text in zip(samples, texts)]
    print(table(score(marks)), flush=True)
    wrong = [
        i
        for i, sample_mark in enumerate(marks)
        if not sample_mark.words_right or sample_mark.boxes_right < sample_mark.boxes
    ]
    for i in wrong[:show]:
        turn = samples[i].turns[0]
        print(f"{turn.question!r}\n   expected {turn.answer}\n   answer   {texts[i]}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, required=True, help="maximum number of steps")
    parser.add_argument("--minutes", type=float, default=60, help="maximum duration of the training")
    parser.add_argument("--out", type=Path, required=True, help="output file of the weights, .npz")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="learning rate of AdamW; Muon's is 10 times it"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=224,
        help="rows with one image per step and process; an eighth as many have two",
    )
    parser.add_argument(
        "--shards", type=int, default=2000, help="maximum number of shards per process, with 512 images each"
    )
    parser.add_argument("--wait_for", type=int, default=12, help="shards to wait for before the first step")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw images, per process")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the drawn rows")
    parser.add_argument("--report", type=int, default=100, help="steps between reports")
    parser.add_argument(
        "--evaluate", type=int, default=10**9, help="steps between evaluations, each after saving the weights"
    )
    parser.add_argument(
        "--samples", type=int, default=256, help="samples per evaluation; four times as many in the last"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
