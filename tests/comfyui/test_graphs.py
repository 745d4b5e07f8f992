"""The shipped workflows, with small random weights under the released names in ComfyUI's own folders."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from selfforcing_core.config import WanConfig
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from selfforcing_core.weights.latent_space import WAN
from tests.comfyui.graphs import SAMPLER, Prompt, add, fresh_seed, latents_of, read_mp4, tiny_prompt
from tests.comfyui.host_server import ROOT, Server, failure
from train.tiny.text import umt5_config

SIZES = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
T2V, I2V = WanConfig(**SIZES), WanConfig(**SIZES, in_dim=36, model_type="i2v")
DECODER = "taew2_1.safetensors"  # the bundled one, as if it were made for Wan's latents
SIDE = 64
# Video frames in place of those of the workflow; the same chunks, fewer of them.
SHORTER = {81: 21, 85: 25, 129: 33, 165: 33, 2001: 33}
FRAMES = {"i2v_1.3b_prefill": 25} | dict.fromkeys(
    ("extend_1.3b", "live_t2v_1.3b", "prompt_schedule_1.3b", "endless_1.3b"), 33
)


def random_weights(config: WanConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        for name, shape in wan_shapes(config).items()
    }


@pytest.fixture(scope="module")
def stocked(server: Server) -> Server:
    """Return the server with small files of the workflows' names, and an encoder of Wan's width for their prompts."""
    models = server.folder / "models"
    for folder in ("diffusion_models", "text_encoders", "vae", "vae_approx", "clip_vision"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    # As the reference's trainer saves it: the average's weights under one key, with the wrapper's prefix.
    released = {"model." + name: value for name, value in random_weights(T2V).items()}
    torch.save({"generator_ema": released}, models / "diffusion_models/self_forcing_dmd.pt")
    save_file(random_weights(T2V), models / "diffusion_models/wan2.1_t2v_14b_lightx2v_4step.safetensors")
    save_file(random_weights(I2V), models / "diffusion_models/wan2.1_i2v_480p_lightx2v_4step.safetensors")
    layer = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight": torch.randn(shape)
        for side, shape in (("down", (2, T2V.dim)), ("up", (T2V.dim, 2)))
    }
    save_file(layer, models / "loras/selfforcing_lora.safetensors")
    taehv = read_checkpoint(ROOT / "assets/tiny/taehv.safetensors")
    save_checkpoint(models / "vae_approx" / DECODER, taehv.state_dict, taehv.config, latent_space=WAN)
    folder = models / "text_encoders/wide"
    shutil.copytree(ROOT / "assets/tiny/text_encoder", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()  # the bundle's, which is narrower than Wan's encoder
    torch.manual_seed(0)
    config = umt5_config(vocab=512, dim=4096, dim_attn=64, dim_ffn=64, num_heads=2, num_layers=1)
    UMT5EncoderModel(config).save_pretrained(folder)
    pixels = torch.arange(SIDE * SIDE * 3).remainder(256).to(torch.uint8).reshape(SIDE, SIDE, 3)
    Image.fromarray(pixels.numpy()).save(server.folder / "input/example.png")
    return server


def small(prompt: Prompt) -> Prompt:
    """Return the graph at a small size; prompts and frames go through small networks of the same kind."""
    inputs = [node["inputs"] for node in prompt.values()]
    for name, node in list(prompt.items()):
        values = node["inputs"]
        values.update({side: SIDE for side in ("width", "height") if side in values})
        if "length" in values:
            values["length"] = SHORTER[values["length"]]
        if "window" in values and values["window"] > 0:
            values.update(window=9, sink=3)
        for seed in ("seed", "noise_seed"):
            if seed in values:
                values[seed] = fresh_seed()
        if node["class_type"] == "CLIPTextEncode":
            node["class_type"], values["text_encoder"] = "SelfForcingTextEncode", "wide"
        if node["class_type"] == "SelfForcingPromptSchedule":
            values.update(text=values["text"].replace("5s:", "1s:"), text_encoder="wide")
        values.pop("clip", None)
        if node["class_type"] in ("VAELoader", "SelfForcingTAEHVLoader"):
            prompt[name] = {"class_type": "SelfForcingTAEHVLoader", "inputs": {"vae_name": DECODER, "latents": "auto"}}
        if node["class_type"] in ("CLIPLoader", "CLIPVisionLoader", "CLIPVisionEncode"):
            del prompt[name]
    for values in inputs:
        if values.get("clip_vision_output", [""])[0] not in prompt:
            values.pop("clip_vision_output", None)
    return prompt


def shipped(name: str) -> Prompt:
    return json.loads((ROOT / "workflows/api" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "workflows/api").glob("*.json"))])
def test_shipped_workflow_runs_and_saves_a_video(stocked: Server, name: str) -> None:
    if name.startswith("tiny"):
        pytest.skip("runs with its real weights in test_video.py")
    prompt = small(shipped(name))
    save = next(key for key, node in prompt.items() if node["class_type"] in ("SaveVideo", "SelfForcingStreamToFile"))
    frames, fps = read_mp4(stocked.run(prompt)[save][0])
    assert frames.shape == (FRAMES.get(name, 21), 3, SIDE, SIDE)
    assert fps == 16
    assert frames.std() > 0.01


def test_the_native_graph_previews_every_chunk_and_gives_all_frames(stocked: Server) -> None:
    prompt = small(shipped("t2v_1.3b_native"))
    add(prompt, "denoised", "SaveLatent", samples=["14", 1], filename_prefix="latents/denoised")
    add(prompt, "output", "SaveLatent", samples=["14", 0], filename_prefix="latents/output")
    with stocked.events() as events:
        queued = stocked.submit(prompt, events.client_id)
        received = events.until("execution_success", "execution_error")
    entry = stocked.result(queued)
    assert entry["status"]["status_str"] == "success", failure(entry)
    assert sum(event["type"] == "binary" for event in received) >= 2, "one for each chunk"
    values = [e["data"]["value"] for e in received if e["type"] == "progress" and e["data"]["node"] == "14"]
    assert values == sorted(values)
    assert values[-1] == 4, "of four sigmas"
    denoised, output = (
        load_file(stocked._files(entry["outputs"][name])[0])["latent_tensor"] for name in ("denoised", "output")
    )
    torch.testing.assert_close(denoised, output, atol=1e-5, rtol=1e-5)


def causal_prompt(**sampler: Any) -> Prompt:
    """Return the streaming workflow at a small size, up to its sampler."""
    prompt = small(shipped("t2v_1.3b_stream"))
    prompt[SAMPLER] = prompt.pop("5")
    prompt[SAMPLER]["inputs"].update(seed=1, **sampler)
    del prompt[SAMPLER]["inputs"]["taehv"]
    return {key: node for key, node in prompt.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}


def test_a_model_of_the_hosts_loader_is_the_same_once_patched(stocked: Server) -> None:
    direct = causal_prompt()
    direct["1"]["inputs"]["unet_name"] = "wan2.1_t2v_14b_lightx2v_4step.safetensors"
    patched = causal_prompt()
    add(patched, "host", "UNETLoader", unet_name="wan2.1_t2v_14b_lightx2v_4step.safetensors", weight_dtype="default")
    patched["1"] = {
        "class_type": "SelfForcingPatchModel",
        "inputs": {"model": ["host", 0], "kind": "causal", "chunk": 3, "shift": 5.0},
    }
    assert torch.equal(latents_of(stocked, patched), latents_of(stocked, direct))


def test_an_unpatched_model_and_models_of_the_wrong_kind_say_what_to_do(stocked: Server) -> None:
    prompt = causal_prompt()
    prompt["1"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "wan2.1_t2v_14b_lightx2v_4step.safetensors", "weight_dtype": "default"},
    }
    add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="x")
    assert "Patch Model (Self Forcing)" in failure(stocked.result(stocked.submit(prompt)))
    for kind, words in (("few-step bidirectional", "Few-Step Sampler"), ("base", "KSampler")):
        prompt = causal_prompt()
        prompt["1"]["inputs"]["kind"] = kind
        add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="x")
        assert words in failure(stocked.result(stocked.submit(prompt)))
    prompt = small(shipped("few_step_t2v_14b"))
    prompt["1"]["inputs"]["kind"] = "causal"
    assert "use Sampler (Self Forcing)" in failure(stocked.result(stocked.submit(prompt)))


def test_prompts_that_a_cache_would_get_wrong_are_refused(stocked: Server) -> None:
    for node, more, words in (
        ("ConditioningSetTimestepRange", {"start": 0.0, "end": 0.5}, "Conditioning Set Timestep Range"),
        ("ConditioningSetArea", {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}, "Set Area"),
    ):
        prompt = causal_prompt(positive=["changed", 0])
        add(prompt, "changed", node, conditioning=["3", 0], **more)
        add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="x")
        assert words in failure(stocked.result(stocked.submit(prompt)))


def test_guidance_changes_the_video_and_needs_a_negative_prompt(stocked: Server) -> None:
    plain = latents_of(stocked, causal_prompt())
    prompt = causal_prompt(cfg=3.0)
    add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="x")
    assert "needs a negative prompt" in failure(stocked.result(stocked.submit(prompt)))
    prompt = causal_prompt(cfg=3.0, negative=["start", 1])  # an output that is empty without a negative prompt
    add(
        prompt,
        "start",
        "SelfForcingImageToVideo",
        model=["1", 0],
        positive=["3", 0],
        width=SIDE,
        height=SIDE,
        length=33,
        batch_size=1,
        latent=["given", 0],
    )
    add(prompt, "given", "EmptyHunyuanLatentVideo", width=SIDE, height=SIDE, length=9, batch_size=1)
    add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="x")
    assert "needs a negative prompt" in failure(stocked.result(stocked.submit(prompt)))
    prompt = causal_prompt(cfg=3.0, negative=["none", 0])
    add(prompt, "none", "SelfForcingTextEncode", text_encoder="wide", text="blurry")
    assert (latents_of(stocked, prompt) - plain).abs().max() > 0.01


def test_cache_options_change_what_a_chunk_sees(stocked: Server) -> None:
    def run(**options: Any) -> torch.Tensor:
        prompt = causal_prompt(length=33, model=["options", 0])
        unchanged = {"chunk": 0, "window": 0, "sink": -1, "context_noise": -1.0}
        places = {"cache_dtype": "default", "cache_device": "default"}
        add(prompt, "options", "SelfForcingCacheOptions", model=["1", 0], **{**unchanged, **places, **options})
        return latents_of(stocked, prompt)

    plain = run()
    # Elsewhere, but of the same numbers: a cache in CPU memory changes nothing.
    assert torch.equal(run(window=-1, cache_device="cpu"), plain)
    assert (run(window=6) - plain)[:, :, :6].abs().max() == 0, "two chunks fit the window"
    assert (run(window=6) - plain)[:, :, 6:].abs().max() > 0
    assert not torch.equal(run(context_noise=500.0), plain)
    assert not torch.equal(run(cache_dtype="float8_e4m3fn"), plain)
    sunk = run(window=6, sink=3)
    assert torch.equal(run(window=6, sink=3, policy="lingbot2"), sunk), "a plain window and sink"
    assert not torch.equal(run(window=6, sink=3, policy="infinity-rope"), sunk)
    reward = run(window=6, sink=3, policy="reward")
    assert not torch.equal(run(window=6, sink=3, policy="reward", policy_settings="sink_average=0"), reward)


def test_a_saved_state_goes_on_as_if_the_run_had_not_ended(stocked: Server) -> None:
    whole = latents_of(stocked, causal_prompt(length=33))
    prompt = causal_prompt(length=21, keep_state=True)
    add(prompt, "kept", "SelfForcingSnapshot", state=[SAMPLER, 2], filename_prefix="selfforcing/test")
    part = latents_of(stocked, prompt)
    assert torch.equal(part, whole[:, :, : part.shape[2]])
    saved = sorted((stocked.folder / "output/selfforcing").glob("test_*.state.safetensors"))[-1]
    prompt = causal_prompt(length=33, state=["state", 0])
    add(prompt, "state", "SelfForcingResume", state_name=f"selfforcing/{saved.name}")
    assert torch.equal(latents_of(stocked, prompt), whole)


def test_a_video_that_was_encoded_again_is_continued(stocked: Server) -> None:
    prompt = causal_prompt(length=33, latent_image=["start", 2])
    add(prompt, "vae", "SelfForcingTAEHVLoader", vae_name=DECODER, latents="auto")
    add(prompt, "picture", "LoadImage", image="example.png")
    add(prompt, "frames", "RepeatImageBatch", image=["picture", 0], amount=9)
    add(prompt, "encoded", "SelfForcingTAEHVEncode", pixels=["frames", 0], taehv=["vae", 0])
    add(
        prompt,
        "start",
        "SelfForcingImageToVideo",
        model=["1", 0],
        positive=["3", 0],
        width=SIDE,
        height=SIDE,
        length=33,
        batch_size=1,
        latent=["encoded", 0],
    )
    add(prompt, "given", "SaveLatent", samples=["encoded", 0], filename_prefix="latents/given")
    latents = latents_of(stocked, prompt)
    (given,) = [load_file(path)["latent_tensor"] for path in (stocked.folder / "output/latents").glob("given_*")]
    assert (latents.shape[2], given.shape[2]) == (9, 3)
    torch.testing.assert_close(latents[:, :, :3], given, atol=1e-5, rtol=1e-5)
    longer = json.loads(json.dumps(prompt))
    longer["frames"]["inputs"]["amount"] = 13  # 4 latent frames: 1 plus a chunk, so that the rest is 1 chunk of 2
    assert latents_of(stocked, longer).shape[2] == 7


def test_wans_own_image_conditioning_runs_chunk_by_chunk(stocked: Server) -> None:
    """A causal image-to-video model with ComfyUI's WanImageToVideo: its condition covers the whole video."""
    prompt = causal_prompt(positive=["start", 0])
    prompt["1"]["inputs"].update(unet_name="wan2.1_i2v_480p_lightx2v_4step.safetensors", kind="causal")
    add(prompt, "vae", "SelfForcingTAEHVLoader", vae_name=DECODER, latents="auto")
    add(prompt, "picture", "LoadImage", image="example.png")
    add(
        prompt,
        "start",
        "WanImageToVideo",
        positive=["3", 0],
        negative=["3", 0],
        vae=["vae", 0],
        width=SIDE,
        height=SIDE,
        length=21,
        batch_size=1,
        start_image=["picture", 0],
    )
    with_picture = latents_of(stocked, prompt)
    # Nobody knows what random weights make of a picture; but it has to be another video with another picture.
    add(prompt, "other", "ImageInvert", image=["picture", 0])
    prompt["start"]["inputs"]["start_image"] = ["other", 0]
    assert (latents_of(stocked, prompt) - with_picture).abs().max() > 0.01


def test_two_clients_do_not_disturb_each_other(stocked: Server) -> None:
    alone = latents_of(stocked, tiny_prompt(seed=11, length=21))
    with stocked.events() as first, stocked.events() as second:
        prompts = {}
        for events, chunk in ((first, 3), (second, 0)):
            prompt = tiny_prompt(seed=11 if events is first else fresh_seed(), length=21, chunk=chunk)
            add(prompt, "latents", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="latents/client")
            prompts[events] = stocked.submit(prompt, events.client_id)
        events_of = {events: events.until("execution_success", "execution_error") for events in (first, second)}
    for events, received in events_of.items():
        assert received[-1]["type"] == "execution_success"
        named = {event["data"]["prompt_id"] for event in received if event["type"] in ("executed", "execution_success")}
        assert named == {prompts[events]}
    entry = stocked.result(prompts[first])
    (file,) = stocked._files(entry["outputs"]["latents"])
    assert torch.equal(load_file(file)["latent_tensor"], alone)
