"""Files: ours come back as saved, other trainers' are understood, and everything else is one clear ValueError."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig, TAEHVConfig, WanConfig
from selfforcing_core.shapes import taehv_shapes, wan_shapes
from selfforcing_core.weights import checkpoint as checkpoint_module
from selfforcing_core.weights.checkpoint import inspect_checkpoint, read_checkpoint, save_checkpoint

WAN = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=8, freq_dim=16)
WIDE_HEADS = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=8, text_len=4, freq_dim=16, eps=1e-5)
TAEHV = TAEHVConfig(encoder_width=8, decoder_widths=(16, 8, 8, 8))
WAN22_I2V = replace(WAN, in_dim=36, model_type="i2v", image_features=False)


def weights_of(config: WanConfig | TAEHVConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = wan_shapes(config) if isinstance(config, WanConfig) else taehv_shapes(config)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def refusal(path: Path, **options: Any) -> str:
    """The message with which a file is refused, checked to be one line that starts with the file."""
    with pytest.raises(ValueError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("config", [WAN, WIDE_HEADS, replace(WAN, in_dim=36, model_type="i2v"), WAN22_I2V, TAEHV])
def test_saved_checkpoint_comes_back_whole(tmp_path: Path, config: WanConfig | TAEHVConfig) -> None:
    weights = weights_of(config)
    causal, steps = CausalConfig(chunk=2, window=7, sink=1), StepConfig(steps=(1000.0, 500.0), shift=3.0)
    save_checkpoint(tmp_path / "m.safetensors", weights, config, {"trained": "on squares"}, causal=causal, steps=steps)
    checkpoint = read_checkpoint(tmp_path / "m.safetensors")
    assert_same(checkpoint.state_dict, weights)
    assert (checkpoint.config, checkpoint.causal, checkpoint.steps) == (config, causal, steps)
    assert checkpoint.metadata["trained"] == "on squares"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_36_channels_without_an_image_embedding_are_image_to_video(tmp_path: Path) -> None:
    """Bare as Wan 2.2 released them, and with the header of earlier versions, which called them text-to-video."""
    weights = weights_of(WAN22_I2V)
    assert not any("img" in name for name in weights)
    save_file(weights, tmp_path / "bare.safetensors")
    older = json.dumps({"format": 1, "kind": "wan", "config": {**replace(WAN, in_dim=36).to_dict()}})
    save_file(weights, tmp_path / "older.safetensors", {"selfforcing": older})
    assert read_checkpoint(tmp_path / "bare.safetensors").config == WAN22_I2V
    assert read_checkpoint(tmp_path / "older.safetensors").config == WAN22_I2V


def test_older_versions_read_every_header_but_that_of_what_they_lack() -> None:
    assert "image_features" not in replace(WAN22_I2V, image_features=True).to_dict()
    assert WAN22_I2V.to_dict()["image_features"] is False


def test_header_tells_a_host_what_shapes_cannot(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.safetensors", weights_of(WIDE_HEADS), WIDE_HEADS, causal=CausalConfig())
    host = json.loads(read_checkpoint(tmp_path / "m.safetensors").metadata["config"])["transformer"]
    assert host == {"causal_ar": True, "num_heads": 2, "text_dim": 8, "freq_dim": 16, "text_len": 4}


def test_bare_wan_file_is_understood_by_its_shapes_alone(tmp_path: Path) -> None:
    save_file(weights_of(WAN), tmp_path / "taehv.safetensors")  # a misleading name changes nothing
    checkpoint = read_checkpoint(tmp_path / "taehv.safetensors")
    assert (checkpoint.kind, checkpoint.config, checkpoint.dialect, checkpoint.causal) == ("wan", WAN, "wan", None)


def test_host_header_gives_the_number_of_heads(tmp_path: Path) -> None:
    header = {"config": json.dumps({"transformer": {"num_heads": 2, "text_len": 4}})}
    save_file(prefixed(weights_of(WIDE_HEADS), "model.diffusion_model."), tmp_path / "m.safetensors", header)
    checkpoint = read_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.config == replace(WIDE_HEADS, eps=1e-6)
    assert checkpoint.dialect == "comfyui"


def test_unknown_number_of_heads_is_not_guessed(tmp_path: Path) -> None:
    save_file(weights_of(WIDE_HEADS), tmp_path / "m.safetensors")
    assert "width 48 is not a multiple of 128" in refusal(tmp_path / "m.safetensors")


def sharded_ema(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as a trainer's average has them whose network is wrapped by FSDP and checkpointing."""
    inner = "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    return {"model._fsdp_wrapped_module." + name.replace(".self_attn.", inner): weights[name] for name in weights}


