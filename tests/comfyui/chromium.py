"""A headless Chromium with one tab on a ComfyUI server, driven over the DevTools protocol.

Run by ComfyUI's Python, which has aiohttp. Requests to anything but the server are refused by the browser's own host
rules, so that a page shows what a machine without network sees.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE = 120  # seconds
WINDOW = (1600, 1000)


class Tab:
    """One tab of a running browser, and the session that talks to the server behind it.

    errors: those of the page on whose stack there is a script of the pack; the front end has some of its own.
    """

    def __init__(
        self, socket: aiohttp.ClientWebSocketResponse, session: aiohttp.ClientSession, address: str, pack: str
    ) -> None:
        self.socket, self.session, self.address, self.pack, self.count = socket, session, address, pack, 0
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1  # answers carry the number of their call; events, which come in between, have none
        await self.socket.send_json({"id": self.count, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE):
            while True:
                answer = await self.socket.receive_json()
                await self._listen(answer)
                if answer.get("id") == self.count:
                    assert "error" not in answer, answer
                    return answer["result"]

    async def _listen(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Page.javascriptDialogOpening":  # leaving a changed workflow
            accept = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            await self.socket.send_json(accept)
        parameters = event.get("params", {})
        is_error = event.get("method") == "Runtime.exceptionThrown" or parameters.get("type") == "error"
        if is_error and f"/extensions/{self.pack}/" in (said := json.dumps(parameters)):
            self.errors.append(said[:2000])

    async def evaluate(self, script: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, json.dumps(result["exceptionDetails"])[:2000]
        return result["result"].get("value")

    async def until(self, script: str) -> None:
        for _ in range(PATIENCE * 5):
            if await self.evaluate(script):
                return
            await asyncio.sleep(0.2)
        raise AssertionError(f"never true: {script}")

    async def open(self, **settings: Any) -> None:
        """Load the front end with these settings of its own, up to a canvas that knows every node of the server."""
        await self.session.post(f"http://{self.address}/settings", json=settings)
        await self.call("Page.navigate", url=f"http://{self.address}/")
        await asyncio.sleep(1)
        await self.until(
            "!!(window.app?.graph && window.app.canvas && window.LiteGraph && document.querySelector('#graph-canvas'))"
        )
        async with self.session.get(f"http://{self.address}/object_info") as answer:
            known = json.dumps(list(await answer.json()))
        await self.until(f"{known}.every(name => name in window.LiteGraph.registered_node_types)")

    async def screenshot(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def tab(chromium: str, address: str, pack: str) -> AsyncIterator[Tab]:
    """Open the only tab of a browser that ends with the block."""
    with tempfile.TemporaryDirectory() as profile:
        process = await asyncio.create_subprocess_exec(
            chromium,
            "--headless=new",
            "--no-sandbox",  # the sandbox does not start for root, as whom containers run
            "--disable-gpu",
            "--disable-dev-shm-usage",  # of 64 MB in a container by default, which a page of this size exceeds
            "--remote-debugging-port=0",  # any free one; the browser names it on stderr
            f"--user-data-dir={profile}",
            f"--window-size={WINDOW[0]},{WINDOW[1]}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            devtools = await _devtools_address(process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{devtools}/json") as answer:
                    (entry,) = [entry for entry in await answer.json() if entry["type"] == "page"]
                async with session.ws_connect(entry["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Tab(socket, session, address, pack)
                    await page.call("Page.enable")
                    await page.call("Runtime.enable")
                    yield page
        finally:
            # Nothing of its profile is wanted, and a page that asks whether to leave would keep it open.
            process.kill()
            await process.wait()


async def _devtools_address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    while True:
        line = (await asyncio.wait_for(process.stderr.readline(), PATIENCE)).decode()
        assert line, "the browser ended"
        if match := re.search(r"ws://([\d.:]+)/", line):
            return match[1]
