"""How much arithmetic a pass needs, in closed form, and how fast this machine multiplies: what speeds are measured by.

A multiply-add is 2 FLOP. Norms, softmax, activations and rotary embedding are not counted.
"""

from __future__ import annotations

import statistics
import time

import torch

from .config import CLIP_DIM, CLIP_TOKENS, WanConfig

# Dense bfloat16 FLOP/s in the makers' data sheets; large products attain about 0.8 of them.
CARDS = {"h200": 989e12, "h100": 989e12, "a100": 312e12, "rtx-5090": 209.5e12, "rtx-4090": 165.2e12}
ATTAINABLE = 0.8
MATMUL_SIZE = 2048


def pass_flops(config: WanConfig, num_tokens: int, num_visible: int) -> int:
    """FLOPs of one pass over `num_tokens` tokens that see `num_visible` tokens, themselves included.

    Counted: the linear layers (self-attention q k v o, cross-attention q o, feed-forward, patch embedding, head) and
    the attentions' products. Not counted: the time embedding, and what depends on the prompt alone (`prompt_flops`).
    Texts count with all their rows: shorter ones are padded, and attended as such.
    """
    D, layers = config.dim, config.num_layers
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    block = 6 * D * D + 2 * D * config.ffn_dim
    ends = patch * D * (config.in_dim + config.out_dim)
    context = config.text_len + _image_tokens(config)
    return 2 * num_tokens * (layers * (block + 2 * D * (num_visible + context)) + ends)


def prompt_flops(config: WanConfig) -> int:
    """FLOPs of a prompt's embedding, keys and values: once per video with a cache, else in every pass."""
    D, text, image = config.dim, config.text_len, _image_tokens(config)
    embedding = text * (config.text_dim * D + D * D) + image * (CLIP_DIM * CLIP_DIM + CLIP_DIM * D)
    return 2 * (embedding + (text + image) * 2 * D * D * config.num_layers)


def _image_tokens(config: WanConfig) -> int:
    return CLIP_TOKENS if config.model_type == "i2v" else 0


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """FLOP per second of a square product on this device, the median over about `seconds` after a warm-up."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    rates, began = [], time.perf_counter()
    while len(rates) < 2 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(2 * MATMUL_SIZE**3 / (time.perf_counter() - start))
    return statistics.median(rates[1:])
