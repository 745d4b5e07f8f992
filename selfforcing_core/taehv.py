"""TAEHV: a tiny causal video autoencoder that maps 4n+1 frames to n+1 latent frames and back.

Architecture and parameter names of github.com/madebyollin/taehv (MIT), so that its released weights load here.
It works on the normalised latents that the diffusion network produces; no mean or std is applied.

One code path serves whole clips and streams: every memory block takes the last frame it saw and returns the next one.

Letters: B batch, T latent frames, C latent channels, H W height and width, V video frames, R RGB.
Inside the network x is [B, frames, channels, height, width], at the rate and in the size that its layer has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from .config import TAEHVConfig

Memory = list[Tensor | None]  # the last frame that each memory block saw; None at the start of a video
BLOCKS_PER_STAGE = 3


class _Clamp(nn.Module):
    """The soft limit that the decoder was trained behind: latents far outside of their distribution stay harmless."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _MemBlock(nn.Module):
    """A residual block that sees the current frame and the one before it."""

    def __init__(self, channels: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            operations.Conv2d(channels * 2, channels, 3, padding=1, **factory),
            nn.ReLU(),
            operations.Conv2d(channels, channels, 3, padding=1, **factory),
            nn.ReLU(),
            operations.Conv2d(channels, channels, 3, padding=1, **factory),
        )

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        if last is None:
            last = torch.zeros_like(x[:, :1])
        past = torch.cat([last, x[:, :-1]], 1)
        both = torch.cat([x, past], 2).flatten(0, 1)
        out = torch.relu(self.conv(both) + x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out, x[:, -1:]


class _TPool(nn.Module):
    """A layer that merges `stride` neighbouring frames into one."""

    def __init__(self, channels: int, stride: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.stride = stride
        self.conv = operations.Conv2d(channels * stride, channels, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return _per_frame(self.conv, rearrange(x, "b (f s) c h w -> b f (s c) h w", s=self.stride))


class _TGrow(nn.Module):
    """A layer that splits one frame into `stride` frames."""

    def __init__(self, channels: int, stride: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.stride = stride
        self.conv = operations.Conv2d(channels, channels * stride, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(_per_frame(self.conv, x), "b f (s c) h w -> b (f s) c h w", s=self.stride)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _run(layers: nn.Sequential, x: Tensor, memory: Memory) -> Tensor:
    """Return what the layers make of x, reading and replacing one remembered frame per memory block."""
    slot = 0
    for layer in layers:
        if isinstance(layer, _MemBlock):
            x, memory[slot] = layer(x, memory[slot])
            slot += 1
        elif isinstance(layer, (_TPool, _TGrow)):
            x = layer(x)
        else:
            x = _per_frame(layer, x)
    return x


def _blank_memory(layers: nn.Sequential) -> Memory:
    return [None] * sum(isinstance(layer, _MemBlock) for layer in layers)


class TAEHV(nn.Module):
    """The encoder and decoder. Build it with a config read from a checkpoint, then `load_state_dict`.

    operations: supplies Conv2d, so that ComfyUI's casting layers take its place.
    """

    def __init__(
        self, config: TAEHVConfig, *, operations: Any = nn, device: torch.device | None = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        pixels = config.image_channels * config.patch_size**2
        width, widths = config.encoder_width, config.decoder_widths

        encoder: list[nn.Module] = [operations.Conv2d(pixels, width, 3, padding=1, **factory), nn.ReLU()]
        for pool in config.encoder_time:
            encoder += [
                _TPool(width, 2 if pool else 1, operations, **factory),
                operations.Conv2d(width, width, 3, padding=1, stride=2, bias=False, **factory),
                *(_MemBlock(width, operations, **factory) for _ in range(BLOCKS_PER_STAGE)),
            ]
        encoder.append(operations.Conv2d(width, config.latent_channels, 3, padding=1, **factory))
        self.encoder = nn.Sequential(*encoder)

        decoder: list[nn.Module] = [
            _Clamp(),
            operations.Conv2d(config.latent_channels, widths[0], 3, padding=1, **factory),
            nn.ReLU(),
        ]
        stages = zip(widths, widths[1:], config.decoder_time, config.decoder_space)
        for width, next_width, grow, upscale in stages:
            decoder += [
                *(_MemBlock(width, operations, **factory) for _ in range(BLOCKS_PER_STAGE)),
                nn.Upsample(scale_factor=2 if upscale else 1),
                _TGrow(width, 2 if grow else 1, operations, **factory),
                operations.Conv2d(width, next_width, 3, padding=1, bias=False, **factory),
            ]
        decoder += [nn.ReLU(), operations.Conv2d(widths[-1], pixels, 3, padding=1, **factory)]
        self.decoder = nn.Sequential(*decoder)

    @property
    def frames_per_latent(self) -> int:
        """Return the frames that the decoder makes of one latent frame."""
        return 2 ** sum(self.config.decoder_time)

    @property
    def frames_to_trim(self) -> int:
        """Return the leading frames of a decode that the first latent frame does not describe."""
        return self.frames_per_latent - 1

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights as usual; of a time-growth kernel larger than ours the last output channels count.

        So a config with fewer frames per latent frame previews with the same file, as in madebyollin/taehv.
        """
        own = self.state_dict()
        patched = {
            key: value[-own[key].shape[0] :]
            if key in own and key.startswith("decoder.") and value.ndim == 4 and value.shape[0] > own[key].shape[0]
            else value
            for key, value in state_dict.items()
        }
        return super().load_state_dict(patched, *args, **kwargs)

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Return the latents [B, ceil(V/4), C, H/8, W/8] of RGB frames in [0, 1], their sides divisible by 8."""
        return self._encode_groups(_padded(frames_BVRHW, self.frames_per_group), _blank_memory(self.encoder))

    @property
    def frames_per_group(self) -> int:
        """Return the frames that the encoder merges into one latent frame."""
        return 2 ** sum(self.config.encoder_time)

    def _encode_groups(self, frames_BVRHW: Tensor, memory: Memory) -> Tensor:
        """Return the latents of whole groups of frames. `memory` carries a stream; it is updated."""
        if self.config.patch_size > 1:
            frames_BVRHW = _per_frame(nn.PixelUnshuffle(self.config.patch_size), frames_BVRHW)
        return _run(self.encoder, frames_BVRHW, memory)

    def decode_untrimmed(self, latents_BTCHW: Tensor, memory: Memory | None = None) -> Tensor:
        """Return frames [B, 4T, R, 8H, 8W], neither clamped nor trimmed. `memory` carries a stream; it is updated."""
        frames = _run(self.decoder, latents_BTCHW, _blank_memory(self.decoder) if memory is None else memory)
        return _per_frame(nn.PixelShuffle(self.config.patch_size), frames) if self.config.patch_size > 1 else frames

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the RGB frames [B, 4(T-1)+1, R, 8H, 8W] in [0, 1] of a whole clip's latents."""
        return StreamingDecoder(self).decode(latents_BTCHW)


def _padded(frames_BVRHW: Tensor, group: int) -> Tensor:
    """Return frames with the last one repeated until they fill whole groups."""
    missing = -frames_BVRHW.shape[1] % group
    return (
        torch.cat([frames_BVRHW, frames_BVRHW[:, -1:].expand(-1, missing, -1, -1, -1)], 1) if missing else frames_BVRHW
    )


class StreamingEncoder:
    """A video encoded piece by piece; the pieces and the rest that `flush` gives, joined, are the whole encode.

    Owns all state of the stream: the memory of each block and the frames that do not fill a group yet.
    """

    def __init__(self, taehv: TAEHV) -> None:
        self.taehv = taehv
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next frame is the first of a video."""
        self.memory = _blank_memory(self.taehv.encoder)
        self.waiting: Tensor | None = None

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Return the latents [B, T, C, H/8, W/8] that the next frames in [0, 1] complete; T may be 0."""
        frames = frames_BVRHW if self.waiting is None else torch.cat([self.waiting, frames_BVRHW], 1)
        whole = frames.shape[1] - frames.shape[1] % self.taehv.frames_per_group
        self.waiting = frames[:, whole:]
        if whole:
            return self.taehv._encode_groups(frames[:, :whole], self.memory)
        batch, _, _, height, width = frames.shape
        return frames.new_zeros(batch, 0, self.taehv.config.latent_channels, height // 8, width // 8)

    def flush(self) -> Tensor:
        """Return the last latent, of frames that fill no group, the last one repeated; then start the stream anew."""
        assert self.waiting is not None, "nothing was encoded"
        rest = self.encode(_padded(self.waiting, self.taehv.frames_per_group)[:, self.waiting.shape[1] :])
        self.reset()
        return rest


class StreamingDecoder:
    """A video decoded piece by piece; the pieces joined are the whole clip's decode.

    Owns all state of the stream: the memory of each block and whether the start-up frames were dropped.
    """

    def __init__(self, taehv: TAEHV) -> None:
        self.taehv = taehv
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next latent is the first of a video."""
        self.memory = _blank_memory(self.taehv.decoder)
        self.is_first = True

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the frames in [0, 1] of the next T latents: 4T frames, 4(T-1)+1 at the start of a video."""
        frames = self.taehv.decode_untrimmed(latents_BTCHW, self.memory)
        if self.is_first:
            frames = frames[:, self.taehv.frames_to_trim :]
            self.is_first = False
        return frames.clamp(0, 1)
