"""A request for videos, and everything that can be decided and refused about it before anything is computed.

Letters: R RGB, H W height and width in pixels, T latent frames, C latent channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import check_writable
from ..attention import ATTENTIONS
from ..codecs.image import read_image
from ..codecs.sound import Sound, sound_of
from ..codecs.video_formats import VideoFormat, check_video
from ..codecs.video_reader import TRAINED_FPS, GivenVideo, given_video
from ..config import CausalConfig, StepConfig, WanConfig
from ..experts import boundary_behind
from ..geometry import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    VideoGeometry,
    chunk_starts,
    covered_latents,
    latent_frames,
    pixel_frames,
)
from ..joint import check_joint
from ..policy import SELF_FORCING, CachePolicy, cache_policy
from ..prompt_schedule import Transition, parse_schedule, schedule_note, start_frames
from ..roofline.meter import Recipe
from ..roofline.policy_bytes import planned_bytes
from ..schedule import FlowSchedule
from ..weights.bundles import is_bundle, resolve_model, resolve_taehv, resolve_text_encoder
from ..weights.checkpoint import DTYPES, Checkpoint
from ..weights.load import check_taehv
from ..weights.pipeline_folder import read_pipeline
from ..weights.preset_settings import (
    AUTO,
    OPTIONS,
    PresetReading,
    counted_boundary,
    partner_path,
    read_with_preset,
)
from ..weights.presets import PRESETS, Preset
from .pair import Pair, read_pair, takes_turns
from .request import BUNDLE_SIZES, SAME, WAN_SIZE, PromptBatch, Request
from .start import context_frames, read_latents

log = logging.getLogger(__name__)
# What the KV cache may hold its numbers in: what networks compute in, and two types of 8 bits.
CACHE_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
STEP_LISTS = ("steps", "first_chunk_steps")
LEAST_FPS, MOST_FPS = 0.001, 1000  # beyond, files store no rate or another one


@dataclass(frozen=True)
class Timeline:
    """The prompts and seeds of a batch's videos by the latent frames from which they hold."""

    prompts: tuple[str, ...]  # every one that is encoded, the first frame's first
    later: dict[int, tuple[str, Transition]]  # each later prompt, and how it takes its place; with the policy's word
    seeds: dict[int, int]  # of the noise; OWN_SEED goes back to the request's
    has_times: bool  # another prompt or seed holds from a later moment on


@dataclass(frozen=True)
class Extent:
    """How large and how long a video is, and how much of it is given."""

    geometry: VideoGeometry  # of what the rollout makes: with an extended video's end, without what stands before it
    chunk_lengths: tuple[int, ...]  # in latent frames
    first_frame: int  # latent frames of the extended video before those that the rollout is given
    shown_frames: int  # video frames of the file: all of the rollout's, or those of the extended video and the new ones
    generated_frames: int  # video frames that the model makes: not those of a picture or of what is extended


