"""What every stage of training shares: roles and their updates in parts, the average, and the loop around them.

A stage is a `Trainer` that says what its networks are (`roles`), what one step does and what the loss of some clips is.

Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width.
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

from selfforcing_core.atomic import NotWritten, print_result
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.geometry import PATCH, chunk_lengths
from selfforcing_core.roofline import device as devices
from selfforcing_core.roofline.device import Card
from selfforcing_core.roofline.work import Work
from selfforcing_core.weights.bundles import resolve_taehv
from selfforcing_core.weights.load import check_taehv
from train import distributed, finite, logs, resume, run_checkpoints
from train.args import ClipArgs, TrainArgs, mistake, parse, to_yaml
from train.conditions import read_texts
from train.data import Row, ShuffledRows
from train.finite import FiniteCheck
from train.networks import Built, Source, build, wide
from train.randomness import Draws
from train.run_checkpoints import Role
from train.supply import FileSupply, Supply
from train.update_cost import clip_work, copies_of, reached
from train.validation import Sampling, ValidationVideos

log = logging.getLogger(__name__)
# float64 is for comparisons: in it, how a batch is divided among parts and processes does not show.
DTYPES = ("float64", "float32", "bfloat16")
STUDENT = "student"  # the role whose average is kept and exported
LARGEST = sys.float_info.max
# Settings that would otherwise teach nothing, or the wrong thing, without a word. LARGEST refuses infinity, and every
# comparison with NaN is false.
RANGES = (
    ("max_steps", 0, LARGEST),
    ("lr", 0, LARGEST),
    ("weight_decay", 0, LARGEST),
    ("lr_end", 0, 1),
    ("ema_decay", 0, 1),
    ("warmup_steps", 0, LARGEST),
    ("max_grad_norm", sys.float_info.min, LARGEST),  # 0 would cut every gradient to nothing
)
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
            raise ValueError(f"{name} {getattr(args, name)} is out of range; use {low:g} to {high:g}")
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
    """Return the share of the learning rates that the step numbered `step` from 0 has."""
    # The reference's rates are constant, which is the default here: no warm-up, and lr_end 1.
    warm = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    # Half a cosine, from 1 to 0.
    cosine = (1 + math.cos(math.pi * min(step / max(args.max_steps, 1), 1))) / 2
    return warm * (args.lr_end + (1 - args.lr_end) * cosine)


def newest(logdir: str) -> str:
    """Name the last good checkpoint, in words."""
    checkpoints = run_checkpoints.complete(Path(logdir))
    return str(checkpoints[-1]) if checkpoints else "the start, no checkpoint is there yet"


# ---------------------------------------------------------------- training --
class NothingLearnt(ValueError):
    """An update of which nothing is applied: why, and the remedy."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}; nothing of it was applied; {remedy}")
        self.why, self.remedy = why, remedy