@pytest.mark.parametrize("legacy", [False, True])
def test_self_forcing_training_file_gives_the_weights_asked_for(tmp_path: Path, legacy: bool) -> None:
    raw, ema = weights_of(WAN, 1), weights_of(WAN, 2)
    file = tmp_path / "model.pt"
    contents = {
        "generator": prefixed(raw, "model."),
        "generator_ema": sharded_ema(ema),
        "critic": prefixed(raw, "model."),
    }
    torch.save(contents, file, _use_new_zipfile_serialization=not legacy)
    assert_same(read_checkpoint(file).state_dict, ema)
    assert_same(read_checkpoint(file, weights="ema").state_dict, ema)
    checkpoint = read_checkpoint(file, weights="raw")
    assert_same(checkpoint.state_dict, raw)
    assert (checkpoint.weights, checkpoint.dialect, checkpoint.config) == ("raw", "self-forcing", WAN)
    assert inspect_checkpoint(file)["weights"] == ["raw", "ema"]


@pytest.mark.parametrize("container", ["generator", "model", None])
def test_torch_file_without_an_average_gives_its_only_weights(tmp_path: Path, container: str | None) -> None:
    weights = prefixed(weights_of(WAN), "model.") if container else weights_of(WAN)
    torch.save({container: weights} if container else OrderedDict(weights), tmp_path / "m.pt")
    assert_same(read_checkpoint(tmp_path / "m.pt").state_dict, weights_of(WAN))
    assert "use --weights " in refusal(tmp_path / "m.pt", weights="ema")


@pytest.mark.parametrize(
    ("containers", "prefix"),
    [
        (["generator"], "module.model."),
        (["generator"], "module._orig_mod."),
        (["generator"], "_orig_mod.module.model._fsdp_wrapped_module."),
        (["module"], "model."),
        (["module"], "module.model."),
        (["state_dict"], "generator.model."),
        (["state_dict"], "model.model."),
        (["model_state_dict"], ""),
        (["model", "module"], "model."),
        ([], "generator.model."),
    ],
)
def test_files_of_every_wrapper_and_trainer_are_read(tmp_path: Path, containers: list[str], prefix: str) -> None:
    """As DDP, FSDP, torch.compile, DeepSpeed and Lightning leave them, with what else they keep beside."""
    contents: dict[str, Any] = prefixed(weights_of(WAN), prefix)
    for name in containers:
        contents = {name: contents, "optimizer": None, "global_step": 12, "ds_version": "0.16"}
    torch.save(contents, tmp_path / "m.pt")
    assert_same(read_checkpoint(tmp_path / "m.pt").state_dict, weights_of(WAN))


@pytest.mark.parametrize(
    ("raw", "ema", "is_flat"),
    [
        ("generator", "generator_ema", False),
        ("generator", "generator_ema", True),
        ("model", "ema", False),
        ("module", "model_ema", False),
    ],
)
def test_raw_and_averaged_weights_are_told_apart_and_the_choice_is_said(
    tmp_path: Path, raw: str, ema: str, is_flat: bool
) -> None:
    sets = {raw: prefixed(weights_of(WAN, 1), "model."), ema: prefixed(weights_of(WAN, 2), "model.")}
    if is_flat:
        flat = {f"{name}.{key}": tensor for name, checkpoint in sets.items() for key, tensor in checkpoint.items()}
        save_file({**flat, "critic.x": torch.zeros(1)}, tmp_path / "m")
    else:
        torch.save(sets, tmp_path / "m")
    checkpoint = read_checkpoint(tmp_path / "m")
    assert_same(checkpoint.state_dict, weights_of(WAN, 2))
    assert f"averaged weights ({ema}) are used" in checkpoint.notes[0]
    if is_flat:
        assert "critic.x" in checkpoint.notes[1]
    checkpoint = read_checkpoint(tmp_path / "m", weights="raw")
    assert_same(checkpoint.state_dict, weights_of(WAN, 1))
    assert not any("are used" in note for note in checkpoint.notes)


