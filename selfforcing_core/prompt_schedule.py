"""Prompts that change while a video is made: text with times in it, and which chunk each prompt begins with.

0s: a red square moving left
3s: a blue circle moving left
6s cut: a green triangle
9s blend 4: a white square

Behind a time, in words or in brackets: what becomes of the frames so far (policy.HISTORIES; else as run or policy say),
blend and a number of chunks over which the prompt becomes the next, a seed for the noise from there on, and quoted, for
a prompt as a JSON string. "4.5s [keep, seed 7]: a prompt"; "6s [seed own]:" goes back to the run's seed. "0s [24 fps]:
a prompt" says which frames per second all times refer to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from .geometry import TEMPORAL_FACTOR, chunk_starts, pixel_frames
from .policy import HISTORIES

OWN_SEED = -1  # of an entry that goes back to the seed of the run
QUOTED = "quoted"
BLEND = "blend"
LEAST_BLEND, MOST_BLEND = 2, 9999  # chunks; with one the prompt would change at once
RULE = f"{', '.join(HISTORIES)}, blend CHUNKS, seed NUMBER, seed own, quoted or, at 0s, NUMBER fps"
# A time at the beginning of a line or behind a semicolon; blanks and punctuation of every keyboard.
_BLANKS = r"[^\S\n\r]*"
_BLANK = r"[^\S\n\r]+"
_TIME = rf"(?:^|[\n\r;\uff1b]){_BLANKS}(\d+(?:\.\d+)?){_BLANKS}s"
_OPTION = (
    rf"(?:{'|'.join((*HISTORIES, QUOTED))}|{BLEND}{_BLANKS}\d{{1,4}}|seed{_BLANKS}(?:own|\d{{1,20}})"
    rf"|\d{{1,9}}(?:\.\d{{1,9}})?{_BLANKS}fps)\b"
)
_WORDS = rf"{_BLANK}({_OPTION}(?:(?:{_BLANK}|{_BLANKS},{_BLANKS}){_OPTION})*)"
_OPTIONS = rf"\[{_BLANKS}({_OPTION}(?:{_BLANKS},{_BLANKS}{_OPTION})*){_BLANKS}\]"
_MARK = re.compile(rf"{_TIME}(?:{_WORDS})?{_BLANKS}(?:{_OPTIONS}{_BLANKS})?[:\uff1a]")
# A mark, but for what the brackets hold, or for a word in front of the colon that nearly is one of the options.
_NEARLY = re.compile(rf"{_TIME}{_BLANKS}(?:\[[^\]\n\r]*\]|([A-Za-z_]+)[^:\n\r;\[]{{0,20}}){_BLANKS}[:\uff1a]")


@dataclass(frozen=True)
class Transition:
    """How a prompt takes the place of the one before."""

    history: str | None = None  # what becomes of the frames so far (policy.HISTORIES); None is what the policy says
    # Chunks over which the embeddings go from one to the other; the frames so far are kept until the last of them.
    blend: int = 1


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt, and from when on it holds."""

    seconds: float  # of the video
    prompt: str  # "" goes on with the one before
    history: str | None = None  # what becomes of the frames so far; None is what the run says
    seed: int | None = None  # of the noise from there on; OWN_SEED is the run's, None goes on with the one before
    fps: float | None = None  # of the first entry alone: frames per second of all times; None is the video's
    blend: int = 1  # chunks over which the prompt before becomes this one; 1 is at once

    def transition(self, history: str | None) -> Transition:
        """Return how the prompt takes its place in a run that says `history`, where the entry says nothing."""
        return Transition(self.history or history, self.blend)


