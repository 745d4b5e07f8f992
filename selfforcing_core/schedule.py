"""Flow-matching arithmetic: x_t = (1 - sigma) x0 + sigma noise, and the network predicts flow = noise - x0.

Sigma is the share of noise: 0 clean, 1 pure noise (rectified flow, arXiv 2209.03003). A shift above 1 moves a schedule
towards noise, since in a larger video as much noise hides less (Stable Diffusion 3, arXiv 2403.03206).

Timesteps are on the 0-1000 scale. Two rules turn a timestep into sigma: "exact" is t / 1000; "table" is the nearest
entry of the reference's 1000-entry shifted table, in which t = 0 does not exist (Self Forcing, FlowMatchScheduler).
A step of exactly 0 has the table's last entry under either rule: at sigma 0 its pass could change nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .config import StepConfig

TIMESTEPS = 1000.0  # the network was trained with sigma times 1000 as its timestep


def shift_sigma(sigma: float | Tensor, shift: float) -> float | Tensor:
    """Move sigma in [0, 1] towards noise: shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """Invert `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


@functools.cache
def sigma_table(shift: float, num_steps: int = 1000) -> Tensor:
    """Return falling sigmas [num_steps], float64, from 1 down to one step above 0, shifted."""
    # one entry more than asked for, and the last one, which is 0, left out (the reference's extra_one_step)
    base = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return shift_sigma(base, shift)  # type: ignore[return-value]


def least_sigma(shift: float) -> float:
    """Return the last entry of the table: the noise that a pass at timestep 0 is taken to see."""
    return float(sigma_table(shift)[-1])


def nearest_sigma(timestep: Tensor, table: Tensor) -> Tensor:
    """Return the entry of `table` nearest to each timestep (of two, the first), float64, in the shape of `timestep`."""
    table = table.to(timestep.device)
    distance = (timestep.double()[..., None] - table * TIMESTEPS).abs()
    return table[distance.argmin(-1)]


def training_weights(shift: float) -> Tensor:
    """Return a bell-shaped loss weight [1000] per table entry, mean 1 (Self Forcing, FlowMatchScheduler)."""
    timesteps = sigma_table(shift) * TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - TIMESTEPS / 2) / TIMESTEPS) ** 2)
    bell = bell - bell.min()  # which leaves 0 for pure noise, the end of the table
    return bell * (len(bell) / bell.sum())


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Mix clean data with noise to x_t; a tensor sigma broadcasts from the left."""
    sigma = _like(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def x0_from_flow(noisy: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the clean data that a flow prediction implies."""
    # (1 - sigma) x0 + sigma noise - sigma (noise - x0) = x0
    return noisy - _like(sigma, noisy) * flow


def flow_from_x0(noisy: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the flow that a clean-data prediction implies; sigma must be positive. Divides in float64."""
    # the difference of two nearly equal numbers where there is little noise, and then divided by little
    sigma = sigma.double() if isinstance(sigma, Tensor) else sigma
    return ((noisy.double() - x0.double()) / _like(sigma, noisy)).to(noisy.dtype)


def euler_step(noisy: Tensor, flow: Tensor, sigma: float | Tensor, next_sigma: float | Tensor) -> Tensor:
    """Take an Euler step of the probability-flow equation, dx / dsigma = flow, from sigma to next_sigma."""
    return noisy + flow * _like(next_sigma - sigma, noisy)


def _like(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """Append axes to a tensor sigma until it broadcasts against x."""
    if not isinstance(sigma, Tensor):
        return sigma
    dtype = sigma.dtype if sigma.dtype == torch.float64 and x.dtype == torch.float64 else x.dtype
    return sigma.to(device=x.device, dtype=dtype).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


class FlowSchedule:
    """A schedule as floats of Python, so that a sampling loop never reads a tensor: `steps` of a config alone.

    A last step of 0 tells the network that its input is clean, and leaves that the least noise of the table (Krea
    Realtime, whose scheduler looks sigma up there).
    """

    def __init__(self, steps: StepConfig) -> None:
        # the listed steps, warped through the shift when asked, noisiest first; and below, their noise levels
        self.timesteps = tuple(
            TIMESTEPS * float(shift_sigma(step / TIMESTEPS, steps.shift)) if steps.warp else float(step)
            for step in steps.steps
        )
        self.sigmas = tuple(
            timestep / TIMESTEPS if timestep else least_sigma(steps.shift) for timestep in self.timesteps
        )
        self.boundary = steps.boundary  # of two experts
        if steps.solver == "phased" and steps.boundary is None:
            raise ValueError("solver 'phased' is for two networks that take turns, and needs their boundary, as 0.875")
        if steps.sigma == "table":
            listed = torch.tensor(self.timesteps, dtype=torch.float64)
            self.sigmas = tuple(nearest_sigma(listed, sigma_table(steps.shift)).tolist())
        if steps.is_whole:
            self.timesteps = tuple(float(int(timestep)) for timestep in self.timesteps)
