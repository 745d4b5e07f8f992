"""A checkpoint of a run to one safetensors file for our nodes, the command line and ComfyUI's own causal nodes.

python -m train.export logdir=runs/dmd out=student.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from selfforcing_core.checkpoint import save_checkpoint
from selfforcing_core.config import WanConfig
from train import state
from train.args import DmdArgs, RunArgs, parse
from train.dmd import causal_of, steps_of
from train.engine import read_network

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ExportArgs(RunArgs):
    """What to write, and from which checkpoint."""

    out: str = ""
    step: int = 0  # 0: the newest checkpoint
    weights: str = "auto"  # ema, raw, or auto: the average where there is one
    dtype: str = "bfloat16"
    overwrite: bool = False


def export(args: ExportArgs) -> Path:
    """Write the student; returns the file. Raises ValueError if there is nothing to write."""
    folder = Path(args.logdir)
    if not args.logdir or not args.out:
        raise ValueError("give logdir=FOLDER of the run and out=FILE.safetensors")
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype {args.dtype!r} cannot be written; use one of {', '.join(DTYPES)}")
    if args.weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights {args.weights!r} is unknown; use auto, ema or raw")
    found = [path for path in state.complete(folder) if not args.step or state.step_of(path) == args.step]
    if not found:
        raise ValueError(f"{folder}: holds no complete checkpoint" + (f" of step {args.step}" if args.step else ""))
    run = parse(DmdArgs, [f"config={folder / 'config.yaml'}"])
    source = read_network(run.student, run.weights)
    assert isinstance(source.config, WanConfig)
    is_average = args.weights == "ema" or (args.weights == "auto" and state.has_average(found[-1]))
    tensors = state.read(found[-1], "ema." if is_average else "roles.student.network.")
    is_causal = run.chunk != 0
    save_checkpoint(
        args.out, {name: value.to(DTYPES[args.dtype]) for name, value in tensors.items()}, source.config,
        {"trained": f"train.dmd, step {state.step_of(found[-1])}, {'ema' if is_average else 'raw'}"},
        causal=causal_of(run) if is_causal else None, steps=steps_of(run), latent_space=source.latent_space,
        overwrite=args.overwrite,
    )  # fmt: skip
    return Path(args.out)


def main() -> int:
    try:
        print(export(parse(ExportArgs)))
    except ValueError as error:
        print("train.export: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
