"""Checks of the training objectives against recorded numbers; see test_golden.py.

The reference keeps autograd history in its cache; these compare with the columns recorded with the cache detached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from selfforcing_core.codecs.wan_vae import WanVAE, new_network, original_name
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import chunk_lengths
from selfforcing_core.noise import CONTEXT
from selfforcing_core.schedule import sigma_table
from tests.support.golden_fixture import FOLDER, Fixture, GivenNoise
from train.data import ClipDatabase, read_pairs
from train.forcing import Forcing, Trajectories
from train.losses import score_timesteps
from train.roles import DistributionMatching, Levels, ScoreDraw, ScoreNetwork, Student, loss_window, score_bounds


def _one(fixture: Fixture, role: str) -> Fixture:
    """The fixture as if it had only this one of its networks."""
    meta = {**fixture.meta, "model": fixture.meta["models"][role], "weight_seed": fixture.meta["weight_seeds"][role]}
    return replace(fixture, meta=meta)


def _condition(fixture: Fixture, embeds: str) -> Conditioning:
    if "y" not in fixture.tensors:
        return Conditioning(fixture[embeds])
    return Conditioning(fixture[embeds], fixture["y"].transpose(1, 2), fixture["clip_fea"].float())


def _parts(fixture: Fixture) -> tuple[Student, DistributionMatching]:
    training, shifts = fixture.meta["training"], fixture.meta["scheduler_shift"]
    listed = tuple(map(float, training["denoising_step_list"]))
    steps = StepConfig(listed, shifts["generator"], training["warp_denoising_step"], "table")
    is_whole = training.get("generator_type") == "bidirectional"
    chunk = fixture["noise"].shape[1] if is_whole else training["num_frame_per_block"]
    causal = CausalConfig(chunk, independent_first_frame=training["independent_first_frame"] and not is_whole)
    student = Student(
        _one(fixture, "generator").wan(), causal, steps, context_sigma=float(sigma_table(shifts["generator"])[-1])
    )
    matching = DistributionMatching(
        teacher=ScoreNetwork(_one(fixture, "real").wan(), Levels(shifts["real"], "table")),
        critic=ScoreNetwork(_one(fixture, "fake").wan(), Levels(shifts["fake"], "table")),
        guidance=training["guidance_scale"] + 1,  # the reference counts from the conditional prediction
        levels=Levels(shifts["generator"], "table"),
        score="sid" if fixture.meta["kind"].startswith("sid") else "dmd",
        sid_alpha=training["sid_alpha"],
    )
    return student, matching


def _draws(fixture: Fixture, student: Student, prefix: str = "") -> tuple[GivenNoise, list[int]]:
    """The recorded noise by chunk and evaluation, and the exit step of every chunk."""
    noise = fixture[f"{prefix}noise"]
    frames, causal = noise.shape[1], student.causal
    lengths = chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    actual: dict[tuple[int, int], Tensor] = {}
    start = 0
    for index, length in enumerate(lengths):
        actual[start, 0] = noise[:, start : start + length]
        chunk = f"{prefix}chunk{index}." if len(lengths) > 1 else prefix
        for step in range(len(student.steps.steps)):
            if f"{chunk}renoise{step}" in fixture.tensors:
                actual[start, step + 1] = fixture[f"{chunk}renoise{step}"].reshape(actual[start, 0].shape)
        if f"{chunk}context_noise" in fixture.tensors:
            actual[start, CONTEXT] = fixture[f"{chunk}context_noise"].reshape(actual[start, 0].shape)
        start += length
    if "exit_steps" in fixture.tensors:
        return GivenNoise(actual), fixture["exit_steps"].tolist()
    return GivenNoise(actual), [fixture.meta["exit_step"]] * len(lengths)


def _score_draw(fixture: Fixture, prefix: str = "") -> ScoreDraw:
    """The recorded draw, at its place between the bounds that its exit step leads to."""
    training, raw = fixture.meta["training"], fixture[f"{prefix}score.timestep_raw"][:, 0].double()
    bounds = 0.0, 1000.0
    if "timestep_from_to" in fixture.tensors and (recorded := fixture["timestep_from_to"].tolist()) != [-1, -1]:
        steps = StepConfig(
            tuple(map(float, training["denoising_step_list"])),
            fixture.meta["scheduler_shift"]["generator"],
            training["warp_denoising_step"],
        )
        exit_step = fixture["exit_steps"].tolist()[0]
        actual = score_bounds(steps, exit_step, is_floored=True, is_capped=True)
        assert [round(bound, 6) for bound in reversed(actual)] == recorded
        bounds = score_bounds(
            steps, exit_step, is_floored=training["ts_schedule"], is_capped=training.get("ts_schedule_max", False)
        )
    low, high = bounds
    timesteps = score_timesteps((raw - low) / (high - low), training["timestep_shift"], bounds=bounds)
    return ScoreDraw(timesteps.float(), fixture[f"{prefix}score.noise"])


def _sample(fixture: Fixture, student: Student, *, with_gradient: bool, prefix: str = "") -> Tensor:
    noise, exits = _draws(fixture, student, prefix)
    shape: tuple[int, int, int, int] = tuple(fixture[f"{prefix}noise"].shape[1:])  # type: ignore[assignment]
    condition = _condition(fixture, "prompt_embeds")
    return student.sample(condition, noise=noise, latent_shape=shape, exit_steps=exits, with_gradient=with_gradient)


def _check_norms(fixture: Fixture, network: nn.Module, name: str, listed: str) -> None:
    """Norm of every parameter's gradient, in the recorded order."""
    parameters = dict(network.named_parameters())
    gradients = (parameters[key].grad for key in fixture.meta[listed])
    norms = torch.stack([torch.zeros(()) if g is None else g.norm() for g in gradients])
    fixture.check(name, norms, rtol=fixture.meta["tolerance"]["grad_norms_rtol"], atol=1e-6)