def test_two_sets_of_weights_of_one_kind_are_not_chosen_from(tmp_path: Path) -> None:
    one, other = weights_of(WAN, 1), weights_of(WAN, 2)
    torch.save({"generator": one, "model": other}, tmp_path / "m.pt")
    assert "generator and model; save the one" in refusal(tmp_path / "m.pt")
    torch.save({"state_dict": {"generator.a": one["head.head.bias"]}, "model": other}, tmp_path / "m.pt")
    assert "state_dict.generator" in refusal(tmp_path / "m.pt")
    torch.save({"generator": one, "model": one}, tmp_path / "m.pt")
    assert_same(read_checkpoint(tmp_path / "m.pt").state_dict, one)  # two names of the same


def test_an_average_that_is_not_there_yet_is_no_set_of_weights(tmp_path: Path) -> None:
    torch.save({"generator": weights_of(WAN), "generator_ema": None, "step": 100}, tmp_path / "m.pt")
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert_same(checkpoint.state_dict, weights_of(WAN))
    assert checkpoint.notes == ()
    assert "has no ema weights" in refusal(tmp_path / "m.pt", weights="ema")


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("average", ["ema.", "model_ema."])
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_raw_weights_beside_an_average_in_a_flat_file_are_reached(
    tmp_path: Path, prefix: str, average: str, form: str
) -> None:
    raw, ema, path = weights_of(WAN, 1), weights_of(WAN, 2), tmp_path / f"m.{form}"
    flat = prefixed(raw, prefix) | prefixed(ema, average)
    save_file(flat, path) if form == "safetensors" else torch.save(flat, path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state_dict, ema)
    assert any("weights 'raw' are the others" in note for note in checkpoint.notes)
    assert_same(read_checkpoint(path, weights="raw").state_dict, raw)
    strays = prefixed(ema, average) | {"critic.weight": torch.zeros(2)}
    torch.save(strays, tmp_path / "strays.pt")
    assert any("left out, the first is critic.weight" in note for note in read_checkpoint(tmp_path / "strays.pt").notes)


@pytest.mark.parametrize("name", ["freqs", "model.freqs", "module.model.freqs", "rope.freqs_cos"])
def test_known_stray_tables_are_left_out_by_name_and_others_refused(tmp_path: Path, name: str) -> None:
    table = torch.zeros(1024, 64, dtype=torch.complex64)
    torch.save({**weights_of(WAN), name: table}, tmp_path / "m.pt")
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert_same(checkpoint.state_dict, weights_of(WAN))
    assert f"{name} left out" in checkpoint.notes[0]
    torch.save({**weights_of(WAN), f"{name}2": table}, tmp_path / "m.pt")
    assert "complex64" in refusal(tmp_path / "m.pt")


def test_shards_of_several_networks_are_told_apart_when_all_are_read(tmp_path: Path) -> None:
    raw, ema = prefixed(weights_of(WAN, 1), "generator."), prefixed(weights_of(WAN, 2), "generator_ema.")
    parts = {"a.safetensors": raw, "b.safetensors": ema}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    listed = {key: name for name, tensors in parts.items() for key in tensors}
    (tmp_path / "m.json").write_text(json.dumps({"weight_map": listed}))
    assert_same(read_checkpoint(tmp_path / "m.json", weights="raw").state_dict, weights_of(WAN, 1))


def test_taehv_torch_file_is_understood_by_its_shapes(tmp_path: Path) -> None:
    torch.save(weights_of(TAEHV), tmp_path / "taew2_1.pth")
    checkpoint = read_checkpoint(tmp_path / "taew2_1.pth")
    assert (checkpoint.kind, checkpoint.config) == ("taehv", TAEHV)


