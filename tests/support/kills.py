"""Kill a run again and again and see that it becomes what it would have been.

    python -m tests.support.kills --count 100 --out bench/results/kills.json

Each time the run is started with the same command and killed (SIGKILL) at a random moment, often in the middle of a
save; in the end it is left alone. Its weights, average, optimisers and log must equal those of a run that nobody
disturbed, bit-exactly. The run is forked from this process, which has loaded all that it imports once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.report import now, write
from bench.rollout import hardware
from tests.support.forks import PRELOADED, measure_no_device
from tests.support.training import numbers, run_settings
from train import run_checkpoints
from train.dmd import main as train


def started(arguments: Sequence[str], log: Path) -> int:
    """The process number of a run of its own."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = train(list(arguments))
    except BaseException:  # the child must never come back into the parent's code
        traceback.print_exc()
    finally:
        os._exit(status)


def finished(arguments: Sequence[str], log: Path) -> None:
    _, status = os.waitpid(started(arguments, log), 0)
    if status:
        raise RuntimeError(f"a run ended with {status}:\n{log.read_text()[-2000:]}")


def content(folder: Path) -> dict[str, torch.Tensor]:
    (newest,) = run_checkpoints.complete(folder)[-1:]
    return run_checkpoints.read(newest, "")


def kill(count: int, steps: int, seed: int, folder: Path) -> dict[str, int]:
    """Returns how often which moment was hit. Raises AssertionError if the runs differ."""
    rng = random.Random(seed)
    settings = [*run_settings(folder), f"max_steps={steps}", "save_every=1", "keep_last=2", "micro_batch=6"]
    log, calm, killed = folder / "log.txt", folder / "calm", folder / "killed"
    start = time.monotonic()
    finished([*settings, f"logdir={calm}"], log)
    inside = sum(json.loads(line)["seconds"] for line in (calm / "log.jsonl").read_text().splitlines())
    life = time.monotonic() - start - inside + 2.5 * inside / steps  # a start and about two steps
    report = {"kills": 0, "in_a_save": 0, "runs_that_reached_their_end": 1}
    while report["kills"] < count:
        child, end = started([*settings, f"logdir={killed}"], log), time.monotonic() + rng.uniform(0, life)
        status = None
        while status is None and time.monotonic() < end:
            time.sleep(0.005)
            actual, value = os.waitpid(child, os.WNOHANG)
            status = value if actual else None
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            report["kills"] += 1
            report["in_a_save"] += any(killed.glob(f"checkpoints/*{run_checkpoints.PARTIAL}"))
        else:
            compare(calm, killed)
            killed = folder / f"killed-{report['runs_that_reached_their_end']}"
            report["runs_that_reached_their_end"] += 1
    finished([*settings, f"logdir={killed}"], log)
    compare(calm, killed)
    return report


def compare(calm: Path, killed: Path) -> None:
    """Raise AssertionError unless two runs are the same."""
    expected, actual = content(calm), content(killed)
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, the first is {different[0]}"
    assert numbers(killed) == numbers(calm), "the logs differ"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8, help="of the run; it is saved after each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the report")
    args = parser.parse_args()
    for name in PRELOADED:  # otherwise half of the kills would hit an import
        importlib.import_module(name)
    measure_no_device()  # likewise
    with tempfile.TemporaryDirectory() as folder:
        counts = kill(args.count, args.steps, args.seed, Path(folder))
    if args.out is not None:
        what = (
            f"a run of {args.steps} steps, saved after each, killed at random moments; every run that reached its end"
        )
        what += " equals the undisturbed one bit-exactly (weights, average, optimisers, log)"
        command = " ".join(["python -m tests.support.kills", *sys.argv[1:]])
        write({"what": what, "command": command, "hardware": hardware(), "when": now(), **counts}, args.out)
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
