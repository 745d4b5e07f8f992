"""Video files written through PyAV, in the formats of video_formats.py, and contact sheets as PNG.

Equal frames become equal files, and a file says how its colours are coded, so that players show the colours of the
frames. Reading is in video_reader.py.

Letters: V video frames, R RGB, H W height and width in pixels. Values of frames are in [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..atomic import GrowingFile, check_writable, replacing, writing
from .sound import Samples, Sound, Track, sound_track
from .video_formats import CONTAINERS, VideoFormat, check_video
from .video_metadata import as_texts, muxer_options, put_entries
from .video_metadata import read_metadata as read_metadata
from .video_metadata import retag as retag
from .video_reader import BT709, FULL, RGB_MATRIX, SCALER, file_name
from .video_reader import read_video as read_video

PALETTE_SIDE = 160  # pixels of the thumbnail whose colours become a gif frame's palette


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: float = 16,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    sound: Sound | Samples | None = None,
    codec: str | None = None,
    quality: int | None = None,
) -> int:
    """Write frames to a file and return their number; the file appears when it is complete, or not at all.

    frames: [V,R,H,W], [1,V,R,H,W], or an iterable of such chunks, which is consumed one chunk at a time; in [0, 1], or
    in integers of as many bits as the format has.
    metadata: entries for the container; values that are not text are stored as JSON. sound: what is heard with it.
    codec: of FORMATS, by default what the ending stands for (H.264 in .mp4, .mov and .mkv); quality: its own number.
    Raises ValueError for sizes that the codec cannot hold (most halve both sides), for chunks that differ in size, for
    no frames, for a path that cannot be written or already exists, and for whatever `check_video` refuses.
    """
    path = Path(path)
    video_format = check_video(path, codec, quality, fps, has_sound=sound is not None)
    container = CONTAINERS[path.suffix.lower()]
    with replacing(path, overwrite=overwrite) as temporary, ExitStack() as stack:
        file = stack.enter_context(
            av.open(file_name(temporary), "w", format=container, options=muxer_options(container))
        )
        writer = _Writer(file, fps, metadata or {}, video_format, quality)
        if sound is not None:
            writer.track = stack.enter_context(closing(sound_track(file, sound, video_format)))
        for chunk_VRHW in _chunks(frames):
            writer.add(chunk_VRHW)
        writer.finish()
        stack.close()  # the container writes its end before entries are put in
        if writer.count == 0:
            raise ValueError(f"{path}: 0 frames make no video; give one or more")
        if writer.keeps_no_entries:
            put_entries(temporary, metadata or {})
    return writer.count


def _chunks(frames: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in [frames] if isinstance(frames, Tensor) else frames:
        if chunk.ndim == 5 and chunk.shape[0] == 1:
            chunk = chunk[0]
        if chunk.ndim != 4 or chunk.shape[1] != 3:
            raise ValueError(
                f"frames of shape {list(chunk.shape)} are not one video [V, 3, H, W]; write videos one by one"
            )
        yield chunk


class _Writer:
    """A writer of frames into an open container; the first chunk decides their size. track: the sound beside them."""

    def __init__(
        self,
        file: Any,
        fps: float,
        metadata: Mapping[str, Any],
        video_format: VideoFormat,
        quality: int | None = None,
        *,
        grows: bool = False,
    ) -> None:
        self.file, self.count, self.format = file, 0, video_format
        self.keeps_no_entries = file.format.name in ("webp", "gif")
        if not self.keeps_no_entries:
            file.metadata.update(as_texts(metadata))
        self.track: Track | None = None
        os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder reads it, and without it prints pages
        self.rate = Fraction(fps).limit_denominator(1001)  # holds 24000/1001 and its like
        options = video_format.encoder_options(quality, grows=grows)
        self.stream = file.add_stream(video_format.encoder, rate=self.rate, options=options)
        self.stream.pix_fmt = video_format.pixels
        context = self.stream.codec_context
        # x264 writes other bytes with another number of threads, and FFmpeg takes that of the machine's cores.
        context.thread_count = 1
        if video_format.tag is not None and file.format.name in ("mp4", "mov"):
            context.codec_tag = video_format.tag
        context.color_primaries = context.color_trc = BT709
        context.colorspace, context.color_range = video_format.matrix, video_format.range

    def add(self, frames_VRHW: Tensor) -> None:
        """Encode a chunk. Raises ValueError for a size that the format cannot hold, or that changes."""
        height, width = frames_VRHW.shape[-2:]
        if self.count == 0:
            self.format.check_size(width, height)
            self.stream.width, self.stream.height = width, height
        elif (width, height) != (self.stream.width, self.stream.height):
            raise ValueError(f"a chunk of {width}x{height} follows frames of {self.stream.width}x{self.stream.height}")
        for image in _images(frames_VRHW, self.format.bits):
            self.file.mux(self.stream.encode(_coded(image, self.format)))
            self.count += 1
            if self.track is not None:
                self.track.until(self.count / self.rate)  # frame by frame: players expect the two side by side

    def finish(self) -> None:
        """Encode what the encoder still holds back, and the rest of the sound; without frames do nothing."""
        if self.count:
            self.file.mux(self.stream.encode(None))
        if self.count and self.track is not None:
            self.track.until(None)


def _coded(image_HWR: np.ndarray, video_format: VideoFormat) -> Any:
    """Return an image as a frame that the encoder takes."""
    if video_format.pixels == "pal8":
        return _with_palette(image_HWR)
    frame = av.VideoFrame.from_ndarray(image_HWR, format="rgb24" if video_format.bits == 8 else "rgb48le")
    if video_format.matrix == RGB_MATRIX:  # no coefficients: channels change places only
        return frame.reformat(format=video_format.pixels)
    # Without these arguments swscale would take BT.601 for any size, whatever the file then says.
    frame = frame.reformat(
        format=video_format.pixels,
        src_colorspace=video_format.matrix,
        dst_colorspace=video_format.matrix,
        src_color_range=FULL,
        dst_color_range=video_format.range,
        interpolation=SCALER,
    )
    if hasattr(frame, "color_trc"):  # from PyAV 17 on; ProRes repeats in each frame what its container says
        frame.color_primaries = frame.color_trc = BT709
    return frame


def _with_palette(image_HWR: np.ndarray) -> Any:
    """Return an image in the 256 colours that suit it, their error spread over neighbouring pixels."""
    image = Image.fromarray(image_HWR)
    small = image.copy()
    small.thumbnail((PALETTE_SIDE, PALETTE_SIDE), Image.Resampling.BOX)  # of all pixels takes ten times as long
    quantised = small.quantize(256, method=Image.Quantize.MEDIANCUT)
    colours = np.array(quantised.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0], palette[: len(colours), 1:] = 255, colours  # opaque, as ARGB
    # Spread by Floyd and Steinberg's weights: flat colours would show bands.
    indices = np.asarray(image.quantize(palette=quantised, dither=Image.Dither.FLOYDSTEINBERG))
    return av.VideoFrame.from_ndarray((indices, palette), format="pal8")  # type: ignore[arg-type]


# By ending: the codec where none is asked for, and how the container is told to keep what is written playable. Half a
# second is the longest that Matroska's clusters wait; fragments begin with each key frame.
_STREAMED = {
    ".mp4": ("h264", "frag_keyframe+empty_moov+default_base_moof", {}),
    ".mov": ("prores", "frag_keyframe+empty_moov+default_base_moof", {}),
    ".mkv": ("ffv1", "", {"cluster_time_limit": "500"}),
    ".webp": ("webp", "", {}),
    ".gif": ("gif", "", {}),
}


class VideoStream:
    """A video file that grows while it is generated: what it holds at any moment can be played, whatever happens next.

    .mp4 is H.264 in fragments, .mov ProRes in fragments, .mkv lossless (FFV1), unless a codec of FORMATS is asked for.
    Memory does not grow with the length, except for .webp, whose bytes are written when it is closed. The file is
    written in its place, under its own name. sound: begins with the first frame, is cut where the video ends, and
    silent where it is shorter. Raises ValueError for another ending, for a path that exists or cannot be written, and
    for whatever `check_video` refuses.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float = 16,
        metadata: Mapping[str, Any] | None = None,
        *,
        codec: str | None = None,
        quality: int | None = None,
        sound: Samples | None = None,
    ) -> None:
        self.path, self.metadata = Path(path), dict(metadata or {})
        ending = self.path.suffix.lower()
        if ending not in _STREAMED:
            raise ValueError(f"{path}: cannot be streamed to; use an ending of {', '.join(_STREAMED)}")
        default_codec, movflags, muxer = _STREAMED[ending]
        video_format = check_video(path, codec or default_codec, quality, fps, has_sound=sound is not None)
        check_writable(self.path, overwrite=False)
        if sound is not None and movflags:
            movflags += "+delay_moov"  # else the silence that AAC begins with is not cut off
        options = {**muxer_options(CONTAINERS[ending], movflags), **muxer, "flush_packets": "1"}
        self._growing_file = GrowingFile(self.path)
        try:
            self._file = av.open(self._growing_file, "w", format=CONTAINERS[ending], options=options)
            self._writer = _Writer(self._file, fps, self.metadata, video_format, quality, grows=True)
            if sound is not None:
                self._writer.track = sound_track(self._file, sound, video_format)
        except BaseException:
            self._growing_file.close()  # without a byte it is removed
            raise

    @property
    def num_frames(self) -> int:
        """Return how many frames have been written."""
        return self._writer.count

    def write(self, frames_VRHW: Tensor) -> None:
        """Append frames in [0, 1]. Raises ValueError for a size that the format cannot hold, or that changes.

        Raises NotWritten when the disk is full; what was written before can be played.
        """
        self._growing_file.check()  # for an error that FFmpeg's muxer forgot
        with writing(self.path):
            self._writer.add(frames_VRHW)
        self._growing_file.check()

    def close(self) -> None:
        """Finish the file, even where its last frames cannot be encoded; a file without frames is removed."""
        with writing(self.path):
            try:
                self._writer.finish()
            finally:
                try:
                    self._file.close()
                finally:
                    self._growing_file.close()
                    if self._writer.count == 0:
                        self.path.unlink(missing_ok=True)
        # FFmpeg's muxers of these have no place for entries; the finished file has.
        if self._writer.count and self._writer.keeps_no_entries and self.metadata:
            retag(self.path, self.metadata)

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def to_integers(frames: Tensor, bits: int) -> Tensor:
    """Return frames in [0, 1] as integers of this many bits, uint8 or (torch computes little in uint16) int32.

    Where they lie: of what a device hands over, integers of 8 bits are a quarter. Integers come back as they are.
    """
    if not frames.is_floating_point():
        return frames
    scaled = frames.detach().float().clamp(0, 1) * (2**bits - 1)
    return scaled.round().to(torch.uint8 if bits == 8 else torch.int32)


def _images(frames_VRHW: Tensor, bits: int = 8) -> np.ndarray:
    """Return frames [V,R,H,W], in [0, 1] or in integers of this many bits, as uint8 or uint16 [V,H,W,R] on the CPU."""
    images = to_integers(frames_VRHW, bits).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return images if bits == 8 else images.astype(np.uint16)


def write_contact_sheet(path: str | Path, frames_VRHW: Tensor, columns: int = 8, overwrite: bool = False) -> None:
    """Write frames [V,R,H,W], in [0, 1] or uint8, as one PNG, in rows of `columns` from left to right, top to bottom.

    Raises ValueError for no frames and for a path that cannot be written, or exists while `overwrite` is off.
    """
    if frames_VRHW.ndim != 4 or frames_VRHW.shape[1] != 3 or len(frames_VRHW) == 0 or columns < 1:
        raise ValueError(
            f"frames {list(frames_VRHW.shape)} in {columns} columns make no sheet; give [V, 3, H, W], V > 0"
        )
    images = _images(frames_VRHW)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (index % columns * width, index // columns * height))
    with replacing(path, overwrite=overwrite) as temporary:
        sheet.save(temporary, format="PNG")
