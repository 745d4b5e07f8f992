"""How a sampler gets from one noise level to the next, once the network has spoken.

Each solver belongs to one chunk of one rollout. The last evaluation is the same for all of them: its prediction of the
clean latents is the result.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import FEW_STEP_SOLVERS
from .schedule import TIMESTEPS, FlowSchedule, add_noise, euler_step, x0_from_flow
from .versions import OPTIONAL, refusal


class Solver(Protocol):
    """What takes a chunk from one noise level to the next."""

    def advance(self, noisy_BTCHW: Tensor, flow_BTCHW: Tensor, step: int) -> Tensor:
        """Take a chunk from the noise level of evaluation `step`, which predicted the flow, to that of the next."""
        ...


class Renoise:
    """Clean latents predicted, then noised afresh to the next level (Self Forcing, algorithm 1).

    Distilled few-step models know no other way: they predict a clean video at once, and each new noise lets them
    mend what the last prediction got wrong (consistency models, arXiv 2303.01469, algorithm 1).
    """

    def __init__(self, schedule: FlowSchedule, noises: Sequence[Tensor]) -> None:
        self.schedule, self.noises = schedule, noises

    def advance(self, noisy_BTCHW: Tensor, flow_BTCHW: Tensor, step: int) -> Tensor:
        # noise number 0 is what the chunk started from
        x0 = x0_from_flow(noisy_BTCHW, flow_BTCHW, self.schedule.sigmas[step])
        return add_noise(x0, self.noises[step + 1].to(x0), self.schedule.sigmas[step + 1])


class Phased(Renoise):
    """Renoise of two experts, of which the one for high noise predicts latents at the boundary, not clean ones.

    Each network is a consistency model of its own part of the schedule, as in phased consistency models (arXiv
    2405.18407); so CausalWan 2.2 is sampled (FastVideo, causal_denoising.py): above the boundary fresh noise is added
    to the latents there, and the low-noise network begins with those latents as they are.
    """

    def advance(self, noisy_BTCHW: Tensor, flow_BTCHW: Tensor, step: int) -> Tensor:
        boundary, sigma, next_sigma = self.schedule.boundary, *self.schedule.sigmas[step : step + 2]
        assert boundary is not None
        if sigma < boundary:
            return super().advance(noisy_BTCHW, flow_BTCHW, step)
        x_BTCHW = euler_step(noisy_BTCHW, flow_BTCHW, sigma, boundary)
        if next_sigma < boundary:
            return x_BTCHW
        # of the noise at the next level, what the latents at the boundary do not hold already; variances add up
        share = (1 - next_sigma) / (1 - boundary)
        return share * x_BTCHW + math.sqrt(next_sigma**2 - (share * boundary) ** 2) * self.noises[step + 1].to(x_BTCHW)


class Euler:
    """First-order steps along the probability-flow equation."""

    def __init__(self, schedule: FlowSchedule) -> None:
        self.schedule = schedule

    def advance(self, noisy_BTCHW: Tensor, flow_BTCHW: Tensor, step: int) -> Tensor:
        # no noise on the way: where a chunk starts decides where it ends
        return euler_step(noisy_BTCHW, flow_BTCHW, self.schedule.sigmas[step], self.schedule.sigmas[step + 1])


class UniPC:
    """Second-order predictor and corrector (UniPC, arXiv 2302.04867), as implemented by diffusers; Wan's own default.

    It remembers earlier predictions, which is why every chunk has one of its own.
    """

    def __init__(self, schedule: FlowSchedule) -> None:
        if reason := refusal("solver 'unipc' needs", {"diffusers": OPTIONAL["diffusers"]}):
            raise ValueError(f"{reason}, or use solver 'euler'")
        try:
            from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
        except ImportError as error:
            raise ValueError(
                f"solver 'unipc' needs the package diffusers ({error}); install it, or use solver 'euler'"
            ) from error
        self.scheduler: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        )
        self.scheduler.set_timesteps(len(schedule.sigmas))
        # In place of its own, since diffusers 0.36 takes no list. Below 1, since it computes log(1 - sigma).
        sigmas = torch.tensor(schedule.sigmas, dtype=torch.float64).clamp(max=1 - 1e-6)
        self.scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)]).float()
        self.scheduler.timesteps = (sigmas * TIMESTEPS).long()  # whole numbers, as its own are
        self.scheduler.set_begin_index(0)

    def advance(self, noisy_BTCHW: Tensor, flow_BTCHW: Tensor, step: int) -> Tensor:
        timestep = self.scheduler.timesteps[step]
        moved = self.scheduler.step(flow_BTCHW, timestep, noisy_BTCHW, return_dict=False)[0]
        return moved.to(torch.float32)


def num_noises(name: str, evaluations: int) -> int:
    """Return how many noises a solver takes for a chunk of this many evaluations, the one it starts from included."""
    # fresh noise before every evaluation, or one that all of them follow
    return evaluations if name in FEW_STEP_SOLVERS else 1


def new_solver(name: str, schedule: FlowSchedule, noises: Sequence[Tensor]) -> Solver:
    """Return a solver for one chunk, given its noises (see `num_noises`). Raises ValueError without its library."""
    if name == "renoise":
        return Renoise(schedule, noises)
    if name == "phased":
        return Phased(schedule, noises)
    return UniPC(schedule) if name == "unipc" else Euler(schedule)
