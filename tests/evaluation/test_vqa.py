"""VQA accuracy, exact match and ANLS."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.evaluation.vqa import anls, exact_match, normalise, vqa_accuracy

NO_RAPIDFUZZ = "rapidfuzz is not installed; `pip install -e '.[eval]'` to test ANLS"


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)]
)
def test_accuracy_by_number_of_equal_answers_of_ten(matches: int, expected: float) -> None:
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


# At least four references: with fewer, `check` refuses this metric.
@given(st.text("ab", max_size=1), st.lists(st.text("ab", max_size=1), min_size=4, max_size=10))
def test_accuracy_is_the_mean_over_subsets_without_one_answer(answer: str, references: list[str]) -> None:
    # With a prefix, since normalisation removes the article "a".
    answer, references = f"x{answer}", [f"x{reference}" for reference in references]
    subsets = list(combinations(references, len(references) - 1))
    expected = sum(min(subset.count(answer) / 3, 1) for subset in subsets) / len(subsets)
    assert vqa_accuracy(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("The red Car", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("ten o'clock", "10 o'clock"),
        ("dont know", "don't know"),
        ("whats that", "what's that"),
        ("its well", "its well"),  # not a misspelled contraction
        ("dog's", "dog's"),
        ("5:30", "5:30"),
        ("3.5 m.", "3.5 m"),
        ("100,978", "100978"),
        ("red, blue", "red blue"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        (" (a)\ta\nhat! ", "hat"),
        ("right?", "right"),
        ("an", ""),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


def test_accuracy_normalises_the_answer_and_the_references() -> None:
    assert vqa_accuracy("A dog.", ["dog", "the dog", "Dog!", "DOG"]) == 1.0


def test_exact_match() -> None:
    assert exact_match(" Red ", ["blue", "red"]) == 1.0
    assert exact_match("red car", ["red"]) == 0.0
    assert exact_match("red.", ["red"]) == 0.0


@cache
def distance(a: str, b: str) -> int:
    """Levenshtein distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


@given(st.text("ab", max_size=6), st.lists(st.text("ab", max_size=6), min_size=1, max_size=3))
def test_anls_agrees_with_its_formula(answer: str, references: list[str]) -> None:
    pytest.importorskip("rapidfuzz", reason=NO_RAPIDFUZZ)
    similarities = [
        1 - distance(answer, reference) / max(len(answer), len(reference), 1) for reference in references
    ]
    best = max(similarities)
    assert anls(answer, references) == pytest.approx(best if best >= 0.5 else 0.0)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("1/8/93", ["1/8/93"], 1.0),
        ("0.28", ["0.29"], 0.75),  # one of four characters differs
        ("ITC  Limited ", ["itc limited"], 1.0),
        ("ab", ["ax"], 0.5),
        ("abc", ["axy"], 0.0),  # a similarity of 1/3 is below the threshold
        ("", ["yes"], 0.0),
        # Two of the answer's ten characters are not in the more similar reference, the second one.
        ("p. m. hall", ["t. f. riehl", "p m hall"], 0.8),
    ],
)
def test_anls_computed_by_hand(answer: str, references: list[str], expected: float) -> None:
    pytest.importorskip("rapidfuzz", reason=NO_RAPIDFUZZ)
    assert anls(answer, references) == pytest.approx(expected)
