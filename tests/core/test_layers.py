"""What the network is made of: shorter ways to the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_core import layers
from selfforcing_core.config import CausalConfig
from selfforcing_core.model import CausalWan
from selfforcing_core.rope import apply_rotary, rotary_table
from tests.core.test_rollout import video
from tests.support.tiny_wan import CONFIG, FRAME, random_text, random_wan

KINDS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (layers.Linear, {"in_features": 6, "out_features": 4}),
    (layers.LayerNorm, {"normalized_shape": 6}),
    (layers.RMSNorm, {"normalized_shape": 6}),
]


def of_torchs_own_layers() -> CausalWan:
    model = CausalWan(CONFIG, operations=nn, dtype=torch.float64).requires_grad_(False)
    model.load_state_dict(random_wan().state_dict())
    return model


def test_the_network_computes_what_it_computes_of_torchs_own_layers() -> None:
    ours, torchs = random_wan(), of_torchs_own_layers()
    assert type(ours.blocks[0].get_submodule("self_attn.q")) is layers.Linear
    assert type(torchs.blocks[0].get_submodule("self_attn.q")) is nn.Linear
    causal = CausalConfig(2, window=4)
    assert torch.equal(video(ours, 8, causal), video(torchs, 8, causal))


def test_gradients_are_those_of_torchs_own_layers() -> None:
    noisy, timesteps, text = torch.randn(1, 3, *FRAME).double(), torch.full((1, 3), 700.0), random_text()
    gradients = []
    for model in (random_wan(), of_torchs_own_layers()):
        model.requires_grad_(True)(noisy, timesteps, text.prompt_embeds_BPE).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_hooks_on_a_layer_are_called(kind: type[nn.Module], sizes: dict[str, Any]) -> None:
    layer, log = kind(**sizes), []
    x = torch.randn(2, 6, requires_grad=True)
    plain = layer(x)
    handles = [
        layer.register_forward_pre_hook(lambda *_: log.append("before")),
        layer.register_forward_hook(lambda *_: log.append("after")),
        layer.register_full_backward_pre_hook(lambda *_: log.append("before backward")),
        layer.register_full_backward_hook(lambda *_: log.append("backward")),
    ]
    layer(x).sum().backward()
    assert log == ["before", "after", "before backward", "backward"]
    for handle in handles:
        handle.remove()
        layer(x).sum().backward()
    assert [log.count(name) for name in ("before", "after", "before backward", "backward")] == [1, 2, 3, 4]
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_hooks_on_all_modules_are_called(kind: type[nn.Module], sizes: dict[str, Any]) -> None:
    layer, log = kind(**sizes), []
    x = torch.randn(2, 6, requires_grad=True)
    handles = [
        register_module_forward_pre_hook(lambda module, _: log.append(("before", module))),
        register_module_forward_hook(lambda module, *_: log.append(("after", module))),
        register_module_full_backward_pre_hook(lambda module, _: log.append(("before backward", module))),
        register_module_full_backward_hook(lambda module, *_: log.append(("backward", module))),
    ]
    try:
        layer(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert log == [(name, layer) for name in ("before", "after", "before backward", "backward")]
    layer(x).sum().backward()
    assert len(log) == 4


def test_a_flop_counter_sees_every_linear_by_its_name() -> None:
    network = random_wan()
    timesteps, text = torch.full((1, 2), 700.0), random_text()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 2, *FRAME).double(), timesteps, text.prompt_embeds_BPE)
    counted = counter.get_flop_counts()
    linears = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    assert linears
    assert linears <= {name.removeprefix("CausalWan.") for name in counted}


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_a_layer_given_another_forward_uses_it(kind: type[nn.Module], sizes: dict[str, Any]) -> None:
    layer, x = kind(**sizes), torch.randn(2, 6)
    layer.forward = lambda input: input + 1  # type: ignore[method-assign]
    assert torch.equal(layer(x), x + 1)


def test_linear_layers_of_blocks_get_three_axes() -> None:
    """ComfyUI multiplies in 8 bits what has two or three, and widens the weights for everything else."""
    network, axes = random_wan(), set()
    for layer in network.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args: axes.add(args[0].ndim))
    video(network, 6, CausalConfig(2))
    assert axes == {3}


@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_subclasses_and_parametrised_layers_keep_their_own_ways(kind: type[nn.Module], sizes: dict[str, Any]) -> None:
    class Other(kind):  # type: ignore[valid-type, misc]
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    layer, other, x = kind(**sizes), Other(**sizes), torch.randn(2, 6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), -layer(x))
    expected = kind.__mro__[1](**sizes)  # torch's own
    expected.load_state_dict({**layer.state_dict(), "weight": 2 * layer.weight})
    parametrize.register_parametrization(layer, "weight", _Doubled())
    assert torch.equal(layer(x), expected(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_embedding_is_the_same_with_gradient_and_without(dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 3, 16).to(dtype)
    table = rotary_table(16, 5, 2, 2, 3)
    with_gradient = apply_rotary(x.clone().requires_grad_(), table)
    assert with_gradient.requires_grad
    with torch.no_grad():
        turned = apply_rotary(x, table)
    assert turned.dtype == dtype
    assert torch.equal(turned, with_gradient)


def test_scaled_positions_are_those_of_a_finer_grid() -> None:
    """Every second position of a table is the table at twice the scale; a shift begins it elsewhere."""
    fine = rotary_table(16, 6, 4, 2, 6).view(4, 2, 6, -1)
    actual = rotary_table(16, 2, 2, 2, 2, axes=((2.0, 2.0), (1.0, 0.0), (3.0, 1.0))).view(2, 2, 2, -1)
    assert torch.equal(actual, fine[::2, :, [1, 4]])
    assert torch.equal(rotary_table(16, 6, 4, 2, 6).view(4, 2, 6, -1), fine)
