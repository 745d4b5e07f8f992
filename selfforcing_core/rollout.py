"""The Self Forcing rollout (arXiv 2506.08009, algorithm 1): chunk by chunk, few denoising steps, a KV cache.

A chunk starts as pure noise. Each step predicts it clean, seeing all earlier chunks by their keys and values in the
cache, and all but the last noise it again, less than before. One more pass over the clean chunk at timestep 0 writes
the keys and values that later chunks see. Training does the same, which is the method's point: a student learns from
the videos that it makes itself.

Sampler node, command line and trainer all call `rollout`. It yields one clean chunk at a time; whoever iterates decides
what to do with it, and may stop at any point. Nothing is read back from the device inside the loop.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import CausalConfig, StepConfig
from .geometry import chunk_lengths
from .guided import Guided
from .history import CONTEXT as CONTEXT_FRAMES
from .history import History, PromptAt
from .joint import AHEAD, JointWindow, new_window
from .noise import CONTEXT, NoiseSource
from .schedule import FlowSchedule, add_noise, x0_from_flow
from .snapshot import Snapshot
from .solver import new_solver, num_noises


@dataclass(frozen=True)
class Chunk:
    """A finished chunk of the video."""

    index: int
    start_frame: int
    latents_BTCHW: Tensor  # clean, float32
    is_given: bool = False  # rather than generated
    is_final: bool = False  # so that it cannot be generated once more
    take: Callable[[torch.device | None], Snapshot] | None = field(default=None, repr=False, compare=False)

    def snapshot(self, device: torch.device | None = None) -> Snapshot:
        """Take the state right after this chunk, to go on from later; to be done before asking for the next chunk.

        device: where its caches are copied to; the default is where they lie.
        """
        assert self.take is not None
        return self.take(device)


@dataclass(frozen=True)
class BackpropSpec:
    """What training changes in the rollout (Self Forcing, section 3.2 and algorithm 1)."""

    # Per generated chunk, the evaluation whose prediction is the chunk; only that one carries gradient.
    exit_steps: Sequence[int]
    first_frame: int = 0  # chunks that start earlier carry no gradient
    # Noise mixed into a chunk before it enters the cache. With cache_source last_step a chunk enters as its last step
    # would have seen it: with that step's noise.
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
    """Generate a video chunk by chunk; yield the given chunks first, then each generated one.

    `send(True)` in place of `next` generates the latest chunk once more, from what `noise` and `prompt_at` then give.

    latent_shape: (T, C, H, W) of the whole video; a chunk of all frames is the bidirectional sampler, without a cache.
    start: clean latents [B or 1, T, C, H, W] of the first frames, whole chunks; or a snapshot, to go on after it.
    steps: the chunk at frame 0 has its own where they say so; behind a given one no chunk is the first.
    commit_last: write the last chunk into the cache too. on_step(chunk, step): called before every pass (step CONTEXT
    for those that write a chunk), and may raise to stop. prompt_at(start_frame): asked before every generated chunk.
    Raises ValueError before the first pass if lengths, start or conditioning do not fit.
    """
    guided.check(latent_shape)
    lengths = chunk_lengths(latent_shape[0], causal.chunk, independent_first_frame=causal.independent_first_frame)
    given = _given_chunks(start, guided, latent_shape, lengths)
    is_cached = len(lengths) > 1 or commit_last or isinstance(start, Snapshot)
    guided = guided.opened(latent_shape, causal, is_cached=is_cached)
    history = History(guided, causal, lengths, prompt_at)
    window = new_window(guided, causal, steps, noise, latent_shape, trains=backprop is not None)
    # chunks before a snapshot are in the caches already
    first = _resume(guided, history, window, start, lengths) if isinstance(start, Snapshot) else 0
    # by chunk: the one that begins the video may have steps of its own, all others share theirs
    schedules = FlowSchedule(steps.of_chunk(0)), FlowSchedule(steps.of_chunk(1))
    denoiser = _Denoiser(guided, history, window, schedules, steps, causal, noise, latent_shape, on_step, backprop)
    for index, (start_frame, end_frame) in list(enumerate(_spans(lengths)))[first:]:
        is_wanted: bool | None = True
        while is_wanted:  # again, where whoever iterates sends True
            if index < len(given):
                finished = given[index]
            else:
                finished = denoiser.denoise(index, index - len(given), start_frame, end_frame)
            # what later chunks see is the clean chunk; after the last one nobody looks, which saves a pass
            is_seen = commit_last or end_frame < latent_shape[0]
            latest = _Latest(denoiser, index, start_frame, end_frame, finished, is_seen)
            # handed out before the pass that writes it, which nobody has to wait for
            kind = index < len(given), window is not None
            is_wanted = yield Chunk(index, start_frame, finished.latents_BTCHW, *kind, latest.snapshot)
        latest.settle()


@dataclass(frozen=True)
class _Finished:
    """A chunk, and how it enters the cache."""

    latents_BTCHW: Tensor
    context_BTCHW: Tensor  # what is written
    timestep: float  # at which it is written
    is_written: bool  # already


@dataclass(frozen=True)
class _Denoiser:
    """What stays the same from one denoised chunk to the next."""

    guided: Guided
    history: History
    window: JointWindow | None  # of chunks that are denoised together
    schedules: tuple[FlowSchedule, FlowSchedule]  # of chunk 0, and of every later one
    steps: StepConfig
    causal: CausalConfig
    noise: NoiseSource
    latent_shape: tuple[int, int, int, int]
    on_step: OnStep | None
    backprop: BackpropSpec | None

    def denoise(self, index: int, generated: int, start_frame: int, end_frame: int) -> _Finished:
        """Return a chunk that is denoised from pure noise; `generated` counts those without the given ones."""
        if self.window is not None:
            return self._denoised_jointly(self.window, index, start_frame)
        if self.history.policy.recomputes and start_frame > 0 and self.on_step is not None:
            self.on_step(index, CONTEXT)  # the window before the chunk is written, in place of the chunk behind it
        self.history.follow_prompt(start_frame, self.latent_shape)
        # Of a prefix, chunk 0 is given: what follows sees frames, as no chunk does that its own steps are for.
        schedule, causal, backprop = self.schedules[min(index, 1)], self.causal, self.backprop
        shape = (self.guided.batch, end_frame - start_frame, *self.latent_shape[1:])
        # algorithm 1 draws in training which evaluation ends a chunk, so that each of them learns
        exit_step = len(schedule.timesteps) - 1 if backprop is None else backprop.exit_steps[generated]
        x0_BTCHW, last_BTCHW = self._denoised(schedule, shape, index, start_frame, exit_step)
        context, timestep, is_written = x0_BTCHW.detach(), causal.context_noise, False
        if causal.cache_source == "last_step":  # the last pass has written its own keys, unless it carried gradient
            context, timestep, is_written = last_BTCHW, schedule.timesteps[-1], backprop is None
        sigma = self._context_sigma(schedule, exit_step)
        if sigma and end_frame < self.latent_shape[0]:
            context = add_noise(x0_BTCHW.detach(), self.noise.draw(start_frame, CONTEXT, shape).to(x0_BTCHW), sigma)
        return _Finished(x0_BTCHW, context, timestep, is_written)

    def _denoised_jointly(self, window: JointWindow, index: int, start_frame: int) -> _Finished:
        """Return the oldest chunk on the way, after as many passes as it still takes."""
        window.expect(start_frame)
        while window.unasked:  # the prompt that holds may have begun with one of the chunks that a snapshot brings
            self.history.follow_prompt(window.unasked.pop(0), self.latent_shape)
        x0_BTCHW: Tensor | None = None
        while x0_BTCHW is None:
            if window.has_room:  # a prompt holds from the pass on in which its chunk comes in
                self.history.follow_prompt(window.next_frame, self.latent_shape)
                window.enter()
            if self.on_step is not None:
                self.on_step(index, window.step)
            x0_BTCHW = window.advance()
        return _Finished(x0_BTCHW, x0_BTCHW, self.causal.context_noise, is_written=False)

    def commit(self, finished: _Finished, index: int, start_frame: int) -> _Finished:
        """Write a chunk into the cache by a pass of its own, over the keys of its noisy self."""
        if self.history.policy.recomputes:  # it is written as often as it is seen, before the chunks that see it
            return replace(finished, is_written=True)
        # the latest denoising pass wrote keys and values of the chunk as it was then, still noisy
        if self.on_step is not None:
            self.on_step(index, CONTEXT)
        self.guided.commit(finished.context_BTCHW, finished.timestep, start_frame)
        return replace(finished, is_written=True)

    def _denoised(
        self, schedule: FlowSchedule, shape: tuple[int, ...], index: int, start_frame: int, exit_step: int
    ) -> tuple[Tensor, Tensor]:
        """Return the clean latents that pass `exit_step` predicts, and what that pass was given."""
        # all of the chunk's noise before its first pass: copies to a device wait for what runs there
        count = num_noises(self.steps.solver, exit_step + 1)
        device = self.guided.device
        noises = [self.noise.draw(start_frame, step, shape).to(device, torch.float32) for step in range(count)]
        solver, x = new_solver(self.steps.solver, schedule, noises), noises[0]
        for step, timestep in enumerate(schedule.timesteps):
            if self.on_step is not None:
                self.on_step(index, step)
            is_exit = step == exit_step
            # algorithm 1: of all passes of a chunk only the one whose prediction is the chunk carries gradient
            with_gradient = self.backprop is not None and is_exit and start_frame >= self.backprop.first_frame
            flow = self.guided.flow(x, timestep, start_frame, with_gradient=with_gradient)
            if is_exit:
                return x0_from_flow(x, flow, schedule.sigmas[step]), x
            x = solver.advance(x, flow, step)
        raise AssertionError(f"exit step {exit_step} is not in a schedule of {len(schedule.timesteps)}")

    def _context_sigma(self, schedule: FlowSchedule, exit_step: int) -> float:
        """Return the noise that training mixes into a chunk before it enters the cache."""
        if self.backprop is None:
            return 0.0
        if self.causal.cache_source == "clean":
            return self.backprop.context_sigma
        # a chunk that exits early is clean where inference has the noise of its last step
        return 0.0 if exit_step == len(schedule.timesteps) - 1 else schedule.sigmas[-1]


@dataclass
class _Latest:
    """The chunk that was handed out last, until it is in caches and history."""

    denoiser: _Denoiser
    index: int
    start_frame: int
    end_frame: int
    finished: _Finished
    is_seen: bool  # by later chunks, so that it has to be written
    is_settled: bool = False

    def settle(self) -> None:
        """Write the chunk for those behind it, and remember it, unless that was done."""
        if self.is_settled:
            return
        if self.is_seen and not self.finished.is_written:
            self.finished = self.denoiser.commit(self.finished, self.index, self.start_frame)
        self.denoiser.history.add(self.start_frame, self.finished.context_BTCHW, self.finished.timestep)
        self.is_settled = True

    def snapshot(self, device: torch.device | None) -> Snapshot:
        """Return the rollout's state after the chunk; where nothing will see it, it goes along as it is to be written.

        What its caches hold is final: the pass that writes the chunk is made now, if it was not yet.
        """
        caches = [cache for cache in self.denoiser.guided.caches if cache is not None]
        # an expert that no step of the chunk has asked has not seen it yet
        assert all(cache.start_frame <= self.start_frame for cache in caches), "too late, the next chunk was asked for"
        self.settle()
        denoiser, finished = self.denoiser, self.finished
        guided, latents = denoiser.guided, denoiser.history.latents(self.end_frame)
        if latents:  # from which the caches are computed again
            latents = {name: x.to(device) for name, x in latents.items()}
            snapshot = Snapshot(self.start_frame, self.end_frame, (), num_networks=guided.num_networks, latents=latents)
            return replace(snapshot, policy=denoiser.history.policy.memory_text)
        states = tuple(cache.snapshot(device) for cache in caches)
        snapshot = Snapshot(self.start_frame, self.end_frame, states, num_networks=guided.num_networks)
        if denoiser.window is not None:
            ahead = {name: x.to(device) for name, x in denoiser.window.latents().items()}
            snapshot = replace(snapshot, latents=ahead, steps_ahead=denoiser.window.steps())
        if finished.is_written:
            return snapshot
        return replace(snapshot, pending_BTCHW=finished.context_BTCHW, pending_timestep=finished.timestep)


def _resume(
    guided: Guided, history: History, window: JointWindow | None, snapshot: Snapshot, lengths: tuple[int, ...]
) -> int:
    """Put caches, history and chunks on the way where the snapshot was taken; return the index of the next chunk."""
    ends = _ends(lengths)
    if snapshot.end_frame not in ends[:-1]:
        raise ValueError(
            f"the snapshot ends after latent frame {snapshot.end_frame}, but chunks of this video of {sum(lengths)} "
            f"frames end at {', '.join(map(str, ends))}; ask for a longer video of the same chunks"
        )
    if snapshot.caches and snapshot.num_networks != guided.num_networks:
        raise ValueError(
            f"the snapshot was taken with {snapshot.num_networks} networks, this rollout has {guided.num_networks}; "
            "resume with those it was taken with"
        )
    if snapshot.caches and len(snapshot.caches) != len(guided.caches):
        counts = (len(caches) // guided.num_networks for caches in (snapshot.caches, guided.caches))
        raise ValueError(
            "the snapshot was taken with {} conditions, this rollout has {}; resume with the same guidance".format(
                *counts
            )
        )
    first = ends.index(snapshot.end_frame) + 1
    history.add_video(snapshot, lengths[:first])
    if history.policy.recomputes:  # nothing of what caches hold is read
        return first
    for name, word in ((CONTEXT_FRAMES, "recomputes"), (AHEAD, "is_joint")):
        if name in snapshot.latents and not getattr(history.policy, word):
            raise ValueError(
                f"the snapshot was taken under another policy than {history.policy.name}; resume with the policy it "
                "was saved with"
            )
    for cache, state in zip(guided.caches, snapshot.caches):
        assert cache is not None
        cache.restore(state)
    if window is not None:
        window.restore(snapshot)
    if snapshot.pending_BTCHW is not None:  # the end of its own video, where nobody was to see it
        guided.commit(snapshot.pending_BTCHW.to(guided.device), snapshot.pending_timestep, snapshot.start_frame)
    return first


def _ends(lengths: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(lengths))


def _spans(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the first frame of each chunk and the one behind its last."""
    return [(end - length, end) for length, end in zip(lengths, _ends(lengths))]


