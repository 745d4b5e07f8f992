"""Ways to compute a block's feed-forward on one CPU thread: what might be gained on the place where most time goes.

    python -m bench.feedforward --out bench/results/feedforward-cpu-1thread.json

plain: linear, torch's tanh GELU, linear, as the model has it. sigmoid: the same function as x sigmoid(2 u), in place.
blocks: plain on 128 rows at a time, so that the wide middle stays in the processor's cache. products: the two matrix
products alone. Best of many runs, milliseconds of the CPU; sizes of the cases of bench.rollout.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.report import now, write
from bench.rollout import CASES, CAUSAL, hardware

# GELU in its tanh form (arXiv 1606.08415): x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
SLOPE = 2 * math.sqrt(2 / math.pi)
ROWS = 128  # of float32 and 1,024 to 2,048 columns: half to one megabyte


def best_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Return CPU milliseconds of the fastest run, after two that warm up; whatever disturbs only makes runs slower."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds[2:])


def by_sigmoid(x: Tensor) -> Tensor:
    """Compute GELU in its tanh form by a sigmoid, in place of a new tensor."""
    inner = torch.addcmul(torch.tensor(SLOPE), x, x, value=SLOPE * 0.044715)
    return inner.mul_(x).sigmoid_().mul_(x)


@torch.no_grad()
def measure(name: str, repeats: int) -> dict[str, float]:
    """Return milliseconds of each way for the rows of one chunk of a case."""
    case = CASES[name]
    up, down = nn.Linear(case.config.dim, case.config.ffn_dim), nn.Linear(case.config.ffn_dim, case.config.dim)
    x = torch.randn(CAUSAL.chunk * case.tokens_per_frame, case.config.dim)
    wide = torch.randn(len(x), case.config.ffn_dim)

    def plain(rows: Tensor) -> Tensor:
        return down(F.gelu(up(rows), approximate="tanh"))

    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(x),
        "sigmoid": lambda: down(by_sigmoid(up(x))),
        "blocks": lambda: torch.cat([plain(rows) for rows in x.split(ROWS)]),
        "products": lambda: (torch.mm(x, up.weight.T), torch.mm(wide, down.weight.T)),
        "gelu": lambda: F.gelu(wide, approximate="tanh"),
        "tanh": lambda: torch.tanh(wide),
    }
    return {way: best_milliseconds(work, repeats) for way, work in ways.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "milliseconds": {name: measure(name, args.repeats) for name in CASES},
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.feedforward", *sys.argv[1:]]),
        "date": now(),
    }
    print(write(report, args.out))


if __name__ == "__main__":
    main()
