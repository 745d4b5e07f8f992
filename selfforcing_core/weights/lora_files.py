"""LoRA (arXiv 2106.09685) of any spelling, merged into the weights that it belongs to as they are read.

A LoRA says of a matrix W that it becomes W + strength * alpha / rank * B A, with A and B of few rows and columns. Files
of PEFT, kohya's trainers, LyCORIS, diffusers, ComfyUI and our own differ in how they call W, A and B and in where alpha
stands; some hold other products, whole differences or weights (`lora_kinds`). What ComfyUI reads in such a file means
the same here, number for number; what is not read is refused by name. What is for a text encoder is left out.

The sum is made in float32 and rounded once, when a weight is asked for: so one weight at a time is wide, and no moment
holds a network twice. A LoRA is taken off by reading the file again without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_header import LORA, SamplingSettings, json_object, one_line, read_lora_header
from .keymap import DIALECT_PREFIXES, fused_parts, lora_module, to_wan
from .lora_kinds import Decomposed, Difference, Generalised, Hadamard, Kronecker, LowRank, Patch, Product, Replacement
from .scaled import ScaledWeights, weight_shapes
from .tensor_files import open_lora

# What stands behind a module's name; the pairs are those that ComfyUI's loader knows.
UPS = (
    *(".lora_B.default.weight", ".lora_B.weight", ".lora_B", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight"),
    ".lora_linear_layer.up.weight",
)
DOWNS = tuple(name.replace("lora_B", "lora_A").replace("up.", "down.") for name in UPS)
DIFFS, BIAS_DIFFS, ALPHA = (".diff", ".w_norm"), (".diff_b", ".b_norm"), ".alpha"
UP, DOWN = UPS[1], DOWNS[1]  # of the many names of each, the one that all are sorted under
LOHA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
GLORA = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")
LOKR = (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b")
DORA, WHOLE = ".dora_scale", ".set_weight"
# What is not read, by a part of its names. OFT and BOFT turn a weight, and their readers differ: ComfyUI's multiplies
# by the strength twice and leaves the rescale of OFT out. Networks of Wan have no kernels of two axes.
OTHER_KINDS = {
    "lora_magnitude_vector": "PEFT's DoRA",  # which measures rows behind the change, where ComfyUI does it before
    "hada_t": "LoHa of kernels",
    "lokr_t2": "LoKr of kernels",
    "oft_": "OFT",
    "boft": "BOFT",
    "lora_mid": "LoCon with a matrix in the middle",
    "reshape_weight": "a file that changes shapes",
    "lora_embedding_": "LoRA of embeddings",
    "lora_B.bias": "LoRA with biases of its own",
    "lora_B.default.bias": "LoRA with biases of its own",
}
# Before the names of what is for a text encoder: kohya's, diffusers' and ComfyUI's.
TEXT_ENCODERS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
)
# Settings of PEFT by which the numbers mean something else.
OTHER_SETTINGS = ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out", "modules_to_save")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_ENTRY = "lora_adapter_metadata"  # a header entry: PEFT's settings, each below the name of its network
Parts = dict[str, dict[str, tuple[str, Tensor]]]  # role -> module -> key and tensor


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
        pairs = {name: patch for name, patch in self.patches.items() if isinstance(patch, (Product, Decomposed))}
        causal, steps, whole = self.settings.causal, self.settings.steps, self.settings.bidirectional
        # How wide the network is that it is for, where it changes an attention.
        width = next((pair.shape[1] for name, pair in pairs.items() if name.endswith(".self_attn.q.weight")), None)
        return {
            "file": self.source,
            "kind": LORA,
            "base": self.base,
            "width": width,
            "kinds": dict(Counter(patch.kind for patch in self.patches.values())),
            "pairs": len(pairs),
            "differences": len(self.patches) - len(pairs),
            "ranks": sorted({pair.rank for pair in pairs.values() if pair.rank is not None}),
            "alphas": sorted({pair.alpha for pair in pairs.values() if pair.rank is not None}),
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
    endings = (*UPS, *DOWNS, *LOHA, *LOKR, *GLORA, DIFFS[0], BIAS_DIFFS[0], WHOLE)
    return not contents.tensors and any(key.endswith(endings) for key in contents.lora)


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
    for_text = [key for key in tensors if key.startswith(TEXT_ENCODERS)]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in for_text}
    if for_text and not tensors:
        raise ValueError(
            f"is a LoRA for a text encoder alone ({for_text[0]}), which is not read; give one for the video model"
        )
    _check_kind(tensors)
    parts = _parts(tensors)
    known, notes = _known_alphas(parts[ALPHA], peft or {}, alpha)
    products = _products(parts, known)
    ranked = {module: product for module, product in products.items() if product.rank is not None}
    guesses = {} if "" in known else {module: each for module, each in ranked.items() if module not in known}
    if guesses:
        some = "" if len(guesses) == len(ranked) else f" for {len(guesses)} of its {len(ranked)} pairs"
        ranks = " and ".join(map(str, sorted({each.rank for each in guesses.values() if each.rank is not None})))
        notes.append(f"says no alpha{some}; it is taken for the rank ({ranks}), so that B A is added as it is")
    if for_text:
        notes.append(f"{len(for_text)} tensors for a text encoder are left out, the first is {for_text[0]}")
    patches: dict[str, Patch] = {}
    for name, patch in _named_patches(parts, products):
        names = tuple(map(to_wan, fused_parts(name))) or (name,)
        for index, part in enumerate(names):
            if part in patches:
                raise ValueError(f"holds both a pair and a difference for {part}; keep one of them")
            patches[part] = patch.part(index, len(names)) if len(names) > 1 else patch
    if not patches:
        raise ValueError("holds no LoRA; give a file with lora_A / lora_B, lora_down / lora_up or their kin")
    _check_peft(peft or {}, patches.values())
    return Lora(source, patches, settings, base, tuple(f"{source}: {note}" for note in notes))


def _named_patches(parts: Parts, products: Mapping[str, Product]) -> Iterator[tuple[str, Patch]]:
    """Yield what is done to which parameter, whose name may be that of a fused projection."""
    magnitudes = {module: tensor for module, (_, tensor) in parts[DORA].items()}
    for module, product in products.items():
        magnitude = magnitudes.get(module)
        yield f"{module}.weight", product if magnitude is None else Decomposed(product, magnitude)
    whole = {".diff": Difference, WHOLE: Replacement}
    for role, make in whole.items():
        for module, (_, tensor) in parts[role].items():
            # A block's modulation is a parameter of its own and no layer's weight.
            yield module if module.rpartition(".")[2] == "modulation" else f"{module}.weight", make(tensor)
    for module, (_, tensor) in parts[".diff_b"].items():
        yield f"{module}.bias", Difference(tensor)


def _products(parts: Parts, alphas: Mapping[str, float]) -> dict[str, Product]:
    """Return the product of each module with its alpha; raise ValueError where a part is missing or does not fit."""
    products: dict[str, Product] = {}
    for module in dict.fromkeys(module for role in (UP, DOWN, *LOHA, *LOKR, *GLORA) for module in parts[role]):
        tensors_by_role = {role: parts[role][module] for role in parts if module in parts[role]}
        makers = {LOHA: _loha, LOKR: _lokr, GLORA: _glora}
        kinds = [(make, roles) for roles, make in makers.items() if any(role in tensors_by_role for role in roles)]
        kinds += [(_pair, (UP, DOWN))] if UP in tensors_by_role or DOWN in tensors_by_role else []
        if len(kinds) > 1:
            raise ValueError(
                f"{next(iter(tensors_by_role.values()))[0]} is not the only change of {module}; keep one of them"
            )
        make, roles = kinds[0]
        product = make({role: tensors_by_role[role] for role in roles if role in tensors_by_role}, 0.0)
        products[module] = replace(product, alpha=alphas.get(module, alphas.get("", float(product.rank or 1))))
    for role in (ALPHA, DORA):
        for module, (key, _) in parts[role].items():
            if module not in products:
                raise ValueError(f"{key} has no B beside it: half of the LoRA is missing; download or save it again")
    return products


def _pair(tensors_by_role: Mapping[str, tuple[str, Tensor]], alpha: float) -> LowRank:
    for role, other, letter in ((UP, DOWN, "A"), (DOWN, UP, "B")):
        if other not in tensors_by_role:
            key = tensors_by_role[role][0]
            raise ValueError(f"{key} has no {letter} beside it: half of the LoRA is missing; download or save it again")
    (key, up), (_, down) = tensors_by_role[UP], tensors_by_role[DOWN]
    if up.ndim < 2 or up.ndim != down.ndim or up.flatten(1).shape[1] != down.shape[0]:
        raise ValueError(f"{key} of shape {list(up.shape)} and its A of shape {list(down.shape)} are no pair")
    return LowRank(up, down, alpha)


def _loha(tensors_by_role: Mapping[str, tuple[str, Tensor]], alpha: float) -> Hadamard:
    a1, b1, a2, b2 = _matrices(tensors_by_role, LOHA)
    first, second = _chain(tensors_by_role, a1, b1), _chain(tensors_by_role, a2, b2)
    if (a1.shape[0], b1.shape[1]) != (a2.shape[0], b2.shape[1]):
        raise _no_pair(tensors_by_role)
    return Hadamard(first, second, alpha)


def _lokr(tensors_by_role: Mapping[str, tuple[str, Tensor]], alpha: float) -> Kronecker:
    factors: list[tuple[Tensor, ...]] = []
    for whole in (".lokr_w1", ".lokr_w2"):
        matrices = _matrices(tensors_by_role, (whole,) if whole in tensors_by_role else (f"{whole}_a", f"{whole}_b"))
        factors.append(matrices if len(matrices) == 1 else _chain(tensors_by_role, *matrices))
    return Kronecker(factors[0], factors[1], alpha)


def _glora(tensors_by_role: Mapping[str, tuple[str, Tensor]], alpha: float) -> Generalised:
    a1, a2, b1, b2 = _matrices(tensors_by_role, GLORA)
    product = Generalised(a1, a2, b1, b2, alpha)
    for left, right in ((a2, a1), (b2, b1)) if product.is_older else ((a1, a2), (b1, b2)):
        _chain(tensors_by_role, left, right)
    return product


def _matrices(tensors_by_role: Mapping[str, tuple[str, Tensor]], roles: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the matrices of these roles. Raises ValueError where one is missing or is no matrix."""
    first = next(iter(tensors_by_role.values()))[0]
    absent = next((role for role in roles if role not in tensors_by_role), None)
    if absent is not None:
        raise ValueError(f"{first} has no {absent[1:]} beside it: part of it is missing; download or save it again")
    matrices = tuple(tensors_by_role[role][1] for role in roles)
    if any(matrix.ndim != 2 for matrix in matrices):
        raise _no_pair(tensors_by_role)
    return matrices


