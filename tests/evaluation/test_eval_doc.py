"""Rows and prompts of docs/eval.md match the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from paddlemix_qwenvl_plugin.evaluation import captions, grounding, vqa
from paddlemix_qwenvl_plugin.evaluation.rows import Row

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "eval.md").read_text("utf-8")


def test_examples() -> None:
    examples = [json.loads(line) for line in re.findall(r"^```json\n(.*)\n```$", DOCUMENT, re.MULTILINE)]
    kinds: list[type[Row]] = [grounding.GroundingRow, vqa.VqaRow, captions.CaptionRow]
    prompts = re.findall(r"^\| prompt \| `<img>…</img>(.*)` \|$", DOCUMENT, re.MULTILINE)
    assert len(examples) == len(prompts) == len(kinds)
    for kind, example, prompt in zip(kinds, examples, prompts):
        request = kind.model_validate(example).prompt()
        assert request.before + request.words + request.after == prompt


def test_lengths() -> None:
    found = re.findall(r"^\| new tokens \| (\d+) to (\d+)", DOCUMENT, re.MULTILINE)
    options = [grounding.OPTIONS, vqa.options(vqa.MAX_NEW_TOKENS["vqa"]), captions.OPTIONS]
    assert found == [(str(one.min_new_tokens), str(one.max_new_tokens)) for one in options]
    assert f"with `--metric anls` 1 to {vqa.MAX_NEW_TOKENS['anls']}" in DOCUMENT
