"""Files of tensors: safetensors, torch files, folders of shards; read without executing anything in them.

A torch file is a pickle, and a pickle can carry code: it is only ever read with `weights_only=True`. What a file is
follows from its bytes, never from its name. Tensors are mapped from the file where its format allows, so that reading
costs no memory until they are used.

Trainers put a network below containers (`generator`, `generator_ema`, `module`, `state_dict`), nested or as prefixes of
the names. Of several sets of weights one is read: as trained ("raw") or their average ("ema"). Nothing is guessed:
where two sets of one kind differ, the file is refused.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..shapes import Shape
from . import gguf_files
from .checkpoint_header import LORA, comfyui_header, json_object, one_line
from .keymap import (
    EMA_CONTAINERS,
    LORA_CONTAINERS,
    RAW_CONTAINERS,
    fused_parts,
    prefix_before,
    split_container,
    to_wan,
)
from .scaled import ScaledWeights, Storage, chosen_tensors, split_scales

log = logging.getLogger(__name__)
WEIGHTS = ("auto", "ema", "raw")
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
# A safetensors file is 8 bytes of its header's length, then the header, a JSON object.
SAFETENSORS_MARK = slice(8, 9), b"{"
ZIP_MARK, PICKLE_MARK = b"PK\x03\x04", b"\x80"  # torch's archive since 1.6, and the bare pickle of versions before


@dataclass(frozen=True)
class FileContents:
    """One set of tensors under the names of the file, its header, and which sets there were to choose from."""

    tensors: dict[str, Tensor]  # weights in 8 bits as they are stored
    header: dict[str, str]
    weights: str  # "raw" or "ema"
    available: tuple[str, ...]
    notes: tuple[str, ...] = ()  # lines for the user about what was chosen or left out
    lora: dict[str, Tensor] = field(default_factory=dict)  # what is to be merged into them; then they may be missing
    key_shapes: Mapping[str, Shape] = field(default_factory=dict)  # of all in the file, containers before the names
    scales: Mapping[str, Storage] = field(default_factory=dict)  # of weights that are stored otherwise, by their names


def read_tensors(path: str | Path, *, is_quiet: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors of any supported file or folder under its own names.

    For the networks that are no Wan and no TAEHV. Tensors in 8 bits with scales are float32 products when they are
    asked for. is_quiet: log nothing about what was chosen. Raises ValueError for whatever is no such file.
    """
    path = Path(path)
    try:
        contents = open_contents(path, "auto")
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    for note in () if is_quiet else contents.notes:
        log.warning("%s: %s", path, note)
    return ScaledWeights(contents.tensors, contents.scales) if contents.scales else contents.tensors


def below_prefix(
    tensors: Mapping[str, Tensor], anchors: Iterable[str], path: str | Path, *, is_quiet: bool = False
) -> Mapping[str, Tensor]:
    """Return tensors by the names that they have in their own network, wherever in the file that network stands.

    anchors: names of which the network has one. Without any the tensors come back as they are; what stands beside the
    network is left out, which one line says. Raises ValueError where there are two such networks.
    """
    prefix = prefix_before(tensors, anchors)
    if not prefix:
        return tensors
    inside = [key for key in tensors if key.startswith(prefix)]
    outside = [key for key in tensors if not key.startswith(prefix)]
    if outside and not is_quiet:
        first = outside[0]
        log.warning("%s: read below %r; %d other tensors left out, such as %s", path, prefix, len(outside), first)
    return chosen_tensors(tensors, {key.removeprefix(prefix): key for key in inside})


