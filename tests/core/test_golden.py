"""Our networks and our rollout against recorded numbers of the reference implementations.

Runs on the folder SELFFORCING_GOLDEN, else on tests/golden. Everything, sizes included, is read from the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder
from selfforcing_core.codecs.umt5 import umt5_from_wan_state_dict
from selfforcing_core.codecs.umt5_layout import wan_umt5_shapes
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, TAEHVConfig
from selfforcing_core.geometry import chunk_lengths, tokens_per_frame
from selfforcing_core.guided import Guided
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import CONTEXT
from selfforcing_core.rollout import rollout
from selfforcing_core.schedule import (
    FlowSchedule,
    add_noise,
    euler_step,
    flow_from_x0,
    nearest_sigma,
    shift_sigma,
    sigma_table,
    training_weights,
    x0_from_flow,
)
from tests.support.golden_fixture import FOLDER, Fixture, GivenNoise, read_fixture, read_metadata
from tests.support.golden_media import MEDIA_CHECKS
from tests.support.golden_networks import NETWORK_CHECKS
from tests.support.golden_policies import POLICY_CHECKS, WAITING
from tests.support.golden_training import TRAINING_CHECKS
from tests.support.tiny_wan import ordered


def check_scheduler(fixture: Fixture) -> None:
    for number in fixture.meta["shifts"]:
        shift = f"shift{number:g}"
        table = sigma_table(number)
        fixture.check(f"{shift}.sigmas", table)
        fixture.check(f"{shift}.timesteps", table * 1000, atol=1e-3)
        fixture.check(f"{shift}.train_weights", training_weights(number), atol=1e-5)
        for index, steps in enumerate(fixture.meta["lists"]):
            warped = torch.tensor([1000 * float(shift_sigma(step / 1000, number)) for step in steps])
            fixture.check(f"{shift}.list{index}.warped", warped, atol=1e-3)
        _check_conversions(fixture, shift, table)
        _check_euler(fixture, shift, sigma_table(number, fixture.meta["short_steps"]))
        ops = nearest_sigma(fixture[f"{shift}.ops.timestep"], table)
        weights = training_weights(number)[(table[None] - ops[:, None]).abs().argmin(-1)]
        fixture.check(f"{shift}.ops.weight", weights, atol=1e-5)


def _check_conversions(fixture: Fixture, shift: str, table: Tensor) -> None:
    ops = {key: fixture[f"{shift}.ops.{key}"] for key in ("x0", "noise", "flow", "timestep", "xt")}
    sigma = nearest_sigma(ops["timestep"], table)
    fixture.check(f"{shift}.ops.xt", add_noise(ops["x0"], ops["noise"], sigma))
    x0 = x0_from_flow(ops["xt"].double(), ops["flow"].double(), sigma).float()
    fixture.check(f"{shift}.ops.x0_from_flow", x0)
    fixture.check(f"{shift}.ops.flow_from_x0", flow_from_x0(ops["xt"], ops["x0"], sigma), rtol=1e-4)
    again = flow_from_x0(ops["xt"], fixture[f"{shift}.ops.x0_from_flow"], sigma)
    fixture.check(f"{shift}.ops.flow_from_x0.again", again, rtol=1e-4)


def _check_euler(fixture: Fixture, shift: str, table: Tensor) -> None:
    fixture.check(f"{shift}.short.sigmas", table)
    fixture.check(f"{shift}.short.timesteps", table * 1000, atol=1e-3)
    nearest = (table * 1000 - fixture[f"{shift}.short.step_in_timestep"].double()[:, None]).abs().argmin(-1)
    following = torch.cat([table, torch.zeros(1)])[nearest + 1]
    noisy, flow = fixture[f"{shift}.ops.xt"], fixture[f"{shift}.ops.flow"]
    fixture.check(f"{shift}.short.step_out", euler_step(noisy, flow, table[nearest], following))
    fixture.check(f"{shift}.short.last_step_out", euler_step(noisy, flow, float(table[-1]), 0.0))


class Recorder:
    """Stands in for the network: passes calls on, keeping what went in, what came out and the first layer's cache."""

    def __init__(self, model: CausalWan) -> None:
        self.model, self.config, self.calls = model, model.config, []
        self.new_cache = model.new_cache

    def __call__(self, x: Tensor, timesteps: Tensor, embeds: Tensor, **kwargs: Any) -> Tensor:
        flow = self.model(x, timesteps, embeds, **kwargs)
        cache = kwargs["cache"]
        self.calls.append(
            {
                "start": kwargs["start_frame"],
                "noisy": x,
                "timestep": timesteps,
                "flow": flow,
                "cache": ordered(cache, 0),
                "end": cache.end_frame,
                "cross": cache.cross[0],
            }
        )
        return flow


