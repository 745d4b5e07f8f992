"""What a distillation is conditioned on: prompts from files and folders, pictures, long clips; and what it shows."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from selfforcing_core.codecs.video import read_video
from tests.support.training import numbers, run_settings, write_database, write_encoders, write_network
from train import dmd, logs
from train.args import DmdArgs, parse
from train.conditions import read_texts
from train.dmd import main
from train.sample import main as sample_main


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*run_settings(tmp_path_factory.mktemp("networks")), "micro_batch=3", "max_steps=2"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    vae, clip = write_encoders(tmp_path_factory.mktemp("encoders"))
    return [f"vae={vae}", f"clip={clip}"]


def test_prompts_come_from_a_file_or_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b.txt").write_text("second\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first\nline two\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("  \n", encoding="utf-8")
    assert read_texts(str(tmp_path)) == ["first line two", "second"]
    assert read_texts(str(tmp_path / "a.txt")) == ["first", "line two"]
    assert "1 empty prompts are left out, 2 remain" in caplog.text
    caplog.clear()
    (tmp_path / "a.txt").write_bytes("one\u2028still\r\ntwo\x85\r\n\r\n".encode())
    assert read_texts(str(tmp_path / "a.txt")) == ["one\u2028still", "two"]
    assert "1 empty prompts are left out, 2 remain" in caplog.text
    (tmp_path / "d.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"d\.txt: cannot be read as text"):
        read_texts(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no prompt"):
        read_texts(str(tmp_path / "none"))


def test_kept_embeddings_are_those_of_the_encoder(settings: list[str], tmp_path: Path) -> None:
    """A second run reads them, and never loads the text encoder."""
    options = [*settings, "max_steps=1", "save_every=0"]
    assert main([*options, f"logdir={tmp_path / 'plain'}"]) == 0
    kept = [*options, f"embeddings={tmp_path / 'kept'}"]
    assert main([*kept, f"logdir={tmp_path / 'first'}"]) == 0
    files = list((tmp_path / "kept").iterdir())
    assert len(files) == 4  # three prompts and the empty negative one
    times = [file.stat().st_mtime_ns for file in files]
    assert main([*kept, f"logdir={tmp_path / 'second'}"]) == 0
    assert [file.stat().st_mtime_ns for file in files] == times
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "first") == numbers(tmp_path / "second")


@pytest.mark.parametrize(("more", "reads_clip"), [(["chunk=0"], True), (["lora_rank=2"], True), ([], False)])
def test_image_to_video_students_see_the_pictures(
    settings: list[str], encoders: list[str], tmp_path: Path, more: list[str], reads_clip: bool
) -> None:
    """In channels and by CLIP's features, or, as Wan 2.2, in channels alone."""
    kind = {"in_dim": 36, "model_type": "i2v", "image_features": reads_clip}
    network = write_network(tmp_path / "i2v.safetensors", 0, **kind)
    encoders = encoders if reads_clip else [each for each in encoders if not each.startswith("clip=")]
    data = write_database(tmp_path / "clips")
    options = [*settings, *encoders, *more, f"student={network}", f"teacher={network}", f"data={data}", "save_every=0"]
    assert main([*options, "sample_every=2", "decoder=tiny", f"logdir={tmp_path / 'run'}"]) == 0
    rows = numbers(tmp_path / "run")
    assert rows[0]["student_grad_norm"] > 0
    assert len(list((tmp_path / "run/samples/step_000002").glob("*.mp4"))) == 4


