"""The public predictor: pictures and words in, words and boxes out, through the two exported stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from paddlemix_qwenvl_plugin.artifact.manifest import check_pair
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, load_config
from paddlemix_qwenvl_plugin.processing.images import ImageLimits, load_image, preprocess_all
from paddlemix_qwenvl_plugin.processing.prompts import (
    Part,
    Prompt,
    Query,
    base_prompt,
    chat_prompt,
    image_spans,
)
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.answer import Answer, AnswerStream
from paddlemix_qwenvl_plugin.runtime.chat import Chat
from paddlemix_qwenvl_plugin.runtime.feature_cache import FeatureCache
from paddlemix_qwenvl_plugin.runtime.generator import Generator
from paddlemix_qwenvl_plugin.runtime.kv_cache import KVCache
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

PathLike = Union[str, Path]

DEFAULT_SYSTEM = "You are a helpful assistant."


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
        self._features = FeatureCache()
        self.config: ModelConfig = language.manifest.config
        # What tells these weights from others, their dtype included.
        self.weights: list[str] = [stage.manifest.weights.sha256 for stage in (vision, language)]

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

    def load(self, vision: bool = True) -> None:
        """Open the vocabulary and the programs, stage 1 only with `vision`, now rather than at their first use.

        Raises:
            UsageError, QwenVLError: files that are missing or damaged.
        """
        _ = self.tokenizer, self._generator
        if vision:
            _ = self._vision

    def encode_images(self, pixels: ArrayLike) -> NDArray[np.float32]:
        """Stage 1.

        Args:
            pixels: float32 [N, 3, image_size, image_size], from `preprocess`.

        Returns:
            float32 [N, n_queries, hidden_size]. Those of pictures seen before are remembered.
        """
        size = self.config.visual.image_size
        array = np.ascontiguousarray(pixels, np.float32)
        if array.ndim != 4 or array.shape[1:] != (3, size, size):
            raise UsageError(f"pixels: shape {list(array.shape)}, must be [N, 3, {size}, {size}]")
        if not len(array):
            return np.zeros([0, self.config.visual.n_queries, self.config.hidden_size], np.float32)
        # One picture at a time: attention over the patches sets the peak memory, and a batch gains nothing on a CPU.
        return np.stack([self._features.get(picture, partial(self._encode, picture)) for picture in array])

    def _encode(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        features: NDArray[np.float32] = self._vision([picture[None]])[0].numpy()[0]
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
        ids, row_lengths = self._check_ids(input_ids, lengths)
        pictures, positions = self._check_features(ids, row_lengths, features)
        chosen = self.fit(max(row_lengths), chosen)
        return self._generator.generate(ids, row_lengths, pictures, positions, chosen, ends).tokens

    def generate(
        self,
        parts: Union[str, Sequence[Part]],
        *,
        chat: bool = False,
        history: Sequence[tuple[Query, str]] = (),
        system: str = DEFAULT_SYSTEM,
        **options: Any,
    ) -> Answer:
        """Answer one prompt; arguments and errors as for `stream`."""
        return self.stream(parts, chat=chat, history=history, system=system, **options).finish()

    def stream(
        self,
        parts: Union[str, Sequence[Part]],
        *,
        chat: bool = False,
        history: Sequence[tuple[Query, str]] = (),
        system: str = DEFAULT_SYSTEM,
        **options: Any,
    ) -> AnswerStream:
        """Answer one prompt in pieces, as they are generated.

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
        prompt, ends = self.prompt(parts, chat=chat, history=history, system=system)
        images = self.load_images(prompt.images)
        pixels = self.preprocess(images)
        size = images[-1].size if images else None
        return self.start(prompt.input_ids, list(pixels), ends, chosen, size, time.perf_counter() - start)

    def prompt(
        self,
        parts: Union[str, Sequence[Part]],
        *,
        chat: bool = False,
        history: Sequence[tuple[Query, str]] = (),
        system: str = DEFAULT_SYSTEM,
    ) -> tuple[Prompt, list[int]]:
        """The prompt and the tokens that end its answer; arguments and errors as for `stream`."""
        query: Sequence[Part] = [{"text": parts}] if isinstance(parts, str) else parts
        tokenizer = self.tokenizer
        if chat:
            ends = [tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id]
            return chat_prompt(tokenizer, query, history, system), ends
        if history:
            raise UsageError("history: only a chat prompt has earlier turns; pass chat=True")
        return base_prompt(tokenizer, query), [tokenizer.eod_id]

    def chat(self, system: str = DEFAULT_SYSTEM) -> Chat:
        """Begin a conversation with Qwen-VL-Chat."""
        return Chat(self, system)

    def load_images(self, sources: Sequence[Any]) -> list[Image.Image]:
        """Open pictures as this predictor's `allow_http` and `limits` let it."""
        return [load_image(i, allow_http=self._allow_http, limits=self._limits) for i in sources]

    def preprocess(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Pictures as stage 1 takes them, float32 [N, 3, image_size, image_size]."""
        return preprocess_all(images, self.config.visual.image_size)

    def start(
        self,
        input_ids: Sequence[int],
        pixels: Sequence[NDArray[np.float32]],
        ends: Sequence[int],
        options: GenerationOptions,
        image_size: Optional[tuple[int, int]],
        prepare_seconds: float,
        cache: KVCache | None = None,
        on_end: Callable[[Answer, KVCache], None] = lambda answer, cache: None,
    ) -> AnswerStream:
        """Start a request on token ids.

        Args:
            input_ids: the prompt, or what follows `cache` of it.
            pixels: float32 [N, 3, image_size, image_size], of the pictures in input_ids.
            ends: tokens that end the answer.
            cache: of what comes before input_ids, one row.
            image_size, prepare_seconds, on_end: see AnswerStream.
        """
        before = int(cache.lengths[0, 0]) if cache is not None else 0
        options = self.fit(before + len(input_ids), options)
        ids, lengths = self._check_ids([input_ids], None)

        def begin(timings: dict[str, float]) -> tuple[RowSampler, Iterator[KVCache]]:
            start = time.perf_counter()
            self.load(vision=len(pixels) > 0)
            loaded = time.perf_counter()
            features = self.encode_images(np.asarray(pixels)) if len(pixels) else None
            pictures, positions = self._check_features(ids, lengths, features)
            timings.update(load=loaded - start, encode_images=time.perf_counter() - loaded)
            [sampler] = self._generator.samplers(1, options, ends)
            # Room for all turns of a conversation: memory is taken as it is filled.
            room = cache or self._generator.empty_cache(1, self.config.max_position_embeddings)
            return sampler, self._generator.steps(ids, lengths, pictures, positions, [sampler], room)

        return AnswerStream(begin, self.tokenizer, ends, image_size, prepare_seconds, on_end)

    def fit(self, n_tokens: int, options: GenerationOptions) -> GenerationOptions:
        """The options with max_new_tokens cut to what the context has room for after a prompt.

        Raises:
            UsageError: it has no room for a single token.
        """
        room = self.config.max_position_embeddings - n_tokens
        if room < 1:
            raise UsageError(
                f"input_ids: a prompt of {n_tokens} tokens leaves no room in the context of "
                f"{self.config.max_position_embeddings}"
            )
        if options.max_new_tokens <= room:
            return options
        return replace(options, max_new_tokens=room, min_new_tokens=min(options.min_new_tokens, room))

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
