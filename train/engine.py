"""What every stage of training shares: roles and their updates in parts, the average, and the loop around them.

A stage is a `Trainer` that says what its networks are (`roles`), what one step does and what the loss of some clips is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.roofline import Card, Work, measured_card
from train import distributed, logs, state
from train.args import ClipArgs, TrainArgs, mistake, parse, to_yaml
from train.conditions import Prompts, read_texts
from train.data import ClipDatabase, Row
from train.draws import Draws, item
from train.networks import Built, Source, build, read_on_first, wide
from train.plan import plan
from train.samples import Samples, Sampling
from train.state import Role
from train.work import clip_work, copies_of, reached

log = logging.getLogger(__name__)
DTYPES = ("float64", "float32", "bfloat16")
STUDENT = "student"  # the role whose average is kept and exported
SAMPLED = 4  # training prompts that are sampled where no others are given
STOPPED = 3  # exit status after another process was lost


# ------------------------------------------------------------------ set-up --
def check(args: TrainArgs, processes: int, needed: Sequence[str]) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    for name in ("logdir", *needed):
        if not getattr(args, name):
            raise ValueError(f"{name} is not set; give {name}=...")
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype {args.dtype!r} is no type to train in; use one of {', '.join(DTYPES)}")
    if args.micro_batch < 1 or args.batch_size < 1 or args.batch_size % (args.micro_batch * processes):
        raise ValueError(
            f"batch_size {args.batch_size} cannot be divided into parts of micro_batch {args.micro_batch} on "
            f"{processes} processes; use a multiple of {max(args.micro_batch, 1) * processes}"
        )
    if args.keep_last < 1:
        raise ValueError(f"keep_last {args.keep_last} would leave no checkpoint to go on from; use 1 or more")
    if args.lora_rank < 0:
        raise ValueError(f"lora_rank {args.lora_rank} is no size of adapters; use 0 (whole networks), or 16 to 256")
    if args.sample_every and not args.decoder:
        raise ValueError("sample_every needs decoder=... (a TAEHV: a bundle's name or a file) to make videos with")
    logs.check(args)


def lr_scale(args: TrainArgs, step: int) -> float:
    """Share of the learning rates that the step numbered `step` from 0 has."""
    warm = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    cosine = (1 + math.cos(math.pi * min(step / max(args.max_steps, 1), 1))) / 2
    return warm * (args.lr_end + (1 - args.lr_end) * cosine)


def newest(logdir: str) -> str:
    """The last good checkpoint in words."""
    found = state.complete(Path(logdir))
    return str(found[-1]) if found else "the start, no checkpoint is there yet"


# ---------------------------------------------------------------- training --
class Trainer(ABC):
    """Networks with their optimisers by role, and the student's average."""

    def __init__(self, args: TrainArgs, world: distributed.World) -> None:
        self.args, self.world = args, world
        self.roles: dict[str, Role] = {}
        self.ema: dict[str, Any] = {}
        self.step = 0
        self.built: dict[str, Built] = {}
        self.worked = Work()  # what this step's updates took at least
        self.prompts = Prompts(args, world)
        self._samples: Samples | None = None

    @abstractmethod
    def run_step(self) -> dict[str, float]:
        """One step; what it tells. Raises ValueError when a number is no longer one."""

    @abstractmethod
    def loss(self, role: str, first: int, count: int) -> Tensor:
        """Mean loss of the step's clips `first`, ... for a role."""

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """Where each role's network comes from."""

    @abstractmethod
    def work(self, role: str) -> Work:
        """What this step's update of a role takes all processes together at least."""

    @abstractmethod
    def sampling(self) -> Sampling:
        """How the student makes videos."""

    @abstractmethod
    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        """Prompts to sample and their conditions; None: some of the training's own."""

    def add_role(self, role: str, built: Built, lr: float, heads: Any = None, lr_heads: float = 1.0) -> None:
        """What an optimiser trains. heads: more of it, with `lr_heads` times the learning rate."""
        groups: list[dict[str, Any]] = [{"params": list(built.parameters.values()), "full_lr": lr}]
        parameters, modules = dict(built.parameters), (built.module,)
        if heads is not None:
            parameters |= {f"heads.{name}": value for name, value in heads.named_parameters()}
            groups.append({"params": list(heads.parameters()), "full_lr": lr * lr_heads})
            modules = (*modules, heads)
        betas = (self.args.betas[0], self.args.betas[1])
        optimiser = torch.optim.AdamW(groups, lr, betas, weight_decay=self.args.weight_decay)
        self.roles[role] = Role(built.network, modules, parameters, optimiser)

    def resume(self, checkpoint: Path) -> None:
        self.step = state.step_of(checkpoint)
        if state.has_average(checkpoint):
            self.start_average()
        state.load(checkpoint, self.roles, self.ema)

    def draws(self, purpose: str) -> Draws:
        """The random numbers of this step for a purpose."""
        return Draws(self.args.seed, self.step, purpose)

    def update(self, role: str) -> dict[str, float]:
        """One update of a role on a batch; loss and gradient norm."""
        trained = self.roles[role]
        for group in trained.optimiser.param_groups:
            group["lr"] = group["full_lr"] * lr_scale(self.args, self.step)
        total = self.accumulate(role)
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters.values(), self.args.max_grad_norm)
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # type: ignore[operator]
        value = distributed.mean(self.world, total) * self.world.size
        if not abs(value) <= self.args.max_loss or not math.isfinite(size):
            raise ValueError(
                f"{role} loss {value:g} with gradient norm {size:g} in step {self.step + 1} (max_loss "
                f"{self.args.max_loss:g}); the last good checkpoint is {newest(self.args.logdir)}"
            )
        self.apply(role)
        self.worked += self.work(role)
        return {f"{role}_loss": value, f"{role}_grad_norm": size}

    def accumulate(self, role: str) -> Tensor:
        """Gradients of a role on a batch, part by part; this process's share of the loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        parts = list(self.parts())
        for index, (first, count) in enumerate(parts):
            for module in self.roles[role].modules:  # gradients are exchanged once, after the last part
                module.set_requires_gradient_sync(index == len(parts) - 1)
            loss = self.loss(role, first, count) * (count / self.args.batch_size)
            loss.backward()
            total += loss.detach()
        return total

    def apply(self, role: str) -> None:
        """The optimiser's step, and the average's."""
        self.roles[role].optimiser.step()
        for held in self.roles.values():  # sid and gan leave gradients in the critic
            held.optimiser.zero_grad()
        if role == STUDENT:
            self._average()

    def parts(self) -> Iterator[tuple[int, int]]:
        """(first clip of the step, number) of every part of this process's share."""
        share = self.args.batch_size // self.world.size
        start = self.world.rank * share
        for first in range(start, start + share, self.args.micro_batch):
            yield first, self.args.micro_batch

    # ------------------------------------------------------------- average --
    def start_average(self) -> None:
        self.ema = {name: value.detach().clone() for name, value in self.roles[STUDENT].parameters.items()}

    @torch.no_grad()
    def _average(self) -> None:
        if self.step < self.args.ema_start:
            return
        if not self.ema:
            self.start_average()
            return
        for name, value in self.roles[STUDENT].parameters.items():
            self.ema[name].lerp_(value, 1 - self.args.ema_decay)

    @torch.no_grad()
    def _swap_average(self) -> None:
        for name, value in self.roles[STUDENT].parameters.items():
            if name in self.ema:
                kept = value.detach().clone()
                value.copy_(self.ema[name])
                self.ema[name].copy_(kept)

    # ------------------------------------------------------------- samples --
    def sample(self) -> None:
        """Videos of the fixed prompts by the average, where there is one."""
        if self._samples is None:
            texts = read_texts(self.args.sample_prompts) if self.args.sample_prompts else None
            self._samples = Samples(*self.examples(texts), self.args.decoder, self.world, self.args.seed)
        how = self.sampling()
        if self.args.sample_frames:
            how = replace(how, latent_shape=(self.args.sample_frames, *how.latent_shape[1:]))
        self._swap_average()
        try:
            self._samples.write(
                self.roles[STUDENT].network, how, Path(self.args.logdir) / "samples" / f"step_{self.step:06d}"
            )
        finally:
            self._swap_average()


