"""The core's rollout as a SAMPLER of the host, and the GUIDER that goes with it.

The host's guider evaluates its prompts and combines them; the rollout sees one guided network. What is denoised,
noised and written into a cache, and when, is the core's alone.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import comfy.samplers
import torch
from einops import rearrange
from torch import Tensor

from ..selfforcing_core.conditioning import Conditioning
from ..selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from ..selfforcing_core.geometry import chunk_lengths, tokens_per_frame, whole_chunks
from ..selfforcing_core.kv_cache import KVCache
from ..selfforcing_core.prompt_schedule import seed_at
from ..selfforcing_core.rollout import Chunk, NoiseSource, SeededNoise, is_past_known, new_caches, rollout
from ..selfforcing_core.schedule import TIMESTEPS
from ..selfforcing_core.snapshot import Snapshot
from . import host
from .causal_model import (
    BASE,
    CAUSAL,
    FEW_STEP,
    HOST_COMPILE,
    KEY,
    RolloutState,
    Settings,
    check_causal,
    config_of,
    forget_extra_bytes,
    kind_note,
    settings_of,
)
from .patches import (
    check_model_options,
    check_model_sampling,
    check_prompt_inputs,
    has_wrappers,
    unapplied_names,
)
from .prompts import Moment, PromptPlan, Typed, check_prompts, conditions, later_prompts, scheduled_seeds

log = logging.getLogger(__name__)
LatentShape = tuple[int, int, int, int]  # T, C, H, W


class Progress(Protocol):
    """Told of every evaluation before it starts, and of every finished chunk, which it may want made once more.

    is_finished: the chunk that it was told of last is to be the video's last one.
    """

    is_finished: bool

    def step(self) -> None: ...

    def chunk(self, chunk: Chunk) -> bool: ...

    def finish(self) -> None: ...


class Steering(Typed, Protocol):
    """A person's hand on a rollout."""

    def seed_at(self, start_frame: int) -> int | None:
        """The seed of this chunk's noise; None is the run's own."""
        ...


@dataclass
class StateHolder:
    """A rollout's state, with its video, as a socket: empty until the sampler that it belongs to has run."""

    snapshot: Snapshot | None = None

    def filled(self) -> Snapshot:
        """Raises ValueError if it is still empty."""
        if self.snapshot is None or self.snapshot.video_BTCHW is None:
            raise ValueError(
                "the state is empty: its sampler has not run yet, or did not keep it; switch keep_state on, and "
                "connect the sampled LATENT to the input that waits for it"
            )
        return self.snapshot


@dataclass(frozen=True)
class Run:
    """How one rollout differs from what the MODEL's settings say.

    is_whole: one bidirectional chunk of all frames. causal: in place of the settings'. noise: for the draws after the
    first of each chunk; None is by the host's seed. progress: made for a number of evaluations. resume: go on from
    there. keep: put the final state here. steering: new prompts and seeds on the way.
    working_bytes: what whoever follows the progress needs on the device.
    """

    is_whole: bool = False
    causal: CausalConfig | None = None
    noise: NoiseSource | None = None
    progress: Callable[[int], Progress] | None = None
    resume: StateHolder | None = None
    keep: StateHolder | None = None
    steering: Steering | None = None
    working_bytes: float = 0


