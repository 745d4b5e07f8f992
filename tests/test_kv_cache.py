"""The ring of keys and values keeps what a naive list would keep, and never more than it said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfforcing_core.kv_cache import KVCache
from tests.tiny_wan import CONFIG, TOKENS


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


def make_cache(capacity: int, sink: int, batch: int = 1) -> KVCache:
    return KVCache(CONFIG, batch=batch, tokens_per_frame=TOKENS, capacity=capacity, sink=sink, dtype=torch.float32)


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
            ordered_k, ordered_v = cache.ordered(0)
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
        cache.stage(start, length)
        k = chunk(index, length).requires_grad_()
        joined, _ = cache.update(0, k, chunk(500 + index, length))
        joined.sum().backward()
        assert torch.equal(k.grad, torch.ones_like(k))
        with torch.no_grad():
            written, _ = cache.update(0, k, chunk(500 + index, length))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_beforehand(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, batch=2, tokens_per_frame=TOKENS, capacity=7, sink=2, dtype=dtype)
    told = KVCache.num_bytes(CONFIG, batch=2, tokens_per_frame=TOKENS, capacity=7, dtype=dtype)
    assert told == cache.k.nbytes + cache.v.nbytes


def test_reset_forgets_frames_and_text() -> None:
    cache = make_cache(4, 1)
    with torch.no_grad():
        cache.stage(0, 3)
        cache.update(0, chunk(0, 3), chunk(1, 3))
        cache.cross_kv(0, lambda: "text")
    cache.reset()
    assert cache.frames() == ()
    assert cache.cross == {}


def test_skipping_frames_is_an_error() -> None:
    cache = make_cache(6, 0)
    cache.stage(0, 3)
    with pytest.raises(AssertionError, match="does not follow"):
        cache.stage(4, 2)
