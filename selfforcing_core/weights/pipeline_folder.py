"""What a folder in diffusers' layout says beside the networks in it: a second one, when it is asked, and the shift."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .checkpoint_header import json_object

HIGH_NOISE_FOLDER = "transformer"  # or that of the only network
LOW_NOISE_FOLDER = "transformer_2"
# Keys of a value, and where they stand: WanPipeline's own, and those of the schedulers it is saved with.
BOUNDARY_KEYS = ("boundary_ratio",)
SHIFT_KEYS = ("flow_shift", "shift")  # UniPC's and the Euler schedulers'


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder says; None where it says nothing."""

    low_noise: Path | None = None  # the folder of the network for low noise, beside that for high noise
    high_noise: Path | None = None  # the folder of the network for high noise, where the path is that for low noise
    boundary: float | None = None  # share of noise from which on the other one is asked
    shift: float | None = None  # of the steps
    pipeline: str | None = None  # the class that it is of

    @property
    def has_two(self) -> bool:
        """Return whether two networks lie in it."""
        return self.low_noise is not None or self.high_noise is not None

    @property
    def says(self) -> tuple[str, ...]:
        """Return which settings it says."""
        return tuple(name for name in ("boundary", "shift") if getattr(self, name) is not None)


def read_pipeline(path: Path) -> PipelineFolder:
    """Return what the folder says that a checkpoint is, or in which it lies as one of its networks.

    Nothing for any other file. Raises ValueError for a damaged entry.
    """
    network = _network_folder(path)
    if network is None:
        return PipelineFolder()
    root, is_low = network.parent, network.name == LOW_NOISE_FOLDER
    other = root / (HIGH_NOISE_FOLDER if is_low else LOW_NOISE_FOLDER)
    return PipelineFolder(
        other if other.is_dir() and not is_low else None,
        other if other.is_dir() and is_low else None,
        _number(root / "model_index.json", BOUNDARY_KEYS),
        _number(root / "scheduler" / "scheduler_config.json", SHIFT_KEYS),
        _class_name(root / "model_index.json"),
    )


def inspect_pipeline(path: Path) -> dict[str, Any] | None:
    """Return what `read_pipeline` reads in plain JSON types; None where it reads nothing."""
    folder = read_pipeline(path)
    values = {item.name: getattr(folder, item.name) for item in fields(folder)}
    entry = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return entry if folder != PipelineFolder() else None


def _network_folder(path: Path) -> Path | None:
    """Return the folder of the network that a path means: a pipeline's, that network's, or a file in it."""
    if (path / HIGH_NOISE_FOLDER).is_dir():
        return path / HIGH_NOISE_FOLDER
    networks = (each for each in (path, path.absolute().parent) if each.name in (HIGH_NOISE_FOLDER, LOW_NOISE_FOLDER))
    # A folder of that name alone is somebody's own; diffusers writes the index beside it.
    return next((each for each in networks if (each.parent / "model_index.json").is_file()), None)


def _number(file: Path, keys: tuple[str, ...]) -> float | None:
    """Return the first of these entries that a JSON file has."""
    entries = _entries(file)
    key = next((key for key in keys if entries.get(key) is not None), None)
    if key is None:
        return None
    if type(entries[key]) not in (int, float):  # bool is a subclass of int
        raise ValueError(f"{file}: {key} is {entries[key]!r}, not a number; download it again")
    return float(entries[key])


def _class_name(file: Path) -> str | None:
    name = _entries(file).get("_class_name")
    return None if name is None else str(name)


def _entries(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is none."""
    try:
        return json_object(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"{file}: cannot be read ({error}); download it again") from error
