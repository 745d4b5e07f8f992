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
# Mean difference of two thumbnails, in [0, 1], and how many times the largest around it that has to be.
LEAST_DIFFERENCE = 0.06
TIMES_AROUND = 2.0
AROUND = 4  # differences on each side; animation that holds each drawing for four frames is no row of cuts
AROUND_SECONDS = 0.5  # further away nothing is the same motion


class CutDetector:
    """A reader of thumbnails, one after another, that keeps nothing of them but how much they differ."""

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
            if difference >= max(LEAST_DIFFERENCE, TIMES_AROUND * max(self._around(index), default=0.0)):
                times.append(float(self.times[index]))
        return times

    def _around(self, index: int) -> list[float]:
        near = range(max(0, index - AROUND), min(len(self.times), index + AROUND + 1))
        return [
            self.differences[other]
            for other in near
            if other != index and abs(self.times[other] - self.times[index]) < AROUND_SECONDS
        ]