class ChunkSampler(comfy.samplers.KSAMPLER):
    """SAMPLER: chunk by chunk with a KV cache; with `is_whole` all frames at once and without."""

    def __init__(self, run: Run) -> None:
        super().__init__(sample_chunks, {"run": run})
        self.run = run

    def check(self, guider: Any) -> None:
        """Raise ValueError for a MODEL or prompts that cannot be sampled so; asked before the host loads anything."""
        settings, native = settings_of(guider.model_patcher), guider.model_patcher.model.diffusion_model
        _check_kind(settings.kind, self.run.is_whole)
        if not self.run.is_whole:
            check_causal(native)
        later = [cond for cond in guider.conds.get("positive", []) if Moment.KEY in cond]
        check_prompts([*conditions(guider), *later], config_of(native))
        note = kind_note(settings)
        if note is not None:
            host.show_text(note)

    def whole_frames(self, guider: Any, num_frames: int, mask: Tensor | None) -> int:
        """How many of so many latent frames are whole chunks."""
        if self.run.is_whole:
            return num_frames
        causal = layout(known_frames(mask), self._causal(guider))
        return whole_chunks(num_frames, causal.chunk, independent_first_frame=causal.independent_first_frame)

    def frames_at_once(self, guider: Any, noise_shape: tuple[int, ...]) -> int:
        """Latent frames of the largest evaluation, for which the host's memory estimate is to be made."""
        frames = noise_shape[2]
        return frames if self.run.is_whole else min(frames, self._causal(guider).chunk)

    def extra_bytes(self, guider: Any, noise_shape: tuple[int, ...]) -> float:
        """What the host's memory estimate does not know of such a run: above all its caches."""
        return self.run.working_bytes + (0 if self.run.is_whole else self._cache_bytes(guider, noise_shape))

    def _causal(self, guider: Any) -> CausalConfig:
        return self.run.causal or settings_of(guider.model_patcher).causal

    def _cache_bytes(self, guider: Any, noise_shape: tuple[int, ...]) -> int:
        """Of the caches, where they lie on the MODEL's device; of what is copied there for one layer, where not all is.

        The past of a layer is joined with the new keys and values where the two are of different types.
        """
        settings, model = settings_of(guider.model_patcher), guider.model_patcher.model
        config, window, computed = config_of(model.diffusion_model), self._causal(guider).window, compute_dtype(model)
        batch, _, frames, height, width = noise_shape
        stored = settings.cache_dtype or computed

        def size(config: WanConfig, dtype: torch.dtype) -> int:
            return KVCache.num_bytes(
                config, batch=batch, tokens_per_frame=tokens_per_frame(height, width),
                capacity=frames if window == -1 else min(frames, window), dtype=dtype,
            )  # fmt: skip

        held = size(config, stored) if settings.cache_device is None else 0
        is_copied = settings.cache_device is not None or stored != computed
        copied = 2 * size(replace(config, num_layers=1), computed) if is_copied else 0
        return max(1, len(conditions(guider))) * held + copied


class ChunkGuider(comfy.samplers.CFGGuider):
    """GUIDER with classifier-free guidance; a negative prompt that has no effect is not kept."""

    def set_prompts(self, positive: list[Any], negative: list[Any] | None, cfg: float) -> None:
        conds = {"positive": positive}
        if negative and cfg != 1:
            conds["negative"] = negative
        elif cfg != 1:
            raise ValueError(f"cfg {cfg} needs a negative prompt; connect one, or set cfg to 1")
        said = settings_of(self.model_patcher).guidance
        if said is not None and said != cfg:
            host.show_text(f"the model's file says that it is sampled with cfg {said:g}; cfg here is {cfg:g}")
        self.inner_set_conds(conds)
        self.set_cfg(cfg)


def compute_dtype(model: Any) -> torch.dtype:
    """The type that activations of the host's model have."""
    return model.manual_cast_dtype or model.get_dtype()


