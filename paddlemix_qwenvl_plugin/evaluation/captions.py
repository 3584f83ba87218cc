"""Caption scores (COCO, Flickr30K, NoCaps): CIDEr, BLEU-4 and ROUGE-L of pycocoevalcap."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from paddlemix_qwenvl_plugin.evaluation.ask import Question
from paddlemix_qwenvl_plugin.evaluation.extra import extra
from paddlemix_qwenvl_plugin.evaluation.rows import Id, Row
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=30, min_new_tokens=8)
"""Generation options of the official evaluation."""

_FEATURE = "eval captions"

_PROMPT = "Describe the image in English:"

_ASCII_PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "--", "—": "--"})

# Tokens that pycocoevalcap's PTBTokenizer drops. Its list also has brackets, but in upper case: they never match.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


class CaptionRow(Row):
    """Row of a caption data set.

    Attributes:
        image_id: id of the row.
        captions: reference captions.
    """

    image_id: Id
    captions: tuple[str, ...] = Field(min_length=1)

    def key(self, number: int) -> Id:
        """The image id."""
        return self.image_id

    def prompt(self) -> Question:
        """The caption prompt."""
        return Question(self.image, _PROMPT)


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a data set. `values`: CIDEr, BLEU-4 and ROUGE-L; `cider`: CIDEr by row. 1 equals 100 points."""

    values: dict[str, float]
    cider: dict[Id, float]


def tokens(caption: str) -> str:
    """Penn Treebank tokens of a caption in lower case, without common punctuation marks, joined by spaces.

    Brackets become -lrb-, -rrb- and the like. COCO's evaluation runs Stanford's tokenizer in Java instead, which gives
    ordinary captions the same tokens (docs/eval.md).
    """
    treebank = extra("nltk.tokenize", _FEATURE).TreebankWordTokenizer()
    # NLTK treats a text as one sentence and splits off only its last full stop: split off the others, after words of
    # three letters or more, which are seldom abbreviations.
    split = re.sub(r"(?<=[a-z]{3})\. ", " . ", caption.lower().translate(_ASCII_PUNCTUATION))
    treebank_tokens = treebank.tokenize(split, convert_parentheses=True)
    return " ".join(token.lower() for token in treebank_tokens if token not in _PUNCTUATION)


def score(rows: Mapping[Id, CaptionRow], answers: Mapping[Id, str]) -> CaptionScores:
    """Score the answer to each row.

    CIDEr weighs n-grams by their rarity in the captions of `rows`, so the CIDEr of a row depends on all rows.

    Raises:
        QwenVLError: a library of the extra `eval` is missing.
    """
    bleu, cider, rouge = _scorers()
    references = {row_id: [tokens(caption) for caption in row.captions] for row_id, row in rows.items()}
    candidates = {row_id: [tokens(answers[row_id])] for row_id in rows}
    bleu_1_to_4, _ = bleu.compute_score(references, candidates, verbose=0)
    mean_cider, row_ciders = cider.compute_score(references, candidates)
    mean_rouge, _ = rouge.compute_score(references, candidates)
    return CaptionScores(
        {"CIDEr": float(mean_cider), "BLEU-4": float(bleu_1_to_4[3]), "ROUGE-L": float(mean_rouge)},
        {row_id: float(value) for row_id, value in zip(rows, row_ciders)},
    )


def check_libraries() -> None:
    """Check for missing libraries before the model runs.

    Raises:
        QwenVLError: a library is missing; the message has the command that installs it.
    """
    _scorers()
    tokens("")


def _scorers() -> tuple[Any, Any, Any]:
    return (
        extra("pycocoevalcap.bleu.bleu", _FEATURE).Bleu(4),
        extra("pycocoevalcap.cider.cider", _FEATURE).Cider(),
        extra("pycocoevalcap.rouge.rouge", _FEATURE).Rouge(),
    )
