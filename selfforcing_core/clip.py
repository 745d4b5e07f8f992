"""The image encoder of Wan's image-to-video models: CLIP ViT-H/14 through transformers, the original names mapped.

Letters: B batch, R RGB, H W height and width, I image tokens, Y image-feature width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensor_files import below_prefix, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

# Of the pixels CLIP was trained on (github.com/openai/CLIP), after scaling to [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # of ViT-H/14; a file that differs must say its heads
ORIGINAL_PREFIX = "visual."  # in the whole open-clip file, beside the text tower
FIRST = ("cls_embedding", "embeddings.class_embedding")  # original names, those of transformers
OURS_PREFIX = "vision_model."  # what older versions of transformers put before every name

# Modules by their original name and by that of transformers, outside of the layers and in them.
_TOP = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


class ClipVision:
    """The encoder of images to the features that an image-to-video network reads."""

    def __init__(self, model: CLIPVisionModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image_BRHW: Tensor) -> Tensor:
        """Return the hidden states [B, I, Y] before the last layer, of images in [0, 1] (I is 257, Y 1280)."""
        first = next(self.model.parameters())
        pixels = preprocess(image_BRHW.to(first.device, torch.float32), int(self.model.config.to_dict()["image_size"]))
        states = self.model(pixel_values=pixels.to(first.dtype), output_hidden_states=True).hidden_states
        assert states is not None
        return states[-2]  # Wan reads what open_clip gives with use_31_block (wan/modules/clip.py)

    def to(self, device: torch.device | str) -> ClipVision:
        """Move the network to a device and return self."""
        self.model.to(device)  # type: ignore[arg-type]
        return self


def preprocess(image_BRHW: Tensor, size: int) -> Tensor:
    """Return images in [0, 1] squeezed to size x size (the aspect is lost, as in the reference) and normalised."""
    # The reference hands over images in [-1, 1]; the way there and back keeps the rounding of its interpolation.
    small = F.interpolate(image_BRHW * 2 - 1, (size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, deviation = (torch.tensor(values).to(small).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (small - mean) / deviation


def load_clip(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> ClipVision:
    """Return the image encoder of a file: original names (the whole open-clip file too) or those of transformers.

    Raises ValueError, one line, for whatever is no such encoder.
    """
    try:
        tensors = transformers_tensors(below_prefix(read_tensors(path), FIRST, path, is_quiet=True))
        return ClipVision(clip_from_tensors(tensors, dtype=dtype, device=device))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def transformers_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vision tower under transformers' names without their prefix, from original or transformers names."""
    vision = {k.removeprefix(ORIGINAL_PREFIX): v for k, v in tensors.items() if k.startswith(ORIGINAL_PREFIX)}
    tensors = vision or tensors
    if "cls_embedding" not in tensors:
        parts = ("embeddings.", "pre_layrnorm.", "encoder.layers.", "post_layernorm.")
        named = {key.removeprefix(OURS_PREFIX): value for key, value in tensors.items()}
        return {key: value for key, value in named.items() if key.startswith(parts) and "position_ids" not in key}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        renamed |= _renamed(key, tensor)
    return renamed


def _renamed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return one original parameter as transformers has it; the merged projections become three."""
    if key in _TOP:
        flat = {"cls_embedding": tensor.flatten(), "pos_embedding": tensor.reshape(-1, tensor.shape[-1])}
        return {_TOP[key]: flat.get(key, tensor)}
    layer = re.match(r"transformer\.(\d+)\.(.+)\.(weight|bias)$", key)
    if layer is None:
        return {}  # the projection to the text's space, which nothing reads here
    head = f"encoder.layers.{layer[1]}."
    if layer[2] == "attn.to_qkv":
        names = ("q_proj", "k_proj", "v_proj")
        return {f"{head}self_attn.{name}.{layer[3]}": part for name, part in zip(names, tensor.chunk(3))}
    return {f"{head}{_LAYER.get(layer[2], layer[2])}.{layer[3]}": tensor}


def clip_from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> CLIPVisionModel:
    """Return the network with these weights (names of transformers without prefix).

    num_heads defaults to width / 80. Raises ValueError where weights are missing or have other shapes.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    patches = tensors.get("embeddings.patch_embedding.weight")
    hidden = tensors.get("encoder.layers.0.mlp.fc1.weight")
    places = tensors.get("embeddings.position_embedding.weight")
    if patches is None or hidden is None or places is None or patches.ndim != 4:
        raise ValueError("is no CLIP image encoder; look for models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layers.")}
    side = round((places.shape[0] - 1) ** 0.5)  # patches of a row; one place is the class token's
    config = CLIPVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=hidden.shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=num_heads or patches.shape[0] // HEAD_DIM,
        patch_size=patches.shape[-1],
        image_size=side * patches.shape[-1],
        hidden_act="gelu",  # open_clip's; OpenAI's own models have an approximation of it
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    expected: dict[str, Any] = model.state_dict()
    prefix = OURS_PREFIX if any(key.startswith(OURS_PREFIX) for key in expected) else ""
    for key, value in expected.items():
        name = key.removeprefix(prefix)
        if name not in tensors or tensors[name].shape != value.shape:
            raise ValueError(f"is not a complete CLIP image encoder: {name} is missing or has another shape")
    weights = {key: tensors[key.removeprefix(prefix)].to(device=device, dtype=dtype) for key in expected}
    model.load_state_dict(weights, assign=True, strict=False)
    # Position numbers are no weights and are not in the file.
    count = places.shape[0]
    embeddings = getattr(model, "vision_model", model).embeddings
    embeddings.register_buffer("position_ids", torch.arange(count, device=device).expand(1, -1), persistent=False)
    return model
