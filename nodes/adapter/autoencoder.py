"""TAEHV as a VAE of ComfyUI, and the two latent conventions.

Letters: B batch, T latent frames, C latent channels, V video frames, R RGB, H W height and width.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management as memory
import comfy.ops
import torch
from einops import rearrange
from torch import Tensor

from ...selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder
from ...selfforcing_core.geometry import SPATIAL_FACTOR
from ...selfforcing_core.weights.checkpoint import Checkpoint
from ...selfforcing_core.weights.latent_space import WAN, WAN_UNSCALED
from . import folders, host

WAN_LATENTS = comfy.latent_formats.Wan21()
SPACE = "selfforcing_space"  # entry of a LATENT, and attribute of its tensor: the latent space, where it is known


# ---------------------------------------------------------------- latents --
#
# A LATENT in the graph is in the raw space of Wan's VAE. The network and every TAEHV, the bundled one included, speak
# normalised latents. These two functions are the only crossing, so ComfyUI's VAE Decode and VAE Encode work with our
# VAE as they are. ComfyUI's own Load VAE does not: it takes a float16 TAEHV for HunyuanVideo's and scales it so.


def network_latents(samples_BCTHW: Tensor) -> Tensor:
    """Return a LATENT of the graph (raw VAE space) as network and TAEHV speak: normalised, [B, T, C, H, W].

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
    """Return latents in raw VAE space [B, C, T, H, W]; the inverse of `network_latents`."""
    # times deviation, plus mean, of each of the 16 channels
    return WAN_LATENTS.process_out(rearrange(latents_BTCHW, "b t c h w -> b c t h w"))


def graph_clips(frames_BVRHW: Tensor) -> list[Tensor]:
    """Return frames in [0, 1] as one IMAGE [V, H, W, R] for each video of a batch: what follows runs for each."""
    return list(rearrange(frames_BVRHW, "b v r h w -> b v h w r"))


def check_channels(channels: int, part: str) -> None:
    """Raise ValueError for a model or VAE of other latents than Wan 2.1's, as the number of their channels tells."""
    if channels != WAN_LATENTS.latent_channels:
        raise ValueError(
            f"this {part} is made for latents of {channels} channels, but Wan 2.1's have "
            f"{WAN_LATENTS.latent_channels}; choose a {part} for Wan 2.1"
        )


# ----------------------------------------------------------- latent spaces --
#
# A LATENT says of itself in two places which space it is of: an entry, which lasts while nodes copy the dictionary, and
# an attribute of the tensor, which reaches nodes that get nothing else (VAE Decode) through samplers of ComfyUI. Where
# neither is left the space is unknown, and nothing is refused.


def marked(samples: Tensor, space: str | None) -> Tensor:
    """Write the latent space on a LATENT's tensor, where it is known; the same tensor."""
    if space is not None:
        setattr(samples, SPACE, space)  # lost by any operation on the tensor, so that it never outlives its truth
    return samples


def graph_latent(samples: Tensor, space: str | None) -> dict[str, Any]:
    """Return a LATENT that says which space it is of, where that is known."""
    return {"samples": marked(samples, space), **({} if space is None else {SPACE: space})}


def space_of(latent: dict[str, Any] | Tensor) -> str | None:
    """Return the latent space of a LATENT or of its tensor; None where nobody knows."""
    if isinstance(latent, dict):
        return latent.get(SPACE) or space_of(latent["samples"])
    return getattr(latent, SPACE, None)


