"""Networks of a run: read by one process, sharded over all, whole or as adapters on a shared frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from selfforcing_core.checkpoint import Checkpoint, read_checkpoint
from selfforcing_core.config import WanConfig
from selfforcing_core.hub import resolve_model
from selfforcing_core.model import CausalWan
from train import distributed
from train.args import NetworkArgs, TrainArgs
from train.lora import PART, Adapted, adapt, recompute_as, starts

META = torch.device("meta")


@dataclass(frozen=True)
class Source:
    """A network's file. weights: of one with both: auto, ema, raw. planned: sizes in place of a file."""

    name: str
    weights: str = "auto"
    planned: WanConfig | None = None


@dataclass(frozen=True)
class Built:
    """A role's network: what is called (as `CausalWan.forward`), the sharded module, and the numbers to train."""

    network: Any
    module: Any
    parameters: dict[str, nn.Parameter]
    config: WanConfig


def wide(args: NetworkArgs) -> torch.dtype:
    """The type of what is trained and summed."""
    return torch.float64 if args.dtype == "float64" else torch.float32


def read_network(name: str, weights: str = "auto") -> Checkpoint:
    """A video model's checkpoint. Raises ValueError for anything else."""
    found = read_checkpoint(resolve_model(name), weights=weights)
    if not isinstance(found.config, WanConfig):
        raise ValueError(f"{name} is a {found.kind}, not a video model")
    found.say_notes()
    return found


def read_on_first(source: Source, world: distributed.World) -> Checkpoint:
    """As `read_network`, by the first process alone: the others get everything but the tensors.

    Raises ValueError on all of them if the first could not read it.
    """
    if source.planned is not None:
        return Checkpoint("wan", {}, source.planned, None, None, "wan", "float32", "raw", {})
    held: list[Any] = [None]
    found = None
    if world.is_first:
        try:
            found = read_network(source.name, source.weights)
            held = [replace(found, state_dict={})]
        except ValueError as error:
            held = [str(error)]
    dist.broadcast_object_list(held, src=0)
    if isinstance(held[0], str):
        raise ValueError(held[0])
    return held[0] if found is None else found


def build(
    sources: Mapping[str, Source], trained: Sequence[str], args: TrainArgs, world: distributed.World
) -> dict[str, Built]:
    """Every role's network. What is trained is kept in full precision, what is frozen in the run's type.

    With adapters, roles of equal files share one frozen network. Raises ValueError for files that cannot be read.
    """
    if not args.lora_rank:
        return {
            role: _trained(source, args, world)
            if role in trained
            else frozen(source, args, world, is_recomputed=args.activation_checkpointing)
            for role, source in sources.items()
        }
    made: dict[str, Built] = {}
    for source in dict.fromkeys(sources.values()):
        roles = [role for role, wanted in sources.items() if wanted == source]
        made |= _shared(source, roles, [role for role in roles if role in trained], args, world)
    return made


def frozen(source: Source, args: NetworkArgs, world: distributed.World, *, is_recomputed: bool = False) -> Built:
    """A whole network that is not trained. Raises ValueError for a file that cannot be read.

    is_recomputed: compute activations again where gradient passes through it (score=sid).
    """
    found = read_on_first(source, world)
    assert isinstance(found.config, WanConfig)
    network = CausalWan(found.config, device=META, dtype=getattr(torch, args.dtype)).requires_grad_(False)
    if is_recomputed:
        network.checkpoint_blocks()
    _place(network, None if source.planned else found.state_dict, args, world)
    return Built(network, network, {}, found.config)


def _trained(source: Source, args: TrainArgs, world: distributed.World) -> Built:
    found = read_on_first(source, world)
    assert isinstance(found.config, WanConfig)
    network = CausalWan(found.config, device=META, dtype=wide(args))
    if args.activation_checkpointing:
        network.checkpoint_blocks()
    _place(network, None if source.planned else found.state_dict, args, world)
    return Built(network, network, dict(network.named_parameters()), found.config)


def _shared(
    source: Source, roles: Sequence[str], trained: Sequence[str], args: TrainArgs, world: distributed.World
) -> dict[str, Built]:
    found = read_on_first(source, world)
    assert isinstance(found.config, WanConfig)
    network = CausalWan(found.config, device=META, dtype=getattr(torch, args.dtype))
    switch = adapt(network, trained, rank=args.lora_rank, alpha=alpha_of(args), dtype=wide(args))
    if args.activation_checkpointing:
        network.checkpoint_blocks(context_fn=recompute_as(switch))
    shapes = {name: value.shape for name, value in network.named_parameters()}
    tensors = None if source.planned else {**found.state_dict, **starts(shapes, args.seed)}
    _place(network, tensors, args, world)
    own = {
        role: {name: value for name, value in network.named_parameters() if f"{PART}{role}." in name} for role in roles
    }
    return {
        role: Built(Adapted(network, switch, role if role in trained else None), network, own[role], found.config)
        for role in roles
    }


def alpha_of(args: TrainArgs) -> float:
    """Adapters count alpha / rank times; by default once."""
    return args.lora_alpha or float(args.lora_rank)


def _place(network: Any, tensors: Mapping[str, Tensor] | None, args: NetworkArgs, world: distributed.World) -> None:
    """Shard a network that has no memory yet, and fill its shards from the first process's tensors, if any."""
    distributed.shard(network, world, getattr(torch, args.dtype))
    network.to_empty(device=world.device)
    if tensors is not None:
        fill(network, tensors, world)


@torch.no_grad()
def fill(network: nn.Module, tensors: Mapping[str, Tensor], world: distributed.World) -> None:
    """Give every process its shards of the first process's tensors, one parameter at a time."""
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor)
        like = {"device": world.device, "dtype": parameter.dtype}
        whole = tensors[name].to(**like) if world.is_first else torch.empty(parameter.shape, **like)
        scattered = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(scattered.to_local())
