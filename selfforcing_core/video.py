"""Video files through PyAV: H.264 in yuv420p, which every browser and player shows, and contact sheets as PNG.

Letters: V video frames, R RGB, H W height and width in pixels. Values of frames are in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image
from torch import Tensor

from .atomic import replacing

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# x264: crf 18 is visually lossless (0 is exact, 51 is worst). Its assembly was seen to encode equal frames into files
# that differ in a few bytes, with one thread too: compare frames, not files.
ENCODER = {"crf": "18", "preset": "medium"}


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: float = 16,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> int:
    """Write frames as H.264 and return their number; the file appears when it is complete, or not at all.

    frames: [V,R,H,W], [1,V,R,H,W], or an iterable of such chunks, which is consumed one chunk at a time.
    metadata: entries for the container; values that are not text are stored as JSON.
    Raises ValueError for odd sizes (yuv420p halves both), for chunks that differ in size, for no frames, and for a
    path that cannot be written or already exists.
    """
    path = Path(path)
    check_video_path(path)
    if fps <= 0:
        raise ValueError(f"fps {fps} is not positive; Wan models are trained at 16")
    with replacing(path, overwrite=overwrite) as temporary:
        return _encode(temporary, CONTAINERS[path.suffix.lower()], _chunks(frames), fps, metadata or {})


def check_video_path(path: str | Path) -> None:
    """Raise ValueError when the ending of `path` names no container that is written here."""
    if Path(path).suffix.lower() not in CONTAINERS:
        raise ValueError(f"{path}: unknown kind of video file; use an ending of {', '.join(CONTAINERS)}")


def _chunks(frames: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in [frames] if isinstance(frames, Tensor) else frames:
        if chunk.ndim == 5 and chunk.shape[0] == 1:
            chunk = chunk[0]
        if chunk.ndim != 4 or chunk.shape[1] != 3:
            raise ValueError(
                f"frames of shape {list(chunk.shape)} are not one video [V, 3, H, W]; write videos one by one"
            )
        yield chunk


def _encode(path: Path, container: str, chunks: Iterator[Tensor], fps: float, metadata: Mapping[str, Any]) -> int:
    # Without use_metadata_tags the mp4 muxer keeps only the few names it knows.
    with av.open(str(path), "w", format=container, options={"movflags": "use_metadata_tags+faststart"}) as file:
        for name, value in metadata.items():
            file.metadata[name] = value if isinstance(value, str) else json.dumps(value)
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=ENCODER)
        stream.pix_fmt = "yuv420p"
        count = 0
        for chunk_VRHW in chunks:
            height, width = chunk_VRHW.shape[-2:]
            if count == 0:
                _check_even(width, height)
                stream.width, stream.height = width, height
            elif (width, height) != (stream.width, stream.height):
                raise ValueError(f"a chunk of {width}x{height} follows frames of {stream.width}x{stream.height}")
            for picture in _to_bytes(chunk_VRHW):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                count += 1
        if count == 0:
            raise ValueError("a video needs at least one frame")
        file.mux(stream.encode(None))
    return count


def _check_even(width: int, height: int) -> None:
    if width % 2 or height % 2:
        raise ValueError(
            f"frames of {width}x{height} have an odd side, H.264 needs even ones; "
            f"use {width - width % 2}x{height - height % 2} or {width + width % 2}x{height + height % 2}"
        )


def _to_bytes(frames_VRHW: Tensor) -> np.ndarray:
    """[V,R,H,W] in [0, 1] to uint8 [V,H,W,R] on the CPU."""
    scaled = frames_VRHW.detach().float().clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def read_video(path: str | Path) -> Tensor:
    """All frames of a video file as [V,R,H,W] in [0, 1]. Raises ValueError when it is not a readable video."""
    with _open_video(path) as file:
        try:
            pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        except FFmpegError as error:
            raise ValueError(f"{path}: is a damaged video ({error.strerror})") from error
    if not pictures:
        raise ValueError(f"{path}: holds no video frame")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def read_metadata(path: str | Path) -> dict[str, str]:
    """The entries of a video file's container. Raises ValueError when it is not a readable video."""
    with _open_video(path) as file:
        return dict(file.metadata)


def _open_video(path: str | Path) -> Any:
    try:
        file = av.open(str(path))
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a video ({error.strerror})") from error
    if not file.streams.video:
        file.close()
        raise ValueError(f"{path}: holds no video stream")
    return file


def write_contact_sheet(path: str | Path, frames_VRHW: Tensor, columns: int = 8, overwrite: bool = False) -> None:
    """Write frames [V,R,H,W] in [0, 1] as one PNG, in rows of `columns` from left to right, top to bottom.

    Raises ValueError for no frames and for a path that cannot be written, or exists while `overwrite` is off.
    """
    if frames_VRHW.ndim != 4 or frames_VRHW.shape[1] != 3 or len(frames_VRHW) == 0 or columns < 1:
        raise ValueError(
            f"frames {list(frames_VRHW.shape)} in {columns} columns make no sheet; give [V, 3, H, W], V > 0"
        )
    pictures = _to_bytes(frames_VRHW)
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    with replacing(path, overwrite=overwrite) as temporary:
        sheet.save(temporary, format="PNG")
