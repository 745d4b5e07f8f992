"""The client that scripts start from."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.comfyui.graphs import fresh_seed, read_mp4
from tests.comfyui.host_server import PACK_NAME, ROOT, Server
from train.tiny.world import detect

CLIENT, WORKFLOW = ROOT / "workflows/client.py", ROOT / "workflows/api/tiny_t2v.json"


def load_client() -> Any:
    """Load the script as a module: it lies in no package, so that it can be copied."""
    spec = importlib.util.spec_from_file_location("workflows_client", CLIENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client = load_client()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return a picture as [R, H, W] in [0, 1]."""
    return (
        torch.tensor(list(image.convert("RGB").tobytes())).unflatten(0, (*image.size[::-1], 3)).permute(2, 0, 1) / 255
    )


def call(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLIENT), str(WORKFLOW), "--server", server.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_it_queues_a_workflow_with_other_inputs_and_fetches_the_video(server: Server, tmp_path: Path) -> None:
    text = "a green circle moving down slowly on a black background"
    process = call(server, "--set", f"2.text={text}", "--set", f"4.seed={fresh_seed()}", "--to", str(tmp_path))
    assert process.returncode == 0, process.stderr
    (video,) = map(Path, process.stdout.split())
    assert (detect(read_mp4(video)[0]).colour, len(read_mp4(video)[0])) == ("green", 33)


def test_what_is_shown_is_saved_while_it_is_made(server: Server, tmp_path: Path) -> None:
    """The newest frame of every chunk, each of them whole."""
    frames, rest = tmp_path / "frames", ["--set", "4.seed=22", "--to", str(tmp_path)]  # one that moves far
    process = call(server, "--frames", str(frames), *rest)
    assert process.returncode == 0, process.stderr
    (video,) = map(Path, process.stdout.split())
    images = sorted(frames.iterdir())
    assert [path.name for path in images] == ["00001.jpg", "00002.jpg", "00003.jpg"]
    saved = read_mp4(video)[0]
    assert len(saved) == 33
    for path, number in zip(images, (8, 20, 32)):
        image = to_tensor(Image.open(path).resize((64, 64)))
        errors = (saved - image).abs().mean((1, 2, 3))
        assert errors[number] < 0.05, "lossy twice, and scaled by ComfyUI"
        assert errors[number] < errors.min() + 0.01, "no other frame of the video is clearly nearer"
        assert errors[number] == min(errors[[8, 20, 32]]), "and it is this chunk's"
    lines = process.stderr.splitlines()
    assert [line.split(" ")[0] for line in lines] == [str(path) for path in images]
    assert "(node 4: " in lines[-1]
    again = call(server, "--frames", str(frames), *rest)
    assert again.returncode == 2
    assert "holds files already" in again.stderr
    cached = call(server, "--frames", str(tmp_path / "none"), *rest)
    assert cached.returncode == 0, cached.stderr
    assert "nothing was shown" in cached.stderr
    assert not (tmp_path / "none").exists()


def test_mistakes_are_one_line(server: Server, tmp_path: Path) -> None:
    for setting, words in (("9.text=a", "sets no input"), ("4.length=100005", "bigger than max")):
        process = call(server, "--set", setting, "--to", str(tmp_path), "--frames", str(tmp_path / "frames"))
        assert process.returncode == 2
        assert words in process.stderr
        assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["{}", "http://{}", "http://{}/", " HTTP://{}// "])
def test_the_server_is_named_as_address_or_as_url(form: str) -> None:
    for address in ("127.0.0.1:8188", "localhost", "[::1]:81", "example.org:80/comfy"):
        assert client.server_of(form.format(address)) == address


@pytest.mark.parametrize(
    "text", ["https://here:1", "ws://here:1", "", "http://", "a b", "here:port", "here:70000", "u@h:1"]
)
def test_other_servers_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"--server .*; (this script speaks plain HTTP, so )?give .*HOST:PORT"
    ) as raised:
        client.server_of(text)
    assert "\n" not in str(raised.value)


