"""Self Forcing: a few-step student learns from a teacher on its own rollouts (arXiv 2506.08009, algorithm 1).

    torchrun --nproc-per-node 8 -m train.dmd config=self_forcing_dmd logdir=runs/dmd

The same command again goes on where the last checkpoint was written. Numbers do not depend on the number of processes.
Letters: B batch, T latent frames, C channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from selfforcing_core.checkpoint import Checkpoint, read_checkpoint
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, VideoGeometry, chunk_lengths, pixel_frames
from selfforcing_core.hub import load_text_encoder, resolve_model
from selfforcing_core.model import CausalWan
from selfforcing_core.prompts import read_prompts
from selfforcing_core.schedule import sigma_table
from train import distributed, state
from train.args import DmdArgs, parse, to_yaml
from train.draws import Draws, item
from train.losses import score_timesteps
from train.plan import plan
from train.roles import Levels, Matching, Score, ScoreDraw, Student

log = logging.getLogger(__name__)
DTYPES = ("float64", "float32", "bfloat16")


# ------------------------------------------------------------------ set-up --
def check(args: DmdArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    for name in ("logdir", "student", "teacher", "text_encoder", "prompts"):
        if not getattr(args, name):
            raise ValueError(f"{name} is not set; give {name}=...")
    if args.score not in ("dmd", "sid"):
        raise ValueError(f"score {args.score!r} is unknown; use dmd or sid")
    if args.train_context_sigma not in ("exact", "last_table"):
        raise ValueError(f"train_context_sigma {args.train_context_sigma!r} is unknown; use exact or last_table")
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype {args.dtype!r} is no type to train in; use one of {', '.join(DTYPES)}")
    if args.micro_batch < 1 or args.batch_size < 1 or args.batch_size % (args.micro_batch * processes):
        raise ValueError(
            f"batch_size {args.batch_size} cannot be divided into parts of micro_batch {args.micro_batch} on "
            f"{processes} processes; use a multiple of {max(args.micro_batch, 1) * processes}"
        )
    VideoGeometry(args.width, args.height, pixel_frames(args.latent_frames), chunk=args.chunk or args.latent_frames)


def causal_of(args: DmdArgs) -> CausalConfig:
    return CausalConfig(args.chunk or args.latent_frames, args.window, args.sink)


def steps_of(args: DmdArgs) -> StepConfig:
    return StepConfig(tuple(args.steps), shift=args.shift)


def read_network(name: str, weights: str = "auto") -> Checkpoint:
    found = read_checkpoint(resolve_model(name), weights=weights)
    if not isinstance(found.config, WanConfig):
        raise ValueError(f"{name} is a {found.kind}, not a video model")
    return found


def new_network(found: Checkpoint, args: DmdArgs, world: distributed.World, *, is_trained: bool) -> Any:
    """A network of the run, sharded: weights in full precision, computed in the run's type."""
    assert isinstance(found.config, WanConfig)
    wide = torch.float64 if args.dtype == "float64" else torch.float32
    network = CausalWan(found.config)
    network.load_state_dict(found.state_dict)
    network.to(world.device, wide).requires_grad_(is_trained)
    if args.activation_checkpointing:
        network.checkpoint_blocks()
    return distributed.shard(network, world, getattr(torch, args.dtype))


class Prompts:
    """The run's prompts as embeddings; each is encoded when it is first needed."""

    def __init__(self, args: DmdArgs, world: distributed.World) -> None:
        self.args, self.world = args, world
        self.texts = read_prompts(Path(args.prompts))
        self.encoder = load_text_encoder(args.text_encoder, dtype=torch.float32)
        self.known: dict[str, Tensor] = {}

    def condition(self, texts: list[str]) -> Conditioning:
        """Embeddings [B, P, E] of these texts, where and as the networks compute."""
        for text in texts:
            if text not in self.known:
                self.known[text] = self.encoder.encode([text])[0].cpu()
        embeds = torch.stack([self.known[text] for text in texts])
        return Conditioning(embeds.to(self.world.device, getattr(torch, self.args.dtype)))

    def of_step(self, number: int, count: int) -> list[str]:
        """Texts of the clips `number`, ... of the whole run."""
        return [self.texts[item(self.args.seed, n, len(self.texts))] for n in range(number, number + count)]


