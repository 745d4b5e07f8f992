"""A decoder of a stream that encodes an earlier picture anew, as the first one of a video.

The first latent frame of a video stands for one picture, each later one for four. A policy that shows the network a
window as if it were a video of its own (Krea Realtime) needs the picture before it in that form.

Letters: B batch, V video frames, R RGB, H W height and width, T latent frames, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..geometry import TEMPORAL_FACTOR


class _Decoder(Protocol):
    def decode(self, latents_BTCHW: Tensor) -> Tensor: ...


class FirstPictures:
    """Decodes in a stream, and after each piece encodes the last picture of the latent frame `back` frames before it.

    encode: frames [B, V, R, H, W] to latents. first_frame: how many latent frames are decoded before frame 0.
    """

    def __init__(
        self, decoder: _Decoder, encode: Callable[[Tensor], Tensor], *, back: int, first_frame: int = 0
    ) -> None:
        assert back > 0, f"{back} frames before the end lies no picture"
        self.decoder, self.encode, self.next_frame = decoder, encode, -first_frame
        self.pictures: deque[Tensor] = deque(maxlen=back)  # the last one of each latent frame, oldest first
        self.encoded_BTCHW: Tensor | None = None  # of the oldest

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the frames of the next latent frames."""
        frames_BVRHW = self.decoder.decode(latents_BTCHW)
        count = latents_BTCHW.shape[1]
        # a latent frame ends four pictures before the next one does
        ends = range(frames_BVRHW.shape[1] - 1 - TEMPORAL_FACTOR * (count - 1), frames_BVRHW.shape[1], TEMPORAL_FACTOR)
        self.pictures.extend(frames_BVRHW[:, end : end + 1].clone() for end in ends)
        self.next_frame += count
        # now, and not when it is asked for: then a chunk is being made, and its kernel of attention is chosen
        if len(self.pictures) == self.pictures.maxlen:
            self.encoded_BTCHW = self.encode(self.pictures[0])
        return frames_BVRHW

    def encode_first(self, frame: int) -> Tensor:
        """Return the latent [B, 1, C, H, W] of the picture that a latent frame of the rollout ends with."""
        assert self.encoded_BTCHW is not None, "nothing was decoded yet"
        assert frame == self.next_frame - len(self.pictures), f"frame {frame} is not the one that was encoded"
        return self.encoded_BTCHW
