"""Flow matching on clips: teacher forcing or diffusion forcing for causal networks, plain for bidirectional ones.

    torchrun --nproc-per-node 8 -m train.diffusion config=diffusion logdir=runs/forcing data=clips network=FILE

A few-step student starts from such a network (exported by train.export), or from one of train.ode.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import StepConfig
from train import engine
from train.args import DiffusionArgs
from train.data import Row
from train.engine import ClipTrainer, check_chunks
from train.footprint import estimate
from train.forcing import Forcing, causal_of
from train.randomness import Draws
from train.validation import Sampling

ENTRIES = 1000  # noise levels to draw from: those of the reference's table, which have a training weight each


def check(args: DiffusionArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    engine.check(args, processes, ("network", "text_encoder", "data"))
    check_chunks(args)
    if args.forcing not in ("teacher", "diffusion", "none"):
        raise ValueError(f"forcing {args.forcing!r} is unknown; use teacher, diffusion or none")
    if (args.forcing == "none") != (args.chunk == 0):
        raise ValueError(
            f"forcing {args.forcing} with chunk {args.chunk} do not fit; use none with chunk 0 (bidirectional), or a "
            "forcing with chunks"
        )
    steps_of(args)
    if not 0 < args.guidance < float("inf"):
        raise ValueError(f"guidance {args.guidance} is not a positive number; 1 is none, Wan's own is 5")


def steps_of(args: DiffusionArgs) -> StepConfig:
    """Return many steps along the probability-flow equation, since this network is not a few-step one yet."""
    return StepConfig.even(args.sampling_steps, shift=args.shift, solver=args.solver)


class FlowMatching(ClipTrainer):
    """On the clean clips of a database."""

    args: DiffusionArgs

    def loss_of(self, network: Any, rows: list[Row], condition: Conditioning, draws: Draws, first: int) -> Tensor:
        args = self.args
        clean = self.clean(rows)
        frames = clean.shape[1]
        # Uniform over the table's entries, as in the reference; the weights of the loss do the rest.
        index = (draws.uniforms(first, len(rows), frames) * ENTRIES).long().to(clean.device)
        part = Forcing(network, causal_of(args, frames), args.shift, args.forcing == "teacher")
        return part.loss(clean, draws.normal(first, tuple(clean.shape)).to(clean), index, condition)[0]

    def sampling(self) -> Sampling:
        """Sample in many steps, with guidance."""
        args, (frames, channels, height, width) = self.args, self.shape
        causal, shape = causal_of(args, frames), (frames, channels, height, width)
        # Without guidance there is no second pass, and no negative prompt to encode.
        negative = None if args.guidance == 1 else self.prompts.condition([args.negative_prompt])
        return Sampling(causal, steps_of(args), shape, not args.chunk, args.guidance, negative)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return engine.command(
        "train.diffusion", DiffusionArgs, check, FlowMatching, functools.partial(estimate, stage=FlowMatching), argv
    )


if __name__ == "__main__":
    sys.exit(main())
