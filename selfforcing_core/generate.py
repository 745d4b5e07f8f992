"""Prompts in, video files out: everything is checked first, then each chunk is denoised, decoded and encoded in turn.

The loop itself is `rollout`; this file loads what it needs, feeds it and measures it. Networks follow one another on
the device: the text encoder goes before the video model comes.
Letters: B batch, V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .attention import MeasuredKernels, attention_kernel
from .conditioning import Conditioning
from .embeddings import EmbeddingFolder
from .float8 import store_in_float8
from .geometry import TEMPORAL_FACTOR
from .hub import check_channels, load_model, load_taehv, load_text_encoder, resolve_text_encoder
from .image import first_frame_condition, fit_image
from .plan import Plan, Request, Take, memory_in_words, plan_request, recipe_of
from .prompt_schedule import Entry, parse_schedule, start_frames
from .rollout import Chunk, PromptChange, ScheduledNoise, SeededNoise, rollout
from .roofline import Card, Meter, measured_card
from .start import (
    Start,
    frames_of,
    shown_frames,
    start_from_image,
    start_from_latents,
    start_from_video,
    write_latents,
)
from .taehv import TAEHV, StreamingDecoder, StreamingEncoder
from .text import encoder_bytes
from .video import write_contact_sheet, write_video
from .video_formats import video_format
from .wan_vae import StreamingWanDecoder, WanVAE, load_wan_vae

log = logging.getLogger(__name__)
SHEET_FRAMES = 32
FPS_INCLUDES = "text encoding, denoising, cache passes and decoding; not loading the models or writing the file"


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


def generate_all(
    request: Request,
    takes: Sequence[Take],
    *,
    rewrite: Callable[[list[str]], list[str]] | None = None,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Generate several takes with the same settings, loading each network once; measurements for each video.

    rewrite: gives the texts that the model reads, from those of the takes; asked once, when all else is checked.
    Raises ValueError, before anything is computed or written, for whatever cannot work.
    """
    plan = plan_request(request, takes)
    if rewrite is not None:
        if any(_has_times(parse_schedule(take.text)) for take in takes):
            raise ValueError("--extend-prompt makes one prompt of a schedule; write its prompts out instead")
        takes = [replace(take, text=text) for take, text in zip(takes, rewrite([take.text for take in takes]))]
    if show_progress and plan.device.type != "cpu":
        batch, text_bytes = max(len(take.outs) for take in takes), _text_encoder_bytes(request, plan, takes)
        log.warning("%s", memory_in_words(plan, request, batch, text_bytes))
    with _compiler_named() if request.compile else nullcontext():
        return _generate_all(request, takes, plan, show_progress)


