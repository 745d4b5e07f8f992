"""What ComfyUI's nodes and other packs put on a MODEL for its forward pass: honoured in the causal pass, or refused.

The causal pass runs the MODEL's own layers in the order of our network, so whatever acts on a layer acts there too, and
so do wrappers around an evaluation. What acts on the passes between the layers would be lost: each such thing is looked
for before anything is sampled, and again at every evaluation, since some nodes put theirs there only then.

Honoured: another attention (of a node, or of ComfyUI's command line), RoPE scaling (`rope_options`), another
cross-attention or feed-forward network of a block. Refused: the rest by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import comfy.ldm.modules.attention as attentions
import comfy.ldm.wan.model
import comfy.lora
import comfy.model_sampling
import torch
import torch.nn as nn
from comfy.cli_args import args as cli_args
from torch import Tensor

from ...selfforcing_core.rope import Axes

log = logging.getLogger(__name__)
OVERRIDE = "optimized_attention_override"
REMEDY = "remove it, or sample the whole video with ComfyUI's own sampler"
# Lists of functions that no Wan network of ComfyUI ever asked for: there they change nothing either.
WITHOUT_EFFECT = {
    "attn1_output_patch",
    "attn2_output_patch",
    "emb_patch",
    "forward_timestep_embed_patch",
    "input_block_patch",
    "input_block_patch_after_skip",
    "middle_block_after_patch",
    "middle_block_patch",
    "noise_refiner",
    "output_block_patch",
    "post_input",
}
# Lists that ComfyUI's Wan does ask for, between its layers, and whose nodes fill them.
SETTERS = {
    "attn1_patch": "InfiniteTalk, HyperTile, ToMe or a hypernetwork",
    "attn2_patch": "InfiniteTalk or a hypernetwork",
    "double_block": "Uni3C or another control network",
}
STEP_SAVERS = {"easycache": "EasyCache", "lazycache": "LazyCache"}  # keys of their wrappers
# Inputs of a prompt that ComfyUI's forward pass joins to the frames of the whole video.
WHOLE_VIDEO_INPUTS = {
    "time_dim_concat": "frames joined to the video in time, as WanPhantomSubjectToVideo sets them",
    "context_latents": "reference latents beside the video, as Bernini's nodes set them",
}
ROPE_AXES = ("t", "y", "x")  # as the names of ComfyUI's options end
FOLLOWED = ("cross_attn", "ffn")  # modules of a block that may be anything, since they see no other tokens
# Who usually replaces a module of this name, for the sentence that refuses it.
HINTS = {
    "self_attn": "Enhance-A-Video or a sage attention of KJNodes for this block; Patch Sage Attention and "
    "--use-sage-attention are followed",
    "rope_embedder": "RIFLEx of KJNodes",
    "network": "TeaCache or another node that skips evaluations",
}
HARMLESS_WRAPPERS = {"selfforcing", "torch.compile"}  # keys of ours, and of ComfyUI's own compilation
# What torch itself writes on instances, as hooks and compilation do, is no patch.
_TORCH_METHODS = frozenset(vars(nn.Module)) - {"forward"}


def _refuse(obstacle: str) -> ValueError:
    return ValueError(f"this model carries {obstacle}, which generating chunk by chunk cannot follow; {REMEDY}")


def check_model_options(model_options: Mapping[str, Any]) -> None:
    """Raise ValueError for what a MODEL carries beside its network, before anything is sampled."""
    if model_options.get("context_handler") is not None:
        raise ValueError(
            "this model carries context windows (Context Windows), which generating chunk by chunk does not need; "
            "remove the node, and set window and sink in Cache Options (Self Forcing)"
        )
    devices = model_options.get("multigpu_clones", {})
    if len(devices) > 1:
        raise ValueError(
            f"this model is split between {len(devices)} devices (MultiGPU CFG Split: {', '.join(map(str, devices))}), "
            "which generating chunk by chunk cannot follow, since the cache of a prompt lies on one of them; remove "
            "the node, and choose one device with Select Model Device"
        )
    options = model_options.get("transformer_options", {})
    for wrappers in options.get("wrappers", {}).values():
        step_saver = next((name for key, name in STEP_SAVERS.items() if wrappers.get(key)), None)
        if step_saver is not None:
            raise _refuse(f"{step_saver}, which skips evaluations that have to write into the cache")
    check_transformer_options(options)
    for name in sorted(set(options.get("patches", {})) & WITHOUT_EFFECT):
        log.warning("%s has no effect on a Wan model, here as in ComfyUI's own sampling", name)


def check_model_sampling(model_sampling: Any) -> None:
    """Raise ValueError for noise that is not mixed in as the rollout does: (1 - sigma) of the video, sigma of noise."""
    kinds = [base.__name__ for base in type(model_sampling).__mro__[1:3]]  # the first is made by each node anew
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        raise _refuse(
            f"a model sampling that is not of flow matching ({', '.join(kinds)}); ModelSamplingSD3 sets one that is"
        )
    scale = getattr(model_sampling, "noise_scale", 1.0)  # of later versions; SIGMAS say nothing of it
    if scale != 1:
        raise _refuse(f"a noise scale of {scale:g} (ModelNoiseScale)")


def check_transformer_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for patches between the layers, as one evaluation is given them."""
    # Replacements have keys such as ("double_block", 3): Wan's blocks are called by the name that Flux gave its own.
    blocks = [key for key in options.get("patches_replace", {}).get("dit", {}) if key[0] == "double_block"]
    if blocks:
        raise _refuse(
            f"a replacement of block {blocks[0][1]} (patches_replace 'dit'; Skip Layer Guidance, TeaCache and other "
            "nodes that skip or change blocks set it)"
        )
    for name, functions in options.get("patches", {}).items():
        if functions and name not in WITHOUT_EFFECT:
            setters = f"; {SETTERS[name]} sets it" if name in SETTERS else ""
            raise _refuse(f"a patch between its layers ({name}{setters})")
    rope_axes(options)


