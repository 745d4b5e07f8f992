"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; it becomes `path` when the block ends, and vanishes if it fails.

    Raises ValueError, before the block runs, when `path` cannot be written, or exists and `overwrite` is off.
    """
    temporary = _claim(Path(path), overwrite)
    mode = temporary.stat().st_mode  # what the user's umask asks for; some writers put a private file in its place
    try:
        yield temporary
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, *, overwrite: bool) -> None:
    """Raise the ValueError that `replacing` would raise for `path`; nothing is left behind."""
    _claim(Path(path), overwrite).unlink()


def _claim(path: Path, overwrite: bool) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; give the name of a file in it")
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: exists already; choose another name or ask to overwrite it")
        temporary.touch()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); choose a folder that exists and is writable"
        ) from error
    return temporary
