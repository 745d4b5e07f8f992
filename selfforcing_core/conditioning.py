"""What a video is conditioned on, checked once on the way in. Letters: B batch, P text tokens, E text width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import WanConfig


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings [B, P, E] with P <= text_len, rows past the text's length zero (UMT5 output).

    Their dtype and device are those the network computes in.
    """

    prompt_embeds_BPE: Tensor

    def check(self, config: WanConfig) -> None:
        """Raises ValueError if the embeddings do not fit the network."""
        shape = tuple(self.prompt_embeds_BPE.shape)
        if len(shape) != 3 or shape[2] != config.text_dim or shape[1] > config.text_len:
            raise ValueError(
                f"text embeddings of shape {shape} do not fit this model: it takes [batch, up to {config.text_len} "
                f"tokens, {config.text_dim}]; use the text encoder that the model was trained with"
            )
