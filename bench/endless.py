"""A thousand chunks with a window: does a chunk cost the same at the end as at the beginning?

    python -m bench.endless --json --out bench/results/endless-cpu-1thread.json

The bundled tiny model with its decoder, one thread. Seconds are of the CPU; bytes are those resident in the process.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.codecs.taehv import StreamingDecoder
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import pixel_frames
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.weights.load import load_model, load_taehv, load_text_encoder

CAUSAL = CausalConfig(chunk=3, window=12, sink=3)  # when the window is full, every chunk reads as many frames
BLOCK = 100  # chunks whose median is reported


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@torch.no_grad()
def run(chunks: int) -> dict[str, Any]:
    """Make a video of so many chunks and report seconds and bytes along the way."""
    torch.set_num_threads(1)
    model, checkpoint = load_model("tiny", dtype=torch.float32)
    decoder = StreamingDecoder(load_taehv("tiny", dtype=torch.float32)[0])
    text = load_text_encoder("tiny", dtype=torch.float32).encode(["a red square moving left slowly"])
    video = rollout(
        Guided(model, Conditioning(text)),
        noise=SeededNoise(0),
        latent_shape=(chunks * CAUSAL.chunk, 16, 8, 8),
        causal=CAUSAL,
        steps=checkpoint.steps or StepConfig(),
    )
    seconds, resident, start = [], [], time.process_time()
    for chunk in video:
        decoder.decode(chunk.latents_BTCHW)
        seconds.append(time.process_time() - start)
        resident.append(resident_bytes())
        start = time.process_time()
    blocks = [statistics.median(seconds[start : start + BLOCK]) for start in range(0, chunks, BLOCK)]
    full = resident[CAUSAL.window // CAUSAL.chunk + 1 :]  # from when the window is full
    return {
        "chunks": chunks,
        "frames": pixel_frames(CAUSAL.chunk * chunks),
        "window": CAUSAL.window,
        "sink": CAUSAL.sink,
        "median_cpu_seconds_of_each_hundred": blocks,
        "last_hundred_over_first": blocks[-1] / blocks[0],
        "resident_bytes": resident[:: max(1, chunks // 20)],
        "memory_grows": full[-1] / full[0] - 1,
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.endless", *sys.argv[1:]]),
        "date": now(),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    report = run(args.chunks)
    text = write(report, args.out)
    ratio, grows = report["last_hundred_over_first"], report["memory_grows"]
    print(text if args.json else f"last hundred over first {ratio:.3f}, memory grows {grows:.2%}")


if __name__ == "__main__":
    main()
