"""What clips are conditioned on, as the networks of a run take it: prompts, and for image-to-video pictures.

Letters: B batch, P text tokens, E text width, R RGB, H W height and width of a picture.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.codecs.clip import load_clip
from selfforcing_core.codecs.embedding_folder import EmbeddingFolder
from selfforcing_core.codecs.image import first_frame_condition, fit_image
from selfforcing_core.codecs.wan_vae import WanVAE
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.generate.prompt_files import read_lines, read_prompts
from selfforcing_core.weights.bundles import resolve_text_encoder
from selfforcing_core.weights.load import load_text_encoder
from train.args import NetworkArgs
from train.distributed import World

log = logging.getLogger(__name__)
KEPT_IN_MEMORY = 64  # embeddings; a prompt of UMT5-XXL, 512 rows of 4,096, takes 4 MB in bfloat16


def read_texts(path: str) -> list[str]:
    """Read the prompts of a file, one per line, or of a folder of .txt files, one each, in the order of their names.

    Raises ValueError if there are none.
    """
    if not Path(path).is_dir():
        texts = read_prompts(Path(path))
        empty = len(read_lines(Path(path))) - len(texts)
    else:
        files = sorted(Path(path).glob("*.txt"))
        texts = [" ".join(read_prompts(file)) for file in files if any(line.strip() for line in read_lines(file))]
        empty = len(files) - len(texts)
    if not texts:
        raise ValueError(f"{path}: holds no prompt; give a folder of .txt files with one prompt each")
    if empty:
        log.warning("%s: %d empty prompts are left out, %d remain", path, empty, len(texts))
    return texts


class Prompts:
    """Texts as embeddings, encoded when they are first needed, kept in memory or in a folder."""

    def __init__(self, args: NetworkArgs, world: World) -> None:
        self.args, self.world = args, world
        self.dtype: torch.dtype = getattr(torch, args.dtype)
        self.embeds = functools.lru_cache(KEPT_IN_MEMORY)(self._embeds)
        self.broken: list[str] = []  # texts whose embeddings hold NaN or Inf

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """Return the embeddings [B, P, E] of these texts, where and as the networks compute."""
        embeds = torch.stack([self.embeds(text) for text in texts])
        return Conditioning(embeds.to(self.world.device, self.dtype))

    def _embeds(self, text: str) -> Tensor:
        embeds = self._encode(text) if self._folder is None else self._folder.get(text, self._encode)
        if not embeds.isfinite().all():
            self.broken.append(text)  # the step's check of finite numbers names it, and not the network
        return embeds

    @functools.cached_property
    def _folder(self) -> EmbeddingFolder | None:
        if not self.args.embeddings:
            return None
        return EmbeddingFolder(self.args.embeddings, resolve_text_encoder(self.args.text_encoder), self._narrow, "all")

    @property
    def _narrow(self) -> torch.dtype:  # not float64, which is for checks of the networks' own arithmetic
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def _encode(self, text: str) -> Tensor:
        encoder = self._encoder  # 11 GB in bfloat16, which is why it may wait in CPU memory
        if self.args.text_encoder_offload:
            encoder.to(self.world.device)
        embeds = encoder.encode([text])[0].cpu()
        if self.args.text_encoder_offload:
            encoder.to("cpu")
        return embeds

    @functools.cached_property
    def _encoder(self) -> Any:
        device = "cpu" if self.args.text_encoder_offload else self.world.device
        return load_text_encoder(self.args.text_encoder, dtype=self._narrow, device=device)


class Pictures:
    """First frames as Wan's image-to-video networks read them: condition channels and, where they do, CLIP features."""

    def __init__(self, vae: WanVAE, clip: str, size: tuple[int, int, int], args: NetworkArgs, world: World) -> None:
        self.vae, self.world, self.dtype = vae, world, getattr(torch, args.dtype)
        self.width, self.height, self.latent_frames = size
        narrow = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        self.clip = load_clip(clip, dtype=narrow, device=world.device) if clip else None  # Wan 2.2 has no layers for it

    def condition(self, text: Conditioning, images_RHW: Sequence[Tensor]) -> Conditioning:
        """Return the conditioning of texts with their pictures, in [-1, 1] and of any size."""
        # Covered and trimmed to the clip's size, as the first frame of a video is; fit_image wants [0, 1].
        fitted = [fit_image((image + 1) / 2, self.width, self.height) for image in images_RHW]
        images = torch.stack(fitted).to(self.world.device)
        channels = first_frame_condition(self.vae, images, self.latent_frames)
        like = {"device": self.world.device, "dtype": self.dtype}
        clip = None if self.clip is None else self.clip.encode(images).to(**like)
        return Conditioning(text.prompt_embeds_BPE, channels.to(**like), clip)
