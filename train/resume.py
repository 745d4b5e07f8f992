"""Whether a run may go on in a folder: its stored settings against today's, before anything is read or touched.

`logdir`/config.yaml holds the settings of the run that wrote the folder, and in a comment its command. What differs
must be harmless (`HARMLESS`), or named in `resume_changed`. The first process looks, and its answer is everybody's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfforcing_core.atomic import make_folder, replacing, writing
from train import run_checkpoints
from train.args import ClipArgs, DiffusionArgs, DmdArgs, OdeArgs, TrainArgs, keys, read_known, to_dict, to_yaml
from train.distributed import Meeting

log = logging.getLogger(__name__)
SETTINGS, LOCK = "config.yaml", ".lock"
STAGES: dict[str, type[TrainArgs]] = {"train.dmd": DmdArgs, "train.diffusion": DiffusionArgs, "train.ode": OdeArgs}
MARKS = {"student": "train.dmd", "forcing": "train.diffusion", "timesteps": "train.ode"}  # what only this stage has
COMMAND = re.compile(r"# (train\.[a-z]+)\b.*")  # the first line
SHARED_WITHIN = 30.0  # seconds in which a network disk must show a new file to all machines

# Settings that may differ, and why nothing that was trained becomes wrong. Whatever is not listed, a setting that is
# new too, ends the run before it starts.
HARMLESS = {
    "logdir": "a folder may be moved",
    "max_steps": "a run may be longer; with lr_end its learning rates follow the new length from here on",
    "resume": "is about the start alone",
    "resume_changed": "is about the start alone",
    "dry_run": "trains nothing",
    "save_every": "saving",
    "keep_last": "saving",
    "max_loss": "only stops a run",
    "tensorboard": "logging",
    "wandb": "logging",
    "sample_every": "videos that training does not read",
    "sample_prompts": "videos that training does not read",
    "sample_frames": "videos that training does not read",
    "decoder": "videos that training does not read",
    "decoder_latent_space": "videos that training does not read",
    "skip_bad_rows": "decides what follows a row that cannot be used; good rows stay where they are",
    "micro_batch": "parts of a batch add up to the same numbers",
    "shard_group": "where weights lie",
    "device": "where it is computed",
    "activation_checkpointing": "computes the same twice in place of keeping it",
    "text_encoder_offload": "where the encoder lies",
    "embeddings": "what is kept there is found by what was encoded, and with what",
    "size": "for the plan alone",
    "teacher_size": "for the plan alone",
    "critic_size": "for the plan alone",
    "prompts": "data: a file may be moved, or hold more",
    "data": "data: a database may be moved, or hold more",
}
# Of stages that read the size of their clips from the data.
HARMLESS_FOR_CLIPS = dict.fromkeys(("width", "height", "latent_frames"), "for the plan alone")
# Of the stage that is sampled in another way than it is trained.
HARMLESS_FOR_DIFFUSION = dict.fromkeys(
    ("sampling_steps", "solver", "guidance", "negative_prompt"), "videos that training does not read, and the export"
)
# Networks are no data: another file under the setting is another run. Two spellings of one place are the same.
FILES = ("student", "teacher", "critic", "network", "text_encoder", "vae", "clip")
# What processes of one run may have differently: where their machine keeps things.
OWN = ("logdir", "device", "embeddings")


def harmless(kind: type[TrainArgs]) -> dict[str, str]:
    """Return the settings of a stage that may change in a run, with the reason."""
    reasons = dict(HARMLESS)
    if issubclass(kind, ClipArgs):
        reasons |= HARMLESS_FOR_CLIPS
    return reasons | HARMLESS_FOR_DIFFUSION if issubclass(kind, DiffusionArgs) else reasons


# ----------------------------------------------------------------- settings --
@dataclass(frozen=True)
class Stored:
    """A run as its folder holds it."""

    stage: str  # its command, for instance train.dmd
    settings: dict[str, Any]  # all that the stage has today; one that did not exist then has its default
    gone: dict[str, Any]  # settings that this version has no more


def write_settings(folder: Path, stage: str, args: TrainArgs) -> None:
    """Write which run a folder holds."""
    with replacing(folder / SETTINGS) as temporary:
        temporary.write_text(f"# {stage}: the settings of this run\n{to_yaml(args)}", encoding="utf-8")


def read_settings(folder: Path) -> Stored:
    """Return what `write_settings` wrote, in this version or an earlier one; what is missing is as by default.

    Raises ValueError for what is no such file.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(
            f"{folder} holds a run without its settings: {SETTINGS} is missing; put it back, or choose another logdir"
        )
    try:
        stage = _stage(file)
        settings, gone = read_known(file, STAGES[stage])
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: cannot be read as a run's settings ({words}); choose another logdir") from error
    return Stored(stage, to_dict(STAGES[stage](**settings)), gone)


