"""Files to MODEL and VAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..selfforcing_core.config import CACHE_SOURCES, CausalConfig, StepConfig
from ..selfforcing_core.policy import POLICIES, cache_policy
from ..selfforcing_core.weights.bundles import resolve_model, resolve_taehv
from ..selfforcing_core.weights.checkpoint import Checkpoint, read_checkpoint
from ..selfforcing_core.weights.latent_space import LATENT_SPACES, WAN, WAN_UNSCALED, expect_latent_space
from ..selfforcing_core.weights.preset_settings import AUTO as AUTO_PRESET
from ..selfforcing_core.weights.preset_settings import NONE as NO_PRESET
from ..selfforcing_core.weights.preset_settings import counted_boundary, read_with_preset
from ..selfforcing_core.weights.presets import PRESETS, find_preset
from .adapter import folders, host, page
from .adapter.autoencoder import TAEHVAutoencoder
from .adapter.causal_model import with_settings
from .adapter.model_file import model_from_checkpoint
from .adapter.model_settings import (
    AUTO,
    BASE,
    CAUSAL,
    FEW_STEP,
    NOISE_AUTO,
    OF_LATER_NODES,
    POLICY_AUTO,
    SINK_AUTO,
    Settings,
    causal_settings,
    chosen_policy,
    own_settings,
    preset_behind_widgets,
    settings_of,
)

# The fp8 types by the names of ComfyUI's own Load Diffusion Model.
WEIGHT_DTYPES = {
    "default": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
KINDS = ("auto", CAUSAL, FEW_STEP, BASE)
CACHE_DTYPES = {
    "default": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def _preset_input(tooltip: str) -> Any:
    choices = [AUTO_PRESET, NO_PRESET, *(preset.name for preset in PRESETS.values() if not preset.unsupported)]
    return io.Combo.Input("preset", options=choices, default=AUTO_PRESET, optional=True, tooltip=tooltip)


def _expect(checkpoint: Checkpoint, kind: str, choice: str, remedy: str) -> None:
    if checkpoint.kind != kind:
        raise ValueError(f"{choice!r} holds a model of kind {checkpoint.kind!r}, not {kind!r}; {remedy}")


def _latent_space(checkpoint: Checkpoint, choice: str, name: str) -> str:
    """Return whose latents a TAEHV decodes: as it says itself, else as the widget says.

    Raises ValueError where neither says so, and for the TAEHV of another released model than Wan 2.1. A name outside
    the released ones is that of a small model's own space, which the decoders' users compare.
    """
    # TAEHV files of several models have equal shapes and decode each other's latents into wrong colours.
    file_space = checkpoint.latent_space
    if file_space is not None and choice not in ("auto", file_space):
        page.show_text(f"{name} says that it decodes latents of {file_space}; latents={choice} is not followed")
    if file_space is None or (file_space in LATENT_SPACES and file_space != WAN_UNSCALED):
        space = choice if file_space is None and choice != "auto" else file_space
        expect_latent_space(space, checkpoint.config, WAN, name, setting="latents")
        return WAN
    return file_space


def load_model(
    unet_name: str, weight_dtype: str, weights: str, kind: str, preset: str = AUTO_PRESET, disable_dynamic: bool = False
) -> Any:
    """Return the MODEL of a file. ComfyUI calls this again, by its name for the last, for a copy on another device."""
    path = folders.file_of(unet_name, resolve_model, folders.MODEL_FOLDER)
    # Of two experts each is a MODEL of its own, and its twin another loader's.
    given = ("low_noise", *OF_LATER_NODES, *(("kind",) if kind != "auto" else ()))
    reading = read_with_preset(path, preset, weights=weights, given=given, folders=folders.partner_folders())
    _expect(reading.checkpoint, "wan", unet_name, "choose a video model")
    for note in reading.notes:
        page.show_text(f"the file {note}")
    model = model_from_checkpoint(
        reading.checkpoint,
        kind=kind,
        dtype=WEIGHT_DTYPES[weight_dtype],
        is_fast_fp8=weight_dtype.endswith("_fast"),
        is_dynamic=not disable_dynamic,
        boundary_step=counted_boundary(reading.preset),
    )
    # Later versions replay it where a MODEL is wanted on another device (Select Model Device); without it, it stays.
    model.cached_patcher_init = load_model, (unet_name, weight_dtype, weights, kind, preset)
    return model


class SelfForcingModelLoader(io.ComfyNode):
    """Checkpoint to MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingModelLoader",
            display_name="Load Model (Self Forcing)",
            category="SelfForcing",
            search_aliases=["self forcing", "load wan 2.1 causal model", "causvid", "autoregressive video"],
            description="Loads a Wan 2.1 model that was trained to generate chunk by chunk: safetensors or the "
            "released .pt files, as they are. The result is an ordinary MODEL: LoRA and other model nodes apply.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folders.file_choices(folders.MODEL_FOLDER, likely=folders.LIKELY_MODELS),
                    tooltip="A file of models/diffusion_models, or a bundled model (with its own TAEHV and text "
                    "encoder).",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Number type of the weights in memory. default: what suits the device; "
                    "the 16-bit types take half the memory of float32, the fp8 types a quarter. fast: multiplies in "
                    "fp8 too, where the GPU can.",
                ),
                io.Combo.Input(
                    "weights",
                    options=["auto", "ema", "raw"],
                    default="auto",
                    tooltip="Which weights of a .pt file that holds both: ema is the moving average, raw the last "
                    "training step. auto: the moving average where there is one.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="auto",
                    optional=True,
                    tooltip="How the model was trained. causal: chunk by chunk (Self Forcing, CausVid, Causal "
                    "Forcing). few-step bidirectional: all frames at once in 4 steps (Self-Forcing-Plus 14B). base: "
                    "not distilled. auto: what the file says, as exports of our trainer do; released files often say "
                    "nothing. Where another kind than the file's is chosen, the node says so.",
                ),
                _preset_input(
                    "Which release the file is: its chunk, window, sink, steps, shift and weights take the place of "
                    "what the file says. auto: recognised by header, names and shapes, which the node says; a training "
                    "file that may be several is asked about, unless kind says how it runs. none: as the file says. "
                    "Widgets of this and later nodes come before it."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model: an ordinary MODEL that our samplers can run too.")],
        )

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, weights: str, kind: str = "auto", preset: str = AUTO_PRESET
    ) -> io.NodeOutput:
        return io.NodeOutput(load_model(unet_name, weight_dtype, weights, kind, preset))

    @classmethod
    def fingerprint_inputs(cls, unet_name: str = "", **_: object) -> str:
        return folders.fingerprint(folders.file_of(unet_name, resolve_model, folders.MODEL_FOLDER)) if unet_name else ""