# ---------------------------------------------------------------- training --
class Trainer:
    """Student, teacher and critic with their optimisers and the student's average."""

    def __init__(self, args: DmdArgs, world: distributed.World) -> None:
        self.args, self.world = args, world
        found = read_network(args.student, args.weights)
        teacher = read_network(args.teacher)
        critic = read_network(args.critic) if args.critic else teacher
        assert isinstance(found.config, WanConfig)
        self.config, self.latent_space = found.config, found.latent_space
        self.causal, self.steps = causal_of(args), steps_of(args)
        student = new_network(found, args, world, is_trained=True)
        self.student = Student(
            student, self.causal, self.steps, loss_frames=args.loss_frames,
            context_sigma=float(sigma_table(args.shift)[-1]) if args.train_context_sigma == "last_table" else 0.0,
        )  # fmt: skip
        levels = Levels(args.score_shift, args.score_levels)
        self.matching = Matching(
            Score(new_network(teacher, args, world, is_trained=False), Levels(8.0, args.score_levels)),
            Score(new_network(critic, args, world, is_trained=True), Levels(8.0, args.score_levels)),
            guidance=args.guidance, levels=levels, score=args.score, sid_alpha=args.sid_alpha,
        )  # fmt: skip
        self.roles = {
            "student": (student, self._optimiser(student, args.lr)),
            "critic": (self.matching.critic.network, self._optimiser(self.matching.critic.network, args.lr_critic)),
        }
        self.ema: dict[str, Any] = {}
        self.prompts = Prompts(args, world)
        self.step = 0

    def _optimiser(self, network: Any, lr: float) -> torch.optim.Optimizer:
        betas = (self.args.betas[0], self.args.betas[1])
        return torch.optim.AdamW(network.parameters(), lr, betas, weight_decay=self.args.weight_decay)

    def resume(self, checkpoint: Path) -> None:
        self.step = state.step_of(checkpoint)
        if state.has_average(checkpoint):
            self._start_average()
        state.load(checkpoint, self.roles, self.ema)

    def save(self) -> Path:
        return state.save(Path(self.args.logdir), self.step, self.roles, self.ema, keep=self.args.keep_last)

    def run_step(self) -> dict[str, float]:
        """One step of the run: the critic always, the student every `critic_per_student` steps."""
        told: dict[str, float] = {}
        if self.step % self.args.critic_per_student == 0:
            told |= self._update("student")
            self._average()
        told |= self._update("critic")
        self.step += 1
        return told

    def _update(self, role: str) -> dict[str, float]:
        """One update of a role on a batch of its own; loss and gradient norm."""
        network, optimiser = self.roles[role]
        for group in optimiser.param_groups:
            group["lr"] = self._rate(self.args.lr if role == "student" else self.args.lr_critic)
        total = torch.zeros((), dtype=torch.float64)
        parts = list(self._parts())
        for index, (first, count) in enumerate(parts):
            distributed.set_sync(network, index == len(parts) - 1)
            loss = self._loss(role, first, count) * (count / self.args.batch_size)
            loss.backward()
            total += loss.detach().double().cpu()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), self.args.max_grad_norm)
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # type: ignore[operator]
        value = distributed.mean(self.world, total) * self.world.size
        if not math.isfinite(value) or not math.isfinite(size):
            last = [str(path) for path in state.complete(Path(self.args.logdir))[-1:]] or ["none"]
            raise ValueError(f"{role} loss {value} with gradient norm {size} in step {self.step}; last good: {last[0]}")
        optimiser.step()
        for trained, _ in self.roles.values():  # sid leaves gradients in the critic
            trained.zero_grad()
        return {f"{role}_loss": value, f"{role}_grad_norm": size}

    def _parts(self) -> Iterator[tuple[int, int]]:
        """(first clip of the step, number) of every part of this process's share."""
        share = self.args.batch_size // self.world.size
        start = self.world.rank * share
        for first in range(start, start + share, self.args.micro_batch):
            yield first, self.args.micro_batch

    def _loss(self, role: str, first: int, count: int) -> Tensor:
        args, draws = self.args, Draws(self.args.seed, self.step, role)
        number = (self.step * 2 + (role == "critic")) * args.batch_size + first
        condition = self.prompts.condition(self.prompts.of_step(number, count))
        negative = self.prompts.condition([args.negative_prompt] * count)
        shape = (args.latent_frames, self.config.out_dim, args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR)
        chunks = len(chunk_lengths(args.latent_frames, self.causal.chunk))
        exits = draws.exit_steps(chunks, len(args.steps), per_chunk=args.exit_per_chunk)
        is_student = role == "student"
        with torch.set_grad_enabled(is_student):
            x = self.student.sample(
                condition, noise=draws.noise(first), latent_shape=shape, exit_steps=exits, with_gradient=is_student
            )  # fmt: skip
        timesteps = score_timesteps(draws.uniform(first, count), args.score_shift).to(x.device, torch.float32)
        draw = ScoreDraw(timesteps, draws.normal(first, tuple(x.shape)).to(x))
        if is_student:
            return self.matching.student_loss(x, draw, condition, negative)[0]
        return self.matching.critic_loss(x, draw, condition)

    def _rate(self, rate: float) -> float:
        return rate * min(1.0, (self.step + 1) / self.args.warmup_steps) if self.args.warmup_steps else rate

    def _start_average(self) -> None:
        self.ema = {name: value.detach().clone() for name, value in self.roles["student"][0].named_parameters()}

    @torch.no_grad()
    def _average(self) -> None:
        if self.step < self.args.ema_start:
            return
        if not self.ema:
            self._start_average()
            return
        for name, value in self.roles["student"][0].named_parameters():
            self.ema[name].lerp_(value, 1 - self.args.ema_decay)


