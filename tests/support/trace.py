"""How often a run changes file on its way from the request to the first line of the rollout.

    python -m tests.support.trace

Counted are calls into another file of the core than the one before, for the bundled model and two prompts. Returns are
not counted, so that every callee costs two of them where its caller goes on to another file. With --hops each is shown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from selfforcing_core.generate.request import Request
from selfforcing_core.generate.run import generate

PROMPTS = "0s: a red square moving left; 1s: a blue circle moving left"


class _Reached(Exception):
    """The rollout begins."""


def hops() -> list[tuple[str, str]]:
    """Return each file that a run enters before its rollout, with the function that is called there first."""
    entered: list[tuple[str, str]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        folder, _, name = frame.f_code.co_filename.replace("\\", "/").rpartition("/selfforcing_core/")
        if event != "call" or not folder or (entered and entered[-1][0] == name):
            return
        if name == "rollout.py":
            raise _Reached
        entered.append((name, frame.f_code.co_name))

    with tempfile.TemporaryDirectory() as folder:
        request = Request(PROMPTS, Path(folder) / "out.mp4", frames=33)
        sys.setprofile(watch)
        try:
            generate(request)
        except _Reached:
            return entered
        finally:
            sys.setprofile(None)
    raise AssertionError("the rollout was not reached")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hops", action="store_true", help="show each")
    entered = hops()
    for name, function in entered if parser.parse_args().hops else ():
        print(f"{name:36}{function}")
    print(f"{len(entered)} changes of file before the rollout, {len({name for name, _ in entered})} files")


if __name__ == "__main__":
    main()
