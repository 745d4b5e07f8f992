"""What the networks of a distillation do: the student rolls out, teacher and critic judge whole clips.

Letters: B batch, T latent frames, C latent channels, H W latent size, I image tokens, Y image-feature width, P text
tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.noise import NoiseSource
from selfforcing_core.rollout import BackpropSpec, rollout
from selfforcing_core.schedule import (
    TIMESTEPS,
    FlowSchedule,
    add_noise,
    flow_from_x0,
    nearest_sigma,
    sigma_table,
    unshift_sigma,
    x0_from_flow,
)
from train.losses import critic_loss, dmd_gradient, dmd_loss, guided, sid_loss


@dataclass(frozen=True)
class Levels:
    """How a timestep becomes a noise level: "exact" is t / 1000, "table" the nearest entry of the table for `shift`."""

    shift: float = 8.0
    rule: str = "exact"

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Return noise levels, float64, of the shape of `timesteps`."""
        # The reference looks sigma up in the table of its shift, so its level can be off by half a step of that table.
        if self.rule == "table":
            return nearest_sigma(timesteps, sigma_table(self.shift))
        return timesteps.double() / TIMESTEPS


@dataclass(frozen=True)
class ScoreNetwork:
    """A bidirectional network that says what clean clip a noisy one came from."""

    network: Any
    levels: Levels = Levels()

    def x0(self, noisy_BTCHW: Tensor, timesteps_B: Tensor, condition: Conditioning) -> Tensor:
        """Return the predicted clean latents [B, T, C, H, W]."""
        frames = timesteps_B[:, None].expand(-1, noisy_BTCHW.shape[1])  # one level for the whole clip
        image = {}
        if condition.image_BTCHW is not None:
            image = {"image_BTCHW": condition.image_BTCHW, "clip_BIY": condition.clip_BIY}
        flow = self.network(noisy_BTCHW, frames, condition.prompt_embeds_BPE, **image)
        return x0_from_flow(noisy_BTCHW, flow.to(noisy_BTCHW.dtype), self.levels.sigma(timesteps_B))


@dataclass(frozen=True)
class ScoreDraw:
    """Where predictions are compared: one timestep per sample, after shift and clamp, and the noise."""

    timesteps_B: Tensor
    noise_BTCHW: Tensor


