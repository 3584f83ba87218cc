"""Optimisers: Muon for most matrices, AdamW for all other parameters, with one cosine schedule.

Muon updates a matrix with its orthogonalised momentum (Jordan et al., 2024). A small model needs about half as many
steps as with AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration of Jordan et al.
_WARM_UP_STEPS = 100


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum 0.95; matrices of the same shape are orthogonalised together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters]
                momenta = [
                    self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    for parameter in parameters
                ]
                torch._foreach_lerp_(momenta, gradients, 0.05)
                steps = torch.stack(torch._foreach_lerp(gradients, momenta, 0.95))
                # A tall matrix gets larger steps, as in Jordan's implementation.
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(parameters, list(orthogonalised(steps).unbind()), alpha=-scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Orthogonalise matrices [N, rows, columns] by five Newton-Schulz steps in bfloat16: singular values near 1."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    is_wide = x.shape[1] <= x.shape[2]
    x = x if is_wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if is_wide else x.mT).to(matrices.dtype)


def optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Create Muon and AdamW.

    Args:
        lr: learning rate of AdamW; that of Muon is ten times as large.
    """
    muon_parameters, adamw_parameters = [], []
    for name, parameter in model.named_parameters():
        # Matrices of the decoder layers and of the vision blocks, and attn.in_proj_weight of the resampler.
        is_layer_matrix = parameter.dim() == 2 and (
            name.startswith("h.") or "resblocks" in name or "in_proj_w" in name
        )
        (muon_parameters if is_layer_matrix else adamw_parameters).append(parameter)
    is_cuda = next(model.parameters()).is_cuda
    adamw = torch.optim.AdamW(adamw_parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=is_cuda)
    return [Muon(muon_parameters, lr=10 * lr), adamw]


def schedule(step: int, progress: float) -> float:
    """Factor of the learning rate: a half cosine from 1 at `progress` 0 to 0.02 at 1, with a linear warm-up.

    Args:
        step: number of the step, from 0, for the warm-up.
        progress: completed share of the training, from 0.
    """
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * cosine
