"""Checks of VAE, image encoder and image conditioning against recorded numbers; see test_golden.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from selfforcing_core.codecs.clip import ClipVision, clip_from_tensors, preprocess, transformers_tensors
from selfforcing_core.codecs.image import first_frame_condition
from selfforcing_core.codecs.wan_vae import StreamingWanDecoder, WanVAE, new_network, original_name, vae_from_tensors
from tests.support.golden_fixture import Fixture


def _vae(fixture: Fixture, sizes: dict[str, Any]) -> WanVAE:
    blocks = sizes["num_res_blocks"]
    shapes = {original_name(k, blocks): v.shape for k, v in new_network(sizes["dim"], blocks).state_dict().items()}
    return WanVAE(vae_from_tensors(fixture.draw(shapes)))


def _unit(pixels: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] to frames [B, T, 3, H, W] in [0, 1]."""
    return rearrange((pixels + 1) / 2, "b r v h w -> b v r h w")


def _channels_first(latents: Tensor) -> Tensor:
    return rearrange(latents, "b t c h w -> b c t h w")


def check_wan_vae(fixture: Fixture) -> None:
    vae = _vae(fixture, fixture.meta["model"])
    mean, deviation = (torch.tensor(fixture.meta[f"latent_{key}"]).view(1, -1, 1, 1, 1) for key in ("mean", "std"))
    encoded = _channels_first(vae.encode(_unit(fixture["pixels"])))
    fixture.check("encoded", encoded)
    fixture.check("encoded_raw", encoded * deviation + mean)
    fixture.check("encoded_first_frame", _channels_first(vae.encode(_unit(fixture["pixels"][:, :, :1]))))

    latents = rearrange(fixture["latents"], "b c t h w -> b t c h w")
    fixture.check("decoded", _channels_first(StreamingWanDecoder(vae).decode_unclamped(latents)))
    fixture.check("decoded_clamped", _channels_first(vae.decode(latents)) * 2 - 1)
    decoder = StreamingWanDecoder(vae)
    for index, piece in enumerate(latents.split(fixture.meta["stream_chunks"], 1)):
        fixture.check(f"stream{index}", _channels_first(decoder.decode_unclamped(piece)))


def clip_shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of Wan's image encoder under its original name."""
    width, hidden = sizes["dim"], sizes["dim"] * sizes["mlp_ratio"]
    patches = (sizes["image_size"] // sizes["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding": (1, 1, width),
        "pos_embedding": (1, patches + 1, width),
        "head": (width, sizes["out_dim"]),
        "patch_embedding.weight": (width, 3, sizes["patch_size"], sizes["patch_size"]),
    }
    for norm in ("pre_norm", "post_norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    layers = {
        "norm1": (width,),
        "attn.to_qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.0": (hidden, width),
        "mlp.2": (width, hidden),
    }
    for index in range(sizes["num_layers"]):
        for name, shape in layers.items():
            shapes |= {f"transformer.{index}.{name}.weight": shape, f"transformer.{index}.{name}.bias": shape[:1]}
    return shapes


def check_clip(fixture: Fixture) -> None:
    sizes = fixture.meta["model"]
    tensors = transformers_tensors(fixture.draw(clip_shapes(sizes)))
    image = (fixture["image"] + 1) / 2
    fixture.check("preprocessed", preprocess(image, sizes["image_size"]))
    encoder = ClipVision(clip_from_tensors(tensors, num_heads=sizes["num_heads"]))
    fixture.check("tokens", encoder.encode(image)[None])


def check_conditioning(fixture: Fixture) -> None:
    vae = _vae(fixture, fixture.meta["vae"])
    condition = first_frame_condition(vae, (fixture["image"][None] + 1) / 2, fixture["y"].shape[1])
    fixture.check("y", condition[0].transpose(0, 1))


MEDIA_CHECKS: dict[str, Callable[[Fixture], None]] = {
    "wan_vae": check_wan_vae,
    "clip_vision": check_clip,
    "i2v_conditioning": check_conditioning,
}
