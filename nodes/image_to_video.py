"""How a video begins: with an image, with frames, or with another video that goes on.

Letters: B batch, T latent frames, C latent channels, H W height and width, V video frames, R RGB.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as memory
import comfy.utils
import torch
from comfy_api.latest import io
from node_helpers import conditioning_set_values
from torch import Tensor

from ..selfforcing_core.geometry import SPATIAL_FACTOR, VideoGeometry, covered_latents, pixel_frames, rounded_length
from .adapter import host, page
from .adapter.autoencoder import WAN_LATENTS, check_channels, check_latent, check_space, graph_latent
from .adapter.chunk_sampler import chunking_behind
from .adapter.model_settings import CAUSAL, settings_of
from .adapter.shared_network import config_of
from .adapter.stream_run import rounded_size

GREY = 0.5  # what image-to-video models of Wan expect where no image is given


class SelfForcingImageToVideo(io.ComfyNode):
    """Picture, frames or LATENT to the start of a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingImageToVideo",
            display_name="Image to Video (Self Forcing)",
            category="SelfForcing",
            search_aliases=["i2v", "first frame", "extend video", "continue video", "as WanImageToVideo", "ARVideoI2V"],
            description="Gives a video its beginning. Text-to-video models take it as their first frames, which fill "
            "the KV cache: one image, several frames, or the latents of a video to continue. Image-to-video models "
            "(14B) take one or more images as condition, as from WanImageToVideo.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Model (Self Forcing) or Patch Model (Self Forcing)."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width in pixels; rounded down to a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height in pixels; rounded down to a multiple of 16.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=100001,
                    step=4,
                    tooltip="Length in video frames of the whole video, what it begins with included. Any number, "
                    "rounded down to whole chunks: behind one image 13, 25, 37, ... 73, 85 for chunks of 3 latent "
                    "frames. The node says what it took.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos that begin alike (a count)."),
                io.Conditioning.Input("negative", optional=True, tooltip="What to avoid, for cfg other than 1."),
                io.Vae.Input("vae", optional=True, tooltip="Wan's VAE or a TAEHV; needed with start_image."),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The first frame, or the first frames; scaled and cropped to width x height.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="A finished video to continue; its size replaces width and height. Instead of start_image.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="From CLIP Vision Encode; image-to-video models follow the image less without it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, with the image if it is one."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, likewise."),
                io.Latent.Output(display_name="latent", tooltip="For the sampler: empty behind what is given."),
            ],
        )

    @classmethod
    def execute(
        cls,
        *,
        model: Any,
        positive: list[Any],
        width: int,
        height: int,
        length: int,
        batch_size: int,
        negative: list[Any] | None = None,
        vae: Any = None,
        start_image: Tensor | None = None,
        latent: dict[str, Any] | None = None,
        clip_vision_output: Any = None,
    ) -> io.NodeOutput:
        # An output without a value would stop the graph; an empty list of prompts does no harm where cfg is 1.
        prompts = (positive, negative if negative is not None else [])
        _check_inputs(model, vae, start_image, latent)
        settings = settings_of(model)
        if config_of(model.model.diffusion_model).model_type == "i2v":
            # Few-step models see all frames at once: their videos have no chunks that a length would have to fit.
            chunk = settings.causal.chunk if settings.kind == CAUSAL else 1
            size = rounded_size(width, height, length, chunk)
            values = _condition(vae, start_image, size, clip_vision_output)
            empty = _zeros(batch_size, size.latent_frames, size.latent_height, size.latent_width)
            prompts = tuple(conditioning_set_values(prompt, values) for prompt in prompts)
            return io.NodeOutput(*prompts, graph_latent(empty, settings.latent_space))
        first_BCTHW = _first_latents(vae, start_image, latent, width, height)
        start = _start_of_video(first_BCTHW, settings.causal, length, batch_size)
        return io.NodeOutput(*prompts, {**start, **graph_latent(start["samples"], settings.latent_space)})


def _check_inputs(model: Any, vae: Any, start_image: Tensor | None, latent: dict[str, Any] | None) -> None:
    """Raise ValueError for inputs that do not go together, before anything is encoded."""
    space = settings_of(model).latent_space
    if start_image is not None and vae is None:
        raise ValueError("start_image needs an encoder; connect vae (Wan's VAE, or Load TAEHV)")
    if start_image is not None and latent is not None:
        raise ValueError("start_image and latent both say how the video begins; connect one of them")
    if start_image is not None:
        check_channels(vae.latent_channels, "VAE")
        check_space(vae, space, "the model reads")
    if latent is not None:
        check_latent(latent, space)


