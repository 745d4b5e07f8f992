"""The network for low noise beside a model, and from which noise on the model itself is asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import CausalConfig, StepConfig, WanConfig
from ..experts import boundary_behind, check_boundary, check_cache_source, check_pair
from ..roofline.meter import Recipe
from ..weights.bundles import resolve_model
from ..weights.checkpoint import Checkpoint, read_checkpoint
from ..weights.pipeline_folder import PipelineFolder
from .request import Request

log = logging.getLogger(__name__)
# Half of a pair by its name: no parameter tells, since both have the same.
NAME_PARTS = ("high_noise", "low_noise", "high-noise", "low-noise", "highnoise", "lownoise")


@dataclass(frozen=True)
class Pair:
    """The network for low noise, and where its part of the steps begins."""

    low: Checkpoint  # mapped, and emptied when its network is made

    def divided(self, request: Request, causal: CausalConfig, steps: StepConfig, notes: list[str]) -> StepConfig:
        """Return the steps with their boundary: the request's, else what the files say.

        Raises ValueError where nothing says it, where one of the two networks is left without a step, and for settings
        that do not go with two.
        """
        check_cache_source(causal)
        stored = steps.boundary
        boundary = stored if request.boundary is None else request.boundary
        if request.boundary_step is not None:
            boundary = boundary_behind(steps, request.boundary_step)
        if boundary is None:
            raise ValueError(
                "nothing says from which noise on --model is asked instead of --low-noise; give --boundary, for Wan "
                "2.2's own A14B 0.875 (text to video) or 0.9 (image to video), or --boundary-step"
            )
        if stored is not None and boundary != stored:
            notes.append(f"says boundary {stored:g}; {boundary:.4g} is used")
        steps = replace(steps, boundary=boundary)
        check_boundary(steps)
        return steps


def read_pair(
    request: Request, path: Path, checkpoint: Checkpoint, folder: PipelineFolder, notes: list[str]
) -> Pair | None:
    """Return what belongs beside the model at `path`; None for a model that is one network.

    Raises ValueError where it is missing, is no such network, or is one where the other is none.
    """
    if request.boundary is not None and request.boundary_step is not None:
        raise ValueError("--boundary and --boundary-step both say which network is asked when; give one of them")
    if folder.high_noise is not None:
        raise ValueError(f"{path} is the low-noise half of {path.parent}; give {folder.high_noise} as --model")
    low_path = folder.low_noise if request.low_noise is None else resolve_model(request.low_noise)
    if low_path is not None:
        low = read_checkpoint(low_path, weights=request.weights, loras=request.low_noise_lora)
        if not isinstance(low.config, WanConfig):
            raise ValueError(f"{low_path} is a {low.kind}, not a video model; give the low-noise network")
        assert isinstance(checkpoint.config, WanConfig)
        check_pair(checkpoint.config, low.config)
        if request.low_noise is not None and path.resolve() == low_path.resolve():
            raise ValueError(f"{low_path} is given as --model and as --low-noise; they are two files")
        if _is_named(path, "low") or _is_named(low_path, "high"):
            # Swapped, both run and the video is noise that looks like a bad model.
            raise ValueError(
                f"by their names {path.name} is not for high noise, or {low_path.name} not for low noise; give the "
                "high-noise network as --model and the other as --low-noise, or rename them"
            )
        if bool(request.lora) != bool(request.low_noise_lora):
            option, noise = ("--lora", "high") if request.lora else ("--low-noise-lora", "low")
            other = "--low-noise-lora" if request.lora else "--lora"
            notes.append(f"has two networks; {option} is merged into that for {noise} noise alone (else {other} too)")
        return Pair(low)
    stored = None if checkpoint.steps is None else checkpoint.steps.boundary
    signs = {
        "--boundary": request.boundary is not None,
        "--boundary-step": request.boundary_step is not None,
        "--solver phased": request.solver == "phased",
        "--offload-expert": request.offload_expert,
        "--low-noise-lora": bool(request.low_noise_lora),
        f"{request.model} says a boundary, which": stored is not None,
    }
    sign = next((sign for sign, is_there in signs.items() if is_there), None)
    if sign is not None:
        raise ValueError(f"{sign} is for two networks that take turns; give the one for low noise as --low-noise")
    part = next((part for part in NAME_PARTS if part in path.name.lower()), None)
    if part is not None:
        notes.append(f"is one of two networks by its name ({part}) and runs alone; give the other as --low-noise")
    return None


def _is_named(path: Path, half: str) -> bool:
    return any(part in path.name.lower() for part in NAME_PARTS if part.startswith(half))


def takes_turns(request: Request, recipe: Recipe, device: torch.device) -> bool:
    """Return whether one of two networks lies on the device at a time: as asked for, or where both do not fit.

    The reason is logged.
    """
    if request.offload_expert:
        if device.type != "cuda":  # elsewhere the memory is the one in which the other would wait
            log.warning("--offload-expert saves no memory on %s, where both networks lie in one memory anyway", device)
        return True
    if device.type != "cuda":
        return False
    needed_bytes, free_bytes = sum(recipe.peak_bytes().values()), torch.cuda.mem_get_info(device)[0]
    if needed_bytes > free_bytes:
        log.warning(
            "both networks together need %.1f GB and %s has %.1f GB free: they take turns there, two changes a chunk",
            needed_bytes / 1e9,
            device,
            free_bytes / 1e9,
        )
    return needed_bytes > free_bytes
