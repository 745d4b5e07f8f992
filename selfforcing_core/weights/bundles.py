"""Models by name: the bundles that lie in assets/ beside this package, what `download` put into models/ here, or any
file or folder by its path.

A bundle is a folder with model.safetensors (the video model), taehv.safetensors (its autoencoder) and text_encoder/.
Nothing here touches the network.
"""

from __future__ import annotations

import os
from pathlib import Path

from .download import RELEASES, downloaded_path
from .presets import PRESETS

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODEL_FILE = "model.safetensors"
TAEHV_FILE = "taehv.safetensors"
TEXT_ENCODER_FOLDER = "text_encoder"
# A folder in assets/ with none of them is no bundle, whatever else lies there.
PARTS = (MODEL_FILE, TAEHV_FILE, TEXT_ENCODER_FOLDER)


# -------------------------------------------------------------------- names --
def list_bundles() -> list[str]:
    """Return the names of the bundles at hand, sorted."""
    if not ASSETS.is_dir():
        return []
    return sorted(name for name in os.listdir(ASSETS) if is_bundle(name))


def is_bundle(name: str | Path) -> bool:
    """Return whether this is the name of a bundle at hand. A path is none, even that of a bundle's folder."""
    # Looked up in the listing, not joined, so that "../x" is no name.
    if not isinstance(name, str) or not ASSETS.is_dir() or name not in os.listdir(ASSETS):
        return False
    return any((ASSETS / name / part).exists() for part in PARTS)


def bundle_path(name: str = "tiny") -> Path:
    """Return the folder of a bundle. Raises ValueError naming the bundles there are."""
    if not is_bundle(name):
        raise ValueError(f"there is no bundle {name!r}; {_choices()}")
    return ASSETS / name


def resolve_model(name_or_path: str | Path) -> Path:
    """Return the file of a video model, from a bundle's name, which wins over a file of that name, or a path."""
    return _resolve(name_or_path, MODEL_FILE)


def resolve_taehv(name_or_path: str | Path) -> Path:
    """Return the file of a tiny video autoencoder, from a bundle's name or a path."""
    return _resolve(name_or_path, TAEHV_FILE)


def resolve_text_encoder(name_or_path: str | Path) -> Path:
    """Return the folder (in the layout of transformers) or file of a text encoder, from a bundle's name or a path."""
    return _resolve(name_or_path, TEXT_ENCODER_FOLDER)


def _resolve(name_or_path: str | Path, part: str) -> Path:
    is_name = is_bundle(name_or_path)
    path = ASSETS / str(name_or_path) / part if is_name else Path(name_or_path).expanduser()
    if str(name_or_path).strip() and os.path.exists(path):  # unlike Path.exists it takes names that no file can have
        return path
    # A file of that name was looked for first: what lies on this disk wins over what could be fetched.
    if name_or_path in RELEASES or name_or_path in PRESETS:
        return downloaded_path(str(name_or_path))
    if is_name:
        raise ValueError(f"the bundle {str(name_or_path)!r} has no {part}; {path} is missing")
    raise ValueError(f"{str(name_or_path)!r} is neither a bundle nor a path to something that exists; {_choices()}")


def _choices() -> str:
    names = ", ".join(list_bundles()) or "none"
    return f"bundles: {names}; the path of a file or folder works as well"
