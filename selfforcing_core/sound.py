"""The sound of a given video, carried into the video that goes on from it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from .video_reader import open_video

log = logging.getLogger(__name__)
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
AAC_LAYOUTS = ("mono", "stereo", "5.1", "7.1")


def _is_taken(container: str, track: Any) -> bool:
    """Whether a container holds the codec of this sound as it is: some say so only when they are begun."""
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


class SoundTrack:
    """A sound that is added to an open container beside its frames: as it is stored, or as AAC, which is said."""

    def __init__(self, file: Any, sound: Sound) -> None:
        self._file, self._sound, self._source = file, sound, open_video(sound.path)
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
        last: int | None = None
        try:
            for packet in self._source.demux(self._track):
                if packet.pts is None or packet.dts is None:
                    continue
                if last is not None and packet.dts <= last:
                    log.warning(
                        "%s: a time stamp of its sound runs backwards; that packet is left out", self._sound.path
                    )
                    continue
                last = packet.dts
                begin = packet.pts * packet.time_base - self._sound.start
                if begin >= self._sound.seconds:
                    return
                if begin + (packet.duration or 0) * packet.time_base >= 0:  # with the one that a decoder begins with
                    yield begin, packet
        except FFmpegError as error:
            log.warning("%s: its sound is damaged (%s) and ends there", self._sound.path, error.strerror)

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
