"""The core's rollout as a SAMPLER of ComfyUI, and the GUIDER that goes with it.

ComfyUI's guider evaluates its prompts and combines them; the rollout sees one guided network. What is denoised,
noised and written into a cache, and when, is the core's alone.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
import torch
from einops import rearrange
from torch import Tensor

from ...selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from ...selfforcing_core.geometry import chunk_lengths, tokens_per_frame, whole_chunks
from ...selfforcing_core.guided import Guided
from ...selfforcing_core.history import is_past_known
from ...selfforcing_core.kv_cache import KVCache
from ...selfforcing_core.noise import NoiseSource, SeededNoise
from ...selfforcing_core.policy import cache_policy
from ...selfforcing_core.rollout import Chunk, rollout
from ...selfforcing_core.roofline.policy_bytes import remembered_bytes
from ...selfforcing_core.schedule import least_sigma
from ...selfforcing_core.snapshot import Snapshot
from . import host, page
from .expert_models import GuidedExperts, check_pair_is_whole, divided, each_guider
from .guided_network import GuidedNetwork, LatentShape, RunNoise, Steering, compute_dtype, memory_explained
from .guider_prompts import (
    GuiderConditioning,
    GuiderTimeline,
    PromptStart,
    check_conditionings,
    conditionings_of,
    later_conditionings,
    scheduled_seeds,
)
from .model_settings import (
    AUTO,
    BASE,
    CAUSAL,
    FEW_STEP,
    kind_note,
    low_noise_of,
    settings_of,
    shift_of,
    sigmas_of,
    steps_of,
)
from .patches import check_model_options, check_model_sampling, check_prompt_inputs, unapplied_names
from .progress import CallbackProgress, Progress
from .shared_network import check_causal, config_of

log = logging.getLogger(__name__)


@dataclass
class SnapshotHolder:
    """A snapshot, with its video, as a socket: empty until the sampler that it belongs to has run.

    A SAMPLER node of ComfyUI returns before anything is sampled, so what it puts out can only be filled later.
    """

    snapshot: Snapshot | None = None

    def filled(self) -> Snapshot:
        """Return the snapshot. Raises ValueError if the socket is still empty."""
        if self.snapshot is None or self.snapshot.video_BTCHW is None:
            raise ValueError(
                "the state is empty: its sampler has not run yet, or did not keep it; switch keep_state on, and "
                "connect the sampled LATENT to the input that waits for it"
            )
        return self.snapshot


@dataclass(frozen=True)
class Run:
    """How one rollout differs from what the MODEL's settings say."""

    is_whole: bool = False  # one bidirectional chunk of all frames
    causal: CausalConfig | None = None  # in place of the settings'
    first_sigmas: Tensor | None = None  # of the first chunk; None: the MODEL's own, or those of every chunk
    shift: float | None = None  # of the noise at timestep 0; None is the MODEL's
    noise: NoiseSource | None = None  # for the draws after the first of each chunk; None is by ComfyUI's seed
    progress: Callable[[int], Progress] | None = None  # makes what follows so many evaluations
    resume: SnapshotHolder | None = None  # to go on from
    keep: SnapshotHolder | None = None  # takes the final snapshot
    steering: Steering | None = None  # new prompts and seeds on the way
    working_bytes: float = 0  # what whoever follows the progress needs on the device


