"""What a video takes at least: arithmetic and bytes in closed form, over what a device can do.

A floor is the time of three groups of work, one after the other: the linear layers, attention, and what is between them
(norms, modulation, rotary embedding, residuals). Inside a group the larger of arithmetic and memory traffic counts, as
in the roofline model (Williams et al., 2009). Nothing else is in it: no launch, no host, no text encoder.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import CLIP_DIM, CLIP_TOKENS, TAEHVConfig, WanConfig
from .geometry import TEMPORAL_FACTOR, pixel_frames, tokens_per_frame
from .layout import wan_shapes

MATMUL_SIZES = (2048, 8192)  # rows of the square product that measures a device: at first, and at most
COPY_BYTES = (2**26, 2**28)
SMALL, SLOW = 256, 0.01  # rows of a product that a device is slow at if it takes longer, in seconds
LONG = 1e-3  # seconds of work in which its start does not count
TOGETHER = 0.02  # seconds of calls between two looks at the clock
# Reads and writes of a [tokens, dim] tensor per block that no fusion saves: norm and modulation 2, norms and rotary
# embedding of queries and keys 4, gate and residual 3, norm 2, norm of the cross queries 2, residual 3, norm and
# modulation 2, gate and residual 3.
MOVES = 21
ALIVE = 6.5  # tensors of that size beside a feed-forward's own, counted in a run
DECODER_ALIVE = 2.5  # tensors of the size of the tiny decoder's last stage, likewise


# ------------------------------------------------------------------ devices --
@dataclass(frozen=True)
class Card:
    """Dense bfloat16 FLOP and bytes per second, and the shares of them that large products and long copies attain."""

    flops: float
    bandwidth: float
    flops_share: float = 0.8
    bandwidth_share: float = 0.88

    @property
    def attainable(self) -> Card:
        """The same card at what it attains."""
        return Card(self.flops * self.flops_share, self.bandwidth * self.bandwidth_share, 1.0, 1.0)


CARDS = {  # the makers' data sheets
    "a100": Card(312e12, 2.04e12),
    "h100": Card(989e12, 3.35e12),
    "h200": Card(989e12, 4.8e12),
    "b200": Card(2250e12, 8.0e12),
    "gb200": Card(2500e12, 8.0e12),
    "gb300": Card(2500e12, 8.0e12),
    "rtx-4090": Card(165.2e12, 1.008e12),
    "rtx-5090": Card(209.5e12, 1.792e12),
}


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP per second of a square product on this device, the median over about `seconds` after a warm-up."""

    def product(size: int) -> Callable[[], Tensor]:
        a = torch.randn(size, size, device=device).to(dtype)
        return lambda: torch.mm(a, a)

    is_slow = _median_seconds(product(SMALL), 0) > SLOW  # a CPU that emulates the type: minutes for the usual size
    size, taken = _grown(product, (SMALL, SMALL) if is_slow else MATMUL_SIZES, seconds)
    return 2 * size**3 / taken


def copy_rate(device: torch.device, *, seconds: float = 0.3) -> float:
    """Bytes read and written per second by a long copy on this device, measured likewise."""

    def copy(size: int) -> Callable[[], Tensor]:
        a = torch.zeros(size, dtype=torch.uint8, device=device)
        b = torch.empty_like(a)
        return lambda: b.copy_(a)

    size, taken = _grown(copy, COPY_BYTES, seconds)
    return 2 * size / taken


def _grown(make: Callable[[int], Callable[[], Tensor]], sizes: tuple[int, int], seconds: float) -> tuple[int, float]:
    """Work of the first size that keeps the device busy for LONG, or of the largest, and the seconds that it takes.

    Smaller work is dominated by its start, or lies in a cache.
    """
    size, largest = sizes
    while size < largest and _median_seconds(make(size), 0) < LONG:
        size *= 2
    return size, _median_seconds(make(size), seconds)


def measured_card(device: torch.device, dtype: torch.dtype, *, seconds: float = 2.0) -> Card:
    """This device, by `seconds` of products and copies; the shares are 1, since they are in the measurement."""
    return Card(matmul_rate(device, dtype, seconds=seconds / 2), copy_rate(device, seconds=seconds / 2), 1.0, 1.0)


