"""Where the Gaussian noise of a rollout comes from.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .prompt_schedule import seed_at

CONTEXT = -1  # the `step` under which a noise source is asked for context noise


class NoiseSource(Protocol):
    """What draws all Gaussian noise of a rollout."""

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Return noise [B, T, C, H, W] for the chunk at `start_frame`: before evaluation `step`, or CONTEXT."""
        ...


class SeededNoise:
    """Noise that depends on seed, batch row, chunk and step alone, drawn on the CPU in float32.

    Neither the device nor the batch size nor what was generated before changes a row's video. first_frame: where in
    the whole video frame 0 of the rollout lies, so that a rollout over its later part repeats no noise of the earlier.
    """

    def __init__(self, seed: int, first_row: int = 0, first_frame: int = 0) -> None:
        self.seed, self.first_row, self.first_frame = seed, first_row, first_frame

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Return noise of this shape, each row from its own seed."""
        # rows by number: a batch split over several devices or calls draws what the whole batch would
        rows = range(self.first_row, self.first_row + shape[0])
        return torch.stack([self._draw_row(row, self.first_frame + start_frame, step, shape[1:]) for row in rows])

    def _draw_row(self, row: int, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        # hashed, so that neighbouring seeds, rows and frames have nothing in common; 7 bytes, since torch takes 63 bits
        key = f"{self.seed}/{row}/{start_frame}/{step}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        # on the CPU and in float32, since other devices and types draw other numbers from the same seed
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class ScheduledNoise:
    """Noise whose seed changes on the way.

    own: the noise where no other seed holds. seeds: by the latent frame from which each holds. of: the noise of a seed.
    """

    def __init__(self, own: NoiseSource, seeds: Mapping[int, int], of: Callable[[int], NoiseSource]) -> None:
        self.own, self.seeds, self.of = own, seeds, of

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Return noise of the seed that holds at this chunk."""
        seed = seed_at(self.seeds, start_frame)
        return (self.own if seed is None else self.of(seed)).draw(start_frame, step, shape)
