"""A node pack for the tests alone: a node that keeps the queue waiting, without work, until it is interrupted."""

import time
from typing import Any

from comfy.model_management import throw_exception_if_processing_interrupted


# Of the older kind, which every version of ComfyUI takes without a package of its own.
class WaitForInterrupt:
    RETURN_TYPES = ()
    FUNCTION = "wait"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": ""})}}

    def wait(self, name: str) -> None:
        while True:
            # ComfyUI's queue runs one prompt at a time: whatever comes after this one is looked at, and waits.
            throw_exception_if_processing_interrupted()
            time.sleep(0.05)


NODE_CLASS_MAPPINGS = {"WaitForInterrupt": WaitForInterrupt}
