"""The examples, prompts and numbers of new tokens in docs/eval.md are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from paddlemix_qwenvl_plugin.evaluation import captions, grounding, vqa
from paddlemix_qwenvl_plugin.evaluation.rows import Row

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "eval.md").read_text("utf-8")


def test_example_rows_have_the_documented_prompts() -> None:
    # Each task has a JSON block of one line with an example row, and a table with its prompt.
    examples = [json.loads(line) for line in re.findall(r"^```json\n(.*)\n```$", DOCUMENT, re.MULTILINE)]
    row_classes: list[type[Row]] = [grounding.GroundingRow, vqa.VqaRow, captions.CaptionRow]
    prompts = re.findall(r"^\| prompt \| `<img>…</img>(.*)` \|$", DOCUMENT, re.MULTILINE)
    assert len(examples) == len(prompts) == len(row_classes)
    for row_class, example, prompt in zip(row_classes, examples, prompts):
        request = row_class.model_validate(example).prompt()
        assert request.before + request.words + request.after == prompt


def test_numbers_of_new_tokens() -> None:
    documented = re.findall(r"^\| new tokens \| (\d+) to (\d+)", DOCUMENT, re.MULTILINE)
    options = [grounding.OPTIONS, vqa.options(vqa.MAX_NEW_TOKENS["vqa"]), captions.OPTIONS]
    assert documented == [(str(option.min_new_tokens), str(option.max_new_tokens)) for option in options]
    assert f"with `--metric anls` 1 to {vqa.MAX_NEW_TOKENS['anls']}" in DOCUMENT
