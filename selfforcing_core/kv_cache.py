"""The ring of keys and values that makes a bidirectional chunk model causal.

One preallocated buffer per rollout holds `capacity` latent frames: the first `sink` frames of the video for ever, and
behind them a ring that new frames overwrite, so that nothing is copied at eviction. All cursors are host integers.

Letters: B batch, L tokens of the staged chunk, S visible tokens, P tokens per frame, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import WanConfig


@dataclass(frozen=True)
class CacheState:
    """A copy of what a cache holds after a chunk: k, v [layers, B, S, N, K] of its used slots, in slot order."""

    k: Tensor
    v: Tensor
    start_frame: int
    end_frame: int
    capacity: int
    sink: int
    base: int


@dataclass(frozen=True)
class Past:
    """Views of one layer's buffers, and where in them the staged chunk has its place: (offset in it, slot, length)."""

    k_BSNK: Tensor
    v_BSNK: Tensor
    staged: tuple[tuple[int, int, int], ...]
    visible: int

    def __call__(self, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor]:
        """Visible keys and values without the staged chunk's own slots and without gradient, then the new ones."""
        return self._joined(self.k_BSNK, k_BLNK), self._joined(self.v_BSNK, v_BLNK)

    def _joined(self, buffer: Tensor, new_BLNK: Tensor) -> Tensor:
        edges, parts = 0, []
        for _, slot, length in sorted(self.staged, key=lambda piece: piece[1]):
            parts.append(buffer[:, edges:slot])
            edges = slot + length
        parts.append(buffer[:, edges : self.visible])
        return torch.cat([part.detach().to(new_BLNK) for part in parts if part.shape[1]] + [new_BLNK], 1)


class KVCache:
    """Keys (already turned by their absolute position) and values of the frames a chunk may see.

    Use: `stage` the frames a forward pass evaluates, `update` once per layer. Staging the same frames again
    overwrites them in place (later denoising steps, the clean pass); staging the next frames moves on.
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
        self.reset()

    @staticmethod
    def num_bytes(config: WanConfig, *, batch: int, tokens_per_frame: int, capacity: int, dtype: torch.dtype) -> int:
        """Exactly what the buffers of such a cache will take."""
        return 2 * config.num_layers * batch * capacity * tokens_per_frame * config.dim * dtype.itemsize

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    def reset(self) -> None:
        """Empty the cache; the next staged frame is frame 0. Nothing is freed or cleared."""
        self.start_frame = self.end_frame = 0
        self.base = self.sink  # the first frame behind the sink; later than that after `restart`
        self.cross: dict[int, Any] = {}
        self._current: list[tuple[int, int, int]] = []

    def restart(self, base: int) -> None:
        """Empty the cache; behind the frames of the sink, the next one staged is frame `base`."""
        self.reset()
        self.base = max(base, self.sink)

    def snapshot(self) -> CacheState:
        """Copy what the cache holds, in the memory where it lies. The text's keys and values are not part of it."""
        used = self._visible()
        return CacheState(
            self.k[:, :, :used].clone(), self.v[:, :, :used].clone(),
            self.start_frame, self.end_frame, self.capacity, self.sink, self.base,
        )  # fmt: skip

    def restore(self, state: CacheState) -> None:
        """Hold again what was copied. Raises ValueError if the state is of another network, size, window or sink."""
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
        self.k[:, :, :used] = state.k
        self.v[:, :, :used] = state.v
        self.start_frame, self.end_frame = state.start_frame, state.end_frame
        self.base = state.base if is_moved else self.sink
        self._current = self._pieces(state.start_frame, state.end_frame - state.start_frame)

    def stage(self, start_frame: int, num_frames: int) -> None:
        """Declare the frames that the next forward pass evaluates: the staged ones again, or those that follow."""
        assert num_frames <= self.capacity - self.sink, f"{num_frames} frames do not fit a ring of {self.capacity}"
        again = (start_frame, start_frame + num_frames) == (self.start_frame, self.end_frame)
        follows = start_frame == (self.base if self.end_frame == self.sink else self.end_frame)
        assert again or follows, f"frame {start_frame} does not follow {self.end_frame}"
        self.start_frame, self.end_frame = start_frame, start_frame + num_frames
        self._current = self._pieces(start_frame, num_frames)

    def update(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the staged chunk's keys and values; return all visible ones [B, S, N, K] in slot order.

        They come back in the type and on the device of the new ones, which need not be those of the buffers.

        With gradients enabled nothing is written: the past is returned detached, joined with the new tensors, so
        gradient stays inside the chunk. The clean pass that follows writes.
        """
        if torch.is_grad_enabled():
            return self.past(layer)(k_BLNK, v_BLNK)
        for source, slot, length in self._current:
            self.k[layer][:, slot : slot + length] = k_BLNK[:, source : source + length]
            self.v[layer][:, slot : slot + length] = v_BLNK[:, source : source + length]
        visible = self._visible()
        return self.k[layer][:, :visible].to(k_BLNK), self.v[layer][:, :visible].to(v_BLNK)

    def past(self, layer: int) -> Past:
        """What the staged chunk sees besides itself, to be joined with its own keys and values.

        Nothing is copied before that: it may be joined again later, as long as no frame has been evicted.
        """
        return Past(self.k[layer], self.v[layer], tuple(self._current), self._visible())

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
        """Copies of one layer's visible keys and values in the order of `frames`, for inspection."""
        slots = torch.tensor([self._slot(frame) for frame in self.frames()], dtype=torch.long)
        tokens = (slots[:, None] * self.tokens_per_frame + torch.arange(self.tokens_per_frame)).flatten()
        tokens = tokens.to(self.k.device)
        return self.k[layer].index_select(1, tokens), self.v[layer].index_select(1, tokens)

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
