"""A request for videos, and everything that can be decided and refused about it before anything is computed.

Letters: V video frames, R RGB, H W height and width in pixels, T latent frames, C latent channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .atomic import check_writable
from .attention import ATTENTIONS
from .checkpoint import DTYPES, Checkpoint, read_checkpoint
from .config import CausalConfig, StepConfig, WanConfig
from .geometry import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    VideoGeometry,
    covered_latents,
    latent_frames,
    pixel_frames,
)
from .hub import is_bundle, resolve_model, resolve_taehv
from .image import read_image
from .load import check_taehv
from .meter import Recipe
from .prompt_schedule import schedule_note, start_frames
from .request import BUNDLE_SIZES, WAN_SIZE, PromptBatch, Request
from .sound import Sound, sound_of
from .start import context_frames, read_latents
from .video_formats import check_video, video_format
from .video_reader import TRAINED_FPS, GivenVideo, given_video

log = logging.getLogger(__name__)
# What the KV cache may hold its numbers in: what networks compute in, and two types of 8 bits.
CACHE_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
LEAST_FPS, MOST_FPS = 0.001, 1000  # beyond, files store no rate or another one


@dataclass(frozen=True)
class Plan:
    """A request that was checked and decided, with all that was read to decide it."""

    request: Request
    batches: tuple[PromptBatch, ...]
    checkpoint: Checkpoint  # of the video model; mapped (bare pickles are not), and emptied when the model is made
    taehv: Checkpoint | None  # of the tiny autoencoder, likewise; None where the Wan VAE decodes
    geometry: VideoGeometry
    causal: CausalConfig
    steps: StepConfig
    device: torch.device
    dtype: torch.dtype  # that the networks compute in
    cache_dtype: torch.dtype
    cfg: float  # scale of the guidance away from the request's negative prompt; 1 is none
    given_frames: int  # latent frames of the start
    image_RHW: Tensor | None  # the first frame, in its own size
    source: Tensor | GivenVideo | None  # what is extended: a video, or latents [T, C, H, W]
    audio: Sound | None = None  # of a file that was given for it, cut at the video's end

    @property
    def config(self) -> WanConfig:
        """The sizes of the video model."""
        assert isinstance(self.checkpoint.config, WanConfig)
        return self.checkpoint.config

    @property
    def decoder(self) -> str:
        """What decodes the latents: "taehv" or "vae"."""
        return "vae" if self.taehv is None else "taehv"

    @property
    def is_latent(self) -> bool:
        """Whether latents are extended, not a video."""
        return isinstance(self.source, Tensor)

    @property
    def encoded_prompts(self) -> list[str]:
        """Every text that is encoded: the prompts of all batches and, with guidance, what to keep away from."""
        prompts = [prompt for batch in self.batches for prompt in batch.encoded_prompts]
        return list(dict.fromkeys(prompts if self.cfg == 1 else [*prompts, self.request.negative]))

    @property
    def sound(self) -> Sound | None:
        """The given one; else that of the extended video, for as long as that lasts."""
        if self.audio is not None:
            return self.audio
        if not isinstance(self.source, GivenVideo) or self.source.findings.sound is None:
            return None
        findings = self.source.findings
        return Sound(findings.path, findings.start, findings.given / (findings.fps or Fraction(TRAINED_FPS)))

    @property
    def is_prefixed_by_image(self) -> bool:
        """Whether the picture enters as the first frame in the cache; image-to-video models get it as channels."""
        return self.image_RHW is not None and self.config.model_type == "t2v"

    @property
    def shown_frames(self) -> int:
        """Frames of the file: all of the rollout's, or those of the extended video and the new ones."""
        if self.source is None:
            return self.geometry.frames
        shown = pixel_frames(len(self.source)) if self.is_latent else len(self.source)
        return shown + self.generated_frames

    @property
    def first_frame(self) -> int:
        """Latent frames of the extended video before those that the rollout is given."""
        if self.source is None:
            return 0
        return (len(self.source) if self.is_latent else covered_latents(len(self.source))) - self.given_frames

    @property
    def generated_frames(self) -> int:
        """Frames that the model makes: not those of a picture or of the video that is extended."""
        return self.geometry.frames - pixel_frames(self.given_frames)

    def recipe(self, batch: int) -> Recipe:
        """Return what is computed for `batch` videos."""
        size, number_bytes = self.geometry, self.dtype.itemsize
        return Recipe(
            self.config,
            size.chunk_lengths,
            size.latent_height,
            size.latent_width,
            steps=len(self.steps.steps),
            window=self.causal.window,
            decoder=self.decoder,
            guided=self.cfg != 1,
            batch=batch,
            weight_bytes=1 if self.request.fp8 else number_bytes,
            cache_bytes=self.cache_dtype.itemsize,
            activation_bytes=number_bytes,
            writes=self.causal.cache_source == "clean",
        )

    def memory_in_words(self, text_bytes: int) -> str:
        """Return what the device will have to hold, counted before anything is loaded.

        text_bytes: weights of the text encoder; 0 where none is loaded.
        """
        recipe = self.recipe(max(len(batch.outs) for batch in self.batches))
        peak = recipe.peak_bytes()
        weights, caches, working = (peak[name] / 1e9 for name in ("weights", "caches", "working"))
        text = f"text encoder {text_bytes / 1e9:.1f} GB, gone before the rest comes; " if text_bytes else ""
        return (
            f"on {self.device}: {text}video model {weights:.1f} GB, caches {caches:.1f} GB, work {working:.1f} GB, "
            f"together {weights + caches + working:.1f} GB{recipe.without}"
        )