class Trainer(ABC):
    """Networks with their optimisers by role, and the student's average."""

    def __init__(self, args: TrainArgs, world: distributed.World, supply: Supply | None = None) -> None:
        self.args, self.world = args, world
        self.supply: Supply = supply or FileSupply(args, world)
        self.roles: dict[str, Role] = {}
        self.ema: dict[str, Any] = {}
        self.step = 0
        self.built: dict[str, Built] = {}
        self.work_done = Work()  # what this step's updates took at least
        self.prompts = self.supply.prompts
        self.finite = FiniteCheck()
        self.rows_replaced = 0  # bad ones, in this process's share of the update
        self.ever_replaced = 0  # by all processes, since the run was started
        self._videos: ValidationVideos | None = None

    @abstractmethod
    def run_step(self) -> dict[str, float]:
        """Take one step; return its metrics. Raises NothingLearnt where loss or gradient are not finite."""

    @abstractmethod
    def loss(self, role: str, first: int, count: int) -> Tensor:
        """Return the mean loss for a role of the step's clips from `first` on."""

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """Return where each role's network comes from."""

    @abstractmethod
    def work(self, role: str) -> Work:
        """Return what this step's update of a role takes all processes together at least."""

    @abstractmethod
    def sampling(self) -> Sampling:
        """Return how the student makes videos."""

    @abstractmethod
    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        """Return prompts to sample and their conditionings. texts: the prompts; None: some of the training's own."""

    def add_role(self, role: str, built: Built, lr: float, heads: Any = None, lr_heads: float = 1.0) -> None:
        """Add what an optimiser trains. heads: more of it, with `lr_heads` times the learning rate."""
        # full_lr is the rate without warm-up and decay, from which `update` sets that of each step.
        groups: list[dict[str, Any]] = [{"params": list(built.parameters.values()), "full_lr": lr}]
        parameters, modules = dict(built.parameters), (built.module,)
        if heads is not None:
            parameters |= {f"heads.{name}": value for name, value in heads.named_parameters()}
            groups.append({"params": list(heads.parameters()), "full_lr": lr * lr_heads})
            modules = (*modules, heads)
        optimiser = torch.optim.AdamW(groups, lr, self.betas(role), weight_decay=self.args.weight_decay)
        self.roles[role] = Role(built.network, modules, parameters, optimiser)

    def betas(self, role: str) -> tuple[float, float]:
        """Return AdamW's betas for a role."""
        return self.args.betas[0], self.args.betas[1]

    def max_grad_norm(self, role: str) -> float:
        """Return the norm that a role's gradient is cut to."""
        return self.args.max_grad_norm

    def resume(self, checkpoint: Path) -> None:
        self.step = run_checkpoints.step_of(checkpoint)
        if run_checkpoints.has_average(checkpoint):
            self.start_average()
        run_checkpoints.load(checkpoint, self.roles, self.ema)

    def draws(self, purpose: str) -> Draws:
        """Return the random numbers of this step for a purpose."""
        return self.supply.draws(self.step, purpose)

    def update(self, role: str) -> dict[str, float]:
        """Update a role on a batch; return loss and gradient norm.

        Raises NothingLearnt on all processes, before anything is applied, if one of the networks, or what they are
        given, is not finite, and if loss or gradient are not or the loss is beyond `max_loss`.
        """
        self.finite.clear()
        self.rows_replaced = 0
        parameters, optimiser = self.roles[role].parameters, self.roles[role].optimiser
        for group in optimiser.param_groups:
            group["lr"] = group["full_lr"] * lr_scale(self.args, self.step)
        total = self.accumulate(role)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.max_grad_norm(role))
        # Of sharded gradients it is a sum that is still to be exchanged.
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # type: ignore[operator]
        own = torch.cat([torch.stack([total, total.new_tensor(self.rows_replaced)]), self.finite.counts(total.device)])
        value, replaced, *bad = distributed.sums(self.world, own)  # one exchange and one wait for all of them
        self._check_finite(role, bad)
        if not abs(value) <= self.args.max_loss or not math.isfinite(grad_norm):  # NaN is not <=
            rate = "lr_critic" if role != STUDENT and hasattr(self.args, "lr_critic") else "lr"
            raise NothingLearnt(
                f"{role} loss {value:g} with gradient norm {grad_norm:g} in step {self.step + 1} (max_loss "
                f"{self.args.max_loss:g})",
                f"{finite.SAME}: change {rate} or seed, and name it in resume_changed",
            )
        self.apply(role)
        self.work_done += self.work(role)
        metrics = {f"{role}_loss": value, f"{role}_grad_norm": grad_norm}
        return metrics | self._count_replaced(role, int(replaced))

    def _check_finite(self, role: str, bad: Sequence[float]) -> None:
        parts = finite.causes(bad)
        if not parts:
            return
        self.finite.reasons[finite.PROMPTS] = [repr(text[:60]) for text in self.prompts.broken]
        # Counts say which parts are bad; why, only the process knows that met it.
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, self.finite.reasons)
        findings = []
        for part in parts:
            reasons = [reason for each in gathered for reason in each.get(part, [])]
            findings.append(finite.WORDS[part][0] + (f" ({reasons[0]})" if reasons else ""))
        remedies = "; ".join(finite.WORDS[part][1] for part in parts)
        raise NothingLearnt(f"{', and '.join(findings)}, in step {self.step + 1} (the {role}'s update)", remedies)

    def _count_replaced(self, role: str, replaced: int) -> dict[str, float]:
        """Report bad rows: always by number in the metrics, in words whenever they became twice as many."""
        before, self.ever_replaced = self.ever_replaced, self.ever_replaced + replaced
        # One more bit is twice as many: ten warnings in a thousand bad rows.
        if self.world.is_first and self.ever_replaced.bit_length() > before.bit_length():
            log.warning(
                "rows of the database that cannot be used: %d times another one took the place since the run was "
                "started; python -m train.check_data lists them",
                self.ever_replaced,
            )
        return {f"{role}_rows_replaced": float(replaced)} if self.args.skip_bad_rows else {}

    def see_prompts(self, *conditions: Conditioning) -> None:
        """Note embeddings that are not finite. Raises ValueError if they are those of another encoder."""
        text_dim = self.built[STUDENT].config.text_dim
        for condition in conditions:
            width = condition.prompt_embeds_BPE.shape[-1]
            if width != text_dim:
                raise ValueError(
                    f"text_encoder {self.args.text_encoder} makes embeddings of width {width}, the network takes "
                    f"{text_dim}; give the encoder that it was trained with"
                )
            self.finite.see(finite.PROMPTS, condition.prompt_embeds_BPE)

    def take(self, rows: ShuffledRows, numbers: Sequence[int]) -> list[Row]:
        """Take rows of a database, good ones in place of bad ones, which count or, unless they may, stop the update."""
        rows.bad.clear()
        good = rows.take(numbers)
        self.rows_replaced += len(rows.bad)
        if not self.args.skip_bad_rows:
            for words in rows.bad:
                self.finite.note(finite.ROWS, words, device=self.world.device)
        return good

    def accumulate(self, role: str) -> Tensor:
        """Accumulate a role's gradients on a batch, part by part; return this process's share of the loss."""
        # On the device, so that no part waits for the one before it.
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        parts = list(self.parts())
        for index, (first, count) in enumerate(parts):
            for module in self.roles[role].modules:  # gradients are exchanged once, after the last part
                module.set_requires_gradient_sync(index == len(parts) - 1)
            # Of the whole batch's mean: sums over parts and processes then need no further division.
            loss = self.loss(role, first, count) * (count / self.args.batch_size)
            loss.backward()
            total += loss.detach()
        return total

    def apply(self, role: str) -> None:
        """Step the optimiser and the average."""
        self.roles[role].optimiser.step()
        for each in self.roles.values():  # sid and gan leave gradients in the critic
            each.optimiser.zero_grad()
        if role == STUDENT:
            self._average()

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield first clip of the step and number of clips of every part of this process's share."""
        # Clips have their numbers in the whole batch, by which everything of theirs is drawn.
        share = self.args.batch_size // self.world.size
        start = self.world.rank * share
        for first in range(start, start + share, self.args.micro_batch):
            yield first, self.args.micro_batch

    # ------------------------------------------------------------- average --
    def start_average(self) -> None:
        """Begin the student's average with its weights as they are."""
        self.ema = {name: value.detach().clone() for name, value in self.roles[STUDENT].parameters.items()}

    @torch.no_grad()
    def _average(self) -> None:
        # As in the reference: the first weights are so far from the last ones that they would only slow it down.
        if self.step < self.args.ema_start:
            return
        if not self.ema:
            self.start_average()
            return
        for name, value in self.roles[STUDENT].parameters.items():
            self.ema[name].lerp_(value, 1 - self.args.ema_decay)

    @torch.no_grad()
    def _swap_average(self) -> None:
        # In place and back again, since a sharded network cannot be built a second time beside itself.
        for name, value in self.roles[STUDENT].parameters.items():
            if name in self.ema:
                weight = value.detach().clone()
                value.copy_(self.ema[name])
                self.ema[name].copy_(weight)

    # ------------------------------------------------------------- samples --
    def check_decoder(self) -> None:
        """Raise ValueError unless the decoder of the videos takes the student's latents."""
        checkpoint = self.supply.checkpoint(STUDENT, self.sources()[STUDENT])
        assert isinstance(checkpoint.config, WanConfig)
        check_taehv(
            resolve_taehv(self.args.decoder),
            channels=checkpoint.config.out_dim,
            latent_space=checkpoint.latent_space,
            said=self.args.decoder_latent_space or None,
            say="decoder_latent_space",
        )

    def sample(self) -> None:
        """Write videos of the fixed prompts by the average, where there is one."""
        if self._videos is None:
            texts = read_texts(self.args.sample_prompts) if self.args.sample_prompts else None
            self._videos = ValidationVideos(*self.examples(texts), self.args.decoder, self.world, self.args.seed)
        sampling = self.sampling()
        if self.args.sample_frames:
            sampling = sampling.of_length(self.args.sample_frames)
        self._swap_average()
        try:
            self._videos.write(
                self.roles[STUDENT].network, sampling, Path(self.args.logdir) / "samples" / f"step_{self.step:06d}"
            )
        finally:
            self._swap_average()


