"""What a run will take, found before anything is allocated: python -m train.plan config=self_forcing_dmd

Bytes per process: the real training step runs on tensors without memory (torch's FakeTensorMode, a process group that
sends nothing) under torch's MemTracker. Time: arithmetic and traffic in closed form over what a card attains. Networks
are those of the presets `size`, `teacher_size` and `critic_size`, so no file is read. processes=64 says how many the
run will have, stage=ode or stage=diffusion that it is one of the stages before the distillation.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any

import torch

from selfforcing_core.atomic import print_result
from selfforcing_core.config import PRESETS, WanConfig
from selfforcing_core.device import CARDS, Card
from selfforcing_core.geometry import SPATIAL_FACTOR
from selfforcing_core.roofline import Work
from train.args import ClipArgs, DiffusionArgs, DmdArgs, OdeArgs, TrainArgs, mistake, parse
from train.work import clip_work, copies_of, distillation_work, parameters, sizes_in_bytes, trained_parameters

CARD_BYTES = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}
WATCHED = (2, 3)  # layers of the networks whose step is watched
STAGES: dict[str, type[TrainArgs]] = {"dmd": DmdArgs, "diffusion": DiffusionArgs, "ode": OdeArgs}


def config_of(size: str) -> WanConfig:
    """A preset. Raises ValueError for an unknown one."""
    if size not in PRESETS:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[size]


# ----------------------------------------------------------------- memory --
def peak_bytes(args: TrainArgs, processes: int) -> dict[str, int]:
    """Peak bytes of one process in an update of each role that is trained.

    What is kept (weights, gradients, moments, average) is counted; what a step adds is watched on networks of a few
    layers, and is a straight line in their number. Watching runs in processes of its own: tensors without memory must
    not get into anything that is kept.
    """
    sizes = sizes_of(args)
    layers = {role: config_of(size).num_layers for role, size in sizes.items()}
    watched = sorted({min(count, max(layers.values())) for count in WATCHED})
    with _fresh_processes().Pool(len(watched)) as pool:
        peaks = pool.starmap(_watch, [(args, processes, count) for count in watched])
    found = {}
    for name in peaks[0]:
        added = [peak[name] - kept_bytes(args, processes, dict.fromkeys(sizes, n)) for n, peak in zip(watched, peaks)]
        slope = (added[-1] - added[0]) / (watched[-1] - watched[0]) if len(watched) > 1 else 0
        more = added[-1] + slope * (layers[name] - watched[-1])
        found[name] = round(kept_bytes(args, processes, layers) + more)
    return found


def _fresh_processes() -> BaseContext:
    """Return how processes start that nothing was computed in yet, without each of them importing torch again."""
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    # Torch's tracker and what it needs take many seconds to import: once for all processes of all calls. Nothing else
    # is done in the server, so that what is copied from it holds no tensor, and no thread that a copy would lack.
    context.set_forkserver_preload(["train.planned"])
    return context


def kept_bytes(args: TrainArgs, processes: int, layers: Mapping[str, int]) -> int:
    """Bytes per process of weights, moments, gradients and average, for networks of these numbers of layers."""
    wide, narrow = sizes_in_bytes(args)
    configs = {role: replace(config_of(size), num_layers=layers[role]) for role, size in sizes_of(args).items()}
    trained = trained_parameters(args, configs["student"]) * 5  # weights, gradients, two moments; and the average
    if "critic" in configs:
        trained += trained_parameters(args, configs["critic"]) * 4
    return (trained * wide + _frozen(args, configs) * narrow) // (args.shard_group or processes)


def _frozen(args: TrainArgs, configs: Mapping[str, WanConfig]) -> int:
    """Numbers that no optimiser changes: a teacher's, or with adapters those of every file, which its roles share."""
    if not args.lora_rank:
        return parameters(configs["teacher"]) if "teacher" in configs else 0
    files: dict[str, str] = {}
    if isinstance(args, DmdArgs):
        files = {"student": args.student, "critic": args.critic or args.teacher, "teacher": args.teacher}
    return sum(map(parameters, {files.get(role) or role: config for role, config in configs.items()}.values()))