@dataclass(frozen=True)
class Plan:
    """A request that was checked and decided, with all that was read to decide it."""

    request: Request
    batches: tuple[PromptBatch, ...]
    timelines: tuple[Timeline, ...]  # one for each batch
    checkpoint: Checkpoint  # of the video model; mapped (bare pickles are not), and emptied when the model is made
    config: WanConfig  # its sizes
    pair: Pair | None  # with the network for low noise, where the model is one for high noise
    takes_turns: bool  # only one of the two lies on the device at a time
    preset: Preset | None  # that the model is run with
    fps: float  # of the videos
    decoder: str  # of the latents: "taehv" or "vae"
    taehv: Checkpoint | None  # of the tiny autoencoder, kept like the model's; None where the Wan VAE decodes
    text_encoder: Path  # its file or folder
    encoded_prompts: tuple[str, ...]  # of all batches and, with guidance, what to keep away from
    extent: Extent
    latent_shape: tuple[int, int, int, int]  # T, C, H, W of what the rollout makes
    causal: CausalConfig
    steps: StepConfig
    device: torch.device
    dtype: torch.dtype  # that the networks compute in
    cache_dtype: torch.dtype
    cfg: float  # scale of the guidance away from the request's negative prompt; 1 is none
    source: Tensor | GivenVideo | None  # what is extended: a video, or latents [T, C, H, W]
    image_RHW: Tensor | None  # the first frame, in its own size
    is_prefixed_by_image: bool  # it enters as the first frame in the cache; image-to-video models get it as channels
    sound: Sound | None  # of the file; None where that has none
    file_bits: int  # of each colour of a pixel in the images that its format takes

    def recipe(self, batch: int) -> Recipe:
        """Return what is computed for `batch` videos."""
        number_bytes = self.dtype.itemsize
        return Recipe(
            self.config,
            self.extent.chunk_lengths,
            *self.latent_shape[-2:],
            steps=len(self.steps.steps),
            first_chunk_steps=len(self.steps.of_chunk(0).steps),
            window=self.causal.cache_frames(self.latent_shape[0]),
            decoder=self.decoder,
            guided=self.cfg != 1,
            batch=batch,
            networks=1 if self.pair is None else 2,
            resident=1 if self.pair is None or self.takes_turns else 2,
            weight_bytes=1 if self.request.fp8 else number_bytes,
            cache_bytes=self.cache_dtype.itemsize,
            activation_bytes=number_bytes,
            writes=self.causal.cache_source == "clean",
            policy_bytes=self._policy_bytes(batch),
            is_joint=cache_policy(self.causal.policy).is_joint,
        )

    def _policy_bytes(self, batch: int) -> int:
        """Return what the policy of the cache takes beside the window, in one cache; see `Recipe`."""
        if self.causal.policy == SELF_FORCING.name or len(self.extent.chunk_lengths) == 1:
            return 0
        policies = self.causal, replace(self.causal, policy=SELF_FORCING.name)
        own, plain = (
            planned_bytes(
                self.config,
                causal,
                self.latent_shape,
                batch=batch,
                dtype=self.dtype,
                cache_dtype=self.cache_dtype,
                steps=self.steps,
            )
            for causal in policies
        )
        return own.ring + own.memory - plain.ring

    def memory_in_words(self, text_bytes: int) -> str:
        """Return what the device will have to hold, counted before anything is loaded.

        text_bytes: weights of the text encoder; 0 where none is loaded.
        """
        recipe = self.recipe(max(len(batch.outs) for batch in self.batches))
        peak = recipe.peak_bytes()
        weights, caches, working = (peak[name] / 1e9 for name in ("weights", "caches", "working"))
        text = f"text encoder {text_bytes / 1e9:.1f} GB, gone before the rest comes; " if text_bytes else ""
        models = "video model" if self.pair is None else "one of two models" if self.takes_turns else "two models"
        return (
            f"on {self.device}: {text}{models} {weights:.1f} GB, caches {caches:.1f} GB, work {working:.1f} GB, "
            f"together {weights + caches + working:.1f} GB{recipe.without}"
        )


