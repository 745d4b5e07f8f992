"""A short run of tests/support/full_disk.py: a full disk is one line that names the file, and leaves what was there."""

from __future__ import annotations

from pathlib import Path

from tests.support.full_disk import full_disk


def test_every_writer_says_in_one_line_that_the_disk_is_full(tmp_path: Path) -> None:
    complaints, tried = full_disk(30, seed=1, folder=tmp_path)
    assert complaints == []
    assert len(tried) == 15
