"""Small vocabulary in `qwen.tiktoken` format, for tests and small models."""

from __future__ import annotations

import base64
import re
from collections import Counter
from pathlib import Path

_N_MERGES = 200

_TEXT = """
The picture shows a small brown dog that is running along the beach with a red ball. There is a woman in the
background, and she is throwing the ball to the dog. In the picture there are two boats on the sea, and the
sky is blue. What is the colour of the ball? The colour of the ball is red. Where is the dog? The dog is on
the beach, in front of the woman. Describe the picture in English. Generate the caption in English with
grounding: the dog and the ball are in front of the boats. Picture 1 and Picture 2 show the same place. What
is the difference between the two pictures? In the first picture the dog is running, and in the second
picture the dog is sitting. How many boats are there? There are two boats. You are a helpful assistant, and
the user asks for the box of the woman in the image. The image shows an animal, a person and the sea:
(10,20),(300,400). The box of the dog is (120,340),(560,780).
图中有一只小狗在海滩上奔跑。图中的女人在海滩上。图片中有两只船。这是什么？这是一只狗。狗在哪里？狗在海滩上。
"""


def write_tiny_vocabulary(path: Path) -> None:
    """Write a vocabulary of 256 single bytes (rank = byte value) and 200 merges; deterministic.

    The merges are trained on the text in this module. Each merge is therefore the concatenation of two tokens of lower
    rank, and the tokenizer can produce it.
    """
    tokens = [bytes([value]) for value in range(256)]
    # Words and punctuation, with the space before them; the tokenizer never merges digits.
    tokens += _train_merges(re.findall(r" ?[^\W\d_]+| ?[^\w\s]+", _TEXT))
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))


def _train_merges(words: list[str]) -> list[bytes]:
    """Train byte-pair merges: in each round, the most frequent concatenation of two neighbours becomes a token."""
    frequency = Counter(word.encode() for word in words)
    split = {word: _split(word, {}) for word in frequency}
    ranks: dict[bytes, int] = {}
    while len(ranks) < _N_MERGES:
        counts: Counter[bytes] = Counter()
        for word, tokens in split.items():
            for left, right in zip(tokens, tokens[1:]):
                counts[left + right] += frequency[word]
        # Ties go to the merge that sorts first, so that the result does not depend on dictionary order.
        best = min(counts, key=lambda token: (-counts[token], token))
        ranks[best] = len(ranks)
        for word in split:
            if best in word:
                # Split again from single bytes, as the tokenizer does, so that it can produce every token.
                split[word] = _split(word, ranks)
    return list(ranks)


def _split(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Split a word into tokens: from single bytes on, apply the merge of the lowest rank until none applies."""
    tokens = [word[i : i + 1] for i in range(len(word))]
    while True:
        candidates = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(zip(tokens, tokens[1:]))
            if left + right in ranks
        ]
        if not candidates:
            return tokens
        _, i = min(candidates)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
