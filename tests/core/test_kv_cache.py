"""The ring of keys and values keeps what a naive list would keep, and never more than it said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfforcing_core.attention import attend, attend_segments, attention_kernel
from selfforcing_core.kv_cache import KVCache, dequantise, quantise
from tests.support.tiny_wan import CONFIG, TOKENS, ordered

EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


class NaiveCache:
    """Concatenates every chunk and drops the oldest frames behind the sink: the specification."""

    def __init__(self, capacity: int, sink: int) -> None:
        self.capacity, self.sink, self.frames, self.numbers = capacity, sink, [], []

    def append(self, frames: list[Tensor]) -> None:
        for frame in frames:
            self.numbers.append(self.numbers[-1] + 1 if self.numbers else 0)
            self.frames.append(frame)
        while len(self.frames) > self.capacity:
            del self.frames[self.sink], self.numbers[self.sink]


def make_cache(capacity: int, sink: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, batch=batch, tokens_per_frame=TOKENS, capacity=capacity, sink=sink, dtype=dtype)


def chunk(seed: int, frames: int, batch: int = 1) -> Tensor:
    shape = (batch, frames * TOKENS, CONFIG.num_heads, CONFIG.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def rings(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    sink, ring = draw(st.integers(0, 4)), draw(st.integers(1, 7))
    return sink + ring, sink, draw(st.lists(st.integers(1, ring), min_size=1, max_size=9))


@given(rings(), st.integers(1, 2))
def test_ring_equals_a_list_that_concatenates_and_drops(ring: tuple[int, int, list[int]], batch: int) -> None:
    capacity, sink, lengths = ring
    cache, naive, start = make_cache(capacity, sink, batch), NaiveCache(capacity, sink), 0
    with torch.no_grad():
        for index, length in enumerate(lengths):
            cache.stage(start, length)
            cache.update(0, chunk(1000 + index, length, batch), chunk(2000 + index, length, batch))  # overwritten below
            cache.stage(start, length)
            k, v = chunk(index, length, batch), chunk(500 + index, length, batch)
            visible_k, _ = cache.update(0, k, v)
            naive.append(list(zip(k.split(TOKENS, 1), v.split(TOKENS, 1))))
            ordered_k, ordered_v = ordered(cache, 0)
            assert cache.frames() == tuple(naive.numbers)
            assert torch.equal(ordered_k, torch.cat([pair[0] for pair in naive.frames], 1))
            assert torch.equal(ordered_v, torch.cat([pair[1] for pair in naive.frames], 1))
            assert visible_k.shape[1] == len(naive.frames) * TOKENS
            start += length


@given(rings())
def test_gradient_path_shows_the_same_frames_and_keeps_gradient_in_the_chunk(ring: tuple[int, int, list[int]]) -> None:
    capacity, sink, lengths = ring
    cache, start = make_cache(capacity, sink), 0
    for index, length in enumerate(lengths):
        cache.stage(start, length, writes=False)
        k = chunk(index, length).requires_grad_()
        joined, _ = cache.update(0, k, chunk(500 + index, length))
        joined.sum().backward()
        assert torch.equal(k.grad, torch.ones_like(k))
        cache.stage(start, length)
        written, _ = cache.update(0, k.detach(), chunk(500 + index, length))
        torch.testing.assert_close(joined.sum(1), written.sum(1))
        assert joined.shape == written.shape
        start += length


def test_nothing_is_allocated_or_moved_after_construction() -> None:
    cache = make_cache(6, 1)
    addresses = cache.k.data_ptr(), cache.v.data_ptr()
    with torch.no_grad():
        for start in range(0, 60, 2):
            cache.stage(start, 2)
            visible, _ = cache.update(1, chunk(start, 2), chunk(start, 2))
            assert visible.data_ptr() == cache.k[1].data_ptr()
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *EIGHT_BITS])
def test_bytes_are_known_beforehand(dtype: torch.dtype) -> None:
    cache = make_cache(7, 2, 2, dtype)
    report = KVCache.num_bytes(CONFIG, batch=2, tokens_per_frame=TOKENS, capacity=7, dtype=dtype)
    assert report == sum(value.nbytes for value in vars(cache).values() if isinstance(value, Tensor))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 0.5 / 8)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_eight_bits_are_off_by_at_most_half_a_step(dtype: torch.dtype, limit: float, kind: torch.dtype) -> None:
    """int8: of the largest number of the token and head; float8: of the number itself, down to its smallest ones."""
    x = (chunk(0, 3, 2) * torch.logspace(-6, 6, 3 * TOKENS)[:, None, None]).to(kind)
    largest = x.float().abs().amax(-1, keepdim=True)
    error = (dequantise(*quantise(x, dtype), torch.empty(0)) - x.float()).abs()
    step = largest if dtype == torch.int8 else x.float().abs().maximum(largest * 2**-6 / 448)
    assert (error <= 1.01 * limit * step).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_eight_bits_keep_zeros_and_huge_numbers_and_show_what_is_not_a_number(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1e30, -1e30], [1.0, float("nan")]])[None, :, None]
    actual = dequantise(*quantise(x, dtype), x)[0, :, 0]
    assert torch.equal(actual[0], torch.zeros(2))
    torch.testing.assert_close(actual[1], x[0, 1, 0], rtol=1e-2, atol=0)
    assert actual[2].isnan().all()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@given(rings())
def test_an_eight_bit_ring_holds_what_was_written(dtype: torch.dtype, ring: tuple[int, int, list[int]]) -> None:
    capacity, sink, lengths = ring
    cache, naive, start = make_cache(capacity, sink, dtype=dtype), NaiveCache(capacity, sink), 0
    with torch.no_grad():
        for index, length in enumerate(lengths):
            k = chunk(index, length)
            cache.stage(start, length)
            cache.write(0, k, -k)
            naive.append(list(dequantise(*quantise(k, dtype), k).split(TOKENS, 1)))
            found_k, found_v = ordered(cache, 0)
            assert torch.equal(found_k, torch.cat(naive.frames, 1))
            assert torch.equal(found_v, -torch.cat(naive.frames, 1))
            start += length


@pytest.mark.parametrize("kernel", ["auto", "math"])
@given(rings(), st.integers(1, 20))
def test_attention_by_segments_is_attention(kernel: str, ring: tuple[int, int, list[int]], num_tokens: int) -> None:
    """Wherever the ring stands, also with scores so large that only their differences can be exponentiated."""
    capacity, sink, lengths = ring
    cache, start = make_cache(capacity, sink, 2, torch.float64), 0
    with torch.no_grad(), attention_kernel(kernel):
        for index, length in enumerate(lengths):
            q, k, v = (chunk(seed + index, length, 2).double() for seed in (1000, 2000, 3000))
            cache.stage(start, length)
            expected = attend(q * 40, *cache.update(0, k, v))
            segments = cache.past(0).segments(k, v, num_tokens=num_tokens)
            torch.testing.assert_close(attend_segments(q * 40, segments), expected, rtol=1e-12, atol=1e-12)
            start += length


@pytest.mark.parametrize("dtype", [*EIGHT_BITS, torch.bfloat16])
@given(rings())
def test_a_chunk_sees_the_same_by_segments_whole_and_with_gradient(
    dtype: torch.dtype, ring: tuple[int, int, list[int]]
) -> None:
    capacity, sink, lengths = ring
    cache, start = make_cache(capacity, sink, dtype=dtype), 0
    for index, length in enumerate(lengths):
        q, k, v = chunk(1000 + index, length), chunk(index, length).requires_grad_(), chunk(500 + index, length)
        cache.stage(start, length, writes=False)
        joined_k, joined_v = cache.update(0, k, v)
        joined_k.sum().backward()
        assert torch.equal(k.grad, torch.ones_like(k))
        assert torch.equal(joined_k[:, -k.shape[1] :], k), "its own keys are not rounded"
        cache.stage(start, length)
        with torch.no_grad():
            whole_k, whole_v = cache.update(0, k.detach(), v)
            assert torch.equal(whole_k, joined_k)
            assert torch.equal(whole_v, joined_v)
            by_segments = attend_segments(q, cache.past(0).segments(k, v))
            torch.testing.assert_close(by_segments, attend(q, whole_k, whole_v))
        start += length


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, *EIGHT_BITS])
@pytest.mark.parametrize("own", [torch.float32, *EIGHT_BITS])
def test_a_state_goes_into_a_cache_of_another_type(saved: torch.dtype, own: torch.dtype) -> None:
    cache, other = make_cache(5, 1, dtype=saved), make_cache(5, 1, dtype=own)
    with torch.no_grad():
        for start in (0, 2, 4, 6):  # past an eviction
            cache.stage(start, 2)
            for layer in range(CONFIG.num_layers):
                cache.write(layer, chunk(start, 2), chunk(start + 1, 2))
        other.restore(cache.snapshot())
    assert other.frames() == cache.frames()
    for actual, expected in zip(ordered(other, 1), ordered(cache, 1)):
        if saved == own:
            assert torch.equal(actual, expected)
        else:
            assert (actual.float() - expected.float()).norm() < 0.04 * expected.float().norm()


def test_a_float8_state_from_before_there_were_scales_is_read() -> None:
    cache, state = make_cache(4, 0, dtype=torch.float8_e4m3fn), make_cache(4, 0)
    with torch.no_grad():
        state.stage(0, 2)
        for layer in range(CONFIG.num_layers):
            state.write(layer, chunk(0, 2), chunk(1, 2))
        copy = state.snapshot()
        old = replace(copy, k=copy.k.to(torch.float8_e4m3fn), v=copy.v.to(torch.float8_e4m3fn))
        cache.restore(old)
    for actual, expected in zip(ordered(cache, 0), (old.k[0].float(), old.v[0].float())):
        assert (actual - expected).norm() < 0.04 * expected.norm()


def test_reset_forgets_frames_and_text() -> None:
    cache = make_cache(4, 1)
    with torch.no_grad():
        cache.stage(0, 3)
        cache.update(0, chunk(0, 3), chunk(1, 3))
        cache.cross_kv(0, lambda: "text")
    cache.reset()
    assert cache.frames() == ()
    assert cache.cross == {}


def test_a_pass_that_only_reads_leaves_nothing_behind() -> None:
    """Neither keys and values of the frames nor those of the prompt, with gradient enabled or not."""
    cache = make_cache(4, 0)
    cache.stage(0, 2)
    cache.update(0, chunk(0, 2), chunk(1, 2))
    before = cache.k.clone(), cache.v.clone()
    cache.stage(0, 2, writes=False)
    with torch.no_grad():
        read, _ = cache.update(0, chunk(2, 2), chunk(3, 2))
        assert cache.cross_kv(0, lambda: "text") == "text"
    assert torch.equal(read, chunk(2, 2))
    assert all(torch.equal(new[0], old[0]) for new, old in zip((cache.k, cache.v), before))
    assert cache.cross == {}


def test_a_pass_that_writes_carries_no_gradient() -> None:
    """It would end where the next chunk overwrites it, in silence."""
    cache = make_cache(4, 0)
    cache.stage(0, 2)
    with pytest.raises(AssertionError, match="carries no gradient"):
        cache.update(0, chunk(0, 2).requires_grad_(), chunk(1, 2))


def test_skipping_frames_is_an_error() -> None:
    cache = make_cache(6, 0)
    cache.stage(0, 3)
    with pytest.raises(AssertionError, match="does not follow"):
        cache.stage(4, 2)
