"""What every test may rely on: no network, reproducible property tests."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("reproducible")


# Files of several processes or many seconds, the longest first, so that none of them is begun when everything else is
# done. Those that fork from tests.support.forks stand together: they fall to one worker, whose server (seconds) serves
# all.
FORKING = ("train", "plan", "resume", "lora", "learning", "conditions", "make_data", "export", "losses")
FIRST = (*FORKING, "update_cost", "generate", "video_formats", "cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the files in that order; within each, tests keep theirs."""
    rank = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))


def pytest_collection_finish() -> None:
    """Leave what the collection made out of every later search for cycles: a million objects that stay to the end."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the golden fixtures that ran: fixture x outcome."""
    prefix = "test_matches_recorded_numbers["
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if prefix in report.nodeid and getattr(report, "when", "call") == "call":
                fixture = report.nodeid.split(prefix)[1].rstrip("]")
                tensors = dict(report.user_properties).get("tensors", 0)
                terminalreporter.write_line(f"golden {fixture:45s} x {outcome} ({tensors} tensors)")