def plan_request(
    request: Request, batches: Sequence[PromptBatch], rewrite: Callable[[list[str]], list[str]] | None = None
) -> Plan:
    """Return the plan after every check that needs no computing, cheapest first; each file is read once and kept.

    rewrite: gives the texts that the model reads, from those of the batches; asked once, when all else is checked.
    Raises ValueError for whatever cannot work.
    """
    _check_options(request)
    decoder = _decoder(request)
    file_format = _check_files(request, batches, _or(request.fps, TRAINED_FPS))
    # What is read from here on is kept in the plan, so that no file is opened twice.
    audio = None if request.audio is None else sound_of(request.audio)

    model_path, is_own = resolve_model(request.model), is_bundle(request.model)
    text_encoder = resolve_text_encoder(request.text_encoder or request.model)
    taehv_path = resolve_taehv(request.taehv or request.model) if decoder == "taehv" else None
    folder = read_pipeline(model_path)
    reading = _reading(request, model_path)
    checkpoint, preset = reading.checkpoint, reading.preset
    config = checkpoint.config
    if not isinstance(config, WanConfig):
        raise ValueError(f"{request.model} is a {checkpoint.kind}, not a video model; give it as --taehv")
    notes: list[str] = []  # whatever is put in place of what the checkpoint says, or is guessed, in words
    twin = None if preset is None or preset.twin is None else partner_path(preset, model_path, preset.twin.file)
    folder = replace(folder, low_noise=twin or folder.low_noise)
    pair = read_pair(request, model_path, checkpoint, folder, notes)
    _check_companions(request, config, decoder, is_own=is_own)
    taehv = None if taehv_path is None else _taehv(request, taehv_path, checkpoint, config)

    fps = _or(request.fps, _or(preset and preset.fps, TRAINED_FPS))
    if fps != _or(request.fps, TRAINED_FPS):  # not every format of files knows every rate
        file_format = _check_files(request, batches, fps)
    is_prefixed = request.image is not None and config.model_type == "t2v"
    is_whole = checkpoint.bidirectional is not None and request.chunk is None
    _check_start(request, is_whole=is_whole, is_prefixed=is_prefixed)
    causal, steps, cfg = _settings(request, reading, notes, is_prefixed=is_prefixed)
    if pair is not None:
        steps = pair.divided(request, causal, _divided_by_count(request, preset, steps), notes)
    source = _source(request, config, fps)
    usual = _usual_size(request.model, preset)
    extent = _extent(request, causal, source, usual, is_whole=is_whole, is_prefixed=is_prefixed)
    size = extent.geometry
    notes += _not_read(request, preset, size, fps)
    notes += _joint_remark(preset, causal, steps)
    latent_shape = (size.latent_frames, config.out_dim, size.latent_height, size.latent_width)
    check_joint(causal, steps, size.latent_frames)
    # Only now is the size known: it may be that of the video that is extended.
    file_format.check_size(size.width, size.height)
    timeline_of = {
        text: _timeline(request, text, extent.chunk_lengths, fps, cache_policy(causal.policy))
        for text in dict.fromkeys(batch.text for batch in batches)
    }
    timelines = tuple(timeline_of[batch.text] for batch in batches)

    device = _device(request.device)
    dtype = _dtype(request.dtype, checkpoint, device)
    cache_dtype = _cache_dtype(request, dtype, device)
    image_RHW = None if request.image is None else read_image(request.image)
    if rewrite is not None:
        batches, timelines = _rewritten(batches, timelines, rewrite)
    guided = [] if cfg == 1 else [request.negative]
    encoded_prompts = dict.fromkeys([*(prompt for timeline in timelines for prompt in timeline.prompts), *guided])
    speaker = request.model if preset is None else f"{request.model} ({preset.name})"
    own = [*(f"{model_path} {note}" for note in reading.notes), *(f"{speaker} {note}" for note in notes)]
    read = [each for each in (checkpoint, pair and pair.low, taehv) if each is not None]
    for line in (*(note for each in read for note in each.notes), *own):
        log.warning("%s", line)
    sound = _sound(request, source, audio, extent.shown_frames, fps, is_silent=file_format.sound is None)
    plan = Plan(
        request=request,
        batches=tuple(batches),
        timelines=timelines,
        checkpoint=checkpoint,
        config=config,
        pair=pair,
        takes_turns=False,
        preset=preset,
        fps=fps,
        decoder=decoder,
        taehv=taehv,
        text_encoder=text_encoder,
        encoded_prompts=tuple(encoded_prompts),
        extent=extent,
        latent_shape=latent_shape,
        causal=causal,
        steps=steps,
        device=device,
        dtype=dtype,
        cache_dtype=cache_dtype,
        cfg=cfg,
        source=source,
        image_RHW=image_RHW,
        is_prefixed_by_image=is_prefixed,
        sound=sound,
        file_bits=file_format.bits,
    )
    if pair is None:
        return plan
    largest = max(len(batch.outs) for batch in batches)
    return replace(plan, takes_turns=takes_turns(request, plan.recipe(largest), device))


def _rewritten(
    batches: Sequence[PromptBatch], timelines: Sequence[Timeline], rewrite: Callable[[list[str]], list[str]]
) -> tuple[tuple[PromptBatch, ...], tuple[Timeline, ...]]:
    """Return the batches with longer prompts, each video under its own as the user wrote it."""
    if any(timeline.has_times or timeline.seeds for timeline in timelines):
        raise ValueError("--extend-prompt makes one prompt of a schedule; write its prompts out instead")
    texts = rewrite([batch.text for batch in batches])
    return (
        tuple(replace(batch, text=text) for batch, text in zip(batches, texts)),
        tuple(replace(timeline, prompts=(text,)) for timeline, text in zip(timelines, texts)),
    )


