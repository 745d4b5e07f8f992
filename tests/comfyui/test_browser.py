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
def report(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the page made of each workflow. Screenshots stay in SELFFORCING_SCREENSHOTS, if that is set."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium found: install the package chromium, or set CHROMIUM")
    folder = os.environ.get("SELFFORCING_SCREENSHOTS") or str(tmp_path_factory.mktemp("screenshots"))
    command = [server.checkout.python, Path(__file__).with_name("browse.py"), browser, server.address, PACK_NAME]
    process = subprocess.run(
        [*map(str, command), folder, *NAMES], capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    if "broken" in report:
        pytest.skip(
            f"this ComfyUI's front end cannot draw ComfyUI's own loaders ({report['broken']}); install spandrel"
        )
    return report


@pytest.mark.parametrize("name", NAMES)
def test_dropped_workflow_has_every_node_and_every_value(report: dict[str, Any], name: str) -> None:
    workflow = report["workflows"][name]
    assert workflow["missing"] == []
    assert workflow["nodes"] == workflow["wanted"]
    twin = json.loads((ROOT / "workflows/api" / f"{name}.json").read_text())
    assert {key: node["class_type"] for key, node in workflow["prompt"].items()} == {
        key: node["class_type"] for key, node in twin.items()
    }
    for key, node in twin.items():
        inputs = workflow["prompt"][key]["inputs"]
        if not node["class_type"].startswith("SelfForcing"):  # later hosts give their nodes more widgets
            inputs = {name: value for name, value in inputs.items() if name in node["inputs"]}
        assert of_one_codec(inputs) == of_one_codec(node["inputs"]), node["class_type"]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("tiny_t2v", "red", "red"), ("tiny_prompt_schedule", "red", "blue"), ("tiny_endless", "red", "red")],
)
def test_the_run_button_makes_the_video_of_the_prompt(
    report: dict[str, Any], server: Server, name: str, first: str, last: str
) -> None:
    ran = report["runs"][name]
    assert ran["status"]["status_str"] == "success"
    (file,) = (file for output in ran["outputs"].values() for file in server._files(output))
    detection = detect(read_mp4(file)[0])
    assert (detection.colours_V[0], detection.colours_V[-1]) == (first, last)
    assert max(set(detection.shapes_V), key=detection.shapes_V.count) == "square"


RENDERERS = pytest.mark.parametrize("renderer", ["classic", "vue"])


def steered(report: dict[str, Any], renderer: str) -> dict[str, Any]:
    result = report[renderer]
    if renderer == "vue" and not result["is_shown"]:
        pytest.skip("this ComfyUI's front end draws no DOM widgets in its Vue nodes")
    assert result["is_shown"]
    return result


@RENDERERS
def test_the_player_shows_and_steers_what_is_made(report: dict[str, Any], renderer: str) -> None:
    """By the page's own pixels: a red square until another prompt is typed, then a blue one."""
    result = steered(report, renderer)
    before, after = (
        detect(torch.tensor(result[name]).reshape(1, 64, 64, 3).permute(0, 3, 1, 2) / 255)
        for name in ("before", "after")
    )
    assert (before.colour, before.shape) == ("red", "square")
    assert after.colour == "blue"
    assert result["error"] == ""
    assert "First frame" in result["figures"]
    assert result["written"] == ""  # sent, so it makes room
    assert "a blue square moving left slowly on a black background" in result["sent"]


@RENDERERS
def test_the_keys_of_the_player_show_what_can_be_done(report: dict[str, Any], renderer: str) -> None:
    result = steered(report, renderer)
    assert result["keys_when_held"] == {"hold": "pressed", "go_on": "on", "reroll": "on", "finish": "on", "stop": "on"}
    assert result["keys_when_on"] == {"hold": "on", "go_on": "off", "reroll": "off", "finish": "on", "stop": "on"}


@RENDERERS
def test_finish_here_keeps_exactly_the_chunks_that_were_made(
    report: dict[str, Any], server: Server, renderer: str
) -> None:
    result = steered(report, renderer)["finished"]
    assert result["entry"]["status"]["status_str"] == "success"
    words = re.fullmatch(r"finished here \u00b7 chunk (\d+) of 167", result["told"])
    assert words, result["told"]
    (file,) = (file for output in result["entry"]["outputs"].values() for file in server._files(output))
    frames_VRHW, _ = read_mp4(file)
    assert len(frames_VRHW) == 12 * int(words[1]) - 3  # a chunk is 3 latent frames, the video's first one is alone
    (link,) = result["files"]
    assert file.name in link


