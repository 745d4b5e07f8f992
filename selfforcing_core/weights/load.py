"""Checkpoints to networks, without ever holding the weights twice.

A checkpoint that was read already (a plan keeps those it read) is made a network by `build_model` and `build_taehv`;
`load_model`, `load_taehv` and `load_text_encoder` begin with a name or a path.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import layers
from ..codecs.taehv import TAEHV
from ..config import TAEHVConfig
from ..model import CausalWan
from .bundles import resolve_model, resolve_taehv, resolve_text_encoder
from .checkpoint import Checkpoint, read_checkpoint
from .latent_space import WAN, WAN_DEVIATION, WAN_MEAN, WAN_UNSCALED, expect_latent_space

if TYPE_CHECKING:
    from ..codecs.text import TextEncoder  # a text encoder needs more than the others; only who loads one imports it

TRIM_EVERY = 1 << 26  # bytes of weights: often enough to bound the peak, seldom enough to take no time


def load_model(
    name_or_path: str | Path,
    *,
    operations: Any = layers,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    weights: str = "auto",
    loras: Sequence[tuple[str | Path, float]] = (),
) -> tuple[CausalWan, Checkpoint]:
    """Return a video model ready for a rollout, and the checkpoint it came from (its causal and step settings).

    weights, loras: as for `read_checkpoint`; the rest as for `build_model`. Raises ValueError for an unknown name, a
    damaged file, or another kind of model.
    """
    path = resolve_model(name_or_path)
    checkpoint = read_checkpoint(path, weights=weights, loras=loras)
    _expect_kind(checkpoint, "wan", path)
    checkpoint.say_notes()
    return build_model(checkpoint, operations=operations, dtype=dtype, device=device), checkpoint


def load_taehv(
    name_or_path: str | Path,
    *,
    operations: Any = torch.nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[TAEHV, Checkpoint]:
    """Return a tiny video autoencoder and the checkpoint it came from; arguments and errors as for `load_model`."""
    path = resolve_taehv(name_or_path)
    checkpoint = read_checkpoint(path)
    _expect_kind(checkpoint, "taehv", path)
    checkpoint.say_notes()
    return build_taehv(checkpoint, operations=operations, dtype=dtype, device=device), checkpoint


def load_text_encoder(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> TextEncoder:
    """Return the text encoder of a bundle, of a folder in the layout of transformers, or of an original Wan file."""
    return build_text_encoder(resolve_text_encoder(name_or_path), dtype=dtype, device=device)


def build_text_encoder(
    path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> TextEncoder:
    """Return the text encoder of a folder or file, which `resolve_text_encoder` gives."""
    from ..codecs.text import TextEncoder

    # Wan's and ComfyUI's encoders are one file; only transformers' own layout is a folder.
    load = TextEncoder.from_file if path.is_file() else TextEncoder.from_folder
    return load(path, dtype=dtype, device=device)


def build_model(
    checkpoint: Checkpoint,
    *,
    operations: Any = layers,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CausalWan:
    """Return the video model of a checkpoint, holding its weights, for inference.

    The checkpoint's tensors are handed to the model one by one and are gone from it afterwards, so that it makes one
    network: no moment holds two copies of the weights. dtype defaults to the stored one; `operations` supplies the
    layers, as for `CausalWan`.
    """
    return _filled(CausalWan, checkpoint, operations, dtype, device)


def build_taehv(
    checkpoint: Checkpoint,
    *,
    operations: Any = torch.nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TAEHV:
    """Return the tiny video autoencoder of a checkpoint, folded, for inference; arguments as for `build_model`.

    It takes and gives normalised latents, also where those of its file are Wan 2.1's without their scaling.
    """
    taehv = _filled(TAEHV, checkpoint, operations, dtype, device)
    if checkpoint.latent_space == WAN_UNSCALED:
        taehv.take_normalised(WAN_MEAN, WAN_DEVIATION)
    return taehv.fold(operations)


# ------------------------------------------------------------------- checks --
def check_taehv(
    path: Path,
    *,
    channels: int,
    latent_space: str | None,
    said: str | None = None,
    is_own: bool = False,
    say: str | None = None,
) -> Checkpoint:
    """Return the checkpoint of a tiny video autoencoder that decodes latents of `channels` channels of `latent_space`.

    latent_space: of the model; None, where it is not known, leaves it unchecked. said: what the user says that the file
    decodes. is_own: it lies in the model's bundle, so that it need not say anything. say: the setting for `said`.
    Raises ValueError for any other file.
    """
    taehv = read_checkpoint(path)
    if not isinstance(taehv.config, TAEHVConfig):
        raise ValueError(f"{path} is a {taehv.kind}, not a TAEHV; choose a file such as taew2_1")
    # A file that is known to be unscaled stays so, whatever the user said of it; it is scaled when it is built.
    decoded = WAN if taehv.latent_space == WAN_UNSCALED else said or taehv.latent_space
    if None not in (decoded, latent_space):  # first, since the space says more than a number of channels
        expect_latent_space(decoded, taehv.config, str(latent_space), path, say)
    check_channels(channels, taehv.config.latent_channels, "TAEHV", path)
    if latent_space is not None and decoded is None and not is_own:
        expect_latent_space(None, taehv.config, latent_space, path, say)
    return taehv


def check_channels(channels: int, decoded: int, what: str, path: str | Path) -> None:
    """Raise ValueError unless the decoder called `what` takes as many channels as the model makes."""
    if decoded != channels:
        raise ValueError(
            f"{path}: the model makes latents of {channels} channels, this {what} decodes {decoded}; "
            f"use the {what} that belongs to the model"
        )


def _expect_kind(checkpoint: Checkpoint, kind: str, path: Path) -> None:
    if checkpoint.kind != kind:
        raise ValueError(f"{path} holds a model of kind {checkpoint.kind!r}, but kind {kind!r} is needed here")


def _filled(
    network_class: Any,
    checkpoint: Checkpoint,
    operations: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Any:
    """Return the network of a checkpoint holding its weights, without gradients.

    It is laid out on the meta device and then takes over the file's tensors: nothing is initialised in vain, and
    weights that need no conversion stay mapped from the file. The others are converted one at a time, each original
    given up on the way, and what the allocator keeps of it is given back.
    """
    dtype = dtype or getattr(torch, checkpoint.dtype)
    network = network_class(checkpoint.config, operations=operations, device=torch.device("meta"), dtype=dtype)
    weights, passed_bytes = {}, 0
    # Taken out one by one: an original that was converted is freed before the next is read.
    while checkpoint.state_dict:
        name, tensor = checkpoint.state_dict.popitem()
        weights[name] = tensor.to(device=device, dtype=dtype)
        passed_bytes += tensor.nbytes
        del tensor
        if passed_bytes > TRIM_EVERY or not checkpoint.state_dict:
            _give_back_freed_memory()
            passed_bytes = 0
    # assign: the tensors themselves become the parameters; copies would read the whole file, and hold it twice.
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def _give_back_freed_memory() -> None:
    """Let the C library return what was freed to the system, where it can (glibc).

    What weights pass through on their way lies between those that stay, where glibc keeps it: with a LoRA, two fifths
    of the network's size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
