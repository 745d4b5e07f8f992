"""Command line: `generate` makes videos, `inspect` and `convert` understand checkpoints, `download` fetches them.

A mistake of the user's is one line on stderr and exit status 2, and nothing is written. So is a lack of memory; by
then earlier videos of a prompt file are there. No file is ever there by half.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .atomic import print_result
from .catalogue import DOWNLOADS
from .prompt_schedule import HISTORIES
from .versions import CORE, refusal

USER_ERROR = 2
INTERRUPTED = 130
# what torch says where memory ends, on CUDA and MPS, and on CPUs under Linux and Windows
MEMORY_ENDED = ("out of memory", "can't allocate memory", "not enough memory", "storage size calculation overflowed")
FEWER_PROGRAMS = "end other programs, or use a machine with more of it"
MODEL_NAMES = "a bundle's name, that of a download in models/, or a checkpoint"
SMALLER = "try --fp8, --cache-dtype int8, a smaller --window, --width and --height, or --batch 1"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it; of torchrun's processes only the first speaks."""

    def print_help(self, file: Any = None) -> None:
        if _is_first():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {' '.join(message.split())}\n" if _is_first() else None)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if reason := refusal("the command line needs", CORE):
        print(f"selfforcing: {reason}", file=sys.stderr)
        return USER_ERROR
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print("selfforcing: " + " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not _is_memory_ended(error):
            raise
        print(f"selfforcing: there is not enough memory; {options.to_save_memory}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("selfforcing: stopped; what was not complete was not written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _is_memory_ended(error: RuntimeError | MemoryError) -> bool:
    import torch

    is_torchs = any(words in str(error).lower() for words in MEMORY_ENDED)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_torchs


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m selfforcing_core", description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_generate(commands.add_parser("generate", help="make videos from prompts"))

    look = commands.add_parser("inspect", help="say as JSON what a checkpoint is")
    look.set_defaults(run=_inspect, to_save_memory=FEWER_PROGRAMS)
    look.add_argument("file", help=f"{MODEL_NAMES}, index of shards, or folder")
    _add_convert(commands.add_parser("convert", help="write a checkpoint in another layout"))

    fetch = commands.add_parser("download", help="fetch released weights by name")
    fetch.set_defaults(run=_download, to_save_memory=FEWER_PROGRAMS)
    fetch.add_argument("name", nargs="?", help="one of those that --list names")
    fetch.add_argument("--list", action="store_true", help="name what can be fetched, with licence and source")
    fetch.add_argument("--sizes", action="store_true", help="with --list: ask the hub for sizes")
    fetch.add_argument("--to", type=Path, default=DOWNLOADS, help="folder to put NAME/ into (default: models)")
    return parser


def _add_generate(make: argparse.ArgumentParser) -> None:
    make.set_defaults(run=_generate, to_save_memory=SMALLER)
    say = "(default: what the checkpoint says)"

    what = make.add_argument_group("what to show")
    what.add_argument(
        "--prompt", help="what the video shows; '0s: a red square; 3s: a blue circle' changes it on the way"
    )
    what.add_argument(
        "--history", choices=HISTORIES, default="recode",
        help="where the prompt changes: write the frames so far into the cache again under the new one, or keep them "
        "(default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--prompt-file", type=Path, help="one prompt per line; split over the processes of torchrun")
    what.add_argument("--extended-prompt-file", type=Path, help="longer prompts, line by line, for the model to read")
    what.add_argument(
        "--extend-prompt", nargs="?", const="", metavar="MODEL",
        help="let a language model write a longer prompt: folder of a chat model, or address of an OpenAI-compatible "
        "server (its key from OPENAI_API_KEY)",
    )  # fmt: skip
    what.add_argument("--extend-prompt-name", help="which model behind that address")
    what.add_argument("--negative", default="", help="what to keep away from, with --cfg")
    what.add_argument("--image", type=Path, help="picture that is the first frame")
    what.add_argument("--extend", type=Path, help="video, or file of --latents, that goes on for --frames more")
    what.add_argument("--frames", type=int, help="length in video frames (default: as trained, if known; else 81)")
    what.add_argument("--width", type=int, help="in pixels (default: the bundle's; 832 for Wan)")
    what.add_argument("--height", type=int, help="in pixels (default: the bundle's; 480 for Wan)")
    what.add_argument("--seed", type=int, default=0, help="equal seeds give equal videos (default: 0)")
    what.add_argument("--samples", type=int, default=1, help="videos per prompt (default: 1)")
    what.add_argument("--batch", type=int, default=1, help="how many of them are computed together (default: 1)")

    files = make.add_argument_group("files to write")
    files.add_argument(
        "--out",
        required=True,
        type=Path,
        help="video file (.mp4, .mov, .mkv; .webp and .gif loop, without sound); a folder for several videos",
    )
    files.add_argument(
        "--codec",
        help="h264, h265, av1, prores (10 bit, .mov), ffv1 (lossless, .mkv), webp, gif (256 colours a frame) "
        "(default: h264; in .webp and .gif their own)",
    )
    files.add_argument(
        "--quality", type=int,
        help="crf of h264 (1 best to 51, default 18), h265 (1 to 51, 21) and av1 (1 to 63, 25); of webp 0 to 100 "
        "(best, 85); of prores 0 proxy to 3 HQ (3); ffv1 and gif have none",
    )  # fmt: skip
    files.add_argument(
        "--audio", type=Path, help="file whose sound the video gets, from its beginning on, cut at the video's end"
    )
    files.add_argument("--sheet", type=Path, help="also write a contact sheet of the frames (PNG)")
    files.add_argument("--latents", type=Path, help="also keep the latents (safetensors), for --extend")
    files.add_argument("--overwrite", action="store_true", help="replace files that exist")
    files.add_argument("--fps", type=float, default=16, help="frames per second of the file (default: 16)")

    models = make.add_argument_group("models")
    models.add_argument("--model", default="tiny", help=f"{MODEL_NAMES} (default: tiny)")
    models.add_argument("--weights", default="auto", choices=["auto", "ema", "raw"], help="of a training file")
    models.add_argument("--taehv", help="bundle or file of the tiny autoencoder (default: the model's bundle)")
    models.add_argument("--taehv-latents", help="whose latents the TAEHV decodes, if its file does not say")
    models.add_argument("--vae", type=Path, help="file or diffusers folder of the Wan VAE")
    models.add_argument("--decoder", help="taehv or vae (default: taehv, or vae if only that is given)")
    models.add_argument("--clip", type=Path, help="image encoder, for image-to-video models")
    models.add_argument("--text-encoder", help="bundle, folder or UMT5 file (default: the model's bundle)")

    how = make.add_argument_group("how to sample")
    how.add_argument("--chunk", type=int, help=f"latent frames denoised together {say}")
    how.add_argument("--window", type=int, help=f"latent frames a chunk sees, itself included; -1: all {say}")
    how.add_argument("--sink", type=int, help=f"first latent frames that stay visible for ever {say}")
    how.add_argument(
        "--cache-source",
        help=f"clean: a pass writes each finished chunk into the cache; last_step: its last step's is kept {say}",
    )
    how.add_argument("--steps", type=_steps, help=f"timesteps, for instance 1000,750,500,250, or their number {say}")
    how.add_argument("--shift", type=float, help=f"flow-matching shift of the steps {say}")
    how.add_argument("--solver", help=f"renoise (few steps), euler or unipc (many) {say}")
    how.add_argument(
        "--cfg", type=float,
        help="classifier-free guidance; 1 is none (default: what the checkpoint says; 1 where it says nothing)",
    )  # fmt: skip

    where = make.add_argument_group("where to compute")
    where.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu; or mps (default: auto)")
    where.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16 (default: float32 on a CPU, else the stored one of 16 bits, else bfloat16)",
    )
    where.add_argument(
        "--attention", default="auto",
        help="auto, math, flash, efficient, cudnn, or measured: the fastest of them here (default: auto)",
    )  # fmt: skip
    where.add_argument(
        "--cache-dtype",
        help="number type of the KV cache: float32, bfloat16, float16, float8_e4m3fn, int8 (default: the model's)",
    )
    where.add_argument(
        "--compile", action="store_true", help="compile the model's blocks; the first chunk waits for it"
    )
    where.add_argument("--fp8", action="store_true", help="keep the model's weights in 8 bits")
    where.add_argument("--threads", type=int, help="CPU threads to compute with (default: torch's choice)")
    where.add_argument(
        "--embeddings",
        type=Path,
        metavar="FOLDER",
        help="keep the prompts' embeddings there; known ones are read again",
    )
    where.add_argument(
        "--roofline", action="store_true",
        help="measure the device for two seconds; say what it can reach and what share of that the run did reach",
    )  # fmt: skip
    where.add_argument("--json", action="store_true", help="print the measurements as one JSON object per video")


def _add_convert(turn: argparse.ArgumentParser) -> None:
    turn.set_defaults(run=_convert, to_save_memory=FEWER_PROGRAMS)
    turn.add_argument("source", help=f"{MODEL_NAMES}, index of shards, or folder")
    turn.add_argument("out", type=Path, help=".safetensors, .pt, or a new folder of shards")
    turn.add_argument(
        "--dialect", help="names to write: wan, comfyui, comfyui-diffusion-model, self-forcing, diffusers"
    )
    turn.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    which = turn.add_mutually_exclusive_group()
    which.add_argument("--ema", dest="weights", action="store_const", const="ema", help="the averaged weights")
    which.add_argument("--raw", dest="weights", action="store_const", const="raw", help="the last weights")
    kind = turn.add_mutually_exclusive_group()
    kind.add_argument("--causal", action="store_true", default=None, help="it generates chunk by chunk")
    kind.add_argument("--bidirectional", dest="causal", action="store_false", help="it denoises whole videos")
    turn.add_argument("--latent-space", help="whose latents a TAEHV decodes, for instance wan2.1")
    turn.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def _steps(text: str) -> tuple[float, ...] | int:
    """A list of timesteps; a single number below 1000 without a point is how many there are."""
    if text.isdecimal() and int(text) < 1000:
        return int(text)
    return tuple(float(part) for part in text.split(","))


def _generate(options: argparse.Namespace) -> None:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads {options.threads} is not a number of threads; use 1 or more")
    import torch

    from .generate import Request, generate_all

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    takes = _takes(options)
    if not takes:  # more processes than prompts
        return
    chosen = {item.name: getattr(options, item.name) for item in fields(Request) if item.name != "prompt"}
    chosen["device"] = _own_device(options.device, os.environ)
    request = Request(prompt=takes[0].prompt, **chosen)
    with _new_folder(options.out) if takes[0].outs[0] != options.out else nullcontext():
        measurements = generate_all(request, takes, rewrite=_rewriter(options), show_progress=True)
    for measured in measurements:
        print_result(json.dumps(measured) if options.json else _in_words(measured))


def _own_device(device: str, environment: Mapping[str, str]) -> str:
    """The device of this process: under torchrun each has its own of the machine's cards."""
    import torch

    is_card = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return f"cuda:{environment['LOCAL_RANK']}" if is_card and "LOCAL_RANK" in environment else device


def _rewriter(options: argparse.Namespace) -> Callable[[list[str]], list[str]] | None:
    """What lets a language model write the prompts, if one is asked for."""
    if options.extend_prompt is None:
        return None
    from .prompts import extend_prompts

    key = os.environ.get("OPENAI_API_KEY")
    return partial(extend_prompts, model=options.extend_prompt, name=options.extend_prompt_name, key=key)


def _takes(options: argparse.Namespace) -> list[Any]:
    """What this process is to generate. Several videos go into a folder, under names made from their prompts."""
    from .generate import Take
    from .prompts import output_name, read_extended, read_prompts
    from .video_formats import usual_ending

    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file")
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} is not a number of videos; use 1 or more")
    prompts = [options.prompt] if options.prompt_file is None else read_prompts(options.prompt_file)
    if options.extended_prompt_file is not None and options.extend_prompt is not None:
        raise ValueError("--extended-prompt-file and --extend-prompt both give longer prompts; use one of them")
    texts = prompts if options.extended_prompt_file is None else read_extended(options.extended_prompt_file, prompts)
    if options.prompt_file is None and options.samples == 1:
        outs = [[options.out]]
    else:
        if options.out.suffix:
            raise ValueError(f"{options.out}: several videos need a folder; give a name without an ending")
        ending = usual_ending(options.codec)
        outs = [
            [options.out / output_name(index, prompt, sample, ending) for sample in range(options.samples)]
            for index, prompt in enumerate(prompts)
        ]
    mine = slice(int(os.environ.get("RANK", "0")), None, int(os.environ.get("WORLD_SIZE", "1")))
    takes = []
    for prompt, text, files in list(zip(prompts, texts, outs))[mine]:
        for first in range(0, len(files), options.batch):
            takes.append(Take(prompt, text, tuple(files[first : first + options.batch]), first))
    return takes


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """A folder to write into. If it was not there before and nothing came into it, it goes again."""
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror}); choose a folder that is writable") from error
    try:
        yield
    finally:
        if is_new and not any(folder.iterdir()):
            with suppress(OSError):  # another process may use it
                folder.rmdir()


