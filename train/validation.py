"""Validation videos: fixed prompts while a run goes on, by the core's rollout on the run's own sharded network.

What a stage says here of how its network is sampled is also what the header of its export says.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.atomic import make_folder
from selfforcing_core.codecs.taehv import StreamingDecoder
from selfforcing_core.codecs.video import write_contact_sheet, write_video
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.weights.load import load_taehv
from train.distributed import World

SHEET_FRAMES = 16  # on a contact sheet, evenly spread


@dataclass(frozen=True)
class Sampling:
    """How a stage's network is sampled."""

    causal: CausalConfig
    steps: StepConfig
    latent_shape: tuple[int, int, int, int]  # (T, C, H, W)
    is_bidirectional: bool = False  # its one chunk is all of T
    guidance: float = 1.0  # away from `negative`; 1: none
    negative: Conditioning | None = None
    prefixes: Sequence[Tensor] = ()  # first frames of each prompt's video, where they are given

    def of_length(self, latent_frames: int) -> Sampling:
        """Return the same for videos of another length."""
        causal = CausalConfig(latent_frames) if self.is_bidirectional else self.causal
        return replace(self, causal=causal, latent_shape=(latent_frames, *self.latent_shape[1:]))


class ValidationVideos:
    """The prompts, what they are conditioned on, and the decoder."""

    def __init__(
        self, texts: Sequence[str], conditions: Sequence[Conditioning], decoder: str, world: World, seed: int
    ) -> None:
        self.texts, self.conditions, self.world, self.seed = list(texts), list(conditions), world, seed
        self.taehv = load_taehv(decoder, dtype=torch.float32, device=world.device)[0]

    @torch.no_grad()
    def write(self, network: Any, sampling: Sampling, folder: Path) -> list[Path]:
        """Write one video and contact sheet per prompt; return this process's videos.

        The processes share the prompts. All of them evaluate the sharded network equally often, so the last round may
        repeat prompts, which are then not written.
        """
        videos = []
        for first in range(0, len(self.texts), self.world.size):
            number = first + self.world.rank
            condition = self.conditions[number % len(self.texts)]
            # Decoded chunk by chunk, so that the decoder needs the memory of one chunk, beside a training run's.
            decoder, frames = StreamingDecoder(self.taehv), []
            noise = SeededNoise(self.seed, number)  # alike in all steps: the weights make the difference
            for chunk in rollout(
                Guided(network, condition, negative=sampling.negative, guidance=sampling.guidance),
                noise=noise,
                latent_shape=sampling.latent_shape,
                causal=sampling.causal,
                steps=sampling.steps,
                start=sampling.prefixes[number % len(self.texts)] if sampling.prefixes else None,
            ):
                frames.append(decoder.decode(chunk.latents_BTCHW.float())[0].cpu())
            if number < len(self.texts):
                make_folder(folder)
                video, out = torch.cat(frames), folder / f"{number:03d}.mp4"
                write_video(out, video, metadata={"comment": self.texts[number]}, overwrite=True)
                indices = torch.linspace(0, len(video) - 1, min(SHEET_FRAMES, len(video))).round().long()
                write_contact_sheet(out.with_suffix(".png"), video[indices], overwrite=True)
                videos.append(out)
        return videos
