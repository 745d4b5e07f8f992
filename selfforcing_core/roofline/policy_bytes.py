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
from ..policy import SELF_FORCING
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
    return CacheBytes(sum(x.nbytes for x in buffers), 0 if cache.memory is None else cache.memory.num_bytes())


def remembered_bytes(
    config: WanConfig,
    causal: CausalConfig,
    latent_shape: tuple[int, int, int, int],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
) -> int:
    """Return the bytes that a policy remembers beside the ring of one cache, where the steps are not known yet.

    The length of the video is rounded up to whole chunks.
    """
    if causal.policy == SELF_FORCING.name or not -1 < causal.window < latent_shape[0]:
        return 0
    # whether the first frame is a chunk of its own changes nothing once frames are evicted
    causal = replace(causal, independent_first_frame=False)
    frames = causal.chunk * -(-latent_shape[0] // causal.chunk)
    # of one step, since chunks that are denoised together need a window that has room for as many
    steps = StepConfig(STEPS.steps[:1])
    shape = (frames, *latent_shape[1:])
    return planned_bytes(config, causal, shape, batch=batch, dtype=dtype, cache_dtype=cache_dtype, steps=steps).memory


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
    layer = held_bytes(cache)
    return CacheBytes(layer.ring * layers, layer.memory * layers)


@dataclass(frozen=True)
class _NoNoise:
    batch: int

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")
