"""Command line: `generate` makes videos, `inspect` and `convert` understand checkpoints, `download`
fetches them, `presets` lists those that were released.

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
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..atomic import print_result
from ..versions import CORE, refusal
from ..weights.download import DOWNLOADS
from .request import GROUPS, LORA_ARGUMENT, LORA_HELP, MODEL_NAMES, PromptBatch, Request

USER_ERROR = 2  # as argparse exits
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# What torch says where memory ends, on CUDA and MPS, and on CPUs under Linux and Windows
MEMORY_ENDED = ("out of memory", "can't allocate memory", "not enough memory", "storage size calculation overflowed")
FEWER_PROGRAMS = "end other programs, or use a machine with more of it"
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
    # On stderr: the standard output holds nothing but what a command gives.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # Before torch is imported: with an older one the import itself may fail, in words that name no remedy.
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
    import torch  # whatever filled the memory has imported it already

    is_torchs = any(words in str(error).lower() for words in MEMORY_ENDED)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_torchs


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m selfforcing_core", description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_generate(commands.add_parser("generate", help="make videos from prompts"))

    look = commands.add_parser("inspect", help="say as JSON what a checkpoint or a LoRA is")
    look.set_defaults(run=_inspect, to_save_memory=FEWER_PROGRAMS)
    look.add_argument("file", help=f"{MODEL_NAMES}, index of shards, folder, or a LoRA")
    look.add_argument("--lora", default=(), help=LORA_HELP, **LORA_ARGUMENT)
    _add_preset(look)
    _add_convert(commands.add_parser("convert", help="write a checkpoint in another layout"))

    table = commands.add_parser("presets", help="list the released checkpoints, and what is missing to run each")
    table.set_defaults(run=_presets, to_save_memory=FEWER_PROGRAMS)
    how = table.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="all numbers, with where each was read")
    how.add_argument("--markdown", action="store_true", help="the table of docs/models.md")

    fetch = commands.add_parser("download", help="fetch released weights by name")
    fetch.set_defaults(run=_download, to_save_memory=FEWER_PROGRAMS)
    fetch.add_argument("name", nargs="?", help="one of those that --list names")
    fetch.add_argument("--list", action="store_true", help="name what can be fetched, with licence and source")
    fetch.add_argument("--sizes", action="store_true", help="with --list: ask the hub for sizes")
    fetch.add_argument("--only", default="", metavar="TEXT", help="part of the name, of a file in several versions")
    fetch.add_argument("--to", type=Path, default=DOWNLOADS, help="folder to put NAME/ into (default: models)")
    return parser


# Options of `generate` that say nothing of a video, by the field of `Request` behind which --help names them.
COMMAND_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "history": {
        "--prompt-file": {"type": Path, "help": "one prompt per line; split over the processes of torchrun"},
        "--extended-prompt-file": {"type": Path, "help": "longer prompts, line by line, for the model to read"},
        "--extend-prompt": {
            "nargs": "?",
            "const": "",
            "metavar": "MODEL",
            "help": "let a language model write a longer prompt: folder of a chat model, or address of an "
            "OpenAI-compatible server (its key from OPENAI_API_KEY)",
        },
        "--extend-prompt-name": {"help": "which model behind that address"},
    },
    "seed": {
        "--samples": {"type": int, "default": 1, "help": "videos per prompt (default: 1)"},
        "--batch": {"type": int, "default": 1, "help": "how many of them are computed together (default: 1)"},
    },
    "fp8": {"--threads": {"type": int, "help": "CPU threads to compute with (default: torch's choice)"}},
    "roofline": {
        "--json": {"action": "store_true", "help": "print the measurements as one JSON object per video"},
    },
}
TYPES = {"int": int, "float": float, "Path": Path}  # of a field's annotation; text needs none


def _add_generate(make: argparse.ArgumentParser) -> None:
    """Give the command every field of `Request` as an option, and what only the command line knows."""
    make.set_defaults(run=_generate, to_save_memory=SMALLER)
    for name in GROUPS:
        group = make.add_argument_group(name)
        for item in (item for item in fields(Request) if item.metadata["group"] == name):
            group.add_argument(f"--{item.name.replace('_', '-')}", **_argument(item))
            for flag, argument in COMMAND_OPTIONS.get(item.name, {}).items():
                group.add_argument(flag, **argument)


def _argument(item: Field[Any]) -> dict[str, Any]:
    """Return what argparse is told of a field: its default and type, and what stands beside it."""
    argument = {} if item.default is MISSING else {"default": item.default}
    annotation = str(item.type).removesuffix(" | None")
    if annotation == "bool":
        argument["action"] = "store_true"
    elif annotation in TYPES:
        argument["type"] = TYPES[annotation]
    return {**argument, **item.metadata["argument"]}


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
    turn.add_argument("--lora", default=(), help=LORA_HELP, **LORA_ARGUMENT)
    _add_preset(turn)
    turn.add_argument("--latent-space", help="whose latents a TAEHV decodes, for instance wan2.1")
    turn.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def _add_preset(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", default="auto", help="released checkpoint that it is, or none (default: auto)")


def _generate(options: argparse.Namespace) -> None:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads {options.threads} is not a number of threads; use 1 or more")
    import torch  # only now, so that neither --help nor a refused option waits for it

    from .run import generate_all

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    batches = _batches(options)
    if not batches:  # more processes than prompts
        return
    values = {item.name: getattr(options, item.name) for item in fields(Request)}
    own = {"prompt": batches[0].prompt, "device": _own_device(options.device, os.environ)}
    request = Request(**{**values, **own})
    with _new_folder(options.out) if batches[0].outs[0] != options.out else nullcontext():
        measurements = generate_all(request, batches, rewrite=_rewriter(options), show_progress=True)
    for measured in measurements:
        print_result(json.dumps(measured) if options.json else _in_words(measured))


def _own_device(device: str, environment: Mapping[str, str]) -> str:
    """Return the device of this process: under torchrun each has its own of the machine's cards."""
    import torch

    is_card = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return f"cuda:{environment['LOCAL_RANK']}" if is_card and "LOCAL_RANK" in environment else device


