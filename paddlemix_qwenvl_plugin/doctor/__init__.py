"""Diagnose an installation and name the fixes of its problems, where known.

Nothing here imports Paddle or an upstream: separate processes do, because such an import may raise, abort or hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.doctor import installation, machine, upstreams
from paddlemix_qwenvl_plugin.doctor.engine import check_engine, check_gpu_engine
from paddlemix_qwenvl_plugin.doctor.model import check_model
from paddlemix_qwenvl_plugin.doctor.probe import Answer, ask
from paddlemix_qwenvl_plugin.doctor.report import Check, Report
from paddlemix_qwenvl_plugin.upstream import pins

__all__ = ["Check", "Report", "examine"]


def examine(model: Optional[Path] = None, visible_gpus: Sequence[str] = ()) -> Report:
    """Run all checks.

    Args:
        model: model folder to check as well.
        visible_gpus: names of the GPUs visible to this process through the CUDA driver.

    Raises:
        UsageError: the model folder does not exist, or has no config.json or no weights.
    """
    model_checks = [check_model(model)] if model is not None else []
    has_paddle, has_ops = (upstreams.source_of(name) is not None for name in ("paddle", "paddlenlp_ops"))
    installed = [pinned.name for pinned in pins.load().upstreams if upstreams.source_of(pinned.name)]
    # Two probes in the pool and one from this thread at a time: each takes a core and half a gigabyte.
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(ask, "import_upstream", name) for name in installed}
        entry_points = pool.submit(ask, "entry_points", installation.DISTRIBUTION)
        paddle_answer = ask("paddle") if has_paddle else Answer({}, "not installed")
        gpu_answer = ask("gpu") if paddle_answer.value.get("gpu_build") else Answer({})
        ops_answer = ask("ops") if has_ops else Answer({})
    answers = {name: future.result() for name, future in futures.items()}

    versions = upstreams.installed_versions()
    broken = upstreams.broken_rows(versions)
    paddle_imports = paddle_answer.cause is None
    paddle = machine.check_paddle(versions, has_paddle, paddle_answer, has_fix=bool(broken))
    hooks = upstreams.check_hooks(answers)
    checks = [
        machine.check_python(),
        installation.check_plugin(),
        paddle,
        machine.check_gpu(paddle, gpu_answer, visible_gpus),
        check_engine(),
        check_gpu_engine(),
        *(
            upstreams.check_upstream(
                pinned, versions, answers.get(pinned.name, Answer({})), paddle_imports, has_fix=bool(broken)
            )
            for pinned in pins.load().upstreams
        ),
        *upstreams.check_combinations(broken, versions),
        hooks,
        upstreams.check_ops(ops_answer, paddle_imports, hooks),
        *installation.check_entry_points(entry_points.result(), paddle_imports),
        *model_checks,
    ]
    return Report(tuple(checks))
