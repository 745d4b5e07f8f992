"""The lowest versions of packages that pass the tests, and the sentence that refuses an older one.

Commands and nodes check when they start, before anything heavy is imported; importing the core as a library checks
nothing. `make test-versions` tries these numbers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata

CORE = {  # as pyproject.toml declares them
    "torch": "2.6",  # transformers 5 asks for it
    "safetensors": "0.4.2",
    "einops": "0.6",
    "huggingface-hub": "0.34",  # diffusers 0.36 asks for it
    "numpy": "1.25.0",
    "transformers": "4.37.2",
    "av": "14.2.0",
    "Pillow": "10.3",
    "tqdm": "4.64",
    "ftfy": "6.1",
}
NODES = {name: lowest for name, lowest in CORE.items() if name not in ("huggingface-hub", "tqdm")}
# torch: its FSDP2 adds up gradients as training needs since 2.8
TRAINING = CORE | {"torch": "2.8", "omegaconf": "2.3", "PyYAML": "6.0", "lmdb": "1.4"}
OPTIONAL = {"diffusers": "0.36", "gguf": "0.17.1"}  # looked at where they are used


def refusal(needed_by: str, lowest: Mapping[str, str]) -> str:
    """Return a sentence that names every installed package older than `lowest` says, or an empty one.

    needed_by: "training needs", say. Nightly and local versions (2.9.0.dev2025, 2.13.0+cpu) count as their release.
    A package that is missing, or does not say its version, is not judged here.
    """
    installed = {name: installed_version(name) for name in lowest}
    outdated = [name for name, version in installed.items() if version and _release(version) < _release(lowest[name])]
    if not outdated:
        return ""
    ages = " and ".join(f"{name} {installed[name]} is older than {lowest[name]}" for name in outdated)
    requirements = " ".join(f'"{name}>={lowest[name]}"' for name in outdated)
    # pip's own torch is for CUDA on Linux and for the CPU on Windows: it would replace the user's build.
    build = " (torch in the build for your device, see pytorch.org)" if "torch" in outdated else ""
    return f"{ages}, which {needed_by}; install with: pip install {requirements}{build}"


def installed_version(name: str) -> str:
    """Return the version of a package as loaded, else as installed, without importing it; '' where neither says."""
    # What is loaded counts: another folder on the path may come before the one that pip knows.
    loaded = getattr(sys.modules.get(name), "__version__", None)
    try:
        version = str(loaded or metadata.version(name))
    except metadata.PackageNotFoundError:
        return ""
    return version if _release(version) else ""


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release without zeros at its end, so that 2.6 and 2.6.0 are equal."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    release = [int(number) for number in numbers[0].split(".")] if numbers else []
    while release and not release[-1]:
        release.pop()
    return tuple(release)
