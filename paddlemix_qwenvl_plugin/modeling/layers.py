"""Layers whose parameters have canonical tensor names (checkpoint/tensors.py).

They work in Paddle's dynamic mode (the reference) and static mode (export), where a parameter's name is fixed at
creation. Weights are loaded later, so parameters are created without random initialization.

Parameters have the storage type, to which `build` (weights.py) sets Paddle's default dtype, and activations the compute
type; a parameter of another type is cast at its use. A float16 export can therefore run on a CPU, for which Paddle has
no float16 kernels.
"""

from __future__ import annotations

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.modeling import ops


def parameter_attr(name: str) -> paddle.ParamAttr:
    """Attributes of a parameter: its name in the exported program, and zero as the initial value."""
    return paddle.ParamAttr(name=name, initializer=nn.initializer.Constant(0.0))


def cast_like(parameter: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """Cast a parameter to the dtype of the activation `x`."""
    return parameter if parameter.dtype == x.dtype else parameter.astype(x.dtype)


class Linear(nn.Layer):
    """Linear layer, […, n_in] -> […, n_out]; the weight is [n_out, n_in] as in the engine (csrc/)."""

    def __init__(self, name: str, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = self.create_parameter([n_out, n_in], attr=parameter_attr(f"{name}.weight"))
        self.bias = self.create_parameter([n_out], attr=parameter_attr(f"{name}.bias")) if bias else None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[…, n_in] -> […, n_out]."""
        product = ops.matmul(x, cast_like(self.weight, x), transpose_y=True)
        return product if self.bias is None else product + cast_like(self.bias, x)


class LayerNorm(nn.Layer):
    """LayerNorm over the last axis with statistics in float32, as PyTorch's half-precision kernels do."""

    def __init__(self, name: str, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = self.create_parameter([width], attr=parameter_attr(f"{name}.weight"))
        self.bias = self.create_parameter([width], attr=parameter_attr(f"{name}.bias"))
        self.width = width
        self.epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[…, width] -> […, width]."""
        normed = nn.functional.layer_norm(
            x.astype("float32"),
            [self.width],
            self.weight.astype("float32"),
            self.bias.astype("float32"),
            self.epsilon,
        )
        return normed.astype(x.dtype)


class RMSNorm(nn.Layer):
    """RMSNorm: x / sqrt(mean(x^2) + eps) in float32, cast back, then times the weight (order of Qwen)."""

    def __init__(self, name: str, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([width], attr=parameter_attr(f"{name}.weight"))
        self.epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[…, width] -> […, width]."""
        wide = x.astype("float32")
        scale = ops.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).astype(x.dtype) * cast_like(self.weight, x)


def attend(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, mask: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Attention: softmax(query @ key^T + mask) @ value. The query must be scaled; softmax runs in float32.

    Args:
        query: [B, heads, S, head_dim].
        key, value: [B, heads, T, head_dim].
        mask: float32, broadcast to [B, heads, S, T], 0 to attend, a large negative number to exclude.

    Returns:
        [B, S, heads * head_dim].
    """
    scores = ops.matmul(query, key, transpose_y=True).astype("float32")
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.softmax(scores, axis=-1).astype(value.dtype)
    mixed = ops.matmul(weights, value).transpose([0, 2, 1, 3])
    return mixed.flatten(2)
