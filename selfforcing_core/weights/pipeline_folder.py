"""What a folder in diffusers' layout says beside the networks in it: a second one, when it is asked, and the shift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_header import json_object

LOW_NOISE_FOLDER = "transformer_2"  # beside `transformer`, which is then the network for high noise
# Keys of a value, and where they stand: WanPipeline's own, and those of the schedulers it is saved with.
BOUNDARY_KEYS = ("boundary_ratio",)
SHIFT_KEYS = ("flow_shift", "shift")  # UniPC's and the Euler schedulers'


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder says; None where it says nothing."""

    low_noise: Path | None = None  # the folder of the network for low noise
    boundary: float | None = None  # share of noise from which on the other one is asked
    shift: float | None = None  # of the steps


def read_pipeline(path: Path) -> PipelineFolder:
    """Return what a checkpoint's folder says; nothing for a file. Raises ValueError for a damaged entry."""
    if not (path / "transformer").is_dir():
        return PipelineFolder()
    low_noise = path / LOW_NOISE_FOLDER
    return PipelineFolder(
        low_noise if low_noise.is_dir() else None,
        _number(path / "model_index.json", BOUNDARY_KEYS),
        _number(path / "scheduler" / "scheduler_config.json", SHIFT_KEYS),
    )


def _number(file: Path, keys: tuple[str, ...]) -> float | None:
    """Return the first of these entries that a JSON file has."""
    try:
        entries: dict[str, Any] = json_object(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"{file}: cannot be read ({error}); download it again") from error
    key = next((key for key in keys if entries.get(key) is not None), None)
    if key is None:
        return None
    if type(entries[key]) not in (int, float):  # bool is a subclass of int
        raise ValueError(f"{file}: {key} is {entries[key]!r}, not a number; download it again")
    return float(entries[key])
