"""Processes and devices: who we are, which device is ours, and networks sharded over all of us (FSDP2)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join(device: str = "auto") -> World:
    """Join the others that torchrun started, or be the only one. Raises ValueError for a device that is not there."""
    wants_cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if wants_cuda and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not here; use device=cpu")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    kind = "cuda" if wants_cuda else "cpu"
    own = torch.device(kind, int(os.environ["LOCAL_RANK"])) if wants_cuda else torch.device("cpu")
    if wants_cuda:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if wants_cuda else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), own, init_device_mesh(kind, (dist.get_world_size(),)))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(network: Any, world: World, dtype: torch.dtype) -> Any:
    """Spread a network over all processes, one unit per block; gradients are summed over them, in full precision."""
    if not hasattr(FSDPModule, "set_gradient_divide_factor"):
        raise ValueError(f"torch {torch.__version__} has an older FSDP2 than training needs; use 2.13, the tested one")
    reduced = torch.promote_types(dtype, torch.float32)
    # inputs are not cast: timesteps stay float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(network, mesh=world.mesh, mp_policy=policy)
    for module in network.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    return network


def mean(world: World, value: torch.Tensor) -> float:
    """A number's mean over all processes."""
    value = value.detach().to(world.device, torch.float64)
    dist.all_reduce(value)
    return float(value) / world.size


def set_sync(network: nn.Module, is_on: bool) -> None:
    """Whether the next backward pass exchanges gradients; off for all but the last part of a batch."""
    network.set_requires_gradient_sync(is_on)  # type: ignore[operator]
