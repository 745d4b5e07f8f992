"""Objectives as pure functions on tensors; each names its source.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfforcing_core.schedule import TIMESTEPS, shift_sigma


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the usual meaning: scale 1 is the conditional prediction, 0 the unconditional.

    The reference writes the same as conditional + w (conditional - unconditional) with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)


def score_timesteps(uniform_B: Tensor, shift: float, low: float = 20.0, high: float = 980.0) -> Tensor:
    """Timesteps [B] at which scores are compared: uniform numbers in [0, 1) shifted, clamped to [low, high]."""
    shifted = shift_sigma(uniform_B, shift)
    assert isinstance(shifted, Tensor)
    return (shifted * TIMESTEPS).clamp(low, high)


def dmd_gradient(x_BTCHW: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """Distribution-matching gradient (DMD, arXiv 2311.18828, eq. 7 and 8): fake minus real prediction.

    Points from where the critic thinks the samples are to where the teacher wants them, reversed in sign; divided per
    sample by mean |x - real|. A sample that equals the teacher's prediction would divide by zero and gets 0 there.
    """
    normaliser = (x_BTCHW - real_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake_x0 - real_x0) / normaliser)


def dmd_loss(x_BTCHW: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is `gradient` / numel (DMD2, arXiv 2405.14867, section 3)."""
    target = (x_BTCHW - gradient).detach()
    return 0.5 * (x_BTCHW.double() - target.double()).square().mean()


def critic_loss(flow: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching error of the critic on generated samples: mean (flow - (noise - x0))^2, unweighted."""
    return (flow - (noise - x0)).square().mean()
