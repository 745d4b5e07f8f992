"""Fakes: every release has one with its names and containers, and a loader reads a network that it stands for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.weights.checkpoint import read_checkpoint
from selfforcing_core.weights.presets import PRESETS
from selfforcing_core.weights.recognise import recognise
from tests.support import fakes

each_fake = pytest.mark.parametrize("name", fakes.NAMES)
make_fake = cache(fakes.make_fake)  # nothing here changes one
# Folders of diffusers have no file that a user gives; HunyuanVideo is recognised as none of these networks.
IN_ONE_FILE = [name for name in fakes.RELEASES if not name.startswith(("causalwan", "sfwan", "hy-"))]
# Where a key that only this release or dialect has is found.
KEYS = {
    "self-forcing-dmd": ("generator_ema.model.blocks.0.self_attn.q.weight", "generator.model.head.modulation"),
    "causal-forcing-framewise": ("generator_ema.model._fsdp_wrapped_module.blocks.1.ffn.2.bias",),
    "reward-forcing": ("model.patch_embedding.weight",),
    "krea": ("patch_embedding.weight", "blocks.1.cross_attn.norm_k.weight"),
    "ddp": ("generator.module.model.time_projection.1.weight",),
    "compiled": ("generator._orig_mod.model.time_projection.1.weight",),
    "deepspeed": ("module.model.head.head.bias",),
    "lightning": ("state_dict.generator.model.head.head.bias",),
    "stray-buffers": ("model.freqs",),
    "comfyui": ("model.diffusion_model.blocks.0.modulation",),
    "fused-qkv": ("blocks.0.self_attn.to_qkv.weight", "blocks.0.cross_attn.to_kv.bias"),
    "fastvideo-names": ("blocks.0.ffn.fc_in.weight", "blocks.0.ffn.fc_out.bias", "blocks.0.attn1.to_out.0.weight"),
    "lightx2v-self-forcing-fp8": ("blocks.0.ffn.0.weight_scale",),
    "comfyui-fp8-scaled": ("blocks.0.ffn.0.scale_weight", "blocks.0.ffn.0.scale_input", "scaled_fp8"),
    "comfyui-comfy-quant": ("blocks.0.ffn.0.weight_scale", "blocks.0.ffn.0.comfy_quant"),
    "matrix-game-2": ("blocks.0.action_model.keyboard_embed.0.weight", "img_emb.proj.1.weight"),
    "lingbot-world-2-1.3b": ("patch_embedding_wancamctrl.weight", "blocks.1.cam_injector_layer2.bias"),
    "longlive-one-file": ("generator_lora.base_model.model.blocks.0.ffn.0.lora_A.weight",),
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that is in a fake's files."""
    fake = make_fake(name)
    contents = [contents for file, contents in fake.files.items() if not file.endswith(".json")]
    return {key: shape for each in contents for key, shape in fakes.key_shapes(each).items()}


def is_equal(weights: dict[str, Tensor], network: dict[str, Tensor]) -> bool:
    """Return whether two networks are the same, to the last bit."""
    return weights.keys() == network.keys() and all(torch.equal(weights[name], network[name]) for name in network)


# ------------------------------------------------------------------- fakes --
def test_every_release_has_a_fake_or_a_reason() -> None:
    assert {*fakes.RELEASES, *fakes.NOT_FAKED} == set(PRESETS)
    assert not fakes.RELEASES.keys() & fakes.NOT_FAKED.keys()
    assert set(fakes.ASSUMED) <= set(fakes.NAMES)
    # Where the hub's name of a file is not known, the fake's is made up, and that is said.
    unnamed = {name for name in fakes.RELEASES if not PRESETS[name].files}
    assert unnamed <= set(fakes.ASSUMED)


@pytest.mark.parametrize("name", ["self-forcing-dmd", "longlive", "lightx2v-wan2.2-i2v", "comfyui-fp8-scaled"])
def test_a_fake_is_the_same_for_the_same_seed_and_another_for_another(name: str) -> None:
    first, again, other = make_fake(name), fakes.make_fake(name), make_fake(name, seed=1)
    assert first.files.keys() == again.files.keys() == other.files.keys()
    assert first.networks.keys() == again.networks.keys()
    for label, network in first.networks.items():
        assert is_equal(network, again.networks[label])
        assert not torch.equal(network["head.head.weight"], other.networks[label]["head.head.weight"])


@each_fake
def test_a_fake_says_what_is_meant_to_be_run(name: str) -> None:
    fake = make_fake(name)
    assert set(fake.run) <= fake.networks.keys()
    assert bool(fake.run) == bool(fake.networks) or name in fakes.FLAWS
    assert len({id(network) for network in fake.networks.values()}) == len(fake.networks)
    weights = PRESETS[name].weights if name in PRESETS else None
    if weights in fake.networks and not PRESETS[name].lora:
        assert fake.run == (weights,), "as the preset says"


