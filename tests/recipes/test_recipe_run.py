"""The command `qwenvl run`, with recipes whose steps are small Python programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from recipe_helpers import qwenvl, recipe, results, run_folder, start, step, write

from paddlemix_qwenvl_plugin.recipes import environment

# Writes {"value": N} to FILE; arguments: FILE N.
WRITE = "import json, sys; json.dump({'value': int(sys.argv[2])}, open(sys.argv[1], 'w'))"
# Starts a child process, writes its process id to a file, and waits. When the step ends, the child must end as well.
WAIT_WITH_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("waiting")
open(sys.argv[1] + ".partial", "w").write(str(child.pid))
import os; os.replace(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie, state Z, has ended but has not been reaped yet. The state follows the program's name in parentheses.
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def ends_within_5_seconds(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_output_and_files_of_a_successful_run(tmp_path: Path) -> None:
    data = recipe(
        seed=5,
        pins={"upstream": "abc"},
        env={"GREETING": "hello there"},
        steps=[
            step("greet", "import os; print(os.environ['GREETING'])"),
            step("write", WRITE, "${run_dir}/out.json", "${seed}"),
        ],
        expect=[
            {"file": "${run_dir}/out.json"},
            {"file": "${run_dir}/out.json", "key": "value", "equals": 6},
        ],
    )
    completed = qwenvl(tmp_path, "run", write(tmp_path, data), "seed=6")
    assert (completed.returncode, completed.stderr) == (0, "")
    lines = completed.stdout.splitlines()
    assert lines[0] == f"fake: {run_folder(tmp_path)}"
    assert lines[1].startswith("[1/2] greet … ok ")
    assert lines[2].startswith("[2/2] write … ok ")
    assert lines[3:] == [
        "expect out.json exists … ok",
        "expect out.json value equals 6 … ok",
        "ok: 2 steps, 2 expectations",
    ]

    folder = run_folder(tmp_path)
    assert time.strptime(folder.name[:15], "%Y%m%d-%H%M%S")
    assert folder.name[15:] == "-fake"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.resolved.yaml", "environment.json", "commands.txt", "log.txt", "results.json", "out.json",
    }  # fmt: skip
    resolved = yaml.safe_load((folder / "recipe.resolved.yaml").read_text())
    assert (resolved["seed"], resolved["pins"]) == (6, {"upstream": "abc"})
    assert "hello there" in (folder / "log.txt").read_text()
    run_results = results(tmp_path)
    assert (run_results["recipe"], run_results["status"], run_results["resumed_from"]) == ("fake", "ok", None)
    assert [(entry["name"], entry["status"], entry["exit_code"]) for entry in run_results["steps"]] == [
        ("greet", "ok", 0),
        ("write", "ok", 0),
    ]
    assert [entry["actual"] for entry in run_results["expect"]] == [True, 6]
    recorded_environment = json.loads((folder / "environment.json").read_text())
    assert recorded_environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert recorded_environment["cpus"] == os.cpu_count()
    assert recorded_environment["packages"]["numpy"] == environment.version("numpy")


def test_the_api_key_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_API_KEY", "top-secret")
    monkeypatch.setenv("QWENVL_ENGINE", "auto")
    recorded = environment.describe()
    assert recorded["variables"]["QWENVL_ENGINE"] == "auto"
    assert "top-secret" not in json.dumps(recorded)


def test_commands_txt_is_a_shell_script(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['WORDS'] + sys.argv[2])"
    data = recipe(env={"WORDS": "it's $HOME "}, steps=[step("a", code, "${run_dir}/out", 'a "b" c')])
    assert qwenvl(tmp_path, "run", write(tmp_path, data)).returncode == 0
    folder = run_folder(tmp_path)
    (folder / "out").unlink()
    subprocess.run(["sh", str(folder / "commands.txt")], check=True)
    assert (folder / "out").read_text() == 'it\'s $HOME a "b" c'


def test_failing_step(tmp_path: Path) -> None:
    code = "import sys; print(*range(100, 150), sep='\\n'); sys.exit('no such tensor')"
    data = recipe(steps=[step("good", "print('fine')"), step("bad", code), step("never", "pass")])
    completed = qwenvl(tmp_path, "run", write(tmp_path, data))
    log = run_folder(tmp_path) / "log.txt"
    assert completed.returncode == 1
    assert completed.stderr == f"qwenvl: step bad failed with exit code 1; log: {log}\n"
    assert "[2/3] bad … FAILED" in completed.stdout
    # The last 20 of the step's 51 lines.
    step_output = [line.strip() for line in completed.stdout.splitlines() if line.startswith("  ")]
    assert len(step_output) == 20
    assert step_output[-1] == "no such tensor"
    assert step_output[0] == "131"
    assert "100\n" in log.read_text()
    run_results = results(tmp_path)
    assert run_results["status"] == "failed"
    assert [(entry["status"], entry["exit_code"]) for entry in run_results["steps"]] == [
        ("ok", 0),
        ("failed", 1),
        ("not run", None),
    ]


def test_step_that_is_ended_by_a_signal(tmp_path: Path) -> None:
    data = recipe(steps=[step("good", "print('fine')"), step("crash", "import os; os.kill(os.getpid(), 11)")])
    completed = qwenvl(tmp_path, "run", write(tmp_path, data))
    assert (completed.returncode, completed.stderr.split(";")[0]) == (
        1,
        "qwenvl: step crash was ended by SIGSEGV",
    )
    assert "fine" not in completed.stdout  # only the output of the failing step is printed


def test_program_that_does_not_exist(tmp_path: Path) -> None:
    completed = qwenvl(
        tmp_path, "run", write(tmp_path, recipe(steps=[{"name": "a", "run": "no-such-program x"}]))
    )
    assert completed.returncode == 1
    assert completed.stderr == "qwenvl: step a: cannot start no-such-program: No such file or directory\n"
    assert results(tmp_path)["steps"][0]["status"] == "failed"


def test_missed_expectations(tmp_path: Path) -> None:
    data = recipe(
        steps=[step("write", WRITE, "${run_dir}/out.json", "5")],
        expect=[
            {"file": "${run_dir}/out.json", "key": "value", "min": 6},
            {"file": "${run_dir}/out.json", "key": "value", "max": 6},
            {"file": "${run_dir}/none.json"},
        ],
    )
    completed = qwenvl(tmp_path, "run", write(tmp_path, data))
    assert completed.returncode == 1
    assert completed.stdout.splitlines()[2:] == [
        "expect out.json value min 6 … MISSED: 5",
        "expect out.json value max 6 … ok",
        "expect none.json exists … MISSED: False",
    ]
    assert (
        completed.stderr
        == f"qwenvl: 2 of 3 expectations missed; see {run_folder(tmp_path) / 'results.json'}\n"
    )
    run_results = results(tmp_path)
    assert run_results["status"] == "failed"
    assert [(entry["ok"], entry["actual"]) for entry in run_results["expect"]] == [
        (False, 5),
        (True, 5),
        (False, False),
    ]


def test_timeout_ends_the_process_group(tmp_path: Path) -> None:
    data = recipe(steps=[step("slow", WAIT_WITH_CHILD, "${run_dir}/pid", timeout_seconds=2)])
    start_time = time.monotonic()
    completed = qwenvl(tmp_path, "run", write(tmp_path, data))
    assert time.monotonic() - start_time < 20  # the step alone would take 60 s
    assert completed.returncode == 1
    assert completed.stderr.startswith("qwenvl: step slow was stopped after timeout_seconds 2; log: ")
    assert "  waiting" in completed.stdout.splitlines()
    assert ends_within_5_seconds(int((run_folder(tmp_path) / "pid").read_text()))
    assert results(tmp_path)["steps"][0]["status"] == "timeout"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_process_group_and_results_are_written(
    tmp_path: Path, number: signal.Signals
) -> None:
    data = recipe(
        steps=[step("one", "pass"), step("two", WAIT_WITH_CHILD, "${run_dir}/pid"), step("three", "pass")]
    )
    process = start(tmp_path, "run", write(tmp_path, data))
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("runs/*/pid")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_running(int((run_folder(tmp_path) / "pid").read_text()))
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert out.splitlines()[-1] == "[2/3] two … interrupted"
    assert ends_within_5_seconds(int((run_folder(tmp_path) / "pid").read_text()))
    run_results = results(tmp_path)
    assert run_results["status"] == "interrupted"
    assert [entry["status"] for entry in run_results["steps"]] == ["ok", "interrupted", "not run"]
    assert run_results["steps"][1]["seconds"] > 0


def test_step_that_ignores_sigterm(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    completed = qwenvl(tmp_path, "run", write(tmp_path, recipe(steps=[step("a", code, timeout_seconds=1)])))
    assert completed.returncode == 1
    assert results(tmp_path)["steps"][0]["exit_code"] == -signal.SIGKILL


def test_from_step_continues_the_newest_run(tmp_path: Path) -> None:
    append = "import sys; open(sys.argv[1], 'a').write('x')"
    check = "import pathlib, sys; sys.exit(not pathlib.Path('ready').exists())"
    data = recipe(
        steps=[step("make", append, "${run_dir}/made"), step("check", check), step("end", "pass")],
        bench={"step": "make", "repeat": 1},
    )
    path = write(tmp_path, data)
    assert qwenvl(tmp_path, "run", path).returncode == 1
    (tmp_path / "ready").touch()
    completed = qwenvl(tmp_path, "run", path, "--from_step", "check")
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "make" not in completed.stdout
    assert "[2/3] check … ok" in completed.stdout
    assert (run_folder(tmp_path) / "made").read_text() == "x"  # `make` has run once
    run_results = results(tmp_path)
    assert (run_results["status"], run_results["resumed_from"]) == ("ok", "check")
    assert [entry["status"] for entry in run_results["steps"]] == ["ok", "ok", "ok"]
    assert run_results["steps"][0]["seconds"] > 0
    assert run_results["bench"]["step"] == "make"
    log = (run_folder(tmp_path) / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("====")] == [
        "make:", "check:", "check:", "end:",
    ]  # fmt: skip


@pytest.mark.parametrize("failing", ["prepare", "measure"])
def test_from_step_discards_the_timings_of_a_step_that_runs_again(tmp_path: Path, failing: str) -> None:
    """Also if the benchmarked step, `measure`, is not reached or fails."""
    check = "import pathlib, sys; sys.exit(pathlib.Path(sys.argv[1]).exists())"
    steps = [step(name, check, f"{name}-fails") for name in ("prepare", "measure")]
    path = write(tmp_path, recipe(steps=steps, bench={"step": "measure", "repeat": 1}))
    assert qwenvl(tmp_path, "run", path).returncode == 0
    assert results(tmp_path)["bench"]["step"] == "measure"
    (tmp_path / f"{failing}-fails").touch()
    assert qwenvl(tmp_path, "run", path, "--from_step", "prepare").returncode == 1
    assert results(tmp_path)["bench"] is None


def test_from_step_uses_the_newest_run_of_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, recipe())
    # An older run, a newer run of another recipe, and a name without a time.
    for other in ("20200101-000000-fake", "20990101-000000-fake-other", "99990101-fake"):
        (tmp_path / "runs" / other).mkdir(parents=True)
    first = qwenvl(tmp_path, "run", path)
    folder = first.stdout.splitlines()[0].removeprefix("fake: ")
    resumed = qwenvl(tmp_path, "run", path, "--from_step", "only")
    assert (resumed.returncode, resumed.stdout.splitlines()[0]) == (0, f"fake: {folder}")


def test_errors_of_from_step(tmp_path: Path) -> None:
    path = write(tmp_path, recipe(seed=1, steps=[step("a", "import sys; sys.exit(1)"), step("b", "pass")]))

    def run_and_fail(*arguments: str) -> tuple[int, str]:
        """Return the exit code and the error message."""
        completed = qwenvl(tmp_path, "run", str(path), *arguments)
        assert completed.stderr.count("\n") == 1
        return completed.returncode, completed.stderr.removeprefix("qwenvl: ").strip()

    assert run_and_fail("--from_step", "c") == (2, "--from_step c: fake has no such step; steps: a, b")
    assert run_and_fail("--from_step", "b") == (1, "--from_step b: runs has no earlier run of fake")
    assert qwenvl(tmp_path, "run", path).returncode == 1
    code, message = run_and_fail("--from_step", "b")
    assert code == 1
    assert message.endswith("the step a before it is 'failed'; continue from a")
    code, message = run_and_fail("seed=2", "--from_step", "a")
    assert code == 1
    assert "was run from another recipe (different: seed)" in message


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path: Path) -> None:
    data = recipe(
        requires={"gpu": False, "python": "<3"},
        assets=[{"name": "pic", "path": "none.png"}],
        env={"A": "b c"},
        steps=[{"name": "one", "run": "qwenvl predict --image ${assets.pic}"}, step("two", "1/0")],
    )
    write(tmp_path, data)
    completed = qwenvl(tmp_path, "run", "./fake.yaml", "--dry_run")
    # A name that ends with .yaml is a path.
    assert qwenvl(tmp_path, "run", "fake.yaml", "--dry_run").returncode == 0
    assert completed.returncode == 0
    assert completed.stdout.splitlines() == [
        "export A='b c'",
        "# one",
        f"{sys.executable} -m paddlemix_qwenvl_plugin.cli predict --image {tmp_path}/none.png",
        "# two",
        f"{sys.executable} -c 1/0",
    ]
    warnings = completed.stderr.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: requires python <3; this is 3.")
    assert warnings[1].startswith(f"warning: asset pic: {tmp_path}/none.png is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["fake.yaml"]


def test_output_folder(tmp_path: Path) -> None:
    path = write(tmp_path, recipe())
    assert qwenvl(tmp_path, "run", path, "--output", "a/b").returncode == 0
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1
    completed = qwenvl(tmp_path, "run", path, "--output", "fake.yaml")
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1)
    assert completed.stderr.startswith("qwenvl: --output fake.yaml: cannot make ")
    (tmp_path / "runs").symlink_to("nowhere")
    completed = qwenvl(tmp_path, "run", path)
    message = f"--output runs: {tmp_path / 'runs'} is a file or a broken link; name a folder"
    assert (completed.returncode, completed.stderr) == (2, f"qwenvl: {message}\n")


def test_missing_asset_and_wrong_digest(tmp_path: Path) -> None:
    (tmp_path / "right").write_bytes(b"abc")
    (tmp_path / "wrong").write_bytes(b"abd")
    (tmp_path / "unchecked").write_bytes(b"anything")
    # Digest of "abc" from FIPS 180-2.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assets = [
        {"name": "right", "path": "right", "sha256": digest},
        {"name": "unchecked", "path": "unchecked", "sha256": None},
        {"name": "wrong", "path": "wrong", "sha256": digest},
        {"name": "none", "path": "none", "why": "the weights"},
        {"name": "folder", "path": ".", "sha256": digest},
    ]
    completed = qwenvl(tmp_path, "run", write(tmp_path, recipe(assets=assets)))
    assert completed.returncode == 1
    assert completed.stderr.count("\n") == 1
    assert "asset right" not in completed.stderr
    assert "asset unchecked" not in completed.stderr
    assert f"asset wrong: {tmp_path}/wrong has sha256 " in completed.stderr
    assert f"asset none: {tmp_path}/none is missing (the weights)" in completed.stderr
    assert "is a folder and sha256 is for files" in completed.stderr
    assert not (tmp_path / "runs").exists()
    assert qwenvl(tmp_path, "run", write(tmp_path, recipe(assets=assets[:2]))).returncode == 0


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        ({"python": "<3"}, "requires python <3; this is 3."),
        ({"paddle": "<1"}, "requires paddle <1; "),
        ({"packages": ["pydantic<1"]}, "requires pydantic<1; installed is 2."),
        ({"packages": ["no-such-distribution-here>=1"]}, "it is not installed (pip install "),
        ({"memory_gib": 1e6}, "requires memory_gib 1e+06; this process may use "),
        ({"disk_gib": 1e9}, "requires disk_gib 1e+09; "),
    ],
)
def test_unmet_requirement(tmp_path: Path, requires: dict[str, object], expected: str) -> None:
    completed = qwenvl(tmp_path, "run", write(tmp_path, recipe(requires=requires)))
    assert (completed.returncode, completed.stderr.count("\n")) == (1, 1)
    assert completed.stderr.startswith("qwenvl: recipe fake cannot run here: requires ")
    assert expected in completed.stderr


def test_met_requirements(tmp_path: Path) -> None:
    requires = {"python": ">=3.9", "packages": ["pydantic>=2"], "memory_gib": 0.1, "disk_gib": 0.001}
    assert qwenvl(tmp_path, "run", write(tmp_path, recipe(requires=requires))).returncode == 0


def test_required_gpu(tmp_path: Path) -> None:
    """The requirement is met on a machine with a GPU, which the NVIDIA driver lists in /proc."""
    gpus = Path("/proc/driver/nvidia/gpus")
    has_gpu = gpus.is_dir() and any(gpus.iterdir())
    completed = qwenvl(tmp_path, "run", write(tmp_path, recipe(requires={"gpu": True})))
    assert (completed.returncode == 0) == has_gpu
    assert has_gpu or "requires gpu; the CUDA driver shows no device" in completed.stderr


def test_bench_repeats_its_step(tmp_path: Path) -> None:
    append = "import sys, time; open(sys.argv[1], 'a').write('x'); time.sleep(0.2)"
    data = recipe(
        steps=[step("once", "pass"), step("often", append, "${run_dir}/count")],
        bench={"step": "often", "repeat": 3, "warmup": 2},
    )
    completed = qwenvl(tmp_path, "run", write(tmp_path, data))
    assert completed.returncode == 0
    assert (run_folder(tmp_path) / "count").read_text() == "xxxxx"  # 2 warm-up runs and 3 measured runs
    bench = results(tmp_path)["bench"]
    assert (bench["step"], bench["repeat"], bench["warmup"], len(bench["seconds"])) == ("often", 3, 2, 3)
    assert bench["min_seconds"] == min(bench["seconds"]) >= 0.2
    assert bench["median_seconds"] == sorted(bench["seconds"])[1]
    assert results(tmp_path)["steps"][1]["seconds"] >= 1.0  # of all 5 runs
    assert "of 3)" in completed.stdout


def test_concurrent_runs_have_separate_folders(tmp_path: Path) -> None:
    path = write(tmp_path, recipe())
    processes = [start(tmp_path, "run", path) for _ in range(3)]
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nope"], "no recipe named 'nope'"),
        (["none.yaml"], "none.yaml: no such recipe file"),
        (["fake.yaml", "sed=1"], "override: sed: unknown key"),
        (["bad.yaml"], "bad.yaml: extra: unknown key"),
    ],
)
def test_usage_errors_exit_2_with_one_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    write(tmp_path, recipe())
    write(tmp_path, recipe(extra=1), "bad.yaml")
    completed = qwenvl(tmp_path, "run", *arguments)
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1)
    assert completed.stderr.startswith(f"qwenvl: {expected}")
    assert not (tmp_path / "runs").exists()
