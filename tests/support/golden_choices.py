"""Recorded rollouts of the policies that choose which frames stay: each layer's slots are told by what they hold.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.rollout import rollout
from selfforcing_core.schedule import FlowSchedule, x0_from_flow
from tests.support.golden_fixture import Fixture, GivenNoise

Seen = list[tuple[int, float, set[int]]]  # of each slot: frame, position, and the calls that wrote this


class ContentLog:
    """Stands in for the network: passes calls on, and tells of every layer's slots who wrote what they hold."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.axes = model, model.config, model.axes
        # what was written: layer -> call, frame, position, keys and values of the frame
        self.written: dict[int, list[tuple[int, int, float, Tensor, Tensor, float]]] = defaultdict(list)
        self.calls: list[dict[str, Any]] = []

    def new_cache(self, **sizes: Any) -> KVCache:
        """Return a cache that tells what is written into it."""
        cache = self.model.new_cache(**sizes)
        write = cache.write

        def told(layer: int, k: Tensor, v: Tensor) -> None:
            frames = range(cache.start_frame, cache.end_frame)
            parts = zip(frames, k.split(cache.tokens_per_frame, 1), v.split(cache.tokens_per_frame, 1))
            for frame, own_k, own_v in parts:
                position = frame + cache.position - cache.start_frame
                self.written[layer].append(
                    (len(self.calls), frame, position, own_k.clone(), own_v.clone(), _first(own_v))
                )
            write(layer, k, v)

        cache.write = told
        return cache

    def __call__(self, x: Tensor, timesteps: Tensor, embeds: Tensor, **kwargs: Any) -> Tensor:
        flow, cache = self.model(x, timesteps, embeds, **kwargs), kwargs["cache"]
        log = [self._seen(cache, layer) for layer in range(cache.k.shape[0])]
        self.calls.append({"x": x, "timestep": timesteps, "flow": flow, "seen": log})
        return flow

    def _seen(self, cache: KVCache, layer: int) -> Seen:
        tokens, (bank, bank_end) = cache.tokens_per_frame, cache._bank()
        starts = [*range(0, cache._num_visible(), tokens), *range(bank, bank_end, tokens)]
        log: Seen = []
        for start in starts:
            k, v = (buffer[layer, :, start : start + tokens] for buffer in (cache.k, cache.v))
            # a first layer knows no prompt, and writes a frame again as it was, but for the length of its products
            near = [entry for entry in self.written[layer] if abs(entry[5] - _first(v)) < 1e-5]  # the few to look at
            near = [entry for entry in near if torch.allclose(entry[3], k, atol=1e-5)]
            same = [entry for entry in near if torch.allclose(entry[4], v, atol=1e-5)]
            assert same, "a slot holds what no call wrote"
            log.append((*same[0][1:3], {entry[0] for entry in same}))
        return log


def _first(x: Tensor) -> float:
    return x.flatten()[0].item()


def _compare(fixture: Fixture, prefix: str, calls: list[str], log: ContentLog) -> None:
    """Compare what every layer of every call saw, and, in the main reading, its flow."""
    assert len(log.calls) == len(calls), "another number of network calls"
    for name, call in zip(calls, log.calls):
        frames = call["flow"].shape[1]
        if not name.endswith("recache"):
            fixture.check(f"{prefix}{name}.timestep", call["timestep"], atol=1e-3)
        if f"{prefix}{name}.flow" in fixture.tensors:
            # its first frames are computed for nobody, so ours has fewer
            recorded, limits = fixture[f"{prefix}{name}.flow"][:, -frames:], fixture.meta["tolerance"]
            assert torch.allclose(call["flow"], recorded, atol=limits["atol"], rtol=limits["rtol"]), f"{name}.flow"
            fixture.checked.add(f"{prefix}{name}.flow")
        for layer, events in enumerate(call["seen"]):
            own = f"{prefix}{name}.layer{layer}"
            _compare_slots(fixture, own if f"{own}.key_frame" in fixture.tensors else f"{prefix}{name}", events)


