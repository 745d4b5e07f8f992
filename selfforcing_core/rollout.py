"""The Self Forcing rollout (arXiv 2506.08009, algorithm 1): chunk by chunk, few denoising steps, a KV cache.

Sampler node, command line and trainer all call `rollout`. It yields one clean chunk at a time; whoever iterates decides
what to do with it, and may stop at any point. Nothing is read back from the device inside the loop.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import CausalConfig, StepConfig
from .geometry import chunk_lengths
from .guided import Guided
from .history import History, PromptAt
from .noise import CONTEXT, NoiseSource
from .schedule import FlowSchedule, add_noise, x0_from_flow
from .snapshot import Snapshot
from .solver import new_solver, num_noises


@dataclass(frozen=True)
class Chunk:
    """Clean latents [B, T, C, H, W], float32, of the frames from `start_frame` on. `is_given`: part of the prefix."""

    index: int
    start_frame: int
    latents_BTCHW: Tensor
    is_given: bool = False
    take: Callable[[torch.device | None], Snapshot] | None = field(default=None, repr=False, compare=False)

    def snapshot(self, device: torch.device | None = None) -> Snapshot:
        """The state right after this chunk, to go on from later; take it before asking for the next chunk.

        device: where its caches are copied to; the default is where they lie.
        """
        assert self.take is not None
        return self.take(device)


@dataclass(frozen=True)
class BackpropSpec:
    """What training changes in the rollout (Self Forcing, section 3.2 and algorithm 1).

    exit_steps: per generated chunk, the evaluation whose prediction is the chunk; only that one carries gradient.
    first_frame: chunks that start earlier carry none. context_sigma: noise mixed into a chunk before it enters the
    cache. With cache_source last_step a chunk enters as its last step would have seen it: with that step's noise.
    """

    exit_steps: Sequence[int]
    first_frame: int = 0
    context_sigma: float = 0.0


OnStep = Callable[[int, int], None]


def rollout(
    guided: Guided,
    *,
    noise: NoiseSource,
    latent_shape: tuple[int, int, int, int],
    causal: CausalConfig,
    steps: StepConfig,
    start: Tensor | Snapshot | None = None,
    commit_last: bool = False,
    on_step: OnStep | None = None,
    backprop: BackpropSpec | None = None,
    prompt_at: PromptAt | None = None,
) -> Generator[Chunk, bool | None, None]:
    """Generate a video chunk by chunk; yields the given chunks first, then each generated one.

    `send(True)` in place of `next` generates the last chunk once more and returns that: with what `noise` and
    `prompt_at` then give, in the place of the one before.

    A chunk that holds all frames is the bidirectional sampler: one pass per step, nothing is cached.

    latent_shape: (T, C, H, W) of the whole video. start: clean latents [B or 1, T, C, H, W] of the first frames, whole
    chunks; or a snapshot, to go on after the chunk where it was taken, and then only later chunks are yielded.
    commit_last: also write the last chunk into the cache. on_step(chunk, step) is called before every pass (step
    CONTEXT for cache passes) and may raise to stop. prompt_at(start_frame) is asked before every generated chunk and
    may return another prompt, which holds from there.

    Raises ValueError before the first pass if lengths, start or conditioning do not fit.
    """
    guided.check(latent_shape)
    lengths = chunk_lengths(latent_shape[0], causal.chunk, independent_first_frame=causal.independent_first_frame)
    snapshot, given_BTCHW = (start, None) if isinstance(start, Snapshot) else (None, start)
    num_given = _count_given(given_BTCHW, guided.batch, latent_shape, lengths)
    guided = guided.opened(latent_shape, causal, is_cached=len(lengths) > 1 or commit_last or snapshot is not None)
    history = None if prompt_at is None else History(guided, causal, lengths, prompt_at)
    first = 0 if snapshot is None else _resume(guided, history, snapshot, lengths)
    denoiser = _Denoiser(guided, FlowSchedule(steps), steps, causal, noise, latent_shape[1:], on_step, backprop)

    for index, (start_frame, end_frame) in list(enumerate(_spans(lengths)))[first:]:
        is_last = index + 1 == len(lengths)
        again: bool | None = True
        while again:
            if given_BTCHW is not None and index < num_given:
                made = _given_chunk(given_BTCHW[:, start_frame:end_frame], guided)
            else:
                if history is not None:
                    history.follow_prompt(start_frame, latent_shape)
                made = denoiser.chunk(index, index - num_given, start_frame, end_frame, is_last=is_last)
            is_committed = made.is_written or commit_last or not is_last
            if is_committed and not made.is_written:
                if on_step is not None:
                    on_step(index, CONTEXT)
                guided.commit(made.context_BTCHW, made.timestep, start_frame)
            if history is not None:
                history.add(start_frame, made.context_BTCHW, made.timestep)
            pending = None if is_committed else (made.context_BTCHW, made.timestep)
            take = functools.partial(_snapshot, guided, start_frame, end_frame, pending)
            again = yield Chunk(index, start_frame, made.latents_BTCHW, is_given=index < num_given, take=take)


@dataclass(frozen=True)
class _Made:
    """A chunk, and how it enters the cache: what is written, at which timestep, and whether that was done already."""

    latents_BTCHW: Tensor
    context_BTCHW: Tensor
    timestep: float
    is_written: bool


def _given_chunk(given_BTCHW: Tensor, guided: Guided) -> _Made:
    """Return a chunk of the given frames, one for each row, which enters the cache as it is."""
    clean = given_BTCHW.to(guided.device, torch.float32).expand(guided.batch, *[-1] * 4)
    return _Made(clean, clean, 0.0, is_written=False)


@dataclass(frozen=True)
class _Denoiser:
    """What stays the same from one denoised chunk to the next."""

    guided: Guided
    schedule: FlowSchedule
    steps: StepConfig
    causal: CausalConfig
    noise: NoiseSource
    frame_shape: tuple[int, int, int]
    on_step: OnStep | None
    backprop: BackpropSpec | None

    def chunk(self, index: int, generated: int, start_frame: int, end_frame: int, *, is_last: bool) -> _Made:
        """Return a chunk that is denoised from pure noise; `generated` counts those without the given ones."""
        schedule, causal, backprop = self.schedule, self.causal, self.backprop
        shape = (self.guided.batch, end_frame - start_frame, *self.frame_shape)
        exit_step = len(schedule.timesteps) - 1 if backprop is None else backprop.exit_steps[generated]
        x0_BTCHW, last_BTCHW = self._denoised(shape, index, start_frame, exit_step)
        context, timestep, is_written = x0_BTCHW.detach(), causal.context_noise, False
        if causal.cache_source == "last_step":  # the last pass has written its own keys, unless it carried gradient
            context, timestep, is_written = last_BTCHW, schedule.timesteps[-1], backprop is None
        sigma = self._context_sigma(exit_step)
        if sigma and not is_last:
            context = add_noise(x0_BTCHW.detach(), self.noise.draw(start_frame, CONTEXT, shape).to(x0_BTCHW), sigma)
        return _Made(x0_BTCHW, context, timestep, is_written)

    def _denoised(self, shape: tuple[int, ...], index: int, start_frame: int, exit_step: int) -> tuple[Tensor, Tensor]:
        """Return the clean latents that pass `exit_step` predicts, and what that pass saw."""
        # all of the chunk's noise before its first pass: copies to a device wait for what runs there
        count = num_noises(self.steps.solver, exit_step + 1)
        device = self.guided.device
        noises = [self.noise.draw(start_frame, step, shape).to(device, torch.float32) for step in range(count)]
        solver, x = new_solver(self.steps.solver, self.schedule, noises), noises[0]
        for step, timestep in enumerate(self.schedule.timesteps):
            if self.on_step is not None:
                self.on_step(index, step)
            is_exit = step == exit_step
            # algorithm 1: of all passes of a chunk only the one whose prediction is the chunk carries gradient
            with_gradient = self.backprop is not None and is_exit and start_frame >= self.backprop.first_frame
            flow = self.guided.flow(x, timestep, start_frame, with_gradient=with_gradient)
            if is_exit:
                return x0_from_flow(x, flow, self.schedule.sigmas[step]), x
            x = solver.advance(x, flow, step)
        raise AssertionError(f"exit step {exit_step} is not in a schedule of {len(self.schedule.timesteps)}")

    def _context_sigma(self, exit_step: int) -> float:
        """Return the noise that training mixes into a chunk before it enters the cache."""
        if self.backprop is None:
            return 0.0
        if self.causal.cache_source == "clean":
            return self.backprop.context_sigma
        return 0.0 if exit_step == len(self.schedule.timesteps) - 1 else self.schedule.sigmas[-1]


def _snapshot(
    guided: Guided,
    start_frame: int,
    end_frame: int,
    pending: tuple[Tensor, float] | None,
    device: torch.device | None,
) -> Snapshot:
    """Return the rollout's state after a chunk. pending: what the next chunk will write, and its timestep."""
    caches = [cache for cache in guided.caches if cache is not None]
    assert all(cache.start_frame == start_frame for cache in caches), "too late, the next chunk was already asked for"
    states = tuple(cache.snapshot(device) for cache in caches)
    return Snapshot(start_frame, end_frame, states, *(pending or (None, 0.0)))


