"""Training: one file per action, started from the project's root with `python -m train.x` or `torchrun -m train.x`."""

from __future__ import annotations

import os
import sys

from selfforcing_core.versions import TRAINING, refusal


def refuse_old_packages() -> None:
    """End a command in one line, with status 2, if a package is too old for training; one process a machine says so."""
    if reason := refusal("training needs", TRAINING):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train: {reason}", file=sys.stderr)
        sys.exit(2)


if sys.argv[0] == "-m":  # so says Python while it looks for the module of `-m train.x`; afterwards it names the file
    refuse_old_packages()