def test_a_run_of_this_client_can_be_finished_from_another_terminal(server: Server, tmp_path: Path) -> None:
    """Without a browser: what was made is saved, and whoever queued it gets it."""
    address, prompt = f"http://{server.address}/", ROOT / "workflows/api/tiny_endless.json"
    finish = [sys.executable, str(CLIENT), "finish", "--server", address]

    def finished() -> subprocess.CompletedProcess[str]:
        return subprocess.run(finish, capture_output=True, text=True, timeout=60, check=False)

    idle = finished()
    assert (idle.returncode, idle.stderr.count("\n")) == (2, 1)
    assert "executes nothing now" in idle.stderr
    settings = ["--set", f"4.seed={fresh_seed()}", "--set", "4.length=12009", "--to", str(tmp_path / "to")]
    command = [
        sys.executable,
        str(CLIENT),
        str(prompt),
        "--server",
        address,
        "--frames",
        str(tmp_path / "seen"),
        *settings,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        # After two chunks, so that there is something to keep and much left to make.
        deadline = time.monotonic() + 120
        while not (tmp_path / "seen/00002.jpg").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process = finished()
        out, err = running.communicate(timeout=120)
    assert process.returncode == 0, process.stderr
    assert "ends after its current chunk" in process.stdout
    assert running.returncode == 0, err
    (video,) = map(Path, out.split())
    frames = len(read_mp4(video)[0])
    assert 21 <= frames < 12009
    assert frames % 12 == 9, "whole chunks"


@pytest.mark.parametrize("content", [(ROOT / "workflows/tiny_t2v.json").read_text(), "[]", "{}", '{"1": {"id": 2}}'])
def test_a_workflow_of_the_canvas_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "canvas.json").write_text(content)
    with pytest.raises(ValueError, match=r"this is a canvas workflow; use .* workflows/api, or Export \(API\)"):
        client.read_prompt(tmp_path / "canvas.json")
    command = [sys.executable, str(CLIENT), str(tmp_path / "canvas.json"), "--set", "4.seed=1"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert "canvas workflow" in process.stderr


def test_help_pages_are_served_for_nodes_that_exist(server: Server) -> None:
    known = server.get("/object_info")
    pages = sorted((ROOT / "web/docs").glob("*.md"))
    assert len(pages) >= 6
    for page in pages:
        assert page.stem in known
        address = f"http://{server.address}/extensions/{PACK_NAME}/docs/{page.name}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read().decode() == page.read_text()


# ------------------------------------------------------------ websocket reader --
class FakeConnection:
    """Gives what a server would have sent in pieces of a few bytes, and keeps what it is told."""

    def __init__(self, content: bytes, piece: int = 3) -> None:
        self.content, self.piece, self.sent = content, piece, b""

    def recv(self, count: int) -> bytes:
        count = min(count, self.piece)
        part, self.content = self.content[:count], self.content[count:]
        return part

    def sendall(self, data: bytes) -> None:
        self.sent += data


def frame(opcode: int, data: bytes, *, is_last: bool = True) -> bytes:
    # RFC 6455, section 5.2: seven bits of length, or 126 and two bytes, or 127 and eight.
    size = len(data)
    if size < 126:
        length = bytes([size])
    else:
        length = b"\x7e" + size.to_bytes(2, "big") if size < 2**16 else b"\x7f" + size.to_bytes(8, "big")
    return bytes([is_last << 7 | opcode]) + length + data


TEXT, BINARY, CLOSE, PING = client.TEXT, client.BINARY, client.CLOSE, client.PING


@pytest.mark.parametrize("piece", [1, 3, 10**6])
def test_messages_come_whole_however_they_are_cut(piece: int) -> None:
    """Frames of every form of length, messages of several frames, and a ping between two of them, which is answered."""
    long, longer = bytes(range(256)) * 4, b"x" * 70000
    content = (
        frame(TEXT, "gr\u00fcn".encode())
        + frame(BINARY, long[:500], is_last=False)
        + frame(PING, b"there?")
        + frame(0, long[500:700], is_last=False)
        + frame(0, long[700:])
        + frame(BINARY, b"")
        + frame(BINARY, longer)
    )
    connection = FakeConnection(content, piece)
    messages = iter(client.Messages("here", connection))
    assert [next(messages) for _ in range(4)] == ["gr\u00fcn", long, b"", longer]
    head, mask, masked = connection.sent[:2], connection.sent[2:6], connection.sent[6:]
    assert head == bytes([0x80 | client.PONG, 0x80 | 6]), "a client's frames are masked"
    assert bytes(byte ^ mask[n % 4] for n, byte in enumerate(masked)) == b"there?"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (frame(CLOSE, (1001).to_bytes(2, "big") + b"going away"), "closed the websocket (1001 going away)"),
        (frame(CLOSE, b""), "closed the websocket (1005)"),
        (bytes([0x80 | TEXT, 0x80 | 1]) + b"maskx", "masked, compressed or overlong"),
        (bytes([0x80 | 0x40 | TEXT, 1]) + b"x", "masked, compressed or overlong"),
        (frame(PING, b"x" * 126), "masked, compressed or overlong"),
        (bytes([0x80 | BINARY, 127]) + (2**40).to_bytes(8, "big"), "sent a frame of 1099511627776 bytes, more than"),
        (frame(BINARY, b"x" * 9, is_last=False) + frame(0, b"x" * 9), "a message of more than 16 bytes"),
        (frame(0, b"x"), "opcode 0 out of order"),
        (frame(TEXT, b"x", is_last=False) + frame(TEXT, b"x"), "opcode 1 out of order"),
        (frame(3, b"x"), "opcode 3 out of order"),
        (frame(TEXT, b"whole")[:4], "ended the websocket within a message"),
        (b"", "ended the websocket"),
    ],
)
def test_what_is_no_message_is_one_clear_line(content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "more than 16" in words:
        monkeypatch.setattr(client, "LARGEST", 16)
    with pytest.raises(ValueError) as raised:
        next(iter(client.Messages("here", FakeConnection(content))))
    message = str(raised.value)
    assert message.startswith("here ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 101 Switching\r\nSec-WebSocket-Accept: other\r\n\r\n", b"x" * 2**14],
)
def test_a_server_without_websocket_is_named(answer: bytes) -> None:
    with pytest.raises(ValueError, match="here opens no websocket"):
        client.Messages("here", FakeConnection(answer, 10**6)).shake_hands("/ws")


