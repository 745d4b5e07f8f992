"""A video file that grows while it is made."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selfforcing_core.codecs.video import VideoStream, read_metadata, read_video, write_video
from tests.support.training import ROOT

FRAMES = torch.rand(30, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_chunks_become_the_video(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"video{ending}"
    with VideoStream(path, 16, {"workflow": {"nodes": [1]}}) as stream:
        for chunk in FRAMES.split(9):
            stream.write(chunk)
        assert stream.num_frames == 30
    actual = read_video(path)
    assert actual.shape == FRAMES.shape
    if ending == ".mkv":
        assert torch.equal(actual, (FRAMES * 255).round() / 255), "lossless"
    metadata = {name.lower(): value for name, value in read_metadata(path).items()}
    assert metadata["workflow"] == '{"nodes": [1]}'


def test_what_was_written_can_be_played_after_a_crash(tmp_path: Path) -> None:
    """One process writes a file of each ending, and is killed in the middle."""
    paths = [tmp_path / f"video{ending}" for ending in (".mp4", ".mkv")]
    code = (
        "import sys, time, torch; from selfforcing_core.codecs.video import VideoStream; torch.manual_seed(0)\n"
        "streams = [VideoStream(path) for path in sys.argv[1:]]\n"
        "for _ in range(4): [stream.write(torch.rand(12, 3, 32, 48)) for stream in streams]\n"
        "print('written', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in paths:
        assert len(read_video(path)) >= 36, (path.name, "all but the last fragment")


def test_an_error_in_the_middle_leaves_a_file_that_plays(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with VideoStream(path) as stream:
        stream.write(FRAMES[:9])
        with pytest.raises(ValueError, match="follows frames of 48x32"):
            stream.write(FRAMES[:3, :, :16])
    assert len(read_video(path)) == 9


def test_what_cannot_be_streamed_to_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    there = tmp_path / "there.mp4"
    write_video(there, FRAMES[:9])
    before = there.read_bytes()
    for path, words in ((there, "exists already"), (tmp_path / "x.avi", "use an ending of .mp4, .mov, .mkv")):
        with pytest.raises(ValueError, match=re.escape(words)):
            VideoStream(path)
    assert there.read_bytes() == before
    with VideoStream(tmp_path / "odd.mp4") as stream, pytest.raises(ValueError, match="odd side"):
        stream.write(torch.rand(2, 3, 31, 48))
    assert not (tmp_path / "odd.mp4").exists()


def test_the_name_is_taken_at_once(tmp_path: Path) -> None:
    with VideoStream(tmp_path / "a.mp4") as stream:
        assert (tmp_path / "a.mp4").exists()
        with pytest.raises(ValueError, match="exists already"):
            VideoStream(tmp_path / "a.mp4")
        stream.write(FRAMES[:9])
    assert len(read_video(tmp_path / "a.mp4")) == 9


def test_a_stream_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("planted")

    monkeypatch.setattr("selfforcing_core.codecs.video.av.open", refused)
    with pytest.raises(OSError, match="planted"):
        VideoStream(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_closed_also_where_its_end_cannot_be_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = VideoStream(tmp_path / "a.mkv")
    stream.write(FRAMES[:9])

    def refused() -> None:
        raise OSError("planted")

    monkeypatch.setattr(stream._writer, "finish", refused)
    with pytest.raises(ValueError, match=re.escape("a.mkv: cannot be written (planted)")):
        stream.close()
    assert len(read_video(tmp_path / "a.mkv")) == 9


def test_memory_and_time_do_not_grow_with_the_length(tmp_path: Path) -> None:
    """Two thousand frames; the last ones take no longer than the first ones did."""
    resource = pytest.importorskip("resource")
    chunk, seconds = torch.rand(20, 3, 64, 64), []
    with VideoStream(tmp_path / "long.mp4") as stream:
        for index in range(100):
            if index == 20:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.process_time()
            stream.write(chunk)
            seconds.append(time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before
    assert grown < 1.02
    assert sorted(seconds[-20:])[10] < 2 * sorted(seconds[:20])[10]
