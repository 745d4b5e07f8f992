"""The Self Forcing rollout (arXiv 2506.08009, algorithm 1): chunk by chunk, few denoising steps, a KV cache.

Sampler node, command line and trainer all call `rollout`. It yields one clean chunk at a time; whoever iterates decides
what to do with it, and may stop at any point. Nothing is read back from the device inside the loop.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .conditioning import Conditioning
from .config import CausalConfig, StepConfig
from .geometry import chunk_lengths
from .kv_cache import KVCache
from .prompt_schedule import HISTORIES, seed_at
from .schedule import FlowSchedule, add_noise, x0_from_flow
from .snapshot import Snapshot
from .solver import new_solver, num_noises

CONTEXT = -1  # the `step` under which a noise source is asked for context noise


class NoiseSource(Protocol):
    """Where all Gaussian noise of a rollout comes from."""

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, T, C, H, W] for the chunk at `start_frame`: before evaluation `step`, or CONTEXT."""
        ...


class SeededNoise:
    """Noise that depends on seed, batch row, chunk and step alone, drawn on the CPU in float32.

    Neither the device nor the batch size nor what was generated before changes a row's video. first_frame: where in
    the whole video frame 0 of the rollout lies, so that a rollout over its later part repeats no noise of the earlier.
    """

    def __init__(self, seed: int, first_row: int = 0, first_frame: int = 0) -> None:
        self.seed, self.first_row, self.first_frame = seed, first_row, first_frame

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        rows = range(self.first_row, self.first_row + shape[0])
        return torch.stack([self._draw_row(row, self.first_frame + start_frame, step, shape[1:]) for row in rows])

    def _draw_row(self, row: int, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        key = f"{self.seed}/{row}/{start_frame}/{step}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class ScheduledNoise:
    """Noise whose seed changes on the way. seeds: by the latent frame from which each holds; else it is `own`."""

    def __init__(self, own: NoiseSource, seeds: Mapping[int, int], of: Callable[[int], NoiseSource]) -> None:
        self.own, self.seeds, self.of = own, seeds, of

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        seed = seed_at(self.seeds, start_frame)
        return (self.own if seed is None else self.of(seed)).draw(start_frame, step, shape)


class GivenNoise:
    """Recorded noise: a mapping from (start_frame, step) to a tensor [B, T, C, H, W]."""

    def __init__(self, draws: Mapping[tuple[int, int], Tensor]) -> None:
        self.draws = draws

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        noise = self.draws[start_frame, step]
        assert tuple(noise.shape) == tuple(shape), f"recorded noise {tuple(noise.shape)}, wanted {tuple(shape)}"
        return noise


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
class GradientPlan:
    """What training changes in the rollout (Self Forcing, section 3.2 and algorithm 1).

    exit_steps: per generated chunk, the evaluation whose prediction is the chunk; only that one carries gradient.
    first_frame: chunks that start earlier carry none. context_sigma: noise mixed into a chunk before it enters the
    cache. With cache_source last_step a chunk enters as its last step would have seen it: with that step's noise.
    """

    exit_steps: Sequence[int]
    first_frame: int = 0
    context_sigma: float = 0.0


@dataclass(frozen=True)
class PromptChange:
    """Another prompt from here on, and what becomes of the frames so far.

    history: "recode" writes those in the window into the cache again under the new prompt (LongLive, arXiv
    2509.22622), "keep" leaves them as they are. Raises ValueError for any other word.
    """

    conditioning: Conditioning
    history: str = "recode"

    def __post_init__(self) -> None:
        if self.history not in HISTORIES:
            raise ValueError(f"history {self.history!r} is unknown; use {' or '.join(HISTORIES)}")


OnStep = Callable[[int, int], None]
PromptAt = Callable[[int], "PromptChange | None"]


def rollout(
    model: Any,
    conditioning: Conditioning,
    *,
    noise: NoiseSource,
    latent_shape: tuple[int, int, int, int],
    causal: CausalConfig,
    steps: StepConfig,
    prefix_BTCHW: Tensor | None = None,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
    caches: Sequence[KVCache] | None = None,
    commit_last: bool = False,
    on_step: OnStep | None = None,
    gradient: GradientPlan | None = None,
    resume: Snapshot | None = None,
    prompt_at: PromptAt | None = None,
) -> Generator[Chunk, bool | None, None]:
    """Generate a video chunk by chunk; yields the prefix's chunks first, then each generated one.

    `send(True)` in place of `next` generates the last chunk once more and returns that: with what `noise` and
    `prompt_at` then give, in the place of the one before.

    A chunk that holds all frames is the bidirectional sampler: one pass per step, nothing is cached.

    model: called as `CausalWan.forward`. latent_shape: (T, C, H, W) of the whole video, prefix included.
    prefix_BTCHW: clean latents of the first frames, whole chunks, batch 1 or B. negative, guidance: classifier-free
    guidance, negative + guidance * (positive - negative), each with a cache of its own; 1 leaves the negative out.
    caches: from `new_caches`, to reuse; they are reset. commit_last: also write the last chunk into the cache.
    on_step(chunk, step) is called before every evaluation (step CONTEXT for cache passes) and may raise to stop.
    resume: go on after the chunk where it was taken; only later chunks are yielded.
    prompt_at(start_frame) is asked before every generated chunk and may return another prompt, which holds from there.

    Raises ValueError before the first network call if lengths, prefix, conditioning or snapshot do not fit.
    """
    conditions = [conditioning] if negative is None or guidance == 1 else [conditioning, negative]
    for condition in conditions:
        condition.check(model.config, latent_shape)
    batch, (num_frames, *frame_shape) = conditioning.prompt_embeds_BPE.shape[0], latent_shape
    lengths = chunk_lengths(num_frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    prefix_frames = _check_prefix(prefix_BTCHW, batch, tuple(frame_shape), lengths)
    schedule = FlowSchedule(steps)
    is_cached = len(lengths) > 1 or commit_last or resume is not None or caches is not None
    if is_cached and caches is None:
        caches = new_caches(model, conditioning, len(conditions), latent_shape, causal)
    call = _Calls(model, conditions, guidance, [None] * len(conditions) if caches is None else list(caches))
    call.reset()
    past = None if prompt_at is None else _History(call, causal, lengths)
    first = 0 if resume is None else _resume(call, resume, lengths, prefix_frames)
    if resume is not None and past is not None:
        past.add_video(resume, lengths[:first], causal)

    start = sum(lengths[:first])
    for index, length in list(enumerate(lengths))[first:]:
        is_last = start + length == num_frames
        is_given = start < prefix_frames
        again: bool | None = True
        while again:
            if is_given:
                assert prefix_BTCHW is not None
                x0 = prefix_BTCHW[:, start : start + length].to(call.device, torch.float32).expand(batch, *[-1] * 4)
                context, timestep, is_written = x0, 0.0, False
            else:
                if prompt_at is not None and (change := prompt_at(start)) is not None:
                    change.conditioning.check(model.config, latent_shape)
                    call.change_prompt(change, past, start)
                shape = (batch, length, *frame_shape)
                generated = index - sum(1 for end in _ends(lengths) if end <= prefix_frames)
                exit_step = len(schedule.timesteps) - 1 if gradient is None else gradient.exit_steps[generated]
                x0, last_x = _denoise_chunk(
                    call, schedule, steps, noise, shape, index, start, on_step, gradient, exit_step
                )
                context, timestep, is_written = x0.detach(), causal.context_noise, False
                if causal.cache_source == "last_step":
                    context, timestep, is_written = last_x, schedule.timesteps[-1], gradient is None
                sigma = _context_sigma(causal, schedule, gradient, exit_step)
                if sigma and not is_last:
                    context = add_noise(x0.detach(), noise.draw(start, CONTEXT, shape).to(x0), sigma)
            is_committed = commit_last or not is_last or is_written
            if is_committed and not is_written:
                if on_step is not None:
                    on_step(index, CONTEXT)
                call.commit(context, timestep, start)
            if past is not None:
                past.add(start, context, timestep)
            pending = None if is_committed else (context, timestep)
            take = functools.partial(call.snapshot, start, start + length, pending)
            again = yield Chunk(index, start, x0, is_given=is_given, take=take)
        start += length


def is_past_known(resume: Snapshot, causal: CausalConfig) -> bool:
    """Whether a rollout that goes on from there can write its history again, as history "recode" does."""
    return resume.video_BTCHW is not None and causal.cache_source != "last_step"


def new_caches(
    model: Any,
    conditioning: Conditioning,
    count: int,
    latent_shape: tuple[int, int, int, int],
    causal: CausalConfig,
) -> list[KVCache]:
    """Empty caches for a rollout of this size: one for the prompt, and with guidance one more (count 2)."""
    embeds, (num_frames, _, height, width) = conditioning.prompt_embeds_BPE, latent_shape
    evicts = -1 < causal.window < num_frames
    capacity, sink = (causal.window, causal.sink) if evicts else (num_frames, 0)
    caches = [
        model.new_cache(
            batch=embeds.shape[0], latent_height=height, latent_width=width, capacity=capacity, sink=sink, like=embeds
        )
        for _ in range(count)
    ]
    for cache in caches:
        cache.keeps_all = not evicts
    return caches


@dataclass(frozen=True)
class _Calls:
    """The network with everything that stays the same during a rollout: conditions, guidance, a cache for each."""

    model: Any
    conditions: list[Conditioning]
    guidance: float
    caches: Sequence[KVCache | None]

    @property
    def device(self) -> torch.device:
        return self.conditions[0].prompt_embeds_BPE.device

    def reset(self) -> None:
        for cache in self.caches:
            if cache is not None:
                cache.reset()

    def flow(self, x_BTCHW: Tensor, timestep: float, start_frame: int, *, with_gradient: bool) -> Tensor:
        """Predicted flow, guided if there is a negative condition."""
        with torch.set_grad_enabled(with_gradient):
            flows = [self._call(x_BTCHW, timestep, start_frame, index) for index in range(len(self.conditions))]
            return flows[0] if len(flows) == 1 else flows[1] + self.guidance * (flows[0] - flows[1])

    def commit(self, x_BTCHW: Tensor, timestep: float, start_frame: int) -> None:
        """Write a finished chunk into every cache."""
        with torch.no_grad():
            for index in range(len(self.conditions)):
                self._call(x_BTCHW, timestep, start_frame, index)

    def change_prompt(self, change: PromptChange, past: _History | None, start_frame: int) -> None:
        """From now on another prompt, under which the frames of `past` are written again if the change says so."""
        self.conditions[0] = change.conditioning
        for cache in self.caches:
            if cache is not None:
                cache.cross = {}
        if past is not None and start_frame > 0 and change.history == "recode":
            past.write_again(start_frame)

    def _call(self, x_BTCHW: Tensor, timestep: float, start_frame: int, index: int) -> Tensor:
        condition, cache = self.conditions[index], self.caches[index]
        timesteps = torch.full(x_BTCHW.shape[:2], timestep, dtype=torch.float32, device=x_BTCHW.device)
        image = condition.frames(start_frame, x_BTCHW.shape[1])
        given = {} if image is None else {"image_BTCHW": image, "clip_BIX": condition.clip_BIX}
        flow = self.model(
            x_BTCHW, timesteps, condition.prompt_embeds_BPE, cache=cache, start_frame=start_frame, **given
        )
        return flow.to(x_BTCHW.dtype)

    def snapshot(
        self, start_frame: int, end_frame: int, pending: tuple[Tensor, float] | None, device: torch.device | None
    ) -> Snapshot:
        held = [cache for cache in self.caches if cache is not None]
        assert all(cache.start_frame == start_frame for cache in held), "too late, the next chunk was already asked for"
        states = tuple(cache.snapshot(device) for cache in held)
        return Snapshot(start_frame, end_frame, states, *(pending or (None, 0.0)))


class _History:
    """The clean frames that the chunk being made sees, as they were written into the cache."""

    def __init__(self, call: _Calls, causal: CausalConfig, lengths: tuple[int, ...]) -> None:
        self.call, self.timestep = call, causal.context_noise
        evicts = -1 < causal.window < sum(lengths)
        self.sink = causal.sink if evicts else 0
        self.ring = causal.window - causal.sink if evicts else sum(lengths)
        self.chunks: list[tuple[int, Tensor, float]] = []
        self.is_known = True

    def add(self, start_frame: int, x_BTCHW: Tensor, timestep: float) -> None:
        """Remember a finished chunk, in place of an earlier one there; forget those that it did not see."""
        self.chunks = [
            (start, x, t)
            for start, x, t in self.chunks
            if start < start_frame and (start < self.sink or start + x.shape[1] > start_frame - self.ring)
        ]
        self.chunks.append((start_frame, x_BTCHW, timestep))

    def add_video(self, snapshot: Snapshot, lengths: tuple[int, ...], causal: CausalConfig) -> None:
        """Remember the chunks before a snapshot, if it holds them as they were written."""
        self.is_known = is_past_known(snapshot, causal)
        if not self.is_known:
            return
        assert snapshot.video_BTCHW is not None
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        for start, chunk in zip(starts, snapshot.video_BTCHW.split(lengths, 1)):
            self.add(start, chunk.to(self.call.device), self.timestep)

    def write_again(self, end_frame: int) -> None:
        """Empty the caches and write the frames before `end_frame` that they showed, oldest first.

        Raises ValueError if the rollout goes on from a snapshot without them.
        """
        if not self.is_known:
            raise ValueError(
                "the snapshot does not hold what was written into the cache, to write it again under another prompt; "
                "use history 'keep'"
            )
        base = max(self.sink, end_frame - self.ring)
        for cache in self.call.caches:
            if cache is not None:
                cache.restart(base)
        for start, x_BTCHW, timestep in self.chunks:
            end = min(start + x_BTCHW.shape[1], end_frame)
            # what lay between the sink and the base is gone; where nothing did, a chunk is written whole, as it was
            parts = ((start, min(end, self.sink)), (max(start, base), end)) if base > self.sink else ((start, end),)
            for first, last in parts:
                if first < last:
                    self.call.commit(x_BTCHW[:, first - start : last - start], timestep, first)


def _resume(call: _Calls, snapshot: Snapshot, lengths: tuple[int, ...], prefix_frames: int) -> int:
    """Put the caches where the snapshot was taken; returns the index of the next chunk."""
    ends = _ends(lengths)
    if prefix_frames:
        raise ValueError("a rollout that resumes from a snapshot takes no prefix; the snapshot holds what came before")
    if snapshot.end_frame not in ends[:-1]:
        raise ValueError(
            f"the snapshot ends after latent frame {snapshot.end_frame}, but chunks of this video of {sum(lengths)} "
            f"frames end at {', '.join(map(str, ends))}; ask for a longer video of the same chunks"
        )
    if snapshot.caches and len(snapshot.caches) != len(call.caches):
        raise ValueError(
            f"the snapshot was taken with {len(snapshot.caches)} conditions, this rollout has {len(call.caches)}; "
            "resume with the same guidance"
        )
    for cache, state in zip(call.caches, snapshot.caches):
        assert cache is not None
        cache.restore(state)
    if snapshot.pending_BTCHW is not None:
        call.commit(snapshot.pending_BTCHW.to(call.device), snapshot.pending_timestep, snapshot.start_frame)
    return ends.index(snapshot.end_frame) + 1


def _denoise_chunk(
    call: _Calls,
    schedule: FlowSchedule,
    steps: StepConfig,
    noise: NoiseSource,
    shape: tuple[int, ...],
    index: int,
    start: int,
    on_step: OnStep | None,
    gradient: GradientPlan | None,
    last: int,
) -> tuple[Tensor, Tensor]:
    """Denoise one chunk from pure noise; the clean latents that evaluation `last` predicts, and what that one saw."""
    # all of the chunk's noise before its first evaluation: copies to a device wait for what runs there
    count = num_noises(steps.solver, last + 1)
    noises = [noise.draw(start, step, shape).to(call.device, torch.float32) for step in range(count)]
    solver, x = new_solver(steps.solver, schedule, noises), noises[0]
    for step, timestep in enumerate(schedule.timesteps):
        if on_step is not None:
            on_step(index, step)
        with_gradient = gradient is not None and step == last and start >= gradient.first_frame
        flow = call.flow(x, timestep, start, with_gradient=with_gradient)
        if step == last:
            return x0_from_flow(x, flow, schedule.sigmas[step]), x
        x = solver.advance(x, flow, step)
    raise AssertionError(f"exit step {last} is not in a schedule of {len(schedule.timesteps)}")


def _context_sigma(
    causal: CausalConfig, schedule: FlowSchedule, gradient: GradientPlan | None, exit_step: int
) -> float:
    """The noise that training mixes into a chunk before it enters the cache."""
    if gradient is None:
        return 0.0
    if causal.cache_source == "clean":
        return gradient.context_sigma
    return 0.0 if exit_step == len(schedule.timesteps) - 1 else schedule.sigmas[-1]


def _ends(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[: count + 1]) for count in range(len(lengths))]


def _check_prefix(
    prefix_BTCHW: Tensor | None, batch: int, frame_shape: tuple[int, ...], lengths: tuple[int, ...]
) -> int:
    """Frames of the prefix. Raises ValueError unless it is whole chunks of the right size that leave room."""
    if prefix_BTCHW is None:
        return 0
    rows, frames = prefix_BTCHW.shape[:2]
    valid = _ends(lengths)[:-1]
    if frames not in valid:
        raise ValueError(
            f"a prefix of {frames} latent frames does not end where a chunk ends; this video of {sum(lengths)} "
            f"frames takes a prefix of {', '.join(map(str, valid)) or 'none'}"
        )
    if rows not in (1, batch) or tuple(prefix_BTCHW.shape[2:]) != frame_shape:
        raise ValueError(
            f"a prefix of shape {tuple(prefix_BTCHW.shape)} does not fit a batch of {batch} with frames of shape "
            f"{frame_shape}; encode it at the size of the video"
        )
    return frames
