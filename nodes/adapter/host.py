"""What is asked of the running ComfyUI: devices, memory, progress, previews, interruption.

Features are tested for, never versions. Tested are ComfyUI 0.3.64 to 0.33; what is said of versions below is of these.

Letters: B batch, T latent frames, C latent channels, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import comfy.model_management as memory
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor

from ...selfforcing_core.roofline.device import Card, measured_card

log = logging.getLogger(__name__)
COMPANIONS = "selfforcing"  # under which a MODEL keeps the networks that are loaded together with it
Interrupted = memory.InterruptProcessingException  # what the stop button raises
PREVIEW_SIZE = 512  # pixels of a preview's longer side; ComfyUI may shrink it further


def schema(*, search_aliases: Sequence[str] = (), **options: Any) -> io.Schema:
    """Return a node's schema, with search aliases where ComfyUI knows them."""
    # 0.3.64's Schema is a dataclass without that field, and would refuse the keyword.
    has_aliases = any(item.name == "search_aliases" for item in fields(io.Schema))
    return io.Schema(**options, **({"search_aliases": list(search_aliases)} if has_aliases else {}))


# ------------------------------------------------------ devices and memory --
def patcher_of(
    module: torch.nn.Module, load_device: torch.device, offload_device: torch.device, *, dynamic: bool
) -> Any:
    """Hand a module to ComfyUI's memory manager. `dynamic`: all weights are in ComfyUI's own layers."""
    patcher = comfy.model_patcher.ModelPatcher
    # Dynamic VRAM of later versions brings weights to the device one by one as a layer asks for them, which only layers
    # of comfy.ops do. At its start ComfyUI points CoreModelPatcher at the class that does so; 0.3.64 has no such name.
    if dynamic:
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    return patcher(module, load_device=load_device, offload_device=offload_device)


def load(patchers: Sequence[Any], *, working_bytes: float = 0, whole: bool = False) -> None:
    """Bring networks to their devices, leaving `working_bytes` free; ComfyUI offloads others as it sees fit."""
    # force_full_load: no weights stay in CPU memory to be copied at each call, as modules without comfy.ops need it.
    memory.load_models_gpu(list(patchers), memory_required=working_bytes, force_full_load=whole)


@contextmanager
def kept_loaded(patcher: Any, *, working_bytes: float) -> Iterator[None]:
    """Let what is done inside bring in other networks; what of this MODEL had to leave for them comes back after.

    working_bytes: what an evaluation of it, and whoever follows, need besides.
    """
    networks = [patcher, *patcher.get_additional_models_with_key(COMPANIONS)]
    before = [network.loaded_size() for network in networks]
    try:
        yield
    finally:
        # Loading what is loaded costs a walk over all modules: only where something has left.
        if any(network.loaded_size() < size for network, size in zip(networks, before)):
            load(networks, working_bytes=working_bytes)


@functools.lru_cache(maxsize=4)
def card(device: torch.device, dtype: torch.dtype) -> Card:
    """Return what this device can do, measured for two seconds when it is first asked for."""
    return measured_card(device, dtype)


def to_graph(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 on the device where ComfyUI keeps what travels between nodes."""
    # CPU memory, but for --gpu-only: what a node returns is kept for later runs, and would fill the GPU.
    return tensor.to(device=memory.intermediate_device(), dtype=torch.float32)


def check_interrupted() -> None:
    """Raise ComfyUI's own exception if the user pressed stop."""
    memory.throw_exception_if_processing_interrupted()


def with_companions(patcher: Any, companions: Sequence[Any]) -> Any:
    """Return a clone of the MODEL with which other networks come to their devices, and stay while it is sampled."""
    clone = patcher.clone()  # a MODEL is shared by all nodes that it is connected to
    clone.set_additional_models(COMPANIONS, list(companions))
    return clone


def with_shift(patcher: Any, shift: float) -> Any:
    """Return the MODEL, changed: with a flow-matching schedule of this shift, as ModelSamplingSD3 sets it."""

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    # multiplier: timesteps of Wan go from 0 to 1000, sigmas from 0 to 1.
    sampling = Sampling(patcher.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    patcher.add_object_patch("model_sampling", sampling)
    return patcher


def blocker(reason: str) -> Any:
    """Return what stands in place of an output: nodes that need it do not run, and say why."""
    return ExecutionBlocker(reason)


# ---------------------------------------------------- progress and previews --
class ProgressBar:
    """The bar of the running node. Counts network calls; a preview is shown with the count reached so far."""

    def __init__(self, total: int) -> None:
        self.bar = comfy.utils.ProgressBar(total)
        self.num_calls = 0  # begun so far

    def back_to(self, num_calls: int) -> None:
        """Forget what came after this many calls: it is made again."""
        self.num_calls = num_calls

    def step(self) -> None:
        """Count one more network call, which is about to start; its predecessor is done."""
        self.bar.update_absolute(self.num_calls)
        self.num_calls += 1

    def finish(self) -> None:
        """Show a full bar: the last call is done."""
        self.bar.update_absolute(self.bar.total)

    def show(self, frame_RHW: Tensor) -> None:
        """Show one frame in [0, 1] on the node."""
        pixels = (frame_RHW.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        # A preview goes out with a value of the bar, and always at once; values alone are thinned out by ComfyUI.
        self.bar.update_absolute(self.num_calls, preview=("JPEG", Image.fromarray(pixels), PREVIEW_SIZE))


def rough_frames(latents_BTCHW: Tensor, latent_format: Any) -> Tensor:
    """Return ComfyUI's linear guess at normalised latents' colours, [B, T, R, H, W]; T is 0 if it has none."""
    factors = getattr(latent_format, "latent_rgb_factors", None)
    batch, _, channels, height, width = latents_BTCHW.shape
    if factors is None or len(factors) != channels:
        return torch.zeros(batch, 0, 3, height, width)
    # As ComfyUI's Latent2RGBPreviewer: a linear map from channels to colours in [-1, 1], fitted for each latent space.
    bias_R = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    rgb = torch.einsum("btchw,cr->btrhw", latents_BTCHW.float().cpu(), torch.tensor(factors))
    return ((rgb + bias_R[:, None, None] + 1) / 2).clamp(0, 1)
