"""Guidance, many steps, and image conditions: the rollout against loops written out by hand."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import CONTEXT, SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.solver import new_solver
from tests.support.tiny_wan import CONFIG, FRAME, guided, random_text, random_wan

I2V = replace(CONFIG, model_type="i2v", in_dim=FRAME[0] + 5)


def video(model: CausalWan, text: Conditioning, frames: int, chunk: int, steps: StepConfig, **options: Any) -> Tensor:
    chunks = rollout(
        guided(model, text, options),
        noise=SeededNoise(0),
        latent_shape=(frames, *FRAME),
        causal=CausalConfig(chunk),
        steps=steps,
        **options,
    )
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def guided_flow(model: CausalWan, x: Tensor, timestep: float, guidance: float) -> Tensor:
    timesteps = torch.full(x.shape[:2], timestep)
    positive, negative = random_text().prompt_embeds_BPE, random_text(seed=5).prompt_embeds_BPE
    wanted = model(x, timesteps, positive)
    unwanted = model(x, timesteps, negative)
    return (unwanted + guidance * (wanted - unwanted)).float()


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_guided_euler_equals_the_loop_by_hand(guidance: float) -> None:
    model, steps = random_wan(), StepConfig.even(6, shift=3.0)
    sigmas = (*FlowSchedule(steps).sigmas, 0.0)
    x = SeededNoise(0).draw(0, 0, (1, 4, *FRAME))
    for sigma, following in zip(sigmas, sigmas[1:]):
        x = x + guided_flow(model, x, 1000 * sigma, guidance) * (following - sigma)
    result = video(model, random_text(), 4, 4, steps, negative=random_text(seed=5), guidance=guidance)
    torch.testing.assert_close(result, x)


def test_unipc_equals_the_librarys_own_loop() -> None:
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    model, count = random_wan(), 12
    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        pytest.skip("diffusers below 0.37 takes no list of sigmas, so its own loop has other ones")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
    x = SeededNoise(0).draw(0, 0, (1, 4, *FRAME))
    for index, timestep in enumerate(scheduler.timesteps):  # rounded to whole numbers, the network gets the exact ones
        flow = guided_flow(model, x, 1000 * float(scheduler.sigmas[index]), 1.0)
        x = scheduler.step(flow, timestep, x, return_dict=False)[0]
    result = video(model, random_text(), 4, 4, StepConfig.even(count, shift=3.0, solver="unipc"))
    torch.testing.assert_close(result, x.float(), atol=1e-4, rtol=1e-4)


def solve_gaussian(solver: str, count: int, spread: float) -> float:
    """Where noise 1 ends if the clean data are Gaussian with this spread, whose flow is known exactly."""
    schedule = FlowSchedule(StepConfig.even(count, shift=3.0, solver=solver))
    stepper, x = new_solver(solver, schedule, []), torch.ones(1, 1, 1, 1, 1)
    for step, sigma in enumerate(schedule.sigmas):
        clean = x * (1 - sigma) * spread**2 / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        flow = (x - clean) / sigma
        x = x - sigma * flow if step == count - 1 else stepper.advance(x, flow, step)
    return float(x)


def test_solvers_reach_the_exact_solution_and_unipc_with_fewer_steps() -> None:
    spread = 0.5  # the exact path takes noise 1 to data 0.5
    assert abs(solve_gaussian("euler", 500, spread) - spread) < 5e-3
    errors = {solver: abs(solve_gaussian(solver, 40, spread) - spread) for solver in ("euler", "unipc")}
    assert errors["unipc"] < 0.2 * errors["euler"]


def test_each_condition_has_its_own_cache_when_guided() -> None:
    """With the same prompt on both sides guidance changes nothing; with different ones each side sees its own past."""
    model, steps, text = random_wan(), StepConfig((1000.0, 500.0)), random_text()
    plain = video(model, text, 6, 2, steps)
    torch.testing.assert_close(video(model, text, 6, 2, steps, negative=text, guidance=4.0), plain)
    ignored = video(model, text, 6, 2, steps, negative=random_text(seed=5), guidance=0.0)
    assert not torch.allclose(ignored, plain)
    alone = video(model, random_text(seed=5), 6, 2, steps)
    torch.testing.assert_close(ignored, alone)


def test_guidance_of_one_costs_one_call_per_step() -> None:
    calls: list[tuple[int, int]] = []
    model, text = random_wan(), random_text()
    count = 0
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        return forward(*args, **kwargs)

    model.forward = counting  # type: ignore[method-assign]
    note = {"on_step": lambda chunk, step: calls.append((chunk, step))}
    video(model, text, 4, 2, StepConfig((1000.0, 500.0)), negative=random_text(seed=5), guidance=1.0, **note)
    assert count == len(calls) == 5
    assert calls[2] == (0, CONTEXT)


def image_condition(frames: int, seed: int = 3) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, frames, 5, *FRAME[1:], generator=generator, dtype=torch.float64)
    clip = torch.randn(1, 7, 1280, generator=generator, dtype=torch.float64)
    return Conditioning(random_text().prompt_embeds_BPE, image, clip)


def test_every_chunk_sees_its_own_frames_of_the_image_condition() -> None:
    """Changing the condition of a chunk changes that chunk and those after it, and nothing before."""
    model, steps = random_wan(config=I2V), StepConfig((1000.0, 500.0))
    given = image_condition(6)
    plain = video(model, given, 6, 2, steps)
    assert given.image_BTCHW is not None
    image = given.image_BTCHW.clone()
    image[:, 2:4] += 1
    changed = video(model, replace(given, image_BTCHW=image), 6, 2, steps)
    assert torch.equal(changed[:, :2], plain[:, :2])
    assert not torch.allclose(changed[:, 2:4], plain[:, 2:4])
    clip = video(model, replace(given, clip_BIY=image_condition(6, seed=4).clip_BIY), 6, 2, steps)
    assert not torch.allclose(clip[:, :2], plain[:, :2])


def test_cached_image_tokens_give_what_the_uncached_network_gives() -> None:
    model, given = random_wan(config=I2V), image_condition(2)
    noisy, timesteps = torch.randn(1, 2, *FRAME, dtype=torch.float64), torch.full((1, 2), 700.0)
    cache = model.new_cache(
        batch=1, latent_height=FRAME[1], latent_width=FRAME[2], capacity=2, like=given.prompt_embeds_BPE
    )
    image = {"image_BTCHW": given.image_BTCHW, "clip_BIY": given.clip_BIY}
    with torch.no_grad():
        for _ in range(2):  # the second time the text and image tokens come from the cache
            cached = model(noisy, timesteps, given.prompt_embeds_BPE, cache=cache, **image)
            torch.testing.assert_close(cached, model(noisy, timesteps, given.prompt_embeds_BPE, **image))


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (I2V, random_text(), "give it an image"),
        (CONFIG, image_condition(4), "takes no image condition"),
        (I2V, image_condition(3), "make it for the video's own size and length"),
        (I2V, replace(image_condition(4), clip_BIY=torch.zeros(1, 7, 99)), "ViT-H/14"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(config: Any, given: Conditioning, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        video(random_wan(config=config), given, 4, 2, StepConfig((1000.0,)))


@pytest.mark.parametrize(("solver", "message"), [("heun", "use renoise, euler, unipc")])
def test_unknown_solvers_are_refused(solver: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepConfig(solver=solver)
    with pytest.raises(ValueError, match="use 1 or more"):
        StepConfig.even(0, shift=5.0)
