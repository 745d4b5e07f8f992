"""The trainer: strict settings, numbers that do not depend on processes or interruptions, students that can be used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from selfforcing_core.weights.checkpoint import read_checkpoint
from tests.support.forks import Program, finish, start
from tests.support.training import ROOT, launch, numbers, run, run_settings, student, write_database, write_network
from train import diffusion, footprint, ode
from train.args import CONFIGS, DmdArgs, config_path, parse
from train.data import DatabaseWriter
from train.dmd import main
from train.engine import lr_scale
from train.export import ExportArgs, export
from train.randomness import Draws, item

CONFIG_NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*run_settings(tmp_path_factory.mktemp("networks")), "micro_batch=3"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process, each in two parts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run([*settings, f"logdir={folder}"])
    return folder


@pytest.mark.parametrize(
    ("processes", "more"),
    [(1, ["micro_batch=6"]), (2, []), (3, ["micro_batch=1"]), (2, ["shard_group=1"])],
)
def test_numbers_do_not_depend_on_processes_or_parts(
    settings: list[str], whole: Path, tmp_path: Path, processes: int, more: list[str]
) -> None:
    """Nor on whether the weights are sharded over all processes or copied to each (shard_group=1)."""
    folder = tmp_path / "other"
    run([*settings, *more, f"logdir={folder}"], processes)
    assert len(numbers(folder)) == 4
    for actual, expected in zip(numbers(folder), numbers(whole)):
        assert actual == pytest.approx(expected, rel=1e-10, abs=1e-10)
    actual, expected = student(folder, tmp_path), student(whole, tmp_path)
    torch.testing.assert_close(actual, expected)


def test_two_processes_sum_gradients_in_float32(settings: list[str], tmp_path: Path) -> None:
    """Which gloo reduces in another way than float64, in which the other tests compare."""
    more = ["dtype=float32", "max_steps=1", "save_every=0"]
    run([*settings, *more, f"logdir={tmp_path / 'one'}"])
    run([*settings, *more, f"logdir={tmp_path / 'two'}"], 2)
    (one,), (two,) = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)


def test_a_run_that_was_killed_goes_on_bit_exactly(settings: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = start(Program("train.dmd", [*settings, f"logdir={folder}"], ROOT), tmp_path / "output.txt")
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints/step_000002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    (folder / "checkpoints/step_000003.partial").mkdir()  # what a kill in the middle of a save leaves
    run([*settings, f"logdir={folder}"])
    assert numbers(folder)[-2:] == numbers(whole)[-2:]
    for weights in ("raw", "ema"):
        actual, expected = student(folder, tmp_path, weights), student(whole, tmp_path, weights)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    untrained = read_checkpoint(Path(settings[0].removeprefix("student="))).state_dict
    assert not torch.equal(expected["head.head.weight"], untrained["head.head.weight"])


def test_a_run_may_go_on_with_another_number_of_processes(settings: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grown"
    assert main([*settings, "micro_batch=6", "max_steps=2", f"logdir={folder}"]) == 0
    run([*settings, f"logdir={folder}"], 2)
    for actual, expected in zip(numbers(folder), numbers(whole), strict=True):
        assert actual == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_a_run_that_is_asked_to_stop_saves_first(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = launch([*settings, "max_steps=1000", "save_every=500", f"logdir={folder}"])
    deadline = time.monotonic() + 200
    while not (folder / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    (saved,) = (folder / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) == len(numbers(folder))


def test_a_lost_process_ends_all_with_one_message(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    process = launch([*settings, "max_steps=1000", f"logdir={folder}"], 2)  # torchrun itself
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints/step_000002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    ours = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ours[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("a process of the run is lost") == 1
    assert "step_0000" in errors
    assert "gloo" not in errors, "no traceback of the others"


@pytest.mark.parametrize(
    "more", [["score=sid"], ["chunk=0"], ["activation_checkpointing=false", "exit_per_chunk=true"], ["dtype=bfloat16"]]
)
def test_every_way_of_matching_takes_a_step(settings: list[str], tmp_path: Path, more: list[str]) -> None:
    assert main([*settings, *more, "max_steps=1", "save_every=0", f"logdir={tmp_path / 'run'}"]) == 0
    (row,) = numbers(tmp_path / "run")
    assert row["student_grad_norm"] > 0
    assert row["critic_grad_norm"] > 0


@pytest.fixture(scope="module")
def clips(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of flow matching on a small database."""
    folder = write_database(tmp_path_factory.mktemp("clips") / "database")
    shared = ("text_encoder", "chunk", "batch_size", "micro_batch", "ema", "dtype", "tensorboard")
    kept = [entry for entry in settings if entry.startswith(shared)]
    network = settings[0].replace("student=", "network=")
    return [*kept, network, f"data={folder}", "lr=1e-3", "device=cpu", "max_steps=2", "save_every=2"]


