"""Zeros without memory in place of all that a stage reads or draws, and the bytes that its step takes on them.

Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from selfforcing_core.codecs.image import MASK_CHANNELS
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CLIP_DIM, CLIP_TOKENS, WanConfig
from selfforcing_core.weights.checkpoint import Checkpoint
from train import run_checkpoints
from train.args import OdeArgs
from train.data import Row
from train.distributed import World
from train.engine import Trainer
from train.live_bytes import LiveBytes
from train.networks import Source
from train.update_cost import config_of, latent_shape, sizes_of


class DrySupply:
    """A `Supply` of zeros, with networks of the presets' sizes but of `num_layers` layers."""

    def __init__(self, args: Any, world: World, num_layers: int) -> None:
        self.args, self.num_layers = args, num_layers
        config = config_of(args.size)
        self.shape = latent_shape(args, config)
        self.prompts = _DryPrompts(config, getattr(torch, args.dtype), world.device)

    def checkpoint(self, role: str, source: Source) -> Checkpoint:
        config = replace(config_of(sizes_of(self.args)[role]), num_layers=self.num_layers)
        # Without tensors: networks are then left as they were allocated.
        return Checkpoint("wan", {}, config, None, None, "wan", "float32", "raw", {})

    def rows(self) -> _DryRows:
        states = len(self.args.timesteps) if isinstance(self.args, OdeArgs) else 1
        return _DryRows((states, *self.shape))

    def vae(self) -> _DryEncoders:
        return _DryEncoders(self.shape)

    def pictures(self, vae: _DryEncoders, *, reads_clip: bool) -> _DryEncoders:
        return replace(vae, reads_clip=reads_clip)

    def draws(self, step: int, purpose: str) -> _DryDraws:
        return _DryDraws()


@dataclass
class _DryPrompts:
    config: WanConfig
    dtype: torch.dtype
    device: torch.device

    def condition(self, texts: Sequence[str]) -> Conditioning:
        shape = (len(texts), self.config.text_len, self.config.text_dim)
        return Conditioning(torch.zeros(shape, dtype=self.dtype, device=self.device))


class _DryRows:
    """A database and the order of its rows in one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.data, self.shape, self.bad = self, shape, []

    def take(self, numbers: Iterable[int]) -> list[Row]:
        # A picture of one pixel, since what is made of pictures is not counted.
        return [Row("", torch.zeros(self.shape), torch.zeros(3, 1, 1)) for _ in numbers]


@dataclass
class _DryEncoders:
    """VAE and CLIP. Latents are their own pixels, which are not counted either."""

    shape: tuple[int, int, int, int]
    reads_clip: bool = True

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        return latents_BTCHW

    def encode(self, frames: Tensor) -> Tensor:
        return torch.zeros(len(frames), 1, *self.shape[1:])

    def condition(self, text: Conditioning, images: Sequence[Tensor]) -> Conditioning:
        embeds_BPE, (frames, channels, *size) = text.prompt_embeds_BPE, self.shape
        image = torch.zeros(len(embeds_BPE), frames, MASK_CHANNELS + channels, *size).to(embeds_BPE)
        clip = torch.zeros(len(embeds_BPE), CLIP_TOKENS, CLIP_DIM).to(embeds_BPE)
        return Conditioning(embeds_BPE, image, clip if self.reads_clip else None)


class _DryDraws:
    """Every clip is of the longest kind; every chunk ends at its first evaluation, since earlier ones leave nothing."""

    def exit_steps(self, count: int, num_steps: int, *, per_chunk: bool) -> list[int]:
        return [0] * count

    def whole(self, name: str, count: int) -> int:
        return count - 1

    def noise(self, first: int) -> _DryDraws:
        return self

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)

    def uniform(self, first: int, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def uniforms(self, first: int, count: int, frames: int) -> Tensor:
        return torch.zeros(count, frames, dtype=torch.float64)

    def normal(self, first: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


def tracked(trainer: Trainer) -> dict[str, int]:
    """Return the peak bytes of this process in an update of each role that is trained, everything included.

    Also for a real trainer: then it is what was really used.
    """
    # Moments and average exist from the first steps on, so they belong to what an update finds.
    for role in trainer.roles.values():
        run_checkpoints.moments(role)
    trainer.start_average()
    modules = [module for role in trainer.roles.values() for module in role.modules]
    modules += [built.module for built in trainer.built.values()]
    optimisers = [role.optimiser for role in trainer.roles.values()]
    peaks = {}
    for name in trainer.roles:
        with LiveBytes(trainer.world.device.type, _held(modules, optimisers, trainer.ema.values())) as counter:
            trainer.accumulate(name)
            trainer.apply(name)
        peaks[name] = counter.peak
    return peaks


def _held(modules: Iterable[Module], optimisers: Iterable[Optimizer], averages: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what is there before an update: parameters with their gradients, buffers, moments and the average."""
    for module in modules:
        yield from module.buffers()
        for parameter in module.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    for optimiser in optimisers:
        for moments in optimiser.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))
    yield from averages
