"""Full disks by the thousand: every writer, at any number of bytes, is one line that names the file, and nothing else.

    python -m tests.support.full_disk --count 2000 --seed 0
    python -m tests.support.full_disk --tmpfs --count 200       # a real file system that is full, mounted by root

What was there before is still there, nothing new is, and a video that was being streamed plays as far as it came. The
disk ends by a limit on the size of files (RLIMIT_FSIZE, which says "File too large" at the exact byte).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver

from selfforcing_core.atomic import NotWritten
from selfforcing_core.codecs.embedding_folder import EmbeddingFolder
from selfforcing_core.codecs.video import VideoStream, read_video, write_contact_sheet, write_video
from selfforcing_core.generate.cli import main as command_line
from selfforcing_core.kv_cache import CacheState
from selfforcing_core.snapshot import Snapshot
from selfforcing_core.weights.checkpoint import read_checkpoint
from tests.support.training import run_settings, write_encoders, write_network
from train import export, make_latents, make_lmdb, trajectories
from train.args import DmdArgs, parse, to_yaml

FRAMES = torch.rand(24, 3, 32, 48, generator=torch.Generator().manual_seed(0))
LIMITED = resource.RLIMIT_FSIZE


@dataclass(frozen=True)
class Writer:
    """What is tried. run: writes, and returns its exit status. is_kept: what is half-written stays, and plays."""

    name: str
    out: str
    run: Callable[[], int]
    is_kept: bool = False


# -------------------------------------------------------------- full disks --
@contextmanager
def no_longer_than(count: int, folder: Path) -> Iterator[None]:
    """Let no file get longer."""
    before = resource.getrlimit(LIMITED)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(LIMITED, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(LIMITED, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def filled_up_to(count: int, folder: Path) -> Iterator[None]:
    """Leave so many bytes of the file system of a folder, which is a small one."""
    gc.collect()  # of what is deleted, nothing may still be mapped
    ballast = folder.parent / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - count, 1))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def small_file_system(folder: Path, size: str = "16m") -> Iterator[Path]:
    """A new file system in memory. Raises PermissionError where this process may not mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ----------------------------------------------------------------- writers --
