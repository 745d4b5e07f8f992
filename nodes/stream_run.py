"""A run of a streaming node: from its inputs to latents, with frames, player, progress and record on the way.

Letters: B batch, T latent frames, C channels, H W latent size, V video frames, R RGB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..selfforcing_core.config import CausalConfig
from ..selfforcing_core.geometry import (
    PIXEL_STEP,
    SPATIAL_FACTOR,
    VideoGeometry,
    pixel_frames,
    rounded_length,
    rounded_side,
    whole_chunks,
)
from ..selfforcing_core.roofline import Meter, Recipe
from . import host
from .autoencoder import check_latent, check_space
from .causal_model import show_left_out
from .frame_stream import FrameStream, frame_stream
from .guided_network import SeededGraphNoise, compute_dtype
from .live import Live, open_live
from .model_settings import causal_settings, settings_of, sigmas_of
from .progress import StreamProgress, Take
from .prompts import planned, reader_of, text_in_graph
from .sampling import ChunkGuider, ChunkSampler, Run, SnapshotHolder, known_frames, layout
from .shared_network import config_of
from .steering_record import SteeringRecord

log = logging.getLogger(__name__)
SCHEDULE_KEY = "selfforcing_schedule"  # of saved files: the Prompt Schedule text that repeats a steered run
NO_STATE = "the sampler's state output is empty; switch keep_state on"
# Closes what was written, with the Prompt Schedule text of a run that was steered, else ""; names it as the host does.
Written = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Sampled:
    """What a run of a streaming node gave.

    samples: LATENT samples [B, C, T, H, W], T shorter than asked for where the run was finished early. kept: where it
    ended, or what stands for that. schedule: Prompt Schedule text that repeats it. ending: "whole" or "early".
    """

    samples: Tensor
    kept: Any
    schedule: str
    ending: str


def sample(
    *,
    model: Any,
    positive: list[Any],
    width: int,
    height: int,
    length: int,
    seed: int,
    steps: int,
    shift: float,
    chunk: int,
    window: int,
    sink: int,
    take: Take,
    latent_image: dict[str, Any] | None = None,
    taehv: Any = None,
    negative: list[Any] | None = None,
    cfg: float = 1.0,
    state: SnapshotHolder | None = None,
    keep_state: bool = False,
    clip: Any = None,
    player: bool = True,
    pace: float = 0.0,
    fps: float = 16.0,
    hidden: Any = None,
    written: Written = lambda schedule: [],
) -> Sampled:
    """What the run gave; `take` gets every chunk's frames as soon as they are decoded.

    The arguments are the inputs of the nodes; fps is the clock of the player, hidden what the host adds to them.
    written: called once when nothing more comes, however the run ended, before the page hears that it did.
    """
    causal = causal_settings(settings_of(model).causal, chunk, window, sink)
    channels = config_of(model.model.diffusion_model).out_dim
    space = settings_of(model).latent_space
    if taehv is not None:
        check_space(taehv, space, "the model makes")
    if latent_image is not None:
        check_latent(latent_image, space)
    latent, lengths = _empty_latent(latent_image, width, height, length, causal, channels)
    stream = None if taehv is None else frame_stream(taehv)
    sigmas = sigmas_of(model, steps, shift)
    guider = ChunkGuider(host.with_companions(model, stream.patchers if stream else []))
    guider.set_prompts(positive, negative, cfg)
    meter = _meter(model, stream, lengths, latent["samples"], sigmas, causal, cfg)
    predicted = meter.predicted()
    log.info("%s", meter.in_words())
    working = stream.working_bytes(*latent["samples"].shape[-2:]) if stream else 0
    record = _record(positive, lengths, fps, hidden)
    live = None
    if player:
        live = open_live(
            record, fps=fps, lengths=lengths, read=reader_of(positive, clip), seed=seed, pace=pace, hidden=hidden
        )  # fmt: skip

    def progress(total: int) -> StreamProgress:
        made = StreamProgress(total, sum(lengths), stream, model.model.latent_format, live, take)
        if state is not None:
            made.resumed(state.filled().video_BTCHW)
        return made

    kept = SnapshotHolder() if keep_state else None
    run = Run(causal=causal, progress=progress, resume=state, keep=kept, steering=live, working_bytes=working)
    ending = "stopped"
    try:
        if live is not None:
            live.limit_fps = predicted["fps"] / latent["samples"].shape[0]  # of one video
            live.say(stream.note if stream is not None and stream.note else meter.in_words())
        samples = guider.sample(
            SeededGraphNoise(seed, lengths).generate_noise(latent),
            latent["samples"],
            ChunkSampler(run),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            disable_pbar=True,
            seed=seed,
        )
        ending = "whole" if samples.shape[2] == sum(lengths) else "early"
        if record.events:
            host.add_metadata(hidden, **{SCHEDULE_KEY: record.text()})
    finally:
        _close(live, written, record, ending)
    return Sampled(host.to_graph(samples), host.blocked(NO_STATE) if kept is None else kept, record.text(), ending)


def _close(live: Live | None, written: Written, record: SteeringRecord, ending: str) -> None:
    """First what was written, then the page, which hears of that; a file that cannot be closed is no good ending."""
    files: list[dict[str, Any]] = []
    is_written = False
    try:
        files, is_written = written(record.text() if record.events else ""), True
    finally:
        if live is not None:
            live.close(ending if is_written else "stopped", files)


def _record(positive: list[Any], lengths: Sequence[int], fps: float, hidden: Any) -> SteeringRecord:
    """What the run begins with, to which is added what is done by hand."""
    plan, audience = planned(positive, lengths), host.audience()
    if not plan.first and audience is not None:
        plan = replace(plan, first=text_in_graph(getattr(hidden, "prompt", None), audience.node))
    return SteeringRecord(plan, lengths, fps)


def _meter(
    model: Any,
    stream: FrameStream | None,
    lengths: Sequence[int],
    samples: Tensor,
    sigmas: Tensor,
    causal: CausalConfig,
    cfg: float,
) -> Meter:
    """What this run should take on the MODEL's device."""
    dtype = compute_dtype(model.model)
    kept = settings_of(model).cache_dtype or dtype
    recipe = Recipe(
        config_of(model.model.diffusion_model), lengths, *samples.shape[-2:], steps=len(sigmas) - 1,
        window=causal.window, writes=causal.cache_source == "clean",
        decoder="none", guided=cfg != 1, batch=samples.shape[0], weight_bytes=model.model.get_dtype().itemsize,
        cache_bytes=kept.itemsize, activation_bytes=dtype.itemsize,
    )  # fmt: skip
    return Meter(recipe if stream is None else stream.counted(recipe), host.card(model.load_device, dtype))