# --------------------------------------------------------------- sampling --
def sample_chunks(
    model_k: Any,
    noise_BCTHW: Tensor,
    sigmas: Tensor,
    *,
    extra_args: dict[str, Any],
    callback: Any = None,
    disable: bool | None = None,
    run: Run,
) -> Tensor:
    """A sampler function of the host: normalised latents [B, C, T, H, W] from noise scaled for the first sigma.

    T is shorter than the noise where whoever follows the progress ends the run early, after a whole chunk.
    Frames at the beginning that the noise mask declares known are given to the rollout as its prefix.
    Raises ValueError for whatever the rollout or the model cannot do, before the first network call.
    """
    guider = model_k.inner_model
    patcher = guider.model_patcher
    settings, native = settings_of(patcher), patcher.model.diffusion_model
    _check_kind(settings.kind, run.is_whole)
    check_model_sampling(patcher.get_model_object("model_sampling"))
    later = later_prompts(guider)
    conds = [*conditions(guider), *(cond for _, conds in later for cond in conds)]
    check_prompts(conds, config_of(native))
    if run.is_whole:  # the host's own forward pass, which follows whatever is set on it
        lost = unapplied_names(patcher, (name for name, _ in native.named_parameters() if name.endswith("modulation")))
        if lost:
            log.warning(
                "%d modulation entries of a LoRA are not applied (%s, ...): ComfyUI's own forward pass leaves them out",
                len(lost), lost[0],
            )  # fmt: skip
    else:
        check_causal(native)
        check_model_options(extra_args.get("model_options", {}))
        for cond in conds:
            check_prompt_inputs(cond["model_conds"])
    x_BTCHW = rearrange(noise_BCTHW, "b c t h w -> b t c h w")
    batch, frames = x_BTCHW.shape[:2]
    shape: LatentShape = tuple(x_BTCHW.shape[1:])  # type: ignore[assignment]
    prefix = None if run.is_whole else _given_frames(extra_args.get("denoise_mask"), model_k.latent_image)
    given = 0 if prefix is None else prefix.shape[1]
    causal = layout(given, run.causal or settings.causal)
    if run.is_whole:
        causal = CausalConfig(chunk=frames)
    steps = replace(steps_of(sigmas), solver=settings.steps.solver)
    lengths = chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    chunk_shape = (*noise_BCTHW.shape[:2], max(lengths), *noise_BCTHW.shape[3:])
    network = _GuidedNetwork(guider, extra_args, settings, chunk_shape, run.working_bytes)
    seed = extra_args.get("seed") or 0
    noise = _HostNoise(x_BTCHW, run.noise or SeededNoise(seed), run.steering, scheduled_seeds(guider, lengths))
    writes = causal.cache_source == "clean"
    num_calls = len(lengths) * (len(steps.steps) + writes) - writes
    resumed = None if run.resume is None else run.resume.filled()
    done: list[Tensor] = []  # where the graph keeps it: on the device, memory would grow with the length
    if resumed is not None:
        assert resumed.video_BTCHW is not None
        done.append(host.to_graph(resumed.video_BTCHW))
    if run.progress is None:
        progress: Progress = _CallbackProgress(callback, sigmas, x_BTCHW, done, num_calls)
    else:
        progress = run.progress(num_calls)

    def on_step(chunk: int, step: int) -> None:
        host.check_interrupted()
        progress.step()

    prompts = None
    if later or run.steering is not None:
        fixed = 0 if resumed is None or is_past_known(resumed, causal) else resumed.end_frame
        begun = 0 if resumed is None else resumed.end_frame
        prompts = PromptPlan(network, later, lengths, run.steering, fixed_frames=fixed, resumed_at=begun)
    with _memory_explained(network, causal, shape, batch):
        caches = None if run.is_whole else network.allocate(shape, causal)
        chunks = rollout(
            network, network.conditioning, noise=noise, latent_shape=shape, causal=causal, steps=steps,
            prefix_BTCHW=prefix if resumed is None else None, caches=caches, on_step=on_step, resume=resumed,
            prompt_at=prompts and prompts.at,
        )  # fmt: skip
        try:
            for chunk in chunks:
                while progress.chunk(chunk):
                    chunk = chunks.send(True)
                done.append(host.to_graph(chunk.latents_BTCHW))
                is_last = progress.is_finished or chunk.start_frame + chunk.latents_BTCHW.shape[1] == frames
                if run.keep is not None and is_last:
                    state = chunk.snapshot(torch.device("cpu"))
                    run.keep.snapshot = replace(state, video_BTCHW=torch.cat(done, 1)).to("cpu")
                if is_last:
                    break
            host.check_interrupted()
            progress.finish()
        finally:
            chunks.close()
            network.release()
    return rearrange(torch.cat(done, 1).to(noise_BCTHW.device), "b t c h w -> b c t h w")


def steps_of(sigmas: Tensor) -> StepConfig:
    """SIGMAS of the graph, falling from noise to 0. Raises ValueError if they do not end at 0."""
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[-1] != 0:
        raise ValueError(
            f"the sigmas {[round(level, 4) for level in levels]} do not end at 0, so no chunk would become clean; "
            "use Sigmas (Self Forcing), or BasicScheduler with denoise 1"
        )
    return StepConfig(tuple(TIMESTEPS * level for level in levels[:-1]), shift=1.0, warp=False)


