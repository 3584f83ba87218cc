"""The tokenizer: compared with PaddleMIX's and with brute force; special tokens; vocabulary files.

The tests with the fixture `real`, Qwen-VL's vocabulary, are skipped without the package dashscope (conftest.py).
"""

from __future__ import annotations

import base64
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.processing.tokenizer import IMAGE_TAGS, QwenTokenizer, _nfc
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

N_TINY = 456  # tokens of the tiny vocabulary, without special tokens

# Special tokens as text, and parts of them.
LOOK_ALIKES = [*IMAGE_TAGS, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_204|>", "<", "|>", "img"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tagged_text = st.lists(st.sampled_from(LOOK_ALIKES) | any_text, max_size=8).map("".join)


def read_ranks(vocab_file: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in vocab_file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def brute_force_bpe(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merge the adjacent pair of the lowest rank, the leftmost of equal ones, until no pair has a rank."""
    parts = [bytes([value]) for value in word]
    while True:
        best = None
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and (best is None or rank < best[0]):
                best = (rank, i)
        if best is None:
            return [ranks[part] for part in parts]
        i = best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_golden_texts(real: QwenTokenizer, golden_tokens: dict[str, Any]) -> None:
    for query in golden_tokens["queries"]:
        ids = real.encode(query["text"], real.special_tokens)
        assert ids == query["input_ids"]
        assert real.decode(ids) == query["decoded"]


def test_ids_of_the_real_vocabulary(real: QwenTokenizer) -> None:
    assert real.eod_id == 151643
    assert (real.im_start_id, real.im_end_id) == (151644, 151645)
    tags = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
    assert [real.special_tokens[tag] for tag in tags] == list(range(151851, 151857))
    assert (real.img_start_id, real.img_end_id, real.img_pad_id) == (151857, 151858, 151859)
    assert real.n_vocab == 151860
    assert real.chat_stop_token_ids == [151643, 151645, 151644]
    assert real.special_tokens["<|extra_0|>"] == 151646


def test_special_ids_follow_a_small_vocabulary(tiny: QwenTokenizer) -> None:
    assert tiny.eod_id == N_TINY
    # 3 control tokens, 205 <|extra_N|>, 9 tags for boxes and images.
    assert tiny.img_pad_id == tiny.n_vocab - 1 == N_TINY + 3 + 205 + 9 - 1
    ids = tiny.encode("<|im_end|><quad>", tiny.special_tokens)
    assert ids == [tiny.im_end_id, tiny.special_tokens["<quad>"]]


def test_from_folder(tiny_vocab_file: Path) -> None:
    tokenizer = QwenTokenizer.from_folder(tiny_vocab_file.parent, n_image_slots=4)
    assert tokenizer.encode("<img>a</img>") == [
        tokenizer.img_start_id,
        97,
        *[tokenizer.img_pad_id] * 3,
        tokenizer.img_end_id,
    ]


def test_the_picture_label_of_a_folder(tiny_vocab_file: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_vocab_file, tmp_path)
    assert QwenTokenizer.from_folder(tmp_path).picture_label == "Picture {}: "
    settings = tmp_path / "tokenizer_config.json"
    for content in ('{"model_max_length": 8192}', "[]"):
        settings.write_text(content)
        assert QwenTokenizer.from_folder(tmp_path).picture_label == "Picture {}: "
    settings.write_text('{"picture_label": "图{}："}', "utf-8")
    tokenizer = QwenTokenizer.from_folder(tmp_path)
    assert tokenizer.picture_label == "图{}："
    tokenizer.picture_label = "{}. "
    assert tokenizer.picture_label == "{}. "
    with pytest.raises(UsageError, match=r"^picture_label: '\{\}\{\}' must be text with \{\} once"):
        tokenizer.picture_label = "{}{}"
    assert tokenizer.picture_label == "{}. "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"picture_label": 3}', "picture_label: 3 must be text with {} once"),
        ('{"picture_label": "Label"}', "picture_label: 'Label' must be text with {} once"),
        ('{"picture_label": "<img>{}"}', "picture_label: '<img>{}' must not contain <img>"),
        ("{", "not valid JSON ("),
        ("\xff", "not valid JSON ("),
    ],
)
def test_an_invalid_picture_label(tiny_vocab_file: Path, tmp_path: Path, settings: str, message: str) -> None:
    shutil.copy(tiny_vocab_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(settings.encode("latin-1"))
    with pytest.raises(QwenVLError, match=re.escape(f"{tmp_path / 'tokenizer_config.json'}: {message}")):
        QwenTokenizer.from_folder(tmp_path)


@given(text=any_text | tagged_text)
def test_round_trip_of_plain_text(tiny: QwenTokenizer, text: str) -> None:
    ids = tiny.encode(text, allowed_special=())
    assert all(0 <= i < tiny.eod_id for i in ids)
    assert tiny.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=tagged_text)
def test_round_trip_with_special_tokens(tiny: QwenTokenizer, text: str) -> None:
    try:
        ids = tiny.encode(text, tiny.special_tokens)
    except UsageError:
        assert "<img>" in text
        return
    assert tiny.decode(ids) == unicodedata.normalize("NFC", text)


# The ids of <img> and </img> are generated more often.
@given(ids=st.lists(st.integers(-5, N_TINY + 300) | st.just(N_TINY + 214) | st.just(N_TINY + 215)))
def test_decode_accepts_any_ids(tiny: QwenTokenizer, ids: list[int]) -> None:
    tiny.decode(ids)


def test_ids_outside_the_vocabulary_become_replacement_characters(tiny: QwenTokenizer) -> None:
    assert tiny.decode([97, tiny.n_vocab, -1, 10**9, 98]) == "a\ufffd\ufffd\ufffdb"


def test_image_slots_contain_the_bytes_of_the_path(tiny: QwenTokenizer) -> None:
    """The ids are the values of the bytes, not their tokens: the two differ in Qwen-VL's vocabulary (the goldens)."""
    ids = tiny.encode("<img>图 the</img>")
    slots = ids[1:-1]
    assert len(slots) == 256
    assert bytes(slots[:7]) == "图 the".encode()
    assert set(slots[7:]) == {tiny.img_pad_id}


def test_a_path_that_fills_all_slots(tiny: QwenTokenizer) -> None:
    text = f"<img>{'é' * 128}</img>"
    ids = tiny.encode(text)
    assert len(ids) == 258
    assert tiny.img_pad_id not in ids
    assert tiny.decode(ids) == text


def test_a_long_path_is_truncated_in_the_message(tiny: QwenTokenizer) -> None:
    with pytest.raises(UsageError, match=r"'/data/xxx.*…' is 263 bytes long.* 256") as caught:
        tiny.encode(f"<img>/data/{'x' * 257}</img>")
    assert len(str(caught.value)) < 200


def test_a_path_with_one_byte_too_many(tiny: QwenTokenizer) -> None:
    with pytest.raises(UsageError, match="is 257 bytes long"):
        tiny.encode(f"<img>{'x' * 257}</img>")


def test_splitting_text_before_the_merges(tmp_path: Path) -> None:
    """With a vocabulary whose merges would join characters across the splits."""
    merges = [b"12", b"\n\n", b"  ", b" a", b"a.", b" .", b"'s", b"(a", b"..", b" 1"]
    path = tmp_path / "splits.tiktoken"
    tokens = [*(bytes([value]) for value in range(256)), *merges]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    tokenizer = QwenTokenizer(path)
    for text, expected in [
        ("12 1", ["1", "2", " ", "1"]),  # each digit is a token, without the space before it
        # A word ends before punctuation; punctuation includes the space before it.
        ("a. .", ["a", ".", " ."]),
        ("   a", ["  ", " a"]),  # the last space belongs to the word
        ("a's", ["a", "'s"]),
        ("a'S", ["a", "'", "S"]),
        ("(a..", ["(a", ".."]),
        ("\n\n\n a", ["\n\n", "\n", " a"]),
    ]:
        assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)] == expected


def test_the_length_of_a_path_is_counted_after_normalisation(tiny: QwenTokenizer) -> None:
    assert len(tiny.encode(f"<img>{'e' * 127}e\u0301{'e' * 127}</img>")) == 258


@settings(deadline=None)
@given(text=st.text(alphabet="ae\u0301\u0316\u0344\u0323\u0345ǭ각가ᄀ狗", max_size=40))
def test_long_texts_are_normalised_like_short_ones(text: str) -> None:
    assert _nfc(text + "狗" * 1000) == unicodedata.normalize("NFC", text + "狗" * 1000)


def test_many_combining_marks_are_normalised_quickly(tiny: QwenTokenizer) -> None:
    """`unicodedata.normalize` takes minutes for this text."""
    assert len(tiny.encode("a" + "\u0301\u0316" * 300_000)) > 600_000


def test_normalisation_creates_no_tags() -> None:
    """No character except "<" has "<" in its NFC form; surrogates, which are not characters, are left out."""
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and chr(code) != "<")
    assert not [character for character in characters if "<" in unicodedata.normalize("NFC", character)]


