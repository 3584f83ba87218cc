"""Opt-in: the shipped patches on real checkouts, named by QWENVL_PADDLENLP_DIR and QWENVL_PADDLEMIX_DIR.

The checkouts are cloned first, so they are only read.
"""

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


def checkout(name: str, tmp: Path) -> Path:
    variable = f"QWENVL_{name.upper()}_DIR"
    [upstream] = [one for one in pins.load().upstreams if one.name == name]
    if not os.environ.get(variable):
        pytest.skip(
            f"{variable} is not set: the folder of a git clone that has {upstream.title} {upstream.commit}"
        )
    root = tmp / name
    git(tmp, "clone", "-q", "--shared", "--no-checkout", os.environ[variable], str(root))
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
def test_applies_and_reverts(name: str, tmp_path: Path) -> None:
    root = checkout(name, tmp_path)
    files = [file for patch, _ in patches.check(root).states for file in patch.files]
    before = {file: (root / file).read_bytes() for file in files}
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
def test_an_archive_without_git(name: str, tmp_path: Path) -> None:
    root = checkout(name, tmp_path)
    shutil.rmtree(root / ".git")
    assert {state for _, state in patches.apply(root).states} == {State.APPLICABLE}
    assert {state for _, state in patches.revert(root).states} == {State.APPLIED}
    assert {state for _, state in patches.check(root).states} == {State.APPLICABLE}


# PaddleNLP


