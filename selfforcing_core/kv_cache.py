"""The ring of keys and values that makes a bidirectional chunk model causal.

One preallocated buffer per rollout holds `capacity` latent frames: the first `sink` frames of the video for ever, and
behind them a ring that new frames overwrite, so that nothing is copied at eviction. All cursors are host integers.

In 8 bits (int8 or float8_e4m3fn) each token's keys and values have one scale per head. Where the type of the buffers is
not that of the computation, what a chunk sees of itself is exact; and on CPUs, without gradient, attention reads the
past segment by segment, so that only one segment at a time exists in the wider type (elsewhere one layer).

Letters: B batch, L tokens of the staged chunk, S visible tokens, P tokens per frame, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import WanConfig

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # largest number of each type that is stored with scales
SCALE_DTYPE = torch.bfloat16  # numbers are divided by the scale as stored, so its own rounding is no error


def quantise(x_BLNK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of one of the types of LARGEST and their scales [B, L, N, 1]: the largest of each token and head."""
    wide = x_BLNK.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST[dtype]).clamp_min(torch.finfo(SCALE_DTYPE).tiny)
    scale = scale.to(SCALE_DTYPE)
    scaled = (wide / scale).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (scaled if dtype.is_floating_point else scaled.round_()).to(dtype), scale


def dequantise(stored_BSNK: Tensor, scale_BSN1: Tensor | None, like: Tensor) -> Tensor:
    """In the type and on the device of `like`; without a scale, only that."""
    if scale_BSN1 is None:
        return stored_BSNK.to(like)
    return stored_BSNK.to(like.device).to(like.dtype).mul_(scale_BSN1.to(like))


