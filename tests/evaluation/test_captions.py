"""Caption scores: tokens compared with Stanford's, CIDEr with its formula, BLEU and ROUGE with manual results."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from paddlemix_qwenvl_plugin.evaluation.captions import CaptionRow, score, tokens
from paddlemix_qwenvl_plugin.evaluation.rows import Id

for library in ("nltk", "pycocoevalcap"):
    pytest.importorskip(
        library, reason=f"{library} is not installed; `pip install -e '.[eval]'` to test captions"
    )

# Results of pycocoevalcap 1.2's PTBTokenizer, Stanford CoreNLP 3.4.1 in Java.
STANFORD = [
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    (
        "Two dogs' toys -- a ball (red) and a rope; don't they look fun?",
        "two dogs toys a ball -lrb- red -rrb- and a rope do n't they look fun",
    ),
    (
        'The U.S. flag flies at 3.5 m, the woman\'s hat is "blue".',
        "the u.s. flag flies at 3.5 m the woman 's hat is blue",
    ),
    ("A T-shirt & jeans, $5.00 each: can't miss it!", "a t-shirt & jeans $ 5.00 each ca n't miss it"),
    ("an off-white, black-and-white cat...", "an off-white black-and-white cat"),
    ("It's a dog. It is brown.", "it 's a dog it is brown"),
    ("“Curly” quotes – and dashes — here", "curly quotes and dashes here"),
    ("a café in Zürich", "a café in zürich"),
    ("a 3-year-old's bike, no. 7", "a 3-year-old 's bike no. 7"),
    ("they've we're I'm you'd isn't won't ", "they 've we 're i 'm you 'd is n't wo n't"),
    ("  ", ""),
]


@pytest.mark.parametrize(("caption", "expected"), STANFORD)
def test_tokens_are_stanfords(caption: str, expected: str) -> None:
    assert tokens(caption) == expected


def rows(*captions: tuple[str, ...]) -> dict[Id, CaptionRow]:
    return {
        number: CaptionRow(image="x.png", image_id=number, captions=several)
        for number, several in enumerate(captions)
    }


def cider(wanted: list[list[str]], given: list[str]) -> list[float]:
    """CIDEr-D of Vedantam, Zitnick and Parikh (2015), on tokens separated by spaces."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    found = []
    for number, candidate in enumerate(given):
        total = 0.0
        for n in (1, 2, 3, 4):

            def weigh(text: str, n: int = n) -> dict[tuple[str, ...], float]:
                weights = {}
                for gram, count in grams(text, n).items():
                    n_images = sum(any(gram in grams(one, n) for one in several) for several in wanted)
                    weights[gram] = count * (math.log(len(wanted)) - math.log(max(n_images, 1)))
                return weights

            ours = weigh(candidate)
            for reference in wanted[number]:
                theirs = weigh(reference)
                dot = sum(
                    min(weight, theirs[gram]) * theirs[gram]
                    for gram, weight in ours.items()
                    if gram in theirs
                )
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                length = len(candidate.split()) - len(reference.split())
                if norms:
                    total += dot / norms * math.exp(-(length**2) / 72) / len(wanted[number])
        found.append(10 * total / 4)
    return found


def test_cider_is_its_formula() -> None:
    wanted = [
        ["a man rides a wave", "a surfer on a big wave", "man surfing on the sea"],
        ["a brown dog runs on grass", "the dog is running"],
        ["a bus on a street", "a red bus in the city", "a city street with a bus"],
    ]
    given = ["a man on a wave", "a dog on a street street street", "a red bus on a city street"]
    scores = score(rows(*map(tuple, wanted)), dict(enumerate(given)))
    expected = cider(wanted, given)
    assert list(scores.cider.values()) == pytest.approx(expected)
    assert scores.values["CIDEr"] == pytest.approx(sum(expected) / 3)
    assert min(expected) > 0


def test_the_right_words_are_perfect() -> None:
    """In any spelling: both sides are tokenized in the same way."""
    wanted = rows(("A man rides a wave.",), ("A brown dog runs on grass.",))
    scores = score(wanted, {0: "a man rides a wave", 1: "A Brown dog runs, on grass"})
    assert scores.values == pytest.approx({"CIDEr": 10.0, "BLEU-4": 1.0, "ROUGE-L": 1.0})


def test_bleu_and_rouge_by_hand() -> None:
    """Five of six words match: n-grams 5/6, 3/5, 2/4 and 1/3; a common subsequence of 5 in 6 and 6."""
    wanted = rows(("a man rides a tall wave",), ("a dog",))
    scores = score({0: wanted[0]}, {0: "a man rides a big wave"})
    assert scores.values["BLEU-4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert scores.values["ROUGE-L"] == pytest.approx(5 / 6)


def test_no_words_score_nothing() -> None:
    scores = score(rows(("a man rides a wave",), ("a dog",)), {0: "", 1: "..."})
    assert scores.values == pytest.approx({"CIDEr": 0.0, "BLEU-4": 0.0, "ROUGE-L": 0.0}, abs=1e-6)
