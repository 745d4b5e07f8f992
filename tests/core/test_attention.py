"""What attention makes on its way: never a wide copy of a narrow cache, and no choice of a kernel twice."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import kv_cache as bench
from bench.kv_cache import peak_bytes
from selfforcing_core import attention
from selfforcing_core.attention import KERNELS, attend, attend_segments, attention_by, attention_kernel
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.guided import Guided
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from tests.support.host_reads import NoHostReads
from tests.support.operators import EveryOperator
from tests.support.tiny_wan import FRAME, random_text, random_wan

CONFIG = WanConfig(dim=256, ffn_dim=256, num_heads=2, num_layers=1)
PER_FRAME = 64
WIDE = PER_FRAME * CONFIG.dim * 4  # bytes of a frame's keys in float32
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


# ------------------------------------------------------------------- memory --
class LargestNewTensor(EveryOperator):
    """Bytes of the largest tensor that operations made; views of what was there before do not count."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def filled(dtype: torch.dtype, num_frames: int, chunk: int = 1) -> tuple[KVCache, Tensor, Tensor, Tensor]:
    """A full cache, the last chunk of its frames staged, with that chunk's queries, keys and values."""
    cache = KVCache(CONFIG, batch=1, tokens_per_frame=PER_FRAME, capacity=num_frames, dtype=dtype)
    for frame in range(0, num_frames, chunk):
        q, k, v = torch.randn(3, 1, chunk * PER_FRAME, CONFIG.num_heads, CONFIG.head_dim)
        cache.stage(frame, chunk)
        cache.write(0, k, v)
    return cache, q, k, v


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_no_more_than_one_segment_of_a_narrow_cache_is_ever_wide(dtype: torch.dtype, kernel: str) -> None:
    cache, q, k, v = filled(dtype, 40)
    buffers = cache.k, cache.v, cache.k_scale, cache.v_scale, q, k, v
    with torch.no_grad(), attention_kernel(kernel):
        with LargestNewTensor(*buffers) as result:
            cache.write(0, k, v)
            attend_segments(q, cache.past(0).segments(k, v))
        with LargestNewTensor(*buffers) as made_at_once:
            attend(q, *cache.update(0, k, v))
    assert result.largest <= WIDE
    assert made_at_once.largest >= 40 * WIDE


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_a_segment_is_gone_before_the_next_one_is_made(kernel: str) -> None:
    cache, q, k, v = filled(torch.int8, 49)
    with torch.no_grad(), attention_kernel(kernel):
        peak = peak_bytes(lambda: attend_segments(q, cache.past(0).segments(k, v, num_tokens=16 * PER_FRAME)))
    segment = 2 * 16 * WIDE
    assert segment < peak < 1.5 * segment


def test_plain_products_hold_no_more_scores_than_keys_and_values() -> None:
    cache, q, k, v = filled(torch.int8, 24, chunk=8)
    buffers = cache.k, cache.v, cache.k_scale, cache.v_scale, q, k, v
    with torch.no_grad(), attention_kernel("math"), LargestNewTensor(*buffers) as result:
        attend_segments(q, cache.past(0).segments(k, v))
    assert result.largest <= 2 * 8 * WIDE < CONFIG.num_heads * (8 * PER_FRAME) ** 2 * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_a_pass_of_the_network_holds_no_wide_copy_of_a_narrow_cache(dtype: torch.dtype) -> None:
    model, text = random_wan(dtype=torch.float32), random_text(dtype=torch.float32).prompt_embeds_BPE
    model.cache_dtype, num_frames = dtype, 60
    cache = model.new_cache(batch=1, latent_height=FRAME[1], latent_width=FRAME[2], capacity=num_frames, like=text)
    known = [*model.parameters(), cache.k, cache.v, cache.k_scale, cache.v_scale]
    with torch.no_grad():
        for frame in range(num_frames):
            # the last pass sees the most
            with LargestNewTensor(*known) if frame == num_frames - 1 else nullcontext() as result:
                model(torch.randn(1, 1, *FRAME), torch.full((1, 1), 500.0), text, cache=cache, start_frame=frame)
    assert isinstance(result, LargestNewTensor)
    assert result.largest < num_frames * cache.tokens_per_frame * model.config.dim * 4 / 4


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_memory_of_attention_does_not_grow_with_the_cache(dtype: torch.dtype, kernel: str) -> None:
    peaks, at_once = [], []
    for num_frames in (4, 40):
        cache, q, k, v = filled(dtype, num_frames)
        with torch.no_grad(), attention_kernel(kernel):
            cache.write(0, k, v)
            peaks.append(peak_bytes(lambda: attend_segments(q, cache.past(0).segments(k, v))))  # noqa: B023
            at_once.append(peak_bytes(lambda: attend(q, *cache.update(0, k, v))))  # noqa: B023
    assert peaks[0] == peaks[1]
    assert at_once[1] - at_once[0] > 2 * 35 * WIDE


