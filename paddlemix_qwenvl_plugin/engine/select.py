"""Choice between the engine and the portable graph, by the user's setting and the machine."""

from __future__ import annotations

from typing import Optional

from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.machine import paddle_gpus
from paddlemix_qwenvl_plugin.util.notice import notice


def engine_choice(setting: Optional[str] = None) -> str:
    """The engine setting, "auto", "fused" or "portable": from a flag, else QWENVL_ENGINE, else "auto".

    Raises:
        UsageError: any other value.
    """
    return env.ENGINE.read() if setting is None else env.ENGINE.check(setting, "--engine")


def engine_available(choice: str, operators: bool = False, gpu: Optional[int] = None) -> bool:
    """Whether to use the engine, which is built now if necessary; with "auto", a fallback prints a notice.

    Args:
        choice: the result of `engine_choice`.
        operators: also require its operators for Paddle.
        gpu: index of the GPU; None: the CPU.

    Raises:
        UsageError, QwenVLError: the engine cannot use the GPU or cannot be built, and no fallback exists: the setting
            is "fused", or this Paddle cannot use the GPU.
    """
    if choice == "portable":
        return False
    from paddlemix_qwenvl_plugin.engine.build import library, operators_library
    from paddlemix_qwenvl_plugin.engine.gpu import load

    try:
        if gpu is not None:
            load(gpu)
        operators_library() if operators else library()
    except QwenVLError as error:
        if choice == "fused" or (gpu is not None and paddle_gpus() <= gpu):
            raise
        notice(f"{error}. Falling back to the portable graph")
        return False
    return True
