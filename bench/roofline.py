"""What a video takes at least on known cards: closed form, nothing is run.

    python -m bench.roofline --json --model t2v-1.3b

Every chunk is counted with its clean pass, the last one too, as in the middle of a stream. With --measure the machine
itself is calibrated for two seconds and stands among the cards.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.report import write
from bench.rollout import hardware
from selfforcing_core.config import NETWORK_SIZES
from selfforcing_core.geometry import VideoGeometry
from selfforcing_core.roofline.device import CARDS, Card, measured_card
from selfforcing_core.roofline.meter import Recipe

# "none" is the network alone; the others are counted with it, since they share the card.
DECODERS = ("taehv", "vae", "none")


def recipe(args: argparse.Namespace, decoder: str) -> Recipe:
    """Build what is counted. Raises ValueError naming the nearest sizes for those that do not fit."""
    size = VideoGeometry(args.width, args.height, args.frames, chunk=args.chunk)
    return Recipe(
        NETWORK_SIZES[args.model],
        size.chunk_lengths,
        size.latent_height,
        size.latent_width,
        steps=args.steps,
        window=args.window,
        decoder=decoder,
        commit_last=True,
    )


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Report the arithmetic of every chunk's pass, and what each card could do at most."""
    network = recipe(args, "none")
    passes = [network.a_pass(index) for index in range(len(network.lengths))]
    tflop = [work.flops / 1e12 for work in passes]
    cards: dict[str, Any] = {name: limits(args, card) for name, card in CARDS.items()}
    if args.measure:  # in the type that the machine computes fastest in
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        cards["this machine"] = limits(args, measured_card(device, dtype)) | {"hardware": hardware()}
    last = len(network.lengths) - 1
    return {
        "model": args.model,
        "width": args.width,
        "height": args.height,
        "frames": args.frames,
        "chunk": args.chunk,
        "window": args.window,
        "steps": args.steps,
        "tflop_per_pass": [round(value, 2) for value in tflop],
        "mean_tflop_per_pass": round(statistics.mean(tflop), 2),
        "tflop_of_decode": {
            decoder: round(recipe(args, decoder).decode(last).flops / 1e12, 2) for decoder in DECODERS[:2]
        },
        "cards": cards,
        "attainable_is": "0.8 of the data sheet's FLOP/s and 0.88 of its bytes/s; of this machine, measured",
    }


def limits(args: argparse.Namespace, card: Card) -> dict[str, Any]:
    """Return a card's limits with each decoder, by its data sheet and by what it attains."""
    recipes = {decoder: recipe(args, decoder) for decoder in DECODERS}
    return {
        decoder: {"attainable": counted.limits(card.attainable), "data_sheet": counted.limits(card)}
        for decoder, counted in recipes.items()
    }


def table(figures: dict[str, Any]) -> str:
    """Show frames per second and seconds to the first frame that no run can beat."""
    per_pass = " ".join(f"{value:.2f}" for value in figures["tflop_per_pass"])
    lines = [
        f"{figures['model']}, {figures['width']}x{figures['height']}, {figures['frames']} frames",
        f"TFLOP per pass: {per_pass}, mean {figures['mean_tflop_per_pass']:.2f}",
        f"{'card':14}{'FPS, TAEHV':>12}{'FPS, VAE':>12}{'first frame, TAEHV':>20}",
    ]
    for name, card in figures["cards"].items():
        tiny, whole = card["taehv"]["attainable"], card["vae"]["attainable"]
        lines.append(f"{name:14}{tiny['fps']:12.1f}{whole['fps']:12.1f}{tiny['first_frame_seconds']:18.3f} s")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=sorted(NETWORK_SIZES), default="t2v-1.3b")
    parser.add_argument("--width", type=int, default=832, help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="(default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=3, help="latent frames (default: %(default)s)")
    parser.add_argument("--window", type=int, default=-1, help="latent frames in the cache, -1: all")
    parser.add_argument("--steps", type=int, default=4, help="denoising passes per chunk (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help="calibrate this machine as well, for two seconds")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="also write it to this file")
    args = parser.parse_args(argv)
    try:
        figures = report(args)
    except ValueError as error:
        print(f"bench.roofline: {error}", file=sys.stderr)
        return 2
    text = write(figures, args.out)
    print(text if args.json else table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
