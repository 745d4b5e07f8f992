"""`python -m selfforcing_core`: see cli.py."""

import sys

from .generate.cli import main

if __name__ == "__main__":
    sys.exit(main())
