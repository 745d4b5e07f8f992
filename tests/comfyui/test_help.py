"""Help that opens beside a node: a page for each, with every input of the node on it."""

from __future__ import annotations

import re
import urllib.request

from tests.comfyui.host_server import PACK_NAME, Server


def page_of(server: Server, node: str) -> str:
    """Return the page as the front end fetches it; HTTPError where there is none."""
    with urllib.request.urlopen(f"http://{server.address}/extensions/{PACK_NAME}/docs/{node}.md", timeout=30) as answer:
        return answer.read().decode()


def test_every_node_has_a_help_page_that_names_every_input(server: Server) -> None:
    nodes = {name: node for name, node in server.get("/object_info").items() if name.startswith("SelfForcing")}
    assert nodes
    for name, node in nodes.items():
        page = page_of(server, name)
        assert page.startswith(f"# {node['display_name']}\n"), name
        inputs = {*node["input"].get("required", {}), *node["input"].get("optional", {})}
        assert inputs <= set(re.findall(r"\*\*(\w+)\*\*", page)), name
        assert "## What goes wrong" in page, name
