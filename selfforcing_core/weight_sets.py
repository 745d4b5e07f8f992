"""Which weights of a training file are read: as trained ("raw") or their average ("ema"), where a file holds several.

Trainers put a network below containers (`generator`, `generator_ema`, `module`, `state_dict`), nested or as prefixes of
the names. Nothing is guessed: where two sets of one kind differ, the file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .keymap import EMA_CONTAINERS, LORA_CONTAINERS, RAW_CONTAINERS, split_container

WEIGHTS = ("auto", "ema", "raw")


@dataclass(frozen=True)
class FileContents:
    """One set of tensors under the names of the file, its header, and which sets there were to choose from."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    weights: str  # "raw" or "ema"
    available: tuple[str, ...]
    notes: tuple[str, ...] = ()  # lines for the user about what was chosen or left out


@dataclass(frozen=True)
class _Candidate:
    """One set of weights in a file."""

    place: str  # the path of containers to it, "" for a flat dictionary
    weights: str  # "raw" or "ema"
    tensors: dict[str, Tensor]
    left_out: str = ""  # a line about what stands beside it in the same dictionary


def choose_container(loaded: dict[Any, Any], weights: str) -> FileContents:
    """Return one set of weights of a torch file; a flat dictionary is one set.

    weights: "raw", "ema", or "auto", which takes the average where there is one.
    Raises ValueError for a file without such weights, with several of them, or with something else than tensors.
    """
    candidates = _candidates(loaded)
    if [candidate.place for candidate in candidates] == [""]:
        return single_set(candidates[0].tensors, {}, weights)
    return _chosen(candidates, {}, weights)


def single_set(tensors: dict[str, Tensor], header: dict[str, str], weights: str) -> FileContents:
    """Return a flat dictionary as one set of weights, unless its names say that it holds more of them."""
    candidates = _by_prefix(tensors, "", "raw")
    if candidates[0].place:
        return _chosen(candidates, header, weights)
    if weights == "ema":
        raise ValueError("holds one set of weights and does not say that it is an average; ask for weights='auto'")
    return FileContents(tensors, header, "raw", ("raw",))


def _candidates(loaded: dict[Any, Any], place: str = "", weights: str = "raw") -> list[_Candidate]:
    """Return every set of weights below the containers that trainers use, at any depth."""
    for name in LORA_CONTAINERS:
        if loaded.get(name):
            raise ValueError(_lora_refusal(place + name))
    candidates: list[_Candidate] = []
    for name in (*EMA_CONTAINERS, *RAW_CONTAINERS):
        if isinstance(loaded.get(name), dict) and loaded[name]:
            candidates += _candidates(loaded[name], f"{place}{name}.", "ema" if name in EMA_CONTAINERS else weights)
    return candidates or _by_prefix(_only_tensors(loaded), place, weights)


def _by_prefix(tensors: dict[str, Tensor], place: str, weights: str) -> list[_Candidate]:
    """Return the networks of a flat dictionary whose names begin with their containers; else the dictionary itself."""
    sets: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        container, name = split_container(key)
        if container in LORA_CONTAINERS:
            raise ValueError(_lora_refusal(place + container))
        if container:
            sets.setdefault(container, {})[name] = tensor
        else:
            others.append(key)
    if not sets:
        return [_Candidate(place.rstrip("."), weights, tensors)]
    left_out = f"{len(others)} tensors beside the network are left out, the first is {others[0]}" if others else ""
    return [
        _Candidate(place + container, "ema" if container in EMA_CONTAINERS else weights, network, left_out)
        for container, network in sets.items()
    ]


def _lora_refusal(place: str) -> str:
    # LongLive trains its long videos as a LoRA beside its base: the base alone would run, as
    # another model.
    return (
        f"holds a LoRA ({place}), without which its other weights are another model; merge it into them, or save the "
        "weights alone"
    )


def _chosen(candidates: list[_Candidate], header: dict[str, str], weights: str) -> FileContents:
    """Return the set of the wanted kind; "auto" takes the average and says so. Two of one kind are not chosen from."""
    kinds = {candidate.weights for candidate in candidates}
    available = tuple(kind for kind in ("raw", "ema") if kind in kinds)
    kind = available[-1] if weights == "auto" else weights  # the papers' videos are made by the average
    fitting = [candidate for candidate in candidates if candidate.weights == kind]
    if not fitting:
        names = ", ".join(candidate.place for candidate in candidates)
        raise ValueError(f"has no {kind} weights, only {names}; ask for weights={available[0]!r}")
    if any(not _is_same(fitting[0].tensors, candidate.tensors) for candidate in fitting[1:]):
        names = " and ".join(candidate.place for candidate in fitting)
        raise ValueError(f"holds more than one set of {kind} weights, {names}; save the one that is meant alone")
    candidate, notes = fitting[0], []
    if weights == "auto" and len(available) > 1:
        other = next(candidate.place for candidate in candidates if candidate.weights != kind)
        notes.append(f"the averaged weights ({candidate.place}) are used; weights 'raw' are the others ({other})")
    if candidate.left_out:
        notes.append(candidate.left_out)
    return FileContents(candidate.tensors, header, kind, available, tuple(notes))


def _is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two containers are two names of the same tensors, as torch.save keeps aliases."""
    return one.keys() == other.keys() and all(one[key].data_ptr() == other[key].data_ptr() for key in one)


def _only_tensors(loaded: dict[Any, Any]) -> dict[str, Tensor]:
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {str(key)[:60]!r} is a {type(value).__name__}, not a tensor; no known layout")
    return loaded
