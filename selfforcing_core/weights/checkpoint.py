"""Checkpoints: the weights of one network in a file, read with their config, and saved with it.

Read: our safetensors (config in the header), safetensors with bare or prefixed Wan names, in 8 bits with scales too,
torch files of Self Forcing (`generator_ema`, `generator`), of DeepSpeed, Lightning and other trainers (`module`,
`state_dict`, `ema`), and of TAEHV, folders of shards with their index, as diffusers writes them. What is no network of
these kinds is refused in one line.

A network follows from the shapes of its tensors and a header (`checkpoint_header`), which must agree; its tensors come
from `tensor_files`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..config import BidirectionalConfig, CausalConfig, StepConfig, TAEHVConfig, WanConfig
from ..shapes import Shape, Shapes, mismatch, taehv_config, taehv_shapes, wan_config, wan_shapes
from .checkpoint_header import FileHeader, SamplingSettings, file_header, one_line, read_header
from .keymap import CONTAINERS, describe_dialect, from_wan, stray_keys, wan_names
from .latent_space import WAN, identify_latent_space
from .lora_files import Lora, is_lora, merge, parse_lora, read_lora
from .scaled import (
    QUANTIZATION_ENTRY,
    ScaledWeights,
    Storage,
    check_scales,
    count_numbers,
    stored_tensors,
    weight_shapes,
)
from .tensor_files import FileContents, open_contents, without_fusions
from .variants import family_of, not_supported, variant_among, variant_of_channels

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # to store and compute in
UMT5_XXL_DIM = 4096  # width of the embeddings of every released Wan model's prompts
MERGED_ENTRY = "merged_loras"  # of the header, for people
WAN_LATENT_CHANNELS = 16  # of Wan 2.1's VAE

# What people most often mistake for a model file of ours, by a part of a parameter's name.
FOREIGN_SIGNS = {
    "lora_": "a LoRA; load its base, and it on top (--lora, in ComfyUI a LoRA loader)",
    ".lora": "a LoRA; load its base, and it on top (--lora, in ComfyUI a LoRA loader)",
    "decoder.upsamples.": "the Wan VAE; a TAEHV is needed here",
    "token_embedding.": "a UMT5 text encoder",
    "encoder.block.": "a text encoder",
    "visual.": "a CLIP model",
    "decoder.1.conv.0.": "a TAEHV with the larger 'super' decoder, which is not supported; use the ordinary one",
}


@dataclass(frozen=True)
class Checkpoint:
    """One network of a file, under its original parameter names.

    It is never both causal and bidirectional; what the file does not say is None.
    """

    kind: str  # "wan" or "taehv"
    # Mapped from the file where its format allows, so that reading costs no memory until they are used; scaled ones are
    # multiplied then, in float32.
    state_dict: MutableMapping[str, Tensor]
    config: WanConfig | TAEHVConfig
    causal: CausalConfig | None  # chunks, window and sink
    steps: StepConfig | None  # the noise levels
    dialect: str  # what the parameters are called in the file, for people
    dtype: str  # what most numbers have, such as "bfloat16", which weights in 8 bits with scales are to become too
    weights: str  # "raw" (as trained) or "ema" (their average)
    metadata: dict[str, str]  # the header's entries
    latent_space: str | None = None  # of the VAE that the network goes with ("wan2.1")
    bidirectional: BidirectionalConfig | None = None
    guidance: float | None = None  # scale that it is sampled with; distilled models take 1
    preset: str | None = None  # name of the release that it is a copy of
    key_shapes: Shapes = field(
        default_factory=dict
    )  # of all that the file holds, by its own names with their containers
    notes: tuple[str, ...] = ()  # lines for the user about what of the file was chosen, left out or is widened
    loras: tuple[dict[str, Any], ...] = ()  # what each is that the weights have added, its strength beside

    @property
    def settings(self) -> SamplingSettings:
        """Return how the network is run, as headers say it."""
        return SamplingSettings(self.causal, self.steps, self.bidirectional, self.guidance, self.preset)

    def say_notes(self) -> None:
        """Log the notes. Whoever uses the weights calls this; looking at a file stays silent."""
        for note in self.notes:
            log.warning("%s", note)


def read_checkpoint(
    path: str | Path, *, weights: str = "auto", loras: Sequence[tuple[str | Path, float]] = ()
) -> Checkpoint:
    """Return the Wan transformer or the TAEHV of any supported file.

    weights: "ema" or "raw" choose between the averaged and the trained weights of a training file, "auto" takes the
    averaged ones where they exist. loras: files and strengths of what is merged into them, beside what the file itself
    has to merge. Raises ValueError, one line, for whatever is not such a file.
    """
    return with_loras(_read(Path(path), weights)[0], loras)


def with_lora(checkpoint: Checkpoint, lora: Lora, strength: float = 1.0) -> Checkpoint:
    """Return the checkpoint with a LoRA merged into its weights, each of them when it is asked for.

    A LoRA whose file says how the two are sampled together brings that along. Strength 0 leaves all as it is.
    Raises ValueError, one line, for a LoRA of another network.
    """
    if not math.isfinite(strength):
        raise ValueError(f"{lora.source}: strength {strength} is not a finite number; 1 is usual, 0 none of it")
    if checkpoint.kind != "wan":
        raise ValueError(f"{lora.source}: a {checkpoint.kind} takes no LoRA; give it to the video model")
    if strength == 0:
        return replace(checkpoint, notes=(*checkpoint.notes, f"{lora.source}: not merged, its strength is 0"))
    weights = merge(checkpoint.state_dict, lora, strength)
    summary = {**lora.summary(), "strength": strength}
    ranks = "" if not summary["ranks"] else f", rank {' and '.join(map(str, summary['ranks']))}"
    notes = [f"{lora.source}: LoRA merged at strength {strength:g} ({len(lora.patches)} weights{ranks})", *lora.notes]
    said = {name: value for name, value in vars(lora.settings).items() if value is not None}
    if "causal" in said or "bidirectional" in said:  # a network is never both
        said = {"causal": None, "bidirectional": None, **said}
    replaced = [name for name, value in said.items() if getattr(checkpoint, name) not in (None, value)]
    if replaced:
        notes.append(f"{lora.source}: its {', '.join(replaced)} settings take the place of the model's")
    merged = ", ".join(f"{each['file']} at strength {each['strength']:g}" for each in (*checkpoint.loras, summary))
    return replace(
        checkpoint,
        state_dict=weights,
        # What was 8 bits without a scale comes out in float32 where a LoRA changes it.
        dtype=checkpoint.dtype if checkpoint.dtype in DTYPES else "bfloat16",
        metadata={**checkpoint.metadata, MERGED_ENTRY: merged},
        loras=(*checkpoint.loras, summary),
        notes=(*checkpoint.notes, *notes),
        **said,
    )


def with_loras(checkpoint: Checkpoint, loras: Sequence[tuple[str | Path, float]]) -> Checkpoint:
    """Return the checkpoint with these files merged at their strengths, as `with_lora` does it."""
    for path, strength in loras:
        checkpoint = with_lora(checkpoint, read_lora(path), strength)
    return checkpoint


def _read(path: Path, weights: str) -> tuple[Checkpoint, FileContents]:
    try:
        contents = open_contents(path, weights)
        checkpoint = _understood(contents, path)
        lora = parse_lora(contents.lora, f"{path}, its own") if contents.lora else None
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return (with_lora(checkpoint, lora) if lora else checkpoint), contents


def inspect_checkpoint(path: str | Path, *, loras: Sequence[tuple[str | Path, float]] = ()) -> dict[str, Any]:
    """Return what a checkpoint, or a LoRA, is, in plain JSON types, without reading its weights.

    loras: as for `read_checkpoint`. Raises ValueError as that does.
    """
    path = Path(path)
    try:
        checkpoint, contents = _read(path, "auto")
    except ValueError:
        if loras or not is_lora(path):
            raise
        return read_lora(path).summary()
    checkpoint = with_loras(checkpoint, loras)
    stored = stored_tensors(checkpoint.state_dict)
    has_containers = any(key.partition(".")[0] in CONTAINERS - {"model", "module"} for key in checkpoint.key_shapes)
    has_containers = has_containers or len(contents.available) > 1
    return {
        "file": str(path),
        "weight_bytes": sum(tensor.nbytes for tensor in stored.values()),
        "kind": checkpoint.kind,
        "dialect": checkpoint.dialect,
        "config": checkpoint.config.to_dict(),
        "dtype": _most_common(stored),
        "tensors": len(stored),
        "parameters": count_numbers(checkpoint.state_dict),
        # Without containers nothing says whether they are an average, as in a copy of one set.
        "weights": list(contents.available) if has_containers else ["as stored"],
        "latent_space": checkpoint.latent_space,
        "causal": checkpoint.causal.to_dict() if checkpoint.causal else None,
        "bidirectional": checkpoint.bidirectional.to_dict() if checkpoint.bidirectional else None,
        "steps": checkpoint.steps.to_dict() if checkpoint.steps else None,
        "guidance": checkpoint.guidance,
        "loras": list(checkpoint.loras),
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
    preset: str | None = None,
    dialect: str = "wan",
    overwrite: bool = True,
) -> None:
    """Write a network as safetensors with everything needed to run it in the header.

    state_dict: original parameter names, all that `config` asks for and no other. metadata: free text entries for the
    header. preset: the release that this is a copy of. dialect: the names to write (keymap.DIALECTS). An existing file
    is replaced once the new one is complete; nothing is left behind on failure.
    Raises ValueError when names or shapes do not fit the config, or when the path cannot be written.
    """
    expected = wan_shapes(config) if isinstance(config, WanConfig) else taehv_shapes(config)
    difference = mismatch(expected, weight_shapes(state_dict))
    if difference:
        raise ValueError(f"{path}: not saved, {difference}")
    header = file_header(config, SamplingSettings(causal, steps, bidirectional, guidance, preset), latent_space)
    clash = sorted(set(header) & set(metadata or {}))
    if clash:
        raise ValueError(f"{path}: not saved, the header entries {', '.join(clash)} are written from the config")
    tensors = {from_wan(name, dialect): state_dict[name].detach().contiguous() for name in expected}
    with replacing(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, {**(metadata or {}), **header})


# ------------------------------------------------------------ understanding --
def _understood(contents: FileContents, path: Path) -> Checkpoint:
    """Recognise the network, settle its config and check every name and shape against it."""
    header = read_header(contents.header)
    contents = without_fusions(contents)
    names = wan_names(contents.tensors)
    dialect, stray = describe_dialect(names.values()), stray_keys(contents.tensors)
    stored = {name: contents.tensors[key] for name, key in names.items()}
    scales = {name: contents.scales[key] for name, key in names.items() if key in contents.scales}
    weights = ScaledWeights(stored, scales) if scales else stored
    shapes = weight_shapes(weights)
    _check_types(stored, scales)
    kind = _kind(shapes)
    if header.kind not in (None, kind):
        raise ValueError(f"header says {header.kind!r} but the tensors are those of a {kind!r}")
    if kind == "wan":
        check_scales(weights)
    config = _config(kind, shapes, header)
    difference = mismatch(wan_shapes(config) if isinstance(config, WanConfig) else taehv_shapes(config), shapes)
    if difference:
        raise ValueError(f"is not a complete {kind} model: {difference}")
    return Checkpoint(
        kind=kind,
        state_dict=weights,
        config=config,
        causal=header.settings.causal,
        steps=header.settings.steps,
        dialect=dialect,
        dtype="bfloat16" if scales else _most_common(stored),  # what the 8 bits were made from
        weights=contents.weights,
        # Reading undoes the quantisation, so that a copy with this entry would claim what is no longer true.
        metadata={name: text for name, text in contents.header.items() if name != QUANTIZATION_ENTRY},
        latent_space=_latent_space(config, path) if header.latent_space is None else header.latent_space,
        bidirectional=header.settings.bidirectional,
        guidance=header.settings.guidance,
        preset=header.settings.preset,
        key_shapes=contents.key_shapes,
        notes=tuple(f"{path}: {note}" for note in (*contents.notes, *_remarks(stray, weights))),
    )


def _remarks(stray: list[str], weights: Mapping[str, Tensor]) -> list[str]:
    """Return what is left out of the file or not used as it is stored, one line each."""
    remarks = []
    if stray:
        remarks.append(f"{', '.join(stray)} left out: a table that the network computes itself")
    if isinstance(weights, ScaledWeights):
        remarks.append(weights.remark())
    return remarks


def _latent_space(config: WanConfig | TAEHVConfig, path: Path) -> str | None:
    """Return what the file says in other ways: a TAEHV by its bytes, a network of Wan's sizes by them."""
    if isinstance(config, TAEHVConfig):
        return identify_latent_space(config, path) if path.is_file() else None
    # Wan 2.1 is the one released family with this text encoder and so many channels.
    return WAN if (config.text_dim, config.out_dim) == (UMT5_XXL_DIM, WAN_LATENT_CHANNELS) else None


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
    family = family_of(shapes)
    if family is not None:
        raise ValueError(f"is no Wan transformer: {not_supported(f'a transformer of {family}')}")
    raise ValueError(f"is no Wan transformer and no TAEHV; its {len(shapes)} tensors follow no known layout")


