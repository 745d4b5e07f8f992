"""Checks of the network and of the bidirectional sampler against recorded numbers; see test_golden.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import chunk_lengths
from selfforcing_core.guided import Guided
from selfforcing_core.masks import block_causal_frames, teacher_forcing_frames
from selfforcing_core.rollout import BackpropSpec, rollout
from selfforcing_core.schedule import FlowSchedule
from tests.support.golden_fixture import Fixture, GivenNoise


def _conditioning(fixture: Fixture) -> Conditioning:
    """Prompt, and for image-to-video networks the image; recorded channels-first."""
    if "y" not in fixture.tensors:
        return Conditioning(fixture["prompt_embeds"])
    return Conditioning(fixture["prompt_embeds"], fixture["y"].transpose(1, 2), fixture["clip_fea"].float())


@torch.enable_grad()
def check_forward(fixture: Fixture) -> None:
    model, given = fixture.wan(), _conditioning(fixture)
    noisy = fixture["noisy"]
    timesteps = fixture["timestep"][:, None].expand(-1, noisy.shape[1])
    flow = model(noisy, timesteps, given.prompt_embeds_BPE, image_BTCHW=given.image_BTCHW, clip_BIY=given.clip_BIY)
    fixture.check("flow", flow)
    flow.square().mean().backward()
    _check_gradients(fixture, "", model)


def _check_gradients(fixture: Fixture, case: str, model: torch.nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name in [name for name in fixture.tensors if name.startswith(f"{case}grad.")]:
        gradient = parameters[name.removeprefix(f"{case}grad.")].grad
        assert gradient is not None
        fixture.check(name, gradient, rtol=1e-3, atol=1e-6)


@torch.enable_grad()
def check_few_step(fixture: Fixture) -> None:
    """The whole sampler, and the training rollouts that stop early, each with gradient through its last evaluation."""
    listed = tuple(map(float, fixture.meta["denoising_step_list"]))
    steps = StepConfig(listed, fixture.meta["timestep_shift"], fixture.meta["warp_denoising_step"], "table")
    fixture.check("denoising_steps", torch.tensor(FlowSchedule(steps).timesteps), atol=1e-3)
    noise = fixture["noise"]
    draws = {(0, 0): noise}
    draws |= {(0, step + 1): fixture[f"step{step}.renoise"].reshape(noise.shape) for step in range(len(listed) - 1)}

    def sample(exit_step: int) -> tuple[torch.nn.Module, Tensor]:
        model = fixture.wan()
        chunks = list(
            rollout(
                Guided(model, _conditioning(fixture)),
                noise=GivenNoise(draws),
                latent_shape=tuple(noise.shape[1:]),
                causal=CausalConfig(chunk=noise.shape[1]),
                steps=steps,
                backprop=BackpropSpec([exit_step]),
            )
        )
        assert len(chunks) == 1
        return model, chunks[0].latents_BTCHW

    for step in range(len(listed)):
        model, result = sample(step)
        fixture.check(f"step{step}.x0", result)
        if f"exit{step}.pred" in fixture.tensors:
            fixture.check(f"exit{step}.pred", result)
            result.square().mean().backward()
            _check_gradient_norms(fixture, f"exit{step}.grad_norm.", model)
    if "published_inference.num_evals" in fixture.tensors:  # the published loop stops one evaluation early
        last = int(fixture["published_inference.num_evals"]) - 1
        fixture.check("published_inference.pred", sample(last)[1])


def _check_gradient_norms(fixture: Fixture, prefix: str, model: torch.nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name in [name for name in fixture.tensors if name.startswith(prefix)]:
        gradient = parameters[name.removeprefix(prefix)].grad
        assert gradient is not None
        fixture.check(name, gradient.norm(), rtol=fixture.meta["tolerance"]["grad_norm_rtol"], atol=1e-6)


@torch.enable_grad()
def check_train_forward(fixture: Fixture) -> None:
    for case, settings in fixture.meta["cases"].items():
        model, noisy = fixture.wan(), fixture["noisy"]
        lengths = chunk_lengths(
            noisy.shape[1],
            settings["num_frame_per_block"],
            independent_first_frame=settings["independent_first_frame"],
        )
        forced = settings["teacher_forcing"]
        make_mask = teacher_forcing_frames if forced else block_causal_frames
        mask_TT = make_mask(lengths, window=settings["local_attn_size"])
        fixture.check(f"{case}.frame_mask", mask_TT)
        flow = model(
            noisy,
            fixture[f"{case}.timestep"],
            fixture["prompt_embeds"],
            mask_TT=mask_TT,
            clean_BTCHW=fixture["clean"] if forced else None,
            clean_timesteps_BT=fixture.tensors.get(f"{case}.aug_timestep"),
        )
        fixture.check(f"{case}.flow", flow)
        flow.square().mean().backward()
        _check_gradients(fixture, f"{case}.", model)


NETWORK_CHECKS: dict[str, Callable[[Fixture], None]] = {
    "bidirectional_forward": check_forward,
    "bidirectional_few_step": check_few_step,
    "causal_train_forward": check_train_forward,
}
