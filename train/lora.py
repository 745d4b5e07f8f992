"""LoRA (arXiv 2106.09685): several roles share one frozen network, and each switches its own low-rank matrices on.

Every matrix of the blocks gets, per role, two small ones: y = W x + (alpha / rank) up down x (eq. 3, with the factor of
section 4.1). With none switched on, or with `up` zero as at the start, the network is the frozen one, bit-exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.randomness import key_of

PART = ".lora."  # in the names of its parameters: <layer>.lora.<role>.down or .up
COMFYUI = "diffusion_model."  # what ComfyUI puts before a layer's name


class Switch:
    """Says whose LoRA a network adds; None: no one's."""

    def __init__(self) -> None:
        self.role: str | None = None

    @contextmanager
    def on(self, role: str | None) -> Iterator[None]:
        """Switch to a role, and back to the one before at the end."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before


class _LowRank(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        # As wide as the layer where it counts, of `rank` in the middle: 2 rank D numbers in place of D^2.
        factory: Any = {"device": layer.weight.device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, **factory))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **factory))


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with low-rank matrices for each role."""

    def __init__(
        self, layer: nn.Linear, roles: Sequence[str], rank: int, scale: float, dtype: torch.dtype, switch: Switch
    ) -> None:
        # On "meta" nothing is allocated, since the weights that count are the layer's own.
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora = nn.ModuleDict({role: _LowRank(layer, rank, dtype) for role in roles})
        self.scale, self.switch = scale, switch

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if self.switch.role is None or self.switch.role not in self.lora:
            return output
        lora = self.lora[self.switch.role]
        return output + F.linear(F.linear(input, lora.down), lora.up) * self.scale  # type: ignore[arg-type]


def adapt(network: Any, roles: Sequence[str], *, rank: int, alpha: float, dtype: torch.dtype) -> Switch:
    """Freeze a network, give every matrix of its blocks LoRA for each role, and return the switch of all of them."""
    network.requires_grad_(False)
    switch = Switch()
    for module in list(network.blocks.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(layer, AdaptedLinear):
                setattr(module, name, AdaptedLinear(layer, roles, rank, alpha / rank, dtype, switch))
    return switch


def starts(names: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Return first values of the LoRA among a network's parameters (name: shape); each depends on its name alone.

    `down` is uniform as in the paper's code, `up` is zero, so that training starts from the frozen network.
    """
    tensors = {}
    for name, shape in names.items():
        if PART in name:
            generator = torch.Generator().manual_seed(key_of(seed, name))
            # torch's Kaiming initialisation with a = sqrt(5), as in the paper's code, comes to 1 / sqrt(inputs).
            bound = shape[1] ** -0.5 if name.endswith(".down") else 0.0
            tensors[name] = (torch.rand(tuple(shape), generator=generator) * 2 - 1) * bound
    return tensors


class Adapted:
    """One role's view of a shared network, called like the network itself. role None: the frozen network."""

    def __init__(self, network: Any, switch: Switch, role: str | None) -> None:
        self.network, self.switch, self.role = network, switch, role

    @property
    def config(self) -> Any:
        return self.network.config

    def new_cache(self, **sizes: Any) -> Any:
        """Make a cache for the shared network."""
        return self.network.new_cache(**sizes)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        with self.switch.on(self.role):
            return self.network(*args, **options)


def recompute_as(switch: Switch) -> Any:
    """Return what torch's activation checkpointing enters: the role of the forward pass, when that is repeated.

    The backward pass computes activations again at a time when another role may be switched on.
    """
    return lambda: (nullcontext(), switch.on(switch.role))


# ----------------------------------------------------------------- weights --
def split(name: str) -> tuple[str, str, str]:
    """Split the name of a parameter of LoRA into layer, role and part."""
    layer, rest = name.split(PART)
    role, part = rest.split(".")
    return layer, role, part


def merged(base: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add the LoRA of one role to a network's weights, in float32 where they change; scale: alpha / rank."""
    weights = dict(base)
    for name, down in lora.items():
        layer, role, part = split(name)
        if part == "down":
            up = lora[f"{layer}{PART}{role}.up"]
            weights[f"{layer}.weight"] = base[f"{layer}.weight"].float() + scale * (up.float() @ down.float())
    return weights


def comfyui_names(lora: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Rename LoRA to what ComfyUI's loader reads: <layer>.lora_down.weight, lora_up.weight and alpha."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in lora.items():
        layer, _, part = split(name)
        renamed[f"{COMFYUI}{layer}.lora_{part}.weight"] = tensor
        renamed[f"{COMFYUI}{layer}.alpha"] = torch.tensor(float(alpha))  # the loader divides it by the rank itself
    return renamed