class ChunkSampler(comfy.samplers.KSAMPLER):
    """SAMPLER: chunk by chunk with a KV cache; with `is_whole` all frames at once and without."""

    def __init__(self, run: Run) -> None:
        super().__init__(sample_chunks, {"run": run})  # options that ComfyUI hands to the function by name
        self.run = run

    def check(self, guider: Any) -> None:
        """Raise ValueError for a MODEL or prompts that cannot be sampled so; asked before ComfyUI loads anything."""
        settings, native = settings_of(guider.model_patcher), guider.model_patcher.model.diffusion_model
        _check_kind(settings.kind, self.run.is_whole)
        if not self.run.is_whole:
            check_causal(native)
        check_pair_is_whole(settings, has_low_noise=low_noise_of(guider.model_patcher) is not None)
        # Later prompts too: a mistake in the last of them is to cost no video.
        later_prompts = [entry for entry in guider.conds.get("positive", []) if PromptStart.KEY in entry]
        check_conditionings([*conditionings_of(guider), *later_prompts], config_of(native))
        note = kind_note(settings)
        if note is not None:
            page.show_text(note)

    def whole_frames(self, guider: Any, num_frames: int, mask: Tensor | None) -> int:
        """Return how many of so many latent frames are whole chunks."""
        if self.run.is_whole:
            return num_frames
        causal = chunking_behind(known_frames(mask), self._causal(guider))
        return whole_chunks(num_frames, causal.chunk, independent_first_frame=causal.independent_first_frame)

    def frames_at_once(self, guider: Any, noise_shape: tuple[int, ...]) -> int:
        """Return the latent frames of the largest evaluation, for which ComfyUI is to estimate its memory."""
        frames, causal = noise_shape[2], self._causal(guider)
        if self.run.is_whole or not cache_policy(causal.policy).is_joint:
            return frames if self.run.is_whole else min(frames, causal.chunk)
        # As many chunks together as there are steps, which are not known here: at most what the window has room for.
        return frames if causal.window == -1 else min(frames, causal.window - causal.sink)

    def extra_bytes(self, guider: Any, noise_shape: tuple[int, ...]) -> float:
        """Return what ComfyUI's memory estimate does not know of such a run: above all its caches."""
        return self.run.working_bytes + (0 if self.run.is_whole else self._cache_bytes(guider, noise_shape))

    def _causal(self, guider: Any) -> CausalConfig:
        return self.run.causal or settings_of(guider.model_patcher).causal

    def _cache_bytes(self, guider: Any, noise_shape: tuple[int, ...]) -> int:
        """Return the bytes of the caches, if on the MODEL's device, and of what is copied there for one layer.

        The past of a layer is joined with the new keys and values where the two are of different types.
        """
        settings, model = settings_of(guider.model_patcher), guider.model_patcher.model
        config, causal, computed = config_of(model.diffusion_model), self._causal(guider), compute_dtype(model)
        batch, _, frames, height, width = noise_shape
        stored = settings.cache_dtype or computed

        def size(config: WanConfig, dtype: torch.dtype) -> int:
            return KVCache.num_bytes(
                config,
                batch=batch,
                tokens_per_frame=tokens_per_frame(height, width),
                capacity=causal.cache_frames(frames),
                dtype=dtype,
            )

        cache_bytes = 0
        if settings.cache_device is None:
            shape = frames, config.out_dim, height, width
            cache_bytes = size(config, stored)
            cache_bytes += remembered_bytes(config, causal, shape, batch=batch, dtype=computed, cache_dtype=stored)
        is_copied = settings.cache_device is not None or stored != computed
        # One layer at a time, and twice: the past as it is computed with, and joined with what is new.
        copied_bytes = 2 * size(replace(config, num_layers=1), computed) if is_copied else 0
        num_models = 1 if low_noise_of(guider.model_patcher) is None else 2
        return num_models * max(1, len(conditionings_of(guider))) * cache_bytes + copied_bytes


