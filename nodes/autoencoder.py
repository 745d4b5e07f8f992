"""TAEHV as a VAE of the host, and the two latent conventions.

Letters: B batch, T latent frames, C channels, V video frames, R RGB, H W size.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management as memory
import comfy.ops
import torch
from einops import rearrange
from torch import Tensor

from ..selfforcing_core.checkpoint import Checkpoint
from ..selfforcing_core.geometry import SPATIAL_FACTOR
from ..selfforcing_core.taehv import TAEHV, StreamingDecoder
from . import host

WAN_LATENTS = comfy.latent_formats.Wan21()


# ---------------------------------------------------------------- latents --
#
# A LATENT in the graph is in the raw space of Wan's VAE. The network and every TAEHV, the bundled one included, speak
# normalised latents. These two functions are the only crossing, so the host's VAE Decode and VAE Encode work with our
# VAE as they are. The host's own Load VAE does not: it takes a float16 TAEHV for HunyuanVideo's and scales it so.


def network_latents(samples_BCTHW: Tensor) -> Tensor:
    """LATENT of the graph (raw VAE space) to what network and TAEHV speak: normalised, [B, T, C, H, W].

    Raises ValueError for latents that are not of a Wan 2.1 video.
    """
    shape = tuple(samples_BCTHW.shape)
    if len(shape) != 5 or shape[1] != WAN_LATENTS.latent_channels:
        raise ValueError(
            f"latents of shape {shape} are not a Wan 2.1 video's [batch, {WAN_LATENTS.latent_channels}, frames, "
            "height, width]; take them from a sampler of a Wan 2.1 model"
        )
    return rearrange(WAN_LATENTS.process_in(samples_BCTHW), "b c t h w -> b t c h w")


def graph_latents(latents_BTCHW: Tensor) -> Tensor:
    """Inverse of `network_latents`: raw VAE space [B, C, T, H, W]."""
    return WAN_LATENTS.process_out(rearrange(latents_BTCHW, "b t c h w -> b c t h w"))


def graph_clips(frames_BVRHW: Tensor) -> list[Tensor]:
    """Frames in [0, 1] to one IMAGE [V, H, W, R] for each video of a batch: what follows runs once for each."""
    return list(rearrange(frames_BVRHW, "b v r h w -> b v h w r"))


def check_channels(channels: int, what: str) -> None:
    if channels != WAN_LATENTS.latent_channels:
        raise ValueError(
            f"this {what} is made for latents of {channels} channels, but Wan 2.1's have "
            f"{WAN_LATENTS.latent_channels}; choose a {what} for Wan 2.1"
        )


# -------------------------------------------------------------------- VAE --
class TAEHVAutoencoder:
    """TAEHV with the methods of a ComfyUI VAE, so that it fits wherever a graph asks for one.

    Takes and returns the graph's conventions: LATENT in raw VAE space, IMAGE [.., H, W, R] in [0, 1].
    """

    latent_dim = 3
    output_channels = 3
    not_video = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        check_channels(checkpoint.config.latent_channels, "TAEHV")
        self.device = memory.vae_device()
        self.vae_dtype = memory.vae_dtype(self.device, [torch.float16, torch.bfloat16, torch.float32])
        operations = comfy.ops.manual_cast
        self.first_stage_model = TAEHV(checkpoint.config, operations=operations, dtype=self.vae_dtype)
        self.first_stage_model.load_state_dict(checkpoint.state_dict)
        self.first_stage_model.eval().requires_grad_(False)
        self.latent_channels = checkpoint.config.latent_channels
        self.patcher = host.patcher_of(self.first_stage_model, self.device, memory.vae_offload_device(), dynamic=False)

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        """Memory that decoding one latent frame takes at most: its frames at full size in a few copies."""
        widest = max(self.first_stage_model.config.decoder_widths)
        pixels = 64 * latent_height * latent_width * self.first_stage_model.frames_per_latent
        return 3.0 * pixels * widest * self.vae_dtype.itemsize

    def decode(self, samples_BCTHW: Tensor, **_: Any) -> Tensor:
        """LATENT samples to frames [B, V, H, W, R]; checks for interruption before every latent frame."""
        latents_BTCHW = network_latents(samples_BCTHW)
        host.load([self.patcher], working_bytes=self.working_bytes(*samples_BCTHW.shape[-2:]))
        decoder = StreamingDecoder(self.first_stage_model)
        progress = host.Progress(latents_BTCHW.shape[1])
        frames = []
        for latent_BCHW in latents_BTCHW.unbind(1):
            host.check_interrupted()
            progress.step()
            frames.append(host.to_graph(decoder.decode(latent_BCHW[:, None].to(self.device, self.vae_dtype))))
        progress.finish()
        return rearrange(torch.cat(frames, 1), "b v r h w -> b v h w r")

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        """As `decode`, whose memory does not grow with the video's length."""
        return self.decode(samples)

    def encode(self, pixels_VHWR: Tensor) -> Tensor:
        """IMAGE frames [V, H, W, R] of one video (or [B, V, H, W, R]) to LATENT samples."""
        frames = pixels_VHWR[None] if pixels_VHWR.ndim == 4 else pixels_VHWR
        host.load(
            [self.patcher],
            working_bytes=frames.shape[1] * self.working_bytes(*(side // SPATIAL_FACTOR for side in frames.shape[2:4])),
        )
        frames_BVRHW = rearrange(frames[..., :3], "b v h w r -> b v r h w").to(self.device, self.vae_dtype)
        return host.to_graph(graph_latents(self.first_stage_model.encode(frames_BVRHW)))

    def encode_tiled(self, pixels: Tensor, **_: Any) -> Tensor:
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        return SPATIAL_FACTOR

    def spacial_compression_encode(self) -> int:
        return SPATIAL_FACTOR

    def temporal_compression_decode(self) -> int:
        return self.first_stage_model.frames_per_latent

    def get_sd(self) -> dict[str, Tensor]:
        return self.first_stage_model.state_dict()


def taehv_autoencoder(vae: Any) -> TAEHVAutoencoder:
    """Our autoencoder inside a VAE. Raises ValueError for a VAE of another loader."""
    if isinstance(vae, TAEHVAutoencoder):
        return vae
    raise ValueError(
        f"this VAE ({type(getattr(vae, 'first_stage_model', vae)).__name__}) cannot decode a stream; "
        "use the node Load TAEHV (Self Forcing), or leave the input open and decode with VAE Decode"
    )
