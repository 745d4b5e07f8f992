"""Files to MODEL and VAE."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..selfforcing_core.checkpoint import Checkpoint, read_checkpoint
from ..selfforcing_core.hub import resolve_model, resolve_taehv
from ..selfforcing_core.taehv_releases import LATENT_SPACES, WAN, expect_latent_space
from . import host
from .adapter import TAEHVAutoencoder, model_from_checkpoint

MODEL_FOLDER = "diffusion_models"
TAEHV_FOLDERS = ("vae_approx", "vae")
WEIGHT_DTYPES = {
    "default": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _expect(checkpoint: Checkpoint, kind: str, choice: str, remedy: str) -> None:
    if checkpoint.kind != kind:
        raise ValueError(f"{choice!r} holds a model of kind {checkpoint.kind!r}, not {kind!r}; {remedy}")


class SelfForcingModelLoader(io.ComfyNode):
    """Checkpoint to MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingModelLoader",
            display_name="Load Model (Self Forcing)",
            category="SelfForcing",
            description="Loads a Wan 2.1 model that was trained to generate chunk by chunk: safetensors or the "
            "released .pt files, as they are. The result is an ordinary MODEL: LoRA and other model nodes apply.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=host.file_choices(MODEL_FOLDER),
                    tooltip="A bundled model, or a file of models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Number type of the weights in memory. default: what suits the device; "
                    "the 16-bit types take half the memory of float32.",
                ),
                io.Combo.Input(
                    "weights",
                    options=["auto", "ema", "raw"],
                    default="auto",
                    tooltip="Which weights of a .pt file that holds both: ema is the moving average, raw the last "
                    "training step. auto: the moving average where there is one.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, for the node Stream Sampler (Self Forcing).")],
        )

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, weights: str) -> io.NodeOutput:
        checkpoint = read_checkpoint(host.file_of(unet_name, resolve_model, MODEL_FOLDER), weights=weights)
        _expect(checkpoint, "wan", unet_name, "choose a video model")
        return io.NodeOutput(model_from_checkpoint(checkpoint, dtype=WEIGHT_DTYPES[weight_dtype]))

    @classmethod
    def fingerprint_inputs(cls, unet_name: str = "", **_: object) -> str:
        return host.fingerprint(host.file_of(unet_name, resolve_model, MODEL_FOLDER)) if unet_name else ""


class SelfForcingTAEHVLoader(io.ComfyNode):
    """Checkpoint to VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingTAEHVLoader",
            display_name="Load TAEHV (Self Forcing)",
            category="SelfForcing",
            description="Loads a tiny video autoencoder for Wan 2.1 latents (taew2_1), which decodes a stream while it "
            "is being generated. The result is an ordinary VAE; video latents only.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=host.file_choices(*TAEHV_FOLDERS),
                    tooltip="A bundled autoencoder, or a TAEHV file of models/vae_approx or models/vae.",
                ),
                io.Combo.Input(
                    "latents",
                    options=["auto", WAN],
                    default="auto",
                    optional=True,
                    tooltip="Whose latents the file decodes. auto: what its header or its bytes say. The TAEHV of "
                    "other models look the same and decode into wrong colours: choose wan2.1 only if you know it.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The autoencoder, for the sampler's live decoding or any VAE input.")],
        )

    @classmethod
    def execute(cls, vae_name: str, latents: str = "auto") -> io.NodeOutput:
        checkpoint = read_checkpoint(host.file_of(vae_name, resolve_taehv, *TAEHV_FOLDERS))
        _expect(checkpoint, "taehv", vae_name, "choose a TAEHV file such as taew2_1; the host's Load VAE reads others")
        # a name outside the released ones is that of a small model's own space, which only its own TAEHV decodes
        if latents == "auto" and checkpoint.latent_space in (None, *LATENT_SPACES):
            expect_latent_space(checkpoint.latent_space, checkpoint.config, WAN, vae_name)
        return io.NodeOutput(TAEHVAutoencoder(checkpoint))

    @classmethod
    def fingerprint_inputs(cls, vae_name: str = "", **_: object) -> str:
        return host.fingerprint(host.file_of(vae_name, resolve_taehv, *TAEHV_FOLDERS)) if vae_name else ""
