"""The kinds of video files that are written, as data: which encoder, in which containers, with which colours and sound.

What a format cannot do is refused here in a sentence, before anything is computed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import av
import torch

from .video_reader import BT709, FULL, LIMITED, RGB_MATRIX

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webp": "webp", ".gif": "gif"}
AUTO_QUALITY = -1  # the format's default, for widgets that hold a number


def x264_options(**more: str) -> dict[str, str]:
    """Return options of x264 by which equal frames become equal files; crf 18 is visually lossless (51 is worst)."""
    # Its AVX-512 assembly encodes equal frames into files that differ, with one thread too; up to AVX2 it does not.
    repeatable = {"x264-params": "asm=avx2"} if torch.cpu._is_avx2_supported() else {}  # x264 does not ask the CPU
    return {"crf": "18", "preset": "medium", **repeatable, **more}


@dataclass(frozen=True)
class Quality:
    """A number that trades size for likeness, with its default and its range."""

    option: str  # of the encoder
    default: int
    worst: int
    best: int
    words: str  # what the number is called
    libavcodec: int = 0  # the first major version that obeys it

    @property
    def in_words(self) -> str:
        """Return what may be chosen."""
        return f"{self.words} from {self.worst} (worst) to {self.best} (best), {self.default} by default"


@dataclass(frozen=True)
class VideoFormat:
    """A way to encode a video."""

    name: str  # as it is asked for
    title: str  # as people know it
    endings: tuple[str, ...]  # of its files, the usual one first
    encoder: str  # FFmpeg's name of it
    pixels: str  # FFmpeg's name of what the encoder takes
    options: dict[str, str]  # of the encoder
    # Options that make every moment of an unfinished file playable; None where its bytes come at the end.
    grows: dict[str, str] | None = None
    matrix: int = BT709  # by which RGB becomes what the encoder takes (ITU-T H.273)
    range: int = LIMITED
    bits: int = 8  # per colour of the images that are handed over
    tag: str | None = None  # the codec's name in .mp4 and .mov
    sound: str | None = None  # encoder of samples; None where files are silent
    quality: Quality | None = None
    even: tuple[int, int] = (1, 1)  # what width and height are multiples of
    least_width: int = 1  # pixels
    most_fps: float | None = None  # what players still show at its speed
    note: str = ""  # what people choose it for

    @property
    def is_here(self) -> bool:
        """Return whether this FFmpeg has the encoder."""
        return _has_encoder(self.encoder)

    def encoder_options(self, quality: int | None, *, grows: bool) -> dict[str, str]:
        """Return the encoder's options for a quality of `check_quality`."""
        options = {**self.options, **((self.grows or {}) if grows else {})}
        if self.quality is None or quality in (None, AUTO_QUALITY):
            return options
        return {**options, self.quality.option: str(quality)}

    def check_quality(self, quality: int | None) -> None:
        """Raise ValueError for a number outside of this format's range."""
        if quality is None or quality == AUTO_QUALITY:
            return
        if self.quality is None:
            raise ValueError(f"quality {quality}: {self.title} has no such choice; leave it at its default")
        if not min(self.quality.worst, self.quality.best) <= quality <= max(self.quality.worst, self.quality.best):
            raise ValueError(f"quality {quality}: {self.title} takes {self.quality.in_words}")
        if av.library_versions["libavcodec"][0] < self.quality.libavcodec and quality != self.quality.default:
            raise ValueError(
                f"quality {quality}: this PyAV ({av.__version__}) encodes {self.title} in its default only; leave it "
                "there, or install PyAV 18"
            )

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError for frames that cannot be encoded, naming the nearest sizes."""
        odd_x, odd_y = width % self.even[0], height % self.even[1]  # 0 or 1
        if odd_x or odd_y:
            raise ValueError(
                f"frames of {width}x{height} have an odd side, {self.title} needs even ones; "
                f"use {width - odd_x}x{height - odd_y} or {width + odd_x}x{height + odd_y}"
            )
        if width < self.least_width:
            raise ValueError(
                f"frames of {width}x{height}: {self.title} needs a width of {self.least_width} or more; use a larger "
                "size or another format"
            )

    def check_fps(self, fps: float) -> None:
        """Raise ValueError for a rate that is not positive, or that players of this format do not keep up."""
        if fps <= 0:
            raise ValueError(f"fps {fps} is not positive; Wan models are trained at 16")
        if self.most_fps is not None and fps > self.most_fps:
            raise ValueError(f"fps {fps:g}: players slow {self.title} down beyond {self.most_fps:g}; use mp4 or webp")


@functools.cache
def _has_encoder(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False
    return True


_EVEN = (2, 2)  # of 4:2:0, where one colour value stands for 2 x 2 pixels
# x265 encodes other frames with another number of frame threads, and writes the size of its pool into the file. Its
# preset "fast" is not repeatable, not even with one thread, and once encoded a frame wrongly.
_X265 = "frame-threads=1:wpp=1:info=0:log-level=error"
_FORMATS = (
    VideoFormat(
        name="h264",
        title="H.264",
        endings=(".mp4", ".mov", ".mkv"),
        encoder="libx264",
        pixels="yuv420p",
        options=x264_options(),
        # A key frame, and with it a fragment, at least every 12 frames.
        grows={"tune": "zerolatency", "g": "12"},
        sound="aac",
        even=_EVEN,
        quality=Quality("crf", 18, 51, 1, "crf"),
        note="small, plays everywhere",
    ),
    VideoFormat(
        name="h265",
        title="H.265",
        endings=(".mp4", ".mov", ".mkv"),
        encoder="libx265",
        pixels="yuv420p",
        options={"crf": "21", "preset": "medium", "x265-params": _X265},
        grows={
            "preset": "veryfast",
            "tune": "zerolatency",
            "x265-params": f"{_X265}:keyint=12:min-keyint=12:scenecut=0",
        },
        tag="hvc1",  # Apple's players take no other
        sound="aac",
        even=_EVEN,
        least_width=64,  # at 48 pixels it writes beyond its own memory
        quality=Quality("crf", 21, 51, 1, "crf"),
        note="smaller, for newer players",
    ),
    VideoFormat(
        name="av1",
        title="AV1",
        endings=(".mp4", ".mkv"),
        encoder="libsvtav1",
        pixels="yuv420p",
        options={"crf": "25", "preset": "8", "svtav1-params": "lp=1"},  # lp: one thread, for repeatable files
        # Frames refer to earlier ones only, and none waits for later ones.
        grows={"g": "12", "svtav1-params": "lp=1:pred-struct=1:lookahead=0"},
        sound="aac",
        even=_EVEN,
        quality=Quality("crf", 25, 63, 1, "crf"),
        note="smaller, for newest players",
    ),
    VideoFormat(
        name="prores",
        title="ProRes",
        endings=(".mov", ".mkv"),
        encoder="prores_ks",
        pixels="yuv422p10le",
        options={"profile": "3", "vendor": "apl0"},  # passes for Apple's own encoder
        grows={},  # every frame is a key frame
        bits=16,
        even=(2, 1),  # of 4:2:2
        sound="pcm_s16le",
        quality=Quality("profile", 3, 0, 3, "0 proxy, 1 LT, 2 standard, 3 HQ:", libavcodec=62),
        note="10 bit, large, for editing",
    ),
    VideoFormat(
        name="ffv1",
        title="FFV1",
        endings=(".mkv",),
        encoder="ffv1",
        pixels="bgr0",  # RGB: a way to YUV and back would lose the last bit
        options={"level": "3", "g": "1", "slices": "4"},
        grows={},
        matrix=RGB_MATRIX,
        range=FULL,
        sound="flac",
        note="lossless, large",
    ),
    VideoFormat(
        name="webp",
        title="animated webp",
        endings=(".webp",),
        encoder="libwebp_anim",
        pixels="bgra",
        options={"quality": "85"},
        matrix=RGB_MATRIX,
        range=FULL,
        quality=Quality("quality", 85, 0, 100, "quality"),
        note="loops, without sound; written when the run ends",
    ),
    VideoFormat(
        name="gif",
        title="gif",
        endings=(".gif",),
        encoder="gif",
        pixels="pal8",
        options={},
        grows={},
        matrix=RGB_MATRIX,
        range=FULL,
        most_fps=50,  # delays are in hundredths of a second, and browsers slow down those of one
        note="loops, without sound, 256 colours a frame and large",
    ),
)
FORMATS = {video_format.name: video_format for video_format in _FORMATS}


def usual_ending(codec: str | None) -> str:
    """Return the ending of a codec's files. Raises ValueError for an unknown codec."""
    return ".mp4" if codec is None else _named(codec).endings[0]