# ------------------------------------------------------------------- checks --
def _check_options(request: Request) -> None:
    """Raise ValueError for an option whose value is wrong whatever the files hold."""
    if request.fps is not None and not LEAST_FPS <= request.fps <= MOST_FPS:
        raise ValueError(
            f"fps {request.fps} is not a rate between {LEAST_FPS} and {MOST_FPS}; Wan models are trained at 16"
        )
    if request.cfg is not None and not 0 < request.cfg < float("inf"):
        raise ValueError(
            f"--cfg {request.cfg} is not a positive number; 1 is no guidance, undistilled models take about 5"
        )
    if request.attention not in ATTENTIONS:
        raise ValueError(f"attention {request.attention!r} is unknown; use {', '.join(ATTENTIONS)}")
    if request.roofline and (request.image or request.extend):
        raise ValueError("--roofline measures videos that begin with noise; leave out --image and --extend")


def _check_files(request: Request, batches: Sequence[PromptBatch], fps: float) -> VideoFormat:
    """Return how the videos are encoded. Raises ValueError for files that cannot be written or not so."""
    if not batches:
        raise ValueError("no prompt was given, so that there is nothing to generate; write one")
    outs = [out for batch in batches for out in batch.outs]
    more = [path for path in (request.sheet, request.latents) if path is not None]
    if any(not batch.text.strip() for batch in batches):
        raise ValueError("the prompt is empty; describe the video in a few words")
    if more and len(outs) > 1:
        raise ValueError("--sheet and --latents go with one video; leave them out for several")
    if len({path.resolve() for path in [*outs, *more]}) < len(outs) + len(more):
        raise ValueError(f"{outs[0]}: video, contact sheet and latents cannot be one file; name two or three")
    has_sound = request.audio is not None
    formats = [check_video(out, request.codec, request.quality, fps, has_sound=has_sound) for out in outs]
    for path in [*outs, *more]:
        check_writable(path, overwrite=request.overwrite)
    return formats[0]  # all of one command have the same ending


def _timeline(request: Request, text: str, lengths: Sequence[int], fps: float, policy: CachePolicy) -> Timeline:
    """Lay a schedule onto chunks of these lengths.

    Raises ValueError unless its prompts begin inside the video, each in a chunk of its own, and the policy can do what
    they ask for to the frames so far.
    """
    entries = list(parse_schedule(text))
    starts = start_frames(entries, lengths, entries[0].fps or fps)
    note = schedule_note(text)
    if len(entries) > 1 and request.extend is not None:
        raise ValueError("a schedule counts from the beginning of a video; extend with one prompt at a time instead")
    if note is not None:
        log.warning("%s", note)
    later = {
        start: (entry.prompt, _as_policy_says(entry.transition(request.history), policy))
        for start, entry in zip(starts[1:], entries[1:])
        if entry.prompt  # one without goes on with the prompt before
    }
    for start, (prompt, transition) in later.items():
        chunks_left = sum(begin >= start for begin in chunk_starts(lengths))
        if transition.blend > chunks_left:
            log.warning(
                "the prompt %a is blended in over %d chunks, but the video ends after %d of them; it is not reached",
                prompt,
                transition.blend,
                chunks_left,
            )
    seeds = {start: entry.seed for start, entry in zip(starts, entries) if entry.seed is not None}
    prompts = dict.fromkeys([entries[0].prompt, *(prompt for prompt, _ in later.values())])
    return Timeline(tuple(prompts), later, seeds, has_times=len(entries) > 1)


def _as_policy_says(transition: Transition, policy: CachePolicy) -> Transition:
    """Return it with the policy's history where none was asked for. Raises ValueError for one it cannot follow."""
    return replace(transition, history=policy.with_history(transition.history).history)


