"""Which preset a file is run with, and its settings in place of what the file says of itself.

An explicit setting comes before the preset, the preset before the file's header, the header before the defaults;
whatever takes another's place is said in a line. A preset is refused, never run by halves: for a cache policy that
there is not, for a file that has to lie beside it, for a number that nobody has read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any, TypeVar

from .. import policy
from ..config import BidirectionalConfig, CausalConfig, StepConfig
from ..experts import boundary_behind
from .checkpoint import MERGED_ENTRY, Checkpoint, read_checkpoint, with_lora
from .checkpoint_header import SamplingSettings
from .download import RELEASES, download_folders, release_folder
from .keymap import EMA_CONTAINERS, LORA_CONTAINERS
from .lora_files import Lora, read_lora
from .pipeline_folder import HIGH_NOISE_FOLDER, LOW_NOISE_FOLDER, PipelineFolder, read_pipeline
from .presets import Preset, Twin, find_preset, missing_policies
from .recognise import COMMON_NAMES, Recognition, containers_in, fits_release, recognise

Loras = Sequence[tuple[str | Path, float]]  # files and strengths
ReadLoras = Sequence[tuple[Lora, float]]
ConfigT = TypeVar("ConfigT", CausalConfig, StepConfig)
AUTO, NONE = "auto", "none"
PLAIN = "sf++"  # Self-Forcing++ changed the training; its cache is Self Forcing's
POLICIES = (*policy.POLICIES, PLAIN)
# What a run cannot do without, and the options that give it.
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("chunk", "window", "sink", "policy", "cache_source")}
OPTIONS |= {"steps": "--steps", "warp": "--warp-steps or --no-warp-steps", "shift": "--shift", "solver": "--solver"}
# Explicit ones, of which each is an answer to what a file is.
HOW_IT_RUNS = {*OPTIONS, "kind"}
OPTIONS |= {"guidance": "--cfg", "weights": "--weights ema or raw", "boundary": "--boundary or --boundary-step"}
OPEN_BY = {"boundary": "twin.boundary"}  # where a preset's open questions have another name for it
# The nodes of ComfyUI that set them, beside a preset; no node sets a solver.
NODES: dict[str, str] = dict.fromkeys(("window", "sink", "policy", "cache_source"), "Cache Options")
NODES |= {"chunk": "Patch Model", "shift": "Patch Model", "steps": "Sigmas", "warp": "Sigmas"}
NODES |= {"guidance": "the guider or sampler, by its cfg", "weights": "Load Model", "boundary": "Two Experts"}
# Of Self Forcing's trainer and those made from it; nothing else puts networks into them.
FAMILY_CONTAINERS = {"generator", "generator_ema", "generator_lora"}
WIDTHS_ASKED = (36,)  # input channels of image-to-video networks
CAUSAL_CLASS = "Causal"  # in the names of FastVideo's pipelines for them; diffusers has none
MOST_NAMES = 6  # of presets in a line


@dataclass(frozen=True)
class PresetReading:
    """A checkpoint with the settings of the preset that it is run with, if any."""

    checkpoint: Checkpoint
    preset: Preset | None
    notes: tuple[str, ...]  # what it is run as, and what gave way for that: sentences without the file as their subject
    # Of its steps only shift and boundary are said, by a pipeline's folder; the others are the defaults.
    has_folder_steps: bool = False
    # Settings that the preset leaves open and no header says: what the checkpoint has there nobody has said.
    unsaid: frozenset[str] = frozenset()


def read_with_preset(
    path: Path,
    choice: str = AUTO,
    *,
    weights: str = "auto",
    loras: Loras = (),
    given: Collection[str] = (),
    folders: Sequence[Path] = (),
) -> PresetReading:
    """Return a checkpoint that is to be run, with the settings of its preset.

    choice: a preset's name, "none", or "auto", which recognises the file. weights, loras: as for `read_checkpoint`;
    weights "auto" are those of the preset, whose LoRA is merged before those that are given, unless it is one of them
    or in the file already. given: names of settings that are explicit and need no preset. folders: as for
    `partner_path`.
    Raises ValueError for a preset that cannot run here or leaves open what is not given, naming where to say it, and
    for whatever is no checkpoint.
    """
    base = read_checkpoint(path, weights=weights)
    merged, given_loras = _merged(base), [(read_lora(file), strength) for file, strength in loras]
    checkpoint = _with_given(base, given_loras)
    folder = read_pipeline(path)
    recognition = choose_preset(checkpoint, path, choice)
    preset, notes = _settled(recognition, path, checkpoint, given)
    if preset is None:
        return with_folder(PresetReading(checkpoint, None, tuple(notes)), folder, given)
    refusal = obstacle(preset, path, (*given, *merged, *_as_own(preset, given_loras)), folders)
    if refusal is not None:
        raise ValueError(f"{path}: {refusal}{_way_out(recognition)}")
    header = checkpoint.settings
    known = {*given, *folder.says, *_said(header), *_only_set(base)}
    question = _open_question(preset, known | ({"weights"} if weights != AUTO else set()))
    if question is not None:
        raise ValueError(f"{path}: {question}{_way_out(recognition)}")
    if not fits_release(preset, checkpoint.key_shapes):
        notes.append(f"does not have the shapes of {in_words(preset)}, as which it is run")
    base = _with_weights(base, path, preset, weights, notes, by=recognition.by)
    base = _with_own_lora(base, path, preset, given_loras, notes, folders=folders)
    checkpoint = _with_given(base, given_loras)  # on top: some kinds of LoRA are no sums, and ComfyUI's order is this
    settled, replaced = with_preset(checkpoint, preset)
    is_said = {*folder.says, *_said(header)}
    unsaid = frozenset(name for name in preset.open_questions if name not in is_said)
    reading = PresetReading(settled, preset, (*notes, *replaced), unsaid=unsaid)
    return with_folder(reading, folder, given, has_header=checkpoint.steps is not None)


def with_folder(
    reading: PresetReading, folder: PipelineFolder, given: Collection[str] = (), *, has_header: bool = False
) -> PresetReading:
    """Return a reading with the shift and the boundary that its pipeline's folder says, and lines about them.

    They come behind explicit settings, the preset and the header. given: names of settings that are explicit.
    has_header: the steps that a preset took the place of were those of a header.
    """
    checkpoint, preset, notes = reading.checkpoint, reading.preset, list(reading.notes)
    is_said = has_header or (checkpoint.steps is not None if preset is None else preset.shift is not None)
    steps = checkpoint.steps or StepConfig()
    if folder.shift not in (None, steps.shift):
        if is_said:
            notes.append(f"says shift {folder.shift:g} in its scheduler_config.json; {steps.shift:g} is used")
        else:
            steps = replace(steps, shift=folder.shift)
            if "shift" not in given:
                notes.append(f"is sampled with shift {steps.shift:g}, as its scheduler_config.json says")
    if folder.boundary is not None and (preset is None or preset.twin is not None):
        if steps.boundary is None:
            steps = replace(steps, boundary=folder.boundary)
        elif steps.boundary != folder.boundary:
            notes.append(f"says boundary {folder.boundary:g} in its model_index.json; {steps.boundary:.4g} is used")
    if checkpoint.steps is None and not folder.says:
        return reading
    reading = replace(reading, notes=tuple(notes), has_folder_steps=checkpoint.steps is None)
    return replace(reading, checkpoint=replace(checkpoint, steps=steps))


def check_lora_choice(path: Path, choice: str) -> None:
    """Raise ValueError where a preset is named for a file that is a LoRA."""
    if choice not in (AUTO, NONE):
        raise ValueError(f"{path} is a LoRA, and preset {choice!r} is of a video model; leave it out")


def choose_preset(checkpoint: Checkpoint, path: Path, choice: str = AUTO) -> Recognition:
    """Return the preset of that name, by "name"; none for "none"; for "auto" those that the file may be.

    Raises ValueError for a name that there is not, and for one of a file that is no video model.
    """
    named = None if choice in (AUTO, NONE) else find_preset(choice)
    if named is not None and checkpoint.kind != "wan":
        raise ValueError(f"{path} is a {checkpoint.kind}, and preset {choice!r} is of a video model; leave it out")
    if checkpoint.kind != "wan" or choice == NONE:
        return Recognition(())
    if named is not None:
        return Recognition((named,), "name")
    try:
        return _by_folder(recognise(checkpoint.key_shapes, path, checkpoint.metadata), read_pipeline(path))
    except ValueError as error:  # a header that names a preset of a later version
        raise ValueError(f"{path}: {error}; preset none runs it by its header") from error


def _by_folder(recognition: Recognition, folder: PipelineFolder) -> Recognition:
    """Return which of the releases that fit by shapes a pipeline's folder leaves: those of as many networks.

    Of a class for causal networks (FastVideo's) they are those that were released as folders; the only one is certain.
    """
    if recognition.by != "names and shapes" or folder.pipeline is None:
        return recognition
    is_causal = CAUSAL_CLASS in folder.pipeline
    fitting = [
        preset
        for preset in recognition.presets
        if any(each.startswith(f"{LOW_NOISE_FOLDER}/") for each in preset.partner_files) == folder.has_two
        and (not is_causal or any(each.startswith(f"{HIGH_NOISE_FOLDER}/") for each in preset.files))
    ]
    return Recognition(tuple(fitting), "pipeline's class" if is_causal and fitting else recognition.by)


def choices_in_words(presets: Sequence[Preset]) -> str:
    """Return the presets' names, the first of them where they are many."""
    names = [preset.name for preset in presets]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def read_to_copy(path: Path, choice: str = AUTO, *, weights: str = "auto", loras: Loras = ()) -> PresetReading:
    """Return a checkpoint that is to be written elsewhere, with its preset's name and settings.

    A preset that cannot run here gives its name alone: whoever reads the copy refuses it, or has learnt to run it.
    """
    base = read_checkpoint(path, weights=weights)
    merged, given_loras = _merged(base), [(read_lora(file), strength) for file, strength in loras]
    checkpoint = _with_given(base, given_loras)
    recognition = choose_preset(checkpoint, path, choice)
    preset, notes, folder = recognition.preset, [], read_pipeline(path)
    if folder.low_noise is not None:
        notes.append(f"holds a second network, {LOW_NOISE_FOLDER}, which is not part of the copy; convert it as well")
    says_itself = checkpoint.causal is not None or checkpoint.bidirectional is not None
    if preset is None:
        checkpoint = replace(checkpoint, preset=None)
        if recognition.presets and not says_itself:
            notes.append(f"may be {choices_in_words(recognition.presets)}; the copy says so if --preset names one")
        return with_folder(PresetReading(checkpoint, None, tuple(notes)), folder)
    base = _with_weights(base, path, preset, weights, notes, by=recognition.by)
    checkpoint = _with_given(base, given_loras)
    if recognition.by not in ("name", "header"):
        notes.insert(0, f"is written as {in_words(preset)}, by its {recognition.by}")
    lacks = obstacle(preset, path, (*merged, *_as_own(preset, given_loras)))
    lacks = lacks or _open_question(preset, {*folder.says, *_said(checkpoint.settings), "weights"})
    if lacks is not None:
        notes.append(f"{lacks}; the copy says that it is {preset.name}, and nothing of settings")
        return PresetReading(replace(checkpoint, preset=preset.name), preset, tuple(notes))
    checkpoint = _with_given(_with_own_lora(base, path, preset, given_loras, notes), given_loras)
    settled, replaced = with_preset(checkpoint, preset)
    reading = PresetReading(settled, preset, (*notes, *replaced))
    return with_folder(reading, folder, has_header=checkpoint.steps is not None)


def inspect_preset(path: Path, choice: str = AUTO, *, loras: Loras = ()) -> dict[str, Any] | None:
    """Return which release a file is or may be and what keeps it from running, in plain JSON types; None for none.

    loras: what is to be merged, which may be the preset's own.
    """
    checkpoint = read_checkpoint(path)
    recognition = choose_preset(checkpoint, path, choice)
    if not recognition.presets:
        return None
    preset = recognition.preset
    entry: dict[str, Any] = {"name": preset and preset.name, "by": recognition.by}
    if preset is None:
        return {**entry, "may_be": [each.name for each in recognition.presets]}
    folder, has_header = read_pipeline(path), checkpoint.steps is not None
    reading = PresetReading(with_preset(checkpoint, preset)[0], preset, ())
    settings = with_folder(reading, folder, has_header=has_header).checkpoint.settings
    given_loras = [(read_lora(file), strength) for file, strength in loras]
    known = (*folder.says, *_said(checkpoint.settings), *_only_set(checkpoint))
    refusal = obstacle(preset, path, (*_merged(checkpoint), *_as_own(preset, given_loras)))
    return {
        **entry,
        "title": preset.title,
        "causal": settings.causal and settings.causal.to_dict(),
        "bidirectional": settings.bidirectional and settings.bidirectional.to_dict(),
        "steps": settings.steps and settings.steps.to_dict(),
        "weights": preset.weights,
        "guidance": settings.guidance,
        "policy": preset.policy,
        "missing": [f"{path} {refusal}"] if refusal else lacking(preset, known),
    }


# ------------------------------------------------------------- what is taken --
def _settled(
    recognition: Recognition, path: Path, checkpoint: Checkpoint, given: Collection[str]
) -> tuple[Preset | None, list[str]]:
    """Return the preset to run with, if one is certain or all that fit run alike, and a line about it.

    Raises ValueError for a file that is one of several releases which run differently, unless something explicit says
    how: they share their names and shapes with every network of a size, so that those alone ask only where the file has
    the containers of this family's trainers, two networks, or a picture's channels, whose releases run least alike. A
    plain base model of text to video has none, and neither have most own files.
    """
    header = checkpoint.settings
    says_itself = header.causal is not None or header.bidirectional is not None
    if recognition.preset is not None:
        return recognition.preset, [] if recognition.by == "name" else [
            f"is run as {in_words(recognition.preset)}, by its {recognition.by}"
        ]
    if not recognition.presets or says_itself:
        return None, []
    names, is_named = choices_in_words(recognition.presets), recognition.by != "names and shapes"
    is_familys = not FAMILY_CONTAINERS.isdisjoint(containers_in(checkpoint.key_shapes))
    folder, width = read_pipeline(path), getattr(checkpoint.config, "in_dim", 0)
    has_two = folder.has_two
    # The network for low noise alone is refused behind this, with the way to the other one.
    is_half = folder.high_noise is not None and "low_noise" not in given
    is_asked = is_familys or (not is_half and (has_two or width in WIDTHS_ASKED))
    if not is_named and (not is_asked or not HOW_IT_RUNS.isdisjoint(given)):
        unsaid = "which; it is run as if it were none of them"
        unsaid = unsaid if len(recognition.presets) > 1 else "that it is this one; it is run as if it were not"
        return None, [f"has the shapes of {names}, and nothing says {unsaid}"]
    if is_named and len({_way_to_run(preset, given) for preset in recognition.presets}) == 1:
        return recognition.presets[0], [f"may be {names}, which run alike"]
    sign = "" if is_named else f"has {width} input channels and "
    sign = "is one of two networks and " if has_two and not is_named else sign
    sign = "comes from a trainer of this family and " if is_familys and not is_named else sign
    differ = ", which run differently" if len(recognition.presets) > 1 else " or a base model"
    raise ValueError(f"{path}: {sign}may be {names}{differ}; say which by preset, or none of them by preset none")


def _way_to_run(preset: Preset, given: Collection[str]) -> tuple[Any, ...]:
    """Return all by which two presets may differ in the picture, but for what is explicit."""
    names = ("is_causal", "weights", "lora", "twin", "guidance", "first_chunk_steps", *OPTIONS)
    return (*(getattr(preset, name, None) for name in names if name not in given), str(preset.policy_options))


def in_words(preset: Preset) -> str:
    """Return a preset's name with what it stands for."""
    return f"{preset.name} ({preset.title})"


def _way_out(recognition: Recognition) -> str:
    """Return how to run a file nonetheless that nobody called by this preset's name."""
    return "" if recognition.by == "name" else "; preset none runs it by its header or Self Forcing's defaults"


# ----------------------------------------------------------- what is missing --
def obstacle(
    preset: Preset, path: Path | None = None, given: Collection[str] = (), folders: Sequence[Path] = ()
) -> str | None:
    """Return why a preset cannot be run, with the remedy where there is one; None where it can.

    path: of the file or folder, beside which partner files have to lie; without it they are not looked for. given: may
    name "low_noise", which then lies elsewhere, and "lora", which then is merged already. folders: as for
    `partner_path`; the first of them is where the remedy puts what is missing.
    """
    if preset.unsupported is not None:
        return f"is {in_words(preset)}, which is not supported: {preset.unsupported}"
    if preset.name in missing_policies(POLICIES):
        return f"is {in_words(preset)}, whose cache policy {preset.policy!r} this version does not have"
    if preset.task == "v2v":  # its steps begin at 700, where pure noise is no input that it knows
        return f"is {in_words(preset)}, which changes a given video, as no command or node here does"
    if path is not None and "low_noise" not in given and (refusal := _half_refusal(preset, path, folders)):
        return refusal
    needed = {"lora": preset.lora, "low_noise": preset.twin}
    partners = [each.file for name, each in needed.items() if each is not None and each.file and name not in given]
    absent = [file for file in partners if path is not None and partner_path(preset, path, file, folders) is None]
    if absent:
        place = f" --to {shlex.quote(str(folders[0]))}" if folders else ""
        remedy = f"fetch it with: python -m selfforcing_core download {preset.name}{place}"
        remedy = remedy if preset.name in RELEASES else "put it there"
        return f"is {in_words(preset)}, which needs {absent[0]} beside it; {remedy}"
    if preset.lora is not None and preset.lora.file is None and "lora" not in given:
        return f"is {in_words(preset)}, a base and a LoRA, whose file's name was not read; give it as --lora"
    return None


def _half_refusal(preset: Preset, path: Path, folders: Sequence[Path]) -> str | None:
    """Return what to do with the network for low noise of a release, where that is given as the model."""
    twin = preset.twin and PurePath(preset.twin.file)
    if twin is None:
        return None
    # Of a folder's file that is the folder's name, else the file's own.
    place = path.absolute() if path.is_dir() or twin.name != "*" else path.absolute().parent
    if not fnmatch(place.name.lower(), (twin.parent.name if twin.name == "*" else twin.name).lower()):
        return None
    first = preset.files[0].removesuffix("/*")
    high = partner_path(preset, path, preset.files[0], folders)
    do = f"give {high or first} as the model, beside which this one is found, or this one as --low-noise"
    return f"is the low-noise half of {in_words(preset)}; {do}"


def unable(preset: Preset, given: Collection[str] = ()) -> str | None:
    """Return a sentence why a preset cannot be run, wherever its files lie; None where it can.

    given: names of settings that are explicit. Which weights are meant is asked of a file that holds both alone.
    """
    refusal = obstacle(preset)
    return _open_question(preset, {*given, "weights"}) if refusal is None else f"the model {refusal}"


def counted_boundary(preset: Preset | None) -> int:
    """Return how many of the steps are the high-noise network's where a release counts them, else 0."""
    return 0 if preset is None or preset.twin is None else preset.twin.boundary_step or 0


def partner_path(preset: Preset, path: Path, file: str, folders: Sequence[Path] = ()) -> Path | None:
    """Return the file or folder that belongs to a release's first one, which lies at `path`; None where it does not.

    It lies where the repository has it, or beside the first one; else where `download` puts it, which may be one of
    `folders`, or right in one of those if its name is no common one. Raises ValueError where several may be meant.
    """
    path, name = path.expanduser(), PurePath(file)
    depths = {len(PurePath(first).parts) for first in preset.files} | {1}
    roots = [path, *(path.parents[depth - 1] for depth in sorted(depths, reverse=True) if depth <= len(path.parents))]
    if preset.name in RELEASES:
        roots += [release_folder(preset.name, folder) for folder in (*download_folders(), *folders)]
    is_folder, is_own_name = name.name == "*", name.name not in COMMON_NAMES
    patterns = [(root, pattern) for root in roots for pattern in (str(name), name.name)]
    # lora.pt of one release would pass for that of another.
    patterns += [(folder, name.name) for folder in folders if is_own_name]
    for root, pattern in patterns:
        if is_folder and (root / name.parent).is_dir():
            return root / name.parent
        partners = [] if is_folder or not root.is_dir() else sorted(each for each in root.glob(pattern) if each != path)
        if len(partners) > 1:  # of several versions in one folder: the one whose name differs in the fewest words
            differences = {each: len(_words(each) ^ _words(path)) for each in partners}
            partners = [each for each in partners if differences[each] == min(differences.values())]
        if len(partners) > 1:
            names = ", ".join(each.name for each in partners)
            raise ValueError(f"{path}: several files may belong to it ({names}); leave one of them in {root}")
        if partners:
            return partners[0]
    return None


def _words(path: Path) -> set[str]:
    return set(re.split(r"[_\W]+", path.stem.lower()))


def _said(header: SamplingSettings) -> tuple[str, ...]:
    """Return those of OPTIONS that a file's header says itself."""
    in_header = {
        "steps": ("steps", "warp", "shift", "solver"),
        "causal": ("chunk", "window", "sink", "policy", "cache_source"),
    }
    said = [name for part, names in in_header.items() if getattr(header, part) is not None for name in names]
    said += ["guidance"] if header.guidance is not None else []
    said += ["boundary"] if header.steps is not None and header.steps.boundary is not None else []
    return tuple(said)


def _only_set(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return "weights" where the file holds one set of them, so that nobody has to choose."""
    containers = containers_in(checkpoint.key_shapes) - {*LORA_CONTAINERS}
    return () if len({each in EMA_CONTAINERS for each in containers}) > 1 else ("weights",)


def _open_settings(preset: Preset, given: Collection[str] = ()) -> list[str]:
    """Return the settings that a run needs, nobody has read, and are not given."""
    return [name for name in OPTIONS if name not in given and _open_by(name) in preset.open_questions]


def _open_by(name: str) -> str:
    return OPEN_BY.get(name, name)


def _open_question(preset: Preset, given: Collection[str]) -> str | None:
    """Return what has to be given explicitly to run a preset, and why; None where nothing has to."""
    names = _open_settings(preset, given)
    if not names:
        return None
    reasons = "; ".join(dict.fromkeys(preset.open_questions[_open_by(name)] for name in names))
    options = ", ".join(OPTIONS[name] for name in names)
    return (
        f"preset {preset.name} leaves {', '.join(names)} open ({reasons}); give {options}, or in ComfyUI "
        f"{_in_comfyui(names)}"
    )


def _in_comfyui(names: Sequence[str]) -> str:
    """Return what to do in ComfyUI about settings that a preset leaves open."""
    if "solver" in names:
        return "run it on the command line, since no node sets a solver"
    if set(names) <= {"chunk", "shift"}:
        return "choose preset none here and this one in Patch Model, which has widgets for them"
    nodes: dict[str, list[str]] = {}
    for name in names:
        nodes.setdefault(NODES[name], []).append(name)
    places = ", ".join(f"{' and '.join(each)} in {node}" for node, each in nodes.items())
    return f"choose preset none, set {places}, and what docs/models.md says of it likewise"


def lacking(preset: Preset, given: Collection[str] = ()) -> list[str]:
    """Return what keeps this version from running a preset, or what a user has to give for it, a line each.

    given: names of settings that are known from elsewhere.
    """
    if preset.unsupported is not None:
        return [f"not supported: {preset.unsupported}"]
    lines = []
    if preset.name in missing_policies(POLICIES):
        lines.append(f"cache policy {preset.policy}")
    elif preset.task == "v2v":
        lines.append("a way to change a given video")
    elif preset.lora is not None and preset.lora.file is None:
        lines.append("its LoRA, whose file's name was not read")
    names_by_reason: dict[str, list[str]] = {}
    for name in _open_settings(preset, given):
        names_by_reason.setdefault(preset.open_questions[_open_by(name)], []).append(OPTIONS[name])
    return [*lines, *(f"{', '.join(names)} to be given ({why})" for why, names in names_by_reason.items())]


def absent_files(preset: Preset, folder: Path) -> list[str]:
    """Return what `download` would still have to fetch of a preset into this folder, a line."""
    if preset.unsupported is not None:
        return []
    if preset.name not in RELEASES:
        return ["its files, whose place or names were not read"]
    place = release_folder(preset.name, folder)
    files = [file for file in RELEASES[preset.name].files if not any(place.glob(file))]
    return [f"{', '.join(files)}: fetch with download {preset.name}"] if files else []


# ---------------------------------------------------------------- its settings --
def _with_weights(
    checkpoint: Checkpoint,
    path: Path,
    preset: Preset,
    asked: str,
    notes: list[str],
    *,
    by: str | None,
) -> Checkpoint:
    """Return the checkpoint with the set of weights that the preset is run with, as far as the file has several.

    Raises ValueError where it has sets, and this one is not among them.
    """
    containers = containers_in(checkpoint.key_shapes)
    if preset.weights is None and asked == "auto" and not _only_set(checkpoint):
        raise ValueError(f"{path}: which weights {preset.name} is run with was not read; give {OPTIONS['weights']}")
    if preset.weights not in ("ema", "raw") or by == "header":  # the copy has been made of the right ones
        return checkpoint
    if asked != "auto":
        if asked != preset.weights:
            notes.append(f"holds {preset.name}, which is run with its {preset.weights} weights; {asked} ones are used")
        return checkpoint
    if not containers:
        if preset.weights == "ema":
            notes.append(f"does not say whether it holds the average, with which {preset.name} is run")
        return checkpoint
    try:
        return read_checkpoint(path, weights=preset.weights)
    except ValueError as error:
        raise ValueError(f"preset {preset.name} is run with {preset.weights} weights: {error}") from error


def _merged(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return "lora" where the weights have one, of their own file or from before they were written."""
    return ("lora",) if MERGED_ENTRY in checkpoint.metadata else ()


def _with_given(checkpoint: Checkpoint, given_loras: ReadLoras) -> Checkpoint:
    """Return the checkpoint with the LoRA that were given merged, in their order."""
    for lora, strength in given_loras:
        checkpoint = with_lora(checkpoint, lora, strength)
    return checkpoint


def _is_own(preset: Preset, lora: Lora) -> bool:
    """Return whether a LoRA may be the preset's, by the name of its file or by its rank."""
    if preset.lora is None:
        return False
    is_named = preset.lora.file is not None and Path(lora.source).name == PurePath(preset.lora.file).name
    return is_named or lora.summary()["ranks"] == [preset.lora.rank]


def _as_own(preset: Preset, given_loras: ReadLoras) -> tuple[str, ...]:
    """Return "lora" where one of those that were given may be the preset's, and is added at all."""
    return ("lora",) if any(strength and _is_own(preset, lora) for lora, strength in given_loras) else ()


def _with_own_lora(
    checkpoint: Checkpoint,
    path: Path,
    preset: Preset,
    given_loras: ReadLoras,
    notes: list[str],
    *,
    folders: Sequence[Path] = (),
) -> Checkpoint:
    """Return the checkpoint with the LoRA that belongs to its release, unless that was given or is merged already.

    Given itself, at whatever strength, it is not merged twice. Where it does not lie beside the file, a given one that
    may be it is taken for it; where it is there and a given one may be it once more, a line says so.
    """
    if preset.lora is None or preset.lora.file is None:
        return checkpoint
    is_merged = bool(_merged(checkpoint))
    file = None if is_merged else partner_path(preset, path, preset.lora.file, folders)
    if file is None and not is_merged:
        notes.append(f"has no {preset.lora.file} beside it; the LoRA that was given is taken for that of {preset.name}")
        return checkpoint
    if file is not None and any(Path(lora.source).resolve() == file.resolve() for lora, _ in given_loras):
        return checkpoint
    again = [lora.source for lora, strength in given_loras if strength and _is_own(preset, lora)]
    if again:
        notes.append(
            f"has the LoRA of {preset.name} already; {again[0]} is added on top of it, the same once more "
            "if it is that one (then leave it out)"
        )
    return checkpoint if file is None else with_lora(checkpoint, read_lora(file, alpha=preset.lora.alpha))


def with_preset(checkpoint: Checkpoint, preset: Preset) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint as if its header said what the preset says, and a line for all that it had said otherwise.

    What was not read, or is no part of presets, stays as the file has it.
    """
    settings = preset_settings(preset, checkpoint.settings)
    notes = list(_replaced(checkpoint.settings, settings, preset))
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    return replace(checkpoint, **values), notes


def preset_settings(preset: Preset, stored: SamplingSettings | None = None) -> SamplingSettings:
    """Return how a preset is run; what was not read of it is as stored, or else the default."""
    stored = stored or SamplingSettings()
    return SamplingSettings(
        causal=_with_numbers(stored.causal or CausalConfig(), preset) if preset.is_causal else None,
        steps=_divided(_with_numbers(stored.steps or StepConfig(), preset), preset.twin),
        bidirectional=None if preset.is_causal else stored.bidirectional or BidirectionalConfig(),
        guidance=stored.guidance if preset.guidance is None else preset.guidance,
        preset=preset.name,
    )


def _with_numbers(config: ConfigT, preset: Preset) -> ConfigT:
    values = {item.name: getattr(preset, item.name, None) for item in fields(config)}
    if values.get("policy") not in policy.POLICIES:  # one that is refused, or needs none of its own
        values.pop("policy", None)
    # No list for the first chunk is a number too: it takes every chunk's.
    keeps_none = {"first_chunk_steps"} if preset.steps is not None else set()
    return replace(
        config,
        **{name: value for name, value in values.items() if value is not None or name in keeps_none & values.keys()},
    )


def _divided(steps: StepConfig, twin: Twin | None) -> StepConfig:
    """Return the steps with the boundary between two experts, as far as it was read."""
    if twin is None:
        return steps
    boundary = twin.boundary if twin.boundary_step is None else boundary_behind(steps, twin.boundary_step)
    return steps if boundary is None else replace(steps, boundary=boundary)


def _replaced(stored: SamplingSettings, settings: SamplingSettings, preset: Preset) -> Iterator[str]:
    """Yield a line for everything in which a header and the preset differ."""
    if stored.preset not in (None, preset.name):
        yield f"says that it is {stored.preset}; it is run as {preset.name}"
    if stored.causal is not None and settings.causal is None:
        yield f"says that it is causal; {preset.name} is bidirectional"
    if stored.bidirectional is not None and settings.bidirectional is None:
        yield f"says that it is bidirectional; {preset.name} is causal"
    for old, new in ((stored.causal, settings.causal), (stored.steps, settings.steps)):
        for item in fields(old) if old is not None and new is not None else ():
            before, after = getattr(old, item.name), getattr(new, item.name)
            if before != after:
                yield f"says {item.name.replace('_', ' ')} {_value(before)}; {preset.name}'s {_value(after)} is used"
    if stored.guidance not in (None, settings.guidance):
        yield f"says guidance {stored.guidance:g}; {preset.name}'s {settings.guidance:g} is used"


def _value(value: Any) -> str:
    if value is None:  # of the first chunk's steps
        return "same"
    listed = value if isinstance(value, tuple) else (value,)
    return ",".join(f"{item:g}" if type(item) in (int, float) else str(item) for item in listed)
