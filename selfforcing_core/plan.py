"""A request for videos, and everything that can be decided and refused about it before anything is computed.

Letters: V video frames, R RGB, H W height and width in pixels, T latent frames, C latent channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
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
from .hub import check_taehv, list_bundles, resolve_model
from .image import read_image
from .prompt_schedule import parse_schedule, schedule_note, start_frames
from .roofline import Recipe
from .sound import Sound, sound_of
from .start import context_frames, read_latents
from .video_formats import check_video, video_format
from .video_reader import TRAINED_FPS, GivenVideo, given_video

log = logging.getLogger(__name__)
# Width, height and frames that a bundle was trained on; anything else is taken for a Wan 2.1 model.
BUNDLE_SIZES = {"tiny": (64, 64, 33)}
WAN_SIZE = (832, 480, 81)
CACHE_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
LEAST_FPS, MOST_FPS = 0.001, 1000  # beyond, files store no rate or another one


@dataclass(frozen=True)
class Request:
    """What to generate and where to; None means what the checkpoint says, or the size its model was trained on.

    model, taehv, text_encoder: a bundle's name or a path; vae, clip: paths. width, height in pixels, frames in video
    frames; chunk, window, sink in latent frames (see CausalConfig); steps as in StepConfig, or their number. image:
    the first frame. extend: a video, or latents kept by `latents`, that goes on for `frames` more frames. cfg: scale
    of the guidance away from `negative`. decoder: "taehv" or "vae". taehv_latents: whose latents the TAEHV decodes,
    where its file does not say. A prompt may be a schedule (see `prompt_schedule`); history: what becomes of
    the frames so far where it changes, "recode" or "keep". roofline: measure the device first and say what share of
    its limit the run reached. embeddings: folder where the prompts' embeddings are kept and looked up.
    cache_dtype: of CACHE_DTYPES; None is the type that the model computes in. codec, quality: of `video_formats`; None
    is what the file's ending stands for, and its default. audio: a file whose sound the video gets.
    """

    prompt: str
    out: Path
    model: str = "tiny"
    weights: str = "auto"
    taehv: str | None = None
    taehv_latents: str | None = None
    text_encoder: str | None = None
    vae: Path | None = None
    clip: Path | None = None
    decoder: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float = 16
    seed: int = 0
    chunk: int | None = None
    window: int | None = None
    sink: int | None = None
    cache_source: str | None = None
    steps: tuple[float, ...] | int | None = None
    shift: float | None = None
    solver: str | None = None
    cfg: float | None = None
    negative: str = ""
    image: Path | None = None
    extend: Path | None = None
    sheet: Path | None = None
    latents: Path | None = None
    overwrite: bool = False
    device: str = "auto"
    dtype: str | None = None
    attention: str = "auto"
    compile: bool = False
    fp8: bool = False
    history: str = "recode"
    roofline: bool = False
    embeddings: Path | None = None
    cache_dtype: str | None = None
    codec: str | None = None
    quality: int | None = None
    audio: Path | None = None


@dataclass(frozen=True)
class Take:
    """Videos of one prompt that are computed together: row b of the noise is `first_row` + b.

    prompt: as the user wrote it. text: what the model reads.
    """

    prompt: str
    text: str
    outs: tuple[Path, ...]
    first_row: int = 0


@dataclass(frozen=True)
class Plan:
    """A request whose every choice is made."""

    geometry: VideoGeometry
    config: WanConfig
    causal: CausalConfig
    steps: StepConfig
    device: torch.device
    dtype: torch.dtype
    decoder: str
    given_frames: int  # latent frames of the start
    image_RHW: Tensor | None  # the first frame, in its own size
    source: Tensor | GivenVideo | None  # what is extended: a video, or latents [T, C, H, W] if is_latent
    is_latent: bool
    cache_dtype: torch.dtype
    cfg: float
    audio: Sound | None = None  # of a file that was given for it, cut at the video's end

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


def plan_request(request: Request, takes: Sequence[Take]) -> Plan:
    """Every check that needs no computing, cheapest first. Raises ValueError for whatever cannot work."""
    if not LEAST_FPS <= request.fps <= MOST_FPS:
        raise ValueError(
            f"fps {request.fps} is not a rate between {LEAST_FPS} and {MOST_FPS}; Wan models are trained at 16"
        )
    _check_files(request, takes)
    audio = None if request.audio is None else sound_of(request.audio)
    if request.cfg is not None and not 0 < request.cfg < float("inf"):
        raise ValueError(
            f"--cfg {request.cfg} is not a positive number; 1 is no guidance, undistilled models take about 5"
        )
    if request.attention not in ATTENTIONS:
        raise ValueError(f"attention {request.attention!r} is unknown; use {', '.join(ATTENTIONS)}")
    if request.roofline and (request.image or request.extend):
        raise ValueError("--roofline measures videos that begin with noise; leave out --image and --extend")
    checkpoint = read_checkpoint(resolve_model(request.model), weights=request.weights)
    if not isinstance(checkpoint.config, WanConfig):
        raise ValueError(f"{request.model} is a {checkpoint.kind}, not a video model; give it as --taehv")
    config, decoder = checkpoint.config, _decoder(request)
    _check_companions(request, config, decoder)
    _check_start(request, checkpoint)
    notes: list[str] = []
    causal, steps, cfg = _settings(request, checkpoint, notes)
    source, is_latent = _source(request, config)
    geometry, given = _geometry(request, config, causal, source, is_latent, is_whole=_is_whole(request, checkpoint))
    video_format(takes[0].outs[0], request.codec).check_size(geometry.width, geometry.height)
    if request.latents is not None and source is not None and not is_latent and pixel_frames(given) < len(source):
        raise ValueError(
            f"--latents would begin only with the last {pixel_frames(given)} of the {len(source)} frames of "
            f"{request.extend}; extend latents that were kept with it, or leave --latents out"
        )
    for take in takes:
        _check_schedule(take, geometry, request)
    for note in dict.fromkeys(schedule_note(take.text) for take in takes):
        if note is not None:
            log.warning("%s", note)
    device = _device(request.device)
    dtype = _dtype(request.dtype, checkpoint, device)
    if request.cache_dtype not in (None, *CACHE_DTYPES):
        raise ValueError(f"--cache-dtype {request.cache_dtype!r} is unknown; use {', '.join(CACHE_DTYPES)}")
    cache = dtype if request.cache_dtype is None else CACHE_DTYPES[request.cache_dtype]
    if device.type == "mps" and (request.fp8 or cache == torch.float8_e4m3fn):
        name = "--fp8" if request.fp8 else "cache-dtype float8_e4m3fn"
        raise ValueError(f"{name} needs numbers that mps does not have; use --cache-dtype int8 to save memory there")
    if decoder == "taehv":
        _check_taehv(request, checkpoint)
    image = None if request.image is None else read_image(request.image)
    for note in notes:
        log.warning("%s %s", request.model, note)
    plan = Plan(geometry, config, causal, steps, device, dtype, decoder, given, image, source, is_latent, cache, cfg)
    if audio is not None:
        plan = _with_audio(request, plan, *audio)
    for note in _notes(request, plan):
        log.warning("%s: %s", request.extend, note)
    return plan


def _with_audio(request: Request, plan: Plan, sound: Sound, seconds: float) -> Plan:
    """The plan with a given sound, which begins with the video and ends no later; what becomes of it is said."""
    end = plan.shown_frames / Fraction(request.fps).limit_denominator(1001)
    if seconds > end:
        log.warning("%s: its %.2f s are cut at the video's end, %.2f s", request.audio, seconds, end)
    elif seconds < end:
        log.warning("%s: lasts %.2f s; the rest of the video's %.2f s is silent", request.audio, seconds, end)
    if plan.sound is not None:
        log.warning("%s: is heard in place of the sound of %s", request.audio, request.extend)
    return replace(plan, audio=replace(sound, seconds=min(sound.seconds, end)))


def _check_files(request: Request, takes: Sequence[Take]) -> None:
    if not takes:
        raise ValueError("there is nothing to generate")
    outs = [out for take in takes for out in take.outs]
    more = [path for path in (request.sheet, request.latents) if path is not None]
    if any(not take.text.strip() for take in takes):
        raise ValueError("the prompt is empty; describe the video in a few words")
    if more and len(outs) > 1:
        raise ValueError("--sheet and --latents go with one video; leave them out for several")
    if len({path.resolve() for path in [*outs, *more]}) < len(outs) + len(more):
        raise ValueError(f"{outs[0]}: video, contact sheet and latents cannot be one file; name two or three")
    for out in outs:
        check_video(out, request.codec, request.quality, request.fps, has_sound=request.audio is not None)
    for path in [*outs, *more]:
        check_writable(path, overwrite=request.overwrite)


def _check_schedule(take: Take, geometry: VideoGeometry, request: Request) -> None:
    """Whether the prompts of a take that is a schedule begin inside the video, each in a chunk of its own."""
    entries = parse_schedule(take.text)
    start_frames(entries, geometry.chunk_lengths, entries[0].fps or request.fps)
    if len(entries) > 1 and request.extend is not None:
        raise ValueError("a schedule counts from the beginning of a video; extend with one prompt at a time instead")


def _check_companions(request: Request, config: WanConfig, decoder: str) -> None:
    """Whether every other network that this model needs is named."""
    if decoder == "vae" and request.vae is None:
        raise ValueError("--decoder vae needs the file of the VAE; give it as --vae")
    has_decoder = request.vae is not None if decoder == "vae" else request.taehv is not None
    if request.model not in list_bundles() and not (has_decoder and request.text_encoder):
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
    chosen = {name: getattr(request, name) for name in ("chunk", "window", "sink", "cache_source")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if checkpoint.bidirectional is None:
        said = checkpoint.causal
        notes += _replaced(said, chosen, ()) if said else []
        return replace(said or CausalConfig(), **chosen)
    if "chunk" in chosen:
        notes.append(f"says that it is bidirectional; --chunk {chosen['chunk']} is used")
        return replace(CausalConfig(), **chosen)
    trained, frames = checkpoint.bidirectional.latent_frames, BUNDLE_SIZES.get(request.model, WAN_SIZE)[2]
    count = _or(trained, latent_frames(frames)) if request.frames is None else latent_frames(request.frames)
    if trained is None:
        notes.append(f"is taken for a bidirectional model: all {count} latent frames are made at once (else --chunk 3)")
    elif count != trained:
        notes.append(f"was trained on {pixel_frames(trained)} frames at once; --frames {request.frames} is used")
    return replace(CausalConfig(count), **chosen)


def _steps(request: Request, said: StepConfig | None, notes: list[str]) -> StepConfig:
    usual = said or StepConfig()
    chosen = {name: getattr(request, name) for name in ("shift", "solver") if getattr(request, name) is not None}
    if isinstance(request.steps, int):  # evenly spaced ones are warped, whatever the checkpoint's own list is
        chosen["steps"] = StepConfig.even(request.steps, shift=_or(request.shift, usual.shift)).steps
        chosen["warp"] = True
    elif request.steps is not None:
        chosen["steps"] = request.steps
    made = replace(usual, **chosen)
    if said is not None:
        notes += _replaced(said, chosen, ("warp",))
    if "shift" in chosen and not made.warp and made.sigma == "exact":
        notes.append(f"gives its timesteps as they are, so that --shift {made.shift:g} changes nothing")
    elif isinstance(request.steps, tuple) and not made.warp:
        notes.append("takes timesteps as they are: --steps are not warped by the shift")
    return made


def _replaced(said: CausalConfig | StepConfig, chosen: dict[str, Any], hidden: tuple[str, ...]) -> list[str]:
    """A line for every setting that another value was chosen for."""

    def words(value: Any) -> str:
        listed = value if isinstance(value, tuple) else (value,)
        return ",".join(f"{item:g}" if isinstance(item, (int, float)) else str(item) for item in listed)

    return [
        f"says {name.replace('_', ' ')} {words(getattr(said, name))}; --{name.replace('_', '-')} {words(value)} is used"
        for name, value in chosen.items()
        if name not in hidden and value != getattr(said, name)
    ]


def _notes(request: Request, plan: Plan) -> list[str]:
    """What the user has to know about the video that is extended."""
    if not isinstance(plan.source, GivenVideo):
        return []
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


def _source(request: Request, config: WanConfig) -> tuple[Tensor | GivenVideo | None, bool]:
    """What is to be extended, and whether it is latents."""
    if request.extend is None:
        return None, False
    latents = read_latents(request.extend)
    if latents is None:
        return given_video(request.extend, request.fps), False
    if latents.shape[1] != config.out_dim:
        raise ValueError(f"{request.extend}: latents of {latents.shape[1]} channels, the model makes {config.out_dim}")
    return latents, True


def _geometry(
    request: Request,
    config: WanConfig,
    causal: CausalConfig,
    source: Tensor | GivenVideo | None,
    is_latent: bool,
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
            height, width = source.height, source.width
        else:
            height, width = (side * SPATIAL_FACTOR for side in source.shape[-2:])
        if (_or(request.width, width), _or(request.height, height)) != (width, height):
            raise ValueError(f"{request.extend} is {width}x{height}; leave --width and --height out when extending it")
        given = context_frames(len(source) if is_latent else covered_latents(len(source)), causal)
        frames = pixel_frames(given) + _added(_or(request.frames, TEMPORAL_FACTOR * usual), causal)
    geometry = VideoGeometry(
        width=_or(request.width, width), height=_or(request.height, height), frames=frames, chunk=causal.chunk,
        independent_first_frame=causal.independent_first_frame,
    )  # fmt: skip
    return geometry, given


def _added(frames: int, causal: CausalConfig) -> int:
    """Frames that an extension adds. Raises ValueError unless they are whole chunks."""
    step = TEMPORAL_FACTOR * causal.chunk
    if frames < 1 or frames % step:
        below = max(frames, 0) // step * step
        nearest = " or ".join(str(count) for count in (below, below + step) if count)
        raise ValueError(f"{frames} frames to add are not whole chunks of {step} frames; use {nearest}")
    return frames


def _check_taehv(request: Request, model: Checkpoint) -> None:
    """Whether the TAEHV decodes this model's latents. A bundle's own, if it says nothing, is taken to."""
    assert isinstance(model.config, WanConfig)
    check_taehv(
        request.taehv or request.model, channels=model.config.out_dim, latent_space=model.latent_space,
        said=request.taehv_latents, is_own=request.taehv is None, say="--taehv-latents",
    )  # fmt: skip


def _or(chosen: Any, default: Any) -> Any:
    return default if chosen is None else chosen


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


def recipe_of(plan: Plan, request: Request, batch: int) -> Recipe:
    """What is computed for `batch` videos of this plan."""
    size, number = plan.geometry, plan.dtype.itemsize
    return Recipe(
        plan.config, size.chunk_lengths, size.latent_height, size.latent_width, steps=len(plan.steps.steps),
        window=plan.causal.window, decoder=plan.decoder, guided=plan.cfg != 1, batch=batch,
        weight_bytes=1 if request.fp8 else number, cache_bytes=plan.cache_dtype.itemsize, activation_bytes=number,
        writes=plan.causal.cache_source == "clean",
    )  # fmt: skip


def memory_in_words(plan: Plan, request: Request, batch: int, text_bytes: int) -> str:
    """What the device will have to hold, counted before anything is loaded.

    text_bytes: weights of the text encoder; 0 where none is loaded.
    """
    recipe = recipe_of(plan, request, batch)
    held = recipe.peak_bytes()
    weights, caches, working = (held[name] / 1e9 for name in ("weights", "caches", "working"))
    text = f"text encoder {text_bytes / 1e9:.1f} GB, gone before the rest comes; " if text_bytes else ""
    return (
        f"on {plan.device}: {text}video model {weights:.1f} GB, caches {caches:.1f} GB, work {working:.1f} GB, "
        f"together {weights + caches + working:.1f} GB{recipe.without}"
    )
