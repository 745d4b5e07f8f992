"""Everything asked of the running ComfyUI: folders, devices, memory, progress, previews, interruption.

Features are tested for, never versions. Letters: V video frames, R RGB, H W pixels.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args as cli_args
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..selfforcing_core.hub import list_bundles, resolve_text_encoder
from ..selfforcing_core.roofline import Card, measured_card

log = logging.getLogger(__name__)
BUNDLE_MARK = " (bundled)"
COMPANIONS = "selfforcing"  # under which a MODEL keeps the networks that are loaded together with it
Interrupted = memory.InterruptProcessingException  # what the stop button raises
# Where files of models and of tiny decoders lie, and how those of ours are called.
MODEL_FOLDER = "diffusion_models"
TAEHV_FOLDERS = ("vae_approx", "vae")
LIKELY_MODELS = ("self_forcing", "self-forcing", "causal", "causvid", "wan2.1", "wan")
LIKELY_TAEHVS = ("taew2_1", "taehv", "tae")
PREVIEW_SIZE = 512  # pixels of a preview's longer side; the host may shrink it further


# ---------------------------------------------------------------- folders --
def file_choices(*folders: str, likely: Sequence[str] = ()) -> list[str]:
    """The files of the host's model folders, each name once, then the bundled models: a new node takes the first.

    So whoever has a real model and a decoder for it gets those, and nobody a bundled part beside a real one. likely:
    parts of the names that come before others.
    """
    files = dict.fromkeys(name for folder in folders for name in folder_paths.get_filename_list(folder))
    ranked = sorted(files, key=lambda name: _rank(Path(name).name.lower(), likely))
    return _in_order(ranked)


def _in_order(real: list[str]) -> list[str]:
    """What a new node takes comes first: real parts only where there is one of each kind that the nodes load."""
    bundled = [name + BUNDLE_MARK for name in list_bundles()]
    return real + bundled if _has_real_parts() else bundled + real


def _has_real_parts() -> bool:
    """Whether there is a likely video model, a TAEHV and a text encoder in the layout of transformers."""
    names = {
        kind: [Path(name).name.lower() for folder in folders for name in folder_paths.get_filename_list(folder)]
        for kind, folders in (("model", (MODEL_FOLDER,)), ("decoder", TAEHV_FOLDERS))
    }
    found = [
        any(_rank(name, likely) < len(likely) for name in names[kind])
        for kind, likely in (("model", LIKELY_MODELS), ("decoder", LIKELY_TAEHVS))
    ]
    return all(found) and bool(_text_encoder_folders())


def _rank(name: str, likely: Sequence[str]) -> int:
    return next((rank for rank, part in enumerate(likely) if part in name), len(likely))


def file_of(choice: str, bundled: Callable[[str], Path], *folders: str) -> Path:
    """The path behind a choice of `file_choices`; `bundled` finds a bundle's part. Raises ValueError if it is gone."""
    if choice.endswith(BUNDLE_MARK):
        return bundled(choice[: -len(BUNDLE_MARK)])
    for folder in folders:
        path = folder_paths.get_full_path(folder, choice)
        if path is not None:
            return Path(path)
    raise ValueError(f"{choice!r} is in none of models/{', models/'.join(folders)}; refresh the list and choose again")


def text_encoder_choices() -> list[str]:
    """Subfolders of models/text_encoders in the layout of transformers, then the bundled text encoders."""
    return _in_order(_text_encoder_folders())


def _text_encoder_folders() -> list[str]:
    roots = [Path(root) for root in folder_paths.get_folder_paths("text_encoders")]
    found = [path.parent.name for root in roots if root.is_dir() for path in sorted(root.glob("*/config.json"))]
    return list(dict.fromkeys(found))


def text_encoder_folder(choice: str) -> Path:
    """The folder behind a choice of `text_encoder_choices`. Raises ValueError if it is gone."""
    if choice.endswith(BUNDLE_MARK):
        return resolve_text_encoder(choice[: -len(BUNDLE_MARK)])
    for root in folder_paths.get_folder_paths("text_encoders"):
        if (Path(root) / choice / "config.json").is_file():
            return Path(root) / choice
    raise ValueError(f"{choice!r} is no folder with a config.json in models/text_encoders; refresh the list")


