"""Cache policies: what the cache keeps of a long video, at which positions, and what a change of the prompt does to it.

All of them run on one ring (`kv_cache.py`) and one `rollout`. A policy is a record of plain values; what some of them
remember beside the ring is in `memory.py`. Attention sees differences of positions alone, so "positions counted from 0
in the order of the cache" is the same function as absolute positions with the sink moved to stand before the window:
the window never turns, and a video has no last position.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

# What becomes of the frames so far when the prompt changes. Three different things are called recache in the field:
# "recode" writes the frames of sink and window again one chunk after another, each seeing those before it; "recache"
# writes the window again in one pass in which all of its frames see each other, and leaves the sink as it is under the
# first prompt; "recache_sink" does that with the whole window of the cache, whose first frames become the sink.
# "flush" forgets all but the sink and the last frames; "cut" does that and puts the next chunk far away.
RECODE, KEEP, RECACHE, RECACHE_SINK, FLUSH, CUT = "recode", "keep", "recache", "recache_sink", "flush", "cut"
HISTORIES = (RECODE, KEEP, RECACHE, RECACHE_SINK, FLUSH, CUT)


@dataclass(frozen=True)
class CachePolicy:
    """One policy. Window and sink are those of CausalConfig; a policy says what they mean."""

    name: str = "self-forcing"
    is_rebased: bool = False  # the sink moves along, so that it always stands right before the window
    history: str = RECODE  # what a change of the prompt does unless it says otherwise
    kept: int = 2  # frames that a flush leaves beside the sink
    cut_at: int = 45  # where the first frame of a chunk behind a cut stands, counted from the sink's first frame
    sink_average: float | None = None  # share of the old in the moving average that evicted frames enter the sink by
    means: tuple[float, float] | None = None  # share of the new in a slow and a fast average, one frame of cache each
    replays: bool = False  # early frames take the places of older ones, walked to and fro
    # as many chunks as there are steps are denoised together, one step apart, and the sink stands before what they see
    is_joint: bool = False
    recomputes: bool = False  # before every chunk the window is computed again from its clean latents
    keeps_first: bool = False  # with that: the window begins with the video's first frame, and not with one read again
    bias: float = 1.0  # factor on attention's weights of past frames but the first one, where a chunk is denoised
    bank: int = 0  # frames beside the window, which each layer keeps by their likeness to the prompt
    record_every: int = 3  # chunks from the one whose first frame enters the bank to the next of them
    bank_follows: bool = False  # in between, the bank's newest frame is the first one of the latest chunk
    refresh_below: float | None = None  # a frame of the sink that is less like the newest one makes room for it
    reset_at: int = 0  # where positions fall back to the end of the first window; 0: nowhere
    shot_offset: int | None = None  # a cut begins a shot, so much farther on, whose first frames stay until the next
    is_published: bool = False  # as the public code reads the method where that is a slip (docs/policies.md)

    def __post_init__(self) -> None:
        if self.history not in HISTORIES:
            raise ValueError(f"history {self.history!r} is unknown; use {', '.join(HISTORIES)}")
        if self.history not in self.histories:
            raise ValueError(f"policy {self.name} cannot {self.history}: {self._reason}; use {_either(self.histories)}")
        shares = [self.sink_average, *(self.means or ())]
        if any(share is not None and not 0 <= share <= 1 for share in shares):
            raise ValueError(f"shares of averages {[share for share in shares if share is not None]} leave [0, 1]")
        if min(self.kept, self.cut_at, self.bank, self.reset_at, self.shot_offset or 0) < 0:
            raise ValueError(
                f"kept {self.kept}, cut_at {self.cut_at}, bank {self.bank}, reset_at {self.reset_at} and shot_offset "
                f"{self.shot_offset} are counts of frames; use 0 or more"
            )
        if not 0 < self.bias < math.inf:
            raise ValueError(f"bias {self.bias} is no finite factor above 0; use 1 for none")
        if self.refresh_below is not None and not -1 <= self.refresh_below <= 1:
            raise ValueError(f"refresh_below {self.refresh_below} is no likeness; use -1 to 1")
        if self.record_every < 1:
            raise ValueError(f"record_every {self.record_every} is a count of chunks; use 1 or more")

    @property
    def num_means(self) -> int:
        """Return how many frames of the cache, behind the sink, hold averages once something was evicted."""
        return 0 if self.means is None else len(self.means)

    @property
    def remembers(self) -> bool:
        """Return whether the cache shows what nothing writes again, above all of frames that have left the window."""
        return self.sink_average is not None or self.means is not None or self.replays or self.is_joint

    @property
    def settings(self) -> tuple[str, ...]:
        """Return what may be set, as `cache_policy` reads it: nothing that this policy would not look at."""
        looks_at = {
            "history": True,
            "kept": FLUSH in self.histories,
            "cut_at": CUT in self.histories and self.shot_offset is None,
            "sink_average": self.sink_average is not None,
            "means": self.means is not None,
            "keeps_first": self.recomputes,
            "bias": self.recomputes,
            "bank": self.bank > 0,
            "record_every": self.bank > 0,
            "refresh_below": self.refresh_below is not None,
            "reset_at": self.refresh_below is not None,
            "shot_offset": self.shot_offset is not None,
            "published": self.name in SLIPS,
        }
        return tuple(key for key, is_own in looks_at.items() if is_own)

    @property
    def histories(self) -> tuple[str, ...]:
        """Return what a change of the prompt may do to the frames so far."""
        if self.recomputes:
            return (RECODE, KEEP)  # the same here: frames stay, and their keys are never kept
        if self.is_joint or self.refresh_below is not None:
            return (KEEP,)
        if self.shot_offset is not None:
            return KEEP, CUT
        if self.bank:
            return RECACHE, KEEP, FLUSH, CUT
        return (KEEP, FLUSH, CUT) if self.remembers else HISTORIES

    @property
    def _reason(self) -> str:
        if self.recomputes:
            return "it computes its window again before every chunk, under the prompt that then holds"
        if self.is_joint:
            return "it denoises several chunks together, whose past stays as it was written"
        if self.refresh_below is not None:
            return "each layer has chosen for itself which frames it holds, and where"
        if self.shot_offset is not None:
            return "the first frames of a shot stay where they are until the next shot"
        return "it remembers frames that are gone, which nothing writes again"

    @property
    def memory_text(self) -> str:
        """Return name and settings that decide what a cache holds: those that differ from the policy's own.

        What a later change of the prompt does is none of them.
        """
        values = {key: getattr(self, FIELD_OF.get(key, key)) for key in _READERS if key not in _OF_CHANGES}
        usual = POLICIES[self.name]
        others = [f"{key}={x}" for key, x in values.items() if x != getattr(usual, FIELD_OF.get(key, key))]
        return ",".join([self.name, *others])

    def with_history(self, history: str | None) -> CachePolicy:
        """Return the policy with another answer to a change of the prompt; None leaves its own.

        Raises ValueError for a word that is unknown, or that this policy cannot follow.
        """
        return self if history is None else replace(self, history=history)


def _either(words: tuple[str, ...]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


# Policies whose public code differs from what their method says: behind a flush it puts queries at the window's end
# though the window is not full; a full bank chooses again at every chunk, and so fills with copies of its newest frame;
# of each frame the keys of its first step stay, not those of the last; a window is computed under the former prompt.
SLIPS = ("infinity-rope", "memflow", "sdv2", "krea", "krea-bias")
# Where each was read: docs/policies.md.
SELF_FORCING = CachePolicy()
_TABLE = (
    SELF_FORCING,
    CachePolicy("longlive", history=RECACHE),
    CachePolicy("longlive-interactive", history=RECACHE_SINK),
    CachePolicy("longlive-infinity", is_rebased=True, history=RECACHE),
    CachePolicy("infinite", is_rebased=True, history=KEEP),
    CachePolicy("infinity-rope", is_rebased=True, history=FLUSH),
    CachePolicy("flashdreams", is_rebased=True, history=KEEP),
    CachePolicy("lingbot2", history=KEEP),
    CachePolicy("reward", is_rebased=True, history=KEEP, sink_average=0.999),
    CachePolicy("memrope", is_rebased=True, history=KEEP, means=(0.01, 0.1)),
    CachePolicy("rolling-sink", history=KEEP, replays=True),
    CachePolicy("rolling-forcing", history=KEEP, is_joint=True),
    CachePolicy("krea", recomputes=True),
    CachePolicy("krea-bias", recomputes=True, bias=0.3),
    CachePolicy("memflow", history=RECACHE, bank=3),
    CachePolicy("memflow-plain", history=KEEP, bank=3, bank_follows=True),
    CachePolicy("sdv2", history=KEEP, refresh_below=0.2, reset_at=50),
    CachePolicy("longlive2", history=KEEP, shot_offset=8),
)
POLICIES: Mapping[str, CachePolicy] = {policy.name: policy for policy in _TABLE}


@functools.cache
def cache_policy(text: str) -> CachePolicy:
    """Return the policy of "NAME" or "NAME,key=value,...".

    Raises ValueError for an unknown name, naming what comes near, for a setting that the policy does not look at,
    naming its own, and for a value that the setting cannot have.
    """
    name, *settings = (word.strip() for word in text.split(","))
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=2) or list(POLICIES)
        raise ValueError(f"policy {name!r} is unknown; use {' or '.join(near)}")
    values: dict[str, Any] = {}
    own = POLICIES[name].settings
    for setting in filter(None, settings):  # a comma at the end is none
        key, sign, value = (part.strip() for part in setting.partition("="))
        if key not in own or not sign:
            # one that it does not have could take the place of the policy's own memory, or do nothing
            raise ValueError(f"policy {name} has no setting {setting!r}; use {'=..., '.join(own)}=...")
        try:
            values[FIELD_OF.get(key, key)] = _READERS[key](value)
        except ValueError as error:
            raise ValueError(f"policy {name}: {key}={value} cannot be read ({error})") from error
    return replace(POLICIES[name], **values)


def _shares(text: str) -> tuple[float, float]:
    slow, fast = map(float, text.split("/"))
    return slow, fast


def _is_yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("use yes or no")
    return text == "yes"


# A setting and the field that it is, where the two are called differently.
FIELD_OF = {"published": "is_published"}
_OF_CHANGES = ("history", "kept", "cut_at")
_READERS: Mapping[str, Callable[[str], Any]] = {
    "history": str,
    "kept": int,
    "cut_at": int,
    "sink_average": float,
    "means": _shares,
    "keeps_first": _is_yes,
    "bias": float,
    "bank": int,
    "record_every": int,
    "refresh_below": float,
    "reset_at": int,
    "shot_offset": int,
    "published": _is_yes,
}
assert {FIELD_OF.get(key, key) for key in _READERS} < {field.name for field in fields(CachePolicy)}
