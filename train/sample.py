"""Videos by what a run has trained so far: its export, sampled by the core's command line.

python -m train.sample logdir=runs/dmd prompts=prompts.txt taehv=taew2_1.safetensors out=videos
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfforcing_core.generate import generate_all
from selfforcing_core.geometry import SPATIAL_FACTOR, latent_frames, pixel_frames
from selfforcing_core.plan import Request, Take
from selfforcing_core.prompts import output_name
from train.args import DmdArgs, mistake, parse
from train.conditions import read_texts
from train.data import ClipDatabase
from train.export import AnyArgs, ExportArgs, export, read_run


@dataclass
class SampleArgs:
    """Which run, what to make of it, and how."""

    logdir: str = ""  # folder of the run
    step: int = 0  # 0: the newest checkpoint
    weights: str = "auto"  # ema, raw, or auto: the average where there is one
    prompts: str = ""  # text file, one prompt per line, or a folder of text files; empty: the run's own
    count: int = 4  # of them; 0: all
    out: str = ""  # folder; empty: samples below logdir
    taehv: str = ""  # a bundle's name or a file; or
    vae: str = ""  # Wan's own
    image: str = ""  # for image-to-video students
    clip: str = ""
    frames: int = 0  # pixel frames; 0: as in training
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    overwrite: bool = False


def sample(args: SampleArgs) -> list[dict[str, Any]]:
    """Make the videos; returns what is measured of each. Raises ValueError for whatever cannot work."""
    if not args.logdir or not (args.taehv or args.vae):
        raise ValueError("give logdir=FOLDER of the run, and taehv=... or vae=... to decode with")
    run = read_run(Path(args.logdir))
    prompts = args.prompts or (run.prompts if isinstance(run, DmdArgs) else "")
    if not prompts:
        raise ValueError("the run has no file of prompts; give prompts=FILE")
    texts = read_texts(prompts)[: args.count or None]
    folder = Path(args.out or Path(args.logdir) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "student.safetensors"
        export(ExportArgs(args.logdir, str(model), args.step, args.weights, dtype="float32"))
        takes = [Take(text, text, (folder / output_name(n, text, 0),)) for n, text in enumerate(texts)]
        return generate_all(_request(args, run, model, takes[0]), takes, show_progress=True)


def _request(args: SampleArgs, run: AnyArgs, model: Path, take: Take) -> Request:
    width, height, frames = _size(run)
    frames = args.frames or frames
    return Request(
        prompt=take.prompt, out=take.outs[0], model=str(model), text_encoder=run.text_encoder,
        taehv=args.taehv or None, vae=_path(args.vae), image=_path(args.image), clip=_path(args.clip), width=width,
        height=height, frames=frames, chunk=None if run.chunk else latent_frames(frames), seed=args.seed,
        device=args.device, dtype=args.dtype, overwrite=args.overwrite,
    )  # fmt: skip


def _size(run: AnyArgs) -> tuple[int, int, int]:
    """Width, height and frames of the training's clips."""
    if isinstance(run, DmdArgs):
        return run.width, run.height, pixel_frames(run.latent_frames)
    _, frames, _, height, width = ClipDatabase(run.data)[0].latents_STCHW.shape
    return width * SPATIAL_FACTOR, height * SPATIAL_FACTOR, pixel_frames(frames)


def _path(name: str) -> Path | None:
    return Path(name) if name else None


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        for made in sample(parse(SampleArgs, argv, __doc__)):
            print(made["out"])
    except ValueError as error:
        return mistake("train.sample", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