def open_contents(path: Path, weights: str) -> FileContents:
    """Return one set of weights of a file or folder, under its own names, their scales told apart from them.

    weights: "raw", "ema", or "auto", which takes the average where there is one. Raises ValueError without the file's
    name.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is unknown; use 'auto', 'ema' or 'raw'")
    contents = _open(path, weights)
    if contents.lora and not contents.tensors:
        raise ValueError(
            "holds a LoRA alone; load its base, and it on top: by --lora, or in ComfyUI what convert makes of it"
        )
    if contents.lora and weights == "auto" and len(contents.available) > 1:
        raise ValueError(
            f"holds a LoRA beside raw and averaged weights; say which it is merged into: {_ask('raw', 'ema')}"
        )
    if contents.scales:
        return contents
    tensors, scales = split_scales(contents.tensors, contents.header)
    return replace(contents, tensors=tensors, scales=scales)


def without_fusions(contents: FileContents) -> FileContents:
    """Return a Wan transformer with every fused projection as its parts: views of its rows, of which nothing is copied.

    Raises ValueError for rows that are no equal parts, and where parts lie beside their fusion.
    """
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Storage] = {}
    for key, tensor in contents.tensors.items():
        parts = fused_parts(key) or (key,)
        if tensor.ndim and tensor.shape[0] % len(parts):
            raise ValueError(f"{key} has {tensor.shape[0]} rows, which are not {len(parts)} equal parts; it is damaged")
        for index, part in enumerate(parts):
            if part in tensors or (part != key and part in contents.tensors):
                raise ValueError(f"holds {part} alone and in {key}; keep one of them")
            tensors[part] = tensor.chunk(len(parts))[index] if len(parts) > 1 else tensor
            if key in contents.scales:
                scales[part] = contents.scales[key].part(index, len(parts))
    return replace(contents, tensors=tensors, scales=scales)


def open_lora(path: Path) -> FileContents:
    """Return the LoRA of a file or folder as `FileContents.lora`, under its own names. Raises ValueError as above."""
    contents = _open(path, "auto")
    return contents if contents.lora else replace(contents, tensors={}, lora=contents.tensors)


def _open(path: Path, weights: str) -> FileContents:
    """Return one set of all tensors of a file or folder, read as its first bytes say."""
    try:
        if path.is_dir():
            return _open_folder(path, weights)
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if not start:
        raise ValueError("is empty; download or save it again")
    place, mark = SAFETENSORS_MARK
    if start[place] == mark:
        return _open_safetensors(path, weights)
    if start.startswith((ZIP_MARK, PICKLE_MARK)):
        return _open_torch(path, weights, is_zip=start.startswith(ZIP_MARK))
    if start.lstrip().startswith(b"{"):
        return _open_shards(path, weights)
    if start.startswith(gguf_files.MARK):
        return _open_gguf(path, weights)
    raise ValueError("is neither a safetensors nor a torch file")


# -------------------------------------------------------------- safetensors --
def _open_safetensors(path: Path, weights: str) -> FileContents:
    index = _index_of(path)
    if index is not None:
        return _open_shards(index, weights)
    tensors, header = _read_safetensors(path)
    return _with_shapes(_single_set(tensors, header, weights), tensors)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it has no __iter__
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        # Damaged headers reach torch as sizes and types that it does not know, so that the error may be torch's own.
        raise ValueError(f"is a damaged or truncated safetensors file ({one_line(error)})") from error


def _index_of(path: Path) -> Path | None:
    """Return the index beside a shard, which stands for all of them: ComfyUI's list of models has no JSON files."""
    stem, number, _ = path.name.rpartition("-of-")[0].rpartition("-")
    index = path.parent / f"{stem}.safetensors.index.json"
    return index if number and SHARD.search(path.name) and index.is_file() else None


def _open_gguf(path: Path, weights: str) -> FileContents:
    tensors, packings = gguf_files.read_gguf(path)
    shapes = {name: packings[name].size if name in packings else tuple(each.shape) for name, each in tensors.items()}
    return replace(_one_set(tensors, {}, weights), scales=packings, key_shapes=shapes)


