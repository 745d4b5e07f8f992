"""Which token may look at which where a whole video is one pass, without a cache: the form that training uses.

A mask is made for frames and then widened to tokens. With a cache none is needed, since what a chunk may not see is
not there.

Letters: T latent frames, L query tokens, S cached tokens (here those of the sequence itself).
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_causal_frames(lengths: tuple[int, ...], *, window: int = -1, sink: int = 0) -> Tensor:
    """Return which frame sees which, bool [T, T]: all of its own chunk and of earlier ones.

    lengths: frames of each chunk. window: only the last so many frames, counted from the chunk's end, stay visible; the
    first `sink` frames of the video take their share of them.
    """
    num_frames = sum(lengths)
    counts = torch.tensor(lengths)
    # the end of a frame's own chunk, and not the frame itself, is the limit: inside a chunk, attention is bidirectional
    ends = torch.repeat_interleave(counts.cumsum(0), counts, output_size=num_frames)[:, None]
    keys = torch.arange(num_frames)[None]
    visible = keys < ends
    if window != -1:
        # as the ring evicts: nothing before it is full, and then what is older than its part behind the sink
        recent = (ends <= window) | (keys >= ends - (window - sink))
        visible &= recent | (keys < sink)
    return visible


def teacher_forcing_frames(lengths: tuple[int, ...], *, window: int = -1) -> Tensor:
    """Return a mask, bool, over twice the frames: a clean copy of the video, and behind it the noisy one.

    Clean chunks are block-causal among themselves; a noisy chunk sees the clean ones before it, and itself.
    """
    clean = block_causal_frames(lengths, window=window)
    own = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    # a noisy chunk may not see its own clean copy, which is what it has to predict
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([clean & ~own, own], 1)])


def expand_frames(mask_TT: Tensor, tokens_per_frame: int) -> Tensor:
    """Widen a mask of frames to one of their tokens, [L, S]."""
    return mask_TT.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
