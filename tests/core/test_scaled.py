"""Files in 8 bits with scales are the products they stand for, in every form; what cannot be one is refused by name."""

from __future__ import annotations

import json
import logging
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.config import WanConfig
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import inspect_checkpoint, read_checkpoint
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.load import load_model
from selfforcing_core.weights.tensor_files import read_tensors
from tests.support.loading_memory import loading_memory
from tests.support.operators import EveryOperator

WAN = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=8, freq_dim=16)
FORMS = ("scale_weight", "weight_scale", "per row", "comfy_quant", "header", "e5m2", "int8")
# 14B in small: its layers, a fortieth of its widths, so that one weight in float32 is to a layer what it is there.
LIKE_14B = replace(WAN, ffn_dim=346, num_layers=40)


def weights_of(config: WanConfig = WAN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in wan_shapes(config).items()}


def scaled(form: str, config: WanConfig = WAN) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """The tensors and header of a file, and the float32 network that it stands for."""
    stored, header, exact = {}, {}, {}
    formats: dict[str, dict[str, str]] = {}
    dtype = {"e5m2": torch.float8_e5m2, "int8": torch.int8}.get(form, torch.float8_e4m3fn)
    largest = 127.0 if form == "int8" else torch.finfo(dtype).max
    for name, weight in weights_of(config).items():
        stored[name] = exact[name] = weight
        if not name.startswith("blocks.") or weight.ndim != 2:
            continue
        layer = name.removesuffix(".weight")
        scale = weight.abs().amax(1, keepdim=True) if form in ("per row", "int8") else weight.abs().max()
        scale = scale / largest
        stored[name] = (weight / scale).round().to(dtype) if form == "int8" else (weight / scale).to(dtype)
        exact[name] = stored[name].float() * scale
        stored[f"{layer}.{'scale_weight' if form == 'scale_weight' else 'weight_scale'}"] = scale
        formats[layer] = {"format": "int8_tensorwise" if form == "int8" else str(dtype).removeprefix("torch.")}
        if form == "scale_weight":
            stored[f"{layer}.scale_input"] = torch.tensor(0.5)
        if form in ("comfy_quant", "e5m2", "int8"):
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(formats[layer]).encode()), dtype=torch.uint8)
    if form == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if form == "header":
        header = {"_quantization_metadata": json.dumps({"layers": formats})}
    return stored, header, exact


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_scaled_file_is_the_product_it_stands_for(tmp_path: Path, form: str, prefix: str) -> None:
    stored, header, exact = scaled(form)
    header = {name: text.replace("blocks.", f"{prefix}blocks.") for name, text in header.items()}
    save_file({prefix + name: tensor for name, tensor in stored.items()}, tmp_path / "m.safetensors", header)
    checkpoint = read_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.config == WAN
    assert checkpoint.state_dict.keys() == exact.keys()
    assert all(torch.equal(checkpoint.state_dict[name], exact[name]) for name in exact)
    assert "widened" in checkpoint.notes[0]


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_a_scaled_file_is_converted_by_one_rounding_of_the_product(tmp_path: Path, dtype: str | None) -> None:
    stored, header, exact = scaled("header")
    save_file(stored, tmp_path / "m.safetensors", header)
    summary = convert(tmp_path / "m.safetensors", tmp_path / "out.safetensors", dtype=dtype)
    assert summary["dtype"] == (dtype or "bfloat16")
    assert summary["notes"] == [], "nothing in the new file says that it were in 8 bits"
    wide = torch.bfloat16 if dtype is None else getattr(torch, dtype)
    converted = load_file(tmp_path / "out.safetensors")
    assert converted.keys() == exact.keys()
    assert all(torch.equal(converted[name], exact[name].to(wide)) for name in exact)


def test_a_scaled_file_generates_as_the_network_it_stands_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored, header, exact = scaled("scale_weight")
    save_file(stored, tmp_path / "m.safetensors", header)
    with caplog.at_level(logging.WARNING):
        model, checkpoint = load_model(tmp_path / "m.safetensors", dtype=torch.float32)
    assert "20 weights are stored in 8 bits" in caplog.text
    assert not checkpoint.state_dict, "taken over one by one"
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.state_dict().items())
    assert next(iter(load_model(tmp_path / "m.safetensors")[0].parameters())).dtype == torch.bfloat16