def _compare_slots(fixture: Fixture, name: str, log: Seen) -> None:
    recorded, ours = defaultdict(list), defaultdict(list)
    lists = (fixture[f"{name}.{key}"].tolist() for key in ("key_frame", "key_pos", "key_call"))
    for frame, position, call in zip(*lists):
        recorded[frame, position].append(call)
    for frame, position, calls in log:
        ours[frame, position].append(calls)
    counts = [{key: len(calls) for key, calls in each.items()} for each in (ours, recorded)]
    assert counts[0] == counts[1], name
    for key, calls in recorded.items():  # several calls may have written the same
        assert any(all(map(_is_in, calls, each)) for each in itertools.permutations(ours[key])), f"{name}: {key}"
    fixture.checked.add(f"{name}.key_frame")


def _is_in(call: int, calls: set[int]) -> bool:
    return call in calls


def _calls(fixture: Fixture, prefix: str) -> list[str]:
    named = fixture.meta["calls"] if not prefix else fixture.meta[f"{prefix[:-1]}_calls"]
    return fixture.meta["calls"] if named == "calls" else named


def _draws(fixture: Fixture, chunk: int, solver: str) -> dict[tuple[int, int], Tensor]:
    noise, draws = fixture["noise"], {}
    for index, start in enumerate(range(0, noise.shape[1], chunk)):
        draws[start, 0] = noise[:, start : start + chunk]
        for step in itertools.count():
            name = f"chunk{index}.step{step}.renoise"
            if solver == "unipc" or name not in fixture.tensors:
                break
            draws[start, step + 1] = fixture[name].view_as(draws[start, 0])
    return draws


def _prompts(fixture: Fixture) -> list[Conditioning]:
    return [Conditioning(fixture[f"prompt_embeds.{index}"]) for index in range(fixture.meta["prompts"])]


def check_memflow(fixture: Fixture) -> None:
    """Compare the intended reading, the published one, and the other pipeline of the same repository."""
    pipeline, at_chunk = fixture.meta["pipeline"], fixture.meta["prompt_at_chunk"]
    chunk, prompts = pipeline["num_frame_per_block"], _prompts(fixture)
    listed = tuple(map(float, pipeline["denoising_step_list"]))
    steps = StepConfig(listed, pipeline["timestep_shift"], pipeline["warp_denoising_step"], "table")

    def prompt_at(start_frame: int) -> PromptChange | None:
        index = start_frame // chunk
        is_other = index > 0 and at_chunk[index] != at_chunk[index - 1]
        return PromptChange(prompts[at_chunk[index]]) if is_other else None

    for prefix, name in (("once.", "memflow"), ("", "memflow,published=yes"), ("plain.", "memflow-plain")):
        policy = f"{name},bank={pipeline['bank_size']},record_every={pipeline['record_interval']}"
        log = ContentLog(fixture.wan())
        chunks = rollout(
            Guided(log, prompts[0]),
            noise=GivenNoise(_draws(fixture, chunk, "renoise")),
            latent_shape=tuple(fixture["noise"].shape[1:]),  # type: ignore[arg-type]
            causal=CausalConfig(chunk, pipeline["window"], pipeline["sink"], policy=policy),
            steps=steps,
            commit_last=True,
            prompt_at=None if prefix == "plain." else prompt_at,
        )
        fixture.check(f"{prefix}latents", torch.cat([each.latents_BTCHW for each in chunks], 1))
        _compare(fixture, prefix, _calls(fixture, prefix), log)


def check_longlive2(fixture: Fixture) -> None:
    """Compare latents, flows and slots; the other settings of the same code are not ours."""
    pipeline, at_chunk = fixture.meta["pipeline"], fixture.meta["prompt_at_chunk"]
    chunk, prompts, cuts = pipeline["num_frame_per_block"], _prompts(fixture), fixture.meta["cut_at_chunk"]
    # its table begins at 0.999, where the training's ends
    listed = tuple(999.0 * (1 - index / pipeline["sampling_steps"]) for index in range(pipeline["sampling_steps"]))
    steps = StepConfig(listed, pipeline["timestep_shift"], solver="unipc", is_whole=True)
    schedule = FlowSchedule(steps)
    fixture.check("timesteps", torch.tensor(schedule.timesteps))
    fixture.check("sigmas", torch.tensor([*schedule.sigmas, 0.0]))

    def prompt_at(start_frame: int) -> PromptChange | None:
        index = start_frame // chunk
        if index == 0 or (at_chunk[index] == at_chunk[index - 1] and index not in cuts):
            return None
        return PromptChange(prompts[at_chunk[index]], "cut" if index in cuts else None)

    policy = f"longlive2,shot_offset={pipeline['multi_shot_rope_offset']:g}"
    log = ContentLog(fixture.wan())
    chunks = rollout(
        Guided(log, prompts[at_chunk[0]]),
        noise=GivenNoise(_draws(fixture, chunk, "unipc")),
        latent_shape=tuple(fixture["noise"].shape[1:]),  # type: ignore[arg-type]
        causal=CausalConfig(chunk, pipeline["window"], pipeline["sink"], policy=policy),
        steps=steps,
        commit_last=True,
        prompt_at=prompt_at,
    )
    fixture.check("latents", torch.cat([each.latents_BTCHW for each in chunks], 1))
    _compare(fixture, "", fixture.meta["calls"], log)


