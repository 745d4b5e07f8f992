"""What every stage of training shares: roles and their updates in parts, the average, and the loop around them.

A stage is a `Trainer` that says what its networks are (`roles`), what one step does and what the loss of some clips is.
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
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from selfforcing_core import device as devices
from selfforcing_core.atomic import NotWritten, print_result
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.device import Card
from selfforcing_core.geometry import PATCH, chunk_lengths
from selfforcing_core.hub import resolve_taehv
from selfforcing_core.load import check_taehv
from selfforcing_core.roofline import Work
from train import distributed, finite, logs, resume, state
from train.args import ClipArgs, TrainArgs, mistake, parse, to_yaml
from train.conditions import Prompts, read_texts
from train.data import ClipDatabase, Row, ShuffledRows
from train.draws import Draws
from train.finite import FiniteCheck
from train.networks import Built, Source, build, read_on_first, wide
from train.samples import Samples, Sampling
from train.state import Role
from train.work import clip_work, copies_of, reached

log = logging.getLogger(__name__)
DTYPES = ("float64", "float32", "bfloat16")
STUDENT = "student"  # the role whose average is kept and exported
LARGEST = sys.float_info.max
# Settings that would otherwise teach nothing, or the wrong thing, without a word
RANGES = (
    ("max_steps", 0, LARGEST), ("lr", 0, LARGEST), ("weight_decay", 0, LARGEST), ("lr_end", 0, 1), ("ema_decay", 0, 1),
    ("warmup_steps", 0, LARGEST), ("max_grad_norm", sys.float_info.min, LARGEST),
)  # fmt: skip
SAMPLED = 4  # training prompts that are sampled where no others are given
STOPPED = 3  # exit status of a run that has begun, after a process was lost or a disk was full


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
    for name, low, high in RANGES:
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"{name} {getattr(args, name)} is not between {low:g} and {high:g}")
    if args.keep_last < 1:
        raise ValueError(f"keep_last {args.keep_last} would leave no checkpoint to go on from; use 1 or more")
    if args.lora_rank < 0:
        raise ValueError(f"lora_rank {args.lora_rank} is no size of adapters; use 0 (whole networks), or 16 to 256")
    if args.sample_every and not args.decoder:
        raise ValueError("sample_every needs decoder=... (a TAEHV: a bundle's name or a file) to make videos with")
    logs.check(args)


def check_chunks(args: TrainArgs) -> None:
    """Raise ValueError for a first frame of its own in a clip that is one chunk."""
    if args.independent_first_frame and not args.chunk:
        raise ValueError("independent_first_frame is about chunks, and chunk=0 has none; leave one of them out")


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
class NothingLearnt(ValueError):
    """An update of which nothing is applied: why, and the remedy."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}; nothing of it was applied; {remedy}")
        self.why, self.remedy = why, remedy


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
        self.finite = FiniteCheck()
        self.rows_replaced = 0  # bad ones, in this process's share of the update
        self.ever_replaced = 0  # by all processes, since the run was started
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
        optimiser = torch.optim.AdamW(groups, lr, self.betas(role), weight_decay=self.args.weight_decay)
        self.roles[role] = Role(built.network, modules, parameters, optimiser)

    def betas(self, role: str) -> tuple[float, float]:
        """AdamW's for a role."""
        return self.args.betas[0], self.args.betas[1]

    def max_grad_norm(self, role: str) -> float:
        """The norm that a role's gradient is cut to."""
        return self.args.max_grad_norm

    def resume(self, checkpoint: Path) -> None:
        self.step = state.step_of(checkpoint)
        if state.has_average(checkpoint):
            self.start_average()
        state.load(checkpoint, self.roles, self.ema)

    def draws(self, purpose: str) -> Draws:
        """The random numbers of this step for a purpose."""
        return Draws(self.args.seed, self.step, purpose)

    def update(self, role: str) -> dict[str, float]:
        """One update of a role on a batch; loss and gradient norm.

        Raises NothingLearnt on all processes, before anything is applied, if one of the networks, or what they are
        given, is not finite, and if loss or gradient are not or the loss is beyond `max_loss`.
        """
        self.finite.clear()
        self.rows_replaced = 0
        trained = self.roles[role]
        for group in trained.optimiser.param_groups:
            group["lr"] = group["full_lr"] * lr_scale(self.args, self.step)
        total = self.accumulate(role)
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters.values(), self.max_grad_norm(role))
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # type: ignore[operator]
        own = torch.cat([torch.stack([total, total.new_tensor(self.rows_replaced)]), self.finite.counts(total.device)])
        value, replaced, *bad = distributed.sums(self.world, own)  # one exchange and one wait for all of them
        self._check_finite(role, bad)
        if not abs(value) <= self.args.max_loss or not math.isfinite(size):
            rate = "lr_critic" if role != STUDENT and hasattr(self.args, "lr_critic") else "lr"
            raise NothingLearnt(
                f"{role} loss {value:g} with gradient norm {size:g} in step {self.step + 1} (max_loss "
                f"{self.args.max_loss:g})",
                f"{finite.SAME}: change {rate} or seed, and name it in resume_changed",
            )
        self.apply(role)
        self.worked += self.work(role)
        told = {f"{role}_loss": value, f"{role}_grad_norm": size}
        return told | self._count_replaced(role, int(replaced))

    def _check_finite(self, role: str, bad: Sequence[float]) -> None:
        parts = finite.causes(bad)
        if not parts:
            return
        self.finite.reasons[finite.PROMPTS] = [repr(text[:60]) for text in self.prompts.broken]
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, self.finite.reasons)
        said = []
        for part in parts:
            reasons = [reason for each in gathered for reason in each.get(part, [])]
            said.append(finite.WORDS[part][0] + (f" ({reasons[0]})" if reasons else ""))
        remedies = "; ".join(finite.WORDS[part][1] for part in parts)
        raise NothingLearnt(f"{', and '.join(said)}, in step {self.step + 1} (the {role}'s update)", remedies)

    def _count_replaced(self, role: str, replaced: int) -> dict[str, float]:
        """What is told of bad rows: always by number in the log, in words whenever they became twice as many."""
        before, self.ever_replaced = self.ever_replaced, self.ever_replaced + replaced
        if self.world.is_first and self.ever_replaced.bit_length() > before.bit_length():
            log.warning(
                "rows of the database that cannot be used: %d times another one took the place since the run was "
                "started; python -m train.check_data lists them", self.ever_replaced,
            )  # fmt: skip
        return {f"{role}_rows_replaced": float(replaced)} if self.args.skip_bad_rows else {}

    def see_prompts(self, *conditions: Conditioning) -> None:
        """Note embeddings that are not finite. Raises ValueError if they are those of another encoder."""
        wanted = self.built[STUDENT].config.text_dim
        for condition in conditions:
            width = condition.prompt_embeds_BPE.shape[-1]
            if width != wanted:
                raise ValueError(
                    f"text_encoder {self.args.text_encoder} makes embeddings of width {width}, the network takes "
                    f"{wanted}; give the encoder that it was trained with"
                )
            self.finite.see(finite.PROMPTS, condition.prompt_embeds_BPE)

    def take(self, rows: ShuffledRows, numbers: Sequence[int]) -> list[Row]:
        """Rows of a database, good ones in place of bad ones, which count or, unless they may, stop the update."""
        rows.bad.clear()
        found = rows.take(numbers)
        self.rows_replaced += len(rows.bad)
        if not self.args.skip_bad_rows:
            for words in rows.bad:
                self.finite.note(finite.ROWS, words, device=self.world.device)
        return found

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
    def check_decoder(self) -> None:
        """Raise ValueError unless the decoder of the videos takes the student's latents."""
        found = read_on_first(self.sources()[STUDENT], self.world)
        assert isinstance(found.config, WanConfig)
        check_taehv(
            resolve_taehv(self.args.decoder), channels=found.config.out_dim, latent_space=found.latent_space,
            said=self.args.decoder_latent_space or None, say="decoder_latent_space",
        )  # fmt: skip

    def sample(self) -> None:
        """Videos of the fixed prompts by the average, where there is one."""
        if self._samples is None:
            texts = read_texts(self.args.sample_prompts) if self.args.sample_prompts else None
            self._samples = Samples(*self.examples(texts), self.args.decoder, self.world, self.args.seed)
        how = self.sampling()
        if self.args.sample_frames:
            how = how.of_length(self.args.sample_frames)
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
        if isinstance(found, WanConfig):
            self._check_shape(found)
        self.built = build(self.sources(), [STUDENT], args, world)
        self.add_role(STUDENT, self.built[STUDENT], args.lr)

    def sources(self) -> dict[str, Source]:
        return {STUDENT: Source(self.clips.network, self.clips.weights)}

    def open_data(self) -> None:
        self.data = ClipDatabase(self.clips.data)
        self.shuffled = ShuffledRows(self.data, self.clips.seed)
        self.shape = self.data.shape[1:]

    def _check_shape(self, config: WanConfig) -> None:
        """Raise ValueError for clips that the network cannot take."""
        frames, channels, height, width = self.shape
        if channels != config.out_dim or height % PATCH or width % PATCH:
            raise ValueError(
                f"{self.clips.data}: clips of {channels} channels and {width} x {height} latent positions, but the "
                f"network takes {config.out_dim} channels and multiples of {PATCH} positions; give another database"
            )
        try:
            chunk_lengths(
                frames, self.clips.chunk or frames, independent_first_frame=self.clips.independent_first_frame
            )
        except ValueError as error:
            raise ValueError(f"{self.clips.data}: {error}, or another chunk") from error

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
        self.see_prompts(condition)
        network = self.finite.watch(finite.STUDENT, self.roles[role].network)
        return self.loss_of(network, rows, condition, self.draws(role), first)

    @abstractmethod
    def loss_of(self, network: Any, rows: list[Row], condition: Conditioning, draws: Draws, first: int) -> Tensor:
        """Mean loss of these rows, the clips `first`, ... of the step."""

    def rows(self, numbers: range) -> list[Row]:
        return self.take(self.shuffled, numbers)

    def clean(self, rows: list[Row]) -> Tensor:
        """The last state of each row, [B, T, C, H, W], where and as sums are computed."""
        return torch.stack([row.latents_STCHW[-1] for row in rows]).to(self.world.device, wide(self.args))

    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        if texts is None:
            texts = [self.data.prompt(index) for index in range(min(SAMPLED, len(self.data)))]
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