def test_inspection_of_a_scaled_file_tells_what_is_stored(tmp_path: Path) -> None:
    stored, _, _ = scaled("scale_weight", replace(WAN, ffn_dim=512))
    save_file(stored, tmp_path / "m.safetensors")
    summary = inspect_checkpoint(tmp_path / "m.safetensors")
    assert summary["dtype"] == "float8_e4m3fn"
    assert summary["weight_bytes"] == sum(stored[name].nbytes for name in wan_shapes(replace(WAN, ffn_dim=512)))
    assert "widened" in summary["notes"][0]


def test_a_file_that_has_lost_a_scale_is_refused_and_a_plain_cast_is_what_it_says(tmp_path: Path) -> None:
    """Also one that has lost them all and says that it had some; a vector may be narrowed without one."""
    stored, _, _ = scaled("scale_weight")
    path, stored["blocks.0.norm3.bias"] = (
        tmp_path / "m.safetensors",
        stored["blocks.0.norm3.bias"].to(torch.float8_e4m3fn),
    )
    save_file(stored, path)
    assert "1 more have none and are read as they stand" in read_checkpoint(path).notes[0]
    save_file({name: tensor for name, tensor in stored.items() if name != "blocks.0.ffn.0.scale_weight"}, path)
    with pytest.raises(
        ValueError, match=r"blocks.0.ffn.0.weight is float8_e4m3fn without a scale, which the same layer"
    ):
        read_checkpoint(path)
    both = {
        name: tensor
        for name, tensor in stored.items()
        if not name.endswith(("ffn.0.scale_weight", "ffn.2.scale_weight"))
    }
    save_file(both, path)
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.weight is float8_e4m3fn without a scale, while 16 other"):
        read_checkpoint(path)
    plain = {name: tensor for name, tensor in stored.items() if "scale" not in name}
    save_file({**plain, "scaled_fp8": stored["scaled_fp8"]}, path)
    with pytest.raises(ValueError, match=r"is marked as scaled .* and has no scale"):
        read_checkpoint(path)
    save_file(plain, path)
    weights = read_checkpoint(path).state_dict
    assert all(torch.equal(weights[name].float(), tensor.float()) for name, tensor in plain.items())


def test_a_lost_scale_of_another_network_is_refused_too(tmp_path: Path) -> None:
    """Text encoders have no blocks of ours; a layer that has none in any block was stored so."""
    weight, scale = torch.randn(4, 4).to(torch.float8_e4m3fn), torch.tensor([3.0])
    stored = {f"block.{index}.{name}.weight": weight.clone() for index in (0, 1) for name in ("q", "bias")}
    save_file({**stored, "block.0.q.scale_weight": scale}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"block.1.q.weight is float8_e4m3fn without a scale"):
        read_tensors(tmp_path / "m.safetensors")
    save_file(
        {**stored, "block.0.q.scale_weight": scale, "block.1.q.scale_weight": scale.clone()}, tmp_path / "m.safetensors"
    )
    assert torch.equal(read_tensors(tmp_path / "m.safetensors")["block.1.bias.weight"].float(), weight.float())


