"""Train the demo model's vocabulary: byte-pair merges over questions and answers of the demo world.

    python -m tools.train_demo.vocabulary paddlemix_qwenvl_plugin/demo/model/qwen.tiktoken

No merges are trained on the words in the images: the model spells them letter by letter, and can thus read any word.
The result is deterministic. Takes 20 seconds on one core.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections import Counter
from pathlib import Path

import regex

from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
from paddlemix_qwenvl_plugin.processing.tokenizer import _WORD_PATTERN

N_TEXTS = 6000
MAX_MERGES = 420
MAX_TOKEN_BYTES = 12  # so that no token is a complete Chinese name of an object with size and colour
# Text of the prompts.
CHAT = "You are a helpful assistant. system user assistant Picture 1: Picture 2:"


def texts() -> list[str]:
    """Training texts, split at tags, line ends and the words in the images, across which no merges are trained."""
    parts = []
    for number in range(N_TEXTS):
        # These numbers are far above those of the samples for evaluation.
        sample = held_out(10**9 + number)
        words = [written.text for scene in sample.scenes for written in scene.texts]
        separators = "|".join(["</?ref>", "</?box>", "\n", *words])
        turn = sample.turns[0]  # a held-out sample has one turn
        parts += re.split(separators, f"{turn.question}\n{turn.answer}\n{CHAT}")
    return parts


def train() -> list[bytes]:
    """Train merges: each adds the most frequent pair of adjacent tokens. Return the new tokens in order of rank."""
    frequency: Counter[bytes] = Counter()
    for text in texts():
        frequency.update(word.encode() for word in regex.findall(_WORD_PATTERN, text))
    split = {word: _split(word, {}) for word in frequency}  # word -> its current tokens
    ranks: dict[bytes, int] = {}
    while len(ranks) < MAX_MERGES:
        counts: Counter[bytes] = Counter()
        for word, parts in split.items():
            for left, right in zip(parts, parts[1:]):
                if len(left) + len(right) <= MAX_TOKEN_BYTES:
                    counts[left + right] += frequency[word]
        if not counts:
            break
        new_token = min(counts, key=lambda token: (-counts[token], token))
        ranks[new_token] = len(ranks)
        for word in split:
            if new_token in word:
                # Split again from single bytes, as the tokenizer does. Then the counted pairs are those that the
                # tokenizer can merge.
                split[word] = _split(word, ranks)
    return list(ranks)


def _split(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Split a word into tokens: begin with single bytes, and merge the pair of lowest rank until no pair has a rank."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(zip(parts, parts[1:]))
            if left + right in ranks
        ]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="output file")
    file = parser.parse_args().file
    tokens = [bytes([value]) for value in range(256)] + train()
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    file.write_bytes(b"".join(lines))
    print(f"{file}: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
