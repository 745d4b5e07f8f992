"""Queue a workflow of workflows/api on a running ComfyUI, wait for it, and fetch what it saved.

    python workflows/client.py workflows/api/tiny_t2v.json --set 2.text="a green circle moving up slowly" --set 4.seed=7
    python workflows/client.py workflows/api/tiny_t2v.json --frames seen
    python workflows/client.py finish --server http://127.0.0.1:8188

Needs nothing but Python. --set NODE.INPUT=VALUE changes one input; values are JSON where they parse, else text.
--server takes host:port or http://host:port.

finish ends what the server is executing after its current chunk, whoever queued it: all that was made goes out, and who
waits for it gets it. It works while a streaming node with its player switched on samples; the server lists what it
executes, with the client id that this needs, to everybody who may also interrupt it.

--frames FOLDER saves the images that ComfyUI shows while it works, as they arrive: 00001.jpg, 00002.jpg, ... Each is
whole when it appears. The streaming samplers show the newest frame of every chunk. They come over ComfyUI's websocket,
of which `Messages` below reads as much as that takes (RFC 6455).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # opcodes of a frame; 0: more of the message before
LARGEST = 64 * 2**20  # bytes of a message
PATIENCE = 30  # seconds of silence after which the server is asked whether it is still there
PREVIEW = 1  # ComfyUI's binary message of an image: this number, one of SUFFIXES, the file; both numbers of 4 bytes
SUFFIXES = {1: ".jpg", 2: ".png"}
ENDS = ("execution_success", "execution_error", "execution_interrupted")


def server_of(text: str) -> str:
    """Return an address as host:port and the path of a proxy. Raises ValueError for what this script cannot speak.

    Takes host:port and http://host:port, with or without a slash at the end; without a port it is that of HTTP.
    """
    scheme, mark, rest = text.strip().partition("://")
    if mark and scheme.lower() != "http":
        raise ValueError(f"--server {text} is not http; this script speaks plain HTTP, so give http://HOST:PORT")
    server = (rest if mark else scheme).rstrip("/")
    try:
        address = urllib.parse.urlsplit(f"//{server}")
        is_usable = bool(address.hostname) and (address.port or 80) > 0
    except ValueError:
        is_usable = False
    if not is_usable or address.username is not None or address.query or address.fragment or " " in server:
        raise ValueError(f"--server {text!r} is no address; give HOST:PORT or http://HOST:PORT, as 127.0.0.1:8188")
    return server


def ask(server: str, path: str, body: Any = None) -> Any:
    """Get a path, or post a body to it, and return the JSON answer. Raises ValueError with the server's own reasons."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{server}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{server} refused: {reason(error.read().decode(errors='replace'))}") from error
    except ValueError as error:
        raise ValueError(f"{server} does not answer in JSON ({error}); is it ComfyUI?") from error
    except OSError as error:
        raise ValueError(f"{server} does not answer ({error}); start ComfyUI, or name another --server") from error


def reason(answer: str) -> str:
    """Return the sentence in an answer of the pack's own routes; any other answer as it is."""
    try:
        error = json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        return answer
    return error if isinstance(error, str) else answer


def finish(server: str) -> str:
    """End what the server executes after its current chunk; return its prompt's id. Raises ValueError if it cannot."""
    running = ask(server, "/queue")["queue_running"]
    if not running:
        raise ValueError(f"{server} executes nothing now, so there is nothing to finish")
    _, prompt_id, _, extra, *_ = running[0]
    client_id = extra.get("client_id")
    if not client_id:
        raise ValueError(f"prompt {prompt_id} was queued without a client id; it can only be interrupted")
    ask(server, "/selfforcing/live", {"action": "finish", "prompt_id": prompt_id, "client": client_id})
    return prompt_id


def read_prompt(path: Path) -> dict[str, Any]:
    """Return a workflow as the server takes it. Raises ValueError for other files, such as those the canvas saves."""
    prompt = json.loads(path.read_text(encoding="utf-8"))
    nodes = list(prompt.values()) if isinstance(prompt, dict) else []
    if not nodes or not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in nodes):
        raise ValueError(
            f"{path}: this is a canvas workflow; use the file of the same name in workflows/api, or Export (API)"
        )
    return prompt