def _empty_latent(
    latent_image: dict[str, Any] | None, width: int, height: int, length: int, causal: CausalConfig, channels: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A LATENT of the video's size and the chunks it is cut into. What is rounded to get whole ones is shown.

    Raises ValueError for a LATENT that is no Wan video, or shorter than a chunk.
    """
    if latent_image is not None:
        samples = latent_image["samples"]
        if samples.ndim != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"latent_image of shape {tuple(samples.shape)} is not a Wan video's [batch, {channels}, frames, "
                "height, width]; use Empty HunyuanVideo Latent or Empty AR Video Latent"
            )
        causal = layout(known_frames(latent_image.get("noise_mask")), causal)
        latent_image = _of_whole_chunks(latent_image, causal)
        frames, latent_height, latent_width = latent_image["samples"].shape[2:]
        width, height, length = latent_width * SPATIAL_FACTOR, latent_height * SPATIAL_FACTOR, pixel_frames(frames)
        size = VideoGeometry(width, height, length, causal.chunk, causal.independent_first_frame)
        return latent_image, size.chunk_lengths
    size = rounded_size(width, height, length, causal.chunk, causal.independent_first_frame)
    empty = torch.zeros(1, channels, size.latent_frames, size.latent_height, size.latent_width)
    return {"samples": empty}, size.chunk_lengths


def rounded_size(
    width: int, height: int, length: int, chunk: int, independent_first_frame: bool = False
) -> VideoGeometry:
    """The largest size up to this one that is whole chunks and tokens, at least one of each; what changes is shown."""
    size = VideoGeometry(
        rounded_side(width), rounded_side(height),
        rounded_length(length, chunk, independent_first_frame=independent_first_frame), chunk, independent_first_frame,
    )  # fmt: skip
    first = "1 and then " if independent_first_frame else ""
    for name, given, used, rule in (
        ("width", width, size.width, f"multiples of {PIXEL_STEP} pixels"),
        ("height", height, size.height, f"multiples of {PIXEL_STEP} pixels"),
        ("length", length, size.frames, f"whole chunks ({first}{chunk} latent frames, 4 frames each but the first, 1)"),
    ):
        if given != used:
            host.show_text(f"{name} {given} is rounded to {used}: {rule}")
    return size


def _of_whole_chunks(latent_image: dict[str, Any], causal: CausalConfig) -> dict[str, Any]:
    """The same without the latent frames at its end that are no whole chunk."""
    samples, mask = latent_image["samples"], latent_image.get("noise_mask")
    count = whole_chunks(samples.shape[2], causal.chunk, independent_first_frame=causal.independent_first_frame)
    if count >= samples.shape[2]:
        return latent_image
    show_left_out(samples.shape[2], count)
    masks = {} if mask is None else {"noise_mask": mask[:, :, :count]}
    return {**latent_image, "samples": samples[:, :, :count], **masks}
