"""Checkpoints of a run: sharded, written beside the training and aside, then renamed, and found by the same command.

A folder `step_000100` is complete; one that ends in `.partial` was being written or removed when the run died.
"""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader

PARTIAL = ".partial"


@dataclass(frozen=True)
class Role:
    """What one optimiser trains: the network as it is called, the sharded modules behind it, and the numbers."""

    network: Any
    modules: tuple[Any, ...]
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer


# --------------------------------------------------------------- on disk --
def complete(folder: Path) -> list[Path]:
    """Complete checkpoints below a run's folder, oldest first."""
    found = folder.glob("checkpoints/step_*")
    return sorted((path for path in found if path.is_dir() and path.suffix != PARTIAL), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def clean(folder: Path) -> None:
    """Remove what a run that died was writing or removing."""
    for path in folder.glob(f"checkpoints/*{PARTIAL}"):
        shutil.rmtree(path)


def _remove(checkpoint: Path) -> None:
    leaving = checkpoint.with_name(checkpoint.name + PARTIAL)  # half a checkpoint must not look like one
    checkpoint.rename(leaving)
    shutil.rmtree(leaving)


def names(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds: dotted names and the description of each."""
    return dict(FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)


def has_average(checkpoint: Path) -> bool:
    return any(name.startswith("ema.") for name in names(checkpoint))


def read(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors below a dotted prefix, by one process alone. Raises ValueError if there are none."""
    wanted = {name: about for name, about in names(checkpoint).items() if name.startswith(prefix)}
    if not wanted:
        raise ValueError(f"{checkpoint}: holds nothing below {prefix!r}; its average starts at step ema_start")
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in wanted.items()}
    with warnings.catch_warnings():  # that one process reads is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# -------------------------------------------------------------- in a run --
def _content(roles: dict[str, Role], ema: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors themselves, by name: loading writes into them."""
    return {
        "roles": {name: {"weights": dict(role.parameters), "moments": moments(role)} for name, role in roles.items()},
        "ema": ema,
    }


def moments(role: Role) -> dict[str, dict[str, Tensor]]:
    """AdamW's numbers by parameter; those that no step has made yet are as its first step makes them."""
    made = {}
    for name, parameter in role.parameters.items():
        held = role.optimiser.state[parameter]
        if not held:
            held["step"] = torch.tensor(0.0)
            held["exp_avg"], held["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        made[name] = held
    return made


def load(checkpoint: Path, roles: dict[str, Role], ema: dict[str, Tensor]) -> None:
    """Put back what was saved, into weights, optimisers and average."""
    with torch.no_grad():
        state_dict_loader.load(_content(roles, ema), checkpoint_id=str(checkpoint))


class Saver:
    """Writes checkpoints beside the training: a save copies everything to main memory and returns."""

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
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        future = state_dict_saver.async_save(_content(roles, ema), checkpoint_id=str(partial), process_group=self.group)
        assert isinstance(future, Future)
        self.pending = future, target

    def poll(self) -> None:
        """Let a checkpoint that is all written appear."""
        if self.pending is not None and self.pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Let the checkpoint that is being written appear. Raises what went wrong with it."""
        if self.pending is None:
            return
        (future, target), self.pending = self.pending, None
        future.result()  # on the first process: all have written, and the index is there
        if dist.get_rank() == 0:
            if target.exists():
                _remove(target)
            target.with_name(target.name + PARTIAL).rename(target)
            for old in complete(self.folder)[: -self.keep]:
                _remove(old)
