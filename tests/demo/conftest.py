"""Fixtures of the demo's tests: the model with random weights, and a run with correct answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo_helpers import make_answer
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin.checkpoint.config import load_config
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.tiny.make import random_weights


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo model with random weights."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(random_weights(load_config(folder), seed=1), str(folder / "model.safetensors"))
    return folder


@pytest.fixture(scope="session")
def all_correct_run() -> Run:
    """A run in which every answer is the expected one."""
    results = tuple(Result(question, make_answer(question.turn.answer)) for question in QUESTIONS)
    return Run(results, parameters=5_500_000, export_seconds=4.2)
