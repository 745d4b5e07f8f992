"""Random numbers as a function of what they are for: seed, step, purpose and the clip's number within the step.

No generator is carried along, so neither the number of processes, nor how a batch is divided among and within them, nor
a resume changes a single number.

Letters: B batch, T latent frames.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_core.noise import SeededNoise


def key_of(*parts: object) -> int:
    """Return a 56-bit number that any change of the parts changes."""
    # Torch's seeds have 64 bits, some of them with a sign. Python's own hash of texts differs from run to run.
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step for one purpose, for instance "student" or "critic"."""

    seed: int
    step: int
    purpose: str

    def _generator(self, *parts: object) -> torch.Generator:
        return torch.Generator().manual_seed(key_of(self.seed, self.step, self.purpose, *parts))

    def exit_steps(self, count: int, num_steps: int, *, per_chunk: bool) -> list[int]:
        """Draw the evaluation at which each of `count` chunks ends; the same for all of them unless per_chunk.

        It is the s of Self Forcing's algorithm 1 (arXiv 2506.08009), uniform over the steps.
        """
        # One for each chunk is drawn in either case, so that the first is the same number in both.
        exits = torch.randint(num_steps, (count,), generator=self._generator("exit")).tolist()
        return exits if per_chunk else exits[:1] * count

    def whole(self, name: str, count: int) -> int:
        """Draw a number below `count`, the same for all clips of the step."""
        return int(torch.randint(count, (1,), generator=self._generator(name)))

    def noise(self, first: int) -> SeededNoise:
        """Return the noise of a rollout whose rows are the clips `first`, `first` + 1, ... of the step."""
        return SeededNoise(key_of(self.seed, self.step, self.purpose, "rollout"), first_row=first)

    def uniform(self, first: int, count: int) -> Tensor:
        """Draw a number in [0, 1) for each of these clips, float64."""
        return self.uniforms(first, count, 1)[:, 0]

    def uniforms(self, first: int, count: int, frames: int) -> Tensor:
        """Draw numbers in [0, 1) [B, T] for each of these clips, float64."""
        # A generator for each clip, so that its numbers are the same in whatever part of a batch it is.
        generators = (self._generator("level", row) for row in range(first, first + count))
        return torch.stack([torch.rand(frames, generator=generator, dtype=torch.float64) for generator in generators])

    def normal(self, first: int, shape: tuple[int, ...]) -> Tensor:
        """Draw noise [B, ...] for the clips `first` to `first` + B, float32."""
        rows = range(first, first + shape[0])
        return torch.stack([torch.randn(shape[1:], generator=self._generator("noise", row)) for row in rows])


def item(seed: int, number: int, count: int) -> int:
    """Return which of `count` examples is the `number`-th of a run: each comes once per round, in the round's order."""
    epoch, place = divmod(number, count)
    return int(_order(seed, epoch, count)[place])


@functools.lru_cache(maxsize=4)  # a batch may lie in two rounds; a million examples take 8 MB and 0.1 s
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(key_of(seed, "order", epoch)))
