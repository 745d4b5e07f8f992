"""The list of our nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .adapter.live import add_route
from .custom_sampling import SelfForcingFewStepSampler, SelfForcingGuider, SelfForcingSampler, SelfForcingSigmas
from .decode import SelfForcingTAEHVDecode, SelfForcingTAEHVEncode
from .image_to_video import SelfForcingImageToVideo
from .loader import SelfForcingCacheOptions, SelfForcingModelLoader, SelfForcingPatchModel, SelfForcingTAEHVLoader
from .scheduled_prompts import SelfForcingPromptSchedule
from .snapshot_resume import SelfForcingResume, SelfForcingSnapshot
from .stream_sampler import SelfForcingStreamSampler
from .stream_to_file import SelfForcingStreamToFile
from .text_encode import SelfForcingTextEncode
from .two_experts import SelfForcingTwoExperts


class SelfForcingExtension(ComfyExtension):
    """What ComfyUI receives from the pack. Ids are for ever; new nodes are appended."""

    def __init__(self) -> None:
        add_route()  # here, since not every ComfyUI calls on_load

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the classes of the pack's nodes, as ComfyUI asks for them once."""
        return [
            SelfForcingModelLoader,
            SelfForcingTextEncode,
            SelfForcingStreamSampler,
            SelfForcingTAEHVLoader,
            SelfForcingTAEHVDecode,
            SelfForcingPatchModel,
            SelfForcingCacheOptions,
            SelfForcingSampler,
            SelfForcingFewStepSampler,
            SelfForcingSigmas,
            SelfForcingGuider,
            SelfForcingImageToVideo,
            SelfForcingTAEHVEncode,
            SelfForcingSnapshot,
            SelfForcingResume,
            SelfForcingPromptSchedule,
            SelfForcingStreamToFile,
            SelfForcingTwoExperts,
        ]
