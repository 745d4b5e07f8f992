"""Narrow types and other attention kernels: what they may change, and what not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils._pytree import tree_leaves

from selfforcing_core import model as model_module
from selfforcing_core.attention import attend, attention_kernel
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import BackpropSpec, rollout
from selfforcing_core.snapshot import HEADER_KEY, Snapshot
from selfforcing_core.weights.float8 import FLOAT8, store_in_float8
from tests.support.operators import EveryOperator
from tests.support.tiny_wan import CONFIG, FRAME, random_text, random_wan


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
    result = store_in_float8(model).get_submodule("blocks.0")(torch.ones(2, 4))
    assert torch.equal(result, linear.bias.expand(2, 3))


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
    log: list[torch.Tensor] = []

    class Watched(CausalWan):
        def forward(
            self, noisy: torch.Tensor, timesteps: torch.Tensor, *args: object, **kwargs: object
        ) -> torch.Tensor:  # type: ignore[override]
            log.append(timesteps)
            return super().forward(noisy, timesteps, *args, **kwargs)  # type: ignore[arg-type]

    exact = random_wan(dtype=torch.float32)
    narrow = Watched(CONFIG, dtype=dtype).requires_grad_(False)
    narrow.load_state_dict(exact.state_dict())
    videos = []
    for model, kind in ((exact, torch.float32), (narrow, dtype)):
        chunks = rollout(
            Guided(model, random_text(dtype=kind)),
            noise=SeededNoise(0),
            latent_shape=(4, *FRAME),
            causal=CausalConfig(2),
            steps=StepConfig((1000.0, 750.0)),
        )
        videos.append(torch.cat([chunk.latents_BTCHW for chunk in chunks], 1))
    assert all(timesteps.dtype == torch.float32 for timesteps in log)
    assert 937.5 in {float(timesteps[0, 0]) for timesteps in log}
    assert (videos[1] - videos[0]).norm() / videos[0].norm() < limit


NARROW_CACHES = [(torch.bfloat16, 0.005), (torch.int8, 0.005), (torch.float8_e4m3fn, 0.03)]
WINDOWS = [CausalConfig(2), CausalConfig(1, window=3), CausalConfig(2, window=5, sink=1)]


def latents(model: CausalWan, causal: CausalConfig, frames: int = 8, **options: Any) -> list[torch.Tensor]:
    chunks = rollout(
        Guided(model, random_text(dtype=torch.float32)),
        noise=SeededNoise(0),
        latent_shape=(frames, *FRAME),
        causal=causal,
        steps=StepConfig((1000.0, 500.0)),
        **options,
    )
    return [chunk.latents_BTCHW for chunk in chunks]


@pytest.mark.parametrize("causal", WINDOWS)
@pytest.mark.parametrize(("dtype", "limit"), NARROW_CACHES)
def test_a_narrow_cache_changes_later_chunks_a_little_and_the_first_not_at_all(
    dtype: torch.dtype, limit: float, causal: CausalConfig
) -> None:
    model = random_wan(dtype=torch.float32)
    exact = latents(model, causal)
    model.cache_dtype = dtype
    narrow = latents(model, causal)
    assert torch.equal(narrow[0], exact[0])
    error = (torch.cat(narrow, 1) - torch.cat(exact, 1)).norm() / torch.cat(exact, 1).norm()
    assert 1e-6 < error < limit


@pytest.mark.parametrize("causal", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_resuming_with_an_eight_bit_cache_is_bit_exact(
    dtype: torch.dtype, causal: CausalConfig, tmp_path: Path
) -> None:
    model = random_wan(dtype=torch.float32)
    model.cache_dtype = dtype
    whole = latents(model, causal)
    chunks = rollout(
        Guided(model, random_text(dtype=torch.float32)),
        noise=SeededNoise(0),
        latent_shape=(8, *FRAME),
        causal=causal,
        steps=StepConfig((1000.0, 500.0)),
    )
    for index, chunk in enumerate(chunks):
        if index == len(whole) - 1:
            break
        snapshot, path = chunk.snapshot(), tmp_path / f"{index}.safetensors"
        snapshot.save(path)
        with safe_open(path, "pt") as file:
            assert '"format": 2' in file.metadata()[HEADER_KEY], "a reader that knows no scales must refuse it"
        for state in (snapshot, Snapshot.load(path), snapshot.to("cpu")):
            for actual, expected in zip(latents(model, causal, start=state), whole[index + 1 :], strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_an_eight_bit_cache_shows_the_same_with_gradients(is_recomputed: bool) -> None:
    model, causal = random_wan(dtype=torch.float32).requires_grad_(True), CausalConfig(2)
    model.cache_dtype = torch.int8
    if is_recomputed:
        model.checkpoint_blocks()
    result = torch.cat(latents(model, causal, backprop=BackpropSpec([1, 1, 1, 1])), 1)
    result.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.blocks.parameters())
    with torch.no_grad():
        torch.testing.assert_close(result.detach(), torch.cat(latents(model, causal), 1))


def test_compiled_blocks_on_an_eight_bit_cache_are_bit_exact() -> None:
    model = random_wan(dtype=torch.float32)
    model.cache_dtype = torch.int8
    plain = latents(model, CausalConfig(2))
    for actual, expected in zip(latents(model.compile_blocks(backend="eager", fullgraph=True), CausalConfig(2)), plain):
        assert torch.equal(actual, expected)


class _Float64Off(EveryOperator):
    """Notices operators that make float64 or complex128 numbers on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.names = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                self.names += [str(func)] if tensor.device.type == self.device else []
        return out


@pytest.mark.parametrize("solver", ["renoise", "euler", "unipc"])
def test_a_device_without_float64_is_asked_for_none(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    """Seen on the device without memory, which takes every operator."""
    monkeypatch.setattr(model_module, "WITHOUT_FLOAT64", ("meta",))
    model, text = random_wan(dtype=torch.float32).to("meta"), random_text(dtype=torch.float32)
    text = replace(text, prompt_embeds_BPE=text.prompt_embeds_BPE.to("meta"))
    steps = StepConfig((1000.0, 750.0, 500.0, 250.0), sigma="table", solver=solver)
    with torch.no_grad(), _Float64Off("meta") as watch:
        chunks = rollout(
            Guided(model, text, negative=text, guidance=3.0),
            noise=SeededNoise(0),
            latent_shape=(4, *FRAME),
            causal=CausalConfig(2),
            steps=steps,
        )
        assert [chunk.latents_BTCHW.device.type for chunk in chunks] == ["meta", "meta"]
    assert watch.names == []


def test_narrow_sinusoids_are_close_to_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    timesteps = torch.linspace(0, 1000, 50)
    wide = model_module.timestep_embedding(timesteps, 256)
    monkeypatch.setattr(model_module, "WITHOUT_FLOAT64", ("cpu",))
    narrow = model_module.timestep_embedding(timesteps, 256)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(narrow.double(), wide, atol=2e-4, rtol=0)
