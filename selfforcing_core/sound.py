"""The sound of a video: carried over from the file that it goes on from, from a given file, or made of samples.

Letters: C channels, S samples.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

from .video_reader import file_name

if TYPE_CHECKING:
    from .video_formats import VideoFormat

log = logging.getLogger(__name__)
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
AAC_LAYOUTS = ("mono", "stereo", "5.1", "7.1")
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}  # of so many channels
LEAST_RATE = 4000  # samples a second
BIT_RATE = 192_000
PCM_IN_MP4 = "pcm"  # which no browser plays


def _is_taken(container: str, track: Any) -> bool:
    """Whether a container holds the codec of this sound as it is: some say so only when they are begun."""
    if container == "mp4" and track.codec_context.name.startswith(PCM_IN_MP4):
        return False
    try:
        with av.open(io.BytesIO(), "w", format=container) as trial:
            trial.add_stream_from_template(track)
            trial.start_encoding()
    except (ValueError, FFmpegError):
        return False
    return True


@dataclass(frozen=True)
class Sound:
    """The first sound track of a file, from the moment of its first frame on.

    start: that moment on the file's own clock, in seconds. seconds: how long the given part lasts.
    """

    path: Path
    start: Fraction
    seconds: Fraction


@dataclass(frozen=True)
class Samples:
    """Sound as numbers in [-1, 1]: waveform [C, S] with `rate` samples per second."""

    waveform_CS: Tensor
    rate: int

    @property
    def seconds(self) -> float:
        """Return how long it lasts."""
        return self.waveform_CS.shape[1] / self.rate

    def check(self) -> None:
        """Raise ValueError for what is no sound that can be encoded."""
        shape = list(self.waveform_CS.shape)
        if len(shape) != 2 or shape[0] not in LAYOUTS or not LEAST_RATE <= self.rate <= 655_350:
            raise ValueError(
                f"audio of shape {shape} with {self.rate} samples a second is not [channels, samples] of 1, 2 or 6 "
                f"channels and {LEAST_RATE} samples a second or more; mix it down to stereo, or resample it, first"
            )
        if not torch.isfinite(self.waveform_CS).all():
            raise ValueError("audio holds NaN or Inf; look at the node that it comes from")


def sound_of(path: str | Path) -> tuple[Sound, float]:
    """Return the first sound track of a file from its beginning on, and how many seconds it lasts.

    Raises ValueError when it cannot be read, or holds none.
    """
    with _open(path) as file:
        track = file.streams.best("audio")
        begin, end = (track.start_time or 0) * track.time_base, None  # packets may begin before what is heard
        for packet in _packets(file, track, Path(path)):
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
    if end is None:
        raise ValueError(f"{path}: holds no sound that can be read")
    return Sound(Path(path), begin, end - begin), float(end - begin)


def _open(path: str | Path) -> Any:
    try:
        file = av.open(file_name(path), options={"protocol_whitelist": "file,crypto,data"})
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a sound ({error.strerror})") from error
    if not file.streams.audio:
        file.close()
        raise ValueError(f"{path}: holds no sound")
    return file


def _packets(file: Any, track: Any, path: Path) -> Iterator[Any]:
    """The packets of a track whose time stamps run forwards, as far as it can be read."""
    last: int | None = None
    try:
        for packet in file.demux(track):
            if packet.pts is None or packet.dts is None:
                continue
            if last is not None and packet.dts <= last:
                log.warning("%s: a time stamp of its sound runs backwards; that packet is left out", path)
                continue
            last = packet.dts
            yield packet
    except FFmpegError as error:
        log.warning("%s: its sound is damaged (%s) and ends there", path, error.strerror)


class Track(Protocol):
    """What is added to an open container beside its frames."""

    def until(self, seconds: Fraction | None) -> None:
        """Write what is heard before `seconds` of the video, or all that there is to its end."""

    def close(self) -> None:
        """Let go of what the sound came from."""


def sound_track(file: Any, sound: Sound | Samples, made: VideoFormat) -> Track:
    """Return the track that adds a sound to a container."""
    if isinstance(sound, Sound):
        return SoundTrack(file, sound)
    assert made.sound is not None
    return SamplesTrack(file, sound, made.sound)


class SamplesTrack:
    """Given samples, encoded as far as the video has come; silence where they have ended."""

    def __init__(self, file: Any, samples: Samples, codec: str) -> None:
        samples.check()
        self._file, self._samples = file, samples
        self._layout = LAYOUTS[samples.waveform_CS.shape[0]]
        rate = samples.rate if codec != "aac" or samples.rate in AAC_RATES else 48000
        self._out = file.add_stream(codec, rate=rate)
        self._out.layout = self._layout
        if codec == "aac":
            self._out.bit_rate = BIT_RATE
        self._taken = 0  # samples

    def until(self, seconds: Fraction | None) -> None:
        """Write what is heard before `seconds` of the video; None is its end."""
        if seconds is None:
            self._file.mux(self._out.encode(None))
            return
        end = round(seconds * self._samples.rate)
        wanted = np.zeros((self._samples.waveform_CS.shape[0], end - self._taken), np.float32)
        given = self._samples.waveform_CS[:, self._taken : end].detach().float().clamp(-1, 1).cpu().numpy()
        wanted[:, : given.shape[1]] = given
        frame = av.AudioFrame.from_ndarray(wanted, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._samples.rate, self._taken, Fraction(1, self._samples.rate)
        self._taken = end
        self._file.mux(self._out.encode(frame))

    def close(self) -> None:
        """Nothing is held."""


class SoundTrack:
    """A sound that is added to an open container beside its frames: as it is stored, or as AAC, which is said."""

    def __init__(self, file: Any, sound: Sound) -> None:
        self._file, self._sound, self._source = file, sound, _open(sound.path)
        self._track = self._source.streams.best("audio")
        if _is_taken(file.format.name, self._track):
            self._out = file.add_stream_from_template(self._track)
            self._packets = self._copied()
        else:
            name = self._track.codec_context.name
            log.warning("%s: its sound (%s) is encoded again as AAC for .%s", sound.path, name, file.format.name)
            self._out = self._aac(file)
            self._packets = self._encoded()
        self._next: tuple[Fraction, Any] | None = next(self._packets, None)

    def until(self, seconds: Fraction | None) -> None:
        """Write what is heard before `seconds` of the new video, or all that there is."""
        while self._next is not None and (seconds is None or self._next[0] < seconds):
            packet = self._next[1]
            packet.stream = self._out
            self._file.mux(packet)
            self._next = next(self._packets, None)

    def close(self) -> None:
        self._source.close()

    def _aac(self, file: Any) -> Any:
        context = self._track.codec_context
        stream = file.add_stream("aac", rate=context.rate if context.rate in AAC_RATES else 48000)
        stream.layout = context.layout.name if context.layout.name in AAC_LAYOUTS else "stereo"
        return stream

    def _demuxed(self) -> Iterator[tuple[Fraction, Any]]:
        """Packets of the given part and when they begin, in seconds of the new video."""
        for packet in _packets(self._source, self._track, self._sound.path):
            begin = packet.pts * packet.time_base - self._sound.start
            if begin >= self._sound.seconds:
                return
            if begin + (packet.duration or 0) * packet.time_base >= 0:  # with the one that a decoder begins with
                yield begin, packet

    def _copied(self) -> Iterator[tuple[Fraction, Any]]:
        for begin, packet in self._demuxed():
            shift = round(self._sound.start / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            yield begin, packet

    def _encoded(self) -> Iterator[tuple[Fraction, Any]]:
        for begin, packet in self._demuxed():
            try:
                frames = packet.decode()
            except FFmpegError as error:
                log.warning("%s: its sound is damaged (%s) after %.2f s", self._sound.path, error.strerror, begin)
                continue
            for frame in frames:
                frame.pts = None if frame.pts is None else frame.pts - round(self._sound.start / frame.time_base)
                yield from ((begin, made) for made in self._out.encode(frame))
        yield from ((self._sound.seconds, made) for made in self._out.encode(None))