def _stage(file: Path) -> str:
    with file.open("rb") as opened_file:
        first_line = COMMAND.match(opened_file.readline().decode("utf-8", "replace"))
    names = keys(file)
    # The first versions wrote no command into the file.
    stage = first_line[1] if first_line else next((stage for mark, stage in MARKS.items() if mark in names), "")
    if stage not in STAGES:
        raise ValueError(f"of {stage or 'no stage that is known'}; known are {', '.join(STAGES)}")
    return stage


def changes(stored: Stored, args: TrainArgs) -> dict[str, str]:
    """Return the settings that differ from a run's of the same stage, as "old -> new"."""
    differences = {
        name: f"{_shown(stored.settings[name])} -> {_shown(value)}"
        for name, value in to_dict(args).items()
        if not _is_same(name, stored.settings[name], value)
    }
    return {**differences, **{name: f"{_shown(value)} -> no setting any more" for name, value in stored.gone.items()}}


def _is_same(name: str, old: Any, new: Any) -> bool:
    if old == new:
        return True
    return name in FILES and bool(old) and bool(new) and os.path.realpath(old) == os.path.realpath(new)


def _shown(value: Any) -> str:
    text = str(value) or "''"
    return text if len(text) <= 120 else f"{text[:117]}..."


def check(folder: Path, stage: str, args: TrainArgs, *, is_told: bool = True) -> Path | None:
    """Find the checkpoint from which a run goes on in a folder; None: it starts. Nothing is written.

    is_told: log what differs and may. Raises ValueError if the folder holds another run: checkpoints, or steps in its
    log.
    """
    checkpoints, log_file = run_checkpoints.complete(folder), folder / "log.jsonl"
    if checkpoints and not args.resume:
        raise ValueError(f"{folder} holds checkpoints of another run; choose another logdir, or leave resume on")
    # Before its first checkpoint a run has a log. Going on with it would mix two runs, unless the settings agree.
    if not checkpoints and (not args.resume or not log_file.is_file() or not log_file.stat().st_size):
        _check_named(stage, args, {})
        return None
    stored = read_settings(folder)
    _check_named(stage, args, stored.gone)
    if stored.stage != stage:
        raise ValueError(f"{folder} holds a run of {stored.stage}, and this is {stage}; choose another logdir")
    differing = changes(stored, args)
    allowed = {*harmless(type(args)), *args.resume_changed}
    refused = [f"{name}: {words}" for name, words in differing.items() if name not in allowed]
    if refused:
        names = ",".join(name for name in differing if name not in allowed)
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(refused)}); give the old ones to go on, "
            f"resume_changed=[{names}] to go on with the new ones, or another logdir to start anew"
        )
    if differing and is_told:
        log.warning("%s goes on with %s", folder, "; ".join(f"{name}: {words}" for name, words in differing.items()))
    return checkpoints[-1] if checkpoints else None


def _check_named(stage: str, args: TrainArgs, gone: dict[str, str]) -> None:
    unknown = sorted(set(args.resume_changed) - set(to_dict(args)) - set(gone))
    if unknown:
        raise ValueError(f"resume_changed: {', '.join(unknown)} is no setting of {stage}; name settings that exist")


# ------------------------------------------------------------ all processes --
@contextmanager
def opened(meeting: Meeting, stage: str, args: TrainArgs | None, mistake: str = "") -> Iterator[Path | None]:
    """Hold the run's folder, which all processes share, and yield the checkpoint to go on from.

    args: None where they could not be read; mistake: why, or what else is wrong with them. Nothing is written before
    all is known to be right, and a folder that is new is removed again if nothing comes into it. Raises ValueError on
    all processes for what is wrong on one of them, for settings that differ between them, for the folder of another
    run or of one that is still going on, and for a folder that they do not share.
    """
    _agree(meeting, stage, args, mistake)
    assert args is not None
    folder = Path(args.logdir)
    answer = _ask(meeting, "folder", lambda: str((check(folder, stage, args) or Path()).name))
    is_new = meeting.rank == 0 and not folder.exists()
    locks: list[Any] = []
    token = f".shared-{os.getpid()}-{time.time_ns()}"
    try:
        token = _ask(meeting, "token", lambda: _begin(folder, token, locks))
        # once more, now that no other run can write there
        answer = _ask(meeting, "held folder", lambda: str((check(folder, stage, args, is_told=False) or Path()).name))
        _every(meeting, "sight", lambda: _see(folder, token, meeting))
        _leave(folder, token, meeting)
        yield folder / "checkpoints" / answer if answer else None
    finally:
        if meeting.rank == 0:
            _leave(folder, token, meeting)
            for file in locks:
                file.close()
            if is_new and folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}:
                with suppress(OSError):
                    (folder / LOCK).unlink(missing_ok=True)
                    folder.rmdir()


