"""Narrow types and other attention kernels: what they may change, and what not."""

from __future__ import annotations

import pytest
import torch

from selfforcing_core.attention import attend, attention_kernel
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.float8 import FLOAT8, store_in_float8
from selfforcing_core.model import CausalWan
from selfforcing_core.rollout import SeededNoise, rollout
from tests.tiny_wan import CONFIG, FRAME, random_text, random_wan


def test_float8_storage_stays_close_and_takes_a_byte_a_weight() -> None:
    model, text = random_wan(dtype=torch.float32), random_text(dtype=torch.float32)
    noisy, timesteps = torch.randn(1, 2, *FRAME), torch.full((1, 2), 700.0)
    with torch.no_grad():
        exact = model(noisy, timesteps, text.prompt_embeds_BPE)
        linears = [layer for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
        weights = sum(layer.weight.numel() for layer in linears)
        narrow = store_in_float8(model)(noisy, timesteps, text.prompt_embeds_BPE)
    stored = [buffer for buffer in model.blocks.buffers() if buffer.dtype == FLOAT8]
    assert sum(buffer.nbytes for buffer in stored) == weights
    error = (narrow - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


def test_a_row_of_zeros_survives_float8() -> None:
    linear = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(linear.weight)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Sequential(linear)])
    made = store_in_float8(model).get_submodule("blocks.0")(torch.ones(2, 4))
    assert torch.equal(made, linear.bias.expand(2, 3))


@pytest.mark.parametrize("name", ["math", "flash"])
def test_attention_kernels_agree(name: str) -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 16)
    with attention_kernel(name):
        torch.testing.assert_close(attend(q, k, v), attend(q, k, v), atol=0, rtol=0)
        chosen = attend(q, k, v)
    torch.testing.assert_close(chosen, attend(q, k, v), atol=1e-5, rtol=1e-5)


def test_kernels_that_cannot_run_here_are_refused() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 16)
    with pytest.raises(ValueError, match="use auto"), attention_kernel("cudnn"):
        attend(q, k, v)
    with pytest.raises(ValueError, match="unknown; use auto, math"), attention_kernel("fast"):
        pass


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_follows_float32_with_timesteps_in_float32(dtype: torch.dtype, limit: float) -> None:
    """937.5 and its neighbours do not exist in bfloat16; the network must still be told the exact timestep."""
    seen: list[torch.Tensor] = []

    class Watched(CausalWan):
        def forward(
            self, noisy: torch.Tensor, timesteps: torch.Tensor, *args: object, **kwargs: object
        ) -> torch.Tensor:  # type: ignore[override]
            seen.append(timesteps)
            return super().forward(noisy, timesteps, *args, **kwargs)  # type: ignore[arg-type]

    exact = random_wan(dtype=torch.float32)
    narrow = Watched(CONFIG, dtype=dtype).requires_grad_(False)
    narrow.load_state_dict(exact.state_dict())
    videos = []
    for model, kind in ((exact, torch.float32), (narrow, dtype)):
        chunks = rollout(model, random_text(dtype=kind), noise=SeededNoise(0), latent_shape=(4, *FRAME),
                         causal=CausalConfig(2), steps=StepConfig((1000.0, 750.0)))  # fmt: skip
        videos.append(torch.cat([chunk.latents_BTCHW for chunk in chunks], 1))
    assert all(timesteps.dtype == torch.float32 for timesteps in seen)
    assert 937.5 in {float(timesteps[0, 0]) for timesteps in seen}
    assert (videos[1] - videos[0]).norm() / videos[0].norm() < limit
