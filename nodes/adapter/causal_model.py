"""A Wan MODEL of ComfyUI made causal: its own modules, run in the order of our network, with our cache.

Nothing in the MODEL is replaced. Two wrappers on it look for a rollout's CausalPass in transformer_options; without
one ComfyUI's own forward pass runs, as for any MODEL. Since its own layers are called, whatever ComfyUI or another
pack does to those that have weights (LoRA, offloading, quantised layers, casting) holds in the causal pass too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as memory
import torch.nn as nn
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...selfforcing_core.geometry import pixel_frames
from ...selfforcing_core.weights.latent_space import WAN
from . import page
from .autoencoder import marked
from .causal_pass import CausalPass
from .model_settings import CAUSAL, KEY, Settings, low_noise_of, settings_of
from .shared_network import check_causal, config_of

log = logging.getLogger(__name__)
UMT5_TO_WAN = (4096, 16)  # width of Wan's text encoder and channels of its latents: only Wan's own models have both
COMFYUI_CAUSAL_SAMPLER = "sample_ar_video"  # SamplerARVideo's, which has a cache of its own


def with_settings(patcher: Any, settings: Settings) -> Any:
    """Return a clone of the MODEL that our samplers can run. Raises ValueError for networks other than Wan 2.1's."""
    config = config_of(patcher.model.diffusion_model)
    if settings.latent_space is None and (config.text_dim, config.out_dim) == UMT5_TO_WAN:
        settings = replace(settings, latent_space=WAN)
    if settings.kind == CAUSAL:
        check_causal(patcher.model.diffusion_model)
    clone = patcher.clone()  # whoever else has the MODEL keeps it as it was
    clone.model_options[KEY] = settings
    wrappers = (
        (WrappersMP.APPLY_MODEL, _slice_condition_channels),
        (WrappersMP.DIFFUSION_MODEL, _run_causally),
        (WrappersMP.OUTER_SAMPLE, _check_and_mark),  # in this order: the first is the outermost
        (WrappersMP.OUTER_SAMPLE, _count_extra_bytes),
    )
    # ComfyUI appends what is added under one key. A MODEL that passes our nodes twice has each wrapper once.
    for kind in dict.fromkeys(kind for kind, _ in wrappers):
        clone.remove_wrappers_with_key(kind, KEY)
    for kind, wrapper in wrappers:
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def check_alone(patcher: Any, sampler: Any) -> None:
    """Raise ValueError where a sampler of others would ask the first of two MODELs alone."""
    if low_noise_of(patcher) is not None and not _wraps_ours(sampler):
        raise ValueError(
            "this model is two, for high and for low noise (Two Experts), and only samplers of this pack ask both; use "
            "Sampler or Few-Step Sampler (Self Forcing), or give ComfyUI's own samplers each model without that node"
        )


def _wraps_ours(sampler: Any) -> bool:
    # Whoever wraps another sampler keeps it among its options.
    return any(hasattr(option, "whole_frames") for option in getattr(sampler, "extra_options", {}).values())


def check_at_once(settings: Settings, num_frames: int, sampler: Any) -> None:
    """Raise ValueError where a sampler of others would evaluate more frames together than the MODEL ever saw so."""
    # Samplers of ComfyUI are a function in a KSAMPLER.
    name = getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)
    is_chunk = num_frames <= settings.causal.chunk
    if settings.kind != CAUSAL or is_chunk or name == COMFYUI_CAUSAL_SAMPLER or _wraps_ours(sampler):
        return
    raise ValueError(
        f"this model generates chunk by chunk ({settings.causal.chunk} latent frames), but the sampler "
        f"{name.removeprefix('sample_')} would denoise all {num_frames} latent frames at once, which it never learnt; "
        "use Stream Sampler (Self Forcing), or Sampler (Self Forcing) in SamplerCustomAdvanced; if it was trained on "
        "whole videos, choose kind 'few-step bidirectional' in its loader"
    )


# --------------------------------------------------------------- wrappers --
def _current_pass(transformer_options: dict[str, Any] | None) -> CausalPass | None:
    current = (transformer_options or {}).get(KEY)
    return current if isinstance(current, CausalPass) and current.start_frame is not None else None


