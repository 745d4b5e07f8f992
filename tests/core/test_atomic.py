"""Whatever a writer raises is one sentence that names the file, and what was there before is still there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
import torch
from safetensors import SafetensorError

from selfforcing_core import atomic
from selfforcing_core.atomic import NotWritten, check_writable, replacing, replacing_folder, temporary_name
from selfforcing_core.codecs.video import VideoStream, read_video
from tests.support.full_disk import no_longer_than, small_file_system
from train.data import DatabaseWriter, write_shards

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(path: Path, writer: Callable[[Path], object], *, overwrite: bool = True) -> None:
    with replacing(path, overwrite=overwrite) as temporary:
        writer(temporary)


def write_folder(path: Path, writer: Callable[[Path], object]) -> None:
    with replacing_folder(path) as temporary:
        writer(temporary)


def stream(path: Path, frames_VRHW: torch.Tensor) -> None:
    with VideoStream(path) as opened:
        for chunk in frames_VRHW.split(6):
            opened.write(chunk)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "(No space left on device); free some space"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "free some space",
        ),
        (lmdb.DiskError("No space left on device"), "free some space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "([enforce fail at"),
        (OSError(errno.EROFS, "Read-only file system"), "choose a folder that exists and is writable"),
        (OSError("broken data stream when writing image file"), "(broken data stream when writing image file)"),
    ],
)
def test_what_a_writer_raises_names_the_file_and_the_cause(error: Exception, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def failing(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(NotWritten) as thrown:
        write(path, failing)
    assert str(thrown.value).startswith(f"{path}: cannot be written (")
    assert words in str(thrown.value)
    assert "\n" not in str(thrown.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.bin": b"old"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("frames are odd"),
        KeyboardInterrupt(),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/another/model.safetensors"),
    ],
)
def test_other_errors_pass_as_they_are(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as thrown, replacing(tmp_path / "a.bin"):
        raise error
    assert thrown.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_cause_that_torch_keeps_for_itself_is_asked_for(tmp_path: Path) -> None:
    tensor, refused = (
        torch.rand(10_000),
        pytest.raises(NotWritten, match=r"a\.pt: cannot be written \(File too large\)"),
    )
    with no_longer_than(5000, tmp_path), refused:
        write(tmp_path / "a.pt", lambda temporary: torch.save(tensor, temporary))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_says_late_that_it_is_full_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network disks do, when bytes are brought to them."""

    def late(_: int) -> None:
        raise FULL

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(atomic.os, "fsync", late)
    with pytest.raises(NotWritten, match="No space left"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old"
    with pytest.raises(NotWritten, match="No space left"), replacing_folder(tmp_path / "folder") as folder:
        (folder / "b.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / "absent/a.bin", "choose a folder that exists"),
        (lambda folder: folder / "file/a.bin", "choose a folder that exists"),
        (lambda folder: folder / ("a" * 300), "choose a shorter name"),
        (lambda folder: folder / "pipe", "is a device or a pipe"),
    ],
)
def test_places_that_cannot_be_written_are_known_before(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    for check in (lambda path: check_writable(path, overwrite=True), lambda path: replacing(path).__enter__()):
        with pytest.raises(ValueError, match=words) as thrown:
            check(make(tmp_path))
        assert str(thrown.value).startswith(str(make(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_folder_that_is_read_only_or_goes_away_is_named(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def vanish(temporary: Path) -> None:
        temporary.unlink()
        place.rmdir()

    with pytest.raises(NotWritten, match="choose a folder that exists"):
        write(place / "a.txt", vanish)
    if os.getuid():
        place.mkdir(mode=0o500)
        with pytest.raises(NotWritten, match="Permission denied"), replacing(place / "a.txt"):
            pass


@pytest.mark.parametrize("name", ["a" * 255, "\u00e9" * 127, ".hidden", "a b\nc", "[x]*?"])
def test_every_name_that_a_disk_takes_can_be_written(name: str, tmp_path: Path) -> None:
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert (tmp_path / name).read_text() == "new"


def test_what_came_meanwhile_is_not_overwritten_unasked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "a", lambda _: (tmp_path / "a").write_text("theirs"), overwrite=False)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "theirs")]
    with pytest.raises(ValueError, match="exists already"):
        write_folder(tmp_path / "b", lambda _: (tmp_path / "b").mkdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = temporary_name(tmp_path / "b").name
    left = own.replace(str(os.getpid()), str(dead.pid))
    elsewhere = f".c.00000000-{dead.pid}.part"
    (tmp_path / left).write_text("half")
    (tmp_path / left.replace(".b.", ".folder.")).mkdir()
    kept = {own, elsewhere, ".download.part", "movie.part", f".b.{dead.pid}.part"}
    for name in kept:
        (tmp_path / name).write_text("somebody's")
    (tmp_path / (old := elsewhere.replace(".c.", ".d."))).write_text("of another machine")
    then = time.time() - 2 * atomic.STALE
    os.utime(tmp_path / old, (then, then))
    check_writable(tmp_path / "a", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_stream_on_a_full_disk_says_so_and_plays(tmp_path: Path) -> None:
    frames = torch.rand(24, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    for ending, room in (("mp4", 16_000), ("mkv", 40_000)):
        path = tmp_path / f"a.{ending}"
        with no_longer_than(room, tmp_path), pytest.raises(NotWritten, match="File too large"):
            stream(path, frames)
        assert 0 < len(read_video(path)) < 24
        assert path.stat().st_size <= room


def test_databases_have_no_file_that_a_full_disk_would_kill_for(tmp_path: Path) -> None:
    """LMDB maps its lock file; a mapped page that the disk has no room for is a signal, no error."""
    writer = DatabaseWriter(tmp_path / "clips")
    writer.add("a", torch.zeros(1, 1, 1, 1))
    writer.close()
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["data.mdb"]


def test_a_file_system_that_is_full_is_said(tmp_path: Path) -> None:
    """A real one, in memory."""
    try:
        with small_file_system(tmp_path, "1m") as folder:
            (folder / "old.pt").write_bytes(b"old")
            with pytest.raises(NotWritten, match="No space left on device"):
                write(folder / "old.pt", lambda temporary: torch.save(torch.rand(1_000_000), temporary))
            rows = [(0, "a", torch.rand(1, 100, 100, 100), None)]
            with pytest.raises(NotWritten, match="No space left on device"):
                write_shards(rows, folder / "clips", 1)
            assert [path.name for path in folder.iterdir()] == ["old.pt"]
            assert (folder / "old.pt").read_bytes() == b"old"
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted here: {error}")


# whatever is planned, the answer is as long; the default is 64 clips of 21 frames
SMALL_PLAN = ["train.plan", "size=tiny", "latent_frames=3", "batch_size=1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [["selfforcing_core", "inspect", "tiny"], SMALL_PLAN])
def test_a_standard_output_that_is_full_is_one_line(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "the standard output: cannot be written" in done.stderr
