"""Video files read as they are meant to be seen: upright, in their own colours, at the rate that is asked for.

Each guess, omission and change on the way becomes a note of one sentence. Only the frames that are asked for are kept:
a long video is decoded again rather than held in memory.

Letters: V video frames, R RGB, H W height and width in pixels. Values of frames are in [0, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

from .cuts import SIDE, CutDetector

log = logging.getLogger(__name__)
TRAINED_FPS = 16  # of the clips that Wan 2.1 was trained on (sample_fps in its configs)

# What the numbers in a frame's tags mean (ITU-T H.273), and what swscale calls these matrices.
BT709, UNSPECIFIED, RESERVED, BT601, BT2020 = 1, 2, 3, 5, 9
# 6 (SMPTE 170M) has the coefficients of 5.
MATRICES = {BT709: BT709, 4: 4, BT601: BT601, 6: BT601, 7: 7, BT2020: BT2020}
RGB_MATRIX = 0
UNKNOWN, LIMITED, FULL = 0, 1, 2
HDR_CURVES = {16: "PQ", 18: "HLG"}  # transfer characteristics of the same table
SCALER = 0x2 | 0x2000 | 0x40000  # bilinear, chroma at full width, accurate rounding
AREA = 0x20  # averages, so that every pixel counts in a thumbnail

LOCAL_ONLY = {"protocol_whitelist": "file,crypto,data"}  # a playlist must not make FFmpeg ask other machines

LONGEST_HOLD = 60  # seconds; a longer pause between two frames is taken for damaged time stamps
STRANGEST_PIXEL = 8  # pixels more oblong than this are taken for a damaged header
SPREAD = Fraction(3, 2)  # longest over shortest distance of frames that still counts as one rate


@dataclass
class Findings:
    """The record of a pass over a video; complete when the pass is. Times are in seconds."""

    path: Path
    fps: Fraction | None  # the rate at which frames are given, None for every frame of the file once
    rate: Fraction | None  # what the file says, None if nothing
    width: int = 0  # of an upright frame with square pixels
    height: int = 0
    square_size: tuple[int, int] = (0, 0)  # width and height as stored, not turned, with square pixels
    sound: str | None = None  # codec of the sound, None without one
    start: Fraction = Fraction(0)  # the first frame's moment on the file's clock
    seconds: Fraction = Fraction(0)  # from the first frame to the end of the last one that was read
    num_read: int = 0  # frames of the file
    num_given: int = 0  # frames at `fps`
    num_repeated: int = 0  # of these, frames given before
    num_skipped: int = 0  # frames of the file that were never given
    shortest_gap: Fraction | None = None  # between the moments of two neighbouring frames
    longest_gap: Fraction = Fraction(0)
    num_unstamped: int = 0  # frames without a time stamp
    num_backward: int = 0  # time stamps that are not behind the one before
    num_damaged: int = 0  # places that could not be decoded
    num_interlaced: int = 0  # frames
    cut_detector: CutDetector = field(default_factory=CutDetector)
    notes: list[str] = field(default_factory=list)

    @property
    def cuts(self) -> list[float]:
        """Return where a new scene begins, in seconds."""
        return self.cut_detector.cuts()

    def in_words(self) -> list[str]:
        """Return one sentence for everything that who uses the frames has to know."""
        sentences = [*self.notes]
        if self.num_unstamped:
            sentences.append(f"{self.num_unstamped} frames have no time stamp and are taken at {self._rate_in_words()}")
        if self.num_backward:
            sentences.append(
                f"{self.num_backward} time stamps run backwards; these frames are taken at {self._rate_in_words()}"
            )
        if self.num_repeated or self.num_skipped or self._is_of_another_rate():
            sentences.append(
                f"has {self._own_rate_in_words()}; so that it lasts as long as before ({float(self.seconds):.2f} s), "
                f"its {self.num_read} frames are read as {self.num_given} at {float(self.fps or 0):g} fps"
            )
        if self.num_damaged:
            sentences.append(f"{self.num_damaged} places are damaged; what could not be decoded is left out or patched")
        if self.num_interlaced:
            sentences.append(
                f"{self.num_interlaced} frames are interlaced; their rows of two moments are read as one image"
            )
        if self.cuts:
            where = ", ".join(f"{cut:.2f}" for cut in self.cuts[:5]) + (", ..." if len(self.cuts) > 5 else "")
            sentences.append(f"is cut at {where} s; the models know scenes without cuts")
        return sentences

    def _is_of_another_rate(self) -> bool:
        return (
            bool(self.fps) and self.num_read > 1 and abs(self.num_read / self.seconds / self.fps - 1) > Fraction(1, 50)
        )

    def _rate_in_words(self) -> str:
        return f"{float(self.rate or _DEFAULT_RATE):g} fps"

    def _own_rate_in_words(self) -> str:
        if self.shortest_gap is not None and self.longest_gap > self.shortest_gap * SPREAD:
            return f"a variable rate ({1 / float(self.longest_gap):.4g} to {1 / float(self.shortest_gap):.4g} fps)"
        return f"{self.num_read / float(self.seconds):.4g} fps"


_DEFAULT_RATE = Fraction(25)  # of a file that says nothing, as FFmpeg's own readers of such formats assume


class VideoReader:
    """A video file; each pass decodes it from its beginning.

    fps: the rate at which frames are given. At each moment it is the frame that is shown then, with frames' own moments
    rounded to the nearest, so that the video lasts as long as before. None gives every frame of the file once. Every
    method raises ValueError for what cannot be read.
    """

    def __init__(self, path: str | Path, fps: float | None = None) -> None:
        self.path = Path(path)
        self.fps = None if fps is None else Fraction(fps).limit_denominator(1001)  # 24000/1001 and its like are exact

    def survey(self) -> Findings:
        """Decode the whole video and return the record of it."""
        findings = self.findings()
        for _ in self._at_rate(findings):
            pass
        return findings

    def iter_frames(
        self, start: int = 0, count: int | None = None, findings: Findings | None = None
    ) -> Iterator[Tensor]:
        """Yield frames [R,H,W] in [0, 1] from number `start` on; decoding stops behind the last of `count`.

        A repeated frame is converted once. findings: a record to fill on the way.
        """
        findings = self.findings() if findings is None else findings
        last, image = None, None
        for number, frame in enumerate(self._at_rate(findings)):
            if count is not None and number >= start + count:
                return
            if number < start:
                continue
            if frame is not last:
                last, image = frame, _image(frame, findings)
            assert image is not None
            yield torch.from_numpy(image).permute(2, 0, 1).float() / 255
            if count is not None and number == start + count - 1:
                return

    def frames(self, start: int = 0, count: int | None = None) -> Tensor:
        """Return frames [V,R,H,W] in [0, 1] from number `start` on."""
        return torch.stack(list(self.iter_frames(start, count)))

    def first_frames(self, count: int) -> tuple[Tensor, Findings]:
        """Return at most `count` frames [V,R,H,W] from the beginning, and the record of what was decoded for them."""
        findings = self.findings()
        return torch.stack(list(self.iter_frames(0, count, findings))), findings

    def findings(self) -> Findings:
        """Return an empty record for a pass to fill."""
        return Findings(self.path, self.fps, None)

    # ------------------------------------------------------------------ passes --
    def _at_rate(self, findings: Findings) -> Iterator[Any]:
        """Yield decoded frames in the order and number in which they are shown at the asked rate."""
        current: tuple[Fraction, Any] | None = None  # what is shown until the next frame's moment
        uses = 0  # of the current frame
        for time, frame in self._stamped(findings):
            if self.fps is None:
                findings.num_given += 1
                yield frame
                continue
            if current is not None:
                uses = 0
                # A frame may come up to half a frame early: its moment is rounded, in place of always late.
                early = min(time - current[0], 1 / self.fps) / 2
                while findings.num_given <= (time - early) * self.fps:
                    findings.num_given, uses = findings.num_given + 1, uses + 1
                    yield current[1]
                _count_uses(findings, uses)
            current = time, frame
        if current is not None:
            uses = 0
            # The last frame stays until the video ends, and a video has at least one frame.
            while findings.num_given < round(findings.seconds * (self.fps or 0)) or findings.num_given == 0:
                findings.num_given, uses = findings.num_given + 1, uses + 1
                yield current[1]
            _count_uses(findings, uses)

    def _stamped(self, findings: Findings) -> Iterator[tuple[Fraction, Any]]:
        """Yield decoded frames with their moments in seconds from the first; each is later than the one before."""
        last: Fraction | None = None
        for frame, stamp, duration in self._decoded(findings):
            step = 1 / (findings.rate or _DEFAULT_RATE)
            if last is None:
                findings.start = stamp or Fraction(0)
            time = None if stamp is None else stamp - findings.start
            if last is None or time is None or time <= last:  # no usable moment: one frame of the file's rate later
                findings.num_unstamped += time is None
                findings.num_backward += time is not None and last is not None
                time = Fraction(0) if last is None else last + step
            elif time - last > LONGEST_HOLD:
                raise ValueError(
                    f"{self.path}: its time stamps jump by {float(time - last):.1f} s after {float(last):.2f} s; "
                    f"where that is meant, encode it at a constant rate first"
                )
            else:
                step = time - last
                findings.shortest_gap = step if findings.shortest_gap is None else min(step, findings.shortest_gap)
                findings.longest_gap = max(step, findings.longest_gap)
            last = time
            findings.num_read += 1
            # Some writers give the last frame a duration of one tick: none shorter than the shortest gap is believed.
            if duration is None or not (findings.shortest_gap or 0) <= duration <= LONGEST_HOLD:
                duration = findings.shortest_gap or step
            findings.seconds = time + duration
            findings.cut_detector.add(time, _thumbnail(frame))
            yield time, frame

    def _decoded(self, findings: Findings) -> Iterator[tuple[Any, Fraction | None, Fraction | None]]:
        """Yield frames as they are decoded, with what is stored of their time stamps and durations in seconds."""
        with open_video(self.path) as file:
            stream = file.streams.best("video")
            assert stream is not None
            stream.thread_type = "AUTO"  # frames at once, not only slices of one
            _look_at_other_streams(file, findings)
            # Not every container has each of these; only unstamped frames need one.
            findings.rate = stream.average_rate or stream.base_rate or stream.guessed_rate
            first: Any = None
            for frame in _frames(file, stream, findings):
                if first is None:
                    first = frame
                    _begin(frame, stream, findings)
                if (frame.width, frame.height) != (first.width, first.height):
                    raise ValueError(
                        f"{self.path}: changes its size from {first.width}x{first.height} to "
                        f"{frame.width}x{frame.height}; encode it in one size first"
                    )
                findings.num_interlaced += frame.interlaced_frame
                base = frame.time_base or stream.time_base
                stamp = frame.pts if frame.pts is not None else frame.dts
                duration = getattr(frame, "duration", None)
                yield (
                    frame,
                    None if stamp is None or not base else stamp * base,
                    duration * base if duration and base else None,
                )
            if first is None:
                raise ValueError(
                    f"{self.path}: holds no video frame" + (", it is damaged" if findings.num_damaged else "")
                )
            _check_end(file, stream, findings)


@dataclass(frozen=True)
class GivenVideo:
    """A video that another one goes on from, decoded once for its record, and again for frames that are asked for."""

    reader: VideoReader
    findings: Findings

    def __len__(self) -> int:
        """Return the number of frames at the asked rate."""
        return self.findings.num_given

    @property
    def width(self) -> int:
        """Return the width of an upright frame, in pixels."""
        return self.findings.width

    @property
    def height(self) -> int:
        """Return the height of an upright frame, in pixels."""
        return self.findings.height


def given_video(path: str | Path, fps: float) -> GivenVideo:
    """Read through a video that is to be shown at `fps`. Raises ValueError when it is not a readable video."""
    reader = VideoReader(path, fps)
    return GivenVideo(reader, reader.survey())


def read_video(path: str | Path, fps: float | None = None) -> Tensor:
    """Return all frames of a video file as [V,R,H,W] in [0, 1], every one or at a rate; notes go to the log.

    Raises ValueError when it is not a readable video.
    """
    reader = VideoReader(path, fps)
    findings = reader.findings()
    frames = list(reader.iter_frames(findings=findings))
    sound = [] if findings.sound is None else ["its sound is not read"]
    for note in [*findings.in_words(), *sound]:
        log.warning("%s: %s", path, note)
    return torch.stack(frames)


def open_video(path: str | Path) -> Any:
    """Open a file that holds a video. Raises ValueError when it does not, or cannot be read."""
    try:
        file = av.open(file_name(path), options=LOCAL_ONLY)
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a video ({error.strerror})") from error
    if not file.streams.video:
        file.close()
        raise ValueError(f"{path}: holds no video stream")
    # FFmpeg guesses formats: it takes any text for a recording of a terminal, and any image for a video of one frame.
    if file.format.name == "tty":
        file.close()
        raise ValueError(f"{path}: cannot be read as a video (it is text)")
    if file.format.name == "webp_pipe":
        file.close()
        raise ValueError(f"{path}: FFmpeg reads no moving webp; encode it as mp4, or give an image as --image")
    if file.format.name.endswith("_pipe") or file.format.name == "image2":
        file.close()
        raise ValueError(f"{path}: is an image, not a video; give it as --image")
    return file


def file_name(path: str | Path) -> str:
    """Return the name by which FFmpeg takes any path for a file."""
    # What stands before a colon is a protocol to FFmpeg, as in "take1:cat.mp4", unless a slash comes first.
    return str(Path(path).absolute())


# ------------------------------------------------------------------- frames --
def _frames(file: Any, stream: Any, findings: Findings) -> Iterator[Any]:
    """Yield all frames that can be decoded; damage is counted."""
    try:
        for packet in file.demux(stream):  # the last packet is empty and flushes the decoder
            findings.num_damaged += packet.is_corrupt
            try:
                frames = packet.decode()
            except FFmpegError:
                findings.num_damaged += 1
                continue
            for frame in frames:
                findings.num_damaged += frame.is_corrupt
                yield frame
        return
    except FFmpegError:
        findings.num_damaged += 1
    with suppress(FFmpegError):
        yield from stream.codec_context.decode(None)  # what had been decoded already


def _count_uses(findings: Findings, uses: int) -> None:
    findings.num_skipped += uses == 0
    findings.num_repeated += max(0, uses - 1)


def _look_at_other_streams(file: Any, findings: Findings) -> None:
    sound = file.streams.best("audio")
    if sound is not None and sound.codec_context is None:
        findings.notes.append("holds a sound of an unknown codec, which is left out")
    elif sound is not None:
        findings.sound = sound.codec_context.name
    num_others = len(file.streams) - 1 - (sound is not None)
    if num_others:
        findings.notes.append(f"holds {num_others} more streams (sound, images, subtitles or data), which are not read")


def _begin(frame: Any, stream: Any, findings: Findings) -> None:
    """Note what the first frame shows of all. Raises ValueError for colours that would come out wrong."""
    path, context = findings.path, stream.codec_context
    curve = getattr(frame, "color_trc", None) or context.color_trc
    if curve in HDR_CURVES:
        raise ValueError(
            f"{path}: is high dynamic range ({HDR_CURVES[curve]}), whose colours need to be mapped; "
            "convert it to SDR first"
        )
    if _is_yuv(frame) and frame.colorspace not in (*MATRICES, UNSPECIFIED, RGB_MATRIX, RESERVED):
        raise ValueError(
            f"{path}: its colour matrix (number {frame.colorspace}) is not known; convert it to BT.709 first"
        )
    if _is_yuv(frame) and frame.colorspace not in MATRICES:
        name = "BT.709" if _matrix(frame) == BT709 else "BT.601"
        findings.notes.append(f"does not say how its colours are coded; they are read as {name}, as players do")
    if context.color_primaries == BT2020:
        findings.notes.append("has the wide colours of BT.2020, which are read as if they were BT.709")
    if "alpha_mode" in stream.metadata:  # of VP8 and VP9 in WebM, whose alpha FFmpeg's own decoders leave out
        findings.notes.append("is transparent in parts, which is not read")
    matrix = _display_matrix(frame)
    if matrix is not None and _turn(matrix) is None:
        findings.notes.append("is to be shown at a slant; it is read unturned")
    shape = stream.sample_aspect_ratio
    if shape and not 1 / STRANGEST_PIXEL <= shape <= STRANGEST_PIXEL:
        findings.notes.append(f"has pixels of {shape.numerator}:{shape.denominator}, which are read as square")
    width, height = _square_size(frame, shape)
    if (width, height) != (frame.width, frame.height):
        findings.notes.append(
            f"has oblong pixels ({shape.numerator}:{shape.denominator}); it is read as {width}x{height}"
        )
    findings.square_size = width, height
    is_swapped = matrix is not None and (_turn(matrix) or (False,))[0]
    findings.width, findings.height = (height, width) if is_swapped else (width, height)


def _check_end(file: Any, stream: Any, findings: Findings) -> None:
    """Note an end that comes before the one that the file announces."""
    announced = None
    if stream.duration and stream.time_base:
        announced = stream.duration * stream.time_base
    elif file.duration and len(file.streams) == 1:  # Matroska counts from 0, not from the first frame
        announced = Fraction(file.duration, av.time_base) - max(findings.start, Fraction(0))
    slack = max(Fraction(1, 4), 3 * findings.longest_gap)  # seconds; the last frames of whole files may last less
    if announced is not None and findings.seconds + slack < announced:
        findings.notes.append(f"ends after {float(findings.seconds):.2f} of {float(announced):.2f} s; it is cut off")


def _square_size(frame: Any, shape: Fraction | None) -> tuple[int, int]:
    """Return width and height of a frame with its pixels made square: one side grows, so that no row is lost."""
    if not shape or not 1 / STRANGEST_PIXEL <= shape <= STRANGEST_PIXEL:
        return frame.width, frame.height
    return max(frame.width, round(frame.width * shape)), max(frame.height, round(frame.height / shape))


def _is_yuv(frame: Any) -> bool:
    return not (frame.format.is_rgb or frame.format.has_palette or frame.format.name.startswith(("gray", "ya", "mono")))


def _matrix(frame: Any) -> int:
    """Return the coefficients between YUV and RGB, as swscale numbers them; without a tag by size, as players do."""
    # Standard definition (up to 576 rows) was BT.601, high definition is BT.709.
    if frame.colorspace in MATRICES:
        return MATRICES[frame.colorspace]
    return BT709 if frame.width >= 1280 or frame.height > 576 else BT601


def _range(frame: Any) -> int:
    if frame.color_range in (LIMITED, FULL):
        return int(frame.color_range)
    # "yuvj" are FFmpeg's older names of full range; untagged YUV is limited by convention.
    return FULL if frame.format.name.startswith("yuvj") or not _is_yuv(frame) else LIMITED


def _converted(frame: Any, width: int, height: int, pixels: str, scaler: int = SCALER) -> np.ndarray:
    """Return a frame in another size as 8-bit RGB or RGBA [H, W, channels], by the colours that it is tagged with."""
    matrix, levels = _matrix(frame), _range(frame)
    return frame.reformat(
        width,
        height,
        pixels,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=levels,
        dst_color_range=UNKNOWN if levels == FULL else FULL,  # PyAV before 17 overlooks ranges that are the same
        interpolation=scaler,
    ).to_ndarray()


def _thumbnail(frame: Any) -> np.ndarray:
    return _converted(frame, SIDE, SIDE, "rgb24", AREA)


def _image(frame: Any, findings: Findings) -> np.ndarray:
    """Return the upright image of a frame as uint8 [H, W, R], transparency over white."""
    size = findings.square_size
    if any(component.is_alpha for component in frame.format.components):
        pixels = _converted(frame, *size, "rgba").astype(np.uint16)
        colours, alpha = pixels[..., :3], pixels[..., 3:]
        image = ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)  # rounded: 127 is half of 255
    else:
        image = _converted(frame, *size, "rgb24")
    matrix = _display_matrix(frame)
    turn = None if matrix is None else _turn(matrix)
    if turn is not None:
        is_swapped, is_mirrored, is_upside_down = turn
        image = image.transpose(1, 0, 2) if is_swapped else image
        image = image[:, ::-1] if is_mirrored else image
        image = image[::-1] if is_upside_down else image
    return np.ascontiguousarray(image)


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Return how a pixel's place is mapped to where it is shown: x' = a x + c y, y' = b x + d y, in 1/65536."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()  # of 3 x 3: the rest moves and projects
    return a, b, c, d


def _turn(matrix: tuple[int, int, int, int]) -> tuple[bool, bool, bool] | None:
    """Return whether rows and columns change places, and whether each row and each column runs backwards.

    None for a turn that is no multiple of 90 degrees.
    """
    a, b, c, d = matrix
    tolerance = max(map(abs, matrix)) / 100  # half a degree
    if abs(b) <= tolerance and abs(c) <= tolerance and a and d:
        return False, a < 0, d < 0
    if abs(a) <= tolerance and abs(d) <= tolerance and b and c:
        return True, c < 0, b < 0
    return None
