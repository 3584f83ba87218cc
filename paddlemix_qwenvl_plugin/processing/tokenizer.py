"""The Qwen-VL tokenizer: byte-level BPE, and picture spans that hold the bytes of a path."""

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
"""What stands before a picture in the prompts that Qwen-VL was tuned on, its number for `{}`."""

_END_OF_TEXT = "<|endoftext|>"
_IM_START = "<|im_start|>"
_IM_END = "<|im_end|>"
_N_EXTRAS = 205

IMAGE_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
"""The tags that a prompt may use; ChatML's own tokens and `<|endoftext|>` are plain text in one."""

_SPECIAL_TOKENS = (
    _END_OF_TEXT,
    _IM_START,
    _IM_END,
    *(f"<|extra_{i}|>" for i in range(_N_EXTRAS)),
    *IMAGE_TAGS,
)

# How text is cut before the merges. The order of the alternatives decides the ids.
_WORD_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|re|ve)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with one character in front, mostly its space
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)",  # spaces, without the one that belongs to the next word
        r"\s+",
    )
)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class QwenTokenizer:
    """Text to ids and back.

    Ranks of the vocabulary file come first; then `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, 205 spare
    tokens and the nine `IMAGE_TAGS`. A picture `<img>path</img>` is the start id, `n_image_slots` ids and the
    end id; the slots hold the path's UTF-8 byte values as they are (byte 0x61 is id 97, whatever that rank
    means in text), filled up with the pad id.
    """

    def __init__(
        self, vocab_file: Path, n_image_slots: int = 256, picture_label: str = PICTURE_LABEL
    ) -> None:
        """Read a vocabulary in `qwen.tiktoken` format: a base64 token and its rank on each line.

        Raises UsageError if the file is missing or the label is none, and QwenVLError (file and line) if it is
        malformed.
        """
        if n_image_slots < 1:
            raise UsageError(f"n_image_slots must be at least 1, got {n_image_slots}")
        pieces = _read_vocabulary(Path(vocab_file))
        self.n_image_slots = n_image_slots
        self.picture_label = picture_label
        self.special_tokens: dict[str, int] = {
            token: rank for rank, token in enumerate(_SPECIAL_TOKENS, start=len(pieces))
        }
        self.n_vocab = len(pieces) + len(self.special_tokens)
        self.eod_id = self.special_tokens[_END_OF_TEXT]
        self.im_start_id = self.special_tokens[_IM_START]
        self.im_end_id = self.special_tokens[_IM_END]
        self.img_start_id = self.special_tokens["<img>"]
        self.img_end_id = self.special_tokens["</img>"]
        self.img_pad_id = self.special_tokens["<imgpad>"]
        self._pieces = [*pieces, *(token.encode() for token in self.special_tokens)]
        self.max_token_bytes = max(map(len, self._pieces))
        self._encoding = tiktoken.Encoding(
            "qwen",
            pat_str=_WORD_PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens=self.special_tokens,
        )

    @classmethod
    def from_folder(cls, folder: Path, n_image_slots: int = 256) -> QwenTokenizer:
        """Read `qwen.tiktoken` in `folder`, and the key `picture_label` of `tokenizer_config.json` where there is one.

        Errors as in the constructor, and QwenVLError (file) if the label cannot be read or is none.
        """
        folder = Path(folder)
        return cls(folder / VOCAB_FILE_NAME, n_image_slots, _read_picture_label(folder / CONFIG_FILE_NAME))

    @classmethod
    def of_model(cls, folder: Path, config: ModelConfig) -> QwenTokenizer:
        """That of a model folder. Errors as in `from_folder`, and QwenVLError (file) if it is another model's."""
        tokenizer = cls.from_folder(folder, config.visual.n_queries)
        if tokenizer.img_start_id != config.visual.image_start_id:
            raise QwenVLError(
                f"{Path(folder) / VOCAB_FILE_NAME}: <img> is token {tokenizer.img_start_id}, but config.json says "
                f"{config.visual.image_start_id}; this is another model's vocabulary"
            )
        return tokenizer

    @property
    def picture_label(self) -> str:
        """What a prompt writes before a picture, `{}` for its number; it can be set. UsageError if it is none."""
        return self._picture_label

    @picture_label.setter
    def picture_label(self, label: str) -> None:
        self._picture_label = check_picture_label(label)

    def encode(self, text: str, allowed_special: Collection[str] = IMAGE_TAGS) -> list[int]:
        """Ids of `text` after NFC normalisation.

        `allowed_special` names the special tokens that are recognised; the others are ordinary text. Pictures are
        recognised if `<img>` is. Half a surrogate pair becomes U+FFFD in text and `?` in a path.

        Raises UsageError for a path longer than `n_image_slots` bytes and for an `<img>` without `</img>`.
        """
        allowed = set(allowed_special)
        text = _nfc(text)
        if "<img>" not in allowed:
            return self._encode_text(text, allowed)
        ids: list[int] = []
        rest = text
        while True:
            before, tag, rest = rest.partition("<img>")
            ids += self._encode_text(before, allowed)
            if not tag:
                return ids
            path, end_tag, rest = rest.partition("</img>")
            if not end_tag or "</img>" not in allowed or "<img>" in path:
                raise UsageError(f"<img> without its </img> before {_shorten(path)!r}")
            ids += self._encode_path(path)

    @property
    def chat_stop_token_ids(self) -> list[int]:
        """The tokens that end a turn of a chat."""
        return [self.eod_id, self.im_end_id, self.im_start_id]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token says, special tokens by name; an id outside [0, n_vocab) is U+FFFD."""
        return self._pieces[token_id] if 0 <= token_id < self.n_vocab else _REPLACEMENT

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Never fails, whatever the ids.

        Picture slots are shown as the path they hold. An id outside [0, n_vocab), for example one of the
        model's padded vocabulary rows, becomes U+FFFD too, so that it does not vanish unseen.
        """
        shown: list[bytes] = []
        id_list = [int(i) for i in ids]
        position = 0
        while position < len(id_list):
            path, position_after = self._path_at(id_list, position)
            if path is not None:
                shown.append(b"<img>" + path + b"</img>")
                position = position_after
            else:
                shown.append(self.token_bytes(id_list[position]))
                position += 1
        return b"".join(shown).decode("utf-8", errors="replace")

    def _encode_text(self, text: str, allowed: set[str]) -> list[int]:
        try:
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except ValueError as error:  # the pattern matcher has a stack limit
            raise UsageError(
                f"text of {len(text)} characters cannot be tokenised, probably for a run of a million "
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
        """The path in the picture span that begins at `start` and the position after it, or (None, start)."""
        if ids[start] != self.img_start_id:
            return None, start
        # A span is short: do not search a long text again for each stray <img>.
        window = ids[start + 1 : start + 2 + self.n_image_slots]
        if self.img_end_id not in window:
            return None, start
        slots = window[: window.index(self.img_end_id)]
        path = slots[: slots.index(self.img_pad_id)] if self.img_pad_id in slots else slots
        if not all(0 <= value < 256 for value in path):
            return None, start
        return bytes(path), start + len(slots) + 2


def _nfc(text: str) -> str:
    """The NFC form of `text`, in time that grows with its length.

    unicodedata sorts combining marks by insertion: a long run of them in the wrong order takes minutes.
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
    """`label`, if it can stand before a picture; else UsageError."""
    if not isinstance(label, str) or label.count("{}") != 1:
        raise UsageError(
            f"picture_label: {label!r:.60} must be text with {{}} once, for the picture's number, "
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
    """The tokens, in the order of their ranks: 0, 1, 2 …, one a line."""
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
            raise QwenVLError(f"{where}: rank {rank}, where {len(ranks)} comes next")
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