class ChunkGuider(comfy.samplers.CFGGuider):
    """GUIDER with classifier-free guidance; a negative prompt that has no effect is not kept."""

    def set_prompts(self, positive: list[Any], negative: list[Any] | None, cfg: float) -> None:
        """Give the guider its CONDITIONING and scale. Raises ValueError for a cfg that needs a negative prompt."""
        conditionings = {"positive": positive}
        if negative and cfg != 1:
            conditionings["negative"] = negative
        elif cfg != 1:
            raise ValueError(f"cfg {cfg} needs a negative prompt; connect one, or set cfg to 1")
        # Guidance can also be distilled into the weights, and then a scale comes on top of it.
        trained_cfg = settings_of(self.model_patcher).guidance
        if trained_cfg is not None and trained_cfg != cfg:
            page.show_text(f"the model's file says that it is sampled with cfg {trained_cfg:g}; cfg here is {cfg:g}")
        # The inner method takes any names; CFGGuider's own asks for both prompts.
        self.inner_set_conds(conditionings)
        self.set_cfg(cfg)


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
    """Sample as ComfyUI's sampler functions do: normalised latents [B, C, T, H, W] from noise of the first sigma.

    T is shorter than the noise where whoever follows the progress ends the run early, after a whole chunk.
    Frames at the beginning that the noise mask declares known are given to the rollout as its prefix.
    Raises ValueError for whatever the rollout or the model cannot do, before the first network call.
    """
    guider = model_k.inner_model
    settings = settings_of(guider.model_patcher)
    _check_kind(settings.kind, run.is_whole)
    later_prompts = later_conditionings(guider)
    guiders = each_guider(guider, extra_args)
    for each, given in guiders:
        check_model_sampling(each.model_patcher.get_model_object("model_sampling"))
        _check_passes(each, later_prompts, run, given.get("model_options", {}))
    x_BTCHW = rearrange(noise_BCTHW, "b c t h w -> b t c h w")
    batch, frames = x_BTCHW.shape[:2]
    shape: LatentShape = tuple(x_BTCHW.shape[1:])  # type: ignore[assignment]
    # ComfyUI keeps frames that a mask declares known by mixing them in at each step; here the cache reads them once.
    prefix = None if run.is_whole else _given_frames(extra_args.get("denoise_mask"), model_k.latent_image)
    num_known = 0 if prefix is None else prefix.shape[1]
    causal = chunking_behind(num_known, run.causal or settings.causal)
    if run.is_whole:
        causal = CausalConfig(chunk=frames)  # the same loop: a video of one chunk
    steps = _steps(guider.model_patcher, sigmas, run)
    lengths = chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    policy = cache_policy(causal.policy)
    if policy.recomputes and not policy.keeps_first and -1 < causal.window < frames:
        page.show_text(
            f"policy {policy.name} reads the video's first frame as that of its window: decoding is another node's, so "
            "that no later picture can be encoded as one"
        )
    at_once = min(frames, max(lengths) * (len(steps.steps) if policy.is_joint else 1))
    chunk_shape = (*noise_BCTHW.shape[:2], at_once, *noise_BCTHW.shape[3:])
    at_zero = least_sigma(steps.shift) if 0 in (steps.steps[-1], steps.of_chunk(0).steps[-1]) else 0.0
    networks = [GuidedNetwork(*each, settings, chunk_shape, run.working_bytes, at_zero) for each in guiders]
    network: Any = networks[0]
    if len(networks) > 1:
        steps = divided(settings, steps)
        assert steps.boundary is not None
        network = GuidedExperts(*networks, steps.boundary)
    seed = extra_args.get("seed") or 0
    noise = RunNoise(x_BTCHW, run.noise or SeededNoise(seed), run.steering, scheduled_seeds(guider, lengths))
    snapshot = None if run.resume is None else run.resume.filled()
    num_known = num_known if snapshot is None else snapshot.end_frame
    num_calls = _num_calls(lengths, steps, causal, num_known, is_written=snapshot is not None)
    video: list[Tensor] = []  # so far, where the graph keeps it: on the device, memory would grow with the length
    if snapshot is not None:
        assert snapshot.video_BTCHW is not None
        video.append(host.to_graph(snapshot.video_BTCHW))
    if run.progress is None:
        progress: Progress = CallbackProgress(callback, sigmas, x_BTCHW, video, num_calls)
    else:
        progress = run.progress(num_calls)

    def on_step(chunk: int, step: int) -> None:
        host.check_interrupted()
        progress.step()

    prompts = None
    if later_prompts or run.steering is not None:
        resumed_at = 0 if snapshot is None else snapshot.end_frame
        # A snapshot holds keys and values; to compute them again under another prompt takes the latents behind them.
        fixed_frames = 0 if snapshot is None or is_past_known(snapshot, causal) else resumed_at
        prompts = GuiderTimeline(
            network,
            later_prompts,
            lengths,
            run.steering,
            policy=cache_policy(causal.policy),
            fixed_frames=fixed_frames,
            resumed_at=resumed_at,
        )
    with memory_explained(network, causal, shape, batch):
        caches = None if run.is_whole else network.allocate(shape, causal)
        chunks = rollout(
            Guided(network, network.conditioning, caches=caches),
            noise=noise,
            latent_shape=shape,
            causal=causal,
            steps=steps,
            on_step=on_step,
            prompt_at=prompts and prompts.at,
            start=snapshot or prefix,
        )
        try:
            _collect(chunks, video, frames, progress, run.keep)
        finally:
            chunks.close()  # now, and not when the generator is collected: it holds the caches
            network.release()
    return rearrange(torch.cat(video, 1).to(noise_BCTHW.device), "b t c h w -> b c t h w")


def _num_calls(
    lengths: tuple[int, ...], steps: StepConfig, causal: CausalConfig, num_known: int, *, is_written: bool
) -> int:
    """Return how many passes a run takes behind known frames; a pass writes each of their chunks unless a state has."""
    given = sum(end <= num_known for end in itertools.accumulate(lengths))
    policy = cache_policy(causal.policy)
    # One more pass writes each clean chunk into the cache; nothing reads what the last one would write.
    writes = causal.cache_source == "clean"
    if policy.is_joint:  # every pass takes a step of all chunks on the way, and the first one comes in alone
        return (len(steps.steps) - 1 + 2 * (len(lengths) - given) - 1) + (0 if is_written else given)
    if policy.recomputes:  # before each chunk but the video's first
        return sum(len(steps.of_chunk(index).steps) + (index > 0) for index in range(given, len(lengths)))
    num_passes = sum(len(steps.of_chunk(index).steps) + writes for index in range(given, len(lengths))) - writes
    return num_passes + (0 if is_written else given)


