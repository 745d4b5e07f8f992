"""GGUF files through the package gguf (MIT): tensors mapped as they are stored, widened one at a time when asked for.

The files that people have of Wan are made for ComfyUI-GGUF (github.com/city96/ComfyUI-GGUF): Wan's own names, and
beside a tensor of more axes than a GGML tensor has, its shape in a field of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..versions import OPTIONAL, refusal

MARK = b"GGUF"  # the first bytes of a file
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # a field, before the name of its tensor
PLAIN_TYPES = ("F32", "F16", "F64")  # those that the package gives as numbers
BFLOAT16 = "BF16"
IN_COMFYUI = "in ComfyUI load it with a GGUF loader and put Patch Model (Self Forcing) behind it"


@dataclass(frozen=True)
class Packing:
    """A weight in blocks of few bits with scales, as one of GGML's types packs it."""

    quantization: Any  # gguf's GGMLQuantizationType
    size: tuple[int, ...]  # the weight's own shape

    @property
    def kind(self) -> str:
        """Return GGML's name of the type."""
        return f"GGUF {self.quantization.name}"

    def shape(self, stored: Tensor) -> tuple[int, ...]:
        """Return the weight's own shape."""
        return self.size

    def product(self, stored: Tensor) -> Tensor:
        """Return the weight in float32."""
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(stored.numpy(), self.quantization)).reshape(self.size)

    def part(self, index: int, count: int) -> Packing:
        """Return how one of `count` equal parts of the rows is stored."""
        return replace(self, size=(self.size[0] // count, *self.size[1:]))


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Packing]]:
    """Return the tensors of a GGUF file as stored, by name, and how those are packed that are no plain numbers.

    Raises ValueError where gguf is missing or too old, for a damaged file, and for types that gguf does not widen.
    """
    reader_class = _reader_class()
    try:
        reader = reader_class(path, "c")  # copy on write: torch maps nothing that it may not write
        tensors: dict[str, Tensor] = {}
        packings: dict[str, Packing] = {}
        for entry in reader.tensors:
            size = _size(reader, entry)
            if entry.tensor_type.name in PLAIN_TYPES:
                tensors[entry.name] = torch.from_numpy(entry.data).reshape(size)
            elif entry.tensor_type.name == BFLOAT16:
                tensors[entry.name] = torch.from_numpy(entry.data).view(torch.bfloat16).reshape(size)
            else:
                tensors[entry.name] = torch.from_numpy(entry.data)
                packings[entry.name] = Packing(entry.tensor_type, size)
    except Exception as error:  # a reader of damaged bytes may raise anything
        raise ValueError(f"is a damaged or truncated GGUF file ({type(error).__name__})") from error
    for quantization in {packing.quantization for packing in packings.values()}:
        _check_type(quantization)
    return tensors, packings


def _reader_class() -> Any:
    lowest = OPTIONAL["gguf"]
    if reason := refusal("reading a GGUF file needs", {"gguf": lowest}):
        raise ValueError(f"is a GGUF file; {reason}")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            f'is a GGUF file, for which the package gguf is missing; pip install "gguf>={lowest}", or {IN_COMFYUI}'
        ) from error
    return GGUFReader


def _size(reader: Any, entry: Any) -> tuple[int, ...]:
    """Return a tensor's own shape; GGML lists axes from the last."""
    original = reader.get_field(ORIGINAL_SHAPE + entry.name)
    if original is not None:
        return tuple(int(original.parts[index][0]) for index in original.data)
    return tuple(int(length) for length in reversed(entry.shape))


def _check_type(quantization: Any) -> None:
    import numpy
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    block = numpy.zeros((1, GGML_QUANT_SIZES[quantization][1]), dtype=numpy.uint8)
    try:
        dequantize(block, quantization)
    except NotImplementedError as error:
        raise ValueError(
            f"is a GGUF file with weights of type {quantization.name}, which the package gguf does not widen; take one "
            "of another type, such as Q8_0"
        ) from error
