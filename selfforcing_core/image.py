"""Pictures as the start of a video: reading files, fitting sizes, and Wan's image-to-video condition channels.

Letters: B batch, R RGB, H W height and width, V video frames, T latent frames, C channels. Pixels are in [0, 1].
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .geometry import PIXEL_STEP, TEMPORAL_FACTOR, pixel_frames

MASK_CHANNELS = TEMPORAL_FACTOR  # one per pixel frame that a latent frame stands for


class Encoder(Protocol):
    """WanVAE or TAEHV."""

    def encode(self, frames_BVRHW: Tensor) -> Tensor: ...


def read_image(path: str | Path) -> Tensor:
    """A picture file as [R, H, W], turned upright, transparency over white. Raises ValueError if it is none."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture; use PNG, JPEG or WebP") from error
    ground = Image.new("RGBA", picture.size, "white")
    pixels = np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def fit_image(image_RHW: Tensor, width: int, height: int) -> Tensor:
    """The picture scaled until it covers width x height, the overhang cut evenly; nothing is distorted."""
    _, own_height, own_width = image_RHW.shape
    scale = max(width / own_width, height / own_height)
    size = (max(height, round(own_height * scale)), max(width, round(own_width * scale)))
    if size != (own_height, own_width):
        image_RHW = F.interpolate(image_RHW[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image_RHW[:, top : top + height, left : left + width].clamp(0, 1)


def size_for_image(image_RHW: Tensor, area: int) -> tuple[int, int]:
    """Width and height, multiples of 16, of about `area` pixels with the picture's aspect (rule of Wan 2.1)."""
    _, height, width = image_RHW.shape
    ideal = math.sqrt(area * width / height), math.sqrt(area * height / width)
    wide, high = (max(1, int(side // PIXEL_STEP)) * PIXEL_STEP for side in ideal)
    return wide, high


def first_frame_condition(vae: Encoder, image_BRHW: Tensor, num_latent_frames: int) -> Tensor:
    """Condition channels [B, T, 4 mask + 16 latent, H/8, W/8] of a video that starts with the image (Wan 2.1 I2V).

    The mask is 1 on the first latent frame; the latents are those of the image followed by grey frames.
    """
    grey = torch.full_like(image_BRHW, 0.5)[:, None].expand(-1, pixel_frames(num_latent_frames) - 1, -1, -1, -1)
    latents = vae.encode(torch.cat([image_BRHW[:, None], grey], 1))
    mask = latents.new_zeros(latents.shape[0], latents.shape[1], MASK_CHANNELS, *latents.shape[-2:])
    mask[:, 0] = 1
    return torch.cat([mask, latents], 2)
