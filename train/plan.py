"""What a distillation will take, found before anything is allocated: python -m train.plan config=self_forcing_dmd

Bytes per process: the real training step runs on tensors without memory (torch's FakeTensorMode, a process group that
sends nothing) under torch's MemTracker. Time: FLOPs in closed form over what a card attains. Networks are those of the
presets `size`, `teacher_size` and `critic_size`, so no file is read. processes=64 says how many the run will have.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from selfforcing_core.config import PRESETS, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, chunk_lengths, tokens_per_frame
from selfforcing_core.layout import wan_shapes
from selfforcing_core.roofline import CARDS, Card, pass_flops, prompt_flops
from train.args import DmdArgs, TrainArgs, mistake, parse

CARD_BYTES = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}
WATCHED = (2, 3)  # layers of the networks whose step is watched
BACKWARD = 2  # passes' worth of arithmetic when weights and inputs get gradients; 1 when inputs alone do


def config_of(size: str) -> WanConfig:
    """A preset. Raises ValueError for an unknown one."""
    if size not in PRESETS:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[size]


def parameters(size: str) -> int:
    """Numbers in a network of this preset. Raises ValueError for an unknown one."""
    return _numbers(wan_shapes(config_of(size)))


# ------------------------------------------------------------------- time --
def update_flops(args: DmdArgs, student: WanConfig, teacher: WanConfig, critic: WanConfig) -> dict[str, float]:
    """FLOPs of one update of student and critic on a whole batch; exits are taken at their mean."""
    tokens = tokens_per_frame(args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR)
    lengths = chunk_lengths(args.latent_frames, args.chunk or args.latent_frames)
    rollout, graded, seen = float(prompt_flops(student)), 0.0, 0
    for index, length in enumerate(lengths):
        seen += length
        one = pass_flops(student, length * tokens, min(seen, args.window if args.window > 0 else seen) * tokens)
        rollout += one * ((len(args.steps) + 1) / 2 + (index + 1 < len(lengths)))
        graded += one
    backward = (1 if args.lora_rank else BACKWARD) + int(args.activation_checkpointing)

    def judged(config: WanConfig) -> float:
        whole = args.latent_frames * tokens
        return pass_flops(config, whole, whole) + prompt_flops(config)

    scores = judged(critic)
    if args.score != "gan":
        scores += judged(teacher) * (1 + (args.guidance != 1))
    if args.score != "dmd":  # the scores carry gradient to the clip
        scores *= 2 + int(args.activation_checkpointing)
    clips = args.batch_size
    compared = 2 if args.score == "gan" else 1
    return {
        "student": clips * (rollout + backward * graded + scores),
        "critic": clips * (rollout + compared * (1 + backward) * judged(critic)),
    }


# ----------------------------------------------------------------- memory --
def peak_bytes(args: DmdArgs, processes: int) -> dict[str, int]:
    """Peak bytes of one process in an update of the student and in one of the critic.

    What is kept (weights, gradients, moments, average) is counted; what a step adds is watched on networks of a few
    layers, and is a straight line in their number. Watching runs in processes of its own: tensors without memory must
    not get into anything that is kept.
    """
    sizes = sizes_of(args)
    layers = {role: config_of(size).num_layers for role, size in sizes.items()}
    watched = sorted({min(count, max(layers.values())) for count in WATCHED})
    with get_context("spawn").Pool(len(watched)) as pool:
        peaks = pool.starmap(_watch, [(args, processes, count) for count in watched])
    found = {}
    for name in ("student", "critic"):
        added = [peak[name] - kept_bytes(args, processes, dict.fromkeys(sizes, n)) for n, peak in zip(watched, peaks)]
        slope = (added[-1] - added[0]) / (watched[-1] - watched[0]) if len(watched) > 1 else 0
        more = added[-1] + slope * (layers[name] - watched[-1])
        found[name] = round(kept_bytes(args, processes, layers) + more)
    return found


def kept_bytes(args: DmdArgs, processes: int, layers: dict[str, int]) -> int:
    """Bytes per process of weights, moments, gradients and average, for networks of these numbers of layers."""
    wide, narrow = (8, 8) if args.dtype == "float64" else (4, getattr(torch, args.dtype).itemsize)
    counts = {
        role: _numbers(wan_shapes(replace(config_of(size), num_layers=layers[role])))
        for role, size in sizes_of(args).items()
    }
    if args.score == "gan":
        del counts["teacher"]
    per_shard = args.shard_group or processes
    if not args.lora_rank:
        trained = counts["student"] * 5 + counts["critic"] * 4  # weights, gradients, two moments; and the average
        return (trained * wide + counts.get("teacher", 0) * narrow) // per_shard
    files = {"student": args.student, "critic": args.critic or args.teacher, "teacher": args.teacher}
    bases = {files[role] or role: count for role, count in counts.items()}
    adapters = {role: _adapters(args, config_of(size), layers[role]) for role, size in sizes_of(args).items()}
    trained = adapters["student"] * 5 + adapters["critic"] * 4
    return (trained * wide + sum(bases.values()) * narrow) // per_shard


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _adapters(args: DmdArgs, config: WanConfig, layers: int) -> int:
    shapes = wan_shapes(replace(config, num_layers=layers))
    return sum(args.lora_rank * sum(s) for name, s in shapes.items() if name.startswith("blocks.") and len(s) == 2
               and name.endswith(".weight"))  # fmt: skip


def _watch(args: DmdArgs, processes: int, num_layers: int) -> dict[str, int]:
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from train.distributed import World, new_mesh
    from train.planned import PlannedDistillation, tracked

    logging.disable(logging.WARNING)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    world = World(0, processes, torch.device("cpu"), new_mesh("cpu", processes, args.shard_group), None)
    with FakeTensorMode():
        return tracked(PlannedDistillation(args, world, num_layers))


# ------------------------------------------------------------------- plan --
def sizes_of(args: TrainArgs) -> dict[str, str]:
    """Preset of each role's network."""
    if not isinstance(args, DmdArgs):
        return {"student": args.size}
    teacher = args.teacher_size or args.size
    return {
        "student": args.size,
        "teacher": teacher,
        "critic": args.critic_size or (args.size if args.critic else teacher),
    }


