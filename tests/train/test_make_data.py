"""From videos, and from a teacher, to databases that the stages train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from selfforcing_core.codecs.video import write_video
from selfforcing_core.codecs.wan_vae import load_wan_vae
from tests.core.test_video_reader import constant, lie, make, quarters
from tests.support.training import numbers, run, run_settings, write_encoders
from train import make_latents, ode, trajectories
from train.data import ClipDatabase, read_pairs
from train.make_lmdb import first_frame
from train.make_lmdb import main as make_lmdb


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good videos, one that is too short, one without a prompt, one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "prompts").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, frames in (("a", 9), ("b", 12), ("short", 4), ("silent", 9)):
        write_video(folder / f"{name}.mp4", torch.rand(frames, 3, 40, 60, generator=generator))
        (folder / f"prompts/{name}.txt").write_text("" if name == "silent" else f"clip {name}", encoding="utf-8")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "prompts/broken.txt").write_text("broken", encoding="utf-8")
    write_encoders(folder)
    return folder


def test_videos_become_latents_and_a_database(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = [
        *("--input_video_folder", str(videos), "--prompt_folder", str(videos / "prompts")),
        *("--output_latent_folder", str(tmp_path / "latents"), "--vae", str(videos / "vae.safetensors")),
        *("--width", "48", "--height", "32", "--frames", "9"),
    ]
    assert make_latents.main(options) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 2, "there": 0, "left_out": 3, "with_cuts": 0}
    for words in ("short.mp4: has 4 frames", "silent.txt is empty", "broken.mp4: cannot be read"):
        assert words in caplog.text
    assert make_latents.main(options) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 0, "there": 2, "left_out": 3, "with_cuts": 0}
    ((prompt, latents),) = read_pairs(tmp_path / "latents/b.pt")
    assert prompt == "clip b"
    assert latents.shape == (3, 16, 4, 6)
    geometry = make_latents.VideoGeometry(48, 32, 9, chunk=1)
    frames, _ = make_latents.first_frames(videos / "b.mp4", geometry)
    torch.testing.assert_close(latents, load_wan_vae(videos / "vae.safetensors").encode(frames[None])[0])
    paths = ["--data_path", str(tmp_path / "latents"), "--lmdb_path", str(tmp_path / "clips")]
    assert make_lmdb([*paths, "--video_path", str(videos)]) == 0
    row = ClipDatabase(tmp_path / "clips")[0]
    assert row.prompt == "clip a"
    assert row.image_RHW is not None
    assert row.image_RHW.shape == (3, 40, 60)


def test_clips_are_upright_in_time_and_without_cuts(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    grey = [np.full((40, 60, 3), 200, np.uint8)] * 60
    make(tmp_path / "in/fast.mp4", constant(60, 60), pictures=grey, sound="aac")
    make(tmp_path / "in/cut.mp4", constant(16, 12), pictures=[*grey[:6], *[np.zeros_like(grey[0])] * 6])
    make(tmp_path / "in/phone.mp4", constant(16, 12), pictures=[np.repeat(quarters(), 2, 0)] * 12)
    lie(tmp_path / "in/phone.mp4", (0, 1, -1, 0))
    for name in ("fast", "cut", "phone"):
        (tmp_path / f"in/{name}.txt").write_text(name, encoding="utf-8")
    options = [
        *("--input_video_folder", str(tmp_path / "in"), "--prompt_folder", str(tmp_path / "in")),
        *("--vae", str(videos / "vae.safetensors"), "--width", "32", "--height", "32", "--frames", "9"),
    ]
    assert make_latents.main([*options, "--output_latent_folder", str(tmp_path / "all")]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 3, "there": 0, "left_out": 0, "with_cuts": 1}
    for words in ("fast.mp4: has 60 fps", "cut.mp4: is cut at 0.38 s", "latents hold no sound; that of 1 videos"):
        assert words in caplog.text
    more = ["--output_latent_folder", str(tmp_path / "some"), "--skip_cuts"]
    assert make_latents.main([*options, *more]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 2, "there": 0, "left_out": 1, "with_cuts": 1}
    geometry = make_latents.VideoGeometry(32, 32, 9, chunk=1)
    frames, findings = make_latents.first_frames(tmp_path / "in/fast.mp4", geometry)
    assert len(frames) == 9
    assert 0.5 < float(findings.seconds) < 0.6, "nine frames of a sixteenth of a second"
    picture = first_frame(tmp_path / "in/phone.mp4")
    assert picture.shape == (64, 64, 3)
    assert picture[5, 5].tolist()[2] > 200, "blue has come to the upper left"
    assert make_latents.main([*options, *more, "--fps", "0"]) == 2
    assert "fps 0.0 is not a rate" in capsys.readouterr().err


def test_what_cannot_be_encoded_is_one_line(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--prompt_folder", str(videos), "--output_latent_folder", str(tmp_path / "out"), "--vae", "absent"]
    assert make_latents.main(["--input_video_folder", str(tmp_path), *paths]) == 2
    assert "holds no video" in capsys.readouterr().err
    assert make_latents.main(["--input_video_folder", str(videos), *paths, "--frames", "10"]) == 2
    assert "10 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teachers_trajectories_are_what_regression_learns_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same from one process and from two; what is there is not made again."""
    student, teacher, text, prompts, *_ = run_settings(tmp_path)
    options = [
        *(teacher, text, prompts, "width=32", "height=32", "latent_frames=4", "device=cpu", "dtype=float32"),
        *("sampling_steps=8", "timesteps=[1000,833.3333333]", "guidance=2"),
    ]
    assert trajectories.main([*options, f"out={tmp_path / 'one'}"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 3
    run([*options, f"out={tmp_path / 'two'}"], 2, "train.trajectories")
    for name in ("00000.pt", "00001.pt", "00002.pt"):
        ((prompt, states),), ((other, same),) = (read_pairs(tmp_path / folder / name) for folder in ("one", "two"))
        assert prompt == other
        assert states.shape == (3, 4, 16, 4, 4)
        torch.testing.assert_close(states, same, atol=1e-2, rtol=1e-2)
    noise, half, clean = states.float()
    assert noise.std() == pytest.approx(1, abs=0.2)
    assert (half - clean).abs().mean() < (noise - clean).abs().mean(), "states fall towards the end"
    (tmp_path / "one/00001.pt").unlink()
    assert trajectories.main([*options, f"out={tmp_path / 'one'}"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 1, "there": 2, "not_numbers": 0}
    assert make_lmdb(["--data_path", str(tmp_path / "one"), "--lmdb_path", str(tmp_path / "database")]) == 0
    learn = [
        *(student.replace("student=", "network="), text, f"data={tmp_path / 'database'}", "chunk=2", "batch_size=3"),
        *("dtype=float32", "device=cpu", "max_steps=6", "save_every=0", "timesteps=[1000,833.3333333,0]", "lr=1e-2"),
        *("sample_every=6", "decoder=tiny", "tensorboard=false", f"logdir={tmp_path / 'run'}"),
    ]
    assert ode.main(learn) == 0
    losses = [row["student_loss"] for row in numbers(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert len(list((tmp_path / "run/samples/step_000006").glob("*.png"))) == 3


def test_timesteps_that_a_teacher_does_not_pass_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["teacher=x", "text_encoder=tiny", "prompts=x", "out=x"]
    assert trajectories.main([*settings, "timesteps=[999]"]) == 2
    assert "nearest are 1000" in capsys.readouterr().err
    assert trajectories.main(settings[1:]) == 2
    assert "teacher is not set" in capsys.readouterr().err
