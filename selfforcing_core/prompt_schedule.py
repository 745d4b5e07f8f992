"""Prompts that change while a video is made: text with times in it, and which chunk each prompt begins with.

0s: a red square moving left
3s: a blue circle moving left
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .geometry import TEMPORAL_FACTOR

_MARK = re.compile(r"(?:^|[\n;])[ \t]*(\d+(?:\.\d+)?)[ \t]*s[ \t]*:")
HISTORIES = ("recode", "keep")  # what becomes of the frames so far when the prompt changes


@dataclass(frozen=True)
class Entry:
    """A prompt, and the second of the video from which it holds."""

    seconds: float
    prompt: str


def parse_schedule(text: str) -> tuple[Entry, ...]:
    """The entries of a text; one that does not begin with a time is a single prompt.

    Entries are separated by lines or semicolons. Raises ValueError for times that do not rise from 0, and for an entry
    without a prompt.
    """
    marks = list(_MARK.finditer(text.strip()))
    if not marks or marks[0].start() != 0:
        return (Entry(0.0, text),)
    stripped, ends = text.strip(), [mark.start() for mark in marks[1:]] + [len(text.strip())]
    entries = tuple(Entry(float(mark[1]), stripped[mark.end() : end].strip()) for mark, end in zip(marks, ends))
    if entries[0].seconds != 0:
        raise ValueError(f"the schedule begins at {entries[0].seconds:g}s; its first prompt must be that of 0s")
    for before, after in zip(entries, entries[1:]):
        if after.seconds <= before.seconds:
            raise ValueError(f"the schedule goes from {before.seconds:g}s to {after.seconds:g}s; times must rise")
    empty = [entry for entry in entries if not entry.prompt]
    if empty:
        raise ValueError(f"the schedule has no prompt at {empty[0].seconds:g}s; write one behind the colon")
    return entries


def start_frames(entries: Sequence[Entry], lengths: Sequence[int], fps: float) -> list[int]:
    """First latent frame of the chunk in which each entry's moment lies; `lengths` are those of all chunks.

    Raises ValueError for a moment behind the video's end, and for two that lie in the same chunk.
    """
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    found: list[int] = []
    for entry in entries:
        frame = int(entry.seconds * fps)
        latent = 0 if frame == 0 else 1 + (frame - 1) // TEMPORAL_FACTOR
        if latent >= sum(lengths):
            seconds = (1 + TEMPORAL_FACTOR * (sum(lengths) - 1)) / fps
            raise ValueError(f"the schedule has a prompt at {entry.seconds:g}s, but the video ends at {seconds:g}s")
        start = max(begin for begin in starts if begin <= latent)
        if found and found[-1] == start:
            raise ValueError(
                f"the prompt at {entry.seconds:g}s begins in the same chunk as the one before; a chunk follows one "
                f"prompt, so leave {TEMPORAL_FACTOR * max(lengths) / fps:g}s between them"
            )
        found.append(start)
    return found
