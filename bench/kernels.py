"""How much of a chunk is its kernels: every operator that ran, timed again by itself, against the chunk as it ran.

    python -m bench.kernels --json --out bench/results/kernels-cpu-1thread.json

A video is recorded once, operator by operator with its real tensors; each different one is then run alone, over and
over, and counts as often as it occurred. What the video took beyond their sum is the host (Python, dispatch, views) and
colder processor caches. One thread, CPU seconds, the cases of bench.rollout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.report import now, write
from bench.rollout import CASES, CAUSAL, STEPS, Case, hardware
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.model import CausalWan
from selfforcing_core.rollout import SeededNoise, rollout

CHUNKS = {"small": 3, "large": 2}
GROUPS = {"addmm": "linears", "mm": "linears", "convolution": "linears", "slow_conv3d_forward": "linears"}
SECONDS = 0.2  # of repetitions per operator


class Recorder(TorchDispatchMode):
    """Counts operators that compute, by operator, shapes, strides and numbers, and keeps one call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self.calls: dict[tuple[Any, ...], Callable[[], object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            leaves, _ = tree_flatten((args, kwargs))
            key = (func, *(_shape(leaf) for leaf in leaves))
            self.counts[key] += 1
            self.calls.setdefault(key, lambda: func(*args, **kwargs))
        return made


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return leaf if isinstance(leaf, (int, float, str, bool, type(None))) else str(leaf)


def alone(call: Callable[[], object]) -> float:
    """CPU seconds of one call, the median over about SECONDS."""
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < SECONDS and len(taken) < 500):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case: Case = CASES[name]
    model = CausalWan(case.config).eval().requires_grad_(False)
    text = Conditioning(torch.randn(1, case.config.text_len, case.config.text_dim))
    shape = (CHUNKS[name] * CAUSAL.chunk, case.config.in_dim, case.latent_height, case.latent_width)

    def video() -> float:
        began = time.process_time()
        for _ in rollout(model, text, noise=SeededNoise(0), latent_shape=shape, causal=CAUSAL, steps=STEPS):
            pass
        return time.process_time() - began

    video()
    with Recorder() as recorder:
        video()
    taken, groups = [video()], Counter[str]()
    for key, count in recorder.counts.items():
        kind = key[0].overloadpacket.__name__
        group = "attention" if "attention" in kind else GROUPS.get(kind, "elementwise")
        groups[group] += count * alone(recorder.calls[key])  # type: ignore[assignment]
    taken += [video(), video()]
    total, kernels = statistics.median(taken), sum(groups.values())
    return {
        "chunks": CHUNKS[name], "cpu_seconds": total, "kernels_cpu_seconds": kernels,
        "over_kernels": total / kernels - 1,
        "share_by_group": {group: seconds / total for group, seconds in groups.items()},
        "operators": sum(recorder.counts.values()), "different_operators": len(recorder.counts),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CHUNKS, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    cases = {name: measure(name) for name in (CHUNKS if args.case == "all" else [args.case])}
    told = {
        "cases": cases, "threads": 1, "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.kernels", *sys.argv[1:]]),
        "date": now(),
    }  # fmt: skip
    text = write(told, args.out)
    words = "; ".join(f"{name}: {case['over_kernels']:+.1%} over its kernels" for name, case in cases.items())
    print(text if args.json else words)


if __name__ == "__main__":
    main()
