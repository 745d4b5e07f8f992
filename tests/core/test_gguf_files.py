"""GGUF files are the numbers that their blocks stand for, one weight wide at a time; without the package, one line."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfforcing_core.codecs.umt5_layout import umt5_key_from_wan
from selfforcing_core.weights import gguf_files
from selfforcing_core.weights.bundles import bundle_path
from selfforcing_core.weights.checkpoint import inspect_checkpoint, read_checkpoint
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.load import load_model, load_text_encoder
from selfforcing_core.weights.tensor_files import open_contents
from tests.core.test_scaled import WAN, weights_of
from tests.core.test_text import WAN_SIZES, random_wan_weights

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the package gguf (extra cli) is not installed"
)
BLOCK = 32  # numbers of a block of Q8_0: a scale in float16, then as many signed bytes


def packed(weight: Tensor) -> tuple[np.ndarray, Tensor]:
    """The bytes of a matrix in Q8_0, and the numbers that they stand for, by hand."""
    blocks = weight.reshape(-1, BLOCK)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
    numbers = (blocks / scales.float()).round().clamp(-127, 127).to(torch.int8)
    data = np.concatenate([scales.numpy().view(np.uint8), numbers.numpy().view(np.uint8)], 1)
    return data.reshape(len(weight), -1), (numbers.float() * scales.float()).reshape(weight.shape)


def write_gguf(path: Path, weights: dict[str, Tensor], *, is_fused: bool = False) -> dict[str, Tensor]:
    """Write a file as ComfyUI-GGUF's users have it, and return the network that it stands for."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, "wan")
    exact = dict(weights)
    stored = dict(weights)
    if is_fused:
        rows = [stored.pop(f"blocks.0.self_attn.{part}.weight") for part in "qkv"]
        stored["blocks.0.self_attn.to_qkv.weight"] = torch.cat(rows)
    for name, weight in stored.items():
        if weight.ndim == 2 and name.startswith("blocks."):
            data, exact_weight = packed(weight)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            parts = exact_weight.chunk(3) if "qkv" in name else [exact_weight]
            names = [f"blocks.0.self_attn.{part}.weight" for part in "qkv"] if "qkv" in name else [name]
            exact |= dict(zip(names, parts))
        elif name == "patch_embedding.weight":  # of five axes, where GGML has four
            writer.add_array(gguf_files.ORIGINAL_SHAPE + name, [int(length) for length in weight.shape])
            writer.add_tensor(name, weight.reshape(len(weight), -1).numpy())
        elif name == "head.head.weight":
            wide = weight.bfloat16()
            exact[name] = wide
            data = wide.view(torch.uint8).numpy().reshape(len(weight), -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            exact[name] = weight.half() if weight.ndim == 2 else weight
            writer.add_tensor(name, exact[name].numpy())
    finish(writer)
    return exact


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_shapes_are_those_that_the_blocks_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By them a release is recognised; the bytes of a block are no axis of a weight."""
    stored = {"head.head.bias": torch.zeros(4), "blocks.0.ffn.0.weight": torch.zeros(8, 34, dtype=torch.uint8)}
    packing = {"blocks.0.ffn.0.weight": gguf_files.Packing(None, (8, BLOCK))}
    monkeypatch.setattr(gguf_files, "read_gguf", lambda path: (stored, packing))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(16))
    shapes = {"head.head.bias": (4,), "blocks.0.ffn.0.weight": (8, BLOCK)}
    assert open_contents(path, "auto").key_shapes == shapes


@needs_gguf
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_gguf_file_is_the_numbers_that_its_blocks_stand_for(tmp_path: Path, is_fused: bool) -> None:
    exact = write_gguf(tmp_path / "m.gguf", weights_of(), is_fused=is_fused)
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    assert (checkpoint.config, checkpoint.dtype) == (WAN, "bfloat16")
    assert checkpoint.state_dict.keys() == exact.keys()
    assert all(torch.equal(checkpoint.state_dict[name], exact[name]) for name in exact)
    assert "20 weights" in checkpoint.notes[0]
    assert "(GGUF Q8_0)" in checkpoint.notes[0]
    with pytest.raises(ValueError, match="does not say that it is an average"):
        read_checkpoint(tmp_path / "m.gguf", weights="ema")


@needs_gguf
def test_a_gguf_file_loads_converts_and_is_inspected(tmp_path: Path) -> None:
    exact = write_gguf(tmp_path / "m.gguf", weights_of())
    model, _ = load_model(tmp_path / "m.gguf", dtype=torch.float32)
    assert all(torch.equal(tensor, exact[name].float()) for name, tensor in model.state_dict().items())
    summary = inspect_checkpoint(tmp_path / "m.gguf")
    assert summary["parameters"] == sum(tensor.numel() for tensor in exact.values())
    assert summary["weight_bytes"] < 0.5 * sum(tensor.numel() * 4 for tensor in exact.values())
    convert(tmp_path / "m.gguf", tmp_path / "m.safetensors", dtype="float32")
    converted = read_checkpoint(tmp_path / "m.safetensors").state_dict
    assert all(torch.equal(converted[name], exact[name].float()) for name in exact)


@needs_gguf
def test_a_gguf_file_is_widened_one_weight_at_a_time(tmp_path: Path) -> None:
    config = replace(WAN, ffn_dim=20_000, num_layers=3)
    exact = write_gguf(tmp_path / "m.gguf", weights_of(config))
    largest = max(tensor.nbytes for tensor in exact.values())

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc (Linux)")
    del exact
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    before, most = anonymous_bytes(), 0
    for tensor in checkpoint.state_dict.values():
        most = max(most, anonymous_bytes() - before)
        assert tensor.isfinite().all()
    assert most < 4 * largest, "a weight, what the package makes it from, and what the allocator keeps"


@needs_gguf
def test_damaged_gguf_files_and_types_that_are_not_widened_are_one_line(tmp_path: Path) -> None:
    import gguf

    write_gguf(tmp_path / "m.gguf", weights_of())
    whole = (tmp_path / "m.gguf").read_bytes()
    for length in (5, 30, 1000, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or truncated GGUF") as caught:
            read_checkpoint(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)
    writer: Any = gguf.GGUFWriter(tmp_path / "odd.gguf", "wan")
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_1][1]
    writer.add_tensor("a.weight", np.zeros((1, size), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    finish(writer)
    with pytest.raises(ValueError, match="type Q8_1, which the package gguf does not widen"):
        read_checkpoint(tmp_path / "odd.gguf")


@needs_gguf
def test_a_gguf_text_encoder_is_the_numbers_that_its_blocks_stand_for(tmp_path: Path) -> None:
    import gguf

    weights = random_wan_weights() | {"token_embedding.weight": torch.randn(300, WAN_SIZES["dim"])}
    writer: Any = gguf.GGUFWriter(tmp_path / "umt5-xxl-encoder.gguf", "t5encoder")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, WAN_SIZES["num_layers"])
    for name, weight in weights.items():
        theirs = names.get_name(umt5_key_from_wan(name), try_suffixes=(".weight",))
        assert theirs is not None
        if "ffn" in name and weight.shape[-1] % BLOCK == 0:
            data, weights[name] = packed(weight)
            writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(theirs, weight.numpy())
    finish(writer)
    shutil.copy(bundle_path("tiny") / "text_encoder" / "tokenizer.json", tmp_path)
    shutil.copy(bundle_path("tiny") / "text_encoder" / "tokenizer_config.json", tmp_path)
    model = load_text_encoder(tmp_path / "umt5-xxl-encoder.gguf").model
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in weights.items())


def test_without_the_package_a_gguf_file_names_it_and_the_way_in_comfyui(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install "gguf>=0\.17\.1", or in ComfyUI load it with a GGUF loader'):
        read_checkpoint(tmp_path / "m.gguf")


def test_an_older_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    monkeypatch.setattr("selfforcing_core.versions.metadata.version", lambda name: "0.9.1")
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(ValueError, match=r"gguf 0\.9\.1 is older than 0\.17\.1"):
        read_checkpoint(tmp_path / "m.gguf")
