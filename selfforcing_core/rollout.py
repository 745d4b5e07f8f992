"""The Self Forcing rollout (arXiv 2506.08009, algorithm 1): chunk by chunk, few denoising steps, a KV cache.

Sampler node, command line and trainer all call `rollout`. It yields one clean chunk at a time; whoever iterates decides
what to do with it, and may stop at any point. Nothing is read back from the device inside the loop.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .conditioning import Conditioning
from .config import CausalConfig, StepConfig
from .geometry import chunk_lengths
from .kv_cache import KVCache
from .schedule import FlowSchedule, add_noise, x0_from_flow

CONTEXT = -1  # the `step` under which a noise source is asked for context noise


class NoiseSource(Protocol):
    """Where all Gaussian noise of a rollout comes from."""

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, T, C, H, W] for the chunk at `start_frame`: before evaluation `step`, or CONTEXT."""
        ...


class SeededNoise:
    """Noise that depends on seed, batch row, chunk and step alone, drawn on the CPU in float32.

    Neither the device nor the batch size nor what was generated before changes a row's video.
    """

    def __init__(self, seed: int, first_row: int = 0) -> None:
        self.seed, self.first_row = seed, first_row

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        rows = range(self.first_row, self.first_row + shape[0])
        return torch.stack([self._draw_row(row, start_frame, step, shape[1:]) for row in rows])

    def _draw_row(self, row: int, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        key = f"{self.seed}/{row}/{start_frame}/{step}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


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


@dataclass(frozen=True)
class GradientPlan:
    """What training changes in the rollout (Self Forcing, section 3.2 and algorithm 1).

    exit_steps: per generated chunk, the evaluation whose prediction is the chunk; only that one carries gradient.
    first_frame: chunks that start earlier carry none. context_sigma: noise mixed into a chunk before it enters the
    cache.
    """

    exit_steps: Sequence[int]
    first_frame: int = 0
    context_sigma: float = 0.0


OnStep = Callable[[int, int], None]


def rollout(
    model: Any,
    conditioning: Conditioning,
    *,
    noise: NoiseSource,
    latent_shape: tuple[int, int, int, int],
    causal: CausalConfig,
    steps: StepConfig,
    prefix_BTCHW: Tensor | None = None,
    cache: KVCache | None = None,
    commit_last: bool = False,
    on_step: OnStep | None = None,
    gradient: GradientPlan | None = None,
) -> Iterator[Chunk]:
    """Generate a video chunk by chunk; yields the prefix's chunks first, then each generated one.

    model: called as `CausalWan.forward`. latent_shape: (T, C, H, W) of the whole video, prefix included.
    prefix_BTCHW: clean latents of the first frames, whole chunks, batch 1 or B. cache: one from `model.new_cache` to
    reuse; it is reset. commit_last: also write the last chunk into the cache (needed only to go on afterwards).
    on_step(chunk, step) is called before every network call (step CONTEXT for cache passes) and may raise to stop.

    Raises ValueError before the first network call if lengths, prefix or conditioning do not fit.
    """
    embeds = conditioning.prompt_embeds_BPE
    conditioning.check(model.config)
    batch, (num_frames, *frame_shape) = embeds.shape[0], latent_shape
    lengths = chunk_lengths(num_frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    prefix_frames = _check_prefix(prefix_BTCHW, batch, tuple(frame_shape), lengths)
    schedule = FlowSchedule(steps)
    evicts = -1 < causal.window < num_frames
    ring: KVCache = cache or model.new_cache(
        batch=batch, latent_height=frame_shape[1], latent_width=frame_shape[2],
        capacity=causal.window if evicts else num_frames, sink=causal.sink if evicts else 0, like=embeds,
    )  # fmt: skip
    ring.reset()
    call = _Calls(model, embeds, ring)

    start = 0
    for index, length in enumerate(lengths):
        is_last = start + length == num_frames
        if start < prefix_frames:
            assert prefix_BTCHW is not None
            x0 = prefix_BTCHW[:, start : start + length].to(embeds.device, torch.float32).expand(batch, *[-1] * 4)
            context, timestep = x0, 0.0
        else:
            shape = (batch, length, *frame_shape)
            generated = index - sum(1 for end in _ends(lengths) if end <= prefix_frames)
            x0 = _denoise_chunk(call, schedule, noise, shape, index, start, on_step, gradient, generated)
            context, timestep = x0.detach(), causal.context_noise
            if gradient is not None and gradient.context_sigma and not is_last:
                drawn = noise.draw(start, CONTEXT, shape).to(context)
                context = add_noise(context, drawn, gradient.context_sigma)
        if commit_last or not is_last:
            if on_step is not None:
                on_step(index, CONTEXT)
            call(context, timestep, start, with_gradient=False)
        yield Chunk(index, start, x0, is_given=start < prefix_frames)
        start += length


@dataclass(frozen=True)
class _Calls:
    """The network with everything that stays the same during a rollout."""

    model: Any
    embeds: Tensor
    cache: KVCache

    def __call__(self, x_BTCHW: Tensor, timestep: float, start_frame: int, *, with_gradient: bool) -> Tensor:
        timesteps = torch.full(x_BTCHW.shape[:2], timestep, dtype=torch.float32, device=x_BTCHW.device)
        with torch.set_grad_enabled(with_gradient):
            flow = self.model(x_BTCHW, timesteps, self.embeds, cache=self.cache, start_frame=start_frame)
            return flow.to(x_BTCHW.dtype)


def _denoise_chunk(
    call: _Calls,
    schedule: FlowSchedule,
    noise: NoiseSource,
    shape: tuple[int, ...],
    index: int,
    start: int,
    on_step: OnStep | None,
    gradient: GradientPlan | None,
    generated: int,
) -> Tensor:
    """Few-step denoising of one chunk: predict x0, noise it to the next timestep, repeat; returns the last x0."""
    last = len(schedule.timesteps) - 1 if gradient is None else gradient.exit_steps[generated]
    x = noise.draw(start, 0, shape).to(call.embeds.device, torch.float32)
    for step, timestep in enumerate(schedule.timesteps):
        if on_step is not None:
            on_step(index, step)
        with_gradient = gradient is not None and step == last and start >= gradient.first_frame
        flow = call(x, timestep, start, with_gradient=with_gradient)
        x0 = x0_from_flow(x, flow, schedule.sigmas[step])
        if step == last:
            return x0
        drawn = noise.draw(start, step + 1, shape).to(x)
        x = add_noise(x0, drawn, schedule.sigmas[step + 1])
    raise AssertionError(f"exit step {last} is not in a schedule of {len(schedule.timesteps)}")


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