class Halted(Exception):
    """What ends a run that has begun, in words that name the last good checkpoint."""


def train(
    args: TrainArgs, world: distributed.World, make: Callable[[], Trainer], stage: str, checkpoint: Path | None
) -> None:
    """Train until max_steps, or until asked to stop; a checkpoint is written then too.

    checkpoint: to go on from, None to start. The run's folder is held (`resume.opened`). Raises Halted when a disk
    refuses what is written; a checkpoint that was begun is then removed.
    """
    folder = Path(args.logdir)
    trainer = make()
    if args.sample_every:
        trainer.check_decoder()
    if checkpoint is not None:
        trainer.resume(checkpoint)
    saver = state.Saver(folder, args.keep_last)
    try:
        if world.is_first:
            resume.write_settings(folder, stage, args)
            state.clean(folder)
        dist.barrier()
        with closing(logs.Log(args, world, trainer.step)) as told_to:
            _steps(args, world, trainer, saver, told_to, _all_cards(world, getattr(torch, args.dtype)))
    except NothingLearnt as error:
        _complete(saver, args)  # a checkpoint that is being written is a good one
        raise ValueError(
            f"{error.why}; nothing of it was applied, the last good checkpoint is {newest(args.logdir)}; {error.remedy}"
        ) from error
    except NotWritten as error:
        saver.give_up()
        raise Halted(f"{error}; the last good checkpoint is {newest(args.logdir)}") from error
    dist.barrier()


