"""Chunks that are denoised together, each one step behind the one before it (Rolling Forcing, arXiv 2509.25161).

One pass takes all of them a step further. As many are on the way as there are steps, so that with every pass the oldest
one is finished and a new one, pure noise, comes in.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import CausalConfig, StepConfig
from .geometry import chunk_lengths, chunk_starts
from .guided import Guided
from .noise import NoiseSource
from .policy import cache_policy
from .schedule import FlowSchedule, x0_from_flow
from .snapshot import Snapshot
from .solver import Solver, new_solver, num_noises

AHEAD = "ahead"  # the name of chunks on the way in a snapshot
SOLVERS = ("renoise", "euler")  # of one network, and without a memory of their own that a snapshot would lack


def new_window(
    guided: Guided,
    causal: CausalConfig,
    steps: StepConfig,
    noise: NoiseSource,
    latent_shape: tuple[int, int, int, int],
    *,
    trains: bool,
) -> JointWindow | None:
    """Return the chunks on the way of a rollout, of which there are none yet; None under a policy of single chunks.

    Raises ValueError for what neither chunks that are denoised together nor a window computed again goes with.
    """
    policy = cache_policy(causal.policy)
    if trains and policy.recomputes:
        raise ValueError(
            f"policy {policy.name} computes its window again before every chunk, which training does not follow; train "
            "with another policy"
        )
    if not policy.is_joint:
        return None
    _check(guided, steps, causal, trains=trains)
    check_joint(causal, steps, latent_shape[0])
    lengths = chunk_lengths(latent_shape[0], causal.chunk, independent_first_frame=causal.independent_first_frame)
    return JointWindow(guided, FlowSchedule(steps.of_chunk(1)), steps.solver, noise, lengths, latent_shape[1:])


def _in_words(causal: CausalConfig, steps: StepConfig) -> str:
    return f"policy {cache_policy(causal.policy).name} denoises {len(steps.steps)} chunks together, one a step"


def _check(guided: Guided, steps: StepConfig, causal: CausalConfig, *, trains: bool) -> None:
    words = _in_words(causal, steps)
    if trains:
        raise ValueError(f"{words}, which training does not follow; train with another policy")
    if guided.num_networks > 1:
        raise ValueError(f"{words}, and of two networks each would be asked for some of them; use another policy")


def check_joint(causal: CausalConfig, steps: StepConfig, num_frames: int) -> None:
    """Raise ValueError for steps or a window that chunks which are denoised together do not go with.

    Under any other policy there is nothing to check.
    """
    if not cache_policy(causal.policy).is_joint:
        return
    words, count = _in_words(causal, steps), len(steps.steps)
    if steps.solver not in SOLVERS:
        raise ValueError(f"{words}, by solver {' or '.join(SOLVERS)}, not {steps.solver}; use one of them")
    if steps.first_chunk_steps is not None and len(steps.first_chunk_steps) != count:
        raise ValueError(
            f"{words}, so that the first one cannot have {len(steps.first_chunk_steps)} of its own; use as many"
        )
    least = count * causal.chunk + causal.sink
    if -1 < causal.window < min(num_frames, least):
        raise ValueError(
            f"{words}, and window {causal.window} has no room for {count * causal.chunk} frames and the sink; use "
            f"window -1 or {least} or more"
        )


@dataclass
class _OnTheWay:
    x_BTCHW: Tensor
    step: int  # that comes next
    solver: Solver


class JointWindow:
    """The chunks on the way, oldest first. lengths: of all chunks of the video."""

    def __init__(
        self,
        guided: Guided,
        schedule: FlowSchedule,
        solver: str,
        noise: NoiseSource,
        lengths: tuple[int, ...],
        frame_shape: tuple[int, ...],
    ) -> None:
        self.guided, self.schedule, self.solver, self.noise = guided, schedule, solver, noise
        self.frame_shape = frame_shape  # C, H, W
        self.lengths = dict(zip(chunk_starts(lengths), lengths))  # by first frame
        self.chunks: list[_OnTheWay] = []
        self.start_frame = 0  # of the oldest
        self.next_frame = 0  # of the chunk that comes in next
        self.unasked: list[int] = []  # first frames of chunks that came in before this rollout

    @property
    def has_room(self) -> bool:
        """Return whether another chunk comes in before the next pass."""
        return len(self.chunks) < len(self.schedule.timesteps) and self.next_frame in self.lengths

    @property
    def step(self) -> int:
        """Return the step that comes next for the oldest chunk."""
        return self.chunks[0].step

    def expect(self, start_frame: int) -> None:
        """Begin with this chunk if none is on the way. Raises ValueError if it was finished before."""
        if start_frame < self.start_frame:
            raise ValueError(
                "a policy that denoises chunks together makes none of them once more, since the later ones have seen "
                "it; generate it again with another policy"
            )
        if not self.chunks:
            self.start_frame = self.next_frame = start_frame

    def enter(self) -> None:
        """Let the next chunk in, pure noise, behind the others."""
        x_BTCHW, solver = self._drawn(self.next_frame)
        self.chunks.append(_OnTheWay(x_BTCHW, 0, solver))
        self.next_frame += x_BTCHW.shape[1]

    def advance(self) -> Tensor | None:
        """Take all of them a step further, in one pass; return the oldest one, clean, if that was its last step."""
        at_timesteps = [(chunk.x_BTCHW, self.schedule.timesteps[chunk.step]) for chunk in self.chunks]
        flow_BTCHW = self.guided.joint_flow(at_timesteps, self.start_frame)
        flows = flow_BTCHW.split([chunk.x_BTCHW.shape[1] for chunk in self.chunks], 1)
        finished_BTCHW: Tensor | None = None
        for chunk, flow in zip(list(self.chunks), flows):
            if chunk.step == len(self.schedule.timesteps) - 1:
                finished_BTCHW = x0_from_flow(chunk.x_BTCHW, flow, self.schedule.sigmas[chunk.step])
                self.start_frame += self.chunks.pop(0).x_BTCHW.shape[1]
            else:
                chunk.x_BTCHW = chunk.solver.advance(chunk.x_BTCHW, flow, chunk.step)
                chunk.step += 1
        return finished_BTCHW

    def latents(self) -> dict[str, Tensor]:
        """Return what a snapshot needs to go on with the chunks on the way, by name."""
        return {AHEAD: torch.cat([chunk.x_BTCHW for chunk in self.chunks], 1)} if self.chunks else {}

    def steps(self) -> tuple[int, ...]:
        """Return the step that comes next for each chunk on the way."""
        return tuple(chunk.step for chunk in self.chunks)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on with the chunks of a snapshot. Raises ValueError if this video has other chunks or steps."""
        ahead_BTCHW, steps = snapshot.latents.get(AHEAD), snapshot.steps_ahead
        if ahead_BTCHW is None:
            return
        starts = [start for start in self.lengths if start >= snapshot.end_frame][: len(steps)]
        lengths = [self.lengths[start] for start in starts]
        if len(lengths) < len(steps) or sum(lengths) != ahead_BTCHW.shape[1]:
            raise ValueError(
                f"the snapshot holds {ahead_BTCHW.shape[1]} frames of {len(steps)} chunks that were begun, for which "
                f"this video has {sum(lengths)} in {len(lengths)}; ask for a longer video of the same chunks"
            )
        if max(steps) >= len(self.schedule.timesteps):
            raise ValueError(
                f"the snapshot holds a chunk that takes step {max(steps) + 1} next, and this rollout has "
                f"{len(self.schedule.timesteps)}; resume with the steps it was saved with"
            )
        self.start_frame, self.next_frame = snapshot.end_frame, snapshot.end_frame + sum(lengths)
        self.unasked = starts
        for start, x_BTCHW, step in zip(starts, ahead_BTCHW.to(self.guided.device).split(lengths, 1), steps):
            self.chunks.append(_OnTheWay(x_BTCHW, step, self._drawn(start)[1]))

    def _drawn(self, start_frame: int) -> tuple[Tensor, Solver]:
        """Return what a chunk starts from, and its solver with all of its later noise."""
        # all of it before the first pass: copies to a device wait for what runs there
        shape = (self.guided.batch, self.lengths[start_frame], *self.frame_shape)
        count = num_noises(self.solver, len(self.schedule.timesteps))
        device = self.guided.device
        noises = [self.noise.draw(start_frame, step, shape).to(device, torch.float32) for step in range(count)]
        return noises[0], new_solver(self.solver, self.schedule, noises)
