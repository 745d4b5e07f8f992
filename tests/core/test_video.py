"""Videos come back as they were written, appear whole or not at all, and never replace another by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from selfforcing_core.atomic import check_writable
from selfforcing_core.codecs.video import read_metadata, read_video, write_contact_sheet, write_video


def moving_gradient(frames: int = 9, width: int = 64, height: int = 48) -> Tensor:
    """[V,R,H,W]: smooth colours, different in every frame and lopsided in both directions."""
    V = torch.arange(frames).view(-1, 1, 1) / frames
    H = torch.linspace(0, 1, height).view(1, -1, 1)
    W = torch.linspace(0, 1, width).view(1, 1, -1)
    return torch.stack(torch.broadcast_tensors(V, H, W), 1)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
def test_written_frames_come_back(tmp_path: Path, ending: str) -> None:
    frames = moving_gradient()
    assert write_video(tmp_path / f"a.{ending}", frames) == len(frames)
    decoded = read_video(tmp_path / f"a.{ending}")
    assert decoded.shape == frames.shape
    assert (decoded - frames).abs().mean() < 0.01
    assert (decoded - frames).abs().max() < 0.08


def test_file_is_h264_in_yuv420p_at_the_asked_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_gradient())
    write_video(tmp_path / "b.mp4", moving_gradient(), fps=23.976)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(16), 9)
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert float(file.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


def test_chunks_make_the_same_video_as_the_whole(tmp_path: Path) -> None:
    frames = moving_gradient(13)
    write_video(tmp_path / "whole.mp4", frames.unsqueeze(0))
    assert write_video(tmp_path / "chunks.mp4", iter(frames.split([1, 4, 8]))) == 13
    whole, chunks = read_video(tmp_path / "whole.mp4"), read_video(tmp_path / "chunks.mp4")
    assert whole.shape == chunks.shape
    assert (whole - chunks).abs().mean() < 0.005


def test_chunks_are_consumed_as_they_come(tmp_path: Path) -> None:
    temporary_names = []

    def chunks() -> Iterator[Tensor]:
        for chunk in moving_gradient(8).split(4):
            temporary_names.append([name for name in os.listdir(tmp_path) if name.endswith(".part")])
            yield chunk

    write_video(tmp_path / "a.mp4", chunks())
    assert [len(names) for names in temporary_names] == [1, 1]
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_metadata_is_in_the_container(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_gradient(), metadata={"prompt": "a red square", "selfforcing": {"seed": 1}})
    entries = read_metadata(tmp_path / "a.mp4")
    assert entries["prompt"] == "a red square"
    assert json.loads(entries["selfforcing"]) == {"seed": 1}


def test_values_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 16, 16), value) for value in (-3.0, 4.0)]).bfloat16()
    write_video(tmp_path / "a.mp4", frames)
    assert read_video(tmp_path / "a.mp4").mean((1, 2, 3)).tolist() == pytest.approx([0, 1], abs=0.02)


@pytest.mark.parametrize(
    ("frames", "word"),
    [
        (torch.zeros(2, 3, 16, 17), "use 16x16 or 18x16"),
        (torch.zeros(2, 3, 15, 16), "use 16x14 or 16x16"),
        (torch.zeros(2, 2, 3, 16, 16), "one by one"),
        (torch.zeros(2, 16, 16, 3), "not one video"),
        (torch.zeros(0, 3, 16, 16), "0 frames make no video"),
        ([], "0 frames make no video"),
        ([torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 32)], "32x16 follows frames of 16x16"),
    ],
)
def test_unfit_frames_leave_nothing(tmp_path: Path, frames: Tensor | list[Tensor], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        write_video(tmp_path / "a.mp4", frames)
    assert not os.listdir(tmp_path)


def test_failure_while_frames_are_made_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[Tensor]:
        yield moving_gradient(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", chunks())
    assert not os.listdir(tmp_path)


def test_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    for write in (
        lambda **options: write_video(tmp_path / "a.mp4", moving_gradient(), **options),
        lambda **options: write_contact_sheet(tmp_path / "a.png", moving_gradient(), **options),
    ):
        write()
        before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
        with pytest.raises(ValueError, match="exists already"):
            write()
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
        write(overwrite=True)


@pytest.mark.parametrize("path", ["absent/a.mp4", "a.avi", "a", "folder.mp4"])
def test_unwritable_path_is_said_before_any_frame_is_made(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_video(tmp_path / path, (pytest.fail("a frame was asked for") for _ in range(1)))
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_checking_a_path_changes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.mp4", overwrite=False)
    assert not os.listdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"mine")
    check_writable(tmp_path / "a.mp4", overwrite=True)
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="exists already"):
        check_writable(tmp_path / "a.mp4", overwrite=False)


@pytest.mark.parametrize("fps", [0, -1])
def test_impossible_rate_is_refused(tmp_path: Path, fps: int) -> None:
    with pytest.raises(ValueError, match="fps"):
        write_video(tmp_path / "a.mp4", moving_gradient(), fps=fps)


@pytest.mark.parametrize("contents", [b"", b"junk" * 100])
def test_unreadable_video_is_one_line(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(contents)
    for read in (read_video, read_metadata):
        with pytest.raises(ValueError, match=r"a\.mp4: cannot be read") as caught:
            read(tmp_path / "a.mp4")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="No such file"):
        read_video(tmp_path / "absent.mp4")


def test_contact_sheet_shows_every_frame_in_order(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 10, 12), value / 10) for value in range(10)])
    write_contact_sheet(tmp_path / "a.png", frames, columns=4)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (4 * 12, 3 * 10)
        levels = [sheet.getpixel((index % 4 * 12 + 5, index // 4 * 10 + 5))[0] for index in range(12)]
    assert levels == [round(value * 25.5) for value in range(10)] + [255, 255]
    assert os.listdir(tmp_path) == ["a.png"]
