"""What a video is conditioned on, checked once on the way in.

Letters: B batch, P text tokens, E text width, T latent frames, C channels, H W latent size, I image tokens,
Y image-feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import CLIP_DIM, WanConfig


@dataclass(frozen=True)
class Conditioning:
    """A prompt, and for image-to-video networks the image. Dtype and device are those the network computes in."""

    prompt_embeds_BPE: Tensor  # of UMT5, up to text_len tokens; those behind the text are zero
    # Condition channels of every frame of the video: 4 of a mask, which is 1 where the image is given, and 16 of
    # normalised latents of the image followed by grey (Wan 2.1, wan/image2video.py).
    image_BTCHW: Tensor | None = None
    # CLIP features of the image before the last block, 257 tokens for ViT-H/14; Wan 2.2 networks read none.
    clip_BIY: Tensor | None = None

    def check(self, config: WanConfig, latent_shape: tuple[int, int, int, int]) -> None:
        """Check that this fits the network and a video of `latent_shape` (T, C, H, W); else raise ValueError."""
        shape = tuple(self.prompt_embeds_BPE.shape)
        if len(shape) != 3 or shape[2] != config.text_dim or shape[1] > config.text_len:
            raise ValueError(
                f"text embeddings of shape {shape} do not fit this model: it takes [batch, up to {config.text_len} "
                f"tokens, {config.text_dim}]; use the text encoder that the model was trained with"
            )
        if config.model_type != "i2v":
            if self.image_BTCHW is not None or self.clip_BIY is not None:
                raise ValueError(
                    "this is a text-to-video model, it takes no image condition; give the image as the video's first "
                    "frames, or use an image-to-video model"
                )
            return
        if self.image_BTCHW is None or (self.clip_BIY is None) == config.reads_clip:
            needs = "condition channels and CLIP features" if config.reads_clip else "condition channels alone"
            raise ValueError(f"this is an image-to-video model; give it an image ({needs})")
        self._check_image(config, shape[0], latent_shape)

    def _check_image(self, config: WanConfig, batch: int, latent_shape: tuple[int, int, int, int]) -> None:
        assert self.image_BTCHW is not None
        frames, channels, height, width = latent_shape
        expected = (batch, frames, config.in_dim - channels, height, width)
        shape = tuple(self.image_BTCHW.shape)
        if shape != expected:
            raise ValueError(
                f"image condition of shape {shape} does not fit this video, it takes {expected}; "
                "make it for the video's own size and length"
            )
        if self.clip_BIY is None:
            return
        clip = tuple(self.clip_BIY.shape)
        if len(clip) != 3 or clip[0] != batch or clip[2] != CLIP_DIM:
            raise ValueError(
                f"CLIP features of shape {clip} do not fit this model, it takes [{batch}, tokens, {CLIP_DIM}]; "
                "use the ViT-H/14 image encoder of Wan 2.1"
            )

    def frames(self, start: int, length: int) -> Tensor | None:
        """Return the image condition of some frames, None where there is none."""
        return None if self.image_BTCHW is None else self.image_BTCHW[:, start : start + length]