def check_rollout(fixture: Fixture) -> None:
    pipeline = fixture.meta["pipeline"]
    causal = CausalConfig(
        pipeline["num_frame_per_block"],
        pipeline["local_attn_size"],
        pipeline["sink_size"],
        pipeline["independent_first_frame"],
        pipeline["context_noise"],
    )
    listed = tuple(map(float, pipeline["denoising_step_list"]))
    steps = StepConfig(listed, pipeline["timestep_shift"], pipeline["warp_denoising_step"], "table")
    fixture.check("denoising_steps", torch.tensor(FlowSchedule(steps).timesteps), atol=1e-3)
    noise, prefix = fixture["noise"], fixture.tensors.get("initial_latent")
    given = 0 if prefix is None else prefix.shape[1]
    num_frames = noise.shape[1] + given
    spans = _spans(chunk_lengths(num_frames, causal.chunk, independent_first_frame=causal.independent_first_frame))
    generated = [span for span in spans if span[0] >= given]

    model = Recorder(fixture.wan())
    chunks = rollout(
        Guided(model, Conditioning(fixture["prompt_embeds"])),
        noise=_recorded_noise(fixture, generated, given, len(listed)),
        latent_shape=(num_frames, *noise.shape[2:]),
        causal=causal,
        steps=steps,
        commit_last=True,
        start=prefix,
    )
    fixture.check("latents", torch.cat([chunk.latents_BTCHW for chunk in chunks], 1))

    calls = iter(model.calls)
    for index in range(len(spans) - len(generated)):
        fixture.check(f"prefix{index}.flow", next(calls)["flow"])
    for index, (start, _) in enumerate(generated):
        _check_chunk(fixture, index, start, calls, len(listed))
    assert next(calls, None) is None, "more network calls than the reference makes"


def _spans(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(sum(lengths[:index]), length) for index, length in enumerate(lengths)]


def _recorded_noise(fixture: Fixture, spans: list[tuple[int, int]], given: int, num_steps: int) -> GivenNoise:
    noise = fixture["noise"]
    draws = {(start, 0): noise[:, start - given : start - given + length] for start, length in spans}
    for index, (start, length) in enumerate(spans):
        for step in range(num_steps - 1):
            draw = fixture[f"chunk{index}.step{step}.renoise"]
            draws[start, step + 1] = draw.reshape(noise.shape[0], length, *noise.shape[2:])
    return GivenNoise(draws)


def _check_chunk(fixture: Fixture, index: int, start: int, calls: Any, num_steps: int) -> None:
    name, per_frame = f"chunk{index}", tokens_per_frame(*fixture["noise"].shape[-2:])
    assert fixture[f"{name}.current_start"] == start * per_frame
    for step in [*range(num_steps), CONTEXT]:
        call = next(calls)
        assert call["start"] == start
        where = f"{name}.context" if step == CONTEXT else f"{name}.step{step}"
        for key in ("noisy", "timestep", "flow"):
            if f"{where}.{key}" in fixture.tensors:
                fixture.check(f"{where}.{key}", call[key], **({"atol": 1e-3} if key == "timestep" else {}))
    for key, tensor in zip("kv", call["cache"]):
        fixture.check(f"{name}.cache.{key}", tensor)
    for key, tensor in zip("kv", call["cross"][0]):
        fixture.check(f"cross.{key}", tensor)
    ends = [call["end"] * per_frame, call["cache"][0].shape[1]]
    assert fixture[f"{name}.cache.ends"].tolist() == ends


