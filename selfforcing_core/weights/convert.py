"""Any supported checkpoint to any other: names, number type, raw or averaged weights, a file or a folder of shards.

The result says what it is: in our header, and for ComfyUI in `config.transformer.causal_ar`, by which its own causal
nodes recognise a model that generates chunk by chunk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import check_new_folder, check_writable, replacing, replacing_folder
from ..config import CLIP_DIM, BidirectionalConfig, CausalConfig, StepConfig, WanConfig
from .bundles import resolve_model
from .checkpoint import DTYPES, Checkpoint, inspect_checkpoint, save_checkpoint
from .checkpoint_header import COMFYUI_KEY, HEADER_KEY, file_header, lora_header
from .keymap import DIALECTS, DIFFUSERS, EMA_CONTAINERS, RAW_CONTAINERS, from_wan
from .latent_space import LATENT_SPACES
from .lora_files import comfyui_lora, is_lora, read_lora
from .preset_settings import PresetReading, check_lora_choice, read_to_copy
from .presets import PRESETS
from .scaled import ScaledWeights

log = logging.getLogger(__name__)
SHARD_SIZE = "5GB"  # as huggingface_hub reads it; diffusers would write 10
# The name by which diffusers looks for weights; of several shards each has its number in it.
SHARD_NAME = "diffusion_pytorch_model{suffix}.safetensors"
# The dialect of each kind of output unless another is asked for: Self Forcing's own scripts load its torch files,
# diffusers a folder.
USUAL_DIALECT = {"safetensors": "wan", "torch": "self-forcing", "folder": DIFFUSERS}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dialect: str | None = None,
    dtype: str | None = None,
    weights: str = "auto",
    preset: str = "auto",
    causal: bool | None = None,
    latent_space: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the network of `source` to `out` and return `inspect_checkpoint` of the result.

    source: a bundle's name, that of a download, or a path. out: *.safetensors, *.pt or *.pth (Self Forcing's
    container), or a new folder of shards with index and config.json.
    dialect: names to write, one of keymap.DIALECTS. dtype: "float32", "bfloat16" or "float16"; None keeps that of the
    file. weights: "raw", "ema" or "auto". preset: the release that the file is, which the copy says and is run with;
    "auto" recognises it, "none" leaves it unsaid. causal: whether the network generates chunk by chunk; None: what the
    file says, and where it does not, yes for Self Forcing's own files and no for others. latent_space: what a TAEHV
    decodes.
    loras: files and strengths of what is merged into the weights. A LoRA as `source` is written in ComfyUI's names, for
    which neither dialect nor what is said of a network has a meaning.
    Raises ValueError, with nothing written, for whatever does not fit.
    """
    out = Path(out)
    kind = _kind_of(out)
    dialect = dialect or USUAL_DIALECT[kind]
    _check_choices(dialect, dtype, latent_space)
    _check_place(out, kind, overwrite)  # before gigabytes are read
    path = resolve_model(source)
    if is_lora(path):
        check_lora_choice(path, preset)
        return _convert_lora(path, out, dtype, is_plain=kind == "safetensors" and not loras, overwrite=overwrite)
    reading = read_to_copy(path, preset, weights=weights, loras=loras)
    checkpoint, notes = reading.checkpoint, list(reading.notes)
    if isinstance(checkpoint.config, WanConfig):
        checkpoint = _with_settings(reading, causal, notes)
    elif kind == "folder" or dialect not in ("wan", USUAL_DIALECT[kind]):
        raise ValueError(f"{source} is a TAEHV, whose names have no dialects; write one file and leave --dialect out")
    if latent_space is not None:
        checkpoint = replace(checkpoint, latent_space=latent_space)
    checkpoint.say_notes()
    for note in notes:
        log.warning("%s %s", source, note)
    tensors = checkpoint.state_dict
    if isinstance(tensors, ScaledWeights) and any(tensor.itemsize == 1 for tensor in tensors.stored.values()):
        # Their products are float32, wider than what was trained; the file says how wide it means them to be.
        dtype = dtype or checkpoint.dtype
    if dtype is not None or checkpoint.loras:
        _settle(checkpoint.state_dict, None if dtype is None else DTYPES[dtype])
    write = {"safetensors": _write_safetensors, "torch": _write_torch, "folder": _write_folder}[kind]
    write(checkpoint, out, dialect, overwrite)
    return inspect_checkpoint(out)