class Writers:
    """Every writer of the product, on small inputs that lie in a folder of their own."""

    def __init__(self, inputs: Path, outputs: Path) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._settings = run_settings(inputs)
        self._write_run()
        (inputs / "videos").mkdir()
        write_video(inputs / "videos/a.mp4", FRAMES[:9])
        (inputs / "videos/a.txt").write_text("a", encoding="utf-8")
        write_encoders(inputs)
        (inputs / "pairs").mkdir()
        torch.save({"a": torch.rand(1, 60, 16, 4, 6)}, inputs / "pairs/a.pt")
        torch.save({"b": torch.rand(1, 60, 16, 4, 6)}, inputs / "pairs/b.pt")

    def _write_run(self) -> None:
        """A run with one checkpoint, as far as `train.export` reads it."""
        weights = read_checkpoint(self.inputs / "student.safetensors").state_dict
        tensors: dict[str, Any] = {f"roles.student.weights.{name}": value for name, value in weights.items()}
        state_dict_saver.save(tensors, checkpoint_id=str(self.inputs / "run/checkpoints/step_000001"), no_dist=True)
        (self.inputs / "run/config.yaml").write_text(to_yaml(parse(DmdArgs, self._settings)), encoding="utf-8")

    def all(self) -> list[Writer]:
        inputs, out = self.inputs, self.outputs
        wide = str(write_network(inputs / "wide.safetensors", 0, dim=128, num_heads=1))
        student = str(inputs / "student.safetensors")
        result = [
            Writer("sheet", "a.png", lambda: self._direct(lambda p: write_contact_sheet(p, FRAMES, overwrite=True))),
            Writer("video", "a.mp4", lambda: self._direct(lambda p: write_video(p, FRAMES, overwrite=True))),
            Writer("snapshot", "a.snapshot", lambda: self._direct(_snapshot().save)),
            Writer("embeddings", "kept", lambda: self._direct(_embed), is_kept=False),
            Writer("stream", "s.mp4", lambda: self._direct(_stream), is_kept=True),
            Writer("lossless stream", "s.mkv", lambda: self._direct(_stream), is_kept=True),
            Writer("export", "e.safetensors", lambda: export.main(
                [f"logdir={inputs}/run", f"out={out}/e.safetensors", "overwrite=true"])),
            Writer("make_lmdb", "clips", lambda: make_lmdb.main(
                ["--data_path", f"{inputs}/pairs", "--lmdb_path", f"{out}/clips"])),
            Writer("make_lmdb in shards", "shards", lambda: make_lmdb.main(
                ["--data_path", f"{inputs}/pairs", "--lmdb_path", f"{out}/shards", "--num_shards", "2"])),
            Writer("make_latents", "latents/a.pt", lambda: make_latents.main(
                ["--input_video_folder", f"{inputs}/videos", "--prompt_folder", f"{inputs}/videos", "--width", "48",
                 "--output_latent_folder", f"{out}/latents", "--vae", f"{inputs}/vae.safetensors", "--height", "32",
                 "--frames", "9", "--device", "cpu", "--dtype", "float32"])),
            Writer("trajectories", "states/0", lambda: trajectories.main(
                [f"teacher={student}", "text_encoder=tiny", f"prompts={inputs}/prompts.txt", f"out={out}/states",
                 "width=32", "height=32", "latent_frames=2", "sampling_steps=4", "timesteps=[1000]", "device=cpu",
                 "dtype=float32"])),
            Writer("generate", "g", lambda: command_line(
                ["generate", "--prompt", "a", "--frames", "9", "--steps", "1000", "--out", f"{out}/g.mp4",
                 "--overwrite", "--sheet", f"{out}/g.png", "--latents", f"{out}/g.safetensors", "--embeddings",
                 f"{out}/g.kept"])),
        ]  # fmt: skip
        for name in ("c.safetensors", "c.pt", "c"):
            line = ["convert", wide, f"{out}/{name}", *(["--overwrite"] if "." in name else [])]
            result.append(Writer(f"convert to {name}", name, lambda line=line: command_line(line)))
        return result

    def _direct(self, write: Callable[[Path], object]) -> int:
        """What a command does with the error of a writer."""
        try:
            write(self.outputs / self._out)
        except NotWritten as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    # ------------------------------------------------------------------ trials --
    def sizes(self, writer: Writer) -> int:
        """Bytes of the largest file that a writer makes where nothing stands in its way."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._out = writer.out
            assert writer.run() == 0, writer.name
        largest = max(path.stat().st_size for path in self.outputs.rglob("*") if path.is_file())
        self.clear()
        return largest

    def clear(self) -> None:
        subprocess.run(["rm", "-rf", "--", *map(str, self.outputs.iterdir())], check=True)

    def content(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.outputs.rglob("*")) if path.is_file()}

    def trial(
        self, writer: Writer, count: int, full: Callable[[int, Path], contextlib.AbstractContextManager[None]]
    ) -> str | None:
        """What was wrong with the answer of a writer whose disk ends after some bytes; None if nothing was."""
        is_replaced = "." in writer.out and not writer.is_kept and "/" not in writer.out
        if is_replaced:
            (self.outputs / writer.out).write_bytes(b"old")
        before, err, self._out = self.content(), io.StringIO(), writer.out
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), full(count, self.outputs):
                status = writer.run()
        except BaseException as error:  # whatever escapes would have been a traceback
            return f"{writer.name} at {count}: {type(error).__name__}: {str(error)[:300]}"
        after = self.content()
        words = [line for line in err.getvalue().replace("\r", "\n").splitlines() if not _is_progress(line)]
        is_named = len(words) == 1 and str(self.outputs / writer.out.partition("/")[0]) in words[0]
        try:
            if status == 0:
                return f"{writer.name} at {count}: nothing was said"
            if status != 2 or not is_named or "Traceback" in err.getvalue():
                return f"{writer.name} at {count}: status {status}, said {words}"
            if writer.is_kept:
                return _unplayable(self.outputs / writer.out)
            added = {name for name in after if name not in before and not _is_complete(Path(name))}
            if added or any(after.get(name) != data for name, data in before.items()):
                return f"{writer.name} at {count}: left {sorted(added)}, or changed what was there"
            return None
        finally:
            self.clear()


def _is_progress(line: str) -> bool:
    return not line.strip() or "chunk]" in line or "chunk/s]" in line or "s/it" in line or "it/s" in line or "?" in line


def _is_complete(path: Path) -> bool:
    """Of a command that writes several files, some may be whole."""
    return path.name.startswith("g.") or path.parent.name == "g.kept" or path.parent.name == "states"


def _snapshot() -> Snapshot:
    keys = torch.rand(1, 1, 12, 2, 16)
    return Snapshot(0, 3, (CacheState(keys, keys.clone(), 0, 3, 3, 0, 0),))


def _embed(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    EmbeddingFolder(folder, folder, torch.float32, "all").get("a", lambda _: torch.rand(16, 128))


def _stream(path: Path) -> None:
    with VideoStream(path) as stream:
        for chunk in FRAMES.split(6):
            stream.write(chunk)


def _unplayable(path: Path) -> str | None:
    """What is wrong with a video that was cut off; where not even its beginning was written, there is none."""
    try:
        return None if not path.exists() or len(read_video(path)) else f"{path.name} holds no frame"
    except ValueError as error:
        return f"{path.name} of {path.stat().st_size} bytes: {error}"


def full_disk(count: int, seed: int, folder: Path, *, is_mounted: bool = False) -> tuple[list[str], Counter[str]]:
    """Complaints about so many writers at random byte counts, and how often each was tried; `folder` is empty.

    is_mounted: `folder` is a small file system of its own, which is filled in place of a limit.
    """
    pick = random.Random(seed)
    outputs = folder / "out"
    outputs.mkdir()
    complaints, tried = [], Counter()
    with tempfile.TemporaryDirectory() as inputs:
        writers = Writers(Path(inputs), outputs)
        sizes = {writer: writers.sizes(writer) for writer in writers.all()}
        for index in range(count):
            writer = list(sizes)[index % len(sizes)]
            room = pick.randrange(sizes[writer]) if pick.random() < 0.9 else sizes[writer] - 1
            complaint = writers.trial(writer, room, filled_up_to if is_mounted else no_longer_than)
            complaints += [complaint] if complaint else []
            tried[writer.name] += 1
    return complaints, tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tmpfs", action="store_true", help="fill a file system in memory in place of a limit (root)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if args.tmpfs:
            stack.enter_context(small_file_system(Path(folder)))
        complaints, tried = full_disk(args.count, args.seed, Path(folder), is_mounted=args.tmpfs)
    for complaint in complaints[:20]:
        print(complaint)
    print(f"{dict(tried)}: {len(complaints)} bad answers, {time.monotonic() - start:.0f} s")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
