"""What a card must hold, and what it cannot beat: models by sizes by lengths, in closed form; nothing is run.

    python -m bench.needs --out bench/results/needs.json

GB are those of the video model, its caches and its widest place, without the text encoder, which leaves before the
model comes, and without what the driver and the desktop keep. Frames per second are a limit at what a card attains in
practice (0.8 of the data sheet's FLOP/s, 0.88 of its bytes/s) with every pass, every clean pass and TAEHV counted: real
runs stay below.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from bench.report import now, write
from selfforcing_core.config import NETWORK_SIZES
from selfforcing_core.geometry import VideoGeometry
from selfforcing_core.roofline.device import CARDS
from selfforcing_core.roofline.meter import Recipe

CARDS_AT_HOME = ("rtx-4090", "rtx-5090", "h100")  # what the table in the README has columns for
CASES = (  # model, width, height, frames, window in latent frames (-1: all), bytes of a weight
    ("t2v-1.3b", 480, 288, 81, -1, 2),
    ("t2v-1.3b", 832, 480, 81, -1, 2),
    ("t2v-1.3b", 832, 480, 81, -1, 1),
    ("t2v-1.3b", 832, 480, 81, 9, 2),
    ("t2v-1.3b", 832, 480, 957, 12, 2),
    ("t2v-14b", 832, 480, 81, -1, 2),
    ("t2v-14b", 832, 480, 81, -1, 1),
    ("t2v-14b", 832, 480, 81, 9, 1),
)


def needs(model: str, width: int, height: int, frames: int, window: int, weight_bytes: int) -> dict[str, Any]:
    """Return bytes by what holds them and, for each card, frames per second that no run can exceed."""
    # Chunks of three latent frames, as the published causal models have them.
    size = VideoGeometry(width, height, frames, chunk=3)
    recipe = Recipe(
        NETWORK_SIZES[model],
        size.chunk_lengths,
        size.latent_height,
        size.latent_width,
        window=window,
        weight_bytes=weight_bytes,
        commit_last=True,
    )
    peak = recipe.peak_bytes()
    limits = {name: recipe.limits(CARDS[name].attainable) for name in CARDS_AT_HOME}
    return {
        "model": model,
        "width": width,
        "height": height,
        "frames": frames,
        "window": window,
        "weight_bytes": weight_bytes,
        "gigabytes": {name: round(number / 1e9, 2) for name, number in peak.items()},
        "gigabytes_together": round(sum(peak.values()) / 1e9, 1),
        "fps_at_most": {name: round(limit["fps"], 1) for name, limit in limits.items()},
        "first_frame_seconds_at_least": {
            name: round(limit["first_frame_seconds"], 2) for name, limit in limits.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.needs", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write it to this file")
    args = parser.parse_args(argv)
    report = {
        "command": "python -m bench.needs",
        "when": now(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "is": "an estimate in closed form; no card was used",
        "cases": [needs(*case) for case in CASES],
    }
    print(write(report, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
