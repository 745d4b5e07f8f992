"""`python -m selfforcing_core`: see cli.py."""

import gc
import sys

from .generate.cli import main

if __name__ == "__main__":
    status = main()
    # An interpreter looks for cycles once more before it ends: among all that torch made, which is long and in vain.
    gc.freeze()
    sys.exit(status)
