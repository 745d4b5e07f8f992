"""Tiny autoencoders of equal shapes are told apart by what is known of a file, or asked about; never guessed."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path

import pytest
import torch

from selfforcing_core.codecs.taehv import StreamingDecoder
from selfforcing_core.config import TAEHVConfig
from selfforcing_core.shapes import taehv_shapes
from selfforcing_core.weights import latent_space
from selfforcing_core.weights.checkpoint import read_checkpoint
from selfforcing_core.weights.latent_space import expect_latent_space, git_name, identify_latent_space
from selfforcing_core.weights.load import check_taehv, load_taehv


def write(path: Path, config: TAEHVConfig) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = taehv_shapes(config)
    torch.save({name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}, path)
    return path


def test_the_fingerprint_is_the_name_git_gives_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"hello\n")
    assert git_name(file) == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert subprocess.run(["git", "hash-object", file], capture_output=True, text=True).stdout.strip() == git_name(file)


def test_a_released_file_is_known_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "misleading_taehv.pth", TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8)))
    assert read_checkpoint(path).latent_space is None
    monkeypatch.setitem(latent_space.BY_GIT_NAME, git_name(path), "hunyuanvideo")
    assert read_checkpoint(path).latent_space == "hunyuanvideo"


def test_shapes_decide_where_only_one_release_has_them(tmp_path: Path) -> None:
    wan22 = TAEHVConfig(latent_channels=48, patch_size=2, encoder_width=8, decoder_widths=(8, 8, 8, 8))
    assert read_checkpoint(write(tmp_path / "m.pth", wan22)).latent_space == "wan2.2"
    assert identify_latent_space(TAEHVConfig(latent_channels=5), tmp_path / "m.pth") is None


def test_lighttaew2_1_is_known_by_its_name_and_not_taken_for_scaled_latents(tmp_path: Path) -> None:
    small = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    path = write(tmp_path / "lighttaew2_1.pth", small)
    assert read_checkpoint(path).latent_space == latent_space.WAN_UNSCALED
    for said in (None, "wan2.1"):
        taehv = check_taehv(path, channels=16, latent_space="wan2.1", said=said)
        assert taehv.latent_space == latent_space.WAN_UNSCALED
    with pytest.raises(ValueError, match=r"lighttaew2_1\.pth decodes latents of wan2\.1, but"):
        check_taehv(path, channels=16, latent_space="x")
    wan22 = write(tmp_path / "lighttaew2_1_of_2.2.pth", TAEHVConfig(latent_channels=48, patch_size=2))
    assert read_checkpoint(wan22).latent_space == "wan2.2"
    with pytest.raises(ValueError, match=r"2\.2\.pth decodes latents of wan2\.2, but the model makes those of wan2\.1"):
        check_taehv(wan22, channels=16, latent_space="wan2.1")


def test_unscaled_weights_take_and_give_normalised_latents(tmp_path: Path) -> None:
    """As if the latents were scaled at the crossing, with the numbers of Wan's own VAE; in pieces and whole."""
    small = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    path, plain = write(tmp_path / "lighttaew2_1.pth", small), write(tmp_path / "taew2_1.pth", small)
    unscaled, _ = load_taehv(path, dtype=torch.float32)
    own, _ = load_taehv(plain, dtype=torch.float32)
    published = inspect.signature(pytest.importorskip("diffusers").AutoencoderKLWan.__init__).parameters
    assert list(latent_space.WAN_MEAN) == published["latents_mean"].default
    assert list(latent_space.WAN_DEVIATION) == published["latents_std"].default
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (latent_space.WAN_MEAN, latent_space.WAN_DEVIATION)
    )
    latents = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = unscaled.decode(latents)
    torch.testing.assert_close(frames, own.decode(latents * deviation + mean))
    stream = StreamingDecoder(unscaled)
    torch.testing.assert_close(torch.cat([stream.decode(latents[:, :1]), stream.decode(latents[:, 1:])], 1), frames)
    pixels = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = (own.encode(pixels) - mean) / deviation
    torch.testing.assert_close(unscaled.encode(pixels), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_unknown_latent_space_is_asked_about_and_another_refused() -> None:
    expect_latent_space("wan2.1", TAEHVConfig(), "wan2.1", "m.pth")
    with pytest.raises(ValueError, match=r"does not say .* \(wan2.1 or hunyuanvideo or .* say so"):
        expect_latent_space(None, TAEHVConfig(), "wan2.1", "m.pth")
    with pytest.raises(ValueError, match=r"decodes latents of hunyuanvideo, but the model makes those of wan2\.1"):
        expect_latent_space("hunyuanvideo", TAEHVConfig(), "wan2.1", "m.pth")


def test_every_fingerprint_is_a_sha1_of_a_known_latent_space() -> None:
    for name, space in latent_space.BY_GIT_NAME.items():
        assert len(bytes.fromhex(name)) == 20
        assert space in latent_space.LATENT_SPACES