def test_silence_is_borne_while_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(0.05)
        messages = client.Messages("here", near)
        monkeypatch.setattr(client, "ask", lambda server, path: (asked.append(path), far.sendall(frame(TEXT, b"a"))))
        assert next(iter(messages)) == "a"
        assert asked == ["/queue"]


def test_only_pictures_of_the_prompt_are_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until it has ended; another prompt's end, texts and pictures with metadata are passed over."""

    def event(kind: str, **data: Any) -> bytes:
        return frame(TEXT, json.dumps({"type": kind, "data": data}).encode())

    def number(value: int) -> bytes:
        return value.to_bytes(4, "big")

    content = (
        event("status")
        + event("execution_success", prompt_id="other")
        + event("progress", node="4", value=2, max=8)
        + frame(BINARY, number(1) + number(1) + b"first")
        + frame(BINARY, number(3) + b"text")
        + frame(BINARY, number(1) + number(2) + b"second")
        + event("execution_error", prompt_id="ours")
        + frame(BINARY, number(1) + number(1) + b"late")
    )
    client.save_frames(client.Messages("here", FakeConnection(content)), "ours", tmp_path / "a/b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a/b").iterdir()} == {
        "00001.jpg": b"first",
        "00002.png": b"second",
    }
    assert "00001.jpg (node 4: 2 of 8)" in capsys.readouterr().err
