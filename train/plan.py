"""What a run will take, known before anything is allocated: python -m train.plan config=self_forcing_dmd

Bytes per process: the real training step runs on tensors without memory (torch's FakeTensorMode, a process group that
sends nothing), whose bytes are counted. Time: arithmetic and traffic in closed form over what a card attains. Networks
have the sizes named by `size`, `teacher_size` and `critic_size`, so no file is read. processes=64 says how many the
run will have, stage=ode or stage=diffusion that it is one of the stages before the distillation.
"""

from __future__ import annotations

import json
import os
import sys

from selfforcing_core.atomic import print_result
from train.args import DiffusionArgs, DmdArgs, OdeArgs, TrainArgs, mistake, parse
from train.diffusion import FlowMatching
from train.dmd import Distillation
from train.engine import Trainer
from train.footprint import estimate
from train.ode import Regression

STAGES: dict[str, tuple[type[TrainArgs], type[Trainer]]] = {
    "dmd": (DmdArgs, Distillation),
    "diffusion": (DiffusionArgs, FlowMatching),
    "ode": (OdeArgs, Regression),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    own = {"processes": os.environ.get("WORLD_SIZE", "1"), "stage": "dmd"}
    rest = []
    # These two are no settings of a stage, so they are taken out before the strict parser sees the rest.
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
        settings, stage = STAGES[own["stage"]]
        args = parse(settings, rest, __doc__)
        print_result(json.dumps(estimate(args, int(own["processes"]), stage), indent=2))
    except ValueError as error:
        return mistake("train.plan", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
