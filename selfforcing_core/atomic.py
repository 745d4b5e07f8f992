"""Files and folders that appear whole or not at all, and the one place where a writer's error becomes a sentence.

They are written under a temporary name in the same folder, flushed to the disk, and then renamed: within a file system
a rename happens at once. Whatever a library raises when the disk is full, or a path cannot be written, leaves this file
as `NotWritten`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"  # ending of temporary names
# .NAME.PLACE-PROCESS.part: the machine and the process that write it, so that others know whether it is left behind.
TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{8})-(?P<process>[0-9]+)\.part")
STALE = 24 * 3600  # seconds after which a temporary file counts as left behind, where its process cannot be looked for
LONGEST = 160  # bytes of a name that its temporary name repeats; file systems take 255
PROBE = bytes(1 << 16)  # more than one block, so that a full disk shows

# Libraries whose errors of writing are no OSError, by the beginning of their modules' names. torch raises RuntimeError,
# which other mistakes are too: parts of the sentences that its writer of files says.
WRITERS = ("safetensors", "av.", "lmdb.")
TORCH_SAYS = ("inline_container", "pytorchstreamwriter", "iostream error", "parent directory")
SPACE = "free some space, or write to another disk"
WRITABLE = "choose a folder that exists and is writable"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)), SPACE),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS), WRITABLE),
    errno.ENAMETOOLONG: "choose a shorter name",
}


class NotWritten(ValueError):
    """A write that the disk refused, in one line that names file and cause. What was there before is still there."""


# ------------------------------------------------------------------- errors --
@contextmanager
def writing(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn errors of writing `path` into NotWritten; other errors pass.

    temporary: the name that the writers know, if it is another. An OSError that names another file passes too: it is
    of something that the block reads.
    """
    try:
        yield
    except BaseException as error:
        cause = _cause(error, Path(path), temporary)
        if cause is None:
            raise
        raise not_written(path, cause) from error


def print_result(text: str) -> None:
    """Print a command's answer, and flush it. Raises NotWritten where the standard output takes no more."""
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError, ValueError):  # else Python flushes at its end and reports the error once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise not_written("the standard output", error) from error


def not_written(path: str | Path, cause: OSError) -> NotWritten:
    """Return the error whose sentence names the file, the cause and a remedy."""
    words = " ".join(str(cause.strerror or cause).split())
    remedy = REMEDIES.get(cause.errno or 0, "look at the disk, or write to another")
    return NotWritten(f"{path}: cannot be written ({words}); {remedy}")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing. Raises NotWritten where that fails."""
    with writing(path), _unnamed():
        path.mkdir(parents=True, exist_ok=True)


def _cause(error: BaseException, path: Path, temporary: Path | None) -> OSError | None:
    """Return what the disk said, if this is an error of a writer of `path`; None for any other error."""
    if isinstance(error, OSError):
        names = [os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
        names_path = not names or any(_is_at(name, temporary or path) for name in names)
        return error if names_path else None
    words = " ".join(str(error).split())[:200] or type(error).__name__
    is_of_torch = isinstance(error, RuntimeError) and any(part in words.lower() for part in TORCH_SAYS)
    if not is_of_torch and not f"{type(error).__module__}.".startswith(WRITERS):
        return None
    code = next((code for code in REMEDIES if os.strerror(code) in words), None)
    if code is not None:
        return OSError(code, os.strerror(code))
    # The library keeps the cause for itself: the disk is asked again.
    return _probe_error(path, temporary) or OSError(words)


def _is_at(name: str, place: Path) -> bool:
    return name == str(place) or name.startswith(f"{place}{os.sep}")


def _probe_error(path: Path, temporary: Path | None) -> OSError | None:
    """Return the error of writing some more bytes, None without one.

    They go to the end of the temporary file, which is given up anyway, or into a file of their own.
    """
    probe = temporary_name((temporary or path.parent) / "probe")
    if temporary is not None and not temporary.is_dir():
        probe = temporary
    try:
        with probe.open("ab") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())  # network disks take anything until then
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


@contextmanager
def _unnamed() -> Iterator[None]:
    """Remove the file name from an OSError: it may be that of a folder above, which `writing` would let pass."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error)) from error