def state_choices(suffix: str) -> list[str]:
    """Files that end so, below the output folder and then the input folder, newest first."""
    roots = [Path(folder_paths.get_output_directory()), Path(folder_paths.get_input_directory())]
    found = [
        (path.stat().st_mtime, path.relative_to(root).as_posix()) for root in roots for path in root.rglob(f"*{suffix}")
    ]
    return list(dict.fromkeys(name for _, name in sorted(found, reverse=True)))


def state_file(choice: str) -> Path:
    """The file behind a choice of `state_choices`. Raises ValueError if it is gone or lies elsewhere."""
    for root in (Path(folder_paths.get_output_directory()), Path(folder_paths.get_input_directory())):
        path = (root / choice).resolve()
        if path.is_relative_to(root.resolve()) and path.is_file():
            return path
    raise ValueError(f"{choice!r} is neither in the output nor in the input folder; refresh the list and choose again")


def fingerprint(path: Path) -> str:
    """Changes when the file (or any file of the folder) changes, so that the host reloads it only then."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return "|".join(f"{file}:{os.path.getmtime(file)}" for file in files if file.is_file())


def schema(*, search_aliases: Sequence[str] = (), **options: Any) -> io.Schema:
    """A node's schema, with search aliases where the host knows them."""
    has_aliases = any(item.name == "search_aliases" for item in fields(io.Schema))
    return io.Schema(**options, **({"search_aliases": list(search_aliases)} if has_aliases else {}))


def output_file(prefix: str, ending: str, width: int, height: int) -> tuple[Path, str]:
    """A new file below the output folder, numbered as the host numbers its own, and its subfolder there."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    return Path(folder) / f"{name}_{counter:05}_{ending}", subfolder


def graph_metadata(hidden: Any) -> dict[str, Any]:
    """Prompt and workflow as the host embeds them into what it saves; none where the user switched that off."""
    if cli_args.disable_metadata or hidden is None:
        return {}
    found = dict(hidden.extra_pnginfo or {})
    return {**found, **({"prompt": hidden.prompt} if hidden.prompt is not None else {})}


def add_metadata(hidden: Any, **entries: str) -> None:
    """Let the nodes that save what comes of this prompt write more entries beside the workflow."""
    known = getattr(hidden, "extra_pnginfo", None)
    if isinstance(known, dict):  # one for all nodes of the prompt
        known.update(entries)


# ------------------------------------------------------ devices and memory --
def patcher_of(
    module: torch.nn.Module, load_device: torch.device, offload_device: torch.device, *, dynamic: bool
) -> Any:
    """Hand a module to the host's memory manager. `dynamic`: all weights are in the host's own layers."""
    patcher = comfy.model_patcher.ModelPatcher
    if dynamic:
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    return patcher(module, load_device=load_device, offload_device=offload_device)


def load(patchers: Sequence[Any], *, working_bytes: float = 0, whole: bool = False) -> None:
    """Bring networks to their devices, leaving `working_bytes` free; the host offloads others as it sees fit."""
    memory.load_models_gpu(list(patchers), memory_required=working_bytes, force_full_load=whole)


@contextmanager
def kept_loaded(patcher: Any, *, working_bytes: float) -> Iterator[None]:
    """What is done inside may bring in other networks; what of this MODEL had to leave for them comes back after.

    working_bytes: what an evaluation of it, and whoever follows, need besides.
    """
    networks = [patcher, *patcher.get_additional_models_with_key(COMPANIONS)]
    before = [network.loaded_size() for network in networks]
    try:
        yield
    finally:
        if any(network.loaded_size() < size for network, size in zip(networks, before)):
            load(networks, working_bytes=working_bytes)


@functools.lru_cache(maxsize=4)
def card(device: torch.device, dtype: torch.dtype) -> Card:
    """What this device can do, measured for two seconds when it is first asked for."""
    return measured_card(device, dtype)


def to_graph(tensor: Tensor) -> Tensor:
    """float32 on the device where the host keeps what travels between nodes."""
    return tensor.to(device=memory.intermediate_device(), dtype=torch.float32)


def check_interrupted() -> None:
    """Raise the host's own exception if the user pressed stop."""
    memory.throw_exception_if_processing_interrupted()