@pytest.mark.parametrize("text", ["<img>a", "<img>a</img><img>", "<img>a<img>b</img>", "<img></ img>"])
def test_unclosed_image(tiny: QwenTokenizer, text: str) -> None:
    with pytest.raises(UsageError, match="<img> without its </img>"):
        tiny.encode(text)


def test_special_tokens_inside_a_path_are_bytes(tiny: QwenTokenizer) -> None:
    ids = tiny.encode("<img>a<|endoftext|><imgpad>b</img>")
    assert tiny.eod_id not in ids
    assert tiny.decode(ids) == "<img>a<|endoftext|><imgpad>b</img>"


def test_allowed_special_names_the_tokens(tiny: QwenTokenizer) -> None:
    ids = tiny.encode("<box><|im_end|></box><img>", allowed_special=["<box>", "</box>", "unknown"])
    assert ids[0] == tiny.special_tokens["<box>"]
    assert tiny.special_tokens["</box>"] in ids
    assert tiny.im_end_id not in ids
    assert tiny.img_start_id not in ids


def test_control_tokens_are_text_unless_named(tiny: QwenTokenizer) -> None:
    text = "<|endoftext|><|im_start|><|im_end|><|extra_0|><box>"
    assert [i for i in tiny.encode(text) if i >= tiny.eod_id] == [tiny.special_tokens["<box>"]]
    assert len(tiny.encode(text, tiny.special_tokens)) == 5


