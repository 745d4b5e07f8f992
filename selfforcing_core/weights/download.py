"""Released weights by short names: where they are, under which licence, and fetching them when asked to.

Downloads go through huggingface_hub: resumable, checked, with progress. Sizes come from the hub, never from a guess.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .presets import APACHE, PRESETS, Preset

log = logging.getLogger(__name__)
DOWNLOADS = Path("models")  # where `download` puts what it fetches, unless another folder is given
# Where the command is started in ComfyUI's node pack; a run elsewhere, as ComfyUI's own, looks there too.
PACK = Path(__file__).resolve().parents[2]
UNSTATED = "see the source's page"  # where no licence is known here


@dataclass(frozen=True)
class Release:
    """Files of one repository of huggingface.co."""

    repo: str  # owner/name
    files: tuple[str, ...]  # paths in the repository, with wildcards
    licence: str  # of the weights
    title: str  # what people choose it for

    @property
    def source(self) -> str:
        """Return the page of the repository."""
        return f"https://huggingface.co/{self.repo}"


def _wan(repo: str, files: tuple[str, ...], title: str) -> Release:
    return Release(f"Wan-AI/{repo}", files, APACHE, title)


def _files_of(preset: Preset) -> tuple[str, ...]:
    """Return a release's own files and those of its partners; of a pipeline's folder what says how it is run, too."""
    pipeline = ("model_index.json", "scheduler/*") if preset.files[0].startswith("transformer/") else ()
    return (*preset.files, *preset.partner_files, *pipeline)


# Small models are one file, large ones several with an index; the wildcard matches both.
SHARDS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json")
RELEASES = {
    # The table's: what belongs together comes together, and what cannot run here is not offered.
    **{
        preset.name: Release(preset.repository, _files_of(preset), preset.licence or UNSTATED, preset.title)
        for preset in PRESETS.values()
        if preset.repository and preset.files and not preset.unsupported
    },
    "self-forcing-ode-init": Release(
        "gdhe17/Self-Forcing", ("checkpoints/ode_init.pt",), UNSTATED, "start of Self Forcing's training"
    ),
    "wan2.1-t2v-1.3b": _wan("Wan2.1-T2V-1.3B", SHARDS, "Wan 2.1 text-to-video 1.3B"),
    "wan2.1-t2v-14b": _wan("Wan2.1-T2V-14B", SHARDS, "Wan 2.1 text-to-video 14B"),
    "wan2.1-i2v-14b": _wan("Wan2.1-I2V-14B-480P", SHARDS, "Wan 2.1 image-to-video 14B, 480p"),
    "taehv": Release("Kijai/WanVideo_comfy", ("taew2_1.safetensors",), "MIT (madebyollin/taehv)", "TAEHV for Wan 2.1"),
    "umt5": _wan(
        "Wan2.1-T2V-1.3B", ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"), "text encoder with its tokenizer"
    ),
    "vae": _wan("Wan2.1-T2V-1.3B", ("Wan2.1_VAE.pth",), "video VAE of Wan 2.1"),
    "clip": _wan(
        "Wan2.1-I2V-14B-480P",
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
        "image encoder of the image-to-video models",
    ),
}


def find_release(name: str) -> Release:
    """Return the release of that name. Raises ValueError that lists the names, or says why a preset has no files."""
    if name in PRESETS and name not in RELEASES:
        reason = (
            PRESETS[name].unsupported or "where its files are was not read; give their path where a model is asked for"
        )
        raise ValueError(f"{name} cannot be fetched: {reason}")
    if name not in RELEASES:
        raise ValueError(f"there is no release {name!r}; use one of {', '.join(RELEASES)}")
    return RELEASES[name]


def list_releases(*, with_sizes: bool = False) -> list[dict[str, Any]]:
    """Return the releases as rows of JSON types; with sizes, the hub is asked, or a line says that it cannot be."""
    rows, is_reached = [], with_sizes
    for name, release in RELEASES.items():
        row: dict[str, Any] = {"name": name, "title": release.title}
        row |= {"licence": release.licence, "source": release.source}
        if with_sizes:
            row["bytes"] = None  # unknown, and also where the repository has none of the files any more
        if is_reached:
            try:
                row["bytes"] = sum(file_sizes(release).values()) or None
            except ValueError as error:  # without a connection the list is there all the same
                log.warning("%s; sizes stay unknown", error)
                is_reached = False
        rows.append(row)
    return rows


def file_sizes(release: Release) -> dict[str, int]:
    """Return a release's files with their sizes in bytes. Raises ValueError if the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(release.repo, files_metadata=True).siblings or []
    except Exception as error:  # offline, refused, renamed: the library has a class of its own for each
        raise ValueError(f"{release.source} cannot be asked ({_short(error)}); check the connection") from error
    return {
        file.rfilename: file.size or 0
        for file in files
        if any(fnmatch(file.rfilename, pattern) for pattern in release.files)
    }