class SelfForcingPatchModel(io.ComfyNode):
    """MODEL of any loader to MODEL that our samplers can run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingPatchModel",
            display_name="Patch Model (Self Forcing)",
            category="SelfForcing",
            search_aliases=["gguf self forcing", "make a wan model causal"],
            description="Lets the samplers of this pack run a Wan 2.1 model from any loader (Load Diffusion Model, "
            "GGUF, quantised). Its layers stay as they are; other samplers see the same model as before.",
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 model whose weights were trained as `kind` says."),
                io.Combo.Input(
                    "kind",
                    options=[CAUSAL, FEW_STEP],
                    default=CAUSAL,
                    tooltip="causal: trained chunk by chunk. few-step bidirectional: all frames at once in few steps.",
                ),
                io.Int.Input(
                    "chunk",
                    default=3,
                    min=1,
                    max=1000,
                    tooltip="Latent frames that the weights were trained to denoise together: 3 chunk-wise, 1 "
                    "frame-wise.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="Timestep shift of the schedule (a ratio). 5 for Self Forcing; ComfyUI assumes 8 for Wan.",
                ),
                _preset_input(
                    "Which release the weights are: what it is run with takes the place of kind, chunk and shift where "
                    "they stand at their defaults; chunk and shift say what nobody has read of it. auto and none: the "
                    "widgets alone, since a MODEL does not say what it was loaded from."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, prepared.")],
        )

    @classmethod
    def execute(cls, model: Any, kind: str, chunk: int, shift: float, preset: str = AUTO_PRESET) -> io.NodeOutput:
        # A MODEL of another loader brings nothing of its training along: the widgets have to say it.
        settings = Settings(kind, CausalConfig(chunk=chunk), StepConfig(shift=shift))
        if preset not in (AUTO_PRESET, NO_PRESET):
            settings, notes = preset_behind_widgets(find_preset(preset), settings, own_settings(model))
            for note in notes:
                page.show_text(note)
        return io.NodeOutput(host.with_shift(with_settings(model, settings), settings.steps.shift))


class SelfForcingCacheOptions(io.ComfyNode):
    """MODEL with other settings of its chunks and cache."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingCacheOptions",
            display_name="Cache Options (Self Forcing)",
            category="SelfForcing",
            search_aliases=["kv cache", "window", "attention sink", "long video", "less vram"],
            description="How a video is cut into chunks and what each chunk remembers of those before it.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Model (Self Forcing) or Patch Model (Self Forcing)."),
                io.Int.Input(
                    "chunk",
                    default=AUTO,
                    min=0,
                    max=1000,
                    tooltip="Latent frames denoised together (one is 4 video frames). 0 is auto: as trained.",
                ),
                io.Int.Input(
                    "window",
                    default=AUTO,
                    min=-1,
                    max=100000,
                    tooltip="Latent frames kept in the KV cache, the current chunk included; fewer need less memory "
                    "and time. -1: the whole video; 0 is auto: as trained.",
                ),
                io.Int.Input(
                    "sink",
                    default=SINK_AUTO,
                    min=-1,
                    max=100000,
                    tooltip="First latent frames that never leave the window. 0: none; -1 is auto: as trained.",
                ),
                io.Float.Input(
                    "context_noise",
                    default=NOISE_AUTO,
                    min=-1.0,
                    max=999.0,
                    step=1.0,
                    tooltip="Timestep (0 to 999) at which a finished chunk is written into the cache. 0: clean; "
                    "-1 is auto: as trained.",
                ),
                io.Combo.Input(
                    "cache_dtype",
                    options=list(CACHE_DTYPES),
                    default="default",
                    tooltip="Number type of the KV cache. default: that of the computation; float8 and int8 take half "
                    "of 16 bits and are less exact; int8 is the more exact of the two.",
                ),
                io.Combo.Input(
                    "cache_device",
                    options=["default", "cpu"],
                    default="default",
                    tooltip="Where the KV cache lies. cpu: in CPU memory, which frees the GPU and is much slower.",
                ),
                io.Combo.Input(
                    "cache_source",
                    options=["auto", *CACHE_SOURCES],
                    default="auto",
                    optional=True,
                    tooltip="What of a finished chunk stays in the cache. clean: one more pass over it; last_step: "
                    "what its last denoising step wrote, one pass fewer, for models trained so. auto: as trained.",
                ),
                io.Combo.Input(
                    "policy",
                    options=[POLICY_AUTO, *POLICIES],
                    default=POLICY_AUTO,
                    optional=True,
                    tooltip="What the cache keeps of a long video, at which positions, and what a new prompt does to "
                    "it. auto: as the model says. Any other runs too, on weights that were not trained for it; "
                    "docs/policies.md says what each does.",
                ),
                io.String.Input(
                    "policy_settings",
                    default="",
                    optional=True,
                    tooltip="Other numbers of the policy, as on the command line: 'kept=4,cut_at=60'. Empty: its own.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with these settings.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        chunk: int,
        window: int,
        sink: int,
        context_noise: float,
        cache_dtype: str,
        cache_device: str,
        cache_source: str = "auto",
        policy: str = POLICY_AUTO,
        policy_settings: str = "",
    ) -> io.NodeOutput:
        settings = settings_of(model)
        chosen = chosen_policy(settings.causal, policy, policy_settings)
        causal = causal_settings(settings.causal, chunk, window, sink, chosen)
        if cache_policy(chosen).name != cache_policy(settings.causal.policy).name:
            page.show_text(
                f"the model says policy {settings.causal.policy}; {chosen} is used, which these weights were not "
                "trained for"
            )
        if context_noise != NOISE_AUTO:
            causal = replace(causal, context_noise=context_noise)
        if cache_source != "auto":
            causal = replace(causal, cache_source=cache_source)
        new_settings = replace(
            settings,
            causal=causal,
            cache_dtype=CACHE_DTYPES[cache_dtype],
            cache_device=None if cache_device == "default" else cache_device,
        )
        return io.NodeOutput(with_settings(model, new_settings))


