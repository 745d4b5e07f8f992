"""Speed of the core's rollout on one CPU thread, as a share of what the same thread reaches in a plain matmul.

    python -m bench.rollout --json --case all --out bench/results/rollout.json

Random weights: the arithmetic does not depend on them. FLOPs are counted in closed form (see `pass_flops`), CPU time is
that of the process, and the matmul is measured first and again after every chunk, since a shared machine's speed
changes within a minute; so a share says how much of a chunk's time went into anything else.

Letters: B batch, P text tokens, E text width.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.report import now, write
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.geometry import tokens_per_frame
from selfforcing_core.guided import Guided
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.roofline.work import pass_flops

ROOT = Path(__file__).resolve().parent.parent
CAUSAL, STEPS = CausalConfig(chunk=3), StepConfig()
MATMUL_SIZE = 2048  # far beyond the caches, and as large as a processor's best rate needs


@dataclass(frozen=True)
class Case:
    """A network, the size of its videos, and what is wanted of it."""

    config: WanConfig
    latent_height: int
    latent_width: int
    latent_frames: int
    repeats: int  # whole videos; of each chunk the median is reported
    goal: float  # share of the matmul rate

    @property
    def tokens_per_frame(self) -> int:
        return tokens_per_frame(self.latent_height, self.latent_width)


# Two sizes, since what is not arithmetic weighs more in a small network: its share of the matmul rate is lower.
CASES = {
    "small": Case(WanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4), 16, 28, 9, repeats=5, goal=0.70),
    "large": Case(WanConfig(dim=512, ffn_dim=2048, num_heads=8, num_layers=8), 30, 52, 21, repeats=1, goal=0.85),
}


# ----------------------------------------------------------------- counting --
def chunk_flops(case: Case, index: int, *, is_last: bool) -> int:
    """Count the FLOPs of one chunk: its denoising passes, and the clean pass into the cache unless it is the last."""
    per_chunk = CAUSAL.chunk * case.tokens_per_frame
    passes = len(STEPS.steps) + (not is_last)
    return passes * pass_flops(case.config, per_chunk, (index + 1) * per_chunk)


# ---------------------------------------------------------------- measuring --
@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Time the block by wall and CPU; the dictionary is filled when it ends."""
    seconds: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield seconds
    seconds.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


def matmul_rate(repeats: int = 3) -> float:
    """Measure float32 FLOP per CPU second of a square matmul, the median of `repeats` after a warm-up."""
    # The best that this thread does: what a product of matrices does not reach, no chunk will.
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    out = torch.empty_like(a)
    rates = []
    for _ in range(repeats + 1):
        with clocks() as timing:
            torch.mm(a, b, out=out)
        rates.append(2 * MATMUL_SIZE**3 / timing["cpu_seconds"])
    return statistics.median(rates[1:])


