"""Shell commands of the documents are valid: their programs, subcommands, flags, required arguments, files, extras.

Here commands are parsed, not run. CI and other tests also run some of them:
- .ci/run: README "Run it" and "Test it";
- test_readme_tasks.py and test_docs_examples.py: other sections of the README, batch.md, chat.md, eval.md, patches.md,
  python-api.md and recipes.md;
- tests/recipes/test_recipe_docs.py: the last console session of recipes.md;
- tests/serve/test_serve_docs.py: `curl` in README.md and serving.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_helpers import REPO, blocks, prose
from shell_commands import Command, commands, typed_lines

from paddlemix_qwenvl_plugin.cli.main import app
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings
from paddlemix_qwenvl_plugin.util import env

PYPROJECT = (REPO / "pyproject.toml").read_text("utf-8")
EXTRAS_TABLE = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
EXTRAS = set(re.findall(r"^([\w-]+) = \[", EXTRAS_TABLE, re.MULTILINE))
CMAKE = (REPO / "csrc" / "CMakeLists.txt").read_text("utf-8")

# Programs whose flags cannot be checked here, and why.
UNCHECKED = {
    "deploy/qwen_vl/export_image_encoder.py": "a script of PaddleMIX, run by tests/upstream",
    "deploy/qwen_vl/run_static_predict.py": "a script of PaddleMIX, run by tests/upstream",
    "predict/export_model.py": "a script of PaddleNLP, run by tests/upstream",
    "my-program": "a placeholder for the reader's program",
    "torch.distributed.run": "PyTorch's; training needs GPUs",
}


def documents() -> list[Path]:
    """The project's Markdown files that may have commands."""
    paths = [
        path
        for pattern in ("*.md", "docs/**/*.md", "csrc/**/*.md", "examples/**/*.md", "tests/*/README.md")
        for path in REPO.glob(pattern)
    ]
    assert len(paths) > 20
    return sorted(paths)


def commands_of(document: Path) -> list[Command]:
    """The commands in a document's blocks of the languages sh and console."""
    text = document.read_text("utf-8")
    scripts = [*blocks(text, "sh"), *map(typed_lines, blocks(text, "console"))]
    return [command for script in scripts for command in commands(script)]


# --- qwenvl ---------------------------------------------------------------------------------------------


Parse = Callable[[list[str]], Any]
"""Function from the arguments of `qwenvl` to the subcommand's parsed arguments, a dict; if no subcommand runs, as with
--help, to an exit code."""


@pytest.fixture(scope="module")
def parse() -> Parse:
    """The command line interface, whose subcommands only return their arguments."""
    root = typer.main.get_command(app)

    def replace_callbacks(command: Any) -> None:
        for child in getattr(command, "commands", {}).values():
            replace_callbacks(child)
        if not hasattr(command, "commands"):
            command.callback = lambda **arguments: arguments

    replace_callbacks(root)
    return lambda arguments: root.main(arguments, prog_name="qwenvl", standalone_mode=False)


def check_qwenvl(command: Command, parse: Parse) -> None:
    arguments = parse(command.arguments)
    if isinstance(arguments, dict) and {"url", "first_model_path"} <= set(arguments):
        stages = [arguments["first_model_path"], arguments["second_model_path"]]
        assert arguments["url"] or None not in stages, "neither --url nor both stages"


def flags(parameters: Iterable[Any]) -> set[str]:
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_inline_commands_exist(document: Path) -> None:
    """`qwenvl …` in a sentence: the subcommand and its flags exist; required arguments may be omitted."""
    for inline_command in re.findall(r"`(qwenvl [^`]+)`", prose(document.read_text("utf-8"))):
        command: Any = typer.main.get_command(app)
        words = re.split(r"[|…]", inline_command)[0].split()[1:]
        if words[:1] and words[0].startswith("-"):
            assert set(words) <= flags(command.params) | {"--help"}, inline_command
            continue
        context = typer.Context(command)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, inline_command
            command = command.commands[words.pop(0)]
            context = typer.Context(command, parent=context)
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown = used - flags(command.get_params(context))
        assert not unknown, f"{inline_command}: {unknown}"


# --- other programs -------------------------------------------------------------------------------------


# Checks of a command's arguments; CHECKS maps programs to them. Only check_qwenvl calls `parse`.


def check_files(command: Command, parse: Parse) -> None:
    """Arguments that begin with one of the folders listed here name existing files, and tests in them."""
    for argument in command.arguments:
        if argument.startswith(("tests/", "csrc", "recipes/", "benchmarks/", "deploy/", "examples")):
            path, _, test = argument.partition("::")
            assert (REPO / path).exists(), path
            assert not test or f"def {test}(" in (REPO / path).read_text(encoding="utf-8"), argument


def check_pip(command: Command, parse: Parse) -> None:
    for argument in command.arguments:
        match = re.fullmatch(r"(?:\.|paddlemix-qwenvl-plugin)\[(.+)\]", argument)
        if match:
            assert set(match[1].split(",")) <= EXTRAS, argument


def check_python(command: Command, parse: Parse) -> None:
    """A script or a module of the repository exists; its source, or one imported from its folder, has the flags."""
    target, *arguments = command.arguments
    if target == "-m":
        module, *arguments = arguments
        if module in ("venv", "pytest", "pip"):
            return CHECKS[module](Command(command.variables, module, arguments), parse)
        if module in UNCHECKED:  # torch.distributed.run, which runs the module after a second `-m`
            module = arguments[arguments.index("-m") + 1]
            arguments = arguments[arguments.index(module) + 1 :]
        script = REPO / f"{module.replace('.', '/')}.py"
    elif target in UNCHECKED:
        return None
    else:
        script = REPO / target
    assert script.exists(), target
    sources = script.read_text("utf-8")
    for module in re.findall(r"^(?:from|import) (\w+)", sources, re.MULTILINE):
        imported = script.with_name(f"{module}.py")
        sources += imported.read_text("utf-8") if imported.exists() else ""
    for argument in arguments:
        if argument.startswith("--"):
            assert f'"{argument}"' in sources, argument
    return None