# per contiguous run of the staged chunk: offset in it, length, and every layer's view of the slots
Slots = list[tuple[int, int, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class CacheState:
    """A copy of what a cache holds after a chunk: k, v [layers, B, S, N, K] of its used slots, in slot order.

    k_scale, v_scale [layers, B, S, N, 1]: their scales, where the cache is of 8 bits.
    """

    k: Tensor
    v: Tensor
    start_frame: int
    end_frame: int
    capacity: int
    sink: int
    base: int
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """Views of one layer's buffers, and where in them the staged chunk has its place: (offset in it, slot, length)."""

    k_BSNK: Tensor
    v_BSNK: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    staged: tuple[tuple[int, int, int], ...]
    visible: int

    def __call__(self, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor]:
        """Visible keys and values without the staged chunk's own slots and without gradient, then the new ones."""
        return self._joined(self.k_BSNK, self.k_scale, k_BLNK), self._joined(self.v_BSNK, self.v_scale, v_BLNK)

    def segments(
        self, k_BLNK: Tensor, v_BLNK: Tensor, *, num_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same piece by piece: the new ones, then at most `num_tokens` at a time (default: as many as are new).

        Each piece is made when it is asked for; let go of it before asking for the next.
        """
        yield k_BLNK, v_BLNK
        step = k_BLNK.shape[1] if num_tokens is None else num_tokens
        for start, end in self._runs():
            for first in range(start, end, step):
                piece = slice(first, min(first + step, end))
                yield (
                    self._piece(self.k_BSNK, self.k_scale, piece, k_BLNK),
                    self._piece(self.v_BSNK, self.v_scale, piece, v_BLNK),
                )

    def _runs(self) -> list[tuple[int, int]]:
        """Where the buffers hold something other than the staged chunk: (first token, end)."""
        edge, runs = 0, []
        for _, slot, length in sorted(self.staged, key=lambda piece: piece[1]):
            runs.append((edge, slot))
            edge = slot + length
        return [(start, end) for start, end in [*runs, (edge, self.visible)] if start < end]

    def _joined(self, buffer: Tensor, scale: Tensor | None, new_BLNK: Tensor) -> Tensor:
        parts = [self._piece(buffer, scale, slice(*run), new_BLNK) for run in self._runs()]
        return torch.cat([*parts, new_BLNK], 1)

    @staticmethod
    def _piece(buffer: Tensor, scale: Tensor | None, tokens: slice, like: Tensor) -> Tensor:
        part = buffer[:, tokens].detach()
        return dequantise(part, None if scale is None else scale[:, tokens].detach(), like.detach())


class KVCache:
    """Keys (already turned by their absolute position) and values of the frames a chunk may see.

    Use: `stage` the frames a forward pass evaluates, `update` once per layer. Staging the same frames again
    overwrites them in place (later denoising steps, the clean pass); staging the next frames moves on.

    dtype: any floating-point type, or int8; for the types of LARGEST the scales lie in k_scale and v_scale. Where it
    `converts`, `write` and the segments of `past` take the place of `update`, which would copy all that is visible.
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
    ) -> None:
        assert 0 <= sink < capacity, f"sink {sink} leaves no room in a cache of {capacity} frames"
        self.tokens_per_frame, self.capacity, self.sink = tokens_per_frame, capacity, sink
        self.keeps_all = False  # set by who knows that the video is no longer than the capacity
        # each head's tokens lie together, the order in which attention reads them
        shape = (config.num_layers, batch, config.num_heads, capacity * tokens_per_frame, config.head_dim)
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
        """Exactly what the buffers of such a cache will take, scales included."""
        per_token = config.dim * dtype.itemsize + (config.num_heads * SCALE_DTYPE.itemsize if dtype in LARGEST else 0)
        return 2 * config.num_layers * batch * capacity * tokens_per_frame * per_token

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    def converts(self, like: Tensor) -> bool:
        """Whether keys and values of this type are stored in another one."""
        return self.k.dtype != like.dtype

    def reset(self) -> None:
        """Empty the cache; the next staged frame is frame 0. Nothing is freed or cleared."""
        self.start_frame = self.end_frame = 0
        self.base = self.sink  # the first frame behind the sink; later than that after `restart`
        self.cross: dict[int, Any] = {}
        self._aim([])

    def restart(self, base: int) -> None:
        """Empty the cache; behind the frames of the sink, the next one staged is frame `base`."""
        self.reset()
        self.base = max(base, self.sink)

    def snapshot(self, device: torch.device | None = None) -> CacheState:
        """Copy what the cache holds, to this device or where it lies. The text's keys and values are not part of it."""
        used = self._visible()

        def copy(buffer: Tensor) -> Tensor:
            made = torch.empty_like(buffer[:, :, :used], device=device)
            _copy_layers(buffer[:, :, :used], made)
            return made

        return CacheState(
            copy(self.k), copy(self.v), self.start_frame, self.end_frame, self.capacity, self.sink, self.base,
            None if self.k_scale is None else copy(self.k_scale), None if self.v_scale is None else copy(self.v_scale),
        )  # fmt: skip

    def restore(self, state: CacheState) -> None:
        """Hold again what was copied, also of a cache of another number type.

        Raises ValueError if the state is of another network, size, window or sink.
        """
        # before the first eviction, every frame is in its slot
        is_moved = state.base != state.sink or state.end_frame > min(state.capacity, self.capacity)
        if is_moved and (state.capacity, state.sink) != (self.capacity, self.sink):
            raise ValueError(
                f"the saved cache has window {state.capacity} and sink {state.sink}, this one {self.capacity} and "
                f"{self.sink}; resume with the window and sink it was saved with"
            )
        used = state.k.shape[2] if is_moved else min(state.end_frame, self.capacity) * self.tokens_per_frame
        target = self.k[:, :, :used]
        if target.shape != state.k.shape:
            raise ValueError(
                f"the saved cache has keys of shape {tuple(state.k.shape)}, this one {tuple(target.shape)}; resume "
                "with the model, size and batch it was saved with"
            )
        self.reset()
        self._put_back(self.k, self.k_scale, state.k, state.k_scale)
        self._put_back(self.v, self.v_scale, state.v, state.v_scale)
        self.start_frame, self.end_frame = state.start_frame, state.end_frame
        self.base = state.base if is_moved else self.sink
        self._aim(self._pieces(state.start_frame, state.end_frame - state.start_frame))

    def stage(self, start_frame: int, num_frames: int) -> None:
        """Declare the frames that the next forward pass evaluates: the staged ones again, or those that follow."""
        assert num_frames <= self.capacity - self.sink, f"{num_frames} frames do not fit a ring of {self.capacity}"
        again = (start_frame, start_frame + num_frames) == (self.start_frame, self.end_frame)
        follows = start_frame == (self.base if self.end_frame == self.sink else self.end_frame)
        assert again or follows, f"frame {start_frame} does not follow {self.end_frame}"
        if not again:
            self.start_frame, self.end_frame = start_frame, start_frame + num_frames
            self._aim(self._pieces(start_frame, num_frames))

    def _aim(self, pieces: list[tuple[int, int, int]]) -> None:
        """Views of every layer's slots for the staged chunk and of all that is visible, for all of its passes."""
        self._current = pieces
        buffers = (self.k, self.v, self.k_scale, self.v_scale)
        self._slots = tuple(
            [] if buffer is None else [
                (source, length, buffer[:, :, slot : slot + length].unbind()) for source, slot, length in pieces
            ] for buffer in buffers
        )  # fmt: skip
        visible = self._visible()
        self._seen = self.k[:, :, :visible].unbind(), self.v[:, :, :visible].unbind()

    def update(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the staged chunk's keys and values; return all visible ones [B, S, N, K] in slot order.

        They come back in the type and on the device of the new ones, which need not be those of the buffers.

        With gradients enabled nothing is written: the past is returned detached, joined with the new tensors, so
        gradient stays inside the chunk. The clean pass that follows writes. A cache of another type joins them in the
        same way, so that a chunk sees the same with gradients and without.
        """
        if torch.is_grad_enabled():
            return self.past(layer)(k_BLNK, v_BLNK)
        self.write(layer, k_BLNK, v_BLNK)
        if self.converts(k_BLNK):
            return self.past(layer)(k_BLNK, v_BLNK)
        return self._seen[0][layer].to(k_BLNK), self._seen[1][layer].to(v_BLNK)

    def write(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> None:
        """Put the staged chunk's keys and values in their slots."""
        k_slots, v_slots, k_scales, v_scales = self._slots
        self._put(layer, k_slots, k_scales, k_BLNK)
        self._put(layer, v_slots, v_scales, v_BLNK)

    def _put(self, layer: int, slots: Slots, scales: Slots, new_BLNK: Tensor) -> None:
        if scales:
            new_BLNK, scale = quantise(new_BLNK, self.k.dtype)
            _fill(layer, scales, scale)
        _fill(layer, slots, new_BLNK)

    @staticmethod
    def _put_back(buffer: Tensor, scales: Tensor | None, saved: Tensor, saved_scales: Tensor | None) -> None:
        """Saved numbers [layers, B, S, N, K] into the first slots: as they are if the types agree, else converted."""
        used = saved.shape[2]
        if buffer.dtype == saved.dtype and (scales is None) == (saved_scales is None):
            _copy_layers(saved, buffer[:, :, :used])
            if scales is not None and saved_scales is not None:
                _copy_layers(saved_scales, scales[:, :, :used])
            return
        like = torch.empty(0, device=buffer.device, dtype=torch.float32)
        for layer in range(saved.shape[0]):
            wide = dequantise(saved[layer], None if saved_scales is None else saved_scales[layer], like)
            if scales is None:
                buffer[layer, :, :used] = wide
            else:
                buffer[layer, :, :used], scales[layer, :, :used] = quantise(wide, buffer.dtype)

    def past(self, layer: int) -> Past:
        """What the staged chunk sees besides itself, to be joined with its own keys and values.

        Nothing is copied before that: it may be joined again later, as long as no frame has been evicted.
        """
        k_scale = None if self.k_scale is None else self.k_scale[layer]
        v_scale = None if self.v_scale is None else self.v_scale[layer]
        return Past(self.k[layer], self.v[layer], k_scale, v_scale, tuple(self._current), self._visible())

    def cross_kv(self, layer: int, compute: Callable[[], Any]) -> Any:
        """Cross-attention keys and values of a layer: computed at first use, afresh whenever gradients are enabled."""
        if torch.is_grad_enabled():
            return compute()
        if layer not in self.cross:
            self.cross[layer] = compute()
        return self.cross[layer]

    def has_cross(self) -> bool:
        """Whether the text is already in the cache, so that a forward pass need not embed it."""
        return len(self.cross) == self.k.shape[0] and not torch.is_grad_enabled()

    def frames(self) -> tuple[int, ...]:
        """Absolute numbers of the visible frames, oldest first."""
        if self.end_frame <= self.sink:
            return tuple(range(self.end_frame))
        oldest = max(self.base, self.end_frame - (self.capacity - self.sink))
        return tuple(range(self.sink)) + tuple(range(oldest, self.end_frame))

    def ordered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of one layer's visible keys and values in the order of `frames`, for inspection; 8 bits as float32."""
        slots = torch.tensor([self._slot(frame) for frame in self.frames()], dtype=torch.long)
        tokens = (slots[:, None] * self.tokens_per_frame + torch.arange(self.tokens_per_frame)).flatten()
        tokens = tokens.to(self.k.device)
        past = self.past(layer)
        pairs = ((past.k_BSNK, past.k_scale), (past.v_BSNK, past.v_scale))
        k, v = (_ordered(stored, scale, tokens) for stored, scale in pairs)
        return k, v

    def _visible(self) -> int:
        """Tokens that are in use."""
        frames = self.end_frame if self.end_frame <= self.sink else self.sink + self.end_frame - self.base
        return min(frames, self.capacity) * self.tokens_per_frame

    def _slot(self, frame: int) -> int:
        return frame if frame < self.sink else self.sink + (frame - self.base) % (self.capacity - self.sink)

    def _pieces(self, start_frame: int, num_frames: int) -> list[tuple[int, int, int]]:
        """(offset in the chunk, offset in the buffer, length) in tokens; contiguous runs of slots."""
        runs: list[tuple[int, int, int]] = []
        for offset in range(num_frames):
            slot = self._slot(start_frame + offset)
            if runs and runs[-1][1] + runs[-1][2] == slot:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((offset, slot, 1))
        p = self.tokens_per_frame
        return [(source * p, slot * p, length * p) for source, slot, length in runs]


def _copy_layers(source: Tensor, target: Tensor) -> None:
    """One by one: between devices, what is not contiguous is copied on its own device first."""
    for one, other in zip(source, target):
        other.copy_(one)


def _fill(layer: int, slots: Slots, new_BLNK: Tensor) -> None:
    for source, length, layers in slots:
        layers[layer].copy_(new_BLNK if len(slots) == 1 else new_BLNK[:, source : source + length])


def _ordered(stored_BSNK: Tensor, scale: Tensor | None, tokens: Tensor) -> Tensor:
    chosen = stored_BSNK.index_select(1, tokens)
    if scale is None:
        return chosen
    return dequantise(chosen, scale.index_select(1, tokens), torch.empty(0, device=chosen.device))
