"""Recorded rollouts whose passes are not those of one chunk after another: joint windows, and windows computed again.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.rollout import rollout
from tests.support.golden_fixture import Fixture, GivenNoise

Seen = set[tuple[float, int]]


def seen_by(cache: KVCache, num_frames: int) -> Seen:
    """Return the frames that a staged pass over `num_frames` sees, each with how far it stands from its first one."""
    past = cache.past(0)
    tokens = cache.tokens_per_frame
    slots = [slot for start, end in past._runs() for slot in range(start // tokens, end // tokens)]
    place = {(cache.slot_positions[slot] - cache.position, cache.slot_frames[slot]) for slot in slots}
    first = cache.start_frame if cache.looks_at is None else cache.looks_at
    return place | {(float(offset), first + offset) for offset in range(num_frames)}


class WatchedWindows:
    """Stands in for the network: passes calls on, keeping what each was, saw and wrote."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.axes, self.new_cache = model, model.config, model.axes, model.new_cache
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, embeds: Tensor, **kwargs: Any) -> Tensor:
        flow = self.model(x, timesteps, embeds, **kwargs)
        cache, start = kwargs["cache"], kwargs["start_frame"]
        log = seen_by(cache, x.shape[1])
        self.calls.append({"start": start, "timestep": timesteps, "flow": flow, "seen": log, "noisy": x})
        return flow


def _check_calls(fixture: Fixture, names: list[str], calls: list[dict[str, Any]]) -> None:
    assert len(names) == len(calls), "another number of network calls"
    for name, call in zip(names, calls):
        frames = fixture[f"{name}.frames"].tolist()
        assert frames == list(range(call["start"], call["start"] + len(frames))), name
        fixture.check(f"{name}.timestep", call["timestep"], atol=1e-3)
        fixture.check(f"{name}.flow", call["flow"])
        assert call["seen"] == _recorded(fixture, name), f"{name} sees other frames"
        fixture.checked.add(f"{name}.key_frame")


def _recorded(fixture: Fixture, name: str) -> Seen:
    first = fixture[f"{name}.query_pos"][0].item()
    positions, frames = fixture[f"{name}.key_pos"].tolist(), fixture[f"{name}.key_frame"].tolist()
    return {(position - first, frame) for position, frame in zip(positions, frames)}


def check_rolling_forcing(fixture: Fixture) -> None:
    """Compare joint windows, and the passes that write their oldest chunk once it is finished."""
    meta, pipeline, noise = fixture.meta, fixture.meta["pipeline"], fixture["noise"]
    chunk, sink = pipeline["num_frame_per_block"], pipeline["sink"]
    causal = CausalConfig(
        chunk, pipeline["window"], sink, context_noise=pipeline["context_noise"], policy="rolling-forcing"
    )
    listed = tuple(map(float, pipeline["denoising_step_list"]))
    steps = StepConfig(listed, pipeline["timestep_shift"], pipeline["warp_denoising_step"], "table")
    draws = {(start, 0): noise[:, start : start + chunk] for start in range(0, noise.shape[1], chunk)}
    for index, step in itertools.product(range(len(draws)), range(1, len(listed))):
        draw = fixture[f"window{index + step - 1}.chunk{index}.renoise"]
        draws[index * chunk, step] = draw.view_as(draws[index * chunk, 0])
    model = WatchedWindows(fixture.wan())
    chunks = rollout(
        Guided(model, Conditioning(fixture["prompt_embeds.0"])),
        noise=GivenNoise(draws),
        latent_shape=tuple(noise.shape[1:]),  # type: ignore[arg-type]
        causal=causal,
        steps=steps,
        commit_last=True,
    )
    fixture.check("latents", torch.cat([each.latents_BTCHW for each in chunks], 1))
    assert meta["policy"]["passes"] == "joint window, commit of its first chunk"
    # what the reference writes of a chunk that is not finished has no reader
    unread = {f"window{index}.context" for index in range(len(listed) - 1)}
    _check_calls(fixture, [name for name in meta["calls"] if name not in unread], model.calls)


# What a file holds -> the settings by which it is read, beside the bias.
READINGS = {
    "latents": "published=yes",
    "prompt_first.latents": "published=no",
    "keep_first.latents": "published=yes,keeps_first=yes",
}


def check_krea(fixture: Fixture) -> None:
    """Compare windows computed again, under the prompt of their chunk and, as published, that of the one before."""
    for name, setting in READINGS.items():
        keeps = "yes" if name.startswith("keep_first") else "no"
        _check_krea(
            fixture, name, f"krea-bias,{setting},keeps_first={keeps},bias={fixture.meta['pipeline']['kv_bias']}"
        )


def _check_krea(fixture: Fixture, result: str, policy: str) -> None:
    meta, pipeline, noise = fixture.meta, fixture.meta["pipeline"], fixture["noise"]
    chunk, window = pipeline["num_frame_per_block"], pipeline["window"]
    causal = CausalConfig(chunk, window, policy=policy)
    listed = tuple(fixture["denoising_steps"].double().tolist())
    steps = StepConfig(listed, pipeline["timestep_shift"], warp=False, sigma="table")
    draws = {(start, 0): noise[:, start : start + chunk] for start in range(0, noise.shape[1], chunk)}
    for index, step in itertools.product(range(len(draws)), range(1, len(listed))):
        draw = fixture[f"chunk{index}.step{step - 1}.renoise"]
        draws[index * chunk, step] = draw.view_as(draws[index * chunk, 0])
    first, second = fixture["prompt_embeds.0"], fixture["prompt_embeds.1"]
    weights = meta["prompt_weight_at_chunk"]

    def prompt_at(start_frame: int) -> PromptChange:
        weight = weights[start_frame // chunk]
        return PromptChange(Conditioning((1 - weight) * first + weight * second))

    def encode_first(frame: int) -> Tensor:
        return fixture[f"chunk{(frame + pipeline['context_frames']) // chunk}.reencoded"]

    model = WatchedWindows(fixture.wan())
    chunks = rollout(
        Guided(model, Conditioning(first), encode_first=encode_first),
        noise=GivenNoise(draws),
        latent_shape=tuple(noise.shape[1:]),  # type: ignore[arg-type]
        causal=causal,
        steps=steps,
        commit_last=True,
        prompt_at=prompt_at,
    )
    fixture.check(result, torch.cat([each.latents_BTCHW for each in chunks], 1))
    assert len(model.calls) == len(meta["calls"]), "another number of network calls"
    if result == "latents":
        _check_calls(fixture, meta["calls"], model.calls)


WINDOW_CHECKS: dict[str, Callable[[Fixture], None]] = {
    "rolling_forcing": check_rolling_forcing,
    "krea": check_krea,
    "krea_bias": check_krea,
}
