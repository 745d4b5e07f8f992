"""Adversarial training (score=gan): heads on the critic's blocks say whether a noised clip is real.

After the discriminator of CausVid's and Self Forcing's adversarial stage, on the losses of `train.losses`.

Letters: B batch, T latent frames, C latent channels, H W latent size, L query tokens, D model width, I image tokens,
Y image-feature width, P text tokens, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.schedule import add_noise
from train.losses import gan_critic_loss, gan_generator_loss, gradient_penalty
from train.roles import Levels, ScoreDraw

TAPS = (14 / 30, 22 / 30, 1.0)  # depth of the blocks that are read: the 14th, 22nd and 30th of the 1.3B
WIDENING = 8192 / 1536  # of the heads' feed-forward layers
TIME_SCALE = 10.0  # of the timestep's embedding beside the features


def tapped(num_layers: int) -> list[int]:
    """Return the indices of the blocks that are read."""
    return [max(round(depth * num_layers) - 1, 0) for depth in TAPS]


class _Reader(nn.Module):
    """One register asks one block's features; a feed-forward layer follows."""

    def __init__(self, dim: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        # A learned query: attention with it is a pooling that learns where in the clip to look.
        self.register = nn.Parameter(torch.randn(1, 1, dim, dtype=dtype))
        self.norm_register = nn.RMSNorm(dim, dtype=dtype)
        self.norm_features, self.norm = nn.LayerNorm(dim, dtype=dtype), nn.LayerNorm(dim, dtype=dtype)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, dtype=dtype) for _ in range(4))
        wide = round(dim * WIDENING)
        self.ffn = nn.Sequential(
            nn.Linear(dim, wide, dtype=dtype), nn.GELU(approximate="tanh"), nn.Linear(wide, dim, dtype=dtype)
        )

    def forward(self, features_BLD: Tensor) -> Tensor:
        """Return what the register gathers from all tokens of a clip, [B, D]."""
        register = self.norm_register(self.register).expand(len(features_BLD), -1, -1)
        features_BLD = self.norm_features(features_BLD)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(register), self.k(features_BLD), self.v(features_BLD))
        )
        gathered = register + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (gathered + self.ffn(self.norm(gathered)))[:, 0]


class Heads(nn.Module):
    """One number per clip from the features of three blocks: large for real ones."""

    def __init__(self, config: WanConfig, *, sees_time: bool, dtype: torch.dtype) -> None:
        super().__init__()
        dim = config.dim
        self.readers = nn.ModuleList(_Reader(dim, config.num_heads, dtype) for _ in TAPS)
        width = dim * (len(TAPS) + int(sees_time))
        self.classify = nn.Sequential(
            nn.LayerNorm(width, dtype=dtype),
            nn.Linear(width, dim, dtype=dtype),
            nn.SiLU(),
            nn.Linear(dim, 1, dtype=dtype),
        )

    def forward(self, features: list[Tensor], time_BD: Tensor | None) -> Tensor:
        """Return logits [B, 1]. features: [B, L, D] of each block that is read."""
        parts = [reader(block_BLD) for reader, block_BLD in zip(self.readers, features)]
        if time_BD is not None:
            parts.append(TIME_SCALE * time_BD)
        return self.classify(torch.cat(parts, -1))


class Discriminator:
    """A critic's network with its heads. module: the network behind `network`, whose blocks are read.

    The critic is a good place for a discriminator: it already follows the student's clips at every noise level, so a
    few small heads are enough, and no network is added (DMD2, arXiv 2405.14867, section 4.3).
    """

    def __init__(self, network: Any, module: Any, heads: Any, *, sees_time: bool) -> None:
        self.network, self.heads, self.sees_time = network, heads, sees_time
        self.features: list[Tensor] | None = None
        self.batch = 0
        self.time_BD: Tensor | None = None
        # Hooks, since what is read lies inside the network, which knows nothing of adversarial training.
        for index in tapped(len(module.blocks)):
            module.blocks[index].register_forward_hook(self._keep)
        module.time_embedding.register_forward_hook(self._keep_time)

    def _keep(self, _module: Any, _inputs: Any, x: Tensor) -> None:
        if self.features is not None:  # outside `logits` nothing is kept
            self.features.append(x.reshape(self.batch, -1, x.shape[-1]))

    def _keep_time(self, _module: Any, _inputs: Any, time_BTD: Tensor) -> None:
        # All frames of a clip have one timestep here.
        self.time_BD = time_BTD[:, 0] if self.features is not None and self.sees_time else None

    def logits(self, noisy_BTCHW: Tensor, timesteps_B: Tensor, condition: Conditioning) -> Tensor:
        """Return one number per noised clip, [B], float64; large for real ones."""
        frames = timesteps_B[:, None].expand(-1, noisy_BTCHW.shape[1])
        image = {}
        if condition.image_BTCHW is not None:
            image = {"image_BTCHW": condition.image_BTCHW, "clip_BIY": condition.clip_BIY}
        self.features, self.batch = [], noisy_BTCHW.shape[0]
        self.network(noisy_BTCHW, frames, condition.prompt_embeds_BPE, **image)
        features, self.features = self.features, None
        return self.heads(features, self.time_BD)[:, 0].double()


@dataclass(frozen=True)
class Adversarial:
    """Student and discriminator against each other, on clips noised to the same level with the same noise."""

    discriminator: Discriminator
    levels: Levels
    weight: float = 1e-2  # of the student's loss; these three are the reference's gan_g_weight, gan_d_weight, r1_sigma
    critic_weight: float = 1e-2
    is_relativistic: bool = False
    r1: float = 0.0  # weights of the penalties on real and on generated clips
    r2: float = 0.0
    sigma: float = 0.01  # size of the penalties' finite differences

    def _noisy(self, x_BTCHW: Tensor, draw: ScoreDraw) -> Tensor:
        return add_noise(x_BTCHW, draw.noise_BTCHW.to(x_BTCHW), self.levels.sigma(draw.timesteps_B))

    def student_loss(self, x_BTCHW: Tensor, real_BTCHW: Tensor, draw: ScoreDraw, condition: Conditioning) -> Tensor:
        """Return a loss that is small where the student's clips pass for real; relativistic: for more than real."""
        fake = self.discriminator.logits(self._noisy(x_BTCHW, draw), draw.timesteps_B, condition)
        real = None
        if self.is_relativistic:
            with torch.no_grad():  # a real clip does not depend on the student
                real = self.discriminator.logits(self._noisy(real_BTCHW, draw), draw.timesteps_B, condition)
        return self.weight * gan_generator_loss(fake, real)

    def critic_loss(
        self, x_BTCHW: Tensor, real_BTCHW: Tensor, draw: ScoreDraw, condition: Conditioning, nearby_BTCHW: Tensor
    ) -> Tensor:
        """Return a loss that is small where real and generated clips are told apart.

        nearby_BTCHW: noise of the penalties' differences.
        """
        clips = {"fake": self._noisy(x_BTCHW, draw), "real": self._noisy(real_BTCHW, draw)}
        logits = {name: self.discriminator.logits(x, draw.timesteps_B, condition) for name, x in clips.items()}
        loss = gan_critic_loss(logits["fake"], logits["real"], is_relativistic=self.is_relativistic)
        loss = self.critic_weight * loss
        for name, weight in (("real", self.r1), ("fake", self.r2)):
            if weight:
                nearby = clips[name] + self.sigma * nearby_BTCHW.to(clips[name])
                nearby_logits = self.discriminator.logits(nearby, draw.timesteps_B, condition)
                loss = loss + 0.5 * weight * gradient_penalty(logits[name], nearby_logits)
        return loss
