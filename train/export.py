"""A checkpoint of a run to one safetensors file for our nodes, the command line and ComfyUI's own causal nodes.

    python -m train.export logdir=runs/dmd out=student.safetensors

A run of LoRA gives the whole student, merged, or with form=lora the LoRA alone in ComfyUI's naming. The file
says how its network is sampled: chunks or all frames at once, steps and solver, guidance.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from selfforcing_core.atomic import print_result, replacing
from selfforcing_core.config import BidirectionalConfig, CausalConfig, StepConfig, WanConfig
from selfforcing_core.weights.checkpoint import DTYPES, save_checkpoint
from selfforcing_core.weights.checkpoint_header import SamplingSettings, lora_header
from train import diffusion, dmd, lora, ode, resume
from train.args import DiffusionArgs, DmdArgs, OdeArgs, mistake, parse
from train.data import ClipDatabase
from train.forcing import causal_of
from train.networks import alpha_of, read_network
from train.run_checkpoints import complete, has_average, read, step_of

log = logging.getLogger(__name__)
AnyArgs = DmdArgs | DiffusionArgs | OdeArgs


@dataclass
class ExportArgs:
    """What to write, and from which checkpoint."""

    logdir: str = ""  # folder of the run
    out: str = ""
    step: int = 0  # 0: the newest checkpoint
    weights: str = "auto"  # ema, raw, or auto: the average where there is one
    form: str = "whole"  # whole network, or lora: the LoRA alone
    dtype: str = "bfloat16"
    overwrite: bool = False


def read_run(folder: Path) -> AnyArgs:
    """Return the settings of the run in a folder. Raises ValueError if it holds none."""
    if not (folder / resume.SETTINGS).is_file():
        raise ValueError(f"{folder}: holds no {resume.SETTINGS}; give the logdir of a run")
    stored = resume.read_settings(folder)
    if stored.gone:
        log.warning("%s: %s no longer exist as settings; they are left out", folder, ", ".join(stored.gone))
    run = resume.STAGES[stored.stage](**stored.settings)
    assert isinstance(run, AnyArgs)
    return run


def _check(args: ExportArgs) -> None:
    if not args.logdir or not args.out:
        raise ValueError("give logdir=FOLDER of the run and out=FILE.safetensors")
    for name, choices in (("dtype", tuple(DTYPES)), ("weights", ("auto", "ema", "raw")), ("form", ("whole", "lora"))):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} {getattr(args, name)!r} cannot be written; use one of {', '.join(choices)}")


def export(args: ExportArgs) -> Path:
    """Write what the run trained, and return the file. Raises ValueError if there is nothing to write."""
    _check(args)
    folder = Path(args.logdir)
    run = read_run(folder)
    if args.form == "lora" and not run.lora_rank:
        raise ValueError(f"{folder}: trained whole networks, there is no LoRA; leave form=lora out")
    checkpoints = [path for path in complete(folder) if args.step in (0, step_of(path))]
    if not checkpoints:
        raise ValueError(f"{folder}: holds no complete checkpoint" + (f" of step {args.step}" if args.step else ""))
    is_average = args.weights == "ema" or (args.weights == "auto" and has_average(checkpoints[-1]))
    tensors = read(checkpoints[-1], "ema." if is_average else "roles.student.weights.")
    about = {"trained": f"step {step_of(checkpoints[-1])}, {'ema' if is_average else 'raw'}"}
    if args.form == "lora":
        _write_lora(args, run, tensors, about)
    else:
        _write_whole(args, run, tensors, about)
    return Path(args.out)


@dataclass(frozen=True)
class SampledAs:
    """What the header of an export says of how its network is sampled; see Checkpoint."""

    causal: CausalConfig | None  # None: bidirectional
    bidirectional: BidirectionalConfig | None  # None: causal
    steps: StepConfig
    guidance: float | None = None  # usual meaning: 1 is none; None: the network learnt its teacher's


def sampled_as(run: AnyArgs) -> SampledAs:
    """Describe how the network of a run is sampled, as `Trainer.sampling` does it while it is trained."""
    whole = None if run.chunk else BidirectionalConfig(_latent_frames(run))
    if isinstance(run, DmdArgs):
        return SampledAs(dmd.causal_of(run) if run.chunk else None, whole, dmd.steps_of(run))
    causal = causal_of(run, run.chunk) if run.chunk else None
    if isinstance(run, OdeArgs):
        return SampledAs(causal, whole, ode.steps_of(run))
    return SampledAs(causal, whole, diffusion.steps_of(run), run.guidance)


def _latent_frames(run: AnyArgs) -> int | None:
    """Return the latent frames of the run's clips; None where its database, which alone knows, is not at hand."""
    if isinstance(run, DmdArgs):
        return run.latent_frames
    try:
        return ClipDatabase(run.data).shape[1]
    except ValueError as error:
        log.warning("the file will not say for which length its network was trained: %s", error)
        return None


def _start(run: AnyArgs) -> str:
    return run.student if isinstance(run, DmdArgs) else run.network


def _write_lora(args: ExportArgs, run: AnyArgs, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    renamed = lora.comfyui_names(tensors, alpha_of(run))
    weights = {name: value.to(DTYPES[args.dtype]).contiguous() for name, value in renamed.items()}
    sampled = sampled_as(run)
    settings = SamplingSettings(sampled.causal, sampled.steps, sampled.bidirectional, sampled.guidance)
    header = {**about, "base": _start(run), **lora_header(_start(run), settings)}
    with replacing(Path(args.out), overwrite=args.overwrite) as temporary:
        save_file(weights, temporary, header)


def _write_whole(args: ExportArgs, run: AnyArgs, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    source = read_network(_start(run), run.weights)  # a run's checkpoint holds no sizes: those of its start are its own
    assert isinstance(source.config, WanConfig)
    if run.lora_rank:
        tensors = lora.merged(source.state_dict, tensors, alpha_of(run) / run.lora_rank)
    sampled = sampled_as(run)
    save_checkpoint(
        args.out,
        {name: value.to(DTYPES[args.dtype]) for name, value in tensors.items()},
        source.config,
        about,
        causal=sampled.causal,
        bidirectional=sampled.bidirectional,
        steps=sampled.steps,
        guidance=sampled.guidance,
        latent_space=source.latent_space,
        overwrite=args.overwrite,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        print_result(str(export(parse(ExportArgs, argv, __doc__))))
    except ValueError as error:
        return mistake("train.export", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
