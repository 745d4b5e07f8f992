"""Command line: `generate` makes a video from a prompt, `inspect` says what a checkpoint is.

A mistake of the user's is one line on stderr and exit status 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print("selfforcing: " + " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("selfforcing: stopped, nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m selfforcing_core", description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    make = commands.add_parser("generate", help="make a video from a prompt")
    make.set_defaults(run=_generate)
    make.add_argument("--prompt", required=True, help="what the video shows")
    make.add_argument("--out", required=True, type=Path, help="video file to write (.mp4, .mov or .mkv)")
    make.add_argument("--sheet", type=Path, help="also write a contact sheet of the frames (PNG)")
    make.add_argument("--overwrite", action="store_true", help="replace files that exist")
    make.add_argument("--model", default="tiny", help="a bundle's name or a checkpoint file (default: tiny)")
    make.add_argument("--taehv", help="bundle or file of the tiny autoencoder (default: the model's bundle)")
    make.add_argument("--text-encoder", help="bundle or folder of the text encoder (default: the model's bundle)")
    make.add_argument("--frames", type=int, help="length in video frames (default: the bundle's; 81 for Wan)")
    make.add_argument("--width", type=int, help="in pixels (default: the bundle's; 832 for Wan)")
    make.add_argument("--height", type=int, help="in pixels (default: the bundle's; 480 for Wan)")
    make.add_argument("--fps", type=float, default=16, help="frames per second of the file (default: 16)")
    make.add_argument("--seed", type=int, default=0, help="equal seeds give equal videos (default: 0)")
    say = "(default: what the checkpoint says)"
    make.add_argument("--chunk", type=int, help=f"latent frames denoised together {say}")
    make.add_argument("--window", type=int, help=f"latent frames a chunk sees, itself included; -1: all {say}")
    make.add_argument("--sink", type=int, help=f"first latent frames that stay visible for ever {say}")
    make.add_argument("--steps", type=_numbers, help=f"timesteps, for instance 1000,750,500,250 {say}")
    make.add_argument("--shift", type=float, help=f"flow-matching shift of the steps {say}")
    make.add_argument("--device", default="cpu", help="where to compute, for instance cuda (default: cpu)")
    make.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the stored one)")
    make.add_argument("--threads", type=int, help="CPU threads to compute with (default: torch's choice)")
    make.add_argument("--json", action="store_true", help="print the measurements as one JSON object")

    look = commands.add_parser("inspect", help="say as JSON what a checkpoint file is")
    look.set_defaults(run=_inspect)
    look.add_argument("file", type=Path)
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _generate(options: argparse.Namespace) -> None:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads {options.threads} is not a number of threads; use 1 or more")
    import torch

    from .generate import Request, generate

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    request = Request(**{name.name: getattr(options, name.name) for name in fields(Request)})
    measured = generate(request, show_progress=True)
    print(json.dumps(measured) if options.json else _in_words(measured))


def _in_words(measured: dict[str, Any]) -> str:
    return (
        f"{measured['out']}: {measured['frames']} frames of {measured['width']}x{measured['height']}\n"
        f"first frame after {measured['seconds_to_first_frame']:.2f} s, "
        f"{measured['seconds_per_chunk']:.2f} s per chunk, "
        f"{measured['generated_fps']:.1f} FPS ({measured['generated_fps_includes']}: "
        f"{measured['seconds_loading']:.2f} s and {measured['seconds_writing']:.2f} s)"
    )


def _inspect(options: argparse.Namespace) -> None:
    from .checkpoint import inspect_checkpoint

    print(json.dumps(inspect_checkpoint(options.file), indent=2))
