"""The auxiliary networks of real models: released names are understood, files of any layout load, pictures fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_core.codecs.clip import clip_from_tensors, load_clip, transformers_tensors
from selfforcing_core.codecs.image import first_frame_condition, fit_image, read_image
from selfforcing_core.codecs.wan_vae import StreamingWanDecoder, WanVAE, load_wan_vae, new_network, original_name
from tests.core.test_keymap import RECORDED, recorded_shapes
from tests.support.golden_media import clip_shapes

BLOCKS = 1


def vae_weights(seed: int = 0) -> dict[str, Tensor]:
    """A small Wan VAE under diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: value.shape for key, value in new_network(8, BLOCKS).state_dict().items()}
    return {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


# ---------------------------------------------------------------------- VAE --
def test_names_of_the_released_vae_are_those_of_diffusers_mapped() -> None:
    network = new_network(RECORDED["wan2.1_vae"]["config"]["dim"], RECORDED["wan2.1_vae"]["config"]["num_res_blocks"])
    shapes = {original_name(key, 2): tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes == recorded_shapes("wan2.1_vae")


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


def test_a_picture_file_is_read_upright_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), torch.ones(3, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (3, 4, 2)
    (tmp_path / "c.png").write_bytes(b"no picture")
    for name in ("c.png", "missing.png"):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            read_image(tmp_path / name)


RED, BLUE = (200, 40, 40), (40, 40, 200)


def two_colours() -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:] = RED, BLUE
    return Image.fromarray(pixels)


def of_mode(mode: str) -> Image.Image:
    """The two colours, or for numbers beyond 8 bits a ramp over the whole range, in this mode of PIL."""
    colours = two_colours()
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(colours, *profiles, outputMode="LAB")
        assert converted is not None
        return converted
    ramp = np.linspace(0, 65535, 48).round().reshape(6, 8)
    if mode == "F":
        return Image.fromarray((ramp / 65535).astype(np.float32))
    if mode == "I":
        return Image.fromarray(ramp.astype(np.int32))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (8, 6), ramp.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    return colours.quantize(4).convert(mode) if mode.startswith("P") else colours.convert(mode)


EXACT = ("BMP", "DIB", "GIF", "ICO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")  # lossless
WRITTEN = {
    "1": 9,
    "L": 10,
    "LA": 6,
    "P": 8,
    "PA": 1,
    "RGB": 10,
    "RGBA": 9,
    "RGBX": 1,
    "CMYK": 1,
    "YCbCr": 1,
    "LAB": 1,
    "I": 2,
    "F": 2,
    "I;16": 4,
    "I;16L": 1,
    "I;16B": 3,
}
IS_NEW_PIL = int(PIL.__version__.split(".")[0]) >= 13  # earlier ones write fewer modes


@pytest.mark.parametrize("mode", sorted(WRITTEN))
def test_every_mode_that_pil_writes_is_read_as_what_it_shows(tmp_path: Path, mode: str) -> None:
    """In every lossless format that takes the mode; the numbers say in how many at least of today's PIL."""
    Image.init()
    image, count = of_mode(mode), 0
    for name in EXACT:
        if name in ("WEBP", "GIF") and mode.startswith(("I", "F", "PA")):
            continue  # PIL itself clips them while it writes
        try:
            image.save(tmp_path / f"a.{name}", format=name, **({"lossless": True} if name == "WEBP" else {}))
        except (OSError, ValueError, KeyError):
            continue
        try:
            with Image.open(tmp_path / f"a.{name}") as written:
                written.load()
        except (UnidentifiedImageError, OSError):
            assert name == "ICO" or not IS_NEW_PIL, "older versions of PIL write files that they do not read"
            continue
        read, count = read_image(tmp_path / f"a.{name}"), count + 1
        assert read.shape == (3, 6, 8), name
        if mode == "F" or mode.startswith("I"):
            expected = torch.linspace(0, 1, 48).view(1, 6, 8).expand(3, -1, -1)
            assert (read - expected).abs().max() < 2e-5, name
            continue
        sides = [tuple((read[:, 3, x] * 255).round().int().tolist()) for x in (1, 6)]
        grey = [tuple([two_colours().convert("L").getpixel((x, 3))] * 3) for x in (1, 6)]
        wanted = {"1": None, "L": grey, "LA": grey}.get(mode, [RED, BLUE])
        if wanted is None:
            assert set(read.flatten().tolist()) <= {0, 1}, name
            wanted = sides
        assert all(abs(a - b) <= 2 for got, want in zip(sides, wanted) for a, b in zip(got, want)), (name, sides)
    assert not IS_NEW_PIL or count >= WRITTEN[mode]


@pytest.mark.parametrize(
    ("dtype", "low", "high", "words"),
    [
        ("int32", 0, 65536, "numbers from 0 to 65536, where images of this kind have 0 to 65535"),
        ("int32", -1, 9, "numbers from -1 to 9"),
        ("float32", 0, 255, "numbers from 0 to 255, where images of this kind have 0 to 1"),
        ("float32", -0.5, 1, "numbers from -0.5 to 1"),
        ("float32", 0, float("nan"), "numbers from nan to nan"),
        ("float32", 0, float("inf"), "numbers from 0 to inf"),
    ],
)
def test_numbers_of_unknown_meaning_are_refused_with_their_range(
    tmp_path: Path, dtype: str, low: float, high: float, words: str
) -> None:
    Image.fromarray(np.array([[low, high], [low, high]], dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=words):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_every_orientation_is_turned_upright(tmp_path: Path, orientation: int, mode: str) -> None:
    """Where the corner of the stored picture goes, by the EXIF standard."""
    pixels = np.zeros((4, 6), np.uint16)
    pixels[0, 0] = 65535
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (
        Image.fromarray(pixels) if mode == "I;16" else Image.fromarray((pixels >> 8).astype(np.uint8)).convert(mode)
    )
    stored.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png")
    assert read.shape == ((3, 4, 6) if orientation < 5 else (3, 6, 4))
    bottom, right = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    assert read[:, -bottom, -right].tolist() == [1, 1, 1]
    assert read.sum() == 3


def test_transparency_of_every_kind_is_over_white(tmp_path: Path) -> None:
    colours = two_colours()
    palette = colours.quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((6, 3)))
    colours.save(tmp_path / "key.png", transparency=BLUE)
    whole = colours.copy()
    whole.putalpha(Image.fromarray(np.repeat([[255] * 4 + [0] * 4], 6, 0).astype(np.uint8)))
    whole.save(tmp_path / "alpha.png")
    whole.convert("LA").save(tmp_path / "grey.png")
    Image.fromarray(np.repeat([[9] * 4 + [40000] * 4], 6, 0).astype(np.uint16)).save(
        tmp_path / "deep.png", transparency=40000
    )
    for name in ("palette", "key", "alpha", "grey", "deep"):
        read = read_image(tmp_path / f"{name}.png")
        assert read[:, 3, 6].tolist() == [1, 1, 1], name
        assert read[:, 3, 1].max() < 0.9, name


def test_what_of_a_picture_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    colours = two_colours()
    more = [colours.rotate(180)]
    for ending in ("gif", "webp", "png", "tiff"):
        colours.save(
            tmp_path / f"a.{ending}",
            save_all=True,
            append_images=more,
            **({"lossless": True} if ending == "webp" else {}),
        )
        caplog.clear()
        assert (read_image(tmp_path / f"a.{ending}")[0, 3, 1] * 255).round() == pytest.approx(200, abs=12)
        assert "holds 2 images; the first is read" in caplog.text
    caplog.clear()
    colours.save(tmp_path / "b.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    read_image(tmp_path / "b.png")
    assert caplog.text == ""
    colours.save(tmp_path / "c.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes())
    read_image(tmp_path / "c.png")
    assert "is not applied" in caplog.text


def test_a_damaged_or_immense_picture_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_colours().resize((64, 64)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for size in (0, 7, 30, len(data) // 2, len(data) - 30):
        (tmp_path / "b.png").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"b\.png: cannot be read as an image") as caught:
            read_image(tmp_path / "b.png")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        read_image(tmp_path / "a.png")


def test_condition_marks_the_first_latent_frame_only(vae_files: list[Path]) -> None:
    vae: WanVAE = load_wan_vae(vae_files[0])
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = first_frame_condition(vae, image, 3)
    assert condition.shape == (1, 3, 20, 2, 2)
    assert condition[:, 0, :4].min() == 1
    assert condition[:, 1:, :4].max() == 0
    torch.testing.assert_close(condition[:, :1, 4:], vae.encode(image[:, None]))
