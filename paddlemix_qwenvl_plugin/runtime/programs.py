"""Exported stages: checking their files, choosing engine or Paddle, opening programs in Paddle Inference."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from paddlemix_qwenvl_plugin.artifact.manifest import (
    FileDigest,
    Manifest,
    check_weights,
    params_path,
    read_manifest,
)
from paddlemix_qwenvl_plugin.artifact.params_file import check_records
from paddlemix_qwenvl_plugin.engine import operators
from paddlemix_qwenvl_plugin.engine.gpu import gpu_index
from paddlemix_qwenvl_plugin.engine.select import engine_available, engine_choice
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.machine import paddle_gpus
from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle
from paddlemix_qwenvl_plugin.util.threads import cpu_threads

_FORMS = (".json", ".pdmodel")

# Python exceptions that Paddle raises for C++ errors.
_PADDLE_ERRORS = (RuntimeError, ValueError, OSError, MemoryError, SystemError, IndexError)


class Stage:
    """An exported stage, whose weights have been checked against its manifest.

    Of a parameter file of more than 64 MiB, only the size and samples are checked. Exports before contract version 3
    have no digest of samples; the headers of their records are checked instead. Programs are checked by `open`.

    Args:
        path: the prefix, or the program file itself to choose its form (`.json` PIR, `.pdmodel` legacy).
        stage: "vision" or "language".
        device: "cpu", "gpu" or "gpu:N".

    Raises:
        UsageError: nothing was exported under the prefix, or the device does not exist or cannot run the stage.
        QwenVLError: the manifest or the parameter file is missing, damaged or not the exported one.
    """

    def __init__(self, path: str | Path, stage: str, device: str) -> None:
        self.prefix = stage_prefix(path)
        if not self.prefix.name:
            raise UsageError(f"{path}: must be the prefix of an exported {stage} stage, folder and file name")
        self._forms = _FORMS if self.prefix == Path(path) else (Path(path).suffix,)
        self.gpu = gpu_index(device)  # None: the CPU
        self.manifest: Manifest = read_manifest(self.prefix, stage)
        self.params = params_path(self.prefix)
        check_weights(self.params, self.manifest)
        if self.manifest.weights_samples is None:  # before contract version 3
            check_records(self.params)
        if self.gpu is not None and not self.engine:
            _check_paddle_gpu(self.gpu)

    @property
    def compute_dtype(self) -> str:
        """Compute type of the portable programs on this device."""
        return "float32" if self.gpu is None else self.manifest.dtype

    @functools.cached_property
    def engine(self) -> bool:
        """Whether the engine computes this stage; the engine is built now if necessary.

        Raises:
            UsageError, QwenVLError: the requested engine is unavailable.
        """
        return engine_available(self._choice(), gpu=self.gpu)

    def _choice(self) -> str:
        """The engine setting, "auto", "fused" or "portable"; quantized stages require "fused"."""
        choice, quant_type = engine_choice(), self.manifest.quant_type
        if quant_type is None:
            return choice
        if choice == "portable":
            raise UsageError(
                f"{self.prefix}: quantized weights ({quant_type}) need the engine, not QWENVL_ENGINE=portable"
            )
        return "fused"

    def open(self, suffix: str = "") -> Program:
        """Load the program PREFIX + suffix in Paddle Inference.

        Of the main program (no suffix), the version with the engine's operator is preferred if the stage has it and the
        engine is available. `.step` programs exist only as portable graphs.

        QwenVL opens programs only if the language stage's `engine` is false; upstream/stock_predictor.py opens one
        always.

        Raises:
            UsageError, QwenVLError: the program is missing, not the exported one, or cannot be loaded; or the engine is
                required and unavailable.
        """
        require_paddle()
        paddle_gpu = self.gpu
        target, before_run = "", None
        has_operator = not suffix and any(".fused." in name for name in self.manifest.programs)
        if has_operator and engine_available(self._choice(), operators=True, gpu=self.gpu):
            operators.load()
            before_run = functools.partial(operators.use_device, self.gpu)
            target = ".fused"
            paddle_gpu = None  # the operator's tensors are on the CPU, even if the engine runs on a GPU
        elif self.gpu is None and self.manifest.dtype != "float32":
            target = ".cpu"  # the program that computes in float32, for CPUs
        programs = [
            self.prefix.with_name(f"{self.prefix.name}{suffix}{target}{form}") for form in self._forms
        ]
        program = next((path for path in programs if path.is_file()), programs[0])
        expected = self.manifest.programs.get(program.name)
        if expected is None or not program.is_file():
            raise QwenVLError(f"{program}: missing; export again")
        if FileDigest.of(program) != expected:
            raise QwenVLError(
                f"{program}: not the program that {self.prefix.name}.manifest.json describes; export again"
            )
        predictor = _create_predictor(program, self.params, paddle_gpu)
        return Program(predictor, _place(paddle_gpu), before_run)


def stage_prefix(path: str | Path) -> Path:
    """The prefix of a stage's files, given the prefix or a program file."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in _FORMS else path