def test_inspection_is_json_and_complete(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    half = {name: tensor.half() for name, tensor in weights_of(WAN).items()}
    save_checkpoint(file, half, WAN, causal=CausalConfig(), steps=StepConfig())
    report = json.loads(json.dumps(inspect_checkpoint(file)))
    assert (report["kind"], report["dialect"], report["dtype"], report["weights"]) == (
        "wan",
        "wan",
        "float16",
        ["as stored"],
    )
    assert report["weight_bytes"] == sum(tensor.nbytes for tensor in load_file(file).values())
    assert report["parameters"] == sum(tensor.numel() for tensor in half.values())
    assert WanConfig.from_dict(report["config"]) == WAN
    assert (CausalConfig.from_dict(report["causal"]), StepConfig.from_dict(report["steps"])) == (
        CausalConfig(),
        StepConfig(),
    )


class Trap:
    """Unpickling it creates a file, for whoever executes what they read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["torch zip", "torch legacy", "pickle"])
def test_code_in_a_file_is_never_executed(tmp_path: Path, form: str, protocol: int) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / "m.pt"
    contents = {"generator": {**prefixed(weights_of(WAN), "model."), "model.trap": Trap(sprung)}}
    if form == "pickle":
        file.write_bytes(pickle.dumps(Trap(sprung), protocol))
    else:
        torch.save(contents, file, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "torch zip")
    message = refusal(file)
    assert not sprung.exists()
    assert "executed" in message
    if protocol == 2:
        assert "mkdir" in message
    with pytest.raises(ValueError, match="executed"):
        inspect_checkpoint(file)
    if form == "pickle":  # the trap is a real one
        pickle.loads(file.read_bytes())
        assert sprung.exists()


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    assert "executed" in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncation_at_any_length_is_one_line(tmp_path: Path, kind: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if kind == "safetensors":
        save_checkpoint(whole, weights_of(TAEHV), TAEHV)
    else:
        torch.save(weights_of(TAEHV), whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.read_bytes()
    read_checkpoint(whole)
    lengths = {*range(40), *range(40, len(data), len(data) // 60), *(len(data) - back for back in range(1, 40))}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        message = refusal(cut)
        assert any(word in message for word in ("empty", "damaged", "neither")), (length, message)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_bytes_are_refused_or_leave_a_whole_model(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "m"
    if kind == "safetensors":
        save_checkpoint(file, weights_of(TAEHV), TAEHV)
    else:
        torch.save(weights_of(TAEHV), file, _use_new_zipfile_serialization=kind == "zip")
    data, messages = file.read_bytes(), []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        damaged = bytearray(data)
        for position in torch.randint(0, min(len(data), 4000), (3,), generator=generator).tolist():
            damaged[position] ^= 1 + seed
        file.write_bytes(damaged)
        try:
            weights = read_checkpoint(file).state_dict.keys()
        except ValueError as error:
            messages.append(str(error))
        else:
            assert taehv_shapes(TAEHV).keys() == weights
    assert messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("contents", "word"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "neither"),
        (b"\x00" * 1000, "neither"),
        (b"PK\x03\x04 not really", "damaged"),
        (b"\x80\x02 not really", "damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "damaged"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no known layout"),
    ],
)
def test_junk_is_one_line(tmp_path: Path, contents: bytes, word: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(contents)
    assert word in refusal(tmp_path / "m.safetensors")


def test_missing_files_and_folders_are_one_line(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.pt")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("blocks.0.self_attn.q.lora_down.weight", "LoRA"),
        ("decoder.upsamples.0.residual.0.gamma", "Wan VAE"),
        ("token_embedding.weight", "UMT5"),
        ("decoder.1.conv.0.weight", "super"),
        ("double_blocks.0.img_attn.qkv.weight", "another family"),
        ("double_blocks.0.img_attn_qkv.weight", "HunyuanVideo is not supported; Wan 2.1 and 2.2"),
        ("transformer.adaln_single.linear.weight", "LTX-Video is not supported; Wan 2.1 and 2.2"),
        ("something\nelse", "no known layout"),
    ],
)
def test_other_networks_are_named(tmp_path: Path, name: str, word: str) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "m.safetensors")
    assert word in refusal(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ("vace_blocks.0.before_proj.weight", "Wan VACE"),
        ("control_adapter.conv.weight", "camera control"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan 2.2 Animate"),
        ("img_emb.emb_pos", "first-and-last-frame"),
    ],
)
def test_wan_models_of_other_kinds_are_named(tmp_path: Path, more: str, word: str) -> None:
    save_file({**weights_of(WAN, 1), more: torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"{word}.* is not supported; Wan 2.1 and 2.2 text-to-video"):
        read_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("in_dim", "out_dim", "word"), [(48, 48, "Wan 2.2 5B"), (48, 16, "Wan Fun Control")])
def test_wan_models_of_other_channels_are_named(tmp_path: Path, in_dim: int, out_dim: int, word: str) -> None:
    config = replace(WAN, in_dim=in_dim, out_dim=out_dim)
    save_file(weights_of(config), tmp_path / "bare.safetensors")
    save_checkpoint(tmp_path / "ours.safetensors", weights_of(config), config)
    for name in ("bare", "ours"):
        assert f"{word} (" in refusal(tmp_path / f"{name}.safetensors")


def test_incomplete_and_foreign_variants_say_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"

    def message_for(change: dict[str, Tensor | None]) -> str:
        weights = {**weights_of(WAN), **change}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
        return refusal(file)

    assert "blocks.1.ffn.2.bias" in message_for({"blocks.1.ffn.2.bias": None})
    assert "blocks.0.more.weight" in message_for({"blocks.0.more.weight": torch.zeros(2)})
    assert "blocks.0.ffn.0.weight has shape [1]" in message_for({"blocks.0.ffn.0.weight": torch.zeros(1)})
    assert "blocks.1.ffn.0.bias has shape [3], expected [64]" in message_for({"blocks.1.ffn.0.bias": torch.zeros(3)})
    assert "int8" in message_for({"blocks.1.ffn.0.bias": torch.zeros(64, dtype=torch.int8)})
    assert "blocks.2 is missing" in message_for({"blocks.7.modulation": torch.zeros(1, 6, 128)})


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"selfforcing": "{"}, "header is damaged"),
        ({"selfforcing": "[]"}, "header is damaged"),
        ({"selfforcing": json.dumps({"format": 4})}, "update"),
        ({"selfforcing": json.dumps({"format": 1, "kind": "taehv"})}, "header says 'taehv'"),
        ({"selfforcing": json.dumps({"format": 1, "config": {"dim": 128}})}, "header is damaged"),
        ({"selfforcing": json.dumps({"format": 1, "config": {**WAN.to_dict(), "ffn_dim": 65}})}, "ffn_dim 65"),
        ({"selfforcing": json.dumps({"format": 1, "config": {**WAN.to_dict(), "num_heads": 0}})}, "num_heads is 0"),
        ({"selfforcing": json.dumps({"format": 1, "config": {**WAN.to_dict(), "colour": 1}})}, "colour"),
        ({"selfforcing": json.dumps({"format": 1, "causal": {"chunk": 0}})}, "chunk 0"),
        ({"selfforcing": json.dumps({"format": 1, "steps": {"steps": "many"}})}, "header is damaged"),
        ({"config": json.dumps({"transformer": {"num_heads": "two"}})}, "num_heads is 'two'"),
        ({"config": "not json"}, "header is damaged"),
    ],
)
def test_contradictory_header_is_one_line(tmp_path: Path, header: dict[str, str], word: str) -> None:
    save_file(weights_of(WAN), tmp_path / "m.safetensors", header)
    assert word in refusal(tmp_path / "m.safetensors")


def test_unfit_weights_are_not_saved(tmp_path: Path) -> None:
    weights = weights_of(WAN)
    del weights["head.modulation"]
    with pytest.raises(ValueError, match=r"head\.modulation"):
        save_checkpoint(tmp_path / "m.safetensors", weights, WAN)
    with pytest.raises(ValueError, match="selfforcing"):
        save_checkpoint(tmp_path / "m.safetensors", weights_of(WAN), WAN, {"selfforcing": "mine"})
    with pytest.raises(ValueError, match="cannot be written"):
        save_checkpoint(tmp_path / "absent" / "m.safetensors", weights_of(WAN), WAN)
    assert not list(tmp_path.iterdir())


def test_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, weights_of(WAN, 1), WAN)

    def broken_save(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_module, "save_file", broken_save)
    with pytest.raises(ValueError, match=r"m\.safetensors: cannot be written \(disk full\)"):
        save_checkpoint(file, weights_of(WAN, 2), WAN)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert_same(read_checkpoint(file).state_dict, weights_of(WAN, 1))


def test_file_can_be_rewritten_from_its_own_weights(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, weights_of(WAN), WAN)
    checkpoint = read_checkpoint(file)
    save_checkpoint(file, checkpoint.state_dict, checkpoint.config, causal=CausalConfig())
    assert_same(load_file(file), weights_of(WAN))
    torch.save(weights_of(WAN), tmp_path / "m.pt")
    save_checkpoint(file, read_checkpoint(tmp_path / "m.pt").state_dict, WAN)
    assert_same(load_file(file), weights_of(WAN))


@pytest.mark.skipif(shutil.which("sh") is None or not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_reading_makes_no_second_copy_of_the_weights(tmp_path: Path, name: str) -> None:
    config = replace(WAN, ffn_dim=160_000)
    if name == "m.pt":
        torch.save({"generator": prefixed(weights_of(config), "model.")}, tmp_path / name)
    else:
        save_checkpoint(tmp_path / name, weights_of(config), config)

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous_bytes()
    checkpoint = read_checkpoint(tmp_path / name)
    total = sum(float(tensor.sum()) for tensor in checkpoint.state_dict.values())
    assert anonymous_bytes() - before < (tmp_path / name).stat().st_size / 4
    assert total == pytest.approx(sum(float(tensor.sum()) for tensor in weights_of(config).values()))
