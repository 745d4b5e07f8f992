"""Prompts that change while a video is made: text with times in it, and which chunk each prompt begins with.

0s: a red square moving left
3s: a blue circle moving left
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .geometry import TEMPORAL_FACTOR

# A time at the beginning of a line or behind a semicolon; blanks and punctuation of every keyboard.
_MARK = re.compile(r"(?:^|[\n\r;\uff1b])[^\S\n\r]*(\d+(?:\.\d+)?)[^\S\n\r]*s[^\S\n\r]*[:\uff1a]")
HISTORIES = ("recode", "keep")  # what becomes of the frames so far when the prompt changes


@dataclass(frozen=True)
class Entry:
    """A prompt, and the second of the video from which it holds."""

    seconds: float
    prompt: str


def parse_schedule(text: str) -> tuple[Entry, ...]:
    """The entries of a text; one that does not begin with a time, or whose only time is not 0, is a single prompt.

    Entries are separated by lines or semicolons. Raises ValueError for times that do not rise from 0, and for an entry
    without a prompt. `schedule_note` says what may have been meant otherwise.
    """
    stripped = text.strip()
    marks = list(_MARK.finditer(stripped))
    if not marks or marks[0].start() != 0 or _is_name(marks, stripped):
        return (Entry(0.0, text),)
    ends = [mark.start() for mark in marks[1:]] + [len(stripped)]
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


def schedule_note(text: str) -> str | None:
    """Return what to tell whoever wrote a text in which a time was taken for words; None if there is none."""
    stripped = text.strip()
    marks = list(_MARK.finditer(stripped))
    if not marks or (marks[0].start() == 0 and not _is_name(marks, stripped)):
        return None
    time = marks[0][0].strip(" \t\r\n;\uff1b")
    return f"{time!a} is read as a part of the prompt, since a schedule begins with 0s: and its first prompt"


def _is_name(marks: Sequence[re.Match[str]], text: str) -> bool:
    """Whether the only time of a text is one that no schedule begins with, as in "1990s: a neon street"."""
    return len(marks) == 1 and float(marks[0][1]) != 0 and bool(text[marks[0].end() :].strip())


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
