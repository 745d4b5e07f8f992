"""The list of our nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .decode import SelfForcingTAEHVDecode
from .loader import SelfForcingModelLoader, SelfForcingTAEHVLoader
from .sampler import SelfForcingStreamSampler
from .text import SelfForcingTextEncode


class SelfForcingExtension(ComfyExtension):
    """What ComfyUI receives from the pack. Ids are for ever; new nodes are appended."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SelfForcingModelLoader,
            SelfForcingTextEncode,
            SelfForcingStreamSampler,
            SelfForcingTAEHVLoader,
            SelfForcingTAEHVDecode,
        ]
