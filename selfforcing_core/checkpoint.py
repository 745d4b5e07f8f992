"""Checkpoint files: reading what others saved, refusing the rest with one clear line, and saving our own.

Read: our safetensors (config in the header), safetensors with bare or prefixed Wan names, in 8 bits with scales too,
torch files of Self Forcing (`generator_ema`, `generator`), of DeepSpeed, Lightning and other trainers (`module`,
`state_dict`, `ema`), and of TAEHV, folders of shards with their index, as diffusers writes them. A torch file is a
pickle, and a pickle can carry code: it is only ever read with `weights_only=True`, so nothing in a file is executed.
What a file is follows from its bytes, its header and the shapes of its tensors, never from its name.

Header of our safetensors files: "selfforcing" = JSON {"format": 1, "kind", "config", "causal", "steps",
"latent_space"}; for Wan also "config" = JSON {"transformer": {...}}, which ComfyUI merges into its own detection.
Format 2 adds "bidirectional" and "guidance". It is written only where one of them has something to say, so that older
versions go on reading all other files and refuse those that they would sample wrongly. A LoRA of our trainer has a
header of kind "lora" with "base" and the same settings.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import replacing
from .config import BidirectionalConfig, CausalConfig, StepConfig, TAEHVConfig, WanConfig
from .keymap import (
    EMA_CONTAINERS,
    LORA_CONTAINERS,
    RAW_CONTAINERS,
    describe_dialect,
    from_wan,
    is_stray,
    prefix_before,
    split_container,
    wan_names,
)
from .layout import Shape, mismatch, taehv_config, taehv_shapes, wan_config, wan_shapes
from .scaled import QUANTIZATION_ENTRY, ScaledWeights, chosen_tensors, split_scales, stored_tensors
from .taehv_releases import WAN, latent_space
from .variants import not_supported, variant_among

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # to store and compute in
HEADER_KEY = "selfforcing"
HEADER_FORMAT = 1
HEADER_FORMATS = (HEADER_FORMAT, 2)
HOST_HEADER_KEY = "config"
LORA = "lora"
UMT5_XXL_DIM = 4096  # width of the text embeddings of every released Wan model

# What people most often mistake for a model file of ours, by a part of a parameter's name.
FOREIGN_SIGNS = {
    "lora_": "a LoRA; load it on top of a model",
    ".lora": "a LoRA; load it on top of a model",
    "decoder.upsamples.": "the Wan VAE; a TAEHV is needed here",
    "token_embedding.": "a UMT5 text encoder",
    "encoder.block.": "a text encoder",
    "visual.": "a CLIP model",
    "decoder.1.conv.0.": "a TAEHV with the larger 'super' decoder, which is not supported; use the ordinary one",
    "double_blocks.": "a transformer of another family",
    "transformer_blocks.": "a transformer of another family",
}


@dataclass(frozen=True)
class Checkpoint:
    """One network of a file, under its original parameter names.

    kind: "wan" or "taehv". dtype: the type most numbers have, such as "bfloat16", which is also what weights in 8 bits
    with scales are to become. weights: "raw" or "ema". causal, bidirectional, steps: how the model wants to be run,
    None where the file does not say; it is never both causal and bidirectional. guidance: scale that it is sampled
    with, None where the file does not say (distilled models take 1). latent_space: of the VAE that the network goes
    with ("wan2.1"), None where that is not known. notes: lines for the user about what of the file was chosen, left
    out or is widened; whoever uses the weights says them (`say_notes`). The tensors of `state_dict` are mapped from
    the file where its format allows, so that reading costs no memory until they are used; scaled ones are multiplied
    then, in float32.
    """

    kind: str
    state_dict: MutableMapping[str, Tensor]
    config: WanConfig | TAEHVConfig
    causal: CausalConfig | None
    steps: StepConfig | None
    dialect: str
    dtype: str
    weights: str
    metadata: dict[str, str]
    latent_space: str | None = None
    bidirectional: BidirectionalConfig | None = None
    guidance: float | None = None
    notes: tuple[str, ...] = ()

    def say_notes(self) -> None:
        for note in self.notes:
            log.warning("%s", note)


@dataclass(frozen=True)
class _Contents:
    """One set of tensors under the names of the file, its header, and which sets there were to choose from."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    weights: str
    available: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """One set of weights in a torch file: the path of containers to it, and whether it is an average."""

    place: str
    weights: str
    tensors: dict[str, Tensor]
    left_out: str = ""  # a line about what stands beside it in the same dictionary