class ClipTrainer(Trainer):
    """One network on the rows of a database, each seen once per round."""

    args: ClipArgs

    def __init__(self, args: ClipArgs, world: distributed.World, supply: Supply | None = None) -> None:
        super().__init__(args, world, supply)
        self.shuffled = self.supply.rows()
        self.shape = self.shuffled.data.shape[1:]
        config = self.supply.checkpoint(STUDENT, self.sources()[STUDENT]).config
        assert isinstance(config, WanConfig)
        if config.model_type == "i2v":
            raise ValueError("an image-to-video network is trained by train.dmd alone; start from a text-to-video one")
        self.check_rows(config)
        self.built = build(self.sources(), [STUDENT], args, world, self.supply.checkpoint)
        self.add_role(STUDENT, self.built[STUDENT], args.lr)

    def sources(self) -> dict[str, Source]:
        return {STUDENT: Source(self.args.network, self.args.weights)}

    def check_rows(self, config: WanConfig) -> None:
        """Raise ValueError for clips that the network cannot take."""
        frames, channels, height, width = self.shape
        if channels != config.out_dim or height % PATCH or width % PATCH:
            raise ValueError(
                f"{self.args.data}: clips of {channels} channels and {width} x {height} latent positions, but the "
                f"network takes {config.out_dim} channels and multiples of {PATCH} positions; give another database"
            )
        try:
            chunk_lengths(frames, self.args.chunk or frames, independent_first_frame=self.args.independent_first_frame)
        except ValueError as error:
            raise ValueError(f"{self.args.data}: {error}, or another chunk") from error

    def work(self, role: str) -> Work:
        config, copies = self.built[role].config, copies_of(self.args, self.world.size)
        return clip_work(self.args, config, self.shape, copies=copies)

    def run_step(self) -> dict[str, float]:
        metrics = self.update(STUDENT)
        self.step += 1
        return metrics

    def loss(self, role: str, first: int, count: int) -> Tensor:
        # Rows follow from the step alone, so a resumed run goes on where it was without any state of a loader.
        number = self.step * self.args.batch_size + first
        rows = self.rows(range(number, number + count))
        condition = self.prompts.condition([row.prompt for row in rows])
        self.see_prompts(condition)
        network = self.finite.watch(finite.STUDENT, self.roles[role].network)
        return self.loss_of(network, rows, condition, self.draws(role), first)

    @abstractmethod
    def loss_of(self, network: Any, rows: list[Row], condition: Conditioning, draws: Draws, first: int) -> Tensor:
        """Return the mean loss of these rows, the step's clips from `first` on."""

    def rows(self, numbers: range) -> list[Row]:
        return self.take(self.shuffled, numbers)

    def clean(self, rows: list[Row]) -> Tensor:
        """Return the last state of each row, [B, T, C, H, W], where and as sums are computed."""
        return torch.stack([row.states[-1] for row in rows]).to(self.world.device, wide(self.args))

    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        if texts is None:
            data = self.shuffled.data
            texts = [data.prompt(index) for index in range(min(SAMPLED, len(data)))]
        return texts, [self.prompts.condition([text]) for text in texts]