def _complete(saver: state.Saver, args: TrainArgs) -> None:
    try:
        saver.wait()
    except NotWritten as error:
        log.warning("%s; the last good checkpoint is %s", error, newest(args.logdir))


def _steps(
    args: TrainArgs, world: distributed.World, trainer: Trainer, saver: state.Saver, told_to: logs.Log, card: Card
) -> None:
    with logs.quiet_threads(), stopping() as asked, logging_redirect_tqdm():  # words go below the bar, not behind it
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


@functools.cache
def measured_card(device: torch.device, dtype: torch.dtype) -> Card:
    """Return what this device can do, measured once per process: it takes two seconds, and does not change."""
    return devices.measured_card(device, dtype)


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
    estimate: Callable[[Args, int], dict[str, Any]],
    argv: list[str] | None,
) -> int:
    """Run the command line of a stage and return the exit status: 2 for a user's mistake, said in one line.

    make: the stage's trainer of settings and processes. estimate: what dry_run prints, of settings and their number.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args, wrong = None, ""
    try:
        args = parse(kind, argv, sys.modules[check_args.__module__].__doc__)
        if args.dry_run:
            text = to_yaml(replace(args, dry_run=False)) + json.dumps(estimate(args, processes), indent=2)
            print_result(text)
            return 0
        check_args(args, processes)
        distributed.check(args.device, args.shard_group)
    except ValueError as error:
        wrong = " ".join(str(error).split())
    meeting = distributed.meet()
    try:
        with resume.opened(meeting, name, args, wrong) as checkpoint:
            assert args is not None
            return _run(name, args, distributed.join(args.device, args.shard_group, meeting), make, checkpoint)
    except ValueError as error:
        return mistake(name, error, is_told=meeting.rank == 0)


def _run(
    name: str, args: Args, world: distributed.World, make: Callable[[Args, distributed.World], Trainer],
    checkpoint: Path | None,
) -> int:  # fmt: skip
    """Train, and see to it that all processes end with the same status when one of them cannot go on."""
    try:
        with distributed.ending_together(world):
            try:
                train(args, world, lambda: make(args, world), name, checkpoint)
            except ValueError as error:
                return distributed.fail(world, mistake(name, error, is_told=world.is_first_to_notice()))
            except Halted as error:
                mistake(name, error, is_told=world.is_first_to_notice())
                return distributed.fail(world, STOPPED)
            except BaseException as error:
                if world.size > 1 and distributed.is_lost(error):
                    _say_lost(name, args, world)
                distributed.fail(world, 1)
                raise
    finally:
        dist.destroy_process_group()
    return 0


def _say_lost(name: str, args: TrainArgs, world: distributed.World) -> NoReturn:
    """End at once, since nothing can be exchanged any more; the first process to notice says so."""
    status = distributed.failed(world)
    if status is None and world.is_first_to_notice():
        words = f"{name}: a process of the run is lost; the same command goes on from {newest(args.logdir)}"
        print("\n" + words, file=sys.stderr, flush=True)  # below the progress bar
    os._exit(STOPPED if status is None else status)
