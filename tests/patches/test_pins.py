"""The pins file: broken combinations of packages, consistency with docs/upstream.md, error messages."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydantic import ValidationError

from paddlemix_qwenvl_plugin.upstream import pins
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Versions of packages that have no broken combination.
WORKING = {
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


def broken_combinations(versions: dict[str, str]) -> list[str]:
    """List the names of the broken combinations that apply to installed packages."""
    return [combination.name for combination in pins.load().broken if combination.matches(versions)]


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
def test_broken_combinations(changes: dict[str, str], names: list[str]) -> None:
    """`changes` replaces versions in WORKING, `_` in a name stands for `-`; the version "" removes a package."""
    versions = {**WORKING, **{name.replace("_", "-"): version for name, version in changes.items()}}
    assert broken_combinations({name: version for name, version in versions.items() if version}) == names


def test_names_are_compared_as_pip_does() -> None:
    versions = {"PaddleNLP": "3.0.0b0", "aistudio_sdk": "0.3.0", "pip": "23"}
    assert broken_combinations(versions) == ["aistudio-sdk"]


def test_the_documented_sets_of_packages_are_not_broken() -> None:
    text = Path("docs/upstream.md").read_text("utf-8")
    block = text.partition("```sh")[2].partition("```")[0].replace("\\\n", "")
    commands = [
        shlex.split(line) for line in block.splitlines() if line.startswith("pip install paddlepaddle==")
    ]
    assert len(commands) == 2
    for _pip, _install, *requirements in commands:
        versions = {"pip": "23"}
        for requirement in map(Requirement, requirements):
            by_operator = {specifier.operator: specifier.version for specifier in requirement.specifier}
            # "0" is a version below any upper bound, as in "<75"; "1" stands for an unspecified version.
            default = "0" if "<" in by_operator else "1"
            versions[requirement.name] = by_operator.get("==", default)
        assert broken_combinations(versions) == []


def test_names_are_unique_and_pins_are_frozen() -> None:
    all_pins = pins.load()
    for section in (all_pins.upstreams, all_pins.broken):
        names = [entry.name for entry in section]
        assert len(names) == len(set(names))
    with pytest.raises(ValidationError):
        all_pins.upstreams[0].commit = "0" * 40  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("commit: 498f", "commit: xyz", "upstreams.0.commit"),
        ("upstreams:", "upstream:", "upstreams"),
        ("visualdl>=3.0.0a0", "visualdl=>3.0.0a0", "visualdl=>3.0.0a0"),
        ("version: 2.6.2", "version: new", "gpu_wheels.0.version"),
        ("upstreams:", "upstreams: [", "pins.yaml"),
    ],
)
def test_errors_in_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    """`new` in place of `old` makes the file invalid."""
    text = (Path(pins.__file__).with_name("pins.yaml")).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "pins.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(QwenVLError) as error:
        pins.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QwenVLError, match="install the package again"):
        pins.load(tmp_path / "none.yaml")
