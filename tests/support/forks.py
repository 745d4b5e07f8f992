"""Programs in processes of their own that are forked from one which has imported the trainer.

An interpreter that imports torch and the trainer takes 3 CPU seconds before it does anything, and the trainer's tests
start dozens. Here one process, which multiprocessing calls the fork server, imports them once; it runs nothing else, so
that what is forked from it is as fresh as a new interpreter.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

# what the stages import, when they are imported and when they begin; and the estimate, whose processes come from the
# same server: only the list counts that was set before its first process
PRELOADED = [
    "pytest",
    "tests.support.training",
    "train.dry_supply",
    "train.footprint",
    "train.dmd",
    "train.diffusion",
    "train.ode",
    "train.trajectories",
    *("torch.distributed.checkpoint.state_dict_saver", "torch.distributed.checkpoint.state_dict_loader"),
    *("torch._dynamo", "transformers.models.auto", "transformers.tokenization_utils_tokenizers", "ftfy"),
]


@dataclass(frozen=True)
class Program:
    """A module that is run as `python -m` would, or as torchrun would with the environment that it gives."""

    module: str
    arguments: Sequence[str]
    folder: Path  # in which it is started
    environment: Mapping[str, str] = field(default_factory=dict)  # beside that of this process
    code: str = ""  # executed before the module


def ranks(module: str, arguments: Sequence[str], folder: Path, count: int) -> tuple[list[Program], Any]:
    """Return what torchrun would start on one machine, and the store where they meet, which must outlive them."""
    # the store is here, as torchrun's is in its agent, so that no port is chosen before it is bound
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Program(module, arguments, folder, {**shared, **each}) for each in own], store


def start(program: Program, log: Path) -> BaseProcess:
    """Start a program, which prints into `log`; the caller waits for it and ends it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **program.environment}
    process = _context().Process(target=_main, args=(program, environment, log))
    process.start()
    return process


def start_server() -> None:
    """Start the process that later ones are forked from, before the estimate of memory starts it with less in it."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver  # there is none on Windows

        _context()
        forkserver.ensure_running()


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def finish(programs: Sequence[Program], outputs: Path, timeout: float) -> tuple[list[int], list[str]]:
    """Run programs at the same time; return their exit statuses and what each printed, errors included.

    outputs: a folder for what they print. Raises TimeoutError after `timeout` seconds; no process outlives the call.
    """
    logs = [outputs / f"output-{number}.txt" for number in range(len(programs))]
    processes: list[BaseProcess] = []
    end = time.monotonic() + timeout
    try:
        for program, log in zip(programs, logs):
            processes.append(start(program, log))
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                printed = [log.read_text(encoding="utf-8")[-2000:] for log in logs if log.exists()]
                raise TimeoutError(f"still running after {timeout} s: {printed}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes], [log.read_text(encoding="utf-8") for log in logs]


def measure_no_device() -> None:
    """Give this process the rates of a device, which every run would measure for seconds before its first step."""
    from selfforcing_core.roofline.device import Card
    from train import engine

    setattr(engine, "measured_card", lambda device, dtype: Card(1e11, 1e10, 1.0, 1.0))  # noqa: B010, pyright knows its type


def _main(program: Program, environment: Mapping[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(program.folder)
    torch.set_num_threads(1)  # the variable was read when torch was imported
    measure_no_device()  # what tests.support.training.launch starts measures it
    exec(program.code, {})
    sys.argv = [program.module, *program.arguments]
    sys.modules.pop(program.module, None)  # run_module warns where what it runs is imported already
    # Multiprocessing ends a process without what atexit has to do, which in an interpreter of its own may print, fail
    # or hang. The rest of an interpreter's end takes a second: it is left to what tests.support.training.launch starts.
    try:
        runpy.run_module(program.module, run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
