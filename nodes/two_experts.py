"""Two MODELs as one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter import host
from .adapter.expert_models import with_low_noise


class SelfForcingTwoExperts(io.ComfyNode):
    """A MODEL for high noise and one for low noise to one MODEL that our samplers ask in turn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingTwoExperts",
            display_name="Two Experts (Self Forcing)",
            category="SelfForcing",
            search_aliases=["a14b", "high noise low noise", "boundary", "mixture of experts"],
            description="Joins the two models of a Wan 2.2 A14B release: the samplers of this pack ask one of them at "
            "high and the other at low noise, and ComfyUI keeps in memory what fits. Put LoRA and other model nodes "
            "before it, on each model.",
            inputs=[
                io.Model.Input(
                    "high_noise",
                    tooltip="The model for high noise, from Load Model or Patch Model (Self Forcing). How the video is "
                    "sampled is what this one says.",
                ),
                io.Model.Input("low_noise", tooltip="The model for low noise of the same release, of any loader."),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=0.999,
                    step=0.005,
                    tooltip="Share of noise (sigma) from which on the high-noise model is asked: 0.875 or 0.9 for Wan "
                    "2.2. 0 is auto: what the file says, or boundary_step.",
                ),
                io.Int.Input(
                    "boundary_step",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Instead of boundary: how many of the steps (a count) are the high-noise model's, for "
                    "instance 2 of LightX2V's 4. 0 is off.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Both, for the samplers of this pack.")],
        )

    @classmethod
    def execute(cls, high_noise: Any, low_noise: Any, boundary: float, boundary_step: int) -> io.NodeOutput:
        return io.NodeOutput(with_low_noise(high_noise, low_noise, boundary=boundary, boundary_step=boundary_step))
