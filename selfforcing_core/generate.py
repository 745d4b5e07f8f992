"""Prompts in, video files out: everything is checked first, then each chunk is denoised, decoded and encoded in turn.

The loop itself is `rollout`; this file loads what it needs, feeds it and measures it. Networks follow one another on
the device: the text encoder goes before the video model comes.
Letters: B batch, V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .atomic import check_writable
from .attention import ATTENTIONS, attention_kernel
from .checkpoint import Checkpoint, read_checkpoint
from .conditioning import Conditioning
from .config import CausalConfig, StepConfig, WanConfig
from .float8 import store_in_float8
from .geometry import TEMPORAL_FACTOR, VideoGeometry, latent_frames, pixel_frames
from .hub import list_bundles, load_model, load_taehv, load_text_encoder, resolve_model, resolve_taehv
from .image import first_frame_condition, fit_image, read_image
from .kv_cache import KVCache
from .layout import wan_shapes
from .rollout import SeededNoise, rollout
from .start import (
    Start,
    context_frames,
    frames_of,
    read_latents,
    start_from_image,
    start_from_latents,
    start_from_video,
    write_latents,
)
from .taehv import TAEHV, StreamingDecoder
from .taehv_releases import expect_latent_space
from .video import check_video_path, read_video, write_contact_sheet, write_video
from .wan_vae import StreamingWanDecoder, WanVAE, load_wan_vae

log = logging.getLogger(__name__)
# Width, height and frames that a bundle was trained on; anything else is taken for a Wan 2.1 model.
BUNDLE_SIZES = {"tiny": (64, 64, 33)}
WAN_SIZE = (832, 480, 81)
SHEET_FRAMES = 32
FPS_INCLUDES = "text encoding, denoising, cache passes and decoding; not loading the models or writing the file"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What to generate and where to; None means what the checkpoint says, or the size its model was trained on.

    model, taehv, text_encoder: a bundle's name or a path; vae, clip: paths. width, height in pixels, frames in video
    frames; chunk, window, sink in latent frames (see CausalConfig); steps as in StepConfig, or their number. image:
    the first frame. extend: a video, or latents kept by `latents`, that goes on for `frames` more frames. cfg: scale
    of the guidance away from `negative`. decoder: "taehv" or "vae". taehv_latents: whose latents the TAEHV decodes,
    where its file does not say.
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
    steps: tuple[float, ...] | int | None = None
    shift: float | None = None
    solver: str | None = None
    cfg: float = 1.0
    negative: str = ""
    image: Path | None = None
    extend: Path | None = None
    sheet: Path | None = None
    latents: Path | None = None
    overwrite: bool = False
    device: str = "cpu"
    dtype: str | None = None
    attention: str = "auto"
    fp8: bool = False


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
class _Plan:
    """A request whose every choice is made."""

    geometry: VideoGeometry
    config: WanConfig
    causal: CausalConfig
    steps: StepConfig
    device: torch.device
    dtype: torch.dtype
    latent_space: str | None
    given_frames: int  # latent frames of the start
    source: Tensor | None  # what is extended: frames [V, R, H, W], or latents [T, C, H, W] if is_latent
    is_latent: bool = False


@dataclass
class _Clock:
    """Seconds from asking for a chunk to having its frames, one entry per chunk; the first includes the prompt."""

    chunks: list[float] = field(default_factory=list)


def generate(request: Request, *, show_progress: bool = False) -> dict[str, Any]:
    """Generate one video and write it (and its contact sheet); returns the measurements in plain JSON types.

    Raises ValueError, before anything is computed or written, for whatever cannot work.
    """
    take = Take(request.prompt, request.prompt, (request.out,))
    return generate_all(request, [take], show_progress=show_progress)[0]


def generate_all(request: Request, takes: Sequence[Take], *, show_progress: bool = False) -> list[dict[str, Any]]:
    """Generate several takes with the same settings, loading each network once; measurements for each video.

    Raises ValueError, before anything is computed or written, for whatever cannot work.
    """
    plan = _plan(request, takes)
    if show_progress and plan.device.type != "cpu":
        log.warning("%s", memory_in_words(plan, request, max(len(take.outs) for take in takes)))
    with attention_kernel(request.attention):
        return _generate_all(request, takes, plan, show_progress)


@torch.no_grad()
def _generate_all(request: Request, takes: Sequence[Take], plan: _Plan, show_progress: bool) -> list[dict[str, Any]]:
    started = time.perf_counter()
    encoded, seconds_encoding = _encode_texts(request, plan, [request.negative, *(take.text for take in takes)])
    autoencoder = _load_autoencoder(request, plan)
    start, image, clip = _start(request, plan, autoencoder)
    model = _load_model(request, plan)
    seconds_loading = time.perf_counter() - started - seconds_encoding

    results = []
    for take, text in zip(takes, encoded[1:]):
        began, clock = time.perf_counter(), _Clock()
        conditions = [
            Conditioning(*(_rows(tensor, len(take.outs), plan) for tensor in (embeds, image, clip)))  # type: ignore[arg-type]
            for embeds in (text, encoded[0])
        ]
        chunks = _frames(request, plan, take, model, autoencoder, start, conditions, clock, show_progress)
        settings = {**_described(request, plan), "prompt": take.prompt}
        if take.text != take.prompt:
            settings["extended_prompt"] = take.text
        _write(request, take, chunks, settings, plan)
        clock.chunks[0] += seconds_encoding / len(takes)
        written = time.perf_counter() - began - sum(clock.chunks) + seconds_encoding / len(takes)
        generated = plan.geometry.frames * len(take.outs)
        for out in take.outs:
            results.append(
                {"out": str(out), "sheet": str(request.sheet) if request.sheet else None, **settings,
                 **_measured(clock.chunks, generated), "seconds_loading": seconds_loading, "seconds_writing": written}
            )  # fmt: skip
    return results


# ----------------------------------------------------------------- planning --
def _plan(request: Request, takes: Sequence[Take]) -> _Plan:
    """Every check that needs no computing, cheapest first."""
    _check_files(request, takes)
    if not 0 < request.fps < float("inf"):
        raise ValueError(f"fps {request.fps} is not a positive number; Wan models are trained at 16")
    if request.attention not in ATTENTIONS:
        raise ValueError(f"attention {request.attention!r} is unknown; use {', '.join(ATTENTIONS)}")
    checkpoint = read_checkpoint(resolve_model(request.model), weights=request.weights)
    if not isinstance(checkpoint.config, WanConfig):
        raise ValueError(f"{request.model} is a {checkpoint.kind}, not a video model; give it as --taehv")
    config = checkpoint.config
    _check_companions(request, config)
    causal, steps = _settings(request, checkpoint)
    width, height, frames = BUNDLE_SIZES.get(request.model, WAN_SIZE)
    source, is_latent = _source(request, config)
    if source is not None:
        height, width = (side * (8 if is_latent else 1) for side in source.shape[-2:])
    given = (
        context_frames(_latent_count(source, is_latent), causal)
        if source is not None
        else int(_is_prefix(request, config))
    )
    geometry = _geometry(request, causal, width, height, frames, given if source is not None else 0)
    if source is not None and (geometry.width, geometry.height) != (width, height):
        raise ValueError(f"{request.extend} is {width}x{height}; leave --width and --height out when extending it")
    device = _device(request.device)
    dtype = _dtype(request.dtype, checkpoint, device)
    return _Plan(geometry, config, causal, steps, device, dtype, checkpoint.latent_space, given, source, is_latent)


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
        check_video_path(out)
    for path in [*outs, *more]:
        check_writable(path, overwrite=request.overwrite)


def _check_companions(request: Request, config: WanConfig) -> None:
    """Whether every other network that this model needs is named."""
    decoder = _decoder(request)
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


def _settings(request: Request, checkpoint: Checkpoint) -> tuple[CausalConfig, StepConfig]:
    """The checkpoint's way of being run, with what the request changes."""
    assert isinstance(checkpoint.config, WanConfig)
    causal = {name: getattr(request, name) for name in ("chunk", "window", "sink")}
    chosen = replace(checkpoint.causal or CausalConfig(), **{k: v for k, v in causal.items() if v is not None})
    if _is_prefix(request, checkpoint.config) and chosen.chunk > 1:
        chosen = replace(chosen, independent_first_frame=True)
    steps = checkpoint.steps or StepConfig()
    if isinstance(request.steps, int):
        even = StepConfig.even(request.steps, shift=request.shift or steps.shift)
        steps = replace(steps, steps=even.steps)
    elif request.steps is not None:
        steps = replace(steps, steps=request.steps)
    changes = {name: getattr(request, name) for name in ("shift", "solver")}
    return chosen, replace(steps, **{name: value for name, value in changes.items() if value is not None})