@pytest.mark.parametrize("name", KEYS)
def test_a_fake_has_the_names_of_its_release(name: str) -> None:
    assert set(KEYS[name]) <= shapes_of(name).keys()


def test_image_to_video_of_wan_2_2_has_36_channels_and_no_image_embedding() -> None:
    for name in ("lightx2v-wan2.2-i2v", "wan2.2-i2v-alone"):
        shapes = shapes_of(name)
        assert shapes["patch_embedding.weight"][1] == 36
        assert not any(key.startswith("img_emb.") for key in shapes)
    assert shapes_of("wan2.2-5b")["patch_embedding.weight"][1] == 48


def test_real_sizes_are_those_of_the_preset() -> None:
    for name in ("self-forcing-dmd", "krea", "longlive2"):
        fake, sizes = make_fake(name, is_real_size=True), PRESETS[name].sizes
        network = fake.networks["raw"]
        assert sizes is not None
        assert network["blocks.0.ffn.0.weight"].shape == (sizes.ffn_dim, sizes.dim)
        assert f"blocks.{sizes.num_layers - 1}.modulation" in network
        assert f"blocks.{sizes.num_layers}.modulation" not in network


# ------------------------------------------------------------------- truth --
def test_a_merged_lora_is_the_weight_plus_its_product() -> None:
    fake = make_fake("longlive")
    lora = fake.files["models/lora.pt"]["generator_lora"]
    raw, merged = fake.networks["raw"], fake.networks["merged"]
    name = "blocks.1.cross_attn.v"
    down, up = (lora[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    x = torch.randn(3, down.shape[1], generator=torch.Generator().manual_seed(0))
    assert (down.shape[0], up.shape[1]) == (fakes.RANK, fakes.RANK)
    expected = x @ raw[f"{name}.weight"].T + (x @ down.T) @ up.T
    torch.testing.assert_close(x @ merged[f"{name}.weight"].T, expected)
    changed = {each for each in raw if not torch.equal(raw[each], merged[each])}
    assert changed == {each for each in raw if each.startswith("blocks.") and raw[each].ndim == 2}
    assert len(changed) == len(lora) // 2 == 2 * 10, "every Linear of both blocks"


def test_alpha_and_strength_scale_a_lora() -> None:
    weights = {"blocks.0.ffn.0.weight": torch.eye(2), "blocks.0.ffn.0.bias": torch.ones(2)}
    lora = {"blocks.0.ffn.0": (torch.ones(4, 2), torch.ones(2, 4))}
    merged = fakes.merged(weights, lora, rank=4, alpha=2, strength=0.5)
    assert torch.equal(merged["blocks.0.ffn.0.weight"], torch.tensor([[2.0, 1.0], [1.0, 2.0]]))  # 1 + 2/4 * 1/2 * 4
    assert torch.equal(merged["blocks.0.ffn.0.bias"], torch.ones(2))


def test_every_spelling_of_a_lora_means_the_same_pairs() -> None:
    contents = {
        name: make_fake(name).files["lora.safetensors"].tensors
        for name in ("lora-kohya", "lora-diffusers", "lora-comfyui")
    }
    assert contents["lora-kohya"]["lora_unet_blocks_0_ffn_2.alpha"] == fakes.RANK / 2
    assert "transformer.blocks.0.attn1.to_out.0.lora_A.weight" in contents["lora-diffusers"]
    assert "transformer.blocks.0.ffn.net.0.proj.lora_B.weight" in contents["lora-diffusers"]
    assert "diffusion_model.blocks.0.self_attn.o.lora_A.weight" in contents["lora-comfyui"]
    assert {len(tensors) for tensors in contents.values()} == {40, 60}  # kohya's have alpha beside each pair


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "comfy_quant"])
def test_scaled_weights_are_those_they_were_made_of_but_for_rounding(form: str) -> None:
    weights = make_fake("krea").networks["raw"]
    weights = {name: tensor.float() for name, tensor in weights.items()}
    stored, exact = fakes.scaled(weights, form)
    assert exact.keys() == weights.keys()
    narrow = {name for name in stored if stored[name].dtype == torch.float8_e4m3fn and name in weights}
    assert len(narrow) == 20
    for name in narrow:
        torch.testing.assert_close(exact[name], weights[name], rtol=2**-4, atol=1e-3)  # three bits behind the point
    assert all(torch.equal(exact[name], weights[name]) for name in weights.keys() - narrow)


def test_fused_weights_are_the_parts_below_each_other() -> None:
    fake = make_fake("fused-qkv")
    tensors, raw = fake.files["m.safetensors"].tensors, fake.networks["raw"]
    parts = torch.cat([raw[f"blocks.0.self_attn.{part}.weight"] for part in "qkv"])
    assert torch.equal(tensors["blocks.0.self_attn.to_qkv.weight"], parts)
    assert "blocks.0.self_attn.norm_q.weight" in tensors
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in raw.values())


