"""The public predictor: pictures and words in, words and boxes out, through the two exported stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, load_config
from paddlemix_qwenvl_plugin.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.export.manifest import check_pair
from paddlemix_qwenvl_plugin.processing.boxes import Box, parse_boxes
from paddlemix_qwenvl_plugin.processing.images import ImageLimits, load_image, preprocess_all
from paddlemix_qwenvl_plugin.processing.prompts import Part, Query, base_prompt, chat_prompt, image_spans
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.generator import Generated, Generator
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage

PathLike = Union[str, Path]


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: what the model said, with its `<ref>` and `<box>` tags, without the end token.
        boxes: the boxes and quads in it, in thousandths of the picture's width and height;
            `box.to_pixels(*answer.image_size)` gives pixels.
        image_size: (width, height) in pixels of the last picture, to which the boxes refer; None without a picture.
        problems: boxes that could not be read, one line each.
        token_ids: every generated token, the end token included.
        finish_reason: "stop" (an end token) or "length" (max_new_tokens, or the context is full).
        timings: seconds of "prepare", "load" (of the programs, at the first call), "encode_images", "prefill" and
            "decode", and the decode's "tokens_per_second".
    """

    text: str
    boxes: tuple[Box, ...]
    image_size: Optional[tuple[int, int]]
    problems: tuple[str, ...]
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, float]


