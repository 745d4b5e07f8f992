"""The trainer: strict settings, numbers that do not depend on processes or interruptions, students that can be used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selfforcing_core.checkpoint import read_checkpoint, save_checkpoint
from selfforcing_core.config import WanConfig
from selfforcing_core.layout import wan_shapes
from train import diffusion, import_config, ode
from train.args import CONFIGS, DmdArgs, config_path, parse
from train.data import DatabaseWriter
from train.dmd import main
from train.draws import Draws, item
from train.export import ExportArgs, export
from train.plan import parameters, plan

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 128, "text_len": 16, "freq_dim": 32}
CONFIG_NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run on small random networks, in float64."""
    folder = tmp_path_factory.mktemp("networks")
    generator = torch.Generator().manual_seed(0)
    for name in ("student", "teacher"):
        shapes = wan_shapes(WanConfig(**SIZES))
        weights = {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}
        save_checkpoint(folder / f"{name}.safetensors", weights, WanConfig(**SIZES))
    (folder / "prompts.txt").write_text("a red square\n\na green circle\na blue triangle\n", encoding="utf-8")
    return [
        f"student={folder}/student.safetensors", f"teacher={folder}/teacher.safetensors", "text_encoder=tiny",
        f"prompts={folder}/prompts.txt", "width=32", "height=32", "latent_frames=4", "chunk=2",
        "batch_size=6", "micro_batch=1", "critic_per_student=2", "lr=1e-3", "lr_critic=1e-3", "ema_start=2",
        "ema_decay=0.5", "dtype=float64", "device=cpu", "max_steps=4", "save_every=2", "keep_last=5",
    ]  # fmt: skip


def launch(arguments: list[str], processes: int = 1, stage: str = "train.dmd") -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", stage, *arguments]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(arguments: list[str], processes: int = 1, stage: str = "train.dmd") -> None:
    process = launch(arguments, processes, stage)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def numbers(folder: Path) -> list[dict[str, float]]:
    """What each step told, without its seconds."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def student(folder: Path, tmp_path: Path, weights: str = "raw") -> dict[str, torch.Tensor]:
    out = tmp_path / f"{folder.name}-{weights}.safetensors"
    export(ExportArgs(logdir=str(folder), out=str(out), weights=weights, dtype="float32"))
    return read_checkpoint(out).state_dict


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process, clip by clip."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run([*settings, f"logdir={folder}"])
    return folder


@pytest.mark.parametrize(("processes", "micro"), [(1, 6), (2, 3), (3, 1)])
def test_numbers_do_not_depend_on_processes_or_parts(
    settings: list[str], whole: Path, tmp_path: Path, processes: int, micro: int
) -> None:
    folder = tmp_path / "other"
    run([*settings, f"micro_batch={micro}", f"logdir={folder}"], processes)
    assert len(numbers(folder)) == 4
    for found, expected in zip(numbers(folder), numbers(whole)):
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)
    found, expected = student(folder, tmp_path), student(whole, tmp_path)
    torch.testing.assert_close(found, expected)


def test_a_run_that_was_killed_goes_on_bit_by_bit(settings: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = launch([*settings, f"logdir={folder}"])
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints/step_000002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder / "checkpoints/step_000003.partial").mkdir()  # what a kill in the middle of a save leaves
    run([*settings, f"logdir={folder}"])
    assert numbers(folder)[-2:] == numbers(whole)[-2:]
    for weights in ("raw", "ema"):
        found, expected = student(folder, tmp_path, weights), student(whole, tmp_path, weights)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    start = read_checkpoint(Path(settings[0].removeprefix("student="))).state_dict
    assert not torch.equal(expected["head.head.weight"], start["head.head.weight"])


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


@pytest.mark.parametrize("more", [["score=sid"], ["chunk=0"], ["activation_checkpointing=true", "exit_per_chunk=true"]])
def test_every_way_of_matching_takes_a_step(settings: list[str], tmp_path: Path, more: list[str]) -> None:
    assert main([*settings, *more, "max_steps=1", "save_every=0", f"logdir={tmp_path / 'run'}"]) == 0
    (row,) = numbers(tmp_path / "run")
    assert row["student_grad_norm"] > 0
    assert row["critic_grad_norm"] > 0


@pytest.fixture(scope="module")
def clips(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of flow matching on a small database."""
    folder = tmp_path_factory.mktemp("clips") / "database"
    writer, generator = DatabaseWriter(folder), torch.Generator().manual_seed(0)
    for name in "abcdefg":
        writer.add(f"clip {name}", torch.randn(4, 16, 4, 4, generator=generator))
    writer.close()
    shared = ("text_encoder", "chunk", "batch_size", "micro_batch", "ema", "dtype")
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