def _check_loss(fixture: Fixture, loss: Tensor, name: str = "loss") -> None:
    fixture.check(name, loss, rtol=fixture.meta["tolerance"]["loss_rtol"], atol=1e-6)


def _check_student(
    fixture: Fixture, student: Student, matching: DistributionMatching, x: Tensor, counted: Tensor | None
) -> None:
    draw = _score_draw(fixture)
    if "score.timestep" in fixture.tensors:
        fixture.check("score.timestep", draw.timesteps_B)
    fixture.check("score.noisy", matching.noisy(x, draw))
    conditions = _condition(fixture, "prompt_embeds"), _condition(fixture, "negative_embeds")
    for network in (matching.teacher.network, matching.critic.network):
        network.requires_grad_(False)
    loss, gradient = matching.student_loss(x, draw, *conditions, counted)
    if "score.grad" in fixture.tensors:
        fixture.check("score.grad", gradient)
    if "score.fake_x0" in fixture.tensors:
        fixture.check("score.fake_x0", matching.critic.x0(matching.noisy(x, draw), draw.timesteps_B, conditions[0]))
    _check_loss(fixture, loss)
    loss.backward()
    norms = "grad_norms_truncated" if "grad_norms_truncated" in fixture.tensors else "grad_norms"
    _check_norms(fixture, student.network, norms, "param_names")


@torch.enable_grad()
def check_student(fixture: Fixture) -> None:
    student, matching = _parts(fixture)
    x = _sample(fixture, student, with_gradient=True)
    fixture.check("pred", x)
    _check_student(fixture, student, matching, x, None)


@torch.enable_grad()
def check_long(fixture: Fixture) -> None:
    student, matching = _parts(fixture)
    clip = _sample(fixture, student, with_gradient=True)
    fixture.check("rollout", clip)
    sizes = fixture.meta["models"]["vae"]
    with torch.device("cpu"):
        network = new_network(sizes["dim"], sizes["num_res_blocks"])
    shapes = {original_name(k, sizes["num_res_blocks"]): (k, v.shape) for k, v in network.state_dict().items()}
    drawn = _one(fixture, "vae").draw({name: shape for name, (_, shape) in shapes.items()})
    network.load_state_dict({shapes[name][0]: value for name, value in drawn.items()}, assign=True)
    vae = WanVAE(network)

    def reencode(latents: Tensor) -> Tensor:
        return vae.encode(vae.decode(latents)[:, -1:])

    x = loss_window(clip, student.loss_frames, reencode)
    fixture.check("pred", x)
    _check_student(fixture, student, matching, x, fixture["gradient_mask_frames"].bool())


@torch.enable_grad()
def check_critic(fixture: Fixture) -> None:
    student, matching = _parts(fixture)
    _check_critic(fixture, student, matching, "")


