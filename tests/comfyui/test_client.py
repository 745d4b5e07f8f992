"""The client that scripts start from."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.comfyui.graphs import fresh_seed, read_mp4
from tests.comfyui.host_server import PACK_NAME, ROOT, Server
from train.tiny.world import detect

CLIENT, WORKFLOW = ROOT / "workflows/client.py", ROOT / "workflows/api/tiny_t2v.json"


def call(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLIENT), str(WORKFLOW), "--server", server.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_it_queues_a_workflow_with_other_inputs_and_fetches_the_video(server: Server, tmp_path: Path) -> None:
    text = "a green circle moving down slowly on a black background"
    done = call(server, "--set", f"2.text={text}", "--set", f"4.seed={fresh_seed()}", "--to", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (video,) = map(Path, done.stdout.split())
    assert (detect(read_mp4(video)[0]).colour, len(read_mp4(video)[0])) == ("green", 33)


def test_mistakes_are_one_line(server: Server, tmp_path: Path) -> None:
    for setting, words in (("9.text=a", "sets no input"), ("4.length=34", "use 33 or 37")):
        done = call(server, "--set", setting, "--to", str(tmp_path))
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_pages_are_served_for_nodes_that_exist(server: Server) -> None:
    known = server.get("/object_info")
    pages = sorted((ROOT / "web/docs").glob("*.md"))
    assert len(pages) >= 6
    for page in pages:
        assert page.stem in known
        address = f"http://{server.address}/extensions/{PACK_NAME}/docs/{page.name}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read().decode() == page.read_text()
