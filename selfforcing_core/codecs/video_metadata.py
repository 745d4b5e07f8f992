"""Entries beside the frames of a video file, such as the workflow that made it: read, and added without encoding again.

.mp4, .mov and .mkv keep them in their containers. .webp has EXIF texts "name:value", as ComfyUI writes and reads them;
.gif has comments, one JSON object each.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

from ..atomic import replacing
from .video_formats import CONTAINERS
from .video_reader import file_name, open_video

# Entries that FFmpeg writes into each container by itself.
OWN_ENTRIES = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}
EXIF_TAGS = {"prompt": 0x0110, "workflow": 0x010F}  # where ComfyUI has them
EXIF_FURTHER = 0xE000  # no tag of EXIF is named from here on
HAS_EXIF = 0x08  # in the flags of a webp's VP8X chunk
PIECE = 255  # bytes of a block of a gif's comment, whose length is one byte


def as_texts(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return entries as files keep them: texts as they are, anything else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()}


def muxer_options(container: str, movflags: str = "faststart") -> dict[str, str]:
    """Return the options of a container, by FFmpeg's name of it. movflags: joined by +, for mp4 and mov."""
    if container in ("webp", "gif"):
        return {"loop": "0"}  # for ever
    # Without this flag mp4 keeps a fixed list of names.
    tags = {} if container == "matroska" else {"movflags": f"use_metadata_tags+{movflags}"}
    # Without this one each Matroska file has random numbers of its own.
    return {"fflags": "+bitexact", **tags}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the entries of a video file. Raises ValueError when it is not a readable video."""
    kind = _image_kind(path)
    if kind == "webp":
        return _read_webp(path)
    if kind == "gif":
        return _read_gif(path)
    with open_video(path) as file:
        return dict(file.metadata)


def retag(path: str | Path, entries: Mapping[str, Any]) -> None:
    """Add entries to a finished video file, or replace those of the same names; no frame or sound is encoded again.

    The file is replaced when the new one is whole. Raises ValueError when it is not a readable video, NotWritten when
    it cannot be written.
    """
    path = Path(path)
    before = read_metadata(path)
    with replacing(path, overwrite=True) as temporary:
        if _image_kind(path) is None:
            replaced = {name.lower() for name in entries} | OWN_ENTRIES  # Matroska returns names in capitals
            kept = {name: value for name, value in before.items() if name.lower() not in replaced}
            _copy(path, temporary, {**kept, **as_texts(entries)})
        else:
            temporary.write_bytes(path.read_bytes())
            put_entries(temporary, {**before, **as_texts(entries)})


def put_entries(path: Path, entries: Mapping[str, Any]) -> None:
    """Write entries into a .webp or .gif in place; they replace all that it had."""
    if entries:
        put = _with_exif if _image_kind(path) == "webp" else _with_comment
        path.write_bytes(put(path, as_texts(entries)))


def _image_kind(path: str | Path) -> str | None:
    """Return whether a file is a "webp" or a "gif", whose entries FFmpeg does not keep; None for any other."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a video ({error.strerror})") from error
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "webp"
    return "gif" if head[:4] == b"GIF8" else None


def _copy(source: Path, target: Path, entries: Mapping[str, str]) -> None:
    """Copy every packet of a file into another with these entries."""
    container = CONTAINERS[source.suffix.lower()]
    try:
        with ExitStack() as stack:
            original = stack.enter_context(open_video(source))
            options = muxer_options(container)
            copy = stack.enter_context(av.open(file_name(target), "w", format=container, options=options))
            copy.metadata.update(entries)
            streams = (*original.streams.video, *original.streams.audio)
            copies = {stream.index: _added(copy, stream) for stream in streams}
            for packet in original.demux(*(original.streams[index] for index in copies)):
                if packet.size:  # the last ones only say that it ends
                    packet.stream = copies[packet.stream.index]
                    copy.mux(packet)
    except FFmpegError as error:
        raise ValueError(f"{source}: cannot be copied ({error.strerror})") from error


def _added(file: Any, stream: Any) -> Any:
    """Add a stream like the given one and return it."""
    copy = file.add_stream_from_template(stream, opaque=True)  # decoders of AV1 have no encoder of their name
    # FFmpeg's own tag of H.265 is hev1, which Apple's players do not take.
    copy.codec_context.codec_tag = stream.codec_context.codec_tag
    return copy


# --------------------------------------------------------------------- webp --
def _opened(path: str | Path) -> Any:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: cannot be read as a video ({' '.join(str(error).split())})") from error


def _read_webp(path: str | Path) -> dict[str, str]:
    with _opened(path) as image:
        texts = [value for value in image.getexif().values() if isinstance(value, str) and ":" in value]
    entries = {}
    for text in texts:
        name, _, value = text.partition(":")
        entries[name] = json.loads(value) if value.startswith('"') else value
    return entries


def _with_exif(path: Path, entries: Mapping[str, str]) -> bytes:
    """Return the webp's bytes with an EXIF chunk, which holds ASCII only: other texts are JSON strings."""
    with _opened(path) as image:
        width, height = image.size
    exif = Image.Exif()
    for number, (name, value) in enumerate(entries.items()):
        is_plain = value.isascii() and not value.startswith('"')
        exif[EXIF_TAGS.get(name, EXIF_FURTHER + number)] = f"{name}:{value if is_plain else json.dumps(value)}"
    chunks = [(name, data) for name, data in _riff_chunks(path.read_bytes()) if name != b"EXIF"]
    # A file of a single frame has no chunk of flags: one is put before it, with the canvas's sides less one in 24 bits.
    if chunks[0][0] != b"VP8X":
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunks.insert(0, (b"VP8X", bytes(4) + sides))
    chunks[0] = (b"VP8X", bytes([chunks[0][1][0] | HAS_EXIF]) + chunks[0][1][1:])
    chunks.append((b"EXIF", exif.tobytes()))
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _riff_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return name and bytes of each chunk."""
    chunks, start = [], 12  # behind "RIFF", the file's length and "WEBP"
    while start + 8 <= len(data):
        size = struct.unpack_from("<I", data, start + 4)[0]
        chunks.append((data[start : start + 4], data[start + 8 : start + 8 + size]))
        start += 8 + size + size % 2  # chunks begin at even places
    return chunks


# ---------------------------------------------------------------------- gif --
def _read_gif(path: str | Path) -> dict[str, str]:
    with _opened(path) as image:
        comments = image.info.get("comment", b"").decode("utf-8", "replace")
    try:
        entries = json.loads(comments) if comments else {}
    except ValueError:
        entries = None
    return entries if isinstance(entries, dict) else {"comment": comments}  # of another program


def _with_comment(path: Path, entries: Mapping[str, str]) -> bytes:
    """Return the gif's bytes with a comment behind its header, in place of the one that was written there."""
    data = path.read_bytes()
    # The header has 13 bytes; flags in its byte 10 say whether a table of 3 x 2^(n+1) bytes of colours follows.
    start = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    rest = start
    if data[start : start + 2] == b"!\xfe":  # a comment: blocks that begin with their length, up to an empty one
        rest += 2
        while data[rest]:
            rest += 1 + data[rest]
        rest += 1
    text = json.dumps(entries).encode()
    pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
    comment = b"!\xfe" + b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"
    return data[:start] + comment + data[rest:]
