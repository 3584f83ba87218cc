"""The shipped patches on clones of the real checkouts that QWENVL_PADDLENLP_DIR and QWENVL_PADDLEMIX_DIR name."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
from made_up import git

from paddlemix_qwenvl_plugin.upstream import patches, pins
from paddlemix_qwenvl_plugin.upstream.patches import State


def checkout(name: str, folder: Path) -> Path:
    """Clone an upstream into `folder`, at the pinned commit; skip the test if the variable is not set."""
    variable = f"QWENVL_{name.upper()}_DIR"
    [upstream] = [upstream for upstream in pins.load().upstreams if upstream.name == name]
    if not os.environ.get(variable):
        pytest.skip(
            f"{variable} is not set: the folder of a git clone that has {upstream.title} {upstream.commit}"
        )
    root = folder / name
    git(folder, "clone", "-q", "--shared", "--no-checkout", os.environ[variable], str(root))
    git(root, "checkout", "-q", upstream.commit)
    return root


@pytest.fixture(scope="module")
def paddlenlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = checkout("paddlenlp", tmp_path_factory.mktemp("upstream"))
    patches.apply(root)
    return root


@pytest.fixture(scope="module")
def paddlemix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = checkout("paddlemix", tmp_path_factory.mktemp("upstream"))
    patches.apply(root)
    return root


@pytest.mark.parametrize("name", ["paddlenlp", "paddlemix"])
def test_apply_and_revert(name: str, tmp_path: Path) -> None:
    root = checkout(name, tmp_path)
    files = [file for patch, _ in patches.check(root).states for file in patch.files]
    before = {file: (root / file).read_bytes() for file in files}
    # `apply` and `revert` return the states before the change.
    assert {state for _, state in patches.apply(root).states} == {State.APPLICABLE}
    assert {state for _, state in patches.check(root).states} == {State.APPLIED}
    for file in files:
        assert (root / file).read_bytes() != before[file]
        if file.endswith(".py"):
            compile((root / file).read_text(encoding="utf-8"), file, "exec")
    patches.revert(root)
    assert {file: (root / file).read_bytes() for file in files} == before
    assert git(root, "status", "--porcelain") == ""


@pytest.mark.parametrize("name", ["paddlenlp", "paddlemix"])
def test_a_tree_without_git(name: str, tmp_path: Path) -> None:
    root = checkout(name, tmp_path)
    shutil.rmtree(root / ".git")
    assert {state for _, state in patches.apply(root).states} == {State.APPLICABLE}
    assert {state for _, state in patches.revert(root).states} == {State.APPLIED}
    assert {state for _, state in patches.check(root).states} == {State.APPLICABLE}


# PaddleNLP


def write_package(folder: Path, name: str, entry_points: str) -> None:
    """Write the metadata of an installed package with entry points."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def run_init(
    paddlenlp: Path, python: str, *python_path: Path, then: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run paddlenlp/__init__.py up to its `import paddle`, and then the code `then`.

    The lines below `import paddle` would need PaddleNLP's requirements.
    """
    source = (paddlenlp / "paddlenlp" / "__init__.py").read_text(encoding="utf-8")
    lines = source.partition("\nimport paddle\n")[0]
    # -S: without site-packages, so that only packages in `python_path` have plugins. -W error: warnings are errors.
    return subprocess.run(
        [python, "-S", "-W", "error", "-c", f"{lines}\n{then}"],
        env={"PYTHONPATH": os.pathsep.join(map(str, python_path))},
        capture_output=True,
        text=True,
        check=False,
    )


def interpreter(minor: int) -> str:
    """Return the path of the Python 3.`minor` binary; skip the test without one.

    The command on PATH may be a wrapper script, which needs variables that run_init does not pass.
    """
    command = shutil.which(f"python3.{minor}")
    if command is not None:
        code = "import sys; print(sys.executable)"
        completed = subprocess.run([command, "-c", code], capture_output=True, text=True, check=False)
        if completed.returncode == 0:
            return completed.stdout.strip()
    pytest.skip(f"no python3.{minor} on PATH; install it")


@pytest.mark.parametrize("minor", [None, 8, 9, 10, 11, 12, 13])
def test_import_calls_every_plugin(paddlenlp: Path, tmp_path: Path, minor: int | None) -> None:
    """A plugin that fails is reported on stderr and does not prevent the import.

    `minor` is that of the Python version; None: this interpreter.
    """
    python = sys.executable if minor is None else interpreter(minor)
    (tmp_path / "plugins.py").write_text(
        "def good(): print('good')\n"
        "def better(): print('better')\n"
        "def bad(): raise ValueError('not today')\n",
        encoding="utf-8",
    )
    write_package(
        tmp_path, "one", "[paddlenlp.plugins]\nA = plugins:good\n[console_scripts]\nno = plugins:never\n"
    )
    write_package(
        tmp_path, "two", "[paddlenlp.plugins]\nB = plugins:bad\nC = no_such_module:init\nD = plugins:better\n"
    )
    completed = run_init(paddlenlp, python, tmp_path, then="print(__version__)")
    assert completed.returncode == 0, completed.stderr
    lines = completed.stdout.splitlines()
    assert sorted(lines[:-1]) == ["better", "good"]
    assert lines[-1].startswith("2.")  # __version__ of the pinned commit: the import has continued
    errors = sorted(line for line in completed.stderr.splitlines() if line)
    assert [line.split(" (")[0] for line in errors] == [f"paddlenlp.plugins: {name} failed" for name in "BC"]
    assert "ValueError('not today')" in errors[0]
    assert "no_such_module" in errors[1]


def test_import_without_plugins(paddlenlp: Path, tmp_path: Path) -> None:
    completed = run_init(paddlenlp, sys.executable, tmp_path)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_import_with_damaged_metadata(paddlenlp: Path, tmp_path: Path) -> None:
    write_package(tmp_path, "damaged", "[paddlenlp.plugins]\nno equals sign\n")
    completed = run_init(paddlenlp, sys.executable, tmp_path, then="print('on')")
    assert (completed.returncode, completed.stdout) == (0, "on\n")
    assert completed.stderr.startswith("paddlenlp.plugins: ")


def test_import_activates_this_plugin(paddlenlp: Path, tmp_path: Path) -> None:
    """The entry point in pyproject.toml activates this plugin; with -S, Python does not read the plugin's .pth file."""
    repo = Path(__file__).resolve().parents[2]
    pyproject = (repo / "pyproject.toml").read_text(encoding="utf-8")
    declaration = re.search(
        r'^\[project\.entry-points\."(paddlenlp\.plugins)"\]\n(\w+) = "(.+)"$', pyproject, re.M
    )
    assert declaration is not None
    write_package(tmp_path, "this-plugin", "[{}]\n{} = {}\n".format(*declaration.groups()))
    code = "print(sys.modules['_qwenvl_activate'].state)"
    completed = run_init(paddlenlp, sys.executable, tmp_path, repo / "activation", then=code)
    assert completed.returncode == 0, completed.stderr
    assert "'armed'" in completed.stdout


