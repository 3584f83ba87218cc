"""Scores of visual question answering: VQA accuracy, exact match, and ANLS for documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, field_validator

from paddlemix_qwenvl_plugin.evaluation.ask import Question
from paddlemix_qwenvl_plugin.evaluation.extra import extra
from paddlemix_qwenvl_plugin.evaluation.rows import Id, Row
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError

_MIN_VQA_ANSWERS = 4  # with fewer, even the best answer has an accuracy below 1

_ANLS_THRESHOLD = 0.5


class VqaRow(Row):
    """Row of a VQA data set.

    Attributes:
        question_id: id of the row.
        question: the question without the prompt's other text.
        answers: the reference answers, 10 in VQAv2; in the official files `answer`, a string or a list.
    """

    question_id: Id
    question: str
    answers: tuple[str, ...] = Field(validation_alias=AliasChoices("answers", "answer"), min_length=1)

    @field_validator("answers", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def key(self, number: int) -> Id:
        """The question id."""
        return self.question_id

    def prompt(self) -> Question:
        """The prompt of Qwen-VL's official evaluation."""
        return Question(self.image, f"{self.question} Answer:")


def options(max_new_tokens: int) -> GenerationOptions:
    """Generation options of the official evaluation."""
    return GenerationOptions(max_new_tokens=max_new_tokens, min_new_tokens=1)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, up to case and surrounding spaces, else 0."""
    return float(answer.strip().lower() in {text.strip().lower() for text in references})


def anls(answer: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 below one half.

    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019. Case and the number of spaces are ignored.
    A similarity of exactly one half counts, as in the evaluation script of the DocVQA challenge.
    """
    similarity = extra("rapidfuzz.distance.Levenshtein", "--metric anls").normalized_similarity
    candidate, *texts = (" ".join(text.lower().split()) for text in (answer, *references))
    return max(float(similarity(candidate, text, score_cutoff=_ANLS_THRESHOLD)) for text in texts)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (visualqa.org/evaluation).

    The mean of min(matches / 3, 1) over all ways to leave out one reference. With ten references: 0, 0.3, 0.6, 0.9 and
    1 for 0, 1, 2, 3 and more matches. The answer and the references are normalised.
    """
    candidate = normalise(answer)
    is_match = [normalise(text) == candidate for text in references]
    n_matches = sum(is_match)
    # If the left-out reference matches, there is one match fewer.
    return sum(min((n_matches - match) / 3, 1.0) for match in is_match) / len(is_match)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa": vqa_accuracy,
    "exact": exact_match,
    "anls": anls,
}
"""Metric name -> score, 0 to 1, of an answer against the references."""

MAX_NEW_TOKENS = {"vqa": 10, "exact": 10, "anls": 100}
"""Completion lengths of the official evaluation, by metric."""


def check(path: Path, rows: Mapping[Id, VqaRow], metric: str) -> None:
    """Check that the metric can score the rows, before the model runs.

    Raises:
        UsageError: unknown metric, or a row has too few answers for VQA accuracy.
        QwenVLError: a library that ANLS needs is missing.
    """
    if metric not in METRICS:
        raise UsageError(f"--metric {metric}: must be one of {', '.join(METRICS)}")
    if metric == "anls":
        anls("", [""])  # imports the library
    if metric == "vqa":
        for row_id, row in rows.items():
            if len(row.answers) < _MIN_VQA_ANSWERS:
                raise UsageError(
                    f"{path}, id {row_id!r}: VQA accuracy needs the answers of {_MIN_VQA_ANSWERS} people or more; "
                    "use --metric exact or anls"
                )


def normalise(answer: str) -> str:
    """Normalise an answer for VQA accuracy (visualqa.org/evaluation).

    Lower case, "none" and "zero" to "ten" as digits, no articles; contractions get their apostrophe ("dont" becomes
    "don't"). Full stops, and commas between digits, are removed; other punctuation becomes spaces; apostrophes, colons,
    decimal points and symbols such as % and $ are kept.
    """
    text = answer.lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)  # thousands separators
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    text = re.sub(r"\.(?!\d)", "", text)  # full stops that are not decimal points
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}

# Contractions that are seldom another word without their apostrophe, unlike "we'll", "it's" and "we're".
_WITH_APOSTROPHE = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't could've i've might've must've not've should've they've we've
    what've where've who've would've you've how'll it'll somebody'll someone'll something'll they'll what'll who'll
    you'll there're they're what're why're you're he's how's somebody's someone's that's there's what's when's
    where's who's why's he'd how'd it'd someone'd something'd that'd there'd they'd where'd who'd you'd i'm ma'am
    o'clock y'all
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
