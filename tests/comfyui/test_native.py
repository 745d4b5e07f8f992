"""Our networks are ordinary citizens of ComfyUI: its folders, LoRA loader, samplers and number types apply to them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from selfforcing_core.config import StepConfig
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from tests.comfyui.graphs import (
    EXPLICIT_CHUNK,
    MODEL,
    SAMPLER,
    SAVE,
    TAEHV,
    TEXT,
    Prompt,
    add,
    fresh_seed,
    latents_of,
    read_mp4,
    tiny_prompt,
)
from tests.comfyui.host_server import ROOT, Server, failure
from train.tiny.text import umt5_config

BUNDLE = ROOT / "assets" / "tiny"


def put(server: Server, source: Path, folder: str, name: str) -> str:
    """Place a file in one of ComfyUI's model folders, as a user does."""
    target = server.folder / "models" / folder
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target / name)
    return name


def short_prompt(seed: int, **sampler_inputs: Any) -> Prompt:
    return tiny_prompt(seed=seed, length=21, **sampler_inputs)


def test_files_in_the_hosts_folders_work_like_the_bundle(server: Server) -> None:
    seed = fresh_seed()
    bundled = latents_of(server, short_prompt(seed))
    prompt = short_prompt(seed)
    model, taehv = BUNDLE / "model.safetensors", BUNDLE / "taehv.safetensors"
    prompt[MODEL]["inputs"]["unet_name"] = put(server, model, "diffusion_models", "mine.safetensors")
    prompt[TAEHV]["inputs"]["vae_name"] = put(server, taehv, "vae_approx", "tae_mine.safetensors")
    shutil.copytree(BUNDLE / "text_encoder", server.folder / "models/text_encoders/mine", dirs_exist_ok=True)
    prompt[TEXT]["inputs"]["text_encoder"] = "mine"
    assert torch.equal(latents_of(server, prompt), bundled)


def test_files_of_the_wrong_kind_are_refused(server: Server) -> None:
    prompt = short_prompt(fresh_seed())
    taehv = BUNDLE / "taehv.safetensors"
    prompt[MODEL]["inputs"]["unet_name"] = put(server, taehv, "diffusion_models", "not_a_model.safetensors")
    assert "choose a video model" in failure(server.result(server.submit(prompt)))
    junk = server.folder / "junk.safetensors"
    junk.write_bytes(b"junk")
    prompt[MODEL]["inputs"]["unet_name"] = put(server, junk, "diffusion_models", "junk.safetensors")
    assert "junk.safetensors" in failure(server.result(server.submit(prompt)))


def test_a_taehv_that_does_not_say_whose_it_is_is_asked_about(server: Server) -> None:
    prompt = short_prompt(fresh_seed())
    silent = server.folder / "silent.safetensors"
    save_file(load_file(BUNDLE / "taehv.safetensors"), silent)  # the tensors without the file's header
    prompt[TAEHV]["inputs"]["vae_name"] = put(server, silent, "vae_approx", "silent.safetensors")
    assert "does not say which latents it decodes" in failure(server.result(server.submit(prompt)))
    prompt[TAEHV]["inputs"]["latents"] = "wan2.1"
    assert "made for latents of wan2.1, but the model makes those of tiny" in failure(
        server.result(server.submit(prompt))
    )


