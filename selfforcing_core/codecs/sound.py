"""The sound of a video: carried over from the file that it goes on from, from a given file, or encoded from samples."""

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

from .video_reader import LOCAL_ONLY, file_name

if TYPE_CHECKING:
    from .video_formats import VideoFormat

log = logging.getLogger(__name__)
# What AAC has a number for in its header (sampling frequency index, ISO/IEC 14496-3); other rates become 48000.
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
AAC_LAYOUTS = ("mono", "stereo", "5.1", "7.1")
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}  # by number of channels
LEAST_RATE = 4000  # samples a second
MOST_RATE = 655_350  # what FLAC's frame header can say: 16 bits of 10 Hz (RFC 9639)
BIT_RATE = 192_000  # of AAC, bits a second
PCM = "pcm"  # beginning of the names of uncompressed codecs


def _can_copy(container: str, track: Any) -> bool:
    """Return whether a container takes the codec of this sound as it is."""
    if container == "mp4" and track.codec_context.name.startswith(PCM):
        return False  # FFmpeg writes it, and no browser plays it
    try:
        # Some muxers refuse a codec only when their header is written: this writes one, into memory.
        with av.open(io.BytesIO(), "w", format=container) as trial:
            trial.add_stream_from_template(track)
            trial.start_encoding()
    except (ValueError, FFmpegError):
        return False
    return True


@dataclass(frozen=True)
class Sound:
    """The first sound track of a file, from the moment of its first frame on."""

    path: Path
    start: Fraction  # that moment on the file's own clock, in seconds
    seconds: Fraction  # length of the part that is used


@dataclass(frozen=True)
class Samples:
    """Sound as numbers."""

    waveform: Tensor  # [channels, samples] in [-1, 1]
    rate: int  # samples per second of each channel

    @property
    def seconds(self) -> float:
        """Return the length in seconds."""
        return self.waveform.shape[1] / self.rate

    def check(self) -> None:
        """Raise ValueError for a shape, a rate or values that cannot be encoded."""
        shape = list(self.waveform.shape)
        if len(shape) != 2 or shape[0] not in LAYOUTS or not LEAST_RATE <= self.rate <= MOST_RATE:
            raise ValueError(
                f"audio of shape {shape} with {self.rate} samples a second is not [channels, samples] of 1, 2 or 6 "
                f"channels and {LEAST_RATE} samples a second or more; mix it down to stereo, or resample it, first"
            )
        if not torch.isfinite(self.waveform).all():
            raise ValueError("audio holds NaN or Inf; look at the node that it comes from")


def sound_of(path: str | Path) -> tuple[Sound, float]:
    """Return the first sound track of a file from its beginning on, and its length in seconds.

    Raises ValueError when the file cannot be read, or holds no sound.
    """
    with _open(path) as file:
        track = file.streams.best("audio")
        # Packets may begin before what is heard: encoders such as AAC's start with silence that players cut off.
        begin, end = (track.start_time or 0) * track.time_base, None
        for packet in _packets(file, track, Path(path)):
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
    if end is None:
        raise ValueError(f"{path}: holds no sound that can be read; convert it, or leave the sound out")
    return Sound(Path(path), begin, end - begin), float(end - begin)


def _open(path: str | Path) -> Any:
    try:
        file = av.open(file_name(path), options=LOCAL_ONLY)
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a sound ({error.strerror})") from error
    if not file.streams.audio:
        file.close()
        raise ValueError(f"{path}: holds no sound; give a file with a sound track, or leave the sound out")
    return file


def _packets(file: Any, track: Any, path: Path) -> Iterator[Any]:
    """Yield the packets of a track whose time stamps run forwards, as far as it can be read."""
    last: int | None = None
    try:
        for packet in file.demux(track):
            if packet.pts is None or packet.dts is None:  # the empty packet at the end, or one of no known moment
                continue
            if last is not None and packet.dts <= last:
                log.warning("%s: a time stamp of its sound runs backwards; that packet is left out", path)
                continue
            last = packet.dts
            yield packet
    except FFmpegError as error:
        log.warning("%s: its sound is damaged (%s) and ends there", path, error.strerror)


class Track(Protocol):
    """A sound that is added to an open container beside its frames."""

    def until(self, seconds: Fraction | None) -> None:
        """Write what is heard before `seconds` of the video; None writes the rest."""

    def close(self) -> None:
        """Close what the sound came from."""


