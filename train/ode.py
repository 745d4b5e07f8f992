"""Regression on a teacher's trajectories: from any state of one, the causal network predicts its end.

    torchrun --nproc-per-node 8 -m train.ode data=trajectories network=FILE text_encoder=FILE logdir=runs/ode

The result is what a few-step student starts from (CausVid, arXiv 2412.07772, section 4.3).

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import StepConfig, WanConfig
from train import engine
from train.args import OdeArgs
from train.data import Row
from train.engine import ClipTrainer, check_chunks
from train.footprint import estimate
from train.forcing import Trajectories, causal_of
from train.losses import mean_count
from train.networks import wide
from train.randomness import Draws
from train.roles import Levels
from train.validation import Sampling


def check(args: OdeArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    engine.check(args, processes, ("network", "text_encoder", "data"))
    if args.levels not in ("exact", "table"):
        raise ValueError(f"levels {args.levels!r} is unknown; use exact or table")
    check_chunks(args)
    if sorted(args.timesteps, reverse=True) != list(args.timesteps) or not args.timesteps:
        raise ValueError(f"timesteps {list(args.timesteps)} must fall from noisy to clean; sort them")


def steps_of(args: OdeArgs) -> StepConfig:
    """Return the timesteps that it is trained on, as they are; at 0, the clip itself, there is nothing to predict."""
    timesteps = tuple(timestep for timestep in args.timesteps if timestep)
    return StepConfig(timesteps, shift=args.shift, warp=False, sigma=args.levels)


class Regression(ClipTrainer):
    """On the trajectories of a database, each of them a few states [T, C, H, W] from noise to clip."""

    args: OdeArgs

    def check_rows(self, config: WanConfig) -> None:
        """Raise ValueError for trajectories of other timesteps, and for what the network cannot take."""
        super().check_rows(config)
        args, states = self.args, self.shuffled.data.shape[0]
        has_clean = args.timesteps[-1] > 0 and states == len(args.timesteps) + 1  # the last state is the target alone
        if states != len(args.timesteps) and not has_clean:
            raise ValueError(f"{args.data}: trajectories of {states} states, not {len(args.timesteps)}; set timesteps")

    def loss_of(self, network: Any, rows: list[Row], condition: Conditioning, draws: Draws, first: int) -> Tensor:
        args = self.args
        states = torch.stack([row.states for row in rows]).to(self.world.device, wide(args))
        frames = states.shape[2]
        causal, levels = causal_of(args, frames), Levels(args.shift, args.levels)
        part = Trajectories(network, causal, tuple(args.timesteps), levels, args.first_frame_clean)
        # Counted over the whole batch, so that the mean does not depend on how the batch is divided into parts.
        counted = part.counted(self.indices(draws, 0, args.batch_size, frames))
        index = self.indices(draws, first, len(rows), frames).to(states.device)
        return part.loss(states, index, condition, mean_count(counted).to(states.device))[0]

    def indices(self, draws: Draws, first: int, count: int, frames: int) -> Tensor:
        """Draw the states of the frames of some of the step's clips, [B, T]."""
        # Uniform over the states, as in the reference.
        return (draws.uniforms(first, count, frames) * len(self.args.timesteps)).long()

    def sampling(self) -> Sampling:
        """Sample in the steps that it was trained on."""
        args, (frames, channels, height, width) = self.args, self.shape
        causal, shape = causal_of(args, frames), (frames, channels, height, width)
        return Sampling(causal, steps_of(args), shape, not args.chunk)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    dry = functools.partial(estimate, stage=Regression)
    return engine.command("train.ode", OdeArgs, check, Regression, dry, argv)


if __name__ == "__main__":
    sys.exit(main())
