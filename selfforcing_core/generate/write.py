"""Chunks of frames into a run's files: videos with their settings inside, and contact sheets.

Letters: B batch, V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..codecs.video import write_contact_sheet, write_video
from ..policy import cache_policy
from .plan import Plan, Timeline
from .request import PromptBatch, Request

SHEET_FRAMES = 32  # at most, so that a sheet of a long video stays a picture that one can look at


def write_batch(plan: Plan, batch: PromptBatch, settings: dict[str, Any], chunks: Iterator[Tensor]) -> None:
    """Write one file per row of the chunks [B, V, R, H, W], in their files' integers, and the contact sheet asked for.

    A single video is written while it is made, several from memory when they are complete. settings: of
    `batch_settings`; they are stored in each file. Raises ValueError for a file that cannot be written.
    """
    request = plan.request
    metadata = {"comment": batch.prompt, "selfforcing": settings}
    write = functools.partial(
        write_video,
        fps=plan.fps,
        overwrite=request.overwrite,
        sound=plan.sound,
        codec=request.codec,
        quality=request.quality,
    )
    if len(batch.outs) == 1:
        sheet_frames: list[Tensor] = []
        video = (chunk[0] for chunk in chunks)
        frames = _collecting(video, plan.extent.shown_frames, sheet_frames) if request.sheet else video
        write(batch.outs[0], frames, metadata=metadata)
        if request.sheet:
            write_contact_sheet(request.sheet, torch.stack(sheet_frames), overwrite=request.overwrite)
        return
    # Each chunk holds a part of every video, so that writing while they are made would take all writers at once.
    complete = list(chunks)
    for row, out in enumerate(batch.outs):
        # Which row of the noise this video is made from, beside the seed that all share.
        row_metadata = {**metadata, "selfforcing": {**settings, "sample": batch.first_row + row}}
        write(out, (chunk[row] for chunk in complete), metadata=row_metadata)


def _collecting(chunks: Iterator[Tensor], total: int, sheet_frames: list[Tensor]) -> Iterator[Tensor]:
    """Pass the chunks of a video on, and add SHEET_FRAMES of its `total` frames, first and last among them, evenly."""
    count = min(total, SHEET_FRAMES)
    # Rounded, not truncated: the last index is exactly the last frame.
    indices = {round(index * (total - 1) / max(count - 1, 1)) for index in range(count)}
    start = 0
    for chunk in chunks:
        sheet_frames += [frame for index, frame in enumerate(chunk, start) if index in indices]
        start += len(chunk)
        yield chunk


def batch_settings(plan: Plan, batch: PromptBatch, timeline: Timeline) -> dict[str, Any]:
    """Return what made these videos, in plain JSON types, as their files and the measurements say it."""
    request, size = plan.request, plan.extent.geometry
    # Without guidance the negative prompt is not read; a record of it would claim that it was.
    guidance = {"cfg": plan.cfg, "negative": request.negative} if plan.cfg != 1 else {}
    settings = {
        "model": request.model,
        **({} if request.low_noise is None else {"low_noise": request.low_noise}),
        "seed": request.seed,
        "width": size.width,
        "height": size.height,
        "frames": plan.extent.shown_frames,
        "fps": plan.fps,
        **({} if plan.preset is None else {"preset": plan.preset.name}),
        "causal": asdict(plan.causal),
        "steps": plan.steps.to_dict(),
        **guidance,
        **_file_settings(request),
        "decoder": plan.decoder,
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "prompt": batch.prompt,
    }
    if timeline.has_times:
        settings["history"] = request.history or cache_policy(plan.causal.policy).history
    if batch.text != batch.prompt:
        settings["extended_prompt"] = batch.text
    return settings


def _file_settings(request: Request) -> dict[str, Any]:
    """Return what was asked for of the file; nothing where that was its ending alone."""
    settings = {"codec": request.codec, "quality": request.quality, "audio": request.audio and str(request.audio)}
    return {name: value for name, value in settings.items() if value is not None}
