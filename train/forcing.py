"""The stages before Self Forcing: regression on a teacher's trajectories, diffusion and teacher forcing on real clips.

Each chunk of a clip has a noise level of its own, and the network sees the whole clip at once through a mask.

Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig
from selfforcing_core.geometry import chunk_lengths, chunk_starts
from selfforcing_core.masks import block_causal_frames, teacher_forcing_frames
from selfforcing_core.schedule import TIMESTEPS, add_noise, sigma_table, training_weights, x0_from_flow
from train.args import ClipArgs
from train.losses import flow_loss, regression_loss
from train.roles import Levels


def causal_of(args: ClipArgs, frames: int) -> CausalConfig:
    """Return how a clip of this many latent frames is cut into chunks."""
    return CausalConfig(args.chunk or frames, args.window, independent_first_frame=args.independent_first_frame)


def per_chunk(values_BT: Tensor, causal: CausalConfig) -> Tensor:
    """Give every frame the value of its chunk's first frame."""
    # The frames of a chunk are denoised together, so they share a level, as they will when the network samples.
    lengths = _lengths(values_BT.shape[1], causal)
    starts = torch.tensor(chunk_starts(lengths))
    frames = torch.repeat_interleave(starts, torch.tensor(lengths), output_size=sum(lengths))
    return values_BT[:, frames.to(values_BT.device)]


def _lengths(frames: int, causal: CausalConfig) -> tuple[int, ...]:
    return chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)


@dataclass(frozen=True)
class Trajectories:
    """Regression of a clip's end from a state along its way (CausVid, arXiv 2412.07772, section 4.3).

    Where a trajectory has one state more than timesteps, that is the clip's end, which is the target alone.
    """

    network: Any
    causal: CausalConfig
    timesteps: tuple[float, ...]  # of the trajectory's states, noisiest first; at 0 there is nothing to predict
    levels: Levels
    is_first_frame_clean: bool = False  # image-to-video: frame 0 is always the state of the last timestep

    def _states(self, index_BT: Tensor) -> Tensor:
        """Return the state that every frame really starts from."""
        index_BT = per_chunk(index_BT, self.causal)
        if not self.is_first_frame_clean:
            return index_BT
        # As in the reference's image-to-video regression; the last timestep's state is the clip where it is 0.
        return torch.cat([torch.full_like(index_BT[:, :1], len(self.timesteps) - 1), index_BT[:, 1:]], 1)

    def counted(self, index_BT: Tensor) -> Tensor:
        """Return which frames' error counts, bool [B, T]: all but those that are clean from the start."""
        return torch.tensor(self.timesteps, device=index_BT.device)[self._states(index_BT)] != 0

    def loss(
        self, states: Tensor, index_BT: Tensor, condition: Conditioning, frames_per_clip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return loss and prediction [B, T, C, H, W].

        states: trajectories [B, states, T, C, H, W]. index_BT: state of each frame; that of a chunk's first frame
        counts for the chunk. frames_per_clip: as in `regression_loss`, where these clips are a part of a batch.
        """
        batch, _, frames = states.shape[:3]
        counted_BT, index_BT = self.counted(index_BT), self._states(index_BT)
        rows = torch.arange(batch, device=index_BT.device)[:, None]
        columns = torch.arange(frames, device=index_BT.device)[None]
        noisy_BTCHW = states[rows, index_BT, columns]
        timesteps = torch.tensor(self.timesteps, device=index_BT.device)[index_BT]
        # Every frame sees its own chunk and the chunks before it, which is what a cache will show it.
        mask = block_causal_frames(_lengths(frames, self.causal), window=self.causal.window)
        flow = self.network(noisy_BTCHW, timesteps, condition.prompt_embeds_BPE, mask_TT=mask)
        x0 = x0_from_flow(noisy_BTCHW, flow, self.levels.sigma(timesteps))
        return regression_loss(x0, states[:, -1], counted_BT, frames_per_clip), x0


@dataclass(frozen=True)
class Forcing:
    """Flow matching with a noise level per chunk, on noisy context or clean.

    On noisy context it is Diffusion Forcing (arXiv 2407.01392, algorithm 1) with a level per chunk in place of one per
    frame; on clean context, which every chunk sees of all chunks before it, teacher forcing.
    """

    network: Any
    causal: CausalConfig
    shift: float
    is_teacher_forcing: bool = True

    def loss(
        self,
        clean_BTCHW: Tensor,
        noise_BTCHW: Tensor,
        index_BT: Tensor,
        condition: Conditioning,
        context_index_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return loss and flow. index_BT: entries of the 1000-entry schedule, noisiest first, per chunk.

        context_index_BT: entries at which the clean context is noised as well, with the same noise.
        """
        table = sigma_table(self.shift).to(clean_BTCHW.device)
        # Independent levels per chunk: the network learns to denoise one given others of any cleanliness.
        index_BT = per_chunk(index_BT, self.causal)
        sigma = table[index_BT]
        noisy = add_noise(clean_BTCHW, noise_BTCHW, sigma)
        lengths = _lengths(clean_BTCHW.shape[1], self.causal)
        timesteps = (sigma * TIMESTEPS).float()
        context: dict[str, Any] = {}
        # A clip of one chunk is seen whole, as a bidirectional network sees it.
        if not self.is_teacher_forcing and len(lengths) > 1:
            context = {"mask_TT": block_causal_frames(lengths, window=self.causal.window)}
        if self.is_teacher_forcing:
            # The clean clip goes in front of the noisy one, so that one pass trains all chunks at once.
            context = {
                "mask_TT": teacher_forcing_frames(lengths, window=self.causal.window),
                "clean_BTCHW": clean_BTCHW,
            }
            # A little noise on the context makes the network forgive the errors of its own samples.
            if context_index_BT is not None:
                level = table[per_chunk(context_index_BT, self.causal)]
                context["clean_BTCHW"] = add_noise(clean_BTCHW, noise_BTCHW, level)
                context["clean_timesteps_BT"] = (level * TIMESTEPS).float()
        flow = self.network(noisy, timesteps, condition.prompt_embeds_BPE, **context)
        # The reference's weights: a bell, so that the noisiest and the cleanest levels count less.
        weight = training_weights(self.shift).to(flow)[index_BT]
        return flow_loss(flow, clean_BTCHW, noise_BTCHW, weight), flow