def _kind_of(out: Path) -> str:
    kinds = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", "": "folder"}
    if out.suffix.lower() not in kinds:
        raise ValueError(
            f"{out}: unknown kind of checkpoint; use .safetensors, .pt, or no ending for a folder of shards"
        )
    return kinds[out.suffix.lower()]


def _check_choices(dialect: str, dtype: str | None, latent_space: str | None) -> None:
    choices = ((dialect, DIALECTS, "dialect"), (dtype, DTYPES, "dtype"), (latent_space, LATENT_SPACES, "latent space"))
    for choice, allowed, setting in choices:
        if choice is not None and choice not in allowed:
            raise ValueError(f"{setting} {choice!r} is unknown; use one of {', '.join(allowed)}")


def _check_place(out: Path, kind: str, overwrite: bool) -> None:
    if kind == "folder":
        check_new_folder(out)
    else:
        check_writable(out, overwrite=overwrite)


def _with_settings(reading: PresetReading, causal: bool | None, notes: list[str]) -> Checkpoint:
    """Return the checkpoint with settings for generating chunk by chunk (`causal`) or all frames at once.

    None keeps those it has, and takes files of Self Forcing's trainer for causal; of a preset that cannot run here
    nothing is known. The preset gives way to another kind than its own.
    """
    checkpoint, name = reading.checkpoint, reading.checkpoint.preset
    if name is not None and causal not in (None, PRESETS[name].is_causal):
        notes.append(f"is {name}, which is {'bidirectional' if causal else 'causal'}; the copy is written as no preset")
        checkpoint = replace(checkpoint, preset=None)
    if causal is None:
        # Its trainer writes no header, and saves causal networks only.
        is_self_forcing = checkpoint.dialect.startswith("self-forcing") and checkpoint.bidirectional is None
        if checkpoint.causal is None and not (is_self_forcing and name is None):
            if not reading.has_folder_steps or checkpoint.steps is None:
                return checkpoint
            # A header has no shift without a list of steps, and nobody said that these are the model's.
            shift = f"--shift {checkpoint.steps.shift:g}"
            notes.append(f"says in its folder, and the copy does not, how it is sampled; give the copy {shift}")
            return replace(checkpoint, steps=None)
    elif not causal:
        steps = checkpoint.steps
        if steps is not None and steps.first_chunk_steps is not None:
            log.warning("the steps of the first chunk are left out: a bidirectional network makes all frames at once")
            steps = steps.of_chunk(1)
        whole = checkpoint.bidirectional or BidirectionalConfig()
        return replace(checkpoint, causal=None, bidirectional=whole, steps=steps)
    chunks, steps = checkpoint.causal or CausalConfig(), checkpoint.steps or StepConfig()
    return replace(checkpoint, causal=chunks, bidirectional=None, steps=steps)


