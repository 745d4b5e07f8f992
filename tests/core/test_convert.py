"""A network survives every change of clothes: dialects, containers, number types, shards."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.config import CausalConfig, TAEHVConfig, WanConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.shapes import taehv_shapes, wan_shapes
from selfforcing_core.weights import convert as convert_module
from selfforcing_core.weights.checkpoint import inspect_checkpoint, read_checkpoint, save_checkpoint
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.keymap import DIALECTS

WAN = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=8, freq_dim=16)
I2V = replace(WAN, in_dim=36, model_type="i2v", num_heads=2)
TAEHV = TAEHVConfig(encoder_width=8, decoder_widths=(16, 8, 8, 8))


def weights_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (".safetensors", WAN),
        (".safetensors", I2V),
        ("", WAN),
        ("", I2V),
        (".pt", WAN),
        (".pt", replace(I2V, num_heads=1)),  # it has no header: its heads are those of width / 128
    ],
)
def test_every_output_reads_back_as_the_same_network(
    tmp_path: Path, dialect: str, kind: str, config: WanConfig
) -> None:
    weights = weights_of(wan_shapes(config))
    save_checkpoint(tmp_path / "in.safetensors", weights, config, causal=CausalConfig(window=6))
    convert(tmp_path / "in.safetensors", tmp_path / f"out{kind}", dialect=dialect)
    convert(tmp_path / f"out{kind}", tmp_path / "back.safetensors")
    checkpoint = read_checkpoint(tmp_path / "back.safetensors")
    assert_same(checkpoint.state_dict, weights)
    assert checkpoint.config == config
    assert checkpoint.dialect == "wan"
    assert sorted(os.listdir(tmp_path)) == sorted(["in.safetensors", f"out{kind}", "back.safetensors"])


def test_a_folder_is_sharded_and_loads_in_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    monkeypatch.setattr(convert_module, "SHARD_SIZE", "400KB")
    weights = weights_of(wan_shapes(I2V))
    save_checkpoint(tmp_path / "in.safetensors", weights, I2V)
    convert(tmp_path / "in.safetensors", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*-of-*.safetensors"))) > 1
    assert_same(read_checkpoint(tmp_path / "out").state_dict, weights)
    index = next((tmp_path / "out").glob("*.index.json"))
    assert_same(read_checkpoint(index).state_dict, weights)
    theirs = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(str(tmp_path / "out")))
    shards = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    theirs.load_state_dict({name: tensor for shard in shards for name, tensor in shard.items()})


def test_a_shard_that_is_missing_or_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "SHARD_SIZE", "200KB")
    save_checkpoint(tmp_path / "in.safetensors", weights_of(wan_shapes(WAN)), WAN)
    convert(tmp_path / "in.safetensors", tmp_path / "out")
    index = next((tmp_path / "out").glob("*.index.json"))
    shard = sorted((tmp_path / "out").glob("*-of-*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=f"lists '{shard.name}', which is not beside it"):
        read_checkpoint(tmp_path / "out")
    index.write_text(index.read_text().replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(ValueError, match=r"lists '\.\./elsewhere\.safetensors'"):
        read_checkpoint(tmp_path / "out")


def test_raw_and_averaged_weights_are_chosen(tmp_path: Path) -> None:
    raw, ema = weights_of(wan_shapes(WAN), 1), weights_of(wan_shapes(WAN), 2)
    wrapped = [{f"model.{name}": tensor for name, tensor in weights.items()} for weights in (raw, ema)]
    torch.save(dict(zip(("generator", "generator_ema"), wrapped)), tmp_path / "in.pt")
    for weights, expected in (("raw", raw), ("ema", ema), ("auto", ema)):
        convert(tmp_path / "in.pt", tmp_path / "out.safetensors", weights=weights, overwrite=True)
        assert_same(load_file(tmp_path / "out.safetensors"), expected)
    convert(tmp_path / "in.pt", tmp_path / "ema.pt", weights="ema")
    assert list(torch.load(tmp_path / "ema.pt", weights_only=True)) == ["generator_ema"]


@pytest.mark.parametrize(("asked", "expected"), [(None, True), (True, True), (False, False)])
def test_the_header_tells_comfyui_whether_the_model_is_causal(
    tmp_path: Path, asked: bool | None, expected: bool
) -> None:
    weights = {f"model.{name}": tensor for name, tensor in weights_of(wan_shapes(WAN)).items()}
    torch.save({"generator": weights}, tmp_path / "in.pt")  # what Self Forcing's trainer writes
    convert(tmp_path / "in.pt", tmp_path / "out.safetensors", causal=asked)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["transformer"]["causal_ar"] is expected
    assert (inspect_checkpoint(tmp_path / "out.safetensors")["causal"] is not None) is expected


def test_a_bare_wan_file_is_not_called_causal(tmp_path: Path) -> None:
    save_file(weights_of(wan_shapes(WAN)), tmp_path / "in.safetensors")
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")["causal"] is None


def test_dtype_is_changed_on_request_only(tmp_path: Path) -> None:
    weights = weights_of(wan_shapes(WAN))
    save_file(weights, tmp_path / "in.safetensors")
    assert convert(tmp_path / "in.safetensors", tmp_path / "a.safetensors")["dtype"] == "float32"
    assert convert(tmp_path / "in.safetensors", tmp_path / "b.safetensors", dtype="bfloat16")["dtype"] == "bfloat16"
    assert_same(load_file(tmp_path / "b.safetensors"), {name: tensor.bfloat16() for name, tensor in weights.items()})


def test_a_taehv_keeps_its_names_and_gets_its_latent_space(tmp_path: Path) -> None:
    weights = weights_of(taehv_shapes(TAEHV))
    torch.save(weights, tmp_path / "in.pth")
    assert read_checkpoint(tmp_path / "in.pth").latent_space is None
    convert(tmp_path / "in.pth", tmp_path / "out.safetensors", latent_space="wan2.1", dtype="float16")
    checkpoint = read_checkpoint(tmp_path / "out.safetensors")
    assert checkpoint.latent_space == "wan2.1"
    assert_same(checkpoint.state_dict, {name: tensor.half() for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("out.onnx", {}, "unknown kind of checkpoint"),
        ("out.safetensors", {"dialect": "elvish"}, "dialect 'elvish' is unknown; use one of comfyui"),
        ("out.safetensors", {"dtype": "int8"}, "dtype 'int8' is unknown; use one of float32"),
        ("out.safetensors", {"latent_space": "pixels"}, "latent space 'pixels' is unknown"),
        ("out.safetensors", {"weights": "ema"}, "one set of weights"),
        ("in.safetensors", {}, "exists already"),
        ("here", {}, "exists already; a folder is never overwritten"),
        ("nowhere/out", {}, "cannot be written"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_written(
    tmp_path: Path, out: str, options: dict[str, str], words: str
) -> None:
    save_file(weights_of(wan_shapes(WAN)), tmp_path / "in.safetensors")
    (tmp_path / "here").mkdir()
    before = (tmp_path / "in.safetensors").read_bytes()
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "in.safetensors", tmp_path / out, **options)
    assert sorted(os.listdir(tmp_path)) == ["here", "in.safetensors"]
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_a_failing_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "in.safetensors", weights_of(wan_shapes(WAN)), WAN)
    calls = itertools.count()

    def full_disk(*_: object) -> None:
        if next(calls):
            raise OSError("No space left on device")

    monkeypatch.setattr(convert_module, "SHARD_SIZE", "200KB")
    monkeypatch.setattr(convert_module, "save_file", full_disk)
    with pytest.raises(ValueError, match="No space"):
        convert(tmp_path / "in.safetensors", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_names_of_models_are_taken_as_by_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle's, a download's, and what is said about any other."""
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "tiny"]) == 0
    tiny = json.loads(capsys.readouterr().out)
    assert main(["convert", "tiny", "out.safetensors"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == tiny["config"]
    download = tmp_path / "models" / "self-forcing-dmd" / "checkpoints" / "self_forcing_dmd.pt"
    download.parent.mkdir(parents=True)
    torch.save({"generator_ema": {f"model.{k}": v for k, v in weights_of(wan_shapes(WAN)).items()}}, download)
    assert main(["convert", "self-forcing-dmd", "dmd.safetensors"]) == 0
    assert json.loads(capsys.readouterr().out)["causal"] is not None
    for command in (["inspect", "self-forcing-sid"], ["convert", "self-forcing-sid", "sid.safetensors"]):
        assert main(command) == 2
        assert "fetch it with: download self-forcing-sid" in capsys.readouterr().err
    for command in (["inspect", "huge"], ["inspect", ""], ["inspect", "a" * 3000], ["convert", "huge", "x.pt"]):
        assert main(command) == 2
        assert "is neither a bundle nor a path" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dmd.safetensors", "models", "out.safetensors"]