def layout(given: int, causal: CausalConfig) -> CausalConfig:
    """Chunks for a video that begins with `given` frames: with a single picture, frame 0 is a chunk of its own."""
    is_single = given % causal.chunk == 1 and causal.chunk > 1
    return replace(causal, independent_first_frame=True) if is_single else causal


def _given_frames(mask: Tensor | None, latent_image: Tensor | None) -> Tensor | None:
    """Latents [B, T, C, H, W] of the first frames, as far as the noise mask says that they are known (0)."""
    if mask is None or latent_image is None:
        return None
    count = known_frames(mask)
    return rearrange(latent_image[:, :, :count], "b c t h w -> b t c h w").float() if count else None


def known_frames(mask_BCTHW: Tensor | None) -> int:
    """How many frames at the beginning a noise mask declares known (0). Raises ValueError for any other mask."""
    if mask_BCTHW is None:
        return 0
    values = rearrange(mask_BCTHW, "b c t h w -> t (b c h w)") if mask_BCTHW.ndim == 5 else mask_BCTHW.flatten(1)
    largest, smallest = values.amax(1).tolist(), values.amin(1).tolist()
    count = next((index for index, value in enumerate(largest) if value > 0), len(largest))
    if mask_BCTHW.ndim != 5 or any(value < 1 for value in smallest[count:]):
        raise ValueError(
            "the noise mask keeps parts of frames, or frames behind the first ones; generating chunk by chunk can "
            "only keep whole frames at the beginning: remove the mask, or use Image to Video (Self Forcing)"
        )
    return count


# ------------------------------------------------------------ what is wrong --
def _check_kind(kind: str, is_whole: bool) -> None:
    if kind == BASE:
        raise ValueError(
            "this model is loaded as 'base': it was not distilled for few steps; sample it with KSampler, or choose "
            "another kind in its loader"
        )
    if kind == FEW_STEP and not is_whole:
        raise ValueError(
            "this model is loaded as 'few-step bidirectional' and never learnt to generate chunk by chunk; use "
            "Few-Step Sampler (Self Forcing), or choose kind 'causal' in its loader if it did"
        )
    if kind == CAUSAL and is_whole:
        raise ValueError(
            "this model generates chunk by chunk; use Sampler (Self Forcing), or choose kind 'few-step "
            "bidirectional' in its loader if it does not"
        )


