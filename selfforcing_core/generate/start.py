"""What a video starts from: nothing, a picture, or another video that goes on.

Letters: B batch, V video frames, R RGB, H W height and width, T latent frames, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from ..codecs.image import Encoder
from ..codecs.video_reader import GivenVideo, VideoReader
from ..config import CausalConfig
from ..geometry import TEMPORAL_FACTOR, covered_latents, pixel_frames

LATENTS_KEY = "latents"  # the one tensor of a latents file, [T, C, H, W], normalised


class Decoder(Protocol):
    """StreamingDecoder or StreamingWanDecoder."""

    def decode(self, latents_BTCHW: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Start:
    """The given part of a video.

    prefix_BTCHW: clean latents the rollout begins with, [1, T, C, H, W]. video: its frames stand before everything
    generated, as they are. shown_BTCHW: latents whose frames do, to be decoded first. is_prefix_shown:
    whether the prefix's own frames are part of the video.
    """

    prefix_BTCHW: Tensor | None = None
    video: VideoReader | None = None
    shown_BTCHW: Tensor | None = None
    is_prefix_shown: bool = True

    @property
    def latent_frames(self) -> int:
        return 0 if self.prefix_BTCHW is None else self.prefix_BTCHW.shape[1]


def start_from_image(image_1RHW: Tensor, encoder: Encoder) -> Start:
    """Return the start of a video whose first frame is a picture in the video's size, in [0, 1]."""
    return Start(prefix_BTCHW=encoder.encode(image_1RHW[:, None]).float())


def start_from_video(video: GivenVideo, encoder: Encoder, causal: CausalConfig) -> Start:
    """Return the start of what goes on from a video: as much of its end as the window leaves room for.

    Raises ValueError if it is too short for one chunk.
    """
    count = context_frames(covered_latents(len(video)), causal)
    # Encoded afresh, so that its first frame stands for itself, as the causal VAE wants a video's first frame to.
    tail = video.reader.frames(len(video) - pixel_frames(count))
    return Start(encoder.encode(tail[None]).float(), video=video.reader, is_prefix_shown=False)


def start_from_latents(latents_TCHW: Tensor, causal: CausalConfig) -> Start:
    """Return the same from latents that `write_latents` kept: nothing is lost by decoding and encoding."""
    count = context_frames(len(latents_TCHW), causal)
    return Start(latents_TCHW[None, -count:], shown_BTCHW=latents_TCHW[None], is_prefix_shown=False)


def context_frames(available: int, causal: CausalConfig) -> int:
    """Return the latent frames of a video of `available` that a continuation sees.

    They are whole chunks, one chunk short of the window. Raises ValueError where that is less than one chunk.
    """
    # One chunk of the window is left for what is denoised.
    room = available if causal.window == -1 else min(available, causal.window - causal.chunk)
    first = 1 if causal.independent_first_frame else causal.chunk  # latent frames of the first chunk
    count = first + (room - first) // causal.chunk * causal.chunk
    if count < first:
        raise ValueError(
            f"a video of {available} latent frames cannot be extended in chunks of {causal.chunk} with window "
            f"{causal.window}; it needs {pixel_frames(first)} frames and a window of {first + causal.chunk}"
        )
    return count


def frames_of(start: Start, chunks: Iterable[Any], decoder: Decoder, piece: int) -> Iterator[tuple[str, Tensor]]:
    """Yield ("start", frames [1, V, R, H, W]) that the start brings along, then ("chunk", frames [B, V, R, H, W]).

    The frames are in [0, 1]. chunks: of the rollout. piece: latent frames of the start that are decoded at a time.
    """
    if start.shown_BTCHW is not None:
        for latents_BTCHW in start.shown_BTCHW.split(piece, 1):
            yield "start", decoder.decode(latents_BTCHW)
    elif start.video is not None:
        pictures = start.video.iter_frames()
        while frames := list(itertools.islice(pictures, TEMPORAL_FACTOR * piece)):
            yield "start", torch.stack(frames)[None]
    for chunk in chunks:
        if chunk.is_given and start.shown_BTCHW is not None:
            continue  # the decoder has already seen it
        frames = decoder.decode(chunk.latents_BTCHW)
        if chunk.is_given and not start.is_prefix_shown:
            continue  # decoded for the decoder's memory only
        yield "chunk", frames


# -------------------------------------------------------------------- files --
def write_latents(path: Path, latents_TCHW: Tensor, *, overwrite: bool = False) -> None:
    """Write a video's normalised latents into a safetensors file. Raises ValueError if the path cannot be written."""
    with replacing(path, overwrite=overwrite) as temporary:
        save_file({LATENTS_KEY: latents_TCHW.float().cpu().contiguous()}, temporary)


def read_latents(path: Path) -> Tensor | None:
    """Return the latents [T, C, H, W] of a file of `write_latents`, None if it is no safetensors file.

    Raises ValueError for a safetensors file that holds something else.
    """
    try:
        with path.open("rb") as file:
            # 8 bytes of the header's length, then the header, a JSON object.
            is_safetensors = file.read(9)[8:] == b"{"
        if not is_safetensors:
            return None
        with safe_open(path, "pt") as file:
            latents = file.get_tensor(LATENTS_KEY)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: holds no latents; give a video, or a file written with --latents") from error
    if latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError(f"{path}: latents of shape {tuple(latents.shape)} are not [frames, channels, height, width]")
    return latents.float()
