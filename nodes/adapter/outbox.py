"""Frames and figures on their way to a page: encoded and sent by a thread of its own, as the page keeps up.

A page acknowledges every message, and at most two with pictures are unanswered: neither a slow page nor one that has
no player piles anything up. Where answers stop, a line without pictures asks again.

Letters: V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

EVENT = "selfforcing.live"  # under which ComfyUI's socket sends our messages
FRAME_SIZE = 512  # pixels of a frame's longer side: as ComfyUI's own previews are by default (--preview-size)
JPEG_QUALITY = 80  # of 100; what is written to disk is encoded from the frames themselves
FRAMES_WAITING = 96  # six seconds at 16 frames per second; the oldest are dropped
FRAMES_PER_MESSAGE = 24  # so that a page that was behind does not get one message of megabytes
UNANSWERED = 2  # messages: one is on its way while the page handles the other
AGAIN_AFTER = 5  # seconds: a page that does not answer may be loading, or show another workflow
PATIENCE = 10  # seconds: how long the last frames, a held chunk and a paced one wait for a page that is gone


class Outbox:
    """Frames and figures on their way to a page, encoded and sent by a thread of its own as the page keeps up."""

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        fixed: dict[str, Any],
        current: Callable[[], dict[str, Any]],
        ended: Callable[[], object],
    ) -> None:
        self.send, self.fixed, self.current, self.ended = send, fixed, current, ended
        self.status: dict[str, Any] = {"message": ""}  # the newest of every figure
        self.frames: deque[tuple[int, Tensor]] = deque(maxlen=FRAMES_WAITING)  # number and bytes, not yet sent
        self.num_sent, self.num_answered = 0, 0  # messages
        self.is_again = False  # the next frames replace what the page has from their first number on
        self.is_new = self.is_closed = False  # whether a figure is unsent; whether nothing more comes
        self.sent_at = 0.0  # seconds of the monotonic clock
        self.changed = threading.Condition()  # the lock of all of the above
        # JPEGs are made while the sampling thread waits for the GPU. A daemon, so that it holds up no exit.
        self.thread = threading.Thread(target=self._work, name=EVENT, daemon=True)
        self.thread.start()

    def put(self, frames: list[tuple[int, Tensor]] | None = None, *, is_again: bool = False, **status: Any) -> None:
        """Send frames [H, W, R] in bytes with their numbers, and figures.

        is_again: they replace those from the first one's number on.
        """
        with self.changed:
            if is_again and frames:
                self.is_again = True
                while self.frames and self.frames[-1][0] >= frames[0][0]:  # of the attempt that is thrown away
                    self.frames.pop()
            self.frames.extend(frames or [])
            self.status |= status
            self.is_new = True
            self.changed.notify_all()

    def acknowledge(self, number: int) -> None:
        """Note that the page has taken message `number`. Raises ValueError for one that was not sent."""
        with self.changed:
            if not 0 <= number < self.num_sent:
                raise ValueError(f"message {number} was never sent; there are {self.num_sent}")
            self.num_answered = max(self.num_answered, number + 1)
            self.changed.notify_all()

    def close(self) -> None:
        """End the sending: what waits is sent if the page takes it within a few seconds. Does not wait for that."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                message, frames = batch
                pictures = {"indices": [number for number, _ in frames], "jpegs": [_jpeg(frame) for _, frame in frames]}
                self.send({**message, **pictures})
        finally:  # also where ComfyUI's socket refuses a message: the run must not stay in the list of those that run
            self.ended()

    def _next(self) -> tuple[dict[str, Any], list[tuple[int, Tensor]]] | None:
        """Return what to send next, as soon as there is anything and the page is ready for it; None at the end."""
        with self.changed:
            while not self.changed.wait_for(lambda: self.is_closed or self._is_due(), timeout=AGAIN_AFTER):
                pass
            if self.is_closed and not self.changed.wait_for(
                lambda: self._is_due() or not self._has_more(), timeout=PATIENCE
            ):
                return None
            if not self._has_more():
                return None
            is_late = self.num_sent - self.num_answered >= UNANSWERED  # a page that may be gone gets no pictures
            count = 0 if is_late else min(len(self.frames), FRAMES_PER_MESSAGE)
            frames = [self.frames.popleft() for _ in range(count)]
            status = {**self.fixed, **self.status, **self.current()}
            message = {**status, "number": self.num_sent, "again": self.is_again and bool(frames)}
            self.num_sent, self.sent_at = self.num_sent + 1, time.monotonic()
            self.is_new, self.is_again = False, self.is_again and not frames
            self.status["message"] = ""  # a line is said once
            if not self.is_closed:  # the last message says all of it again, for a page that missed one
                self.status.pop("schedule", None)
            return message, frames

    def _has_more(self) -> bool:
        return bool(self.is_new or self.frames)

    def _is_due(self) -> bool:
        is_patient = time.monotonic() < self.sent_at + AGAIN_AFTER
        return self._has_more() and (self.num_sent - self.num_answered < UNANSWERED or not is_patient)


def thumbnails(frames_VRHW: Tensor) -> list[Tensor]:
    """Return frames in bytes [H, W, R] in CPU memory, no side longer than FRAME_SIZE."""
    longest = max(frames_VRHW.shape[-2:])
    if longest > FRAME_SIZE:
        # "area" averages all pixels that fall into one, so that thin lines do not flicker.
        height, width = (max(1, round(side * FRAME_SIZE / longest)) for side in frames_VRHW.shape[-2:])
        frames_VRHW = interpolate(frames_VRHW.float(), (height, width), mode="area")
    return list((frames_VRHW.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu())


def _jpeg(frame_HWR: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(frame_HWR.numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