def plan_request(request: Request, batches: Sequence[PromptBatch]) -> Plan:
    """Return the plan after every check that needs no computing, cheapest first; each file is read once and kept.

    Raises ValueError for whatever cannot work.
    """
    _check_options(request)
    _check_files(request, batches)
    audio = None if request.audio is None else sound_of(request.audio)
    checkpoint = read_checkpoint(resolve_model(request.model), weights=request.weights)
    if not isinstance(checkpoint.config, WanConfig):
        raise ValueError(f"{request.model} is a {checkpoint.kind}, not a video model; give it as --taehv")
    config, decoder = checkpoint.config, _decoder(request)
    _check_companions(request, config, decoder)
    _check_start(request, checkpoint)
    notes: list[str] = []
    causal, steps, cfg = _settings(request, checkpoint, notes)
    source = _source(request, config)
    geometry, given = _geometry(request, config, causal, source, is_whole=_is_whole(request, checkpoint))
    video_format(batches[0].outs[0], request.codec).check_size(geometry.width, geometry.height)
    if request.latents is not None and isinstance(source, GivenVideo) and pixel_frames(given) < len(source):
        raise ValueError(
            f"--latents would begin only with the last {pixel_frames(given)} of the {len(source)} frames of "
            f"{request.extend}; extend latents that were kept with it, or leave --latents out"
        )
    _check_schedules(request, batches, geometry)
    device = _device(request.device)
    dtype = _dtype(request.dtype, checkpoint, device)
    cache_dtype = _cache_dtype(request, dtype, device)
    taehv = _taehv(request, checkpoint) if decoder == "taehv" else None
    image_RHW = None if request.image is None else read_image(request.image)
    for note in notes:
        log.warning("%s %s", request.model, note)
    plan = Plan(
        request=request,
        batches=tuple(batches),
        checkpoint=checkpoint,
        taehv=taehv,
        geometry=geometry,
        causal=causal,
        steps=steps,
        device=device,
        dtype=dtype,
        cache_dtype=cache_dtype,
        cfg=cfg,
        given_frames=given,
        image_RHW=image_RHW,
        source=source,
    )
    if audio is not None:
        plan = _with_audio(plan, *audio)
    for note in _source_notes(plan):
        log.warning("%s: %s", request.extend, note)
    return plan


def _with_audio(plan: Plan, sound: Sound, seconds: float) -> Plan:
    """The plan with a given sound, which begins with the video and ends no later; what becomes of it is said."""
    request = plan.request
    end = plan.shown_frames / Fraction(request.fps).limit_denominator(1001)
    if seconds > end:
        log.warning("%s: its %.2f s are cut at the video's end, %.2f s", request.audio, seconds, end)
    elif seconds < end:
        log.warning("%s: lasts %.2f s; the rest of the video's %.2f s is silent", request.audio, seconds, end)
    if plan.sound is not None:
        log.warning("%s: is heard in place of the sound of %s", request.audio, request.extend)
    return replace(plan, audio=replace(sound, seconds=min(sound.seconds, end)))