def _check_critic(fixture: Fixture, student: Student, matching: DistributionMatching, prefix: str) -> None:
    x, draw = _sample(fixture, student, with_gradient=False, prefix=prefix), _score_draw(fixture, prefix)
    if "pred" in fixture.tensors and not prefix:
        fixture.check("pred", x)
    condition = _condition(fixture, "prompt_embeds")
    if "critic.x0" in fixture.tensors:
        fixture.check("critic.x0", matching.critic.x0(matching.noisy(x, draw), draw.timesteps_B, condition))
    loss = matching.critic_loss(x, draw, condition)
    _check_loss(fixture, loss, f"{prefix}loss")
    matching.critic.network.zero_grad()
    loss.backward()
    listed = "critic_param_names" if prefix else "param_names"
    _check_norms(fixture, matching.critic.network, f"{prefix}grad_norms", listed)


@torch.enable_grad()
def check_bidirectional(fixture: Fixture) -> None:
    student, matching = _parts(fixture)
    x = _sample(fixture, student, with_gradient=True)
    fixture.check("pred", x)
    _check_student(fixture, student, matching, x, None)
    matching.critic.network.requires_grad_(True)
    _check_critic(fixture, student, matching, "critic.")


def _causal(training: dict[str, Any]) -> CausalConfig:
    return CausalConfig(
        training["num_frame_per_block"],
        training["local_attn_size"],
        independent_first_frame=training["independent_first_frame"],
    )


@torch.enable_grad()
def check_trajectories(fixture: Fixture) -> None:
    training, network = fixture.meta["training"], fixture.wan()
    levels = Levels(training["timestep_shift"], "table")
    timesteps = tuple(fixture["denoising_steps"].tolist())
    part = Trajectories(network, _causal(training), timesteps, levels, training["i2v"])
    loss, x0 = part.loss(fixture["ode_latent"], fixture["index_raw"], _condition(fixture, "prompt_embeds"))
    fixture.check("pred", x0)
    _check_loss(fixture, loss)
    loss.backward()
    _check_norms(fixture, network, "grad_norms", "param_names")


@torch.enable_grad()
def check_forcing(fixture: Fixture) -> None:
    training, network = fixture.meta["training"], fixture.wan()

    def fed(noisy: Tensor, timesteps: Tensor, *args: Any, **options: Any) -> Tensor:
        """The recorded timesteps, which a table in float32 puts up to 1e-4 beside ours, go into the network."""
        fixture.check("timestep", timesteps, atol=2e-4)
        if "aug_timestep" in fixture.tensors:
            fixture.check("aug_timestep", options["clean_timesteps_BT"], atol=2e-4)
            options["clean_timesteps_BT"] = fixture["aug_timestep"]
        return network(noisy, fixture["timestep"], *args, **options)

    part = Forcing(fed, _causal(training), training["timestep_shift"], training["teacher_forcing"])
    context = fixture["aug_index_raw"] if "aug_index_raw" in fixture.tensors else None
    loss, flow = part.loss(
        fixture["clean"], fixture["noise"], fixture["index_raw"], _condition(fixture, "prompt_embeds"), context
    )
    fixture.check("flow", flow)
    _check_loss(fixture, loss)
    loss.backward()
    _check_norms(fixture, network, "grad_norms", "param_names")


def check_lmdb(fixture: Fixture) -> None:
    """Databases and .pt files of the reference's scripts, in the folder beside the fixture."""
    folder = FOLDER / "lmdb"
    for name in ("ode_iterative", "sharded_t2v", "sharded_i2v"):
        image = f"{name}.img"
        size = tuple(fixture[image].shape[-2:]) if image in fixture.tensors else None
        database = ClipDatabase(folder / name, size)  # type: ignore[arg-type]
        rows = [database[index] for index in range(len(database))]
        assert [row.prompt for row in rows] == fixture.meta["prompts"][name]
        fixture.check(f"{name}.latents", torch.stack([row.states for row in rows]), atol=0, rtol=0)
        if size is not None:
            pictures = [row.image_RHW for row in rows if row.image_RHW is not None]
            fixture.check(image, torch.stack(pictures), atol=1e-6, rtol=0)
    for name, tensor in (("00000000.pt", "pt.vae_latent"), ("00001.pt", "pt.ode_pair")):
        ((prompt, latents),) = read_pairs(folder / "pt" / name)
        assert prompt == fixture.meta["prompts"]["pt"][name]
        fixture.check(tensor, latents[None], atol=0, rtol=0)


TRAINING_CHECKS: dict[str, Callable[[Fixture], None]] = {
    "dmd_gen": check_student,
    "sid_gen": check_student,
    "dmd_gen_long": check_long,
    "dmd_critic": check_critic,
    "dmd_bidirectional": check_bidirectional,
    "ode_regression": check_trajectories,
    "causal_diffusion": check_forcing,
    "lmdb": check_lmdb,
}
