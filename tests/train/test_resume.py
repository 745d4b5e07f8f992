"""A run goes on in its own folder alone, on however many machines, and ends in one line where it cannot."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from tests.support.forks import Program, finish
from tests.support.full_disk import no_longer_than
from tests.support.training import numbers, run_settings, write_database
from train import diffusion, resume, run_checkpoints
from train.args import DmdArgs, OdeArgs, TrainArgs, parse, to_yaml
from train.distributed import Meeting
from train.dmd import main

STAGES: list[tuple[str, type[TrainArgs]]] = list(resume.STAGES.items())


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*run_settings(tmp_path_factory.mktemp("networks")), "micro_batch=6", "dtype=float32"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*settings, "max_steps=2", "save_every=1", f"logdir={folder}"]) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, 0.5] if isinstance(value, list) else f"{value}/other"


# ---------------------------------------------------------------- settings --
@pytest.mark.parametrize(("stage", "kind"), STAGES)
def test_every_single_setting_that_differs_is_harmless_for_a_reason_or_refused(
    stage: str, kind: type[TrainArgs], tmp_path: Path
) -> None:
    args = parse(kind, [f"logdir={tmp_path}"])
    resume.write_settings(tmp_path, stage, args)
    (tmp_path / "checkpoints/step_000003").mkdir(parents=True)
    before = content(tmp_path)
    assert resume.check(tmp_path, stage, args) == tmp_path / "checkpoints/step_000003"
    for field in dataclasses.fields(kind):
        value = other(getattr(args, field.name))
        changed = dataclasses.replace(args, **{field.name: [] if field.name == "resume_changed" else value})
        if field.name in resume.harmless(kind):
            assert resume.harmless(kind)[field.name]
            if field.name != "resume":
                assert resume.check(tmp_path, stage, changed) is not None, field.name
        else:
            with pytest.raises(ValueError, match=rf"\({field.name}: .* -> .*resume_changed=\[{field.name}\]"):
                resume.check(tmp_path, stage, changed)
            wanted = dataclasses.replace(changed, resume_changed=[field.name])
            assert resume.check(tmp_path, stage, wanted) is not None
    assert content(tmp_path) == before
    known = {field.name for _, stage_kind in STAGES for field in dataclasses.fields(stage_kind)}
    assert set(resume.HARMLESS) | set(resume.HARMLESS_FOR_CLIPS) <= known


def test_what_changes_what_is_learnt_is_not_harmless() -> None:
    for name in ("seed", "lr", "batch_size", "guidance", "dtype", "chunk", "teacher", "lora_rank", "width", "student"):
        assert name not in resume.harmless(DmdArgs)
    assert "width" in resume.harmless(OdeArgs)


def test_folders_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Without the stage's name, and without settings that came later, which count as their defaults."""
    for number, (stage, kind) in enumerate(STAGES):
        folder = tmp_path / str(number)
        (folder / "checkpoints/step_000003").mkdir(parents=True)
        old = [line for line in to_yaml(parse(kind, ["lr=3e-5"])).splitlines() if not line.startswith("warmup_steps")]
        (folder / "config.yaml").write_text("\n".join(line for line in old if "resume_changed" not in line))
        assert resume.read_settings(folder).stage == stage
        assert resume.check(folder, stage, parse(kind, ["lr=3e-5"])) is not None
        with pytest.raises(ValueError, match="warmup_steps: 0 -> 7"):
            resume.check(folder, stage, parse(kind, ["lr=3e-5", "warmup_steps=7"]))
        (folder / "config.yaml").write_text("\n".join([*old, "was_once: 3"]))
        with pytest.raises(ValueError, match="was_once: 3 -> no setting any more"):
            resume.check(folder, stage, parse(kind, ["lr=3e-5"]))


def test_another_spelling_of_a_file_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resume.write_settings(tmp_path, "train.dmd", parse(DmdArgs, ["teacher=a/t.pt"]))
    (tmp_path / "checkpoints/step_000003").mkdir(parents=True)
    assert resume.check(tmp_path, "train.dmd", parse(DmdArgs, [f"teacher={tmp_path}/a/t.pt"])) is not None
    with pytest.raises(ValueError, match=r"teacher: a/t\.pt -> b/t\.pt"):
        resume.check(tmp_path, "train.dmd", parse(DmdArgs, ["teacher=b/t.pt"]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "config.yaml is missing"),
        (lambda file: file.write_text("a: [1"), "cannot be read as a run's settings"),
        (lambda file: file.write_text("lr: 1\n"), "known are train.dmd"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "cannot be read as a run's settings"),
    ],
)
def test_a_folder_whose_run_is_unknown_is_left_alone(damage: Any, words: str, tmp_path: Path) -> None:
    resume.write_settings(tmp_path, "train.dmd", parse(DmdArgs, []))
    (tmp_path / "checkpoints/step_000003").mkdir(parents=True)
    damage(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=words):
        resume.check(tmp_path, "train.dmd", parse(DmdArgs, []))


