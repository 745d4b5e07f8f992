"""The live player's scripts: their logic under Node.js, and their types against what the host's front end offers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from selfforcing_core.policy import HISTORIES

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ROOT / "tests" / "web"
INSTALLED = ROOT / "build" / "web"  # ignored by git; kept, so that only the first run installs
REGISTRY_SECONDS = 60


def run(*command: str | Path, cwd: Path = ROOT, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_the_players_words_are_the_policies() -> None:
    words = re.search(r"const HISTORIES = \{(.*?)\};", (ROOT / "web" / "desk.js").read_text(encoding="utf-8"), re.S)
    assert words is not None
    assert tuple(re.findall(r"^ +(\w+):", words[1], re.M)) == HISTORIES


@pytest.fixture(scope="module")
def node() -> str:
    node_path = shutil.which("node")
    if node_path is None:
        pytest.skip("no Node.js found: install Node.js 20 or newer")
    major = int(run(node_path, "--version").stdout.strip().lstrip("v").split(".")[0])
    if major < 20:
        pytest.skip(f"Node.js {major} is too old for these tests: install Node.js 20 or newer")
    return node_path


@pytest.fixture(scope="module")
def compiler() -> Path:
    """Return the pinned TypeScript compiler, installed anew when the lock file changed."""
    lock = CHECKS / "package-lock.json"
    compiler = INSTALLED / "node_modules" / "typescript" / "bin" / "tsc"
    if compiler.is_file() and (INSTALLED / lock.name).read_bytes() == lock.read_bytes():
        return compiler
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm found: install npm 9 or newer, which comes with Node.js")
    INSTALLED.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(CHECKS / name, INSTALLED / name)
    try:
        process = run(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=INSTALLED, seconds=REGISTRY_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm's registry did not answer within {REGISTRY_SECONDS} s: run once with a connection")
    if process.returncode:
        # A mistake in this repository; anything else is taken for a machine without network.
        assert "EUSAGE" not in process.stderr, process.stderr  # package.json and its lock disagree
        pytest.skip(
            f"npm could not install TypeScript; run `npm ci` in {INSTALLED} to see why: {process.stderr[-300:]}"
        )
    return compiler


def test_the_players_logic_keeps_its_promises(node: str) -> None:
    process = run(node, "--test", *sorted(CHECKS.glob("*.test.js")))
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]


def test_the_players_types_agree_with_each_other_and_with_the_host(node: str, compiler: Path) -> None:
    process = run(node, compiler, "--project", CHECKS / "tsconfig.json")
    assert process.returncode == 0, process.stdout[-5000:]


@pytest.mark.parametrize(
    "name", ["playback.js", "panel.js", "desk.js", "elements.js", "film.js", "timeline.js", "words.js"]
)
def test_a_helper_module_does_nothing_when_the_host_imports_it(node: str, name: str) -> None:
    """The host's page imports every script of the folder. Node.js has no page: touching one would fail."""
    script = f"""
        const before = Object.keys(globalThis).join()
        await import({os.fspath(ROOT / "web" / name)!r})
        if (Object.keys(globalThis).join() !== before) throw new Error('it left something behind')
    """
    process = run(node, "--input-type=module", "--eval", script)
    assert process.returncode == 0, process.stderr[-2000:]
