"""Pictures as the start of a video: reading files, fitting sizes, and Wan's image-to-video condition channels.

Letters: B batch, R RGB, H W height and width, V video frames, T latent frames, C channels. Pixels are in [0, 1].
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from .geometry import PIXEL_STEP, TEMPORAL_FACTOR, pixel_frames

log = logging.getLogger(__name__)
MASK_CHANNELS = TEMPORAL_FACTOR  # one per pixel frame that a latent frame stands for


class Encoder(Protocol):
    """WanVAE or TAEHV."""

    def encode(self, frames_BVRHW: Tensor) -> Tensor: ...


def read_image(path: str | Path) -> Tensor:
    """Return a picture file as [R, H, W], turned upright, transparency over white; of several pictures the first.

    Whole numbers beyond 8 bits count from 0 to 65535, fractions from 0 to 1. Raises ValueError for other ranges, and
    for what is no picture.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused at twice that size
            count = getattr(file, "n_frames", 1)
            picture = ImageOps.exif_transpose(file)
            if count > 1:
                log.warning("%s: holds %d pictures; the first is read", path, count)
            profile = _profile(picture)
            if "srgb" not in profile.lower():
                log.warning("%s: its colour profile (%s) is not applied; its colours are read as sRGB", path, profile)
            return _pixels(picture, path)
    except _Refusal:
        raise
    except Exception as error:  # PIL's readers of many formats raise nearly everything for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a picture ({' '.join(reason.split())[:200]}); use PNG, JPEG or WebP"
        ) from error


class _Refusal(ValueError):
    """Of a picture that was read, for what is in it."""


def _profile(picture: Image.Image) -> str:
    """The name of the embedded colour profile; sRGB where there is none."""
    data = picture.info.get("icc_profile")
    if not data:
        return "sRGB"
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "damaged"


def _pixels(picture: Image.Image, path: str | Path) -> Tensor:
    """[R, H, W] of a picture of any mode."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _scaled(picture, path).expand(3, -1, -1).clone()
    if picture.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        assert converted is not None
        picture = converted
    if picture.mode == "La":  # premultiplied
        picture = picture.convert("LA")
    picture = (picture.convert("RGB") if picture.mode in ("HSV", "YCbCr") else picture).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    pixels = np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _scaled(picture: Image.Image, path: str | Path) -> Tensor:
    """Grey [1, H, W] of a picture of numbers beyond 8 bits. Raises ValueError for a range of unknown meaning."""
    values_HW = np.asarray(picture).astype(np.float64)
    full = 1 if picture.mode == "F" else 65535
    low, high = float(values_HW.min()), float(values_HW.max())
    if not 0 <= low <= high <= full:  # nor for NaN
        raise _Refusal(
            f"{path}: holds numbers from {low:g} to {high:g}, where pictures of this kind have 0 to {full}; "
            f"scale them, or save it with 8 bits"
        )
    grey_HW = values_HW / full
    if "transparency" in picture.info:  # the one value that is
        grey_HW[values_HW == picture.info["transparency"]] = 1
    return torch.from_numpy(grey_HW).float()[None]


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
