"""Files in ComfyUI's folders: what the nodes' lists offer, where a choice lies, and where results go."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import folder_paths

from ...selfforcing_core.weights.bundles import list_bundles, resolve_text_encoder

BUNDLE_MARK = " (bundled)"
# Where files of models and of tiny decoders lie, and how those of ours are called.
MODEL_FOLDER = "diffusion_models"
TAEHV_FOLDERS = ("vae_approx", "vae")
LIKELY_MODELS = ("self_forcing", "self-forcing", "causal", "causvid", "wan2.1", "wan")
LIKELY_TAEHVS = ("taew2_1", "taehv", "tae")


def file_choices(*folders: str, likely: Sequence[str] = ()) -> list[str]:
    """Return the files of ComfyUI's model folders, each name once, and the bundled models: a node takes the first.

    So whoever has a real model and a decoder for it gets those, and nobody a bundled part beside a real one. likely:
    parts of the names that come before others.
    """
    # A dictionary keeps the order and drops a name that two folders have: ComfyUI's list takes the first of them, too.
    files = dict.fromkeys(name for folder in folders for name in folder_paths.get_filename_list(folder))
    ranked = sorted(files, key=lambda name: _rank(Path(name).name.lower(), likely))
    return _in_order(ranked)


def _in_order(real: list[str]) -> list[str]:
    """Return real parts first only where there is one of each kind that the nodes load: a new node takes the first."""
    # By default a new graph pairs the first choices of three lists. A real model beside the tiny one's decoder, or the
    # other way round, would give noise; so all three lists begin with a bundled part until the real ones are complete.
    bundled = [name + BUNDLE_MARK for name in list_bundles()]
    return real + bundled if _has_real_parts() else bundled + real


def _has_real_parts() -> bool:
    """Return whether there is a likely video model, a TAEHV and a text encoder in the layout of transformers."""
    names = {
        kind: [Path(name).name.lower() for folder in folders for name in folder_paths.get_filename_list(folder)]
        for kind, folders in (("model", (MODEL_FOLDER,)), ("decoder", TAEHV_FOLDERS))
    }
    has_kinds = [
        any(_rank(name, likely) < len(likely) for name in names[kind])
        for kind, likely in (("model", LIKELY_MODELS), ("decoder", LIKELY_TAEHVS))
    ]
    return all(has_kinds) and bool(_text_encoder_folders())


def _rank(name: str, likely: Sequence[str]) -> int:
    return next((rank for rank, part in enumerate(likely) if part in name), len(likely))


def file_of(choice: str, bundled: Callable[[str], Path], *folders: str) -> Path:
    """Return the path behind a choice of `file_choices`; `bundled` finds a bundle's part.

    Raises ValueError if it is gone.
    """
    if choice.endswith(BUNDLE_MARK):
        return bundled(choice[: -len(BUNDLE_MARK)])
    for folder in folders:
        # It also looks where extra_model_paths.yaml points, as ComfyUI's own loaders do.
        path = folder_paths.get_full_path(folder, choice)
        if path is not None:
            return Path(path)
    raise ValueError(f"{choice!r} is in none of models/{', models/'.join(folders)}; refresh the list and choose again")


def partner_folders() -> list[Path]:
    """Return where a file that belongs to a model may lie, first where the models do, into which both are fetched."""
    return [Path(root) for name in (MODEL_FOLDER, "loras") for root in folder_paths.get_folder_paths(name)]


def text_encoder_choices() -> list[str]:
    """Return subfolders of models/text_encoders in the layout of transformers, then the bundled text encoders."""
    return _in_order(_text_encoder_folders())


def _text_encoder_folders() -> list[str]:
    roots = [Path(root) for root in folder_paths.get_folder_paths("text_encoders")]
    # ComfyUI lists single files there; a folder with a config.json is a model in the layout of transformers.
    names = [path.parent.name for root in roots if root.is_dir() for path in sorted(root.glob("*/config.json"))]
    return list(dict.fromkeys(names))


def text_encoder_folder(choice: str) -> Path:
    """Return the folder behind a choice of `text_encoder_choices`. Raises ValueError if it is gone."""
    if choice.endswith(BUNDLE_MARK):
        return resolve_text_encoder(choice[: -len(BUNDLE_MARK)])
    for root in folder_paths.get_folder_paths("text_encoders"):
        if (Path(root) / choice / "config.json").is_file():
            return Path(root) / choice
    raise ValueError(f"{choice!r} is no folder with a config.json in models/text_encoders; refresh the list")


def snapshot_choices(suffix: str) -> list[str]:
    """Return files that end so, below the output folder and then the input folder, newest first."""
    # Output first: there lies what Snapshot wrote. Input is where people put files of other machines.
    roots = [Path(folder_paths.get_output_directory()), Path(folder_paths.get_input_directory())]
    files = [
        (path.stat().st_mtime, path.relative_to(root).as_posix()) for root in roots for path in root.rglob(f"*{suffix}")
    ]
    return list(dict.fromkeys(name for _, name in sorted(files, reverse=True)))


def snapshot_file(choice: str) -> Path:
    """Return the file behind a choice of `snapshot_choices`. Raises ValueError if it is gone or lies elsewhere."""
    for root in (Path(folder_paths.get_output_directory()), Path(folder_paths.get_input_directory())):
        path = (root / choice).resolve()  # a queued graph may hold any text here, "../" too
        if path.is_relative_to(root.resolve()) and path.is_file():
            return path
    raise ValueError(f"{choice!r} is neither in the output nor in the input folder; refresh the list and choose again")


def fingerprint(path: Path) -> str:
    """Return what changes when the file (or any file of the folder) does, so that ComfyUI reloads it only then."""
    # Times and no contents: this is asked of every loader each time that a graph is queued.
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return "|".join(f"{file}:{os.path.getmtime(file)}" for file in files if file.is_file())


def output_file(prefix: str, ending: str, width: int, height: int) -> tuple[Path, str]:
    """Return a new file in the output folder, numbered as ComfyUI numbers its own, and its subfolder there."""
    # %width%, %height% and the parts of a date are filled in by it, and folders are made.
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    return Path(folder) / f"{name}_{counter:05}_{ending}", subfolder