def space_of_vae(vae: Any) -> str | None:
    """Return the latent space of a VAE of any loader; None for one that is not known here."""
    if isinstance(vae, TAEHVAutoencoder):
        return vae.latent_space
    network = getattr(vae, "first_stage_model", None)
    # 16 channels are also those of HunyuanVideo, Flux and Cosmos: shapes alone do not tell them apart.
    home, kind = type(network).__module__, type(network).__name__
    if getattr(vae, "latent_channels", None) != WAN_LATENTS.latent_channels:
        return None  # whatever it is, `check_channels` refuses it
    if home.startswith("comfy.ldm.wan."):
        return WAN
    if home.startswith("comfy.ldm."):
        return f"another model ({kind})"
    if getattr(network, "latent_format", None) is comfy.latent_formats.HunyuanVideo:  # a TAEHV of ComfyUI
        return "hunyuanvideo, for which Load VAE takes every TAEHV in float16"
    return None


def check_space(vae: Any, space: str | None, whose: str) -> None:
    """Raise ValueError where a VAE is known to be of another latent space than `space`.

    whose: whose latents they are, with its verb, as in "the model makes".
    """
    own_space = space_of_vae(vae)
    if own_space is None or space is None or own_space == space:
        return
    name = getattr(vae, "name", "")
    raise ValueError(
        f"this VAE{f' ({name})' * bool(name)} is made for latents of {own_space}, but {whose} those of {space}: the "
        f"frames would be wrong; {_own_vae(space)}"
    )


def check_latent(latent: dict[str, Any], space: str | None) -> None:
    """Raise ValueError where a LATENT is known to be of another space than the MODEL that is to go on from it."""
    own_space = space_of(latent)
    if None not in (own_space, space) and own_space != space:
        raise ValueError(
            f"these latents are of {own_space}, but the model makes those of {space}; encode the video's frames with "
            f"the model's own VAE: {_own_vae(str(space))}"
        )


def _own_vae(space: str) -> str:
    if space == WAN:
        return "choose a file such as taew2_1 in Load TAEHV (Self Forcing), or connect Load VAE with Wan's own VAE"
    return f"choose the TAEHV of '{space}' in Load TAEHV (Self Forcing), for instance '{space}{folders.BUNDLE_MARK}'"


