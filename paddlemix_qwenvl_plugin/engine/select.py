"""Whether the engine is used: what the user asked for, and what this machine can do."""

from __future__ import annotations

from typing import Optional

from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.machine import paddle_gpus
from paddlemix_qwenvl_plugin.util.notice import notice


def engine_choice(asked: Optional[str] = None) -> str:
    """ "auto", "fused" or "portable": what a flag says, else QWENVL_ENGINE, else auto.

    Raises:
        UsageError: another word.
    """
    return env.ENGINE.read() if asked is None else env.ENGINE.check(asked, "--engine")


def engine_available(choice: str, operators: bool = False, gpu: Optional[int] = None) -> bool:
    """Whether to use the engine, which is built now if need be. Says so where "auto" has to do without.

    Args:
        choice: what `engine_choice` gave.
        operators: its operators for Paddle are needed as well.
        gpu: on which GPU; None: on the CPU.

    Raises:
        QwenVLError: the engine cannot be built, and "fused" was asked for, or a GPU that this Paddle does not use.
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
        notice(f"{error}. Going on with the portable graph")
        return False
    return True
