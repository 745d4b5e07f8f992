"""Latents in, frames out, chunk by chunk, by whatever VAE is connected.

Each stream has the same face. `decode` takes normalised latents [B, T, C, H, W] and returns the frames that they
complete, [B, V, R, H, W] in [0, 1], where the graph keeps tensors; V may be 0, and so may T, to say that the chunk
before was the last. Joined they are those of VAE Decode. `state` and `restore` undo a chunk.

Letters: B batch, T latent frames, C latent channels, V video frames, R RGB, H W height and width.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ...selfforcing_core.codecs.taehv import StreamingDecoder
from ...selfforcing_core.geometry import SPATIAL_FACTOR
from ...selfforcing_core.roofline.meter import Recipe
from . import host
from .autoencoder import TAEHVAutoencoder, check_channels, graph_latents

log = logging.getLogger(__name__)
AT_THE_END = (
    "this VAE cannot decode a stream: the frames come at the end (Load TAEHV, or Wan's own VAE, show them at once)"
)


class FrameStream(Protocol):
    """One video's decoder. patchers: what must be on its device; note: what the user should know."""

    patchers: list[Any]
    note: str

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        """Return the memory that decoding one step of the stream takes at most."""
        ...

    def decode(self, latents_BTCHW: Tensor, *, is_last: bool) -> Tensor:
        """Return the frames that these latents complete, as the file's head says."""
        ...

    def with_decoder(self, recipe: Recipe) -> Recipe:
        """Return the same with this decoder's work in it, where that is known."""
        ...

    def state(self) -> Any:
        """Return what the decoder remembers, for `restore`."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to where `state` was asked: what was decoded since is undone."""
        ...


def frame_stream(vae: Any) -> FrameStream:
    """Return a new stream by a VAE of any loader. Raises ValueError for a VAE of other latents."""
    if isinstance(vae, TAEHVAutoencoder):  # its loader has checked its latents
        return _TAEHVStream(vae)
    check_channels(vae.latent_channels, "VAE")
    group = _group(vae.first_stage_model)
    return _WholeStream(vae) if group is None else _WanStream(vae, *group)


class _TAEHVStream:
    """One latent frame after the other; bit-exact the decode of the whole."""

    note = ""

    def __init__(self, autoencoder: TAEHVAutoencoder) -> None:
        self.autoencoder, self.patchers = autoencoder, [autoencoder.patcher]
        self.decoder = StreamingDecoder(autoencoder.first_stage_model)

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        return self.autoencoder.working_bytes(latent_height, latent_width)

    def decode(self, latents_BTCHW: Tensor, *, is_last: bool) -> Tensor:
        if not latents_BTCHW.shape[1]:
            batch, _, _, height, width = latents_BTCHW.shape
            return host.to_graph(torch.zeros(batch, 0, 3, height * SPATIAL_FACTOR, width * SPATIAL_FACTOR))
        # One by one, so that no more than a latent frame's activations are alive, however long the chunk is.
        return torch.cat([self._decode_one(latent_BCHW) for latent_BCHW in latents_BTCHW.unbind(1)], 1)

    def _decode_one(self, latent_BCHW: Tensor) -> Tensor:
        return host.to_graph(self.decoder.decode(self.autoencoder.own_latents(latent_BCHW[:, None])))

    def with_decoder(self, recipe: Recipe) -> Recipe:
        return replace(recipe, decoder="taehv", taehv=self.autoencoder.first_stage_model.config)

    def state(self) -> Any:
        # A new list of the same tensors: the decoder puts new ones in their places and writes into none.
        return list(self.decoder.memory), self.decoder.is_first

    def restore(self, state: Any) -> None:
        memory, self.decoder.is_first = state
        self.decoder.memory = list(memory)


