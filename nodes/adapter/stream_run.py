"""A run of a streaming node: from its inputs to latents, with frames, player, progress and record on the way.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...selfforcing_core.config import CausalConfig
from ...selfforcing_core.geometry import (
    PIXEL_STEP,
    SPATIAL_FACTOR,
    VideoGeometry,
    pixel_frames,
    rounded_length,
    rounded_side,
    whole_chunks,
)
from ...selfforcing_core.policy import cache_policy
from ...selfforcing_core.roofline.meter import Meter, Recipe
from . import host, page
from .autoencoder import check_latent, check_space
from .causal_model import show_left_out
from .chunk_sampler import ChunkGuider, ChunkSampler, Run, SnapshotHolder, chunking_behind, known_frames
from .frame_stream import FrameStream, frame_stream
from .guided_network import SeededGraphNoise, compute_dtype
from .guider_prompts import reader_of, text_in_graph, timeline_of
from .live import Live, open_live
from .model_settings import AUTO, causal_settings, low_noise_of, settings_of, shift_of, sigmas_of
from .progress import OnFrames, StreamProgress
from .shared_network import config_of
from .steering_record import SteeringRecord

log = logging.getLogger(__name__)
SCHEDULE_KEY = "selfforcing_schedule"  # of saved files: the Prompt Schedule text that repeats a steered run
NO_STATE = "the sampler's state output is empty; switch keep_state on"
# Closes what was written, with the Prompt Schedule text of a run that was steered, else ""; returns the files as
# ComfyUI lists them for the page.
OnEnd = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class StreamInputs:
    """The inputs of a streaming node under the names of its sockets and widgets, and what ComfyUI adds to them."""

    model: Any  # MODEL that our loader or our patch node has seen
    positive: list[Any]  # CONDITIONING, perhaps with the times from which its prompts hold
    width: int  # pixels, rounded down to whole tokens
    height: int  # likewise
    length: int  # video frames, rounded down to whole chunks
    seed: int  # of all noise
    steps: int  # per chunk; AUTO is the MODEL's own list
    shift: float  # of the timesteps; AUTO is the MODEL's own
    chunk: int  # latent frames; AUTO likewise
    window: int  # latent frames in the KV cache, -1 for all; AUTO likewise
    sink: int  # latent frames that never leave it; SINK_AUTO likewise
    latent_image: dict[str, Any] | None = None  # its size replaces width, height and length
    taehv: Any = None  # a VAE of any loader; without one nothing is decoded
    negative: list[Any] | None = None  # CONDITIONING; only with a cfg other than 1
    cfg: float = 1.0  # guidance scale
    state: SnapshotHolder | None = None  # to go on from
    keep_state: bool = False  # whether the result holds a snapshot
    clip: Any = None  # reads typed prompts where positive brings no reader
    player: bool = True  # whether a page may watch and steer
    pace: float = 0.0  # seconds of video that may be made and not yet shown; 0 is no limit
    fps: float = 16.0  # of the player's clock, and of times in prompts
    warp: str = "auto"  # whether steps go through the shift: one of WARPS
    first_chunk_steps: int = AUTO  # AUTO is the MODEL's own list, if it has one, else as every chunk
    hidden: Any = None  # what ComfyUI adds: the queued graph, and what saved files are given


@dataclass(frozen=True)
class StreamResult:
    """What a run of a streaming node gave."""

    samples: Tensor  # of a LATENT [B, C, T, H, W]; T is shorter than asked for where the run was finished early
    state: Any  # SnapshotHolder of where it ended, or what stands for that in the graph
    schedule: str  # Prompt Schedule text that repeats the run
    ending: str  # "whole" or "early"


def sample(inputs: StreamInputs, *, on_frames: OnFrames, on_end: OnEnd = lambda schedule: []) -> StreamResult:
    """Run a streaming node; `on_frames` gets every chunk's frames as soon as they are decoded.

    on_end: called once when nothing more comes, however the run ended, before the page hears that it did.
    Raises ValueError for inputs that do not go together, before the first network call.
    """
    model, latent, lengths, causal = _video(inputs)
    stream = None if inputs.taehv is None else frame_stream(inputs.taehv)
    sigmas, first_sigmas = sigmas_of(
        model, inputs.steps, inputs.shift, warp=inputs.warp, first_chunk_steps=inputs.first_chunk_steps
    )
    first_sigmas = sigmas if first_sigmas is None else first_sigmas
    # The decoder is loaded with the MODEL and stays: coming and going, it would make ComfyUI unload parts of either.
    guider = ChunkGuider(host.with_companions(model, stream.patchers if stream else []))
    guider.set_prompts(inputs.positive, inputs.negative, inputs.cfg)
    meter = Meter(
        _recipe(inputs, stream, lengths, latent["samples"], causal, sigmas, first_sigmas),
        host.card(model.load_device, compute_dtype(model.model)),
    )
    log.info("%s", meter.in_words())
    record = _record(inputs, lengths)
    live = _live(inputs, lengths, record)

    def progress(total: int) -> StreamProgress:
        watcher = StreamProgress(
            total, sum(lengths), stream=stream, latent_format=model.model.latent_format, live=live, on_frames=on_frames
        )
        if inputs.state is not None:
            watcher.begin_with(inputs.state.filled().video_BTCHW)
        return watcher

    holder = SnapshotHolder() if inputs.keep_state else None
    run = Run(
        causal=causal,
        first_sigmas=first_sigmas,
        shift=shift_of(model, inputs.shift),
        progress=progress,
        resume=inputs.state,
        keep=holder,
        steering=live,
        working_bytes=stream.working_bytes(*latent["samples"].shape[-2:]) if stream else 0,
    )
    ending = "stopped"  # unless sampling returns
    try:
        if live is not None:
            live.figures.limit_fps = meter.predicted()["fps"] / latent["samples"].shape[0]  # of one video
            live.say(stream.note if stream is not None and stream.note else meter.in_words())
        # As SamplerCustomAdvanced calls a guider, but for the callback: StreamProgress is told by the rollout itself.
        samples = guider.sample(
            SeededGraphNoise(inputs.seed, lengths).generate_noise(latent),
            latent["samples"],
            ChunkSampler(run),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            disable_pbar=True,  # StreamProgress moves the node's bar, by network calls and not by sigmas
            seed=inputs.seed,
        )
        ending = "whole" if samples.shape[2] == sum(lengths) else "early"
        if record.events:
            page.add_metadata(inputs.hidden, **{SCHEDULE_KEY: record.text()})
    finally:
        _close(live, on_end, record, ending)
    state = host.blocker(NO_STATE) if holder is None else holder
    return StreamResult(host.to_graph(samples), state, record.text(), ending)


def _video(inputs: StreamInputs) -> tuple[Any, dict[str, Any], tuple[int, ...], CausalConfig]:
    """Return the MODEL, an empty LATENT of the video's size, its chunks' lengths and how they are made.

    Raises ValueError for a VAE or latents of another latent space than the MODEL's.
    """
    model, settings = inputs.model, settings_of(inputs.model)
    causal = causal_settings(settings.causal, inputs.chunk, inputs.window, inputs.sink)
    channels = config_of(model.model.diffusion_model).out_dim
    if inputs.taehv is not None:
        check_space(inputs.taehv, settings.latent_space, "the model makes")
    if inputs.latent_image is not None:
        check_latent(inputs.latent_image, settings.latent_space)
    latent, lengths = _empty_latent(inputs, causal, channels)
    return model, latent, lengths, causal


def _live(inputs: StreamInputs, lengths: Sequence[int], record: SteeringRecord) -> Live | None:
    """Return the run as its page sees it; None where the player is off or no page queued it."""
    if not inputs.player:
        return None
    return open_live(
        record,
        fps=inputs.fps,
        lengths=lengths,
        reader=reader_of(inputs.positive, inputs.clip),
        seed=inputs.seed,
        pace=inputs.pace,
        hidden=inputs.hidden,
    )


def _close(live: Live | None, on_end: OnEnd, record: SteeringRecord, ending: str) -> None:
    """Close what was written, then tell the page, which hears of it; a file that cannot be closed is no good ending."""
    files: list[dict[str, Any]] = []
    is_written = False
    try:
        # A run that nobody steered is repeated by the graph itself, which the file holds anyway.
        files, is_written = on_end(record.text() if record.events else ""), True
    finally:
        if live is not None:
            live.close(ending if is_written else "stopped", files)


def _record(inputs: StreamInputs, lengths: Sequence[int]) -> SteeringRecord:
    """Return what the run begins with, to which is added what is done by hand."""
    timeline, audience = timeline_of(inputs.positive, lengths), page.audience()
    # Embeddings of ComfyUI's own nodes have lost their text; the graph that was queued has it still.
    if not timeline.first and audience is not None:
        timeline = replace(timeline, first=text_in_graph(getattr(inputs.hidden, "prompt", None), audience.node))
    return SteeringRecord(timeline, lengths, inputs.fps)


def _recipe(
    inputs: StreamInputs,
    stream: FrameStream | None,
    lengths: Sequence[int],
    samples_BCTHW: Tensor,
    causal: CausalConfig,
    sigmas: Tensor,
    first_sigmas: Tensor,
) -> Recipe:
    """Return the work of this run, from which follows what it should take on the MODEL's device."""
    model = inputs.model.model
    dtype = compute_dtype(model)
    num_models = 1 if low_noise_of(inputs.model) is None else 2
    # weight_bytes: as they lie in memory and are read for each pass; activations are of the type computed in.
    recipe = Recipe(
        config_of(model.diffusion_model),
        lengths,
        *samples_BCTHW.shape[-2:],
        steps=len(sigmas) - 1,
        first_chunk_steps=len(first_sigmas) - 1,
        window=causal.window,
        writes=causal.cache_source == "clean",
        is_joint=cache_policy(causal.policy).is_joint,
        decoder="none",
        guided=inputs.cfg != 1,
        batch=samples_BCTHW.shape[0],
        networks=num_models,
        resident=num_models,
        weight_bytes=model.get_dtype().itemsize,
        cache_bytes=(settings_of(inputs.model).cache_dtype or dtype).itemsize,
        activation_bytes=dtype.itemsize,
    )
    return recipe if stream is None else stream.with_decoder(recipe)


