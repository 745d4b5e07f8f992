"""Score a bundle on captions whose combinations of words training never saw.

The detector reads generated videos back; the same command first scores real videos (the ceiling) and real videos
against shuffled captions (chance). Diversity is what the caption does not say, size and starting point: the mean
difference between two videos of one caption, as a share of the same number on real videos.

    python -m train.tiny.evaluate --out assets/tiny/scores.json

Letters: B batch, T latent frames, C latent channels, V video frames, R RGB, H W height and width.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from selfforcing_core.codecs.taehv import StreamingDecoder
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.generate.cli import Parser
from selfforcing_core.geometry import latent_frames, pixel_frames
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.weights.load import load_model, load_taehv, load_text_encoder
from train.tiny.data import LATENT_FRAMES
from train.tiny.diffusion import TRAINED_KEY
from train.tiny.world import (
    ATTRIBUTES,
    SIZE,
    Detection,
    combinations,
    detect,
    heldout,
    named_scene,
    random_scene,
    render,
)

log = logging.getLogger(__name__)
LONG = 4  # times the training length
BATCH = 16  # videos that are sampled together
# Shares of what real videos score: words that must hold, over four times the trained length too, and the diversity.
TARGETS = {"colour": 0.97, "shape": 0.90, "direction": 0.80, "long.colour": 0.95, "long.shape": 0.85, "diversity": 0.5}


@dataclass(frozen=True)
class Videos:
    """Detections of two videos for each caption."""

    words: list[tuple[str, ...]]  # of each caption
    pairs: list[tuple[Detection, Detection]]  # by caption


def check_overlap(model_file: Path, captions: list[tuple[str, ...]]) -> None:
    """Check that training saw none of the captions.

    Raises ValueError if the model was trained on one of them, or does not say what it was trained on.
    """
    with safe_open(model_file, "pt") as file:
        trained = (file.metadata() or {}).get(TRAINED_KEY)
    if trained is None:
        raise ValueError(f"{model_file} does not say which captions it was trained on; train it with train.tiny")
    common = {combinations()[index] for index in json.loads(trained)} & set(captions)
    if common:
        raise ValueError(f"{model_file} was trained on {len(common)} of the captions, {sorted(common)[0]} among them")


def real_videos(captions: list[tuple[str, ...]], num_frames: int, seed: int) -> Videos:
    """Render two videos of each caption and read them back."""
    rng = np.random.default_rng(seed)
    pairs = [tuple(detect(render(random_scene(rng, words), num_frames)) for _ in range(2)) for words in captions]
    return Videos(captions, pairs)  # type: ignore[arg-type]


class Generator:
    """Turns captions into detections with a model, its text encoder and a TAEHV."""

    def __init__(self, model: Path, taehv: Path, text_encoder: Path) -> None:
        self.model, checkpoint = load_model(model, dtype=torch.float32)
        self.taehv, _ = load_taehv(taehv, dtype=torch.float32)
        self.text_encoder = load_text_encoder(text_encoder)
        self.causal, self.steps = checkpoint.causal or CausalConfig(), checkpoint.steps or StepConfig()

    @torch.no_grad()
    def frames(self, captions: list[str], num_frames: int, seed: int, first_row: int = 0) -> Tensor:
        """Generate frames [B, V, R, H, W]; row b depends on the seed and first_row + b alone."""
        # As the command line makes a video, chunk by chunk, and not in some way of training's.
        channels = self.taehv.config.latent_channels
        decoder, side = StreamingDecoder(self.taehv), SIZE // 8
        chunks = rollout(
            Guided(self.model, Conditioning(self.text_encoder.encode(captions).float())),
            noise=SeededNoise(seed, first_row),
            latent_shape=(latent_frames(num_frames), channels, side, side),
            causal=self.causal,
            steps=self.steps,
        )
        return torch.cat([decoder.decode(chunk.latents_BTCHW) for chunk in chunks], 1)

    def videos(self, captions: list[tuple[str, ...]], num_frames: int, seed: int) -> Videos:
        """Generate two videos of each caption and read them back."""
        doubled = [words for words in captions for _ in range(2)]
        detections: list[Detection] = []
        for first in range(0, len(doubled), BATCH):
            texts = [named_scene(words).caption() for words in doubled[first : first + BATCH]]
            detections += [detect(video) for video in self.frames(texts, num_frames, seed, first)]
        return Videos(captions, list(zip(detections[::2], detections[1::2])))


def score(videos: Videos, words: list[tuple[str, ...]] | None = None) -> dict[str, float]:
    """Return shares that agree with the caption: colour and shape by frame, the rest by video; and pair differences.

    words: captions to compare with, in place of the videos' own.
    """
    rows = [(w, d) for w, pair in zip(words or videos.words, videos.pairs) for d in pair]
    share = {
        "colour": float(np.mean([c == w[0] for w, d in rows for c in d.colours_V])),
        "shape": float(np.mean([s == w[1] for w, d in rows for s in d.shapes_V])),
        "direction": float(np.mean([d.direction == w[2] for w, d in rows])),
        "speed": float(np.mean([d.speed == w[3] for w, d in rows])),
        "background": float(np.mean([d.background == w[4] for w, d in rows])),
    }
    # Errors of an autoregressive model add up, so that the end of a video is worse than its whole.
    last = [(w, d) for w, d in rows if len(d.colours_V) >= 4]
    share["last_quarter_colour"] = float(np.mean([c == w[0] for w, d in last for c in _last_quarter(d.colours_V)]))
    share["last_quarter_shape"] = float(np.mean([s == w[1] for w, d in last for s in _last_quarter(d.shapes_V)]))
    return {**share, **pair_differences(videos)}


def _last_quarter(words: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return words[-(len(words) // 4) :]


def pair_differences(videos: Videos) -> dict[str, float]:
    """Return the mean differences of the two videos of a caption: size and starting point on the ring, in pixels."""
    pairs = [(a, b) for a, b in videos.pairs if a.shape_share and b.shape_share]
    sizes = [abs(a.radius - b.radius) for a, b in pairs]
    # Edges are joined, so that no two points are further apart than half of SIZE in x and in y.
    starts = [np.abs((np.subtract(a.start, b.start) + SIZE / 2) % SIZE - SIZE / 2).mean() for a, b in pairs]
    return {"size_difference": float(np.mean(sizes)), "start_difference": float(np.mean(starts))}


def report(
    real: dict[str, float], generated: dict[str, float], long_real: dict[str, float], long_generated: dict[str, float]
) -> dict:
    """Return shares of the real score, and whether each target is reached."""
    shares = {name: generated[name] / real[name] for name in generated}
    shares |= {f"long.{name}": long_generated[name] / long_real[name] for name in long_generated}
    # A generator that always starts at one place, or with one size, would make its captions true and be no use.
    shares["diversity"] = min(shares["size_difference"], shares["start_difference"])
    reached = {name: bool(shares[name] >= target) for name, target in TARGETS.items()}
    return {"share_of_real": shares, "targets": TARGETS, "reached": reached}


def choose_captions(split: str, count: int, seed: int) -> list[tuple[str, ...]]:
    """Choose held-out captions, or as many random ones of training: those are for choosing between checkpoints."""
    if split == "heldout":
        return heldout()[:count]
    others = [words for words in combinations() if words not in set(heldout())]
    return [others[index] for index in np.random.default_rng(seed).permutation(len(others))[:count]]


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score real, shuffled and generated videos, at the trained length and at four times that."""
    start, captions = time.monotonic(), choose_captions(args.split, args.captions, args.seed)
    if args.split == "heldout":
        check_overlap(args.model, captions)
    num_frames = pixel_frames(LATENT_FRAMES)
    long_frames = pixel_frames(LATENT_FRAMES * LONG)
    real = real_videos(captions, num_frames, args.seed)
    # Captions of other videos agree by chance alone, as often as each word occurs.
    order = np.random.default_rng(args.seed).permutation(len(captions))
    result: dict[str, Any] = {"real": score(real), "shuffled": score(real, [captions[i] for i in order])}
    log.info("real %s", _short(result["real"]))
    log.info("shuffled captions %s; chance %s", _short(result["shuffled"]), _short(_chance()))
    for name in ("colour", "shape", "direction", "speed", "background"):
        if result["real"][name] < 0.98:  # scores of generated videos would say more of the detector than of the model
            raise ValueError(f"the detector reads {name} of real videos only {result['real'][name]:.1%} of the time")
    generator = Generator(args.model, args.taehv, args.text_encoder)
    result["generated"] = score(generator.videos(captions, num_frames, args.seed))
    log.info("generated %s", _short(result["generated"]))
    if not args.quick:
        result["long_real"] = score(real_videos(captions, long_frames, args.seed + 1))
        result["long_generated"] = score(generator.videos(captions, long_frames, args.seed + 1))
        log.info("at %d frames %s", long_frames, _short(result["long_generated"]))
        scores = report(result["real"], result["generated"], result["long_real"], result["long_generated"])
        result |= {"frames": num_frames, "long_frames": long_frames, "captions": len(captions), "seed": args.seed}
        result |= scores
        log.info("reached %s", scores["reached"])
    log.info("%.0f s", time.monotonic() - start)
    return result


def _chance() -> dict[str, float]:
    return {name: 1 / len(values) for name, values in ATTRIBUTES.items()}


def _short(values: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())


def main() -> None:
    """Run the command line."""
    bundle = Path("assets/tiny")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bundle / "model.safetensors")
    parser.add_argument("--taehv", type=Path, default=bundle / "taehv.safetensors")
    parser.add_argument("--text-encoder", type=Path, default=bundle / "text_encoder")
    parser.add_argument("--captions", type=int, default=128, help="number of captions, two videos each")
    parser.add_argument("--split", choices=["heldout", "trained"], default="heldout", help="trained: to choose by")
    parser.add_argument("--quick", action="store_true", help="training length only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    result = evaluate(args)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
