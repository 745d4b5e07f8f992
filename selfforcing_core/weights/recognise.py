"""Which release a file is: by its header, by the names and shapes in it with the file's own name, by its bytes.

All networks of one size look alike, so that often several releases fit. Then all of them are returned, and the caller
asks; nothing is chosen here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePath

from ..shapes import Shapes
from .checkpoint_header import PRESET_ENTRY, read_entries
from .keymap import CONTAINERS, bare_names
from .presets import NO_WEIGHTS, PRESETS, Preset, Sizes, find_preset
from .variants import variant_among

FSDP_INFIX = "_fsdp_wrapped_module."
# Names that many files and folders have which are no such release; they count only beside one that is its own.
COMMON_NAMES = ("*", "model.pt", "base.pt", "lora.pt", "ema_model.pt", "models", "transformer", "transformer_2")
FINGERPRINT_BYTES = 1 << 20
# fingerprint -> preset. It holds only files that were at hand when the line was written, and none was yet.
FINGERPRINTS: dict[str, str] = {}


@dataclass(frozen=True)
class Recognition:
    """The releases that a file may be, and by what they were recognised."""

    presets: tuple[Preset, ...]  # none where nothing fits; several where the user has to say which
    by: str | None = None  # "header", "file name", "names and shapes" or "fingerprint"

    @property
    def preset(self) -> Preset | None:
        """Return the release if it is certain: the only one that fits, and by more than shapes that others may have."""
        return self.presets[0] if len(self.presets) == 1 and self.by != "names and shapes" else None


def recognise(shapes: Shapes, path: str | Path, header: Mapping[str, str] | None = None) -> Recognition:
    """Return which releases a file may be.

    shapes: of everything in the file under its own names, containers before them ("generator.model.head.head.bias").
    path: its name and folders are looked at, and its bytes only where names decide nothing.
    header: of a safetensors file. Raises ValueError where it names a preset that there is not.
    """
    name = read_entries(header or {}).get(PRESET_ENTRY)
    if name is not None:
        return Recognition((find_preset(str(name)),), "header")
    network = _network(shapes)
    fitting = [preset for preset in PRESETS.values() if _may_be(preset, network)]
    if not fitting:
        return Recognition(())
    named = _named(fitting, PurePath(path))
    candidates = _as_released(named, shapes) if named else fitting
    if named and len(candidates) == 1:
        return Recognition(tuple(candidates), "file name")
    known = FINGERPRINTS.get(fingerprint(path) or "") if FINGERPRINTS else None
    if known is not None:
        return Recognition((find_preset(known),), "fingerprint")
    return Recognition(tuple(candidates), "file name" if named else "names and shapes")


def fits_release(preset: Preset, shapes: Shapes) -> bool:
    """Return whether the names and shapes in a file are those that a release has."""
    return _may_be(preset, _network(shapes))


def fingerprint(path: str | Path) -> str | None:
    """Return a name for the bytes of a file: its size and the SHA-256 of its first MiB. None where there is no file."""
    path = Path(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return f"{path.stat().st_size}:{hashlib.sha256(file.read(FINGERPRINT_BYTES)).hexdigest()}"


# ------------------------------------------------------- names and shapes --
@dataclass(frozen=True)
class _Network:
    """What the names and shapes in a file show."""

    sizes: Sizes | None  # None where the file holds no whole network
    names: tuple[str, ...]  # Wan's own
    variant: str | None  # a network of another kind, which holds all that a plain one does
    lora_width: int | None  # of the network that a LoRA in the file belongs to


def _network(shapes: Shapes) -> _Network:
    wan_shapes = dict(zip(bare_names(shapes), map(tuple, shapes.values())))  # of two sets of weights one
    downs = (shape for key, shape in shapes.items() if "self_attn.q.lora_A" in key and len(shape) == 2)
    lora_width = next((shape[1] for shape in downs), None)
    return _Network(_sizes(wan_shapes), tuple(wan_shapes), variant_among(wan_shapes), lora_width)


def _sizes(shapes: Shapes) -> Sizes | None:
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    feed_forward = shapes.get("blocks.0.ffn.0.weight", ())
    if len(patch) != 5 or len(head) != 2 or len(feed_forward) != 2:
        return None
    return Sizes(
        dim=patch[0],
        ffn_dim=feed_forward[0],
        num_heads=0,  # shapes do not show it
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        in_dim=patch[1],
        out_dim=head[0] // math.prod(patch[2:]),
        has_image_features=any(name.startswith("img_emb.") for name in shapes),
    )


def _may_be(preset: Preset, network: _Network) -> bool:
    """Return whether a file with this network, or with a LoRA for it, can be the release at all."""
    if preset.unsupported == NO_WEIGHTS or (network.lora_width is not None and preset.lora is None):
        return False
    sizes = preset.sizes
    if network.sizes is None:
        return sizes is not None and sizes.dim == network.lora_width
    if not preset.signs and network.variant is not None:
        return False
    if not all(any(sign in name for name in network.names) for sign in preset.signs):
        return False
    if sizes is None:
        return bool(preset.signs)  # where sizes were not read, what only such networks have is enough
    read = replace(
        network.sizes,
        num_heads=sizes.num_heads,
        ffn_dim=network.sizes.ffn_dim if sizes.ffn_dim else None,
        has_image_features=None if sizes.has_image_features is None else network.sizes.has_image_features,
    )
    return read == sizes


def _as_released(presets: list[Preset], shapes: Shapes) -> list[Preset]:
    """Return those whose released file has the containers of this one; all where that tells nothing.

    Somebody's copy without containers can come from any of them.
    """
    containers = containers_in(shapes)
    if not containers:
        return presets
    has_infix = any(FSDP_INFIX in key for key in shapes)
    fitting = [each for each in presets if set(each.containers) <= containers and each.has_fsdp_infix == has_infix]
    return fitting or presets


def containers_in(shapes: Shapes) -> set[str]:
    """Return the containers that a file has sets of weights in; none for a file of names alone."""
    return {part for key in shapes for part in _containers_of(key)}


def _containers_of(key: str) -> Iterator[str]:
    """Yield the containers before a name; "model." alone is what Self Forcing leaves in every name, and none."""
    for part in key.split("."):
        if part not in CONTAINERS:
            return
        if part not in ("model", "module"):
            yield part


# -------------------------------------------------------------- file names --
NAME_AND_REPOSITORY = 2  # how far a file's name alone agrees in its repository; its folders there agree further


def _named(presets: list[Preset], path: PurePath) -> list[Preset]:
    """Return the releases that the path names best, with folders where they lie in them; none where it names none."""
    agreements = [_agreement(preset, path) for preset in presets]
    for index, preset in enumerate(presets):
        if not preset.files and preset.repository:  # its name was not read: it may be that of another one there
            siblings = [each for each, other in zip(agreements, presets) if other.repository == preset.repository]
            agreements[index] = min(max(siblings), NAME_AND_REPOSITORY)
    best = max(agreements, default=0)
    return [preset for preset, agreement in zip(presets, agreements) if agreement == best > 0]


def _agreement(preset: Preset, path: PurePath) -> int:
    """Return how many parts at the end of a path are those of a file of the release, its repository as one more.

    The repository alone is no agreement: cloned code has its name too, with other networks in it.
    """
    repository = (preset.repository or "").rpartition("/")[2].lower()
    in_repository = bool(repository) and repository in (part.lower() for part in path.parts)
    best = 0
    for file in (*preset.files, *preset.partner_files):
        equal = _equal_ends(PurePath(file), path)
        if in_repository or any(part not in COMMON_NAMES for part in equal):
            best = max(best, len(equal))
    return best + in_repository if best else 0


def _equal_ends(pattern: PurePath, path: PurePath) -> list[str]:
    """Return the parts of a pattern that the end of a path fits, last first."""
    equal: list[str] = []
    for expected, part in zip(reversed(pattern.parts), reversed(path.parts)):
        if not fnmatch(part.lower(), expected.lower()):
            break
        equal.append(expected)
    return equal