def _open_folder(path: Path, weights: str) -> FileContents:
    """Return a network in a folder: an index of shards, or one file; also below `transformer`."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path  # where a pipeline of diffusers has it
    kinds = (("*.safetensors.index.json", _open_shards), ("*.safetensors", _open_safetensors), ("*.pt", _open))
    for pattern, read in kinds:
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            contents = read(files[0], weights)
            return replace(contents, header=_diffusers_header(folder / "config.json") | contents.header)
        if files:
            raise ValueError(f"is a folder with {len(files)} files {pattern}; give one of them, or their index")
    raise ValueError("is a folder without a safetensors or .pt file; give the checkpoint file")


def _diffusers_header(file: Path) -> dict[str, str]:
    """Return what a model folder's config.json adds to the tensors, as a header entry of ComfyUI's form."""
    if not file.is_file():
        return {}
    heads = json_object(file.read_text(encoding="utf-8", errors="replace")).get("num_attention_heads")
    return {} if heads is None else comfyui_header(heads)


def _open_shards(index: Path, weights: str) -> FileContents:
    """Return the tensors of the safetensors files that an index lists. Names that leave its folder are refused."""
    try:
        files_by_key = json_object(index.read_text(encoding="utf-8")).get("weight_map")
    except UnicodeDecodeError as error:
        raise ValueError("is neither a checkpoint nor an index of one") from error
    is_map = isinstance(files_by_key, dict) and all(isinstance(name, str) for name in files_by_key.values())
    if not is_map or not files_by_key:
        raise ValueError("is a JSON file without a weight_map; give a checkpoint or its index")
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for name in sorted(set(files_by_key.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():  # an index from elsewhere must not reach other folders
            raise ValueError(f"lists {name!r}, which is not beside it; download all shards into one folder")
        shard_tensors, shard_header = _read_safetensors(shard)
        double = next((key for key in shard_tensors if key in tensors), None)
        if double is not None:
            raise ValueError(f"has {double} in two shards; download them again")
        tensors |= shard_tensors
        header |= shard_header
    return _with_shapes(_single_set(tensors, header, weights), tensors)


# -------------------------------------------------------------- torch files --
def _open_torch(path: Path, weights: str, *, is_zip: bool) -> FileContents:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on foreign pickles before it refuses them
            # Only the archive keeps tensors where they can be mapped; torch raises for mmap of a bare pickle.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if code:
            raise ValueError(f"holds code ({code[1]}), which was not executed; use a file of plain tensors") from error
        raise ValueError("is a damaged, truncated or foreign pickle; nothing in it was executed") from error
    except Exception as error:  # an unpickler that is fed damaged bytes may raise anything
        raise ValueError(f"is a damaged or truncated torch file ({type(error).__name__})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not a dictionary of tensors")
    return _with_shapes(_choose_container(loaded, weights), loaded)


# -------------------------------------------------------- sets of weights --
@dataclass(frozen=True)
class _Candidate:
    """One set of weights in a file."""

    place: str  # the path of containers to it, "" for a flat dictionary
    weights: str  # "raw", "ema", or "lora": what is to be merged into one of them
    tensors: dict[str, Tensor]
    left_out: str = ""  # a line about what stands beside it in the same dictionary


def _with_shapes(contents: FileContents, loaded: Mapping[Any, Any]) -> FileContents:
    """Return the contents with the shapes of all that the file holds, chosen or not."""
    return replace(contents, key_shapes=dict(_key_shapes(loaded)))


def _key_shapes(loaded: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Shape]]:
    for key, entry in loaded.items():
        if isinstance(entry, Tensor):
            yield f"{place}{key}", tuple(entry.shape)
        elif isinstance(entry, Mapping):
            yield from _key_shapes(entry, f"{place}{key}.")


def _choose_container(loaded: dict[Any, Any], weights: str) -> FileContents:
    """Return one set of weights of a torch file; a flat dictionary is one set.

    weights: "raw", "ema", or "auto", which takes the average where there is one.
    Raises ValueError for a file without such weights, with several of them, or with something else than tensors.
    """
    candidates = _candidates(loaded)
    if [candidate.place for candidate in candidates] == [""]:
        return _single_set(candidates[0].tensors, {}, weights)
    return _chosen(candidates, {}, weights)


def _single_set(tensors: dict[str, Tensor], header: dict[str, str], weights: str) -> FileContents:
    """Return a flat dictionary as one set of weights, unless its names say that it holds more of them."""
    candidates = _by_prefix(tensors, "", "raw")
    if len(candidates) > 1 or candidates[0].place:
        return _chosen(candidates, header, weights)
    return _one_set(tensors, header, weights)


def _one_set(tensors: dict[str, Tensor], header: dict[str, str], weights: str) -> FileContents:
    if weights == "ema":
        raise ValueError(f"holds one set of weights and does not say that it is an average; {_ask('auto')}")
    return FileContents(tensors, header, "raw", ("raw",))


def _candidates(loaded: dict[Any, Any], place: str = "", weights: str = "raw") -> list[_Candidate]:
    """Return every set of weights below the containers that trainers use, at any depth."""
    candidates: list[_Candidate] = []
    for name in (*EMA_CONTAINERS, *RAW_CONTAINERS):
        if isinstance(loaded.get(name), dict) and loaded[name]:
            candidates += _candidates(loaded[name], f"{place}{name}.", "ema" if name in EMA_CONTAINERS else weights)
    loras = [_lora_candidate(loaded, name, place) for name in LORA_CONTAINERS if loaded.get(name)]
    if candidates:
        return [*candidates, *loras]
    # Beside a LoRA stand the other LoRA and the counters of its training, or the weights themselves.
    if loras:
        loaded = {key: entry for key, entry in loaded.items() if isinstance(entry, Tensor) and entry.ndim}
    return [*loras, *(_by_prefix(_only_tensors(loaded), place, weights) if loaded or not loras else ())]


def _lora_candidate(loaded: dict[Any, Any], name: str, place: str) -> _Candidate:
    tensors = loaded[name]
    if not isinstance(tensors, dict):
        raise ValueError(f"entry {name} is a {type(tensors).__name__}, not a LoRA; no known layout")
    others = [key for key in loaded if "lora" in str(key) and key not in LORA_CONTAINERS]
    left_out = f"{', '.join(others)} left out: only {name} belongs to the network" if others else ""
    return _Candidate(place + name, LORA, _only_tensors(tensors), left_out)


def _by_prefix(tensors: dict[str, Tensor], place: str, weights: str) -> list[_Candidate]:
    """Return the networks of a flat dictionary whose names begin with their containers; else the dictionary itself."""
    sets: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        container, name = split_container(key)
        if container:
            sets.setdefault(container, {})[name] = tensor
        else:
            others.append(key)
    if not sets:
        return [_Candidate(place.rstrip("."), weights, tensors)]
    if others and all(container in LORA_CONTAINERS for container in sets):
        sets[""], others = {key: tensors[key] for key in others}, []  # what the LoRA belongs on
    averages = [names for container, names in sets.items() if container in EMA_CONTAINERS]
    if others and len(averages) == len(sets) and {*map(to_wan, averages[0])} <= {*map(to_wan, others)}:
        # The average stands beside the network itself, whose names have no container, or "model." alone.
        sets["model" if all(key.startswith("model.") for key in others) else "names without a prefix"] = {
            key: tensors[key] for key in others
        }
        others = []
    left_out = f"{len(others)} tensors beside the network are left out, the first is {others[0]}" if others else ""
    kinds: dict[str, str] = {**dict.fromkeys(EMA_CONTAINERS, "ema"), **dict.fromkeys(LORA_CONTAINERS, LORA)}
    return [
        _Candidate((place + container).rstrip("."), kinds.get(container, weights), network, left_out)
        for container, network in sets.items()
    ]


def _chosen(candidates: list[_Candidate], header: dict[str, str], weights: str) -> FileContents:
    """Return the set of the wanted kind; "auto" takes the average and says so. Two of one kind are not chosen from.

    A LoRA beside them comes along: the base alone would run, as another model.
    """
    loras = [candidate for candidate in candidates if candidate.weights == LORA]
    candidates = [candidate for candidate in candidates if candidate.weights != LORA]
    if len(loras) > 1:
        raise ValueError(f"holds more than one LoRA, {' and '.join(lora.place for lora in loras)}; save one of them")
    lora = loras[0].tensors if loras else {}
    remarks = [candidate.left_out for candidate in loras if candidate.left_out]
    if not candidates:
        return FileContents({}, header, "raw", (), tuple(remarks), lora=lora)
    kinds = {candidate.weights for candidate in candidates}
    available = tuple(kind for kind in ("raw", "ema") if kind in kinds)
    kind = available[-1] if weights == "auto" else weights  # the papers' videos are made by the average
    fitting = [candidate for candidate in candidates if candidate.weights == kind]
    if not fitting:
        names = ", ".join(candidate.place for candidate in candidates)
        raise ValueError(f"has no {kind} weights, only {names}; {_ask(available[0])}")
    if any(not _is_same(fitting[0].tensors, candidate.tensors) for candidate in fitting[1:]):
        names = " and ".join(candidate.place for candidate in fitting)
        raise ValueError(f"holds more than one set of {kind} weights, {names}; save the one that is meant alone")
    candidate, notes = fitting[0], remarks
    if weights == "auto" and len(available) > 1:
        other = next(candidate.place for candidate in candidates if candidate.weights != kind)
        notes.append(f"the averaged weights ({candidate.place}) are used; weights 'raw' are the others ({other})")
    if candidate.left_out:
        notes.append(candidate.left_out)
    return FileContents(candidate.tensors, header, kind, available, tuple(notes), lora=lora)


def _ask(*weights: str) -> str:
    """Return how to ask for one of these sets, in the words of the command line and of the widget."""
    return f"use --weights {' or '.join(weights)} (in ComfyUI: weights in Load Model)"


def _is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two containers are two names of the same tensors, as torch.save keeps aliases."""
    return one.keys() == other.keys() and all(one[key].data_ptr() == other[key].data_ptr() for key in one)


def _only_tensors(loaded: dict[Any, Any]) -> dict[str, Tensor]:
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {str(key)[:60]!r} is a {type(value).__name__}, not a tensor; no known layout")
    return loaded