def _given_chunks(
    start: Tensor | Snapshot | None,
    guided: Guided,
    latent_shape: tuple[int, int, int, int],
    lengths: tuple[int, ...],
) -> list[_Finished]:
    """Return the chunks of given frames, one for each row. Raises ValueError unless they are whole and leave room."""
    if not isinstance(start, Tensor):
        return []
    rows, frames = start.shape[:2]
    ends = _ends(lengths)[:-1]
    if frames not in ends:
        raise ValueError(
            f"a prefix of {frames} latent frames does not end where a chunk ends; this video of {sum(lengths)} "
            f"frames takes a prefix of {', '.join(map(str, ends)) or 'none'}"
        )
    if rows not in (1, guided.batch) or tuple(start.shape[2:]) != latent_shape[1:]:
        raise ValueError(
            f"a prefix of shape {tuple(start.shape)} does not fit a batch of {guided.batch} with frames of shape "
            f"{latent_shape[1:]}; encode it at the size of the video"
        )
    clean_BTCHW = start.to(guided.device, torch.float32).expand(guided.batch, *[-1] * 4)
    chunks = clean_BTCHW.split(lengths[: ends.index(frames) + 1], 1)
    # as clean as an encoder makes them, so they enter the cache at timestep 0
    return [_Finished(chunk_BTCHW, chunk_BTCHW, 0.0, is_written=False) for chunk_BTCHW in chunks]
