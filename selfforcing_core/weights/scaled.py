"""Files whose matrices are stored in 8 bits, each with a scale: recognised by names, multiplied when asked for.

Eight bits hold few magnitudes, so a writer divides a weight by a scale that fills their range. Beside the weight of a
layer the file has that scale as `scale_weight` or `weight_scale`, one number or one for every row; the product is
computed again in float32. Other companions change nothing in it: `scale_input` and `input_scale` belong to products of
8-bit activations, `comfy_quant` (and the header's `_quantization_metadata`) names the format, `scaled_fp8` marks a
whole file. They are kept for ComfyUI, whose own layers compute with weights in 8 bits. A file in 8-bit floating point
without any scale is a plain cast and taken as it is, as in ComfyUI; one that has lost some or all of its scales is
refused. Other ways to store a weight (`gguf_files`) are undone the same way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name
INPUT_SCALES = ("scale_input", "input_scale")  # of products of 8-bit activations, which nothing here computes
FORMAT = "comfy_quant"
FILE_MARK = "scaled_fp8"
FULL_PRECISION = "full_precision_matrix_mult"  # ComfyUI's option: activations stay as they are
QUANTIZATION_ENTRY = "_quantization_metadata"  # a header entry: {"layers": {layer: {"format": ...}}}
FORMATS = {  # as ComfyUI names them (comfy/quant_ops.py)
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
# An option of int8_tensorwise: rows were rotated before they were rounded, and nothing here turns them back.
ROTATED = "convrot"
# Second scales, above those of blocks of 16: ComfyUI's and ModelOpt's name, LightX2V's. Weights are two to a byte.
NVFP4_SCALES = ("weight_scale_2", "weight_global_scale")
NVFP4 = "nvfp4"


class Storage(Protocol):
    """How a weight is stored that is no plain tensor."""

    @property
    def kind(self) -> str:
        """Return the name of the format, for people."""
        ...

    def shape(self, stored: Tensor) -> tuple[int, ...]:
        """Return the weight's own shape."""
        ...

    def product(self, stored: Tensor) -> Tensor:
        """Return the weight in float32."""
        ...

    def part(self, index: int, count: int) -> Storage:
        """Return how one of `count` equal parts of the rows is stored."""
        ...


@dataclass(frozen=True)
class Scale:
    """A weight in 8 bits times a factor, and what else the file says of its layer."""

    factor: Tensor  # float32, in a shape that multiplies the weight: one number, or one for every row
    kind: str  # the weight's type, "float8_e4m3fn"
    options: Mapping[str, Any] = field(default_factory=dict)  # of ComfyUI's layer; {} where the file says nothing
    input_scale: Tensor | None = None  # of activations, where products in 8 bits are meant

    def shape(self, stored: Tensor) -> tuple[int, ...]:
        return tuple(stored.shape)

    def product(self, stored: Tensor) -> Tensor:
        return stored.float().mul_(self.factor)  # PyTorch multiplies no 8-bit floats; in place, so that one is wide

    def part(self, index: int, count: int) -> Scale:
        return replace(self, factor=self.factor.chunk(count)[index]) if self.factor.ndim else self


class ScaledWeights(MutableMapping[str, Tensor]):
    """Tensors by name, some of them stored otherwise; those become float32 weights whenever they are asked for.

    So one weight is wide at a time, and who reads them one by one never has two copies of a network.
    stored: what the file holds. scales: by the name of their weight.
    """

    def __init__(self, stored: MutableMapping[str, Tensor], scales: Mapping[str, Storage]) -> None:
        self.stored, self.scales = stored, scales

    def __getitem__(self, name: str) -> Tensor:
        tensor, scale = self.stored[name], self.scales.get(name)
        return tensor if scale is None else scale.product(tensor)

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

    def remark(self) -> str:
        """Return a line that says how weights are stored and that they are widened."""
        kinds = ", ".join(sorted({scale.kind for scale in self.scales.values()}))
        plain = [name for name, x in self.stored.items() if x.dtype in FORMATS.values() and name not in self.scales]
        # Not matrices of the blocks, of which `check_scales` has refused one without its scale.
        unscaled = f"; {len(plain)} more have none and are read as they stand, the first is {plain[0]}" if plain else ""
        return (
            f"{len(self.scales)} weights are stored in 8 bits or fewer with scales ({kinds}) and are widened as they "
            f"are read, by default to bfloat16; scales for 8-bit activations are not used{unscaled}"
        )