def _steps(patcher: Any, sigmas: Tensor, run: Run) -> StepConfig:
    """Return the noise levels, which the graph decides, and how to get from one to the next, which the MODEL does.

    Raises ValueError for a pass at timestep 0 over whole videos.
    """
    first_sigmas = run.first_sigmas
    if first_sigmas is None and not run.is_whole:
        first_sigmas = sigmas_of(patcher, AUTO, AUTO)[1]
        if first_sigmas is not None:
            log.info("the first chunk has the model's own %d steps", len(first_sigmas) - 1)
    steps = steps_of(sigmas, first_sigmas, shift=run.shift or shift_of(patcher))
    if run.is_whole and steps.steps[-1] == 0:
        raise ValueError(
            "the sigmas end in two zeros, a pass at timestep 0, which only models that generate chunk by chunk have "
            "here; use other sigmas"
        )
    trained = settings_of(patcher).steps
    return replace(steps, solver=trained.solver, boundary=trained.boundary)


def _check_passes(
    guider: Any,
    later_prompts: list[tuple[PromptStart, list[GuiderConditioning]]],
    run: Run,
    model_options: dict[str, Any],
) -> None:
    """Raise ValueError for prompts, or for what is set on the MODEL, that passes over it cannot follow."""
    patcher = guider.model_patcher
    native = patcher.model.diffusion_model
    all_conditionings = [*conditionings_of(guider), *(entry for _, entries in later_prompts for entry in entries)]
    check_conditionings(all_conditionings, config_of(native))
    if not run.is_whole:
        check_causal(native)
        check_model_options(model_options)
        for conditioning in all_conditionings:
            check_prompt_inputs(conditioning["model_conds"])
        return
    # ComfyUI's own forward pass follows whatever is set on it, but for one kind of parameters in a LoRA.
    unapplied = unapplied_names(patcher, (name for name, _ in native.named_parameters() if name.endswith("modulation")))
    if unapplied:
        log.warning(
            "%d modulation entries of a LoRA are not applied (%s, ...): ComfyUI's own forward pass leaves them out",
            len(unapplied),
            unapplied[0],
        )


def _collect(
    chunks: Generator[Chunk, bool | None, None],
    video: list[Tensor],
    num_frames: int,
    progress: Progress,
    keep: SnapshotHolder | None,
) -> None:
    """Add the latents of every chunk to `video` until the last of the video, or the one that is to be its last.

    A chunk is made again as long as whoever follows the progress wants that. keep: takes the final snapshot.
    """
    for chunk in chunks:
        while progress.chunk(chunk):
            chunk = chunks.send(True)
        video.append(host.to_graph(chunk.latents_BTCHW))
        is_last = progress.is_finished or chunk.start_frame + chunk.latents_BTCHW.shape[1] == num_frames
        if keep is not None and is_last:
            snapshot = chunk.snapshot(torch.device("cpu"))  # nothing on the device: it may be full by now
            keep.snapshot = replace(snapshot, video_BTCHW=torch.cat(video, 1)).to("cpu")
        if is_last:
            break
    host.check_interrupted()  # a stop that came while the last chunk was shown
    progress.finish()


def chunking_behind(num_known: int, causal: CausalConfig) -> CausalConfig:
    """Return how a video that begins with known frames is cut: behind a single one, frame 0 is a chunk of its own."""
    # A picture is one latent frame, since the causal VAE encodes the first frame of a video alone. The reference counts
    # likewise for a given picture: one frame, then whole chunks.
    is_single = num_known % causal.chunk == 1 and causal.chunk > 1
    return replace(causal, independent_first_frame=True) if is_single else causal


def _given_frames(mask: Tensor | None, latent_image: Tensor | None) -> Tensor | None:
    """Return latents [B, T, C, H, W] of the first frames, as far as the noise mask says that they are known (0)."""
    if mask is None or latent_image is None:
        return None
    count = known_frames(mask)
    return rearrange(latent_image[:, :, :count], "b c t h w -> b t c h w").float() if count else None


def known_frames(mask_BCTHW: Tensor | None) -> int:
    """Return how many first frames a noise mask declares known (0). Raises ValueError for any other mask."""
    if mask_BCTHW is None:
        return 0
    # A picture's mask has no axis of time: it cannot say which frames it means, and is refused below.
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