def test_prompt_from_another_models_text_encoder_is_refused(server: Server) -> None:
    folder = server.folder / "models/text_encoders/other"
    shutil.copytree(BUNDLE / "text_encoder", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    config = umt5_config(vocab=512, dim=64, dim_attn=64, dim_ffn=64, num_heads=2, num_layers=1)
    UMT5EncoderModel(config).save_pretrained(folder)
    prompt = short_prompt(fresh_seed())
    prompt[TEXT]["inputs"]["text_encoder"] = "other"
    assert "64 wide" in failure(server.result(server.submit(prompt)))


def test_lora_of_the_usual_names_changes_the_video_and_leaves_no_trace(server: Server) -> None:
    seed = fresh_seed()
    before = latents_of(server, short_prompt(seed))
    weights = load_file(BUNDLE / "model.safetensors")
    width = weights["blocks.0.self_attn.q.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for part in ("self_attn.q", "self_attn.o", "ffn.0"):
        rows = weights[f"blocks.0.{part}.weight"].shape[0]
        lora[f"diffusion_model.blocks.0.{part}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.3
        lora[f"diffusion_model.blocks.0.{part}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
    save_file(lora, server.folder / "models/loras/lora.safetensors")

    prompt = short_prompt(seed, model=["lora", 0])
    add(prompt, "lora", "LoraLoaderModelOnly", model=[MODEL, 0], lora_name="lora.safetensors", strength_model=1.0)
    assert (latents_of(server, prompt) - before).abs().mean() > 0.01
    assert "lora key not loaded" not in server.log()
    # ComfyUI adds a LoRA to the weights themselves and takes it off again: not a bit may be left.
    assert torch.equal(latents_of(server, short_prompt(seed, chunk=EXPLICIT_CHUNK)), before)


def test_steps_by_widgets_are_those_of_a_file_that_says_so(server: Server) -> None:
    """Timesteps as they are, and others for the first chunk: by the Stream Sampler, and by the header at auto."""
    seed = fresh_seed()
    asked = latents_of(server, short_prompt(seed, warp="as listed", first_chunk_steps=2))
    checkpoint = read_checkpoint(BUNDLE / "model.safetensors")
    steps = replace(checkpoint.steps or StepConfig(), warp=False, first_chunk_steps=(1000.0, 500.0))
    settings = {"causal": checkpoint.causal, "steps": steps, "latent_space": checkpoint.latent_space}
    folder = server.folder / "models/diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "raw.safetensors", checkpoint.state_dict, checkpoint.config, **settings)
    prompt = short_prompt(seed)
    prompt[MODEL]["inputs"]["unet_name"] = "raw.safetensors"
    assert torch.equal(latents_of(server, prompt), asked)
    assert (latents_of(server, short_prompt(seed)) - asked).abs().mean() > 0.01


def test_hosts_own_sampler_runs_the_model(server: Server) -> None:
    # Nine frames are one chunk: all that a causal model may denoise at once.
    prompt = tiny_prompt()
    add(prompt, "latent", "EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
    add(prompt, "zero", "ConditioningZeroOut", conditioning=[TEXT, 0])
    add(
        prompt,
        SAMPLER,
        "KSampler",
        model=[MODEL, 0],
        positive=[TEXT, 0],
        negative=["zero", 0],
        latent_image=["latent", 0],
        seed=fresh_seed(),
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    add(prompt, "decode", "SelfForcingTAEHVDecode", samples=[SAMPLER, 0], taehv=[TAEHV, 0])
    prompt["5"]["inputs"]["images"] = ["decode", 0]
    assert len(read_mp4(server.run(prompt)[SAVE][0])[0]) == 9


def test_shift_set_by_the_hosts_model_node_counts_when_shift_is_auto(server: Server) -> None:
    seed = fresh_seed()
    by_widget = latents_of(server, short_prompt(seed, shift=2.0))
    prompt = short_prompt(seed, model=["shifted", 0])
    add(prompt, "shifted", "ModelSamplingSD3", model=[MODEL, 0], shift=2.0)
    assert torch.equal(latents_of(server, prompt), by_widget)


@pytest.mark.parametrize(("weight_dtype", "is_stored"), [("bfloat16", True), ("float16", False)])
def test_narrow_number_types_give_nearly_the_same_video(server: Server, weight_dtype: str, is_stored: bool) -> None:
    """Nearly; and exactly for the type that the bundle's file holds, since a CPU computes in float32 either way."""
    seed = 1
    full = latents_of(server, short_prompt(seed))
    prompt = short_prompt(seed)
    prompt[MODEL]["inputs"]["weight_dtype"] = weight_dtype
    difference = (latents_of(server, prompt) - full).abs().mean()
    assert (difference == 0) == is_stored
    assert difference < 0.5