def changed(prompt: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Return the prompt with some inputs set. Raises ValueError for inputs that it does not have."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        node, _, field = name.partition(".")
        if not equals or field not in prompt.get(node, {}).get("inputs", {}):
            known = ", ".join(f"{key}.{entry}" for key, value in prompt.items() for entry in value["inputs"])
            raise ValueError(f"{setting!r} sets no input of this workflow; use NODE.INPUT=VALUE with one of {known}")
        try:
            prompt[node]["inputs"][field] = json.loads(text)
        except ValueError:
            prompt[node]["inputs"][field] = text
    return prompt


class Messages:
    """What a server tells one client over a websocket: text as str, the rest as bytes. Raises ValueError if it ends."""

    def __init__(self, server: str, connection: socket.socket) -> None:
        self.server, self.connection = server, connection

    @classmethod
    def open(cls, server: str, client_id: str) -> Messages:
        address = urllib.parse.urlsplit(f"//{server}")
        try:
            connection = socket.create_connection((address.hostname, address.port or 80), PATIENCE)
        except OSError as error:
            raise ValueError(f"{server} does not answer ({error}); start ComfyUI, or name another --server") from error
        messages = cls(server, connection)
        messages.shake_hands(f"{address.path}/ws?clientId={client_id}")
        return messages

    def __iter__(self) -> Iterator[str | bytes]:
        kind, whole = 0, b""
        while True:
            is_last, opcode, data = self.frame()
            if opcode == CLOSE:
                words = [str(int.from_bytes(data[:2], "big") or 1005), *data[2:].decode(errors="replace").split()]
                raise ValueError(f"{self.server} closed the websocket ({' '.join(words)}); the prompt may still run")
            if opcode == PING:
                self.send(PONG, data)
            if opcode in (PING, PONG):
                continue
            if opcode not in ((TEXT, BINARY) if not kind else (0,)):
                raise ValueError(f"{self.server} sent a frame of opcode {opcode} out of order; is it ComfyUI?")
            kind, whole = kind or opcode, whole + data
            if len(whole) > LARGEST:
                raise ValueError(f"{self.server} sent a message of more than {LARGEST} bytes; is it ComfyUI?")
            if is_last:
                yield whole.decode(errors="replace") if kind == TEXT else whole
                kind, whole = 0, b""

    def shake_hands(self, path: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {self.server.partition('/')[0]}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        answer = b""
        while not answer.endswith(b"\r\n\r\n") and len(answer) < 2**14:
            answer += self.read(1)
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())
        first = answer.partition(b"\r\n")[0][:80]
        if b" 101 " not in first or accept not in answer:
            raise ValueError(f"{self.server} opens no websocket ({first.decode(errors='replace')}); is it ComfyUI?")

    def frame(self) -> tuple[bool, int, bytes]:
        """Return whether a message ends with this frame, its opcode, its data."""
        first, second = self.read(2)
        length = second & 0x7F
        if first & 0x70 or second & 0x80 or (first & 0x08 and length > 125):
            raise ValueError(f"{self.server} sent a masked, compressed or overlong frame; is it ComfyUI?")
        if length > 125:
            length = int.from_bytes(self.read(2 if length == 126 else 8), "big")
        if length > LARGEST:
            raise ValueError(f"{self.server} sent a frame of {length} bytes, more than {LARGEST}; is it ComfyUI?")
        return bool(first & 0x80), first & 0x0F, self.read(length)

    def read(self, count: int) -> bytes:
        """Return exactly this many bytes, however long they take, as long as the server answers."""
        content = b""
        while len(content) < count:
            try:
                part = self.connection.recv(min(count - len(content), 2**16))
            except TimeoutError:  # silence may be a long chunk; one that is gone does not answer this either
                ask(self.server, "/queue")
                continue
            except OSError as error:
                raise ValueError(f"{self.server} was lost ({error}); the prompt may still run") from error
            if not part:
                raise ValueError(f"{self.server} ended the websocket within a message; the prompt may still run")
            content += part
        return content

    def send(self, opcode: int, data: bytes) -> None:
        """Send one short frame, masked as a client's must be."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
        self.connection.sendall(bytes((0x80 | opcode, 0x80 | len(data))) + mask + masked)


def save_frames(messages: Messages, queued: str, folder: Path) -> None:
    """Save every image that is shown until a prompt has ended."""
    count, progress = 0, ""
    for message in messages:
        if isinstance(message, str):
            event = json.loads(message)
            data = event.get("data") or {}
            if event["type"] == "progress":
                progress = f" (node {data.get('node')}: {data['value']} of {data['max']})"
            if event["type"] in ENDS and data.get("prompt_id") == queued:
                break
        elif int.from_bytes(message[:4], "big") == PREVIEW:
            count += 1
            path = folder / f"{count:05d}{SUFFIXES.get(int.from_bytes(message[4:8], 'big'), '.bin')}"
            part = path.with_suffix(".part")
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(message[8:])
            part.replace(path)
            print(f"{path}{progress}", file=sys.stderr)
    if not count:
        print("nothing was shown: the server had the answer already, or no node shows what it makes", file=sys.stderr)


def run(server: str, prompt: dict[str, Any], frames: Path | None = None) -> dict[str, Any]:
    """Queue a prompt, wait until it has ended, return what each node put out. Raises ValueError if it failed.

    frames: folder for the images that are shown meanwhile; those of two runs are not mixed.
    """
    if frames is not None and frames.exists() and any(frames.iterdir()):
        raise ValueError(f"{frames} holds files already; give --frames an empty folder, or a new one")
    client_id = uuid.uuid4().hex
    messages = None if frames is None else Messages.open(server, client_id)
    queued = ask(server, "/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]
    if messages is not None and frames is not None:
        with messages.connection:
            save_frames(messages, queued, frames)
    while True:
        entry = ask(server, f"/history/{queued}").get(queued)
        if entry is not None:
            break
        time.sleep(0.5)
    if entry["status"]["status_str"] != "success":
        kind, data = entry["status"]["messages"][-1]
        raise ValueError(f"{kind}: {data.get('node_type')}: {data.get('exception_message', '').strip()}")
    return entry["outputs"]


def fetch(server: str, outputs: dict[str, Any], folder: Path) -> list[Path]:
    """Download every saved file; return their places here."""
    paths = []
    for output in outputs.values():
        for files in output.values():
            for file in files:
                if not isinstance(file, dict) or file.get("type") != "output":
                    continue
                query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
                with urllib.request.urlopen(f"http://{server}/view?{query}", timeout=60) as answer:
                    content = answer.read()
                folder.mkdir(parents=True, exist_ok=True)
                paths.append(folder / Path(file["filename"]).name)
                paths[-1].write_bytes(content)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "workflow",
        help="a file of workflows/api, or of the menu entry Export (API); or the word finish: end early, after its "
        "current chunk, what the server executes (a file of that name is ./finish)",
    )
    parser.add_argument(
        "--server",
        default="127.0.0.1:8188",
        help="address of ComfyUI, host:port or http://host:port (default: 127.0.0.1:8188)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change one input")
    parser.add_argument("--to", type=Path, help="folder for the results (default: out)")
    parser.add_argument("--frames", type=Path, metavar="FOLDER", help="save what is shown meanwhile, as it arrives")
    options = parser.parse_args()
    try:
        server = server_of(options.server)
        if options.workflow == "finish":
            if options.set or options.to or options.frames:
                raise ValueError("finish takes --server alone; who queued the run gets its results")
            print(f"{finish(server)} ends after its current chunk")
            return 0
        prompt = changed(read_prompt(Path(options.workflow)), options.set)
        for path in fetch(server, run(server, prompt, options.frames), options.to or Path("out")):
            print(path)
    except (ValueError, OSError) as error:
        print(f"client: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