class GrowingFile:
    """A new file written under its own name, for a library that may forget an error.

    FFmpeg's muxers do, where they flush or end a file in fragments. The first error is kept: nothing is written after
    it, and closing cuts the file to its length at the last `check`. A file that was never checked is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self.checked = 0  # bytes at the last check
        with writing(path):
            self._file = path.open("xb", buffering=0)  # x: never over another file; each write reaches the system

    def write(self, data: bytes) -> int:
        """Write all of the data and return its length. Raises the first OSError at this call and all that follow."""
        view = memoryview(data)
        try:
            while view and self.error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
        if self.error is not None:
            raise self.error
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place in the file. Muxers go back to fill in lengths that they did not know at the beginning."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._file.tell()

    def check(self) -> None:
        """Raise NotWritten if anything was not written; else all that was written so far will stay."""
        if self.error is not None:
            raise not_written(self.path, self.error) from self.error
        self.checked = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Flush everything to the disk and close. Raises NotWritten where something did not get there."""
        if self._file.closed:
            return
        try:
            if self.error is not None:
                os.ftruncate(self._file.fileno(), self.checked)
            with writing(self.path):
                _sync(self._file.fileno())
            self.check()
        finally:
            self._file.close()
            if not self.checked:
                self.path.unlink(missing_ok=True)


# -------------------------------------------------------------------- files --
@contextmanager
def replacing(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; it becomes `path` when the block ends, and vanishes if it fails.

    Its bytes are on the disk before it gets its name: after a crash there is the old file or the whole new one, and a
    network disk reports what it could not keep. Raises NotWritten when `path` cannot be written, before the block runs
    where that can be known, and ValueError when it is a folder or a device, or exists and `overwrite` is off.
    """
    path = Path(path)
    temporary = _claim(path, overwrite)
    try:
        with writing(path, temporary):
            mode = temporary.stat().st_mode  # by the user's umask; some writers put a private file in its place
            yield temporary
            _bring_to_disk(temporary)
            os.chmod(temporary, mode)
            _check_place(path, overwrite)  # hours may have passed since the first look
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; it becomes `path` when the block ends, and vanishes if it fails.

    Raises NotWritten when `path` cannot be written, and ValueError when it exists: a folder is never replaced.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with writing(path), _unnamed():
        check_new_folder(path)
        sweep(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # of an earlier attempt of this process
        temporary.mkdir()
    try:
        with writing(path, temporary):
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    _bring_to_disk(file)
            check_new_folder(path)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | Path, *, overwrite: bool) -> None:
    """Raise the errors that `replacing` raises for `path` before its block; leave nothing behind."""
    _claim(Path(path), overwrite).unlink()


def check_new_folder(path: Path) -> None:
    """Raise ValueError when `path` exists, NotWritten when no folder can be made there."""
    with writing(path), _unnamed():
        if _mode(path) is not None:
            raise ValueError(f"{path}: exists already; a folder is never overwritten, name a new one")
        if not os.access(path.parent, os.W_OK):
            raise OSError(errno.EACCES if path.parent.is_dir() else errno.ENOENT, "its folder is missing or read-only")


def temporary_name(path: Path) -> Path:
    """Return the name beside `path` under which this process writes it; no longer than file systems take."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{_place()}-{os.getpid()}{PART}")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; do so once per process and folder."""
    _swept(folder.absolute())


def _claim(path: Path, overwrite: bool) -> Path:
    temporary = temporary_name(path)
    with writing(path), _unnamed():
        _check_place(path, overwrite)
        sweep(path.parent)
        temporary.touch()  # fails now and not after hours of work
    return temporary


def _check_place(path: Path, overwrite: bool) -> None:
    mode = _mode(path)
    if mode is None:
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a folder; give the name of a file in it")
    if not overwrite:
        raise ValueError(f"{path}: exists already; choose another name or ask to overwrite it")
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise ValueError(f"{path}: is a device or a pipe, which a file would replace; give the name of a file")


def _mode(path: Path) -> int | None:
    """Return the mode of what is at a path, None for nothing; of a link that of its target, else its own."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.lstat(path).st_mode
    return None


def _bring_to_disk(path: Path) -> None:
    with path.open("r+b") as file:
        _sync(file.fileno())


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, mounted from elsewhere, have no such call.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


# ------------------------------------------------------------ left behind ----
def _place() -> str:
    """Return a name of the machine, and of the container on it: only within one do process numbers mean the same."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


@functools.cache
def _swept(folder: Path) -> None:
    with suppress(OSError):  # a folder that may be written, and not be listed
        for name in os.listdir(folder):
            match = TEMPORARY.fullmatch(name)
            if match is not None and _is_left_behind(folder / name, match["place"], int(match["process"])):
                shutil.rmtree(folder / name, ignore_errors=True)
                with suppress(OSError):
                    (folder / name).unlink()


def _is_left_behind(path: Path, place: str, process: int) -> bool:
    """Return whether the process that wrote a temporary file is gone, or is elsewhere and has not written for a day."""
    # Windows has no signal 0: os.kill would end the process.
    if place == _place() and os.name == "posix":
        return not _is_alive(process)
    return time.time() - path.stat().st_mtime > STALE


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True
