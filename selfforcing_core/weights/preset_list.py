"""The table of presets for people and programs: what each is run with, and what is missing to run it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .download import DOWNLOADS, UNSTATED
from .preset_settings import absent_files, lacking
from .presets import PRESETS, Preset

HEADINGS = (
    *("preset", "release", "chunk", "window", "sink", "policy", "steps", "shift", "solver", "weights"),
    *("beside it", "frames a second", "size", "licence", "missing here"),
)
OPEN = "?"  # of a number that nobody has read


def list_presets(folder: Path = DOWNLOADS) -> list[dict[str, Any]]:
    """Return every preset in plain JSON types, with where each number was read and what is missing to run it.

    folder: where `download` puts files.
    """
    return [
        {**asdict(preset), "sources": preset.sources, "missing": _missing(preset, folder)}
        for preset in PRESETS.values()
    ]


def presets_in_words(folder: Path = DOWNLOADS) -> str:
    """Return every preset with its title and, a line each, what is missing to run it."""
    lines = []
    for preset in PRESETS.values():
        missing = _missing(preset, folder)
        lines.append(f"{preset.name:38}{preset.title}{'' if missing else '; ready'}")
        lines += [f"{'':38}- {line}" for line in missing]
    return "\n".join(lines)


def presets_table() -> str:
    """Return the table of docs/models.md in Markdown; nothing in it depends on the machine."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(preset) for preset in PRESETS.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _missing(preset: Preset, folder: Path) -> list[str]:
    return [*lacking(preset), *absent_files(preset, folder)]


def _cells(preset: Preset) -> tuple[str, ...]:
    release = preset.title
    if preset.repository is not None:
        release = f"[{release}](https://huggingface.co/{preset.repository})"
    size = None if preset.native_size is None else "{1}x{0}".format(*preset.native_size)
    numbers = (preset.chunk, preset.window, preset.sink, preset.policy)
    return (
        f"`{preset.name}`",
        release,
        *(_cell(preset, name, number) for name, number in zip(("chunk", "window", "sink", "policy"), numbers)),
        _steps(preset),
        *(_cell(preset, name, getattr(preset, name)) for name in ("shift", "solver", "weights")),
        ", ".join(f"`{file}`" for file in preset.partner_files),
        _cell(preset, "fps", preset.fps),
        _cell(preset, "native_size", size),
        preset.licence or UNSTATED,
        "; ".join(lacking(preset)) or "nothing",
    )


def _cell(preset: Preset, name: str, value: Any) -> str:
    if value is None:
        return "" if name in preset.not_used else OPEN
    return f"{value:g}" if isinstance(value, float) else str(value)


def _steps(preset: Preset) -> str:
    if preset.steps is None:
        return OPEN
    words = " ".join(f"{step:g}" for step in preset.steps)
    words += {True: "", False: " (not warped)", None: f" (warped{OPEN})"}[preset.warp]
    first = preset.first_chunk_steps
    return f"{words}; first chunk {' '.join(f'{step:g}' for step in first)}" if first else words
