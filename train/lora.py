"""Low-rank adapters (LoRA, arXiv 2106.09685): several roles share one frozen network and switch theirs on in place.

Every matrix of the blocks gets, per role, two small ones: y = W x + (alpha / rank) up down x. With none switched on, or
with `up` zero as at the start, the network is the frozen one, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.randomness import key_of

PART = ".lora."  # in the names of adapters' parameters: <layer>.lora.<role>.down or .up
COMFYUI = "diffusion_model."  # what ComfyUI puts before a layer's name


class Switch:
    """Which role's adapters a network adds; None: no one's."""

    def __init__(self) -> None:
        self.role: str | None = None

    @contextmanager
    def on(self, role: str | None) -> Iterator[None]:
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before


class _Adapter(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        factory: Any = {"device": layer.weight.device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, **factory))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **factory))


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with one adapter per role."""

    def __init__(
        self, layer: nn.Linear, roles: Sequence[str], rank: int, scale: float, dtype: torch.dtype, switch: Switch
    ) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora = nn.ModuleDict({role: _Adapter(layer, rank, dtype) for role in roles})
        self.scale, self.switch = scale, switch

    def forward(self, input: Tensor) -> Tensor:
        made = super().forward(input)
        if self.switch.role is None or self.switch.role not in self.lora:
            return made
        adapter = self.lora[self.switch.role]
        return made + F.linear(F.linear(input, adapter.down), adapter.up) * self.scale  # type: ignore[arg-type]


def adapt(network: Any, roles: Sequence[str], *, rank: int, alpha: float, dtype: torch.dtype) -> Switch:
    """Freeze a network, give every matrix of its blocks an adapter for each role; returns the switch of all."""
    network.requires_grad_(False)
    switch = Switch()
    for module in list(network.blocks.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(layer, AdaptedLinear):
                setattr(module, name, AdaptedLinear(layer, roles, rank, alpha / rank, dtype, switch))
    return switch


def starts(names: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """First values of the adapters among a network's parameters (name: shape); each depends on its name alone.

    `down` is uniform as in the paper's code, `up` is zero, so that training starts from the frozen network.
    """
    found = {}
    for name, shape in names.items():
        if PART in name:
            generator = torch.Generator().manual_seed(key_of(seed, name))
            bound = shape[1] ** -0.5 if name.endswith(".down") else 0.0
            found[name] = (torch.rand(tuple(shape), generator=generator) * 2 - 1) * bound
    return found


class Adapted:
    """One role's view of a shared network, called like the network itself. role None: the frozen network."""

    def __init__(self, network: Any, switch: Switch, role: str | None) -> None:
        self.network, self.switch, self.role = network, switch, role

    @property
    def config(self) -> Any:
        return self.network.config

    def new_cache(self, **sizes: Any) -> Any:
        """A cache of the shared network."""
        return self.network.new_cache(**sizes)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        with self.switch.on(self.role):
            return self.network(*args, **options)


def recompute_as(switch: Switch) -> Any:
    """For torch's activation checkpointing: what a forward pass had switched on is on when it is computed again."""
    return lambda: (nullcontext(), switch.on(switch.role))


# ----------------------------------------------------------------- weights --
def split(name: str) -> tuple[str, str, str]:
    """(layer, role, part) of an adapter's parameter."""
    layer, rest = name.split(PART)
    role, part = rest.split(".")
    return layer, role, part


def merged(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The network's weights with the adapters of one role added, in float32 where they change."""
    made = dict(base)
    for name, down in adapters.items():
        layer, role, part = split(name)
        if part == "down":
            up = adapters[f"{layer}{PART}{role}.up"]
            made[f"{layer}.weight"] = base[f"{layer}.weight"].float() + scale * (up.float() @ down.float())
    return made


def comfyui_names(adapters: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The adapters as ComfyUI's LoRA loader reads them: <layer>.lora_down.weight, lora_up.weight and alpha."""
    made: dict[str, Tensor] = {}
    for name, tensor in adapters.items():
        layer, _, part = split(name)
        made[f"{COMFYUI}{layer}.lora_{part}.weight"] = tensor
        made[f"{COMFYUI}{layer}.alpha"] = torch.tensor(float(alpha))
    return made