def test_flow_matching_does_not_depend_on_processes(clips: list[str], tmp_path: Path) -> None:
    assert diffusion.main([*clips, "micro_batch=6", f"logdir={tmp_path / 'one'}"]) == 0
    run([*clips, f"logdir={tmp_path / 'two'}"], 2, "train.diffusion")
    for found, expected in zip(numbers(tmp_path / "two"), numbers(tmp_path / "one")):
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_activation_checkpointing_changes_no_number(settings: list[str], whole: Path, tmp_path: Path) -> None:
    options = ["activation_checkpointing=false", "max_steps=1", "save_every=0"]
    assert main([*settings, *options, f"logdir={tmp_path / 'run'}"]) == 0
    assert numbers(tmp_path / "run")[0] == pytest.approx(numbers(whole)[0], rel=1e-12)


# ---------------------------------------------------------------- settings --
@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_every_shipped_configuration_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage = diffusion.main if name.startswith("diffusion") else main
    assert stage([f"config={name}", "--dry-run"]) == 0
    assert "bytes_per_process" in capsys.readouterr().out


def test_launch_lines_of_the_reference_work(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--config_path configs/self_forcing_dmd.yaml --logdir logs/x --no_visualize --disable-wandb --dry-run"
    assert main(words.split()) == 0
    told = capsys.readouterr().out
    assert "logdir: logs/x" in told
    assert "max_steps: 600" in told
    assert config_path("configs/self_forcing_dmd.yaml") == CONFIGS / "self_forcing_dmd.yaml"


def test_a_configuration_of_the_reference_is_translated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(
        "generator_ckpt: checkpoints/ode_init.pt\nreal_name: Wan2.1-T2V-14B\nguidance_scale: 3.0\nlr: 2.0e-06\n"
        "denoising_step_list: [1000, 750, 500, 250, 0]\ntimestep_shift: 5.0\nbeta1: 0.0\nbeta2: 0.999\n"
        "image_or_video_shape: [1, 21, 16, 60, 104]\nlog_iters: 50\nwandb_key: x\ndistribution_loss: sid\n",
        encoding="utf-8",
    )
    assert import_config.main([str(theirs)]) == 0
    told = capsys.readouterr()
    assert "no use for: wandb_key" in told.err
    (tmp_path / "ours.yaml").write_text(told.out, encoding="utf-8")
    args = parse(DmdArgs, [f"config={tmp_path / 'ours.yaml'}"])
    assert (args.teacher, args.guidance, args.score, args.save_every) == ("models/wan2.1-t2v-14b", 4.0, "sid", 50)
    assert (args.width, args.height, args.latent_frames) == (832, 480, 21)
    assert args.steps == [1000.0, 750.0, 500.0, 250.0]
    theirs.write_text("lr: fast\n", encoding="utf-8")
    assert import_config.main([str(theirs)]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lr_crtic=1"], "nearest are lr_critic"),
        (["lr=fast"], "lr"),
        (["--fast"], "is no setting"),
        (["config=absent"], "use one of debug_cpu"),
        (["config=debug_cpu", "logdir=x", "batch_size=3", "micro_batch=2"], "use a multiple of 2"),
        (["config=debug_cpu", "logdir=x", "score=gun"], "use dmd or sid"),
        (["config=debug_cpu", "logdir=x", "keep_last=0"], "use 1 or more"),
        (["config=debug_cpu", "logdir=x", "wandb=true"], "is no setting"),
        (["config=debug_cpu", "logdir=x", "width=33"], "use 32 or 48"),
        (["config=debug_cpu"], "logdir is not set"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert told.err.count("\n") == 1
    assert not Path("x").exists()


def test_a_new_run_is_not_mixed_with_an_old_one(
    settings: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*settings, "resume=false", f"logdir={whole}"]) == 2
    assert "choose another logdir" in capsys.readouterr().err


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


def test_the_plan_counts_the_published_networks() -> None:
    assert parameters("t2v-1.3b") == 1_418_996_800
    assert parameters("t2v-14b") == 14_288_491_584
    args = parse(DmdArgs, ["config=self_forcing_dmd"])
    alone, many = plan(args, 1), plan(args, 64)
    assert alone["bytes_per_process"]["teacher"] == 4 * 14_288_491_584
    assert many["bytes_per_process"]["teacher"] == alone["bytes_per_process"]["teacher"] // 64