class ClipTrainer(Trainer):
    """One network on the rows of a database, each seen once per round."""

    def __init__(self, args: ClipArgs, world: distributed.World) -> None:
        super().__init__(args, world)
        self.clips = args
        self.open_data()
        found = read_on_first(self.sources()[STUDENT], world).config  # its weights are mapped, not read
        if isinstance(found, WanConfig) and found.model_type == "i2v":
            raise ValueError("an image-to-video network is trained by train.dmd alone; start from a text-to-video one")
        self.built = build(self.sources(), [STUDENT], args, world)
        self.add_role(STUDENT, self.built[STUDENT], args.lr)

    def sources(self) -> dict[str, Source]:
        return {STUDENT: Source(self.clips.network, self.clips.weights)}

    def open_data(self) -> None:
        self.data = ClipDatabase(self.clips.data)
        self.shape = tuple(self.data[0].latents_STCHW.shape[1:])

    def work(self, role: str) -> Work:
        config, copies = self.built[role].config, copies_of(self.args, self.world.size)
        return clip_work(self.clips, config, self.shape, copies=copies)

    def run_step(self) -> dict[str, float]:
        told = self.update(STUDENT)
        self.step += 1
        return told

    def loss(self, role: str, first: int, count: int) -> Tensor:
        number = self.step * self.args.batch_size + first
        rows = self.rows(range(number, number + count))
        condition = self.prompts.condition([row.prompt for row in rows])
        return self.loss_of(self.roles[role].network, rows, condition, self.draws(role), first)

    @abstractmethod
    def loss_of(self, network: Any, rows: list[Row], condition: Conditioning, draws: Draws, first: int) -> Tensor:
        """Mean loss of these rows, the clips `first`, ... of the step."""

    def rows(self, numbers: range) -> list[Row]:
        return [self.data[item(self.args.seed, n, len(self.data))] for n in numbers]

    def clean(self, rows: list[Row]) -> Tensor:
        """The last state of each row, [B, T, C, H, W], where and as sums are computed."""
        return torch.stack([row.latents_STCHW[-1] for row in rows]).to(self.world.device, wide(self.args))

    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        if texts is None:
            texts = [self.data[index].prompt for index in range(min(SAMPLED, len(self.data)))]
        return texts, [self.prompts.condition([text]) for text in texts]


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


