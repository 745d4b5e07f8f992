"""Decoders and text encoders of ComfyUI and of the pack, and which of them fit a model. Run by inside_checks.py.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from inside import (
    BROKEN,
    CHANNELS,
    CORE,
    FOLDER,
    HEIGHT,
    WIDTH,
    apart,
    autoencoder,
    core,
    folders,
    frame_stream,
    part,
    text_nodes,
)
from safetensors.torch import save_file


def wan_vae() -> Any:
    """Return a random Wan VAE, as narrow as this ComfyUI's loader takes it."""
    config = {
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    }
    for dim in (16, 96):  # earlier hosts know one width only
        weights = comfy.ldm.wan.vae.WanVAE(dim=dim, **config).state_dict()
        try:
            return comfy.sd.VAE(
                sd={name: torch.randn_like(tensor) * (0.4 / dim**0.5) for name, tensor in weights.items()},
                dtype=torch.float32,
            )
        except RuntimeError:
            continue
    raise AssertionError("ComfyUI loads no Wan VAE of ours")


class FrameByFrame(torch.nn.Module):
    """A pointwise convolution that rounds the same for any number of frames."""

    def __init__(self, convolution: torch.nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.convolution(frame) for frame in x_BCTHW.split(1, 2)], 2)


def vaes_of_the_host_stream() -> dict[str, Any]:
    """Compare a small random Wan VAE, chunk by chunk and with a chunk taken back, with its decode of the whole video.

    ComfyUI's decode gives all latents at once to a pointwise convolution, whose sums a CPU may round in another order
    for other lengths. So it is compared as it is, and again with that convolution frame by frame: nothing differs.
    """
    torch.manual_seed(0)
    vae = wan_vae()
    as_it_is = vae_streams(vae)
    vae.first_stage_model.conv2 = FrameByFrame(vae.first_stage_model.conv2)
    return {"as_it_is": as_it_is, "frame_by_frame": vae_streams(vae)}


def vae_streams(vae: Any) -> dict[str, Any]:
    results: dict[str, Any] = {"kinds": []}
    for length in (1, 3):
        latents = torch.randn(1, 7 if length == 1 else 9, 16, 2, 2, generator=torch.Generator().manual_seed(1))
        whole = vae.decode(autoencoder.graph_latents(latents)).permute(0, 1, 4, 2, 3)
        without_parts = types.SimpleNamespace(latent_channels=16, first_stage_model=None, decode=vae.decode)
        for wrapped in (vae, without_parts):
            stream, frames = frame_stream.frame_stream(wrapped), []
            for start in range(0, latents.shape[1], length):
                chunk, is_last = latents[:, start : start + length], start + length == latents.shape[1]
                before = stream.state()
                # An attempt that is thrown away, with other latents: whatever it leaves behind would show.
                stream.decode(-chunk, is_last=is_last)
                stream.restore(before)
                frames.append(stream.decode(chunk, is_last=is_last))
            results["kinds"].append([bool(stream.note), [part.shape[1] for part in frames]])
            results[f"difference_{length}_{bool(stream.note)}"] = apart(torch.cat(frames, 1), whole)
    results |= {
        f"difference_ended_early_{bool(wrapped is vae)}": ended_early(wrapped, vae) for wrapped in (vae, without_parts)
    }
    results["spread"] = float(whole.std())
    return results


def ended_early(wrapped: Any, vae: Any) -> float:
    """Compare two chunks, and then only the word that they were the last, with the decode of the whole."""
    latents = torch.randn(1, 6, 16, 2, 2, generator=torch.Generator().manual_seed(3))
    stream = frame_stream.frame_stream(wrapped)
    frames = [stream.decode(chunk, is_last=False) for chunk in latents.split(3, 1)]
    frames.append(stream.decode(latents[:, :0], is_last=True))
    keeps_back = getattr(stream, "group", None) != 1  # a host that decodes latent by latent gives each at once
    assert bool(frames[-1].shape[1]) == keeps_back
    return apart(torch.cat(frames, 1), vae.decode(autoencoder.graph_latents(latents)).permute(0, 1, 4, 2, 3))


def taehv_streams_latent_by_latent() -> dict[str, Any]:
    """Return whether frames are bit-exact however the latents are cut; what a resumed run has comes in small pieces."""
    checkpoint = core["checkpoint"].read_checkpoint(core["bundles"].resolve_taehv("tiny"))
    vae = autoencoder.TAEHVAutoencoder(checkpoint)
    latents = torch.randn(1, 7, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2))
    single, is_same = frame_stream.frame_stream(vae), {}
    whole = torch.cat([single.decode(latent, is_last=False) for latent in latents.split(1, 1)], 1)
    for length in (2, 3, 7):
        stream = frame_stream.frame_stream(vae)
        chunks = (*latents.split(length, 1), latents[:, :0])
        frames = torch.cat([stream.decode(chunk, is_last=not chunk.shape[1]) for chunk in chunks], 1)
        is_same[str(length)] = bool(torch.equal(frames, whole))
    pieces: list[torch.Tensor] = []
    progress = part("progress").StreamProgress(
        1, 9, stream=frame_stream.frame_stream(vae), latent_format=None, live=None, on_frames=pieces.append
    )
    progress.begin_with(latents)
    is_same["resumed"] = bool(torch.equal(torch.cat(pieces, 1), whole))
    return {"is_same": is_same, "largest": max(piece.shape[1] for piece in pieces), "shape": list(whole.shape)}