def _named(codec: str) -> VideoFormat:
    if codec not in FORMATS:
        raise ValueError(f"codec {codec!r} is unknown; use {', '.join(FORMATS)}")
    return FORMATS[codec]


def video_format(path: str | Path, codec: str | None = None) -> VideoFormat:
    """Return the format of a file, by its ending and the codec that is asked for.

    Raises ValueError for an unknown ending or codec, for two that do not go together, and for a codec that this FFmpeg
    lacks; each message lists what there is.
    """
    ending = Path(path).suffix.lower()
    if ending not in CONTAINERS:
        raise ValueError(f"{path}: unknown kind of video file; use an ending of {', '.join(CONTAINERS)}")
    default = next(name for name, candidate in FORMATS.items() if ending in candidate.endings)
    candidate = _named(codec or default)
    if not candidate.is_here:
        available = ", ".join(name for name, other in FORMATS.items() if other.is_here)
        raise ValueError(f"codec {candidate.name}: this FFmpeg has no {candidate.encoder}; it has {available}")
    if ending not in candidate.endings:
        endings = " or ".join(candidate.endings)
        raise ValueError(f"{path}: {candidate.title} is not written into {ending}; use {endings}")
    return candidate


def check_video(
    path: str | Path, codec: str | None, quality: int | None, fps: float, *, has_sound: bool = False
) -> VideoFormat:
    """Return the format of a file (see `video_format`). Raises ValueError for whatever of this it cannot do."""
    checked = video_format(path, codec)
    checked.check_quality(quality)
    checked.check_fps(fps)
    if has_sound and checked.sound is None:
        raise ValueError(f"{path}: {checked.title} has no sound; leave the audio out, or use .mp4, .mov or .mkv")
    return checked