def _slice_condition_channels(
    executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Give a chunk its own frames of the condition channels, which span the whole video."""
    # ComfyUI gives them by position; another wrapper may hand them on by name.
    options = kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict) and KEY in a), None)
    current = _current_pass(options)
    if current is not None and c_concat is not None:
        assert current.start_frame is not None
        c_concat = c_concat[:, :, current.start_frame : current.start_frame + current.num_frames]
    return executor(x, t, c_concat, *args, **kwargs)


def _run_causally(
    executor: Any,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    clip_fea: Tensor | None = None,
    time_dim_concat: Tensor | None = None,
    transformer_options: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run our forward pass where a rollout is under way, else ComfyUI's own; wrappers of others stay around either."""
    current = _current_pass(transformer_options)
    if current is None:
        return executor(x, timestep, context, clip_fea, time_dim_concat, transformer_options or {}, *args, **kwargs)
    native = executor.class_obj

    def our_pass(
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None,
        time_dim_concat: Tensor | None,
        transformer_options: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> Tensor:
        return current.evaluate(native, x, timestep, context, clip_fea, transformer_options)

    # Wrappers of other packs that come after ours stay around our pass as they stand around ComfyUI's.
    # An executor is the rest of the chain: its wrappers from idx on, and the innermost function, which is replaced.
    inner = type(executor)(our_pass, native, executor.wrappers, executor.idx)
    return inner(x, timestep, context, clip_fea, time_dim_concat, transformer_options, *args, **kwargs)


def _check_and_mark(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse what would go wrong and leave out what is no whole chunk before anything is loaded; mark the result.

    Samplers of ours have `check` and `whole_frames`; any other sees all frames at once.
    """
    guider = executor.class_obj
    settings = settings_of(guider.model_patcher)
    if not hasattr(sampler, "check"):
        check_alone(guider.model_patcher, sampler)
        check_at_once(settings, noise.shape[2] if noise.ndim == 5 else 1, sampler)
    else:
        sampler.check(guider)
        num_kept = sampler.whole_frames(guider, noise.shape[2], denoise_mask) if noise.ndim == 5 else noise.shape[2]
        if num_kept < noise.shape[2]:
            show_left_out(noise.shape[2], num_kept)
            noise, latent_image = noise[:, :, :num_kept], latent_image[:, :, :num_kept]
            denoise_mask = None if denoise_mask is None else denoise_mask[:, :, :num_kept]
            # 0.27 and later also hand over the shapes, for latents of several parts packed into one.
            kwargs |= {"latent_shapes": [latent_image.shape]} if "latent_shapes" in kwargs else {}
    samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    return marked(samples.to(memory.intermediate_device()), settings.latent_space)


def show_left_out(num_latents: int, num_kept: int) -> None:
    """Show that a length of so many latent frames is cut to the whole chunks in it."""
    page.show_text(
        f"length {pixel_frames(num_latents)} is no whole number of chunks: "
        f"the video has {pixel_frames(num_kept)} frames"
    )


def _count_extra_bytes(
    executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any
) -> Any:
    """Make ComfyUI's estimate that of the coming rollout while it decides how much of the model fits.

    One chunk is evaluated at a time, not the whole video; caches and decoder come on top.
    """
    guider = executor.class_obj
    if not hasattr(sampler, "extra_bytes"):
        return executor(noise, latent_image, sampler, *args, **kwargs)
    shape, model = tuple(noise.shape), guider.model_patcher.model
    frames, extra = sampler.frames_at_once(guider, shape), sampler.extra_bytes(guider, shape)
    estimate = type(model).memory_required

    def of_a_chunk(input_shape: Sequence[int], **options: Any) -> float:
        return estimate(model, [*input_shape[:2], frames, *input_shape[3:]], **options) + extra

    # On the instance, where it hides the method of the class, since ComfyUI asks the model itself.
    model.memory_required = of_a_chunk
    try:
        return executor(noise, latent_image, sampler, *args, **kwargs)
    finally:
        forget_extra_bytes(model)


def forget_extra_bytes(model: nn.Module) -> None:
    """Give ComfyUI its own estimate back: the caches lie in memory now, or are gone."""
    model.__dict__.pop("memory_required", None)
