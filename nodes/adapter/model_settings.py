"""What a MODEL is and how it is sampled, as its model_options carry it, and what the widgets of a node make of that."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...selfforcing_core.config import FEW_STEP_SOLVERS, CausalConfig, StepConfig
from ...selfforcing_core.policy import cache_policy
from ...selfforcing_core.schedule import TIMESTEPS, FlowSchedule
from ...selfforcing_core.weights.checkpoint_header import SamplingSettings
from ...selfforcing_core.weights.preset_settings import counted_boundary, in_words, preset_settings, unable
from ...selfforcing_core.weights.presets import Preset

log = logging.getLogger(__name__)
LOW_NOISE = "selfforcing_low_noise"  # attachment of a MODEL for high noise: the one for low noise
KEY = "selfforcing"  # of our settings in model_options, and of a rollout's CausalPass in transformer_options
CAUSAL, FEW_STEP, BASE, UNKNOWN = "causal", "few-step bidirectional", "base", "unknown"
AUTO, SINK_AUTO, NOISE_AUTO, POLICY_AUTO = 0, -1, -1.0, "auto"  # widget values that stand for the MODEL's own setting
WIDGETS = ("chunk", "shift")  # of Patch Model, which say what a preset may leave open
OF_LATER_NODES = ("guidance", "boundary")  # what a guider and Two Experts say
WARPS = {"auto": None, "shifted": True, "as listed": False}  # whether steps go through the shift


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
    settings = own_settings(patcher)
    if settings is not None:
        return settings
    raise ValueError(
        f"this model ({type(patcher.model).__name__}) is not prepared to generate chunk by chunk; load it with the "
        "node Load Model (Self Forcing), or put Patch Model (Self Forcing) behind its loader"
    )


def own_settings(patcher: Any) -> Settings | None:
    """Return what our loader or patch node left on a MODEL; None for a MODEL that neither has seen."""
    # model_options travel with a MODEL through every node that clones it: LoRA loaders, ModelSamplingSD3 and so on.
    settings = patcher.model_options.get(KEY)
    return settings if isinstance(settings, Settings) else None


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


def preset_behind_widgets(preset: Preset, widgets: Settings, own: Settings | None) -> tuple[Settings, list[str]]:
    """Return a preset's settings, those of widgets that stand elsewhere than at their defaults before it, and lines.

    What nobody has read of the release is as its widget says, or as the MODEL does where that stands at its default.
    own: what a loader or patch node of ours has left on the MODEL. Raises ValueError for a preset that cannot run here
    or leaves open what has no widget.
    """
    refusal = unable(preset, (*WIDGETS, *OF_LATER_NODES))
    if refusal is not None:
        raise ValueError(refusal)
    settings = preset_settings(preset, None if own is None else SamplingSettings(own.causal, own.steps))
    assert settings.steps is not None
    usual = Settings(CAUSAL)
    kind = CAUSAL if settings.causal is not None else FEW_STEP
    values: dict[str, tuple[Any, Any, Any]] = {  # the widget's, its default, the preset's
        "kind": (widgets.kind, usual.kind, kind),
        "chunk": (widgets.causal.chunk, usual.causal.chunk, (settings.causal or usual.causal).chunk),
        "shift": (widgets.steps.shift, usual.steps.shift, settings.steps.shift),
    }
    unread = {name: preset.open_questions[name] for name in WIDGETS if name in preset.open_questions}
    chosen = {name: value if value != default else read for name, (value, default, read) in values.items()}
    notes = [f"the model is run as {in_words(preset)}: chunk {chosen['chunk']}, shift {chosen['shift']:g}"]
    if preset.lora is not None:  # what lies on a MODEL does not say where it came from
        notes.append(
            f"{preset.name} is a base and its LoRA ({preset.lora.file}): put that on this MODEL by a LoRA loader, or "
            "it is another model"
        )
    notes += [
        f"{preset.name} has {name} {read}; {value} is used"
        for name, (value, default, read) in values.items()
        if value not in (default, read) and name not in unread
    ]
    notes += [
        f"{preset.name} leaves {name} open ({why}); {chosen[name]:g} is used, as the widget or the model's file says"
        for name, why in unread.items()
    ]
    causal = replace(settings.causal or usual.causal, chunk=chosen["chunk"])
    steps = replace(settings.steps, shift=chosen["shift"])
    behind = Settings(
        chosen["kind"],
        causal,
        steps,
        guidance=settings.guidance,
        latent_space=preset.latent_space,
        boundary_step=counted_boundary(preset),
    )
    return behind, notes


def chosen_policy(trained: CausalConfig, name: str, options: str) -> str:
    """Return what widgets say of the cache policy: POLICY_AUTO is the MODEL's own; options: "key=value,..." or nothing.

    Raises ValueError for options that the policy does not have.
    """
    text = ",".join(part for part in (trained.policy if name == POLICY_AUTO else name, options.strip()) if part)
    cache_policy(text)
    return text


def causal_settings(
    trained: CausalConfig, chunk: int, window: int, sink: int, policy: str | None = None
) -> CausalConfig:
    """Return the widgets' values, the MODEL's own where they say auto or None; log what they replace."""
    widgets = (("chunk", chunk, AUTO), ("window", window, AUTO), ("sink", sink, SINK_AUTO))
    overrides = {name: value for name, value, auto in widgets if value not in (auto, getattr(trained, name))}
    for name, value in overrides.items():
        log.info("the model's own %s is %d; %d is used", name, getattr(trained, name), value)
    return replace(trained, **overrides, policy=policy or trained.policy)


def shift_of(patcher: Any, shift: float = AUTO) -> float:
    """Return the shift of a MODEL's schedule. AUTO is its own, or what a ModelSamplingSD3 node set."""
    return shift or getattr(patcher.get_model_object("model_sampling"), "shift", settings_of(patcher).steps.shift)


