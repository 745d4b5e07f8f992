"""A configuration of the reference as its files hold it: read, and asked key by key.

The reference means Self-Forcing, and what shares its keys: Self-Forcing-Plus after it, CausVid before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

Settings = dict[str, Any]

SMALL, LARGE = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
# Folders below the reference's wan_models/, and where our `download` command puts the same weights.
RELEASED = {
    "wan2.1-t2v-1.3b": "models/wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b": "models/wan2.1-t2v-14b",
    "wan2.1-i2v-14b-480p": "models/wan2.1-i2v-14b",
}
# CausVid names a class of its code where the reference names a folder; all of them load the 1.3B model.
CLASSES = ("wan", "causal_wan", "wandiffusionwrapper", "causalwanmodel", "wanmodel")


def read_config(*files: Path) -> Settings:
    """Merge YAML files, later over earlier ones, and fill in what keys take from each other.

    Raises ValueError for a file that is no mapping, and whatever OmegaConf raises for one that is no YAML.
    """
    # OmegaConf, as in the reference, since its files may say ${other_key}. Our own settings are read letter for letter.
    merged = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files)), resolve=True)
    if not isinstance(merged, dict):
        raise ValueError("is no mapping of settings")
    return {str(key): value for key, value in merged.items()}


class ReferenceConfig:
    """The keys of a configuration; whoever translates one takes it, so that what nobody took is known at the end."""

    def __init__(self, values: Settings) -> None:
        self.values = values
        # An empty key of YAML is None; the reference then falls back on its default, as if the key were not there.
        self.untaken = {key for key, value in values.items() if value is not None}
        self.missing: list[str] = []  # keys that have no default in the reference and stand in no file

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def take(self, key: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
        """Return the value as `kind` makes it, or the default. Raises ValueError naming key and value."""
        self.untaken.discard(key)
        if key not in self:
            return default
        value = self.values[key]
        try:
            return kind(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {value!r} cannot be translated ({error})") from error

    def need(self, key: str, kind: Callable[[Any], Any]) -> Any:
        """Take a key for which the reference has no default; one that is missing is None, and remembered."""
        if key not in self:
            self.missing.append(key)
        return self.take(key, kind)


# Python's own bool(), float() and str() take too much: bool("no") is true, and float(True) is 1.
def as_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def as_number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("is no number")
    return float(value)


def as_count(value: Any) -> int:
    if as_number(value) != int(value):
        raise ValueError("is no whole number")
    return int(value)


def as_numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        raise ValueError("is no list")
    return [as_number(value) for value in values]


def as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


def network_file(name: str) -> str:
    """Find the file behind a network's name: a folder below wan_models/, which forks also write as a path."""
    if name.lower() in CLASSES:
        name = SMALL
    if name.lower() in RELEASED:
        return RELEASED[name.lower()]
    below = Path("wan_models") / name
    return str(below) if "/" not in name and below.exists() else name


def size_of_name(name: str) -> str:
    """Return the preset that a network's name tells; empty: none."""
    lower = name.lower()
    if lower in CLASSES or "1.3b" in lower:
        return "t2v-1.3b"
    is_large = re.search(r"(?<![a-z0-9.])14b", lower)  # a word of its own, not the end of A14B, Wan 2.2's size
    return next((f"{kind}-14b" for kind in ("t2v", "i2v") if is_large and kind in lower), "")
