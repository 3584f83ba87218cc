"""Every shell command of the documents exists: programs, subcommands, flags, required arguments, files, extras.

Commands are parsed, not run. Those that are also run: README "Run it" and "Test it" by .ci/run, the rest of the README,
batch.md, chat.md, eval.md, patches.md, python-api.md and recipes.md by test_docs_examples.py, the session of recipes.md
by tests/recipes/test_recipe_docs.py, the `curl` of README.md and serving.md by tests/serve/test_serve_docs.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_helpers import REPO, blocks, prose
from shell_commands import Command, commands, typed

from paddlemix_qwenvl_plugin.cli.main import app
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings
from paddlemix_qwenvl_plugin.util import env

PYPROJECT = (REPO / "pyproject.toml").read_text("utf-8")
EXTRAS = set(
    re.findall(
        r"^([\w-]+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE
    )
)
CMAKE = (REPO / "csrc" / "CMakeLists.txt").read_text("utf-8")

# Programs of others, whose command lines are not known here.
UNCHECKED = {
    "deploy/qwen_vl/export_image_encoder.py": "a script of PaddleMIX, run by tests/upstream",
    "deploy/qwen_vl/run_static_predict.py": "a script of PaddleMIX, run by tests/upstream",
    "predict/export_model.py": "a script of PaddleNLP, run by tests/upstream",
    "my-program": "the reader's own",
    "torch.distributed.run": "PyTorch's; training needs GPUs",
}


def documents() -> list[Path]:
    """The Markdown files of the project's own."""
    found = [
        path
        for pattern in ("*.md", "docs/**/*.md", "csrc/**/*.md", "examples/**/*.md", "tests/*/README.md")
        for path in REPO.glob(pattern)
    ]
    assert len(found) > 20
    return sorted(found)


def shell(document: Path) -> list[Command]:
    text = document.read_text("utf-8")
    scripts = [*blocks(text, "sh"), *map(typed, blocks(text, "console"))]
    return [command for script in scripts for command in commands(script)]


# --- qwenvl ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parsed() -> Callable[[list[str]], dict[str, Any]]:
    """The command line interface, with functions that give their arguments back in place of the real ones."""
    root = typer.main.get_command(app)

    def disarm(command: Any) -> None:
        for child in getattr(command, "commands", {}).values():
            disarm(child)
        if not hasattr(command, "commands"):
            command.callback = lambda **given: given

    disarm(root)
    return lambda arguments: root.main(arguments, prog_name="qwenvl", standalone_mode=False)


def check_qwenvl(command: Command, parsed: Callable[[list[str]], Any]) -> None:
    given = parsed(command.arguments)
    if isinstance(given, dict) and {"url", "first_model_path"} <= set(given):
        stages = [given["first_model_path"], given["second_model_path"]]
        assert given["url"] or None not in stages, "neither --url nor both stages"


