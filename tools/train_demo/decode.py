"""Batched greedy decoding of held-out samples with the PyTorch model, without a KV cache: slow on a CPU."""

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
def answers(
    model: QwenVL, tokenizer: QwenTokenizer, samples: Sequence[Sample], batch_size: int = 256
) -> list[str]:
    """Answer the first turn of each sample."""
    device = next(model.parameters()).device
    texts: dict[int, str] = {}  # by index of the sample
    # The samples of a batch have the same number of images.
    for n_images in sorted({len(sample.scenes) for sample in samples}):
        indices = [i for i, sample in enumerate(samples) if len(sample.scenes) == n_images]
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            texts.update(zip(batch, _answer_batch(model, tokenizer, [samples[i] for i in batch], device)))
    return [texts[i] for i in range(len(samples))]


def _answer_batch(
    model: QwenVL, tokenizer: QwenTokenizer, samples: Sequence[Sample], device: torch.device
) -> list[str]:
    # The side of the model's input in pixels: 16 x 16 patches.
    image_size = model.visual.conv1.kernel_size[0] * 16
    # Drawn at 256 pixels, as in `qwenvl eval demo` and the shipped images (demo/world/draw.py).
    images = np.stack(
        [image_array(scene, image_size, side=256) for sample in samples for scene in sample.scenes]
    )
    prompts = [prompt_ids(tokenizer, sample) for sample in samples]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(samples), int(lengths.max()) + MAX_NEW_TOKENS), tokenizer.eod_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    starts = torch.stack([(row == tokenizer.img_start_id).nonzero().flatten() for row in ids]).to(device)
    ids = ids.to(device)
    features = model.visual(torch.from_numpy(images).to(device))
    stop_token_ids = torch.tensor([tokenizer.eod_id, tokenizer.im_end_id], device=device)
    rows = torch.arange(len(samples), device=device)
    stopped = torch.zeros(len(samples), dtype=torch.bool, device=device)
    for step in range(MAX_NEW_TOKENS):
        longest = int(lengths.max()) + step
        hidden = model.hidden(ids[:, :longest], features, starts)
        tokens = model.lm_head(hidden[rows, lengths + step - 1]).argmax(-1)
        ids[rows, lengths + step] = torch.where(stopped, tokenizer.eod_id, tokens)
        stopped |= torch.isin(tokens, stop_token_ids)
        if step % 8 == 7 and bool(stopped.all()):  # not in every step, since it waits for the GPU
            break
    completions = [row[length:].tolist() for row, length in zip(ids.cpu(), lengths.tolist())]
    return [tokenizer.decode(_until_stop(ids, stop_token_ids.tolist())) for ids in completions]


def _until_stop(ids: list[int], stop_token_ids: list[int]) -> list[int]:
    """Return the tokens before the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stop_token_ids), len(ids))
    return ids[:end]
