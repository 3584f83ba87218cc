"""Rows of tokens for training: a prompt and its answers, with the positions whose next tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.demo.world.sample import Sample
from paddlemix_qwenvl_plugin.processing.prompts import base_prompt, chat_prompt
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer

NAME = "a.png"  # file name in the prompts; the image features replace its tokens


@dataclass(frozen=True)
class Size:
    """Capacity of a row: number of tokens, of learned tokens, and of images."""

    tokens: int
    learned: int
    images: int


# Rows with one image and with two.
ONE = Size(512, 224, 1)
TWO = Size(704, 160, 2)


@dataclass(frozen=True)
class Row:
    """Training row.

    Attributes:
        ids: tokens, padded with the end-of-text token.
        at: positions whose next token is learned, padded with -1.
        starts: positions of `<img>`.
    """

    ids: NDArray[np.int16]
    at: NDArray[np.int16]
    starts: NDArray[np.int16]


def prompt_ids(tokenizer: QwenTokenizer, sample: Sample) -> list[int]:
    """Encode the prompt of the first turn."""
    parts = sample.parts([NAME] * len(sample.scenes))
    make_prompt = chat_prompt if sample.form == "chat" else base_prompt
    return make_prompt(tokenizer, parts).input_ids


def make_row(tokenizer: QwenTokenizer, sample: Sample, size: Size) -> Row:
    """Encode a sample in a row, without the turns for which the row has no room; a later, shorter turn may have room.

    Raises:
        ValueError: the row has no room for the first turn.
    """
    stop_token = tokenizer.im_end_id if sample.form == "chat" else tokenizer.eod_id
    ids = prompt_ids(tokenizer, sample)
    at: list[int] = []
    new_line = tokenizer.encode("\n")
    # ChatML around the question of a further turn.
    before_question = [*new_line, tokenizer.im_start_id, *tokenizer.encode("user"), *new_line]
    after_question = [
        *(tokenizer.im_end_id, *new_line, tokenizer.im_start_id, *tokenizer.encode("assistant"), *new_line)
    ]
    for number, turn in enumerate(sample.turns):
        question: list[int] = []
        if number:
            question = [*before_question, *tokenizer.encode(turn.question), *after_question]
        answer = [*tokenizer.encode(turn.answer), stop_token]
        answer_start = len(ids) + len(question)
        if answer_start + len(answer) > size.tokens or len(at) + len(answer) > size.learned:
            if not number:
                raise ValueError(f"no room for {turn}: {answer_start} + {len(answer)} tokens")
            continue
        ids += question + answer
        at += range(answer_start - 1, answer_start + len(answer) - 1)
    starts = [i for i, token in enumerate(ids) if token == tokenizer.img_start_id]
    return Row(
        _padded(ids, size.tokens, tokenizer.eod_id), _padded(at, size.learned, -1), np.array(starts, np.int16)
    )


def _padded(values: Sequence[int], length: int, padding: int) -> NDArray[np.int16]:
    row = np.full(length, padding, np.int16)
    row[: len(values)] = values
    return row