def read_checkpoint(path: str | Path, *, weights: str = "auto") -> Checkpoint:
    """Read a Wan transformer or a TAEHV from any supported file.

    weights: "ema" or "raw" choose between the averaged and the last weights of a training file, "auto" takes the
    averaged ones where they exist. Raises ValueError, one line, for whatever is not such a file.
    """
    path = Path(path)
    try:
        return _understand(_open(path, weights), path)
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error


def read_tensors(path: str | Path, *, is_quiet: bool = False) -> Mapping[str, Tensor]:
    """Tensors of any supported file or folder under its own names, for networks that are no Wan and no TAEHV.

    Those in 8 bits with scales are float32 products when they are asked for. is_quiet: log nothing about what was
    chosen. Raises ValueError as `read_checkpoint` does.
    """
    path = Path(path)
    try:
        contents = _open(path, "auto")
        weights, scales = split_scales(contents.tensors, contents.header)
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    for note in () if is_quiet else contents.notes:
        log.warning("%s: %s", path, note)
    return ScaledWeights(weights, scales) if scales else weights


def below_prefix(
    tensors: Mapping[str, Tensor], anchors: Iterable[str], path: str | Path, *, is_quiet: bool = False
) -> Mapping[str, Tensor]:
    """Tensors by the names that they have in their own network, wherever in the file that network stands.

    anchors: names of which the network has one. Without any the tensors come back as they are; what stands beside the
    network is left out, which one line says. Raises ValueError where two networks are found.
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


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, in plain JSON types, without reading its weights. Raises as `read_checkpoint` does."""
    path = Path(path)
    try:
        contents = _open(path, "auto")
        checkpoint = _understand(contents, path)
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    stored = stored_tensors(checkpoint.state_dict)
    return {
        "file": str(path),
        "weight_bytes": sum(tensor.nbytes for tensor in stored.values()),
        "kind": checkpoint.kind,
        "dialect": checkpoint.dialect,
        "config": checkpoint.config.to_dict(),
        "dtype": _most_common(stored),
        "tensors": len(stored),
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "weights": list(contents.available),
        "latent_space": checkpoint.latent_space,
        "causal": checkpoint.causal.to_dict() if checkpoint.causal else None,
        "bidirectional": checkpoint.bidirectional.to_dict() if checkpoint.bidirectional else None,
        "steps": checkpoint.steps.to_dict() if checkpoint.steps else None,
        "guidance": checkpoint.guidance,
        "notes": list(checkpoint.notes),
    }


