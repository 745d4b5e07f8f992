"""The page that queued the running graph: lines on its nodes, events to it, and the metadata of what it saves."""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import dataclass
from typing import Any

from comfy.cli_args import args as cli_args
from comfy_execution.utils import get_executing_context

log = logging.getLogger(__name__)


def server() -> Any:
    """Return ComfyUI's web server; None where ComfyUI runs without one."""
    # Importing it would start one: whoever runs ComfyUI's code without a server has not imported it.
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def show_text(text: str) -> None:
    """Show a line on the node that runs now, below those it shows already, and in the log."""
    log.warning("%s", text)  # for scripts, which see no nodes, and for versions that cannot show text
    context, page = get_executing_context(), server()
    if context is None or not hasattr(page, "send_progress_text"):
        return
    lines = _lines_on(context.prompt_id, context.node_id)
    if text not in lines:
        lines.append(text)
    page.send_progress_text(".\n".join(lines), context.node_id, getattr(page, "client_id", None))  # type: ignore[union-attr]


@functools.lru_cache(maxsize=1)
def _lines_on(prompt: str, node: str) -> list[str]:
    """Return what the node that ran last shows: ComfyUI keeps one text for each node."""
    return []  # the cache hands out the same list until another node, or another prompt, asks


def is_read(hidden: Any, output: int) -> bool:
    """Return whether another node of the graph takes this output of the running node; False where nobody knows."""
    context, prompt = get_executing_context(), getattr(hidden, "prompt", None)
    if context is None or not isinstance(prompt, dict) or context.node_id not in prompt:
        return False
    # In the graph as it is queued a link is a list of a node's id and the number of its output.
    return any([context.node_id, output] in node.get("inputs", {}).values() for node in prompt.values())


@dataclass(frozen=True)
class Audience:
    """Whose page queued the running graph, its prompt, and the node that runs."""

    client: str  # id of the page
    prompt: str  # id that ComfyUI gave the queued graph
    node: str  # id of the node in it


def audience() -> Audience | None:
    """Return the audience of the node that runs now; None where no page queued it."""
    context, client = get_executing_context(), getattr(server(), "client_id", None)  # client: of the running prompt
    return Audience(client, context.prompt_id, context.node_id) if client and context is not None else None


def is_listening(client: str) -> bool:
    """Return whether a page of this client is connected."""
    return client in getattr(server(), "sockets", {})


def send(event: str, data: dict[str, Any], client: str) -> None:
    """Send an event to the pages of this client alone; any thread may."""
    # Without a client ComfyUI would send it to every open page. It only puts it into the server's queue.
    server().send_sync(event, data, client)


def graph_metadata(hidden: Any) -> dict[str, Any]:
    """Return prompt and workflow as ComfyUI embeds them into what it saves; none where the user switched that off."""
    if cli_args.disable_metadata or hidden is None:
        return {}
    metadata = dict(hidden.extra_pnginfo or {})
    return {**metadata, **({"prompt": hidden.prompt} if hidden.prompt is not None else {})}


def add_metadata(hidden: Any, **entries: str) -> None:
    """Let the nodes that save what comes of this prompt write more entries beside the workflow."""
    metadata = getattr(hidden, "extra_pnginfo", None)
    if isinstance(metadata, dict):  # one for all nodes of the prompt: SaveVideo, which runs later, writes it out
        metadata.update(entries)