def _source(request: Request, config: WanConfig) -> tuple[Tensor | None, bool]:
    """What is to be extended, and whether it is latents."""
    if request.extend is None:
        return None, False
    latents = read_latents(request.extend)
    if latents is None:
        return read_video(request.extend), False
    if latents.shape[1] != config.out_dim:
        raise ValueError(f"{request.extend}: latents of {latents.shape[1]} channels, the model makes {config.out_dim}")
    return latents, True


def _latent_count(source: Tensor, is_latent: bool) -> int:
    return len(source) if is_latent else (len(source) - 1) // TEMPORAL_FACTOR + 1


def _geometry(
    request: Request, causal: CausalConfig, width: int, height: int, frames: int, given: int
) -> VideoGeometry:
    """The size of what the rollout makes. An extension asks for frames to add, in whole chunks."""
    step, first = TEMPORAL_FACTOR * causal.chunk, int(causal.independent_first_frame)
    usual = max(1, (latent_frames(frames) - first) // causal.chunk)  # whole chunks in the usual length
    if not given:
        frames = _or(request.frames, pixel_frames(first + usual * causal.chunk))
    else:
        added = _or(request.frames, usual * step)
        if added < 1 or added % step:
            below = max(added, 0) // step * step
            nearest = " or ".join(str(count) for count in (below, below + step) if count)
            raise ValueError(f"{added} frames to add are not whole chunks of {step} frames; use {nearest}")
        frames = pixel_frames(given) + added
    return VideoGeometry(
        width=_or(request.width, width), height=_or(request.height, height), frames=frames, chunk=causal.chunk,
        independent_first_frame=causal.independent_first_frame,
    )  # fmt: skip


def _or(chosen: Any, default: Any) -> Any:
    return default if chosen is None else chosen


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here; cpu always works") from error
    return device


def _dtype(name: str | None, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The asked one; else the stored one, except on a CPU, where float32 is both exact and fastest."""
    if name is None:
        stored = checkpoint.dtype if checkpoint.dtype in DTYPES else "bfloat16"
        name = "float32" if device.type == "cpu" else stored
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is no type to compute in; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def memory_in_words(plan: _Plan, request: Request, batch: int) -> str:
    """What the device will have to hold at once while chunks are made, counted before anything is loaded."""
    numbers = sum(torch.Size(shape).numel() for shape in wan_shapes(plan.config).values())
    weights = numbers * (1 if request.fp8 else plan.dtype.itemsize)
    window = plan.causal.window if plan.causal.window != -1 else plan.geometry.latent_frames
    frames = min(window, plan.geometry.latent_frames)
    cache = KVCache.num_bytes(
        plan.config, batch=batch, tokens_per_frame=plan.geometry.tokens_per_frame, capacity=frames, dtype=plan.dtype
    )
    caches = cache * (2 if request.cfg != 1 else 1)
    total = (weights + caches) / 1e9
    return (
        f"on {plan.device}: video model {weights / 1e9:.1f} GB, caches {caches / 1e9:.1f} GB, together {total:.1f} GB "
        "plus activations and the decoder; the text encoder is gone before they come"
    )


# ------------------------------------------------------------------ loading --
def _encode_texts(request: Request, plan: _Plan, texts: list[str]) -> tuple[list[Tensor], float]:
    """Embeddings [1, P, E] of each text on the CPU without their zero rows, and the seconds that took."""
    # float16 overflows inside UMT5
    dtype = torch.bfloat16 if plan.dtype == torch.float16 else plan.dtype
    encoder = load_text_encoder(request.text_encoder or request.model, dtype=dtype, device=plan.device)
    began = time.perf_counter()
    known = {text: _trimmed(encoder.encode([text])).cpu() for text in dict.fromkeys(texts)}
    return [known[text] for text in texts], time.perf_counter() - began


def _trimmed(embeds_1PE: Tensor) -> Tensor:
    used = int(embeds_1PE[0].any(-1).sum())
    return embeds_1PE[:, : max(used, 1)].clone()


def _load_autoencoder(request: Request, plan: _Plan) -> TAEHV | WanVAE:
    """What decodes the video. Raises ValueError if it is made for other latents."""
    if _decoder(request) == "vae":
        assert request.vae is not None
        vae = load_wan_vae(request.vae, dtype=plan.dtype, device=plan.device)
        _check_channels(plan.config.out_dim, vae.latent_channels, "VAE")
        return vae
    taehv, checkpoint = load_taehv(request.taehv or request.model, dtype=plan.dtype, device=plan.device)
    _check_channels(plan.config.out_dim, taehv.config.latent_channels, "TAEHV")
    found = request.taehv_latents or checkpoint.latent_space
    if plan.latent_space is not None and (request.taehv is not None or found is not None):
        path = resolve_taehv(request.taehv or request.model)
        expect_latent_space(found, taehv.config, plan.latent_space, path)
    return taehv


def _check_channels(channels: int, decoded: int, what: str) -> None:
    if decoded != channels:
        raise ValueError(
            f"the model makes latents of {channels} channels, the {what} decodes {decoded}; "
            f"use the {what} that belongs to the model"
        )


def _load_model(request: Request, plan: _Plan) -> Any:
    """The video model on its device; with fp8 it is shrunk on the CPU before it moves."""
    if not request.fp8:
        return load_model(request.model, dtype=plan.dtype, device=plan.device, weights=request.weights)[0]
    model, _ = load_model(request.model, dtype=plan.dtype, weights=request.weights)
    return store_in_float8(model).to(plan.device)


def _start(request: Request, plan: _Plan, autoencoder: TAEHV | WanVAE) -> tuple[Start, Tensor | None, Tensor | None]:
    """How the video begins, and for image-to-video models their condition channels and CLIP features."""
    encoder = _OnDevice(autoencoder, plan)
    if plan.source is not None:
        if plan.is_latent:
            return start_from_latents(plan.source, plan.causal), None, None
        return start_from_video(plan.source, encoder, plan.causal), None, None
    if request.image is None:
        return Start(), None, None
    size = plan.geometry
    if _is_prefix(request, plan.config):
        return start_from_image(request.image, encoder, width=size.width, height=size.height), None, None
    from .clip import load_clip

    assert request.vae is not None
    assert request.clip is not None
    image = fit_image(read_image(request.image), size.width, size.height)[None]
    vae = autoencoder
    if not isinstance(vae, WanVAE):
        vae = load_wan_vae(request.vae, dtype=plan.dtype, device=plan.device)
    condition = first_frame_condition(_OnDevice(vae, plan), image, size.latent_frames)
    clip = load_clip(request.clip, dtype=plan.dtype, device=plan.device).encode(image)
    return Start(), condition.cpu(), clip.cpu()


@dataclass(frozen=True)
class _OnDevice:
    """An encoder that takes frames from anywhere."""

    autoencoder: TAEHV | WanVAE
    plan: _Plan

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        return self.autoencoder.encode(frames_BVRHW.to(self.plan.device, self.plan.dtype))


def _rows(tensor: Tensor | None, count: int, plan: _Plan) -> Tensor | None:
    """A tensor of one row for `count` videos, where and as the model computes."""
    return None if tensor is None else tensor.to(plan.device, plan.dtype).expand(count, *[-1] * (tensor.ndim - 1))


# --------------------------------------------------------------- generating --
@torch.no_grad()
def _frames(
    request: Request,
    plan: _Plan,
    take: Take,
    model: Any,
    autoencoder: TAEHV | WanVAE,
    start: Start,
    conditions: list[Conditioning],
    clock: _Clock,
    show_progress: bool,
) -> Iterator[Tensor]:
    """Frames [B, V, R, H, W] of each chunk on the CPU, as soon as they are there."""
    size, began = plan.geometry, time.perf_counter()
    stream = StreamingWanDecoder(autoencoder) if isinstance(autoencoder, WanVAE) else StreamingDecoder(autoencoder)
    kept: list[Tensor] = []
    with tqdm(total=len(size.chunk_lengths), unit="chunk", disable=not show_progress, ascii=True) as bar:

        def counted(chunks: Iterator[Any]) -> Iterator[Any]:
            for chunk in chunks:
                bar.update()
                if request.latents is not None and not (chunk.is_given and start.shown_BTCHW is not None):
                    kept.append(chunk.latents_BTCHW[0].cpu())
                yield chunk

        chunks = rollout(
            model, conditions[0], noise=SeededNoise(request.seed, take.first_row),
            latent_shape=(size.latent_frames, plan.config.out_dim, size.latent_height, size.latent_width),
            causal=plan.causal, steps=plan.steps, prefix_BTCHW=start.prefix_BTCHW,
            negative=conditions[1], guidance=request.cfg,
        )  # fmt: skip
        for frames in frames_of(counted(chunks), _Cast(stream, plan), start):
            frames = frames.float().cpu()
            clock.chunks.append(time.perf_counter() - began)
            yield frames
            began = time.perf_counter()
    if request.latents is not None:
        shown = [] if start.shown_BTCHW is None else [start.shown_BTCHW[0]]
        write_latents(request.latents, torch.cat([*shown, *kept]), overwrite=request.overwrite)


@dataclass(frozen=True)
class _Cast:
    """A decoder that takes latents from anywhere."""

    decoder: Any
    plan: _Plan

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        return self.decoder.decode(latents_BTCHW.to(self.plan.device, self.plan.dtype))


def _write(request: Request, take: Take, chunks: Iterator[Tensor], settings: dict[str, Any], plan: _Plan) -> None:
    """One file per row. A single video is written while it is made, several from memory when they are complete."""
    metadata = {"comment": take.prompt, "selfforcing": settings}
    if len(take.outs) == 1:
        kept: list[Tensor] = []
        single = (chunk[0] for chunk in chunks)
        frames = _keeping(single, plan, kept) if request.sheet else single
        write_video(take.outs[0], frames, fps=request.fps, metadata=metadata, overwrite=request.overwrite)
        if request.sheet:
            write_contact_sheet(request.sheet, torch.stack(kept), overwrite=request.overwrite)
        return
    whole = list(chunks)
    for row, out in enumerate(take.outs):
        write_video(
            out, (chunk[row] for chunk in whole), fps=request.fps,
            metadata={**metadata, "selfforcing": {**settings, "sample": take.first_row + row}},
            overwrite=request.overwrite,
        )  # fmt: skip


def _keeping(chunks: Iterator[Tensor], plan: _Plan, kept: list[Tensor]) -> Iterator[Tensor]:
    """Pass chunks on and put at most SHEET_FRAMES frames, evenly spaced with the first and last, into `kept`."""
    total = _shown_frames(plan)
    count = min(total, SHEET_FRAMES)
    wanted = {round(index * (total - 1) / max(count - 1, 1)) for index in range(count)}
    start = 0
    for chunk in chunks:
        kept += [frame for index, frame in enumerate(chunk, start) if index in wanted]
        start += len(chunk)
        yield chunk


def _shown_frames(plan: _Plan) -> int:
    """Frames of the file: all of the rollout's, or those of the extended video and the new ones."""
    if plan.source is None:
        return plan.geometry.frames
    shown = pixel_frames(len(plan.source)) if plan.is_latent else len(plan.source)
    return shown + TEMPORAL_FACTOR * (plan.geometry.latent_frames - plan.given_frames)


def _described(request: Request, plan: _Plan) -> dict[str, Any]:
    size = plan.geometry
    more = {"cfg": request.cfg, "negative": request.negative} if request.cfg != 1 else {}
    return {
        "model": request.model,
        "seed": request.seed,
        "width": size.width,
        "height": size.height,
        "frames": _shown_frames(plan),
        "fps": request.fps,
        "causal": asdict(plan.causal),
        "steps": plan.steps.to_dict(),
        **more,
        "decoder": _decoder(request),
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def _measured(seconds: list[float], frames: int) -> dict[str, Any]:
    later = seconds[1:] or seconds
    return {
        "seconds_to_first_frame": seconds[0],
        "seconds_per_chunk": sum(later) / len(later),
        "generated_fps": frames / sum(seconds),
        "generated_fps_includes": FPS_INCLUDES,
    }
