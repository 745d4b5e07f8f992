"""What a run will take, known before anything is allocated: counts, bytes and hours.

Bytes per process: the real training step runs on tensors without memory (torch's FakeTensorMode, a process group that
sends nothing), whose bytes are counted. Time: arithmetic and traffic in closed form over what a card attains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.distributed as dist

from selfforcing_core.config import WanConfig
from selfforcing_core.roofline.device import CARDS, Card
from selfforcing_core.roofline.work import Work
from train.args import ClipArgs, DmdArgs, TrainArgs
from train.distributed import World, new_mesh
from train.engine import Trainer
from train.update_cost import (
    clip_work,
    config_of,
    copies_of,
    distillation_work,
    latent_shape,
    parameters,
    sizes_in_bytes,
    sizes_of,
    trained_parameters,
)

# GPU memory as sold: RTX 4090, RTX 6000 Ada, A100 and H100, H200.
CARD_BYTES = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}
WATCHED = (2, 3)  # layers of the networks whose step is watched


# ----------------------------------------------------------------- memory --
def peak_bytes(args: TrainArgs, processes: int, stage: type[Trainer]) -> dict[str, int]:
    """Return the peak bytes of one process in an update of each role that is trained.

    stage: the trainer that makes the update; it is sent to other processes, so it must be importable by name.

    What is kept (weights, gradients, moments, average) is counted; what a step adds is watched on networks of a few
    layers, and is a straight line in their number. Watching runs in processes of its own: tensors without memory must
    not get into anything that is kept.
    """
    sizes = sizes_of(args)
    layers = {role: config_of(size).num_layers for role, size in sizes.items()}
    watched = sorted({min(count, max(layers.values())) for count in WATCHED})
    with _fresh_processes().Pool(len(watched)) as pool:
        peaks = pool.starmap(_watch, [(args, processes, count, stage) for count in watched])
    # What is kept is known exactly; only what a step adds beside it is extrapolated.
    totals = {}
    for name in peaks[0]:
        added = [peak[name] - kept_bytes(args, processes, dict.fromkeys(sizes, n)) for n, peak in zip(watched, peaks)]
        # Every layer adds as much as every other one: its activations, or their recomputation's.
        slope = (added[-1] - added[0]) / (watched[-1] - watched[0]) if len(watched) > 1 else 0
        step_bytes = added[-1] + slope * (layers[name] - watched[-1])
        totals[name] = round(kept_bytes(args, processes, layers) + step_bytes)
    return totals


def _fresh_processes() -> BaseContext:
    """Return how processes start that nothing was computed in yet, without each of them importing torch again."""
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    # What tensors without memory need takes seconds to import: once for all processes of all calls. Nothing else
    # is done in the server, so that what is copied from it holds no tensor, and no thread that a copy would lack. No
    # command is among what is loaded: runpy warns of one that is there before it is run.
    context.set_forkserver_preload(["train.footprint", "train.dry_supply", "torch._dynamo"])
    return context


def kept_bytes(args: TrainArgs, processes: int, layers: Mapping[str, int]) -> int:
    """Return the bytes per process of weights, moments, gradients and average, for networks of so many layers."""
    wide, narrow = sizes_in_bytes(args)
    configs = {role: replace(config_of(size), num_layers=layers[role]) for role, size in sizes_of(args).items()}
    trained = trained_parameters(args, configs["student"]) * 5  # weights, gradients, two moments; and the average
    if "critic" in configs:
        trained += trained_parameters(args, configs["critic"]) * 4
    return (trained * wide + _frozen(args, configs) * narrow) // (args.shard_group or processes)


def _frozen(args: TrainArgs, configs: Mapping[str, WanConfig]) -> int:
    """Count what no optimiser changes: a teacher's numbers, or with adapters those of every file, which roles share."""
    if not args.lora_rank:
        return parameters(configs["teacher"]) if "teacher" in configs else 0
    # Keyed by file, so that roles of one file are counted once; a role without a file is one of its own.
    files: dict[str, str] = {}
    if isinstance(args, DmdArgs):
        files = {"student": args.student, "critic": args.critic or args.teacher, "teacher": args.teacher}
    return sum(map(parameters, {files.get(role) or role: config for role, config in configs.items()}.values()))


def _watch(args: TrainArgs, processes: int, num_layers: int, stage: type[Trainer]) -> dict[str, int]:
    # Private parts of torch, which a run that only counts on `estimate` being there need not load.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from train.dry_supply import DrySupply, tracked

    logging.disable(logging.WARNING)  # this process exists to count; what it would warn of, the real run says
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    world = World(0, processes, torch.device("cpu"), new_mesh("cpu", processes, args.shard_group), None)
    # The second part of a batch adds to gradients that are there; from then on every part takes what the last one did.
    args = replace(args, batch_size=min(args.batch_size, 2 * args.micro_batch * processes))
    make: Any = stage
    with FakeTensorMode():
        return tracked(make(args, world, DrySupply(args, world, num_layers)))


# --------------------------------------------------------------- estimate --
def updates(args: TrainArgs, processes: int) -> dict[str, Work]:
    """Return what an update of each role that is trained takes all processes together at least."""
    configs = {role: config_of(size) for role, size in sizes_of(args).items()}
    copies = copies_of(args, processes)
    if isinstance(args, DmdArgs):
        return {role: distillation_work(args, role, configs, copies=copies) for role in ("student", "critic")}
    assert isinstance(args, ClipArgs)
    config = configs["student"]
    return {"student": clip_work(args, config, latent_shape(args, config), copies=copies)}


def estimate(args: TrainArgs, processes: int, stage: type[Trainer]) -> dict[str, Any]:
    """Return counts, bytes and hours of a run of a stage on this many processes, in plain JSON types."""
    if args.batch_size % processes:
        raise ValueError(f"batch_size {args.batch_size} cannot be divided among {processes} processes; use a multiple")
    figures: dict[str, Any] = {
        "processes": processes,
        "parameters": {role: parameters(config_of(size)) for role, size in sizes_of(args).items()},
        "clips_per_process_and_step": args.batch_size // processes,
    }
    work = updates(args, processes)
    # A step trains the critic always and the student in every critic_per_student-th one, so costs are averaged.
    step = sum((each * (1 / _steps_per_update(args, role)) for role, each in work.items()), Work())
    hours = {name: sum(step.seconds(card.attainable).values()) * args.max_steps / 3600 for name, card in CARDS.items()}
    figures["flops_per_update"] = {role: each.flops for role, each in work.items()}
    figures["least_gpu_hours"] = {name: round(time, 2) for name, time in hours.items()}
    figures["least_gpu_hours_are"] = (
        f"arithmetic over {Card.flops_share} of the data sheet's dense bfloat16 rate, or traffic over "
        f"{Card.bandwidth_share} of its bandwidth, whichever takes longer, for linears, attention and the rest in turn"
    )
    figures["peak_bytes_per_process"] = peaks = peak_bytes(args, processes, stage)
    figures["fits"] = {card: max(peaks.values()) < size for card, size in CARD_BYTES.items()}
    figures["not_counted"] = (
        "the text encoder while it encodes, the VAE and CLIP, the samples' decoder, the allocator's gaps"
    )
    return figures


def _steps_per_update(args: TrainArgs, role: str) -> int:
    return args.critic_per_student if isinstance(args, DmdArgs) and role == "student" else 1
