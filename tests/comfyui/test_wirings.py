"""What users wire wrongly, and the sentence in which each of it ends before the video model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.graphs import SAMPLER, TAEHV, Prompt, add, fresh_seed, latents_of, tiny_prompt
from tests.comfyui.host_server import Refused, Server, failure
from tests.comfyui.test_graphs import DECODER, I2V, SIDE, T2V, causal_prompt, random_weights, shipped, small, stocked

__all__ = ["stocked"]  # the fixture
LOADED = "Requested to load WAN21"  # what ComfyUI logs when a video model goes to its device
TINY = "tiny (bundled)"
FILES = {  # models of other kinds: the plain one's layers, and what only they have
    "vace": (
        T2V,
        {
            "vace_patch_embedding.weight": (T2V.dim, 96, 1, 2, 2),
            "vace_blocks.0.before_proj.weight": (T2V.dim, T2V.dim),
        },
    ),
    "camera": (I2V, {"control_adapter.conv.weight": (T2V.dim, 1536, 2, 2)}),
    "first_last": (I2V, {"img_emb.emb_pos": (1, 514, 1280)}),
}


@pytest.fixture(scope="module")
def shelves(stocked: Server) -> Server:
    """Return the stocked server with files of models that are not supported."""
    folder = stocked.folder / "models/diffusion_models"
    for name, (config, more) in FILES.items():
        shapes = {key: torch.zeros(shape) for key, shape in more.items()}
        save_file({**random_weights(config), **shapes}, folder / f"{name}.safetensors")
    # The 5B model has latents of 48 channels, of another VAE, and is told by them alone.
    wide = {**random_weights(T2V), "patch_embedding.weight": torch.zeros(T2V.dim, 48, 1, 2, 2)}
    wide |= {"head.head.weight": torch.zeros(192, T2V.dim), "head.head.bias": torch.zeros(192)}
    save_file(wide, folder / "5b.safetensors")
    return stocked


# ------------------------------------------------------------------ wirings --
def streamed(**sampler: Any) -> Prompt:
    """Return the streaming workflow at a small size, to its LATENT."""
    prompt = causal_prompt()
    prompt[SAMPLER]["inputs"].update(sampler)
    add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="x")
    return prompt


def decoder(prompt: Prompt, name: str = DECODER) -> Prompt:
    add(prompt, "vae", "SelfForcingTAEHVLoader", vae_name=name, latents="auto")
    return prompt


def foreign_decoder() -> Prompt:
    return decoder(streamed(taehv=["vae", 0]), TINY)


def real_decoder_on_the_tiny_model() -> Prompt:
    prompt = tiny_prompt(seed=fresh_seed())
    prompt[TAEHV]["inputs"]["vae_name"] = DECODER
    return prompt


def tiny_text_on_the_real_model() -> Prompt:
    prompt = streamed()
    prompt["3"]["inputs"]["text_encoder"] = TINY
    return prompt


def picture(prompt: Prompt, node: str, **inputs: Any) -> Prompt:
    add(decoder(prompt), "picture", "LoadImage", image="example.png")
    size = {"width": SIDE, "height": SIDE, "length": 21, "batch_size": 1}
    add(prompt, "start", node, positive=["3", 0], vae=["vae", 0], **size, **inputs)
    return prompt


def picture_on_text_to_video() -> Prompt:
    prompt = streamed(positive=["start", 0])
    return picture(prompt, "WanImageToVideo", negative=["3", 0], start_image=["picture", 0])


def vace_input_on_text_to_video() -> Prompt:
    prompt = streamed(positive=["start", 0])
    return picture(prompt, "WanVaceToVideo", negative=["3", 0], strength=1.0, reference_image=["picture", 0])


def image_to_video_without_picture() -> Prompt:
    prompt = streamed()
    prompt["1"]["inputs"].update(unet_name="wan2.1_i2v_480p_lightx2v_4step.safetensors", kind="causal")
    return prompt


def whole_without_picture() -> Prompt:
    prompt = small(shipped("few_step_i2v_14b"))
    prompt["11"]["inputs"].update(positive=["3", 0])
    prompt["11"]["inputs"].pop("negative", None)
    return prompt


def causal_in_ksampler() -> Prompt:
    prompt = streamed()
    add(prompt, "empty", "EmptyHunyuanLatentVideo", width=SIDE, height=SIDE, length=21, batch_size=1)
    add(
        prompt,
        SAMPLER,
        "KSampler",
        model=["1", 0],
        positive=["3", 0],
        negative=["3", 0],
        latent_image=["empty", 0],
        seed=1,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return prompt


def causal_in_sampler_custom() -> Prompt:
    prompt = causal_in_ksampler()
    add(prompt, "euler", "KSamplerSelect", sampler_name="uni_pc")
    add(prompt, "sigmas", "BasicScheduler", model=["1", 0], scheduler="simple", steps=2, denoise=1.0)
    add(
        prompt,
        SAMPLER,
        "SamplerCustom",
        model=["1", 0],
        add_noise=True,
        noise_seed=1,
        cfg=1.0,
        positive=["3", 0],
        negative=["3", 0],
        sampler=["euler", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 0],
    )
    return prompt


def file(name: str) -> Prompt:
    prompt = streamed()
    prompt["1"]["inputs"]["unet_name"] = f"{name}.safetensors"
    return prompt


def patched(name: str) -> Prompt:
    prompt = streamed()
    add(prompt, "host", "UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")
    add(prompt, "1", "SelfForcingPatchModel", model=["host", 0], kind="causal", chunk=3, shift=5.0)
    return prompt


def encoded_by_another_vae(vae: str) -> Prompt:
    prompt = streamed(latent_image=["start", 2])
    # ComfyUI's "pixel_space" is a VAE that does nothing, and needs no file.
    add(prompt, "vae", *(("VAELoader",) if vae == "pixel_space" else ("SelfForcingTAEHVLoader",)), vae_name=vae)
    add(prompt, "picture", "LoadImage", image="example.png")
    size = {"width": SIDE, "height": SIDE, "length": 25, "batch_size": 1}
    picture_inputs = {"start_image": ["picture", 0], "vae": ["vae", 0]}
    add(prompt, "start", "SelfForcingImageToVideo", model=["1", 0], positive=["3", 0], **size, **picture_inputs)
    return prompt


def continued_with_latents_of_the_tiny_model() -> Prompt:
    prompt = streamed(latent_image=["start", 2])
    add(decoder(prompt, TINY), "picture", "LoadImage", image="example.png")
    add(prompt, "frames", "RepeatImageBatch", image=["picture", 0], amount=9)
    add(prompt, "encoded", "VAEEncode", pixels=["frames", 0], vae=["vae", 0])
    size = {"width": SIDE, "height": SIDE, "length": 21, "batch_size": 1}
    add(prompt, "start", "SelfForcingImageToVideo", model=["1", 0], positive=["3", 0], latent=["encoded", 0], **size)
    return prompt


def images_without_decoder() -> Prompt:
    prompt = streamed()
    add(prompt, "images", "PreviewImage", images=[SAMPLER, 1])
    return prompt


WRONG: tuple[tuple[Callable[[], Prompt], str], ...] = (
    (foreign_decoder, "(tiny (bundled)) is made for latents of tiny, but the model makes those of wan2.1"),
    (real_decoder_on_the_tiny_model, "is made for latents of wan2.1, but the model makes those of tiny"),
    (tiny_text_on_the_real_model, "128 wide, but this model reads 4096"),
    (picture_on_text_to_video, "an image comes with the prompt"),
    (vace_input_on_text_to_video, "comes from WanVaceToVideo"),
    (image_to_video_without_picture, "no image comes with the prompt"),
    (whole_without_picture, "no image comes with the prompt"),
    (causal_in_ksampler, "the sampler euler would denoise all 6 latent frames at once"),
    (causal_in_sampler_custom, "would denoise all 6 latent frames at once"),
    (lambda: file("vace"), "Wan VACE is not supported"),
    (lambda: file("camera"), "Wan Fun Camera (camera control) is not supported"),
    (lambda: file("first_last"), "first-and-last-frame (FLF2V) is not supported"),
    (lambda: file("5b"), "Wan 2.2 5B (text and image to video) is not supported"),
    (lambda: patched("vace"), "Wan VACE is not supported"),
    (lambda: patched("first_last"), "a first-and-last-frame model"),
    (lambda: patched("5b"), "Wan 2.2 5B (text and image to video) is not supported"),
    (lambda: encoded_by_another_vae("pixel_space"), "this VAE is made for latents of 3 channels"),
    (lambda: encoded_by_another_vae(TINY), "is made for latents of tiny, but the model reads those of wan2.1"),
    (continued_with_latents_of_the_tiny_model, "these latents are of tiny, but the model makes those of wan2.1"),
    (images_without_decoder, "connect taehv"),
)


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_wiring_ends_in_its_sentence_before_the_model_is_loaded(shelves: Server, case: int) -> None:
    build, sentence = WRONG[case]
    # A real model takes a minute to load: whoever has wired it wrongly is to hear of it before.
    before = shelves.log().count(LOADED)
    assert sentence in failure(shelves.result(shelves.submit(build())))
    assert shelves.log().count(LOADED) == before


def test_right_wirings_load_the_model(shelves: Server) -> None:
    """So that the above can fail; a decoder of the model's own space, in all places that take one."""
    before = shelves.log().count(LOADED)
    prompt = decoder(streamed(taehv=["vae", 0], seed=fresh_seed()))
    add(prompt, "images", "PreviewImage", images=[SAMPLER, 1])
    add(prompt, "decoded", "VAEDecode", samples=[SAMPLER, 0], vae=["vae", 0])
    add(prompt, "again", "PreviewImage", images=["decoded", 0])
    shelves.run(prompt)
    assert shelves.log().count(LOADED) > before


