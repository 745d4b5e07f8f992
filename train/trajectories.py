"""A teacher's trajectories: what `train.ode` learns from, as .pt files {prompt: states}, one per prompt.

    torchrun --nproc-per-node 8 -m train.trajectories teacher=FILE text_encoder=FILE prompts=prompts.txt out=pairs
    python -m train.make_lmdb --data_path pairs --lmdb_path trajectories

The teacher samples each prompt in many Euler steps with guidance; the states at the student's own timesteps are kept,
noisiest first, the clean clip last. A student that regresses from each state to the clean clip learns to jump to the
end of the teacher's path: the start of the distillation, as in CausVid (arXiv 2412.07772). What is there already is not
made again, so the same command goes on.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from selfforcing_core.atomic import make_folder, replacing
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, VideoGeometry, pixel_frames
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.schedule import FlowSchedule
from train import distributed
from train.args import NetworkArgs, mistake, parse
from train.conditions import Prompts, read_texts
from train.networks import Source, frozen, read_on_first
from train.randomness import key_of

log = logging.getLogger(__name__)


@dataclass
class TrajectoryArgs(NetworkArgs):
    """Which teacher, of what, and what is kept."""

    teacher: str = ""
    prompts: str = ""  # text file, one prompt per line, or a folder of text files
    negative_prompt: str = ""
    out: str = ""  # folder of .pt files
    width: int = 832  # pixels
    height: int = 480
    latent_frames: int = 21
    sampling_steps: int = 48  # with shift 5 they pass through the default timesteps
    shift: float = 5.0
    guidance: float = 6.0  # usual meaning: 1 is none
    timesteps: list[float] = field(default_factory=lambda: [1000.0, 937.5, 2500 / 3, 625.0])  # kept, besides the end


class Recorder:
    """A network that remembers its inputs at some timesteps: the states of a trajectory.

    In place of an option of the rollout, which so stays the one that every model is sampled with.
    """

    def __init__(self, network: Any, timesteps: list[float]) -> None:
        self.network, self.timesteps = network, timesteps
        self.states: dict[float, Tensor] = {}  # by timestep

    @property
    def config(self) -> Any:
        return self.network.config

    def __call__(self, noisy_BTCHW: Tensor, timesteps_BT: Tensor, *args: Any, **options: Any) -> Tensor:
        timestep = float(timesteps_BT.flatten()[0])  # a bidirectional teacher has one for all frames
        for recorded in self.timesteps:
            if abs(timestep - recorded) < 1e-2:  # those of the schedule are float32
                self.states[recorded] = noisy_BTCHW.clone()
        return self.network(noisy_BTCHW, timesteps_BT, *args, **options)


def check(args: TrajectoryArgs) -> None:
    """Raise ValueError for settings that cannot work."""
    for name in ("teacher", "text_encoder", "prompts", "out"):
        if not getattr(args, name):
            raise ValueError(f"{name} is not set; give {name}=...")
    VideoGeometry(args.width, args.height, pixel_frames(args.latent_frames), chunk=args.latent_frames)
    passed = FlowSchedule(StepConfig.even(args.sampling_steps, shift=args.shift)).timesteps
    for timestep in args.timesteps:
        if min(abs(timestep - at) for at in passed) >= 1e-2:
            near = sorted(passed, key=lambda at: abs(at - timestep))[:2]
            raise ValueError(
                f"timestep {timestep:g} is not passed in {args.sampling_steps} steps with shift {args.shift:g}; "
                f"nearest are {near[0]:.4f} and {near[1]:.4f}"
            )


@torch.no_grad()
def make(args: TrajectoryArgs, world: distributed.World) -> dict[str, int]:
    """Write this process's share of the prompts' trajectories; return the counts over all processes."""
    texts = list(dict.fromkeys(read_texts(args.prompts)))
    checkpoint = read_on_first(Source(args.teacher), world)
    if checkpoint.causal is not None and world.is_first:
        log.warning("%s says that it is causal; its trajectories are those of all frames at once", args.teacher)
    prompts, teacher = Prompts(args, world), frozen(checkpoint, args, world)
    shape = (args.latent_frames, teacher.config.out_dim, args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR)
    counts = {"written": 0, "there": 0, "not_numbers": 0}
    for first in tqdm(range(0, len(texts), world.size), disable=not world.is_first, ascii=True):
        number = min(first + world.rank, len(texts) - 1)  # all evaluate the sharded teacher equally often
        out = Path(args.out) / f"{number:05d}.pt"
        is_needed = torch.tensor(float(first + world.rank < len(texts) and not out.is_file()))
        if distributed.mean(world, is_needed) == 0:  # a row that one process needs is computed by all, and dropped
            counts["there"] += first + world.rank < len(texts)
            continue
        recorder = Recorder(teacher.network, args.timesteps)
        chunks = rollout(
            Guided(
                recorder,
                prompts.condition([texts[number]]),
                negative=prompts.condition([args.negative_prompt]),
                guidance=args.guidance,
            ),
            noise=SeededNoise(key_of(args.seed, texts[number])),
            latent_shape=shape,
            causal=CausalConfig(args.latent_frames),
            steps=StepConfig.even(args.sampling_steps, shift=args.shift),
        )
        clean = torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)
        states = torch.stack([*(recorder.states[at] for at in args.timesteps), clean], 1).half().cpu()
        if not states.isfinite().all():
            log.warning("the trajectory of %r holds NaN or Inf and is left out", texts[number][:60])
            counts["not_numbers"] += 1
        elif is_needed:
            make_folder(out.parent)
            with replacing(out, overwrite=True) as temporary:
                torch.save({texts[number]: states}, temporary)
            counts["written"] += 1
    return {name: round(distributed.mean(world, torch.tensor(float(n))) * world.size) for name, n in counts.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        args = parse(TrajectoryArgs, argv, __doc__)
        check(args)
        world = distributed.join(args.device, args.shard_group)
    except ValueError as error:
        return mistake("train.trajectories", error)
    try:
        with distributed.ending_together(world):
            try:
                counts = make(args, world)
            except ValueError as error:
                status = mistake("train.trajectories", error, is_told=world.is_first_to_notice())
                return distributed.fail(world, status)
    finally:
        dist.destroy_process_group()
    if world.is_first:
        print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