def _group(network: Any) -> tuple[int, int] | None:
    """Return how many latent frames ComfyUI's Wan VAE decodes together, and its cache's places; None for others.

    ComfyUI decodes the first latent frame alone and then, later versions, two at a time.
    """
    home = sys.modules.get(type(network).__module__)  # another pack may bring a WanVAE of its own
    if type(network).__name__ != "WanVAE" or not hasattr(network, "conv2") or not hasattr(network, "decoder"):
        return None
    # 0.27 and 0.33 have the first function and decode pairs; 0.3.64 has the second and decodes one by one. Both count
    # the causal convolutions, each of which remembers the frames that it needs of the group before.
    for name, group in (("count_cache_layers", 2), ("count_conv3d", 1)):
        if hasattr(home, name):
            return group, getattr(home, name)(network.decoder)
    return None


class _WanStream:
    """ComfyUI's own Wan VAE, driven group by group as its `decode` drives it."""

    note = ""

    def __init__(self, vae: Any, group: int, num_memories: int) -> None:
        self.vae, self.group, self.patchers = vae, group, [vae.patcher]
        self.memory: list[Any] = [None] * num_memories
        self.pending: Tensor | None = None  # latents [B, C, T, H, W] that do not fill a group yet
        self.is_first = True

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        long = 100  # latent frames: ComfyUI's estimate of a video's decode does not grow with its length
        shape = (1, self.vae.latent_channels, long, latent_height, latent_width)
        return self.vae.memory_used_decode(shape, self.vae.vae_dtype)

    def decode(self, latents_BTCHW: Tensor, *, is_last: bool) -> Tensor:
        new = graph_latents(latents_BTCHW).to(self.vae.device, self.vae.vae_dtype)
        pending = new if self.pending is None else torch.cat([self.pending, new], 2)
        frames = []
        while pending.shape[2]:
            count = 1 if self.is_first else self.group  # the first latent frame is one frame of the video, others four
            if pending.shape[2] < count and not is_last:
                break
            frames.append(self._decode_group(pending[:, :, :count]))
            pending, self.is_first = pending[:, :, count:], False
        self.pending = pending
        if frames:
            return rearrange(torch.cat(frames, 2), "b r v h w -> b v r h w")
        batch, _, _, height, width = new.shape
        return host.to_graph(torch.zeros(batch, 0, 3, height * SPATIAL_FACTOR, width * SPATIAL_FACTOR))

    def _decode_group(self, latents_BCTHW: Tensor) -> Tensor:
        network = self.vae.first_stage_model
        with torch.no_grad():
            # feat_idx counts the convolutions of one call, which pick their memory out of the list by it.
            frames_BRVHW = network.decoder(network.conv2(latents_BCTHW), feat_cache=self.memory, feat_idx=[0])
        frames_BRVHW = torch.cat(frames_BRVHW, 2) if isinstance(frames_BRVHW, list) else frames_BRVHW
        # To [0, 1]; ComfyUI's VAE does the same behind its own decode.
        return self.vae.process_output(host.to_graph(frames_BRVHW))

    def with_decoder(self, recipe: Recipe) -> Recipe:
        return replace(recipe, decoder="vae")

    def state(self) -> Any:
        return list(self.memory), self.pending, self.is_first

    def restore(self, state: Any) -> None:
        memory, self.pending, self.is_first = state
        self.memory = list(memory)


class _WholeStream:
    """A VAE that decodes whole videos only."""

    note = AT_THE_END

    def __init__(self, vae: Any) -> None:
        log.warning(AT_THE_END)
        self.vae, self.patchers, self.chunks = vae, [], ()

    def working_bytes(self, latent_height: int, latent_width: int) -> float:
        return 0.0

    def decode(self, latents_BTCHW: Tensor, *, is_last: bool) -> Tensor:
        self.chunks = (*self.chunks, latents_BTCHW)
        if not is_last:
            batch, _, _, height, width = latents_BTCHW.shape
            return host.to_graph(torch.zeros(batch, 0, 3, height * SPATIAL_FACTOR, width * SPATIAL_FACTOR))
        # ComfyUI loads it for that by its own estimate, and decodes in tiles if memory runs out.
        images = self.vae.decode(graph_latents(torch.cat(self.chunks, 1)))
        return rearrange(images, "b v h w r -> b v r h w")

    def with_decoder(self, recipe: Recipe) -> Recipe:
        return recipe

    def state(self) -> Any:
        return self.chunks

    def restore(self, state: Any) -> None:
        self.chunks = state
