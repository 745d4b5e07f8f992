"""Wan 2.1's video VAE outside ComfyUI: diffusers' network, the original names, and an exact streamed decode.

Its convolutions are causal in time: they see earlier frames and never later ones. So a decoder that keeps the last
frames of every convolution's input continues where it stopped, and a chunk can be shown before the next one exists.

Letters: B batch, T latent frames, C latent channels, H W height and width, V video frames, R RGB.
Frames are in [0, 1]; latents are normalised per channel, as the diffusion network makes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ..geometry import SPATIAL_FACTOR, latent_frames
from ..versions import OPTIONAL, refusal
from ..weights.tensor_files import below_prefix, read_tensors

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

# Patterns of diffusers' names of modules, and the original ones (github.com/Wan-Video/Wan2.1, wan/modules/vae.py).
_ORIGINAL = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
)
# In a residual block the originals are places in a list; what is missing has no weights.
_ORIGINAL_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_FIRST = ("encoder.conv1.weight", "encoder.conv_in.weight")  # one is in every VAE: the original name, diffusers'


# -------------------------------------------------------------------- names --
def original_name(key: str, num_res_blocks: int) -> str:
    """Return the original Wan name of a parameter that diffusers calls `key`."""
    stage = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", key)
    if stage:  # one flat list: per stage its residual blocks, then the layer that enlarges
        inside = int(stage[3]) if stage[2] == "resnets" else num_res_blocks + 1
        key = f"decoder.upsamples.{int(stage[1]) * (num_res_blocks + 2) + inside}.{key[stage.end() :]}"
    for pattern, replacement in _ORIGINAL:
        key = re.sub(pattern, replacement, key)
    block = re.match(r"((?:en|de)coder\.(?:downsamples|upsamples|middle)\.\d+)\.(\w+)\.", key)
    if block and block[2] in _ORIGINAL_RESIDUAL:
        key = f"{block[1]}.{_ORIGINAL_RESIDUAL[block[2]]}.{key[block.end() :]}"
    return key


def _res_blocks(keys: Mapping[str, Any], base: str, mark: str) -> int:
    """Return the residual blocks of an encoder's stage, by the place of the decoder's first enlarging layer."""
    places = [int(match[1]) for key in keys if (match := re.match(rf"{re.escape(base)}\.(\d+)\.{mark}", key))]
    if not places:
        raise ValueError(f"is no Wan 2.1 VAE: it has no {base} with {mark}")
    return min(places) - 1  # a stage of the decoder has one block more than one of the encoder


# ------------------------------------------------------------------ network --
class WanVAE:
    """The encoder and decoder with TAEHV's interface: frames [B, V, R, H, W] and latents [B, T, C, H/8, W/8]."""

    def __init__(self, network: AutoencoderKLWan) -> None:
        self.network = network.eval().requires_grad_(False)
        # Of each latent channel, over Wan's training data (vae.py of the reference); files of original weights lack
        # them.
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(network.config["latents_mean"]).view(shape)
        self.deviation = torch.tensor(network.config["latents_std"]).view(shape)

    @property
    def latent_channels(self) -> int:
        """Return the channels C of the latents."""
        return len(self.mean.flatten())

    @torch.no_grad()
    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Return the normalised mean of the latents [B, T, C, H/8, W/8] of frames in [0, 1].

        Raises ValueError unless V is 4n+1 and the sides are multiples of 8.
        """
        latent_frames(frames_BVRHW.shape[1])  # raises for any other number of frames
        height, width = frames_BVRHW.shape[-2:]
        if height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
            raise ValueError(f"frames of {width}x{height} pixels are not multiples of {SPATIAL_FACTOR}; resize them")
        weight = next(self.network.parameters())
        pixels = rearrange(frames_BVRHW, "b v r h w -> b r v h w").to(weight) * 2 - 1  # the network reads [-1, 1]
        mean = self.network.encode(pixels, return_dict=False)[0].mode().float()  # no sample of the posterior
        latents = (mean - self.mean.to(mean)) / self.deviation.to(mean)
        return rearrange(latents, "b c t h w -> b t c h w")

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the frames [B, 4(T-1)+1, R, H, W] in [0, 1] of a whole video."""
        return StreamingWanDecoder(self).decode(latents_BTCHW)

    def denormalised(self, latents_BTCHW: Tensor) -> Tensor:
        """Return latents as the decoder takes them: not normalised, channels first, on its device in its type."""
        latents = rearrange(latents_BTCHW, "b t c h w -> b c t h w").float()
        scaled = latents * self.deviation.to(latents) + self.mean.to(latents)
        return scaled.to(next(self.network.parameters()))

    def to(self, device: torch.device | str) -> WanVAE:
        """Move the network to a device and return self."""
        self.network.to(device)  # type: ignore[arg-type]
        return self


