"""A real ComfyUI on this machine: finding checkouts, running one as a server, and talking to it as a browser would.

The server runs with its own Python and its own checkout on the path; this repository is linked into its custom_nodes
under a name with hyphens, as a user's clone would have.
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "self-forcing-test-pack"
START_SECONDS = 300  # an idle machine needs 5; continuous integration may share its cores
RUN_SECONDS = 300


@dataclass(frozen=True)
class Checkout:
    """A ComfyUI source tree and the interpreter that has its packages."""

    path: Path
    python: Path

    @property
    def version(self) -> str:
        match = re.search(r'__version__ = "(.+?)"', (self.path / "comfyui_version.py").read_text())
        return match.group(1) if match else "unknown"


def find_checkouts() -> list[Checkout]:
    """Return COMFYUI_PATH, else each folder below ~/comfy/ with a main.py; by COMFYUI_PYTHON, else its own .venv."""
    named = os.environ.get("COMFYUI_PATH")
    folders = [Path(named)] if named else sorted(main.parent for main in Path.home().glob("comfy/*/main.py"))
    python = os.environ.get("COMFYUI_PYTHON")
    return [Checkout(folder, Path(python or folder / ".venv/bin/python")) for folder in folders]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Refused(Exception):
    """The server did not accept a prompt; the argument is its answer."""


class Server:
    """One running ComfyUI. `folder` is its base directory: models/, output/, ..."""

    def __init__(self, checkout: Checkout, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder
        self.address = f"127.0.0.1:{_free_port()}"
        for name in ("custom_nodes", "models/loras", "input", "output", "temp", "user"):
            (folder / name).mkdir(parents=True)
        (folder / "custom_nodes" / PACK_NAME).symlink_to(ROOT, target_is_directory=True)
        (folder / "custom_nodes/waiting_node.py").symlink_to(Path(__file__).with_name("waiting_node.py"))
        # Another PYTHONPATH would put its packages before those of ComfyUI's own environment.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.log_path = folder / "log.txt"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [str(checkout.python), "main.py", *self._arguments()],
                cwd=checkout.path,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _arguments(self) -> list[str]:
        host, port = self.address.split(":")
        arguments = [
            "--cpu",
            "--listen",
            host,
            "--port",
            port,
            "--base-directory",
            str(self.folder),
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
            "--preview-method",
            "latent2rgb",
        ]
        frontend = os.environ.get("COMFYUI_FRONTEND")  # the folder `static` of another comfyui-frontend-package
        return [*arguments, "--front-end-root", frontend] if frontend else arguments

    def wait_until_up(self) -> None:
        # An interpreter that has ended is noticed at once, with its log, instead of after the deadline.
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"ComfyUI {self.checkout.version} did not start:\n{self.log()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()  # ComfyUI closes its files; killed, it may leave them half written
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    # -------------------------------------------------------------- requests --
    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from error
        return json.loads(text) if text else None

    def submit(self, prompt: dict[str, Any], client_id: str = "", workflow: dict[str, Any] | None = None) -> str:
        """Queue a prompt in API format; its id. Raises Refused with the reasons. workflow: as a page sends it."""
        extra = {} if workflow is None else {"extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        return self.post("/prompt", {"prompt": prompt, "client_id": client_id, **extra})["prompt_id"]

    def result(self, prompt_id: str) -> dict[str, Any]:
        """Return the history entry of a prompt, once it has ended in whatever way."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            # The entry appears a moment after the last event.
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.05)
        raise AssertionError(f"the prompt did not end within {RUN_SECONDS} s:\n{self.log()[-3000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, list[Path]]:
        """Run a prompt to its end; the files that each output node saved, by node id."""
        entry = self.result(self.submit(prompt))
        assert entry["status"]["status_str"] == "success", failure(entry)
        return {node: self._files(output) for node, output in entry["outputs"].items()}

    def _files(self, output: dict[str, Any]) -> list[Path]:
        saved = (file for files in output.values() for file in files if isinstance(file, dict))
        return [self.folder / "output" / file["subfolder"] / file["filename"] for file in saved]

    def events(self) -> Events:
        return Events(self)


def failure(entry: dict[str, Any]) -> str:
    """Return what a history entry says went wrong: ComfyUI's message, or the name of the event that ended the run."""
    kind, data = entry["status"]["messages"][-1]
    return f"{kind}: {data.get('node_type')}: {data.get('exception_message', '')}"


class Events:
    """What the server tells one client over the websocket, read through ComfyUI's own aiohttp."""

    def __init__(self, server: Server) -> None:
        self.client_id = uuid.uuid4().hex
        script = Path(__file__).with_name("listen.py")
        self.process = subprocess.Popen(
            [str(server.checkout.python), str(script), server.address, self.client_id], stdout=subprocess.PIPE
        )
        self.arrived: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Events:
        self.until("listening")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.arrived.put(json.loads(line))

    def until(self, *kinds: str) -> list[dict[str, Any]]:
        """Return all events up to and including the first of these kinds."""
        return list(self._until(kinds))

    def _until(self, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        while True:
            event = self.arrived.get(timeout=RUN_SECONDS)
            yield event
            if event["type"] in kinds:
                return
