"""Checkpoints of a run: sharded, written aside and then renamed, and found again by the same command.

A folder `step_000100` is complete; one that ends in `.partial` was being written when the run died and is ignored.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

PARTIAL = ".partial"


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints below a run's folder, oldest first."""
    found = folder.glob("checkpoints/step_*")
    return sorted((path for path in found if path.is_dir() and path.suffix != PARTIAL), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _gather(roles: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (network, optimiser) in roles.items():
        weights, moments = get_state_dict(network, optimiser)
        found[name] = {"network": weights, "optimiser": moments}
    return found


def save(folder: Path, step: int, roles: dict[str, tuple[Any, Any]], ema: dict[str, Any], *, keep: int) -> Path:
    """Write networks and optimisers by role, and the average; then drop all but the newest `keep` checkpoints."""
    target = folder / "checkpoints" / f"step_{step:06d}"
    partial = target.with_name(target.name + PARTIAL)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state_dict_saver.save({"roles": _gather(roles), "ema": ema}, checkpoint_id=str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def names(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds: dotted names and the description of each."""
    return dict(FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)


def has_average(checkpoint: Path) -> bool:
    return any(name.startswith("ema.") for name in names(checkpoint))


def read(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The whole tensors below a dotted prefix, by one process alone. Raises ValueError if there are none."""
    wanted = {name: about for name, about in names(checkpoint).items() if name.startswith(prefix)}
    if not wanted:
        raise ValueError(f"{checkpoint}: holds nothing below {prefix!r}; its average starts at step ema_start")
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in wanted.items()}
    state_dict_loader.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def load(checkpoint: Path, roles: dict[str, tuple[Any, Any]], ema: dict[str, Any]) -> None:
    """Put back what `save` wrote, into networks, optimisers and average."""
    state = {"roles": _gather(roles), "ema": ema}
    state_dict_loader.load(state, checkpoint_id=str(checkpoint))
    for name, (network, optimiser) in roles.items():
        held = state["roles"][name]
        set_state_dict(network, optimiser, model_state_dict=held["network"], optim_state_dict=held["optimiser"])