# ------------------------------------------------------------------ loading --
def read(path: Path) -> dict[str, Tensor] | None:
    """Return the weights that are read from a file; None where it is refused, which is checked to be one line."""
    try:
        return dict(read_checkpoint(path).state_dict)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return None


# Dialects and containers that are read, by what they are to be read as where nothing is said.
READ = {
    **dict.fromkeys(("ddp", "compiled", "deepspeed", "lightning", "stray-buffers", "comfyui", "shards"), "raw"),
    **dict.fromkeys(("fused-qkv", "fastvideo-names", "comfyui-fp8-scaled", "comfyui-comfy-quant"), "raw"),
    **dict.fromkeys(("sfwan2.1", "lightx2v-self-forcing-fp8", "krea", "wan2.2-i2v-alone", "wan2.1-i2v"), "raw"),
    **dict.fromkeys(("causalwan2.2-i2v", "causalwan2.2-t2v", "lightx2v-wan2.2-i2v"), "high"),
    "causal-forcing-both": "ema",
    "causal-forcing-framewise": "ema",
}
REFUSED = {
    "vace": "Wan VACE is not supported",
    "wan2.2-5b": "Wan 2.2 5B (text and image to video) is not supported",
    "longlive2": "Wan 2.2 5B",
    "matrix-game-2": "Matrix-Game (keyboard and mouse control) is not supported",
    "lingbot-world-2-1.3b": "LingBot-World (camera control) is not supported",
    "hy-worldplay": "HunyuanVideo is not supported",
    "lightx2v-self-forcing-nvfp4": "NVFP4",
}


@pytest.mark.parametrize("name", READ)
def test_every_dialect_and_container_is_read_as_the_network_it_stands_for(name: str, tmp_path: Path) -> None:
    fake = make_fake(name)
    weights = read(fakes.write_fake(fake, tmp_path))
    assert weights is not None
    assert is_equal(weights, fake.networks[READ[name]])


def test_a_file_with_both_sets_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    fake = make_fake("causal-forcing-both")
    path = fakes.write_fake(fake, tmp_path)
    for weights in ("raw", "ema"):
        assert is_equal(dict(read_checkpoint(path, weights=weights).state_dict), fake.networks[weights])


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_another_kind_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = fakes.write_fake(make_fake(name), tmp_path)
    with pytest.raises(ValueError) as caught:
        read_checkpoint(path)
    assert REFUSED[name] in str(caught.value)


def test_fused_rows_are_views_of_what_is_mapped_and_their_parts_no_second_copy(tmp_path: Path) -> None:
    stored = read_checkpoint(fakes.write_fake(make_fake("fused-qkv"), tmp_path)).state_dict
    q, k, v = (stored[f"blocks.0.self_attn.{part}.weight"] for part in "qkv")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_a_fusion_beside_its_parts_or_of_uneven_rows_is_refused(tmp_path: Path) -> None:
    tensors = dict(make_fake("fused-qkv").files["m.safetensors"].tensors)
    key = "blocks.0.self_attn.to_qkv.weight"
    for change in ({"blocks.0.self_attn.q.weight": tensors[key][:128].clone()}, {key: tensors[key][:-1].clone()}):
        save_file({**tensors, **change}, tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match=r"keep one of them|not 3 equal parts"):
            read_checkpoint(tmp_path / "m.safetensors")


@each_fake
def test_a_file_is_read_as_a_network_that_it_stands_for_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    """Never as anything else: whatever a loader learns, this holds."""
    fake = make_fake(name)
    path = fakes.write_fake(fake, tmp_path)
    for each in (path, *([tmp_path / fake.partner] if fake.partner else [])):
        weights = read(each)
        assert weights is None or any(is_equal(weights, network) for network in fake.networks.values())


@pytest.mark.parametrize(
    "name", [name for name in fakes.RELEASES if not name.startswith(("causalwan", "sfwan", "hy-"))]
)
def test_a_written_fake_is_recognised_as_its_release(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file on disk: what is written has the names and shapes that recognition is shown."""
    fake = make_fake(name)
    path = fakes.write_fake(fake, tmp_path)
    contents = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    shapes = fakes.key_shapes(contents)
    assert shapes == fakes.key_shapes(fake.files[fake.path])
    for preset_name, preset in fakes.tiny_presets().items():
        monkeypatch.setitem(PRESETS, preset_name, preset)
    assert name in {preset.name for preset in recognise(shapes, path).presets}


def test_the_command_writes_the_fakes_that_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.main([str(tmp_path), "longlive", "sfwan2.1"])
    paths = [tmp_path / "longlive/models/longlive_base.pt", tmp_path / "sfwan2.1"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert sorted(path.name for path in (tmp_path / "longlive/models").iterdir()) == ["longlive_base.pt", "lora.pt"]
    assert (tmp_path / "sfwan2.1/scheduler/scheduler_config.json").is_file()
    with pytest.raises(SystemExit) as caught:
        fakes.main([str(tmp_path), "longlve"])
    assert caught.value.code == 2
    assert "there is no fake 'longlve'" in capsys.readouterr().err
