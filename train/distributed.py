"""Processes and devices: who we are, which device is ours, and networks sharded over all of us (FSDP2)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

LOST = "lost processes"  # in the store: how many noticed that one is gone


@dataclass(frozen=True)
class World:
    """This process among all of the run. mesh: one axis to shard over, or two: copies, and shards of each."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    store: Any

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def is_first_to_notice(self) -> bool:
        """Whether no other process has said yet that one is lost."""
        try:
            return self.store.add(LOST, 1) == 1
        except RuntimeError:  # the store is gone as well
            return self.is_first


def join(device: str = "auto", shard_group: int = 0) -> World:
    """Join the others that torchrun started, or be the only one.

    shard_group: processes that share one copy of the weights; 0: all. Raises ValueError for a device that is not
    there, and for groups that do not divide the processes.
    """
    wants_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if wants_cuda and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not here; use device=cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if shard_group < 0 or size % (shard_group or size):
        raise ValueError(f"shard_group {shard_group} does not divide {size} processes; use 0 or a divisor")
    kind = "cuda" if wants_cuda else "cpu"
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if wants_cuda else torch.device("cpu")
    if wants_cuda:
        torch.cuda.set_device(own)
    alone = (HashStore(), 0, 1)
    store, rank, size = next(rendezvous("env://")) if "RANK" in os.environ else alone
    backend = "cpu:gloo,cuda:nccl" if wants_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, own, new_mesh(kind, size, shard_group), store)


def new_mesh(kind: str, size: int, shard_group: int) -> DeviceMesh:
    """All processes in one row, or copies of rows of `shard_group`."""
    if shard_group in (0, size):
        return init_device_mesh(kind, (size,))
    return init_device_mesh(kind, (size // shard_group, shard_group), mesh_dim_names=("copy", "shard"))


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch means that another process is gone."""
    words = str(error).lower()
    marks = ("connection closed", "connection reset", "broken pipe", "timed out", "remote process exited", "nccl")
    return isinstance(error, RuntimeError) and any(mark in words for mark in marks)


def shard(network: Any, world: World, dtype: torch.dtype) -> Any:
    """Spread a network over all processes, one unit per block; gradients are summed over them, in full precision."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"torch {torch.__version__} has an older FSDP2 than training needs; use 2.13, the tested one")
    reduced = torch.promote_types(dtype, torch.float32)
    # inputs are not cast: timesteps stay float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    for block in getattr(network, "blocks", ()):
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(network, mesh=world.mesh, mp_policy=policy)
    for module in network.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else it scales while it sums, which only NCCL can
    return network


def mean(world: World, value: torch.Tensor) -> float:
    """A number's mean over all processes."""
    return sums(world, value)[0] / world.size


def sums(world: World, values: torch.Tensor) -> list[float]:
    """Sums over all processes, number by number, in one exchange and one wait for the device."""
    values = values.detach().to(world.device, torch.float64, copy=True).reshape(-1)
    dist.all_reduce(values)
    return values.tolist()
