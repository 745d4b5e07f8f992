"""The two lists of dependencies agree, and neither can harm the ComfyUI that a user already has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from selfforcing_core.codecs.wan_vae import new_network
from selfforcing_core.config import StepConfig
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.solver import new_solver
from selfforcing_core.versions import CORE, NODES, OPTIONAL, TRAINING, installed_version, refusal

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# requirements.txt of ComfyUI 0.3.64, the oldest supported host. It asks for any torch.
HOST_BOUNDS = {"numpy": "1.25.0", "transformers": "4.37.2", "safetensors": "0.4.2", "av": "14.2.0"}
LINTERS = {"ruff", "pyright"}


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def bounds(lines: list[str]) -> dict[str, str]:
    """Name: lowest version."""
    return dict(line.replace("[nodejs]", "").split(">=") for line in lines)


DECLARED = bounds(PROJECT["dependencies"])
EXTRAS = {name: bounds(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def test_pyproject_mirrors_requirements() -> None:
    """But for torch, of which pip would put another build into the host."""
    assert [line for line in PROJECT["dependencies"] if line != f"torch>={DECLARED['torch']}"] == [
        line for line in requirement_lines("requirements.txt") if line != "torch"
    ]


def test_requirements_never_replace_what_the_host_needs() -> None:
    for line in requirement_lines("requirements.txt"):
        name, _, bound = line.partition(">=")
        assert name not in ("comfyui", "flash-attn"), f"{name} must not be mandatory"
        assert bool(bound) == (name != "torch"), f"{line}: a bound of torch would upgrade the host's"
        assert not bound or Version(bound) <= Version(HOST_BOUNDS.get(name, "9999")), f"{line} would upgrade the host's"


def test_every_tested_version_satisfies_its_bound() -> None:
    pinned = dict(line.split("==") for line in requirement_lines("constraints.txt"))
    lowest = DECLARED | bounds(requirement_lines("requirements-dev.txt")) | EXTRAS["cli"] | EXTRAS["train"]
    assert all(Version(pinned[name]) >= Version(bound) for name, bound in lowest.items())


def test_the_lowest_versions_that_are_tried_are_those_that_are_declared() -> None:
    tried = dict(line.split("==") for line in requirement_lines("constraints-lowest.txt"))
    declared = DECLARED | bounds(requirement_lines("requirements-dev.txt")) | EXTRAS["cli"]
    assert tried == {name: bound for name, bound in declared.items() if name not in LINTERS}


def test_what_is_refused_at_the_start_is_what_is_declared_as_too_old() -> None:
    assert DECLARED | EXTRAS["train"] == TRAINING
    assert {name: DECLARED[name] for name in CORE} == CORE
    assert set(TRAINING) - set(CORE) == {"omegaconf", "lmdb", "PyYAML"}, "of training alone"
    assert EXTRAS["cli"] == OPTIONAL
    assert NODES.items() < CORE.items()


@pytest.mark.parametrize(
    ("installed", "is_refused"),
    [
        ("2.4.1", True),
        ("2.5.1", False),
        ("2.5.1.0", False),
        ("2.5", True),
        ("2.13.0+cpu", False),
        ("10", False),
        ("2.9.0.dev20251001+cu130", False),
        ("2.4.0a0+git12ab", True),
        ("2.5.1rc1", False),
        ("unknown", False),
        ("", False),
        ("None", False),
    ],
)
def test_only_an_older_release_is_refused(monkeypatch: pytest.MonkeyPatch, installed: str, is_refused: bool) -> None:
    """Nightly and local builds count as their release; what does not say its version is not judged."""
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=installed or None))
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    assert bool(refusal("the nodes need", {"torch": "2.5.1"})) == is_refused


def test_a_missing_package_is_not_called_old(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_version("no-such-package") == ""
    assert refusal("training needs", {"no-such-package": "1"}) == ""
    monkeypatch.setattr(metadata, "version", lambda name: None)  # as of a package whose installation was interrupted
    assert installed_version("Pillow") == ""


def test_what_is_loaded_counts_more_than_what_pip_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.4.1")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.13.0+cpu"))
    assert installed_version("torch") == "2.13.0+cpu"


def start_with(folder: Path, package: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where pip seems to have installed an older `package`, as name==version."""
    name, number = package.split("==")
    (folder / f"{name}-{number}.dist-info").mkdir(parents=True)
    (folder / f"{name}-{number}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


PACK = """
import asyncio, importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=["."])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
try:
    asyncio.run(pack.comfy_entrypoint())
except Exception as error:  # as ComfyUI does
    sys.exit(f"Error while calling comfy_entrypoint: {error}")
"""
STARTS = {
    "selfforcing: torch 2.4.1 is older than 2.6, which the command line needs": (
        *("torch==2.4.1", "-m", "selfforcing_core", "inspect", "no-such-file"),
    ),
    "train: torch 2.7.1 is older than 2.8, which training needs": ("torch==2.7.1", "-m", "train.dmd", "config=tiny"),
    "train: lmdb 1.3 is older than 1.4, which training needs": ("lmdb==1.3", "-m", "train.plan"),
    "Error while calling comfy_entrypoint: torch 2.4.1 is older than 2.6, which the nodes of Self Forcing need": (
        "torch==2.4.1",
        "-c",
        PACK,
    ),
}


@pytest.mark.parametrize("sentence", STARTS)
def test_an_older_package_is_refused_in_one_line_at_the_start(sentence: str, tmp_path: Path) -> None:
    package, *command = STARTS[sentence]
    done = start_with(tmp_path, package, *command)
    assert done.returncode == (1 if "-c" in command else 2)
    assert done.stdout == ""
    assert done.stderr.startswith(sentence)
    assert "install with: pip install " in done.stderr
    assert done.stderr.count("\n") == 1


def test_importing_the_library_asks_for_nothing(tmp_path: Path) -> None:
    done = start_with(
        tmp_path, "torch==2.4.1", "-c", "import train, selfforcing_core.geometry, selfforcing_core.generate.cli"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_older_diffusers_is_refused_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(__version__="0.33.1"))
    with pytest.raises(ValueError, match=r"diffusers 0.33.1 is older than 0.36, .* or use solver 'euler'"):
        new_solver("unipc", FlowSchedule(StepConfig((1000.0, 500.0))), [])
    with pytest.raises(ValueError, match=r"diffusers 0.33.1 is older than 0.36, .* or decode with a TAEHV"):
        new_network(8, 1)


def test_registry_metadata_is_complete() -> None:
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
    assert "comfyui" not in PROJECT["name"].lower(), "the registry refuses the host's name in a pack's name"
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert {"PublisherId", "DisplayName"} <= set(comfy)


def test_the_changelog_ends_at_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [
        version.split(".") for version in re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changelog, re.M)
    ]
    assert len(versions) == changelog.count("\n## "), "every heading is a version with its day"
    assert ".".join(versions[0]) == PROJECT["version"]
    assert versions == sorted(versions, key=lambda parts: tuple(map(int, parts)), reverse=True)


