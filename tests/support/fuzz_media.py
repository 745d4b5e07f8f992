"""Damaged videos, sounds and pictures by the thousand: what can be seen is read, anything else is one line.

python -m tests.support.fuzz_media --count 2000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfforcing_core.codecs.image import read_image
from selfforcing_core.codecs.sound import Sound
from selfforcing_core.codecs.video import VideoStream, read_video, write_video
from selfforcing_core.codecs.video_reader import VideoReader, given_video
from selfforcing_core.generate.cli import main as command_line
from tests.core.test_video_reader import constant, make, numbers

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "I;16B"]
FORMATS = ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP"]


class MediaFuzzer:
    """Makes one damaged or odd file after another in an empty folder and says what was wrong with the answer."""

    def __init__(self, folder: Path, chooser: random.Random) -> None:
        self.folder, self.random = folder, chooser
        self.answers: Counter[str] = Counter()
        self.kinds: list[Callable[[], str | None]] = [
            *[self.video] * 6,
            *[self.image] * 6,
            *[self.sound] * 3,
            *[self.rate] * 2,
            *[self.command] * 1,
        ]
        with tempfile.TemporaryDirectory() as other:
            self.videos = dict(self._videos(Path(other)))
        self.images = {f"{mode} {name}": data for mode in MODES for name, data in self._images(mode)}

    def try_one(self) -> str | None:
        """Try one kind. Returns a complaint, None if there is none; the folder is empty again."""
        kind = self.random.choice(self.kinds)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                complaint = kind()
        except Exception as error:  # whatever escapes would have been a traceback
            complaint = f"{type(error).__name__}: {error}"
        for path in self.folder.iterdir():
            path.unlink()
        return None if complaint is None else f"{kind.__name__}: {complaint}"

    def main(self, count: int) -> list[str]:
        actual = (self.try_one() for _ in range(count))
        return [complaint for complaint in actual if complaint]

    # ------------------------------------------------------------------ inputs --
    def _videos(self, folder: Path) -> list[tuple[str, bytes]]:
        generator = torch.Generator().manual_seed(0)
        pictures = [*(torch.rand(24, 64, 64, 3, generator=generator) * 255).byte().numpy()]
        written = [
            make(folder / "a.mp4", constant(30, 24), pictures=pictures, sound="aac"),
            make(folder / "b.mkv", constant(12, 24), pictures=pictures, sound="libopus"),
            make(folder / "c.mkv", constant(16, 24), pictures=pictures, codec="ffv1", sound="pcm_s16le"),
            make(folder / "d.ts", constant(25, 24), pictures=pictures, sound="aac"),
            make(folder / "e.mp4", [Fraction(i * i, 200) for i in range(24)], pictures=pictures),
        ]
        frames = torch.rand(24, 3, 64, 64, generator=generator)
        write_video(folder / "f.mp4", frames, metadata={"comment": "a"})
        with VideoStream(folder / "g.mp4") as stream:
            stream.write(frames)
        return [(path.name, path.read_bytes()) for path in [*written, folder / "f.mp4", folder / "g.mp4"]]

    def _images(self, mode: str) -> list[tuple[str, bytes]]:
        colours = Image.fromarray((np.random.default_rng(0).random((24, 32, 3)) * 255).astype(np.uint8))
        ramp = np.linspace(0, 65535, 768).reshape(24, 32)
        if mode == "F":
            image = Image.fromarray((ramp / 65535).astype(np.float32))
        elif mode == "I":
            image = Image.fromarray(ramp.astype(np.int32))
        elif mode.startswith("I;16"):
            image = Image.frombytes(mode, (32, 24), ramp.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        else:
            image = colours.quantize(9).convert(mode) if mode == "PA" else colours.convert(mode)
        actual = []
        for name in FORMATS:
            data = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                image.save(data, format=name)
                actual.append((name, data.getvalue()))
        return actual

    def damaged(self, data: bytes) -> bytes:
        """A file cut short, with bits turned, bytes overwritten, moved or doubled; or the file as it was."""
        pick, changed = self.random, bytearray(data)
        kind = pick.randrange(7)
        if kind == 0:
            return bytes(changed[: pick.randrange(len(changed))])
        if kind == 1:  # anywhere
            for _ in range(pick.randrange(1, 30)):
                changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
        elif kind == 2:  # the first or last bytes, which say how to read the rest
            for _ in range(pick.randrange(1, 9)):
                place = pick.randrange(min(900, len(changed)))
                changed[place if pick.random() < 0.5 else -1 - place] = pick.randrange(256)
        elif kind == 3:
            start = pick.randrange(len(changed))
            changed[start : start + 400] = pick.randbytes(min(400, len(changed) - start))
        elif kind == 4:
            start, length = pick.randrange(len(changed)), pick.randrange(1, 2000)
            del changed[start : start + length]
        elif kind == 5:
            start, length = pick.randrange(len(changed)), pick.randrange(1, 2000)
            changed[start:start] = changed[start : start + length]
        return bytes(changed)

    def _damaged_video(self) -> Path:
        name, data = self.random.choice(list(self.videos.items()))
        path = self.folder / name
        path.write_bytes(self.damaged(data))
        return path

    # ------------------------------------------------------------------- kinds --
    def video(self) -> str | None:
        path, fps = self._damaged_video(), self.random.choice([None, 16, 16, 24, 7.5, 60])
        try:
            frames, findings = VideoReader(path, fps).first_frames(40)
            notes = findings.in_words()
        except ValueError as error:
            return self._refused(error, path)
        self.answers["video said" if notes else "video read"] += 1
        return _useless(frames, 40) or _words(notes)

    def image(self) -> str | None:
        name, data = self.random.choice(list(self.images.items()))
        path = self.folder / f"a.{name.split()[1]}"
        path.write_bytes(self.damaged(data))
        try:
            image = read_image(path)
        except ValueError as error:
            return self._refused(error, path)
        self.answers["image read"] += 1
        return _useless(image[None], 1)

    def sound(self) -> str | None:
        """A damaged sound beside good frames: the frames are there, or nothing is."""
        path, out = self._damaged_video(), self.folder / f"out.{self.random.choice(['mp4', 'mov', 'mkv'])}"
        try:
            given = given_video(path, 16)
            if given.findings.sound is None:
                return None
            seconds = Fraction(self.random.randrange(1, 20), 16)
            write_video(out, torch.rand(12, 3, 16, 16), sound=Sound(path, given.findings.start, seconds))
        except ValueError as error:
            return self._refused(error, path)
        self.answers["sound written"] += 1
        return None if len(read_video(out)) == 12 else f"{path.name}: the frames are lost"

    def rate(self) -> str | None:
        """A good video of a random rate at another: as long, each frame until the next one's moment."""
        rate, fps, count = self.random.uniform(4, 60), self.random.choice([8, 16, 24, 30]), self.random.randrange(2, 30)
        path = make(self.folder / f"a.{self.random.choice(['mp4', 'mkv', 'mov'])}", constant(rate, count))
        actual = numbers(VideoReader(path, fps).frames())
        self.answers["rate read"] += 1
        is_long = abs(len(actual) / fps - count / rate) <= 1 / fps
        early = min(1 / rate, 1 / fps) / 2  # by which a frame's moment may be rounded
        is_held = all(
            number / rate - early - 0.004 <= at / fps
            and (at / fps <= (number + 1) / rate - early + 0.004 or number == count - 1)
            for at, number in enumerate(actual)
        )
        return None if is_long and is_held and max(actual) < count else f"{rate=} {fps=} {count=}: {actual}"

    def command(self) -> str | None:
        """The command line on a damaged video or picture: a video that plays, or one line and no file."""
        name, data = self.random.choice(list(self.images.items()))
        path = self._damaged_video() if self.random.random() < 0.5 else self.folder / f"a.{name.split()[1]}"
        kind = "--extend" if path.exists() else "--image"
        if kind == "--image":
            path.write_bytes(self.damaged(data))
        out, err = self.folder / "out.mp4", io.StringIO()
        line = ["generate", "--prompt", "a", kind, str(path), "--steps", "1000", "--out", str(out), "--threads", "1"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = command_line([*line, "--frames", "12" if kind == "--extend" else "13"])
        left = set(os.listdir(self.folder)) - {path.name}
        self.answers[f"command {status}"] += 1
        if status == 0:
            return None if left == {"out.mp4"} and len(read_video(out)) > 12 else f"{path.name}: left {left}"
        is_said = err.getvalue().splitlines()[-1:] != [] and "Traceback" not in err.getvalue()
        return None if status == 2 and is_said and not left else f"{path.name}: {status}, {left}, {err.getvalue()}"

    def _refused(self, error: ValueError, path: Path) -> str | None:
        self.answers["refused"] += 1
        left = set(os.listdir(self.folder)) - {path.name}
        return None if str(error).strip() and "\n" not in str(error) and not left else f"{error!r}, left {left}"


def _useless(frames_VRHW: Tensor, most: int) -> str | None:
    is_right = 0 < len(frames_VRHW) <= most and frames_VRHW.shape[1] == 3 and frames_VRHW.isfinite().all()
    return None if is_right and frames_VRHW.min() >= 0 and frames_VRHW.max() <= 1 else f"frames {frames_VRHW.shape}"


def _words(notes: list[str]) -> str | None:
    return next((note for note in notes if "\n" in note or not note), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = MediaFuzzer(Path(folder), random.Random(args.seed))
        complaints = fuzzer.main(args.count)
    for complaint in complaints[:20]:
        print(complaint)
    print(dict(sorted(fuzzer.answers.items())))
    print(f"{args.count} inputs, {len(complaints)} bad answers, {time.monotonic() - started:.0f} s")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