# --------------------------------------------------------------------- run --
@contextmanager
def stopping() -> Iterator[Any]:
    """Yield a list that Ctrl-C and SIGTERM append to in place of ending the process."""
    signals: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)  # a scheduler sends the latter before it takes the machine away
    handlers = {kind: signal.signal(kind, lambda number, _: signals.append(number)) for kind in kinds}
    try:
        yield signals
    finally:
        for kind, handler in handlers.items():
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
    saver = run_checkpoints.Saver(folder, args.keep_last)
    try:
        if world.is_first:
            resume.write_settings(folder, stage, args)
            run_checkpoints.clean(folder)
        dist.barrier()  # nothing is written before what killed runs left is gone
        with closing(logs.Log(args, world, trainer.step)) as metrics_log:
            _steps(args, world, trainer, saver, metrics_log, _all_cards(world, getattr(torch, args.dtype)))
    except NothingLearnt as error:
        _complete(saver, args)  # a checkpoint that is being written is a good one
        raise ValueError(
            f"{error.why}; nothing of it was applied, the last good checkpoint is {newest(args.logdir)}; {error.remedy}"
        ) from error
    except NotWritten as error:
        saver.give_up()
        raise Halted(f"{error}; the last good checkpoint is {newest(args.logdir)}") from error
    dist.barrier()