def _check_companions(request: Request, config: WanConfig, decoder: str, *, is_own: bool) -> None:
    """Raise ValueError unless every other network that this model needs is named, or is in its own bundle."""
    if decoder == "vae" and request.vae is None:
        raise ValueError("--decoder vae needs the file of the VAE; give it as --vae")
    has_decoder = request.vae is not None if decoder == "vae" else request.taehv is not None
    if not is_own and not (has_decoder and request.text_encoder):
        raise ValueError(
            f"{request.model} is a single file; give its --taehv (or --vae) and its --text-encoder as well"
        )
    if request.image and request.extend:
        raise ValueError("--image and --extend both say how the video starts; give one of them")
    if config.model_type != "i2v":
        return
    if not (request.image and request.vae and (request.clip or not config.reads_clip)):
        options = "--image, --vae and --clip" if config.reads_clip else "--image and --vae"
        raise ValueError(f"this is an image-to-video model; give it {options}")
    if request.clip and not config.reads_clip:
        raise ValueError("this image-to-video model reads the image's channels alone (as Wan 2.2); leave out --clip")


def _decoder(request: Request) -> str:
    decoder = request.decoder or ("vae" if request.vae is not None and request.taehv is None else "taehv")
    if decoder not in ("taehv", "vae"):
        raise ValueError(f"decoder {decoder!r} is unknown; use taehv or vae")
    return decoder


# ----------------------------------------------------------------- settings --
def _reading(request: Request, path: Path) -> PresetReading:
    """Return the checkpoint of the model with the settings of its preset."""
    given = {name for name in OPTIONS if getattr(request, name, None) is not None}
    if isinstance(request.steps, int) or request.warp_steps is not None:
        given.add("warp")  # a number of steps is a list that goes through the shift, whatever the preset's does
    given -= {"weights"} if request.weights == AUTO else set()
    given |= {"guidance"} if request.cfg is not None else set()
    given |= {"boundary"} if request.boundary_step is not None else set()
    given |= {"low_noise"} if request.low_noise is not None else set()
    choice = request.preset
    # By its name a release was fetched, whatever its file is called.
    if choice == AUTO and request.model in PRESETS and path != Path(request.model):
        choice = request.model
    return read_with_preset(path, choice, weights=request.weights, loras=request.lora, given=given)


def _check_start(request: Request, *, is_whole: bool, is_prefixed: bool) -> None:
    """Raise ValueError where a bidirectional network is to go on from frames, which only chunks can see."""
    for name, is_given in (("--extend", request.extend), ("--image", is_prefixed)):
        if is_whole and is_given:
            raise ValueError(
                f"{request.model} is bidirectional: it makes all frames of a video at once and sees none before them; "
                f"leave {name} out, or give --chunk to run it chunk by chunk, for which it was not trained"
            )


def _settings(
    request: Request, reading: PresetReading, notes: list[str], *, is_prefixed: bool
) -> tuple[CausalConfig, StepConfig, float]:
    """Return the request's settings, where it has none the checkpoint's, where that has none the defaults."""
    checkpoint = reading.checkpoint
    if (checkpoint.causal, checkpoint.bidirectional) == (None, None) and request.chunk is None:
        notes.append(
            "does not say how it was trained; it is sampled chunk by chunk, as Self Forcing's models are "
            f"(--chunk {CausalConfig.chunk}); a bidirectional one needs --chunk of all latent frames and --window -1"
        )
    causal_options = _causal_options(request, checkpoint, notes, unsaid=reading.unsaid)
    # Of a pipeline's folder alone only the shift is what somebody said.
    unsaid = reading.unsaid | ({*STEP_LISTS, "solver", "warp"} if reading.has_folder_steps else set())
    step_options = _step_options(request, checkpoint.steps, notes, unsaid=unsaid)
    if None not in (request.cfg, checkpoint.guidance) and request.cfg != checkpoint.guidance:
        notes.append(f"says guidance {checkpoint.guidance:g}; --cfg {request.cfg:g} is used")
    cfg = float(_or(request.cfg, _or(checkpoint.guidance, 1.0)))
    causal = replace(checkpoint.causal or CausalConfig(), **causal_options)
    if is_prefixed and causal.chunk > 1:  # the picture fills one latent frame, so that it has to be a chunk of its own
        causal = replace(causal, independent_first_frame=True)
    steps = replace(checkpoint.steps or StepConfig(), **step_options)
    if steps.first_chunk_steps and (is_prefixed or request.extend):
        notes.append("is given the video's beginning, so that no chunk takes the steps of the first one")
    return causal, steps, cfg


