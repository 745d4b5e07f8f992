"""Checkpoint files: reading what others saved, refusing the rest with one clear line, and saving our own.

Read: our safetensors (config in the header), safetensors with bare or prefixed Wan names, torch files of Self Forcing
(`generator_ema`, `generator`, `model`) and of TAEHV, folders of shards with their index, as diffusers writes them. A
torch file is a pickle, and a pickle can carry code: it is only ever read with `weights_only=True`, so nothing in a file
is executed. What a file is follows from its bytes, its header and the shapes of its tensors, never from its name.

Header of our safetensors files: "selfforcing" = JSON {"format": 1, "kind", "config", "causal", "steps",
"latent_space"}; for Wan also "config" = JSON {"transformer": {...}}, which ComfyUI merges into its own detection.
Format 2 adds "bidirectional" and "guidance". It is written only where one of them has something to say, so that older
versions go on reading all other files and refuse those that they would sample wrongly. A LoRA of our trainer has a
header of kind "lora" with "base" and the same settings.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import replacing
from .config import BidirectionalConfig, CausalConfig, StepConfig, TAEHVConfig, WanConfig
from .keymap import EMA_CONTAINERS, RAW_CONTAINERS, describe_dialect, from_wan, wan_names
from .layout import Shape, mismatch, taehv_config, taehv_shapes, wan_config, wan_shapes
from .taehv_releases import WAN, latent_space

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

    kind: "wan" or "taehv". dtype: the type most numbers have, such as "bfloat16". weights: "raw" or "ema".
    causal, bidirectional, steps: how the model wants to be run, None where the file does not say; it is never both
    causal and bidirectional. guidance: scale that it is sampled with, None where the file does not say (distilled
    models take 1). latent_space: of the VAE that the network goes with ("wan2.1"), None where that is not known. The
    tensors of `state_dict` are mapped from the file where its format allows, so that reading costs no memory until
    they are used.
    """

    kind: str
    state_dict: dict[str, Tensor]
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


@dataclass(frozen=True)
class _Contents:
    """One set of tensors under the names of the file, its header, and which sets there were to choose from."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    weights: str
    available: tuple[str, ...]


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


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of any supported file or folder under its own names, for networks that are no Wan and no TAEHV.

    Raises ValueError as `read_checkpoint` does.
    """
    path = Path(path)
    try:
        return _open(path, "auto").tensors
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, in plain JSON types, without reading its weights. Raises as `read_checkpoint` does."""
    path = Path(path)
    try:
        contents = _open(path, "auto")
        checkpoint = _understand(contents, path)
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    return {
        "file": str(path),
        "weight_bytes": sum(tensor.nbytes for tensor in checkpoint.state_dict.values()),
        "kind": checkpoint.kind,
        "dialect": checkpoint.dialect,
        "config": checkpoint.config.to_dict(),
        "dtype": checkpoint.dtype,
        "tensors": len(checkpoint.state_dict),
        "parameters": sum(tensor.numel() for tensor in checkpoint.state_dict.values()),
        "weights": list(contents.available),
        "latent_space": checkpoint.latent_space,
        "causal": checkpoint.causal.to_dict() if checkpoint.causal else None,
        "bidirectional": checkpoint.bidirectional.to_dict() if checkpoint.bidirectional else None,
        "steps": checkpoint.steps.to_dict() if checkpoint.steps else None,
        "guidance": checkpoint.guidance,
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
    raise ValueError("is neither a safetensors nor a torch file")


def _open_safetensors(path: Path, weights: str) -> _Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it has no __iter__
            header = file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"is a damaged or truncated safetensors file ({_one_line(error)})") from error
    return _single(tensors, header, weights)


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
        contents = _open_safetensors(shard, weights)
        twice = next((key for key in contents.tensors if key in tensors), None)
        if twice is not None:
            raise ValueError(f"has {twice} in two shards; download them again")
        tensors |= contents.tensors
        header |= contents.header
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
    ema = [name for name in EMA_CONTAINERS if isinstance(loaded.get(name), dict)]
    raw = [name for name in RAW_CONTAINERS if isinstance(loaded.get(name), dict)]
    if not ema and not raw:
        return _single(_only_tensors(loaded), {}, weights)
    available = ("raw",) * bool(raw) + ("ema",) * bool(ema)
    chosen = available[-1] if weights == "auto" else weights
    if chosen not in available:
        raise ValueError(f"has no {chosen} weights, only {', '.join([*raw, *ema])}; ask for weights={available[0]!r}")
    name = (ema if chosen == "ema" else raw)[0]
    return _Contents(_only_tensors(loaded[name]), {}, chosen, available)


def _single(tensors: dict[str, Tensor], header: dict[str, str], weights: str) -> _Contents:
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
    names = wan_names(contents.tensors)
    state_dict = {name: contents.tensors[key] for name, key in names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    ours = _our_header(contents.header)
    if ours.get("kind") == LORA:
        raise ValueError(_what_lora(ours))
    kind = _kind(shapes)
    dtype = _dtype(state_dict)
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
    dialect = describe_dialect(contents.tensors)
    space = _latent_space(ours.get("latent_space"), config, path)
    return Checkpoint(
        kind, state_dict, config, causal, steps, dialect, dtype, contents.weights, contents.header, space,
        bidirectional, guidance,
    )  # fmt: skip


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
        return "wan"
    if "encoder.0.weight" in shapes and "decoder.3.conv.0.weight" in shapes:
        return "taehv"
    for sign, meaning in FOREIGN_SIGNS.items():
        if any(sign in name for name in shapes):
            raise ValueError(f"is no Wan transformer and no TAEHV; it looks like {meaning}")
    raise ValueError(f"is no Wan transformer and no TAEHV; its {len(shapes)} tensors follow no known layout")


def _dtype(state_dict: Mapping[str, Tensor]) -> str:
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(
                f"parameter {name} is {tensor.dtype} in {tensor.layout}; only plain floating-point weights load"
            )
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
