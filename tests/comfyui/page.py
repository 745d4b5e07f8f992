"""A page with the live player, as far as the server can tell: its websocket, its answers and its commands."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.comfyui.host_server import RUN_SECONDS, Server


class Page:
    """A client that plays along, or does not."""

    def __init__(self, server: Server, reactions: list[dict[str, Any]], client_id: str | None = None) -> None:
        self.client_id = client_id or uuid.uuid4().hex
        # In ComfyUI's interpreter: it has aiohttp, which this project does not need otherwise.
        command = [server.checkout.python, Path(__file__).with_name("play.py"), server.address, self.client_id]
        self.process = subprocess.Popen([*map(str, command), json.dumps(reactions)], stdout=subprocess.PIPE)
        self.arrived: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.arrived.get(timeout=RUN_SECONDS)["type"] == "listening"
        self.events: list[dict[str, Any]] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.arrived.put(json.loads(line))

    def until(self, kind: str) -> None:
        while not self.events or self.events[-1].get("type") != kind:
            self.events.append(self.arrived.get(timeout=RUN_SECONDS))

    def until_done(self) -> list[dict[str, Any]]:
        """Return all messages of the player up to that which ends the run."""
        while not any(message["state"] == "done" for message in self.live()):
            self.events.append(self.arrived.get(timeout=30))
        return self.live()

    def live(self) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event.get("type") == "live"]


@contextmanager
def page(server: Server, reactions: list[dict[str, Any]] | None = None, client_id: str | None = None) -> Iterator[Page]:
    client = Page(server, reactions or [], client_id)
    try:
        yield client
    finally:
        client.process.kill()
        client.process.wait()