def _divided_by_count(request: Request, preset: Preset | None, steps: StepConfig) -> StepConfig:
    """Return the steps with the boundary of a preset that counts them, at the noise which they have in this run."""
    step = counted_boundary(preset)
    if not step or request.boundary is not None or request.boundary_step is not None:
        return steps
    return replace(steps, boundary=boundary_behind(steps, step))


def _given(request: Request, *names: str) -> dict[str, Any]:
    """Return those of these options that the request gives."""
    return {name: getattr(request, name) for name in names if getattr(request, name) is not None}


def _causal_options(
    request: Request, checkpoint: Checkpoint, notes: list[str], *, unsaid: Collection[str]
) -> dict[str, Any]:
    """Return what takes the place of the checkpoint's causal settings, or of the defaults where it has none.

    unsaid: those of the stored ones that nobody has said.
    """
    options = _given(request, "chunk", "window", "sink", "policy", "cache_source")
    if checkpoint.bidirectional is None:
        notes += _replaced(checkpoint.causal, options, unsaid) if checkpoint.causal else []
        return options
    if "chunk" in options:
        notes.append(f"says that it is bidirectional; --chunk {options['chunk']} is used")
        return options
    trained, frames = checkpoint.bidirectional.latent_frames, BUNDLE_SIZES.get(request.model, WAN_SIZE)[2]
    count = _or(trained, latent_frames(frames)) if request.frames is None else latent_frames(request.frames)
    if trained is None:
        notes.append(f"is taken for a bidirectional model: all {count} latent frames are made at once (else --chunk 3)")
    elif count != trained:
        notes.append(f"was trained on {pixel_frames(trained)} frames at once; --frames {request.frames} is used")
    return {"chunk": count, **options}


def _step_options(
    request: Request, stored: StepConfig | None, notes: list[str], *, unsaid: Collection[str]
) -> dict[str, Any]:
    """Return what takes the place of the checkpoint's noise levels, or of the defaults where it has none.

    unsaid: those of the stored ones that nobody has said.
    """
    options = _given(request, "shift", "solver", *STEP_LISTS)
    trained, is_warp_given = stored or StepConfig(), request.warp_steps is not None
    is_warped = _or(request.warp_steps, trained.warp)
    counts = [name for name in STEP_LISTS if isinstance(options.get(name), int)]
    for name in counts:  # evenly spaced ones go through the shift, whatever the checkpoint's own list does
        even = StepConfig.even(options[name], shift=_or(request.shift, trained.shift))
        options[name] = even.steps if is_warped or is_warp_given else FlowSchedule(even).timesteps
    if options.get("first_chunk_steps") == ():
        options["first_chunk_steps"] = None
    if stored is not None:
        notes += _replaced(stored, options, unsaid)
        if "steps" in options and stored.first_chunk_steps and "first_chunk_steps" not in options:
            notes.append(f"says steps of its own for the first chunk, which are kept (else --first-chunk-steps {SAME})")
        if is_warp_given and is_warped != stored.warp and "warp" not in unsaid:
            says = "go through the shift" if stored.warp else "are what the model sees"
            notes.append(f"says that its steps {says}; --{'' if is_warped else 'no-'}warp-steps is used")
    if is_warp_given:
        options["warp"] = is_warped
    steps = replace(trained, **options)
    ends_in_zero = 0 in (steps.steps[-1], steps.of_chunk(0).steps[-1])  # which has a noise level by the shift
    if "shift" in options and not (is_warped or counts or ends_in_zero) and trained.sigma == "exact":
        notes.append(f"takes timesteps as they are, so that --shift {request.shift:g} changes nothing")
    elif not is_warped and not is_warp_given and any(isinstance(getattr(request, name), tuple) for name in STEP_LISTS):
        notes.append("takes timesteps as they are: --steps are not warped by the shift (else --warp-steps)")
    return options


def _replaced(stored: CausalConfig | StepConfig, options: dict[str, Any], unsaid: Collection[str]) -> list[str]:
    """Return a line for every setting that somebody has said and another value was given for."""

    def words(value: Any) -> str:
        if value is None:  # of the first chunk's steps
            return SAME
        listed = value if isinstance(value, tuple) else (value,)
        return ",".join(f"{item:g}" if isinstance(item, (int, float)) else str(item) for item in listed)

    return [
        f"says {name.replace('_', ' ')} {words(getattr(stored, name))}; "
        f"--{name.replace('_', '-')} {words(value)} is used"
        for name, value in options.items()
        if value != getattr(stored, name) and name not in unsaid
    ]


