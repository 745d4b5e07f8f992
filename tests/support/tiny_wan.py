"""Small random networks that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.guided import Guided
from selfforcing_core.kv_cache import KVCache, dequantise
from selfforcing_core.model import CausalWan

CONFIG = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=6, freq_dim=32
)
FRAME = (4, 4, 6)  # channels, latent height, latent width
TOKENS = 6  # per frame


def random_wan(seed: int = 0, config: WanConfig = CONFIG, dtype: torch.dtype = torch.float64) -> CausalWan:
    """A network with random weights everywhere, the zero-initialised layers of practice included."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalWan(config, dtype=dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / parameter.shape[-1] ** 0.5)
    return model


def random_text(batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Conditioning:
    """Return random embeddings. Half precision rounds those of float32: older torch draws other numbers for it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.promote_types(dtype, torch.float32)
    return Conditioning(torch.randn(batch, 5, CONFIG.text_dim, generator=generator, dtype=drawn).to(dtype))


def guided(model: Any, text: Conditioning, options: dict[str, Any]) -> Guided:
    """The network as a rollout takes it; what belongs to it is taken out of the rollout's options."""
    names = {"negative", "guidance", "caches"} & options.keys()
    return Guided(model, text, **{name: options.pop(name) for name in names})


def ordered(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """Copies of one layer's visible keys and values in the order of `KVCache.frames`; 8 bits as float32."""
    slots = torch.tensor([cache.slot_of(frame) for frame in cache.frames()], dtype=torch.long)
    tokens = (slots[:, None] * cache.tokens_per_frame + torch.arange(cache.tokens_per_frame)).flatten()
    past = cache.past(layer)
    pairs = ((past.k_BSNK, past.k_scale), (past.v_BSNK, past.v_scale))
    k, v = (_chosen(stored, scale, tokens.to(stored.device)) for stored, scale in pairs)
    return k, v


def _chosen(stored_BSNK: Tensor, scale: Tensor | None, tokens: Tensor) -> Tensor:
    chosen = stored_BSNK.index_select(1, tokens)
    if scale is None:
        return chosen
    return dequantise(chosen, scale.index_select(1, tokens), torch.empty(0, device=chosen.device))