@contextmanager
def _compiler_named() -> Iterator[None]:
    """Say in one line what torch.compile lacks, in place of its own pages."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--compile failed ({reason}); it needs a C++ compiler, on a GPU Triton as well; leave it out otherwise"
        ) from error


@torch.no_grad()
def _generate_all(request: Request, takes: Sequence[Take], plan: Plan, show_progress: bool) -> list[dict[str, Any]]:
    started = time.perf_counter()
    known, seconds_encoding = _encode_texts(request, plan, _texts(request, plan, takes))
    gc.collect()  # the text encoder may sit in a cycle of references, and has to go before the model comes
    autoencoder = _load_autoencoder(request, plan)
    start, image, clip = _start(request, plan, autoencoder)
    model = _load_model(request, plan)
    seconds_loading = time.perf_counter() - started - seconds_encoding
    card = measured_card(plan.device, plan.dtype) if request.roofline else None

    results = []
    kernel = functools.partial(attention_kernel, request.attention, MeasuredKernels())
    for take in takes:
        entries = parse_schedule(take.text)
        meter = None if card is None else _meter(request, plan, len(take.outs), autoencoder, card)
        if meter is not None and show_progress:
            log.warning("%s", _prediction_in_words(meter))
        began, clock = time.perf_counter(), _Clock()
        conditions = {
            text: Conditioning(*(_rows(tensor, len(take.outs), plan) for tensor in (known[text], image, clip)))  # type: ignore[arg-type]
            for text in _texts(request, plan, [take])
        }
        prompts = _Prompts(entries, conditions, plan, request)
        chunks = _frames(request, plan, take, model, autoencoder, start, prompts, kernel, clock, show_progress)
        settings = {**_described(request, plan), "prompt": take.prompt}
        if len(entries) > 1:
            settings["history"] = request.history
        if take.text != take.prompt:
            settings["extended_prompt"] = take.text
        _write(request, take, chunks, settings, plan)
        told = {} if meter is None else {"roofline": {**meter.predicted(), **meter.reached(clock.chunks)}}
        clock.chunks[0] += seconds_encoding / len(takes)
        written = time.perf_counter() - began - sum(clock.chunks) + seconds_encoding / len(takes)
        generated = plan.generated_frames * len(take.outs)
        for out in take.outs:
            results.append(
                {"out": str(out), "sheet": str(request.sheet) if request.sheet else None, **settings,
                 **_measured(clock.chunks, generated), "seconds_loading": seconds_loading, "seconds_writing": written,
                 **told}
            )  # fmt: skip
    return results


# ------------------------------------------------------------------ loading --
def _texts(request: Request, plan: Plan, takes: Sequence[Take]) -> list[str]:
    """Every text that is encoded for these takes: their prompts and, with guidance, what to keep away from."""
    prompts = [entry.prompt for take in takes for entry in parse_schedule(take.text) if _is_read(entry)]
    return list(dict.fromkeys(prompts if plan.cfg == 1 else [*prompts, request.negative]))


def _has_times(entries: Sequence[Entry]) -> bool:
    """Whether something holds from a moment on: a later prompt, or a seed."""
    return len(entries) > 1 or any(entry.seed is not None for entry in entries)


def _is_read(entry: Entry) -> bool:
    """Whether an entry has a prompt of its own, which only the first may have empty."""
    return bool(entry.prompt) or not entry.seconds


def _text_dtype(plan: Plan) -> torch.dtype:
    return torch.bfloat16 if plan.dtype == torch.float16 else plan.dtype  # float16 overflows inside UMT5


def _embedding_folder(request: Request, plan: Plan) -> EmbeddingFolder | None:
    if request.embeddings is None:
        return None
    encoder = resolve_text_encoder(request.text_encoder or request.model)
    return EmbeddingFolder(request.embeddings, encoder, _text_dtype(plan), "used")


def _is_known(folder: EmbeddingFolder | None, texts: list[str]) -> bool:
    """Whether the embeddings of all texts are kept, so that no text encoder is loaded."""
    return folder is not None and all(folder.path(text).is_file() for text in texts)


def _text_encoder_bytes(request: Request, plan: Plan, takes: Sequence[Take]) -> int:
    """Of the weights as they will be loaded; 0 where they are not."""
    if _is_known(_embedding_folder(request, plan), _texts(request, plan, takes)):
        return 0
    return encoder_bytes(resolve_text_encoder(request.text_encoder or request.model), _text_dtype(plan))


def _encode_texts(request: Request, plan: Plan, texts: list[str]) -> tuple[dict[str, Tensor], float]:
    """Embeddings [1, P, E] of each text on the CPU without their zero rows, and the seconds that took."""
    name = request.text_encoder or request.model
    load = functools.cache(lambda: load_text_encoder(name, dtype=_text_dtype(plan), device=plan.device))

    def encode(text: str) -> Tensor:
        return _trimmed(load().encode([text])).cpu()[0]

    folder = _embedding_folder(request, plan)
    embeds = encode if folder is None else functools.partial(folder.get, encode=encode)
    if not _is_known(folder, texts):
        load()
    began = time.perf_counter()
    return {text: embeds(text)[None] for text in texts}, time.perf_counter() - began


def _trimmed(embeds_1PE: Tensor) -> Tensor:
    used = int(embeds_1PE[0].any(-1).sum())
    return embeds_1PE[:, : max(used, 1)].clone()


def _load_autoencoder(request: Request, plan: Plan) -> TAEHV | WanVAE:
    """What decodes the video. Raises ValueError if it is made for other latents."""
    if plan.decoder == "vae":
        assert request.vae is not None
        vae = load_wan_vae(request.vae, dtype=plan.dtype, device=plan.device)
        check_channels(plan.config.out_dim, vae.latent_channels, "VAE")
        return vae
    return load_taehv(request.taehv or request.model, dtype=plan.dtype, device=plan.device)[0]


def _load_model(request: Request, plan: Plan) -> Any:
    """The video model on its device; with fp8 it is shrunk on the CPU before it moves."""
    device = None if request.fp8 else plan.device
    model: Any = load_model(request.model, dtype=plan.dtype, device=device, weights=request.weights)[0]
    if request.fp8:
        model = store_in_float8(model).to(plan.device)
    model.cache_dtype = plan.cache_dtype
    return model.compile_blocks() if request.compile else model


def _meter(request: Request, plan: Plan, batch: int, autoencoder: TAEHV | WanVAE, card: Card) -> Meter:
    recipe = recipe_of(plan, request, batch)
    return Meter(replace(recipe, taehv=autoencoder.config) if isinstance(autoencoder, TAEHV) else recipe, card)


def _prediction_in_words(meter: Meter) -> str:
    told = meter.predicted()
    return (
        f"the device multiplies at {told['device_tflops']:.3g} TFLOP/s and moves "
        f"{told['device_gbytes_per_second']:.3g} GB/s: {meter.in_words()}"
    )


def _start(request: Request, plan: Plan, autoencoder: TAEHV | WanVAE) -> tuple[Start, Tensor | None, Tensor | None]:
    """How the video begins, and for image-to-video models their condition channels and CLIP features."""
    encoder = _OnDevice(autoencoder, plan)
    if plan.source is not None:
        if isinstance(plan.source, Tensor):
            return start_from_latents(plan.source, plan.causal), None, None
        return start_from_video(plan.source, encoder, plan.causal), None, None
    if plan.image_RHW is None:
        return Start(), None, None
    size = plan.geometry
    image = fit_image(plan.image_RHW, size.width, size.height)[None]
    if plan.is_prefixed_by_image:
        return start_from_image(image, encoder), None, None
    from .clip import load_clip

    assert request.vae is not None
    assert request.clip is not None
    vae = autoencoder
    if not isinstance(vae, WanVAE):
        vae = load_wan_vae(request.vae, dtype=plan.dtype, device=plan.device)
    condition = first_frame_condition(_OnDevice(vae, plan), image, size.latent_frames)
    clip = load_clip(request.clip, dtype=plan.dtype, device=plan.device).encode(image)
    return Start(), condition.cpu(), clip.cpu()


@dataclass(frozen=True)
class _OnDevice:
    """An encoder that takes frames from anywhere and holds the work for one chunk of them at a time."""

    autoencoder: TAEHV | WanVAE
    plan: Plan

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        device, dtype = self.plan.device, self.plan.dtype
        if isinstance(self.autoencoder, WanVAE):  # walks through a video in groups of 4 frames by itself
            return self.autoencoder.encode(frames_BVRHW.to(device, dtype))
        stream = StreamingEncoder(self.autoencoder)
        pieces = frames_BVRHW.split(TEMPORAL_FACTOR * self.plan.causal.chunk, 1)
        return torch.cat([*(stream.encode(piece.to(device, dtype)) for piece in pieces), stream.flush()], 1)


def _rows(tensor: Tensor | None, count: int, plan: Plan) -> Tensor | None:
    """A tensor of one row for `count` videos, where and as the model computes."""
    return None if tensor is None else tensor.to(plan.device, plan.dtype).expand(count, *[-1] * (tensor.ndim - 1))


# --------------------------------------------------------------- generating --
Kernel = Callable[[], AbstractContextManager[None]]


class _Prompts:
    """The prompts and seeds of one video and the frames from which they hold."""

    def __init__(
        self, entries: Sequence[Entry], conditions: dict[str, Conditioning], plan: Plan, request: Request
    ) -> None:
        starts = start_frames(entries, plan.geometry.chunk_lengths, entries[0].fps or request.fps)
        self.first = conditions[entries[0].prompt]
        self.later = {
            start: PromptChange(conditions[entry.prompt], entry.history or request.history)
            for start, entry in zip(starts[1:], entries[1:])
            if _is_read(entry)
        }
        self.seeds = {start: entry.seed for start, entry in zip(starts, entries) if entry.seed is not None}
        self.negative = None if plan.cfg == 1 else conditions[request.negative]
        self.at = self.later.get if self.later else None


def _switched(chunks: Iterator[Any], kernel: Kernel) -> Iterator[Any]:
    """The chunks, with the kernel switched to only while one is made: other networks' attention it may refuse."""
    while True:
        with kernel():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


