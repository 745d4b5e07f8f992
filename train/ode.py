"""Regression on a teacher's trajectories: from any state of one, the causal network predicts its end.

    torchrun --nproc-per-node 8 -m train.ode data=trajectories network=FILE text_encoder=FILE logdir=runs/ode

The result is what a few-step student starts from (CausVid, arXiv 2412.07772, section 4.3).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from selfforcing_core.config import CausalConfig
from train import distributed, engine
from train.args import OdeArgs
from train.data import ClipDatabase
from train.draws import Draws, item
from train.engine import STUDENT, Prompts, Trainer, new_network, read_network
from train.forcing import Trajectories
from train.roles import Levels


def check(args: OdeArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    engine.check(args, processes, ("network", "text_encoder", "data"))
    if args.levels not in ("exact", "table"):
        raise ValueError(f"levels {args.levels!r} is unknown; use exact or table")
    if sorted(args.timesteps, reverse=True) != list(args.timesteps) or not args.timesteps:
        raise ValueError(f"timesteps {list(args.timesteps)} must fall from noisy to clean; sort them")


class Regression(Trainer):
    """One network, on the trajectories of a database."""

    def __init__(self, args: OdeArgs, world: distributed.World) -> None:
        super().__init__(args, world)
        self.settings, self.data = args, ClipDatabase(args.data)
        states = self.data[0].latents_STCHW.shape[0]
        if states != len(args.timesteps):
            raise ValueError(
                f"{args.data}: trajectories of {states} states, but {len(args.timesteps)} timesteps are set"
            )
        self.add_role(
            STUDENT, new_network(read_network(args.network, args.weights), args, world, is_trained=True), args.lr
        )
        self.prompts = Prompts(args, world)

    def run_step(self) -> dict[str, float]:
        told = self.update(STUDENT)
        self.step += 1
        return told

    def loss(self, role: str, first: int, count: int) -> Tensor:
        args, draws = self.settings, Draws(self.args.seed, self.step, role)
        number = self.step * args.batch_size + first
        rows = [self.data[item(args.seed, n, len(self.data))] for n in range(number, number + count)]
        states = torch.stack([row.latents_STCHW for row in rows]).to(self.world.device)
        frames = states.shape[2]
        index = (draws.uniforms(first, count, frames) * len(args.timesteps)).long().to(states.device)
        part = Trajectories(
            self.roles[role][0], CausalConfig(args.chunk or frames, args.window), tuple(args.timesteps),
            Levels(args.shift, args.levels), args.first_frame_clean,
        )  # fmt: skip
        return part.loss(states, index, self.prompts.condition([row.prompt for row in rows]))[0]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return engine.command("train.ode", OdeArgs, check, Regression, argv)


if __name__ == "__main__":
    sys.exit(main())