def _settle(state_dict: MutableMapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Cast and merge in place, one tensor at a time: each original is given up before the next copy is made."""
    for name in list(state_dict):
        tensor = state_dict.pop(name)
        state_dict[name] = tensor.to(dtype or tensor.dtype)


def _convert_lora(path: Path, out: Path, dtype: str | None, *, is_plain: bool, overwrite: bool) -> dict[str, Any]:
    """Write a LoRA with the names that ComfyUI's loaders read, and return what it is."""
    if not is_plain:
        raise ValueError(
            f"{path} is a LoRA, which is written alone and as .safetensors; merge it with --lora of its base"
        )
    lora = read_lora(path)
    for note in lora.notes:
        log.warning("%s", note)
    tensors = {
        name: (tensor if dtype is None or not tensor.ndim else tensor.to(DTYPES[dtype])).contiguous()
        for name, tensor in comfyui_lora(lora.patches).items()
    }
    header = {"format": "pt"} if lora.base is None else lora_header(lora.base, lora.settings)
    with replacing(out, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, header)
    return inspect_checkpoint(out)


def _write_safetensors(checkpoint: Checkpoint, out: Path, dialect: str, overwrite: bool) -> None:
    # Both entries are written anew from the config; everything else that the source says of itself is kept.
    metadata = {name: text for name, text in checkpoint.metadata.items() if name not in (HEADER_KEY, COMFYUI_KEY)}
    save_checkpoint(
        out,
        checkpoint.state_dict,
        checkpoint.config,
        metadata,
        causal=checkpoint.causal,
        steps=checkpoint.steps,
        latent_space=checkpoint.latent_space,
        bidirectional=checkpoint.bidirectional,
        guidance=checkpoint.guidance,
        preset=checkpoint.preset,
        dialect=dialect,
        overwrite=overwrite,
    )


def _write_torch(checkpoint: Checkpoint, out: Path, dialect: str, overwrite: bool) -> None:
    """Write the container of Self Forcing's trainer; of a TAEHV a flat dictionary, as it is released."""
    settings = (checkpoint.causal or CausalConfig(), checkpoint.steps or StepConfig())
    if checkpoint.preset is not None:
        log.warning("%s: a torch file has no place for the preset; sample it with --preset %s", out, checkpoint.preset)
    elif (*settings, checkpoint.bidirectional, checkpoint.guidance) != (CausalConfig(), StepConfig(), None, None):
        log.warning("%s: a torch file has no place for chunks, steps and guidance; name them when it is sampled", out)
    contents: dict[str, Any] = dict(checkpoint.state_dict)
    # Under the key that says which weights these are, so that a reader who asks for the average gets it.
    if checkpoint.kind == "wan":
        container = (EMA_CONTAINERS if checkpoint.weights == "ema" else RAW_CONTAINERS)[0]
        contents = {container: {from_wan(name, dialect): tensor for name, tensor in contents.items()}}
    with replacing(out, overwrite=overwrite) as temporary:
        torch.save(contents, temporary)


def _write_folder(checkpoint: Checkpoint, out: Path, dialect: str, overwrite: bool) -> None:
    """Write shards of at most 5 GB with their index and diffusers' config.json, complete or not at all."""
    from huggingface_hub import split_torch_state_dict_into_shards

    assert isinstance(checkpoint.config, WanConfig)
    # safetensors writes contiguous tensors only.
    tensors = {from_wan(name, dialect): tensor.contiguous() for name, tensor in checkpoint.state_dict.items()}
    shards = split_torch_state_dict_into_shards(tensors, filename_pattern=SHARD_NAME, max_shard_size=SHARD_SIZE)
    header = file_header(checkpoint.config, checkpoint.settings, checkpoint.latent_space)
    with replacing_folder(out) as temporary:
        for name, keys in shards.filename_to_tensors.items():
            # "format" stands in every file that transformers and diffusers write for torch.
            save_file({key: tensors[key] for key in keys}, temporary / name, {"format": "pt", **header})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (temporary / (SHARD_NAME.format(suffix="") + ".index.json")).write_text(json.dumps(index, indent=2))
        (temporary / "config.json").write_text(json.dumps(_diffusers_config(checkpoint.config), indent=2))


def _diffusers_config(config: WanConfig) -> dict[str, Any]:
    """Return what diffusers' WanTransformer3DModel.from_pretrained reads."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        # Literal values are the same for every Wan 2.1.
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": CLIP_DIM if config.reads_clip else None,
        "added_kv_proj_dim": config.dim if config.reads_clip else None,
        "rope_max_seq_len": 1024,  # positions of the reference's table on each axis
    }