def _agree(meeting: Meeting, stage: str, args: TrainArgs | None, mistake: str) -> None:
    """Raise ValueError on all processes if one has a mistake, or other settings than the first."""
    settings = None if args is None else to_dict(args)
    words = json.dumps({"host": socket.gethostname(), "mistake": mistake, "stage": stage, "settings": settings})
    answers = [json.loads(answer) for answer in meeting.exchange("settings", words)]
    _raise_first([answer["mistake"] for answer in answers], [answer["host"] for answer in answers])
    first = answers[0]
    for rank, other in enumerate(answers):
        same = {**other["settings"], **{name: first["settings"].get(name) for name in OWN}}
        every = sorted({*same, *first["settings"]})
        different = [key for key in every if same.get(key) != first["settings"].get(key)]
        if other["stage"] != first["stage"] or different:
            differences = "; ".join(
                f"{key}: {_shown(first['settings'].get(key))} and {_shown(same.get(key))}" for key in different
            )
            raise ValueError(
                f"process 0 ({first['host']}, {first['stage']}) and process {rank} ({other['host']}, {other['stage']}) "
                f"have different settings ({differences or 'another stage'}); start all of them with the same ones"
            )


def _raise_first(mistakes: list[str], hosts: list[str]) -> None:
    """Raise what is wrong on the first process that says so; it is named if others are fine."""
    wrong = [rank for rank, words in enumerate(mistakes) if words]
    if wrong:
        where = "" if len(set(mistakes)) == 1 else f"process {wrong[0]} ({hosts[wrong[0]]}): "
        raise ValueError(where + mistakes[wrong[0]])


def _every(meeting: Meeting, about: str, look: Any) -> list[str]:
    """Let every process look, and return what all of them found. Raises ValueError on all if one does."""
    answer, mistake = "", ""
    try:
        answer = look()
    except (ValueError, OSError) as error:
        mistake = " ".join(str(error).split())
    words = json.dumps({"host": socket.gethostname(), "mistake": mistake, "answer": answer})
    answers = [json.loads(text) for text in meeting.exchange(about, words)]
    _raise_first([each["mistake"] for each in answers], [each["host"] for each in answers])
    return [each["answer"] for each in answers]


def _ask(meeting: Meeting, about: str, look: Any) -> str:
    """Let the first process look, and return what it found to all. Raises ValueError on all of them if it does."""
    return _every(meeting, about, look if meeting.rank == 0 else str)[0]


def _begin(folder: Path, token: str, locks: list[Any]) -> str:
    """Hold the folder, and write what the others are to see."""
    make_folder(folder)
    locks.append(_lock(folder))
    with writing(folder):
        (folder / token).touch()
    return token


def _lock(folder: Path) -> Any:
    """Open a file that no other run can lock as long as this process lives; a killed one leaves no lock behind."""
    with writing(folder):
        file = (folder / LOCK).open("w", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows
        pass
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"{folder}: another run is writing there; wait for its end, or choose another logdir"
        ) from error
    except OSError as error:
        log.warning("%s: its disk has no locks (%s); see to it that no other run writes there", folder, error.strerror)
    return file


def _see(folder: Path, token: str, meeting: Meeting) -> str:
    """Find what the first process wrote, and write there as well."""
    end = time.monotonic() + SHARED_WITHIN
    # Asked by listing, since a network disk may remember for a while that a file is not there.
    while not (folder.is_dir() and token in os.listdir(folder)):
        if time.monotonic() > end:
            raise ValueError(
                f"logdir {folder} is not the folder of the same name that process 0 writes to; "
                "give one on a disk that all machines share"
            )
        time.sleep(0.5)
    own = folder / f"{token}-{meeting.rank}"
    with writing(folder, own):
        own.touch()
        own.unlink()
    return ""


def _leave(folder: Path, token: str, meeting: Meeting) -> None:
    if meeting.rank == 0:
        with suppress(OSError):
            (folder / token).unlink(missing_ok=True)
