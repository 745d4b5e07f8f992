"""Models that are refused by name: Wan's of other kinds (github.com/Wan-Video, and what was built on it), and others.

All of Wan's hold the layers of a plain transformer too, so that without a look at these names they pass for one. But
without their own layers they would generate something else.
"""

from __future__ import annotations

from collections.abc import Iterable

SUPPORTED = "Wan 2.1 and 2.2 text-to-video and image-to-video models of 1.3B and 14B are"
FIRST_LAST = "img_emb.emb_pos"  # the places of two images' tokens, where image-to-video has one image
# Part of a parameter's name -> the model that has it.
VARIANTS = {
    "vace_patch_embedding.": "Wan VACE",
    "vace_blocks.": "Wan VACE",
    "control_adapter.": "Wan Fun Camera (camera control)",
    "cam_injector_layer": "LingBot-World (camera control)",
    "patch_embedding_wancamctrl": "LingBot-World (camera control)",
    "action_model.": "Matrix-Game (keyboard and mouse control)",
    "ref_conv.": "Wan Fun Control (reference picture)",
    "casual_audio_encoder.": "Wan 2.2 S2V (speech to video)",  # spelled so in the release
    "audio_proj.audio_proj_glob": "HuMo (sound to video)",
    "face_adapter.": "Wan 2.2 Animate",
    "patch_embedding_mask.": "SCAIL 2 (pose control)",
    "patch_embedding_pose.": "SCAIL (pose control)",
    "patch_embedding_global.": "WanDancer",
    FIRST_LAST: "Wan first-and-last-frame (FLF2V)",
    "image_embedder.pos_embed": "Wan first-and-last-frame (FLF2V)",  # in diffusers' names
}
# Models with the parameters of plain Wan and other channels: (input channels, latent channels) -> the model. Plain ones
# have 16 latent channels, and 16 or, with 4 of mask and 16 of an image, 36 input channels.
BY_CHANNELS = {
    (48, 48): "Wan 2.2 5B (text and image to video)",
    (48, 16): "Wan Fun Control (control video)",
}
# Transformers of other families, by what ComfyUI (comfy/model_detection.py) or their own code knows them by.
FAMILIES = {
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "img_attn_q": "HunyuanVideo",  # and img_attn_qkv
    "context_embedder.token_refiner.": "HunyuanVideo",  # in diffusers' names
    "t5_yproj.": "Mochi",
    "adaln_single.": "LTX-Video",
    "blocks.block0.blocks.": "Cosmos",
    "mlp.layer1.": "Cosmos Predict 2",
    "txt_norm.": "Qwen-Image",
    "double_blocks.": "another family",  # Flux and whatever was made after it
    "transformer_blocks.": "another family",
}


def variant_among(names: Iterable[str]) -> str | None:
    """Return which model of another kind parameters of these names belong to, None where they are plain Wan's."""
    return next((VARIANTS[part] for name in names for part in VARIANTS if part in name), None)


def variant_of_channels(in_dim: int, out_dim: int) -> str | None:
    """Return which model of another kind has so many input and latent channels, None for plain Wan and unknown ones."""
    return BY_CHANNELS.get((in_dim, out_dim))


def family_of(names: Iterable[str]) -> str | None:
    """Return which family a transformer with parameters of these names belongs to, None where it is none of them."""
    names = list(names)
    return next((FAMILIES[part] for part in FAMILIES if any(part in name for name in names)), None)


def not_supported(variant: str) -> str:
    """Return the sentence that refuses a model of another kind."""
    return f"{variant} is not supported; {SUPPORTED}"