@torch.no_grad()
def _frames(
    request: Request,
    plan: Plan,
    take: Take,
    model: Any,
    autoencoder: TAEHV | WanVAE,
    start: Start,
    prompts: _Prompts,
    kernel: Kernel,
    clock: _Clock,
    show_progress: bool,
) -> Iterator[Tensor]:
    """Frames [B, V, R, H, W] on the CPU, as soon as they are there: what the start shows, then chunk by chunk.

    Raises ValueError for a chunk with numbers that are none.
    """
    size = plan.geometry
    stream = StreamingWanDecoder(autoencoder) if isinstance(autoencoder, WanVAE) else StreamingDecoder(autoencoder)
    kept: list[Tensor] = []
    with tqdm(total=len(size.chunk_lengths), unit="chunk", disable=not show_progress, ascii=True) as bar:

        def counted(chunks: Iterator[Any]) -> Iterator[Any]:
            for chunk in chunks:
                _check_finite(chunk, plan)
                bar.update()
                if request.latents is not None and not (chunk.is_given and start.shown_BTCHW is not None):
                    kept.append(chunk.latents_BTCHW[0].cpu())
                yield chunk

        seeded = functools.partial(SeededNoise, first_row=take.first_row, first_frame=plan.first_frame)
        chunks = rollout(
            model, prompts.first, noise=ScheduledNoise(seeded(request.seed), prompts.seeds, seeded),
            latent_shape=(size.latent_frames, plan.config.out_dim, size.latent_height, size.latent_width),
            causal=plan.causal, steps=plan.steps, prefix_BTCHW=start.prefix_BTCHW,
            negative=prompts.negative, guidance=plan.cfg, prompt_at=prompts.at,
        )  # fmt: skip
        decoder = _Cast(stream, plan)
        shown = ((frames, False) for frames in shown_frames(start, decoder, size.chunk))
        made = ((frames, True) for frames in frames_of(counted(_switched(chunks, kernel)), decoder, start))
        seconds, began = 0.0, time.perf_counter()
        for frames, is_chunk in itertools.chain(shown, made):
            frames = frames.float().cpu().expand(len(take.outs), *[-1] * 4)
            seconds += time.perf_counter() - began
            if is_chunk:
                clock.chunks.append(seconds)
                seconds = 0.0
            yield frames
            began = time.perf_counter()
    if request.latents is not None:
        before = [] if start.shown_BTCHW is None else [start.shown_BTCHW[0]]
        write_latents(request.latents, torch.cat([*before, *kept]), overwrite=request.overwrite)