def test_tensors_of_other_networks_are_multiplied_too(tmp_path: Path) -> None:
    weight, scale = torch.randn(4, 4).to(torch.float8_e4m3fn), torch.tensor([3.0])
    save_file({"a.weight": weight, "a.scale_weight": scale, "scaled_fp8": torch.zeros(0)}, tmp_path / "m.safetensors")
    tensors = read_tensors(tmp_path / "m.safetensors")
    assert list(tensors) == ["a.weight"]
    assert torch.equal(tensors["a.weight"], weight.float() * 3)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"blocks.0.ffn.0.weight": None}, "weight_scale is the scale of blocks.0.ffn.0.weight, which is missing"),
        ({"blocks.0.ffn.0.weight": torch.ones(64, 128)}, "is float32 and not in 8 bits"),
        ({"blocks.0.ffn.0.weight_scale": torch.ones(64, 2)}, "weight_scale of shape [64, 2]"),
        ({"blocks.0.ffn.0.weight_scale": torch.ones(3)}, "weight_scale of shape [3]"),
        ({"blocks.0.ffn.0.weight_scale": torch.tensor(float("nan"))}, "weight_scale is not a finite number"),
        ({"blocks.0.ffn.0.weight_scale": torch.ones(64, dtype=torch.int32)}, "in torch.int32"),
        ({"blocks.0.ffn.0.scale_weight": torch.ones(())}, "both scale blocks.0.ffn.0.weight"),
        (
            {"blocks.0.ffn.0.comfy_quant": b'{"format": "nvfp4"}'},
            "as NVFP4, such as blocks.0.ffn.0, which is not read",
        ),
        ({"blocks.0.ffn.0.comfy_quant": b'{"format": "float8_e5m2"}'}, "float8_e5m2, but its weight is float8_e4m3fn"),
        ({"blocks.0.ffn.0.comfy_quant": b'{"format": "int8_tensorwise", "convrot": true}'}, "convrot"),
        ({"blocks.0.ffn.0.comfy_quant": b"[]"}, "not a JSON object"),
        ({"blocks.0.ffn.0.comfy_quant": b"\xff"}, "not JSON"),
        ({"blocks.0.ffn.9.comfy_quant": b'{"format": "float8_e4m3fn"}'}, "blocks.0.ffn.9.weight is missing"),
        ({"blocks.0.ffn.0.weight_scale_2": torch.ones(())}, "weight_scale_2"),
        ({"scaled_fp8x": torch.ones(())}, "scaled_fp8x"),
    ],
)
def test_what_cannot_be_a_scaled_weight_is_refused_by_name(
    tmp_path: Path, change: dict[str, Tensor | bytes | None], word: str
) -> None:
    stored, _, _ = scaled("weight_scale")
    for name, value in change.items():
        stored.pop(name, None)
        if isinstance(value, bytes):
            value = torch.tensor(list(value), dtype=torch.uint8)
        if value is not None:
            stored[name] = value
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(ValueError) as caught:
        read_checkpoint(tmp_path / "m.safetensors")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scale_of_one_beside_a_wide_weight_changes_nothing(tmp_path: Path) -> None:
    weights = weights_of()
    save_file({**weights, "blocks.0.ffn.0.scale_weight": torch.ones(1)}, tmp_path / "m.safetensors")
    checkpoint = read_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(checkpoint.state_dict["blocks.0.ffn.0.weight"], weights["blocks.0.ffn.0.weight"])
    assert (checkpoint.dtype, checkpoint.notes) == ("float32", ())


@pytest.mark.skipif(shutil.which("sh") is None or not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
def test_a_scaled_file_is_widened_one_weight_at_a_time(tmp_path: Path) -> None:
    config = replace(WAN, ffn_dim=60_000, num_layers=3)
    stored, _, exact = scaled("weight_scale", config)
    largest = max(tensor.nbytes for tensor in exact.values())
    total = sum(float(tensor.sum()) for tensor in exact.values())
    save_file(stored, tmp_path / "m.safetensors")
    del stored, exact

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous_bytes()
    checkpoint, most = read_checkpoint(tmp_path / "m.safetensors"), 0
    summed = 0.0
    for tensor in checkpoint.state_dict.values():
        most = max(most, anonymous_bytes() - before)
        summed += float(tensor.sum())
    assert most < 3 * largest, "a weight, its product, and what the allocator keeps"
    assert summed == pytest.approx(total)


class Copies(EveryOperator):
    """Counts the bytes of the tensors that conversions make, and the most that there are at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.bytes += result.nbytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(result, self.forget, result.nbytes)
        return result

    def forget(self, freed: int) -> None:
        self.bytes -= freed


@pytest.mark.parametrize("form", ["scale_weight", "per row"])
def test_a_scaled_network_needs_no_more_than_its_bfloat16_form_and_a_layer(tmp_path: Path, form: str) -> None:
    shapes = wan_shapes(LIKE_14B)
    wide = sum(math.prod(shape) for shape in shapes.values()) * 2
    layer = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.0.")) * 2
    save_file(scaled(form, LIKE_14B)[0], tmp_path / "m.safetensors")
    with Copies() as copies:
        model, _ = load_model(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert sum(parameter.nbytes for parameter in model.parameters()) == wide
    assert wide <= copies.peak < wide + layer


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
def test_blocks_of_14b_in_8_bits_take_their_bfloat16_form_and_less_than_a_block_in_memory(tmp_path: Path) -> None:
    """Two blocks of real size, by what the process holds."""
    shapes = wan_shapes(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=2))
    stored: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        is_scaled = name.startswith("blocks.") and len(shape) == 2
        stored[name] = torch.zeros(shape, dtype=torch.float8_e4m3fn if is_scaled else torch.bfloat16)
        if is_scaled:
            stored[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(0.5)
    save_file(stored, tmp_path / "m.safetensors")
    wide = 2 * sum(math.prod(shape) for name, shape in shapes.items() if f"{name[:-6]}scale_weight" in stored)
    del stored  # the others stay mapped from the file
    peak, still = loading_memory(tmp_path / "m.safetensors", "bfloat16")
    assert peak < wide + wide // 2
    assert wide <= still < wide + wide // 20