def _check_types(stored: Mapping[str, Tensor], scales: Mapping[str, Storage]) -> None:
    for name, tensor in stored.items():
        if not (tensor.is_floating_point() or name in scales) or tensor.layout != torch.strided:
            raise ValueError(
                f"parameter {name} is {tensor.dtype} in {tensor.layout}; only plain floating-point weights load"
            )


def _most_common(stored: Mapping[str, Tensor]) -> str:
    """Return the type that most numbers have: norms of a bfloat16 network are often float32."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        counts[tensor.dtype] += tensor.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _config(kind: str, shapes: Mapping[str, Shape], header: FileHeader) -> WanConfig | TAEHVConfig:
    """Return the config that the shapes show, completed by what only a header can say; both must agree."""
    stored: WanConfig | TAEHVConfig | None = None
    config: WanConfig | TAEHVConfig
    try:
        if header.config:
            stored = (WanConfig if kind == "wan" else TAEHVConfig).from_dict(header.config)
        if isinstance(stored, WanConfig):
            config = replace(wan_config(shapes, num_heads=stored.num_heads, text_len=stored.text_len), eps=stored.eps)
        elif isinstance(stored, TAEHVConfig):
            config = taehv_config(shapes, decoder_space=stored.decoder_space)
        else:
            config = wan_config(shapes, **header.sizes) if kind == "wan" else taehv_config(shapes)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"header is damaged ({one_line(error)})") from error
    variant = variant_of_channels(config.in_dim, config.out_dim) if isinstance(config, WanConfig) else None
    if variant is not None:
        raise ValueError(f"is of another kind: {not_supported(variant)}")
    if stored is not None and stored != config:
        name = next(each.name for each in fields(config) if getattr(stored, each.name) != getattr(config, each.name))
        raise ValueError(
            f"header says {name} {getattr(stored, name)} but the tensors say {getattr(config, name)}; the file is "
            "damaged"
        )
    return config