@contextmanager
def _memory_explained(network: _GuidedNetwork, causal: CausalConfig, shape: LatentShape, batch: int) -> Iterator[None]:
    """Out of memory: say what would help and by how much; whoever holds the caches lets go of them."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(_remedies(network, causal, shape, batch)) from error


def _remedies(network: _GuidedNetwork, causal: CausalConfig, shape: LatentShape, batch: int) -> str:
    frames, _, height, width = shape
    config, count = network.config, network.num_caches
    capacity = frames if causal.window == -1 else min(frames, causal.window)
    small = min(capacity, causal.sink + 2 * causal.chunk)

    def size(capacity: int, dtype: torch.dtype) -> int:
        tokens = tokens_per_frame(height, width)
        return count * KVCache.num_bytes(config, batch=batch, tokens_per_frame=tokens, capacity=capacity, dtype=dtype)

    whole = size(capacity, network.cache_dtype)
    narrow, halved = whole - size(small, network.cache_dtype), whole - size(capacity, torch.float8_e4m3fn)
    return (
        f"out of memory while generating; the KV cache alone takes {whole} bytes. In Cache Options (Self Forcing): "
        f"window {small} saves {narrow} bytes, cache_dtype float8_e4m3fn {halved}, cache_device cpu {whole}; "
        "a smaller width and height save in proportion"
    )


# ---------------------------------------------------------------- network --
@dataclass
class _GuidedNetwork:
    """The host's guider in the shape that `rollout` calls a network in: flow from latents and timesteps.

    chunk_shape: [B, C, T, H, W] of the largest evaluation. working_bytes: of whoever follows the progress.
    """

    guider: Any
    extra_args: dict[str, Any]
    settings: Settings
    chunk_shape: tuple[int, ...]
    working_bytes: float = 0
    state: RolloutState | None = field(default=None, init=False)
    latest: tuple[int, set[int]] | None = field(default=None, init=False)  # first frame and conditions of the last call
    used: set[int] = field(default_factory=set, init=False)  # conditions that have been evaluated at all

    def __post_init__(self) -> None:
        patcher = self.guider.model_patcher
        native = config_of(patcher.model.diffusion_model)
        # condition channels and CLIP features are the host's: to the rollout this is a text-to-video network
        self.config = replace(native, model_type="t2v", in_dim=native.out_dim)
        self.device, self.dtype = patcher.load_device, compute_dtype(patcher.model)
        self.cache_dtype = self.settings.cache_dtype or self.dtype
        self.num_caches = max(1, len(conditions(self.guider)))
        self.model_options = self.extra_args.get("model_options", {})

    @property
    def conditioning(self) -> Conditioning:
        """Rows, type and place of what is computed; the prompts themselves are the guider's."""
        return Conditioning(
            torch.zeros(self.chunk_shape[0], 1, self.config.text_dim, device=self.device, dtype=self.dtype)
        )

    def allocate(self, shape: LatentShape, causal: CausalConfig) -> list[KVCache]:
        """A cache for every prompt that the guider evaluates."""
        caches = new_caches(self, self.conditioning, self.num_caches, shape, causal)
        forget_extra_bytes(self.guider.model_patcher.model)
        patcher = self.guider.model_patcher
        self.state = RolloutState(
            caches, self._index_of(), self.model_options.get(HOST_COMPILE), patcher,
            is_watched=has_wrappers(self.model_options),
        )  # fmt: skip
        inner = {**self.model_options.get("transformer_options", {}), KEY: self.state}
        self.state.share(patcher.model.diffusion_model, inner)
        self.model_options = {**self.model_options, "transformer_options": inner}
        return caches

    def renew(self) -> Conditioning:
        """The guider's prompts have changed: their caches are those of the ones before."""
        assert self.state is not None
        self.state.index_of = self._index_of()
        self.latest, self.used = None, set()
        return self.conditioning

    def kept_loaded(self) -> AbstractContextManager[None]:
        """For work that may bring in other networks of the host."""
        patcher = self.guider.model_patcher
        shape = (self.num_caches * self.chunk_shape[0], *self.chunk_shape[1:])
        return host.kept_loaded(patcher, working_bytes=patcher.memory_required(shape) + self.working_bytes)

    def _index_of(self) -> dict[Any, int]:
        return {cond["uuid"]: index for index, cond in enumerate(conditions(self.guider))}

    def new_cache(
        self, *, batch: int, latent_height: int, latent_width: int, capacity: int, sink: int, like: Tensor
    ) -> KVCache:
        device = like.device if self.settings.cache_device is None else torch.device(self.settings.cache_device)
        return KVCache(
            self.config, batch=batch, tokens_per_frame=tokens_per_frame(latent_height, latent_width),
            capacity=capacity, sink=sink, device=device, dtype=self.cache_dtype,
        )  # fmt: skip

    def release(self) -> None:
        """Let go of the caches, also where the host keeps the options of a run that failed."""
        if self.state is not None:
            self.state.caches, self.state.patcher = (), None
            self.state.start_frame = None

    def __call__(
        self, x_BTCHW: Tensor, timesteps_BT: Tensor, *_: Any, cache: Any = None, start_frame: int = 0
    ) -> Tensor:
        if self.state is not None:
            self.state.begin_call(start_frame, x_BTCHW.shape[1])
        sigma_B = timesteps_BT[:, 0] / TIMESTEPS
        x0_BCTHW = self.guider(
            rearrange(x_BTCHW, "b t c h w -> b c t h w"), sigma_B,
            model_options=self.model_options, seed=self.extra_args.get("seed"),
        )  # fmt: skip
        x0_BTCHW = rearrange(x0_BCTHW, "b c t h w -> b t c h w")
        if self.state is not None:
            self._check_evaluated(start_frame, self.state.evaluated)
        sigma = sigma_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None, None, None]
        return (x_BTCHW - x0_BTCHW) / sigma  # at sigma 0, a pass into the cache, nobody reads it

    def _check_evaluated(self, start_frame: int, evaluated: set[int]) -> None:
        """Raise ValueError where a node kept the network from being asked.

        A step may leave out a prompt, but the last pass over a chunk, which the cache keeps, has to have them all.
        """
        has_begun = self.latest is not None and self.latest[0] != start_frame
        is_whole = not has_begun or (self.latest is not None and self.latest[1] == self.used)
        if not evaluated or not is_whole or (has_begun and not evaluated <= self.used):
            raise ValueError(
                "an evaluation of the model was skipped by a node that saves steps (such as EasyCache, TeaCache or a "
                "cfg that ends early), which leaves a hole in the cache of a video made chunk by chunk; remove it"
            )
        self.latest = start_frame, evaluated
        self.used |= evaluated


