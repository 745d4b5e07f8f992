"""Flow-matching arithmetic: x_t = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0.

Timesteps are on the 0-1000 scale. Two rules turn a timestep into sigma: "exact" is t / 1000; "table" is the nearest
entry of the reference's 1000-entry shifted table, in which t = 0 does not exist (Self Forcing, FlowMatchScheduler).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .config import StepConfig

TIMESTEPS = 1000.0


def shift_sigma(sigma: float | Tensor, shift: float) -> float | Tensor:
    """Move sigma in [0, 1] towards noise: shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """Inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


@functools.cache
def sigma_table(shift: float, num_steps: int = 1000) -> Tensor:
    """Falling sigmas [num_steps], float64, from 1 down to one step above 0, shifted."""
    base = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return shift_sigma(base, shift)  # type: ignore[return-value]


def nearest_sigma(timestep: Tensor, table: Tensor) -> Tensor:
    """Entries of `table` nearest to each timestep (ties: first), float64, same shape as `timestep`."""
    table = table.to(timestep.device)
    distance = (timestep.double()[..., None] - table * TIMESTEPS).abs()
    return table[distance.argmin(-1)]


def training_weights(shift: float) -> Tensor:
    """Bell-shaped loss weight [1000] per table entry, mean 1 (Self Forcing, FlowMatchScheduler)."""
    timesteps = sigma_table(shift) * TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - TIMESTEPS / 2) / TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (len(bell) / bell.sum())


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_t from clean data and noise; a tensor sigma broadcasts from the left."""
    sigma = _like(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def x0_from_flow(noisy: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """Clean data implied by a flow prediction."""
    return noisy - _like(sigma, noisy) * flow


def flow_from_x0(noisy: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """Flow implied by a clean-data prediction; sigma must be positive. Divides in float64."""
    sigma = sigma.double() if isinstance(sigma, Tensor) else sigma
    return ((noisy.double() - x0.double()) / _like(sigma, noisy)).to(noisy.dtype)


def euler_step(noisy: Tensor, flow: Tensor, sigma: float | Tensor, next_sigma: float | Tensor) -> Tensor:
    """One Euler step of the probability-flow equation from sigma to next_sigma."""
    return noisy + flow * _like(next_sigma - sigma, noisy)


def _like(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """Append axes to a tensor sigma until it broadcasts against x."""
    if not isinstance(sigma, Tensor):
        return sigma
    dtype = sigma.dtype if sigma.dtype == torch.float64 and x.dtype == torch.float64 else x.dtype
    return sigma.to(device=x.device, dtype=dtype).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


class FlowSchedule:
    """A few-step schedule as host floats, so that a sampling loop never reads a tensor.

    timesteps: the listed steps, warped through the shift when asked, noisiest first. sigmas: their noise levels by the
    schedule's rule.
    """

    def __init__(self, steps: StepConfig) -> None:
        self.timesteps = tuple(
            TIMESTEPS * float(shift_sigma(step / TIMESTEPS, steps.shift)) if steps.warp else float(step)
            for step in steps.steps
        )
        self.sigmas = tuple(timestep / TIMESTEPS for timestep in self.timesteps)
        if steps.sigma == "table":
            listed = torch.tensor(self.timesteps, dtype=torch.float64)
            self.sigmas = tuple(nearest_sigma(listed, sigma_table(steps.shift)).tolist())
