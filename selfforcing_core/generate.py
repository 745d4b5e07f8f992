"""A prompt in, a video file out: everything is checked first, then each chunk is denoised, decoded and encoded in turn.

The loop itself is `rollout`; this file loads what it needs, feeds it and measures it.
Letters: V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .atomic import check_writable
from .checkpoint import Checkpoint, read_checkpoint
from .conditioning import Conditioning
from .config import CausalConfig, StepConfig
from .geometry import VideoGeometry
from .hub import list_bundles, load_model, load_taehv, load_text_encoder, resolve_model
from .rollout import SeededNoise, rollout
from .taehv import TAEHV, StreamingDecoder
from .video import check_video_path, write_contact_sheet, write_video

# Width, height and frames that a bundle was trained on; anything else is taken for a Wan 2.1 model.
BUNDLE_SIZES = {"tiny": (64, 64, 33)}
WAN_SIZE = (832, 480, 81)
SHEET_FRAMES = 32
FPS_INCLUDES = "text encoding, denoising, cache passes and decoding; not loading the models or writing the file"


@dataclass(frozen=True)
class Request:
    """What to generate and where to; None means what the checkpoint says, or the size its model was trained on.

    model, taehv, text_encoder: a bundle's name or a path. width, height in pixels, frames in video frames; chunk,
    window, sink in latent frames (see CausalConfig); steps and shift as in StepConfig.
    """

    prompt: str
    out: Path
    model: str = "tiny"
    taehv: str | None = None
    text_encoder: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float = 16
    seed: int = 0
    chunk: int | None = None
    window: int | None = None
    sink: int | None = None
    steps: tuple[float, ...] | None = None
    shift: float | None = None
    sheet: Path | None = None
    overwrite: bool = False
    device: str = "cpu"
    dtype: str | None = None


@dataclass(frozen=True)
class _Plan:
    """A request whose every choice is made."""

    geometry: VideoGeometry
    causal: CausalConfig
    steps: StepConfig
    device: torch.device
    dtype: torch.dtype


@dataclass
class _Clock:
    """Seconds from asking for a chunk to having its frames, one entry per chunk; the first includes the prompt."""

    chunks: list[float] = field(default_factory=list)


def generate(request: Request, *, show_progress: bool = False) -> dict[str, Any]:
    """Generate one video and write it (and its contact sheet); returns the measurements in plain JSON types.

    Raises ValueError, before anything is computed or written, for whatever cannot work.
    """
    plan = _plan(request)
    started = time.perf_counter()
    model, _ = load_model(request.model, dtype=plan.dtype, device=plan.device)
    taehv, _ = load_taehv(request.taehv or request.model, dtype=plan.dtype, device=plan.device)
    encoder = load_text_encoder(request.text_encoder or request.model, device=plan.device)
    _check_channels(model.config.out_dim, taehv)
    loaded = time.perf_counter()

    clock, kept = _Clock(), []
    chunks = _frames(request, plan, model, taehv, encoder, clock, show_progress)
    settings = {**_described(request, plan), "prompt": request.prompt}
    write_video(
        request.out, _keeping(chunks, plan.geometry.frames, kept) if request.sheet else chunks,
        fps=request.fps, metadata={"comment": request.prompt, "selfforcing": settings}, overwrite=request.overwrite,
    )  # fmt: skip
    if request.sheet:
        write_contact_sheet(request.sheet, torch.stack(kept), overwrite=request.overwrite)
    written = time.perf_counter()
    return {
        "out": str(request.out),
        "sheet": str(request.sheet) if request.sheet else None,
        **settings,
        **_measured(clock.chunks, plan.geometry.frames),
        "seconds_loading": loaded - started,
        "seconds_writing": written - loaded - sum(clock.chunks),
    }


def _plan(request: Request) -> _Plan:
    """Every check that needs no computing, cheapest first."""
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; describe the video in a few words")
    if request.sheet and request.sheet.resolve() == request.out.resolve():
        raise ValueError(f"{request.out}: video and contact sheet cannot be one file; name two")
    check_video_path(request.out)
    for path in filter(None, (request.out, request.sheet)):
        check_writable(path, overwrite=request.overwrite)
    if not 0 < request.fps < float("inf"):
        raise ValueError(f"fps {request.fps} is not a positive number; Wan models are trained at 16")
    checkpoint = read_checkpoint(resolve_model(request.model))
    if checkpoint.kind != "wan":
        raise ValueError(f"{request.model} is a {checkpoint.kind}, not a video model; give it as --taehv")
    if request.model not in list_bundles() and not (request.taehv and request.text_encoder):
        raise ValueError(f"{request.model} is a single file; give its --taehv and its --text-encoder as well")
    causal, steps = _settings(request, checkpoint)
    width, height, frames = BUNDLE_SIZES.get(request.model, WAN_SIZE)
    geometry = VideoGeometry(
        width=_or(request.width, width), height=_or(request.height, height), frames=_or(request.frames, frames),
        chunk=causal.chunk, independent_first_frame=causal.independent_first_frame,
    )  # fmt: skip
    device = _device(request.device)
    return _Plan(geometry, causal, steps, device, _dtype(request.dtype, checkpoint, device))


def _or(chosen: Any, default: Any) -> Any:
    return default if chosen is None else chosen


def _settings(request: Request, checkpoint: Checkpoint) -> tuple[CausalConfig, StepConfig]:
    """The checkpoint's way of being run, with what the request changes."""
    causal = {name: getattr(request, name) for name in ("chunk", "window", "sink")}
    steps = {name: getattr(request, name) for name in ("steps", "shift")}
    return (
        replace(checkpoint.causal or CausalConfig(), **{k: v for k, v in causal.items() if v is not None}),
        replace(checkpoint.steps or StepConfig(), **{k: v for k, v in steps.items() if v is not None}),
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here; cpu always works") from error
    return device


def _dtype(name: str | None, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The asked one; else the stored one, except on a CPU, where float32 is both exact and fastest."""
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        name = "float32" if device.type == "cpu" else checkpoint.dtype
    if name not in choices:
        raise ValueError(f"dtype {name!r} is no type to compute in; use one of {', '.join(choices)}")
    return choices[name]


def _check_channels(channels: int, taehv: TAEHV) -> None:
    if taehv.config.latent_channels != channels:
        raise ValueError(
            f"the model makes latents of {channels} channels, the TAEHV decodes {taehv.config.latent_channels}; "
            "use the TAEHV that belongs to the model"
        )


@torch.no_grad()
def _frames(
    request: Request, plan: _Plan, model: Any, taehv: TAEHV, encoder: Any, clock: _Clock, show_progress: bool
) -> Iterator[Tensor]:
    """Frames [V,R,H,W] of each chunk on the CPU, as soon as they are there."""
    size, began = plan.geometry, time.perf_counter()
    with tqdm(total=len(size.chunk_lengths), unit="chunk", disable=not show_progress, ascii=True) as bar:
        decoder = StreamingDecoder(taehv)
        chunks = rollout(
            model, Conditioning(encoder.encode([request.prompt]).to(plan.dtype)), noise=SeededNoise(request.seed),
            latent_shape=(size.latent_frames, model.config.out_dim, size.latent_height, size.latent_width),
            causal=plan.causal, steps=plan.steps,
        )  # fmt: skip
        for chunk in chunks:
            frames = decoder.decode(chunk.latents_BTCHW.to(plan.dtype))[0].float().cpu()
            clock.chunks.append(time.perf_counter() - began)
            bar.update()
            yield frames
            began = time.perf_counter()


def _keeping(chunks: Iterator[Tensor], total: int, kept: list[Tensor]) -> Iterator[Tensor]:
    """Pass chunks on and put at most SHEET_FRAMES frames, evenly spaced with the first and last, into `kept`."""
    count = min(total, SHEET_FRAMES)
    wanted = {round(index * (total - 1) / max(count - 1, 1)) for index in range(count)}
    start = 0
    for chunk in chunks:
        kept += [frame for index, frame in enumerate(chunk, start) if index in wanted]
        start += len(chunk)
        yield chunk


def _described(request: Request, plan: _Plan) -> dict[str, Any]:
    size = plan.geometry
    return {
        "model": request.model,
        "seed": request.seed,
        "width": size.width,
        "height": size.height,
        "frames": size.frames,
        "fps": request.fps,
        "causal": asdict(plan.causal),
        "steps": plan.steps.to_dict(),
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