class _HostNoise:
    """The first draw of a chunk is its part of the host's noise; later ones come from another source.

    A chunk whose seed is steered, or else one of the schedule's `seeds`, has all its noise from that.
    """

    def __init__(
        self, x_BTCHW: Tensor, later: NoiseSource, steering: Steering | None, seeds: Mapping[int, int]
    ) -> None:
        self.x_BTCHW, self.later, self.steering, self.seeds = x_BTCHW, later, steering, seeds

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        seed = None if self.steering is None else self.steering.seed_at(start_frame)
        seed = seed_at(self.seeds, start_frame) if seed is None else seed
        if seed is not None:
            return SeededNoise(seed).draw(start_frame, step, shape).to(self.x_BTCHW)
        if step == 0:
            return self.x_BTCHW[:, start_frame : start_frame + shape[1]]
        return self.later.draw(start_frame, step, shape)


class SeededHostNoise:
    """NOISE of the graph that is, chunk by chunk, what the command line draws for this seed."""

    def __init__(self, seed: int, lengths: tuple[int, ...]) -> None:
        self.seed, self.lengths = seed, lengths

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        batch, channels, _, height, width = latent["samples"].shape
        source, start, parts = SeededNoise(self.seed), 0, []
        for length in self.lengths:
            parts.append(source.draw(start, 0, (batch, length, channels, height, width)))
            start += length
        return rearrange(torch.cat(parts, 1), "b t c h w -> b c t h w").contiguous()


class _CallbackProgress:
    """The host's callback: its bar counts sigmas, so evaluations are scaled to them; the last call has all frames."""

    is_finished = False

    def __init__(self, callback: Any, sigmas: Tensor, like_BTCHW: Tensor, begun: list[Tensor], num_calls: int) -> None:
        self.callback, self.sigmas, self.num_calls, self.calls = callback, sigmas, num_calls, 0
        self.latest_BCTHW = host.to_graph(torch.zeros(like_BTCHW.transpose(1, 2).shape))
        for latents_BTCHW in begun:  # what a resumed state brings along
            self._put(latents_BTCHW, 0)

    def _put(self, latents_BTCHW: Tensor, start_frame: int) -> Tensor:
        new = rearrange(latents_BTCHW, "b t c h w -> b c t h w")
        self.latest_BCTHW[:, :, start_frame : start_frame + new.shape[2]] = new
        return new

    def step(self) -> None:
        self.calls += 1

    def chunk(self, chunk: Chunk) -> bool:
        if self.callback is None:
            return False
        new = self._put(chunk.latents_BTCHW, chunk.start_frame)
        is_last = chunk.start_frame + new.shape[2] == self.latest_BCTHW.shape[2]
        steps = len(self.sigmas) - 1
        index = steps - 1 if is_last else min(steps - 1, self.calls * steps // max(self.num_calls, 1))
        # the host shows the first frame of what it is given: the newest one
        shown = self.latest_BCTHW if is_last else new[:, :, -1:]
        self.callback({"i": index, "denoised": shown, "x": shown, "sigma": self.sigmas[0], "sigma_hat": self.sigmas[0]})
        return False

    def finish(self) -> None:
        """Nothing is left to tell."""
