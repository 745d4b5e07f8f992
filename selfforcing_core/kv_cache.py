"""The ring of keys and values that makes a bidirectional network causal.

One preallocated buffer per rollout holds `capacity` latent frames: the first `sink` frames of the video for ever, and
behind them a ring that new frames overwrite, so that nothing is copied at eviction. All cursors are integers of Python,
since reading one back from a device would wait for all that runs there.

In 8 bits (int8 or float8_e4m3fn) each token's keys and values have one scale per head. Where the type of the buffers is
not that of the computation, what a chunk sees of itself is exact.

Letters: B batch, L query tokens (those of the staged chunk), S cached tokens, N heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chosen_memory import chosen_memory
from .config import WanConfig
from .memory import Memory, PulledSink, new_memory
from .policy import SELF_FORCING, CachePolicy
from .quantised import LARGEST, SCALE_DTYPE, dequantise, quantise
from .rope import PLAIN, Axes, apply_rotary, rotary_table, time_turn

# for each contiguous run of the staged chunk: offset in it, length, and every layer's view of its slots
Slots = list[tuple[int, int, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class CacheState:
    """A copy of what a cache holds after a chunk."""

    k: Tensor  # [layers, B, S, N, K] of the slots in use, in the order of slots
    v: Tensor
    start_frame: int  # of the latest chunk
    end_frame: int
    capacity: int  # latent frames, the sink's included
    sink: int
    base: int  # the frame in the ring's first slot before anything is evicted
    k_scale: Tensor | None = None  # [layers, B, S, N, 1] where the cache is of 8 bits
    v_scale: Tensor | None = None
    sink_start: int = 0  # the frame in the first slot
    jump: float = 0.0  # how far the latest chunk stands from its own number
    slot_frames: tuple[int, ...] = ()  # what each slot in use shows; () for the frames as they came
    slot_positions: tuple[float, ...] = ()
    policy: str = SELF_FORCING.name  # with the settings that are not its own; older files hold the name alone
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # of the policy, by name


@dataclass(frozen=True)
class Past:
    """Views of one layer's buffers, to be joined with the staged chunk's own keys and values."""

    k_BSNK: Tensor
    v_BSNK: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    # what is not the past: the chunk's own slots, and hidden ones; offset in the chunk, slot, length, in tokens
    staged: tuple[tuple[int, int, int], ...]
    num_visible: int  # tokens of the buffers in use
    bank: tuple[int, int] = (0, 0)  # where frames of earlier times lie, behind the ring, in tokens
    # where the device chose a slot for the chunk's one frame: its number for each row, and the tokens of a frame
    chosen: tuple[Tensor, int] | None = None

    def __call__(self, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor]:
        """Return all visible keys and values: those of the past, without gradient, then the new ones."""
        return self._joined(self.k_BSNK, self.k_scale, k_BLNK), self._joined(self.v_BSNK, self.v_scale, v_BLNK)

    def segments(
        self, k_BLNK: Tensor, v_BLNK: Tensor, *, num_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same piece by piece: the new ones, then at most `num_tokens` at a time (default: as many as new).

        Each piece is made when it is asked for; let go of it before asking for the next.
        """
        if self.chosen is not None:  # nobody here knows where a piece without the chunk's own frame would end
            yield self(k_BLNK, v_BLNK)
            return
        yield k_BLNK, v_BLNK  # exact, and as they are: nothing of a chunk is read back from its own rounded copy
        step = k_BLNK.shape[1] if num_tokens is None else num_tokens
        for start, end in self._runs():
            for first in range(start, end, step):
                piece = slice(first, min(first + step, end))
                yield (
                    self._piece(self.k_BSNK, self.k_scale, piece, k_BLNK),
                    self._piece(self.v_BSNK, self.v_scale, piece, v_BLNK),
                )

    def _runs(self) -> list[tuple[int, int]]:
        """Return where the buffers hold something other than the staged chunk: (first token, end)."""
        edge, runs = 0, []
        # a chunk lies in two pieces where the ring comes round
        for _, slot, length in sorted(self.staged, key=lambda piece: piece[1]):
            runs.append((edge, slot))
            edge = slot + length
        return [(start, end) for start, end in [*runs, (edge, self.num_visible), self.bank] if start < end]

    def _joined(self, buffer: Tensor, scale: Tensor | None, new_BLNK: Tensor) -> Tensor:
        if self.chosen is not None:
            slot_B, tokens = self.chosen
            whole = self._piece(buffer, scale, slice(0, self.num_visible), new_BLNK).clone()
            rows = torch.arange(whole.shape[0], device=whole.device)
            whole.unflatten(1, (-1, tokens))[rows, slot_B.to(whole.device)] = new_BLNK  # exact, as in any other cache
            return whole
        parts = [self._piece(buffer, scale, slice(*run), new_BLNK) for run in self._runs()]
        return torch.cat([*parts, new_BLNK], 1)

    @staticmethod
    def _piece(buffer: Tensor, scale: Tensor | None, tokens: slice, like: Tensor) -> Tensor:
        # what earlier chunks wrote carries no gradient (Self Forcing, algorithm 1): backpropagation stays in a chunk
        part = buffer[:, tokens].detach()
        return dequantise(part, None if scale is None else scale[:, tokens].detach(), like.detach())


