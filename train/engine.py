"""What every stage of training shares: networks, batches in parts, the average, checkpoints, and the loop around them.

A stage is a `Trainer` that says what its networks are (`roles`), what one step does and what the loss of some clips is.
Letters: B batch, P text tokens, E text width.
"""

from __future__ import annotations

import functools
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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from selfforcing_core.checkpoint import Checkpoint, read_checkpoint
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.hub import load_text_encoder, resolve_model
from selfforcing_core.model import CausalWan
from train import distributed, state
from train.args import ClipArgs, TrainArgs, parse, to_yaml
from train.data import ClipDatabase, Row
from train.draws import Draws, item
from train.plan import plan

log = logging.getLogger(__name__)
DTYPES = ("float64", "float32", "bfloat16")
STUDENT = "student"  # the role whose average is kept and exported
KNOWN_PROMPTS = 64  # embeddings that are kept; one of UMT5-XXL takes 4 MB in bfloat16


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


def read_network(name: str, weights: str = "auto") -> Checkpoint:
    found = read_checkpoint(resolve_model(name), weights=weights)
    if not isinstance(found.config, WanConfig):
        raise ValueError(f"{name} is a {found.kind}, not a video model")
    return found


def new_network(found: Checkpoint, args: TrainArgs, world: distributed.World, *, is_trained: bool) -> Any:
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
    """Texts as embeddings, encoded when they are needed; the latest are kept."""

    def __init__(self, args: TrainArgs, world: distributed.World) -> None:
        self.args, self.world = args, world
        narrow = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
        encoder = load_text_encoder(args.text_encoder, dtype=narrow)
        self.encode = functools.lru_cache(KNOWN_PROMPTS)(lambda text: encoder.encode([text])[0].cpu())

    def condition(self, texts: list[str]) -> Conditioning:
        """Embeddings [B, P, E] of these texts, where and as the networks compute."""
        embeds = torch.stack([self.encode(text) for text in texts])
        return Conditioning(embeds.to(self.world.device, getattr(torch, self.args.dtype)))


# ---------------------------------------------------------------- training --
class Trainer(ABC):
    """Networks with their optimisers by role, and the student's average."""

    def __init__(self, args: TrainArgs, world: distributed.World) -> None:
        self.args, self.world = args, world
        self.roles: dict[str, tuple[Any, torch.optim.Optimizer]] = {}
        self.ema: dict[str, Any] = {}
        self.step = 0

    @abstractmethod
    def run_step(self) -> dict[str, float]:
        """One step; what it tells. Raises ValueError when a number is no longer one."""

    @abstractmethod
    def loss(self, role: str, first: int, count: int) -> Tensor:
        """Mean loss of the step's clips `first`, ... for a role."""

    def add_role(self, role: str, network: Any, lr: float) -> None:
        betas = (self.args.betas[0], self.args.betas[1])
        optimiser = torch.optim.AdamW(network.parameters(), lr, betas, weight_decay=self.args.weight_decay)
        for group in optimiser.param_groups:
            group["full_lr"] = lr
        self.roles[role] = network, optimiser

    def resume(self, checkpoint: Path) -> None:
        self.step = state.step_of(checkpoint)
        if state.has_average(checkpoint):
            self._start_average()
        state.load(checkpoint, self.roles, self.ema)

    def save(self) -> Path:
        return state.save(Path(self.args.logdir), self.step, self.roles, self.ema, keep=self.args.keep_last)

    def update(self, role: str) -> dict[str, float]:
        """One update of a role on a batch, part by part; loss and gradient norm."""
        network, optimiser = self.roles[role]
        warm = min(1.0, (self.step + 1) / self.args.warmup_steps) if self.args.warmup_steps else 1.0
        for group in optimiser.param_groups:
            group["lr"] = group["full_lr"] * warm
        total = torch.zeros((), dtype=torch.float64)
        parts = list(self._parts())
        for index, (first, count) in enumerate(parts):
            distributed.set_sync(network, index == len(parts) - 1)
            loss = self.loss(role, first, count) * (count / self.args.batch_size)
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
        if role == STUDENT:
            self._average()
        return {f"{role}_loss": value, f"{role}_grad_norm": size}

    def _parts(self) -> Iterator[tuple[int, int]]:
        """(first clip of the step, number) of every part of this process's share."""
        share = self.args.batch_size // self.world.size
        start = self.world.rank * share
        for first in range(start, start + share, self.args.micro_batch):
            yield first, self.args.micro_batch

    def _start_average(self) -> None:
        self.ema = {name: value.detach().clone() for name, value in self.roles[STUDENT][0].named_parameters()}

    @torch.no_grad()
    def _average(self) -> None:
        if self.step < self.args.ema_start:
            return
        if not self.ema:
            self._start_average()
            return
        for name, value in self.roles[STUDENT][0].named_parameters():
            self.ema[name].lerp_(value, 1 - self.args.ema_decay)


class ClipTrainer(Trainer):
    """One network on the rows of a database, each seen once per round."""

    def __init__(self, args: ClipArgs, world: distributed.World) -> None:
        super().__init__(args, world)
        self.data, self.prompts = ClipDatabase(args.data), Prompts(args, world)
        network = new_network(read_network(args.network, args.weights), args, world, is_trained=True)
        self.add_role(STUDENT, network, args.lr)

    def run_step(self) -> dict[str, float]:
        told = self.update(STUDENT)
        self.step += 1
        return told

    def loss(self, role: str, first: int, count: int) -> Tensor:
        number = self.step * self.args.batch_size + first
        rows = [self.data[item(self.args.seed, n, len(self.data))] for n in range(number, number + count)]
        condition = self.prompts.condition([row.prompt for row in rows])
        return self.loss_of(self.roles[role][0], rows, condition, Draws(self.args.seed, self.step, role), first)

    @abstractmethod
    def loss_of(self, network: Any, rows: list[Row], condition: Conditioning, draws: Draws, first: int) -> Tensor:
        """Mean loss of these rows, the clips `first`, ... of the step."""


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
        args = parse(kind, argv)
        if args.dry_run:
            print(to_yaml(replace(args, dry_run=False)) + json.dumps(plan(args, processes), indent=2))
            return 0
        check_args(args, processes)
        world = distributed.join(args.device)
        try:
            train(args, world, lambda: make(args, world))
        finally:
            dist.destroy_process_group()
    except ValueError as error:
        print(f"{name}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
