"""Flow matching on clips: teacher forcing or diffusion forcing for causal networks, plain for bidirectional ones.

    torchrun --nproc-per-node 8 -m train.diffusion config=diffusion logdir=runs/forcing data=clips network=FILE

A few-step student starts from such a network, or from one of train.ode.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from selfforcing_core.config import CausalConfig
from train import distributed, engine
from train.args import DiffusionArgs
from train.data import ClipDatabase
from train.draws import Draws, item
from train.engine import STUDENT, Prompts, Trainer, new_network, read_network
from train.forcing import Forcing

ENTRIES = 1000  # noise levels to draw from


def check(args: DiffusionArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    engine.check(args, processes, ("network", "text_encoder", "data"))
    if args.forcing not in ("teacher", "diffusion", "none"):
        raise ValueError(f"forcing {args.forcing!r} is unknown; use teacher, diffusion or none")
    if (args.forcing == "none") != (args.chunk == 0):
        raise ValueError(f"forcing {args.forcing} with chunk {args.chunk}: bidirectional training is none with chunk 0")


class FlowMatching(Trainer):
    """One network, on the clean clips of a database."""

    def __init__(self, args: DiffusionArgs, world: distributed.World) -> None:
        super().__init__(args, world)
        self.settings, self.data = args, ClipDatabase(args.data)
        network = new_network(read_network(args.network, args.weights), args, world, is_trained=True)
        self.add_role(STUDENT, network, args.lr)
        self.prompts = Prompts(args, world)

    def run_step(self) -> dict[str, float]:
        told = self.update(STUDENT)
        self.step += 1
        return told

    def loss(self, role: str, first: int, count: int) -> Tensor:
        args, draws = self.settings, Draws(self.args.seed, self.step, role)
        number = self.step * args.batch_size + first
        rows = [self.data[item(args.seed, n, len(self.data))] for n in range(number, number + count)]
        clean = torch.stack([row.latents_STCHW[-1] for row in rows]).to(self.world.device)
        frames = clean.shape[1]
        index = (draws.uniforms(first, count, frames) * ENTRIES).long().to(clean.device)
        causal = CausalConfig(args.chunk or frames, args.window)
        part = Forcing(self.roles[role][0], causal, args.shift, args.forcing == "teacher")
        noise = draws.normal(first, tuple(clean.shape)).to(clean)
        return part.loss(clean, noise, index, self.prompts.condition([row.prompt for row in rows]))[0]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return engine.command("train.diffusion", DiffusionArgs, check, FlowMatching, argv)


if __name__ == "__main__":
    sys.exit(main())
