"""QwenVL, the public predictor: answers prompts with images through the two exported stages."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from paddlemix_qwenvl_plugin.artifact.manifest import check_pair
from paddlemix_qwenvl_plugin.artifact.verify import verify as verify_stage
from paddlemix_qwenvl_plugin.checkpoint.adapter import Adapter
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, is_chat_model, load_config
from paddlemix_qwenvl_plugin.processing.images import ImageLimits, from_folder, load_image, preprocess
from paddlemix_qwenvl_plugin.processing.prompts import (
    Part,
    Prompt,
    Query,
    base_prompt,
    chat_prompt,
    image_spans,
)
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.adapters import open_adapters
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.chat import Chat
from paddlemix_qwenvl_plugin.runtime.executor import Executor
from paddlemix_qwenvl_plugin.runtime.generation import MAX_LOGPROBS, Generation, ImageInput
from paddlemix_qwenvl_plugin.runtime.gpu_memory import check_share
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage, stage_prefix
from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM, Request
from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

PathLike = Union[str, Path]


class QwenVL:
    """Qwen-VL opened from its two exported stages, with `from_exported`. Thread-safe."""

    def __init__(
        self,
        vision: Stage,
        language: Stage,
        model: Path,
        allow_http: bool,
        limits: ImageLimits,
        gpu_memory: float,
        adapters: Mapping[str, Adapter],
    ) -> None:
        self._stages = vision, language
        self._adapters = adapters
        self._gpu_memory = gpu_memory
        self._model = model
        self._allow_http = allow_http
        self._limits = limits
        self._opening = threading.Lock()
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
        verify: bool = False,
        gpu_memory: float = 0.9,
        adapters: Optional[Mapping[str, PathLike]] = None,
    ) -> QwenVL:
        """Open a model from its two exported stages.

        Args:
            vision: prefix of the vision stage, or its program file (`.json` or `.pdmodel`) to choose the form.
            language: prefix or program file of the language stage.
            model: the model folder, or any folder with `qwen.tiktoken`; None: the folder of the language stage.
            device: "cpu", "gpu" or "gpu:N".
            allow_http: allow images from http(s) URLs.
            limits: limits for loading images.
            verify: compare the digests of all files with the manifests, and check that the weights are finite;
                otherwise weights of more than 64 MiB are compared by size and samples.
            gpu_memory: share that the KV cache may take of the GPU memory left by the weights, up to 1.
            adapters: folders of LoRA adapters, as saved by PEFT or PaddleNLP, by the names with which requests choose
                them. Adapters need the engine.

        Raises:
            UsageError: a path or the device does not exist, `gpu_memory` is out of range, or an adapter cannot be used
                at run time.
            QwenVLError: files are damaged, the stages and `config.json` come from different models, or the engine is
                required on the GPU and cannot be built.
        """
        check_share(gpu_memory)
        if verify:
            for stage in (vision, language):
                verify_stage(stage_prefix(stage))
        vision_stage = Stage(vision, "vision", device)
        language_stage = Stage(language, "language", device)
        check_pair(vision_stage.manifest, language_stage.manifest)
        folder = Path(model) if model is not None else language_stage.prefix.parent
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such model folder")
        if (folder / "config.json").is_file() and load_config(folder) != language_stage.manifest.config:
            raise QwenVLError(f"{folder}: its config.json is not that of the exported model; export again")
        opened_adapters = open_adapters(adapters or {}, language_stage.manifest.config)
        limits = limits or ImageLimits()
        return cls(vision_stage, language_stage, folder, allow_http, limits, gpu_memory, opened_adapters)

    @cached_property
    def weights(self) -> list[str]:
        """Digest of each stage's weights, which depends on their dtype, and name and fingerprint of each adapter."""
        stages = [stage.manifest.weights.sha256 for stage in self._stages]
        adapters = [
            f"{name} {adapter.fingerprint(adapter.names)}" for name, adapter in self._adapters.items()
        ]
        return stages + adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self._adapters)

    @cached_property
    def tokenizer(self) -> QwenTokenizer:
        """The tokenizer of the model folder."""
        return QwenTokenizer.of_model(self._model, self.config)

    @property
    def picture_label(self) -> str:
        """Text before each image in a prompt, `{}` for the image's number."""
        return self.tokenizer.picture_label

    @cached_property
    def is_chat(self) -> bool:
        """Whether the model folder, or that of the language stage, declares a chat model; default of `Request.chat`."""
        return is_chat_model(self._model) or is_chat_model(self._stages[1].prefix.parent)

    @cached_property
    def _loop(self) -> Loop:
        with self._opening:  # cached_property has no lock from Python 3.12 on
            if "_loop" not in vars(self):
                vars(self)["_loop"] = Loop(self._open())
            return vars(self)["_loop"]  # type: ignore[no-any-return]

    def _open(self) -> Executor:
        vision, language = self._stages
        if language.engine:
            from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor

            return EngineExecutor(vision, language, gpu_memory=self._gpu_memory, adapters=self._adapters)
        if self._adapters:
            raise UsageError(
                "adapters need the engine, and this model runs on the portable graph; merge one with --lora at export"
            )
        from paddlemix_qwenvl_plugin.runtime.portable_executor import PortableExecutor

        return PortableExecutor(vision, language)

    def load(self, vision: bool = True) -> None:
        """Load the tokenizer, the language stage and, with `vision`, the vision stage now, not at their first use.

        Raises:
            UsageError, QwenVLError: a file is missing or damaged, there is too little memory, or the engine is
                unavailable although the setting, the weights or the adapters require it.
        """
        _ = self.tokenizer
        self._loop.load(vision)

    def open_loop(self) -> Loop:
        """Load both stages and return the loop behind all requests, for servers that run its steps.

        Errors as for `load`.
        """
        self._loop.load(vision=True)
        return self._loop

    def load_images(self, sources: Sequence[Any], folder: Optional[Path] = None) -> list[Image.Image]:
        """Load images; relative paths are resolved against `folder`. `allow_http` and `limits` apply."""
        return [
            load_image(from_folder(source, folder), allow_http=self._allow_http, limits=self._limits)
            for source in sources
        ]

    def image_inputs(self, images: Sequence[Image.Image]) -> list[ImageInput]:
        """Preprocess images for requests."""
        return [ImageInput.of(preprocess(image, self.config.visual.image_size)) for image in images]

    def encode_images(self, pixels: ArrayLike) -> NDArray[np.float32]:
        """Run the vision stage on preprocessed images; features of images seen before may come from a cache.

        Args:
            pixels: float32 [N, 3, image_size, image_size], from `preprocess`.

        Returns:
            Features, float32 [N, n_queries, hidden_size].

        Raises:
            UsageError: another shape.
            QwenVLError: as for `load`, or the computation failed.
        """
        size = self.config.visual.image_size
        array = np.ascontiguousarray(pixels, np.float32)
        if array.ndim != 4 or array.shape[1:] != (3, size, size):
            raise UsageError(f"pixels: shape {list(array.shape)}, must be [N, 3, {size}, {size}]")
        # One image at a time: attention over the patches sets the peak memory, and a batch gains nothing on a CPU.
        features = [self._loop.encode(ImageInput.of(image)) for image in array]
        shape = [0, self.config.visual.n_queries, self.config.hidden_size]
        return np.stack(features) if features else np.zeros(shape, np.float32)

    def generate_ids(
        self,
        input_ids: ArrayLike,
        features: Optional[ArrayLike] = None,
        *,
        lengths: Optional[Sequence[int]] = None,
        eos_token_ids: Optional[Iterable[int]] = None,
        adapter: Optional[str] = None,
        **options: Any,
    ) -> list[list[int]]:
        """Run the language stage on a batch of token ids.

        Args:
            input_ids: int64 [B, T]; a row shorter than T is padded on the right.
            features: float32 [N, n_queries, hidden_size], of the batch's images in order of appearance, row by row.
            lengths: length of each row; None: T for all rows.
            eos_token_ids: stop tokens, kept as the last token of a row; None: the tokenizer's end-of-text token, or
                none if the model folder has no tokenizer. Without stop tokens, a row ends at max_new_tokens or at the
                end of the context.
            adapter: name of an adapter, for all rows.
            options: see GenerationOptions.

        Returns:
            The generated token ids of each row.

        Raises:
            UsageError: an invalid shape, id, adapter or option; the message names it.
            QwenVLError: malformed image tags or slots in `input_ids`, or the computation failed.
        """
        generation_options = GenerationOptions.of(options)
        if eos_token_ids is not None:
            stop_token_ids = [int(token) for token in eos_token_ids]
        elif (self._model / "qwen.tiktoken").is_file():
            stop_token_ids = [self.tokenizer.eod_id]
        else:
            stop_token_ids = []
        rows = self._check_ids(input_ids, lengths)
        image_features = self._check_features(features)
        spans = [self._spans(row) for row in rows]
        n_spans = sum(map(len, spans))
        if n_spans != len(image_features):
            raise UsageError(
                f"features: {len(image_features)} image(s), but the prompt has {n_spans} <img> … </img> place(s)"
            )
        images = iter([ImageInput.encoded(features_of_image) for features_of_image in image_features])
        generations = []
        for row, row_spans in zip(rows, spans):
            row_images = [next(images) for _ in row_spans]
            generations.append(
                self.generation(row, row_images, stop_token_ids, generation_options, adapter=adapter)
            )
        loop = self._loop
        for generation in generations:
            loop.submit(generation)
        try:
            for generation in generations:
                while not generation.finished:
                    loop.advance(generation, len(generation.tokens))
                loop.advance(generation, 0)  # raises the error of a failed request
        finally:
            for generation in generations:
                if not generation.finished:
                    loop.cancel(generation)
        return [generation.tokens for generation in generations]

    def generate(
        self,
        parts: Union[str, Sequence[Part]],
        *,
        chat: Optional[bool] = None,
        history: Sequence[tuple[Query, str]] = (),
        system: str = DEFAULT_SYSTEM,
        adapter: Optional[str] = None,
        **options: Any,
    ) -> Answer:
        """Answer one prompt and return the complete answer; arguments and errors as for `stream`."""
        stream = self.stream(parts, chat=chat, history=history, system=system, adapter=adapter, **options)
        return stream.finish()

    def generate_batch(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer several prompts in one batch, each with separate options.

        The answers are the same as without a batch; those sampled without a seed are random in both cases.

        Raises:
            UsageError, QwenVLError: the error of the first request that fails; no answers are returned.
        """
        streams = [self.ask(request) for request in requests]
        return list(self.finish_all(streams, len(streams)))

    def stream(
        self,
        parts: Union[str, Sequence[Part]],
        *,
        chat: Optional[bool] = None,
        history: Sequence[tuple[Query, str]] = (),
        system: str = DEFAULT_SYSTEM,
        adapter: Optional[str] = None,
        **options: Any,
    ) -> AnswerStream:
        """Answer one prompt in segments, as they are generated.

        Args:
            parts: text, or a list of {"image": …}, {"text": …} and {"box": …, "ref": …} (processing/prompts.py).
            chat: True: the ChatML form of Qwen-VL-Chat, with its stop tokens; False: the base model's form; None: as
                `is_chat` says.
            history: earlier turns (query, answer), chat only; beyond 6144 tokens the oldest are dropped (chat_prompt).
            system: the system message, chat only.
            adapter: name of an adapter (`from_exported`); None: the model without an adapter.
            options: see GenerationOptions.

        Raises:
            UsageError, QwenVLError: an invalid part, image, history or option, or an unknown adapter, which the
                message names; or a prompt that fills the context.
        """
        return self.ask(Request(parts, GenerationOptions.of(options), chat, history, system, adapter))

    def chat(self, system: str = DEFAULT_SYSTEM, adapter: Optional[str] = None) -> Chat:
        """Begin a conversation with Qwen-VL-Chat, with an adapter if one is named."""
        return Chat(self, system, adapter)

    def ask(self, request: Request, folder: Optional[Path] = None) -> AnswerStream:
        """Answer a request in segments; relative image paths are resolved against `folder`. Errors as for `stream`."""
        start = time.perf_counter()
        prompt, stop_token_ids = self._prompt(request)
        images = self.load_images(prompt.images, folder)
        size = images[-1].size if images else None
        inputs = self.image_inputs(images)
        seconds = time.perf_counter() - start
        return self.start(
            prompt, inputs, stop_token_ids, request.options, size, seconds, adapter=request.adapter
        )

    def finish_all(self, streams: Iterable[AnswerStream], window: int = 16) -> Iterator[Answer]:
        """Yield the complete answers of streams in their order; up to `window` of them are generated concurrently.

        Raises:
            QwenVLError: the error of the first stream that fails.
        """
        active: deque[AnswerStream] = deque()
        try:
            for stream in streams:
                active.append(stream.submit())
                if len(active) == window:
                    yield active.popleft().finish()
            while active:
                yield active.popleft().finish()
        finally:
            for stream in active:
                stream.close()

    def wait_any(self, streams: Collection[AnswerStream]) -> list[AnswerStream]:
        """Generate until at least one of the submitted streams is done; return all that are done."""
        while not (done := [stream for stream in streams if stream.done]):
            self._loop.step()
        return done

    def start(
        self,
        prompt: Prompt,
        images: Sequence[ImageInput],
        stop_token_ids: Sequence[int],
        options: GenerationOptions,
        image_size: Optional[tuple[int, int]],
        prepare_seconds: float = 0.0,
        on_end: Callable[[Answer], None] = lambda answer: None,
        adapter: Optional[str] = None,
    ) -> AnswerStream:
        """Create the stream for a tokenized prompt and loaded images. Errors as for `generation`.

        Args:
            prompt: the tokenized prompt.
            images: one for each `<img>` of the prompt, in order.
            stop_token_ids: tokens that end the answer.
            options: sampling parameters and limits.
            image_size, prepare_seconds, on_end: see AnswerStream.
            adapter: name of an adapter.
        """
        generation = self.generation(
            prompt.input_ids, images, stop_token_ids, options, prompt.generated, adapter=adapter
        )

        def open_loop() -> Loop:
            self.load(vision=bool(images))
            return self._loop

        return AnswerStream(open_loop, generation, self.tokenizer, image_size, prepare_seconds, on_end)

    def _prompt(self, request: Request) -> tuple[Prompt, Sequence[int]]:
        """The prompt and the stop tokens of a request."""
        parts: Sequence[Part] = [{"text": request.parts}] if isinstance(request.parts, str) else request.parts
        tokenizer = self.tokenizer
        chat = self.is_chat if request.chat is None else request.chat
        if chat:
            prompt = chat_prompt(tokenizer, parts, request.history, request.system)
            return prompt, tokenizer.chat_stop_token_ids
        request.refuse_history()
        return base_prompt(tokenizer, parts), [tokenizer.eod_id]

    def generation(
        self,
        input_ids: Sequence[int],
        images: Sequence[ImageInput],
        stop_token_ids: Sequence[int],
        options: GenerationOptions,
        generated: Sequence[tuple[int, int]] = (),
        n_logprobs: Optional[int] = None,
        adapter: Optional[str] = None,
    ) -> Generation:
        """Create a request for the loop, with max_new_tokens limited to the context that the prompt leaves.

        Args:
            input_ids: token ids of the prompt.
            images: one for each `<img>` of the prompt, in order.
            stop_token_ids: tokens that end the completion.
            options: sampling parameters and limits.
            generated, n_logprobs, adapter: see Generation.

        Raises:
            UsageError: no or an invalid id, a wrong number of images, a prompt that fills the context, `n_logprobs` out
                of range, or an unknown adapter.
            QwenVLError: malformed image tags or slots in `input_ids`.
        """
        if adapter is not None and adapter not in self._adapters:
            names = ", ".join(self._adapters) or "none"
            raise UsageError(f"adapter: {adapter!r:.100} is not an adapter of this model; it has: {names}")
        if not input_ids:
            raise UsageError("input_ids: must have at least one token")
        if min(input_ids) < 0 or max(input_ids) >= self.config.vocab_size:
            raise UsageError(f"input_ids: ids must be 0 to {self.config.vocab_size - 1}")
        spans = self._spans(input_ids)
        if len(spans) != len(images):
            raise UsageError(
                f"images: {len(images)}, but the prompt has {len(spans)} <img> … </img> place(s)"
            )
        if n_logprobs is not None and not 0 <= n_logprobs <= MAX_LOGPROBS:
            raise UsageError(f"n_logprobs: {n_logprobs} is out of range; it must be 0 to {MAX_LOGPROBS}")
        room = self.config.max_position_embeddings - len(input_ids)
        if room < 1:
            raise UsageError(
                f"input_ids: a prompt of {len(input_ids)} tokens leaves no room in the context of "
                f"{self.config.max_position_embeddings}"
            )
        images_with_slots = [
            # The slots are between `<img>` at `start` and `</img>` at `end`.
            ImageInput(image.digest, image.pixels, image.features, (start + 1, end))
            for image, (start, end) in zip(images, spans)
        ]
        rotary_class = self.config.ntk_doublings(len(input_ids))
        options = options.within(room)
        return Generation(
            input_ids,
            images_with_slots,
            stop_token_ids,
            options,
            generated,
            rotary_class,
            n_logprobs,
            adapter,
        )

    def _spans(self, input_ids: Sequence[int]) -> list[tuple[int, int]]:
        vision = self.config.visual
        return image_spans(input_ids, vision.image_start_id, vision.n_queries)

    def _check_ids(self, input_ids: ArrayLike, lengths: Optional[Sequence[int]]) -> list[list[int]]:
        """Return the rows of token ids without their padding; raise UsageError for an invalid shape or length."""
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
        return [row[:n].tolist() for row, n in zip(ids, row_lengths)]

    def _check_features(self, features: Optional[ArrayLike]) -> NDArray[np.float32]:
        shape = (self.config.visual.n_queries, self.config.hidden_size)
        if features is None:
            return np.zeros((0, *shape), np.float32)
        array = np.asarray(features, np.float32)
        if array.ndim != 3 or array.shape[1:] != shape:
            raise UsageError(f"features: shape {list(array.shape)}, must be [N, {shape[0]}, {shape[1]}]")
        return np.ascontiguousarray(array)
