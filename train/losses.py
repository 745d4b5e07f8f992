"""Objectives as pure functions on tensors; each names its source.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfforcing_core.schedule import TIMESTEPS, shift_sigma


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv 2207.12598): scale 1 is the conditional prediction, 0 the unconditional.

    The reference writes the same as conditional + w (conditional - unconditional) with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)


def score_timesteps(
    uniform_B: Tensor,
    shift: float,
    low: float = 20.0,
    high: float = 980.0,
    bounds: tuple[float, float] = (0.0, TIMESTEPS),
) -> Tensor:
    """Return timesteps [B] at which scores are compared: uniform numbers in [0, 1) shifted, clamped to [low, high].

    bounds: of the timesteps before the shift, between which the uniform numbers are spread.
    """
    first, last = (bound / TIMESTEPS for bound in bounds)
    shifted = shift_sigma(first + uniform_B * (last - first), shift)
    assert isinstance(shifted, Tensor)
    # By default 0.02 and 0.98 of all timesteps, as in DMD (section 3.2): at the ends the scores say next to nothing.
    return (shifted * TIMESTEPS).clamp(low, high)


def dmd_gradient(x_BTCHW: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """Return the distribution-matching gradient (DMD, arXiv 2311.18828, eq. 7 and 8): fake minus real prediction.

    To follow it downhill leads from where the critic thinks the samples are to where the teacher wants them. It is
    divided per sample by mean |x - real|.
    """
    # Eq. 8: the division makes gradients of all noise levels about equally large. In float64, since most digits of two
    # near predictions cancel.
    x, fake, real = x_BTCHW.double(), fake_x0.double(), real_x0.double()
    normaliser = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / normaliser)  # 0 where x is the teacher's own prediction: 0 / 0


def dmd_loss(x_BTCHW: Tensor, gradient: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """Return a scalar whose gradient with respect to x is `gradient` / numel (DMD2, arXiv 2405.14867, section 3).

    counted_T: bool, the frames that the mean is over; all by default.
    """
    # x moves towards a target one gradient away, so that no gradient passes through the scores themselves.
    target = (x_BTCHW - gradient).detach()
    error = 0.5 * (x_BTCHW.double() - target.double()).square()
    return _mean(error, counted_T)


def _mean(error_BTCHW: Tensor, counted_T: Tensor | None) -> Tensor:
    """Return the mean over frames that count; a selection by bool would wait for the device."""
    if counted_T is None:
        return error_BTCHW.mean()
    assert counted_T.dtype == torch.bool
    weight_T = counted_T.to(error_BTCHW)
    return (error_BTCHW.mean(dim=(0, 2, 3, 4)) * weight_T).sum() / weight_T.sum()


def sid_loss(
    x_BTCHW: Tensor, fake_x0: Tensor, real_x0: Tensor, alpha: float = 1.0, counted_T: Tensor | None = None
) -> Tensor:
    """Return the loss of score identity distillation (SiD, arXiv 2404.04057, eq. 23, in the form of Self Forcing).

    It is the mean of (real - fake) ((real - x) - alpha (real - fake)), divided per sample by mean |x - real| without
    gradient. Both predictions carry gradient into x. counted_T: as in `dmd_loss`.
    """
    # Unlike DMD's gradient, this is a loss, differentiated through teacher and critic too. With alpha = 1 it is
    # (real - fake) (fake - x).
    x, fake, real = x_BTCHW.double(), fake_x0.double(), real_x0.double()
    normaliser = (x - real).detach().abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    error = torch.nan_to_num((real - fake) * ((real - x) - alpha * (real - fake)) / normaliser)
    return _mean(error, counted_T)


def critic_loss(flow: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return the critic's flow-matching error on generated samples: mean (flow - (noise - x0))^2, unweighted.

    The critic thereby follows what the student generates now (DMD, arXiv 2311.18828, eq. 6, on flows).
    """
    return (flow - (noise - x0)).double().square().mean()


# ------------------------------------------------------------- adversarial --
def gan_generator_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Return softplus(-D(fake)) (non-saturating, arXiv 1406.2661), with `real` softplus(D(real) - D(fake)).

    The latter is relativistic (arXiv 1807.00734): it asks generated clips to look more real than real ones.
    """
    return F.softplus(-fake).mean() if real is None else F.softplus(real - fake).mean()


def gan_critic_loss(fake: Tensor, real: Tensor, *, is_relativistic: bool = False) -> Tensor:
    """Return softplus(-D(real)) + softplus(D(fake)); relativistic: softplus(D(fake) - D(real))."""
    if is_relativistic:
        return F.softplus(fake - real).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def gradient_penalty(value: Tensor, nearby: Tensor) -> Tensor:
    """Return R1 or R2 by finite differences (arXiv 2501.08316, eq. 5): mean (D(x) - D(x + noise))^2, x real or fake."""
    # The exact penalty is a gradient of a gradient, which neither fused attention nor FSDP offers.
    return (value - nearby).square().mean()


# -------------------------------------------------------------- regression --
def regression_loss(x0: Tensor, target: Tensor, counted_BT: Tensor, frames_per_clip: Tensor | None = None) -> Tensor:
    """Return the mean squared error over counted frames (ODE initialisation, CausVid, arXiv 2412.07772, section 4.3).

    frames_per_clip: counted frames over clips of the batch that these clips are a part of. The mean of its equal parts
    is then the whole batch's, however many frames each part counts; by default these clips are the batch.
    """
    error_BT = (x0 - target).double().square().mean(dim=(2, 3, 4)) * counted_BT
    if frames_per_clip is None:
        frames_per_clip = mean_count(counted_BT)
    return error_BT.sum() / (len(error_BT) * frames_per_clip)


def mean_count(counted_BT: Tensor) -> Tensor:
    """Return counted frames per clip, float64; of a batch that counts none, whose error is 0, as if it were one."""
    return counted_BT.sum().clamp_min(1).double() / len(counted_BT)


def flow_loss(flow: Tensor, x0: Tensor, noise: Tensor, weight_BT: Tensor) -> Tensor:
    """Return the weighted flow-matching error: mean weight (flow - (noise - x0))^2 (arXiv 2210.02747, eq. 23)."""
    # noise - x0 is how x0 + sigma (noise - x0) changes with sigma.
    return ((flow - (noise - x0)).double().square().mean(dim=(2, 3, 4)) * weight_BT).mean()