def sigmas_of(
    patcher: Any, num_steps: int, shift: float, *, warp: str = "auto", first_chunk_steps: int = AUTO
) -> tuple[Tensor, Tensor | None]:
    """Return SIGMAS, 0 at the end, and those of the first chunk, None where they are the same.

    num_steps, first_chunk_steps: at AUTO the MODEL's own lists, else so many evenly spaced ones. shift: AUTO as in
    `shift_of`. warp: one of WARPS. A list whose last step is 0 ends in two zeros: a pass, and the end.
    """
    trained = replace(settings_of(patcher).steps, shift=shift_of(patcher, shift))
    steps = first = _steps_by(trained.of_chunk(1), num_steps, warp)
    has_own = trained.first_chunk_steps is not None and first_chunk_steps == AUTO
    if has_own or first_chunk_steps not in (AUTO, len(steps.steps)):
        first = _steps_by(trained.of_chunk(0), first_chunk_steps, warp)
    is_shifted = steps.warp or first.warp or steps.sigma == "table" or 0 in (steps.steps[-1], first.steps[-1])
    if not is_shifted and steps.shift != settings_of(patcher).steps.shift:
        log.warning("timesteps are taken as they are, so that shift %g changes nothing", steps.shift)
    return _sigmas(steps), None if first == steps else _sigmas(first)


def _steps_by(trained: StepConfig, count: int, warp: str) -> StepConfig:
    """Return the MODEL's own list at AUTO or as many as it has, else so many evenly spaced ones."""
    is_warped = WARPS[warp]
    if count in (AUTO, len(trained.steps)):
        # A released list such as 1000, 750, 500, 250 is warped by the shift, s t / (1 + (s - 1) t) for t in [0, 1].
        return replace(trained, warp=trained.warp if is_warped is None else is_warped)
    # evenly spaced ones are warped, whatever the model's own list is
    log.info("the model's own steps are %d; %d even ones are used", len(trained.steps), count)
    return replace(trained, steps=StepConfig.even(count, shift=trained.shift).steps, warp=is_warped is not False)


def _sigmas(steps: StepConfig) -> Tensor:
    schedule = FlowSchedule(steps)
    # A pass at timestep 0 is one at sigma 0, whose noise `steps_of` finds again; SIGMAS of ComfyUI end with the level
    # that the last step reaches.
    sigmas = (sigma if timestep else 0.0 for timestep, sigma in zip(schedule.timesteps, schedule.sigmas))
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)


def steps_of(sigmas: Tensor, first_sigmas: Tensor | None = None, *, shift: float = 1.0) -> StepConfig:
    """Return the steps of SIGMAS, and of those of the first chunk, falling from noise to 0.

    Two zeros at the end are a pass at timestep 0, with the noise of this shift, and the end. Raises ValueError for
    SIGMAS that do not end at 0.
    """
    levels, first = (None if each is None else _levels(each) for each in (sigmas, first_sigmas))
    assert levels is not None
    # Sigmas are timesteps / 1000 that have been through the shift already: no warp is left to be done.
    return StepConfig(levels, shift=shift, warp=False, first_chunk_steps=first)


def _levels(sigmas: Tensor) -> tuple[float, ...]:
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[-1] != 0:
        raise ValueError(
            f"the sigmas {[round(level, 4) for level in levels]} do not end at 0, so no chunk would become clean; "
            "use Sigmas (Self Forcing), or BasicScheduler with denoise 1"
        )
    return tuple(TIMESTEPS * level for level in levels[:-1])
