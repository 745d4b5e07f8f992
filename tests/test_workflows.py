"""The workflows that users drag into ComfyUI hold together, and each agrees with its twin for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def ids(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture(params=WORKFLOWS, ids=ids(WORKFLOWS))
def graph(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_there_is_a_workflow_and_each_has_a_twin_for_scripts() -> None:
    assert WORKFLOWS
    assert ids(WORKFLOWS) == ids(sorted((ROOT / "workflows" / "api").glob("*.json")))


def test_what_the_tiny_model_can_show_has_a_picture() -> None:
    pictures = ids(sorted((ROOT / "workflows").glob("*.jpg")))
    assert pictures == [name for name in ids(WORKFLOWS) if "14b" not in name]


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