@RENDERERS
def test_a_stopped_run_names_the_file_that_was_written_until_then(
    report: dict[str, Any], server: Server, renderer: str
) -> None:
    result = steered(report, renderer)["stopped"]
    assert result["entry"]["status"]["messages"][-1][0] == "execution_interrupted"
    assert "stopped" in result["told"]
    (link,) = result["files"]
    with urllib.request.urlopen(link, timeout=30) as answer:
        assert answer.read(8)[4:] == b"ftyp"


@RENDERERS
def test_an_unchanged_workflow_does_not_run_again_for_its_players_sake(report: dict[str, Any], renderer: str) -> None:
    assert report["twice"][renderer]["ran"] == [True, False]


@RENDERERS
def test_a_node_has_one_player_and_it_plays_the_file_to_its_last_frame(report: dict[str, Any], renderer: str) -> None:
    result = report["twice"][renderer]
    assert result["videos"] == {"widgets": [], "elements": 0, "players": 1}
    assert result["place"] == "0:02.0 / 0:02.0"  # 33 frames


@RENDERERS
def test_the_players_width_follows_the_node_while_the_side_panel_is_open(report: dict[str, Any], renderer: str) -> None:
    for node, player in report["twice"][renderer]["widths"]:
        assert node - 32 <= player < node, (node, player)


def test_no_script_of_the_pack_complains(report: dict[str, Any]) -> None:
    assert report["errors"] == []


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_widgets_at_auto_say_so_and_a_lengths_arrows_go_by_chunks(report: dict[str, Any], renderer: str) -> None:
    if not report[renderer]["is_shown"]:
        pytest.skip("this ComfyUI's front end draws no DOM widgets in its Vue nodes")
    result = report[renderer]["widgets"]
    assert result["before"] == [
        "steps \u00b7 auto",
        "shift \u00b7 auto",
        "chunk \u00b7 auto",
        "sink \u00b7 none",
        "quality \u00b7 auto",
    ]
    assert result["after"] == [
        "shift \u00b7 auto",
        "chunk \u00b7 auto",
        "window \u00b7 whole video",
        "sink \u00b7 none",
        "quality \u00b7 auto",
    ]
    if renderer == "vue":
        assert "window \u00b7 whole video" in result["text"]
        assert "steps \u00b7 auto" not in result["text"]
    assert (result["typed"], result["stepped"]) == (35, 333)
    assert result["same"], "values of saved workflows stay as they are"


def test_a_typed_prompt_shows_within_the_pace_and_a_chunk_whenever_it_is_sent(report: dict[str, Any]) -> None:
    if not report["vue"]["is_shown"]:
        pytest.skip("this ComfyUI's front end draws no DOM widgets in its Vue nodes")
    delays, statuses, moments, statuses_before = zip(*report["delays"])
    shown_chunks, sent_chunks = (
        [int(re.search(r"chunk (\d+) of 167", words)[1]) for words in each] for each in (statuses, statuses_before)
    )
    first, *_, last = shown_chunks
    seconds = max(12 / 16, (moments[-1] - moments[0]) / (last - first))  # of a chunk, on this machine as busy as it is
    # The pace, the chunk that is being made, the one in which the picture changes, as long again on a busy machine.
    most = 2 + 3 * seconds + 1
    # A machine that halts for a while makes no chunks either: then the same holds in chunks of 0.75 s.
    chunks = [later - earlier for earlier, later in zip(sent_chunks, shown_chunks)]
    is_in_time = [delay is not None and (delay < most or count <= 6) for delay, count in zip(delays, chunks)]
    assert all(is_in_time), report["delays"]


def test_a_queued_run_is_shown_in_its_own_workflow_alone_and_a_page_that_comes_back_sees_it(
    report: dict[str, Any],
) -> None:
    result = report["left"]
    assert result["told_in_the_copy"] == "no run yet"
    assert re.search("chunk [1-9]", result["told_when_back"])
    assert result["is_running"]


def test_players_in_subgraphs_go_with_their_workflow(report: dict[str, Any]) -> None:
    assert report["left"]["players"] == 1
