"""Every workflow dropped on the host's own canvas in a real browser; tiny ones are run by the button and steered."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.comfyui.graphs import of_one_codec, read_mp4
from tests.comfyui.host_server import PACK_NAME, ROOT, Server
from train.tiny.world import detect

pytestmark = pytest.mark.browser
NAMES = [path.stem for path in sorted((ROOT / "workflows").glob("*.json"))]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def seen(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page made of each workflow. Screenshots stay in SELFFORCING_SCREENSHOTS, if that is set."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium found: install the package chromium, or set CHROMIUM")
    folder = os.environ.get("SELFFORCING_SCREENSHOTS") or str(tmp_path_factory.mktemp("screenshots"))
    command = [server.checkout.python, Path(__file__).with_name("browse.py"), browser, server.address, PACK_NAME]
    done = subprocess.run(
        [*map(str, command), folder, *NAMES], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if "broken" in found:
        pytest.skip(f"this host's front end cannot draw the host's own loaders ({found['broken']}); install spandrel")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_dropped_workflow_has_every_node_and_every_value(seen: dict[str, Any], name: str) -> None:
    found = seen["workflows"][name]
    assert found["missing"] == []
    assert found["nodes"] == found["wanted"]
    twin = json.loads((ROOT / "workflows/api" / f"{name}.json").read_text())
    assert {key: node["class_type"] for key, node in found["prompt"].items()} == {
        key: node["class_type"] for key, node in twin.items()
    }
    for key, node in twin.items():
        made = found["prompt"][key]["inputs"]
        if not node["class_type"].startswith("SelfForcing"):  # later hosts give their nodes more widgets
            made = {name: value for name, value in made.items() if name in node["inputs"]}
        assert of_one_codec(made) == of_one_codec(node["inputs"]), node["class_type"]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("tiny_t2v", "red", "red"), ("tiny_prompt_schedule", "red", "blue"), ("tiny_endless", "red", "red")],
)
def test_the_run_button_makes_the_video_of_the_prompt(
    seen: dict[str, Any], server: Server, name: str, first: str, last: str
) -> None:
    ran = seen["runs"][name]
    assert ran["status"]["status_str"] == "success"
    (file,) = (file for output in ran["outputs"].values() for file in server._files(output))
    found = detect(read_mp4(file)[0])
    assert (found.colours_V[0], found.colours_V[-1]) == (first, last)
    assert max(set(found.shapes_V), key=found.shapes_V.count) == "square"


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_the_player_shows_steers_and_stops_what_is_made(seen: dict[str, Any], renderer: str) -> None:
    """By the page's own pixels: a red square until another prompt is typed, then a blue one."""
    found = seen[renderer]
    if renderer == "vue" and not found["is_shown"]:
        pytest.skip("this host's front end draws no DOM widgets in its Vue nodes")
    assert found["is_shown"]
    before, after = (
        detect(torch.tensor(found[name]).reshape(1, 64, 64, 3).permute(0, 3, 1, 2) / 255)
        for name in ("before", "after")
    )
    assert (before.colour, before.shape) == ("red", "square")
    assert after.colour == "blue"
    assert found["error"] == ""
    assert "first frame" in found["told"]
    assert found["stopped"]["messages"][-1][0] == "execution_interrupted"
    assert "stopped" in found["told_when_stopped"]


def test_a_queued_run_is_shown_in_its_own_workflow_alone_and_a_page_that_comes_back_sees_it(
    seen: dict[str, Any],
) -> None:
    found = seen["left"]
    assert found["told_in_the_copy"] == ""
    assert "first frame" in found["told_when_back"]
    assert found["is_running"]


def test_players_in_subgraphs_go_with_their_workflow(seen: dict[str, Any]) -> None:
    assert seen["left"]["players"] == 1