def _median_seconds(work: Callable[[], Tensor], seconds: float) -> float:
    def several(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            made = work()
        made.flatten()[0].item()  # reading a number waits for the device, whichever it is
        return (time.perf_counter() - start) / count

    several(1)
    count = max(1, int(TOGETHER / several(1)))  # so many that launching and waiting do not count
    taken: list[float] = []
    began = time.perf_counter()
    while not taken or time.perf_counter() - began < seconds:
        taken.append(several(count))
    return statistics.median(taken)


# --------------------------------------------------------------------- work --
@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of something, by group."""

    linear_flops: float = 0
    linear_bytes: float = 0
    attention_flops: float = 0
    attention_bytes: float = 0
    elementwise_bytes: float = 0
    decode_flops: float = 0

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops + self.decode_flops

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))

    def seconds(self, card: Card) -> dict[str, float]:
        """The floor of each group on this card, as it is (see `Card.attainable`)."""
        return {
            "linears": max(self.linear_flops / card.flops, self.linear_bytes / card.bandwidth),
            "attention": max(self.attention_flops / card.flops, self.attention_bytes / card.bandwidth),
            "elementwise": self.elementwise_bytes / card.bandwidth,
            "decode": self.decode_flops / card.flops,
        }


def pass_flops(config: WanConfig, num_tokens: int, num_visible: int) -> int:
    """FLOPs of one pass over `num_tokens` tokens that see `num_visible` tokens, themselves included.

    Counted: the linear layers (self-attention q k v o, cross-attention q o, feed-forward, patch embedding, head) and
    the attentions' products. Not counted: the time embedding, and what depends on the prompt alone (`prompt_flops`).
    Texts count with all their rows: shorter ones are padded, and attended as such.
    """
    D, layers = config.dim, config.num_layers
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    ends = patch * D * (config.in_dim + config.out_dim)
    linears = 2 * num_tokens * (layers * (6 * D * D + 2 * D * config.ffn_dim) + ends)
    return linears + _attention_flops(config, num_tokens, num_visible)


def _attention_flops(config: WanConfig, num_tokens: int, num_visible: int) -> int:
    context = config.text_len + _image_tokens(config)
    return 4 * num_tokens * config.num_layers * config.dim * (num_visible + context)


def pass_work(
    config: WanConfig,
    num_tokens: int,
    num_visible: int,
    *,
    batch: int = 1,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
    activation_bytes: int = 2,
) -> Work:
    """`pass_flops` by group, for `batch` rows, and the least traffic: weights once, inputs and outputs of every layer
    (one read for queries, keys and values together), the visible cache read, the chunk's own part written.

    weight_bytes, cache_bytes, activation_bytes: of one number.
    """
    D, layers, rows = config.dim, config.num_layers, batch * num_tokens
    attention = batch * _attention_flops(config, num_tokens, num_visible)
    weights = layers * (6 * D * D + 2 * D * config.ffn_dim + 6 * D)
    kept = 2 * D * layers * cache_bytes * batch
    return Work(
        linear_flops=batch * pass_flops(config, num_tokens, num_visible) - attention,
        linear_bytes=weights * weight_bytes + rows * (12 * D + 2 * config.ffn_dim) * layers * activation_bytes,
        attention_flops=attention,
        attention_bytes=kept * (num_visible + num_tokens),
        elementwise_bytes=MOVES * rows * D * layers * activation_bytes,
    )


def prompt_flops(config: WanConfig) -> int:
    """FLOPs of a prompt's embedding, keys and values: once per video with a cache, else in every pass."""
    D, text, image = config.dim, config.text_len, _image_tokens(config)
    embedding = text * (config.text_dim * D + D * D) + image * (CLIP_DIM * CLIP_DIM + CLIP_DIM * D)
    return 2 * (embedding + (text + image) * 2 * D * D * config.num_layers)


def _image_tokens(config: WanConfig) -> int:
    return CLIP_TOKENS if config.model_type == "i2v" else 0


# ------------------------------------------------------------------ decoders --
def taehv_flops(config: TAEHVConfig, latent_frames: int, latent_height: int, latent_width: int) -> int:
    """FLOPs of decoding this many latent frames, start-up frames included."""
    widths, pixels = config.decoder_widths, latent_frames * latent_height * latent_width
    total = 9 * config.latent_channels * widths[0] * pixels
    stages = zip(widths, widths[1:], config.decoder_time, config.decoder_space)
    for width, next_width, grow, upscale in stages:
        total += (
            3 * 9 * (2 + 1 + 1) * width**2 * pixels
        )  # three blocks of three convolutions; the first sees two frames
        pixels *= 4 if upscale else 1
        total += width**2 * (2 if grow else 1) * pixels
        pixels *= 2 if grow else 1
        total += 9 * width * next_width * pixels
    return 2 * (total + 9 * widths[-1] * config.image_channels * config.patch_size**2 * pixels)


def wan_vae_flops(
    latent_frames: int, latent_height: int, latent_width: int, *, dim: int = 96, channels: int = 16
) -> int:
    """FLOPs of Wan 2.1's VAE decoding latent frames behind the first one of a video, 4 frames of pictures each."""
    widest, frame = 4 * dim, latent_height * latent_width
    pixels = latent_frames * frame

    def residual(before: int, after: int) -> int:
        shortcut = before * after if before != after else 0
        return (27 * before * after + 27 * after**2 + shortcut) * pixels

    total = (channels**2 + 27 * channels * widest) * pixels
    total += 2 * residual(widest, widest) + (4 * widest**2 + 2 * frame * widest) * pixels  # middle, with attention
    stages = ((widest, widest, True), (widest // 2, widest, True), (widest // 2, widest // 2, False))
    for before, after, grows in stages:
        total += residual(before, after) + 2 * residual(after, after)
        if grows:
            total += 3 * after * 2 * after * pixels
            pixels *= 2
        pixels *= 4
        total += 9 * after * (after // 2) * pixels
    total += 3 * residual(dim, dim)
    return 2 * (total + 27 * dim * 3 * pixels)


# ------------------------------------------------------------------- rollouts --
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
        """One pass of a chunk, at the cache's length there."""
        seen = self._ends[chunk]
        visible = seen if self.window == -1 else min(seen, self.window)
        return pass_work(
            self.config, self.lengths[chunk] * self.tokens_per_frame, visible * self.tokens_per_frame, batch=self.batch,
            weight_bytes=self.weight_bytes, cache_bytes=self.cache_bytes, activation_bytes=self.activation_bytes,
        )  # fmt: skip

    def decode(self, chunk: int) -> Work:
        length, size = self.lengths[chunk], (self.latent_height, self.latent_width)
        if self.decoder == "taehv":
            return Work(decode_flops=self.batch * taehv_flops(self.taehv, length, *size))
        frames = length - 0.75 if chunk == 0 else length  # the first latent frame is one picture, not four
        return Work(decode_flops=self.batch * wan_vae_flops(1, *size) * frames if self.decoder == "vae" else 0)

    def until_shown(self, chunk: int) -> Work:
        """From a chunk's noise to its pictures."""
        return self.a_pass(chunk) * (self.steps * (1 + self.guided)) + self.decode(chunk)

    def chunk(self, chunk: int) -> Work:
        """Everything that a chunk costs: its pictures, and the clean pass if another chunk follows."""
        more = self.writes and (self.commit_last or chunk + 1 < len(self.lengths))
        return self.until_shown(chunk) + self.a_pass(chunk) * (more * (1 + self.guided))

    @property
    def without(self) -> str:
        """What `peak_bytes` leaves out, as the end of a sentence."""
        return "" if self.decoder == "taehv" else ", without the decoder"

    def peak_bytes(self) -> dict[str, int]:
        """What the device holds at once while chunks are made: weights, caches, and the larger of what the network's
        widest place (a block's feed-forward, with what is alive beside it) and the decoder's last stage take."""
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
            "caches": caches + kept * (config.text_len + _image_tokens(config)) * self.activation_bytes,
            "working": max(network, decoder if self.decoder == "taehv" else 0),
        }

    def limits(self, card: Card) -> dict[str, Any]:
        """Floors on a card: seconds to the first frame, of every chunk, frames per second, and seconds by group."""
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
        """The prediction as the end of a sentence."""
        told = self.predicted()
        return (
            f"by estimate at most {told['fps']:.3g} FPS, first frame in at least {told['first_frame_seconds']:.3g} s, "
            f"memory about {told['peak_bytes'] / 1e9:.3g} GB{self.recipe.without}"
        )

    def reached(self, chunk_seconds: Sequence[float]) -> dict[str, Any]:
        """From the seconds of every chunk, decode included; `above_limit` is whatever else they went into."""
        floors = self.recipe.limits(self.card)
        by_group, taken = floors["seconds_by_group"], sum(chunk_seconds)
        shares = {name: seconds / taken for name, seconds in by_group.items()}
        return {
            "share_of_limit": sum(by_group.values()) / taken,
            "first_frame_share_of_limit": floors["first_frame_seconds"] / chunk_seconds[0],
            "time_by_group": {**shares, "above_limit": 1 - sum(shares.values())},
            **{name: value for name, value in self.predicted().items() if name.startswith("device")},
        }