# ------------------------------------------------------------------- checks --
def _check_options(request: Request) -> None:
    """Raise ValueError for an option whose value is wrong whatever the files hold."""
    if not LEAST_FPS <= request.fps <= MOST_FPS:
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


def _check_files(request: Request, batches: Sequence[PromptBatch]) -> None:
    if not batches:
        raise ValueError("there is nothing to generate")
    outs = [out for batch in batches for out in batch.outs]
    more = [path for path in (request.sheet, request.latents) if path is not None]
    if any(not batch.text.strip() for batch in batches):
        raise ValueError("the prompt is empty; describe the video in a few words")
    if more and len(outs) > 1:
        raise ValueError("--sheet and --latents go with one video; leave them out for several")
    if len({path.resolve() for path in [*outs, *more]}) < len(outs) + len(more):
        raise ValueError(f"{outs[0]}: video, contact sheet and latents cannot be one file; name two or three")
    for out in outs:
        check_video(out, request.codec, request.quality, request.fps, has_sound=request.audio is not None)
    for path in [*outs, *more]:
        check_writable(path, overwrite=request.overwrite)


def _check_schedules(request: Request, batches: Sequence[PromptBatch], geometry: VideoGeometry) -> None:
    """Raise ValueError unless the prompts of a schedule begin inside the video, each in a chunk of its own."""
    lengths = geometry.chunk_lengths
    for batch in batches:
        start_frames(batch.entries, lengths, batch.entries[0].fps or request.fps)
        if len(batch.entries) > 1 and request.extend is not None:
            raise ValueError(
                "a schedule counts from the beginning of a video; extend with one prompt at a time instead"
            )
    for note in dict.fromkeys(schedule_note(batch.text) for batch in batches):
        if note is not None:
            log.warning("%s", note)


def _check_companions(request: Request, config: WanConfig, decoder: str) -> None:
    """Whether every other network that this model needs is named."""
    if decoder == "vae" and request.vae is None:
        raise ValueError("--decoder vae needs the file of the VAE; give it as --vae")
    has_decoder = request.vae is not None if decoder == "vae" else request.taehv is not None
    if not is_bundle(request.model) and not (has_decoder and request.text_encoder):
        raise ValueError(
            f"{request.model} is a single file; give its --taehv (or --vae) and its --text-encoder as well"
        )
    if request.image and request.extend:
        raise ValueError("--image and --extend both say how the video starts; give one of them")
    if config.model_type == "i2v" and not (request.image and request.vae and request.clip):
        raise ValueError("this is an image-to-video model; give it --image, --vae and --clip")


def _decoder(request: Request) -> str:
    decoder = request.decoder or ("vae" if request.vae is not None and request.taehv is None else "taehv")
    if decoder not in ("taehv", "vae"):
        raise ValueError(f"decoder {decoder!r} is unknown; use taehv or vae")
    return decoder


def _is_prefix(request: Request, config: WanConfig) -> bool:
    """Whether a picture enters as the first frame in the cache; image-to-video models get it as condition channels."""
    return request.image is not None and config.model_type == "t2v"


# ----------------------------------------------------------------- settings --
def _check_start(request: Request, checkpoint: Checkpoint) -> None:
    """Raise ValueError where a bidirectional network is to go on from frames, which only chunks can see."""
    assert isinstance(checkpoint.config, WanConfig)
    if not _is_whole(request, checkpoint):
        return
    for name, is_given in (("--extend", request.extend), ("--image", _is_prefix(request, checkpoint.config))):
        if is_given:
            raise ValueError(
                f"{request.model} is bidirectional: it makes all frames of a video at once and sees none before them; "
                f"leave {name} out, or give --chunk to run it chunk by chunk, for which it was not trained"
            )


def _is_whole(request: Request, checkpoint: Checkpoint) -> bool:
    """Whether the network is bidirectional, and no chunk is asked for in spite of that."""
    return checkpoint.bidirectional is not None and request.chunk is None


