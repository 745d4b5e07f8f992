"""What a rollout costs in closed form, chunk by chunk, and what share of a device's limit a run of it reached."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import TAEHVConfig, WanConfig
from .device import Card
from .geometry import TEMPORAL_FACTOR, pixel_frames, tokens_per_frame
from .roofline import Work, image_tokens, pass_work, taehv_flops, wan_vae_flops
from .shapes import wan_shapes

ALIVE = 6.5  # tensors [tokens, dim] beside a feed-forward's own at the network's peak, counted in a run
DECODER_ALIVE = 2.5  # tensors of the size of the tiny decoder's last stage at its peak, likewise


@dataclass(frozen=True)
class Recipe:
    """What is computed for every chunk of a video, in closed form.

    lengths: latent frames of the chunks. steps: denoising passes of a chunk. window: latent frames in the cache, -1 for
    all. decoder: "taehv", "vae" or "none". writes: whether a clean pass follows each chunk but the last, with
    commit_last that one too. guided: whether every pass is made twice. Bytes as in `pass_work`.
    """

    config: WanConfig
    lengths: Sequence[int]
    latent_height: int
    latent_width: int
    steps: int = 4
    window: int = -1
    decoder: str = "taehv"
    writes: bool = True
    commit_last: bool = False
    guided: bool = False
    batch: int = 1
    weight_bytes: int = 2
    cache_bytes: int = 2
    activation_bytes: int = 2
    taehv: TAEHVConfig = field(default_factory=TAEHVConfig)

    @property
    def tokens_per_frame(self) -> int:
        return tokens_per_frame(self.latent_height, self.latent_width)

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.lengths))

    def a_pass(self, chunk: int) -> Work:
        """Return one pass of a chunk, at the cache's length there."""
        end = self._ends[chunk]
        visible = end if self.window == -1 else min(end, self.window)
        return pass_work(
            self.config,
            self.lengths[chunk] * self.tokens_per_frame,
            visible * self.tokens_per_frame,
            batch=self.batch,
            weight_bytes=self.weight_bytes,
            cache_bytes=self.cache_bytes,
            activation_bytes=self.activation_bytes,
        )

    def decode(self, chunk: int) -> Work:
        length, size = self.lengths[chunk], (self.latent_height, self.latent_width)
        if self.decoder == "taehv":
            return Work(decode_flops=self.batch * taehv_flops(self.taehv, length, *size))
        frames = length - 0.75 if chunk == 0 else length  # the first latent frame is one picture, not four
        return Work(decode_flops=self.batch * wan_vae_flops(1, *size) * frames if self.decoder == "vae" else 0)

    def until_shown(self, chunk: int) -> Work:
        """Return the work from a chunk's noise to its frames."""
        return self.a_pass(chunk) * (self.steps * (1 + self.guided)) + self.decode(chunk)

    def chunk(self, chunk: int) -> Work:
        """Return everything that a chunk costs: its frames, and the clean pass if another chunk follows."""
        more = self.writes and (self.commit_last or chunk + 1 < len(self.lengths))
        return self.until_shown(chunk) + self.a_pass(chunk) * (more * (1 + self.guided))

    @property
    def without(self) -> str:
        """What `peak_bytes` leaves out, as the end of a sentence."""
        return "" if self.decoder == "taehv" else ", without the decoder"

    def peak_bytes(self) -> dict[str, int]:
        """Return what the device holds at once while chunks are made: weights, caches, and what is worked with.

        The last is the larger of what the network's widest place (a block's feed-forward, with what is alive beside
        it) and the decoder's last stage take.
        """
        config, rows = self.config, self.batch * max(self.lengths) * self.tokens_per_frame
        numbers = sum(math.prod(shape) for shape in wan_shapes(config).values())
        frames = sum(self.lengths) if self.window == -1 else min(sum(self.lengths), self.window)
        kept = 2 * config.num_layers * self.batch * config.dim * (1 + self.guided)
        caches = kept * frames * self.tokens_per_frame * self.cache_bytes if len(self.lengths) > 1 else 0
        network = int(rows * (2 * config.ffn_dim + ALIVE * config.dim) * self.activation_bytes)
        pictures = self.batch * max(self.lengths) * TEMPORAL_FACTOR * 64 * self.latent_height * self.latent_width
        decoder = int(DECODER_ALIVE * pictures * self.taehv.decoder_widths[-1] * self.activation_bytes)
        return {
            "weights": numbers * self.weight_bytes,
            "caches": caches + kept * (config.text_len + image_tokens(config)) * self.activation_bytes,
            "working": max(network, decoder if self.decoder == "taehv" else 0),
        }

    def limits(self, card: Card) -> dict[str, Any]:
        """Return floors on a card: seconds to the first frame, of every chunk, frames per second, seconds by group."""
        chunks = [self.chunk(index).seconds(card) for index in range(len(self.lengths))]
        seconds = [sum(groups.values()) for groups in chunks]
        return {
            "first_frame_seconds": sum(self.until_shown(0).seconds(card).values()),
            "chunk_seconds": seconds,
            "fps": self.batch * pixel_frames(sum(self.lengths)) / sum(seconds),
            "seconds_by_group": {name: sum(groups[name] for groups in chunks) for name in chunks[0]},
        }


@dataclass(frozen=True)
class Meter:
    """What a run should take on its device, said before it, and what share of that it reached, said after it."""

    recipe: Recipe
    card: Card

    def predicted(self) -> dict[str, Any]:
        limits = self.recipe.limits(self.card)
        return {
            "first_frame_seconds": limits["first_frame_seconds"],
            "fps": limits["fps"],
            "seconds_by_group": limits["seconds_by_group"],
            "peak_bytes": sum(self.recipe.peak_bytes().values()),
            "device_tflops": self.card.flops / 1e12,
            "device_gbytes_per_second": self.card.bandwidth / 1e9,
        }

    def in_words(self) -> str:
        """Return the prediction as the end of a sentence."""
        prediction = self.predicted()
        return (
            f"by estimate at most {prediction['fps']:.3g} FPS, "
            f"first frame in at least {prediction['first_frame_seconds']:.3g} s, "
            f"memory about {prediction['peak_bytes'] / 1e9:.3g} GB{self.recipe.without}"
        )

    def reached(self, chunk_seconds: Sequence[float]) -> dict[str, Any]:
        """Return shares of every chunk's seconds, decode included; `above_limit` is whatever else they went into."""
        floors = self.recipe.limits(self.card)
        by_group, total = floors["seconds_by_group"], sum(chunk_seconds)
        shares = {name: seconds / total for name, seconds in by_group.items()}
        return {
            "share_of_limit": sum(by_group.values()) / total,
            "first_frame_share_of_limit": floors["first_frame_seconds"] / chunk_seconds[0],
            "time_by_group": {**shares, "above_limit": 1 - sum(shares.values())},
            **{name: value for name, value in self.predicted().items() if name.startswith("device")},
        }
