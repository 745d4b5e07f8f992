"""How much of a chunk is its kernels: every operator that runs, timed in its place and again by itself.

    python -m bench.kernels --json --out bench/results/kernels-cpu-1thread.json

In its place: of two videos every other pass runs plainly, in the rest each operator is timed as it runs, and in the
second video they change places, since a shared machine's speed changes within seconds; what the plain passes take
beyond the operators' sum is the host (Python, views). By itself: each different operator is run alone, over and over,
and counts as often as it occurred; beyond that sum are also colder processor caches. And the host alone: a pass of as
many layers as 1.3B's, so narrow that nothing else takes time. One thread, CPU seconds, the cases of bench.rollout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench.report import now, write
from bench.rollout import CASES, CAUSAL, STEPS, Case, hardware
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import NETWORK_SIZES, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR
from selfforcing_core.guided import Guided
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import OnStep, rollout
from selfforcing_core.rope import rotary_table

# Chunks of a video, and pairs of videos of which the one with the median counts.
CHUNKS = {"small": 3, "large": 2}
ROUNDS = {"small": 41, "large": 5}
NARROW = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=30, text_len=4, text_dim=8)
GROUPS = {"addmm": "linears", "mm": "linears", "convolution": "linears", "slow_conv3d_forward": "linears"}
WAN = NETWORK_SIZES["t2v-1.3b"]
ROWS, COLUMNS = (side // SPATIAL_FACTOR // WAN.patch_size[1] for side in (480, 832))  # of tokens
SECONDS = 0.2  # of repetitions per operator


class Recorder(TorchDispatchMode):
    """Counts operators that compute, by operator, shapes, strides and numbers, and keeps one call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self.calls: dict[tuple[Any, ...], Callable[[], object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Views compute nothing; _unsafe_view is one that does not say so.
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            leaves, _ = tree_flatten((args, kwargs))
            key = (func, *(_shape(leaf) for leaf in leaves))
            self.counts[key] += 1
            self.calls.setdefault(key, lambda: func(*args, **kwargs))
        return result


class Stopwatch(TorchDispatchMode):
    """CPU seconds of every operator that computes, by group, as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.groups[_group(func)] += time.thread_time() - start  # type: ignore[assignment]
        return result


def _group(func: Any) -> str:
    kind = func.overloadpacket.__name__
    return "attention" if "attention" in kind else GROUPS.get(kind, "elementwise")


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return leaf if isinstance(leaf, (int, float, str, bool, type(None))) else str(leaf)


def alone(call: Callable[[], object]) -> float:
    """Return CPU seconds of one call, the median over about SECONDS."""
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < SECONDS and len(seconds) < 500):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])  # the first call warms up


def video(model: CausalWan, case: Case, chunks: int, on_step: OnStep | None = None) -> float:
    """Return CPU seconds of a video."""
    text = Conditioning(torch.zeros(1, case.config.text_len, case.config.text_dim))
    shape = (chunks * CAUSAL.chunk, case.config.in_dim, case.latent_height, case.latent_width)
    start = time.thread_time()
    for _ in rollout(
        Guided(model, text), noise=SeededNoise(0), latent_shape=shape, causal=CAUSAL, steps=STEPS, on_step=on_step
    ):
        pass
    return time.thread_time() - start


def half_watched(model: CausalWan, case: Case, chunks: int, is_watched: bool) -> tuple[float, Counter[str]]:
    """Make a video whose passes are watched and plain in turn; is_watched: what comes before the first.

    Returns CPU seconds of the plain ones, each with what follows before the next one, and of the operators of the
    others by group.
    """
    watch, watching, plain, start = Stopwatch(), ExitStack(), 0.0, 0.0

    def change(chunk: int, step: int) -> None:
        nonlocal is_watched, plain, start
        if not is_watched:
            plain += time.thread_time() - start
        watching.close()
        is_watched = not is_watched
        if is_watched:
            watching.enter_context(watch)
        start = time.thread_time()

    if is_watched:
        watching.enter_context(watch)
    with watching:
        start = time.thread_time()
        video(model, case, chunks, change)
        change(0, 0)
    return plain, watch.groups


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """Report one case: the video's time over that of its operators, in their place and alone."""
    torch.manual_seed(0)
    case, chunks = CASES[name], CHUNKS[name]
    model = CausalWan(case.config).eval().requires_grad_(False)
    video(model, case, chunks)
    rounds = []
    for _ in range(ROUNDS[name]):
        # Each pass is plain in one of the two videos and watched in the other, so that together they are one of each.
        (plain, groups), (rest, more) = (half_watched(model, case, chunks, first) for first in (True, False))
        groups = groups + more
        rounds.append(((plain + rest) / groups.total(), plain + rest, groups))
    over, total, groups = sorted(rounds, key=lambda each: each[0])[len(rounds) // 2]
    with Recorder() as recorder:
        video(model, case, chunks)
    before, alone_seconds = video(model, case, chunks), 0.0
    for key, count in recorder.counts.items():
        alone_seconds += count * alone(recorder.calls[key])
    return {
        "chunks": chunks,
        "cpu_seconds": total,
        "over_kernels_in_place": over - 1,
        "over_kernels_in_place_of_every_round": sorted(round(each[0] - 1, 4) for each in rounds),
        "over_kernels_alone": (before + video(model, case, chunks)) / 2 / alone_seconds - 1,
        "share_by_group": {group: seconds / total for group, seconds in groups.items()},
        "operators": sum(recorder.counts.values()),
        "different_operators": len(recorder.counts),
    }


@torch.no_grad()
def measure_host() -> dict[str, float]:
    """Return milliseconds of the host: for a pass of a network in which nothing else takes time, and for what a chunk
    at 480x832 does once."""
    case, chunks = Case(NARROW, 2, 2, 21, repeats=9, goal=0), 7
    model = CausalWan(NARROW).eval().requires_grad_(False)
    passes = chunks * (len(STEPS.steps) + 1) - 1  # a clean pass after each chunk but the last
    seconds = [video(model, case, chunks) / passes for _ in range(case.repeats)][1:]
    tables = []
    for start in range(0, 20 * CAUSAL.chunk, CAUSAL.chunk):
        before = time.thread_time()
        rotary_table(WAN.head_dim, start, CAUSAL.chunk, ROWS, COLUMNS)
        tables.append(time.thread_time() - before)
    return {"pass_of_30_layers": 1000 * statistics.median(seconds), "rotary_table": 1000 * statistics.median(tables)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CHUNKS, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: measure(name) for name in (CHUNKS if args.case == "all" else [args.case])}
    report = {
        "cases": cases,
        "host_milliseconds": measure_host(),
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.kernels", *sys.argv[1:]]),
        "date": now(),
    }
    text = write(report, args.out)
    words = "; ".join(
        f"{name}: {case['over_kernels_in_place']:+.1%} over its kernels in place, "
        f"{case['over_kernels_alone']:+.1%} over them alone"
        for name, case in cases.items()
    )
    print(text if args.json else words)


if __name__ == "__main__":
    main()