def _resume(guided: Guided, history: History | None, snapshot: Snapshot, lengths: tuple[int, ...]) -> int:
    """Put caches and history where the snapshot was taken, and return the index of the next chunk."""
    ends = _ends(lengths)
    if snapshot.end_frame not in ends[:-1]:
        raise ValueError(
            f"the snapshot ends after latent frame {snapshot.end_frame}, but chunks of this video of {sum(lengths)} "
            f"frames end at {', '.join(map(str, ends))}; ask for a longer video of the same chunks"
        )
    if snapshot.caches and len(snapshot.caches) != len(guided.caches):
        raise ValueError(
            f"the snapshot was taken with {len(snapshot.caches)} conditions, this rollout has {len(guided.caches)}; "
            "resume with the same guidance"
        )
    for cache, state in zip(guided.caches, snapshot.caches):
        assert cache is not None
        cache.restore(state)
    if snapshot.pending_BTCHW is not None:
        guided.commit(snapshot.pending_BTCHW.to(guided.device), snapshot.pending_timestep, snapshot.start_frame)
    first = ends.index(snapshot.end_frame) + 1
    if history is not None:
        history.add_video(snapshot, lengths[:first])
    return first


def _ends(lengths: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(lengths))


def _spans(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the first frame of each chunk and the one behind its last."""
    return [(end - length, end) for length, end in zip(lengths, _ends(lengths))]


def _count_given(
    given_BTCHW: Tensor | None, batch: int, latent_shape: tuple[int, int, int, int], lengths: tuple[int, ...]
) -> int:
    """Return how many chunks are given. Raises ValueError unless they are whole, of the right size, and leave room."""
    if given_BTCHW is None:
        return 0
    frame_shape = latent_shape[1:]
    rows, frames = given_BTCHW.shape[:2]
    valid = _ends(lengths)[:-1]
    if frames not in valid:
        raise ValueError(
            f"a prefix of {frames} latent frames does not end where a chunk ends; this video of {sum(lengths)} "
            f"frames takes a prefix of {', '.join(map(str, valid)) or 'none'}"
        )
    if rows not in (1, batch) or tuple(given_BTCHW.shape[2:]) != frame_shape:
        raise ValueError(
            f"a prefix of shape {tuple(given_BTCHW.shape)} does not fit a batch of {batch} with frames of shape "
            f"{frame_shape}; encode it at the size of the video"
        )
    return valid.index(frames) + 1
