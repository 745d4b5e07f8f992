"""The work of a rollout in closed form, chunk by chunk, and what share of a device's limit a run of it reached."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import TAEHVConfig, WanConfig
from ..geometry import TEMPORAL_FACTOR, pixel_frames, tokens_per_frame
from ..shapes import wan_shapes
from .device import Card
from .work import Work, image_tokens, pass_work, taehv_flops, wan_vae_flops

# Tensors that are alive at a peak, counted in runs: of [tokens, dim] beside those of a feed-forward layer; of the size
# of one frame in TAEHV's last stage; and channels of the finished frames of a chunk when they are joined.
ALIVE = 6.5
DECODER_ALIVE = 3.3
JOINED_CHANNELS = 7


@dataclass(frozen=True)
class Recipe:
    """What is computed for every chunk of a video, in closed form."""

    config: WanConfig
    lengths: Sequence[int]  # latent frames of each chunk
    latent_height: int
    latent_width: int
    steps: int = 4  # denoising passes of a chunk
    first_chunk_steps: int | None = None  # those of chunk 0; None: as every chunk
    window: int = -1  # latent frames in the cache, -1 for all
    is_joint: bool = False  # whether as many chunks as there are steps are denoised together, one pass a step
    decoder: str = "taehv"  # "taehv", "vae" or "none"
    writes: bool = True  # whether a clean pass, which writes the cache, follows each chunk but the last
    commit_last: bool = False  # whether one follows the last chunk too
    guided: bool = False  # whether every pass is made twice, with and without the prompt
    batch: int = 1  # videos
    networks: int = 1  # 2 where two take turns: each pass asks one, each clean pass writes the caches of both
    resident: int = 1  # how many of them lie on the device at once
    weight_bytes: int = 2  # of one number, as in `pass_work`
    cache_bytes: int = 2
    activation_bytes: int = 2
    policy_bytes: int = 0  # what the cache's policy keeps beside the window, in one cache of all videos
    taehv: TAEHVConfig = field(default_factory=TAEHVConfig)

    @property
    def tokens_per_frame(self) -> int:
        """Return the tokens of one latent frame."""
        return tokens_per_frame(self.latent_height, self.latent_width)

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Return the latent frame behind each chunk."""
        return list(itertools.accumulate(self.lengths))

    def a_pass(self, chunk: int, together: int = 1) -> Work:
        """Return one pass of a chunk, and of those denoised together with it, at the cache's length there."""
        lengths = self.lengths[chunk : chunk + together]
        end = self._ends[chunk + len(lengths) - 1]
        # Earlier chunks see less: until the window is full, a chunk costs more than the one before.
        visible = end if self.window == -1 else min(end, self.window)
        return pass_work(
            self.config,
            sum(lengths) * self.tokens_per_frame,
            visible * self.tokens_per_frame,
            batch=self.batch,
            weight_bytes=self.weight_bytes,
            cache_bytes=self.cache_bytes,
            activation_bytes=self.activation_bytes,
        )

    def decode(self, chunk: int) -> Work:
        """Return the work of a chunk's decode."""
        length, size = self.lengths[chunk], (self.latent_height, self.latent_width)
        if self.decoder == "taehv":
            return Work(decode_flops=self.batch * taehv_flops(self.taehv, length, *size))
        frames = length - 0.75 if chunk == 0 else length  # the first latent frame is one video frame, not four
        return Work(decode_flops=self.batch * wan_vae_flops(1, *size) * frames if self.decoder == "vae" else 0)

    def until_shown(self, chunk: int) -> Work:
        """Return the work from a chunk's noise to its frames."""
        steps = self.steps if chunk or self.first_chunk_steps is None else self.first_chunk_steps
        if self.is_joint:  # chunks come in one by one before the first is finished, and then with every pass
            counts = range(1, steps + 1) if chunk == 0 else (steps,)
            passes = (self.a_pass(chunk, count) * (1 + self.guided) for count in counts)
            return functools.reduce(operator.add, passes) + self.decode(chunk)
        return self.a_pass(chunk) * (steps * (1 + self.guided)) + self.decode(chunk)

    def chunk(self, chunk: int) -> Work:
        """Return everything that a chunk costs: its frames, and the clean pass if another chunk follows."""
        is_committed = self.writes and (self.commit_last or chunk + 1 < len(self.lengths))
        return self.until_shown(chunk) + self.a_pass(chunk) * (is_committed * (1 + self.guided) * self.networks)

    @property
    def without(self) -> str:
        """Return what `peak_bytes` leaves out, as the end of a sentence."""
        return "" if self.decoder == "taehv" else ", without the decoder"

    def peak_bytes(self) -> dict[str, int]:
        """Return what the device holds at once while chunks are made: weights, caches, and working memory.

        The last is the larger of two peaks: a block's feed-forward layer with what is alive beside it, and the last
        stage of the decoder.
        """
        at_once = min(sum(self.lengths), max(self.lengths) * (self.steps if self.is_joint else 1))
        config, rows = self.config, self.batch * at_once * self.tokens_per_frame
        numbers = sum(math.prod(shape) for shape in wan_shapes(config).values())
        cached_frames = sum(self.lengths) if self.window == -1 else min(sum(self.lengths), self.window)
        # Keys and values of one token in all layers; guidance has a second cache, for the negative prompt, and so has
        # a second network.
        cached = 2 * config.num_layers * self.batch * config.dim * (1 + self.guided) * self.networks
        # A single chunk is never read back, so nothing is cached.
        caches = cached * cached_frames * self.tokens_per_frame * self.cache_bytes if len(self.lengths) > 1 else 0
        caches += self.policy_bytes * (1 + self.guided) * self.networks
        network = int(rows * (2 * config.ffn_dim + ALIVE * config.dim) * self.activation_bytes)
        # Frame by frame, 8 x 8 pixels for each latent one; those of a chunk wait for each other.
        frames, pixels = max(self.lengths) * TEMPORAL_FACTOR, self.batch * 64 * self.latent_height * self.latent_width
        channels = self.taehv.image_channels * frames
        widest = max(DECODER_ALIVE * self.taehv.decoder_widths[-1] + channels, JOINED_CHANNELS * frames)
        decoder = int(widest * pixels * self.activation_bytes)
        return {
            "weights": numbers * self.weight_bytes * self.resident,
            # Keys and values of the prompt and the image are computed once, and stay in the computation's type.
            "caches": caches + cached * (config.text_len + image_tokens(config)) * self.activation_bytes,
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
    """The prediction of a run on its device, and afterwards the shares of its limit that it reached."""

    recipe: Recipe
    card: Card

    def predicted(self) -> dict[str, Any]:
        """Return what a run should take: seconds, frames per second, peak bytes, and the rates of the device."""
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
        """Return which shares of a run's time its floors are. chunk_seconds: of every chunk, decode included.

        `above_limit` is the share of everything that no floor counts.
        """
        floors = self.recipe.limits(self.card)
        by_group, total = floors["seconds_by_group"], sum(chunk_seconds)
        shares = {name: seconds / total for name, seconds in by_group.items()}
        return {
            "share_of_limit": sum(by_group.values()) / total,
            "first_frame_share_of_limit": floors["first_frame_seconds"] / chunk_seconds[0],
            "time_by_group": {**shares, "above_limit": 1 - sum(shares.values())},
            **{name: value for name, value in self.predicted().items() if name.startswith("device")},
        }
