"""Train the demo model's vocabulary: byte-level merges over the world's questions and answers.

    python -m tools.train_demo.vocabulary paddlemix_qwenvl_plugin/demo/model/qwen.tiktoken

The words in the images are excluded, so that they are spelled letter by letter and any word can be read.
Deterministic; 20 seconds on one core.
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
MAX_TOKEN_BYTES = 12  # no token covers a complete Chinese name with size and colour
CHAT = "You are a helpful assistant. system user assistant Picture 1: Picture 2:"


def texts() -> list[str]:
    """Training texts, split at tags and at the words in the images, which merges must not cross."""
    found = []
    for number in range(N_TEXTS):
        # Numbers far beyond the evaluated held-out samples.
        sample = held_out(10**9 + number)
        labels = [thing.text for scene in sample.scenes for thing in scene.texts]
        borders = "|".join(["</?ref>", "</?box>", "\n", *labels])
        turn = sample.turns[0]
        found += re.split(borders, f"{turn.question}\n{turn.answer}\n{CHAT}")
    return found


def train() -> list[bytes]:
    """Train merges: in each round, merge the most frequent pair of neighbours."""
    frequency: Counter[bytes] = Counter()
    for text in texts():
        frequency.update(word.encode() for word in regex.findall(_WORD_PATTERN, text))
    split = {word: [word[i : i + 1] for i in range(len(word))] for word in frequency}
    ranks: dict[bytes, int] = {}
    while len(ranks) < MAX_MERGES:
        counts: Counter[bytes] = Counter()
        for word, parts in split.items():
            for left, right in zip(parts, parts[1:]):
                if len(left) + len(right) <= MAX_TOKEN_BYTES:
                    counts[left + right] += frequency[word]
        if not counts:
            break
        best = min(counts, key=lambda token: (-counts[token], token))
        ranks[best] = len(ranks)
        for word in split:
            if best in word:
                # Split again from single bytes, as the tokenizer does, so that it can produce every token.
                split[word] = _split(word, ranks)
    return list(ranks)


def _split(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        found = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(zip(parts, parts[1:]))
            if left + right in ranks
        ]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    tokens = [bytes([value]) for value in range(256)] + train()
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    file.write_bytes(b"".join(lines))
    print(f"{file}: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