def _settings(request: Request, checkpoint: Checkpoint, notes: list[str]) -> tuple[CausalConfig, StepConfig, float]:
    """The request's settings, where it has none the checkpoint's, where that has none the defaults.

    notes: takes in words whatever is put in place of what the checkpoint says, or is guessed.
    """
    assert isinstance(checkpoint.config, WanConfig)
    if (checkpoint.causal, checkpoint.bidirectional) == (None, None) and request.chunk is None:
        notes.append(
            "does not say how it was trained; it is sampled chunk by chunk, as Self Forcing's models are "
            f"(--chunk {CausalConfig().chunk}); a bidirectional one needs --chunk of all latent frames and --window -1"
        )
    causal = _causal(request, checkpoint, notes)
    if _is_prefix(request, checkpoint.config) and causal.chunk > 1:
        causal = replace(causal, independent_first_frame=True)
    steps = _steps(request, checkpoint.steps, notes)
    if None not in (request.cfg, checkpoint.guidance) and request.cfg != checkpoint.guidance:
        notes.append(f"says guidance {checkpoint.guidance:g}; --cfg {request.cfg:g} is used")
    return causal, steps, float(_or(request.cfg, _or(checkpoint.guidance, 1.0)))


def _causal(request: Request, checkpoint: Checkpoint, notes: list[str]) -> CausalConfig:
    options = {name: getattr(request, name) for name in ("chunk", "window", "sink", "cache_source")}
    options = {name: value for name, value in options.items() if value is not None}
    if checkpoint.bidirectional is None:
        stored = checkpoint.causal
        notes += _replaced(stored, options, ()) if stored else []
        return replace(stored or CausalConfig(), **options)
    if "chunk" in options:
        notes.append(f"says that it is bidirectional; --chunk {options['chunk']} is used")
        return replace(CausalConfig(), **options)
    trained, frames = checkpoint.bidirectional.latent_frames, BUNDLE_SIZES.get(request.model, WAN_SIZE)[2]
    count = _or(trained, latent_frames(frames)) if request.frames is None else latent_frames(request.frames)
    if trained is None:
        notes.append(f"is taken for a bidirectional model: all {count} latent frames are made at once (else --chunk 3)")
    elif count != trained:
        notes.append(f"was trained on {pixel_frames(trained)} frames at once; --frames {request.frames} is used")
    return replace(CausalConfig(count), **options)


def _steps(request: Request, stored: StepConfig | None, notes: list[str]) -> StepConfig:
    usual = stored or StepConfig()
    options = {name: getattr(request, name) for name in ("shift", "solver") if getattr(request, name) is not None}
    if isinstance(request.steps, int):  # evenly spaced ones are warped, whatever the checkpoint's own list is
        options["steps"] = StepConfig.even(request.steps, shift=_or(request.shift, usual.shift)).steps
        options["warp"] = True
    elif request.steps is not None:
        options["steps"] = request.steps
    steps = replace(usual, **options)
    if stored is not None:
        notes += _replaced(stored, options, ("warp",))
    if "shift" in options and not steps.warp and steps.sigma == "exact":
        notes.append(f"gives its timesteps as they are, so that --shift {steps.shift:g} changes nothing")
    elif isinstance(request.steps, tuple) and not steps.warp:
        notes.append("takes timesteps as they are: --steps are not warped by the shift")
    return steps


def _replaced(stored: CausalConfig | StepConfig, options: dict[str, Any], hidden: tuple[str, ...]) -> list[str]:
    """A line for every setting that another value was given for."""

    def words(value: Any) -> str:
        listed = value if isinstance(value, tuple) else (value,)
        return ",".join(f"{item:g}" if isinstance(item, (int, float)) else str(item) for item in listed)

    return [
        f"says {name.replace('_', ' ')} {words(getattr(stored, name))}; "
        f"--{name.replace('_', '-')} {words(value)} is used"
        for name, value in options.items()
        if name not in hidden and value != getattr(stored, name)
    ]


def _source_notes(plan: Plan) -> list[str]:
    """What the user has to know about the video that is extended."""
    if not isinstance(plan.source, GivenVideo):
        return []
    request = plan.request
    notes = plan.source.findings.in_words()
    is_silent = video_format(request.out, request.codec).sound is None
    if request.fps != TRAINED_FPS:
        notes.append(f"goes on at {request.fps:g} fps; Wan models know motion at {TRAINED_FPS}")
    if plan.sound is not None and is_silent:
        notes.append(f"its sound is lost: {request.out.name} has none")
    elif plan.sound is not None and plan.audio is None:
        notes.append(f"its sound is kept for its {float(plan.sound.seconds):.2f} s; what is added is silent")
        if request.latents is not None:
            notes.append(f"{request.latents} keeps no sound; a video that goes on from it has none")
    return notes