def _empty_latent(inputs: StreamInputs, causal: CausalConfig, channels: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return a LATENT of the video's size and the chunks it is cut into; show what is rounded to get whole ones.

    Raises ValueError for a LATENT that is no Wan video, or shorter than a chunk.
    """
    latent_image = inputs.latent_image
    if latent_image is not None:
        samples = latent_image["samples"]
        if samples.ndim != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"latent_image of shape {tuple(samples.shape)} is not a Wan video's [batch, {channels}, frames, "
                "height, width]; use Empty HunyuanVideo Latent or Empty AR Video Latent"
            )
        causal = chunking_behind(known_frames(latent_image.get("noise_mask")), causal)
        latent_image = _of_whole_chunks(latent_image, causal)
        frames, latent_height, latent_width = latent_image["samples"].shape[2:]
        width, height, length = latent_width * SPATIAL_FACTOR, latent_height * SPATIAL_FACTOR, pixel_frames(frames)
        size = VideoGeometry(width, height, length, causal.chunk, causal.independent_first_frame)
        return latent_image, size.chunk_lengths
    size = rounded_size(inputs.width, inputs.height, inputs.length, causal.chunk, causal.independent_first_frame)
    # On the CPU: where the rollout begins with noise alone, only the shape of this is read.
    empty = torch.zeros(1, channels, size.latent_frames, size.latent_height, size.latent_width)
    return {"samples": empty}, size.chunk_lengths


def rounded_size(
    width: int, height: int, length: int, chunk: int, independent_first_frame: bool = False
) -> VideoGeometry:
    """Return the largest size up to this one of whole chunks and tokens, at least one of each; show what changes."""
    size = VideoGeometry(
        rounded_side(width),
        rounded_side(height),
        rounded_length(length, chunk, independent_first_frame=independent_first_frame),
        chunk,
        independent_first_frame,
    )
    first = "1 and then " if independent_first_frame else ""
    # Rounded and not refused: ComfyUI's own widgets step by 4 frames and 16 pixels, whatever the chunks are.
    for name, wish, rounded, rule in (
        ("width", width, size.width, f"multiples of {PIXEL_STEP} pixels"),
        ("height", height, size.height, f"multiples of {PIXEL_STEP} pixels"),
        ("length", length, size.frames, f"whole chunks ({first}{chunk} latent frames, 4 frames each but the first, 1)"),
    ):
        if wish != rounded:
            page.show_text(f"{name} {wish} is rounded to {rounded}: {rule}")
    return size


def _of_whole_chunks(latent_image: dict[str, Any], causal: CausalConfig) -> dict[str, Any]:
    """Return the same without the latent frames at its end that are no whole chunk."""
    samples, mask = latent_image["samples"], latent_image.get("noise_mask")
    count = whole_chunks(samples.shape[2], causal.chunk, independent_first_frame=causal.independent_first_frame)
    if count >= samples.shape[2]:
        return latent_image
    show_left_out(samples.shape[2], count)
    masks = {} if mask is None else {"noise_mask": mask[:, :, :count]}
    return {**latent_image, "samples": samples[:, :, :count], **masks}
