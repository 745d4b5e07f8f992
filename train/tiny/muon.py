"""Muon (kellerjordan.github.io/posts/muon) in float32.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without native bfloat16 emulates slowly. The rule is the same,
with the update scaled to AdamW's size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose iteration drives singular values towards 1


def orthogonalise(matrix: Tensor, iterations: int = 4) -> Tensor:
    """Return the nearest semi-orthogonal matrix, roughly: singular values end near 1 (Newton-Schulz iteration)."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)  # the iteration converges for singular values up to 1, and their norm bounds them
    for _ in range(iterations):
        gram = x @ x.T  # of the shorter side: the products are cheaper
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised, for two-dimensional parameters."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                # Nesterov's form: the gradient is mixed in once more.
                update = orthogonalise(parameter.grad.lerp(state["momentum"], group["momentum"]))
                size = 0.2 * max(parameter.shape) ** 0.5  # the root mean square of a typical AdamW update
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)