def check_sdv2(fixture: Fixture) -> None:
    """Compare the repaired ring and the published one.

    Chunk by chunk, each from the snapshot of the one before, since the input video decides each one's first step.
    """
    pipeline, num_frames = fixture.meta["pipeline"], fixture["input_latents"].shape[1]
    first = pipeline["first_chunk_frames"]
    settings = f"refresh_below={pipeline['adapt_sink_threshold']},reset_at={pipeline['position_reset_at']}"
    for prefix, name in (("repaired.", "sdv2"), ("", "sdv2,published=yes")):
        log, latents, snapshot = ContentLog(fixture.wan()), [], None
        for index, (start, length) in enumerate(_sdv2_chunks(first, num_frames)):
            channels, height, width = fixture["input_latents"].shape[2:]
            # the first chunk is longer than the others, and chooses nothing
            own = "self-forcing" if index == 0 else f"{name},{settings}"
            causal = CausalConfig(length, pipeline["window"], pipeline["sink"], cache_source="last_step", policy=own)
            steps = _sdv2_steps(fixture, index)
            chunks = rollout(
                Guided(log, _prompts(fixture)[0]),
                noise=GivenNoise(_sdv2_draws(fixture, index, start, length)),
                latent_shape=(first * num_frames, channels, height, width),  # of which each call makes one chunk
                causal=causal,
                steps=steps,
                start=snapshot,
            )
            finished = next(chunks)
            latents.append(finished.latents_BTCHW)
            snapshot = finished.snapshot()
            if not prefix:
                sigmas = FlowSchedule(steps).sigmas
                for step, call in enumerate(log.calls[-len(sigmas) :]):
                    x0 = x0_from_flow(call["x"], call["flow"], sigmas[step])
                    fixture.check(f"chunk{index}.step{step}.x0", x0)
        fixture.check(f"{prefix}latents", torch.cat(latents, 1))
        _compare(fixture, prefix, _calls(fixture, prefix), log)


def _sdv2_chunks(first: int, num_frames: int) -> Iterator[tuple[int, int]]:
    yield 0, first
    yield from ((frame, 1) for frame in range(first, num_frames))


def _sdv2_steps(fixture: Fixture, index: int) -> StepConfig:
    pipeline = fixture.meta["pipeline"]
    listed = [float(fixture["first_step"][index]), *map(float, pipeline["denoising_step_list"][1:])]
    listed[0] += 1e-6 * (listed[0] == listed[1])  # steps have to fall, by less than float32 can tell if need be
    return StepConfig(tuple(listed), pipeline["timestep_shift"], pipeline["warp_denoising_step"], "table")


def _sdv2_draws(fixture: Fixture, index: int, start: int, length: int) -> dict[tuple[int, int], Tensor]:
    scale, clean = fixture["noise_scale"][index], fixture["input_latents"][:, start : start + length]
    draws = {(start, 0): fixture[f"chunk{index}.noise"] * scale + clean * (1 - scale)}
    for step in range(len(fixture.meta["pipeline"]["denoising_step_list"]) - 1):
        draws[start, step + 1] = fixture[f"chunk{index}.step{step}.renoise"].view_as(draws[start, 0])
    return draws


CHOICES: dict[str, Callable[[Fixture], None]] = {
    "memflow": check_memflow,
    "longlive2": check_longlive2,
    "sdv2": check_sdv2,
}