def test_lone_surrogates_do_not_crash(tiny: QwenTokenizer) -> None:
    assert tiny.decode(tiny.encode("a\ud800b<img>\udc80</img>")) == "a\ufffdb<img>?</img>"


def test_too_many_spaces_are_refused(tiny: QwenTokenizer) -> None:
    with pytest.raises(UsageError, match="1500001 characters cannot be tokenized"):
        tiny.encode(" " * 1_500_000 + "x")


# Letters only: the tokenizer then splits a sentence before each space.
words = st.lists(
    st.sampled_from(
        ["the", "dog", "ing", "pict", "ure", "ou", "a", "e", "B", "ê", "海滩", "上", "狗", "船", "s"]
    ),
    min_size=1,
    max_size=8,
).map("".join)


@given(sentence=st.lists(words, min_size=1, max_size=5))
def test_tiny_vocabulary_against_brute_force(
    tiny: QwenTokenizer, tiny_vocab_file: Path, sentence: list[str]
) -> None:
    ranks = read_ranks(tiny_vocab_file)
    expected = brute_force_bpe(sentence[0].encode(), ranks)
    for word in sentence[1:]:
        expected += brute_force_bpe(f" {word}".encode(), ranks)
    assert tiny.encode(" ".join(sentence)) == expected


def test_every_tiny_token_is_reachable(tiny_vocab_file: Path) -> None:
    """Each token is a byte, or BPE makes it by merging two tokens of lower ranks."""
    ranks = read_ranks(tiny_vocab_file)
    assert sorted(ranks.values()) == list(range(N_TINY))
    assert all(ranks[bytes([value])] == value for value in range(256))
    for token, rank in ranks.items():
        if rank >= 256:
            splits = [(token[:i], token[i:]) for i in range(1, len(token))]
            assert any(
                ranks.get(left, rank) < rank and ranks.get(right, rank) < rank for left, right in splits
            )
            assert brute_force_bpe(token, ranks) == [rank]
    assert {" the", " dog", "图"} <= {token.decode(errors="ignore") for token in ranks}


def test_tiny_vocabulary_is_deterministic(tiny_vocab_file: Path, tmp_path: Path) -> None:
    write_tiny_vocabulary(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == tiny_vocab_file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"qwen\.tiktoken does not exist"):
        QwenTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"justonecolumn", "line 457: expected a base64 token and its rank"),
        (b"YWJj 1 2", "line 457: expected a base64 token"),
        (b"YWJ 456", "line 457: expected a base64 token"),
        (b"Y!WJj 456", "line 457: expected a base64 token"),
        (b"YWJj four", "line 457: expected a base64 token"),
        (b"YWJjYWJj 7", "line 457: rank 7, expected 456"),
        (b"YWJjYWJj 900", "line 457: rank 900, expected 456"),
        (b"YWJjYWJj -1", "line 457: rank -1, expected 456"),
        (b"YQ== 456", "line 457: token b'a' appears twice"),
    ],
)
def test_malformed_vocabulary(tiny_vocab_file: Path, tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "malformed.tiktoken"
    path.write_bytes(tiny_vocab_file.read_bytes() + line + b"\n")
    with pytest.raises(QwenVLError, match=message) as caught:
        QwenTokenizer(path)
    assert "malformed.tiktoken" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabulary_without_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "few.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(200)))
    with pytest.raises(QwenVLError, match="56 of the 256 single bytes are missing, the first is 0xc8"):
        QwenTokenizer(path)
