"""A checkpoint of a run to one safetensors file for our nodes, the command line and ComfyUI's own causal nodes.

python -m train.export logdir=runs/dmd out=student.safetensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from selfforcing_core.checkpoint import DTYPES, save_checkpoint
from selfforcing_core.config import CausalConfig, WanConfig
from train import state
from train.args import DiffusionArgs, DmdArgs, OdeArgs, parse
from train.dmd import steps_of
from train.engine import read_network

STAGES = {"student": DmdArgs, "forcing": DiffusionArgs, "timesteps": OdeArgs}  # by a setting that only this one has


@dataclass
class ExportArgs:
    """What to write, and from which checkpoint."""

    logdir: str = ""  # folder of the run
    out: str = ""
    step: int = 0  # 0: the newest checkpoint
    weights: str = "auto"  # ema, raw, or auto: the average where there is one
    dtype: str = "bfloat16"
    overwrite: bool = False


def read_run(folder: Path) -> DmdArgs | DiffusionArgs | OdeArgs:
    """The settings of the run in a folder. Raises ValueError if it holds none."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder}: holds no config.yaml; give the logdir of a run")
    found = OmegaConf.load(file)
    kind = next((kind for mark, kind in STAGES.items() if mark in found), DmdArgs)
    return parse(kind, [f"config={file}"])


def export(args: ExportArgs) -> Path:
    """Write what the run trained; returns the file. Raises ValueError if there is nothing to write."""
    folder = Path(args.logdir)
    if not args.logdir or not args.out:
        raise ValueError("give logdir=FOLDER of the run and out=FILE.safetensors")
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype {args.dtype!r} cannot be written; use one of {', '.join(DTYPES)}")
    if args.weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights {args.weights!r} is unknown; use auto, ema or raw")
    run = read_run(folder)
    found = [path for path in state.complete(folder) if not args.step or state.step_of(path) == args.step]
    if not found:
        raise ValueError(f"{folder}: holds no complete checkpoint" + (f" of step {args.step}" if args.step else ""))
    source = read_network(run.student if isinstance(run, DmdArgs) else run.network, run.weights)
    assert isinstance(source.config, WanConfig)
    is_average = args.weights == "ema" or (args.weights == "auto" and state.has_average(found[-1]))
    tensors = state.read(found[-1], "ema." if is_average else "roles.student.network.")
    sink = run.sink if isinstance(run, DmdArgs) else 0
    save_checkpoint(
        args.out, {name: value.to(DTYPES[args.dtype]) for name, value in tensors.items()}, source.config,
        {"trained": f"step {state.step_of(found[-1])}, {'ema' if is_average else 'raw'}"},
        causal=CausalConfig(run.chunk, run.window, sink) if run.chunk else None,
        steps=steps_of(run) if isinstance(run, DmdArgs) else source.steps, latent_space=source.latent_space,
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
