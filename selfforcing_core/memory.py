"""What some cache policies remember beside the ring, each with its bytes, its reset and its place in a snapshot.

The cache calls `advance` once for every new chunk, before its first pass: what is about to be evicted is still there,
and the chunk before is final. Nothing here is read back to Python.

Letters: B batch, L query tokens (those of the staged chunk), S cached tokens, N heads, K head width, P text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .policy import CachePolicy
from .rope import Axes, apply_rotary, time_turn

AVERAGE = -2  # what a slot shows that holds no frame of the video
Evicted = Sequence[tuple[int, int]]  # frame and slot of each frame that the new chunk overwrites, oldest first


class Ring(Protocol):
    """What a memory needs of the cache (`KVCache`)."""

    policy: CachePolicy
    start_frame: int
    end_frame: int
    capacity: int
    sink: int
    head: int
    sink_start: int
    base: int
    head_dim: int
    axes: Axes
    tokens_per_frame: int
    slot_frames: list[int]
    slot_positions: list[float]
    writes: bool
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def slot_of(self, frame: int) -> int: ...
    def table(self, position: int) -> Tensor: ...
    def read_slots(self, slot: int, count: int) -> tuple[Tensor, Tensor]: ...
    def write_slots(
        self, slot: int, k: Tensor, v: Tensor | None, positions: Sequence[float], *, frame: int | None = None
    ) -> None: ...


class Memory:
    """Tensors by name; which of them are filled is part of a snapshot, since an empty one is made at first use."""

    def __init__(self, cache: Ring) -> None:
        self.cache = cache
        self.tensors: dict[str, Tensor] = {}

    def num_bytes(self) -> int:
        """Return the bytes of all that is kept, a snapshot's part of it and the rest."""
        return sum(x.nbytes for x in self.tensors.values())

    def reset(self) -> None:
        """Forget everything; called when the cache is emptied."""
        self.tensors = {}

    def advance(self, evicted: Evicted, window_start: int) -> None:
        """Follow the ring to its next chunk. window_start: the oldest frame of the ring that stays visible."""
        raise NotImplementedError

    # What a policy may do beyond that; by default the ring goes its way.

    num_banked = 0  # frames in use behind the ring
    is_placing = False  # whether it is for the memory to say in which slot a frame lies

    def restart(self) -> None:
        """Follow the cache, which is to be written again from some frame on."""
        self.reset()

    def close(self, end_frame: int) -> None:
        """Take what is kept of the frames before `end_frame`, which are final, before the prompt changes."""

    def undo(self) -> None:
        """Go back to before the first pass of the staged chunk."""

    def begin_pass(self) -> None:
        """Follow the ring to another pass over the staged chunk."""

    def begin_shot(self, start_frame: int) -> None:
        """Let the chunk there be the first one of a shot."""

    def read_text(self, layer: int, k_BPNK: Tensor) -> None:
        """Learn a layer's keys of a new prompt."""

    def place(self, frames: Sequence[int]) -> list[int]:
        """Return the slots for the frames of a new chunk, before `advance`; an empty list where the device chooses."""
        return [self.cache.slot_of(frame) for frame in frames]

    def offset(self, start_frame: int) -> float:
        """Return how far the chunk there stands from its own number."""
        return 0.0

    def is_chosen(self, start_frame: int) -> bool:
        """Return whether the device chooses where the chunk there lies."""
        return False

    def slot_in(self, layer: int) -> Tensor | None:
        """Return the slot of the staged chunk's frame for each row, [B], where the device chose it."""
        return None

    def write(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> bool:
        """Write the staged chunk where the device chose, and return True; False leaves it to the ring."""
        return False

    def state(self) -> dict[str, Tensor]:
        """Return all that a snapshot has to hold; nothing while all frames lie where they came."""
        return self.tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold again what `state` returned."""
        self.tensors = state

    def _turned(self, k_BSNK: Tensor, num_frames: float) -> Tensor:
        cache = self.cache
        return apply_rotary(k_BSNK, time_turn(cache.head_dim, num_frames, k_BSNK.device, cache.axes))


class MovingSink(Memory):
    """The sink as it was written, from which it is turned anew to stand right before the window.

    Turned in place from chunk to chunk it would gather the rounding of every step of the way.
    average: evicted frames enter it, slot by slot, by this share of the old (Reward Forcing, section 3.2).
    """

    def __init__(self, cache: Ring, average: float | None = None) -> None:
        super().__init__(cache)
        self.average = average

    def advance(self, evicted: Evicted, window_start: int) -> None:
        cache, count = self.cache, self.cache.sink
        place = window_start - cache.head  # where the first frame of the sink comes to stand
        # written again piece by piece, a sink is not whole when the first of it is there
        is_moved = count > 0 and cache.slot_frames[count - 1] >= 0 and place != cache.slot_positions[0]
        if not (is_moved or (evicted and self.average is not None)):
            return
        if not self.tensors:
            k, v = cache.read_slots(0, count)
            # the values never turn; they are kept where an average changes them
            self.tensors = {"sink_k": k} if self.average is None else {"sink_k": k, "sink_v": v}
        if evicted and self.average is not None:
            self._average(evicted)
        k = self._turned(self.tensors["sink_k"], place - cache.sink_start)
        frame = None if self.average is None else AVERAGE
        cache.write_slots(0, k, self.tensors.get("sink_v"), [place + slot for slot in range(count)], frame=frame)

    def _average(self, evicted: Evicted) -> None:
        cache, tokens = self.cache, self.cache.tokens_per_frame
        assert self.average is not None
        for slot, (_, evicted_slot) in enumerate(evicted[: cache.sink]):
            k, v = cache.read_slots(evicted_slot, 1)
            # in the sink's own place: an average of keys that are turned differently is no key
            k = self._turned(k, cache.sink_start + slot - cache.slot_positions[evicted_slot])
            place = slice(slot * tokens, (slot + 1) * tokens)
            self.tensors["sink_k"][:, :, place].lerp_(k, 1 - self.average)
            self.tensors["sink_v"][:, :, place].lerp_(v, 1 - self.average)


class PulledSink(Memory):
    """The sink as it was written, for passes that see it in different places (Rolling Forcing, section 3.3).

    Chunks that are denoised together see it right before the frames that they see of the past; one that is written
    sees it where it was.
    """

    def advance(self, evicted: Evicted, window_start: int) -> None:
        if window_start == self.cache.base:  # later it is hidden from a pass that writes
            self.move(self.cache.sink_start)

    def move(self, place: int) -> None:
        """Let the first frame of the sink stand at this place."""
        cache, count = self.cache, self.cache.sink
        if not count or cache.slot_frames[count - 1] < 0 or place == cache.slot_positions[0]:
            return
        if not self.tensors:
            self.tensors = {"sink_k": cache.read_slots(0, count)[0]}
        k = self._turned(self.tensors["sink_k"], place - cache.sink_start)
        cache.write_slots(0, k, None, [place + slot for slot in range(count)])


class Means(MovingSink):
    """Behind the sink, a slow and a fast moving average of what left, each one frame of equal tokens (MemRoPE)."""

    def __init__(self, cache: Ring, shares: Sequence[float]) -> None:
        super().__init__(cache)
        self.shares = shares

    def advance(self, evicted: Evicted, window_start: int) -> None:
        super().advance(evicted, window_start)
        cache = self.cache
        if evicted:
            # the two frames in these slots make room at the first eviction and enter no average, as published
            parts = [self._mean(frame_slot) for _, frame_slot in evicted]
            k, v = (torch.stack(each).mean(0) for each in zip(*parts))
            for name, share in zip(("slow", "fast"), self.shares):
                if f"{name}_k" in self.tensors:
                    self.tensors[f"{name}_k"].lerp_(k, share)
                    self.tensors[f"{name}_v"].lerp_(v, share)
                else:
                    self.tensors |= {f"{name}_k": k.clone(), f"{name}_v": v.clone()}
        if "slow_k" not in self.tensors:
            return
        for index, name in enumerate(("slow", "fast")):
            place = window_start - len(self.shares) + index
            k = self.tensors[f"{name}_k"].expand(-1, -1, cache.tokens_per_frame, -1, -1)
            v = self.tensors[f"{name}_v"].expand_as(k)
            cache.write_slots(cache.sink + index, apply_rotary(k, cache.table(place)), v, [place], frame=AVERAGE)

    def _mean(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return the mean over a frame's tokens of keys without any turn, and of values."""
        k, v = self.cache.read_slots(slot, 1)
        k = apply_rotary(k, self.cache.table(int(self.cache.slot_positions[slot])).conj())
        return k.mean(2, keepdim=True), v.mean(2, keepdim=True)


class Replay(Memory):
    """The frames that first filled the cache, shown again in place of older ones, walked to and fro (Rolling Sink).

    They are counted from the oldest one there: behind a flush or a cut that is not the video's first.
    """

    def __init__(self, cache: Ring) -> None:
        super().__init__(cache)
        self.first_frame = 0  # the oldest of them

    def advance(self, evicted: Evicted, window_start: int) -> None:
        cache = self.cache
        if not evicted:
            return
        chunk = cache.end_frame - cache.start_frame  # of the chunk before, which is final now
        if not self.tensors:
            k, v = cache.read_slots(0, cache.capacity)
            self.tensors, self.first_frame = {"early_k": k, "early_v": v}, cache.base
        period, tokens = cache.capacity - chunk, cache.tokens_per_frame
        for frame in range(cache.start_frame - chunk, cache.start_frame):
            lap, left = divmod(frame - self.first_frame, period)
            if lap < 1:  # one of them itself
                continue
            index = left if lap % 2 == 0 else period - left - 1
            early, place = self.first_frame + index, slice(index * tokens, (index + 1) * tokens)
            k = self._turned(self.tensors["early_k"][:, :, place], frame - early)
            cache.write_slots(cache.slot_of(frame), k, self.tensors["early_v"][:, :, place], [frame], frame=early)

    def state(self) -> dict[str, Tensor]:
        return {**self.tensors, "first_frame": torch.tensor(self.first_frame)} if self.tensors else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.tensors = {name: x for name, x in state.items() if name != "first_frame"}
        self.first_frame = int(state.get("first_frame", 0))


def new_memory(cache: Ring) -> Memory | None:
    """Return what the cache's policy remembers, None for one that remembers nothing."""
    policy = cache.policy
    if policy.replays:
        return Replay(cache)
    if policy.is_joint:
        return PulledSink(cache)
    if policy.means is not None:
        return Means(cache, policy.means)
    if policy.is_rebased or policy.sink_average is not None:
        return MovingSink(cache, policy.sink_average)
    return None