def download(name: str, folder: Path, only: str = "") -> list[Path]:
    """Fetch a release into `folder`/`name` and return its files; files that are there are kept, broken ones resumed.

    only: what is in the names of the wanted ones, where the hub has several versions of one file.
    Raises ValueError if the name is unknown, the disk too small, or the hub does not answer, and for several versions.
    """
    from huggingface_hub import hf_hub_download

    release = find_release(name)
    sizes = file_sizes(release)
    if not sizes:
        raise ValueError(
            f"{release.source} has no file {' or '.join(release.files)} any more; look there for its place"
        )
    sizes = _one_version(name, release, sizes, only)
    target = release_folder(name, folder)
    # A full disk would show only after hours. Files that are there are counted as whole.
    _check_space(folder, sum(size for file, size in sizes.items() if not (target / file).exists()))
    try:
        # local_dir keeps the paths of the repository, and keeps the files out of the hub's cache.
        return [Path(hf_hub_download(release.repo, file, local_dir=target)) for file in sorted(sizes)]
    except Exception as error:
        raise ValueError(
            f"{name}: the download stopped ({_short(error)}); run the same command again, it goes on where it was"
        ) from error


def _one_version(name: str, release: Release, sizes: dict[str, int], only: str) -> dict[str, int]:
    """Return the files to fetch: of each that a release has once, one. Raises ValueError where several may be meant."""
    chosen = dict(sizes)
    for pattern in (each for each in release.files if _is_one_file(each)):
        versions = [file for file in sizes if fnmatch(file, pattern)]
        fitting = [file for file in versions if only in file]
        if len(versions) > 1 and len(fitting) != 1:
            listed = ", ".join(f"{file} ({sizes[file] / 1e9:.1f} GB)" for file in sorted(fitting or versions))
            raise ValueError(
                f"{name}: {release.source} has {len(versions)} versions of one file, {len(fitting)} of them with "
                f"{only!r} in the name: {listed}; say which by --only TEXT, a part of the name that the others lack"
            )
        for file in versions if len(versions) > 1 else ():
            if file not in fitting:
                del chosen[file]
    return chosen


def _is_one_file(pattern: str) -> bool:
    """Return whether a pattern with a wildcard stands for one file of a release, not for shards or a folder."""
    name = Path(pattern).name
    return "*" in name and name != "*" and name not in SHARDS


def downloaded_path(name: str, folder: Path = DOWNLOADS) -> Path:
    """Return the file of a release that `download` has put there, or the folder of its shards.

    Raises ValueError where it is not there.
    """
    release = find_release(name)
    file = release_folder(name, folder) / release.files[0]
    path = file.parent if "*" in file.name else file
    matches = list(path.glob(file.name)) if release.files[0] not in ("*", *SHARDS) else []
    if len(matches) == 1 and file.name != "*":  # the wildcard stands for a part of one file's name
        path = matches[0]
    if not path.exists():
        raise ValueError(f"{name} is a release that is not here ({path}); fetch it with: download {name}")
    return path


def release_folder(name: str, folder: Path = DOWNLOADS) -> Path:
    """Return where a release's files lie: presets of the same files share the folder of the first."""
    release = find_release(name)
    same = (other for other, each in RELEASES.items() if (each.repo, each.files) == (release.repo, release.files))
    return folder / next(same)


def download_folders() -> tuple[Path, ...]:
    """Return the folders into which `download` puts releases where it is not told another."""
    return tuple(dict.fromkeys((DOWNLOADS.absolute(), PACK / DOWNLOADS)))


def _check_space(folder: Path, needed: int) -> None:
    # The folder may not exist yet; the nearest one above it is on the same disk.
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; choose another --to"
        )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