def with_companions(patcher: Any, companions: Sequence[Any]) -> Any:
    """A clone of the MODEL with which other networks are brought to their devices, and stay while it is sampled."""
    clone = patcher.clone()
    clone.set_additional_models(COMPANIONS, list(companions))
    return clone


def with_shift(patcher: Any, shift: float) -> Any:
    """The MODEL with a flow-matching schedule of this shift, as the host's ModelSamplingSD3 sets it; changes it."""

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(patcher.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    patcher.add_object_patch("model_sampling", sampling)
    return patcher


def blocked(reason: str) -> Any:
    """In place of an output: nodes that need it do not run, and say why."""
    return ExecutionBlocker(reason)


# ---------------------------------------------------- progress and previews --
class ProgressBar:
    """The bar of the running node. Counts network calls; a preview is shown with the count reached so far."""

    def __init__(self, total: int) -> None:
        self.bar = comfy.utils.ProgressBar(total)
        self.done = 0

    def back_to(self, count: int) -> None:
        """What came after this many calls is made again."""
        self.done = count

    def step(self) -> None:
        """One more network call is about to start; its predecessor is done."""
        self.bar.update_absolute(self.done)
        self.done += 1

    def finish(self) -> None:
        self.bar.update_absolute(self.bar.total)

    def show(self, frame_RHW: Tensor) -> None:
        """Show one frame in [0, 1] on the node."""
        pixels = (frame_RHW.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        self.bar.update_absolute(self.done, preview=("JPEG", Image.fromarray(pixels), PREVIEW_SIZE))


def rough_frames(latents_BTCHW: Tensor, latent_format: Any) -> Tensor:
    """Normalised latents in the host's linear guess at their colours, [B, T, R, H, W]; T is 0 if it has none."""
    factors = getattr(latent_format, "latent_rgb_factors", None)
    batch, _, channels, height, width = latents_BTCHW.shape
    if factors is None or len(factors) != channels:
        return torch.zeros(batch, 0, 3, height, width)
    bias_R = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    rgb = torch.einsum("btchw,cr->btrhw", latents_BTCHW.float().cpu(), torch.tensor(factors))
    return ((rgb + bias_R[:, None, None] + 1) / 2).clamp(0, 1)


# -------------------------------------------------------------- the page --
def server() -> Any:
    """The host's web server; None where the host runs without one."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def show_text(text: str) -> None:
    """Show a line on the node that runs now, below those it shows already, and in the log."""
    log.warning("%s", text)
    context, page = get_executing_context(), server()
    if context is None or not hasattr(page, "send_progress_text"):
        return
    lines = _lines_on(context.prompt_id, context.node_id)
    if text not in lines:
        lines.append(text)
    page.send_progress_text(".\n".join(lines), context.node_id, getattr(page, "client_id", None))  # type: ignore[union-attr]


@functools.lru_cache(maxsize=1)
def _lines_on(prompt: str, node: str) -> list[str]:
    """What the node that ran last shows: the host keeps one text for each node."""
    return []


def is_read(hidden: Any, output: int) -> bool:
    """Whether another node of the running graph takes this output of the running node; False where nobody knows."""
    context, prompt = get_executing_context(), getattr(hidden, "prompt", None)
    if context is None or not isinstance(prompt, dict) or context.node_id not in prompt:
        return False
    return any([context.node_id, output] in node.get("inputs", {}).values() for node in prompt.values())


@dataclass(frozen=True)
class Audience:
    """Whose page queued the running graph, its prompt, and the node that runs."""

    client: str
    prompt: str
    node: str


def audience() -> Audience | None:
    """Of the node that runs now; None where no page queued it."""
    context, client = get_executing_context(), getattr(server(), "client_id", None)
    return Audience(client, context.prompt_id, context.node_id) if client and context is not None else None


def is_listening(client: str) -> bool:
    """Whether a page of this client is connected."""
    return client in getattr(server(), "sockets", {})


def send(event: str, data: dict[str, Any], client: str) -> None:
    """To the pages of this client alone; callable from any thread."""
    server().send_sync(event, data, client)
