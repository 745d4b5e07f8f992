"""What a run reports while it goes on: a progress bar, log.jsonl, and curves in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfforcing_core.atomic import replacing, writing
from train.args import TrainArgs, to_dict
from train.distributed import World

log = logging.getLogger(__name__)
SHOWN = 6  # values beside the bar: the first ones that are no part of a group, losses before all


def check(args: TrainArgs) -> None:
    """Raise ValueError if what is asked for is not here, before anything is computed."""
    if args.wandb:
        try:
            import wandb  # noqa: F401  # type: ignore[import-not-found]
        except ImportError as error:
            raise ValueError("wandb=true needs the package wandb; install it, or leave it out") from error
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") != "offline":
            raise ValueError("wandb=true needs the key in the environment; set WANDB_API_KEY, or WANDB_MODE=offline")


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Hide errors of the disk in TensorBoard's thread: the next step meets and reports them in one sentence."""
    before = threading.excepthook
    threading.excepthook = lambda thrown: None if isinstance(thrown.exc_value, OSError) else before(thrown)
    try:
        yield
    finally:
        threading.excepthook = before


class Log:
    """The log of the first process; that of the others is silent."""

    def __init__(self, args: TrainArgs, world: World, step: int) -> None:
        self.is_on, self.folder = world.is_first, Path(args.logdir)
        self.bar: Any = tqdm(total=args.max_steps, initial=step, disable=not world.is_first, ascii=True)
        self.shown: dict[str, str] = {}  # the newest of each, since not every step has the student's
        self.boards: list[Any] = []
        if not self.is_on:
            return
        self._rewind(step)
        if args.tensorboard and (board := _tensorboard(self.folder, step)) is not None:
            self.boards.append(
                lambda metrics, at: [board.add_scalar(name, value, at) for name, value in metrics.items()]
            )
        if args.wandb:
            import wandb  # type: ignore[import-not-found]

            # A resumed run draws on in the same curves: "allow" takes the id up if the service knows it.
            settings = {"id": self._run_id(), "resume": "allow", "config": to_dict(args)}
            run = wandb.init(project="self-forcing", dir=str(self.folder), **settings)
            self.boards.append(lambda metrics, at: run.log(metrics, step=at))

    def _rewind(self, step: int) -> None:
        """Drop what was logged after the checkpoint that the run goes on from; those steps come again."""
        path = self.folder / "log.jsonl"
        if not path.is_file():
            return
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except ValueError:  # the run died while it wrote this line
                break
        with replacing(path, overwrite=True) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def _run_id(self) -> str:
        """Return the name under which the curves of this folder go on at Weights & Biases."""
        path = self.folder / "wandb-run-id.txt"
        if not path.is_file():
            with replacing(path) as temporary:
                temporary.write_text(os.urandom(4).hex(), encoding="utf-8")
        return path.read_text(encoding="utf-8")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line about a finished step. Raises NotWritten when the disk is full."""
        if not self.is_on:
            return
        path = self.folder / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.shown |= {name: f"{value:.3g}" for name, value in metrics.items() if "/" not in name}
        names = sorted(self.shown, key=lambda name: not name.endswith("_loss"))
        self.bar.set_postfix({name: self.shown[name] for name in names[:SHOWN]})
        self.bar.update()
        with writing(self.folder):
            for draw in self.boards:
                draw(metrics, step)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard curves: the package tensorboard is not installed")
        return None
    with writing(folder / "tensorboard"):
        # Curves beyond the step that the run goes on from are hidden, as lines of the log are dropped.
        return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)
