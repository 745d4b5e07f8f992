"""How fast a run is, as its page shows it: without the time that it waited for its viewer."""

from __future__ import annotations

import time
from typing import Any


class Figures:
    """Figures of one run, counted by the thread that samples. fps: frames per second of the video."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.run_start = self.chunk_start = time.perf_counter()  # seconds of a clock that nothing sets back
        self.pause_seconds = 0.0  # seconds that the run waited, or computed what was thrown away
        self.first_seconds = 0.0  # from the beginning to the first frames
        self.first_frames = 0  # how many those were
        self.num_frames = 0  # made so far
        self.limit_fps: float | None = None  # what this device can reach at most, for one video

    def count(self, num_frames: int) -> float | None:
        """Return the frames per second so far, now that there are so many; None before there is anything to divide.

        What came first is left out of the rate: it includes loading and warming up.
        """
        self.num_frames = num_frames
        seconds = time.perf_counter() - self.run_start - self.pause_seconds
        if not self.first_frames:
            self.first_seconds, self.first_frames = seconds, num_frames
        frames_since, seconds_since = num_frames - self.first_frames, seconds - self.first_seconds
        return frames_since / seconds_since if frames_since and seconds_since else None

    def stats(self, rate: float | None) -> dict[str, Any]:
        """Return what the page's line of figures shows."""
        return {
            "fps": rate,
            "first_frame_seconds": self.first_seconds,
            "real_time": rate and rate / self.fps,
            "share_of_limit": rate / self.limit_fps if rate and self.limit_fps else None,
        }

    def throw_away(self, wait_start: float) -> None:
        """Leave out the attempt at a chunk that is made once more, as little of the rate as the wait behind it."""
        self.pause_seconds += wait_start - self.chunk_start

    def go_on(self, wait_start: float) -> None:
        """Leave out the wait, which ends now; the next chunk begins."""
        self.chunk_start = time.perf_counter()
        self.pause_seconds += self.chunk_start - wait_start
