"""Every workflow dropped on ComfyUI's own canvas in a real browser; tiny ones are run by the button and steered."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
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
        pytest.skip(f"this ComfyUI's front end cannot draw ComfyUI's own loaders ({found['broken']}); install spandrel")
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


RENDERERS = pytest.mark.parametrize("renderer", ["classic", "vue"])


def steered(seen: dict[str, Any], renderer: str) -> dict[str, Any]:
    found = seen[renderer]
    if renderer == "vue" and not found["is_shown"]:
        pytest.skip("this ComfyUI's front end draws no DOM widgets in its Vue nodes")
    assert found["is_shown"]
    return found


@RENDERERS
def test_the_player_shows_and_steers_what_is_made(seen: dict[str, Any], renderer: str) -> None:
    """By the page's own pixels: a red square until another prompt is typed, then a blue one."""
    found = steered(seen, renderer)
    before, after = (
        detect(torch.tensor(found[name]).reshape(1, 64, 64, 3).permute(0, 3, 1, 2) / 255)
        for name in ("before", "after")
    )
    assert (before.colour, before.shape) == ("red", "square")
    assert after.colour == "blue"
    assert found["error"] == ""
    assert "First frame" in found["figures"]
    assert found["written"] == ""  # sent, so it makes room
    assert "a blue square moving left slowly on a black background" in found["sent"]


@RENDERERS
def test_the_keys_of_the_player_show_what_can_be_done(seen: dict[str, Any], renderer: str) -> None:
    found = steered(seen, renderer)
    assert found["keys_when_held"] == {"hold": "pressed", "go_on": "on", "reroll": "on", "finish": "on", "stop": "on"}
    assert found["keys_when_on"] == {"hold": "on", "go_on": "off", "reroll": "off", "finish": "on", "stop": "on"}


@RENDERERS
def test_finish_here_keeps_exactly_the_chunks_that_were_made(
    seen: dict[str, Any], server: Server, renderer: str
) -> None:
    found = steered(seen, renderer)["finished"]
    assert found["entry"]["status"]["status_str"] == "success"
    words = re.fullmatch(r"finished here \u00b7 chunk (\d+) of 167", found["told"])
    assert words, found["told"]
    (file,) = (file for output in found["entry"]["outputs"].values() for file in server._files(output))
    frames_VRHW, _ = read_mp4(file)
    assert len(frames_VRHW) == 12 * int(words[1]) - 3  # a chunk is 3 latent frames, the video's first one is alone
    (link,) = found["files"]
    assert file.name in link


@RENDERERS
def test_a_stopped_run_names_the_file_that_was_written_until_then(
    seen: dict[str, Any], server: Server, renderer: str
) -> None:
    found = steered(seen, renderer)["stopped"]
    assert found["entry"]["status"]["messages"][-1][0] == "execution_interrupted"
    assert "stopped" in found["told"]
    (link,) = found["files"]
    with urllib.request.urlopen(link, timeout=30) as answer:
        assert answer.read(8)[4:] == b"ftyp"


@RENDERERS
def test_an_unchanged_workflow_does_not_run_again_for_its_players_sake(seen: dict[str, Any], renderer: str) -> None:
    assert seen["twice"][renderer]["ran"] == [True, False]


@RENDERERS
def test_a_node_has_one_player_and_it_plays_the_file_to_its_last_frame(seen: dict[str, Any], renderer: str) -> None:
    found = seen["twice"][renderer]
    assert found["videos"] == {"widgets": [], "elements": 0, "players": 1}
    assert found["place"] == "0:02.0 / 0:02.0"  # 33 frames


@RENDERERS
def test_the_players_width_follows_the_node_while_the_side_panel_is_open(seen: dict[str, Any], renderer: str) -> None:
    for node, player in seen["twice"][renderer]["widths"]:
        assert node - 32 <= player < node, (node, player)


def test_no_script_of_the_pack_complains(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_widgets_at_auto_say_so_and_a_lengths_arrows_go_by_chunks(seen: dict[str, Any], renderer: str) -> None:
    if not seen[renderer]["is_shown"]:
        pytest.skip("this ComfyUI's front end draws no DOM widgets in its Vue nodes")
    found = seen[renderer]["widgets"]
    assert found["before"] == [
        "steps \u00b7 auto",
        "shift \u00b7 auto",
        "chunk \u00b7 auto",
        "sink \u00b7 none",
        "quality \u00b7 auto",
    ]
    assert found["after"] == [
        "shift \u00b7 auto",
        "chunk \u00b7 auto",
        "window \u00b7 whole video",
        "sink \u00b7 none",
        "quality \u00b7 auto",
    ]
    if renderer == "vue":
        assert "window \u00b7 whole video" in found["text"]
        assert "steps \u00b7 auto" not in found["text"]
    assert (found["typed"], found["stepped"]) == (35, 333)
    assert found["same"], "values of saved workflows stay as they are"


def test_a_typed_prompt_shows_within_the_pace_and_a_chunk_whenever_it_is_sent(seen: dict[str, Any]) -> None:
    if not seen["vue"]["is_shown"]:
        pytest.skip("this ComfyUI's front end draws no DOM widgets in its Vue nodes")
    delays, told, moments, before = zip(*seen["delays"])
    shown, sent = ([int(re.search(r"chunk (\d+) of 167", words)[1]) for words in each] for each in (told, before))
    first, *_, last = shown
    seconds = max(12 / 16, (moments[-1] - moments[0]) / (last - first))  # of a chunk, on this machine as busy as it is
    # The pace, the chunk that is being made, the one in which the picture changes, as long again on a busy machine.
    most = 2 + 3 * seconds + 1
    # A machine that halts for a while makes no chunks either: then the same holds in chunks of 0.75 s.
    chunks = [later - earlier for earlier, later in zip(sent, shown)]
    held = [delay is not None and (delay < most or count <= 6) for delay, count in zip(delays, chunks)]
    assert all(held), seen["delays"]


def test_a_queued_run_is_shown_in_its_own_workflow_alone_and_a_page_that_comes_back_sees_it(
    seen: dict[str, Any],
) -> None:
    found = seen["left"]
    assert found["told_in_the_copy"] == "no run yet"
    assert re.search("chunk [1-9]", found["told_when_back"])
    assert found["is_running"]


def test_players_in_subgraphs_go_with_their_workflow(seen: dict[str, Any]) -> None:
    assert seen["left"]["players"] == 1
