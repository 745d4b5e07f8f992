"""Latents to frames, and frames to latents."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter import host
from .adapter.autoencoder import check_space, graph_latent, space_of, taehv_autoencoder


class SelfForcingTAEHVDecode(io.ComfyNode):
    """LATENT to IMAGE, one latent frame at a time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingTAEHVDecode",
            display_name="Decode TAEHV (Self Forcing)",
            category="SelfForcing",
            search_aliases=["taehv", "taew2_1", "tiny vae", "fast decode"],
            description="Decodes video latents frame by frame: memory does not grow with the length of the video, and "
            "it can be stopped at any frame.",
            inputs=[
                io.Latent.Input("samples", tooltip="Video latents, as samplers give and VAE Decode takes them."),
                io.Vae.Input("taehv", tooltip="From the node Load TAEHV (Self Forcing)."),
            ],
            outputs=[
                io.Image.Output(
                    is_output_list=True,
                    tooltip="Frames; 4 per latent frame, 1 for the first. One clip for each row of a batch.",
                )
            ],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], taehv: Any) -> io.NodeOutput:
        autoencoder = taehv_autoencoder(taehv)
        check_space(autoencoder, space_of(samples), "these are")
        # A list of clips: IMAGE has no axis for videos, and joined, those of a batch would play one after the other.
        return io.NodeOutput(list(autoencoder.decode(samples["samples"])))


class SelfForcingTAEHVEncode(io.ComfyNode):
    """IMAGE to LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingTAEHVEncode",
            display_name="Encode TAEHV (Self Forcing)",
            category="SelfForcing",
            search_aliases=["taehv", "taew2_1", "tiny vae", "fast encode"],
            description="Encodes the frames of a video with the tiny autoencoder, for instance to continue it.",
            inputs=[
                io.Image.Input("pixels", tooltip="Frames of one video: 4n+1 of them, sides in multiples of 8 pixels."),
                io.Vae.Input("taehv", tooltip="From the node Load TAEHV (Self Forcing)."),
            ],
            outputs=[io.Latent.Output(tooltip="Video latents; one per 4 frames, and one for the first.")],
        )

    @classmethod
    def execute(cls, pixels: Any, taehv: Any) -> io.NodeOutput:
        autoencoder = taehv_autoencoder(taehv)
        # The LATENT says whose it is, so that a model of another space refuses to go on from it.
        return io.NodeOutput(graph_latent(autoencoder.encode(pixels), autoencoder.latent_space))
