"""Videos by what a run has trained so far: its export, sampled by the core's command line.

python -m train.sample logdir=runs/dmd prompts=prompts.txt taehv=taew2_1.safetensors out=videos

What is not set is as in the run: device and number type, chunks, steps and guidance, the decoder and the prompts of its
validation videos, pictures of its database. Prompt n begins with the noise that it has in the validation videos.

Letters: R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from selfforcing_core.atomic import make_folder, print_result
from selfforcing_core.config import WanConfig
from selfforcing_core.generate.plan import CACHE_DTYPES
from selfforcing_core.generate.prompt_files import output_name
from selfforcing_core.generate.request import PromptBatch, Request
from selfforcing_core.generate.run import generate_all
from selfforcing_core.geometry import SPATIAL_FACTOR, pixel_frames
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import DTYPES
from train.args import DmdArgs, OdeArgs, mistake, parse
from train.conditions import read_texts
from train.data import ClipDatabase, Row
from train.export import AnyArgs, ExportArgs, export, read_run
from train.networks import read_network

log = logging.getLogger(__name__)
# The core's command line calls some settings otherwise than training does.
KEYS = {
    "cfg": "guidance",
    "negative": "negative_prompt",
    "taehv_latents": "latent_space",
    "warp_steps": "warp",
    "no_warp_steps": "warp",
}
# What may follow a flag in a message.
VALUE = "|".join(("-?[0-9](?:[0-9.,e+-]*[0-9])?", "nan", "-?inf", *CACHE_DTYPES, "taehv", "vae"))
ROOM = 1.02  # of a file's tensors: its header, and what else is written meanwhile


@dataclass
class SampleArgs:
    """Which run, what to make of it, and how."""

    logdir: str = ""  # folder of the run
    step: int = 0  # 0: the newest checkpoint
    weights: str = "auto"  # ema, raw, or auto: the average where there is one
    prompts: str = ""  # text file, one prompt per line, or a folder of text files; empty: the run's own
    count: int = 4  # of them; 0: all
    out: str = ""  # folder; empty: samples below logdir
    taehv: str = ""  # a bundle's name or a file; empty: the run's decoder, unless vae is given
    latent_space: str = ""  # whose latents the taehv decodes, for instance wan2.1, where its file does not say
    vae: str = ""  # Wan's own; also reads the picture of image-to-video students (empty: the run's)
    decoder: str = ""  # taehv or vae; empty: taehv where there is one
    text_encoder: str = ""  # empty: the run's
    image: str = ""  # first frame; empty: for image-to-video students the pictures of the run's database
    clip: str = ""  # image encoder, for image-to-video students; empty: the run's

    # how; what is not set here is as the run says
    width: int = 0  # pixels; 0: as in training
    height: int = 0
    frames: int = 0  # pixel frames; 0: as in training
    seed: int = -1  # -1: the run's
    chunk: int = 0  # latent frames; 0: as in training
    window: int = 0  # latent frames, -1: no limit; 0: as in training
    sink: int = -1  # latent frames; -1: as in training
    cache_source: str = ""  # clean or last_step
    steps: list[float] = field(default_factory=list)  # timesteps, for instance [1000,750,500,250]
    sampling_steps: int = 0  # in place of steps: their number, evenly spaced
    first_chunk_steps: list[float] = field(default_factory=list)  # of the chunk that begins the video
    warp: bool | None = None  # steps go through the shift; false: they are the timesteps themselves
    shift: float = 0.0  # 0: as in training
    solver: str = ""  # renoise, euler or unipc
    guidance: float = 0.0  # usual meaning: 1 is none; 0: as in training
    negative_prompt: str = ""  # what to keep away from, with guidance; empty: the run's

    device: str = "auto"  # auto: the run's, where it is here
    dtype: str = "auto"  # auto: the run's on GPUs, float32 on a CPU
    attention: str = "auto"
    cache_dtype: str = ""  # number type of the KV cache; empty: that of the computation
    fp8: bool = False  # keep the network's weights in 8 bits
    overwrite: bool = False


@dataclass(frozen=True)
class _Example:
    text: str
    image_RHW: Tensor | None = None  # in [-1, 1]


def sample(args: SampleArgs) -> list[dict[str, Any]]:
    """Make the videos and return the metrics of each. Raises ValueError for whatever cannot work."""
    if not args.logdir:
        raise ValueError("give logdir=FOLDER of the run")
    run = read_run(Path(args.logdir))
    if not (args.taehv or args.vae or run.decoder):
        raise ValueError("the run names no decoder; give taehv=... or vae=... to decode with")
    if isinstance(run, DmdArgs) and run.first_frame != "generated" and not args.image:
        raise ValueError("the run's student was trained on given first frames; give image=FILE")
    config = read_network(run.student if isinstance(run, DmdArgs) else run.network, run.weights).config
    assert isinstance(config, WanConfig)
    examples = _examples(args, run, is_i2v=config.model_type == "i2v")
    with _in_keys():
        request = _request(args, run)
        run_dtype = "bfloat16" if run.dtype == "bfloat16" else "float32"
        dtype = run_dtype if args.dtype == "auto" else args.dtype
        size = sum(math.prod(shape) for shape in wan_shapes(config).values()) * _itemsize(dtype)
        folder = Path(args.out or Path(args.logdir) / "samples")
        make_folder(folder)
        with tempfile.TemporaryDirectory(prefix=".sample-", dir=_room(size, Path(args.logdir))) as temporary:
            model = Path(temporary) / "student.safetensors"
            export(ExportArgs(args.logdir, str(model), args.step, args.weights, dtype=dtype))
            request = replace(request, model=str(model))
            batches = [
                PromptBatch(
                    example.text, example.text, (folder / output_name(number, example.text, 0),), first_row=number
                )
                for number, example in enumerate(examples)
            ]
            if all(example.image_RHW is None for example in examples):
                return generate_all(request, batches, show_progress=True)
            metrics = []
            for batch, example in zip(batches, examples):  # a request has one picture
                image = _write_image(example, Path(temporary) / "first.png")
                metrics += generate_all(replace(request, image=image), [batch], show_progress=True)
            return metrics


def _request(args: SampleArgs, run: AnyArgs) -> Request:
    """Build the request without its model, prompt and pictures."""
    width, height, frames = _size(args, run)
    is_dmd = isinstance(run, DmdArgs)  # the other stages have neither VAE nor CLIP
    is_run_decoder = not args.taehv and not args.vae
    taehv = run.decoder if is_run_decoder else args.taehv
    latent_space = args.latent_space or (run.decoder_latent_space if is_run_decoder or taehv == run.decoder else "")
    vae, clip = (args.vae or run.vae, args.clip or run.clip) if is_dmd else (args.vae, args.clip)
    negative = args.negative_prompt or ("" if isinstance(run, OdeArgs) else run.negative_prompt)
    if args.steps and args.sampling_steps:
        raise ValueError("steps and sampling_steps both say which timesteps; give one of them")
    device = _device(args, run)
    return Request(
        prompt="",
        out=Path(),
        text_encoder=args.text_encoder or run.text_encoder,
        taehv=taehv or None,
        taehv_latents=latent_space or None,
        vae=_path(vae),
        decoder=args.decoder or ("taehv" if taehv else "vae"),
        image=_path(args.image),
        clip=_path(clip),
        width=width,
        height=height,
        frames=frames or None,
        seed=run.seed if args.seed == -1 else args.seed,
        # None leaves each of these to the header of the export, which says how the run samples.
        chunk=args.chunk or None,
        window=args.window or None,
        sink=None if args.sink == -1 else args.sink,
        cache_source=args.cache_source or None,
        steps=args.sampling_steps or tuple(args.steps) or None,
        first_chunk_steps=tuple(args.first_chunk_steps) or None,
        warp_steps=args.warp,
        shift=args.shift or None,
        solver=args.solver or None,
        cfg=args.guidance or None,
        negative=negative,
        device=device,
        dtype=_dtype(args, run, device),
        attention=args.attention,
        cache_dtype=args.cache_dtype or None,
        fp8=args.fp8,
        overwrite=args.overwrite,
    )


# ------------------------------------------------------------ as in the run --
def _examples(args: SampleArgs, run: AnyArgs, *, is_i2v: bool) -> list[_Example]:
    """Choose prompts: those that are asked for, of the validation videos, of training; with pictures if need be."""
    if is_i2v and not args.image and (args.prompts or not run.data):
        raise ValueError("an image-to-video student needs a first frame; give image=...")
    # Prompts of the validation videos have no pictures; the database's rows have both.
    file = args.prompts or ("" if is_i2v and not args.image else run.sample_prompts)
    if not file and isinstance(run, DmdArgs) and not run.data:
        file = run.prompts
    if file:
        return [_Example(text) for text in read_texts(file)][: args.count or None]
    if not run.data:
        raise ValueError("the run names neither prompts nor a database; give prompts=FILE")
    data = ClipDatabase(run.data, _image_size(run))
    rows: list[Row] = [data[index] for index in range(min(args.count or len(data), len(data)))]
    if is_i2v and not args.image and any(row.image_RHW is None for row in rows):
        raise ValueError(f"{run.data}: holds rows without pictures; give image=... for the first frame")
    return [_Example(row.prompt, row.image_RHW if is_i2v and not args.image else None) for row in rows]


def _image_size(run: AnyArgs) -> tuple[int, int] | None:
    if isinstance(run, DmdArgs) and run.image_height and run.image_width:
        return run.image_height, run.image_width
    return None


def _write_image(example: _Example, file: Path) -> Path:
    """Write the picture of a database's row to a file."""
    assert example.image_RHW is not None
    pixels = ((example.image_RHW + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    return file


def _size(args: SampleArgs, run: AnyArgs) -> tuple[int, int, int]:
    """Return width, height and frames: those that are asked for, else those of the training's clips."""
    if all((args.width, args.height, args.frames)):
        return args.width, args.height, args.frames
    if isinstance(run, DmdArgs):
        width, height, frames = run.width, run.height, run.latent_frames
    else:
        _, frames, _, height, width = ClipDatabase(run.data).shape
        width, height = width * SPATIAL_FACTOR, height * SPATIAL_FACTOR
    return args.width or width, args.height or height, args.frames or pixel_frames(run.sample_frames or frames)


def _device(args: SampleArgs, run: AnyArgs) -> str:
    device = args.device if args.device != "auto" else run.device
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if args.device == "auto" and device.startswith("cuda") and not has_cuda:
        log.warning("the run's device %s is not here; device=cpu is used", device)
        return "cpu"
    return device


def _dtype(args: SampleArgs, run: AnyArgs, device: str) -> str:
    if args.dtype != "auto":
        return args.dtype
    # Many CPUs only emulate bfloat16, and are slower with it.
    return "bfloat16" if run.dtype == "bfloat16" and device != "cpu" else "float32"


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is no type to compute in; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype].itemsize


def _room(size: int, logdir: Path) -> Path:
    """Choose a folder with room for `size` bytes: $TMPDIR where it is set, else the run's own.

    Not the machine's usual folder for temporary files, which often lies in memory. Raises ValueError without room.
    """
    folder = Path(os.environ.get("TMPDIR") or logdir)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); set TMPDIR to another folder") from error
    if free < size * ROOM:
        raise ValueError(
            f"{folder}: has {free / 1e9:.1f} GB free, the weights to sample with take {size * ROOM / 1e9:.1f} GB for a "
            "while; set TMPDIR to a folder with more room"
        )
    return folder


def _path(name: str) -> Path | None:
    return Path(name) if name else None


# ----------------------------------------------------------------- messages --
def in_keys(text: str) -> str:
    """Translate what the core says of its flags to settings of this command: "--cfg 5" becomes "guidance=5"."""

    def setting(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return f"{KEYS.get(name, name)}={flag[2] or flag[3] or '...'}"

    return re.sub(rf"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?:[ =]({VALUE})\b|=([^\s);]+))?", setting, text)


class _InKeys(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = in_keys(record.getMessage()), ()
        return True


@contextmanager
def _in_keys() -> Iterator[None]:
    """Let the core speak of settings as this command line takes them."""
    logger, rewriting = logging.getLogger("selfforcing_core.generate.plan"), _InKeys()
    logger.addFilter(rewriting)
    try:
        yield
    except ValueError as error:
        raise ValueError(in_keys(str(error))) from error
    finally:
        logger.removeFilter(rewriting)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        for metrics in sample(parse(SampleArgs, argv, __doc__)):
            print_result(str(metrics["out"]))
    except ValueError as error:
        return mistake("train.sample", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