def _in_words(measured: dict[str, Any]) -> str:
    limit = ""
    if "roofline" in measured:
        reached = measured["roofline"]
        limit = f"\n{reached['share_of_limit']:.0%} of this device's limit of {reached['fps']:.3g} FPS: " + ", ".join(
            f"{name.replace('_', ' ')} {share:.0%}" for name, share in reached["time_by_group"].items()
        )
    return (
        f"{measured['out']}: {measured['frames']} frames of {measured['width']}x{measured['height']}\n"
        f"first frame after {measured['seconds_to_first_frame']:.2f} s, "
        f"{measured['seconds_per_chunk']:.2f} s per chunk, "
        f"{measured['generated_fps']:.1f} FPS ({measured['generated_fps_includes']}: "
        f"{measured['seconds_loading']:.2f} s and {measured['seconds_writing']:.2f} s){limit}"
    )


def _inspect(options: argparse.Namespace) -> None:
    from .checkpoint import inspect_checkpoint
    from .hub import resolve_model

    print_result(json.dumps(inspect_checkpoint(resolve_model(options.file)), indent=2))


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert

    told = convert(
        options.source, options.out, dialect=options.dialect, dtype=options.dtype, weights=options.weights or "auto",
        causal=options.causal, latent_space=options.latent_space, overwrite=options.overwrite,
    )  # fmt: skip
    print_result(json.dumps(told, indent=2))


def _download(options: argparse.Namespace) -> None:
    from .catalogue import download, listed

    if options.list:
        for row in listed(with_sizes=options.sizes):
            size = f"  {row['bytes'] / 1e9:.2f} GB" if row.get("bytes") else ""
            print_result(f"{row['name']:26}{row['what']}{size}\n{'':26}{row['licence']}, {row['source']}")
        return
    if not options.name:
        raise ValueError("name what to fetch; --list shows what there is")
    for path in download(options.name, options.to):
        print_result(str(path))
