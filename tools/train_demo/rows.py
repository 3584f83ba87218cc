"""Token rows for training: prompt and answers in one row, with the positions to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.demo.world.sample import Sample
from paddlemix_qwenvl_plugin.processing.prompts import base_prompt, chat_prompt
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer

NAME = "a.png"  # any name will do: image features replace it


@dataclass(frozen=True)
class Size:
    """Capacity of a row: tokens, learned tokens, images."""

    tokens: int
    learned: int
    images: int


ONE = Size(512, 224, 1)
TWO = Size(704, 160, 2)


@dataclass(frozen=True)
class Row:
    """Training row. `at`: positions whose next token is learned; `starts`: positions of `<img>`."""

    ids: NDArray[np.int16]
    at: NDArray[np.int16]
    starts: NDArray[np.int16]


def prompt_ids(tokenizer: QwenTokenizer, sample: Sample) -> list[int]:
    """Encode the prompt of the first turn."""
    parts = sample.parts([NAME] * len(sample.scenes))
    make = chat_prompt if sample.form == "chat" else base_prompt
    return make(tokenizer, parts).input_ids


def make_row(tokenizer: QwenTokenizer, sample: Sample, size: Size) -> Row:
    """Encode as many turns as fit into `size`; the first must fit."""
    end = tokenizer.im_end_id if sample.form == "chat" else tokenizer.eod_id
    ids = prompt_ids(tokenizer, sample)
    at: list[int] = []
    new_line, role = tokenizer.encode("\n"), tokenizer.encode("user")
    reply = [*new_line, tokenizer.im_start_id, *tokenizer.encode("assistant"), *new_line]
    for number, turn in enumerate(sample.turns):
        question: list[int] = []
        if number:
            asked = tokenizer.encode(turn.question)
            question = [
                *new_line,
                tokenizer.im_start_id,
                *role,
                *new_line,
                *asked,
                tokenizer.im_end_id,
                *reply,
            ]
        answer = [*tokenizer.encode(turn.answer), end]
        start = len(ids) + len(question)
        if start + len(answer) > size.tokens or len(at) + len(answer) > size.learned:
            if not number:
                raise ValueError(f"no room for {turn}: {start} + {len(answer)} tokens")
            continue
        ids += question + answer
        at += range(start - 1, start + len(answer) - 1)
    starts = [i for i, token in enumerate(ids) if token == tokenizer.img_start_id]
    return Row(
        _filled(ids, size.tokens, tokenizer.eod_id), _filled(at, size.learned, -1), np.array(starts, np.int16)
    )


def _filled(values: Sequence[int], length: int, fill: int) -> NDArray[np.int16]:
    row = np.full(length, fill, np.int16)
    row[: len(values)] = values
    return row