def flags(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_inline_commands_exist(document: Path) -> None:
    """`qwenvl …` in a sentence: the subcommand and each flag, though not always the required arguments."""
    for span in re.findall(r"`(qwenvl [^`]+)`", prose(document.read_text("utf-8"))):
        command: Any = typer.main.get_command(app)
        known = flags(command)
        words = re.split(r"[|…]", span)[0].split()[1:]
        if words[:1] and words[0].startswith("-"):
            assert set(words) <= known | {"--help"}, span
            continue
        context = typer.Context(command)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, span
            command = command.commands[words.pop(0)]
            context = typer.Context(command, parent=context)
        known = {
            name
            for parameter in command.get_params(context)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known, f"{span}: {used - known}"


# --- other programs -------------------------------------------------------------------------------------


def check_files(command: Command, parsed: Any) -> None:
    """Arguments that look like files of the repository."""
    for argument in command.arguments:
        if argument.startswith(("tests/", "csrc", "recipes/", "benchmarks/", "deploy/", "examples")):
            assert (REPO / argument).exists(), argument


def check_pip(command: Command, parsed: Any) -> None:
    for argument in command.arguments:
        match = re.fullmatch(r"(?:\.|paddlemix-qwenvl-plugin)\[(.+)\]", argument)
        if match:
            assert set(match[1].split(",")) <= EXTRAS, argument


def check_python(command: Command, parsed: Any) -> None:
    """A script or a module of the repository, and that its source spells each flag."""
    first, *rest = command.arguments
    if first == "-m":
        module, *rest = rest
        if module in ("venv", "pytest", "pip"):
            return CHECKS[module](Command(command.variables, module, rest), parsed)
        if module in UNCHECKED:
            module = rest[rest.index("-m") + 1]
            rest = rest[rest.index(module) + 1 :]
        script = REPO / f"{module.replace('.', '/')}.py"
    elif first in UNCHECKED:
        return None
    else:
        script = REPO / first
    assert script.exists(), first
    sources = script.read_text("utf-8")
    for module in re.findall(r"^(?:from|import) (\w+)", sources, re.MULTILINE):
        beside = script.with_name(f"{module}.py")
        sources += beside.read_text("utf-8") if beside.exists() else ""
    for argument in rest:
        if argument.startswith("--"):
            assert f'"{argument}"' in sources, argument
    return None


def check_cmake(command: Command, parsed: Any) -> None:
    arguments = command.arguments
    if "-S" in arguments:
        assert (REPO / arguments[arguments.index("-S") + 1] / "CMakeLists.txt").exists()
    if "--target" in arguments:
        check_target(arguments[arguments.index("--target") + 1])
    for option in re.findall(r"-D(\w+)=", " ".join(arguments)):
        assert f"({option} " in CMAKE, option


def check_target(name: str) -> None:
    assert re.search(rf"add_(executable|library)\({name} ", CMAKE), name


def check_make(command: Command, parsed: Any) -> None:
    arguments = [argument for argument in command.arguments if not re.match("-[^C]", argument)]
    folder = arguments.pop(arguments.index("-C") + 1) if "-C" in arguments else "."
    rules = (REPO / folder / "Makefile").read_text("utf-8")
    for target in (argument for argument in arguments if argument != "-C" and "=" not in argument):
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target


def check_wrapped(command: Command, parsed: Any) -> None:
    """The program that a profiler starts."""
    names = [argument.rpartition("/")[2] for argument in command.arguments]
    start = next((number for number, name in enumerate(names) if name in CHECKS), None)
    if start is not None:
        wrapped = Command(command.variables, command.arguments[start], command.arguments[start + 1 :])
        CHECKS[names[start]](wrapped, parsed)


def check_systemctl(command: Command, parsed: Any) -> None:
    for argument in command.arguments:
        if argument.endswith((".service", ".socket")):
            assert (REPO / "deploy" / "systemd" / argument).exists(), argument


def check_linter(command: Command, parsed: Any) -> None:
    assert f'"{command.program.rpartition("/")[2]}' in PYPROJECT.split("\ndev = [")[1]


def check_mkdocs(command: Command, parsed: Any) -> None:
    assert '"mkdocs>' in PYPROJECT.split("\ndocs = [")[1]
    assert (REPO / "mkdocs.yml").exists()


def check_nothing(command: Command, parsed: Any) -> None:
    """A program of the system."""


CHECKS: dict[str, Callable[[Command, Any], None]] = {
    "qwenvl": check_qwenvl,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "pytest": check_files,
    "cmake": check_cmake,
    "driver": lambda command, parsed: check_target("driver"),
    "make": check_make,
    "nsys": check_wrapped,
    "perf": check_wrapped,
    "systemctl": check_systemctl,
    "docker": check_files,
    "kubectl": check_files,
    "jupyter": check_files,
    "clang-format": check_linter,
    "mypy": check_linter,
    "ruff": check_linter,
    "mkdocs": check_mkdocs,
    "cp": check_files,
    "find": check_files,
    **dict.fromkeys(
        ["", "cd", "curl", "export", "kill", "printf", "ray", "serve", "venv", "xargs"], check_nothing
    ),
}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_commands_exist(document: Path, parsed: Callable[[list[str]], Any]) -> None:
    for command in shell(document):
        name = command.program.rpartition("/")[2]
        if command.program in UNCHECKED:
            continue
        assert name in CHECKS, f"{command}: no check for {name}; add one, or a reason to UNCHECKED"
        try:
            CHECKS[name](command, parsed)
        except Exception as error:
            pytest.fail(f"{command.program} {' '.join(command.arguments)}: {error}")


def test_every_reason_is_needed() -> None:
    words = {
        word
        for document in documents()
        for command in shell(document)
        for word in (command.program, *command.arguments)
    }
    assert set(UNCHECKED) <= words


def test_variables_exist() -> None:
    """The variables of the package, of the server and of the tests and benchmarks."""
    tests = "".join(
        path.read_text("utf-8")
        for folder in ("tests", "benchmarks")
        for path in (REPO / folder).rglob("*.py")
    )
    known = {value.name for value in vars(env).values() if hasattr(value, "name")}
    known |= {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in ServeSettings.model_fields}
    for document in documents():
        for command in shell(document):
            words = [f"{name}=" for name in command.variables] + command.arguments
            for name in re.findall(r"\b(QWENVL_\w+)=", " ".join(words)):
                assert name in known or f'"{name}"' in tests, f"{document.name}: {name}"


def test_all_shell_blocks_are_marked() -> None:
    """A block without a language would be seen by no test."""
    for document in documents():
        marks = re.findall(r"^```(.*)$", document.read_text("utf-8"), re.MULTILINE)
        assert all(marks[::2]), document
        assert not {"bash", "shell"} & set(marks), f"{document}: say sh"


# --- the reader of shell examples -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("A=1 b c && d 'e f' # g", [({"A": "1"}, "b", ["c"]), ({}, "d", ["e f"])]),
        ("a -d @- <<END\nx; y\nEND\n", [({}, "a", ["-d", "@-"])]),
        ("a \\\n  b > c & old=$!", [({}, "a", ["b"]), ({"old": "$!"}, "", [])]),
        ("printf 'x\\n' | a; b", [({}, "printf", ["x\\n"]), ({}, "a", []), ({}, "b", [])]),
    ],
)
def test_reader(script: str, expected: list[Any]) -> None:
    assert [tuple(command) for command in commands(script)] == expected


@pytest.mark.parametrize(
    "line",
    [
        "qwenvl predict --first_model_path a --second_model_path b --colour red",
        "qwenvl predict --first_model_path a --prompt b",
        "qwenvl recipes explain",
        "qwenvl make-tiny",
        "qwenvl make-tiny a b",
        "qwenvl chat --image a",
    ],
)
def test_wrong_commands_are_found(line: str, parsed: Callable[[list[str]], Any]) -> None:
    (command,) = commands(line)
    with pytest.raises(Exception):  # noqa: B017, PT011  (click's, of typer's copy or its own)
        check_qwenvl(command, parsed)