@dataclass(frozen=True)
class Student:
    """The few-step generator, causal or (with one chunk of all frames) bidirectional."""

    network: Any
    causal: CausalConfig
    steps: StepConfig
    # Noise mixed into a finished chunk before it enters the cache. The reference has that of its table's entry nearest
    # to context_noise here (0.005 for 0), while its sampler has none.
    context_sigma: float = 0.0
    loss_frames: int = 21  # only the last ones carry gradient: as many as teacher and critic see

    def sample(
        self,
        condition: Conditioning,
        *,
        noise: NoiseSource,
        latent_shape: tuple[int, int, int, int],
        exit_steps: Sequence[int],
        with_gradient: bool,
        prefix_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """Generate a clip [B, T, C, H, W]; chunk i is what its evaluation `exit_steps[i]` predicts, of its own steps.

        This is Self Forcing's algorithm 1 (arXiv 2506.08009): the student continues its own chunks, as when it samples.

        prefix_BTCHW: given first frames, which are part of the clip, and before which no chunk is counted.
        """
        frames = latent_shape[0]
        first_frame = max(0, frames - self.loss_frames) if with_gradient else frames
        chunks = rollout(
            Guided(self.network, condition),
            noise=noise,
            latent_shape=latent_shape,
            causal=self.causal,
            steps=self.steps,
            backprop=BackpropSpec(exit_steps, first_frame, self.context_sigma),
            start=prefix_BTCHW,
        )
        return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def score_bounds(
    steps: StepConfig, exit_step: int, *, lowest: float = 0.0, is_floored: bool = False, is_capped: bool = False
) -> tuple[float, float]:
    """Return between which timesteps, before their shift, clips are compared that end at evaluation `exit_step`.

    That is one of `steps` which all chunks share, not of the first chunk's own, as in Causal-Forcing++.

    is_floored: not below the timestep that the exit step leads to (in place of `lowest`); is_capped: not above its own
    (Self Forcing's ts_schedule and ts_schedule_max).
    """
    # The steps as they were before the shift, whether the list was given shifted or not.
    plain = [TIMESTEPS * unshift_sigma(timestep / TIMESTEPS, steps.shift) for timestep in FlowSchedule(steps).timesteps]
    low = [*plain, 0.0][exit_step + 1] if is_floored else lowest
    return low, plain[exit_step] if is_capped else TIMESTEPS


def loss_window(clip_BTCHW: Tensor, frames: int, reencode: Any) -> Tensor:
    """Return the last `frames` of a longer clip as a clip of its own, which is what teacher and critic know.

    A latent at the start of a video stands for one picture, later ones for four; so the window's first latent is made
    anew from the last picture before it. reencode: [B, T, C, H, W] to the latent [B, 1, C, H, W] of its last picture.
    """
    if clip_BTCHW.shape[1] <= frames:
        return clip_BTCHW
    # In the reference the last 20 of more than 21 latent frames follow the one that is made anew.
    with torch.no_grad():  # the VAE is frozen, and the frame has no loss
        first = reencode(clip_BTCHW[:, : 1 - frames])
    return torch.cat([first.to(clip_BTCHW), clip_BTCHW[:, 1 - frames :]], 1)


@dataclass(frozen=True)
class DistributionMatching:
    """Distribution matching of the student's clips with the teacher's, through a critic."""

    teacher: ScoreNetwork
    critic: ScoreNetwork
    guidance: float  # on the teacher, in the usual meaning: 1 is none
    levels: Levels = Levels(5.0)  # of the noise that clips are compared under; 5 is the reference's timestep_shift
    score: str = "dmd"  # dmd or sid
    sid_alpha: float = 1.0
    critic_guidance: float = 1.0
    see: Callable[..., None] | None = None  # is given both guided predictions, to note what is not finite

    def noisy(self, x_BTCHW: Tensor, draw: ScoreDraw) -> Tensor:
        """Return the clip at the draw's noise level."""
        return add_noise(x_BTCHW, draw.noise_BTCHW.to(x_BTCHW), self.levels.sigma(draw.timesteps_B))

    def predictions(
        self, x_BTCHW: Tensor, draw: ScoreDraw, condition: Conditioning, negative: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Return what guided critic and guided teacher take for the clean clip."""
        noisy, timesteps = self.noisy(x_BTCHW, draw), draw.timesteps_B
        # Both judge the same noised clip: their difference is that of two scores at one point (DMD, eq. 2).
        fake = self.critic.x0(noisy, timesteps, condition)
        if self.critic_guidance != 1:
            fake = guided(fake, self.critic.x0(noisy, timesteps, negative), self.critic_guidance)
        real = self.teacher.x0(noisy, timesteps, condition)
        if self.guidance != 1:
            real = guided(real, self.teacher.x0(noisy, timesteps, negative), self.guidance)
        if self.see is not None:
            self.see(fake, real)
        return fake, real

    def student_loss(
        self,
        x_BTCHW: Tensor,
        draw: ScoreDraw,
        condition: Conditioning,
        negative: Conditioning,
        counted_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the student's loss, and the gradient per latent (dmd) or critic minus teacher (sid)."""
        if self.score == "sid":
            fake, real = self.predictions(x_BTCHW, draw, condition, negative)
            return sid_loss(x_BTCHW, fake, real, self.sid_alpha, counted_T), (fake - real).detach()
        # DMD's eq. 7 is a gradient already, which `dmd_loss` hands to the student; none passes through the scores.
        with torch.no_grad():
            fake, real = self.predictions(x_BTCHW.detach(), draw, condition, negative)
            gradient = dmd_gradient(x_BTCHW, fake, real)
        return dmd_loss(x_BTCHW, gradient, counted_T), gradient

    def critic_loss(self, x_BTCHW: Tensor, draw: ScoreDraw, condition: Conditioning) -> Tensor:
        """Return the critic's flow-matching error on a clip of the student's."""
        noisy = self.noisy(x_BTCHW, draw)
        x0 = self.critic.x0(noisy, draw.timesteps_B, condition)
        # At the level that noised the clip; with rule "table" it is not quite the one by which the critic takes x0.
        flow = flow_from_x0(noisy, x0, self.levels.sigma(draw.timesteps_B))
        return critic_loss(flow, x_BTCHW, draw.noise_BTCHW)
