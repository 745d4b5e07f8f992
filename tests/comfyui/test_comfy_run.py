"""Every workflow and every twin, as real clients hand them in: the server takes them, and so does `comfy run`.

They are only looked at, not run: a node that waits keeps the queue busy until they are taken out again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.comfyui.host_server import ROOT, RUN_SECONDS, Refused, Server

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TWINS = sorted((ROOT / "workflows/api").glob("*.json"))
UNLISTED = ("loras/selfforcing_lora.safetensors",)  # a user's own file, which no dialog can fetch


def named_files() -> set[str]:
    """Return the model files that the workflows name, as paths below models/."""
    nodes = [node for path in WORKFLOWS for node in json.loads(path.read_text())["nodes"]]
    listed = (model for node in nodes for model in node.get("properties", {}).get("models", []))
    return {f"{model['directory']}/{model['name']}" for model in listed} | set(UNLISTED)


@pytest.fixture(scope="module")
def catalogued(server: Server) -> Iterator[Server]:
    """Return the server with files of the right names and nothing in them: clients look at names only."""
    # Files that other tests have put there stay, with what is in them; only these are removed again.
    models, placed = server.folder / "models", []
    for path in (models / name for name in named_files()):
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, path) if path.suffix == ".pt" else save_file({}, path)
        placed.append(path)
    picture = server.folder / "input/example.png"
    if not picture.exists():
        Image.new("RGB", (64, 64)).save(picture)
        placed.append(picture)
    yield server
    for path in placed:
        path.unlink()


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """Let nothing begin that is queued in here; afterwards the queue is empty and the server idle."""
    server.submit({"wait": {"class_type": "WaitForInterrupt", "inputs": {"name": "busy"}}})
    try:
        yield
        assert server.get("/queue")["queue_running"], "it was busy all the time"
    finally:
        server.post("/queue", {"clear": True})
        server.post("/interrupt")
        deadline = time.monotonic() + RUN_SECONDS
        while server.get("/queue")["queue_running"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.smoke
def test_the_server_takes_every_twin(catalogued: Server) -> None:
    with busy(catalogued):
        for path in TWINS:
            try:
                answer = catalogued.post("/prompt", {"prompt": json.loads(path.read_text())})
            except Refused as refused:
                pytest.fail(f"{path.name}: {refused}")
            assert not answer["node_errors"], path.name


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return `comfy run` as a function that returns its answer. It gets a home of its own, since it writes there."""
    program = os.environ.get("COMFY_CLI") or shutil.which("comfy")
    if program is None:
        pytest.skip("no comfy found: python3 -m venv V && V/bin/pip install comfy-cli, then COMFY_CLI=V/bin/comfy")
    environment = os.environ | {"HOME": str(tmp_path_factory.mktemp("home")), "DO_NOT_TRACK": "1"}

    def run(server: Server, path: Path, *more: str) -> dict[str, Any]:
        host, port = server.address.split(":")
        command = [program, "--skip-prompt", "run", "--workflow", str(path), "--host", host, "--port", port, *more]
        process = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
        )
        assert process.stdout.strip(), process.stderr[-3000:]
        return json.loads(process.stdout.splitlines()[-1])

    return run


def test_comfy_run_takes_every_workflow_and_every_twin(catalogued: Server, comfy: Any) -> None:
    with busy(catalogued):
        answers = {path: comfy(catalogued, path, "--no-watch") for path in (*WORKFLOWS, *TWINS)}
    refused = {str(path.relative_to(ROOT)): answer["error"] for path, answer in answers.items() if not answer["ok"]}
    assert not refused


TINY = [path for path in WORKFLOWS if path.stem.startswith("tiny")] + [ROOT / "workflows/api/tiny_t2v.json"]


@pytest.mark.parametrize("path", TINY, ids=lambda path: str(path.relative_to(ROOT)))
def test_comfy_run_runs_the_tiny_ones(server: Server, comfy: Any, path: Path) -> None:
    answer = comfy(server, path, "--wait")
    assert answer["ok"], answer["error"]
    assert answer["data"]["status"] == "completed"
    assert any(".mp4" in output for output in answer["data"]["outputs"])
