"""TAEHV: a tiny causal video autoencoder that maps 4n+1 frames to n+1 latent frames and back.

Architecture and parameter names are those of github.com/madebyollin/taehv (MIT), so that its released weights load
here. It is distilled from the large VAE of a video model and takes its place where speed counts. It works on the
normalised latents that the diffusion network produces; no mean or deviation is applied.

One code path serves whole clips and streams: every memory block takes the last frame of what came before and leaves its
own. The decoder finishes one frame before it begins the next, so that no more than one is alive at full size.

Letters: B batch, T latent frames, C latent channels, H W height and width, V video frames, R RGB.
Inside the network x is one frame [B, channels, height, width] in the decoder, and in the encoder
[B, frames, channels, height, width], at the rate and in the size that its layer has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from ..config import TAEHVConfig
from ..shapes import MEMORY_BLOCKS

Memory = list[Tensor | None]  # by memory block: the last frame that it read, None at the start of a video


class _Clamp(nn.Module):
    """The soft limit that the decoder was trained behind: latents far outside of their distribution stay harmless."""

    def forward(self, x: Tensor) -> Tensor:
        # Nearly the identity around 0, where normalised latents lie, and never beyond 3 deviations.
        return torch.tanh(x / 3) * 3


class _UnscaledClamp(_Clamp):
    """The limit of a decoder whose own latents are unscaled, behind normalised ones."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean_C: Tensor, deviation_C: Tensor) -> None:
        super().__init__()
        # They go along to devices and types, and are no weights of a file.
        self.register_buffer("mean", mean_C[:, None, None], persistent=False)
        self.register_buffer("deviation", deviation_C[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.deviation + self.mean)


class _MemBlock(nn.Module):
    """A residual block that reads each frame together with the one before it."""

    def __init__(self, channels: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            operations.Conv2d(channels * 2, channels, 3, padding=1, **factory),
            nn.ReLU(inplace=True),
            operations.Conv2d(channels, channels, 3, padding=1, **factory),
            nn.ReLU(inplace=True),
            operations.Conv2d(channels, channels, 3, padding=1, **factory),
        )

    def forward(self, x_BCHW: Tensor, past_BCHW: Tensor | None) -> Tensor:
        """Return the frames x, each read with its frame of `past`; None is the beginning of a video."""
        # as in training: before the beginning there is nothing
        past_BCHW = torch.zeros_like(x_BCHW) if past_BCHW is None else past_BCHW
        # What a convolution gives is nobody else's, and may be written over; x is what the next frame reads.
        return self.conv(torch.cat([x_BCHW, past_BCHW], 1)).add_(x_BCHW).relu_()

    def group(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the next frames [B, frames, ...] of a video of which `last` was the latest, and their own last one."""
        # This pair is all that flows through time, always forwards. So a stream has to keep one frame for each block,
        # and a clip is coded exactly as in one piece.
        last = torch.zeros_like(x[:, 0]) if last is None else last
        past = torch.cat([last[:, None], x[:, :-1]], 1)
        return self(x.flatten(0, 1), past.flatten(0, 1)).unflatten(0, x.shape[:2]), x[:, -1]


class _TPool(nn.Module):
    """A layer that merges `stride` neighbouring frames into one."""

    def __init__(self, channels: int, stride: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.stride = stride
        # 1x1, and there with a stride of 1 too: released files have its weights in every stage.
        self.conv = operations.Conv2d(channels * stride, channels, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return _per_frame(self.conv, rearrange(x, "b (f s) c h w -> b f (s c) h w", s=self.stride))


class _TGrow(nn.Module):
    """A layer that splits one frame into `stride` frames."""

    def __init__(self, channels: int, stride: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.stride = stride
        self.conv = operations.Conv2d(channels, channels * stride, 1, bias=False, **factory)

    def frames(self, x_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield the frames that one frame becomes, the earliest first."""
        yield from self.conv(x_BCHW).chunk(self.stride, 1)


class _FoldedGrowth(nn.Module):
    """Upsampling, growth and the convolution behind them as one: exact, and less than half of the arithmetic.

    Of the nine weights of a 3x3 kernel over pixels that were doubled, those that meet the same pixel are added
    beforehand: that leaves four kernels of 2x2, one for each pixel of the four that one becomes. The 1x1 kernel of the
    growth multiplies into them, frame by frame.
    """

    def __init__(self, upsample: nn.Upsample, growth: _TGrow, conv: nn.Conv2d, operations: Any) -> None:
        super().__init__()
        self.is_doubled = upsample.scale_factor == 2
        # in float64, since the sums are rounded once more when they are stored
        kernel = conv.weight.detach().double()
        frames = growth.conv.weight.detach().double().chunk(growth.stride, 0)
        kernels = [torch.einsum("ocyx,ci->oiyx", kernel, frame[:, :, 0, 0]) for frame in frames]
        if self.is_doubled:
            kernels = [_halved(_halved(each, 2, row), 3, column) for each in kernels for row, column in PLACES]
        self.convs = nn.ModuleList(_conv_of(each, conv, operations) for each in kernels)

    def frames(self, x_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield the frames that one frame becomes, the earliest first."""
        if not self.is_doubled:
            yield from (conv(x_BCHW) for conv in self.convs)
            return
        batch, _, height, width = x_BCHW.shape
        for first in range(0, len(self.convs), len(PLACES)):
            frame = None
            for (row, column), conv in zip(PLACES, self.convs[first : first + len(PLACES)]):
                # with a border all around there is one result more than needed, at one end or the other
                pixels = conv(x_BCHW)[:, :, row : row + height, column : column + width]
                if frame is None:
                    frame = pixels.new_empty(batch, pixels.shape[1], 2 * height, 2 * width)
                frame[:, :, row::2, column::2] = pixels
                del pixels
            assert frame is not None
            yield frame


PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of the pixels that one pixel becomes


def _halved(kernel: Tensor, axis: int, place: int) -> Tensor:
    """Return the two weights along an axis that the three have over doubled pixels, for the pixel at `place`."""
    before, middle, behind = kernel.unbind(axis)
    return torch.stack([before, middle + behind] if place == 0 else [before + middle, behind], axis)


def _conv_of(kernel: Tensor, like: nn.Conv2d, operations: Any) -> nn.Conv2d:
    """Return a convolution of this kernel with a border of zeros, its weights stored as those of `like`."""
    factory = {"device": like.weight.device, "dtype": like.weight.dtype}
    out_width, in_width, size, _ = kernel.shape
    conv = operations.Conv2d(in_width, out_width, size, padding=1, bias=False, **factory)
    conv.load_state_dict({"weight": kernel.to(like.weight)})
    return conv.requires_grad_(False)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _merged(layers: nn.Sequential, x: Tensor, memory: Memory) -> Tensor:
    """Return what the encoder's layers make of frames x. Each memory block reads and replaces its frame of `memory`."""
    index = 0
    for layer in layers:
        if isinstance(layer, _MemBlock):
            x, memory[index] = layer.group(x, memory[index])
            index += 1
        else:
            x = layer(x) if isinstance(layer, _TPool) else _per_frame(layer, x)
    return x


def _grown(layers: Sequence[nn.Module], x_BCHW: Tensor, memory: Memory, index: int = 0) -> Iterator[Tensor]:
    """Yield the frames that the decoder's layers make of one latent frame, each before the next one is begun.

    index: which of `memory` is that of the next memory block; each reads its own and replaces it.
    """
    for place, layer in enumerate(layers):
        if isinstance(layer, _MemBlock):
            past, memory[index] = memory[index], x_BCHW
            x_BCHW = layer(x_BCHW, past)
            index += 1
        elif isinstance(layer, (_TGrow, _FoldedGrowth)):
            for frame in layer.frames(x_BCHW):
                yield from _grown(layers[place + 1 :], frame, memory, index)
                del frame  # before the next one is made
            return
        else:
            x_BCHW = layer(x_BCHW)
    yield x_BCHW


def _blank_memory(layers: nn.Sequential) -> Memory:
    return [None] * sum(isinstance(layer, _MemBlock) for layer in layers)


class TAEHV(nn.Module):
    """The encoder and decoder. Build it with the config of a checkpoint, then `load_state_dict`.

    operations: supplies Conv2d; ComfyUI's own layers, which cast their weights when used, take its place there.
    """

    def __init__(
        self, config: TAEHVConfig, *, operations: Any = nn, device: torch.device | None = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        pixels = config.image_channels * config.patch_size**2
        width, widths = config.encoder_width, config.decoder_widths

        # Three stages, each of which halves the sides: latents are 8 times smaller. Two of them halve the rate as well.
        encoder: list[nn.Module] = [operations.Conv2d(pixels, width, 3, padding=1, **factory), nn.ReLU(inplace=True)]
        for pool in config.encoder_time:
            encoder += [
                _TPool(width, 2 if pool else 1, operations, **factory),
                operations.Conv2d(width, width, 3, padding=1, stride=2, bias=False, **factory),
                *(_MemBlock(width, operations, **factory) for _ in range(MEMORY_BLOCKS)),
            ]
        encoder.append(operations.Conv2d(width, config.latent_channels, 3, padding=1, **factory))
        self.encoder = nn.Sequential(*encoder)

        # The same backwards, from wide to narrow: the upper stages see the most pixels.
        decoder: list[nn.Module] = [
            _Clamp(),
            operations.Conv2d(config.latent_channels, widths[0], 3, padding=1, **factory),
            nn.ReLU(inplace=True),
        ]
        stages = zip(widths, widths[1:], config.decoder_time, config.decoder_space)
        for width, next_width, grow, upscale in stages:
            decoder += [
                *(_MemBlock(width, operations, **factory) for _ in range(MEMORY_BLOCKS)),
                nn.Upsample(scale_factor=2 if upscale else 1),  # to the nearest pixel; the convolutions smooth it
                _TGrow(width, 2 if grow else 1, operations, **factory),
                operations.Conv2d(width, next_width, 3, padding=1, bias=False, **factory),
            ]
        decoder += [nn.ReLU(inplace=True), operations.Conv2d(widths[-1], pixels, 3, padding=1, **factory)]
        self.decoder = nn.Sequential(*decoder)

    @property
    def frames_per_latent(self) -> int:
        """Return how many frames the decoder makes of one latent frame."""
        return 2 ** sum(self.config.decoder_time)

    @property
    def frames_to_trim(self) -> int:
        """Return how many frames at the start of a decode the first latent frame does not describe."""
        # It stands for one video frame only, as in Wan's VAE (4n+1 frames to n+1), and the decoder still grows it to 4.
        return self.frames_per_latent - 1

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights as usual; of a kernel with more output channels than the decoder's, take the last ones.

        So a config with fewer frames per latent frame previews with the same file, as in madebyollin/taehv: output
        channels of a layer that splits frames are ordered by frame, and the last frame is the one to show.
        """
        weights = dict(state_dict)
        for key, own in self.state_dict().items():
            weight = weights.get(key)
            if key.startswith("decoder.") and weight is not None and weight.ndim == 4 and len(weight) > len(own):
                weights[key] = weight[-len(own) :]
        return super().load_state_dict(weights, *args, **kwargs)

    def fold(self, operations: Any = nn) -> TAEHV:
        """Make one layer of each upsampling, growth and convolution of the decoder, for good; returns self.

        Once the weights are there, and where nothing is trained: afterwards `state_dict` has other names for them.
        """
        for place, layer in enumerate(self.decoder):
            if isinstance(layer, _TGrow):
                upsample, conv = self.decoder[place - 1], self.decoder[place + 1]
                self.decoder[place] = _FoldedGrowth(upsample, layer, conv, operations)  # type: ignore[arg-type]
                # the layers behind keep their numbers, and with them the names of their weights
                self.decoder[place - 1], self.decoder[place + 1] = nn.Identity(), nn.Identity()
        return self

    def take_normalised(self, mean: Sequence[float], deviation: Sequence[float]) -> TAEHV:
        """Let weights whose latents are unscaled take and give normalised ones, for good; returns self.

        mean, deviation: of each latent channel.
        """
        conv = self.encoder[-1]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        mean_C, deviation_C = (conv.bias.new_tensor(values) for values in (mean, deviation))
        self.decoder[0] = _UnscaledClamp(mean_C, deviation_C)
        # New parameters: the old ones may be the file's own pages.
        conv.weight = nn.Parameter(conv.weight / deviation_C[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter((conv.bias - mean_C) / deviation_C, requires_grad=False)
        return self

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Return the latents [B, ceil(V/4), C, H/8, W/8] of RGB frames in [0, 1], their sides divisible by 8."""
        # 4n+1 frames are n whole groups and one frame: with that repeated, n+1 latent frames, as many as Wan's VAE
        # gives.
        return self._encode_groups(_padded(frames_BVRHW, self.frames_per_group), _blank_memory(self.encoder))

    @property
    def frames_per_group(self) -> int:
        """Return how many frames the encoder merges into one latent frame."""
        return 2 ** sum(self.config.encoder_time)

    def _encode_groups(self, frames_BVRHW: Tensor, memory: Memory) -> Tensor:
        """Return the latents of whole groups of frames. memory: of the stream so far; it is updated."""
        latents = []
        # one by one: what a clip's frames are at full size would not fit beside each other
        for group in frames_BVRHW.split(self.frames_per_group, 1):
            if self.config.patch_size > 1:
                group = _per_frame(nn.PixelUnshuffle(self.config.patch_size), group)
            latents.append(_merged(self.encoder, group, memory))
        return torch.cat(latents, 1)

    def decode_untrimmed(self, latents_BTCHW: Tensor, memory: Memory | None = None) -> Tensor:
        """Return frames [B, 4T, R, 8H, 8W], not clamped, not trimmed. memory: of the stream so far; it is updated."""
        memory = _blank_memory(self.decoder) if memory is None else memory
        layers = list(self.decoder)
        frames = [frame for latent_BCHW in latents_BTCHW.unbind(1) for frame in _grown(layers, latent_BCHW, memory)]
        if self.config.patch_size > 1:
            frames = [nn.functional.pixel_shuffle(frame, self.config.patch_size) for frame in frames]
        return torch.stack(frames, 1)

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the RGB frames [B, 4(T-1)+1, R, 8H, 8W] in [0, 1] of a whole clip's latents."""
        # A clip is a stream of one piece, so that both ways stay the same.
        return StreamingDecoder(self).decode(latents_BTCHW)


def _padded(frames_BVRHW: Tensor, group: int) -> Tensor:
    """Return frames with the last one repeated until they fill whole groups."""
    num_missing = -frames_BVRHW.shape[1] % group
    if not num_missing:
        return frames_BVRHW
    return torch.cat([frames_BVRHW, frames_BVRHW[:, -1:].expand(-1, num_missing, -1, -1, -1)], 1)


class StreamingEncoder:
    """An encoder of a video that comes piece by piece; all results and that of `flush`, joined, are the whole encode.

    Owns all state of the stream: the memory of each block and the frames that do not fill a group yet.
    """

    def __init__(self, taehv: TAEHV) -> None:
        self.taehv = taehv
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next frame is the first of a video."""
        self.memory = _blank_memory(self.taehv.encoder)
        self.waiting: Tensor | None = None  # [B, V, R, H, W], fewer frames than a group

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Return the latents [B, T, C, H/8, W/8] that the next frames in [0, 1] complete; T may be 0."""
        frames = frames_BVRHW if self.waiting is None else torch.cat([self.waiting, frames_BVRHW], 1)
        num_complete = frames.shape[1] - frames.shape[1] % self.taehv.frames_per_group
        self.waiting = frames[:, num_complete:]
        if num_complete:
            return self.taehv._encode_groups(frames[:, :num_complete], self.memory)
        batch, _, _, height, width = frames.shape
        return frames.new_zeros(batch, 0, self.taehv.config.latent_channels, height // 8, width // 8)

    def flush(self) -> Tensor:
        """Return the latent of the frames that fill no group, the last one repeated; then start the stream anew."""
        assert self.waiting is not None, "nothing was encoded"
        # `encode` puts the waiting frames in front itself: it is given the repeated ones alone.
        latents_BTCHW = self.encode(_padded(self.waiting, self.taehv.frames_per_group)[:, self.waiting.shape[1] :])
        self.reset()
        return latents_BTCHW


class StreamingDecoder:
    """A decoder of a video that comes piece by piece; the results joined are the whole clip's decode.

    Owns all state of the stream: the memory of each block, and whether the frames to trim are still to come.
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
