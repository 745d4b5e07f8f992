"""Self Forcing for ComfyUI: causal few-step video that streams. ComfyUI imports this file; it does nothing heavy.

The library is in selfforcing_core/ and does not need ComfyUI; the nodes are in nodes/.
"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

# No NODE_CLASS_MAPPINGS beside the entry point: ComfyUI would look at those alone. And the folder is not named again in
# pyproject.toml ([tool.comfy] web), or every script would be loaded twice.
WEB_DIRECTORY = "web"  # the live player and the nodes' help pages


async def comfy_entrypoint() -> Any:
    """Give ComfyUI our nodes. Nothing is imported before it asks.

    Raises ImportError, one sentence, if a package is too old: ComfyUI logs it, lists the pack as failed and goes on.
    """
    from .selfforcing_core.versions import NODES, refusal

    if reason := refusal("the nodes of Self Forcing need (in ComfyUI's Python)", NODES):
        raise ImportError(reason)
    try:
        from .nodes.extension import SelfForcingExtension

        return SelfForcingExtension()
    except Exception:
        # ComfyUI logs one line and drops the traceback, which is what a bug report needs.
        logging.getLogger(__name__).exception("Self Forcing nodes could not be loaded")
        raise
