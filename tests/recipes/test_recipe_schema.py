"""Loading of recipes: schema, references, overrides and paths; an error is one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_helpers import recipe, step, write

from paddlemix_qwenvl_plugin.recipes import loader
from paddlemix_qwenvl_plugin.util.errors import UsageError


def error_of(path: Path, *overrides: str) -> str:
    """Load an invalid recipe and return the error message."""
    with pytest.raises(UsageError) as raised:
        loader.load(path, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            recipe(stpes=[]),
            ": stpes: unknown key; known keys: schema, name, why, requires, pins, assets, env, ",
        ),
        (
            recipe(steps=[step("export", "pass", timout_seconds=3)]),
            ": steps.export.timout_seconds: unknown key; known keys: name, run, timeout_seconds",
        ),
        (recipe(requires={"gpus": True}), ": requires.gpus: unknown key; known keys: python, paddle, "),
        (
            recipe(expect=[{"file": "a", "exists": True}]),
            ": expect.0.exists: unknown key; known keys: file, key",
        ),
        (recipe(schema=2), ": schema: input should be 1, got 2"),
        (recipe(seed="7"), ": seed: input should be a valid integer, got '7'"),
        (recipe(dtype="float8"), ": dtype: input should be 'float32', 'float16' or 'bfloat16', got 'float8'"),
        (recipe(env={"FLAG": True}), ": env.FLAG: input should be a valid string, got True"),
        (recipe(name="a/b"), ": name: "),
        (recipe(steps=[]), ": steps: "),
        (recipe(steps=[{"name": "a", "run": ""}]), ": steps.a.run: "),
        (recipe(steps=[{"name": "a", "run": "echo 'open"}]), ": steps.a.run: No closing quotation"),
        (recipe(steps=[{"name": "a"}]), ": steps.a.run: this key is required"),
        (recipe(steps=[step("a", "1"), step("a", "2")]), ": steps: duplicate name 'a'"),
        (recipe(bench={"step": "no", "repeat": 1}), ": bench.step: no step 'no'; steps: only"),
        (recipe(requires={"paddle": "3.0"}), ": requires.paddle: not a version range"),
        (recipe(requires={"packages": ["numpy=="]}), ": requires.packages.0: not a requirement"),
        (recipe(assets=[{"name": "a", "path": "b", "sha256": "abc"}]), ": assets.a.sha256: "),
        (
            recipe(expect=[{"file": "a", "key": "b"}]),
            ": expect.0: a check needs a key and a key needs one check",
        ),
        (
            recipe(expect=[{"file": "a", "min": 1}]),
            ": expect.0: a check needs a key and a key needs one check",
        ),
        (
            recipe(expect=[{"file": "a", "key": "b", "min": 1, "max": 2}]),
            ": expect.0: one check only, not min and",
        ),
        (
            recipe(expect=[{"file": "a", "key": "b", "matches": "("}]),
            ": expect.0.matches: not a regular expr",
        ),
        (recipe(expect=[{"file": "a", "key": "b", "min": None}]), ": expect.0: min has no value"),
        (["a", "list"], ": a recipe is a mapping of keys to values"),
        ("schema: 1\nname: x\nname: y\n", ":3:1: the key 'name' is given twice"),
        ("schema: [1\n", ":2:1: "),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, data: Any, expected: str) -> None:
    path = write(tmp_path, data)
    assert error_of(path).startswith(f"{path}{expected}")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            recipe(steps=[step("a", "pass", "${seeed}")]),
            "steps.a.run: unknown ${seeed} in '${seeed}'; known: ",
        ),
        (recipe(steps=[step("a", "pass", "${seed")]), "steps.a.run: '${' without its '}' in '${seed'"),
        (recipe(steps=[step("a", "pass", "${assets.b}")]), "steps.a.run: unknown ${assets.b}"),
        (recipe(steps=[step("a", "pass", "${seed}")]), "steps.a.run: unknown ${seed}"),  # no seed is set
        (recipe(env={"X": "${HOME}"}), "env.X: unknown ${HOME}"),
        (recipe(expect=[{"file": "${rundir}/a"}]), "expect.0.file: unknown ${rundir}"),
        (recipe(assets=[{"name": "a", "path": "${run_dir}/x"}]), "assets.a.path: unknown ${run_dir}"),
    ],
)
def test_unknown_reference(tmp_path: Path, data: Any, expected: str) -> None:
    assert expected in error_of(write(tmp_path, data))


def test_the_error_of_an_unknown_reference_lists_all_references(tmp_path: Path) -> None:
    data = recipe(
        seed=1, assets=[{"name": "pic", "path": "p.png"}], steps=[{"name": "a", "run": "echo ${no}"}]
    )
    assert error_of(write(tmp_path, data)).endswith(
        "known: ${seed}, ${run_dir}, ${python}, ${recipe_dir}, ${assets.pic}"
    )


def test_string_and_list_give_the_same_arguments(tmp_path: Path) -> None:
    as_string = write(tmp_path, recipe(steps=[{"name": "a", "run": "cmd --n 24 --p 'two words'"}]), "s.yaml")
    as_list = write(tmp_path, recipe(steps=[{"name": "a", "run": ["cmd", "--n", 24, "--p", "two words"]}]))
    assert loader.load(as_string).steps == loader.load(as_list).steps
    assert loader.load(as_list).steps[0].run == ["cmd", "--n", "24", "--p", "two words"]


def test_recipe_dir_with_a_space_stays_one_argument(tmp_path: Path) -> None:
    folder = tmp_path / "my recipes"
    folder.mkdir()
    path = write(folder, recipe(steps=[{"name": "a", "run": "cat ${recipe_dir}/x"}]))
    assert loader.load(path).steps[0].run == ["cat", f"{folder}/x"]


def test_asset_paths_start_at_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_folder, working_directory = tmp_path / "recipes", tmp_path / "work"
    recipe_folder.mkdir()
    working_directory.mkdir()
    monkeypatch.chdir(working_directory)
    monkeypatch.setenv("HOME", "/home/user")
    data = recipe(
        assets=[
            {"name": "relative", "path": "data/x"},
            {"name": "recipe-dir", "path": "${recipe_dir}/x"},
            {"name": "home", "path": "~/x"},
        ]
    )
    paths = [asset.path for asset in loader.load(write(recipe_folder, data)).assets]
    assert paths == [f"{working_directory}/data/x", f"{recipe_folder}/x", "/home/user/x"]


def test_overrides_replace_and_add_keys(tmp_path: Path) -> None:
    path = write(tmp_path, recipe(seed=1, dtype="float32", assets=[{"name": "pic", "path": "/a"}]))
    loaded = loader.load(
        path,
        [
            "dtype=float16",
            "seed=7",
            "env.OMP_NUM_THREADS=2",
            "steps.only.timeout_seconds=60",
            "assets.pic.path=/b",
            "requires.gpu=true",
            "steps.only.run=echo 'a b'",
        ],
    )
    assert (loaded.dtype, loaded.seed, loaded.env) == ("float16", 7, {"OMP_NUM_THREADS": "2"})
    assert (loaded.steps[0].timeout_seconds, loaded.assets[0].path, loaded.requires.gpu) == (60, "/b", True)
    assert loaded.steps[0].run == ["echo", "a b"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dtyp=float16", "override: dtyp: unknown key; known keys: schema, name"),
        ("steps.only.timeout=1", "override: steps.only.timeout: unknown key; known keys: name, run"),
        ("steps.other.run=x", "override 'steps.other.run=x': steps has no 'other'; known: only"),
        ("assets.x.path=y", "override 'assets.x.path=y': assets has no 'x'; known: none"),
        ("name.x=1", "override 'name.x=1': name has no keys"),
        ("seed=1.5", "override: seed: input should be a valid integer, got 1.5"),
        ("seed", "override 'seed': write key=value"),
        ("seed=[1", "override 'seed=[1': the value is not plain YAML (expected"),
    ],
)
def test_invalid_overrides(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path, recipe(assets=[]))
    assert error_of(path, override).startswith(expected)


def test_a_resolved_recipe_loads_as_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another folder, without the overrides."""
    data = recipe(
        seed=3,
        pins={"upstream": "abc"},
        env={"A": 1, "B": "${recipe_dir}"},
        assets=[{"name": "pic", "path": "${recipe_dir}/p.png", "sha256": None}],
        steps=[step("a", "pass", "${run_dir}", "${seed}", "${assets.pic}", "${recipe_dir}")],
        expect=[{"file": "${run_dir}/x.json", "key": "a", "equals": None}],
        bench={"step": "a", "repeat": 2},
    )
    original = loader.load(write(tmp_path, data), ["seed=9"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    reloaded = loader.load(write(elsewhere, yaml.safe_dump(original.resolved())))
    assert reloaded.resolved() == original.resolved()
    assert reloaded.seed == 9
    assert reloaded.steps[0].run[3:] == ["${run_dir}", "${seed}", "${assets.pic}", str(tmp_path)]
    assert reloaded.expect[0].check == "equals"


def test_folder_of_the_shipped_recipes(tmp_path: Path) -> None:
    """The package's folder, or that of a checkout, which has a pyproject.toml; no other folder named recipes."""
    package, sibling = tmp_path / "site" / "package", tmp_path / "site" / "recipes"
    package.mkdir(parents=True)
    sibling.mkdir()
    with pytest.raises(Exception, match="shipped recipes are missing"):
        loader.shipped_dir(package)
    (tmp_path / "site" / "pyproject.toml").touch()
    assert loader.shipped_dir(package) == sibling
    shipped = package / "recipes" / "shipped"
    shipped.mkdir(parents=True)
    assert loader.shipped_dir(package) == shipped


def test_unknown_recipes() -> None:
    with pytest.raises(UsageError, match=r"no recipe named 'nope'; shipped: .*tiny-cpu.*\.yaml file"):
        loader.find("nope")
    for path in ("no/such.yaml", "no/tiny-cpu", "no.yml"):
        with pytest.raises(UsageError, match=rf"^{path}: no such recipe file$"):
            loader.find(path)