def _rewriter(options: argparse.Namespace) -> Callable[[list[str]], list[str]] | None:
    """Return what lets a language model write the prompts, if one is asked for."""
    if options.extend_prompt is None:
        return None
    from .prompt_files import extend_prompts

    # Not an option: those stand in the shell's history and in the list of processes.
    key = os.environ.get("OPENAI_API_KEY")
    return partial(extend_prompts, model=options.extend_prompt, name=options.extend_prompt_name, key=key)


def _batches(options: argparse.Namespace) -> list[PromptBatch]:
    """Return what this process is to generate; several videos go into a folder, under names made from their prompts."""
    from ..codecs.video_formats import usual_ending
    from .prompt_files import output_name, read_extended, read_prompts

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
    # By torchrun's numbers every process takes each WORLD_SIZE-th prompt; a plain command is the only process.
    mine = slice(int(os.environ.get("RANK", "0")), None, int(os.environ.get("WORLD_SIZE", "1")))
    batches = []
    for prompt, text, files in list(zip(prompts, texts, outs))[mine]:
        # A sample's noise follows from its row, so that --batch changes no video.
        for first in range(0, len(files), options.batch):
            batches.append(PromptBatch(prompt, text, tuple(files[first : first + options.batch]), first))
    return batches


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder to write into; if it was not there before and nothing came into it, it goes again."""
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a mistyped path should not become a tree
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
        f"{measured['seconds_loading']:.2f} s and {measured['seconds_writing']:.2f} s; with it "
        f"{measured['written_fps']:.1f} FPS){limit}"
    )


def _inspect(options: argparse.Namespace) -> None:
    from ..weights.bundles import resolve_model
    from ..weights.checkpoint import inspect_checkpoint
    from ..weights.checkpoint_header import LORA
    from ..weights.pipeline_folder import inspect_pipeline
    from ..weights.preset_settings import check_lora_choice, inspect_preset

    path = resolve_model(options.file)
    summary = inspect_checkpoint(path, loras=options.lora)
    if summary["kind"] != LORA:
        summary["folder"] = inspect_pipeline(path)
        summary["preset"] = inspect_preset(path, options.preset, loras=options.lora)
    else:
        check_lora_choice(path, options.preset)
    print_result(json.dumps(summary, indent=2))


def _presets(options: argparse.Namespace) -> None:
    from ..weights.preset_list import list_presets, presets_in_words, presets_table

    if options.json:
        print_result(json.dumps(list_presets(), indent=2))
    else:
        print_result(presets_table() if options.markdown else presets_in_words())


def _convert(options: argparse.Namespace) -> None:
    from ..weights.convert import convert

    summary = convert(
        options.source,
        options.out,
        dialect=options.dialect,
        dtype=options.dtype,
        weights=options.weights or "auto",
        preset=options.preset,
        causal=options.causal,
        latent_space=options.latent_space,
        loras=options.lora,
        overwrite=options.overwrite,
    )
    print_result(json.dumps(summary, indent=2))


def _download(options: argparse.Namespace) -> None:
    from ..weights.download import download, list_releases

    if options.list:
        rows = list_releases(with_sizes=options.sizes)
        width = max(len(row["name"]) for row in rows) + 2
        for row in rows:
            size = f"  {row['bytes'] / 1e9:.2f} GB" if row.get("bytes") else "  size unknown" if options.sizes else ""
            print_result(f"{row['name']:{width}}{row['title']}{size}\n{'':{width}}{row['licence']}, {row['source']}")
        return
    if not options.name:
        raise ValueError("name what to fetch; --list shows what there is")
    for path in download(options.name, options.to, options.only):
        print_result(str(path))