def _sound(
    request: Request,
    source: Tensor | GivenVideo | None,
    audio: tuple[Sound, float] | None,
    shown_frames: int,
    fps: float,
    *,
    is_silent: bool,
) -> Sound | None:
    """Return the given sound, cut at the video's end; else that of the extended video, for as long as that lasts.

    What becomes of either, and of the extended video, is logged.
    """
    sound, notes = None, []
    if isinstance(source, GivenVideo):
        findings = source.findings
        notes += findings.in_words()
        if fps != TRAINED_FPS:
            notes.append(f"goes on at {fps:g} fps; Wan models know motion at {TRAINED_FPS}")
        if findings.sound is not None:
            sound = Sound(findings.path, findings.start, findings.num_given / (findings.fps or Fraction(TRAINED_FPS)))
    if audio is not None:
        given, seconds = audio
        # A rate such as 29.97 stands for 30000/1001, of which the file counts its time.
        end = shown_frames / Fraction(fps).limit_denominator(1001)
        if seconds > end:
            log.warning("%s: its %.2f s are cut at the video's end, %.2f s", request.audio, seconds, end)
        elif seconds < end:
            log.warning("%s: lasts %.2f s; the rest of the video's %.2f s is silent", request.audio, seconds, end)
        if sound is not None:
            log.warning("%s: is heard in place of the sound of %s", request.audio, request.extend)
        sound = replace(given, seconds=min(given.seconds, end))
    elif sound is not None and is_silent:
        notes.append(f"its sound is lost: {request.out.name} has none")
    elif sound is not None:
        notes.append(f"its sound is kept for its {float(sound.seconds):.2f} s; what is added is silent")
        if request.latents is not None:
            notes.append(f"{request.latents} keeps no sound; a video that goes on from it has none")
    for note in notes:
        log.warning("%s: %s", request.extend, note)
    return None if is_silent else sound


def _source(request: Request, config: WanConfig, fps: float) -> Tensor | GivenVideo | None:
    """Return what is to be extended: latents [T, C, H, W] or a video."""
    if request.extend is None:
        return None
    latents = read_latents(request.extend)
    if latents is None:
        return given_video(request.extend, fps)
    if latents.shape[1] != config.out_dim:
        raise ValueError(f"{request.extend}: latents of {latents.shape[1]} channels, the model makes {config.out_dim}")
    return latents


def _not_read(request: Request, preset: Preset | None, size: VideoGeometry, fps: float) -> list[str]:
    """Return a line about what nobody has read of a preset's picture, where the usual one takes its place."""
    is_given = {"size": None not in (request.width, request.height) or request.extend, "rate": request.fps is not None}
    read = {} if preset is None else {"size": preset.native_size, "rate": preset.fps}
    names = [name for name, number in read.items() if number is None and not is_given[name]]
    words = f"{size.width}x{size.height} at {fps:g} frames a second"
    return [f"has no {' and '.join(names)} that was read; it makes {words}"] if names else []


def _joint_remark(preset: Preset | None, causal: CausalConfig | None, steps: StepConfig) -> list[str]:
    """Return a line where other frames are denoised together than those that a preset was trained with."""
    trained = None if preset is None else preset.policy_options.get("joint_frames")
    if preset is None or trained is None or causal is None or causal.policy != preset.policy:
        return []
    frames = len(steps.steps) * causal.chunk  # a chunk for each step
    if frames == trained:
        return []
    return [
        f"was trained with {trained} frames denoised together; {len(steps.steps)} steps and chunks of {causal.chunk} "
        f"make {frames}: give {trained // causal.chunk} steps for its own"
    ]


def _usual_size(model: str, preset: Preset | None) -> tuple[int, int, int]:
    """Return width, height and frames of a video where the request does not say."""
    width, height, frames = BUNDLE_SIZES.get(model, WAN_SIZE)
    if preset is not None and preset.native_size is not None:
        height, width = preset.native_size
    return width, height, frames