# ------------------------------------------------------------------ kernels --
def tensors(queries: int, keys: int, dtype: torch.dtype, *, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, length, 3, 32, generator=generator, dtype=torch.float64).to(dtype)
        for length in (queries, keys, keys)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (12, 40), (64, 130)])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("name", ["math", "flash", "measured"])
def test_every_kernel_gives_what_the_default_gives(
    name: str, dtype: torch.dtype, queries: int, keys: int, is_masked: bool
) -> None:
    q, k, v = tensors(queries, keys, dtype)
    mask = torch.arange(keys) <= torch.arange(queries)[:, None] if is_masked else None
    with torch.no_grad():
        expected = attend(q, k, v, mask)
        with attention_kernel(name):
            torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=0, atol=DTYPES[dtype])


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


@torch.no_grad()
def test_a_shape_is_measured_once_and_lengths_up_to_a_power_of_two_together(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), attention_kernel("measured"):
        for keys, count in ((5, 1), (8, 1), (6, 1), (9, 2), (16, 2)):
            attend(*tensors(4, keys, torch.float32))
            assert len(messages(caplog)) == count
        attend(*tensors(3, 5, torch.float32))
        attend(*tensors(4, 5, torch.float64))
        attend(*tensors(4, 5, torch.float32), torch.ones(4, 5).bool())
        assert len(messages(caplog)) == 5
    assert "attention of 4 queries to 5 keys, 3 heads of 32, batch 2, float32: " in messages(caplog)[0]
    assert all("flash" in line and "math" in line and "cudnn" not in line for line in messages(caplog))
    with caplog.at_level(logging.INFO), attention_kernel("measured"):
        attend(*tensors(4, 5, torch.float32))
    assert len(messages(caplog)) == 6, "another block measures for itself"
    attend(*tensors(4, 30, torch.float32))
    assert len(messages(caplog)) == 6


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called, in order."""
    called: list[str] = []
    by_kernel = attention._by_kernel

    def noted(name: str, *args: Any) -> Tensor:
        called.append(name)
        return by_kernel(name, *args)

    monkeypatch.setattr(attention, "_by_kernel", noted)
    return called


@torch.no_grad()
@pytest.mark.parametrize("fastest", ["auto", "math", "flash"])
def test_the_fastest_kernel_is_taken(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy(monkeypatch)
    monkeypatch.setattr(attention, "_seconds", lambda name, *_: 1.0 if name == fastest else 2.0)
    with attention_kernel("measured"):
        attend(*tensors(4, 5, torch.float32))
        with attention_kernel("auto"):
            attend(*tensors(4, 5, torch.float32))
        attend(*tensors(4, 6, torch.float32))
    assert called == [fastest, fastest]


@torch.no_grad()
def test_only_kernels_that_serve_a_shape_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy(monkeypatch)
    with attention_kernel("measured"):
        attend(*tensors(4, 5, torch.float32))
    assert set(called[:-1]) == {"auto", *KERNELS}, "all are tried"
    assert called[-1] in ("auto", "math", "flash"), "the CPU has two kernels"


@torch.no_grad()
def test_scores_that_would_fill_the_memory_are_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MATH_LIMIT", 2 * 3 * 4 * 5 * 4 - 1)
    called = spy(monkeypatch)
    with attention_kernel("measured"):
        attend(*tensors(4, 5, torch.float32))
    assert "math" not in called


@torch.no_grad()
def test_a_length_that_its_neighbours_kernel_refuses_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_seconds", lambda name, *_: 1.0 if name == "math" else 2.0)
    by_kernel, called = attention._by_kernel, []

    def refusing(name: str, *args: Any) -> Tensor:
        called.append(name)
        if name == "math" and args[1].shape[2] == 7:
            raise RuntimeError("No available kernel. Aborting execution.")
        return by_kernel(name, *args)

    monkeypatch.setattr(attention, "_by_kernel", refusing)
    with attention_kernel("measured"):
        for keys in (5, 7, 7, 6):
            q, k, v = tensors(4, keys, torch.float32)
            plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
            torch.testing.assert_close(attend(q, k, v), plain)
    assert called == ["math", "math", "auto", "auto", "math"]


def test_nothing_is_measured_where_gradient_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy(monkeypatch)
    with attention_kernel("measured"):
        attend(*(x.requires_grad_() for x in tensors(4, 5, torch.float32)))
    assert called == []


def video(model: Any, **options: Any) -> Any:
    return rollout(
        Guided(model, random_text(dtype=torch.float32)),
        noise=SeededNoise(0),
        latent_shape=(12, *FRAME),
        causal=CausalConfig(2, window=5, sink=1),
        steps=StepConfig((1000.0, 500.0)),
        **options,
    )


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_nothing_is_read_back_once_every_shape_was_measured(cache_dtype: torch.dtype | None) -> None:
    model = random_wan(dtype=torch.float32)
    model.cache_dtype = cache_dtype
    with attention_kernel("measured"):
        chunks = video(model)
        first = [next(chunks) for _ in range(3)]
        with NoHostReads():
            rest = list(chunks)
    assert len(first + rest) == 6


def test_compiled_blocks_with_measured_kernels_make_the_same_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to the cache is measured; that to the text lies in the compiled part, which torch decides about."""
    model, called = random_wan(dtype=torch.float32), spy(monkeypatch)
    expected = torch.cat([chunk.latents_BTCHW for chunk in video(model)], 1)
    model.compile_blocks(backend="eager", fullgraph=True)
    with attention_kernel("measured"):
        actual = torch.cat([chunk.latents_BTCHW for chunk in video(model)], 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert "math" in called


# ---------------------------------------------------------------- benchmark --
def test_a_hosts_attention_takes_the_place_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every pass, also where a narrow cache is read segment by segment; and only while the block runs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, more = (torch.randn(1, 5, 2, 8, generator=generator) for _ in range(4))
    plain, joined = attend(q, k, v), attend(q, torch.cat([k, more], 1), torch.cat([v, more], 1))
    log = []

    def other(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, mask_LS: Tensor | None) -> Tensor:
        log.append((k_BSNK.shape[1], mask_LS is not None))
        k, v = k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2)
        return 2 * F.scaled_dot_product_attention(q_BLNK.transpose(1, 2), k, v, mask_LS).transpose(1, 2)

    with attention_by(other):
        assert torch.allclose(attend(q, k, v), 2 * plain)
        assert torch.allclose(attend_segments(q, iter([(k, v), (more, more)])), 2 * joined)
        attend(q, k, v, torch.ones(5, 5, dtype=torch.bool))
    assert log == [(5, False), (10, False), (5, True)]
    assert torch.equal(attend(q, k, v), plain)


def test_the_benchmark_of_the_cache_reports_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = bench.measure_rollouts(captions=1, seeds=1, num_frames=6)
    rows = {row["cache"]: row for row in actual["caches"]}
    assert list(rows) == list(bench.CACHES)
    assert rows["float32"]["error_mean"] == 0 < rows["int8"]["error_mean"] < rows["int8, own chunk too"]["error_mean"]
    assert rows["int8"]["cache_bytes"] * 256 == rows["float32"]["cache_bytes"] // 2 * (128 + 2)
    cases = bench.measure_layer(repeats=1, layer=(1, 4, 4, 4))["cases"]
    assert len(cases) == 12
    assert all(case["error"] < 0.05 for case in cases)
