"""A checkpoint to a MODEL of ComfyUI."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import comfy.lora
import comfy.model_management as memory
import comfy.supported_models
import comfy.utils
import torch
import torch.nn as nn

from ...selfforcing_core.config import FEW_STEP_SOLVERS, CausalConfig, StepConfig, WanConfig
from ...selfforcing_core.weights.checkpoint import Checkpoint
from ...selfforcing_core.weights.gguf_files import IN_COMFYUI, Packing
from ...selfforcing_core.weights.lora_files import MergedWeights, comfyui_lora
from ...selfforcing_core.weights.lora_kinds import Patch
from ...selfforcing_core.weights.scaled import FORMATS, FULL_PRECISION, Scale, ScaledWeights, count_numbers
from . import host, page
from .autoencoder import check_channels
from .causal_model import with_settings
from .model_settings import BASE, CAUSAL, FEW_STEP, UNKNOWN, Settings, kind_note
from .shared_network import check_variant

try:
    import comfy.quant_ops as quantisation
except ImportError:  # before 0.3.65
    quantisation = None

log = logging.getLogger(__name__)
COMFYUI_FORMATS = {dtype: name for name, dtype in FORMATS.items()}


def model_from_checkpoint(
    checkpoint: Checkpoint,
    *,
    kind: str = "auto",
    dtype: torch.dtype | None = None,
    is_fast_fp8: bool = False,
    is_dynamic: bool = True,
    boundary_step: int = 0,
) -> Any:
    """Return a MODEL of ComfyUI from a checkpoint of kind "wan", prepared for our samplers.

    kind: CAUSAL, FEW_STEP, BASE, or "auto": what the file says, UNKNOWN (which is shown) where it says nothing. Another
    kind than the file's is used, and that is shown.
    dtype: None lets ComfyUI choose what the device likes. is_fast_fp8: ComfyUI's own float8 products.
    is_dynamic: let ComfyUI bring weights in by pieces, where it can. boundary_step: as in `Settings`.
    """
    assert isinstance(checkpoint.config, WanConfig)
    loras = []
    if isinstance(checkpoint.state_dict, MergedWeights):
        loras, checkpoint = checkpoint.state_dict.loras, replace(checkpoint, state_dict=checkpoint.state_dict.base)
    weights, notes = checkpoint.state_dict, checkpoint.notes
    if isinstance(weights, ScaledWeights) and any(isinstance(scale, Packing) for scale in weights.scales.values()):
        raise ValueError(f"this is a GGUF file; {IN_COMFYUI}")
    check_variant(checkpoint.config)
    check_channels(checkpoint.config.out_dim, "model")
    steps = checkpoint.steps or StepConfig()
    file_kind = kind_in(checkpoint)
    if kind == "auto":
        kind = file_kind
    elif file_kind not in (kind, UNKNOWN):
        page.show_text(f"the file says that its model is of kind '{file_kind}'; it is loaded as '{kind}'")
    model_config = _comfyui_config(checkpoint.config, is_causal=kind == CAUSAL)
    if checkpoint.steps is not None or kind != BASE:  # an undistilled model keeps ComfyUI's shift for Wan
        model_config.sampling_settings = {"shift": steps.shift}
    quantised = None
    if isinstance(weights, ScaledWeights):
        quantised = _quantised(weights, dtype, is_fast_fp8=is_fast_fp8)
        # The file's own note says what happens outside ComfyUI.
        notes = tuple(note for note in notes if not note.endswith(weights.remark()))
    if quantised is None:
        _choose_dtype(model_config, checkpoint, dtype)
    else:
        _choose_quantised(model_config, checkpoint)
    if is_fast_fp8:
        # ComfyUI then picks layers that multiply in float8 where the GPU can, as its own loader does for "_fast".
        model_config.optimizations["fp8"] = True
    model = model_config.get_model(checkpoint.state_dict, "")  # "": no prefix before the names of parameters
    patcher = host.patcher_of(model, memory.get_torch_device(), memory.unet_offload_device(), dynamic=is_dynamic)
    # Under dynamic VRAM weights stay where the file maps them, and are read when a layer is first called.
    assign = getattr(patcher, "is_dynamic", lambda: False)()
    if quantised is not None:
        model.diffusion_model.load_state_dict(quantised, assign=assign)
    elif isinstance(weights, ScaledWeights):
        _fill_scaled(model.diffusion_model, weights, assign=assign)
    else:
        model.diffusion_model.load_state_dict(weights, assign=assign)
    for note in notes:
        log.warning("%s", note)
    model.diffusion_model.eval().requires_grad_(False)
    _add_loras(patcher, loras)
    settings = Settings(
        kind,
        checkpoint.causal or CausalConfig(),
        steps,
        guidance=checkpoint.guidance,
        latent_space=checkpoint.latent_space,
        boundary_step=boundary_step,
    )
    note = kind_note(settings)
    if note is not None:
        page.show_text(note)
    return with_settings(patcher, settings)


def kind_in(checkpoint: Checkpoint) -> str:
    """Return the kind that a file says its model is of; UNKNOWN where it says nothing."""
    if checkpoint.causal is not None:
        return CAUSAL
    if checkpoint.bidirectional is None:
        return UNKNOWN
    # Distilled models are given fresh noise from step to step; teachers are sampled with an ODE solver.
    steps = checkpoint.steps
    # But for LightX2V's pairs, which follow the flow and are distilled nonetheless.
    is_few = steps is None or steps.solver in FEW_STEP_SOLVERS or steps.boundary is not None
    return FEW_STEP if is_few else BASE


def _quantised(weights: ScaledWeights, dtype: torch.dtype | None, *, is_fast_fp8: bool) -> dict[str, Any] | None:
    """Return weights in 8 bits as ComfyUI's own quantised layers load them; None where they have to be widened.

    Why is said. dtype: None or that of the weights keeps them. is_fast_fp8: multiply in 8 bits whatever the file says.
    """
    reason = _widened_because(weights, dtype)
    if reason is not None:
        page.show_text(
            f"{len(weights.scales)} weights in 8 bits are widened to the model's number type, which takes twice the "
            f"memory or more: {reason}"
        )
        return None
    state: dict[str, Any] = {}
    for name, tensor in weights.stored.items():
        scale = weights.scales.get(name)
        if not isinstance(scale, Scale) or tensor.ndim != 2:  # ComfyUI quantises linear layers alone
            state[name] = weights[name]
            continue
        options = {FULL_PRECISION: True, **scale.options} if not scale.options else dict(scale.options)
        if is_fast_fp8:
            options.pop(FULL_PRECISION, None)
        options["format"] = COMFYUI_FORMATS[tensor.dtype]
        layer = name.removesuffix("weight")
        state |= {name: tensor, f"{layer}weight_scale": scale.factor}
        state[f"{layer}comfy_quant"] = torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)
        if scale.input_scale is not None:
            state[f"{layer}input_scale"] = scale.input_scale
    log.info("%d weights stay in 8 bits, in ComfyUI's own quantised layers", len(weights.scales))
    return state


def _widened_because(weights: ScaledWeights, dtype: torch.dtype | None) -> str | None:
    """Return why weights in 8 bits cannot stay so; None where ComfyUI has layers for them."""
    types = {weights.stored[name].dtype for name in weights.scales}
    if dtype is not None and types != {dtype}:
        return f"weight_dtype asks for {str(dtype).removeprefix('torch.')}; default keeps them as they are"
    # Older versions have none, or take other settings; newer ones without their package comfy_kitchen are stand-ins.
    formats = getattr(quantisation, "QUANT_ALGOS", {}) if hasattr(comfy.utils, "detect_layer_quantization") else {}
    if not getattr(quantisation, "_CK_AVAILABLE", False) or any(COMFYUI_FORMATS[each] not in formats for each in types):
        return (
            "this ComfyUI has no layers for them as newer versions with comfy-kitchen do; of files made for it, Load "
            "Diffusion Model with Patch Model (Self Forcing) keeps them in 8 bits"
        )
    factors = [(name, scale) for name, scale in weights.scales.items() if isinstance(scale, Scale)]
    if any(scale.factor.numel() > 1 and weights.stored[name].dtype != torch.int8 for name, scale in factors):
        return "they have a scale for every row, and ComfyUI's float8 layers have one for a whole weight"
    return None


def _choose_quantised(model_config: Any, checkpoint: Checkpoint) -> None:
    """Let ComfyUI make quantised layers, as its own loader does; what is not quantised gets the type that it likes."""
    supported = list(model_config.supported_inference_dtypes)
    model_config.quant_config = {"mixed_ops": True}  # as comfy.utils.detect_layer_quantization says of such files
    others = memory.unet_dtype(
        model_params=count_numbers(checkpoint.state_dict), supported_dtypes=supported, weight_dtype=None
    )
    model_config.set_inference_dtype(others, memory.unet_manual_cast(None, memory.get_torch_device(), supported))


def _add_loras(patcher: Any, loras: Sequence[tuple[dict[str, Patch], float]]) -> None:
    """Put LoRA on a MODEL as ComfyUI's own loader does: taken off when it is unloaded, and others go on top."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    for patches, strength in loras:
        added = patcher.add_patches(comfy.lora.load_lora(comfyui_lora(patches), keys), strength)
        assert len(added) == len(patches), f"ComfyUI takes {len(added)} of {len(patches)} parts of a LoRA"