class SelfForcingTAEHVLoader(io.ComfyNode):
    """Checkpoint to VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingTAEHVLoader",
            display_name="Load TAEHV (Self Forcing)",
            category="SelfForcing",
            search_aliases=["taehv", "taew2_1", "tiny vae", "fast vae", "load vae"],
            description="Loads a tiny video autoencoder for Wan 2.1 latents (taew2_1), which decodes a stream while it "
            "is being generated. The result is an ordinary VAE; video latents only.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folders.file_choices(*folders.TAEHV_FOLDERS, likely=folders.LIKELY_TAEHVS),
                    tooltip="A TAEHV file of models/vae_approx or models/vae (taew2_1, lighttaew2_1), or the bundled "
                    "autoencoder of a bundled model.",
                ),
                io.Combo.Input(
                    "latents",
                    options=["auto", WAN],
                    default="auto",
                    optional=True,
                    tooltip="Whose latents the file decodes. auto: what its header, its bytes or its name "
                    "(lighttaew2_1) say. The TAEHV of other models look the same and decode into wrong colours: choose "
                    "wan2.1 only if you know it. What a file says itself holds whatever is chosen.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The autoencoder, for the sampler's live decoding or any VAE input.")],
        )

    @classmethod
    def execute(cls, vae_name: str, latents: str = "auto") -> io.NodeOutput:
        checkpoint = read_checkpoint(folders.file_of(vae_name, resolve_taehv, *folders.TAEHV_FOLDERS))
        _expect(checkpoint, "taehv", vae_name, "choose a TAEHV file such as taew2_1; ComfyUI's Load VAE reads others")
        space = _latent_space(checkpoint, latents, vae_name)
        return io.NodeOutput(TAEHVAutoencoder(checkpoint, name=vae_name, latent_space=space))

    @classmethod
    def fingerprint_inputs(cls, vae_name: str = "", **_: object) -> str:
        return folders.fingerprint(folders.file_of(vae_name, resolve_taehv, *folders.TAEHV_FOLDERS)) if vae_name else ""