def text_encoders() -> dict[str, Any]:
    """Compare the bundled encoder with the same one taken for a large one, in the number types of ComfyUI."""
    sys.path.remove(str(BROKEN))  # transformers does not load beside a flash_attn that raises
    folder, calls = folders.text_encoder_folder("tiny" + folders.BUNDLE_MARK), {}
    sentence, original = "a red square moving left slowly on a navy background", text_nodes.SMALL
    chosen = comfy.model_management.text_encoder_dtype
    exact = text_nodes.TextReader("tiny" + folders.BUNDLE_MARK)(sentence)[0][0]
    text_nodes.SMALL = 0  # every encoder is larger than that
    try:
        for name in ("default", "float8_e4m3fn", "bfloat16"):
            text_nodes._load.cache_clear()
            if name != "default":
                comfy.model_management.text_encoder_dtype = lambda device=None, name=name: getattr(torch, name)
            encoder = text_nodes._load(folder, "").encoder
            text_nodes._load.cache_clear()
            embeds = text_nodes.TextReader("tiny" + folders.BUNDLE_MARK)(sentence)[0][0]
            calls[name] = [str(encoder.model.token_embedding.weight.dtype), apart(embeds, exact), str(embeds.dtype)]
    finally:
        text_nodes.SMALL, comfy.model_management.text_encoder_dtype = original, chosen
        text_nodes._load.cache_clear()
    small = text_nodes._load(folder, "").encoder
    sys.path.insert(0, str(BROKEN))
    return {**calls, "small": str(small.model.token_embedding.weight.dtype)}


def random_taehv() -> dict[str, torch.Tensor]:
    """Return weights of the released shapes, whose outputs are of the usual size."""
    shapes = importlib.import_module(CORE + "shapes").taehv_shapes(core["config"].TAEHVConfig())
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / max(torch.Size(shape[1:]).numel(), 1) ** 0.5
        for name, shape in shapes.items()
    }


def lighttaew2_1_decodes_as_in_the_host() -> dict[str, Any]:
    """Compare a file of this name, whose latents are unscaled, with ComfyUI's own decode where it knows such files."""
    loader, weights = part("loader"), random_taehv()
    decoders, names = {}, ("lighttaew2_1", "taew2_1")
    latents = torch.randn(1, CHANNELS, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    for name, chosen in zip(names, ("auto", "wan2.1")):
        path = FOLDER / f"{name}.safetensors"
        save_file(weights, path)
        checkpoint = core["checkpoint"].read_checkpoint(path)
        space = loader._latent_space(checkpoint, chosen, path.name)
        decoders[name] = autoencoder.TAEHVAutoencoder(checkpoint, name=path.name, latent_space=space)
    light, usual = (decoders[name].decode(latents) for name in names)
    stream = frame_stream.frame_stream(decoders["lighttaew2_1"])
    normalised = autoencoder.network_latents(latents)
    streamed = torch.cat([stream.decode(normalised[:, at : at + 1], is_last=at == 2) for at in range(3)], 1)
    results = {
        "spaces": [decoders[name].latent_space for name in names],
        "matters": apart(usual, light),
        "streamed": apart(streamed.movedim(2, -1), light),
    }
    image = torch.rand(9, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    if hasattr(comfy, "taesd") and hasattr(comfy.taesd, "taehv"):
        native = comfy.sd.VAE(sd={name: value.clone() for name, value in weights.items()}, dtype=torch.float32)
        results["decoded"] = apart(native.decode(latents).cpu().clamp(0, 1), light)  # ComfyUI leaves that to its nodes
        results["encoded"] = apart(native.encode(image).cpu(), decoders["lighttaew2_1"].encode(image))
    return results


def vaes_of_other_spaces() -> dict[str, Any]:
    """Return the sentence for each VAE beside a model of Wan's latents and beside one of its own, "" where it fits."""
    narrow = {name: value.half() for name, value in random_taehv().items()}
    vaes = {"wan": wan_vae()}
    for name, home in (
        ("picture", "models.autoencoder.AutoencoderKL"),
        ("cosmos", "cosmos.vae.CausalContinuousVideoTokenizer"),
    ):
        module, _, kind = home.rpartition(".")
        network_class = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)
        # Without weights: the space is told by the class alone.
        network_ = network_class.__new__(network_class)
        vaes[name] = types.SimpleNamespace(first_stage_model=network_, latent_channels=16)
    vaes["unknown"] = types.SimpleNamespace(first_stage_model=torch.nn.Identity(), latent_channels=16)
    if hasattr(comfy, "taesd") and hasattr(comfy.taesd, "taehv"):
        vaes["float16"] = comfy.sd.VAE(sd=narrow)
    return {
        name: [refusal(autoencoder.check_space, vae, space, "the model makes") for space in ("wan2.1", "tiny")]
        for name, vae in vaes.items()
    }


def refusal(call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""
