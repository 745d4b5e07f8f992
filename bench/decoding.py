"""TAEHV's decoder beside a plain restatement of the published one, on one CPU thread: seconds and memory.

    python -m bench.decoding --out bench/results/decoding-cpu-1thread.json

Random weights of the released sizes, the same in both; nothing is fetched. `published` streams as
github.com/madebyollin/taehv does, frame by frame, with upsampling, growth and convolution as three layers; `folded` is
what the nodes and the command line run. Both decode the same latents in turns in one process, and their CPU time
counts; memory is the peak of a process of its own above what it held before the first latent. `difference` is the
largest between their frames.

Letters: B batch, T latent frames, C latent channels, H W height and width.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder
from selfforcing_core.config import TAEHVConfig
from selfforcing_core.geometry import SPATIAL_FACTOR
from selfforcing_core.shapes import MEMORY_BLOCKS

Decode = Callable[[Tensor], Tensor]  # the next latent [B, 1, C, H, W] of a stream to its frames


class Published:
    """The published decoder, restated: its layers in their order, its weights by their names, one frame at a time."""

    def __init__(self, weights: dict[str, Tensor], config: TAEHVConfig) -> None:
        self.weights, self.config = weights, config
        self.past: dict[str, Tensor] = {}  # what each block read before

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the frames of the next latent, not clamped, not trimmed."""
        x_BCHW = F.relu_(self._conv("decoder.1", torch.tanh(latents_BTCHW[:, 0] / 3) * 3))
        return torch.stack(self._stage(x_BCHW, 0), 1)

    def _stage(self, x_BCHW: Tensor, stage: int) -> list[Tensor]:
        first = 3 + stage * (MEMORY_BLOCKS + 3)  # the number of the stage's first layer
        if stage == len(self.config.decoder_time):
            return [self._conv(f"decoder.{first + 1}", F.relu_(x_BCHW))]
        for block in range(first, first + MEMORY_BLOCKS):
            x_BCHW = self._block(f"decoder.{block}.conv", x_BCHW)
        if self.config.decoder_space[stage]:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2)
        growth, conv = first + MEMORY_BLOCKS + 1, first + MEMORY_BLOCKS + 2
        grown = F.conv2d(x_BCHW, self.weights[f"decoder.{growth}.conv.weight"])
        frames = grown.chunk(2 if self.config.decoder_time[stage] else 1, 1)
        return [
            each
            for frame in frames
            for each in self._stage(F.conv2d(frame, self.weights[f"decoder.{conv}.weight"], padding=1), stage + 1)
        ]

    def _block(self, name: str, x_BCHW: Tensor) -> Tensor:
        past_BCHW = self.past.get(name, torch.zeros_like(x_BCHW))
        self.past[name] = x_BCHW
        out = F.relu_(self._conv(f"{name}.0", torch.cat([x_BCHW, past_BCHW], 1)))
        out = self._conv(f"{name}.4", F.relu_(self._conv(f"{name}.2", out)))
        return F.relu_(out + x_BCHW)

    def _conv(self, name: str, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=1)


def decoders() -> dict[str, Decode]:
    """Return both decoders, with the same random weights, at the start of a stream."""
    torch.manual_seed(0)
    taehv, config = TAEHV(TAEHVConfig()).requires_grad_(False), TAEHVConfig()
    published = Published({name: tensor.clone() for name, tensor in taehv.state_dict().items()}, config)
    stream = StreamingDecoder(taehv.fold())
    return {
        "published": published.decode,
        "folded": functools.partial(taehv.decode_untrimmed, memory=stream.memory),
    }


@torch.no_grad()
def measure(latent_height: int, latent_width: int, repeats: int) -> dict[str, Any]:
    """Return seconds of CPU for a latent frame by each decoder, their ratio, and how far their frames differ."""
    pair, difference = decoders(), 0.0
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for turn in range(repeats + 1):
        latent = torch.randn(1, 1, 16, latent_height, latent_width, generator=torch.Generator().manual_seed(turn))
        frames = {}
        for name, decode in pair.items():
            start = time.process_time()
            frames[name] = decode(latent)
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - start)
        difference = max(difference, float((frames["published"] - frames["folded"]).abs().max()))
    best = {name: min(each) for name, each in seconds.items()}
    return {"seconds": best, "ratio": best["folded"] / best["published"], "difference": difference}


@torch.no_grad()
def peak_bytes(name: str, latent_height: int, latent_width: int) -> int:
    """Return by how much this process's peak memory grows while one decoder makes two latents (Linux)."""
    decode, latent = decoders()[name], torch.randn(1, 1, 16, latent_height, latent_width)
    decode(latent[..., :8, :8])  # libraries and their threads, which take memory once
    decode = decoders()[name]  # another stream: what the small latent left behind does not fit the next one
    before = _peak()
    for _ in range(2):
        decode(latent)
    return _peak() - before


def _peak() -> int:
    # of this program alone: what getrusage tells counts that of the parent too
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR
    if args.memory_of:
        print(peak_bytes(args.memory_of, *size))
        return
    report = measure(*size, args.repeats)
    command = [sys.executable, "-m", "bench.decoding", "--height", str(args.height), "--width", str(args.width)]
    report["bytes"] = {
        name: int(subprocess.run([*command, "--memory-of", name], capture_output=True, check=True).stdout)
        for name in report["seconds"]
    }
    report["bytes_ratio"] = report["bytes"]["folded"] / report["bytes"]["published"]
    report |= {
        "size": [args.height, args.width],
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.decoding", *sys.argv[1:]]),
        "date": now(),
    }
    print(write(report, args.out))


if __name__ == "__main__":
    main()