# --------------------------------------------------------------------- run --
@contextmanager
def stopping() -> Iterator[Any]:
    """A flag that Ctrl-C and SIGTERM raise in place of ending the process."""
    asked: list[int] = []
    before = {
        kind: signal.signal(kind, lambda number, _: asked.append(number)) for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def train(args: DmdArgs, world: distributed.World) -> None:
    """Train until max_steps, or until asked to stop; a checkpoint is written then too."""
    folder = Path(args.logdir)
    found = state.complete(folder)
    if found and not args.resume:
        raise ValueError(f"{folder} holds checkpoints of another run; choose another logdir, or leave resume on")
    trainer = Trainer(args, world)
    if found:
        trainer.resume(found[-1])
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(args), encoding="utf-8")
    with stopping() as asked, tqdm(total=args.max_steps, initial=trainer.step, disable=not world.is_first) as bar:
        while trainer.step < args.max_steps:
            began = time.perf_counter()
            told = trainer.run_step()
            told["seconds"] = time.perf_counter() - began
            if world.is_first:
                with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": trainer.step, **told}) + "\n")
                bar.set_postfix({name: f"{value:.3g}" for name, value in told.items()})
                bar.update()
            is_due = bool(args.save_every) and trainer.step % args.save_every == 0
            is_asked = distributed.mean(world, torch.tensor(float(bool(asked)))) > 0
            if is_due or is_asked or (bool(args.save_every) and trainer.step == args.max_steps):
                trainer.save()
            if is_asked:
                log.warning("stopped after step %d; the same command goes on from there", trainer.step)
                return


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 2 for a user's mistake, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        args = parse(DmdArgs, argv)
        if args.dry_run:
            print(to_yaml(replace(args, dry_run=False)) + json.dumps(plan(args, processes), indent=2))
            return 0
        check(args, processes)
        world = distributed.join(args.device)
        try:
            train(args, world)
        finally:
            dist.destroy_process_group()
    except ValueError as error:
        print("train.dmd: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
