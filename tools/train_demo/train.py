"""Train the demo model.

    python -m tools.train_demo.train --steps 9000 --out weights.npz

Cost: COST_LINE
Needs: PyTorch 2.6 or newer, tiktoken and Pillow. Nothing is downloaded: the pictures are drawn while it trains.
The config and the vocabulary are those in paddlemix_qwenvl_plugin/demo_model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from paddlemix_qwenvl_plugin.demo_world.tasks import held_out
from paddlemix_qwenvl_plugin.evaluation.demo import mark, score, table
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from tools.train_demo.decode import answers
from tools.train_demo.model import QwenVL
from tools.train_demo.optimiser import optimisers, schedule
from tools.train_demo.rows import ONE, TWO
from tools.train_demo.shards import Feed

FOLDER = Path(__file__).resolve().parents[2] / "paddlemix_qwenvl_plugin" / "demo_model"
VALIDATION = (
    10**6
)  # number of the first held-out sample that training looks at; evaluation takes those from 0 on


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    tokenizer = QwenTokenizer.from_folder(FOLDER)
    feed = Feed(FOLDER, config["visual"]["image_size"], options.first_shard, options.shards, options.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    model = QwenVL(config).to(device)
    if options.init:
        load(model, options.init)
    feed.start(device, wait_for=options.wait_for)
    began = time.perf_counter()
    loss_of = torch.compile(model.loss) if options.compile else model.loss
    chosen = optimisers(model, options.lr)
    base = [group["lr"] for one in chosen for group in one.param_groups]
    random = torch.Generator().manual_seed(options.seed)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses: list[torch.Tensor] = []
    for step in range(options.steps):
        factor = schedule(step, options.steps)
        groups = [group for one in chosen for group in one.param_groups]
        for group, lr in zip(groups, base):
            group["lr"] = lr * factor
        # One picture a row for most, two for some: two shapes of batch, one step.
        for name, size, rows, weight in (
            ("one", ONE, options.rows, 0.85),
            ("two", TWO, options.rows // 8, 0.15),
        ):
            batch = feed.batch(name, size, rows, random)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_of(*batch)
            (weight * loss).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in chosen:
            one.step()
            one.zero_grad(set_to_none=True)
        # The average of the last few hundred steps is what is kept.
        blend = 1 - min(0.998, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], blend)
        if (step + 1) % options.report == 0:
            recent = torch.stack(losses).float().view(-1, 2).mean(0).tolist()
            losses.clear()
            elapsed = time.perf_counter() - began
            print(
                f"step {step + 1} loss {recent[0]:.4f} {recent[1]:.4f} seconds {elapsed:.0f} shards {feed.ready}",
                flush=True,
            )
        if (step + 1) % options.evaluate == 0 or step + 1 == options.steps:
            feed_free = step + 1 == options.steps
            if feed_free:
                feed.close()
            _keep_and_score(model, average, tokenizer, options, final=feed_free)


def load(model: QwenVL, file: Path) -> None:
    """Weights as `save` wrote them."""
    arrays = np.load(file)
    model.load_state_dict({name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays})


def save(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Float16 under canonical names."""
    with file.open("wb") as out:
        np.savez(out, **{name: value.detach().cpu().half().numpy() for name, value in weights.items()})


def _keep_and_score(
    model: QwenVL,
    average: dict[str, torch.Tensor],
    tokenizer: QwenTokenizer,
    options: argparse.Namespace,
    final: bool,
) -> None:
    save(average, options.out)
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load_state_dict(average)
    n = options.samples * (4 if final else 1)
    samples = [held_out(VALIDATION + number) for number in range(n)]
    with torch.autocast("cuda", torch.bfloat16, enabled=next(model.parameters()).is_cuda):
        found = answers(model, tokenizer, samples)
    marks = [mark(sample, answer) for sample, answer in zip(samples, found)]
    print(table(score(marks)), flush=True)
    if final:
        wrong = [i for i, one in enumerate(marks) if not one.words_right or one.boxes_right < one.boxes]
        for i in wrong[:40]:
            turn = samples[i].turns[0]
            print(f"{turn.question!r}\n   want {turn.answer}\n   got  {found[i]}")
    model.load_state_dict(own)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="weights, .npz")
    parser.add_argument("--init", type=Path, help="weights to go on from, .npz")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=384, help="rows of one picture in a step")
    parser.add_argument("--shards", type=int, default=1600, help="of 512 pictures each")
    parser.add_argument("--first_shard", type=int, default=0)
    parser.add_argument("--wait_for", type=int, default=30, help="shards to wait for before the first step")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=100, help="steps between two lines")
    parser.add_argument("--evaluate", type=int, default=10**9, help="steps between two evaluations")
    parser.add_argument(
        "--samples", type=int, default=512, help="of an evaluation; the last takes four times that"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
