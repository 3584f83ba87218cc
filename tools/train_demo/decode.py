"""Batched greedy decoding of held-out samples with the PyTorch model; without a KV cache, so for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paddlemix_qwenvl_plugin.demo.world.sample import Sample
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from tools.train_demo.model import QwenVL
from tools.train_demo.rows import prompt_ids
from tools.train_demo.shards import image_array

MAX_NEW_TOKENS = 160


@torch.no_grad()
def answers(model: QwenVL, tokenizer: QwenTokenizer, samples: Sequence[Sample], rows: int = 256) -> list[str]:
    """Answer the first turn of each sample. Samples of one batch have the same number of images."""
    device = next(model.parameters()).device
    found: dict[int, str] = {}
    for n_images in sorted({len(sample.scenes) for sample in samples}):
        numbers = [i for i, sample in enumerate(samples) if len(sample.scenes) == n_images]
        for start in range(0, len(numbers), rows):
            chosen = numbers[start : start + rows]
            texts = _batch(model, tokenizer, [samples[i] for i in chosen], device)
            found.update(zip(chosen, texts))
    return [found[i] for i in range(len(samples))]


def _batch(
    model: QwenVL, tokenizer: QwenTokenizer, samples: Sequence[Sample], device: torch.device
) -> list[str]:
    side = model.visual.conv1.kernel_size[0] * 16
    images = np.stack([image_array(scene, side, 256) for sample in samples for scene in sample.scenes])
    prompts = [prompt_ids(tokenizer, sample) for sample in samples]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(samples), int(lengths.max()) + MAX_NEW_TOKENS), tokenizer.eod_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    starts = torch.stack([(row == tokenizer.img_start_id).nonzero().flatten() for row in ids]).to(device)
    ids = ids.to(device)
    features = model.visual(torch.from_numpy(images).to(device))
    stop_token_ids = torch.tensor([tokenizer.eod_id, tokenizer.im_end_id], device=device)
    each = torch.arange(len(samples), device=device)
    stopped = torch.zeros(len(samples), dtype=torch.bool, device=device)
    for step in range(MAX_NEW_TOKENS):
        until = int(lengths.max()) + step
        hidden = model.hidden(ids[:, :until], features, starts)
        token = model.lm_head(hidden[each, lengths + step - 1]).argmax(-1)
        ids[each, lengths + step] = torch.where(stopped, tokenizer.eod_id, token)
        stopped |= torch.isin(token, stop_token_ids)
        if step % 8 == 7 and bool(stopped.all()):
            break
    rows = [row[length:].tolist() for row, length in zip(ids.cpu(), lengths.tolist())]
    return [tokenizer.decode(_until_stop(row, stop_token_ids.tolist())) for row in rows]


def _until_stop(ids: list[int], stop_token_ids: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop_token_ids), len(ids))]