def _extent(
    request: Request,
    causal: CausalConfig,
    source: Tensor | GivenVideo | None,
    usual_size: tuple[int, int, int],
    *,
    is_whole: bool,
    is_prefixed: bool,
) -> Extent:
    """Return the size of the video. Raises ValueError for one that the chunks, or what is extended, do not allow."""
    width, height, usual = usual_size
    if isinstance(source, GivenVideo):
        width, height = source.width, source.height
    elif source is not None:
        height, width = (side * SPATIAL_FACTOR for side in source.shape[-2:])
    size = _or(request.width, width), _or(request.height, height)
    if source is not None and size != (width, height):
        raise ValueError(f"{request.extend} is {width}x{height}; leave --width and --height out when extending it")
    # As many whole chunks as fit into the usual length: what is made where the request does not say.
    first = int(causal.independent_first_frame)
    count = 1 if is_whole else max(1, (latent_frames(usual) - first) // causal.chunk)
    if source is None:
        frames = pixel_frames(first + count * causal.chunk) if request.frames is None else request.frames
        given, available, before = int(is_prefixed), 0, 0
    else:
        is_video = isinstance(source, GivenVideo)
        available = covered_latents(len(source)) if is_video else len(source)
        before = len(source) if is_video else pixel_frames(len(source))  # video frames that stand before the new ones
        given = context_frames(available, causal)
        frames = pixel_frames(given) + _added(_or(request.frames, TEMPORAL_FACTOR * count * causal.chunk), causal)
        if request.latents is not None and is_video and pixel_frames(given) < before:
            raise ValueError(
                f"--latents would begin only with the last {pixel_frames(given)} of the {before} frames of "
                f"{request.extend}; extend latents that were kept with it, or leave --latents out"
            )
    geometry = VideoGeometry(*size, frames, causal.chunk, causal.independent_first_frame)
    generated = frames - pixel_frames(given)
    return Extent(
        geometry=geometry,
        chunk_lengths=geometry.chunk_lengths,
        first_frame=0 if source is None else available - given,
        shown_frames=frames if source is None else before + generated,
        generated_frames=generated,
    )


def _added(frames: int, causal: CausalConfig) -> int:
    """Return the frames that an extension adds. Raises ValueError unless they are whole chunks."""
    step = TEMPORAL_FACTOR * causal.chunk
    if frames < 1 or frames % step:
        below = max(frames, 0) // step * step
        nearest = " or ".join(str(count) for count in (below, below + step) if count)
        raise ValueError(f"{frames} frames to add are not whole chunks of {step} frames; use {nearest}")
    return frames


def _taehv(request: Request, path: Path, model: Checkpoint, config: WanConfig) -> Checkpoint:
    """Return the TAEHV's checkpoint, which decodes this model's latents; a bundle's own, if it says nothing, does."""
    return check_taehv(
        path,
        channels=config.out_dim,
        latent_space=model.latent_space,
        said=request.taehv_latents,
        is_own=request.taehv is None,
        say="--taehv-latents",
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # "meta" takes a number and cannot give it back
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device {name!r} cannot be used here; cpu always works") from error
    return device


def _dtype(name: str | None, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the asked one; else float32 on a CPU (exact, and fastest there), elsewhere the stored one of 16 bits."""
    if name is None and device.type == "cpu":
        name = "float32"
    elif name is None:  # float32 files are what training left, not what a video needs
        name = checkpoint.dtype if checkpoint.dtype in ("bfloat16", "float16") else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is no type to compute in; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _cache_dtype(request: Request, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number type of the KV cache: the asked one, else that of the model."""
    if request.cache_dtype not in (None, *CACHE_DTYPES):
        raise ValueError(f"--cache-dtype {request.cache_dtype!r} is unknown; use {', '.join(CACHE_DTYPES)}")
    cache_dtype = dtype if request.cache_dtype is None else CACHE_DTYPES[request.cache_dtype]
    if device.type == "mps" and (request.fp8 or cache_dtype == torch.float8_e4m3fn):
        name = "--fp8" if request.fp8 else "cache-dtype float8_e4m3fn"
        raise ValueError(f"{name} needs numbers that mps does not have; use --cache-dtype int8 to save memory there")
    return cache_dtype
