"""How far the page has shown the video, by its own word and, between two of them, by the video's clock."""

from __future__ import annotations

import time

TRUSTED = 0.5  # seconds: a page whose picture moves says so this often (REPORT_MS in web/panel.js)
SILENT = 6.0  # seconds: one whose picture stands still says so every two (STILL_MS), if it is still there


class Viewer:
    """The page in front of which a video plays. It may be silent (an older one, or none): then nothing is known."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.frame: int | None = None  # on screen, by the page's last word
        self.reported_at = 0.0  # seconds of the monotonic clock
        self.is_moving = False  # it was further on than at the word before

    def tell(self, frame: int) -> None:
        """Note that this frame is on screen."""
        self.is_moving = self.frame is not None and frame > self.frame
        self.frame, self.reported_at = frame, time.monotonic()

    def forget(self) -> None:
        """Note that the page is gone: nothing is known until one speaks again."""
        self.frame, self.is_moving = None, False

    def seconds_ahead(self, num_frames: int) -> float | None:
        """Return how many seconds of `num_frames` made ones lie behind the one on screen; None: unknown.

        A moving picture is taken to have moved on since, for as long as a page may be silent about it.
        """
        frame, since = self.frame, time.monotonic() - self.reported_at  # the server's thread may write it meanwhile
        if frame is None or since > SILENT:
            return None
        # Not further: a page that stalls would otherwise be thought to have shown what it has not.
        seconds_moved = min(since, TRUSTED) if self.is_moving else 0.0
        return max(0.0, (num_frames - 1 - frame) / self.fps - seconds_moved)
