"""Models by name: the bundles that lie in assets/ beside this package, what `download` put into models/ here, or any
file or folder by its path.

A bundle is a folder with model.safetensors (the video model), taehv.safetensors (its autoencoder) and text_encoder/.
Nothing here touches the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import layers
from .catalogue import CATALOGUE, downloaded

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .model import CausalWan
    from .taehv import TAEHV
    from .text import TextEncoder

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MODEL_FILE = "model.safetensors"
TAEHV_FILE = "taehv.safetensors"
TEXT_ENCODER_FOLDER = "text_encoder"


# -------------------------------------------------------------------- names --
def list_bundles() -> list[str]:
    """Names of the bundles at hand, sorted."""
    if not ASSETS.is_dir():
        return []
    parts = (MODEL_FILE, TAEHV_FILE, TEXT_ENCODER_FOLDER)
    return sorted(folder.name for folder in ASSETS.iterdir() if any((folder / part).exists() for part in parts))


def bundle_path(name: str = "tiny") -> Path:
    """Folder of a bundle; raises ValueError naming the bundles there are."""
    if name not in list_bundles():
        raise ValueError(f"there is no bundle {name!r}; {_choices()}")
    return ASSETS / name


def resolve_model(name_or_path: str | Path) -> Path:
    """File of a video model, from a bundle's name or a path; a bundle's name wins over a file of that name."""
    return _resolve(name_or_path, MODEL_FILE)


def resolve_taehv(name_or_path: str | Path) -> Path:
    """File of a tiny video autoencoder, from a bundle's name or a path."""
    return _resolve(name_or_path, TAEHV_FILE)


def resolve_text_encoder(name_or_path: str | Path) -> Path:
    """Folder (in the layout of transformers) or file of a text encoder, from a bundle's name or a path."""
    return _resolve(name_or_path, TEXT_ENCODER_FOLDER)


def _resolve(name_or_path: str | Path, part: str) -> Path:
    is_name = isinstance(name_or_path, str) and name_or_path in list_bundles()
    path = ASSETS / str(name_or_path) / part if is_name else Path(name_or_path).expanduser()
    if str(name_or_path).strip() and os.path.exists(path):  # unlike Path.exists it takes names that no file can have
        return path
    if name_or_path in CATALOGUE:
        return downloaded(str(name_or_path))
    if is_name:
        raise ValueError(f"the bundle {str(name_or_path)!r} has no {part}; {path} is missing")
    raise ValueError(f"{str(name_or_path)!r} is neither a bundle nor a path to something that exists; {_choices()}")


def _choices() -> str:
    names = ", ".join(list_bundles()) or "none"
    return f"bundles: {names}; the path of a file or folder works as well"


# ------------------------------------------------------------------ loading --
def load_model(
    name_or_path: str | Path,
    *,
    operations: Any = layers,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    weights: str = "auto",
) -> tuple[CausalWan, Checkpoint]:
    """A video model ready for a rollout, and the checkpoint it came from (with its causal and step settings).

    The checkpoint's tensors are handed to the model one by one and are gone from it afterwards: no moment holds two
    copies of the weights. dtype defaults to the stored one; `operations` supplies the layers, as for `CausalWan`.
    weights: as for `read_checkpoint`. Raises ValueError for an unknown name, a damaged file, or another kind of model.
    """
    from .checkpoint import read_checkpoint
    from .model import CausalWan

    path = resolve_model(name_or_path)
    checkpoint = read_checkpoint(path, weights=weights)
    _expect_kind(checkpoint, "wan", path)
    return _filled(CausalWan, checkpoint, operations, dtype, device), checkpoint


def load_taehv(
    name_or_path: str | Path,
    *,
    operations: Any = torch.nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[TAEHV, Checkpoint]:
    """A tiny video autoencoder and the checkpoint it came from; arguments and errors as for `load_model`."""
    from .checkpoint import read_checkpoint
    from .taehv import TAEHV

    path = resolve_taehv(name_or_path)
    checkpoint = read_checkpoint(path)
    _expect_kind(checkpoint, "taehv", path)
    return _filled(TAEHV, checkpoint, operations, dtype, device), checkpoint


def check_taehv(
    name_or_path: str | Path,
    *,
    channels: int,
    latent_space: str | None,
    said: str | None = None,
    is_own: bool = False,
    say: str | None = None,
) -> None:
    """Raise ValueError unless a tiny video autoencoder decodes latents of `channels` channels of `latent_space`.

    latent_space: of the model; None, where it is not known, leaves it unchecked. said: what the user says that the file
    decodes. is_own: it lies in the model's bundle, so that it need not say anything. say: the setting for `said`.
    """
    from .checkpoint import read_checkpoint
    from .config import TAEHVConfig
    from .taehv_releases import WAN_UNSCALED, expect_latent_space

    path = resolve_taehv(name_or_path)
    taehv = read_checkpoint(path)
    if not isinstance(taehv.config, TAEHVConfig):
        raise ValueError(f"{path} is a {taehv.kind}, not a TAEHV; choose a file such as taew2_1")
    check_channels(channels, taehv.config.latent_channels, "TAEHV")
    found = WAN_UNSCALED if taehv.latent_space == WAN_UNSCALED else said or taehv.latent_space  # its scaling is its own
    if latent_space is not None and not (is_own and found is None):
        expect_latent_space(found, taehv.config, latent_space, path, say)


def check_channels(channels: int, decoded: int, what: str) -> None:
    """Raise ValueError unless the decoder called `what` takes as many channels as the model makes."""
    if decoded != channels:
        raise ValueError(
            f"the model makes latents of {channels} channels, the {what} decodes {decoded}; "
            f"use the {what} that belongs to the model"
        )


def load_text_encoder(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> TextEncoder:
    """The text encoder of a bundle, of a folder in the layout of transformers, or of an original Wan file."""
    from .text import TextEncoder

    path = resolve_text_encoder(name_or_path)
    load = TextEncoder.from_file if path.is_file() else TextEncoder.from_folder
    return load(path, dtype=dtype, device=device)


def _expect_kind(checkpoint: Checkpoint, kind: str, path: Path) -> None:
    if checkpoint.kind != kind:
        raise ValueError(f"{path} holds a model of kind {checkpoint.kind!r}, but kind {kind!r} is needed here")


def _filled(
    model_class: Any,
    checkpoint: Checkpoint,
    operations: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Any:
    """The network of a checkpoint holding its weights, for inference (no gradients).

    It is laid out on the meta device and then takes over the file's tensors: nothing is initialised in vain, and
    weights that need no conversion stay mapped from the file. The others are converted one at a time, each original
    given up on the way.
    """
    checkpoint.say_notes()
    dtype = dtype or getattr(torch, checkpoint.dtype)
    model = model_class(checkpoint.config, operations=operations, device=torch.device("meta"), dtype=dtype)
    weights = {}
    while checkpoint.state_dict:
        name, tensor = checkpoint.state_dict.popitem()
        weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
