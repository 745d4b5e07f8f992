"""Workflows as they open in a real browser: nothing lies over anything, notes are read, search finds the sampler."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfyui.arrange import SCALES
from tests.comfyui.host_server import PACK_NAME, ROOT, Server

pytestmark = pytest.mark.browser

NAMES = [path.stem for path in sorted((ROOT / "workflows").glob("*.json"))]
RENDERERS = ("classic", "vue")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUERIES = ["realtime", "live", "streaming", "endless", "text to video", "wan", "causal", "self forcing"]
READABLE = 4.5  # contrast of text, WCAG 2 level AA


@pytest.fixture(scope="module")
def report(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what was measured of each workflow. Screenshots stay in SELFFORCING_SCREENSHOTS, if that is set."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium found: install the package chromium, or set CHROMIUM")
    if server.checkout.version.startswith("0.3."):
        pytest.skip("this ComfyUI's front end has no Nodes 2.0 and no search aliases")
    Image.new("RGB", (512, 768)).save(server.folder / "input/example.png")  # a portrait: the highest preview
    folder = os.environ.get("SELFFORCING_SCREENSHOTS") or str(tmp_path_factory.mktemp("layout"))
    script = Path(__file__).with_name("layout.py")
    command = [server.checkout.python, script, browser, server.address, PACK_NAME, folder, json.dumps(QUERIES)]
    process = subprocess.run([*map(str, command), *NAMES], capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def overlap(first: list[float], second: list[float]) -> bool:
    """Return whether two boxes (left, top, width, height) share more than a line."""
    return all(
        min(first[axis] + first[axis + 2], second[axis] + second[axis + 2]) - max(first[axis], second[axis]) > 1
        for axis in (0, 1)
    )


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_over_another(report: dict[str, Any], name: str, renderer: str) -> None:
    nodes = report[f"{renderer} dark {name}"]["nodes"]
    assert {node["is_dom"] for node in nodes} == {renderer == "vue"}, "measured in the other renderer"
    over = [
        (first["type"], second["type"])
        for first, second in itertools.combinations(nodes, 2)
        if overlap(first["box"], second["box"])
    ]
    assert not over


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_readable_and_whole_in_a_window_of_1920_by_1080(
    report: dict[str, Any], name: str, renderer: str
) -> None:
    result = report[f"{renderer} dark {name}"]
    assert result["scale"] >= SCALES[0]
    for left, top, width, height in (node["box"] for node in result["nodes"]):
        # What the front end's own bars cover at this size.
        assert (left + result["offset"][0]) * result["scale"] >= 60, "behind the side bar"
        assert (top + result["offset"][1]) * result["scale"] >= 90, "behind the menus"
        assert (left + width + result["offset"][0]) * result["scale"] <= 1920
        assert (top + height + result["offset"][1]) * result["scale"] <= 940, "below the browser's edge"


def test_notes_can_be_read_in_both_renderers_and_themes(report: dict[str, Any]) -> None:
    notes = {key: result["note"] for key, result in report.items() if key != "search"}
    assert len(notes) == len(RENDERERS) * (len(NAMES) + 1)
    for key, note in notes.items():
        assert note["text"], f"{key}: no text found"
        faint = [text for text in note["text"] if text["contrast"] < READABLE]
        assert not faint, key
        assert note["hidden"] <= 1, f"{key}: {note['hidden']} pixels of the note are hidden"


@pytest.mark.parametrize("query", QUERIES)
def test_search_lists_the_sampler_first_of_the_pack(report: dict[str, Any], query: str) -> None:
    """Nodes of ComfyUI with the word in their names, or used often, come before."""
    names = [name for name in report["search"][query] if name.startswith("SelfForcing")]
    assert names[:1] == ["SelfForcingStreamSampler"]