class StreamingWanDecoder:
    """A decoder of a video that comes piece by piece, by the network's own feature cache; joined, the whole decode."""

    def __init__(self, vae: WanVAE) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next latent is the first of a video."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        modules = self.vae.network.decoder.modules()
        num_convolutions = sum(isinstance(module, WanCausalConv3d) for module in modules)
        # By causal convolution: the last frames of its input. The decoder fills and reads them itself.
        self.features: list[Any] = [None] * num_convolutions
        self.is_first = True

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the frames in [0, 1] of the next T latents: 4T frames, 4(T-1)+1 at the start of a video."""
        return (self.decode_unclamped(latents_BTCHW).float().clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def decode_unclamped(self, latents_BTCHW: Tensor) -> Tensor:
        """Return what `decode` does before it clamps: frames in [-1, 1] and a little beyond."""
        network, frames = self.vae.network, []
        latents = network.post_quant_conv(self.vae.denormalised(latents_BTCHW))
        for latent in latents.split(1, dim=2):  # its cache is made for steps of one latent frame
            # feat_idx is a counter of the convolutions on the way through, which finds each its part of the cache.
            frames.append(network.decoder(latent, feat_cache=self.features, feat_idx=[0], first_chunk=self.is_first))
            self.is_first = False
        return rearrange(torch.cat(frames, 2), "b r v h w -> b v r h w")


# ------------------------------------------------------------------ loading --
def new_network(base_dim: int, num_res_blocks: int) -> AutoencoderKLWan:
    """Return diffusers' Wan 2.1 VAE on the meta device. Raises ValueError where diffusers is missing or too old."""
    if reason := refusal("the Wan VAE needs", {"diffusers": OPTIONAL["diffusers"]}):
        raise ValueError(f"{reason}, or decode with a TAEHV (--decoder taehv)")
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise ValueError(
            f"the Wan VAE needs the package diffusers ({error}); install it, or decode with a TAEHV (--decoder taehv)"
        ) from error
    with torch.device("meta"):
        return AutoencoderKLWan(base_dim=base_dim, num_res_blocks=num_res_blocks)


def load_wan_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> WanVAE:
    """Return the VAE of a file with original names (Wan2.1_VAE.pth, wan_2.1_vae.safetensors) or of diffusers' folder.

    The names may stand below a prefix (`model.`, `first_stage_model.`, `vae.`) or in a trainer's container.
    Raises ValueError, one line that names the file, for whatever is not a Wan 2.1 VAE.
    """
    path = Path(path)
    folder = path / "vae" if (path / "vae").is_dir() else path  # of a whole model of diffusers
    tensors = read_tensors(folder)
    try:
        tensors = below_prefix(tensors, _FIRST, path)
        return WanVAE(vae_from_tensors(tensors, dtype=dtype, device=device))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def vae_from_tensors(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> AutoencoderKLWan:
    """Return the network with these weights, under original or diffusers' names.

    Raises ValueError where weights are missing, unknown or of other shapes.
    """
    is_original = _FIRST[0] in tensors
    first = tensors.get(_FIRST[not is_original])  # the first convolution, whose output is as wide as the network's base
    if first is None or first.ndim != 5:
        raise ValueError("is no Wan VAE; give Wan2.1_VAE.pth, wan_2.1_vae.safetensors or diffusers' vae folder")
    if is_original:
        blocks = _res_blocks(tensors, "decoder.upsamples", "resample")
    else:
        matches = (re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)", key) for key in tensors)
        blocks = max((int(match[1]) for match in matches if match), default=1)
    network = new_network(first.shape[0], blocks)
    expected = network.state_dict()
    names = {key: original_name(key, blocks) if is_original else key for key in expected}
    _check(tensors, {names[key]: tuple(value.shape) for key, value in expected.items()})
    weights = {key: tensors[name].to(device=device, dtype=dtype) for key, name in names.items()}
    network.load_state_dict(weights, assign=True)
    return network


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless names and shapes are the expected ones."""
    odd_names = sorted(set(expected) - set(tensors)) or sorted(set(tensors) - set(expected))
    if odd_names:
        raise ValueError(f"is not a complete Wan VAE: {odd_names[0]} is missing or unknown; Wan 2.2's does not fit")
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        raise ValueError(f"is not a Wan 2.1 VAE: {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}")