@pytest.mark.parametrize("node", ["VAEDecode", "SelfForcingTAEHVDecode"])
def test_decoders_refuse_what_comes_from_a_model_of_another_space(shelves: Server, node: str) -> None:
    """Also behind ComfyUI's own sampling node, which makes the LATENT itself."""
    prompt = small(shipped("t2v_1.3b_native"))
    prompt["4"]["inputs"]["vae_name"] = TINY
    decoder_input = {"vae" if node == "VAEDecode" else "taehv": ["4", 0]}
    add(prompt, "20", node, samples=["14", 0], **decoder_input)
    assert "latents of tiny, but these are those of wan2.1" in failure(shelves.result(shelves.submit(prompt)))


# ------------------------------------------------------------------ forgiving --
def shown(server: Server, prompt: Prompt) -> str:
    """Return what nodes show in words while a prompt runs."""
    add(prompt, "save", "SaveLatent", samples=[SAMPLER, 0], filename_prefix="latents/shown")
    with server.events() as events:
        server.submit(prompt, events.client_id)
        received = events.until("execution_success", "execution_error")
    assert received[-1]["type"] == "execution_success", received[-1]["data"]
    return "\n".join(event["data"]["text"] for event in received if event["type"] == "text")


@pytest.mark.parametrize(
    ("inputs", "sentence", "latent_frames", "sides"),
    [
        ({"length": 37, "width": 79, "height": 70}, "length 37 is rounded to 33", 9, (64, 64)),
        ({"length": 2}, "length 2 is rounded to 9", 3, (64, 64)),
        ({"length": 33, "chunk": 2, "height": 90}, "height 90 is rounded to 80", 8, (80, 64)),
        ({"length": 34}, "length 34 is rounded to 33", 9, (64, 64)),
    ],
)
def test_sizes_are_rounded_and_the_node_says_so(
    server: Server, inputs: dict[str, int], sentence: str, latent_frames: int, sides: tuple[int, int]
) -> None:
    assert sentence in shown(server, tiny_prompt(seed=fresh_seed(), **inputs))
    latents = latents_of(server, tiny_prompt(seed=fresh_seed(), **inputs))
    assert latents.shape[2:] == (latent_frames, sides[0] // 8, sides[1] // 8)


def test_lengths_from_elsewhere_are_rounded_too(shelves: Server) -> None:
    """An empty LATENT of another length, into the streaming sampler and into ComfyUI's own sampling node."""
    prompt = tiny_prompt(seed=fresh_seed(), latent_image=["latent", 0])
    add(prompt, "latent", "EmptyHunyuanLatentVideo", width=64, height=64, length=25, batch_size=1)
    assert "length 25 is no whole number of chunks: the video has 21 frames" in shown(shelves, prompt)
    native = small(shipped("t2v_1.3b_native"))
    native["5"]["inputs"]["length"] = 25
    native = {name: node for name, node in native.items() if int(name) < 20}
    native[SAMPLER] = native.pop("14")
    native["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "x"}}
    assert latents_of(shelves, native).shape[2] == 6


def test_image_to_video_takes_any_length(shelves: Server) -> None:
    prompt = streamed(latent_image=["start", 2])
    add(decoder(prompt), "picture", "LoadImage", image="example.png")
    add(
        prompt,
        "start",
        "SelfForcingImageToVideo",
        model=["1", 0],
        positive=["3", 0],
        width=SIDE + 7,
        height=SIDE,
        length=33,
        batch_size=1,
        vae=["vae", 0],
        start_image=["picture", 0],
    )
    sentence = shown(shelves, prompt)
    assert "length 33 is rounded to 25: whole chunks (1 and then 3 latent frames" in sentence
    assert "width 71 is rounded to 64" in sentence
    assert latents_of(shelves, prompt).shape[2] == 7


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 100005}, {"width": 8}, {"height": 10000}])
def test_bounds_hold_and_only_the_widget_at_fault_has_an_error(server: Server, wrong: dict[str, int]) -> None:
    with pytest.raises(Refused) as refusal:
        server.submit(tiny_prompt(**wrong))
    errors = json.loads(str(refusal.value))["node_errors"][SAMPLER]["errors"]
    assert [error["extra_info"]["input_name"] for error in errors] == list(wrong)


def test_a_model_of_unknown_kind_is_said_in_the_node(shelves: Server) -> None:
    prompt = streamed(seed=fresh_seed())
    prompt["1"]["inputs"].update(kind="auto")
    assert "does not say how its model was trained" in shown(shelves, prompt)


def test_the_first_choice_of_a_new_loader_is_a_real_file_where_there_is_one(shelves: Server) -> None:
    for node, name, expected in (
        ("SelfForcingModelLoader", "unet_name", "self_forcing_dmd.pt"),
        ("SelfForcingTAEHVLoader", "vae_name", DECODER),
        ("SelfForcingTextEncode", "text_encoder", "wide"),
    ):
        options = shelves.get(f"/object_info/{node}")[node]["input"]["required"][name][1]["options"]
        assert options[0] in (expected, "mine"), "of this server's other tests"
        assert options[-1] == TINY