@pytest.mark.parametrize("more", [[], ["forcing=diffusion"], ["forcing=none", "chunk=0"]])
def test_every_way_of_flow_matching_gives_a_start(
    clips: list[str], settings: list[str], tmp_path: Path, more: list[str]
) -> None:
    assert diffusion.main([*clips, *more, f"logdir={tmp_path / 'run'}"]) == 0
    first, second = numbers(tmp_path / "run")
    assert first["student_grad_norm"] > 0
    assert first["student_loss"] != second["student_loss"]
    # a student of the next stage starts from its export
    out = tmp_path / "start.safetensors"
    export(ExportArgs(logdir=str(tmp_path / "run"), out=str(out), weights="raw"))
    assert (read_checkpoint(out).causal is None) == ("chunk=0" in more)
    assert main([*settings, f"student={out}", "max_steps=1", "save_every=0", f"logdir={tmp_path / 'next'}"]) == 0


def test_regression_on_trajectories_takes_steps(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer, generator = DatabaseWriter(tmp_path / "ode"), torch.Generator().manual_seed(0)
    for name in "abc":
        writer.add(f"clip {name}", torch.randn(3, 4, 16, 4, 4, generator=generator))
    writer.close()
    options = [*clips, f"data={tmp_path / 'ode'}", f"logdir={tmp_path / 'run'}"]
    assert ode.main([*options, "timesteps=[1000,500,0]", "first_frame_clean=true"]) == 0
    first, second = numbers(tmp_path / "run")
    assert first["student_grad_norm"] > 0
    assert first["student_loss"] != second["student_loss"]
    assert ode.main([*options, f"logdir={tmp_path / 'other'}", "timesteps=[1000,0]"]) == 2
    assert "3 states" in capsys.readouterr().err


def test_stages_before_the_distillation_take_text_to_video_networks(
    clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = write_network(tmp_path / "i2v.safetensors", 0, in_dim=36, model_type="i2v")
    assert diffusion.main([*clips, f"network={network}", f"logdir={tmp_path / 'run'}"]) == 2
    assert "start from a text-to-video one" in capsys.readouterr().err


def test_flow_matching_does_not_depend_on_processes(clips: list[str], tmp_path: Path) -> None:
    assert diffusion.main([*clips, "micro_batch=6", f"logdir={tmp_path / 'one'}"]) == 0
    run([*clips, "micro_batch=1", f"logdir={tmp_path / 'two'}"], 2, "train.diffusion")
    for actual, expected in zip(numbers(tmp_path / "two"), numbers(tmp_path / "one")):
        assert actual == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_activation_checkpointing_changes_no_number(settings: list[str], whole: Path, tmp_path: Path) -> None:
    options = ["activation_checkpointing=false", "max_steps=1", "save_every=0"]
    assert main([*settings, *options, f"logdir={tmp_path / 'run'}"]) == 0
    assert numbers(tmp_path / "run")[0] == pytest.approx(numbers(whole)[0], rel=1e-12)


# ---------------------------------------------------------------- settings --
@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_every_shipped_configuration_is_understood(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, which takes a minute to find, is what tests/train/test_plan.py is about."""
    monkeypatch.setattr(footprint, "peak_bytes", lambda args, processes, stage: {"student": processes})
    stage = {"diffusion": diffusion.main, "ode": ode.main}.get(name, main)
    assert stage([f"config={name}", "--dry-run"]) == 0
    report = json.loads("{" + capsys.readouterr().out.split("\n{", 1)[1])
    assert report["clips_per_process_and_step"] > 0
    assert report["peak_bytes_per_process"] == {"student": 1}
    assert set(report["flops_per_update"]) == ({"student", "critic"} if stage is main else {"student"})
    assert report["least_gpu_hours"]["a100"] >= report["least_gpu_hours"]["h100"] >= 0


@pytest.mark.parametrize("name", [f"self_forcing_{kind}" for kind in ("dmd", "sid", "14b_dmd", "14b_i2v_dmd")])
def test_launch_lines_of_the_reference_work(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "peak_bytes", lambda args, processes, stage: {"student": processes})
    words = f"--config_path configs/{name}.yaml --logdir logs/x --no_visualize --no_save --disable-wandb --dry-run"
    assert main(words.split()) == 0
    stdout = capsys.readouterr().out
    assert "logdir: logs/x" in stdout
    assert "save_every: 0" in stdout
    assert config_path(f"configs/{name}.yaml") == CONFIGS / f"{name}.yaml"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lr_crtic=1"], "nearest are lr_critic"),
        (["lr=fast"], "lr"),
        (["--fast"], "is no setting"),
        (["config=absent"], "use one of debug_cpu"),
        (["config=debug_cpu", "logdir=x", "batch_size=3", "micro_batch=2"], "use a multiple of 2"),
        (["config=debug_cpu", "logdir=x", "score=gun"], "use dmd, sid or gan"),
        (["config=debug_cpu", "logdir=x", "keep_last=0"], "use 1 or more"),
        (["config=debug_cpu", "logdir=x", "wandb=true"], "needs the package wandb"),
        (["config=debug_cpu", "logdir=x", "sample_every=1"], "needs decoder="),
        (["config=debug_cpu", "logdir=x", "lora_rank=-1"], "no size of adapters"),
        (["config=debug_cpu", "logdir=x", "max_latent_frames=3"], "less than the 6"),
        (["config=debug_cpu", "logdir=x", "max_latent_frames=9"], "need chunks"),
        (["config=debug_cpu", "logdir=x", "shard_group=2"], "does not divide 1"),
        (["config=debug_cpu", "logdir=x", "width=33"], "use 32 or 48"),
        (["config=debug_cpu"], "logdir is not set"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("x").exists()


def test_a_new_run_is_not_mixed_with_an_old_one(
    settings: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*settings, "resume=false", f"logdir={whole}"]) == 2
    assert "choose another logdir" in capsys.readouterr().err


def test_learning_rates_rise_and_fall() -> None:
    plain = parse(DmdArgs, ["max_steps=100"])
    assert {lr_scale(plain, step) for step in range(100)} == {1.0}
    args = parse(DmdArgs, ["max_steps=100", "warmup_steps=10", "lr_end=0.1"])
    scales = [lr_scale(args, step) for step in range(101)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[50] == pytest.approx(0.55)
    assert scales[100] == pytest.approx(0.1)
    assert max(scales) == scales[9]


def test_draws_depend_on_all_that_they_are_for() -> None:
    shape = (2, 3)
    drawn = [
        Draws(seed, step, purpose).normal(first, shape)
        for seed in (0, 1)
        for step in (0, 1)
        for purpose in ("student", "critic")
        for first in (0, 2)
    ]
    assert len({tuple(values.flatten().tolist()) for values in drawn}) == len(drawn)
    assert torch.equal(Draws(0, 0, "a").normal(1, (1, 3))[0], Draws(0, 0, "a").normal(0, shape)[1])
    assert sorted(item(0, number, 5) for number in range(5, 10)) == list(range(5))


def test_runs_that_are_killed_at_any_moment_become_what_they_would_have_been(tmp_path: Path) -> None:
    """Two of the hundred kills of `python -m tests.support.kills`."""
    program = Program("tests.support.kills", ["--count", "2", "--steps", "3"], ROOT)
    (status,), (output,) = finish([program], tmp_path, timeout=400)
    assert status == 0, output[-3000:]
    assert json.loads(output.splitlines()[-1])["kills"] == 2