def test_image_to_video_needs_pictures(
    settings: list[str], encoders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = write_network(tmp_path / "i2v.safetensors", 0, in_dim=36, model_type="i2v")
    options = [*settings, f"student={network}", f"teacher={network}", f"logdir={tmp_path / 'run'}"]
    assert main(options) == 2
    assert "an image-to-video student needs vae=" in capsys.readouterr().err


def test_a_student_without_layers_for_clip_takes_none(
    settings: list[str], encoders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a teacher that has them: both are shown the same."""
    kinds = {name: {"in_dim": 36, "model_type": "i2v", "image_features": name == "2.1"} for name in ("2.1", "2.2")}
    networks = {name: write_network(tmp_path / f"{name}.safetensors", 0, **kinds[name]) for name in kinds}
    data = write_database(tmp_path / "clips")
    options = [*settings, f"student={networks['2.2']}", f"data={data}", f"logdir={tmp_path / 'run'}"]
    assert main([*options, *encoders, f"teacher={networks['2.2']}"]) == 2
    assert "reads its picture in channels alone (as Wan 2.2); leave clip out" in capsys.readouterr().err
    without = [each for each in encoders if not each.startswith("clip=")]
    assert main([*options, *without, f"teacher={networks['2.1']}"]) == 2
    assert "image_features is True, the student's False" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["max_latent_frames=8", "sample_frames=6"])
def test_image_to_video_students_make_clips_of_one_length(
    settings: list[str],
    encoders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: str,
) -> None:
    """Said before any network is loaded, for a run by the student's file and for a plan by its size."""
    monkeypatch.setattr(dmd, "build", lambda *_: pytest.fail("networks are loaded"))
    network = write_network(tmp_path / "i2v.safetensors", 0, in_dim=36, model_type="i2v")
    options = [*settings, *encoders, f"student={network}", f"teacher={network}", f"logdir={tmp_path / 'run'}", more]
    name, value = more.split("=")
    for arguments in (options, [*settings, *encoders, more, "size=i2v-14b", "logdir=x", "--dry-run"]):
        assert main(arguments) == 2
        stderr = capsys.readouterr().err
        assert f"{name} {value} is another length than the 4 latent_frames" in stderr
        assert f"leave {name} out" in stderr
        assert stderr.count("\n") == 1


def test_long_clips_are_judged_by_their_end(settings: list[str], encoders: list[str], tmp_path: Path) -> None:
    """Their lengths differ between steps; the short ones are those of a run without long ones."""
    options = [*settings, "critic_per_student=1", "max_steps=3", "save_every=0", "dtype=float32"]
    assert main([*options, f"logdir={tmp_path / 'short'}"]) == 0
    assert main([*options, encoders[0], "max_latent_frames=8", f"logdir={tmp_path / 'long'}"]) == 0
    short, long = numbers(tmp_path / "short"), numbers(tmp_path / "long")
    assert all(row["student_grad_norm"] > 0 for row in long)
    assert short[-1]["student_loss"] != long[-1]["student_loss"]


def test_videos_of_fixed_prompts_are_written_while_a_run_goes_on(settings: list[str], tmp_path: Path) -> None:
    """By the average where there is one; the run itself is what it is without them."""
    (tmp_path / "shown.txt").write_text("a red square\n", encoding="utf-8")
    folder = tmp_path / "run"
    shown = ["sample_every=1", "decoder=tiny", f"sample_prompts={tmp_path / 'shown.txt'}", "sample_frames=6"]
    assert main([*settings, *shown, "ema_start=0", f"logdir={folder}"]) == 0
    assert main([*settings, "ema_start=0", f"logdir={tmp_path / 'plain'}"]) == 0
    assert numbers(folder) == numbers(tmp_path / "plain")
    videos = [read_video(folder / f"samples/step_00000{step}/000.mp4") for step in (1, 2)]
    assert [len(video) for video in videos] == [21, 21]
    assert (folder / "samples/step_000002/000.png").is_file()


def test_a_run_can_be_sampled_afterwards(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*settings, "chunk=0", f"logdir={tmp_path / 'run'}"]) == 0
    options = [f"logdir={tmp_path / 'run'}", "taehv=tiny", f"out={tmp_path / 'videos'}", "count=2"]
    assert sample_main(options) == 0
    files = sorted((tmp_path / "videos").iterdir())
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert [file.name for file in files] == ["0000-a-red-square-0.mp4", "0001-a-green-circle-0.mp4"]
    assert read_video(files[0]).shape == (13, 3, 32, 32)
    assert sample_main(options) == 2
    assert "exists already" in capsys.readouterr().err
    assert sample_main([f"logdir={tmp_path / 'run'}"]) == 2
    assert "the run names no decoder; give taehv=" in capsys.readouterr().err


# -------------------------------------------------------------------- logs --
def test_curves_go_to_weights_and_biases_when_asked_for(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a stand-in that keeps what it is told; a resumed run goes on under the same name."""
    rows: list[tuple[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            rows.append(("log", {**values, "step": step}))

    module = types.ModuleType("wandb")
    module.init = lambda **options: rows.append(("init", options)) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    options = [*settings, "wandb=true", f"logdir={tmp_path / 'run'}"]
    assert main(options) == 2
    assert "set WANDB_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert main([*options, "max_steps=1", "save_every=1"]) == 0
    assert main(options) == 0
    inits = [values for kind, values in rows if kind == "init"]
    assert inits[0]["id"] == inits[1]["id"]
    assert "secret" not in json.dumps(inits[0]["config"])
    assert [values["step"] for kind, values in rows if kind == "log"] == [1, 2]


def test_curves_go_to_tensorboard(settings: list[str], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([*settings, "tensorboard=true", "save_every=0", f"logdir={tmp_path / 'run'}"]) == 0
    actual = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    actual.Reload()
    losses = [event.value for event in actual.Scalars("critic_loss")]
    assert losses == pytest.approx([row["critic_loss"] for row in numbers(tmp_path / "run")])


def test_what_was_told_after_the_checkpoint_is_told_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste', encoding="utf-8")
    args = parse(DmdArgs, [f"logdir={tmp_path}", "tensorboard=false"])
    world: Any = types.SimpleNamespace(is_first=True)
    logs.Log(args, world, step=2).close()
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["lr=1e300", "resume_changed=[lr]"], "the student's own prediction holds NaN or Inf"),
        (["max_loss=1e-9"], "max_loss 1e-09"),
    ],
)
def test_exploding_losses_stop_the_run_and_the_last_good_checkpoint_is_named(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    options = [*settings, f"logdir={tmp_path / 'run'}", "critic_per_student=1"]
    assert main([*options, "max_steps=1", "save_every=1"]) == 0
    capsys.readouterr()
    assert main([*options, *more]) == 2
    stderr = capsys.readouterr().err
    assert words in stderr
    assert "the last good checkpoint is" in stderr
    assert "step_000001" in stderr
