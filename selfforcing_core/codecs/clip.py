"""The image encoder of Wan's image-to-video models: CLIP ViT-H/14 through transformers, from files of either's names.

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

from ..weights.tensor_files import below_prefix, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

# Of the pixels CLIP was trained on (github.com/openai/CLIP), after scaling to [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # of ViT-H/14, width 1280 in 16 heads; a file that differs must say its heads
ORIGINAL_PREFIX = "visual."  # in the whole open-clip file, beside the text tower
FIRST = ("cls_embedding", "embeddings.class_embedding")  # one is in every encoder: the original name, transformers'
TRANSFORMERS_PREFIX = "vision_model."  # before every name in older versions of transformers

# Original names (github.com/Wan-Video/Wan2.1, wan/modules/clip.py) and those of transformers, outside of layers and in
# them. "pre_layrnorm" is spelled so there.
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
        """Return the features [B, I, Y] that the last layer but one makes of images in [0, 1] (I is 257, Y 1280)."""
        weight = next(self.model.parameters())
        # Resized in float32, and only then rounded to what the network computes in.
        pixels = preprocess(image_BRHW.to(weight.device, torch.float32), int(self.model.config.to_dict()["image_size"]))
        states = self.model(pixel_values=pixels.to(weight.dtype), output_hidden_states=True).hidden_states
        assert states is not None
        return states[-2]  # Wan reads what open_clip gives with use_31_block (wan/modules/clip.py)

    def to(self, device: torch.device | str) -> ClipVision:
        """Move the network to a device and return self."""
        self.model.to(device)  # type: ignore[arg-type]
        return self


def preprocess(image_BRHW: Tensor, size: int) -> Tensor:
    """Return images in [0, 1] squeezed to size x size, normalised. The aspect is lost, as in the reference."""
    # The reference hands over images in [-1, 1]; the way there and back keeps the rounding of its interpolation.
    resized = F.interpolate(image_BRHW * 2 - 1, (size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, deviation = (torch.tensor(values).to(resized).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (resized - mean) / deviation


def load_clip(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> ClipVision:
    """Return the image encoder of a file, under original names (the whole open-clip file too) or transformers'.

    Raises ValueError, one line that names the file, for any other file.
    """
    try:
        tensors = transformers_tensors(below_prefix(read_tensors(path), FIRST, path, is_quiet=True))
        return ClipVision(clip_from_tensors(tensors, dtype=dtype, device=device))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def transformers_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vision tower's weights under transformers' names without prefix, from either's names."""
    vision_tower = {
        key.removeprefix(ORIGINAL_PREFIX): tensor for key, tensor in tensors.items() if key.startswith(ORIGINAL_PREFIX)
    }
    tensors = vision_tower or tensors
    if FIRST[0] not in tensors:
        parts = ("embeddings.", "pre_layrnorm.", "encoder.layers.", "post_layernorm.")
        unprefixed = {key.removeprefix(TRANSFORMERS_PREFIX): tensor for key, tensor in tensors.items()}
        # Older versions save position numbers, which are no weights.
        return {key: value for key, value in unprefixed.items() if key.startswith(parts) and "position_ids" not in key}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        renamed |= _renamed(key, tensor)
    return renamed


def _renamed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return an original parameter as transformers has it: merged projections become three, unknown ones nothing."""
    if key in _TOP:
        # The originals have axes of size 1 to add them to a batch; transformers' are a vector and a table.
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
    """Return the network with these weights, under transformers' names without prefix.

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
        hidden_act="gelu",  # open_clip's; OpenAI's own models have x * sigmoid(1.702 x) in its place
    )
    with torch.device("meta"):  # no initial values that the file replaces
        model = CLIPVisionModel(config)
    expected: dict[str, Any] = model.state_dict()
    prefix = TRANSFORMERS_PREFIX if any(key.startswith(TRANSFORMERS_PREFIX) for key in expected) else ""
    for key, value in expected.items():
        name = key.removeprefix(prefix)
        if name not in tensors or tensors[name].shape != value.shape:
            raise ValueError(
                f"is not a complete CLIP image encoder: {name} is missing or has another shape; use clip_vision_h"
            )
    weights = {key: tensors[key.removeprefix(prefix)].to(device=device, dtype=dtype) for key in expected}
    model.load_state_dict(weights, assign=True, strict=False)
    # Position numbers are a buffer that no file needs to hold; the one of the meta device has no values.
    count = places.shape[0]
    embeddings = getattr(model, "vision_model", model).embeddings
    embeddings.register_buffer("position_ids", torch.arange(count, device=device).expand(1, -1), persistent=False)
    return model