def _chain(tensors_by_role: Mapping[str, tuple[str, Tensor]], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    if left.shape[1] != right.shape[0]:
        raise _no_pair(tensors_by_role)
    return left, right


def _no_pair(tensors_by_role: Mapping[str, tuple[str, Tensor]]) -> ValueError:
    shapes = ", ".join(f"{key.rpartition('.')[2]} {list(tensor.shape)}" for key, tensor in tensors_by_role.values())
    return ValueError(
        f"{next(iter(tensors_by_role.values()))[0]} and what is beside it do not fit each other ({shapes})"
    )


def _check_kind(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        kind = next((kind for sign, kind in OTHER_KINDS.items() if sign in key), None)
        if kind is not None:
            raise ValueError(f"is {kind} ({key}), which is not read; use a plain LoRA, or a file with it merged")
        if not tensor.is_floating_point() and not key.endswith(ALPHA):
            raise ValueError(f"{key} is {tensor.dtype}; only plain floating-point matrices are read")


def _parts(tensors: Mapping[str, Tensor]) -> Parts:
    """Sort tensors by what they are of which module: {".dora_scale": {module: (key, tensor)}, ...}."""
    endings = {UP: UPS, DOWN: DOWNS, ".diff": DIFFS, ".diff_b": BIAS_DIFFS}
    endings |= {name: (name,) for name in (ALPHA, *LOHA, *LOKR, *GLORA, DORA, WHOLE)}
    roles = {ending: role for role, names in endings.items() for ending in names}
    parts: Parts = {role: {} for role in endings}
    strangers: list[str] = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in roles if key.endswith(ending)), None)
        if ending is None:
            strangers.append(key)
            continue
        module, tensors_by_role = lora_module(key.removesuffix(ending)), parts[roles[ending]]
        if module in tensors_by_role:
            raise ValueError(f"{tensors_by_role[module][0]} and {key} both change {module}; keep one of them")
        tensors_by_role[module] = key, tensor
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
    ranks = {patch.rank for patch in patches if isinstance(patch, (Product, Decomposed)) and patch.rank is not None}
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
            total = patch.applied(total, strength)
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
        for ending, tensor in patch.tensors().items():
            is_bias = name.endswith(".bias")
            tensors[f"{key.removesuffix('.bias')}{ending}_b" if is_bias else f"{key}{ending}"] = tensor
    return tensors
