"""Latents to frames."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from einops import rearrange

from .adapter import taehv_autoencoder


class SelfForcingTAEHVDecode(io.ComfyNode):
    """LATENT to IMAGE, one latent frame at a time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingTAEHVDecode",
            display_name="Decode TAEHV (Self Forcing)",
            category="SelfForcing",
            description="Decodes video latents frame by frame: memory does not grow with the length of the video, and "
            "it can be stopped at any frame.",
            inputs=[
                io.Latent.Input("samples", tooltip="Video latents, as samplers give and VAE Decode takes them."),
                io.Vae.Input("taehv", tooltip="From the node Load TAEHV (Self Forcing)."),
            ],
            outputs=[io.Image.Output(tooltip="Frames; 4 per latent frame, 1 for the first.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], taehv: Any) -> io.NodeOutput:
        frames_BVHWR = taehv_autoencoder(taehv).decode(samples["samples"])
        return io.NodeOutput(rearrange(frames_BVHWR, "b v h w r -> (b v) h w r"))
