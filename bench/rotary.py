"""Ways to compute the rotary embedding behind its norm on one CPU thread, run plainly and compiled.

    python -m bench.rotary --out bench/results/rotary-cpu-1thread.json

complex: a product of complex numbers, as the model has it; torch.compile leaves it to torch's own kernel and says so.
real: the same from cosines and sines, which torch.compile makes code of. Best of many runs, milliseconds of the CPU,
for queries of the larger case of bench.rollout.

Letters: B batch, L query tokens, N heads, K head width.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.feedforward import best_milliseconds
from bench.report import now, write
from bench.rollout import CASES, CAUSAL, hardware
from selfforcing_core.rope import apply_rotary, rotary_table


def in_real_numbers(x_BLNK: Tensor, table_L1K: Tensor) -> Tensor:
    """Turn pairs of features by the table's angles, (a + ib) (cos + i sin), without complex numbers."""
    (a, b), (cos, sin) = x_BLNK.unflatten(-1, (-1, 2)).unbind(-1), torch.view_as_real(table_L1K).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@torch.no_grad()
def measure(repeats: int) -> dict[str, float]:
    """Return milliseconds of each way, run plainly and compiled."""
    case = CASES["large"]
    config = case.config
    rows, columns = case.latent_height // config.patch_size[1], case.latent_width // config.patch_size[2]
    table = rotary_table(config.head_dim, 0, CAUSAL.chunk, rows, columns)
    x, weight = torch.randn(1, len(table), config.dim), torch.randn(config.dim)

    def behind_norm(turn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def whole(x: Tensor, table: Tensor) -> Tensor:
            normed = F.rms_norm(x, (config.dim,), weight, config.eps)
            return turn(normed.unflatten(-1, (config.num_heads, -1)), table)

        return torch.compile(whole) if is_compiled else whole

    milliseconds = {}
    for is_compiled in (False, True):
        for name, turn in (("complex", apply_rotary), ("real", in_real_numbers)):
            work = behind_norm(turn)
            key = f"{name}, compiled" if is_compiled else name
            milliseconds[key] = best_milliseconds(functools.partial(work, x, table), repeats)
    return milliseconds


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # of torch.compile, which says that it leaves complex numbers alone
        warnings.simplefilter("ignore")
        milliseconds = measure(args.repeats)
    report = {
        "milliseconds": milliseconds,
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.rotary", *sys.argv[1:]]),
        "date": now(),
    }
    print(write(report, args.out))


if __name__ == "__main__":
    main()
