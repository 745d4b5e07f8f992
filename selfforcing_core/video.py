"""Video files through PyAV: H.264 in yuv420p, which every browser and player shows, and contact sheets as PNG.

Equal frames become equal files, and the file says how its colours are coded, so that players show those that were made.
Reading is in video_reader.py.
Letters: V video frames, R RGB, H W height and width in pixels. Values of frames are in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .atomic import GrowingFile, check_writable, replacing, writing
from .sound import Sound, SoundTrack
from .video_reader import BT709, FULL, LIMITED, RGB_MATRIX, SCALER, file_name
from .video_reader import read_metadata as read_metadata
from .video_reader import read_video as read_video

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


def encoder_options(**more: str) -> dict[str, str]:
    """Return the options of x264: crf 18 is visually lossless (0 is exact, 51 is worst).

    Its AVX-512 assembly encodes equal frames into files that differ, with one thread too; up to AVX2 it does not.
    """
    repeatable = {"x264-params": "asm=avx2"} if torch.cpu._is_avx2_supported() else {}  # x264 does not ask the CPU
    return {"crf": "18", "preset": "medium", **repeatable, **more}


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: float = 16,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    sound: Sound | None = None,
) -> int:
    """Write frames as H.264 and return their number; the file appears when it is complete, or not at all.

    frames: [V,R,H,W], [1,V,R,H,W], or an iterable of such chunks, which is consumed one chunk at a time.
    metadata: entries for the container; values that are not text are stored as JSON. sound: what is heard meanwhile.
    Raises ValueError for odd sizes (yuv420p halves both), for chunks that differ in size, for no frames, and for a
    path that cannot be written or already exists.
    """
    path = Path(path)
    check_video_path(path)
    if fps <= 0:
        raise ValueError(f"fps {fps} is not positive; Wan models are trained at 16")
    with replacing(path, overwrite=overwrite) as temporary:
        return _encode(temporary, CONTAINERS[path.suffix.lower()], _chunks(frames), fps, metadata or {}, sound)


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


def _encode(
    path: Path, container: str, chunks: Iterator[Tensor], fps: float, metadata: Mapping[str, Any], sound: Sound | None
) -> int:
    with ExitStack() as stack:
        file = stack.enter_context(av.open(file_name(path), "w", format=container, options=_muxer(container)))
        writer = _Writer(file, fps, metadata, H264)
        if sound is not None:
            writer.track = stack.enter_context(closing(SoundTrack(file, sound)))
        for chunk_VRHW in chunks:
            writer.add(chunk_VRHW)
        writer.finish()
    if writer.count == 0:
        raise ValueError("a video needs at least one frame")
    return writer.count


def _muxer(container: str, movflags: str = "faststart") -> dict[str, str]:
    """Options of a container. Without use_metadata_tags mp4 keeps few names, without bitexact Matroska is never twice
    the same.
    """
    more = {} if container == "matroska" else {"movflags": f"use_metadata_tags+{movflags}"}
    return {"fflags": "+bitexact", **more}


@dataclass(frozen=True)
class Coding:
    """How frames are encoded: the codec, its pixels and options, and by which matrix and range RGB becomes them."""

    codec: str
    pixels: str
    options: dict[str, str]
    matrix: int
    range: int


H264 = Coding("libx264", "yuv420p", encoder_options(), BT709, LIMITED)
# A key frame, and with it a fragment, at least every 12 frames.
H264_STREAM = Coding("libx264", "yuv420p", encoder_options(tune="zerolatency", g="12"), BT709, LIMITED)
FFV1 = Coding("ffv1", "bgr0", {"level": "3", "g": "1", "slices": "4"}, RGB_MATRIX, FULL)


class _Writer:
    """Frames into an open container; the first chunk says their size. track: the sound beside them."""

    def __init__(self, file: Any, fps: float, metadata: Mapping[str, Any], coding: Coding) -> None:
        for name, value in metadata.items():
            file.metadata[name] = value if isinstance(value, str) else json.dumps(value)
        self.file, self.count, self.coding = file, 0, coding
        self.track: SoundTrack | None = None
        self.rate = Fraction(fps).limit_denominator(1001)
        self.stream = file.add_stream(coding.codec, rate=self.rate, options=coding.options)
        self.stream.pix_fmt = coding.pixels
        context = self.stream.codec_context
        context.thread_count = 1  # their number changes what x264 writes; that of a machine's cores must not
        context.color_primaries = context.color_trc = BT709
        context.colorspace, context.color_range = coding.matrix, coding.range

    def add(self, frames_VRHW: Tensor) -> None:
        """Encode a chunk. Raises ValueError if its size is odd or not that of the ones before."""
        height, width = frames_VRHW.shape[-2:]
        if self.count == 0:
            _check_even(width, height)
            self.stream.width, self.stream.height = width, height
        elif (width, height) != (self.stream.width, self.stream.height):
            raise ValueError(f"a chunk of {width}x{height} follows frames of {self.stream.width}x{self.stream.height}")
        for picture in _to_bytes(frames_VRHW):
            self.file.mux(self.stream.encode(self._coded(picture)))
            self.count += 1
            if self.track is not None:
                self.track.until(self.count / self.rate)

    def _coded(self, picture_HWR: np.ndarray) -> Any:
        frame, coding = av.VideoFrame.from_ndarray(picture_HWR, format="rgb24"), self.coding
        if coding.matrix == RGB_MATRIX:
            return frame.reformat(format=coding.pixels)
        return frame.reformat(
            format=coding.pixels, src_colorspace=coding.matrix, dst_colorspace=coding.matrix, src_color_range=FULL,
            dst_color_range=coding.range, interpolation=SCALER,
        )  # fmt: skip

    def finish(self) -> None:
        if self.count:
            self.file.mux(self.stream.encode(None))
        if self.count and self.track is not None:
            self.track.until(None)


_STREAMS = {
    ".mp4": (H264_STREAM, _muxer("mp4", "frag_keyframe+empty_moov+default_base_moof")),
    ".mkv": (FFV1, {**_muxer("matroska"), "cluster_time_limit": "500"}),
}


class VideoStream:
    """A video file that grows while it is made: what it holds at any moment can be played, whatever happens next.

    .mp4 is H.264 in fragments, .mkv is lossless (FFV1). Memory does not grow with the length. The file is written where
    it is to be, not aside. Raises ValueError for another ending, and for a path that exists or cannot be written.
    """

    def __init__(self, path: str | Path, fps: float = 16, metadata: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in _STREAMS:
            raise ValueError(f"{path}: cannot be streamed to; use an ending of {', '.join(_STREAMS)}")
        check_writable(self.path, overwrite=False)
        coding, muxer = _STREAMS[self.path.suffix.lower()]
        container = CONTAINERS[self.path.suffix.lower()]
        self._grown = GrowingFile(self.path)
        try:
            self._file = av.open(self._grown, "w", format=container, options={**muxer, "flush_packets": "1"})
            self._writer = _Writer(self._file, fps, metadata or {}, coding)
        except BaseException:
            self._grown.close()  # without a byte it is removed
            raise

    @property
    def num_frames(self) -> int:
        return self._writer.count

    def write(self, frames_VRHW: Tensor) -> None:
        """Append frames in [0, 1]. Raises ValueError if their size is odd or not that of the ones before.

        Raises NotWritten when the disk is full; what was written before can be played.
        """
        self._grown.check()
        with writing(self.path):
            self._writer.add(frames_VRHW)
        self._grown.check()

    def close(self) -> None:
        """Finish the file, also where its last frames cannot be encoded; without any frame it is removed."""
        with writing(self.path):
            try:
                self._writer.finish()
            finally:
                try:
                    self._file.close()
                finally:
                    self._grown.close()
                    if self._writer.count == 0:
                        self.path.unlink(missing_ok=True)

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
