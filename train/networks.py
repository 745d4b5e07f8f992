"""Networks of a run: read by one process, sharded over all, whole or as adapters on a shared frozen base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from selfforcing_core.config import WanConfig
from selfforcing_core.model import CausalWan
from selfforcing_core.weights.bundles import resolve_model
from selfforcing_core.weights.checkpoint import Checkpoint, read_checkpoint
from train import distributed
from train.args import NetworkArgs, TrainArgs
from train.lora import PART, Adapted, adapt, recompute_as, starts

META = torch.device("meta")


@dataclass(frozen=True)
class Source:
    """A network's file."""

    name: str  # empty where an estimate runs without files
    weights: str = "auto"  # of a file with both: auto, ema, raw


Read = Callable[[str, Source], Checkpoint]  # of a role and its file


@dataclass(frozen=True)
class Built:
    """A role's network."""

    network: Any  # what is called, as `CausalWan.forward`
    module: Any  # the sharded module behind it, which roles may share
    parameters: dict[str, nn.Parameter]  # what is trained
    config: WanConfig


def wide(args: NetworkArgs) -> torch.dtype:
    """Return the type of what is trained and summed."""
    # An update is often smaller than half a bfloat16 step of its weight, and would be rounded away.
    return torch.float64 if args.dtype == "float64" else torch.float32


def read_network(name: str, weights: str = "auto") -> Checkpoint:
    """Read a video model's checkpoint. Raises ValueError for anything else."""
    checkpoint = read_checkpoint(resolve_model(name), weights=weights)
    if not isinstance(checkpoint.config, WanConfig):
        raise ValueError(f"{name} is a {checkpoint.kind}, not a video model; give a Wan checkpoint")
    checkpoint.say_notes()
    return checkpoint


def read_on_first(source: Source, world: distributed.World) -> Checkpoint:
    """Read a network as `read_network` does, by the first process alone: the others get everything but the tensors.

    Raises ValueError on all of them if the first could not read it.
    """
    config: list[Any] = [None]
    checkpoint = None
    if world.is_first:
        try:
            checkpoint = read_network(source.name, source.weights)
            config = [replace(checkpoint, state_dict={})]
        except ValueError as error:
            config = [str(error)]
    dist.broadcast_object_list(config, src=0)
    if isinstance(config[0], str):
        raise ValueError(config[0])
    return config[0] if checkpoint is None else checkpoint


def build(
    sources: Mapping[str, Source], trained: Sequence[str], args: TrainArgs, world: distributed.World, read: Read
) -> dict[str, Built]:
    """Build every role's network. What is trained is kept in full precision, what is frozen in the run's type.

    read: gives a role's checkpoint. With adapters, roles of equal files share one frozen network.
    """
    if not args.lora_rank:
        return {
            role: _trained(read(role, source), args, world)
            if role in trained
            else frozen(read(role, source), args, world, is_recomputed=args.activation_checkpointing)
            for role, source in sources.items()
        }
    # Roles of one file differ in their small adapters alone, so its frozen weights are kept once.
    sharing: dict[Source, list[str]] = {}
    for role, source in sources.items():
        sharing.setdefault(source if source.name else Source(role), []).append(role)
    built: dict[str, Built] = {}
    for roles in sharing.values():
        checkpoint = read(roles[0], sources[roles[0]])
        built |= _shared(checkpoint, roles, [role for role in roles if role in trained], args, world)
    return built


def frozen(
    checkpoint: Checkpoint, args: NetworkArgs, world: distributed.World, *, is_recomputed: bool = False
) -> Built:
    """Build a whole network that is not trained.

    is_recomputed: compute activations again where gradient passes through it (score=sid).
    """
    assert isinstance(checkpoint.config, WanConfig)
    network = CausalWan(checkpoint.config, device=META, dtype=getattr(torch, args.dtype)).requires_grad_(False)
    if is_recomputed:
        network.checkpoint_blocks()
    _place(network, checkpoint.state_dict, args, world)
    return Built(network, network, {}, checkpoint.config)


def _trained(checkpoint: Checkpoint, args: TrainArgs, world: distributed.World) -> Built:
    assert isinstance(checkpoint.config, WanConfig)
    network = CausalWan(checkpoint.config, device=META, dtype=wide(args))
    if args.activation_checkpointing:
        network.checkpoint_blocks()
    _place(network, checkpoint.state_dict, args, world)
    return Built(network, network, dict(network.named_parameters()), checkpoint.config)


def _shared(
    checkpoint: Checkpoint, roles: Sequence[str], trained: Sequence[str], args: TrainArgs, world: distributed.World
) -> dict[str, Built]:
    assert isinstance(checkpoint.config, WanConfig)
    network = CausalWan(checkpoint.config, device=META, dtype=getattr(torch, args.dtype))
    # One set of adapters for each trained role; the switch says whose are on.
    switch = adapt(network, trained, rank=args.lora_rank, alpha=alpha_of(args), dtype=wide(args))
    if args.activation_checkpointing:
        network.checkpoint_blocks(context_fn=recompute_as(switch))
    shapes = {name: value.shape for name, value in network.named_parameters()}
    weights = checkpoint.state_dict
    _place(network, {**weights, **starts(shapes, args.seed)} if weights else {}, args, world)
    own = {
        role: {name: value for name, value in network.named_parameters() if f"{PART}{role}." in name} for role in roles
    }
    return {
        role: Built(Adapted(network, switch, role if role in trained else None), network, own[role], checkpoint.config)
        for role in roles
    }


def alpha_of(args: TrainArgs) -> float:
    """Return the alpha of adapters, which count alpha / rank times; by default once."""
    return args.lora_alpha or float(args.lora_rank)


def _place(network: Any, tensors: Mapping[str, Tensor], args: NetworkArgs, world: distributed.World) -> None:
    """Shard a network that has no memory yet, and fill its shards from the first process's tensors."""
    # Sharded while still on "meta": no process ever has memory for a whole network.
    distributed.shard(network, world, getattr(torch, args.dtype))
    network.to_empty(device=world.device)
    if tensors or not world.is_first:  # the first process has none where an estimate runs without files
        fill(network, tensors, world)


@torch.no_grad()
def fill(network: nn.Module, tensors: Mapping[str, Tensor], world: distributed.World) -> None:
    """Give every process its shards of the first process's tensors, one parameter at a time."""
    # One by one, so that a device holds a single whole parameter beside its shards, not a whole network.
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor)
        like = {"device": world.device, "dtype": parameter.dtype}
        whole = tensors[name].to(**like) if world.is_first else torch.empty(parameter.shape, **like)
        scattered = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(scattered.to_local())
