"""What every test may rely on: no network, reproducible property tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("reproducible")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the golden fixtures that ran: fixture x outcome."""
    prefix = "test_matches_recorded_numbers["
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if prefix in report.nodeid and getattr(report, "when", "call") == "call":
                fixture = report.nodeid.split(prefix)[1].rstrip("]")
                tensors = dict(report.user_properties).get("tensors", 0)
                terminalreporter.write_line(f"golden {fixture:45s} x {outcome} ({tensors} tensors)")
