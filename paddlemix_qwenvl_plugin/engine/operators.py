"""The engine's operators for Paddle: registration in this process, and calls in PIR and legacy programs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Optional

from paddlemix_qwenvl_plugin.engine.build import operators_library
from paddlemix_qwenvl_plugin.engine.gpu import gpu_index
from paddlemix_qwenvl_plugin.engine.gpu import load as load_gpu
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.threads import cpu_threads


@functools.cache
def load() -> ctypes.CDLL:
    """Load the operators' library, built now if necessary, and register its operators with Paddle.

    If QWENVL_DEVICE names a GPU, also load the engine's part for GPUs, which the operators use until `use_device` sets
    another device.

    Raises:
        QwenVLError: a library cannot be built, or the GPU cannot be used.
    """
    from paddle.base import core
    from paddle.base.framework import OpProtoHolder, get_all_op_protos

    path = operators_library()
    core.load_op_meta_info_and_register_op(str(path))
    # Legacy programs look operators up in this table. It is updated directly, because the arguments of Paddle's method
    # for it differ between versions.
    protos = OpProtoHolder.instance().op_proto_map
    protos.update({proto.type: proto for proto in get_all_op_protos() if proto.type not in protos})
    library = ctypes.CDLL(str(path))
    library.qwenvl_set_threads.restype, library.qwenvl_set_threads.argtypes = None, [ctypes.c_int32]
    library.qwenvl_set_threads(cpu_threads())
    library.qwenvl_set_gpu.restype, library.qwenvl_set_gpu.argtypes = None, [ctypes.c_int32]
    device = env.DEVICE.read()
    gpu = gpu_index(device, env.DEVICE.name) if device else None
    if gpu is not None:
        load_gpu(gpu)
    return library


def use_device(gpu: Optional[int]) -> None:
    """Set the GPU on which operators create engines from now on; None: the CPU."""
    load().qwenvl_set_gpu(-1 if gpu is None else gpu)


def call(name: str, inputs: dict[str, Any], attributes: dict[str, Any], outputs: Sequence[str]) -> list[Any]:
    """Run an operator, or append it to the program under construction.

    Args:
        inputs: values by name, in the order of the operator's declaration; `weights` is a list of tensors.
        attributes: values by name, in the order of the operator's declaration.
        outputs: names, in the order of the operator's declaration.
    """
    from paddle import _C_ops
    from paddle.base.layer_helper import LayerHelper
    from paddle.framework import in_dynamic_or_pir_mode

    load()
    if in_dynamic_or_pir_mode():
        result = _C_ops._run_custom_op(  # type: ignore[attr-defined]
            name, *inputs.values(), *attributes.values()
        )
        return list(result) if isinstance(result, (list, tuple)) else [result]
    helper = LayerHelper(name)
    # float32 is a placeholder: append_op sets the dtypes that the operator infers.
    variables = [helper.create_variable_for_type_inference("float32") for _ in outputs]
    # Custom operators declare a list of tensors with this suffix.
    declared = {f"{key}@VECTOR" if isinstance(value, list) else key: value for key, value in inputs.items()}
    helper.append_op(type=name, inputs=declared, outputs=dict(zip(outputs, variables)), attrs=attributes)
    return variables
