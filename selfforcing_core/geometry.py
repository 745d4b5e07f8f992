"""Every size of a video: pixels, latent frames, tokens, chunks. Plain integers, and the only place with the factors.

An autoencoder makes latents of pixels, a quarter of the frames and an eighth of either side; the network cuts these
into tokens of 2 x 2 positions. At 832 x 480, 81 frames are 21 latent frames of 104 x 60 positions, 1560 tokens each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SPATIAL_FACTOR = 8  # pixels per latent position, height and width (Wan 2.1 VAE, TAEHV)
TEMPORAL_FACTOR = 4  # pixel frames per latent frame after the first, which stands for one
PATCH = 2  # latent positions per token, height and width (all Wan 2.1 models)
PIXEL_STEP = SPATIAL_FACTOR * PATCH


def pixel_frames(num_latent_frames: int) -> int:
    """Return how many pixel frames a video of latent frames has: 21 -> 81."""
    # the encoder is causal and has nothing before the first frame to merge it with, so that stays alone
    return TEMPORAL_FACTOR * (num_latent_frames - 1) + 1 if num_latent_frames else 0


def latent_frames(num_pixel_frames: int) -> int:
    """Return the latent frames of a video: 81 -> 21. Raises ValueError naming the nearest counts of the form 4n+1."""
    if num_pixel_frames < 1 or (num_pixel_frames - 1) % TEMPORAL_FACTOR:
        below = max(1, num_pixel_frames - (num_pixel_frames - 1) % TEMPORAL_FACTOR)
        above = below + TEMPORAL_FACTOR
        nearest = f"{below} or {above}" if num_pixel_frames > below else f"{below}"
        raise ValueError(f"{num_pixel_frames} frames is not a count of the form {TEMPORAL_FACTOR}n+1; use {nearest}")
    return (num_pixel_frames - 1) // TEMPORAL_FACTOR + 1


def covered_latents(num_pixel_frames: int) -> int:
    """Return how many latent frames a video of any length fills: 33 -> 9, 36 -> 9, 0 -> 0."""
    # floor division takes 0 frames to -1, so that they give 0
    return (num_pixel_frames - 1) // TEMPORAL_FACTOR + 1


def chunk_starts(lengths: Sequence[int]) -> list[int]:
    """Return the first frame of each chunk, of the lengths of all."""
    return list(itertools.accumulate(lengths[:-1], initial=0)) if lengths else []


def chunk_lengths(num_frames: int, chunk: int, *, independent_first_frame: bool = False) -> tuple[int, ...]:
    """Return the latent frames of each chunk. Raises ValueError naming the nearest counts that `chunk` divides."""
    first = 1 if independent_first_frame else 0
    rest = num_frames - first
    if num_frames < 1 or rest < 0 or rest % chunk:
        below = first + max(rest, 0) // chunk * chunk
        valid = [count for count in (below, below + chunk) if count > 0]
        rule = f"1 plus a multiple of chunk {chunk}" if first else f"a multiple of chunk {chunk}"
        raise ValueError(f"{num_frames} latent frames is not {rule}; use {' or '.join(map(str, valid))}")
    return (1,) * first + (chunk,) * (rest // chunk)


def whole_chunks(num_frames: int, chunk: int, *, independent_first_frame: bool = False) -> int:
    """Return the largest count of latent frames up to `num_frames` that is whole chunks, but at least one of them."""
    first = 1 if independent_first_frame else 0
    return max(first + (num_frames - first) // chunk * chunk, first or chunk)


def rounded_length(num_pixel_frames: int, chunk: int, *, independent_first_frame: bool = False) -> int:
    """Return the largest length in pixel frames up to this one that is whole chunks, but at least one of them.

    With chunks of 3 latent frames 81 -> 81, 84 -> 81, 2 -> 9; with a first frame of its own 85 -> 85, 81 -> 73.
    """
    frames = covered_latents(max(num_pixel_frames, 1))
    return pixel_frames(whole_chunks(frames, chunk, independent_first_frame=independent_first_frame))


def rounded_side(pixels: int) -> int:
    """Return the largest width or height up to this one that is whole tokens, but at least one: 70 -> 64, 5 -> 16."""
    return max(pixels // PIXEL_STEP, 1) * PIXEL_STEP


def tokens_per_frame(latent_height: int, latent_width: int) -> int:
    """Return how many tokens one latent frame has."""
    return (latent_height // PATCH) * (latent_width // PATCH)


@dataclass(frozen=True)
class VideoGeometry:
    """A video, cut into chunks. Raises ValueError with the value, the rule and the nearest valid values."""

    width: int  # pixels
    height: int
    frames: int  # pixel frames
    chunk: int = 3  # latent frames denoised together, as in the released chunk-wise checkpoints
    independent_first_frame: bool = False  # is a chunk of its own

    def __post_init__(self) -> None:
        for name, size in (("width", self.width), ("height", self.height)):
            if size < PIXEL_STEP or size % PIXEL_STEP:
                below = max(size, 0) // PIXEL_STEP * PIXEL_STEP
                valid = " or ".join(str(value) for value in (below, below + PIXEL_STEP) if value > 0)
                raise ValueError(f"{name} {size} is not a multiple of {PIXEL_STEP} pixels; use {valid}")
        if self.chunk < 1:
            raise ValueError(f"chunk {self.chunk} is not a number of latent frames; use 1 or more")
        self._check_frames()

    def _check_frames(self) -> None:
        first = int(self.independent_first_frame)
        valid = (self.frames - 1) % TEMPORAL_FACTOR == 0 and self.frames > 0
        count = (self.frames - 1) // TEMPORAL_FACTOR + 1
        if valid and count >= max(first, 1) and (count - first) % self.chunk == 0:
            return
        chunks = max(0, (count - first) // self.chunk)
        nearest = [pixel_frames(first + step * self.chunk) for step in (chunks, chunks + 1)]
        names = " or ".join(str(frames) for frames in nearest if frames > 0)
        rule = (
            f"gives {count} latent frames, not {'1 plus ' if first else ''}a multiple of chunk {self.chunk}"
            if valid
            else f"is not of the form {TEMPORAL_FACTOR}n+1 with whole chunks of {self.chunk} latent frames"
        )
        raise ValueError(f"a length of {self.frames} frames {rule}; use {names}")

    @property
    def latent_frames(self) -> int:
        return latent_frames(self.frames)

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_FACTOR

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_FACTOR

    @property
    def tokens_per_frame(self) -> int:
        return tokens_per_frame(self.latent_height, self.latent_width)

    @property
    def chunk_lengths(self) -> tuple[int, ...]:
        return chunk_lengths(self.latent_frames, self.chunk, independent_first_frame=self.independent_first_frame)

    @property
    def chunk_starts(self) -> tuple[int, ...]:
        """First latent frame of each chunk."""
        return tuple(chunk_starts(self.chunk_lengths))
