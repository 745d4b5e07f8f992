"""Hard cuts of a video: the moments where one scene ends and another begins.

A cut is a frame that differs strongly from the one before it, and far more than the frames around it differ from
theirs: fast motion, shaking and zooming change every frame, a cut changes one. A flash comes and goes and is none.
Scenes of less than five frames are taken for such motion, unless each frame stands for as long as in a slideshow.

Letters: R RGB, H W height and width of a thumbnail.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

SIDE = 8  # frames are compared as thumbnails of SIDE x SIDE pixels, which fast motion changes least
# What the mean difference of two thumbnails, in [0, 1], has to be at a cut: this much, and so many times the largest
# difference around it.
LEAST_DIFFERENCE = 0.06
TIMES_AROUND = 2.0
AROUND = 4  # differences on each side, so that animation that holds each drawing for four frames has no cuts
AROUND_SECONDS = 0.5  # what is further away is not the same motion; frames of a slideshow have nothing around them


class CutDetector:
    """A detector that takes thumbnails one after another, and keeps of them only how much they differ."""

    def __init__(self) -> None:
        self.times: list[Fraction] = []
        self.differences: list[float] = []
        self._last: np.ndarray | None = None

    def add(self, time: Fraction, thumbnail_HWR: np.ndarray) -> None:
        """Compare a uint8 thumbnail, shown at `time` seconds, with the one before it."""
        thumbnail = thumbnail_HWR.astype(np.int16)  # differences of uint8 would wrap around
        if self._last is not None:
            self.times.append(time)
            self.differences.append(float(np.abs(thumbnail - self._last).mean()) / 255)
        self._last = thumbnail

    def cuts(self) -> list[float]:
        """Return the times of the first frames behind a cut, in seconds."""
        times = []
        for index, difference in enumerate(self.differences):
            # A flash is two large differences side by side, neither of which is twice the other.
            if difference >= max(LEAST_DIFFERENCE, TIMES_AROUND * max(self._around(index), default=0.0)):
                times.append(float(self.times[index]))
        return times

    def _around(self, index: int) -> list[float]:
        """Return the differences near one, without itself."""
        near = range(max(0, index - AROUND), min(len(self.times), index + AROUND + 1))
        return [
            self.differences[other]
            for other in near
            if other != index and abs(self.times[other] - self.times[index]) < AROUND_SECONDS
        ]
