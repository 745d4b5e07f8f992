"""The bytes of a cache and of what its policy remembers beside it, before anything is allocated.

Letters: B batch, P text tokens, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..config import CausalConfig, StepConfig, WanConfig
from ..guided import Guided, new_caches
from ..kv_cache import KVCache
from ..model import CausalWan
from ..rollout import rollout

STEPS = StepConfig((1000.0, 500.0))  # what a policy remembers does not depend on the noise levels, nor on their number


@dataclass(frozen=True)
class CacheBytes:
    """What one cache takes once the video is longer than its window."""

    ring: int  # keys and values, and scales of 8 bits
    memory: int  # what the policy remembers beside it


def held_bytes(cache: KVCache) -> CacheBytes:
    """Return the bytes that a cache holds now."""
    buffers = [buffer for buffer in (cache.k, cache.v, cache.k_scale, cache.v_scale) if buffer is not None]
    memory = [] if cache.memory is None else list(cache.memory.tensors.values())
    ring, remembered = (sum(each.numel() * each.element_size() for each in tensors) for tensors in (buffers, memory))
    return CacheBytes(ring, remembered)


def planned_bytes(
    config: WanConfig,
    causal: CausalConfig,
    latent_shape: tuple[int, int, int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    steps: StepConfig = STEPS,
) -> CacheBytes:
    """Return the bytes of one cache of a video of `latent_shape` (T, C, H, W) at its largest.

    A rollout of one layer without memory (torch's meta device) makes what a real one would make, whatever the policy.
    """
    meta, layers = torch.device("meta"), config.num_layers
    # an image's channels change neither keys nor values
    plain = replace(config, num_layers=1, model_type="t2v", in_dim=config.out_dim, image_features=True)
    with meta:
        model = CausalWan(plain).to(dtype)
        embeds_BPE = torch.empty(batch, 1, config.text_dim, dtype=dtype)
    model.cache_dtype = cache_dtype or dtype
    frames, first = latent_shape[0], int(causal.independent_first_frame)
    if causal.window > -1:  # everything is there once the ring came round twice
        least = 2 * causal.window + 2 * causal.chunk
        frames = min(frames, first + causal.chunk * -(-least // causal.chunk))
    shape = (frames, *latent_shape[1:])
    conditioning = Conditioning(embeds_BPE)
    (cache,) = new_caches(model, conditioning, 1, shape, causal)
    with torch.no_grad():
        guided = Guided(model, conditioning, caches=[cache])
        for _ in rollout(guided, noise=_NoNoise(batch), latent_shape=shape, causal=causal, steps=steps):
            pass
    held = held_bytes(cache)
    return CacheBytes(held.ring * layers, held.memory * layers)


@dataclass(frozen=True)
class _NoNoise:
    batch: int

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")
