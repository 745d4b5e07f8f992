"""LoRA (arXiv 2106.09685) of any spelling, merged into the weights that it belongs to as they are read.

A LoRA says of a matrix W that it becomes W + strength * alpha / rank * B A, with A and B of few rows and columns. Files
of PEFT, kohya's trainers, diffusers, ComfyUI and our own differ in how they call W, A and B and in where alpha stands;
some also add whole differences to norms and biases (`diff`, `diff_b`). What ComfyUI reads in such a file means the same
here, number for number; what is no LoRA in this sense (DoRA, LoHa and others) is refused by name.

The sum is made in float32 and rounded once, when a weight is asked for: so one weight at a time is wide, and no moment
holds a network twice. A LoRA is taken off by reading the file again without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_header import LORA, SamplingSettings, json_object, one_line, read_lora_header
from .keymap import DIALECT_PREFIXES, lora_module
from .scaled import ScaledWeights, weight_shapes
from .tensor_files import open_lora

# What stands behind a module's name; the pairs are those that ComfyUI's loader knows.
UPS = (
    *(".lora_B.default.weight", ".lora_B.weight", ".lora_B", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight"),
    ".lora_linear_layer.up.weight",
)
DOWNS = tuple(name.replace("lora_B", "lora_A").replace("up.", "down.") for name in UPS)
DIFFS, BIAS_DIFFS, ALPHA = (".diff", ".w_norm"), (".diff_b", ".b_norm"), ".alpha"
# Other ways to change few numbers of a matrix, by a part of their names.
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft": "BOFT",
    ".a1.weight": "GLoRA",
    "lora_mid": "LoCon with a matrix in the middle",
    "set_weight": "a file of weights to set",
    "reshape_weight": "a file that changes shapes",
    "lora_embedding_": "LoRA of embeddings",
    "lora_B.bias": "LoRA with biases of its own",
    "lora_B.default.bias": "LoRA with biases of its own",
}
# Settings of PEFT by which the numbers mean something else.
OTHER_SETTINGS = ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out", "modules_to_save")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_ENTRY = "lora_adapter_metadata"  # a header entry: PEFT's settings, each below the name of its network


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight as a product."""

    up: Tensor  # B, a row for each of the weight's rows
    down: Tensor  # A, a row for each rank
    alpha: float

    @property
    def rank(self) -> int:
        """Return how many rows A has."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the product; the axes of a kernel count as one."""
        return self.up.shape[0], self.down[0].numel()

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the product can be added to a weight of this shape."""
        return len(shape) > 1 and self.shape == (shape[0], math.prod(shape[1:]))

    def times(self, strength: float, shape: Sequence[int]) -> Tensor:
        """Return what is to be added, float32."""
        # In ComfyUI's order of products, so that its patched weights and these are bit-exact.
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.reshape(*shape).mul_(strength * (self.alpha / self.rank))


@dataclass(frozen=True)
class Difference:
    """What is added to one parameter as it stands."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the parameter that it fits."""
        return tuple(self.tensor.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether it can be added to a parameter of this shape."""
        return self.shape == tuple(shape)

    def times(self, strength: float, shape: Sequence[int]) -> Tensor:
        """Return what is to be added, float32."""
        return strength * self.tensor.float()


Patch = LowRank | Difference


@dataclass(frozen=True)
class Lora:
    """A LoRA by Wan's names of the parameters that it changes."""

    source: str  # the file, for people
    patches: dict[str, Patch]
    settings: SamplingSettings  # how it and its base are sampled together, where it says so
    base: str | None = None  # what it was trained on, where it says so
    notes: tuple[str, ...] = ()  # lines for the user about what was left out or guessed

    def summary(self) -> dict[str, Any]:
        """Return what it is, in plain JSON types."""
        pairs = {name: patch for name, patch in self.patches.items() if isinstance(patch, LowRank)}
        causal, steps, whole = self.settings.causal, self.settings.steps, self.settings.bidirectional
        # How wide the network is that it is for, where it changes an attention.
        width = next((pair.down.shape[1] for name, pair in pairs.items() if name.endswith(".self_attn.q.weight")), None)
        return {
            "file": self.source,
            "kind": LORA,
            "base": self.base,
            "width": width,
            "pairs": len(pairs),
            "differences": len(self.patches) - len(pairs),
            "ranks": sorted({pair.rank for pair in pairs.values()}),
            "alphas": sorted({pair.alpha for pair in pairs.values()}),
            "causal": causal.to_dict() if causal else None,
            "bidirectional": whole.to_dict() if whole else None,
            "steps": steps.to_dict() if steps else None,
            "guidance": self.settings.guidance,
            "notes": list(self.notes),
        }


# ----------------------------------------------------------------- reading --
def read_lora(path: str | Path, *, alpha: float | None = None) -> Lora:
    """Return the LoRA of a safetensors or torch file, of PEFT's folder, or beside the weights of a file.

    alpha: what is known of it from elsewhere, as from a preset; it goes before what the file says. Where neither says
    it, and no settings of PEFT lie beside, it is taken for the rank, as ComfyUI does, and a note says so.
    Raises ValueError, one line, for whatever is no LoRA or not used to its last tensor.
    """
    path = Path(path)
    try:
        contents = open_lora(path)
        lora = parse_lora(contents.lora, str(path), contents.header, _peft_settings(path, contents.header), alpha=alpha)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return replace(lora, notes=(*(f"{path}: {note}" for note in contents.notes), *lora.notes))


def is_lora(path: str | Path) -> bool:
    """Return whether a file or folder holds a LoRA and no network; False for what cannot be read."""
    try:
        contents = open_lora(Path(path))
    except ValueError:
        return False
    return not contents.tensors and any(key.endswith((*UPS, *DOWNS)) for key in contents.lora)


def parse_lora(
    tensors: Mapping[str, Tensor],
    source: str,
    header: Mapping[str, str] | None = None,
    peft: Mapping[str, Any] | None = None,
    *,
    alpha: float | None = None,
) -> Lora:
    """Return the LoRA that these tensors are, under the names of its file; `alpha` as for `read_lora`.

    source: the file, for people. header: its metadata. peft: settings that PEFT keeps of it.
    Raises ValueError without the file's name.
    """
    base, settings = read_lora_header(header or {})
    _check_kind(tensors)
    parts = _parts(tensors)
    known, notes = _known_alphas(parts["alpha"], peft or {}, alpha)
    pairs = _pairs(parts, known)
    guesses = {} if "" in known else {module: pair for module, pair in pairs.items() if module not in known}
    if guesses:
        some = "" if len(guesses) == len(pairs) else f" for {len(guesses)} of its {len(pairs)} pairs"
        ranks = " and ".join(map(str, sorted({pair.rank for pair in guesses.values()})))
        notes.append(f"says no alpha{some}; it is taken for the rank ({ranks}), so that B A is added as it is")
    patches: dict[str, Patch] = {f"{module}.weight": pair for module, pair in pairs.items()}
    for module, (_, tensor) in parts["difference"].items():
        # A block's modulation is a parameter of its own and no layer's weight.
        name = module if module.rpartition(".")[2] == "modulation" else f"{module}.weight"
        if name in patches:
            raise ValueError(f"holds both a pair and a difference for {name}; keep one of them")
        patches[name] = Difference(tensor)
    patches |= {f"{module}.bias": Difference(tensor) for module, (_, tensor) in parts["bias"].items()}
    if not patches:
        raise ValueError("holds no LoRA")
    _check_peft(peft or {}, patches.values())
    return Lora(source, patches, settings, base, tuple(f"{source}: {note}" for note in notes))


def _pairs(parts: Mapping[str, Mapping[str, tuple[str, Tensor]]], alphas: Mapping[str, float]) -> dict[str, LowRank]:
    """Return A and B of each module with its alpha; raise ValueError where one of them is missing or does not fit."""
    pairs: dict[str, LowRank] = {}
    for module, (key, up) in parts["up"].items():
        if module not in parts["down"]:
            raise ValueError(f"{key} has no A beside it: half of the LoRA is missing; download or save it again")
        down = parts["down"][module][1]
        if up.ndim < 2 or up.ndim != down.ndim or up.flatten(1).shape[1] != down.shape[0]:
            raise ValueError(f"{key} of shape {list(up.shape)} and its A of shape {list(down.shape)} are no pair")
        pairs[module] = LowRank(up, down, alphas.get(module, alphas.get("", float(down.shape[0]))))
    for module, (key, _) in (*parts["down"].items(), *parts["alpha"].items()):
        if module not in parts["up"]:
            raise ValueError(f"{key} has no B beside it: half of the LoRA is missing; download or save it again")
    return pairs


def _check_kind(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        kind = next((kind for sign, kind in OTHER_KINDS.items() if sign in key), None)
        if kind is not None:
            raise ValueError(f"is {kind} ({key}), which is not read; use a plain LoRA, or a file with it merged")
        if not tensor.is_floating_point() and not key.endswith(ALPHA):
            raise ValueError(f"{key} is {tensor.dtype}; only plain floating-point matrices are read")


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Sort tensors by what they are of which module: {"up": {module: (key, tensor)}, ...}."""
    endings = {"up": UPS, "down": DOWNS, "difference": DIFFS, "bias": BIAS_DIFFS, "alpha": (ALPHA,)}
    roles = {ending: role for role, names in endings.items() for ending in names}
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {role: {} for role in endings}
    strangers: list[str] = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in roles if key.endswith(ending)), None)
        if ending is None:
            strangers.append(key)
            continue
        module, found = lora_module(key.removesuffix(ending)), parts[roles[ending]]
        if module in found:
            raise ValueError(f"{found[module][0]} and {key} both change {module}; keep one of them")
        found[module] = key, tensor
    if strangers:
        count = f"{len(strangers)} of its {len(tensors)} tensors are"
        raise ValueError(f"is no LoRA that is read here: {count} of no known part of one, the first is {strangers[0]}")
    return parts


def _known_alphas(
    stored: Mapping[str, tuple[str, Tensor]], peft: Mapping[str, Any], given: float | None
) -> tuple[dict[str, float], list[str]]:
    """Return alpha by module, "" for all others; and a line where one that is given overrides others."""
    alphas = {module: _number(key, tensor) for module, (key, tensor) in stored.items()}
    if peft.get("lora_alpha") is not None:
        alphas[""] = _number(f"lora_alpha of {PEFT_CONFIG}", peft["lora_alpha"])
    if given is None:
        return alphas, []
    others = sorted({alpha for alpha in alphas.values() if alpha != given})
    note = f"says alpha {' and '.join(f'{alpha:g}' for alpha in others)}; {given:g} is used"
    return {"": given}, [note] if others else []


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key} is {one_line(error)}, not a number") from error
    if not math.isfinite(number):
        raise ValueError(f"{key} is {number}, not a finite number; the file is damaged")
    return number


def _peft_settings(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return what PEFT keeps of a LoRA: in a file beside it, or as diffusers writes it into the header."""
    file = (path if path.is_dir() else path.parent) / PEFT_CONFIG
    if file.is_file():
        return json_object(file.read_text(encoding="utf-8", errors="replace"))
    # Each setting has the name of the network before it, of which one is the transformer.
    entries = json_object(header.get(DIFFUSERS_ENTRY, "{}"))
    head = "transformer."
    return {name.removeprefix(head): value for name, value in entries.items() if name.startswith(head)}


def _check_peft(settings: Mapping[str, Any], patches: Iterable[Patch]) -> None:
    """Raise ValueError where settings give the numbers another meaning, or are those of another LoRA."""
    other = next((name for name in OTHER_SETTINGS if settings.get(name)), None)
    if other is not None:
        raise ValueError(f"is trained with {other}, which is not read; use a plain LoRA, or a file with it merged")
    ranks = {patch.rank for patch in patches if isinstance(patch, LowRank)}
    if ranks and settings.get("r") is not None and settings["r"] not in ranks and not settings.get("rank_pattern"):
        raise ValueError(
            f"has rank {' and '.join(map(str, sorted(ranks)))}, but {PEFT_CONFIG} says {settings['r']}: it belongs to "
            "another LoRA; put each into a folder of its own"
        )


# ----------------------------------------------------------------- merging --
class MergedWeights(ScaledWeights):
    """Tensors by name; those that a LoRA changes are added up in float32 whenever they are asked for.

    They come out in the stored type, rounded once; in float32 where that has 8 bits, since few LoRA would outlast them.
    loras: what is added, one after the other, by the names of the parameters, with its strength.
    """

    def __init__(self, weights: MutableMapping[str, Tensor], loras: Sequence[tuple[dict[str, Patch], float]]) -> None:
        scales = weights.scales if isinstance(weights, ScaledWeights) else {}
        super().__init__(weights.stored if isinstance(weights, ScaledWeights) else weights, scales)
        self.loras = list(loras)

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name)
        patches = [(patches[name], strength) for patches, strength in self.loras if name in patches]
        if not patches:
            return weight
        total = weight.to(torch.float32, copy=True)  # the file's own pages are not written to
        for patch, strength in patches:
            total += patch.times(strength, total.shape)
        return total.to(weight.dtype if weight.itemsize > 1 else torch.float32)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor)
        self._forget(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Let go of what was to be added to a weight that is gone, or that is one in its own right now."""
        for patches, _ in self.loras:
            patches.pop(name, None)

    @property
    def base(self) -> MutableMapping[str, Tensor]:
        """Return the weights without any LoRA; the same tensors, not copies."""
        return ScaledWeights(self.stored, self.scales) if self.scales else self.stored


def merge(weights: MutableMapping[str, Tensor], lora: Lora, strength: float) -> MergedWeights:
    """Return weights that have a LoRA added whenever one is asked for, on top of what they have already.

    Raises ValueError, naming the LoRA, unless every one of its parts fits a weight.
    """
    shapes = weight_shapes(weights)
    strangers = [name for name in lora.patches if name not in shapes]
    if strangers:
        raise ValueError(
            f"{lora.source}: {len(strangers)} of its {len(lora.patches)} parts are for parameters that this model does "
            f"not have, the first is {strangers[0]}; use the LoRA of this model"
        )
    for name, patch in lora.patches.items():
        shape = shapes[name]
        if not patch.fits(shape):
            raise ValueError(
                f"{lora.source}: does not fit this model, whose {name} is {list(shape)} and the LoRA's "
                f"{list(patch.shape)}; use the LoRA of this model"
            )
    before = weights.loras if isinstance(weights, MergedWeights) else []
    return MergedWeights(weights, [*before, (dict(lora.patches), strength)])


def comfyui_lora(patches: Mapping[str, Patch]) -> dict[str, Tensor]:
    """Return a LoRA under names that every LoRA loader of ComfyUI reads."""
    tensors: dict[str, Tensor] = {}
    for name, patch in patches.items():
        key = DIALECT_PREFIXES["comfyui-diffusion-model"] + name.removesuffix(".weight")
        if isinstance(patch, LowRank):
            tensors |= {f"{key}.lora_up.weight": patch.up, f"{key}.lora_down.weight": patch.down}
            tensors[f"{key}.alpha"] = torch.tensor(patch.alpha, dtype=torch.float64)
        else:
            ending = ".diff_b" if name.endswith(".bias") else ".diff"
            tensors[key.removesuffix(".bias") + ending] = patch.tensor
    return tensors