class QwenVL:
    """A pair of exported stages. Use `from_exported`. Not safe for use by several threads at once."""

    def __init__(
        self, vision: Stage, language: Stage, model: Path, allow_http: bool, limits: ImageLimits
    ) -> None:
        self._vision_stage = vision
        self._language_stage = language
        self._model = model
        self._allow_http = allow_http
        self._limits = limits
        self.config: ModelConfig = language.manifest.config

    @classmethod
    def from_exported(
        cls,
        vision: PathLike,
        language: PathLike,
        model: Optional[PathLike] = None,
        device: str = "cpu",
        allow_http: bool = False,
        limits: Optional[ImageLimits] = None,
    ) -> QwenVL:
        """Open two exported stages.

        Args:
            vision: prefix of stage 1, or its program file (`.json` or `.pdmodel`) to choose the form.
            language: the same for stage 2.
            model: the model folder, or any folder with `qwen.tiktoken`; None: the folder of stage 2.
            device: "cpu", "gpu" or "gpu:N".
            allow_http: whether pictures may come from http(s) URLs.
            limits: bytes, pixels and seconds that a picture may take.

        Raises:
            UsageError: a path or a device that is not there.
            QwenVLError: damaged files, or stages that do not belong together.
        """
        vision_stage = Stage(vision, "vision", device)
        language_stage = Stage(language, "language", device)
        check_pair(vision_stage.manifest, language_stage.manifest)
        folder = Path(model) if model is not None else language_stage.prefix.parent
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such model folder")
        if (folder / "config.json").is_file() and load_config(folder) != language_stage.manifest.config:
            raise QwenVLError(f"{folder}: its config.json is not that of the exported model; export again")
        return cls(vision_stage, language_stage, folder, allow_http, limits or ImageLimits())

    @cached_property
    def tokenizer(self) -> QwenTokenizer:
        """The tokenizer of the model folder."""
        tokenizer = QwenTokenizer.from_folder(self._model, self.config.visual.n_queries)
        expected = self.config.visual.image_start_id
        if tokenizer.img_start_id != expected:
            raise QwenVLError(
                f"{self._model / 'qwen.tiktoken'}: <img> is token {tokenizer.img_start_id}, "
                f"but config.json says {expected}; this is another model's vocabulary"
            )
        return tokenizer

    @cached_property
    def _vision(self) -> Any:
        return self._vision_stage.open()

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self._language_stage)

    def _load(self, vision: bool) -> None:
        """Open what a prompt needs now rather than at its first use, so that it is timed apart."""
        _ = self._generator
        if vision:
            _ = self._vision

    def encode_images(self, pixels: ArrayLike) -> NDArray[np.float32]:
        """Stage 1.

        Args:
            pixels: float32 [N, 3, image_size, image_size], from `preprocess`.

        Returns:
            float32 [N, n_queries, hidden_size].
        """
        size = self.config.visual.image_size
        array = np.ascontiguousarray(pixels, np.float32)
        if array.ndim != 4 or array.shape[1:] != (3, size, size):
            raise UsageError(f"pixels: shape {list(array.shape)}, must be [N, 3, {size}, {size}]")
        if not len(array):
            return np.zeros([0, self.config.visual.n_queries, self.config.hidden_size], np.float32)
        # One picture at a time: attention over the patches sets the peak memory, and a batch gains nothing on a CPU.
        rows = [self._vision([array[i : i + 1]])[0].numpy() for i in range(len(array))]
        features: NDArray[np.float32] = np.concatenate(rows)
        return features

    def generate_ids(
        self,
        input_ids: ArrayLike,
        features: Optional[ArrayLike] = None,
        *,
        lengths: Optional[Sequence[int]] = None,
        eos_token_ids: Optional[Iterable[int]] = None,
        **options: Any,
    ) -> list[list[int]]:
        """Stage 2 on token ids.

        Args:
            input_ids: int64 [B, T]; a row shorter than T is padded on the right.
            features: float32 [N, n_queries, hidden_size], of the batch's pictures in order of appearance, row by row.
            lengths: each row's own length; None: T for all.
            eos_token_ids: tokens that end a row, kept as its last token; None: the tokenizer's end-of-text token, none
                where the model folder has no tokenizer; empty: only max_new_tokens ends a row.
            options: see GenerationOptions.

        Returns:
            The new tokens of each row.

        Raises:
            UsageError: a shape, id or option that cannot be; the line names it.
        """
        chosen = GenerationOptions.of(options)
        if eos_token_ids is not None:
            ends = [int(token) for token in eos_token_ids]
        else:
            ends = [self.tokenizer.eod_id] if (self._model / "qwen.tiktoken").is_file() else []
        return self._generate(input_ids, features, lengths, ends, chosen).tokens

    def generate(
        self,
        parts: Union[str, Sequence[Part]],
        *,
        chat: bool = False,
        history: Sequence[tuple[Query, str]] = (),
        system: str = "You are a helpful assistant.",
        **options: Any,
    ) -> Answer:
        """Answer one prompt.

        Args:
            parts: text, or a list of {"image": …}, {"text": …} and {"box": …, "ref": …} (processing/prompts.py).
            chat: use the ChatML form of Qwen-VL-Chat and stop at its turn tokens; False: the base model's form.
            history: earlier turns (query, answer), chat only.
            system: the system message, chat only.
            options: see GenerationOptions.

        Raises:
            UsageError, QwenVLError: one line that names the part, picture or option.
        """
        chosen = GenerationOptions.of(options)
        start = time.perf_counter()
        query: Sequence[Part] = [{"text": parts}] if isinstance(parts, str) else parts
        tokenizer = self.tokenizer
        ends = [tokenizer.eod_id]
        if chat:
            prompt = chat_prompt(tokenizer, query, history, system)
            ends += [tokenizer.im_end_id, tokenizer.im_start_id]
        elif history:
            raise UsageError("history: only a chat prompt has earlier turns; pass chat=True")
        else:
            prompt = base_prompt(tokenizer, query)
        images = [load_image(i, allow_http=self._allow_http, limits=self._limits) for i in prompt.images]
        pixels = preprocess_all(images, self.config.visual.image_size)
        prepared = time.perf_counter()
        self._load(vision=bool(images))
        loaded = time.perf_counter()
        features = self.encode_images(pixels)
        encoded = time.perf_counter()
        generated = self._generate([prompt.input_ids], features, None, ends, chosen)
        timings = {
            "prepare": prepared - start,
            "load": loaded - prepared,
            "encode_images": encoded - loaded,
            "prefill": generated.prefill_seconds,
            "decode": generated.decode_seconds,
            "tokens_per_second": (generated.steps - 1) / max(generated.decode_seconds, 1e-9),
        }
        tokens, reason = generated.tokens[0], generated.finish_reasons[0]
        text = tokenizer.decode(tokens[:-1] if tokens[-1] in ends else tokens)
        parsed = parse_boxes(text)
        return Answer(
            text=text,
            boxes=tuple(parsed.boxes),
            image_size=images[-1].size if images else None,
            problems=tuple(parsed.problems),
            token_ids=tokens,
            finish_reason=reason,
            timings=timings,
        )

    def _generate(
        self,
        input_ids: ArrayLike,
        features: Optional[ArrayLike],
        lengths: Optional[Sequence[int]],
        ends: Sequence[int],
        options: GenerationOptions,
    ) -> Generated:
        ids, row_lengths = self._check_ids(input_ids, lengths)
        pictures, positions = self._check_features(ids, row_lengths, features)
        room = self.config.max_position_embeddings - max(row_lengths)
        if room < 1:
            raise UsageError(
                f"input_ids: a prompt of {max(row_lengths)} tokens leaves no room in the context of "
                f"{self.config.max_position_embeddings}"
            )
        if options.max_new_tokens > room:
            least = min(options.min_new_tokens, room)
            options = replace(options, max_new_tokens=room, min_new_tokens=least)
        return self._generator.generate(ids, row_lengths, pictures, positions, options, ends)

    def _check_ids(
        self, input_ids: ArrayLike, lengths: Optional[Sequence[int]]
    ) -> tuple[NDArray[np.int64], list[int]]:
        try:
            ids = np.asarray(input_ids)
        except ValueError as error:
            raise UsageError(
                "input_ids: rows differ in length; pad them on the right and pass lengths"
            ) from error
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            raise UsageError(
                f"input_ids: {ids.dtype} {list(ids.shape)}, must be integers [B, T] with B and T over 0"
            )
        row_lengths = (
            [ids.shape[1]] * len(ids) if lengths is None else [int(n) for n in np.ravel(np.asarray(lengths))]
        )
        if len(row_lengths) != len(ids):
            raise UsageError(f"lengths: {len(row_lengths)} values for {len(ids)} rows")
        if not all(1 <= n <= ids.shape[1] for n in row_lengths):
            raise UsageError(f"lengths: {row_lengths}, each must be 1 to {ids.shape[1]}")
        # Whatever the caller padded with, the program looks it up in the embedding table.
        inside = np.arange(ids.shape[1]) < np.asarray(row_lengths)[:, None]
        ids = np.where(inside, ids, 0).astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UsageError(f"input_ids: ids must be 0 to {self.config.vocab_size - 1}")
        return ids, row_lengths

    def _check_features(
        self, ids: NDArray[np.int64], lengths: Sequence[int], features: Optional[ArrayLike]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        vision = self.config.visual
        shape = (vision.n_queries, self.config.hidden_size)
        pictures = np.zeros((0, *shape), np.float32) if features is None else np.asarray(features, np.float32)
        if pictures.ndim != 3 or pictures.shape[1:] != shape:
            raise UsageError(f"features: shape {list(pictures.shape)}, must be [N, {shape[0]}, {shape[1]}]")
        spans = [
            (row, start, end)
            for row, length in enumerate(lengths)
            for start, end in image_spans(ids[row, :length].tolist(), vision.image_start_id, vision.n_queries)
        ]
        if len(spans) != len(pictures):
            raise UsageError(
                f"features: {len(pictures)} picture(s), but the prompt has {len(spans)} <img> … </img> place(s)"
            )
        return np.ascontiguousarray(pictures), np.asarray(spans, np.int64).reshape(-1, 3)