def package(folder: Path, name: str, entry_points: str) -> None:
    """Installed metadata of a package with its entry points."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def run_start(paddlenlp: Path, python: str, *path: Path, then: str = "") -> subprocess.CompletedProcess[str]:
    """Run the lines above `import paddle` of `paddlenlp`: the rest needs PaddleNLP's requirements."""
    source = (paddlenlp / "paddlenlp" / "__init__.py").read_text(encoding="utf-8")
    lines = source.partition("\nimport paddle\n")[0]
    # -S: without site-packages, so no plugins but those of `path`. -W error: not even a warning may be raised.
    return subprocess.run(
        [python, "-S", "-W", "error", "-c", f"{lines}\n{then}"],
        env={"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=False,
    )


def interpreter(minor: int) -> str:
    """Path of the Python 3.`minor` binary: the command on PATH may be a wrapper script."""
    found = shutil.which(f"python3.{minor}")
    command = [found or "", "-c", "import sys; print(sys.executable)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if found else None
    if done is None or done.returncode != 0:
        pytest.skip(f"no python3.{minor} on PATH; install it")
    return done.stdout.strip()


@pytest.mark.parametrize("minor", [None, 8, 9, 10, 11, 12, 13])
def test_import_calls_every_plugin(paddlenlp: Path, tmp_path: Path, minor: int | None) -> None:
    python = sys.executable if minor is None else interpreter(minor)
    (tmp_path / "plugins.py").write_text(
        "def good(): print('good')\n"
        "def better(): print('better')\n"
        "def bad(): raise ValueError('not today')\n",
        encoding="utf-8",
    )
    package(tmp_path, "one", "[paddlenlp.plugins]\nA = plugins:good\n[console_scripts]\nno = plugins:never\n")
    package(
        tmp_path, "two", "[paddlenlp.plugins]\nB = plugins:bad\nC = no_such_module:init\nD = plugins:better\n"
    )
    done = run_start(paddlenlp, python, tmp_path, then="print(__version__)")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(lines[:-1]) == ["better", "good"]
    assert lines[-1].startswith("2.")  # and the import continued
    told = sorted(line for line in done.stderr.splitlines() if line)
    assert [line.split(" (")[0] for line in told] == [f"paddlenlp.plugins: {one} failed" for one in "BC"]
    assert "ValueError('not today')" in told[0]
    assert "no_such_module" in told[1]


def test_import_without_plugins(paddlenlp: Path, tmp_path: Path) -> None:
    done = run_start(paddlenlp, sys.executable, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_with_damaged_metadata(paddlenlp: Path, tmp_path: Path) -> None:
    package(tmp_path, "damaged", "[paddlenlp.plugins]\nno equals sign\n")
    done = run_start(paddlenlp, sys.executable, tmp_path, then="print('on')")
    assert (done.returncode, done.stdout) == (0, "on\n")
    assert done.stderr.startswith("paddlenlp.plugins: ")


def test_import_activates_this_plugin(paddlenlp: Path, tmp_path: Path) -> None:
    """By the installed entry point; with -S Python does not read the .pth file."""
    repo = Path(__file__).resolve().parents[2]
    pyproject = (repo / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(
        r'^\[project\.entry-points\."(paddlenlp\.plugins)"\]\n(\w+) = "(.+)"$', pyproject, re.M
    )
    assert declared is not None
    package(tmp_path, "ours", "[{}]\n{} = {}\n".format(*declared.groups()))
    code = "print(sys.modules['_qwenvl_activate'].state)"
    done = run_start(paddlenlp, sys.executable, tmp_path, repo / "activation", then=code)
    assert done.returncode == 0, done.stderr
    assert "'armed'" in done.stdout


@pytest.mark.parametrize("pir", ["0", "1"])
def test_validate_pdmodel_on_a_cpu(paddlenlp: Path, tmp_path: Path, pir: str) -> None:
    pytest.importorskip("paddle", reason="paddle is not installed: pip install 'paddlepaddle>=3.0,<3.4'")
    script = tmp_path / "validate.py"
    script.write_text(_VALIDATE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(paddlenlp / "llm" / "predict" / "export_model.py"), str(tmp_path)],
        env={**os.environ, "FLAGS_enable_pir_api": pir, "QWENVL_PLUGIN": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UNEXPECTED OP<print>" in done.stdout  # the graph has one, which the function finds


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
    source = (paddlenlp / "csrc" / "generation" / "quant_int8.cu").read_text(encoding="utf-8")
    found = re.search(r"^template<>\n[^\n]* add_mul<__nv_bfloat16>\(.*?^\}", source, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group()


@pytest.mark.parametrize(
    ("architecture", "intrinsics"), [(None, False), (700, False), (750, False), (800, True)]
)
def test_the_guard_picks_a_branch(paddlenlp: Path, architecture: int | None, intrinsics: bool) -> None:
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
    """For the oldest GPUs that this nvcc supports and for sm_80; the whole file needs a GPU build of Paddle."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH; install the CUDA toolkit")
    source = tmp_path / "add_mul.cu"
    head = "#include <cuda_bf16.h>\ntemplate <typename T> __device__ T add_mul(T a, T b, T c);\n"
    kernel = "\n__global__ void kernel(__nv_bfloat16* x) { x[3] = add_mul(x[0], x[1], x[2]); }\n"
    source.write_text(head + add_mul(paddlenlp) + kernel, encoding="utf-8")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    for architecture in ("compute_70", "compute_75", "compute_80"):
        if architecture not in known.split():
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
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def has_no_hash(node: ast.ClassDef) -> bool:
    """Whether a class is unhashable: it, or its dataclass decorator, defines __eq__ without __hash__."""
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    if "__hash__" in methods:
        return False
    plain = any(
        name_of(one) == "dataclass" and not getattr(one, "keywords", []) for one in node.decorator_list
    )
    return plain or "__eq__" in methods


def unhashable_defaults(roots: list[Path]) -> set[str]:
    """CLASS.FIELD of each dataclass field whose default is a list, dict or set, or an unhashable instance.

    Classes are matched by unqualified name, so the result may contain false positives, but misses none.
    """
    classes: list[ast.ClassDef] = []
    for path in (path for root in roots for path in root.rglob("*.py")):
        with contextlib.suppress(SyntaxError):  # nothing can import such a file either
            tree = ast.parse(path.read_text(encoding="utf-8"))
            classes += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    hashless = {node.name for node in classes if has_no_hash(node)}
    found = set()
    for node in classes:
        if "dataclass" not in map(name_of, node.decorator_list):
            continue
        for part in node.body:
            if not isinstance(part, ast.AnnAssign) or part.value is None:
                continue
            default: ast.expr | None = part.value
            if isinstance(default, ast.Call) and name_of(default) == "field":
                default = next((one.value for one in default.keywords if one.arg == "default"), None)
            literal = isinstance(default, (ast.List, ast.Dict, ast.Set))
            instance = isinstance(default, ast.Call) and name_of(default) in {
                *hashless,
                "list",
                "dict",
                "set",
            }
            if literal or instance:
                found.add(f"{node.name}.{ast.unparse(part.target)}")
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_no_unhashable_dataclass_defaults(paddlemix: Path, tmp_path: Path) -> None:
    roots = ("paddlemix", "ppdiffusers/ppdiffusers", "deploy")
    assert unhashable_defaults([paddlemix / root for root in roots]) == set()
    stock = checkout("paddlemix", tmp_path)
    # The scan finds what the patch fixes.
    wanted = {"CLAPConfig.audio_cfg", "CLAPConfig.text_cfg"}
    assert unhashable_defaults([stock / root for root in roots]) == wanted


def test_paddlemix_imports(paddlemix: Path) -> None:
    if importlib.util.find_spec("ppdiffusers") is None or importlib.util.find_spec("paddlenlp") is None:
        pytest.skip("ppdiffusers or paddlenlp is not installed: the second set of docs/upstream.md has them")
    done = subprocess.run(
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
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"{paddlemix / 'paddlemix' / '__init__.py'} QwenVLProcessor"


@pytest.fixture
def stock_reader(paddlemix: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(
        "stock_reader", paddlemix / "deploy" / "qwen_vl" / "utils.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("value", [None, "", "other", "a [folder] with 'odd' $names"])
def test_real_time_save_dir(
    stock_reader: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("QWENVL_REAL_TIME_SAVE_DIR", raising=False)
    else:
        monkeypatch.setenv("QWENVL_REAL_TIME_SAVE_DIR", value)
    (tmp_path / "other").mkdir()
    for folder in {Path(value or "."), Path(), Path("other")}:
        folder.mkdir(exist_ok=True)
        for step in (1, 2, 3):
            # A type byte of 1: int64.
            wanted = folder == Path(value or ".")
            (folder / f"real_time_save.temp_ids_rank_0_step_{step}").write_bytes(
                b"11" + struct.pack("<q", step * 10 if wanted else -1)
            )
    assert stock_reader.load_real_time_tokens().tolist() == [[10, 20, 30]]
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("real_time_save.*")}
    assert left == {".", "other"} - {value or "."}
