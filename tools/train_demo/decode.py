"""Greedy answers of the PyTorch model to held-out samples, many at a time; without a cache, so for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paddlemix_qwenvl_plugin.demo.world.sample import Sample
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from tools.train_demo.model import QwenVL
from tools.train_demo.rows import prompt_ids
from tools.train_demo.shards import picture

MAX_NEW_TOKENS = 160


@torch.no_grad()
def answers(model: QwenVL, tokenizer: QwenTokenizer, samples: Sequence[Sample], rows: int = 256) -> list[str]:
    """One answer a sample, to its first turn. Samples of one batch have the same number of pictures."""
    device = next(model.parameters()).device
    found: dict[int, str] = {}
    for n_pictures in sorted({len(sample.scenes) for sample in samples}):
        numbers = [i for i, sample in enumerate(samples) if len(sample.scenes) == n_pictures]
        for start in range(0, len(numbers), rows):
            chosen = numbers[start : start + rows]
            texts = _batch(model, tokenizer, [samples[i] for i in chosen], device)
            found.update(zip(chosen, texts))
    return [found[i] for i in range(len(samples))]


def _batch(
    model: QwenVL, tokenizer: QwenTokenizer, samples: Sequence[Sample], device: torch.device
) -> list[str]:
    side = model.visual.conv1.kernel_size[0] * 16
    pictures = np.stack([picture(scene, side, 256) for sample in samples for scene in sample.scenes])
    prompts = [prompt_ids(tokenizer, sample) for sample in samples]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(samples), int(lengths.max()) + MAX_NEW_TOKENS), tokenizer.eod_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    starts = torch.stack([(row == tokenizer.img_start_id).nonzero().flatten() for row in ids]).to(device)
    ids = ids.to(device)
    features = model.visual(torch.from_numpy(pictures).to(device))
    ends = torch.tensor([tokenizer.eod_id, tokenizer.im_end_id], device=device)
    each = torch.arange(len(samples), device=device)
    stopped = torch.zeros(len(samples), dtype=torch.bool, device=device)
    for step in range(MAX_NEW_TOKENS):
        until = int(lengths.max()) + step
        hidden = model.hidden(ids[:, :until], features, starts)
        token = model.lm_head(hidden[each, lengths + step - 1]).argmax(-1)
        ids[each, lengths + step] = torch.where(stopped, tokenizer.eod_id, token)
        stopped |= torch.isin(token, ends)
        if step % 8 == 7 and bool(stopped.all()):
            break
    rows = [row[length:].tolist() for row, length in zip(ids.cpu(), lengths.tolist())]
    return [tokenizer.decode(_until_end(row, ends.tolist())) for row in rows]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
