"""The two lists of dependencies agree, and neither can harm the ComfyUI that a user already has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# requirements.txt of ComfyUI 0.3.64, the oldest supported host; its README asks for torch 2.4 or newer.
HOST_BOUNDS = {"numpy": "1.25.0", "transformers": "4.37.2", "safetensors": "0.4.2", "av": "14.2.0", "torch": "2.4"}


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_pyproject_mirrors_requirements() -> None:
    assert PROJECT["dependencies"] == requirement_lines("requirements.txt")


def test_requirements_never_replace_what_the_host_needs() -> None:
    for line in requirement_lines("requirements.txt"):
        name, bound = re.fullmatch(r"([A-Za-z-]+)>=([0-9.]+)", line).groups()  # type: ignore[union-attr]
        assert name not in ("comfyui", "flash-attn"), f"{name} must not be mandatory"
        assert version(bound) <= version(HOST_BOUNDS.get(name, "9999")), f"{line} would upgrade the host's {name}"


def test_every_tested_version_satisfies_its_bound() -> None:
    pinned = dict(line.split("==") for line in requirement_lines("constraints.txt"))
    bounds = requirement_lines("requirements.txt") + requirement_lines("requirements-dev.txt")
    for line in bounds:
        name, bound = line.replace("[nodejs]", "").split(">=")
        assert version(pinned[name]) >= version(bound)


def test_registry_metadata_is_complete() -> None:
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]
    assert "comfyui" not in PROJECT["name"].lower(), "the registry refuses the host's name in a pack's name"
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert {"PublisherId", "DisplayName"} <= set(comfy)


def test_the_changelog_ends_at_this_version() -> None:
    told = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [found.split(".") for found in re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", told, re.M)]
    assert len(versions) == told.count("\n## "), "every heading is a version with its day"
    assert ".".join(versions[0]) == PROJECT["version"]
    assert versions == sorted(versions, key=lambda parts: tuple(map(int, parts)), reverse=True)


def test_a_release_leaves_out_nothing_that_runs() -> None:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in lines if not line.startswith("#")}
    assert all((ROOT / name).exists() for name in left_out), "what is left out exists"
    needed = {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"}
    assert not left_out & (needed | {"assets", "nodes", "selfforcing_core", "train", "web", "workflows"})


def test_the_map_names_every_file() -> None:
    told = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    files = [
        path for folder in ("selfforcing_core", "nodes", "train", "bench") for path in (ROOT / folder).rglob("*.py")
    ]
    names = {path.name for path in files if path.name not in ("__init__.py", "__main__.py")}
    missing = sorted(name for name in names if f"{name}`" not in told)
    assert not missing, f"docs/map.md says nothing of {', '.join(missing)}"