def peak_bytes() -> int | None:
    """Return the process's largest resident memory so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def time_chunks(model: CausalWan, case: Case, latent_frames: int, seed: int) -> list[dict[str, float]]:
    """Time every chunk of one video, with "matmul", the mean of the matmul's rates before and after it."""
    config = case.config
    shape = (latent_frames, config.in_dim, case.latent_height, case.latent_width)
    embeds_BPE = torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(seed))
    chunks = rollout(
        Guided(model, Conditioning(embeds_BPE)), noise=SeededNoise(seed), latent_shape=shape, causal=CAUSAL, steps=STEPS
    )
    timings: list[dict[str, float]] = []
    # The rate is taken on both sides of each chunk, since the machine may be slower or faster by then.
    before = matmul_rate()
    for _ in range(latent_frames // CAUSAL.chunk):
        with clocks() as timing:
            next(chunks)
        after = matmul_rate()
        timings.append({**timing, "matmul": (before + after) / 2})
        before = after
    return timings


def median_chunks(videos: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Choose for each chunk the video with the median share of the matmul's rate."""
    return [
        sorted(same, key=lambda timing: timing["cpu_seconds"] * timing["matmul"])[len(same) // 2]
        for same in zip(*videos)
    ]


def measure(name: str) -> dict[str, Any]:
    """Run one case on one thread in this process and report it; everything in plain JSON types."""
    torch.set_num_threads(1)
    case, imported = CASES[name], peak_bytes()
    rate, load = matmul_rate(9), load_average()
    torch.manual_seed(0)
    model = CausalWan(case.config).eval().requires_grad_(False)
    time_chunks(model, case, CAUSAL.chunk, seed=0)  # warm-up: one chunk
    videos = [time_chunks(model, case, case.latent_frames, seed) for seed in range(case.repeats)]
    peak = peak_bytes()
    return {
        "case": {**asdict(case), "chunk": CAUSAL.chunk, "steps": list(STEPS.steps)},
        "matmul_gflops": round(rate / 1e9, 2),
        "load_average_1min": load,
        **shares(case, median_chunks(videos)),
        "goal": case.goal,
        "memory": memory(model, case, imported, peak),
    }


def shares(case: Case, timings: list[dict[str, float]]) -> dict[str, Any]:
    """Report each chunk and the whole video: seconds, CPU seconds, and FLOPs as a share of the matmul's rate then."""
    rows, total, possible = [], 0, 0.0
    for index, timing in enumerate(timings):
        flops = chunk_flops(case, index, is_last=index == len(timings) - 1)
        reachable = timing["cpu_seconds"] * timing["matmul"]
        total, possible = total + flops, possible + reachable
        row = {clock: round(timing[clock], 4) for clock in ("seconds", "cpu_seconds")}
        row |= {"gflop": round(flops / 1e9, 3), "matmul_gflops": round(timing["matmul"] / 1e9, 2)}
        rows.append({**row, "share_of_matmul": round(flops / reachable, 4)})
    cpu = sum(timing["cpu_seconds"] for timing in timings)
    return {"chunks": rows, "cpu_seconds": round(cpu, 3), "share_of_matmul": round(total / possible, 4)}


def memory(model: CausalWan, case: Case, imported: int | None, peak: int | None) -> dict[str, int | None]:
    """Report bytes: the process's peak, that after the imports alone, and the largest known parts."""
    cache = KVCache.num_bytes(
        case.config,
        batch=1,
        tokens_per_frame=case.tokens_per_frame,
        capacity=case.latent_frames,
        dtype=torch.float32,
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    matmul = 3 * MATMUL_SIZE**2 * 4
    return {
        "peak": peak,
        "peak_after_imports": imported,
        "weights": weights,
        "kv_cache": cache,
        "matmul_of_the_meter": matmul,
    }


# ------------------------------------------------------------------- report --
def load_average() -> float | None:
    """Return how many processes wanted to run in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def hardware() -> dict[str, Any]:
    """Describe processor and versions, without which a number means nothing."""
    return {
        "cpu": _cpu_name(),
        "logical_cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return the commit measured, with "+" if tracked files of the core differ from it; None outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT)]
        head = subprocess.run([*command, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*command, "diff", "--quiet", "HEAD", "--", "selfforcing_core", "bench/rollout.py"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")


def run(names: list[str], command: str) -> dict[str, Any]:
    """Measure each case in a process of its own, so that its peak memory is its own."""
    cases = {}
    for name in names:
        # Started anew and not forked: a fork begins with the memory of this process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            cases[name] = fresh.submit(measure, name).result()
    return {
        "benchmark": "rollout",
        "date": now(),
        "command": command,
        "commit": _commit(),
        "threads": 1,
        "dtype": "float32",
        "hardware": hardware(),
        "counting": " ".join(str(pass_flops.__doc__).split()),
        "cases": cases,
    }


def table(report: dict[str, Any]) -> str:
    """Show the report's main numbers."""
    lines = ["case   chunk  seconds  CPU seconds  share of matmul"]
    for name, case in report["cases"].items():
        for index, row in enumerate(case["chunks"]):
            lines.append(
                f"{name:6} {index:5}  {row['seconds']:7.3f}  {row['cpu_seconds']:11.3f}  {row['share_of_matmul']:15.1%}"
            )
        peak = case["memory"]["peak"]
        lines.append(
            f"{name:6}   all  matmul {case['matmul_gflops']} GFLOP/s, share {case['share_of_matmul']:.1%} "
            f"(goal {case['goal']:.0%}), peak {'unknown' if peak is None else f'{peak / 2**20:.0f} MiB'}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--out", type=Path, help="also write the report to this file, for instance in bench/results/")
    args = parser.parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    report = run(list(CASES) if args.case == "all" else [args.case], " ".join([parser.prog, *arguments]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    text = write(report, args.out)
    print(text if args.json else table(report))


if __name__ == "__main__":
    main()
