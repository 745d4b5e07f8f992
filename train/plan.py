"""What a distillation will take, counted before anything is allocated: python -m train.plan config=self_forcing_dmd

Bytes per process of weights, gradients, optimiser and average, sharded over all processes; activations are not counted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from selfforcing_core.config import PRESETS
from selfforcing_core.geometry import SPATIAL_FACTOR, tokens_per_frame
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.layout import wan_shapes
from train.args import DmdArgs, TrainArgs, parse

MASTER = 4  # bytes of a float32 number


def parameters(size: str) -> int:
    """Numbers in a network of this preset. Raises ValueError for an unknown one."""
    if size not in PRESETS:
        raise ValueError(f"size {size!r} is unknown; use one of {', '.join(PRESETS)}")
    return sum(torch.Size(shape).numel() for shape in wan_shapes(PRESETS[size]).values())


def plan(args: TrainArgs, processes: int) -> dict[str, Any]:
    """Counts and bytes of a run on this many processes."""
    wide = 8 if args.dtype == "float64" else MASTER
    trained = parameters(args.size)
    kept = {"trained": trained * wide * 4, "average": trained * wide}  # weights, gradients, two moments
    counted = {"trained_parameters": trained}
    if isinstance(args, DmdArgs):
        counted["teacher_parameters"] = parameters(args.teacher_size or args.size)
        kept |= {"trained": 2 * kept["trained"], "teacher": counted["teacher_parameters"] * wide}
    shares = {name: value // processes for name, value in kept.items()}
    if isinstance(args, DmdArgs) and args.chunk:
        shares["kv_cache"] = KVCache.num_bytes(
            PRESETS[args.size],
            batch=args.micro_batch,
            tokens_per_frame=tokens_per_frame(args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR),
            capacity=args.latent_frames,
            dtype=getattr(torch, args.dtype),
        )
    return {
        "processes": processes,
        **counted,
        "clips_per_process_and_step": args.batch_size / processes,
        "bytes_per_process": shares,
        "not_counted": "activations, the text encoder, what a sharded block gathers while it computes",
    }


def main() -> None:
    try:
        args = parse(DmdArgs)
        print(json.dumps(plan(args, int(os.environ.get("WORLD_SIZE", "1"))), indent=2))
    except ValueError as error:
        sys.exit(f"train.plan: {error}")


if __name__ == "__main__":
    main()
