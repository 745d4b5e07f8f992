"""Self Forcing: a few-step student learns from a teacher on its own rollouts (arXiv 2506.08009, algorithm 1).

    torchrun --nproc-per-node 8 -m train.dmd config=self_forcing_dmd logdir=runs/dmd

The same command again goes on where the last checkpoint was written. Numbers do not depend on the number of processes.
Letters: B batch, T latent frames, C channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, VideoGeometry, chunk_lengths, pixel_frames
from selfforcing_core.prompts import read_prompts
from selfforcing_core.schedule import sigma_table
from train import distributed, engine
from train.args import DmdArgs
from train.draws import Draws, item
from train.engine import STUDENT, Prompts, Trainer, new_network, read_network
from train.losses import score_timesteps
from train.roles import Levels, Matching, Score, ScoreDraw, Student

CRITIC = "critic"


def check(args: DmdArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    engine.check(args, processes, ("student", "teacher", "text_encoder", "prompts"))
    if args.score not in ("dmd", "sid"):
        raise ValueError(f"score {args.score!r} is unknown; use dmd or sid")
    if args.score_levels not in ("exact", "table"):
        raise ValueError(f"score_levels {args.score_levels!r} is unknown; use exact or table")
    if args.train_context_sigma not in ("exact", "last_table"):
        raise ValueError(f"train_context_sigma {args.train_context_sigma!r} is unknown; use exact or last_table")
    VideoGeometry(args.width, args.height, pixel_frames(args.latent_frames), chunk=args.chunk or args.latent_frames)


def causal_of(args: DmdArgs) -> CausalConfig:
    return CausalConfig(args.chunk or args.latent_frames, args.window, args.sink)


def steps_of(args: DmdArgs) -> StepConfig:
    return StepConfig(tuple(args.steps), shift=args.shift)


class Distillation(Trainer):
    """Student, teacher and critic."""

    def __init__(self, args: DmdArgs, world: distributed.World) -> None:
        super().__init__(args, world)
        self.settings = args
        found = read_network(args.student, args.weights)
        teacher = read_network(args.teacher)
        critic = read_network(args.critic) if args.critic else teacher
        assert isinstance(found.config, WanConfig)
        self.channels, self.causal = found.config.out_dim, causal_of(args)
        student = new_network(found, args, world, is_trained=True)
        self.student = Student(
            student, self.causal, steps_of(args), loss_frames=args.latent_frames,
            context_sigma=float(sigma_table(args.shift)[-1]) if args.train_context_sigma == "last_table" else 0.0,
        )  # fmt: skip
        self.matching = Matching(
            Score(new_network(teacher, args, world, is_trained=False), Levels(rule=args.score_levels)),
            Score(new_network(critic, args, world, is_trained=True), Levels(rule=args.score_levels)),
            guidance=args.guidance, levels=Levels(args.score_shift, args.score_levels), score=args.score,
            sid_alpha=args.sid_alpha,
        )  # fmt: skip
        self.add_role(STUDENT, student, args.lr)
        self.add_role(CRITIC, self.matching.critic.network, args.lr_critic)
        self.texts, self.prompts = read_prompts(Path(args.prompts)), Prompts(args, world)

    def run_step(self) -> dict[str, float]:
        """The critic always, the student every `critic_per_student` steps."""
        told: dict[str, float] = {}
        if self.step % self.settings.critic_per_student == 0:
            told |= self.update(STUDENT)
        told |= self.update(CRITIC)
        self.step += 1
        return told

    def loss(self, role: str, first: int, count: int) -> Tensor:
        """On clips that the student makes for this: with gradient through them, or without for the critic."""
        args, draws = self.settings, Draws(self.args.seed, self.step, role)
        number = (self.step * 2 + (role == CRITIC)) * args.batch_size + first
        texts = [self.texts[item(args.seed, n, len(self.texts))] for n in range(number, number + count)]
        condition = self.prompts.condition(texts)
        negative = self.prompts.condition([args.negative_prompt] * count)
        shape = (args.latent_frames, self.channels, args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR)
        chunks = len(chunk_lengths(args.latent_frames, self.causal.chunk))
        exits = draws.exit_steps(chunks, len(args.steps), per_chunk=args.exit_per_chunk)
        is_student = role == STUDENT
        with torch.set_grad_enabled(is_student):
            x = self.student.sample(
                condition, noise=draws.noise(first), latent_shape=shape, exit_steps=exits, with_gradient=is_student
            )  # fmt: skip
        timesteps = score_timesteps(draws.uniform(first, count), args.score_shift).to(x.device, torch.float32)
        draw = ScoreDraw(timesteps, draws.normal(first, tuple(x.shape)).to(x))
        if is_student:
            return self.matching.student_loss(x, draw, condition, negative)[0]
        return self.matching.critic_loss(x, draw, condition)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return engine.command("train.dmd", DmdArgs, check, Distillation, argv)


if __name__ == "__main__":
    sys.exit(main())
