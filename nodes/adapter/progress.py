"""Who is told of every evaluation and every chunk: ComfyUI's callback, or the player and the frames of a stream.

Letters: B batch, T latent frames, C latent channels, H W latent size, V video frames, R RGB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ...selfforcing_core.geometry import pixel_frames
from ...selfforcing_core.rollout import Chunk
from . import host
from .frame_stream import FrameStream
from .live import Live

OnFrames = Callable[[Tensor], object]  # what becomes of a chunk's frames [B, V, R, H, W] in [0, 1]


class Progress(Protocol):
    """Told of every evaluation before it starts, and of every finished chunk, which it may want made once more.

    is_finished: the chunk that it was told of last is to be the video's last one.
    """

    is_finished: bool

    def step(self) -> None:
        """Take note that an evaluation is about to start."""
        ...

    def chunk(self, chunk: Chunk) -> bool:
        """Take note of a finished chunk; return whether it is to be made once more."""
        ...

    def finish(self) -> None:
        """Take note that the last chunk is done."""
        ...


class CallbackProgress:
    """ComfyUI's callback: its bar counts sigmas, so evaluations are scaled to them; the last call has all frames."""

    is_finished = False

    def __init__(
        self, callback: Any, sigmas: Tensor, like_BTCHW: Tensor, earlier_latents: list[Tensor], num_calls: int
    ) -> None:
        self.callback, self.sigmas, self.total_calls, self.num_calls = callback, sigmas, num_calls, 0
        self.latest_BCTHW = host.to_graph(torch.zeros(like_BTCHW.transpose(1, 2).shape))
        for latents_BTCHW in earlier_latents:  # what a resumed state brings along
            self._put(latents_BTCHW, 0)

    def _put(self, latents_BTCHW: Tensor, start_frame: int) -> Tensor:
        new = rearrange(latents_BTCHW, "b t c h w -> b c t h w")
        self.latest_BCTHW[:, :, start_frame : start_frame + new.shape[2]] = new
        return new

    def step(self) -> None:
        """Count the evaluation."""
        self.num_calls += 1

    def chunk(self, chunk: Chunk) -> bool:
        """Show the chunk's newest frame, at the end of the video all of it; nothing is made once more."""
        if self.callback is None:
            return False
        new = self._put(chunk.latents_BTCHW, chunk.start_frame)
        is_last = chunk.start_frame + new.shape[2] == self.latest_BCTHW.shape[2]
        steps = len(self.sigmas) - 1
        index = steps - 1 if is_last else min(steps - 1, self.num_calls * steps // max(self.total_calls, 1))
        # ComfyUI's preview is of the first frame that it is given, so that is the newest one. Of the last call it keeps
        # everything: SamplerCustomAdvanced makes its second output, denoised_output, of it.
        preview_BCTHW = self.latest_BCTHW if is_last else new[:, :, -1:]
        sigma = self.sigmas[0]
        self.callback({"i": index, "denoised": preview_BCTHW, "x": preview_BCTHW, "sigma": sigma, "sigma_hat": sigma})
        return False

    def finish(self) -> None:
        """Do nothing: the last call has told all."""


class StreamProgress(host.ProgressBar):
    """Counts network calls, decodes each chunk as soon as it is there, shows it, and waits while it is held."""

    def __init__(
        self,
        total: int,
        num_frames: int,
        *,
        stream: FrameStream | None,
        latent_format: Any,
        live: Live | None,
        on_frames: OnFrames,
    ) -> None:
        super().__init__(total)
        self.num_frames, self.stream, self.latent_format = num_frames, stream, latent_format
        self.live, self.on_frames = live, on_frames
        self.num_accepted = 0  # video frames that nothing replaces any more
        self.calls_at_accept = 0  # network calls up to the last chunk that was accepted
        self.is_finished = False

    def begin_with(self, video_BTCHW: Tensor) -> None:
        """Decode what a run that goes on from a snapshot has already."""
        if self.stream is not None:
            for latent_BTCHW in video_BTCHW.split(1, 1):  # a file takes them one by one, however many there are
                host.check_interrupted()
                self._accept(self.stream.decode(latent_BTCHW, is_last=False))

    def chunk(self, chunk: Chunk) -> bool:
        """Decode and show a chunk; return whether the page wants it once more."""
        may_repeat = self.live is not None and not chunk.is_given  # frames that the user gave are as they are
        is_end = chunk.start_frame + chunk.latents_BTCHW.shape[1] == self.num_frames
        self.is_finished = is_end or (may_repeat and self._is_finishing())
        # A decoder remembers the frames before: what is decoded of an attempt has to be undone with it.
        decoder_state = self.stream.state() if self.stream is not None and may_repeat else None
        if self.stream is None:
            frames_BVRHW = chunk.latents_BTCHW[:, :0]
        else:
            frames_BVRHW = self.stream.decode(chunk.latents_BTCHW, is_last=self.is_finished)
        self._show(frames_BVRHW, chunk)
        if self._wants_again(frames_BVRHW, may_repeat, is_final=chunk.is_final):
            if self.stream is not None:
                self.stream.restore(decoder_state)
            self.back_to(self.calls_at_accept)  # the bar goes back too: its total does not count what is thrown away
            return True
        self.calls_at_accept = self.num_calls
        self._accept(frames_BVRHW)
        if may_repeat and not self.is_finished and self._is_finishing():  # it was asked for while this chunk waited
            self.is_finished = True
            self._flush(chunk)
        return False

    def _wants_again(self, frames_BVRHW: Tensor, may_repeat: bool, *, is_final: bool) -> bool:
        """Wait as long as the page wishes; keep the chunk that waits where the run is interrupted."""
        if self.live is None:
            return False
        try:
            return self.live.wants_again(can_hold=may_repeat, is_last=self.is_finished, is_final=is_final)
        except host.Interrupted:
            # It was whole and on screen: a file that is written on the way is to hold it.
            self._accept(frames_BVRHW)
            raise

    def _is_finishing(self) -> bool:
        return self.live is not None and self.live.is_finishing

    def _flush(self, chunk: Chunk) -> None:
        """Show and keep the frames that the decoder kept back for a chunk that does not come."""
        if self.stream is not None:
            frames_BVRHW = self.stream.decode(chunk.latents_BTCHW[:, :0], is_last=True)
            if frames_BVRHW.shape[1]:
                self._show(frames_BVRHW, chunk)
                self._accept(frames_BVRHW)

    def _show(self, frames_BVRHW: Tensor, chunk: Chunk) -> None:
        first = self.num_accepted
        if not frames_BVRHW.shape[1] and (self.stream is None or self.stream.note):  # no pictures before the end
            # Where no decoder shows anything yet, the newest latent frame stands in for its chunk.
            frames_BVRHW = host.rough_frames(chunk.latents_BTCHW[:1, -1:], self.latent_format)
            first = pixel_frames(chunk.start_frame + chunk.latents_BTCHW.shape[1]) - 1
        if self.live is not None:
            self.live.show(frames_BVRHW[0], first, chunk.index + 1)
        # ComfyUI's preview is for whoever has no player: with both, each frame would be sent twice.
        if frames_BVRHW.shape[1] and (self.live is None or not self.live.has_page):
            self.show(frames_BVRHW[0, -1])

    def _accept(self, frames_BVRHW: Tensor) -> None:
        self.num_accepted += frames_BVRHW.shape[1]
        if frames_BVRHW.shape[1] and self.stream is not None:
            self.on_frames(frames_BVRHW)