def check_prompt_inputs(names: Mapping[str, Any]) -> None:
    """Raise ValueError for what a prompt adds to the whole video. names: of the prompt's inputs to the network."""
    foreign = next((name for name in WHOLE_VIDEO_INPUTS if name in names), None)
    if foreign is not None:
        raise ValueError(
            f"the prompt carries {WHOLE_VIDEO_INPUTS[foreign]} ({foreign}), which does not go with generating chunk by "
            "chunk; take it out of the prompt"
        )


def rope_axes(options: Mapping[str, Any]) -> Axes | None:
    """Return scale and shift of the positions of time, height and width; None where nothing is scaled.

    As ComfyUI's Wan has it: positions 0, 1, ... become shift + scale * position. Raises ValueError for other options.
    """
    rope_options = options.get("rope_options")
    if not rope_options:
        return None
    names = {f"{kind}_{axis}" for kind in ("scale", "shift") for axis in ROPE_AXES}
    unknown = sorted(name for name, value in rope_options.items() if name not in names and value)
    if unknown:
        raise _refuse(f"RoPE options that are not known here ({', '.join(unknown)})")
    t, y, x = (
        (float(rope_options.get(f"scale_{axis}", 1)), float(rope_options.get(f"shift_{axis}", 0))) for axis in ROPE_AXES
    )
    return t, y, x


def has_wrappers(model_options: Mapping[str, Any]) -> bool:
    """Return whether others stand around an evaluation, who may change what the network is given each time."""
    kinds = model_options.get("transformer_options", {}).get("wrappers", {}).values()
    others = any(functions for keys in kinds for key, functions in keys.items() if key not in HARMLESS_WRAPPERS)
    return others or any(
        model_options.get(name) is not None for name in ("model_function_wrapper", "sampler_calc_cond_batch_function")
    )


