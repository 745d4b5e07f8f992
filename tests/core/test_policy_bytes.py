"""What a policy takes is known before anything is allocated."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from selfforcing_core.config import CausalConfig, WanConfig
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.roofline.policy_bytes import CacheBytes, held_bytes, planned_bytes, remembered_bytes
from selfforcing_core.weights.presets import PRESETS
from tests.core.test_policies import SMALL, STEPS
from tests.support.tiny_wan import CONFIG, FRAME, random_text, random_wan

WAN_1_3B = WanConfig(1536, 8960, 12, 30)


def allocated(causal: CausalConfig, frames: int, dtype: Any) -> CacheBytes:
    model, text = random_wan(dtype=torch.float32), random_text(dtype=torch.float32)
    model.cache_dtype = dtype
    (cache,) = new_caches(model, text, 1, (frames, *FRAME), causal)
    with torch.no_grad():
        guided = Guided(model, text, caches=[cache])
        for _ in rollout(
            guided, noise=SeededNoise(0), latent_shape=(frames, *FRAME), causal=causal, steps=STEPS, commit_last=True
        ):
            pass
    state = held_bytes(cache)
    assert state == CacheBytes(storage_bytes(cache.k, cache.v, cache.k_scale, cache.v_scale), kept_by_memory(cache))
    return state


def storage_bytes(*values: Any) -> int:
    """Return the bytes of all storages that tensors in these values hold, each once."""
    storages: dict[int, int] = {}
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return sum(storages.values())


def kept_by_memory(cache: Any) -> int:
    """Return the bytes of every tensor that the policy's memory refers to, whatever it says of itself."""
    return 0 if cache.memory is None else storage_bytes(*vars(cache.memory).values())


@pytest.mark.parametrize("name", ["reward", "rolling-forcing", "sdv2"])
def test_a_policy_is_counted_before_steps_and_chunks_are_known(name: str) -> None:
    causal = replace(SMALL[name], policy=name)
    remembered = remembered_bytes(CONFIG, causal, (20, *FRAME), dtype=torch.float32, cache_dtype=torch.int8)
    assert remembered == allocated(causal, 20, torch.int8).memory > 0
    odd = replace(causal, independent_first_frame=True)
    assert remembered_bytes(CONFIG, odd, (21, *FRAME), dtype=torch.float32, cache_dtype=torch.int8) == remembered
    assert remembered_bytes(CONFIG, odd, (causal.window, *FRAME)) == 0


# Shorter than any window, and past its first two rounds.
@pytest.mark.parametrize(("frames", "dtype"), [(4, torch.float32), (20, torch.int8)])
@pytest.mark.parametrize("name", SMALL)
def test_planned_bytes_are_those_that_a_run_allocates(name: str, frames: int, dtype: torch.dtype) -> None:
    causal = replace(SMALL[name], policy=name)
    batch = random_text().prompt_embeds_BPE.shape[0]
    planned = planned_bytes(CONFIG, causal, (frames, *FRAME), batch=batch, dtype=torch.float32, cache_dtype=dtype)
    assert planned == allocated(causal, frames, dtype)


def test_a_moving_sink_of_wan_costs_its_keys_once_more() -> None:
    """In float32, at 480x832; counted in less time than a chunk takes."""
    preset = PRESETS["infinite-forcing"]
    assert preset.window is not None
    assert preset.sink is not None
    causal = CausalConfig(3, preset.window, preset.sink, policy="infinite")
    start = time.perf_counter()
    planned = planned_bytes(WAN_1_3B, causal, (243, 16, 60, 104))
    assert time.perf_counter() - start < 10
    frame = 30 * 1560 * 1536
    assert planned == CacheBytes(2 * 2 * preset.window * frame, 4 * preset.sink * frame)