def parse_schedule(text: str) -> tuple[TimedPrompt, ...]:
    """Return the entries of a text.

    One that does not begin with a time, or whose only time is not 0, is a single prompt. Entries are separated by lines
    or semicolons. Raises ValueError for times that do not rise from 0, for an entry without prompt and seed, and for
    options that contradict. `schedule_note` says what may have been meant otherwise.
    """
    stripped = text.strip()
    marks = list(_MARK.finditer(stripped))
    if not marks or marks[0].start() != 0 or _is_name(marks, stripped):
        return (TimedPrompt(0.0, text),)
    ends = [mark.start() for mark in marks[1:]] + [len(stripped)]
    entries = tuple(_entry(mark, stripped[mark.end() : end].strip()) for mark, end in zip(marks, ends))
    if entries[0].seconds != 0:
        raise ValueError(f"the schedule begins at {entries[0].seconds:g}s; its first prompt must be that of 0s")
    for before, after in zip(entries, entries[1:]):
        if after.seconds <= before.seconds:
            raise ValueError(f"the schedule goes from {before.seconds:g}s to {after.seconds:g}s; times must rise")
    empty = [entry for entry in entries if not entry.prompt and (entry.seed is None or entry is entries[0])]
    if empty:
        raise ValueError(f"the schedule has no prompt at {empty[0].seconds:g}s; write one behind the colon")
    changed = [entry for entry in entries if entry.history or entry.blend != 1]
    idle = [entry for entry in changed if not entry.prompt or entry is entries[0]]
    if idle:
        raise ValueError(
            f"the schedule says {' '.join(_transition_words(idle[0]))} at {idle[0].seconds:g}s, where no prompt "
            "changes; leave that out"
        )
    if any(entry.fps is not None for entry in entries[1:]) or entries[0].fps == 0:
        raise ValueError("the schedule says fps at another time than 0s, or 0 fps; say it once, at 0s, and above 0")
    return entries


def _entry(mark: re.Match[str], prompt: str) -> TimedPrompt:
    """Return a mark's entry. Raises ValueError for options that contradict or are out of range, and broken quotes."""
    seconds = float(mark[1])
    options = re.findall(_OPTION, f"{mark[2] or ''} {mark[3] or ''}")
    histories = [option for option in options if option in HISTORIES]
    blends = [int(option[len(BLEND) :]) for option in options if option.startswith(BLEND)]
    seeds = [option[len("seed") :].strip() for option in options if option.startswith("seed")]
    rates = [float(option[: -len("fps")]) for option in options if option.endswith("fps")]
    if max(len(histories), len(blends), len(seeds), len(rates)) > 1:
        raise ValueError(
            f"the schedule says [{', '.join(options)}] at {seconds:g}s; use one of {', '.join(HISTORIES)}, one blend, "
            "one seed, one fps"
        )
    if blends and blends[0] < LEAST_BLEND:
        raise ValueError(
            f"the schedule says blend {blends[0]} at {seconds:g}s; use {LEAST_BLEND} chunks or more, or leave it out, "
            "so that the prompt changes at once"
        )
    seed = None if not seeds else OWN_SEED if seeds[0] == "own" else int(seeds[0])
    if seed is not None and seed >= 2**64:
        raise ValueError(f"the schedule has seed {seed} at {seconds:g}s; use a whole number below 2**64")
    if QUOTED in options:
        prompt = _unquoted(prompt, seconds)
    history, rate, blend = next(iter(histories), None), next(iter(rates), None), next(iter(blends), 1)
    return TimedPrompt(seconds, prompt, history, seed, rate, blend)


def _unquoted(text: str, seconds: float) -> str:
    try:
        prompt = json.loads(text)
    except ValueError:
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f'the prompt at {seconds:g}s is no JSON string; write "..." behind the colon, or drop quoted')
    return prompt


def schedule_text(entries: Sequence[TimedPrompt]) -> str:
    """Return the text that `parse_schedule` reads as these entries; times and fps have up to six decimals."""
    return "\n".join(_line(entry) for entry in entries)


def _line(entry: TimedPrompt) -> str:
    words, options, prompt = _transition_words(entry), [], entry.prompt
    if entry.seed is not None:
        options.append("seed own" if entry.seed == OWN_SEED else f"seed {entry.seed}")
    if entry.fps is not None:
        options.append(f"{_decimal(entry.fps)} fps")
    # what would not be read back as it is: blanks at the ends, and words that look like a time
    if prompt != prompt.strip() or _MARK.search(f"-{prompt}"):
        options.append(QUOTED)
        prompt = json.dumps(prompt, ensure_ascii=False).replace(";", "\\u003b").replace("\uff1b", "\\uff1b")
    # a change alone reads best in words; with anything else all of it stands in brackets
    said = f" [{', '.join([*words, *options])}]" if options else "".join(f" {word}" for word in words)
    return f"{_decimal(entry.seconds)}s{said}: {prompt}".rstrip(" ")