def save_checkpoint(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    config: WanConfig | TAEHVConfig,
    metadata: Mapping[str, str] | None = None,
    *,
    causal: CausalConfig | None = None,
    steps: StepConfig | None = None,
    latent_space: str | None = None,
    bidirectional: BidirectionalConfig | None = None,
    guidance: float | None = None,
    dialect: str = "wan",
    overwrite: bool = True,
) -> None:
    """Save a network as safetensors with everything needed to run it in the header.

    state_dict: original parameter names, all that `config` asks for and no other. metadata: free text entries for the
    header. dialect: the names to write (keymap.DIALECTS). An existing file is replaced once the new one is complete;
    nothing is left behind on failure.
    Raises ValueError when names or shapes do not fit the config, or when the path cannot be written.
    """
    expected = wan_shapes(config) if isinstance(config, WanConfig) else taehv_shapes(config)
    problem = mismatch(expected, {name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    if problem:
        raise ValueError(f"{path}: not saved, {problem}")
    header = file_header(config, causal, steps, latent_space, bidirectional, guidance)
    clash = sorted(set(header) & set(metadata or {}))
    if clash:
        raise ValueError(f"{path}: not saved, the header entries {', '.join(clash)} are written from the config")
    tensors = {from_wan(name, dialect): state_dict[name].detach().contiguous() for name in expected}
    with replacing(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, {**(metadata or {}), **header})


def file_header(
    config: WanConfig | TAEHVConfig,
    causal: CausalConfig | None,
    steps: StepConfig | None,
    latent_space: str | None,
    bidirectional: BidirectionalConfig | None = None,
    guidance: float | None = None,
) -> dict[str, str]:
    """Return the metadata by which this project and ComfyUI recognise a network."""
    is_wan = isinstance(config, WanConfig)
    settings = _settings_entries(causal, steps, latent_space, bidirectional, guidance)
    ours = {"kind": "wan" if is_wan else "taehv", "config": config.to_dict(), **settings}
    header = {HEADER_KEY: json.dumps(ours)}
    if is_wan:
        sizes = {name: getattr(config, name) for name in ("num_heads", "text_dim", "freq_dim", "text_len")}
        header[HOST_HEADER_KEY] = json.dumps({"transformer": {"causal_ar": causal is not None, **sizes}})
    return header


def lora_header(
    base: str,
    causal: CausalConfig | None,
    steps: StepConfig | None,
    bidirectional: BidirectionalConfig | None = None,
    guidance: float | None = None,
) -> dict[str, str]:
    """Return the metadata of a LoRA: the network it belongs on, and how the two together are sampled."""
    settings = _settings_entries(causal, steps, None, bidirectional, guidance)
    return {HEADER_KEY: json.dumps({"kind": LORA, "base": base, **settings})}


def _settings_entries(
    causal: CausalConfig | None,
    steps: StepConfig | None,
    latent_space: str | None,
    bidirectional: BidirectionalConfig | None,
    guidance: float | None,
) -> dict[str, Any]:
    assert causal is None or bidirectional is None, "a network is causal or bidirectional, not both"
    entries: dict[str, Any] = {
        "format": HEADER_FORMAT,
        "causal": causal.to_dict() if causal else None,
        "steps": steps.to_dict() if steps else None,
        "latent_space": latent_space,
    }
    if bidirectional is not None or guidance is not None:
        named = bidirectional.to_dict() if bidirectional else None
        entries |= {"format": max(HEADER_FORMATS), "bidirectional": named, "guidance": guidance}
    return entries


def _open(path: Path, weights: str) -> _Contents:
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights {weights!r} is unknown; use 'auto', 'ema' or 'raw'")
    try:
        if path.is_dir():
            return _open_folder(path, weights)
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if not start:
        raise ValueError("is empty; download or save it again")
    if start[8:] == b"{":  # after the length of a safetensors header, the header's JSON
        return _open_safetensors(path, weights)
    if start.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip archive, and the bare pickle of its early versions
        return _open_torch(path, weights, is_zip=start.startswith(b"PK"))
    if start.lstrip().startswith(b"{"):
        return _open_shards(path, weights)
    if start.startswith(b"GGUF"):
        raise ValueError(
            "is a GGUF file, which is not read here; in ComfyUI load it with a GGUF loader and put Patch Model (Self "
            "Forcing) behind it, elsewhere use a safetensors or torch file of the same model"
        )
    raise ValueError("is neither a safetensors nor a torch file")


def _open_safetensors(path: Path, weights: str) -> _Contents:
    return _single(*_read_safetensors(path), weights)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it has no __iter__
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"is a damaged or truncated safetensors file ({_one_line(error)})") from error


def _open_folder(path: Path, weights: str) -> _Contents:
    """A network in a folder: an index of shards, or one safetensors file; also below a pipeline's `transformer`."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for pattern, read in (("*.safetensors.index.json", _open_shards), ("*.safetensors", _open_safetensors)):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            contents = read(found[0], weights)
            return replace(contents, header=_diffusers_header(folder / "config.json") | contents.header)
        if found:
            raise ValueError(f"is a folder with {len(found)} files {pattern}; give one of them, or their index")
    raise ValueError("is a folder without a safetensors file; give the checkpoint file")


def _diffusers_header(file: Path) -> dict[str, str]:
    """What a model folder's config.json adds to the tensors, as a header entry for the host."""
    if not file.is_file():
        return {}
    heads = _json_object(file.read_text(encoding="utf-8", errors="replace")).get("num_attention_heads")
    return {HOST_HEADER_KEY: json.dumps({"transformer": {"num_heads": heads}})} if heads is not None else {}


def _open_shards(index: Path, weights: str) -> _Contents:
    """The safetensors files that an index lists. Names that leave the index's folder are refused."""
    try:
        listed = _json_object(index.read_text(encoding="utf-8")).get("weight_map")
    except UnicodeDecodeError as error:
        raise ValueError("is neither a checkpoint nor an index of one") from error
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError("is a JSON file without a weight_map; give a checkpoint or its index")
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for name in sorted(set(listed.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise ValueError(f"lists {name!r}, which is not beside it; download all shards into one folder")
        part, part_header = _read_safetensors(shard)
        twice = next((key for key in part if key in tensors), None)
        if twice is not None:
            raise ValueError(f"has {twice} in two shards; download them again")
        tensors |= part
        header |= part_header
    return _single(tensors, header, weights)


def _open_torch(path: Path, weights: str, *, is_zip: bool) -> _Contents:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on foreign pickles before it refuses them
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
    return _choose_container(loaded, weights)


def _choose_container(loaded: dict[Any, Any], weights: str) -> _Contents:
    """Pick the averaged or the last weights of a training file; a flat dictionary is one set of weights."""
    candidates = _candidates(loaded)
    if [candidate.place for candidate in candidates] == [""]:
        return _single(candidates[0].tensors, {}, weights)
    return _chosen(candidates, {}, weights)


def _candidates(loaded: dict[Any, Any], place: str = "", weights: str = "raw") -> list[_Candidate]:
    """Every set of weights below the containers that trainers use, at any depth."""
    for name in LORA_CONTAINERS:
        if loaded.get(name):
            raise ValueError(_lora_beside(place + name))
    found: list[_Candidate] = []
    for name in (*EMA_CONTAINERS, *RAW_CONTAINERS):
        if isinstance(loaded.get(name), dict) and loaded[name]:
            found += _candidates(loaded[name], f"{place}{name}.", "ema" if name in EMA_CONTAINERS else weights)
    return found or _by_prefix(_only_tensors(loaded), place, weights)


def _by_prefix(tensors: dict[str, Tensor], place: str, weights: str) -> list[_Candidate]:
    """The networks of a flat dictionary whose names begin with their containers; else the dictionary itself."""
    sets: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        container, name = split_container(key)
        if container in LORA_CONTAINERS:
            raise ValueError(_lora_beside(place + container))
        if container:
            sets.setdefault(container, {})[name] = tensor
        else:
            others.append(key)
    if not sets:
        return [_Candidate(place.rstrip("."), weights, tensors)]
    left_out = f"{len(others)} tensors beside the network are left out, the first is {others[0]}" if others else ""
    return [
        _Candidate(place + container, "ema" if container in EMA_CONTAINERS else weights, found, left_out)
        for container, found in sets.items()
    ]


def _lora_beside(place: str) -> str:
    return (
        f"holds a LoRA ({place}), without which its other weights are another model; merge it into them, or save the "
        "weights alone"
    )


def _chosen(candidates: list[_Candidate], header: dict[str, str], weights: str) -> _Contents:
    """The set that was asked for; "auto" takes the averaged one and says so. Two of one kind are not chosen from."""
    available = tuple(kind for kind in ("raw", "ema") if any(found.weights == kind for found in candidates))
    kind = available[-1] if weights == "auto" else weights
    fitting = [found for found in candidates if found.weights == kind]
    if not fitting:
        names = ", ".join(found.place for found in candidates)
        raise ValueError(f"has no {kind} weights, only {names}; ask for weights={available[0]!r}")
    if any(not _is_same(fitting[0].tensors, found.tensors) for found in fitting[1:]):
        names = " and ".join(found.place for found in fitting)
        raise ValueError(f"holds more than one set of {kind} weights, {names}; save the one that is meant alone")
    chosen, notes = fitting[0], []
    if weights == "auto" and len(available) > 1:
        other = next(found.place for found in candidates if found.weights != kind)
        notes.append(f"the averaged weights ({chosen.place}) are used; weights 'raw' are the others ({other})")
    if chosen.left_out:
        notes.append(chosen.left_out)
    return _Contents(chosen.tensors, header, kind, available, tuple(notes))


def _is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two containers are two names of the same tensors."""
    return one.keys() == other.keys() and all(one[key].data_ptr() == other[key].data_ptr() for key in one)


def _single(tensors: dict[str, Tensor], header: dict[str, str], weights: str) -> _Contents:
    """One set of weights, unless the names say that there are more."""
    candidates = _by_prefix(tensors, "", "raw")
    if candidates[0].place:
        return _chosen(candidates, header, weights)
    if weights == "ema":
        raise ValueError("holds one set of weights and does not say that it is an average; ask for weights='auto'")
    return _Contents(tensors, header, "raw", ("raw",))


def _only_tensors(loaded: dict[Any, Any]) -> dict[str, Tensor]:
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {str(key)[:60]!r} is a {type(value).__name__}, not a tensor; no known layout")
    return loaded


def _understand(contents: _Contents, path: Path) -> Checkpoint:
    """Recognise the network, settle its config and check every name and shape against it."""
    ours = _our_header(contents.header)
    if ours.get("kind") == LORA:
        raise ValueError(_what_lora(ours))
    tensors, scales_by_key = split_scales(contents.tensors, contents.header)
    names = wan_names(tensors)
    stored = {name: tensors[key] for name, key in names.items()}
    scales = {name: scales_by_key[key] for name, key in names.items() if key in scales_by_key}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    kind = _kind(shapes)
    _check_types(stored, scales)
    dtype = "bfloat16" if scales else _most_common(stored)
    if ours.get("kind", kind) != kind:
        raise ValueError(f"header says {ours['kind']!r} but the tensors are those of a {kind!r}")
    try:
        config = _config(kind, shapes, ours.get("config"), _host_sizes(contents.header))
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"header is damaged ({_one_line(error)})") from error
    causal, steps, bidirectional, guidance = _settings(ours)
    problem = mismatch(wan_shapes(config) if isinstance(config, WanConfig) else taehv_shapes(config), shapes)
    if problem:
        raise ValueError(f"is not a complete {kind} model: {problem}")
    dialect = describe_dialect(names.values())
    space = _latent_space(ours.get("latent_space"), config, path)
    state_dict = ScaledWeights(stored, scales) if scales else stored
    notes = tuple(f"{path}: {note}" for note in (*contents.notes, *_remarks(tensors, stored, scales)))
    header = {name: text for name, text in contents.header.items() if name != QUANTIZATION_ENTRY}  # undone by reading
    return Checkpoint(
        kind, state_dict, config, causal, steps, dialect, dtype, contents.weights, header, space, bidirectional,
        guidance, notes,
    )  # fmt: skip


def _remarks(
    tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """What is left out of the file or not used as it is stored."""
    stray = sorted(key for key in tensors if is_stray(key))
    remarks = ()
    if stray:
        remarks += (f"{', '.join(stray)} left out: a table that the network computes itself",)
    if scales:
        types = ", ".join(sorted({str(stored[name].dtype).removeprefix("torch.") for name in scales}))
        remarks += (
            f"{len(scales)} weights are stored in 8 bits with scales ({types}) and are widened as they are read, by "
            "default to bfloat16; scales for 8-bit activations are not used",
        )
    return remarks


def _settings(
    ours: Mapping[str, Any],
) -> tuple[CausalConfig | None, StepConfig | None, BidirectionalConfig | None, float | None]:
    """How the header wants the network to be run: chunks, steps, or all frames at once, and guidance."""
    try:
        causal = CausalConfig.from_dict(ours["causal"]) if ours.get("causal") else None
        steps = StepConfig.from_dict(ours["steps"]) if ours.get("steps") else None
        return causal, steps, _bidirectional(ours, causal, steps), _guidance(ours)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"header is damaged ({_one_line(error)})") from error


def _bidirectional(
    ours: Mapping[str, Any], causal: CausalConfig | None, steps: StepConfig | None
) -> BidirectionalConfig | None:
    """What the header says of a bidirectional network.

    Headers of format 1 had no word for it: there it is a network with steps and without chunks, which only exports of
    bidirectional runs and `convert --bidirectional` wrote. A network with neither is one that nothing is known about.
    """
    if ours.get("bidirectional") is not None:
        if causal is not None:
            raise ValueError("header is damaged (it says both causal and bidirectional)")
        return BidirectionalConfig.from_dict(ours["bidirectional"])
    is_older = ours.get("format") == HEADER_FORMAT and ours.get("kind") == "wan"
    return BidirectionalConfig() if is_older and causal is None and steps is not None else None


def _guidance(ours: Mapping[str, Any]) -> float | None:
    value = ours.get("guidance")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"header is damaged (guidance is {value!r}, not a positive number)")
    return float(value)


def _what_lora(ours: Mapping[str, Any]) -> str:
    """A LoRA of our trainer in words: where it belongs, and how it is sampled there."""
    causal, steps, _, _ = _settings(ours)
    how = "bidirectional" if causal is None else f"chunk {causal.chunk}, window {causal.window}"
    listed = "" if steps is None else f"{len(steps.steps)} steps, {steps.solver}, shift {steps.shift:g}"
    said = ", ".join(part for part in (how, listed) if part)
    return (
        f"is a LoRA, to be loaded in ComfyUI on top of {ours.get('base')} ({said}); where a whole network is needed, "
        "export the run with form=whole"
    )


def _latent_space(stored: Any, config: WanConfig | TAEHVConfig, path: Path) -> str | None:
    """What the header says; else for a TAEHV what its bytes say, and for a network with Wan's text encoder Wan's."""
    if stored is not None:
        return str(stored)
    if isinstance(config, TAEHVConfig):
        return latent_space(config, path) if path.is_file() else None
    return WAN if (config.text_dim, config.out_dim) == (UMT5_XXL_DIM, 16) else None


def _kind(shapes: Mapping[str, Shape]) -> str:
    if "head.modulation" in shapes:
        variant = variant_among(shapes)
        if variant is not None:
            raise ValueError(f"is of another kind: {not_supported(variant)}")
        return "wan"
    if "encoder.0.weight" in shapes and "decoder.3.conv.0.weight" in shapes:
        return "taehv"
    for sign, meaning in FOREIGN_SIGNS.items():
        if any(sign in name for name in shapes):
            raise ValueError(f"is no Wan transformer and no TAEHV; it looks like {meaning}")
    raise ValueError(f"is no Wan transformer and no TAEHV; its {len(shapes)} tensors follow no known layout")


def _check_types(stored: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    for name, tensor in stored.items():
        if not (tensor.is_floating_point() or name in scales) or tensor.layout != torch.strided:
            raise ValueError(
                f"parameter {name} is {tensor.dtype} in {tensor.layout}; only plain floating-point weights load"
            )


def _most_common(stored: Mapping[str, Tensor]) -> str:
    """The type that most numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        counts[tensor.dtype] += tensor.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _our_header(header: Mapping[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in header:
        return {}
    values = _json_object(header[HEADER_KEY])
    if values.get("format") not in HEADER_FORMATS:
        known = " and ".join(map(str, HEADER_FORMATS))
        raise ValueError(f"header has format {values.get('format')!r}, this version reads {known}; update it")
    return values


def _host_sizes(header: Mapping[str, str]) -> dict[str, int]:
    """Sizes that a file made for ComfyUI gives in its header; {} where there are none."""
    if HOST_HEADER_KEY not in header:
        return {}
    sizes = _json_object(header[HOST_HEADER_KEY]).get("transformer")
    return {name: sizes[name] for name in ("num_heads", "text_len") if name in sizes} if isinstance(sizes, dict) else {}


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse what no tensor can contradict: sizes that only the header gives."""
    for name in ("num_heads", "text_len"):
        if name in sizes and (type(sizes[name]) is not int or sizes[name] < 1):
            raise ValueError(f"header is damaged ({name} is {sizes[name]!r}, not a positive number)")


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"header is damaged ({_one_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError("header is damaged (not a JSON object)")
    return values


def _config(
    kind: str, shapes: Mapping[str, Shape], stored_values: dict[str, Any] | None, host_sizes: dict[str, int]
) -> WanConfig | TAEHVConfig:
    """The config that the shapes tell, completed by what only a header can tell; both must agree."""
    stored: WanConfig | TAEHVConfig | None
    told: WanConfig | TAEHVConfig
    _check_sizes(stored_values or host_sizes)
    if kind == "wan":
        stored = WanConfig.from_dict(stored_values) if stored_values else None
        if isinstance(stored, WanConfig):
            told = replace(wan_config(shapes, num_heads=stored.num_heads, text_len=stored.text_len), eps=stored.eps)
        else:
            told = wan_config(shapes, **host_sizes)
    else:
        stored = TAEHVConfig.from_dict(stored_values) if stored_values else None
        told = taehv_config(shapes, decoder_space=stored.decoder_space) if stored else taehv_config(shapes)
    if stored is not None and stored != told:
        name = next(field.name for field in fields(told) if getattr(stored, field.name) != getattr(told, field.name))
        raise ValueError(
            f"header says {name} {getattr(stored, name)} but the tensors say {getattr(told, name)}; the file is damaged"
        )
    return told


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
