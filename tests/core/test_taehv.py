"""TAEHV in pieces and folded: streams equal whole clips, at any cut, and a folded decoder equals its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder, StreamingEncoder
from selfforcing_core.config import TAEHVConfig
from selfforcing_core.weights.bundles import resolve_taehv
from selfforcing_core.weights.checkpoint import read_checkpoint
from selfforcing_core.weights.load import load_taehv


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


# ------------------------------------------------------------------- folded --
GROWTHS = [(False, True, True), (True, False, True)]
ENLARGEMENTS = [(True, True, True), (True, False, True)]


def random_taehv(*, seed: int = 0, **options: Any) -> TAEHV:
    torch.manual_seed(seed)
    config = TAEHVConfig(latent_channels=4, encoder_width=8, decoder_widths=(12, 8, 6, 4), **options)
    return TAEHV(config).requires_grad_(False)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("decoder_time", GROWTHS)
@pytest.mark.parametrize("decoder_space", ENLARGEMENTS)
def test_a_folded_decoder_is_its_layers(
    patch_size: int, decoder_time: tuple[bool, ...], decoder_space: tuple[bool, ...]
) -> None:
    options = {"patch_size": patch_size, "decoder_time": decoder_time, "decoder_space": decoder_space}
    plain, folded = (random_taehv(**options).double() for _ in range(2))
    latents = torch.randn(2, 3, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(folded.fold().decode(latents), plain.decode(latents), rtol=1e-12, atol=1e-12)


def test_folding_rounds_no_further_than_float32_does() -> None:
    plain, folded = random_taehv(), random_taehv().fold()
    latents = torch.randn(1, 3, 4, 4, 6)
    assert (folded.decode(latents) - plain.decode(latents)).abs().max() < 1e-6


def test_a_stream_has_the_bits_of_the_whole() -> None:
    folded = random_taehv().fold()
    latents, frames = torch.randn(2, 5, 4, 4, 6), torch.rand(1, 13, 3, 32, 48)
    decoder, encoder = StreamingDecoder(folded), StreamingEncoder(folded)
    pieces = [decoder.decode(piece) for piece in latents.split([1, 3, 1], 1)]
    assert torch.cat(pieces, 1).equal(folded.decode(latents))
    pieces = [encoder.encode(piece) for piece in frames.split([5, 2, 6], 1)]
    assert torch.cat([*pieces, encoder.flush()], 1).equal(folded.encode(frames))


def test_loading_folds_and_leaves_what_decodes_alone() -> None:
    folded, _ = load_taehv("tiny", dtype=torch.float32)
    plain = TAEHV(folded.config).requires_grad_(False)
    weights = read_checkpoint(resolve_taehv("tiny")).state_dict
    plain.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    assert len(folded.state_dict()) != len(plain.state_dict()), "nothing was folded"
    latents = torch.randn(1, 2, folded.config.latent_channels, 4, 4)
    torch.testing.assert_close(folded.decode(latents), plain.decode(latents), rtol=1e-5, atol=1e-6)
    assert folded.encode(plain.decode(latents)).equal(plain.encode(plain.decode(latents)))


def test_nothing_that_a_stream_keeps_is_written_over() -> None:
    """A snapshot of a stream is its list of tensors: what is computed in place must not reach them."""
    decoder = StreamingDecoder(random_taehv().fold())
    latents = torch.randn(1, 4, 4, 3, 3)
    decoder.decode(latents[:, :2])
    kept, is_first = list(decoder.memory), decoder.is_first
    once = decoder.decode(latents[:, 2:])
    decoder.memory, decoder.is_first = list(kept), is_first
    assert decoder.decode(latents[:, 2:]).equal(once)