@pytest.mark.parametrize("pir", ["0", "1"])
def test_validate_pdmodel_on_a_cpu(paddlenlp: Path, tmp_path: Path, pir: str) -> None:
    """The patched function reports an operator of a graph in either form: `pir` "0" is legacy, "1" PIR."""
    pytest.importorskip("paddle", reason="paddle is not installed: pip install 'paddlepaddle>=3.0,<3.4'")
    script = tmp_path / "validate.py"
    script.write_text(_VALIDATE, encoding="utf-8")
    completed = subprocess.run(
        [sys.executable, str(script), str(paddlenlp / "llm" / "predict" / "export_model.py"), str(tmp_path)],
        env={**os.environ, "FLAGS_enable_pir_api": pir, "QWENVL_PLUGIN": "0"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert "UNEXPECTED OP<print>" in completed.stdout  # the operator of Printing


# Runs only the function validate_pdmodel of a source file, on an exported graph with an operator that it reports.
_VALIDATE = """
import ast, __future__, os, sys, types
import paddle

class Printing(paddle.nn.Layer):
    def forward(self, x):
        return paddle.static.Print(x) + 1

source, folder = sys.argv[1:]
spec = [paddle.static.InputSpec([None, 4], "float32")]
paddle.jit.save(paddle.jit.to_static(Printing(), full_graph=True), os.path.join(folder, "model"), input_spec=spec)
tree = ast.parse(open(source).read())
function = [node for node in tree.body if getattr(node, "name", "") == "validate_pdmodel"]
names = {"paddle": paddle, "os": os, "tqdm": lambda ops, desc: ops, "SimpleNamespace": types.SimpleNamespace}
names["logger"] = types.SimpleNamespace(warning=print)
exec(compile(ast.Module(function, []), source, "exec", __future__.annotations.compiler_flag), names)
names["validate_pdmodel"](folder, "model", "cpu")
"""


def add_mul(paddlenlp: Path) -> str:
    """Return the source of the CUDA function add_mul for bfloat16."""
    source = (paddlenlp / "csrc" / "generation" / "quant_int8.cu").read_text(encoding="utf-8")
    match = re.search(r"^template<>\n[^\n]* add_mul<__nv_bfloat16>\(.*?^\}", source, re.MULTILINE | re.DOTALL)
    assert match is not None
    return match.group()


@pytest.mark.parametrize(
    ("architecture", "intrinsics"), [(None, False), (700, False), (750, False), (800, True)]
)
def test_add_mul_uses_bfloat16_intrinsics_from_sm_80_on(
    paddlenlp: Path, architecture: int | None, intrinsics: bool
) -> None:
    """The preprocessor selects a branch by __CUDA_ARCH__; None: not defined, as in host code."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no g++ on PATH; install one")
    define = [] if architecture is None else [f"-D__CUDA_ARCH__={architecture}"]
    text = subprocess.run(
        [compiler, "-E", "-P", "-x", "c++", *define, "-"],
        input=add_mul(paddlenlp),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("__hmul" in text, "__bfloat162float" in text) == (intrinsics, not intrinsics)


def test_add_mul_compiles(paddlenlp: Path, tmp_path: Path) -> None:
    """Compile add_mul for sm_70, sm_75 and sm_80, as far as nvcc supports them: only sm_80 multiplies in bfloat16.

    The complete source file would need a GPU build of Paddle.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH; install the CUDA toolkit")
    source = tmp_path / "add_mul.cu"
    declaration = "#include <cuda_bf16.h>\ntemplate <typename T> __device__ T add_mul(T a, T b, T c);\n"
    kernel = "\n__global__ void kernel(__nv_bfloat16* x) { x[3] = add_mul(x[0], x[1], x[2]); }\n"
    source.write_text(declaration + add_mul(paddlenlp) + kernel, encoding="utf-8")
    supported = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    for architecture in ("compute_70", "compute_75", "compute_80"):
        if architecture not in supported.split():
            continue
        command = [
            nvcc,
            "-std=c++17",
            f"-arch={architecture}",
            "-ptx",
            "-o",
            str(tmp_path / "out.ptx"),
            str(source),
        ]
        subprocess.run(command, check=True, capture_output=True)
        ptx = (tmp_path / "out.ptx").read_text(encoding="utf-8")
        assert bool(re.search(r"fma\.rn\.bf16|mul\.bf16", ptx)) == (architecture == "compute_80")


# PaddleMIX


def name_of(node: ast.expr) -> str:
    """Return the unqualified name of a name, an attribute or a called function; "" for other expressions."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_unhashable(node: ast.ClassDef) -> bool:
    """Whether a class has __eq__ but no __hash__, from its own methods or a dataclass decorator without keywords."""
    methods = {statement.name for statement in node.body if isinstance(statement, ast.FunctionDef)}
    if "__hash__" in methods:
        return False
    is_default_dataclass = any(
        name_of(decorator) == "dataclass" and not getattr(decorator, "keywords", [])
        for decorator in node.decorator_list
    )
    return is_default_dataclass or "__eq__" in methods


def unhashable_defaults(roots: list[Path]) -> set[str]:
    """Return CLASS.FIELD of dataclass fields whose default is a list, dict, set or instance of an unhashable class.

    Python 3.11 and newer reject such defaults. Classes are compared by unqualified name: the result may have false
    positives.
    """
    classes: list[ast.ClassDef] = []
    for path in (path for root in roots for path in root.rglob("*.py")):
        with contextlib.suppress(SyntaxError):  # a file that cannot be imported
            tree = ast.parse(path.read_text(encoding="utf-8"))
            classes += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    unhashable_classes = {node.name for node in classes if is_unhashable(node)} | {"list", "dict", "set"}
    fields = set()
    for node in classes:
        if "dataclass" not in map(name_of, node.decorator_list):
            continue
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign) or statement.value is None:
                continue
            default: ast.expr | None = statement.value
            if isinstance(default, ast.Call) and name_of(default) == "field":
                keywords = {keyword.arg: keyword.value for keyword in default.keywords}
                default = keywords.get("default")
            is_literal = isinstance(default, (ast.List, ast.Dict, ast.Set))
            is_instance = isinstance(default, ast.Call) and name_of(default) in unhashable_classes
            if is_literal or is_instance:
                fields.add(f"{node.name}.{ast.unparse(statement.target)}")
    return fields


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_no_unhashable_dataclass_defaults(paddlemix: Path, tmp_path: Path) -> None:
    roots = ("paddlemix", "ppdiffusers/ppdiffusers", "deploy")
    assert unhashable_defaults([paddlemix / root for root in roots]) == set()
    # Without patches, there are two such fields, which a patch fixes.
    unpatched = checkout("paddlemix", tmp_path)
    expected = {"CLAPConfig.audio_cfg", "CLAPConfig.text_cfg"}
    assert unhashable_defaults([unpatched / root for root in roots]) == expected


def test_paddlemix_imports(paddlemix: Path) -> None:
    if importlib.util.find_spec("ppdiffusers") is None or importlib.util.find_spec("paddlenlp") is None:
        pytest.skip("ppdiffusers or paddlenlp is not installed: the second set of docs/upstream.md has them")
    completed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import paddlemix; print(paddlemix.__file__, paddlemix.QwenVLProcessor.__name__)",
        ],
        env={**os.environ, "PYTHONPATH": f"{paddlemix}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        cwd=paddlemix.parent,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert completed.stdout.splitlines()[-1] == f"{paddlemix / 'paddlemix' / '__init__.py'} QwenVLProcessor"


@pytest.fixture
def patched_utils(paddlemix: Path) -> types.ModuleType:
    """The patched module deploy/qwen_vl/utils.py, which reads the files of generated tokens, one for each step."""
    spec = importlib.util.spec_from_file_location(
        "patched_utils", paddlemix / "deploy" / "qwen_vl" / "utils.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value", [None, "", "other", "a [folder] with 'odd' $names"])
def test_folder_of_the_token_files(
    patched_utils: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """Only files in the folder QWENVL_REAL_TIME_SAVE_DIR are read and deleted, by default in the working directory.

    `value` None: the variable is not set.
    """
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("QWENVL_REAL_TIME_SAVE_DIR", raising=False)
    else:
        monkeypatch.setenv("QWENVL_REAL_TIME_SAVE_DIR", value)
    (tmp_path / "other").mkdir()
    token_folder = Path(value or ".")
    for folder in {token_folder, Path(), Path("other")}:
        folder.mkdir(exist_ok=True)
        for step in (1, 2, 3):
            token = step * 10 if folder == token_folder else -1
            # The byte "1" for a complete file, the type byte "1" for int64, and a token.
            (folder / f"real_time_save.temp_ids_rank_0_step_{step}").write_bytes(
                b"11" + struct.pack("<q", token)
            )
    assert patched_utils.load_real_time_tokens().tolist() == [[10, 20, 30]]
    # Only the files that were read are deleted.
    remaining = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("real_time_save.*")}
    assert remaining == {".", "other"} - {value or "."}
