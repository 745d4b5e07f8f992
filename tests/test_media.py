"""The auxiliary networks of real models: released names are understood, files of any layout load, pictures fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_core.clip import clip_from_tensors, load_clip, transformers_tensors
from selfforcing_core.image import first_frame_condition, fit_image, read_image, size_for_image
from selfforcing_core.wan_vae import StreamingWanDecoder, WanVAE, load_wan_vae, new_network, original_name
from tests.golden_media import clip_shapes
from tests.test_keymap import RECORDED, recorded_shapes

BLOCKS = 1


def vae_weights(seed: int = 0) -> dict[str, Tensor]:
    """A small Wan VAE under diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: value.shape for key, value in new_network(8, BLOCKS).state_dict().items()}
    return {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


# ---------------------------------------------------------------------- VAE --
def test_names_of_the_released_vae_are_those_of_diffusers_mapped() -> None:
    network = new_network(RECORDED["wan2.1_vae"]["config"]["dim"], RECORDED["wan2.1_vae"]["config"]["num_res_blocks"])
    found = {original_name(key, 2): tuple(value.shape) for key, value in network.state_dict().items()}
    assert found == recorded_shapes("wan2.1_vae")


@pytest.fixture(scope="module")
def vae_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same VAE as a torch file with original names, as such a safetensors file, and as diffusers' folder."""
    folder, weights = tmp_path_factory.mktemp("vae"), vae_weights()
    original = {original_name(key, BLOCKS): value for key, value in weights.items()}
    torch.save(original, folder / "Wan2.1_VAE.pth")
    save_file(original, folder / "wan_2.1_vae.safetensors")
    (folder / "pipeline" / "vae").mkdir(parents=True)
    save_file(weights, folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    return [folder / "Wan2.1_VAE.pth", folder / "wan_2.1_vae.safetensors", folder / "pipeline"]


def test_every_layout_of_a_vae_loads_as_the_same_network(vae_files: list[Path]) -> None:
    latents = torch.randn(1, 2, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    first, *others = [load_wan_vae(path).decode(latents) for path in vae_files]
    assert first.shape == (1, 5, 3, 16, 16)
    assert 0 <= first.min() < first.max() <= 1
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("prefix", ["model.", "first_stage_model.", "vae.", "module.vae."])
def test_a_vae_below_any_prefix_or_in_a_container_is_read(vae_files: list[Path], tmp_path: Path, prefix: str) -> None:
    weights = {original_name(key, BLOCKS): value for key, value in vae_weights().items()}
    latents = torch.randn(1, 2, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.save({"state_dict": {prefix + key: value for key, value in weights.items()}}, tmp_path / "vae.ckpt")
    wanted = load_wan_vae(vae_files[0]).decode(latents)
    assert torch.equal(load_wan_vae(tmp_path / "vae.ckpt").decode(latents), wanted)


def test_a_file_with_two_vaes_is_refused(tmp_path: Path) -> None:
    weights = {original_name(key, BLOCKS): value for key, value in vae_weights().items()}
    both = {f"{name}.{key}": value.clone() for name in ("vae", "old") for key, value in weights.items()}
    save_file(both, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"below 'old\.' and 'vae\.'"):
        load_wan_vae(tmp_path / "m.safetensors")


def test_a_vae_says_what_it_cannot_encode_and_what_it_is_not(vae_files: list[Path], tmp_path: Path) -> None:
    vae = load_wan_vae(vae_files[0])
    with pytest.raises(ValueError, match="4n\\+1; use 5 or 9"):
        vae.encode(torch.zeros(1, 6, 3, 16, 16))
    with pytest.raises(ValueError, match="20x16 pixels are not multiples of 8"):
        vae.encode(torch.zeros(1, 5, 3, 16, 20))
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is no Wan VAE"):
        load_wan_vae(tmp_path / "m.safetensors")
    weights = {original_name(key, BLOCKS): value for key, value in vae_weights().items()}
    save_file(dict(list(weights.items())[:-1]), tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="not a complete Wan VAE"):
        load_wan_vae(tmp_path / "cut.safetensors")


def test_a_stream_can_be_started_again(vae_files: list[Path]) -> None:
    stream = StreamingWanDecoder(load_wan_vae(vae_files[0]))
    latents = torch.randn(1, 2, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    first = stream.decode(latents)
    assert stream.decode(latents).shape != first.shape, "without a reset the video goes on"
    stream.reset()
    assert torch.equal(stream.decode(latents), first)


def test_names_that_lack_a_block_are_refused(vae_files: list[Path], tmp_path: Path) -> None:
    kept = {name: value for name, value in vae_weights().items() if "up_blocks" not in name}
    save_file(kept, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="is not a complete Wan VAE"):
        load_wan_vae(tmp_path / "vae.safetensors")


# --------------------------------------------------------------------- CLIP --
def clip_weights() -> dict[str, Tensor]:
    sizes = {"image_size": 28, "patch_size": 14, "dim": 160, "mlp_ratio": 2, "out_dim": 8, "num_layers": 2}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in clip_shapes(sizes).items()}


def test_names_of_the_released_clip_are_understood() -> None:
    recorded = RECORDED["clip_vision_h14"]["config"]
    shapes = clip_shapes(recorded)
    assert shapes == recorded_shapes("clip_vision_h14")
    with torch.device("meta"):
        tensors = transformers_tensors({name: torch.empty(shape) for name, shape in shapes.items()})
        model = clip_from_tensors(tensors)
    assert (model.config.num_attention_heads, model.config.num_hidden_layers) == (16, 32)
    assert (model.config.image_size, model.config.hidden_size) == (224, 1280)


def test_the_whole_clip_file_and_transformers_names_give_the_same_features(tmp_path: Path) -> None:
    weights = clip_weights()
    whole = {f"visual.{name}": value for name, value in weights.items()} | {"textual.a": torch.zeros(1)}
    torch.save(whole, tmp_path / "open-clip.pth")
    named = {f"vision_model.{name}": value for name, value in transformers_tensors(weights).items()}
    save_file({key: value.contiguous() for key, value in named.items()}, tmp_path / "clip_vision_h.safetensors")
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    a, b = (load_clip(tmp_path / name).encode(image) for name in ("open-clip.pth", "clip_vision_h.safetensors"))
    assert a.shape == (1, 5, 160)
    assert torch.equal(a, b)
    assert a.std() > 0.01


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is no CLIP image encoder"):
        load_clip(tmp_path / "m.safetensors")
    weights = clip_weights()
    del weights["transformer.1.mlp.2.bias"]
    save_file(weights, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="not a complete CLIP image encoder"):
        load_clip(tmp_path / "cut.safetensors")


# ----------------------------------------------------------------- pictures --
def test_a_picture_covers_the_frame_without_distortion() -> None:
    image = torch.zeros(3, 40, 80)
    image[:, :, 40:] = 1
    fitted = fit_image(image, 32, 32)
    assert fitted.shape == (3, 32, 32)
    assert fitted[:, :, :14].max() < 0.05
    assert fitted[:, :, 18:].min() > 0.95
    assert torch.equal(fit_image(image, 80, 40), image)


def test_size_follows_the_picture_and_the_area() -> None:
    assert size_for_image(torch.zeros(3, 480, 832), 480 * 832) == (832, 480)
    width, height = size_for_image(torch.zeros(3, 1000, 500), 480 * 832)
    assert (width % 16, height % 16) == (0, 0)
    assert abs(height / width - 2) < 0.1
    assert 0.9 < width * height / (480 * 832) <= 1


def test_a_picture_file_is_read_upright_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), torch.ones(3, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (3, 4, 2)
    (tmp_path / "c.png").write_bytes(b"no picture")
    for name in ("c.png", "missing.png"):
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            read_image(tmp_path / name)


def test_condition_marks_the_first_latent_frame_only(vae_files: list[Path]) -> None:
    vae: WanVAE = load_wan_vae(vae_files[0])
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = first_frame_condition(vae, image, 3)
    assert condition.shape == (1, 3, 20, 2, 2)
    assert condition[:, 0, :4].min() == 1
    assert condition[:, 1:, :4].max() == 0
    torch.testing.assert_close(condition[:, :1, 4:], vae.encode(image[:, None]))
