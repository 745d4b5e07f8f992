"""TAEHV in pieces: streams equal whole clips, at any cut, and start anew after a reset."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder, StreamingEncoder
from selfforcing_core.config import TAEHVConfig


@pytest.fixture(scope="module")
def taehv() -> TAEHV:
    torch.manual_seed(0)
    config = TAEHVConfig(latent_channels=4, encoder_width=8, decoder_widths=(8, 8, 8, 8))
    return TAEHV(config).double().requires_grad_(False)


@settings(deadline=None, max_examples=20)
@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_streamed_encode_equals_the_whole(taehv: TAEHV, pieces: list[int]) -> None:
    frames = torch.rand(2, sum(pieces), 3, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    encoder = StreamingEncoder(taehv)
    for _ in range(2):  # the second time shows that flush left nothing behind
        streamed = [encoder.encode(piece) for piece in frames.split(pieces, 1)]
        assert sum(piece.shape[1] for piece in streamed) == frames.shape[1] // 4
        torch.testing.assert_close(torch.cat([*streamed, encoder.flush()], 1), taehv.encode(frames))


@settings(deadline=None, max_examples=20)
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_streamed_decode_equals_the_whole(taehv: TAEHV, pieces: list[int]) -> None:
    latents = torch.randn(2, sum(pieces), 4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    decoder = StreamingDecoder(taehv)
    for _ in range(2):
        torch.testing.assert_close(
            torch.cat([decoder.decode(piece) for piece in latents.split(pieces, 1)], 1), taehv.decode(latents)
        )
        decoder.reset()
