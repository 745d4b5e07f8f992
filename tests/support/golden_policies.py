"""Checks of whole rollouts, with the log of what each call saw, against recorded numbers; see test_golden.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import chunk_lengths
from selfforcing_core.guided import Guided
from selfforcing_core.model import CausalWan
from selfforcing_core.rollout import rollout
from selfforcing_core.schedule import FlowSchedule
from tests.support.golden_choices import CHOICES
from tests.support.golden_fixture import Fixture, GivenNoise
from tests.support.golden_rings import POLICY_OF, check_ring
from tests.support.golden_windows import WINDOW_CHECKS
from tests.support.tiny_wan import ordered

# Recorded files of policies that the cache does not have yet. Whatever is not named here has to pass.
# Not asked for: its steps lie in one batch, each with a cache of its own, which is another function.
WAITING = frozenset({"policy_sdv2_batch"})


class CallLog:
    """Stands in for the network: passes calls on, and compares each with what was recorded of it."""

    def __init__(self, model: CausalWan, fixture: Fixture) -> None:
        self.model, self.config, self.new_cache, self.fixture = model, model.config, model.new_cache, fixture
        self.calls = iter(fixture.meta["calls"])
        self.written: list[Tensor] = []  # what each call so far wrote: values of the first layer, by frame

    def __call__(self, x: Tensor, timesteps: Tensor, embeds: Tensor, **kwargs: Any) -> Tensor:
        flow, cache = self.model(x, timesteps, embeds, **kwargs), kwargs["cache"]
        name, start, count = next(self.calls), kwargs["start_frame"], x.shape[1]
        self.fixture.check(f"{name}.flow", flow)
        self.fixture.check(f"{name}.timestep", timesteps, atol=1e-3)
        frames = list(range(start, start + count))
        values = ordered(cache, 0)[1].unflatten(1, (-1, cache.tokens_per_frame)).unbind(1)
        self.written.append(torch.stack(values[-count:], 1))
        # Keys are turned by the number of their frame, so that it is their position too.
        log = list(cache.frames())
        for key, actual in (("frames", frames), ("query_pos", frames), ("key_frame", log), ("key_pos", log)):
            assert self.fixture[f"{name}.{key}"].tolist() == actual, f"{name}.{key}"
        assert self.fixture[f"{name}.key_call"].tolist() == [self._writer(value) for value in values], name
        self.fixture.checked.add(f"{name}.key_call")
        return flow

    def _writer(self, value: Tensor) -> int:
        """The latest call that wrote exactly this."""
        writers = (index for index, frames in enumerate(self.written) for own in frames.unbind(1) if own.equal(value))
        return max(writers)


def check_policy(fixture: Fixture) -> None:
    pipeline, noise = fixture.meta["pipeline"], fixture["noise"]
    causal = CausalConfig(pipeline["num_frame_per_block"], pipeline["window"], pipeline["sink"])
    listed, first = (
        tuple(map(float, pipeline[key])) for key in ("denoising_step_list", "denoising_step_list_first_chunk")
    )
    warp = pipeline["warp_denoising_step"]
    steps = StepConfig(listed, pipeline["timestep_shift"], warp, "table", pipeline["solver"], first)
    for key, index in (("denoising_steps", 1), ("denoising_steps_first_chunk", 0)):
        fixture.check(key, torch.tensor(FlowSchedule(steps.of_chunk(index)).timesteps), atol=1e-3)
    lengths = chunk_lengths(noise.shape[1], causal.chunk)
    draws = {(index * causal.chunk, 0): chunk for index, chunk in enumerate(noise.split(lengths, 1))}
    for index, length in enumerate(lengths):
        for step in range(len(steps.of_chunk(index).steps) - 1):
            draw = fixture[f"chunk{index}.step{step}.renoise"]
            draws[index * causal.chunk, step + 1] = draw.unflatten(0, (-1, length))
    log = CallLog(fixture.wan(), fixture)
    chunks = rollout(
        Guided(log, Conditioning(fixture["prompt_embeds.0"])),
        noise=GivenNoise(draws),
        latent_shape=tuple(noise.shape[1:]),
        causal=causal,
        steps=steps,
        commit_last=True,
    )
    fixture.check("latents", torch.cat([chunk.latents_BTCHW for chunk in chunks], 1))
    assert next(log.calls, None) is None, "fewer network calls than the reference makes"


def check_any(fixture: Fixture) -> None:
    """Compare a file as its policy asks."""
    preset = fixture.meta["preset"]
    checks = {**WINDOW_CHECKS, **CHOICES}
    checks.get(preset, check_ring if preset in POLICY_OF else check_policy)(fixture)


POLICY_CHECKS: dict[str, Callable[[Fixture], None]] = {"policy_rollout": check_any}
