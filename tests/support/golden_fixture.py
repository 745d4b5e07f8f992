"""Recorded numbers of the reference implementations: reading a file, drawing its weights, comparing.

Files are those of the folder SELFFORCING_GOLDEN, else of tests/golden. Everything, sizes included, is in the files.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from selfforcing_core.config import WanConfig
from selfforcing_core.model import CausalWan

FOLDER = Path(os.environ.get("SELFFORCING_GOLDEN") or Path(__file__).parents[1] / "golden")


def _load_weight_rule() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_weights", FOLDER / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GivenNoise:
    """Recorded noise: a mapping from (start_frame, step) to a tensor [B, T, C, H, W]."""

    def __init__(self, draws: Mapping[tuple[int, int], Tensor]) -> None:
        self.draws = draws

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        noise = self.draws[start_frame, step]
        assert tuple(noise.shape) == tuple(shape), f"recorded noise {tuple(noise.shape)}, wanted {tuple(shape)}"
        return noise


@dataclass
class Fixture:
    """One file; `check` compares with its tolerance and counts."""

    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    checked: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def check(self, name: str, actual: Tensor, **tolerance: float) -> None:
        limits = {key: tolerance[key] if key in tolerance else self.meta["tolerance"][key] for key in ("atol", "rtol")}
        torch.testing.assert_close(
            actual.to(self.tensors[name]), self.tensors[name], **limits, msg=lambda text: f"{self.name} {name}: {text}"
        )
        self.checked.add(name)

    def draw(self, shapes: dict[str, Any]) -> dict[str, Tensor]:
        rule, seed, gain = _load_weight_rule(), self.meta["weight_seed"], self.meta.get("weight_gain", 1.0)
        return {name: torch.from_numpy(rule.draw(name, tuple(shape), seed, gain)) for name, shape in shapes.items()}

    def wan(self) -> CausalWan:
        sizes = {key: value for key, value in self.meta["model"].items() if key in WanConfig.__dataclass_fields__}
        model = CausalWan(WanConfig.from_dict(sizes))
        model.load_state_dict(self.draw({name: p.shape for name, p in model.state_dict().items()}))
        return model


def read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["golden"])


def read_fixture(path: Path) -> Fixture:
    with safe_open(path, "pt") as file:
        return Fixture(path.stem, read_metadata(path), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
