"""Images that start a video: read from files, fitted to its size, and turned into Wan's image-to-video channels.

Letters: B batch, T latent frames, C latent channels, H W height and width, V video frames, R RGB. Pixels are in [0, 1].
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from ..geometry import TEMPORAL_FACTOR, pixel_frames

log = logging.getLogger(__name__)
MASK_CHANNELS = TEMPORAL_FACTOR  # one for each video frame that a latent frame stands for


class Encoder(Protocol):
    """A video autoencoder's encoder, as WanVAE and TAEHV have it."""

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Return latents [B, T, C, H/8, W/8] of frames in [0, 1]."""
        ...


def read_image(path: str | Path) -> Tensor:
    """Return an image file as [R, H, W] in [0, 1], upright, transparency over white; of several images the first.

    Whole numbers beyond 8 bits count from 0 to 65535, fractions from 0 to 1. Raises ValueError for other ranges, and
    for what is not an image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused at twice that size
            count = getattr(file, "n_frames", 1)
            image = ImageOps.exif_transpose(file)  # cameras store pixels as they lie and say how to turn them
            if count > 1:
                log.warning("%s: holds %d images; the first is read", path, count)
            profile = _profile(image)
            if "srgb" not in profile.lower():
                log.warning("%s: its colour profile (%s) is not applied; its colours are read as sRGB", path, profile)
            return _pixels(image, path)
    except _Refusal:
        raise
    except Exception as error:  # PIL's readers of many formats raise nearly everything for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as an image ({' '.join(reason.split())[:200]}); use PNG, JPEG or WebP"
        ) from error


class _Refusal(ValueError):
    """A refusal of an image that was read, for what is in it. Errors of the reader itself get another sentence."""


def _profile(image: Image.Image) -> str:
    """Return the name of the embedded colour profile; sRGB where there is none."""
    data = image.info.get("icc_profile")
    if not data:
        return "sRGB"
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "damaged"


def _pixels(image: Image.Image, path: str | Path) -> Tensor:
    """Return an image of any of PIL's modes as [R, H, W] in [0, 1]."""
    # PIL's own conversion of these to RGB clips at 255.
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image, path).expand(3, -1, -1).clone()
    if image.mode == "LAB":  # PIL converts it by profiles only
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        image = converted
    if image.mode == "La":  # premultiplied, which PIL converts to LA only
        image = image.convert("LA")
    if image.mode in ("HSV", "YCbCr"):  # for which there is no direct way to RGBA
        image = image.convert("RGB")
    background = Image.new("RGBA", image.size, "white")
    pixels_HWR = np.asarray(Image.alpha_composite(background, image.convert("RGBA")).convert("RGB"))
    return torch.from_numpy(pixels_HWR.copy()).permute(2, 0, 1).float() / 255


def _scaled(image: Image.Image, path: str | Path) -> Tensor:
    """Return an image of numbers beyond 8 bits as grey [1, H, W]. Raises ValueError for a range of unknown meaning."""
    values_HW = np.asarray(image).astype(np.float64)
    full = 1 if image.mode == "F" else 65535  # the number that means white
    low, high = float(values_HW.min()), float(values_HW.max())
    if not 0 <= low <= high <= full:  # nor for NaN
        raise _Refusal(
            f"{path}: holds numbers from {low:g} to {high:g}, where images of this kind have 0 to {full}; "
            f"scale them, or save it with 8 bits"
        )
    grey_HW = values_HW / full
    if "transparency" in image.info:  # the one value that is, over white
        grey_HW[values_HW == image.info["transparency"]] = 1
    return torch.from_numpy(grey_HW).float()[None]


def fit_image(image_RHW: Tensor, width: int, height: int) -> Tensor:
    """Return an image [R, H, W] scaled to cover width x height, the overhang cut evenly; nothing is distorted."""
    _, image_height, image_width = image_RHW.shape
    scale = max(width / image_width, height / image_height)
    # Rounding must not leave a side one pixel short.
    size = (max(height, round(image_height * scale)), max(width, round(image_width * scale)))
    if size != (image_height, image_width):
        image_RHW = F.interpolate(image_RHW[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image_RHW[:, top : top + height, left : left + width].clamp(0, 1)  # bicubic weights overshoot at edges


def first_frame_condition(vae: Encoder, image_BRHW: Tensor, num_latent_frames: int) -> Tensor:
    """Return the condition channels [B, T, 4 mask + 16 latent, H/8, W/8] of a video that starts with an image.

    The network reads them beside the noise in every pass (wan/image2video.py of Wan 2.1): the mask is 1 where frames
    are given, the latents are those of the image followed by grey frames.
    """
    # Grey is zero in the VAE's range [-1, 1], which the reference fills the missing frames with.
    grey_BVRHW = torch.full_like(image_BRHW, 0.5)[:, None].expand(-1, pixel_frames(num_latent_frames) - 1, -1, -1, -1)
    latents_BTCHW = vae.encode(torch.cat([image_BRHW[:, None], grey_BVRHW], 1))
    mask_BTCHW = latents_BTCHW.new_zeros(*latents_BTCHW.shape[:2], MASK_CHANNELS, *latents_BTCHW.shape[-2:])
    # All four channels, though this latent frame stands for one video frame: the reference repeats that frame's entry.
    mask_BTCHW[:, 0] = 1
    return torch.cat([mask_BTCHW, latents_BTCHW], 2)
