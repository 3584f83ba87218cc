"""The Qwen-VL tokenizer: byte-level BPE, and image slots whose tokens are the bytes of the image's path."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import tiktoken

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, read_json
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

VOCAB_FILE_NAME = "qwen.tiktoken"
CONFIG_FILE_NAME = "tokenizer_config.json"

PICTURE_LABEL = "Picture {}: "
"""Text before an image in the prompts that Qwen-VL was tuned on, `{}` for the image's number."""

_END_OF_TEXT = "<|endoftext|>"
_IM_START = "<|im_start|>"
_IM_END = "<|im_end|>"
_N_EXTRAS = 205  # spare tokens <|extra_0|> to <|extra_204|>

IMAGE_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
"""Special tokens that a prompt may use; ChatML's own tokens and `<|endoftext|>` are plain text in a prompt."""

# In the order of their ids, which follow those of the vocabulary.
_SPECIAL_TOKENS = (
    _END_OF_TEXT,
    _IM_START,
    _IM_END,
    *(f"<|extra_{i}|>" for i in range(_N_EXTRAS)),
    *IMAGE_TAGS,
)

# Splits text into words before the BPE merges. The order of the alternatives affects the ids.
_WORD_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|re|ve)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, and at most one character in front, mostly its space
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)",  # spaces, without the one that belongs to the next word
        r"\s+",
    )
)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class QwenTokenizer:
    """Tokenizer of Qwen-VL: text to token ids and back.

    The ids are the ranks of the vocabulary file, then `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, 205 spare tokens
    and the nine `IMAGE_TAGS`. An image `<img>path</img>` becomes the start id, `n_image_slots` ids and the end id. The
    ids in the slots are the values of the path's UTF-8 bytes (byte 0x61 is id 97, whatever token 97 is in text), padded
    with the pad id.
    """

    def __init__(
        self, vocab_file: Path, n_image_slots: int = 256, picture_label: str = PICTURE_LABEL
    ) -> None:
        """Read a vocabulary in `qwen.tiktoken` format: a base64 token and its rank on each line.

        Raises:
            UsageError: the file cannot be read, or another argument is invalid.
            QwenVLError: the file is malformed; the message names file and line.
        """
        if n_image_slots < 1:
            raise UsageError(f"n_image_slots must be at least 1, got {n_image_slots}")
        tokens = _read_vocabulary(Path(vocab_file))
        self.n_image_slots = n_image_slots
        self.picture_label = picture_label
        self.special_tokens: dict[str, int] = {
            token: rank for rank, token in enumerate(_SPECIAL_TOKENS, start=len(tokens))
        }
        self.n_vocab = len(tokens) + len(self.special_tokens)
        self.eod_id = self.special_tokens[_END_OF_TEXT]
        self.im_start_id = self.special_tokens[_IM_START]
        self.im_end_id = self.special_tokens[_IM_END]
        self.img_start_id = self.special_tokens["<img>"]
        self.img_end_id = self.special_tokens["</img>"]
        self.img_pad_id = self.special_tokens["<imgpad>"]
        self._token_bytes = [*tokens, *(token.encode() for token in self.special_tokens)]
        self.max_token_bytes = max(map(len, self._token_bytes))  # for lower bounds of the tokens of a text
        self._encoding = tiktoken.Encoding(
            "qwen",
            pat_str=_WORD_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens=self.special_tokens,
        )

    @classmethod
    def from_folder(cls, folder: Path, n_image_slots: int = 256) -> QwenTokenizer:
        """Read `qwen.tiktoken` of a folder, and the key `picture_label` of its `tokenizer_config.json`, if present.

        Errors as in the constructor, and QwenVLError if the label cannot be read or is invalid; the message names the
        file.
        """
        folder = Path(folder)
        return cls(folder / VOCAB_FILE_NAME, n_image_slots, _read_picture_label(folder / CONFIG_FILE_NAME))

    @classmethod
    def of_model(cls, folder: Path, config: ModelConfig) -> QwenTokenizer:
        """Read the tokenizer of a model folder.

        Errors as in `from_folder`, and QwenVLError if the vocabulary does not match the config; the message names the
        file.
        """
        tokenizer = cls.from_folder(folder, config.visual.n_queries)
        if tokenizer.img_start_id != config.visual.image_start_id:
            raise QwenVLError(
                f"{Path(folder) / VOCAB_FILE_NAME}: <img> is token {tokenizer.img_start_id}, but "
                f"{config.visual.image_start_id} in config.json; this is another model's vocabulary"
            )
        return tokenizer

    @property
    def picture_label(self) -> str:
        """Text before each image in a prompt, `{}` for the image's number; setting an invalid one raises UsageError."""
        return self._picture_label

    @picture_label.setter
    def picture_label(self, label: str) -> None:
        self._picture_label = check_picture_label(label)

    def encode(self, text: str, allowed_special: Collection[str] = IMAGE_TAGS) -> list[int]:
        """Tokenize text after NFC normalisation.

        An unpaired surrogate becomes U+FFFD in text and `?` in a path.

        Args:
            text: the text, with `<img>path</img>` for images.
            allowed_special: special tokens to recognise; others are ordinary text. If `<img>` is not among them, images
                are not recognised.

        Raises:
            UsageError: a path is longer than `n_image_slots` bytes, an `<img>` has no `</img>`, or the text has a
                run of about a million spaces.
        """
        allowed = set(allowed_special)
        text = _nfc(text)
        if "<img>" not in allowed:
            return self._encode_text(text, allowed)
        ids: list[int] = []
        remaining = text
        while True:
            before, tag, remaining = remaining.partition("<img>")
            ids += self._encode_text(before, allowed)
            if not tag:
                return ids
            path, end_tag, remaining = remaining.partition("</img>")
            if not end_tag or "</img>" not in allowed or "<img>" in path:
                raise UsageError(f"<img> without its </img> before {_shorten(path)!r}")
            ids += self._encode_path(path)

    @property
    def chat_stop_token_ids(self) -> list[int]:
        """Stop tokens of a chat turn."""
        return [self.eod_id, self.im_end_id, self.im_start_id]

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token (of its name, for a special token); U+FFFD for an id outside [0, n_vocab)."""
        return self._token_bytes[token_id] if 0 <= token_id < self.n_vocab else _REPLACEMENT

    def decode(self, ids: Iterable[int]) -> str:
        """Decode any token ids to text; bytes that are not UTF-8 become U+FFFD.

        Image slots become the path in them. An id outside [0, n_vocab) becomes U+FFFD as well, so that it stays
        visible: the model may generate one, since its embedding can have more rows than the tokenizer has tokens.
        """
        decoded: list[bytes] = []
        id_list = [int(token_id) for token_id in ids]
        position = 0
        while position < len(id_list):
            path, position_after = self._path_at(id_list, position)
            if path is not None:
                decoded.append(b"<img>" + path + b"</img>")
                position = position_after
            else:
                decoded.append(self.token_bytes(id_list[position]))
                position += 1
        return b"".join(decoded).decode("utf-8", errors="replace")

    def _encode_text(self, text: str, allowed: set[str]) -> list[int]:
        try:
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except ValueError as error:  # the pattern matcher has a stack limit
            raise UsageError(
                f"text of {len(text)} characters cannot be tokenized, probably for a run of a million "
                f"spaces: {error}"
            ) from error

    def _encode_path(self, path: str) -> list[int]:
        path_bytes = path.encode("utf-8", errors="replace")
        n_free = self.n_image_slots - len(path_bytes)
        if n_free < 0:
            raise UsageError(
                f"image path {_shorten(path)!r} is {len(path_bytes)} bytes long, "
                f"and the model has room for {self.n_image_slots}: use a shorter path"
            )
        return [self.img_start_id, *path_bytes, *[self.img_pad_id] * n_free, self.img_end_id]

    def _path_at(self, ids: list[int], start: int) -> tuple[bytes | None, int]:
        """The path in the image span that begins at `start` and the position after it, or (None, start)."""
        if ids[start] != self.img_start_id:
            return None, start
        # Search the end tag within the length of a span only, not in the remaining text for each unmatched <img>.
        window = ids[start + 1 : start + 2 + self.n_image_slots]
        if self.img_end_id not in window:
            return None, start
        slots = window[: window.index(self.img_end_id)]
        path = slots[: slots.index(self.img_pad_id)] if self.img_pad_id in slots else slots
        if not all(0 <= value < 256 for value in path):
            return None, start
        return bytes(path), start + len(slots) + 2


def _nfc(text: str) -> str:
    """Normalise text to NFC in near-linear time.

    unicodedata sorts the marks of a run by insertion, which takes minutes for a long run in the wrong order. Therefore
    runs of combining marks are sorted before, except in texts of up to 1000 characters, where they are short.
    """
    if len(text) > 1000 and not text.isascii():
        text = "".join(
            "".join(sorted(run, key=unicodedata.combining) if combining else run)
            for combining, run in itertools.groupby(
                text, lambda character: unicodedata.combining(character) > 0
            )
        )
    return unicodedata.normalize("NFC", text)


def check_picture_label(label: Any) -> str:
    """Return `label` if it is a valid picture label; otherwise raise UsageError."""
    if not isinstance(label, str) or label.count("{}") != 1:
        raise UsageError(
            f"picture_label: {label!r:.60} must be text with {{}} once, for the image's number, "
            f"such as {PICTURE_LABEL!r}"
        )
    for tag in _SPECIAL_TOKENS:
        if tag in label:
            raise UsageError(f"picture_label: {label!r:.60} must not contain {tag}")
    return label


def _read_picture_label(config_file: Path) -> str:
    settings = read_json(config_file) if config_file.exists() else None
    if not isinstance(settings, dict) or "picture_label" not in settings:
        return PICTURE_LABEL
    try:
        return check_picture_label(settings["picture_label"])
    except UsageError as error:
        raise QwenVLError(f"{config_file}: {error}") from error


def _read_vocabulary(vocab_file: Path) -> list[bytes]:
    """Read the tokens of a vocabulary file, one per line, in the order of their ranks 0, 1, 2 …."""
    try:
        lines = vocab_file.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"vocabulary file {vocab_file} does not exist") from error
    except OSError as error:
        raise UsageError(f"vocabulary file {vocab_file} cannot be read: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"vocabulary file {vocab_file}, line {number}"
        try:
            token_base64, rank_digits = line.split()
            token = base64.b64decode(token_base64, validate=True)
            rank = int(rank_digits)
        except (ValueError, binascii.Error) as error:
            raise QwenVLError(f"{where}: expected a base64 token and its rank, got {line[:60]!r}") from error
        if not token:
            raise QwenVLError(f"{where}: the token is empty")
        if token in ranks:
            raise QwenVLError(f"{where}: token {token!r} appears twice (first with rank {ranks[token]})")
        if rank != len(ranks):
            raise QwenVLError(f"{where}: rank {rank}, expected {len(ranks)}")
        ranks[token] = rank
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise QwenVLError(
            f"vocabulary file {vocab_file}: {len(missing)} of the 256 single bytes are missing, "
            f"the first is 0x{missing[0]:02x}"
        )
    return list(ranks)


def _shorten(path: str, limit: int = 60) -> str:
    path = re.sub(r"\s+", " ", path)
    return path if len(path) <= limit else path[: limit - 1] + "…"