def stored_tensors(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors as the file holds them, for whoever needs types or bytes and no product."""
    return weights.stored if isinstance(weights, ScaledWeights) else weights


def weight_shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights; nothing is multiplied."""
    scales = weights.scales if isinstance(weights, ScaledWeights) else {}
    return {
        name: scales[name].shape(tensor) if name in scales else tuple(tensor.shape)
        for name, tensor in stored_tensors(weights).items()
    }


def count_numbers(weights: Mapping[str, Tensor]) -> int:
    """Return how many numbers the weights are."""
    return sum(math.prod(shape) for shape in weight_shapes(weights).values())


def chosen_tensors(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> MutableMapping[str, Tensor]:
    """Return some of the tensors under other names, with their scales. names: old names by new ones."""
    stored = stored_tensors(weights)
    renamed = {new: stored[old] for new, old in names.items()}
    if not isinstance(weights, ScaledWeights):
        return renamed
    return ScaledWeights(renamed, {new: weights.scales[old] for new, old in names.items() if old in weights.scales})


def check_scales(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a matrix of a transformer's blocks is in 8 bits without a scale and others have theirs.

    Writers scale all of these or none. Vectors and layers outside the blocks are narrowed without one here and there.
    """
    if not isinstance(weights, ScaledWeights):
        return
    matrices = [name for name, tensor in weights.stored.items() if name.startswith("blocks.") and tensor.ndim > 1]
    narrow = [name for name in matrices if weights.stored[name].dtype in FORMATS.values()]
    lost = [name for name in narrow if name not in weights.scales]
    if lost and len(lost) < len(narrow):
        kind = str(weights.stored[lost[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{lost[0]} is {kind} without a scale, while {len(narrow) - len(lost)} other weights have theirs: the file "
            "has lost it, and the weight would be wrong by a factor; download or save the file again"
        )


# ------------------------------------------------------------------ reading --
def split_scales(
    tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Scale]]:
    """Return the weights of a file, and the scales by the names of their weights, in shapes that multiply them.

    Raises ValueError for a scale without its weight, of another shape or kind, and for formats that are not known.
    """
    _refuse_nvfp4(tensors)
    weights: dict[str, Tensor] = {}
    scales: dict[str, tuple[str, Tensor]] = {}  # by the name of the weight: key and value of the scale
    input_scales: dict[str, Tensor] = {}  # by layer
    formats = _header_formats(header)
    is_marked = is_full_precision = False
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
        elif leaf in INPUT_SCALES:
            input_scales[layer] = tensor
        elif leaf == FILE_MARK:
            is_marked, is_full_precision = (
                True,
                tensor.numel() == 2,
            )  # ComfyUI's sign for it (comfy/utils.py, convert_old_quants)
        else:
            weights[key] = tensor
    for layer, options in formats.items():  # only now are all weights and scales of the file known
        _check_format(layer, options, weights.get(f"{layer}.weight"), f"{layer}.weight" in scales)
    narrow = next((name for name, tensor in weights.items() if tensor.dtype in FORMATS.values()), None)
    if is_marked and narrow is not None and not scales:
        raise ValueError(
            f"is marked as scaled ({FILE_MARK}) and has no scale, not even for {narrow}; download or save it again"
        )
    _check_siblings(weights, scales)
    fitting = {name: _fitting(key, scale, name, weights.get(name)) for name, (key, scale) in scales.items()}
    mark = {FULL_PRECISION: True} if is_full_precision else {}
    return weights, {
        name: Scale(
            factor,
            str(weights[name].dtype).removeprefix("torch."),
            formats.get(name.removesuffix(".weight"), mark),
            input_scales.get(name.removesuffix(".weight")),
        )
        for name, factor in fitting.items()
        # Some writers leave a scale of 1 beside layers that they did not narrow.
        if weights[name].dtype in FORMATS.values()
    }


def _check_siblings(weights: Mapping[str, Tensor], scales: Collection[str]) -> None:
    """Raise ValueError for a weight in 8 bits without a scale, where the same layer of another block has one."""
    kinds = {re.sub(r"\d+", "#", name) for name in scales}
    for name, tensor in weights.items():
        if tensor.dtype in FORMATS.values() and name not in scales and re.sub(r"\d+", "#", name) in kinds:
            raise ValueError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} without a scale, which the same layer of other "
                "blocks has: the file has lost it, and the weight would be wrong by a factor; download or save it again"
            )


def _refuse_nvfp4(tensors: Mapping[str, Tensor]) -> None:
    key = next((key for key in tensors if key.endswith(NVFP4_SCALES)), None)
    packed = tensors.get(f"{key.rpartition('.')[0]}.weight") if key else None
    if packed is not None and packed.dtype == torch.uint8:
        raise ValueError(
            f"holds weights in NVFP4 ({key} is the second scale of 4-bit numbers), which is not supported; take a file "
            "in bfloat16 or scaled fp8"
        )


def _not_read(what: str) -> str:
    return (
        f"{what}, which is not read here; in ComfyUI use Load Diffusion Model with Patch Model (Self Forcing), or take "
        "a file in bfloat16 or scaled fp8"
    )


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
        kind = f"{name} ({ROTATED})" if is_rotated else "NVFP4" if name == NVFP4 else repr(name)
        raise ValueError(_not_read(f"holds layers that are stored as {kind}, such as {layer}"))
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
