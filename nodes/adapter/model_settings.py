"""What a MODEL is and how it is sampled, as its model_options carry it, and what the widgets of a node make of that."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...selfforcing_core.config import FEW_STEP_SOLVERS, CausalConfig, StepConfig
from ...selfforcing_core.schedule import FlowSchedule
from ...selfforcing_core.weights.preset_settings import in_words, preset_settings, unable
from ...selfforcing_core.weights.presets import Preset

log = logging.getLogger(__name__)
LOW_NOISE = "selfforcing_low_noise"  # attachment of a MODEL for high noise: the one for low noise
KEY = "selfforcing"  # of our settings in model_options, and of a rollout's CausalPass in transformer_options
CAUSAL, FEW_STEP, BASE, UNKNOWN = "causal", "few-step bidirectional", "base", "unknown"
AUTO, SINK_AUTO, NOISE_AUTO = 0, -1, -1.0  # widget values that stand for the MODEL's own setting


@dataclass(frozen=True)
class Settings:
    """What a MODEL is and how it is sampled; travels in its model_options."""

    kind: str = UNKNOWN  # how it was trained: CAUSAL, FEW_STEP, BASE or UNKNOWN
    causal: CausalConfig = field(default_factory=CausalConfig)  # chunks, window and sink
    steps: StepConfig = field(default_factory=StepConfig)  # its noise levels, and the shift they are sent through
    cache_dtype: torch.dtype | None = None  # of keys and values; None is the type that the model computes in
    cache_device: str | None = None  # where they lie; None is where the model computes
    guidance: float | None = None  # scale that the file says it is sampled with
    latent_space: str | None = None  # whose latents it makes; None is not known
    boundary_step: int = 0  # of two MODELs: how many steps are the first one's; 0: the boundary of `steps` says it


def settings_of(patcher: Any) -> Settings:
    """Return what our loader or patch node left on a MODEL. Raises ValueError for a MODEL that neither has seen."""
    # model_options travel with a MODEL through every node that clones it: LoRA loaders, ModelSamplingSD3 and so on.
    settings = patcher.model_options.get(KEY)
    if isinstance(settings, Settings):
        return settings
    raise ValueError(
        f"this model ({type(patcher.model).__name__}) is not prepared to generate chunk by chunk; load it with the "
        "node Load Model (Self Forcing), or put Patch Model (Self Forcing) behind its loader"
    )


def low_noise_of(patcher: Any) -> Any:
    """Return the MODEL for low noise that a MODEL brings along; None where it is the only one."""
    return patcher.get_attachment(LOW_NOISE)


def kind_note(settings: Settings) -> str | None:
    """Return what the user should know of how the MODEL was trained; None where our samplers are made for it."""
    if settings.kind == UNKNOWN:
        return (
            "the file does not say how its model was trained; choose kind in Load Model to be sure (causal for Self "
            "Forcing and its kin). A plain Wan 2.1 model, which was not distilled, gives blurred or broken videos here"
        )
    steps = settings.steps
    if settings.kind == CAUSAL and steps.solver not in FEW_STEP_SOLVERS:
        guidance = "" if settings.guidance is None else f" and cfg {settings.guidance:g}"
        return f"this model is not distilled: its file lists {len(steps.steps)} steps ({steps.solver}){guidance}"
    return None


def preset_behind_widgets(preset: Preset, widgets: Settings) -> tuple[Settings, list[str]]:
    """Return a preset's settings, those of widgets that stand elsewhere than at their defaults before it, and lines.

    Raises ValueError for a preset that cannot run here or leaves something open.
    """
    refusal = unable(preset)
    if refusal is not None:
        raise ValueError(f"the model {refusal}")
    settings = preset_settings(preset)
    usual = Settings(CAUSAL)
    kind = CAUSAL if settings.causal is not None else FEW_STEP
    values: dict[str, tuple[Any, Any, Any]] = {  # the widget's, its default, the preset's
        "kind": (widgets.kind, usual.kind, kind),
        "chunk": (widgets.causal.chunk, usual.causal.chunk, (settings.causal or usual.causal).chunk),
        "shift": (widgets.steps.shift, usual.steps.shift, settings.steps.shift),
    }
    chosen = {name: own if own != default else read for name, (own, default, read) in values.items()}
    notes = [f"the model is run as {in_words(preset)}: chunk {chosen['chunk']}, shift {chosen['shift']:g}"]
    notes += [
        f"{preset.name} has {name} {read}; {own} is used"
        for name, (own, default, read) in values.items()
        if own not in (default, read)
    ]
    causal = replace(settings.causal or usual.causal, chunk=chosen["chunk"])
    steps = replace(settings.steps, shift=chosen["shift"])
    return Settings(chosen["kind"], causal, steps, guidance=settings.guidance, latent_space=preset.latent_space), notes


def causal_settings(trained: CausalConfig, chunk: int, window: int, sink: int) -> CausalConfig:
    """Return the widgets' values, the MODEL's own where they say auto; log what they replace."""
    widgets = (("chunk", chunk, AUTO), ("window", window, AUTO), ("sink", sink, SINK_AUTO))
    overrides = {name: value for name, value, auto in widgets if value not in (auto, getattr(trained, name))}
    for name, value in overrides.items():
        log.info("the model's own %s is %d; %d is used", name, getattr(trained, name), value)
    return replace(trained, **overrides)


def sigmas_of(patcher: Any, num_steps: int, shift: float) -> Tensor:
    """Return SIGMAS, 0 at the end: the MODEL's own list at auto, else `num_steps` evenly spaced ones.

    shift: AUTO is the MODEL's own, or what a ModelSamplingSD3 node set.
    """
    trained = settings_of(patcher).steps
    keeps_list = num_steps in (AUTO, len(trained.steps))
    used_shift = shift or getattr(patcher.get_model_object("model_sampling"), "shift", trained.shift)
    # A released list such as 1000, 750, 500, 250 is warped by the shift, s t / (1 + (s - 1) t) for t in [0, 1].
    if keeps_list:
        schedule = FlowSchedule(replace(trained, shift=used_shift))
        if not trained.warp and trained.sigma == "exact" and used_shift != trained.shift:
            log.warning("the model gives its timesteps as they are, so that shift %g changes nothing", used_shift)
    else:  # evenly spaced ones are warped, whatever the model's own list is
        log.info("the model's own steps are %d; %d even ones are used", len(trained.steps), num_steps)
        even = StepConfig.even(num_steps, shift=used_shift)
        schedule = FlowSchedule(replace(trained, steps=even.steps, shift=used_shift, warp=True))
    # SIGMAS of ComfyUI end with the level that the last step reaches.
    return torch.tensor([*schedule.sigmas, 0.0], dtype=torch.float32)