def _complete(saver: run_checkpoints.Saver, args: TrainArgs) -> None:
    try:
        saver.wait()
    except NotWritten as error:
        log.warning("%s; the last good checkpoint is %s", error, newest(args.logdir))


def _steps(
    args: TrainArgs,
    world: distributed.World,
    trainer: Trainer,
    saver: run_checkpoints.Saver,
    metrics_log: logs.Log,
    card: Card,
) -> None:
    with logs.quiet_threads(), stopping() as signals, logging_redirect_tqdm():  # words go below the bar, not behind it
        while trainer.step < args.max_steps:
            trainer.work_done = Work()
            start = time.perf_counter()
            metrics = trainer.run_step()
            seconds = time.perf_counter() - start
            metrics_log.step(trainer.step, {**metrics, "seconds": seconds, **reached(trainer.work_done, card, seconds)})
            saver.poll()
            # A signal may reach one process alone; all have to agree, or the others would wait for it in a collective.
            is_asked = distributed.mean(world, torch.tensor(float(bool(signals)))) > 0
            is_last = trainer.step == args.max_steps or is_asked
            if args.sample_every and (trainer.step % args.sample_every == 0 or is_last):
                trainer.sample()
            # A run that is asked to stop saves even where it otherwise never would, or its work would be lost.
            if (args.save_every and (trainer.step % args.save_every == 0 or is_last)) or is_asked:
                saver.save(trainer.step, trainer.roles, trainer.ema)
            if is_asked:
                log.warning("stopped after step %d; the same command goes on from there", trainer.step)
                break
        saver.wait()


@functools.cache
def measured_card(device: torch.device, dtype: torch.dtype) -> Card:
    """Return what this device can do, measured once per process: it does not change, and a run waits for it."""
    return devices.measured_card(device, dtype, seconds=0.5)


def _all_cards(world: distributed.World, dtype: torch.dtype) -> Card:
    """Return what all processes can do together, measured by all of them at the same time."""
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
    args, error_text = None, ""
    try:
        args = parse(kind, argv, sys.modules[check_args.__module__].__doc__)
        if args.dry_run:
            text = to_yaml(replace(args, dry_run=False)) + json.dumps(estimate(args, processes), indent=2)
            print_result(text)
            return 0
        check_args(args, processes)
        distributed.check(args.device, args.shard_group)
    except ValueError as error:
        error_text = " ".join(str(error).split())
    # Also with a mistake: the others may not have made it, and would wait for this process.
    meeting = distributed.meet()
    try:
        with resume.opened(meeting, name, args, error_text) as checkpoint:
            assert args is not None
            # From here on one process may fail while the others wait for it in a collective.
            return _run(name, args, distributed.join(args.device, args.shard_group, meeting), make, checkpoint)
    except ValueError as error:
        return mistake(name, error, is_told=meeting.rank == 0)


def _run(
    name: str,
    args: Args,
    world: distributed.World,
    make: Callable[[Args, distributed.World], Trainer],
    checkpoint: Path | None,
) -> int:
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
    # Without the usual end, which would wait for the lost process.
    os._exit(STOPPED if status is None else status)