def _watch(args: TrainArgs, processes: int, num_layers: int) -> dict[str, int]:
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from train.distributed import World, new_mesh
    from train.planned import planned, tracked

    logging.disable(logging.WARNING)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    world = World(0, processes, torch.device("cpu"), new_mesh("cpu", processes, args.shard_group), None)
    with FakeTensorMode():
        return tracked(planned(args, world, num_layers))


# ------------------------------------------------------------------- plan --
def sizes_of(args: TrainArgs) -> dict[str, str]:
    """Preset of each role's network."""
    if not isinstance(args, DmdArgs):
        return {"student": args.size}
    teacher = args.teacher_size or args.size
    sizes = {
        "student": args.size,
        "teacher": teacher,
        "critic": args.critic_size or (args.size if args.critic else teacher),
    }
    if args.score == "gan":
        del sizes["teacher"]
    return sizes


def latent_shape(args: DmdArgs | ClipArgs, config: WanConfig) -> tuple[int, int, int, int]:
    """Of the clips: frames, channels, height and width."""
    return args.latent_frames, config.out_dim, args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR


def updates(args: TrainArgs, processes: int) -> dict[str, Work]:
    """What an update of each role that is trained takes all processes together at least."""
    configs = {role: config_of(size) for role, size in sizes_of(args).items()}
    copies = copies_of(args, processes)
    if isinstance(args, DmdArgs):
        return {role: distillation_work(args, role, configs, copies=copies) for role in ("student", "critic")}
    assert isinstance(args, ClipArgs)
    config = configs["student"]
    return {"student": clip_work(args, config, latent_shape(args, config), copies=copies)}


def plan(args: TrainArgs, processes: int) -> dict[str, Any]:
    """Counts, bytes and hours of a run on this many processes."""
    if args.batch_size % processes:
        raise ValueError(f"batch_size {args.batch_size} cannot be divided among {processes} processes; use a multiple")
    told: dict[str, Any] = {
        "processes": processes,
        "parameters": {role: parameters(config_of(size)) for role, size in sizes_of(args).items()},
        "clips_per_process_and_step": args.batch_size // processes,
    }
    work = updates(args, processes)
    step = sum((each * (1 / _steps_per_update(args, role)) for role, each in work.items()), Work())
    hours = {name: sum(step.seconds(card.attainable).values()) * args.max_steps / 3600 for name, card in CARDS.items()}
    told["flops_per_update"] = {role: each.flops for role, each in work.items()}
    told["least_gpu_hours"] = {name: round(taken, 2) for name, taken in hours.items()}
    told["least_gpu_hours_are"] = (
        f"arithmetic over {Card.flops_share} of the data sheet's dense bfloat16 rate, or traffic over "
        f"{Card.bandwidth_share} of its bandwidth, whichever takes longer, for linears, attention and the rest in turn"
    )
    told["peak_bytes_per_process"] = peaks = peak_bytes(args, processes)
    told["fits"] = {card: max(peaks.values()) < size for card, size in CARD_BYTES.items()}
    told["not_counted"] = (
        "the text encoder while it encodes, the VAE and CLIP, the samples' decoder, the allocator's gaps"
    )
    return told


def _steps_per_update(args: TrainArgs, role: str) -> int:
    return args.critic_per_student if isinstance(args, DmdArgs) and role == "student" else 1


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    own = {"processes": os.environ.get("WORLD_SIZE", "1"), "stage": "dmd"}
    rest = []
    for word in sys.argv[1:] if argv is None else argv:
        name, _, value = word.partition("=")
        if name in own:
            own[name] = value
        else:
            rest.append(word)
    try:
        if own["stage"] not in STAGES:
            raise ValueError(f"stage {own['stage']!r} is unknown; use one of {', '.join(STAGES)}")
        if not own["processes"].isdecimal() or int(own["processes"]) < 1:
            raise ValueError(f"processes {own['processes']!r} is no number of processes; use 1 or more")
        print_result(json.dumps(plan(parse(STAGES[own["stage"]], rest, __doc__), int(own["processes"])), indent=2))
    except ValueError as error:
        return mistake("train.plan", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
