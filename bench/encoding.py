"""What repeatable files cost: CPU seconds to encode a video of real size, by x264's assembly and threads.

    python -m bench.encoding --out bench/results/encoding-cpu.json

Equal frames are encoded again and again in each way; the report says how many different files came of it, and the CPU
seconds of one, best and median. "as it is written" is what `write_video` does. Where the CPU has no AVX-512, "auto" and
"avx2" are the same code, and the column of files proves nothing about a CPU that has.

Letters: V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import torch
from torch import Tensor

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.codecs import video
from selfforcing_core.codecs.video_formats import FORMATS

# x264 chooses its assembly by the CPU. Sums of floats differ between them, and so does a file in its last bits.
ASSEMBLY = {"auto": "", "avx2": "avx2", "sse4.2": "sse4.2", "none": "0"}
SIZE, FRAMES = (480, 832), 33  # the size of the published models, two seconds


def pictures() -> Tensor:
    """Make a moving texture with a little noise, [V, R, H, W]: what a decoder makes is neither flat nor random."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, SIZE[0] // 16, SIZE[1] // 16, generator=generator)
    still = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 1)[0]
    noise = 0.02 * torch.randn(FRAMES, 3, *SIZE, generator=generator)
    return (torch.stack([still.roll(3 * index, -1) for index in range(FRAMES)]) + noise).clamp(0, 1)


def encoded(frames_VRHW: Tensor, folder: Path, params: str | None) -> bytes:
    """Return the file that `write_video` makes with these parameters of x264; None leaves them as they are."""
    coding = FORMATS["h264"]
    if params is not None:
        options = {name: value for name, value in coding.options.items() if name != "x264-params"}
        coding = replace(coding, options={**options, **({"x264-params": params} if params else {})})
    path = folder / "encoding.mp4"
    with patch.dict(FORMATS, h264=coding):
        video.write_video(path, frames_VRHW, overwrite=True)
    data = path.read_bytes()
    path.unlink()
    return data


def timed(encode: Callable[[], bytes], repeats: int) -> dict[str, Any]:
    """Encode again and again, and report CPU seconds and how many different files came of it."""
    seconds, files = [], []
    for _ in range(repeats):
        start = time.process_time()  # of all threads, which x264 starts several of
        files.append(encode())
        seconds.append(time.process_time() - start)
    digests = {hashlib.sha256(data).hexdigest() for data in files}
    return {
        "cpu_seconds_best": min(seconds),
        "cpu_seconds_median": statistics.median(seconds),
        "repeats": repeats,
        "different_files": len(digests),
        "bytes": len(files[0]),
    }


def has_avx512() -> bool:
    """Return whether torch found AVX-512 in this CPU, as x264 would."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def x264_in_words(data: bytes) -> str:
    """Read what the encoder wrote about itself into the file."""
    start = data.find(b"x264 - core")
    return data[start : data.find(b"\0", start)].split(b" - options")[0].decode("ascii", "replace")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    frames = pictures()
    ways = {f"asm {name}": f"asm={value}" if value else "" for name, value in ASSEMBLY.items()}
    results = {"as it is written": timed(lambda: encoded(frames, args.folder, None), args.repeats)}
    for name, params in ways.items():
        results[name] = timed(lambda params=params: encoded(frames, args.folder, params), args.repeats)
    report = {
        "frames": FRAMES,
        "height": SIZE[0],
        "width": SIZE[1],
        "has_avx512": has_avx512(),
        "ways": results,
        "encoder": x264_in_words(encoded(frames, args.folder, None)),
        "av": av.__version__,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.encoding", *sys.argv[1:]]),
        "date": now(),
    }
    print(write(report, args.out))


if __name__ == "__main__":
    main()
