"""Two networks in place of one: each pass asks the one for its noise level, as Wan 2.2's A14B models do.

Both see every finished chunk, each by a cache of its own, since keys and values of one mean nothing to the other. Where
a device has no room for both, the one that is asked takes the place of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from .config import CausalConfig, StepConfig, WanConfig
from .schedule import TIMESTEPS, FlowSchedule

HIGH, LOW = 0, 1  # places of the two in every pair
NAMES = ("high-noise", "low-noise")


class Experts:
    """A network for high noise and one for low noise, each called as `CausalWan.forward`.

    boundary: the share of noise at and above which the first is asked. bring: called with HIGH or LOW whenever that
    network is asked and the other one was before, and before the first pass; without it both lie where they are needed.
    """

    def __init__(self, high: Any, low: Any, boundary: float, *, bring: Callable[[int], None] | None = None) -> None:
        self.networks, self.boundary, self.bring = (high, low), boundary, bring
        self.at_hand: int | None = None  # which was asked last; None before the first pass

    @property
    def config(self) -> WanConfig:
        return self.networks[HIGH].config

    def index_at(self, timestep: float) -> int:
        """Return which network a pass at this timestep asks."""
        # a share as it is written, 0.9, is the quotient 900 / 1000 to the last bit, which 0.9 * 1000 need not be
        return HIGH if timestep / TIMESTEPS >= self.boundary else LOW

    def network(self, index: int) -> Any:
        """Return one of the two, ready to be asked."""
        if self.bring is not None and self.at_hand != index:
            self.bring(index)
        self.at_hand = index
        return self.networks[index]

    def in_turn(self) -> tuple[int, int]:
        """Return both in the order in which to ask them all: first the one at hand, so that one change is enough."""
        return (LOW, HIGH) if self.at_hand == LOW else (HIGH, LOW)


class TakingTurns:
    """Copies the weights of one of two networks to a device, and drops those of the other there: an Experts' `bring`.

    The weights themselves stay where they are, which may be a mapped file, so that nothing is ever copied back.
    """

    def __init__(self, networks: tuple[torch.nn.Module, torch.nn.Module], device: torch.device) -> None:
        self.device = device
        self.kept = [
            [(tensor, tensor.data) for tensor in (*network.parameters(), *network.buffers())] for network in networks
        ]

    def __call__(self, index: int) -> None:
        for tensor, stored in self.kept[1 - index]:  # first, so that there is room for the others
            tensor.data = stored
        for tensor, stored in self.kept[index]:
            tensor.data = stored.to(self.device)


def check_pair(high: WanConfig, low: WanConfig) -> None:
    """Raise ValueError for two networks that cannot take turns on the same latents and prompts."""
    different = [item.name for item in fields(WanConfig) if getattr(high, item.name) != getattr(low, item.name)]
    if different:
        values = ", ".join(f"{name} {getattr(high, name)} and {getattr(low, name)}" for name in different)
        raise ValueError(
            f"the high-noise and the low-noise network are of different sizes ({values}); give both of one release"
        )


def check_cache_source(causal: CausalConfig) -> None:
    """Raise ValueError for caches that only one of two networks would write."""
    if causal.cache_source == "last_step":
        raise ValueError(
            "cache_source last_step keeps what a chunk's last step wrote, which only one of two networks takes; use "
            "cache_source clean"
        )


def boundary_behind(steps: StepConfig, index: int) -> float:
    """Return the boundary for which step number `index` (from 0) is the first of the low-noise network.

    Raises ValueError where that leaves one of the two without a step.
    """
    if not 0 < index < len(steps.steps):
        raise ValueError(
            f"boundary step {index} leaves one of the two networks without a step; of {len(steps.steps)} steps it is "
            f"1 to {len(steps.steps) - 1}, the first of the low-noise network"
        )
    # just above that step, so that the boundary is its noise level and the step itself lies below
    return math.nextafter(FlowSchedule(steps).timesteps[index] / TIMESTEPS, 1.0)


def check_boundary(steps: StepConfig) -> None:
    """Raise ValueError where a boundary leaves one of the two networks without a step."""
    assert steps.boundary is not None
    shares = [timestep / TIMESTEPS for timestep in FlowSchedule(steps).timesteps]
    if not shares[-1] < steps.boundary <= shares[0]:
        side = LOW if steps.boundary <= shares[-1] else HIGH
        listed = ", ".join(f"{TIMESTEPS * share:.4g}" for share in shares)
        raise ValueError(
            f"boundary {steps.boundary:g} leaves the {NAMES[side]} network without a step: they are at {listed}; use "
            "another boundary, shift or steps"
        )