def plan(args: TrainArgs, processes: int) -> dict[str, Any]:
    """Counts, bytes and hours of a run on this many processes."""
    if args.batch_size % processes:
        raise ValueError(f"batch_size {args.batch_size} cannot be divided among {processes} processes; use a multiple")
    sizes = sizes_of(args)
    told: dict[str, Any] = {
        "processes": processes,
        "parameters": {role: parameters(size) for role, size in sizes.items()},
        "clips_per_process_and_step": args.batch_size // processes,
    }
    if not isinstance(args, DmdArgs):
        return told
    flops = update_flops(args, *(config_of(sizes[role]) for role in ("student", "teacher", "critic")))
    total = args.max_steps * (flops["critic"] + flops["student"] / args.critic_per_student)
    told["flops_per_update"] = flops
    told["least_gpu_hours"] = {name: round(total / card.attainable.flops / 3600, 2) for name, card in CARDS.items()}
    told["least_gpu_hours_are"] = f"FLOPs over {Card.flops_share} of the data sheet's dense bfloat16 rate, nothing else"
    told["peak_bytes_per_process"] = peaks = peak_bytes(args, processes)
    told["fits"] = {card: max(peaks.values()) < size for card, size in CARD_BYTES.items()}
    told["not_counted"] = (
        "the text encoder while it encodes, the VAE and CLIP, the samples' decoder, the allocator's gaps"
    )
    return told


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    counts = [word.removeprefix("processes=") for word in words if word.startswith("processes=")]
    try:
        args = parse(DmdArgs, [word for word in words if not word.startswith("processes=")])
        processes = int(counts[-1]) if counts else int(os.environ.get("WORLD_SIZE", "1"))
        print(json.dumps(plan(args, processes), indent=2))
    except ValueError as error:
        return mistake("train.plan", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
