"""A checkpoint of a run to one safetensors file for our nodes, the command line and ComfyUI's own causal nodes.

    python -m train.export logdir=runs/dmd out=student.safetensors

A run of adapters gives the whole student, adapters merged in, or with form=lora a LoRA in ComfyUI's naming.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from selfforcing_core.atomic import replacing
from selfforcing_core.checkpoint import DTYPES, save_checkpoint
from selfforcing_core.config import CausalConfig, WanConfig
from train import lora, state
from train.args import DiffusionArgs, DmdArgs, OdeArgs, keys, mistake, parse
from train.dmd import causal_of, steps_of
from train.networks import alpha_of, read_network

STAGES = {"student": DmdArgs, "forcing": DiffusionArgs, "timesteps": OdeArgs}  # by a setting that only this one has
AnyArgs = DmdArgs | DiffusionArgs | OdeArgs


@dataclass
class ExportArgs:
    """What to write, and from which checkpoint."""

    logdir: str = ""  # folder of the run
    out: str = ""
    step: int = 0  # 0: the newest checkpoint
    weights: str = "auto"  # ema, raw, or auto: the average where there is one
    form: str = "whole"  # whole network, or lora: the adapters alone
    dtype: str = "bfloat16"
    overwrite: bool = False


def read_run(folder: Path) -> AnyArgs:
    """The settings of the run in a folder. Raises ValueError if it holds none."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder}: holds no config.yaml; give the logdir of a run")
    known = keys(file)
    kind = next((kind for mark, kind in STAGES.items() if mark in known), DmdArgs)
    return parse(kind, [f"config={file}"])


def _check(args: ExportArgs) -> None:
    if not args.logdir or not args.out:
        raise ValueError("give logdir=FOLDER of the run and out=FILE.safetensors")
    for name, known in (("dtype", tuple(DTYPES)), ("weights", ("auto", "ema", "raw")), ("form", ("whole", "lora"))):
        if getattr(args, name) not in known:
            raise ValueError(f"{name} {getattr(args, name)!r} cannot be written; use one of {', '.join(known)}")


def export(args: ExportArgs) -> Path:
    """Write what the run trained; returns the file. Raises ValueError if there is nothing to write."""
    _check(args)
    folder = Path(args.logdir)
    run = read_run(folder)
    if args.form == "lora" and not run.lora_rank:
        raise ValueError(f"{folder}: trained whole networks, there are no adapters; leave form=lora out")
    found = [path for path in state.complete(folder) if not args.step or state.step_of(path) == args.step]
    if not found:
        raise ValueError(f"{folder}: holds no complete checkpoint" + (f" of step {args.step}" if args.step else ""))
    is_average = args.weights == "ema" or (args.weights == "auto" and state.has_average(found[-1]))
    tensors = state.read(found[-1], "ema." if is_average else "roles.student.weights.")
    about = {"trained": f"step {state.step_of(found[-1])}, {'ema' if is_average else 'raw'}"}
    if args.form == "lora":
        _write_lora(args, run, tensors, about)
    else:
        _write_whole(args, run, tensors, about)
    return Path(args.out)


def _start(run: AnyArgs) -> str:
    return run.student if isinstance(run, DmdArgs) else run.network


def _write_lora(args: ExportArgs, run: AnyArgs, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    named = lora.comfyui_names(tensors, alpha_of(run))
    with replacing(Path(args.out), overwrite=args.overwrite) as temporary:
        held = {name: value.to(DTYPES[args.dtype]).contiguous() for name, value in named.items()}
        save_file(held, temporary, {**about, "base": _start(run)})


def _write_whole(args: ExportArgs, run: AnyArgs, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    source = read_network(_start(run), run.weights)
    assert isinstance(source.config, WanConfig)
    if run.lora_rank:
        tensors = lora.merged(source.state_dict, tensors, alpha_of(run) / run.lora_rank)
    causal = causal_of(run) if isinstance(run, DmdArgs) else CausalConfig(run.chunk or 1, run.window)
    save_checkpoint(
        args.out, {name: value.to(DTYPES[args.dtype]) for name, value in tensors.items()}, source.config, about,
        causal=causal if run.chunk else None,
        steps=steps_of(run) if isinstance(run, DmdArgs) else source.steps, latent_space=source.latent_space,
        overwrite=args.overwrite,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        print(export(parse(ExportArgs, argv, __doc__)))
    except ValueError as error:
        return mistake("train.export", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