def _transition_words(entry: TimedPrompt) -> list[str]:
    blend = [f"{BLEND} {entry.blend}"] if entry.blend != 1 else []
    return ([entry.history] if entry.history else []) + blend


def _decimal(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def schedule_note(text: str) -> str | None:
    """Return what to tell whoever wrote a text in which a time was taken for words; None if there is none."""
    stripped = text.strip()
    marks = list(_MARK.finditer(stripped))
    if not marks or (marks[0].start() == 0 and not _is_name(marks, stripped)):
        return _option_note(stripped)
    time = marks[0][0].strip(" \t\r\n;\uff1b")
    return f"{time!a} is read as a part of the prompt, since a schedule begins with 0s: and its first prompt"


def _option_note(text: str) -> str | None:
    near = next((mark for mark in _NEARLY.finditer(text) if _is_slip(mark)), None)
    if near is None:
        return None
    time = near[0].strip(" \t\r\n;\uff1b")
    return f"{time!a} is read as a part of the prompt; words or brackets behind a time hold {RULE}"


def _is_slip(mark: re.Match[str]) -> bool:
    """Return whether this is no mark, but may have been meant as one: "3s [late]:", "3s Cut:", and not "3s later:"."""
    if _MARK.fullmatch(mark[0]):
        return False
    return mark[2] is None or bool(get_close_matches(mark[2].lower(), (*HISTORIES, BLEND, "seed", QUOTED), cutoff=0.75))


def _is_name(marks: Sequence[re.Match[str]], text: str) -> bool:
    """Whether the only time of a text is one that no schedule begins with, as in "1990s: a neon street"."""
    return len(marks) == 1 and float(marks[0][1]) != 0 and bool(text[marks[0].end() :].strip())


def start_frames(entries: Sequence[TimedPrompt], lengths: Sequence[int], fps: float) -> list[int]:
    """Return the first latent frame of the chunk in which each entry's moment lies; `lengths`: of all chunks.

    Raises ValueError for a moment behind the video's end, and for two that lie in the same chunk.
    """
    starts = chunk_starts(lengths)
    entry_starts: list[int] = []
    for entry in entries:
        frame = int(entry.seconds * fps)
        # frame 0 is latent frame 0 alone; from there on a latent frame stands for four
        latent = 0 if frame == 0 else 1 + (frame - 1) // TEMPORAL_FACTOR
        if latent >= sum(lengths):
            seconds = (1 + TEMPORAL_FACTOR * (sum(lengths) - 1)) / fps
            raise ValueError(
                f"the schedule has a prompt at {entry.seconds:g}s, but the video ends at {seconds:g}s; leave it out, "
                "or make a longer video"
            )
        start = max(begin for begin in starts if begin <= latent)
        if entry_starts and entry_starts[-1] == start:
            raise ValueError(
                f"the prompt at {entry.seconds:g}s begins in the same chunk as the one before; a chunk follows one "
                f"prompt, so leave {TEMPORAL_FACTOR * max(lengths) / fps:g}s between them"
            )
        entry_starts.append(start)
    return entry_starts


def moment_of(start: int, fps: float) -> float:
    """Return the second, in thousandths, at which `start_frames` finds the chunk that begins at this latent frame."""
    frame = pixel_frames(start)
    thousandths = math.ceil(round(1000 * frame / fps, 6))  # rounded first: 3.0000000001 is to be 3, and not 4
    # `start_frames` multiplies floats, and may come out one frame early
    return (thousandths if int(thousandths / 1000 * fps) >= frame else thousandths + 1) / 1000


def seed_at(seeds: Mapping[int, int], start: int) -> int | None:
    """Return the seed that holds at a latent frame, of those by the frames from which they hold; None: the run's."""
    earlier = [frame for frame in seeds if frame <= start]
    seed = seeds[max(earlier)] if earlier else OWN_SEED
    return None if seed == OWN_SEED else seed