def _fill_scaled(network: nn.Module, weights: ScaledWeights, *, assign: bool) -> None:
    """Multiply one weight at a time into its place: nothing but that one is held in float32."""
    places = dict(network.named_parameters())
    if places.keys() != weights.keys():  # as a checkpoint is complete, this is a network of another kind
        raise AssertionError(f"parameters differ: {sorted(places.keys() ^ weights.keys())[:3]}")
    if assign:
        widened = {name: tensor.to(places[name].dtype) for name, tensor in weights.items()}
        network.load_state_dict(widened, assign=True)
        return
    for name, tensor in weights.items():  # `items` widens each weight as it comes to it
        places[name].data.copy_(tensor)


def _comfyui_config(config: WanConfig, *, is_causal: bool) -> Any:
    """Return ComfyUI's class for this network; with is_causal the one that its causal nodes ask for, if it has it."""
    # Built here and not detected from the weights, as ComfyUI does it: its causal class is only chosen for an entry
    # `causal_ar` in the header of a safetensors file, which released files do not have.
    classes = comfy.supported_models
    config_class = classes.WAN21_I2V if config.reads_clip else classes.WAN21_T2V
    if is_causal and config.model_type == "t2v":
        config_class = getattr(classes, "WAN21_CausalAR_T2V", config_class)  # since 0.22, for text-to-video alone
    # ComfyUI calls a network without layers for CLIP's features "t2v", whatever its input channels.
    sizes = asdict(config) | {"image_model": "wan2.1", "model_type": "i2v" if config.reads_clip else "t2v"}
    del sizes["image_features"]
    return config_class(sizes)


def _choose_dtype(model_config: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Follow ComfyUI's rule: weights as stored where the device computes in that type, else cast at use."""
    supported = model_config.supported_inference_dtypes
    # ComfyUI widens float8 weights where all of them fit the GPU so, for which it asks how many there are.
    num_parameters = count_numbers(checkpoint.state_dict)
    stored = getattr(torch, checkpoint.dtype)
    weights = dtype or memory.unet_dtype(
        model_params=num_parameters, supported_dtypes=list(supported), weight_dtype=stored
    )
    model_config.set_inference_dtype(weights, memory.unet_manual_cast(weights, memory.get_torch_device(), supported))