# -------------------------------------------------------------------- VAE --
class TAEHVAutoencoder:
    """TAEHV with the methods of a ComfyUI VAE, so that it fits wherever a graph asks for one.

    Takes and returns the graph's conventions: LATENT in raw VAE space, IMAGE [.., H, W, R] in [0, 1].
    name: as the user knows the file. latent_space: what it decodes, None where that is not known; WAN_UNSCALED is WAN's
    without the scaling by mean and deviation, which is done here.
    """

    # What ComfyUI's nodes ask of a VAE: the axes of its latents (time, height, width), and that it is one for videos.
    latent_dim = 3
    output_channels = 3
    not_video = False

    def __init__(self, checkpoint: Checkpoint, *, name: str = "", latent_space: str | None = None) -> None:
        check_channels(checkpoint.config.latent_channels, "TAEHV")
        self.name, self.is_scaled = name, latent_space != WAN_UNSCALED
        self.latent_space = latent_space if self.is_scaled else WAN
        self.device = memory.vae_device()
        self.vae_dtype = memory.vae_dtype(self.device, [torch.float16, torch.bfloat16, torch.float32])
        operations = comfy.ops.manual_cast  # layers that cast their weights to their input's type as they are called
        self.first_stage_model = TAEHV(checkpoint.config, operations=operations, dtype=self.vae_dtype)
        self.first_stage_model.load_state_dict(checkpoint.state_dict)
        self.first_stage_model.fold(operations).eval().requires_grad_(False)
        # by the names of the file, for nodes that save a VAE: a folded network has none for the layers that it joined
        self.file_weights = {
            name: tensor.to(self.vae_dtype, copy=True) for name, tensor in checkpoint.state_dict.items()
        }
        self.latent_channels = checkpoint.config.latent_channels
        self.patcher = host.patcher_of(self.first_stage_model, self.device, memory.vae_offload_device(), dynamic=False)

    def own_latents(self, latents_BTCHW: Tensor) -> Tensor:
        """Return normalised latents as this file's weights expect them, where and in what type it computes."""
        own = latents_BTCHW if self.is_scaled else rearrange(graph_latents(latents_BTCHW), "b c t h w -> b t c h w")
        return own.to(self.device, self.vae_dtype)

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        """Return the memory that coding one frame takes at most: the frame at full size in a few copies."""
        widest = max(self.first_stage_model.config.decoder_widths)
        # 8 by 8 pixels for each place of a latent, in the decoder's widest feature map.
        return 3.0 * 64 * latent_height * latent_width * widest * self.vae_dtype.itemsize

    def decode(self, samples_BCTHW: Tensor, **_: Any) -> Tensor:
        """Decode LATENT samples to frames [B, V, H, W, R]; check for interruption before every latent frame."""
        check_space(self, space_of(samples_BCTHW), "these are")
        latents_BTCHW = network_latents(samples_BCTHW)
        host.load([self.patcher], working_bytes=self.working_bytes(*samples_BCTHW.shape[-2:]))
        decoder = StreamingDecoder(self.first_stage_model)
        progress = host.ProgressBar(latents_BTCHW.shape[1])
        frames = []
        for latent_BCHW in latents_BTCHW.unbind(1):
            host.check_interrupted()
            progress.step()
            frames.append(host.to_graph(decoder.decode(self.own_latents(latent_BCHW[:, None]))))
        progress.finish()
        return rearrange(torch.cat(frames, 1), "b v r h w -> b v h w r")

    def decode_tiled(self, samples: Tensor, **_: Any) -> Tensor:
        """Decode as `decode` does, whose memory does not grow with the video's length."""
        return self.decode(samples)

    def encode(self, pixels_VHWR: Tensor) -> Tensor:
        """Encode IMAGE frames [V, H, W, R] of one video (or [B, V, H, W, R]) to LATENT samples."""
        # VAE Encode gives the frames of one video as a batch of pictures.
        frames = pixels_VHWR[None] if pixels_VHWR.ndim == 4 else pixels_VHWR
        size = (side // SPATIAL_FACTOR for side in frames.shape[2:4])
        group = self.first_stage_model.frames_per_group  # as many are encoded at once, however long the video is
        host.load([self.patcher], working_bytes=group * self.working_bytes(*size))
        # Pictures may have a fourth channel, for transparency.
        frames_BVRHW = rearrange(frames[..., :3], "b v h w r -> b v r h w").to(self.device, self.vae_dtype)
        encoded_BTCHW = self.first_stage_model.encode(frames_BVRHW)
        raw = graph_latents(encoded_BTCHW) if self.is_scaled else rearrange(encoded_BTCHW, "b t c h w -> b c t h w")
        return marked(host.to_graph(raw), self.latent_space)

    def encode_tiled(self, pixels: Tensor, **_: Any) -> Tensor:
        """Encode as `encode` does; ComfyUI asks for tiles where memory is short."""
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        """Return the pixels of a latent's side; under the name that ComfyUI asks by."""
        return SPATIAL_FACTOR

    def spacial_compression_encode(self) -> int:
        """Return the pixels of a latent's side; under the name that ComfyUI asks by."""
        return SPATIAL_FACTOR

    def temporal_compression_decode(self) -> int:
        """Return the video frames of a latent frame."""
        return self.first_stage_model.frames_per_latent

    def get_sd(self) -> dict[str, Tensor]:
        """Return the weights, for nodes that save a VAE."""
        return dict(self.file_weights)


def taehv_autoencoder(vae: Any) -> TAEHVAutoencoder:
    """Return our autoencoder inside a VAE. Raises ValueError for a VAE of another loader."""
    if isinstance(vae, TAEHVAutoencoder):
        return vae
    raise ValueError(
        f"this VAE ({type(getattr(vae, 'first_stage_model', vae)).__name__}) cannot decode a stream; "
        "use the node Load TAEHV (Self Forcing), or leave the input open and decode with VAE Decode"
    )