def check_cmake(command: Command, parse: Parse) -> None:
    arguments = command.arguments
    if "-S" in arguments:
        assert (REPO / arguments[arguments.index("-S") + 1] / "CMakeLists.txt").exists()
    if "--target" in arguments:
        check_target(arguments[arguments.index("--target") + 1])
    for option in re.findall(r"-D(\w+)=", " ".join(arguments)):
        assert f"({option} " in CMAKE, option


def check_target(name: str) -> None:
    assert re.search(rf"add_(executable|library)\({name} ", CMAKE), name


def check_make(command: Command, parse: Parse) -> None:
    # Without flags, except -C and the folder after it.
    arguments = [argument for argument in command.arguments if not re.match("-[^C]", argument)]
    folder = arguments.pop(arguments.index("-C") + 1) if "-C" in arguments else "."
    rules = (REPO / folder / "Makefile").read_text("utf-8")
    for target in (argument for argument in arguments if argument != "-C" and "=" not in argument):
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target


def check_started(command: Command, parse: Parse) -> None:
    """Check the program that perf or xargs starts: its command is among their arguments."""
    names = [argument.rpartition("/")[2] for argument in command.arguments]
    start = next((index for index, name in enumerate(names) if name in CHECKS), None)
    if start is not None:
        started = Command(command.variables, command.arguments[start], command.arguments[start + 1 :])
        CHECKS[names[start]](started, parse)


def check_systemctl(command: Command, parse: Parse) -> None:
    for argument in command.arguments:
        if argument.endswith((".service", ".socket")):
            assert (REPO / "deploy" / "systemd" / argument).exists(), argument


def check_linter(command: Command, parse: Parse) -> None:
    """The linter is in the extra `dev`."""
    assert f'"{command.program.rpartition("/")[2]}' in PYPROJECT.split("\ndev = [")[1]


def check_mkdocs(command: Command, parse: Parse) -> None:
    assert '"mkdocs>' in PYPROJECT.split("\ndocs = [")[1]
    assert (REPO / "mkdocs.yml").exists()


def check_nothing(command: Command, parse: Parse) -> None:
    """No check: a program that is not the project's, or an assignment without a program."""


CHECKS: dict[str, Callable[[Command, Any], None]] = {
    "qwenvl": check_qwenvl,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "pytest": check_files,
    "cmake": check_cmake,
    "driver": lambda command, parse: check_target("driver"),
    "make": check_make,
    "perf": check_started,
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
    "venv": check_nothing,
    "xargs": check_started,
    **dict.fromkeys(
        ["", "cd", "curl", "echo", "export", "git", "install", "kill", "mkdir", "openssl", "printf", "ray"],
        check_nothing,
    ),
}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_commands_exist(document: Path, parse: Parse) -> None:
    for command in commands_of(document):
        name = command.program.rpartition("/")[2]
        if command.program in UNCHECKED:
            continue
        assert name in CHECKS, f"{command}: no check for {name}; add one, or a reason to UNCHECKED"
        try:
            CHECKS[name](command, parse)
        except Exception as error:
            pytest.fail(f"{command.program} {' '.join(command.arguments)}: {error}")


def test_unchecked_programs_occur() -> None:
    words = {
        word
        for document in documents()
        for command in commands_of(document)
        for word in (command.program, *command.arguments)
    }
    assert set(UNCHECKED) <= words


def test_environment_variables_exist() -> None:
    """Each assigned variable QWENVL_… is one of the package or of the server, or occurs in tests or benchmarks."""
    sources = "".join(
        path.read_text("utf-8")
        for folder in ("tests", "benchmarks")
        for path in (REPO / folder).rglob("*.py")
    )
    variables = {value.name for value in vars(env).values() if hasattr(value, "name")}
    variables |= {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in ServeSettings.model_fields}
    for document in documents():
        for command in commands_of(document):
            words = [f"{name}=" for name in command.variables] + command.arguments
            for name in re.findall(r"\b(QWENVL_\w+)=", " ".join(words)):
                assert name in variables or f'"{name}"' in sources, f"{document.name}: {name}"


def test_all_blocks_have_a_language() -> None:
    """Every block has a language, by which tests select blocks; no block has the language bash or shell."""
    for document in documents():
        fences = re.findall(r"^```(.*)$", document.read_text("utf-8"), re.MULTILINE)
        assert all(fences[::2]), document  # every second fence ends a block
        assert not {"bash", "shell"} & set(fences), f"{document}: use sh"


# --- the parser of shell examples -----------------------------------------------------------------------


# Expected: (variables, program, arguments) of the commands.
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("A=1 b c && d 'e f' # g", [({"A": "1"}, "b", ["c"]), ({}, "d", ["e f"])]),
        ("a -d @- <<END\nx; y\nEND\n", [({}, "a", ["-d", "@-"])]),
        ("a \\\n  b > c & old=$!", [({}, "a", ["b"]), ({"old": "$!"}, "", [])]),
        ("printf 'x\\n' | a; b", [({}, "printf", ["x\\n"]), ({}, "a", []), ({}, "b", [])]),
    ],
)
def test_parser(script: str, expected: list[Any]) -> None:
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
def test_wrong_commands_are_found(line: str, parse: Parse) -> None:
    (command,) = commands(line)
    # Exceptions of click; some versions of typer have a copy of click with its own exceptions.
    with pytest.raises(Exception):  # noqa: B017, PT011
        check_qwenvl(command, parse)
