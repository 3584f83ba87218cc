"""Caption scores: tokens as from Stanford CoreNLP, CIDEr as from its formula, BLEU and ROUGE as computed by hand."""

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

# (caption, tokens of pycocoevalcap 1.2's PTBTokenizer, which runs Stanford CoreNLP 3.4.1 in Java)
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
def test_tokens_are_those_of_stanford_corenlp(caption: str, expected: str) -> None:
    assert tokens(caption) == expected


def rows(*captions: tuple[str, ...]) -> dict[Id, CaptionRow]:
    """Row of each image with its reference captions, by number of the image."""
    return {
        number: CaptionRow(image="x.png", image_id=number, captions=of_image)
        for number, of_image in enumerate(captions)
    }


def cider(references: list[list[str]], candidates: list[str]) -> list[float]:
    """CIDEr-D of each image, on words separated by spaces, by the formula of Vedantam, Zitnick and Parikh (2015).

    Args:
        references: reference captions of each image.
        candidates: the caption to score, for each image.
    """

    def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def tf_idf(text: str, n: int) -> dict[tuple[str, ...], float]:
        weights = {}
        for ngram, count in ngrams(text, n).items():
            # Number of images whose references contain the n-gram.
            n_images = sum(
                any(ngram in ngrams(caption, n) for caption in captions) for captions in references
            )
            weights[ngram] = count * (math.log(len(references)) - math.log(max(n_images, 1)))
        return weights

    scores = []
    for candidate, captions in zip(candidates, references):
        total = 0.0
        for n in (1, 2, 3, 4):
            weights = tf_idf(candidate, n)
            for reference in captions:
                reference_weights = tf_idf(reference, n)
                clipped_product = sum(
                    min(weight, reference_weights[ngram]) * reference_weights[ngram]
                    for ngram, weight in weights.items()
                    if ngram in reference_weights
                )
                norms = math.hypot(*weights.values()) * math.hypot(*reference_weights.values())
                length_difference = len(candidate.split()) - len(reference.split())
                if norms:
                    # Gaussian length penalty with a standard deviation of 6 words.
                    penalty = math.exp(-(length_difference**2) / (2 * 6**2))
                    total += clipped_product / norms * penalty / len(captions)
        scores.append(10 * total / 4)
    return scores


def test_cider_agrees_with_its_formula() -> None:
    references = [
        ["a man rides a wave", "a surfer on a big wave", "man surfing on the sea"],
        ["a brown dog runs on grass", "the dog is running"],
        ["a bus on a street", "a red bus in the city", "a city street with a bus"],
    ]
    candidates = ["a man on a wave", "a dog on a street street street", "a red bus on a city street"]
    scores = score(rows(*map(tuple, references)), dict(enumerate(candidates)))
    expected = cider(references, candidates)
    assert list(scores.cider.values()) == pytest.approx(expected)
    assert scores.values["CIDEr"] == pytest.approx(sum(expected) / 3)
    assert min(expected) > 0


def test_reference_captions_in_other_spelling_score_the_maximum() -> None:
    """References and candidates are tokenized in the same way."""
    references = rows(("A man rides a wave.",), ("A brown dog runs on grass.",))
    scores = score(references, {0: "a man rides a wave", 1: "A Brown dog runs, on grass"})
    assert scores.values == pytest.approx({"CIDEr": 10.0, "BLEU-4": 1.0, "ROUGE-L": 1.0})


def test_bleu_and_rouge_computed_by_hand() -> None:
    """One of six words differs.

    Of the n-grams with 1 to 4 words, 5/6, 3/5, 2/4 and 1/3 match. The longest common subsequence has five words.
    """
    scores = score(rows(("a man rides a tall wave",)), {0: "a man rides a big wave"})
    assert scores.values["BLEU-4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert scores.values["ROUGE-L"] == pytest.approx(5 / 6)


def test_captions_without_words_score_zero() -> None:
    scores = score(rows(("a man rides a wave",), ("a dog",)), {0: "", 1: "..."})
    assert scores.values == pytest.approx({"CIDEr": 0.0, "BLEU-4": 0.0, "ROUGE-L": 0.0}, abs=1e-6)