def _source(request: Request, config: WanConfig) -> Tensor | GivenVideo | None:
    """What is to be extended: latents [T, C, H, W] or a video."""
    if request.extend is None:
        return None
    latents = read_latents(request.extend)
    if latents is None:
        return given_video(request.extend, request.fps)
    if latents.shape[1] != config.out_dim:
        raise ValueError(f"{request.extend}: latents of {latents.shape[1]} channels, the model makes {config.out_dim}")
    return latents


def _geometry(
    request: Request,
    config: WanConfig,
    causal: CausalConfig,
    source: Tensor | GivenVideo | None,
    *,
    is_whole: bool,
) -> tuple[VideoGeometry, int]:
    """The size of what the rollout makes, and how many of its latent frames are given."""
    width, height, frames = BUNDLE_SIZES.get(request.model, WAN_SIZE)
    first = int(causal.independent_first_frame)
    usual = max(1, (latent_frames(frames) - first) // causal.chunk) * causal.chunk  # whole chunks in the usual length
    usual = causal.chunk if is_whole else usual
    if source is None:
        given, frames = int(_is_prefix(request, config)), _or(request.frames, pixel_frames(first + usual))
    else:
        if isinstance(source, GivenVideo):
            height, width, available = source.height, source.width, covered_latents(len(source))
        else:
            height, width = (side * SPATIAL_FACTOR for side in source.shape[-2:])
            available = len(source)
        if (_or(request.width, width), _or(request.height, height)) != (width, height):
            raise ValueError(f"{request.extend} is {width}x{height}; leave --width and --height out when extending it")
        given = context_frames(available, causal)
        frames = pixel_frames(given) + _added(_or(request.frames, TEMPORAL_FACTOR * usual), causal)
    geometry = VideoGeometry(
        width=_or(request.width, width),
        height=_or(request.height, height),
        frames=frames,
        chunk=causal.chunk,
        independent_first_frame=causal.independent_first_frame,
    )
    return geometry, given


def _added(frames: int, causal: CausalConfig) -> int:
    """Frames that an extension adds. Raises ValueError unless they are whole chunks."""
    step = TEMPORAL_FACTOR * causal.chunk
    if frames < 1 or frames % step:
        below = max(frames, 0) // step * step
        nearest = " or ".join(str(count) for count in (below, below + step) if count)
        raise ValueError(f"{frames} frames to add are not whole chunks of {step} frames; use {nearest}")
    return frames


def _taehv(request: Request, model: Checkpoint) -> Checkpoint:
    """The TAEHV's checkpoint, which decodes this model's latents. A bundle's own, if it says nothing, is taken to."""
    assert isinstance(model.config, WanConfig)
    return check_taehv(
        resolve_taehv(request.taehv or request.model),
        channels=model.config.out_dim,
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
    """The asked one; else float32 on a CPU, where it is exact and fastest, elsewhere the stored one of 16 bits."""
    if name is None and device.type == "cpu":
        name = "float32"
    elif name is None:  # float32 files are what training left, not what a video needs
        name = checkpoint.dtype if checkpoint.dtype in ("bfloat16", "float16") else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is no type to compute in; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _cache_dtype(request: Request, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The number type of the KV cache: the asked one, else that of the model."""
    if request.cache_dtype not in (None, *CACHE_DTYPES):
        raise ValueError(f"--cache-dtype {request.cache_dtype!r} is unknown; use {', '.join(CACHE_DTYPES)}")
    cache_dtype = dtype if request.cache_dtype is None else CACHE_DTYPES[request.cache_dtype]
    if device.type == "mps" and (request.fp8 or cache_dtype == torch.float8_e4m3fn):
        name = "--fp8" if request.fp8 else "cache-dtype float8_e4m3fn"
        raise ValueError(f"{name} needs numbers that mps does not have; use --cache-dtype int8 to save memory there")
    return cache_dtype
