"""One server per ComfyUI checkout, shared by all tests; without a checkout everything here is skipped and says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfyui.host_server import Checkout, Server, find_checkouts

CHECKOUTS = find_checkouts()
NONE_FOUND = "no ComfyUI checkout found: set COMFYUI_PATH, or put one below ~/comfy/"


def checkouts() -> list[object]:
    """Return one parameter per checkout; a skipped one that says why where there is none."""
    if not CHECKOUTS:
        return [pytest.param(None, marks=pytest.mark.skip(reason=NONE_FOUND), id="none")]
    return [pytest.param(checkout, id=f"ComfyUI-{checkout.version}") for checkout in CHECKOUTS]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: drives a headless Chromium on ComfyUI's front end")
    config.addinivalue_line("markers", "smoke: enough to say that the pack loads and runs on an old ComfyUI")


# For the whole session: a start takes five seconds, and nothing that tests do outlives its own prompt.
@pytest.fixture(scope="session", params=checkouts())
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server of each checkout in turn."""
    checkout: Checkout = request.param
    if not os.access(checkout.python, os.X_OK):
        pytest.fail(f"ComfyUI {checkout.version} at {checkout.path} has no interpreter {checkout.python}")
    running = Server(checkout, Path(tmp_path_factory.mktemp("comfyui")) / "base")
    try:
        running.wait_until_up()
        yield running
    finally:
        running.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # A run without a checkout skips everything here and is green: the summary says so.
    versions = ", ".join(f"{checkout.version} ({checkout.path})" for checkout in CHECKOUTS)
    terminalreporter.write_line(f"ComfyUI versions tested: {versions or 'none; ' + NONE_FOUND}")