class Program:
    """A program loaded in Paddle Inference. Not thread-safe."""

    def __init__(self, predictor: Any, place: Any, before_run: Optional[Callable[[], None]] = None) -> None:
        self._predictor = predictor
        self._place = place
        self._before_run = before_run

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on NumPy arrays or Paddle tensors; the outputs are Paddle tensors that later runs do not overwrite.

        Raises:
            QwenVLError: Paddle Inference, or the engine in it, failed.
        """
        import paddle

        if self._before_run is not None:
            self._before_run()
        try:
            tensors = [
                paddle.to_tensor(value, place=self._place) if isinstance(value, np.ndarray) else value
                for value in inputs
            ]
            # Return copies: a run writes into the memory of the last run's outputs where they fit, even if the caller
            # passes those outputs as inputs, as it does with a KV cache.
            return [output.clone() for output in self._predictor.run(tensors)]
        except _PADDLE_ERRORS as error:
            raise QwenVLError(f"Paddle Inference failed ({_cause(error)})") from error

    def zeros(self, shape: list[int], dtype: str) -> Any:
        """Create a Paddle tensor of zeros on the program's device."""
        import paddle

        return paddle.zeros(shape, dtype=dtype).to(self._place)


def _check_paddle_gpu(index: int) -> None:
    require_paddle()
    import paddle

    if not paddle.is_compiled_with_cuda():
        raise UsageError(
            f"--device gpu:{index}: the portable graph runs in Paddle, and this one ({paddle.__version__}) is a "
            "CPU build; use the engine, or install paddlepaddle-gpu"
        )
    if index >= paddle_gpus():
        raise UsageError(f"--device gpu:{index}: Paddle sees {paddle_gpus()} GPU(s)")


def _place(gpu: Optional[int]) -> Any:
    import paddle

    return paddle.CPUPlace() if gpu is None else paddle.CUDAPlace(gpu)


def _create_predictor(program: Path, params: Path, gpu: Optional[int]) -> Any:
    from paddle import inference

    config = inference.Config(str(program), str(params))
    config.disable_glog_info()
    if gpu is None:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(cpu_threads())
        # Paddle 3.3 enables oneDNN by default, which fails on these graphs (zero-dimension reorders).
        name = "disable_onednn" if hasattr(config, "disable_onednn") else "disable_mkldnn"
        getattr(config, name)()
    else:
        config.enable_use_gpu(100, gpu)  # initial size of the GPU memory pool: 100 MB
    try:
        return inference.create_predictor(config)
    except _PADDLE_ERRORS as error:
        raise QwenVLError(f"{program}: Paddle Inference cannot load it ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """Extract the cause from a Paddle error: the engine's line, which contains "qwenvl: ", else the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        _, separator, message = line.partition("qwenvl: ")
        if separator:
            return re.sub(r" \(at \S+:\d+\)$", "", message)  # without the source location that Paddle appends
    return lines[-1] if lines else type(error).__name__
