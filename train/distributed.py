"""Processes and devices: who we are, which device is ours, and networks sharded over all of us (FSDP2).

What ends one process of a run ends all of them: before they are joined they tell each other in words what is wrong
(`Meeting`), and afterwards each looks every half second whether another has failed (`ending_together`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

# names in the store
LOST = "lost processes"  # how many noticed that one is gone
FAILED = "exit status"  # of the process that failed first
INFORMED = "processes that know of it"
POLL = 0.5  # seconds between two looks
PATIENCE = 10.0  # seconds that a process waits for others to have heard it before it ends
GRACE = 3.0  # seconds in which a process may end by itself after another has failed


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # one axis to shard over, or two: copies, and shards of each
    store: Any  # where all processes can leave a few words; it outlives collectives that hang

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def is_first_to_notice(self) -> bool:
        """Return whether no other process has said yet that one is lost."""
        try:
            return self.store.add(LOST, 1) == 1
        except RuntimeError:  # the store is gone as well
            return self.is_first


@dataclass(frozen=True)
class Meeting:
    """The processes of a run before they are joined: they can tell each other words, and nothing else."""

    store: Any
    rank: int
    size: int

    def exchange(self, about: str, words: str) -> list[str]:
        """Return what every process says about something, in the order of their ranks; all of them call this."""
        self.store.set(f"{about} {self.rank}", words)
        answers = [self.store.get(f"{about} {rank}").decode() for rank in range(self.size)]
        self.store.add(f"{about} heard", 1)
        if self.rank == 0:  # which may keep the store, and may be about to end
            _until(lambda: self.store.add(f"{about} heard", 0) >= self.size)
        return answers


def meet() -> Meeting:
    """Find the others that torchrun started, or be the only one."""
    if "RANK" not in os.environ:
        return Meeting(HashStore(), 0, 1)
    return Meeting(*next(rendezvous("env://")))


def check(device: str, shard_group: int) -> None:
    """Raise ValueError for a device that is not there, and for groups that do not divide the processes."""
    if _wants_cuda(device) and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not here; use device=cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if shard_group < 0 or size % (shard_group or size):
        raise ValueError(f"shard_group {shard_group} does not divide {size} processes; use 0 or a divisor")


def _wants_cuda(device: str) -> bool:
    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def join(device: str = "auto", shard_group: int = 0, meeting: Meeting | None = None) -> World:
    """Join the others that torchrun started, or be the only one.

    shard_group: processes that share one copy of the weights; 0: all. meeting: where they have met already.
    Raises ValueError as `check` does.
    """
    check(device, shard_group)
    kind = "cuda" if _wants_cuda(device) else "cpu"
    # torchrun numbers the processes of each machine; everyone takes the GPU of its number.
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(own)
    meeting = meeting or meet()
    # gloo beside NCCL, for what is exchanged on the CPU: Python objects and checkpoints.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=meeting.store, rank=meeting.rank, world_size=meeting.size)
    return World(meeting.rank, meeting.size, own, new_mesh(kind, meeting.size, shard_group), meeting.store)


@contextmanager
def ending_together(world: World) -> Iterator[None]:
    """End this process soon after another has failed, with its exit status, even if it waits for that one."""
    if world.size == 1:
        yield
        return
    is_over = threading.Event()
    own = world.store.clone()  # a store serves one question at a time, and the process may be waiting for an answer
    # A daemon: it must not keep a process alive that has nothing else to do.
    thread = threading.Thread(target=_watch, args=(own, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _watch(store: Any, is_over: threading.Event) -> None:
    with suppress(RuntimeError):  # the store is gone, and the process that kept it
        while not is_over.wait(POLL):
            if store.check([FAILED]):
                status = int(store.get(FAILED))
                store.add(INFORMED, 1)
                if not is_over.wait(GRACE):  # it hangs in a collective that will never be complete
                    os._exit(status)
                return


def fail(world: World, status: int) -> int:
    """Let all processes end with an exit status, which is returned."""
    if world.size > 1:
        with suppress(RuntimeError):
            if not world.store.check([FAILED]):
                world.store.set(FAILED, str(status))
            _until(lambda: world.store.add(INFORMED, 0) >= world.size)
    return status


def failed(world: World) -> int | None:
    """Return the exit status of a process that has failed, if one has."""
    with suppress(RuntimeError):
        if world.size > 1 and world.store.check([FAILED]):
            return int(world.store.get(FAILED))
    return None


def _until(is_so: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)


def new_mesh(kind: str, size: int, shard_group: int) -> DeviceMesh:
    """Arrange all processes in one row, or in copies of rows of `shard_group`."""
    if shard_group in (0, size):
        return init_device_mesh(kind, (size,))
    return init_device_mesh(kind, (size // shard_group, shard_group), mesh_dim_names=("copy", "shard"))


def is_lost(error: BaseException) -> bool:
    """Return whether an error of torch means that another process is gone."""
    # Torch has no error class for this; these are the words of gloo and NCCL.
    words = str(error).lower()
    marks = ("connection closed", "connection reset", "broken pipe", "timed out", "remote process exited", "nccl")
    return isinstance(error, RuntimeError) and any(mark in words for mark in marks)


def shard(network: Any, world: World, dtype: torch.dtype) -> Any:
    """Spread a network over all processes, one unit per block; gradients are summed over them, in full precision."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"torch {torch.__version__} has an older FSDP2 than training needs; use 2.13, the tested one")
    # Sums of gradients over many processes lose too much in bfloat16: the reference reduces in float32 too.
    reduced = torch.promote_types(dtype, torch.float32)
    # Inputs are not cast: timesteps must stay float32, of which bfloat16 would keep 3 digits.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    # While one block computes, the next one's weights are gathered; no more are ever whole.
    for block in getattr(network, "blocks", ()):
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(network, mesh=world.mesh, mp_policy=policy)
    # FSDP would average gradients. The trainer divides every part's loss by the whole batch, so they are to be summed.
    for module in network.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else it scales while it sums, which only NCCL can
    return network


def mean(world: World, value: torch.Tensor) -> float:
    """Return a number's mean over all processes."""
    return sums(world, value)[0] / world.size


def sums(world: World, values: torch.Tensor) -> list[float]:
    """Return sums over all processes, number by number, in one exchange and one wait for the device."""
    values = values.detach().to(world.device, torch.float64, copy=True).reshape(-1)  # a copy, which is overwritten
    dist.all_reduce(values)
    return values.tolist()
