"""The least that a video takes: arithmetic and bytes in closed form, over what a device can do.

A floor is the time of three groups of work, one after the other: the linear layers, attention, and what is between them
(norms, modulation, rotary embedding, residuals). Inside a group the larger of arithmetic and memory traffic counts, as
in the roofline model (Williams et al., 2009). Nothing else is in it: no launch, no CPU, no text encoder.

D is the model width. A multiplication and its addition are 2 FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import CLIP_DIM, CLIP_TOKENS, TAEHVConfig, WanConfig
from ..shapes import MEMORY_BLOCKS
from .device import Card

# Reads and writes of a [tokens, dim] tensor per block that no fusion saves: norm and modulation 2, norms and rotary
# embedding of queries and keys 4, gate and residual 3, norm 2, norm of the cross queries 2, residual 3, norm and
# modulation 2, gate and residual 3.
MOVES = 21


# --------------------------------------------------------------------- work --
@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of something, by group."""

    linear_flops: float = 0
    linear_bytes: float = 0
    attention_flops: float = 0
    attention_bytes: float = 0
    elementwise_bytes: float = 0  # whose arithmetic never counts beside them
    decode_flops: float = 0  # convolutions, whose traffic never counts beside it

    @property
    def flops(self) -> float:
        """Return the FLOPs of all groups."""
        return self.linear_flops + self.attention_flops + self.decode_flops

    def __add__(self, other: Work) -> Work:
        return Work(*(left + right for left, right in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))

    def seconds(self, card: Card) -> dict[str, float]:
        """Return the floor of each group on this card, by its full rates; give `card.attainable` for realistic ones."""
        return {
            "linears": max(self.linear_flops / card.flops, self.linear_bytes / card.bandwidth),
            "attention": max(self.attention_flops / card.flops, self.attention_bytes / card.bandwidth),
            "elementwise": self.elementwise_bytes / card.bandwidth,
            "decode": self.decode_flops / card.flops,
        }


def pass_flops(config: WanConfig, num_tokens: int, num_visible: int) -> int:
    """Return the FLOPs of one pass over `num_tokens` tokens that attend to `num_visible` tokens, themselves included.

    Counted: the linear layers (self-attention q k v o, cross-attention q o, feed-forward, patch embedding, head) and
    the attentions' products. Not counted: the time embedding, and what depends on the prompt alone (`prompt_flops`).
    Texts count with all their rows: shorter ones are padded, and the padding is attended to.
    """
    D, layers = config.dim, config.num_layers
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    ends = patch * D * (config.in_dim + config.out_dim)  # patch embedding and head
    # Of each token and layer: 4 D^2 of self-attention and 2 D^2 of cross-attention, then up to ffn_dim and down again.
    linears = 2 * num_tokens * (layers * (6 * D * D + 2 * D * config.ffn_dim) + ends)
    return linears + _attention_flops(config, num_tokens, num_visible)


def _attention_flops(config: WanConfig, num_tokens: int, num_visible: int) -> int:
    context = config.text_len + image_tokens(config)  # what cross-attention reads
    # Two products, queries by keys and weights by values, each of 2 D FLOPs for a pair of tokens.
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
    """Return `pass_flops` by group, for `batch` rows, with the least traffic.

    That is weights once, inputs and outputs of every layer (one read for queries, keys and values together), the
    visible cache read, the chunk's own part written. weight_bytes, cache_bytes, activation_bytes: of one number.
    """
    D, layers, rows = config.dim, config.num_layers, batch * num_tokens
    attention = batch * _attention_flops(config, num_tokens, num_visible)
    weights = layers * (6 * D * D + 2 * D * config.ffn_dim + 6 * D)
    cached = 2 * D * layers * cache_bytes * batch  # bytes of one token's keys and values, in all layers
    return Work(
        linear_flops=batch * pass_flops(config, num_tokens, num_visible) - attention,
        # 12 D: q k v read one and write three, self-attention's o, cross-attention's q and o read and write one each,
        # the feed-forward layers read one and write one; between these they write ffn_dim and read it.
        linear_bytes=weights * weight_bytes + rows * (12 * D + 2 * config.ffn_dim) * layers * activation_bytes,
        attention_flops=attention,
        attention_bytes=cached * (num_visible + num_tokens),
        elementwise_bytes=MOVES * rows * D * layers * activation_bytes,
    )


