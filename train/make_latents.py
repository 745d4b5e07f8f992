"""Videos to latents of Wan's VAE: a folder of videos to .pt files {prompt: latents}, for `train.make_lmdb`.

    torchrun --nproc-per-node 8 -m train.make_latents --input_video_folder videos --output_latent_folder latents \\
        --prompt_folder prompts --vae Wan2.1_VAE.pth

The prompt of videos/x.mp4 is that of prompts/x.txt; its latents become latents/x.pt. The first frames of a video,
upright and at --fps, are scaled to cover the size and trimmed evenly. What was changed is named, so are cuts. What is
there already is not made again, so the same command goes on after a stop. Whatever is left out is named and counted.

Letters: V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from selfforcing_core.atomic import make_folder, print_result, replacing
from selfforcing_core.codecs.image import fit_image
from selfforcing_core.codecs.video_reader import TRAINED_FPS, Findings, VideoReader
from selfforcing_core.codecs.wan_vae import WanVAE, load_wan_vae
from selfforcing_core.generate.cli import Parser
from selfforcing_core.generate.plan import LEAST_FPS, MOST_FPS
from selfforcing_core.generate.prompt_files import read_one
from selfforcing_core.geometry import VideoGeometry
from train.args import mistake

log = logging.getLogger(__name__)
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
DTYPES = ("bfloat16", "float32")


def first_frames(path: Path, geometry: VideoGeometry, fps: float = TRAINED_FPS) -> tuple[Tensor, Findings]:
    """Return the first frames of a video at `fps` in the clips' size, [V, R, H, W] in [0, 1], and what was changed.

    Raises ValueError if it is too short.
    """
    reader, frames = VideoReader(path, fps), []
    findings = reader.findings()
    for picture in reader.iter_frames(0, geometry.frames, findings):
        frames.append(fit_image(picture, geometry.width, geometry.height))
    if len(frames) < geometry.frames:
        raise ValueError(f"{path}: has {len(frames)} frames at {fps:g} fps, clips take {geometry.frames}")
    return torch.stack(frames), findings


def prompt_of(video: Path, prompts: Path) -> str:
    """Read the prompt beside a video. Raises ValueError if there is none."""
    path = prompts / f"{video.stem}.txt"
    if not path.is_file():
        raise ValueError(f"{video}: has no prompt; {path} is missing")
    text = read_one(path)
    if not text:
        raise ValueError(f"{video}: has no prompt; {path} is empty")
    return text


def encode(
    videos: list[Path],
    prompts: Path,
    out: Path,
    vae: WanVAE,
    geometry: VideoGeometry,
    fps: float = TRAINED_FPS,
    skip_cuts: bool = False,
) -> dict[str, int]:
    """Write the latents of these videos; return how many were written, there already, left out, and have cuts."""
    counts, num_with_sound = {"written": 0, "there": 0, "left_out": 0, "with_cuts": 0}, 0
    for video in tqdm(videos, ascii=True):  # a video that cannot be used is left out, not the run ended
        target = out / f"{video.stem}.pt"
        if target.is_file():
            counts["there"] += 1
            continue
        try:
            prompt = prompt_of(video, prompts)
            frames, findings = first_frames(video, geometry, fps)
            for note in findings.in_words():
                log.warning("%s: %s", video, note)
            counts["with_cuts"] += bool(findings.cuts)
            # A model learns a cut as motion; some databases are of cut films, so that the user decides.
            if skip_cuts and findings.cuts:
                raise ValueError(f"{video}: has cuts, which skip_cuts leaves out")
            latents = vae.encode(frames[None])
            if not latents.isfinite().all():
                raise ValueError(f"{video}: has latents with NaN or Inf; encode in float32")
        except ValueError as error:
            log.warning("%s; left out", error)
            counts["left_out"] += 1
            continue
        make_folder(out)
        # Renamed when it is whole, since the next start takes whatever has this name for done.
        with replacing(target, overwrite=True) as temporary:
            torch.save({prompt: latents.float().cpu()}, temporary)  # the layout that the reference's scripts read
        counts["written"] += 1
        num_with_sound += findings.sound is not None
    if num_with_sound:
        log.warning("latents hold no sound; that of %d videos is not in them", num_with_sound)
    return counts


def _own_device(name: str) -> str:
    """Return this process's own device; torchrun numbers the processes of a machine in LOCAL_RANK."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(prog="python -m train.make_latents", description=str(__doc__).splitlines()[0])
    parser.add_argument("--input_video_folder", type=Path, required=True)
    parser.add_argument("--output_latent_folder", type=Path, required=True)
    parser.add_argument("--prompt_folder", type=Path, required=True, help="one .txt per video, of the same name")
    parser.add_argument("--vae", type=Path, required=True, help="Wan2.1_VAE.pth, its safetensors, or diffusers' folder")
    parser.add_argument("--width", type=int, default=832, help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="of a clip (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=TRAINED_FPS, help="rate of a clip's frames (default: %(default)s)")
    parser.add_argument("--skip_cuts", action="store_true", help="leave out clips that are cut; else they are named")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the VAE (default: bfloat16 on cuda, else float32)")
    options = parser.parse_args(argv)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if not LEAST_FPS <= options.fps <= MOST_FPS:
            raise ValueError(
                f"fps {options.fps} is not a rate between {LEAST_FPS} and {MOST_FPS}; models are trained at 16"
            )
        # Chunks of 1: any whole number of latent frames will do here, and a stage cuts them as it likes.
        geometry = VideoGeometry(options.width, options.height, options.frames, chunk=1)
        videos = sorted(path for path in options.input_video_folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if not videos:
            raise ValueError(f"{options.input_video_folder}: holds no video ({', '.join(SUFFIXES)})")
        device = _own_device(options.device)
        dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        vae = load_wan_vae(options.vae, dtype=getattr(torch, dtype), device=device)
        share = videos[rank::size]  # processes need not meet: each video is a file of its own
        latents = options.output_latent_folder
        counts = encode(share, options.prompt_folder, latents, vae, geometry, options.fps, options.skip_cuts)
        print_result(json.dumps({**({"process": rank} if size > 1 else {}), **counts}))
    except (ValueError, OSError) as error:
        return mistake("train.make_latents", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