# -------------------------------------------------------------- attention --
def comfyui_attention(options: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """Return the attention of ComfyUI's own Wan where the user chose one; None where torch's own is as good.

    It is chosen by a node (`optimized_attention_override`), by an option of the command line, by an installed xformers,
    or by a pack that replaces the function. Torch's, and what ComfyUI takes by itself where it does not trust torch's,
    are left to the network's own door.
    """
    function = comfy.ldm.wan.model.optimized_attention  # as that module has it: packs replace it just there
    plain = [attentions.attention_pytorch]
    if not cli_args.use_quad_cross_attention:
        plain += [attentions.attention_sub_quad, attentions.attention_basic]
    return None if OVERRIDE not in options and function in plain else function


def attention_note(options: Mapping[str, Any]) -> str:
    """Return which attention the passes of a run use, for the log."""
    function = comfyui_attention(options)
    if function is None:
        return "attention: torch's scaled_dot_product_attention"
    if OVERRIDE in options:
        return f"attention: {_name(options[OVERRIDE])}, set on the model ({OVERRIDE}) in the place of {_name(function)}"
    return f"attention: ComfyUI's {_name(function)}, as it was started or another pack chose"


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


# ---------------------------------------------------------------- modules --
def check_module(path: str, module: nn.Module, *, is_comfyuis: bool = True) -> None:
    """Raise ValueError if a module whose place our network takes does not do what ComfyUI's own does.

    is_comfyuis: it has to be of a class of ComfyUI, not only to be left as its class has it.
    """
    module = getattr(module, "_orig_mod", module)  # compiled: the same function
    kind = type(module)
    where = path or "the network"
    setter = HINTS.get(path.rpartition(".")[2] or "network")
    hint = "" if setter is None else f" ({setter})"
    method = next(_changed_methods(module), None)
    if method is not None:
        raise _refuse(f"another {method} of {where}{hint}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise _refuse(f"a forward hook on {where}")
    if is_comfyuis and not _is_of_comfyui(module):
        raise _refuse(f"another {where}: {kind.__module__}.{kind.__qualname__}{hint}")


def is_changed(module: nn.Module) -> bool:
    """Return whether a module of a block is not ComfyUI's own, or does something else than its class has it do."""
    module = getattr(module, "_orig_mod", module)
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    return has_hooks or not _is_of_comfyui(module) or next(_changed_methods(module), None) is not None


def _is_of_comfyui(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("comfy.", "torch.nn.modules.container"))


def _changed_methods(module: nn.Module) -> Iterator[str]:
    """Yield methods that an instance has replaced. ComfyUI leaves the class's own there after a patch."""
    for name, value in vars(module).items():
        own = getattr(type(module), name, None)
        # Object patches (`add_object_patch`) write a bound function where the class has a method.
        if callable(own) and name not in _TORCH_METHODS and value is not None:
            is_own = getattr(value, "__func__", None) is own and getattr(value, "__self__", None) is module
            if not is_own:
                yield name


# --------------------------------------------------------------- weights --
def unapplied_names(patcher: Any, names: Iterable[str]) -> list[str]:
    """Return the network's parameters for which the MODEL carries a patch that ComfyUI has not applied."""
    # `patches` are those that the MODEL carries, `backup` the weights from before one was applied.
    keys = ((name, f"diffusion_model.{name}") for name in names)
    return [name for name, key in keys if key in patcher.patches and key not in patcher.backup]


def unapplied_weights(patcher: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return what a LoRA makes of parameters that ComfyUI leaves as they are, float32, by their names.

    ComfyUI applies a patch where a module has nothing but its own parameters; a block's modulation is not such a one.
    """
    weights: dict[str, Tensor] = {}
    for name in unapplied_names(patcher, names):
        key = f"diffusion_model.{name}"
        # In float32, as ComfyUI computes a LoRA, and on a copy: the MODEL without it stays as it is.
        weight = patcher.get_model_object(key).to(patcher.load_device, torch.float32, copy=True)
        weights[name] = comfy.lora.calculate_weight(patcher.patches[key], weight, key)
    return weights
