"""Recorded rollouts of the family's cache policies: which policy each file is, and its comparison.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.history import PromptChange
from selfforcing_core.rollout import rollout
from tests.support.golden_fixture import Fixture, GivenNoise


def _plain(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda policy: name


def _reward(policy: dict[str, Any]) -> str:
    return f"reward,sink_average={policy['memory']['alpha']}"


def _memrope(policy: dict[str, Any]) -> str:
    memory = policy["memory"]
    return f"memrope,means={memory['alpha_long']}/{memory['alpha_short']}"


# What a file calls its policy -> ours, with the settings that the file has.
POLICY_OF: dict[str, Callable[[dict[str, Any]], str]] = {
    "longlive": _plain("longlive"),
    "longlive_moving_sink": _plain("longlive-interactive"),
    "longlive_infinity": _plain("longlive-infinity"),
    "infinite_forcing": _plain("infinite"),
    "infinity_rope": _plain("infinity-rope"),
    "infinity_rope_wide": _plain("infinity-rope"),
    "reward_forcing": _reward,
    "memrope": _memrope,
    "rolling_sink": _plain("rolling-sink"),
    "flashdreams_long": _plain("flashdreams"),
}
# Where a file holds two readings, the one that is ours; the other one is told as published=yes.
LATENTS = {"infinity_rope_wide": "latents_query_at_tail"}


class Watched:
    """Stands in for the network: passes calls on, keeping what each saw, and of which frames."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.axes, self.new_cache = model, model.config, model.axes, model.new_cache
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, embeds: Tensor, **kwargs: Any) -> Tensor:
        flow = self.model(x, timesteps, embeds, **kwargs)
        cache = kwargs["cache"]
        slots = range(cache._num_visible() // cache.tokens_per_frame)
        place = {(cache.slot_positions[slot] - cache.position, cache.slot_frames[slot]) for slot in slots}
        frames = list(range(kwargs["start_frame"], kwargs["start_frame"] + x.shape[1]))
        self.calls.append({"timestep": timesteps, "flow": flow, "seen": place, "frames": frames})
        return flow


def check_ring(fixture: Fixture) -> None:
    """Compare latents, flows, and of every call which frames it saw at which distance, in each reading."""
    policy = POLICY_OF[fixture.meta["preset"]](fixture.meta["policy"])
    other = LATENTS.get(fixture.meta["preset"])
    if other is not None:
        _check_reading(fixture, policy, other)
    _check_reading(fixture, policy if other is None else f"{policy},published=yes", "latents")


def _check_reading(fixture: Fixture, policy: str, main: str) -> None:
    meta, pipeline = fixture.meta, fixture.meta["pipeline"]
    chunk, sink = pipeline["num_frame_per_block"], pipeline["sink"]
    causal = CausalConfig(chunk, pipeline["window"], sink, context_noise=pipeline["context_noise"], policy=policy)
    listed = tuple(map(float, pipeline["denoising_step_list"]))
    steps = StepConfig(listed, pipeline["timestep_shift"], pipeline["warp_denoising_step"], "table")
    noise = fixture["noise"]
    starts = range(0, noise.shape[1], chunk)
    draws = {(start, 0): noise[:, start : start + chunk] for start in starts}
    for index, start in enumerate(starts):
        for step in range(len(listed) - 1):
            draws[start, step + 1] = fixture[f"chunk{index}.step{step}.renoise"].view_as(draws[start, 0])
    prompts = [Conditioning(fixture[f"prompt_embeds.{index}"]) for index in range(meta["prompts"])]
    at_chunk, cuts = meta["prompt_at_chunk"], meta["policy"].get("cut_at_chunk", [])

    def prompt_at(start_frame: int) -> PromptChange | None:
        index = start_frame // chunk
        if index == 0 or at_chunk[index] == at_chunk[index - 1]:
            return None
        return PromptChange(prompts[at_chunk[index]], "cut" if index in cuts else None)

    model = Watched(fixture.wan())
    chunks = rollout(
        Guided(model, prompts[at_chunk[0]]),
        noise=GivenNoise(draws),
        latent_shape=noise.shape[1:],  # type: ignore[arg-type]
        causal=causal,
        steps=steps,
        commit_last=True,
        prompt_at=prompt_at,
    )
    latents = torch.cat([each.latents_BTCHW for each in chunks], 1)
    fixture.check(main, latents)
    assert len(model.calls) == len(meta["calls"]), "another number of network calls"
    for name, call in zip(meta["calls"], model.calls):
        recorded = fixture[f"{name}.frames"].tolist()
        if name.endswith("recache") and call["frames"] != recorded:
            # What was evicted is computed there for nobody: ours has the last of these frames.
            assert call["frames"] == recorded[-len(call["frames"]) :], f"{name} writes other frames"
            continue
        assert call["frames"] == recorded, f"{name} is of other frames"
        if main == "latents":
            fixture.check(f"{name}.timestep", call["timestep"], atol=1e-3)
            fixture.check(f"{name}.flow", call["flow"])
            assert call["seen"] == _seen(fixture, name), f"{name} sees other frames"


def _seen(fixture: Fixture, name: str) -> set[tuple[float, int]]:
    """Return the frames that a recorded call sees and how far each stands from the call's first frame."""
    first = fixture[f"{name}.query_pos"][0].item()
    positions, frames = fixture[f"{name}.key_pos"].tolist(), fixture[f"{name}.key_frame"].tolist()
    return {(position - first, frame) for position, frame in zip(positions, frames)}