def _first_latents(
    vae: Any, start_image: Tensor | None, latent: dict[str, Any] | None, width: int, height: int
) -> Tensor:
    """Return latents [B, C, T, H, W] that the video begins with, raw as in the graph."""
    if latent is not None:
        if latent["samples"].ndim != 5:
            raise ValueError(f"latent of shape {tuple(latent['samples'].shape)} is no video; connect a video's latents")
        return latent["samples"]
    if start_image is None:
        raise ValueError("a text-to-video model begins with frames; connect start_image (and vae) or latent")
    count = rounded_length(len(start_image), chunk=1)  # 4n + 1: a latent frame holds four, the first one alone
    if count != len(start_image):
        page.show_text(
            f"start_image has {len(start_image)} frames; the first {count} are used: a count of the form 4n+1"
        )
    size = rounded_size(width, height, 1, chunk=1)
    return vae.encode(_fitted(start_image[:count], size.width, size.height))


def _start_of_video(first_BCTHW: Tensor, causal: Any, length: int, batch_size: int) -> dict[str, Any]:
    """Return a LATENT whose first frames are known and whose others are to be made, told apart by its noise mask."""
    count, (latent_height, latent_width) = first_BCTHW.shape[2], first_BCTHW.shape[-2:]
    chunks = chunking_behind(count, causal)
    size = rounded_size(
        latent_width * SPATIAL_FACTOR,
        latent_height * SPATIAL_FACTOR,
        length,
        chunks.chunk,
        chunks.independent_first_frame,
    )
    ends = [start for start in size.chunk_starts if start]
    if count not in ends:
        names = ", ".join(str(pixel_frames(end)) for end in ends) or "none; make the video longer"
        raise ValueError(
            f"{pixel_frames(count)} given frames do not end where a chunk of {chunks.chunk} latent frames ends; a "
            f"video of {size.frames} frames can begin with {names}, or with 1"
        )
    samples = _zeros(batch_size, size.latent_frames, latent_height, latent_width)
    samples[:, :, :count] = first_BCTHW.to(samples)
    # As ComfyUI has it for pictures: 1 is to be made, 0 is known.
    mask = torch.ones_like(samples[:, :1])
    mask[:, :, :count] = 0
    return {"samples": samples, "noise_mask": mask}


def _condition(vae: Any, start_image: Tensor | None, size: VideoGeometry, clip_vision_output: Any) -> dict[str, Any]:
    """Return what image-to-video models of Wan read: latents of images, then grey; what is known; CLIP's features."""
    if start_image is None:
        raise ValueError(
            "this is an image-to-video model; connect start_image, vae and (Wan 2.1) clip_vision_output (the images "
            "that it continues come as condition, so latent does not fit)"
        )
    # As WanImageToVideo builds it: the VAE encodes the given frames and grey ones behind them as one video, and
    # the mask says which latent frames are the user's. ComfyUI inverts it and lays it beside the latents.
    frames_VHWR = torch.full((size.frames, size.height, size.width, 3), GREY)
    count = min(len(start_image), size.frames)
    frames_VHWR[:count] = _fitted(start_image[:count], size.width, size.height).to(frames_VHWR)
    mask = torch.ones(1, 1, size.latent_frames, size.latent_height, size.latent_width)
    mask[:, :, : covered_latents(count)] = 0
    # Names of options beside the embeddings, which ComfyUI's Wan turns into condition channels.
    values = {"concat_latent_image": vae.encode(frames_VHWR), "concat_mask": mask}
    return values if clip_vision_output is None else {**values, "clip_vision_output": clip_vision_output}


def _fitted(image_VHWR: Tensor, width: int, height: int) -> Tensor:
    frames = comfy.utils.common_upscale(image_VHWR[..., :3].movedim(-1, 1), width, height, "bilinear", "center")
    return frames.movedim(1, -1)


def _zeros(batch: int, frames: int, latent_height: int, latent_width: int) -> Tensor:
    shape = (batch, WAN_LATENTS.latent_channels, frames, latent_height, latent_width)
    return torch.zeros(shape, device=memory.intermediate_device())
