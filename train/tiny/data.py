"""Clips of the tiny world as latents, with the text embeddings of their captions.

    python -m train.tiny.data --basis out/tiny/basis.safetensors --out out/tiny/clips.safetensors
    python -m train.tiny.data --out train/configs/tiny_prompts.txt      # captions alone, for train.dmd

The world wraps around, so rolling a latent frame by whole latent positions is again a scene of the same caption.
Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.generate.cli import Parser
from selfforcing_core.geometry import pixel_frames
from train.tiny.codec import PatchBasis
from train.tiny.world import ATTRIBUTES, combinations, heldout, named_scene, random_scene, render

log = logging.getLogger(__name__)
LATENT_FRAMES = 9  # of a training clip: three chunks of three
UNSAID = 0.1  # chance that a caption leaves out the speed, and likewise the background
EMPTY = 0.1  # chance that the caption is empty: guidance needs the unconditional case (arXiv 2207.12598)
TEXT_ENCODER = Path("assets/tiny/text_encoder")


def make_clips(count: int, basis: PatchBasis, seed: int) -> dict[str, Tensor]:
    """Render and encode random clips: their "latents", float16 [T, C, H, W] stacked, and their "labels".

    A label is the number of a clip's five words in `combinations()`; those held out never occur.
    """
    rng = np.random.default_rng(seed)
    allowed = [index for index, words in enumerate(combinations()) if words not in set(heldout())]
    latents, labels = [], []
    for number in range(count):
        label = allowed[int(rng.integers(len(allowed)))]
        frames = render(random_scene(rng, combinations()[label]), pixel_frames(LATENT_FRAMES))
        latents.append(basis.encode(frames[None])[0].half())
        labels.append(label)
        if number % 500 == 499:
            log.info("%d of %d clips", number + 1, count)
    return {"latents": torch.stack(latents).contiguous(), "labels": torch.tensor(labels)}


@dataclass
class Batch:
    """What a step of training reads."""

    latents_BTCHW: Tensor
    prompt_embeds_BPE: Tensor


class Clips:
    """Random batches; every draw comes from one generator seeded with (seed, rank)."""

    def __init__(self, path: Path, seed: int, rank: int = 0) -> None:
        tensors = load_file(path)
        self.latents, self.labels = tensors["latents"], tensors["labels"]
        self.generator = torch.Generator().manual_seed(seed * 1000 + rank)
        self.captions = CaptionTable()

    def batch(self, size: int, num_frames: int = LATENT_FRAMES) -> Batch:
        """Draw `size` clips of the first `num_frames` latent frames, rolled at random, with caption variants."""
        rows = torch.randint(len(self.latents), (size,), generator=self.generator)
        # The world is a torus: rolled by whole latent positions, a clip becomes another one of the same caption.
        shifts = torch.randint(self.latents.shape[-1], (size, 2), generator=self.generator).tolist()
        clips = [self.latents[row, :num_frames].float().roll(shift, (-2, -1)) for row, shift in zip(rows, shifts)]
        labels = self.labels[rows]
        return Batch(torch.stack(clips), self.captions.draw(labels, self.generator))


class CaptionTable:
    """Text embeddings of every caption of every combination, encoded once."""

    VARIANTS = tuple(itertools.product((True, False), repeat=2))  # (speed said, background said)

    def __init__(self, text_encoder: Path = TEXT_ENCODER) -> None:
        from selfforcing_core.codecs.text import TextEncoder

        encoder = TextEncoder.from_folder(text_encoder)
        scenes = [named_scene(words) for words in combinations()]
        captions = [s.caption(speed=speed, background=ground) for speed, ground in self.VARIANTS for s in scenes]
        self.embeds = encoder.encode(captions).float().unflatten(0, (len(self.VARIANTS), len(scenes)))
        self.empty = encoder.encode([""]).float()[0]

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return embeddings [B, P, E] of random variants of the captions, some empty."""
        said = torch.rand(len(labels), 3, generator=generator)
        variant = (said[:, 0] < UNSAID).long() * 2 + (said[:, 1] < UNSAID).long()
        embeds = self.embeds[variant, labels]
        return torch.where((said[:, 2] < EMPTY)[:, None, None], self.empty, embeds)

    def full(self, labels: Tensor) -> Tensor:
        """Return embeddings of the captions that say everything."""
        return self.embeds[0, labels]


def training_captions(seed: int) -> list[str]:
    """Write one caption for every combination that is not held out, some without the speed or the background."""
    rng, left_out = np.random.default_rng(seed), set(heldout())
    return [
        named_scene(words).caption(speed=bool(rng.random() >= UNSAID), background=bool(rng.random() >= UNSAID))
        for words in combinations()
        if words not in left_out
    ]


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--basis", type=Path, help="of the latents; without it captions are written in place of clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    assert len(combinations()) == np.prod([len(values) for values in ATTRIBUTES.values()])
    if args.basis is None:
        args.out.write_text("".join(f"{caption}\n" for caption in training_captions(args.seed)), encoding="utf-8")
        return
    save_file(make_clips(args.clips, PatchBasis.load(args.basis), args.seed), args.out)


if __name__ == "__main__":
    main()