class KVCache:
    """Keys (already turned by their absolute position) and values of the frames a chunk may see.

    Use: `stage` the frames of a forward pass, then `update` once per layer. Staging the same frames again overwrites
    them in place (later denoising steps, the clean pass); staging the next frames moves on.

    dtype: any floating-point type, or int8; for the types of LARGEST the scales lie in k_scale and v_scale.
    by_segments: where numbers are converted, `write` and the segments of `past` take the place of `update`, so that one
    segment at a time, and not all that is visible, exists in the wider type.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        batch: int,
        tokens_per_frame: int,
        capacity: int,
        sink: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        by_segments: bool = False,
    ) -> None:
        assert 0 <= sink < capacity, f"sink {sink} leaves no room in a cache of {capacity} frames"
        self.tokens_per_frame, self.capacity, self.sink = tokens_per_frame, capacity, sink
        self.num_slots = capacity  # the capacity, and behind it what a policy shows beside the window
        self.by_segments = by_segments
        self.head_dim, self.grid = config.head_dim, (1, tokens_per_frame)
        self.axes: Axes = PLAIN  # scale and shift of positions, by which the network turns
        self.policy = SELF_FORCING
        self.head = sink  # slots in front of the ring: those of the sink, and what a policy keeps behind it
        self.memory: Memory | None = None
        self.keeps_all = False  # set by who knows that the video is no longer than the capacity
        # each head's tokens lie together, the order in which attention reads them; shown with tokens before heads
        shape = (config.num_layers, batch, config.num_heads, capacity * tokens_per_frame, config.head_dim)
        # not cleared: only slots that were written are ever visible
        self.k = torch.empty(shape, device=device, dtype=dtype).transpose(2, 3)
        self.v = torch.empty(shape, device=device, dtype=dtype).transpose(2, 3)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if dtype in LARGEST:
            self.k_scale = torch.empty((*shape[:-1], 1), device=device, dtype=SCALE_DTYPE).transpose(2, 3)
            self.v_scale = torch.empty((*shape[:-1], 1), device=device, dtype=SCALE_DTYPE).transpose(2, 3)
        self.reset()

    @staticmethod
    def num_bytes(config: WanConfig, *, batch: int, tokens_per_frame: int, capacity: int, dtype: torch.dtype) -> int:
        """Return the bytes that the buffers of such a cache will take, scales included."""
        per_token = config.dim * dtype.itemsize + (config.num_heads * SCALE_DTYPE.itemsize if dtype in LARGEST else 0)
        return 2 * config.num_layers * batch * capacity * tokens_per_frame * per_token

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    def converts(self, like: Tensor) -> bool:
        """Return whether keys and values of this type are stored in another one."""
        return self.k.dtype != like.dtype

    def follow(self, policy: CachePolicy, grid: tuple[int, int]) -> None:
        """Keep what a policy says from here on; the cache is empty afterwards.

        grid: tokens of a frame, down and across.
        """
        assert grid[0] * grid[1] == self.tokens_per_frame, f"{grid} are not {self.tokens_per_frame} tokens"
        self.policy, self.grid = policy, grid
        self.head, self.capacity = self.sink + policy.num_means, self.num_slots - policy.bank
        assert self.head < self.capacity, f"{self.head} frames that stay leave no room in a cache of {self.capacity}"
        self.memory = chosen_memory(self) or new_memory(self)
        self.reset()

    def reset(self) -> None:
        """Empty the cache; the next staged frame is frame 0. Nothing is freed or cleared."""
        if self.memory is not None:
            self.memory.reset()
        self._empty()

    def _empty(self) -> None:
        self.start_frame = self.end_frame = 0
        self.writes = True  # in the staged pass
        self.keeps_text = True  # in the staged pass: what it computes of the prompt serves later ones
        self.looks_at: int | None = None  # the first frame of a staged pass that stands behind what is in the cache
        self.bias = 1.0  # factor on the weights of past frames but the first one
        self._hidden: list[tuple[int, int, int]] = []  # slots in use that the staged pass does not see, as pieces
        self._mask: Tensor | None = None
        self.base = self.head  # the frame in the ring's first slot; later than that after `restart`
        self.sink_start = 0  # the frame in the first slot of all
        # What each slot shows and where it stands, on the time axis: -1 nothing, -2 no frame but an average.
        self.slot_frames = [-1] * self.capacity
        self.slot_positions: list[float] = [0.0] * self.capacity
        self.jump = 0.0  # how far the staged chunk stands from its own number
        self.offset = 0.0  # the same, where it stays there
        self.lead = 0  # how far the staged chunk's queries stand before its own keys
        self.next_jump_to: int | None = None
        self.cross: dict[int, Any] = {}  # by layer; of the prompt, which does not change from pass to pass
        self._aim([])

    def restart(self, base: int, *, sink_start: int = 0) -> None:
        """Empty the cache; the sink begins with frame `sink_start`, and the ring behind it with frame `base`."""
        if self.memory is not None:
            self.memory.restart()
        self._empty()
        self.sink_start = self.start_frame = self.end_frame = sink_start
        self.base = max(base, sink_start + self.head)

    def forget_window(self, end_frame: int, num_kept: int) -> None:
        """Keep the sink and the last `num_kept` frames before `end_frame`; what is staged goes with the rest."""
        self._settle()
        kept = [frame for frame in range(end_frame - num_kept, end_frame) if frame >= self.sink_start + self.head]
        slots = [self.slot_of(frame) for frame in kept]
        parts = [(self.read_slots(slot, 1), self.slot_positions[slot]) for slot in slots]
        self.base = kept[0] if kept else max(end_frame, self.sink_start + self.head)
        self.slot_frames[self.head :] = [-1] * (self.capacity - self.head)
        self.start_frame, self.end_frame = end_frame - 1, end_frame
        for frame, ((k, v), position) in zip(kept, parts):
            self.write_slots(self.slot_of(frame), k, v, [position], frame=frame)
        self._aim([])

    def rewind(self, base: int) -> None:
        """Empty the ring and keep what stays for ever; behind that, frame `base` comes next."""
        self.start_frame = self.end_frame = self.sink_start + self.head
        self.base, self.jump = base, 0.0
        self.slot_frames[self.head :] = [-1] * (self.capacity - self.head)
        self.cross = {}
        self._aim([])

    def begin_again(self, base: int) -> None:
        """Empty the cache but for the text; frame `base` comes next, before anything is biased."""
        cross = self.cross
        self.restart(base)
        self.cross = cross

    def close(self, end_frame: int) -> None:
        """Let the policy take what it keeps of the frames before `end_frame`: the chunk there is final."""
        if self.memory is not None:
            self.memory.close(end_frame)

    def undo(self, start_frame: int) -> None:
        """Go back to before the first pass of the chunk there, if it is staged: it is to be made once more."""
        if self.memory is not None and self.start_frame == start_frame < self.end_frame:
            self.memory.undo()
            self._place(self._slots_of_staged())

    def begin_shot(self, start_frame: int) -> None:
        """Let the chunk there be the first one of a shot."""
        if self.memory is not None:
            self.memory.begin_shot(start_frame)
            if self.start_frame == start_frame < self.end_frame:  # it is made once more
                self._place(self._slots_of_staged())

    def jump_to(self, place: int) -> None:
        """Let the next new chunk stand `place` frames behind the first visible one, until the chunk after it begins."""
        self.next_jump_to = place

    def snapshot(self, device: torch.device | None = None) -> CacheState:
        """Copy what the cache holds, to this device or where it lies. The text's keys and values are not part of it."""
        num_visible, (bank, bank_end) = self._num_visible(), self._bank()

        def copy(buffer: Tensor) -> Tensor:
            used = buffer[:, :, : num_visible + bank_end - bank]
            target = torch.empty_like(used, device=device)
            _copy_layers(buffer[:, :, :num_visible], target[:, :, :num_visible])
            _copy_layers(buffer[:, :, bank:bank_end], target[:, :, num_visible:])
            return target

        return CacheState(
            copy(self.k),
            copy(self.v),
            self.start_frame,
            self.end_frame,
            self.capacity,
            self.sink,
            self.base,
            None if self.k_scale is None else copy(self.k_scale),
            None if self.v_scale is None else copy(self.v_scale),
            self.sink_start,
            self.jump,
            tuple(self.slot_frames[: num_visible // self.tokens_per_frame]),
            tuple(self.slot_positions[: num_visible // self.tokens_per_frame]),
            self.policy.memory_text,
            {} if self.memory is None else {name: x.to(device, copy=True) for name, x in self.memory.state().items()},
        )

    def restore(self, state: CacheState) -> None:
        """Hold again what was copied, also of a cache of another number type.

        Raises ValueError if the state is of another network, size, window or sink.
        """
        # Before the first eviction every frame lies in the slot of its own number, whatever window and sink are, so
        # that only what comes later depends on them.
        is_moved = (
            bool(state.memory or state.jump)
            or (state.base, state.sink_start) != (state.sink, 0)
            or state.end_frame > min(state.capacity, self.capacity)
        )
        if is_moved and state.policy != self.policy.memory_text:
            raise ValueError(
                f"the saved cache follows policy {state.policy}, this one {self.policy.memory_text}; resume with the "
                "policy and the settings it was saved with"
            )
        if is_moved and (state.capacity, state.sink) != (self.capacity, self.sink):
            raise ValueError(
                f"the saved cache has window {state.capacity} and sink {state.sink}, this one {self.capacity} and "
                f"{self.sink}; resume with the window and sink it was saved with"
            )
        num_tokens = state.k.shape[2] if is_moved else min(state.end_frame, self.capacity) * self.tokens_per_frame
        # behind the frames that came in turn, those of a bank
        num_banked = max(0, num_tokens - len(state.slot_frames) * self.tokens_per_frame) if state.slot_frames else 0
        num_tokens -= num_banked
        target = self.k[:, :, : num_tokens + num_banked]
        if target.shape != state.k.shape:
            raise ValueError(
                f"the saved cache has keys of shape {tuple(state.k.shape)}, this one {tuple(target.shape)}; resume "
                "with the model, size and batch it was saved with"
            )
        self.reset()
        bank, end = self.capacity * self.tokens_per_frame, num_tokens + num_banked
        pairs = (self.k, self.k_scale, state.k, state.k_scale), (self.v, self.v_scale, state.v, state.v_scale)
        for first, used in ((0, slice(0, num_tokens)), (bank, slice(num_tokens, end))):
            for buffer, scales, saved, saved_scales in pairs:
                self._put_back(
                    buffer[:, :, first:],
                    None if scales is None else scales[:, :, first:],
                    saved[:, :, used],
                    None if saved_scales is None else saved_scales[:, :, used],
                )
        self.start_frame, self.end_frame = state.start_frame, state.end_frame
        self.base = state.base if is_moved else self.head
        self.sink_start, self.jump = state.sink_start, state.jump
        num_frames = num_tokens // self.tokens_per_frame
        if state.slot_frames:
            self.slot_frames[:num_frames] = state.slot_frames[:num_frames]
            self.slot_positions[:num_frames] = state.slot_positions[:num_frames]
        else:  # an older file, of a time when no frame stood anywhere but at its own number
            oldest = max(self.base, self.end_frame - (self.capacity - self.head))
            for frame in (*range(min(self.head, self.end_frame)), *range(oldest, self.end_frame)):
                self.slot_frames[self.slot_of(frame)] = frame
                self.slot_positions[self.slot_of(frame)] = frame
        if self.memory is not None:
            self.memory.restore({name: x.to(self.k.device, copy=True) for name, x in state.memory.items()})
        self._place(self._slots_of_staged())
        self._aim(self._pieces(state.start_frame, state.end_frame - state.start_frame))

    def stage(self, start_frame: int, num_frames: int, *, writes: bool = True) -> None:
        """Declare the frames that the next forward pass evaluates: the staged ones again, or those that follow.

        writes: put their keys and values into the cache; else the pass only reads the past, may carry gradient, and
        leaves nothing behind, so that a pass that writes has to follow. Under a policy of joint passes it may stand
        over frames of several chunks, none of which is staged by that.
        """
        if self.policy.is_joint and not writes:
            self._look(start_frame, num_frames)
            return
        # a longer chunk would come round the ring and overwrite its own beginning
        most = self.capacity - (self.head if start_frame > self.sink_start else 0)
        assert num_frames <= most, f"{num_frames} frames do not fit a ring of {self.capacity}"
        is_again = (start_frame, start_frame + num_frames) == (self.start_frame, self.end_frame)
        # behind the sink, frames may be left out after `restart`
        is_ring_empty = self.end_frame == self.sink_start + self.head
        follows = start_frame == (self.base if is_ring_empty else self.end_frame)
        assert is_again or follows, f"frame {start_frame} does not follow {self.end_frame}"
        self.writes = self.keeps_text = writes
        if not is_again:
            self._advance(start_frame, num_frames)
            self._aim(self._pieces(start_frame, num_frames))
        if self.memory is not None:
            self.memory.begin_pass()

    def _look(self, start_frame: int, num_frames: int) -> None:
        """Let a pass stand behind the latest chunk: it sees sink and last frames, of a window its own ones included."""
        assert start_frame == self.end_frame, f"frame {start_frame} does not follow {self.end_frame}"
        self.writes, self.keeps_text, self.looks_at = False, True, start_frame
        self._staged, self._hidden = [], []
        if self.keeps_all:
            return
        room = self.capacity - 2 * self.sink - num_frames  # the capacity is a window and the sink once more
        assert room >= 0, f"{num_frames} frames and the sink do not fit a window of {self.capacity - self.sink}"
        oldest = max(self.base, start_frame - (self.capacity - self.head))
        first = max(self.base, start_frame - room)
        assert isinstance(self.memory, PulledSink)
        self.memory.move(first - self.sink)
        self._hidden = self._pieces(oldest, first - oldest)

    @property
    def position(self) -> int:
        """Return where the first staged frame stands on the time axis."""
        if self.looks_at is not None:
            return self.looks_at
        return self.start_frame + int(self.jump + self.offset) + self.lead

    def _advance(self, start_frame: int, num_frames: int) -> None:
        """Move on to a new chunk: the one before is final, and what it overwrites goes to the policy's memory."""
        self._settle()
        end_frame = start_frame + num_frames
        frames = range(start_frame, end_frame)
        slots = [*map(self.slot_of, frames)] if self.memory is None else self.memory.place(frames)
        evicted = sorted((self.slot_frames[slot], slot) for slot in slots if self.slot_frames[slot] >= 0)
        window_start = max(self.base, end_frame - (self.capacity - self.head))
        if self.memory is not None:
            self.memory.advance([(frame, slot) for frame, slot in evicted], window_start)
        self.start_frame, self.end_frame, self.jump = start_frame, end_frame, 0.0
        self.looks_at = None
        if self.policy.is_joint and not self.keeps_all:
            # a chunk that is written sees the last frames as they came, of which the sink's are some at first
            num_hidden = min(max(0, end_frame - self.sink_start - (self.capacity - self.sink)), self.sink)
            self._hidden = [(0, 0, num_hidden * self.tokens_per_frame)]
        for frame, slot in zip(frames, slots):
            self.slot_frames[slot] = frame
        if self.next_jump_to is not None:
            first = self.slot_positions[0] if self.head and self.slot_frames[0] != start_frame else window_start
            self.jump, self.next_jump_to = self.next_jump_to - (start_frame - first), None
        self._place(slots)

    def _place(self, slots: Sequence[int]) -> None:
        """Say where the staged chunk stands, which lies in these slots."""
        self.offset = 0.0 if self.memory is None else self.memory.offset(self.start_frame)
        for frame, slot in zip(range(self.start_frame, self.end_frame), slots):
            self.slot_positions[slot] = frame + self.offset + self.jump
        # Behind a flush Infinity-RoPE's public code has queries at the end of a window that is not full yet.
        is_flushed = self.policy.is_rebased and self.base > self.sink_start + self.head and not self.jump
        missing = self.capacity - self._num_visible() // self.tokens_per_frame
        self.lead = missing if self.policy.is_published and is_flushed else 0

    def _is_chosen(self, start_frame: int) -> bool:
        return self.memory is not None and self.memory.is_chosen(start_frame)

    def _slots_of_staged(self) -> list[int]:
        """Return where the staged chunk lies; an empty list where the device chose."""
        frames = range(self.start_frame, self.end_frame)
        return [] if self._is_chosen(self.start_frame) else [self.slot_of(frame) for frame in frames]

    def _settle(self) -> None:
        """Turn a chunk that jumped back to its own number, since later chunks follow it there."""
        for frame in range(self.start_frame, self.end_frame) if self.jump else ():
            slot = self.slot_of(frame)
            k, _ = self.read_slots(slot, 1)
            k = apply_rotary(k, time_turn(self.head_dim, -self.jump, k.device, self.axes))
            self.write_slots(slot, k, None, [float(frame)])
        self.jump = 0.0

    def table(self, position: int) -> Tensor:
        """Return the turns of one frame's tokens at a position, [S, 1, K/2]."""
        return rotary_table(self.head_dim, position, 1, *self.grid, self.k.device, axes=self.axes)

    def read_slots(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of neighbouring slots, [layers, B, S, N, K] in float32 at least."""
        tokens = slice(slot * self.tokens_per_frame, (slot + count) * self.tokens_per_frame)
        wide = torch.float64 if self.k.dtype == torch.float64 else torch.float32
        like = torch.empty(0, device=self.k.device, dtype=wide)
        k, v = (
            dequantise(buffer[:, :, tokens], None if scale is None else scale[:, :, tokens], like)
            for buffer, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        return (k.clone(), v.clone()) if k.dtype == self.k.dtype else (k, v)

    def write_slots(
        self, slot: int, k: Tensor, v: Tensor | None, positions: Sequence[float], *, frame: int | None = None
    ) -> None:
        """Put keys and values, [layers, B, S, N, K], into neighbouring slots, one for each position.

        v: None leaves the values. frame: what the slots show from now on; None leaves that too.
        """
        tokens = slice(slot * self.tokens_per_frame, (slot + len(positions)) * self.tokens_per_frame)
        for new, buffer, scale in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if new is None:
                continue
            if scale is None:
                buffer[:, :, tokens] = new.to(buffer.dtype)
            else:
                buffer[:, :, tokens], scale[:, :, tokens] = quantise(new, buffer.dtype)
        self.slot_positions[slot : slot + len(positions)] = positions
        if frame is not None:
            self.slot_frames[slot : slot + len(positions)] = [frame] * len(positions)

    def _aim(self, pieces: list[tuple[int, int, int]]) -> None:
        """Make views of every layer's slots for the staged chunk and of all that is visible.

        Once for all of its passes: a few hundred views a pass would cost more than the copies through them.
        """
        self._staged = pieces
        buffers = (self.k, self.v, self.k_scale, self.v_scale)
        self._slots = tuple([] if buffer is None else _slots(buffer, pieces) for buffer in buffers)
        self._mask = None
        num_visible, (bank, bank_end) = self._num_visible(), self._bank()
        # until the ring is full, what lies between it and the bank is not there yet
        self._is_split = num_visible < bank < bank_end
        if num_visible == bank:
            num_visible = bank_end
        visible = slice(self._hidden[0][2] if self._hidden else 0, num_visible)
        self._views = self.k[:, :, visible].unbind(), self.v[:, :, visible].unbind()

    def update(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the staged chunk's keys and values; return all visible ones, [B, S, N, K].

        They come back in the type and on the device of the new ones, which need not be those of the buffers.

        In a pass that does not write, and in a cache of another type, the past is joined with the new tensors
        themselves, so that a chunk sees the same with gradient and without.
        """
        if self.writes:
            self.write(layer, k_BLNK, v_BLNK)
        if not self.writes or self._is_split or self.converts(k_BLNK):
            return self.past(layer)(k_BLNK, v_BLNK)
        return self._views[0][layer].to(k_BLNK), self._views[1][layer].to(v_BLNK)

    def write(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> None:
        """Put the staged chunk's keys and values in their slots."""
        # a gradient that went on through the buffer would reach the next chunk's loss, and keep this one's graph alive
        assert not k_BLNK.requires_grad, "a pass that writes carries no gradient"
        if self.memory is not None and self.memory.write(layer, k_BLNK, v_BLNK):
            return
        k_slots, v_slots, k_scales, v_scales = self._slots
        self._put(layer, k_slots, k_scales, k_BLNK)
        self._put(layer, v_slots, v_scales, v_BLNK)

    def own_keys(self, k_BLNK: Tensor) -> Tensor:
        """Return the staged chunk's keys, which were turned as its queries, at the place where they stand."""
        if not self.lead:
            return k_BLNK
        return apply_rotary(k_BLNK, time_turn(self.head_dim, -self.lead, k_BLNK.device, self.axes))

    def _put(self, layer: int, slots: Slots, scales: Slots, new_BLNK: Tensor) -> None:
        if scales:
            new_BLNK, scale = quantise(new_BLNK, self.k.dtype)
            _fill(layer, scales, scale)
        _fill(layer, slots, new_BLNK)

    @staticmethod
    def _put_back(buffer: Tensor, scales: Tensor | None, saved: Tensor, saved_scales: Tensor | None) -> None:
        """Copy saved numbers into the first slots: as they are if the types agree, else converted layer by layer."""
        used = saved.shape[2]
        if buffer.dtype == saved.dtype and (scales is None) == (saved_scales is None):
            _copy_layers(saved, buffer[:, :, :used])
            if scales is not None and saved_scales is not None:
                _copy_layers(saved_scales, scales[:, :, :used])
            return
        # one layer at a time, so that no wide copy of the whole cache is ever there
        like = torch.empty(0, device=buffer.device, dtype=torch.float32)
        for layer in range(saved.shape[0]):
            wide = dequantise(saved[layer], None if saved_scales is None else saved_scales[layer], like)
            if scales is None:
                buffer[layer, :, :used] = wide
            else:
                buffer[layer, :, :used], scales[layer, :, :used] = quantise(wide, buffer.dtype)

    def past(self, layer: int) -> Past:
        """Return what the staged chunk sees besides itself, to be joined with its own keys and values.

        Nothing is copied before that: it may be joined again later, as long as no frame has been evicted.
        """
        k_scale = None if self.k_scale is None else self.k_scale[layer]
        v_scale = None if self.v_scale is None else self.v_scale[layer]
        chosen = None if self.memory is None else self.memory.slot_in(layer)
        return Past(
            self.k[layer],
            self.v[layer],
            k_scale,
            v_scale,
            (*self._staged, *self._hidden),
            self._num_visible(),
            self._bank(),
            None if chosen is None else (chosen, self.tokens_per_frame),
        )

    def mask(self, like: Tensor) -> Tensor | None:
        """Return what is added to the scores of the visible tokens, [1, S] in the type and on the device of `like`.

        None where nothing is. Tokens are in the order of `update`.
        """
        if self.bias == 1:
            return None
        if self._mask is None or self._mask.dtype != like.dtype:
            num_visible, own = self._num_visible(), sum(length for _, _, length in self._staged)
            self._mask = like.new_zeros(1, num_visible)
            # a factor on a weight is a summand in the exponent
            self._mask[:, self.tokens_per_frame : num_visible - own] = math.log(self.bias)
        return self._mask

    def cross_kv(self, layer: int, compute: Callable[[], Any]) -> Any:
        """Return a layer's keys and values of the prompt: kept from first use on, afresh in a pass that only reads."""
        if not self.keeps_text:  # gradient has to reach the weights that make them
            return compute()
        if layer not in self.cross:
            self.cross[layer] = compute()
            if self.memory is not None:
                self.memory.read_text(layer, self.cross[layer][0][0])
        return self.cross[layer]

    def has_cross(self) -> bool:
        """Return whether the staged pass finds the prompt in the cache, and need not embed it."""
        return len(self.cross) == self.k.shape[0] and self.keeps_text

    def frames(self) -> tuple[int, ...]:
        """Return the absolute numbers of the visible frames, those of memory slots as -2, oldest first."""
        return tuple(sorted(self.slot_frames[slot] for slot in range(self._num_visible() // self.tokens_per_frame)))

    def _num_visible(self) -> int:
        """Return how many tokens are in use."""
        head_end = self.sink_start + self.head
        frames = (
            self.end_frame - self.sink_start if self.end_frame <= head_end else self.head + self.end_frame - self.base
        )
        return min(frames, self.capacity) * self.tokens_per_frame

    def _bank(self) -> tuple[int, int]:
        """Return where frames of earlier times lie, in tokens."""
        count = 0 if self.memory is None else self.memory.num_banked
        return self.capacity * self.tokens_per_frame, (self.capacity + count) * self.tokens_per_frame

    def slot_of(self, frame: int) -> int:
        """Return the slot of a frame that is visible or comes next."""
        # no frame ever moves: the one that comes next takes the slot of the one that leaves
        if frame < self.sink_start + self.head:
            return frame - self.sink_start
        if self.memory is not None and self.memory.is_placing:
            return self.slot_frames.index(frame)
        return self.head + (frame - self.base) % (self.capacity - self.head)

    def _pieces(self, start_frame: int, num_frames: int) -> list[tuple[int, int, int]]:
        """Return contiguous runs of slots: offset in the chunk, offset in the buffer, and length, in tokens."""
        runs: list[tuple[int, int, int]] = []
        for offset in range(0 if self._is_chosen(start_frame) else num_frames):
            slot = self.slot_of(start_frame + offset)
            if runs and runs[-1][1] + runs[-1][2] == slot:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((offset, slot, 1))
        return [tuple(frames * self.tokens_per_frame for frames in run) for run in runs]  # type: ignore[misc]


def _slots(buffer: Tensor, pieces: list[tuple[int, int, int]]) -> Slots:
    return [(offset, length, buffer[:, :, slot : slot + length].unbind()) for offset, slot, length in pieces]


def _copy_layers(source: Tensor, target: Tensor) -> None:
    """Copy layer by layer: between devices, what is not contiguous is first copied on its own device, as a whole."""
    for source_layer, target_layer in zip(source, target):
        target_layer.copy_(source_layer)


def _fill(layer: int, slots: Slots, new_BLNK: Tensor) -> None:
    for offset, length, layers in slots:
        layers[layer].copy_(new_BLNK if len(slots) == 1 else new_BLNK[:, offset : offset + length])
