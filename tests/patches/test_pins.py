"""The pins file, compared with packages' rules and recorded facts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydantic import ValidationError

from paddlemix_qwenvl_plugin.upstream import pins
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# An environment in which both generations can be imported.
GOOD = {
    "paddlepaddle": "3.3.1",
    "paddlenlp": "3.0.0b0",
    "ppdiffusers": "0.29.0",
    "numpy": "1.26.4",
    "huggingface-hub": "0.25.2",
    "aistudio-sdk": "0.2.6",
    "pyarrow": "17.0.0",
    "visualdl": "2.5.3",
    "setuptools": "65.5.0",
    "pip": "23.2.1",
}


def broken(**changes: str) -> list[str]:
    """Names of the broken combinations in GOOD with changes; version "" removes the package."""
    versions = {**GOOD, **{name.replace("_", "-"): version for name, version in changes.items()}}
    versions = {name: version for name, version in versions.items() if version}
    return [one.name for one in pins.load().broken if one.matches(versions)]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"aistudio_sdk": "0.3.0"}, ["aistudio-sdk"]),
        ({"aistudio_sdk": "0.3.9"}, ["aistudio-sdk"]),
        ({"aistudio_sdk": "0.3.0", "paddlenlp": ""}, []),
        ({"huggingface_hub": "0.26.0"}, ["huggingface-hub-ppdiffusers"]),
        ({"huggingface_hub": "0.26.0", "ppdiffusers": ""}, []),
        ({"huggingface_hub": "1.33.0", "ppdiffusers": ""}, []),
        ({"huggingface_hub": "2.0.0", "ppdiffusers": ""}, ["huggingface-hub-paddlenlp"]),
        ({"visualdl": "3.0.0b2"}, ["visualdl-beta"]),
        ({"pyarrow": "25.0.1"}, []),
        ({"pyarrow": "26.0.1"}, ["pyarrow-numpy"]),
        ({"pyarrow": "26.0.1", "numpy": "2.4.6"}, []),
        ({"setuptools": ""}, ["setuptools"]),
        ({"setuptools": "", "paddlepaddle": "", "paddlepaddle_gpu": "3.3.1"}, ["setuptools-gpu"]),
        ({"pip": ""}, ["pip"]),
        ({"paddlepaddle": "2.6.2"}, ["paddle-too-old"]),
    ],
)
def test_broken(changes: dict[str, str], names: list[str]) -> None:
    assert broken(**changes) == names


def test_names_are_compared_as_pip_does() -> None:
    versions = {"PaddleNLP": "3.0.0b0", "aistudio_sdk": "0.3.0", "pip": "23"}
    assert [one.name for one in pins.load().broken if one.matches(versions)] == ["aistudio-sdk"]


def test_no_set_of_the_documents_is_broken() -> None:
    text = Path("docs/upstream.md").read_text("utf-8")
    block = text.partition("```sh")[2].partition("```")[0].replace("\\\n", "")
    commands = [
        shlex.split(line) for line in block.splitlines() if line.startswith("pip install paddlepaddle==")
    ]
    assert len(commands) == 2
    for _, _, *requirements in commands:
        exact = {"pip": "23"}
        for wanted in map(Requirement, requirements):
            pinned = [one.version for one in wanted.specifier if one.operator == "=="]
            below = [one.version for one in wanted.specifier if one.operator == "<"]
            # "<75": excludes 75, and any lower version will do, such as "0".
            exact[wanted.name] = pinned[0] if pinned else "0" if below else "1"
        assert [one.name for one in pins.load().broken if one.matches(exact)] == []


def test_names_are_unique_and_pins_frozen() -> None:
    all_pins = pins.load()
    for group in (all_pins.upstreams, all_pins.broken):
        names = [one.name for one in group]
        assert len(names) == len(set(names))
    with pytest.raises(ValidationError):
        all_pins.upstreams[0].commit = "0" * 40  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("commit: 498f", "commit: xyz", "upstreams.0.commit"),
        ("upstreams:", "upstream:", "upstreams"),
        ("visualdl>=3.0.0a0", "visualdl=>3.0.0a0", "visualdl=>3.0.0a0"),
        ("version: 2.6.2", "version: new", "gpu_wheels.0.version"),
        ("upstreams:", "upstreams: [", "pins.yaml"),
    ],
)
def test_an_error_in_the_file_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = (Path(pins.__file__).with_name("pins.yaml")).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "pins.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(QwenVLError) as caught:
        pins.load(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QwenVLError, match="install the package again"):
        pins.load(tmp_path / "none.yaml")