def test_what_is_no_checkpoint_of_the_run_is_neither_read_nor_removed(tmp_path: Path) -> None:
    kept = ["step_000002_mine", "step_backup", "best.partial"]
    for name in (*kept, "step_000002", "step_000003.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in run_checkpoints.complete(tmp_path)] == ["step_000002"]
    run_checkpoints.clean(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted([*kept, "step_000002"])


# --------------------------------------------------------------- real runs --
def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], stage: Any = main, status: int = 2) -> str:
    """The one line with which a run ends."""
    capsys.readouterr()
    start = time.monotonic()
    assert stage(arguments) == status
    stderr = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("train.")]
    assert len(stderr) == 1
    assert time.monotonic() - start < 60
    return stderr[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["guidance=9", "lr=2e-3"], "(lr: 0.001 -> 0.002; guidance: 4.0 -> 9.0)"),
        (["lora_rank=4", "resume_changed=[lora_rank]"], "holds other tensors than this run trains"),
        (["resume_changed=[lrr]"], "lrr is no setting"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_nothing_is_touched(
    settings: list[str], whole: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(whole)
    line = refusal([*settings, *more, "max_steps=3", f"logdir={whole}"], capsys)
    assert words in line
    assert content(whole) == before


def test_another_stage_is_refused_and_nothing_is_touched(
    settings: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("text_encoder", "chunk", "batch_size", "micro_batch", "dtype", "tensorboard", "device")
    kept = [entry for entry in settings if entry.startswith(shared)]
    clips = [settings[0].replace("student=", "network="), f"data={write_database(tmp_path / 'database')}"]
    before = content(whole)
    line = refusal([*kept, *clips, "max_steps=3", f"logdir={whole}"], capsys, diffusion.main)
    assert "holds a run of train.dmd, and this is train.diffusion" in line
    assert content(whole) == before


def test_a_run_goes_on_with_harmless_changes_and_those_that_are_named(
    settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert main([*settings, "max_steps=1", "save_every=1", f"logdir={folder}"]) == 0
    more = ["max_steps=2", "micro_batch=3", "lr=2e-3", "resume_changed=[lr]"]
    assert main([*settings, *more, f"logdir={folder}"]) == 0
    assert [row["step"] for row in numbers(folder)] == [1, 2]
    assert "lr: 0.001 -> 0.002" in caplog.text
    assert resume.read_settings(folder).settings["lr"] == 2e-3


def test_a_folder_that_another_run_writes_to_is_left_alone(
    settings: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = resume._lock(whole)
    before = content(whole)
    try:
        assert "another run is writing there" in refusal([*settings, f"logdir={whole}"], capsys)
    finally:
        state.close()
    assert content(whole) == before


def test_a_run_that_cannot_begin_leaves_no_folder(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal([*settings, "student=absent.safetensors", f"logdir={tmp_path}/a/b"], capsys)
    assert not (tmp_path / "a/b").exists()
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/run: cannot be written" in refusal([*settings, f"logdir={tmp_path}/file/run"], capsys)


# --------------------------------------------------------------- full disks --
def test_a_checkpoint_that_does_not_fit_ends_the_run_with_the_last_good_one(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*settings, "max_steps=2", f"logdir={folder}"]) == 0
    for room in (50_000, 400_000):
        with no_longer_than(room, tmp_path):
            line = refusal([*settings, "save_every=1", f"logdir={folder}"], capsys, status=3)
        assert "step_000003: cannot be written (" in line
        assert line.endswith(f"the last good checkpoint is {folder}/checkpoints/step_000002")
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]
    assert main([*settings, f"logdir={folder}"]) == 0
    assert [row["step"] for row in numbers(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize("more", [["tensorboard=true"], ["tensorboard=false"]])
def test_a_log_that_does_not_fit_ends_the_run_in_one_line(
    settings: list[str], more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with no_longer_than(4000, tmp_path):
        status = main([*settings, *more, "max_steps=400", "save_every=0", f"logdir={folder}"])
    stderr = capfd.readouterr().err
    assert status == 3
    assert stderr.count("train.dmd: ") == 1
    assert "the last good checkpoint is the start" in stderr
    assert "Traceback" not in stderr


# --------------------------------------------------------- several machines --
IMPATIENT = "from train import resume; resume.SHARED_WITHIN = 3"


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return int(result.getsockname()[1])


def machines(arguments: list[list[str]], folders: list[Path], code: str = "") -> tuple[list[int], list[str], float]:
    """One process per machine, each started in a folder of its own: exit statuses, what they said, seconds."""
    port, start = str(free_port()), time.monotonic()
    programs = []
    for rank, (words, folder) in enumerate(zip(arguments, folders)):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(arguments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        folder.mkdir(exist_ok=True)
        programs.append(Program("train.dmd", words, folder, environment, code))
    with TemporaryDirectory() as outputs:
        statuses, report = finish(programs, Path(outputs), timeout=150)
    return statuses, report, time.monotonic() - start


def test_processes_without_a_shared_folder_end_in_one_line(settings: list[str], tmp_path: Path) -> None:
    """Whatever is in their folders: here a checkpoint on the first machine alone."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    assert main([*settings, "max_steps=1", "save_every=1", f"logdir={first}/run"]) == 0
    before = content(first)
    statuses, report, seconds = machines([[*settings, "micro_batch=3", "logdir=run"]] * 2, [first, second], IMPATIENT)
    assert statuses == [2, 2], report
    lines = "".join(report).splitlines()
    assert len([line for line in lines if line.startswith("train.dmd: process 1 (")]) == 1
    assert "on a disk that all machines share" in "".join(lines)
    assert "Traceback" not in "".join(lines)
    assert content(first) == before
    assert content(second) == {}
    assert seconds < 60


def met(argument_lists: list[list[str]], mistakes: tuple[str, ...] = ("", "")) -> list[str]:
    """What processes that meet (threads, here) are told before they are joined; empty: that they may begin."""
    store, report = HashStore(), [""] * len(argument_lists)

    def begin(rank: int) -> None:
        args = None if mistakes[rank] else parse(DmdArgs, argument_lists[rank])
        try:
            with resume.opened(Meeting(store, rank, len(report)), "train.dmd", args, mistakes[rank]):
                pass
        except ValueError as error:
            report[rank] = str(error)

    threads = [threading.Thread(target=begin, args=(rank,), daemon=True) for rank in range(len(report))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return report


def test_processes_that_cannot_run_together_are_all_told_the_same(
    whole: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SHARED_WITHIN", 0.5)
    before, old, new = content(whole), [*settings, f"logdir={whole}"], [*settings, f"logdir={tmp_path}/new"]
    for lines, mistakes, words in (
        ([new, [*new, "max_steps=9"]], ("", ""), "have different settings (max_steps: 4 and 9)"),
        ([new, []], ("", "lr is wrong"), "): lr is wrong"),
        ([[*new, "x"], []], ("lr is wrong", "lr is wrong"), "lr is wrong"),
        ([[*old, "lr=5"], [*new, "lr=5"]], ("", ""), "holds a run with other settings (lr: 0.001 -> 5.0)"),
        ([old, new], ("", ""), "on a disk that all machines share"),
        ([new, old], ("", ""), "on a disk that all machines share"),
        ([[*settings, f"logdir={tmp_path}/file/run"], new], ("", ""), "file/run: cannot be written"),
    ):
        (tmp_path / "file").write_text("")
        report = met(lines, mistakes)
        assert report[0] == report[1]
        assert words in report[0]
        assert content(whole) == before
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert met([new, new]) == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FULL = "(_ for _ in ()).throw(OSError(28, 'No space left on device'))"

OPENING = f"""
import pathlib
opened = pathlib.Path.open
pathlib.Path.open = lambda path, *how, **more: {FULL} if path.name == "log.jsonl" else opened(path, *how, **more)
"""


@pytest.mark.parametrize(
    ("rank", "planted", "words"),
    [
        (1, f"import os; os.fsync = lambda _: {FULL}", "step_000001: cannot be written (No space left on device)"),
        (0, OPENING, "log.jsonl: cannot be written (No space left on device)"),
    ],
    ids=["checkpoint", "log"],
)
def test_a_full_disk_of_one_process_ends_all(
    rank: int, planted: str, words: str, settings: list[str], tmp_path: Path
) -> None:
    """Also the one that waits for it: both with one line, and no half checkpoint."""
    code = f"import os; exec({planted!r}) if os.environ['RANK'] == '{rank}' else None"
    ours = [*settings, "micro_batch=3", "save_every=1", f"logdir={tmp_path}/run"]
    statuses, report, _ = machines([ours] * 2, [tmp_path, tmp_path], code)
    assert statuses == [3, 3], report
    lines = [line for line in "".join(report).replace("\r", "\n").splitlines() if line.startswith("train.dmd: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "the last good checkpoint is the start" in lines[0]
    assert "Traceback" not in "".join(report)
    assert list((tmp_path / "run").glob("checkpoints/*")) == []


def test_a_setting_that_is_gone_may_be_named(tmp_path: Path) -> None:
    args = DmdArgs(logdir=str(tmp_path))
    resume.write_settings(tmp_path, "train.dmd", args)
    with (tmp_path / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("old_knob: 3\n")
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"resume_changed=\[old_knob\]"):
        resume.check(tmp_path, "train.dmd", args)
    args.resume_changed = ["old_knob"]
    assert resume.check(tmp_path, "train.dmd", args) == tmp_path / "checkpoints" / "step_000001"