def train(args: TrainArgs, world: distributed.World, make: Callable[[], Trainer]) -> None:
    """Train until max_steps, or until asked to stop; a checkpoint is written then too."""
    folder = Path(args.logdir)
    found = state.complete(folder)
    if found and not args.resume:
        raise ValueError(f"{folder} holds checkpoints of another run; choose another logdir, or leave resume on")
    trainer = make()
    if found:
        trainer.resume(found[-1])
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(args), encoding="utf-8")
        state.clean(folder)
    dist.barrier()
    saver, told_to = state.Saver(folder, args.keep_last), logs.Log(args, world, trainer.step)
    card = _all_cards(world, getattr(torch, args.dtype))
    with stopping() as asked:
        while trainer.step < args.max_steps:
            trainer.worked = Work()
            began = time.perf_counter()
            told = trainer.run_step()
            seconds = time.perf_counter() - began
            told_to.step(trainer.step, {**told, "seconds": seconds, **reached(trainer.worked, card, seconds)})
            saver.poll()
            is_asked = distributed.mean(world, torch.tensor(float(bool(asked)))) > 0
            is_last = trainer.step == args.max_steps or is_asked
            if args.sample_every and (trainer.step % args.sample_every == 0 or is_last):
                trainer.sample()
            if (args.save_every and (trainer.step % args.save_every == 0 or is_last)) or is_asked:
                saver.save(trainer.step, trainer.roles, trainer.ema)
            if is_asked:
                log.warning("stopped after step %d; the same command goes on from there", trainer.step)
                break
        saver.wait()
    told_to.close()
    dist.barrier()


def _all_cards(world: distributed.World, dtype: torch.dtype) -> Card:
    """What all processes can do together, measured by all of them at the same time."""
    card = measured_card(world.device, dtype)
    flops, bandwidth = (distributed.mean(world, torch.tensor(rate)) for rate in (card.flops, card.bandwidth))
    return Card(flops * world.size, bandwidth * world.size, 1.0, 1.0)


Args = TypeVar("Args", bound=TrainArgs)


def command(
    name: str,
    kind: type[Args],
    check_args: Callable[[Args, int], None],
    make: Callable[[Args, distributed.World], Trainer],
    argv: list[str] | None,
) -> int:
    """The command line of a stage; returns the exit status: 2 for a user's mistake, said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        args = parse(kind, argv, sys.modules[check_args.__module__].__doc__)
        if args.dry_run:
            print(to_yaml(replace(args, dry_run=False)) + json.dumps(plan(args, processes), indent=2))
            return 0
        check_args(args, processes)
        world = distributed.join(args.device, args.shard_group)
    except ValueError as error:
        return mistake(name, error, is_told=os.environ.get("RANK", "0") == "0")
    try:
        train(args, world, lambda: make(args, world))
    except ValueError as error:
        return mistake(name, error, is_told=world.is_first_to_notice())
    except RuntimeError as error:
        if world.size == 1 or not distributed.is_lost(error):
            raise
        _say_lost(name, args, world)
    finally:
        dist.destroy_process_group()
    return 0


def _say_lost(name: str, args: TrainArgs, world: distributed.World) -> NoReturn:
    """End at once, since nothing can be exchanged any more; the first process to notice says so."""
    if world.is_first_to_notice():
        words = f"{name}: a process of the run is lost; the same command goes on from {newest(args.logdir)}"
        print("\n" + words, file=sys.stderr, flush=True)  # below the progress bar
    os._exit(STOPPED)
