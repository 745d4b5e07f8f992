"""Files whose matrices are stored in 8 bits, each with a scale: recognised by names, multiplied when asked for.

Eight bits hold few magnitudes, so a writer divides a weight by a scale that fills their range. Beside the weight of a
layer the file has that scale as `scale_weight` or `weight_scale`, one number or one for every row; the product is
computed again in float32. Other companions change nothing in it: `scale_input` and `input_scale` belong to products of
8-bit activations, `comfy_quant` (and the header's `_quantization_metadata`) names the format, `scaled_fp8` marks a
whole file. A weight in 8-bit floating point without a scale is taken as it is, as in ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name
INPUT_SCALES = ("scale_input", "input_scale")  # of products of 8-bit activations, which nothing here computes
FORMAT = "comfy_quant"
FILE_MARK = "scaled_fp8"
QUANTIZATION_ENTRY = "_quantization_metadata"  # a header entry: {"layers": {layer: {"format": ...}}}
FORMATS = {  # as ComfyUI names them (comfy/quant_ops.py)
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
# An option of int8_tensorwise: rows were rotated before they were rounded, and nothing here turns them back.
ROTATED = "convrot"


class ScaledWeights(MutableMapping[str, Tensor]):
    """Tensors by name, some of them stored in 8 bits; those become float32 products whenever they are asked for.

    So one weight is wide at a time, and who reads them one by one never has two copies of a network.
    stored: what the file holds. scales: by the name of their weight.
    """

    def __init__(self, stored: MutableMapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        self.stored, self.scales = stored, scales

    def __getitem__(self, name: str) -> Tensor:
        tensor, scale = self.stored[name], self.scales.get(name)
        return tensor if scale is None else tensor.float() * scale  # PyTorch multiplies no 8-bit floats

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.stored[name] = tensor
        # What is put in is a weight in its own right; the old scale would change it.
        self.scales = {key: scale for key, scale in self.scales.items() if key != name}

    def __delitem__(self, name: str) -> None:
        del self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def stored_tensors(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors as the file holds them, for whoever needs shapes or counts and no product."""
    return weights.stored if isinstance(weights, ScaledWeights) else weights


def chosen_tensors(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> MutableMapping[str, Tensor]:
    """Return some of the tensors under other names, with their scales. names: old names by new ones."""
    stored = stored_tensors(weights)
    renamed = {new: stored[old] for new, old in names.items()}
    if not isinstance(weights, ScaledWeights):
        return renamed
    return ScaledWeights(renamed, {new: weights.scales[old] for new, old in names.items() if old in weights.scales})


def split_scales(
    tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of a file, and the scales by the names of their weights, in shapes that multiply them.

    Raises ValueError for a scale without its weight, of another shape or kind, and for formats that are not known.
    """
    weights: dict[str, Tensor] = {}
    scales: dict[str, tuple[str, Tensor]] = {}  # by the name of the weight: key and value of the scale
    formats = _header_formats(header)
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in SCALES:
            weight = f"{layer}.weight" if layer else "weight"
            if weight in scales:
                raise ValueError(f"{scales[weight][0]} and {key} both scale {weight}; keep one of them")
            scales[weight] = key, tensor
        elif leaf == FORMAT:
            if tensor.dtype != torch.uint8:
                raise ValueError(f"{key} is damaged: it is {tensor.dtype}, not bytes of JSON")
            # ComfyUI stores this JSON as a tensor of bytes.
            formats[layer] = _json_object(key, bytes(tensor.flatten().tolist()))
        elif leaf not in (*INPUT_SCALES, FILE_MARK):
            weights[key] = tensor
    for layer, options in formats.items():  # only now are all weights and scales of the file known
        _check_format(layer, options, weights.get(f"{layer}.weight"), f"{layer}.weight" in scales)
    fitting = {name: _fitting(key, scale, name, weights.get(name)) for name, (key, scale) in scales.items()}
    # Some writers leave a scale of 1 beside layers that they did not narrow.
    return weights, {name: scale for name, scale in fitting.items() if weights[name].dtype in FORMATS.values()}


def _header_formats(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if QUANTIZATION_ENTRY not in header:
        return {}
    layers = _json_object(f"header entry {QUANTIZATION_ENTRY}", header[QUANTIZATION_ENTRY].encode()).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(options, dict) for options in layers.values()):
        raise ValueError(f"header is damaged ({QUANTIZATION_ENTRY} lists no layers)")
    return dict(layers)


def _json_object(key: str, text: bytes) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is damaged: it is not JSON") from error
    if not isinstance(options, dict):
        raise ValueError(f"{key} is damaged: it is not a JSON object")
    return options


def _check_format(layer: str, options: Mapping[str, Any], weight: Tensor | None, has_scale: bool) -> None:
    """Raise ValueError unless a layer's weight and scale are what its `options` say, in a format that is read here."""
    name = options.get("format")
    params = options.get("params")
    is_rotated = bool(options.get(ROTATED) or (isinstance(params, dict) and params.get(ROTATED)))
    if name not in FORMATS or is_rotated:
        raise ValueError(
            f"layer {layer} is stored as {f'{name} ({ROTATED})' if is_rotated else name!r}, which is not read here; in "
            "ComfyUI use Load Diffusion Model with Patch Model (Self Forcing), or take a file in bfloat16 or scaled fp8"
        )
    if weight is None:
        raise ValueError(f"layer {layer} is said to be {name}, but {layer}.weight is missing; the file is incomplete")
    if weight.dtype != FORMATS[name] or not has_scale:
        actual = str(weight.dtype).removeprefix("torch.") + ("" if has_scale else " without a scale")
        raise ValueError(f"layer {layer} is said to be {name}, but its weight is {actual}; the file is damaged")


def _fitting(key: str, scale: Tensor, name: str, weight: Tensor | None) -> Tensor:
    """Return a scale as float32 in a shape that multiplies its weight: one number, or one for every row."""
    if weight is None:
        raise ValueError(f"{key} is the scale of {name}, which is missing; the file is incomplete")
    rows = weight.shape[0] if weight.ndim else 0
    shape = tuple(scale.shape)
    # Rows are output channels; writers give them the weight's number of axes or one.
    is_per_row = shape in ((rows,), (rows, *(1,) * (weight.ndim - 1)))
    if (scale.numel() != 1 and not is_per_row) or not scale.is_floating_point():
        raise ValueError(
            f"{key} of shape {list(shape)} in {scale.dtype} does not scale {name} of shape {list(weight.shape)}; only "
            "one number for the weight or for each of its rows does"
        )
    wide = scale.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError(f"{key} is not a finite number; the file is damaged")
    if weight.dtype not in FORMATS.values() and not bool((wide == 1).all()):
        raise ValueError(
            f"{key} scales {name}, which is {str(weight.dtype).removeprefix('torch.')} and not in 8 bits: whether it "
            "was multiplied already cannot be told; save the file again"
        )
    return wide.reshape(()) if scale.numel() == 1 else wide.reshape(rows, *(1,) * (weight.ndim - 1))
