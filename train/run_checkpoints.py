"""Checkpoints of a run: sharded, written by a thread while training goes on, and renamed when they are complete.

A folder `step_000100` is complete; one that ends in `.partial` was being written or removed when the run died.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from selfforcing_core.atomic import make_folder, writing
from train.distributed import is_lost

log = logging.getLogger(__name__)
PARTIAL = ".partial"
GIVE_UP = 20.0  # seconds that a run which ends waits for its last checkpoint
CHECKPOINT_NAME = re.compile(r"step_[0-9]+")  # whatever else lies beside checkpoints is the user's, and stays


@dataclass(frozen=True)
class Role:
    """What one optimiser trains."""

    network: Any  # as it is called
    modules: tuple[Any, ...]  # the sharded modules behind it
    parameters: dict[str, nn.Parameter]  # those that are trained, by the names of checkpoints
    optimiser: torch.optim.Optimizer


# --------------------------------------------------------------- on disk --
def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints below a run's folder, oldest first."""
    folders = [path for path in folder.glob("checkpoints/step_*") if path.is_dir()]
    return sorted((path for path in folders if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("step_"))


def clean(folder: Path) -> None:
    """Remove what a run that died was writing or removing. The folder must be held (`resume.opened`)."""
    for path in folder.glob(f"checkpoints/*{PARTIAL}"):
        if CHECKPOINT_NAME.fullmatch(path.name.removesuffix(PARTIAL)):
            _discard(path)


def _remove(checkpoint: Path) -> None:
    partial = checkpoint.with_name(checkpoint.name + PARTIAL)  # half a checkpoint must not look like a whole one
    checkpoint.rename(partial)
    _discard(partial)


def _discard(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if partial.exists():  # on a network disk, while somebody reads a file of it
        log.warning("%s cannot be removed; the next start of the run tries again", partial)


def describe(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds: dotted names and the description of each."""
    return dict(FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)


def has_average(checkpoint: Path) -> bool:
    """Return whether the average of the weights had begun."""
    return any(name.startswith("ema.") for name in describe(checkpoint))


def read(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Read the whole tensors below a dotted prefix, in one process alone. Raises ValueError if there are none."""
    described = {name: about for name, about in describe(checkpoint).items() if name.startswith(prefix)}
    if not described:
        raise ValueError(f"{checkpoint}: holds nothing below {prefix!r}; its average starts at step ema_start")
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in described.items()}
    with warnings.catch_warnings():  # that one process reads is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# -------------------------------------------------------------- in a run --
def _content(roles: dict[str, Role], ema: dict[str, Tensor]) -> dict[str, Any]:
    """Return the tensors themselves, by name: loading writes into them."""
    return {
        "roles": {name: {"weights": dict(role.parameters), "moments": moments(role)} for name, role in roles.items()},
        "ema": ema,
    }


def moments(role: Role) -> dict[str, dict[str, Tensor]]:
    """Return AdamW's numbers by parameter; those that no step has made yet are as its first step makes them."""
    states = {}
    for name, parameter in role.parameters.items():
        state = role.optimiser.state[parameter]
        # AdamW makes them in its first step, but loading needs tensors to write into before that.
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states[name] = state
    return states


def load(checkpoint: Path, roles: dict[str, Role], ema: dict[str, Tensor]) -> None:
    """Put back what was saved, into weights, optimisers and average.

    Raises ValueError, before anything is changed, if it holds other tensors than these, and if it cannot be read.
    """
    content = _content(roles, ema)
    try:
        with torch.no_grad():
            _check_fits(checkpoint, content)
            state_dict_loader.load(content, checkpoint_id=str(checkpoint))
    except CheckpointException as error:
        cause = first_cause(error)
        if is_lost(cause):  # another process is gone, which says nothing about the checkpoint
            raise cause from error
        words = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ValueError(
            f"{checkpoint}: cannot be read ({words}); remove it, and the run goes on from the one before"
        ) from error


def _check_fits(checkpoint: Path, content: dict[str, Any]) -> None:
    expected = dict(_flat("", content))
    stored = {name: tuple(about.size) for name, about in describe(checkpoint).items()}
    different = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{checkpoint}: holds other tensors than this run trains ({len(different)} differ, the first is {name}: "
            f"{stored.get(name, 'missing')} -> {expected.get(name, 'missing')}); give the networks and sizes it was "
            "written with, or another logdir"
        )


def _flat(prefix: str, content: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the dotted name and the shape of every tensor."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", tuple(value.shape)


def first_cause(error: CheckpointException) -> BaseException:
    """Return what went wrong on the first process that could not go on."""
    return next(iter(error.failures.values()))[0]


class Saver:
    """Writes checkpoints while training goes on: a save copies everything to CPU memory and returns."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.group: Any = dist.new_group(backend="gloo")  # its messages must not mix with those of training
        self.pending: tuple[Future[Any], Path] | None = None

    def save(self, step: int, roles: dict[str, Role], ema: dict[str, Tensor]) -> None:
        """Begin a checkpoint; an earlier one is completed first. All processes call this together."""
        self.wait()
        target = self.folder / "checkpoints" / f"step_{step:06d}"
        partial = target.with_name(target.name + PARTIAL)
        if dist.get_rank() == 0:
            make_folder(partial.parent)
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()  # nobody writes into the folder before the remains of an earlier run are gone
        future = state_dict_saver.async_save(_content(roles, ema), checkpoint_id=str(partial), process_group=self.group)
        assert isinstance(future, Future)
        self.pending = future, target

    def poll(self) -> None:
        """Let a checkpoint that is all written appear."""
        if self.pending is not None and self.pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Let the checkpoint that is being written appear.

        Raises NotWritten on all processes, with its folder removed, if the disk of one of them has refused it.
        """
        if self.pending is None:
            return
        (future, target), self.pending = self.pending, None
        partial = target.with_name(target.name + PARTIAL)
        with writing(target, partial):
            try:
                future.result()  # on the first process: all have written, and the index is there
            except CheckpointException as error:
                cause = first_cause(error)
                try:
                    with writing(target, partial):
                        raise cause from error
                finally:
                    if not is_lost(cause):  # all processes have ended writing, or they could not have agreed on this
                        shutil.rmtree(partial, ignore_errors=True)
            if dist.get_rank() == 0:
                if target.exists():
                    _remove(target)
                partial.rename(target)
                for old in complete(self.folder)[: -self.keep]:  # only now that a newer one is complete
                    _remove(old)

    def give_up(self) -> None:
        """Leave nothing half-written: what is begun is awaited for a while, and removed if it is not complete."""
        if self.pending is None:
            return
        (future, target), self.pending = self.pending, None
        try:
            future.result(timeout=GIVE_UP)
        except (Exception, CheckpointException):  # torch's is a BaseException
            shutil.rmtree(target.with_name(target.name + PARTIAL), ignore_errors=True)
            return
        self.pending = future, target
        self.wait()