def sound_track(file: Any, sound: Sound | Samples, video_format: VideoFormat) -> Track:
    """Return the track that adds a sound to a container."""
    if isinstance(sound, Sound):
        return SoundTrack(file, sound)
    assert video_format.sound is not None, "check_video refuses sound for such a format"
    return SamplesTrack(file, sound, video_format.sound)


class SamplesTrack:
    """A track of samples, encoded as far as the video has come; silence behind their end."""

    def __init__(self, file: Any, samples: Samples, codec: str) -> None:
        samples.check()
        self._file, self._samples = file, samples
        self._layout = LAYOUTS[samples.waveform.shape[0]]
        rate = samples.rate if codec != "aac" or samples.rate in AAC_RATES else 48000
        self._out = file.add_stream(codec, rate=rate)
        self._out.layout = self._layout
        if codec == "aac":
            self._out.bit_rate = BIT_RATE
        self._num_encoded = 0  # samples of each channel

    def until(self, seconds: Fraction | None) -> None:
        """Write what is heard before `seconds` of the video; None flushes the encoder."""
        if seconds is None:
            self._file.mux(self._out.encode(None))
            return
        # Rounded from the start of the video each time, so that errors do not add up.
        end = round(seconds * self._samples.rate)
        piece = np.zeros((self._samples.waveform.shape[0], end - self._num_encoded), np.float32)
        sound = self._samples.waveform[:, self._num_encoded : end].detach().float().clamp(-1, 1).cpu().numpy()
        piece[:, : sound.shape[1]] = sound
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=self._layout)
        frame.sample_rate, frame.time_base = self._samples.rate, Fraction(1, self._samples.rate)
        frame.pts = self._num_encoded
        self._num_encoded = end
        self._file.mux(self._out.encode(frame))

    def close(self) -> None:
        """Do nothing: samples are in memory."""


class SoundTrack:
    """A track of a file's sound: copied, or encoded again as AAC where the container does not take its codec."""

    def __init__(self, file: Any, sound: Sound) -> None:
        self._file, self._sound, self._source = file, sound, _open(sound.path)
        self._track = self._source.streams.best("audio")
        if _can_copy(file.format.name, self._track):
            self._out = file.add_stream_from_template(self._track)
            self._packets = self._copied()
        else:
            name = self._track.codec_context.name
            log.warning("%s: its sound (%s) is encoded again as AAC for .%s", sound.path, name, file.format.name)
            self._out = self._aac(file)
            self._packets = self._encoded()
        self._next: tuple[Fraction, Any] | None = next(self._packets, None)

    def until(self, seconds: Fraction | None) -> None:
        """Write what is heard before `seconds` of the new video; None writes the rest."""
        while self._next is not None and (seconds is None or self._next[0] < seconds):
            packet = self._next[1]
            packet.stream = self._out
            self._file.mux(packet)
            self._next = next(self._packets, None)

    def close(self) -> None:
        """Close the file that the sound came from."""
        self._source.close()

    def _aac(self, file: Any) -> Any:
        context = self._track.codec_context
        stream = file.add_stream("aac", rate=context.rate if context.rate in AAC_RATES else 48000)
        stream.layout = context.layout.name if context.layout.name in AAC_LAYOUTS else "stereo"
        return stream

    def _demuxed(self) -> Iterator[tuple[Fraction, Any]]:
        """Yield the packets of the used part and when they begin, in seconds of the new video."""
        for packet in _packets(self._source, self._track, self._sound.path):
            begin = packet.pts * packet.time_base - self._sound.start
            if begin >= self._sound.seconds:
                return
            # The packet that ends at the start is kept too: decoders of AAC need the one before.
            if begin + (packet.duration or 0) * packet.time_base >= 0:
                yield begin, packet

    def _copied(self) -> Iterator[tuple[Fraction, Any]]:
        """Yield the packets as they are stored, moved to the clock of the new video."""
        for begin, packet in self._demuxed():
            shift = round(self._sound.start / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            yield begin, packet

    def _encoded(self) -> Iterator[tuple[Fraction, Any]]:
        """Yield packets of AAC; what cannot be decoded is left out, with a warning."""
        for begin, packet in self._demuxed():
            try:
                frames = packet.decode()
            except FFmpegError as error:
                log.warning("%s: its sound is damaged (%s) after %.2f s", self._sound.path, error.strerror, begin)
                continue
            for frame in frames:
                frame.pts = None if frame.pts is None else frame.pts - round(self._sound.start / frame.time_base)
                yield from ((begin, encoded) for encoded in self._out.encode(frame))
        yield from ((self._sound.seconds, encoded) for encoded in self._out.encode(None))