def _check_finite(chunk: Chunk, plan: Plan) -> None:
    """Raise ValueError for what would be a black video."""
    if not chunk.latents_BTCHW.isfinite().all():
        raise ValueError(
            f"chunk {chunk.index} holds numbers beyond {str(plan.dtype).removeprefix('torch.')}; "
            f"use a smaller --cfg than {plan.cfg}, or another --dtype"
        )


@dataclass(frozen=True)
class _Cast:
    """A decoder that takes latents from anywhere."""

    decoder: Any
    plan: Plan

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        return self.decoder.decode(latents_BTCHW.to(self.plan.device, self.plan.dtype))


def _write(request: Request, take: Take, chunks: Iterator[Tensor], settings: dict[str, Any], plan: Plan) -> None:
    """One file per row. A single video is written while it is made, several from memory when they are complete."""
    metadata = {"comment": take.prompt, "selfforcing": settings}
    has_sound = video_format(take.outs[0], request.codec).sound is not None
    write = functools.partial(
        write_video, fps=request.fps, overwrite=request.overwrite, sound=plan.sound if has_sound else None,
        codec=request.codec, quality=request.quality,
    )  # fmt: skip
    if len(take.outs) == 1:
        kept: list[Tensor] = []
        single = (chunk[0] for chunk in chunks)
        frames = _keeping(single, plan, kept) if request.sheet else single
        write(take.outs[0], frames, metadata=metadata)
        if request.sheet:
            write_contact_sheet(request.sheet, torch.stack(kept), overwrite=request.overwrite)
        return
    whole = list(chunks)
    for row, out in enumerate(take.outs):
        of_row = {**metadata, "selfforcing": {**settings, "sample": take.first_row + row}}
        write(out, (chunk[row] for chunk in whole), metadata=of_row)


def _keeping(chunks: Iterator[Tensor], plan: Plan, kept: list[Tensor]) -> Iterator[Tensor]:
    """Pass chunks on and put at most SHEET_FRAMES frames, evenly spaced with the first and last, into `kept`."""
    total = plan.shown_frames
    count = min(total, SHEET_FRAMES)
    wanted = {round(index * (total - 1) / max(count - 1, 1)) for index in range(count)}
    start = 0
    for chunk in chunks:
        kept += [frame for index, frame in enumerate(chunk, start) if index in wanted]
        start += len(chunk)
        yield chunk


def _described(request: Request, plan: Plan) -> dict[str, Any]:
    size = plan.geometry
    more = {"cfg": plan.cfg, "negative": request.negative} if plan.cfg != 1 else {}
    return {
        "model": request.model,
        "seed": request.seed,
        "width": size.width,
        "height": size.height,
        "frames": plan.shown_frames,
        "fps": request.fps,
        "causal": asdict(plan.causal),
        "steps": plan.steps.to_dict(),
        **more,
        **_file_described(request),
        "decoder": plan.decoder,
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def _file_described(request: Request) -> dict[str, Any]:
    """What was asked for of the file; nothing where that was its ending alone."""
    asked = {"codec": request.codec, "quality": request.quality, "audio": request.audio and str(request.audio)}
    return {name: value for name, value in asked.items() if value is not None}


def _measured(seconds: list[float], frames: int) -> dict[str, Any]:
    later = seconds[1:] or seconds
    return {
        "seconds_to_first_frame": seconds[0],
        "seconds_per_chunk": sum(later) / len(later),
        "generated_fps": frames / sum(seconds),
        "generated_fps_includes": FPS_INCLUDES,
    }
