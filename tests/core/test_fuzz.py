"""A short run of tests/support/fuzz.py: whatever is damaged is one line, status 2, and no file."""

from __future__ import annotations

from pathlib import Path

from tests.support.fuzz import fuzz


def test_damaged_files_and_argument_lines_are_answered_in_one_line(tmp_path: Path) -> None:
    assert fuzz(300, seed=1, folder=tmp_path) == []