def test_a_release_leaves_out_nothing_that_runs() -> None:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in lines if not line.startswith("#")}
    assert all(any(ROOT.glob(name)) for name in left_out), "what is left out exists"
    needed = {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"}
    assert not left_out & (needed | {"assets", "nodes", "selfforcing_core", "train", "web", "workflows"})


def test_what_the_readme_links_to_is_in_a_release(tmp_path: Path) -> None:
    """Tests are the exception: the README names one as the place of the proof, and they are half of the files."""
    copy_release(tmp_path)
    links = re.findall(r"\]\(([^)#:]+)[)#]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 30
    missing = [link for link in links if not link.startswith("tests/") and not (tmp_path / link).exists()]
    assert not missing, f"README.md links to {', '.join(missing)}, which .comfyignore leaves out"


def test_the_map_names_every_file() -> None:
    map_text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    files = [
        path for folder in ("selfforcing_core", "nodes", "train", "bench") for path in (ROOT / folder).rglob("*.py")
    ]
    names = {path.name for path in files if path.name not in ("__init__.py", "__main__.py")}
    missing = sorted(name for name in names if f"{name}`" not in map_text)
    assert not missing, f"docs/map.md says nothing of {', '.join(missing)}"


def test_files_that_drive_a_browser_are_marked_for_it() -> None:
    """.ci/run picks them by their mark: with a newer front end those alone, on an older ComfyUI all but those."""
    files = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests/comfyui").glob("test_*.py")}
    driving = {path.name for path, text in files.items() if re.search(r"\bchromium\b|browse\.py", text, re.IGNORECASE)}
    marked = {path.name for path, text in files.items() if "\npytestmark = pytest.mark.browser\n" in text}
    assert "test_browser.py" in driving
    assert driving == marked


def copy_release(folder: Path) -> None:
    """Write there what the registry would publish: the files under version control but for those in .comfyignore."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = [line for line in lines if not line.startswith("#")]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not any(fnmatch(name, f"{line}*") for line in left_out) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def test_the_lint_of_comfy_test_objects_to_training_code_alone(tmp_path: Path) -> None:
    """It asks every layer to be one of ComfyUI's; training knows no ComfyUI, and no node imports it."""
    program = os.environ.get("COMFY_TEST") or shutil.which("comfy-test")
    if program is None:
        pytest.skip(
            "no comfy-test: python3 -m venv V && V/bin/pip install comfy-test, then COMFY_TEST=V/bin/comfy-test"
        )
    copy_release(tmp_path)
    lint = [program, "lint", "--json", str(tmp_path)]
    results = json.loads(subprocess.run(lint, capture_output=True, text=True, check=False).stdout)["results"]
    assert results["javascript"]["passed"], results["javascript"].get("details")
    named = re.findall(r"^(\S+\.py):$", results["syntax"].get("details") or "", re.MULTILINE)
    assert results["syntax"]["passed"] or named
    assert all(name.startswith("train/") for name in named), results["syntax"]["details"]