def prompt_flops(config: WanConfig) -> int:
    """Return the FLOPs of a prompt's embedding, keys and values: once per video with a cache, else in every pass."""
    D, text, image = config.dim, config.text_len, image_tokens(config)
    # Two linear layers each: the text's to the model width, the image's first within its own.
    embedding = text * (config.text_dim * D + D * D) + image * (CLIP_DIM * CLIP_DIM + CLIP_DIM * D)
    # Then keys and values of every layer's cross-attention.
    return 2 * (embedding + (text + image) * 2 * D * D * config.num_layers)


def image_tokens(config: WanConfig) -> int:
    """Return the tokens of the first frame that each pass attends to; 0 where the model reads no CLIP features."""
    return CLIP_TOKENS if config.reads_clip else 0


# ------------------------------------------------------------------ decoders --
def taehv_flops(config: TAEHVConfig, latent_frames: int, latent_height: int, latent_width: int) -> int:
    """Return the FLOPs of a folded TAEHV that decodes so many latent frames, with those trimmed at the start."""
    # 9 are the weights of a 3x3 convolution.
    widths, frames, height, width = config.decoder_widths, latent_frames, latent_height, latent_width
    total = 9 * config.latent_channels * widths[0] * frames * height * width
    stages = zip(widths, widths[1:], config.decoder_time, config.decoder_space)
    for channels, next_channels, grow, upscale in stages:
        # Three blocks of three convolutions; the first of them reads two frames.
        total += MEMORY_BLOCKS * 9 * (2 + 1 + 1) * channels**2 * frames * height * width
        frames *= 2 if grow else 1
        # Folded: the pixels that one becomes have a kernel of 2x2 each, with one result more along each side.
        places = 4 * 4 * (height + 1) * (width + 1) if upscale else 9 * height * width
        total += channels * next_channels * frames * places
        height, width = (2 * height, 2 * width) if upscale else (height, width)
    return 2 * (total + 9 * widths[-1] * config.image_channels * config.patch_size**2 * frames * height * width)


def wan_vae_flops(
    latent_frames: int, latent_height: int, latent_width: int, *, dim: int = 96, channels: int = 16
) -> int:
    """Return the FLOPs of Wan 2.1's VAE decoding latent frames behind the first of a video, 4 video frames each."""
    # As wan/modules/vae.py builds its Decoder3d; 27 are the weights of a 3x3x3 convolution.
    widest, frame = 4 * dim, latent_height * latent_width
    pixels = latent_frames * frame

    def residual(before: int, after: int) -> int:
        shortcut = before * after if before != after else 0
        return (27 * before * after + 27 * after**2 + shortcut) * pixels

    # The 1x1x1 convolution before the decoder, and its first one.
    total = (channels**2 + 27 * channels * widest) * pixels
    # The middle: two residual blocks, and attention between the pixels of one frame.
    total += 2 * residual(widest, widest) + (4 * widest**2 + 2 * frame * widest) * pixels
    # Width before and after a stage's first block; each enlarging layer halves it again.
    stages = ((widest, widest, True), (widest // 2, widest, True), (widest // 2, widest // 2, False))
    for before, after, grows in stages:
        total += residual(before, after) + 2 * residual(after, after)
        if grows:
            total += 3 * after * 2 * after * pixels  # one frame to two, by a convolution over three frames
            pixels *= 2
        pixels *= 4  # both sides doubled, before a 3x3 convolution
        total += 9 * after * (after // 2) * pixels
    total += 3 * residual(dim, dim)
    return 2 * (total + 27 * dim * 3 * pixels)
