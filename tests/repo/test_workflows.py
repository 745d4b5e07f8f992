"""The workflows that users drag into ComfyUI hold together, and each agrees with its twin for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TITLE = 30  # pixels above a node's place, where ComfyUI draws its title


def ids(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture(params=WORKFLOWS, ids=ids(WORKFLOWS))
def graph(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_there_is_a_workflow_and_each_has_a_twin_for_scripts() -> None:
    assert WORKFLOWS
    assert ids(WORKFLOWS) == ids(sorted((ROOT / "workflows" / "api").glob("*.json")))


def test_every_workflow_has_a_picture() -> None:
    assert ids(sorted((ROOT / "workflows").glob("*.jpg"))) == ids(WORKFLOWS)


def test_the_note_comes_first_and_every_other_node_stands_in_one_titled_group(graph: dict[str, Any]) -> None:
    note, *nodes = graph["nodes"]
    assert note["type"] == "MarkdownNote"
    assert note["pos"][0] == min(node["pos"][0] for node in graph["nodes"])
    assert all(group["title"] for group in graph["groups"])
    for node in nodes:
        (left, top), (width, height) = node["pos"], node["size"]
        inside = [
            group
            for group in graph["groups"]
            if _is_inside([left, top - TITLE, width, height + TITLE], group["bounding"])
        ]
        assert len(inside) == 1, node["type"]


def _is_inside(box: list[float], frame: list[float]) -> bool:
    return all(
        frame[axis] <= box[axis] and box[axis] + box[axis + 2] <= frame[axis] + frame[axis + 2] for axis in (0, 1)
    )


def test_links_agree_with_the_slots_at_both_ends(graph: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, slot, target, target_slot, kind in graph["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][target_slot]
        assert link in output["links"]
        assert entry["link"] == link
        assert kind == output["type"] == entry["type"]


def test_slots_mention_no_link_that_does_not_exist(graph: dict[str, Any]) -> None:
    inputs = [entry["link"] for node in graph["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    outputs = [link for node in graph["nodes"] for entry in node["outputs"] for link in entry["links"] or []]
    assert sorted(inputs) == sorted(outputs) == sorted(link[0] for link in graph["links"])


def test_counters_leave_room_for_new_nodes_and_links(graph: dict[str, Any]) -> None:
    assert graph["last_node_id"] >= max(node["id"] for node in graph["nodes"])
    assert graph["last_link_id"] >= max(link[0] for link in graph["links"])
    assert len({node["id"] for node in graph["nodes"]}) == len(graph["nodes"])
