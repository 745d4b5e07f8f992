"""Run the tests that matter with the lowest versions that are declared and with the newest that the index gives.

    python -m tests.support.versions --out bench/results/versions.json        # or: make test-versions

Two environments, .venv-lowest and .venv-newest, are made anew: several GB each where the index gives CUDA builds of
torch. The first has constraints-lowest.txt, then the lowest torch of training for training's tests, then the lowest
torch again under the newest of what is built on it. Tests run on the CPU. The status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.versions import CORE, TRAINING

ROOT = Path(__file__).resolve().parents[2]
CORE_TESTS = (
    "golden",
    "rollout",
    "kv_cache",
    "layers",
    "attention",
    "precision",
    "guidance",
    "generate",
    "checkpoint",
    "convert",
    "download",
    "snapshot",
    "text",
    "prompt_files",
    "media",
    "video",
)
TRAINING_TESTS = ("losses", "data", "args", "conditions", "lora", "train")
ENCODER_TESTS = ("golden", "text", "media", "guidance", "download", "checkpoint")
BUILT_ON_TORCH = ("transformers", "diffusers", "huggingface-hub", "safetensors", "einops", "numpy")
TOOLS = ("pytest", "hypothesis", "diffusers", "tensorboard")
SAID = ("torch", "transformers", "diffusers", "huggingface-hub", "numpy", "safetensors", "av", "Pillow")
HOURS = 3  # of one set of tests, after which something hangs


def new_environment(name: str, interpreter: str, packages: list[str]) -> Path:
    """Make the environment anew with these arguments of pip; returns its Python."""
    if shutil.which(interpreter) is None:
        sys.exit(
            f"tests.support.versions: there is no {interpreter}; name another with --lowest-python or --newest-python"
        )
    folder = ROOT / f".venv-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install(python, packages)
    return python


def install(python: Path, packages: list[str]) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *packages]
    subprocess.run(command, cwd=ROOT, check=True)


def outcome(name: str, python: Path, tests: tuple[str, ...]) -> dict[str, Any]:
    """Run these files of tests: what was installed, how many passed, and which did not."""
    code = f"import importlib.metadata, json, sys; names = {SAID}; "
    code += "print(json.dumps([sys.version.split()[0], *map(importlib.metadata.version, names)]))"
    installed = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    files = [str(next((ROOT / "tests").glob(f"*/test_{test}.py")).relative_to(ROOT)) for test in tests]
    begun = time.monotonic()
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=HOURS * 3600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode not in (0, 1):  # pytest's own words for tests that did not run at all
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
    counts = {
        kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])
    }
    return {
        "name": name,
        "tests": list(tests),
        "versions": dict(zip(("python", *SAID), installed)),
        **counts,
        "is_passed": done.returncode == 0,
        "not_passed": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M),
        "seconds": round(time.monotonic() - begun),
    }


def lowest(interpreter: str) -> list[dict[str, Any]]:
    python = new_environment("lowest", interpreter, ["-r", "constraints-lowest.txt"])
    outcomes = [outcome("lowest", python, CORE_TESTS)]
    install(python, [f"torch=={TRAINING['torch']}"])
    outcomes.append(outcome("lowest of training", python, TRAINING_TESTS))
    # as on a machine whose torch must stay: what is built on it is another matter than what is built on the newest
    install(python, [f"torch=={CORE['torch']}", "--upgrade", *BUILT_ON_TORCH])
    return [*outcomes, outcome("lowest torch, newest others", python, ENCODER_TESTS)]


def newest(interpreter: str) -> list[dict[str, Any]]:
    python = new_environment("newest", interpreter, ["-r", "requirements.txt", *TOOLS])
    return [outcome("newest", python, CORE_TESTS), outcome("newest, training", python, TRAINING_TESTS)]


def table(outcomes: list[dict[str, Any]]) -> str:
    """The outcomes as columns of text, and a line for every test that did not pass."""
    head = ("", "python", *SAID, "passed", "failed", "skipped", "seconds")
    rows: list[tuple[str, ...]] = [head]
    for one in outcomes:
        failed = one.get("failed", 0) + one.get("error", 0)
        figures = (one.get("passed", 0), failed, one.get("skipped", 0), one["seconds"])
        rows.append((one["name"], *one["versions"].values(), *map(str, figures)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + [f"{one['name']}: {test}" for one in outcomes for test in one["not_passed"]])


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.versions")
    parser.add_argument("--which", choices=["lowest", "newest", "both"], default="both")
    parser.add_argument("--lowest-python", default="python3.10", help="(default: %(default)s)")
    parser.add_argument("--newest-python", default=sys.executable, help="(default: the one that runs this)")
    parser.add_argument("--out", type=Path, help="report as JSON")
    options = parser.parse_args()
    outcomes: list[dict[str, Any]] = []
    if options.which != "newest":
        outcomes += lowest(options.lowest_python)
    if options.which != "lowest":
        outcomes += newest(options.newest_python)
    report = {
        "what": "the tests with the lowest declared versions and the newest of the index",
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "tests.support.versions", *sys.argv[1:]]),
        "when": now(),
        "outcomes": outcomes,
    }
    write(report, options.out)
    print(table(outcomes))
    return 0 if all(one["is_passed"] for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
