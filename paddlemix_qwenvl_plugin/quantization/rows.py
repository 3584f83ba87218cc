"""Calibration rows as token ids: prompts with images, and answers if given."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from paddlemix_qwenvl_plugin.batch.rows import read_row
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.demo.world.draw import draw
from paddlemix_qwenvl_plugin.demo.world.tasks import random_sample
from paddlemix_qwenvl_plugin.processing.images import from_folder, load_image
from paddlemix_qwenvl_plugin.processing.prompts import base_prompt, chat_prompt, image_spans
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.request import Request
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import check_source

MIN_ROWS = 8
"""Minimum number of rows in a file, so that at least one row is held out."""

HELD_OUT_EVERY = 8
"""One of this many rows is held out: it is used for the report, not for calibration."""

N_DRAWN = 128
"""Number of rows drawn from the demo world if no file is given."""


@dataclass(frozen=True)
class CalibrationRow:
    """A tokenized calibration row.

    Attributes:
        input_ids: the prompt, then the answer and its stop token if the row has one.
        n_prompt: length of the prompt.
        images: sources of the images, in order.
        spans: (index of `<img>`, index of `</img>`) of each image.
        where: file and line, or number of the drawn row, for messages.
    """

    input_ids: list[int]
    n_prompt: int
    images: list[Any]
    spans: list[tuple[int, int]]
    where: str

    @property
    def judged(self) -> list[int]:
        """Positions of compared predictions: those that predict the answer; without an answer, all outside images."""
        if len(self.input_ids) > self.n_prompt:
            return list(range(self.n_prompt - 1, len(self.input_ids) - 1))
        # The end tag `</img>` predicts the first token of the text after the image.
        in_images = {i for start, end in self.spans for i in range(start, end)}
        return [i for i in range(len(self.input_ids)) if i not in in_images]


class CalibrationRows:
    """Calibration rows, read from a file in either format of `qwenvl batch`, or random samples of the demo world.

    A row may have the additional key "answer": the model's completion, as `text` in the output of `qwenvl batch`. The
    generation options and the adapter of a row have no effect.

    Attributes:
        rows: the rows.
        sha256: digest of the file, or of the number of drawn rows. It does not cover the contents of image files.
    """

    def __init__(
        self, source: Optional[Path], tokenizer: QwenTokenizer, config: ModelConfig, chat: bool
    ) -> None:
        """Read and tokenize all rows; images of a file's rows are loaded later, one row at a time.

        Args:
            source: JSONL file; None: samples of the demo world.
            chat: whether the model is a chat model; the default of a row's key "chat".

        Raises:
            UsageError, QwenVLError: the file does not exist or has too few rows, or a row is invalid (the message names
                file and line).
        """
        self._folder = source.parent if source is not None else None
        self._tokenizer, self._config, self._chat = tokenizer, config, chat
        if source is None:
            self.rows = [self._drawn(number) for number in range(N_DRAWN)]
            self.sha256 = hashlib.sha256(f"drawn {N_DRAWN}".encode()).hexdigest()
            return
        check_source(source)
        content = source.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.rows = list(self._read(source, content))
        if len(self.rows) < MIN_ROWS:
            raise UsageError(f"{source}: {len(self.rows)} rows; calibration needs at least {MIN_ROWS}")

    def images(self, row: CalibrationRow) -> list[Image.Image]:
        """Load the images of a row; relative paths are resolved against the file's folder.

        Raises:
            UsageError, QwenVLError: an image cannot be loaded; the message names file and line.
        """
        try:
            return [load_image(from_folder(source, self._folder)) for source in row.images]
        except QwenVLError as error:
            raise type(error)(f"{row.where}: {error}") from error

    def _read(self, source: Path, content: bytes) -> Iterator[CalibrationRow]:
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            where = f"{source}: line {number}"
            line, answer = _take_answer(line)
            try:
                if answer is not None and not isinstance(answer, str):
                    raise UsageError("answer must be a string")
                parsed = read_row(number, line, {}).parsed
                if isinstance(parsed, QwenVLError):
                    raise parsed
                yield self._tokenized(parsed.request, answer, where)
            except QwenVLError as error:
                text = str(error).removeprefix(f"line {number}: ")
                raise type(error)(f"{where}: {text}") from error

    def _drawn(self, number: int) -> CalibrationRow:
        # A seed that neither the training set nor the held-out set of the demo world uses.
        rng = random.Random(f"calibration {number}")
        sample = random_sample(rng)
        parts = sample.parts([draw(scene) for scene in sample.scenes])
        request = Request(parts, chat=sample.form == "chat")
        return self._tokenized(request, sample.turns[0].answer, f"drawn row {number}")

    def _tokenized(self, request: Request, answer: Optional[str], where: str) -> CalibrationRow:
        parts: Sequence[Any] = [{"text": request.parts}] if isinstance(request.parts, str) else request.parts
        chat = self._chat if request.chat is None else request.chat
        tokenizer, config = self._tokenizer, self._config
        prompt = (
            chat_prompt(tokenizer, parts, request.history, request.system)
            if chat
            else base_prompt(tokenizer, parts)
        )
        input_ids = list(prompt.input_ids)
        if answer is not None:
            stop = tokenizer.im_end_id if chat else tokenizer.eod_id
            input_ids += [*tokenizer.encode(answer, _ANSWER_TAGS), stop]
        if len(input_ids) > config.max_position_embeddings:
            raise UsageError(
                f"{len(input_ids)} tokens do not fit into the context of {config.max_position_embeddings}"
            )
        spans = image_spans(input_ids, config.visual.image_start_id, config.visual.n_queries)
        return CalibrationRow(input_ids, len(prompt.input_ids), prompt.images, spans, where)


# The special tokens of an answer; other tags are plain text in it.
_ANSWER_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


def _take_answer(line: bytes) -> tuple[bytes, Any]:
    """Split a row into the row without its key "answer", and the answer, which is None if the row has no such key."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # read_row reports it
        return line, None
    if not isinstance(values, dict) or "answer" not in values:
        return line, None
    answer = values.pop("answer")
    return json.dumps(values).encode(), answer