def check_taehv(fixture: Fixture) -> None:
    sizes = fixture.meta["model"]
    config = TAEHVConfig(sizes["latent_channels"], sizes["image_channels"], patch_size=sizes["patch_size"])
    taehv = TAEHV(config)
    assert taehv.frames_to_trim == fixture.meta["frames_to_trim"]
    taehv.load_state_dict(fixture.draw({name: p.shape for name, p in taehv.state_dict().items()}))
    fixture.check("decoded_raw", taehv.decode_untrimmed(fixture["latents"]))
    fixture.check("encoded", taehv.encode(fixture["pixels"]))

    decoder = StreamingDecoder(taehv)
    pieces = [decoder.decode(piece) for piece in fixture["latents"].split(fixture.meta["stream_chunks"], 1)]
    assert [piece.shape[1] for piece in pieces] == fixture.meta["stream_frames_out_after_trim"]
    final = fixture["decoded_raw"].clamp(0, 1)[:, fixture.meta["frames_to_trim"] :]
    torch.testing.assert_close(torch.cat(pieces, 1), final, atol=fixture.meta["tolerance"]["atol"], rtol=1e-4)


def check_taehv_preview(fixture: Fixture) -> None:
    grow, space = fixture.meta["decoder_time_upscale"], fixture.meta["decoder_space_upscale"]
    full = TAEHV(TAEHVConfig(latent_channels=fixture["latents"].shape[2]))
    preview = TAEHV(TAEHVConfig(fixture["latents"].shape[2], decoder_time=tuple(grow), decoder_space=tuple(space)))
    preview.load_state_dict(fixture.draw({name: p.shape for name, p in full.state_dict().items()}))
    assert preview.frames_to_trim == fixture.meta["frames_to_trim"]
    fixture.check("decoded_raw", preview.decode_untrimmed(fixture["latents"]))


def check_umt5(fixture: Fixture) -> None:
    keys = ("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
    sizes = {key: fixture.meta["model"][key] for key in keys}
    model = umt5_from_wan_state_dict(fixture.draw(wan_umt5_shapes(**sizes)), num_heads=sizes["num_heads"])
    fixture.check("hidden", model(fixture["ids"], fixture["mask"]))
    fixture.check("prompt_embeds", model.embed(fixture["ids"], fixture["mask"]))


CHECKS: dict[str, Callable[[Fixture], None]] = {
    "scheduler": check_scheduler,
    "causal_rollout": check_rollout,
    "taehv": check_taehv,
    "taehv_preview": check_taehv_preview,
    "umt5": check_umt5,
    **NETWORK_CHECKS,
    **MEDIA_CHECKS,
    **TRAINING_CHECKS,
    **POLICY_CHECKS,
}
KINDS = {path.stem: read_metadata(path).get("kind") for path in sorted(FOLDER.glob("*.safetensors"))}


def test_every_listed_kind_is_in_the_folder() -> None:
    missing = sorted(set(CHECKS) - set(KINDS.values()))
    assert not missing, f"{FOLDER} has no fixture of kind {', '.join(missing)}"


def test_every_file_in_the_folder_is_compared() -> None:
    unknown = sorted(f"{name} of kind {kind}" for name, kind in KINDS.items() if kind not in CHECKS)
    assert not unknown, f"{FOLDER} holds what nothing here compares: {', '.join(unknown)}"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind in CHECKS and name not in WAITING])
def test_matches_recorded_numbers(name: str, record_property: Callable[[str, object], None]) -> None:
    fixture = read_fixture(FOLDER / f"{name}.safetensors")
    with torch.no_grad():
        CHECKS[fixture.meta["kind"]](fixture)
    assert fixture.checked, f"{name} compared nothing"
    record_property("tensors", len(fixture.checked))
