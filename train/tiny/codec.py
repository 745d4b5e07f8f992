"""The tiny bundle's codec: an analytic latent space, and a TAEHV that learns to speak it.

The latent space is a principal component analysis of the world's own patches (4 frames x 8 x 8 pixels x RGB to 16
numbers; the first frame is repeated three times in front, as in a causal video VAE). TAEHV's decoder is then trained to
turn these latents back into frames, jittered so that it tolerates what a generator gets slightly wrong, and its encoder
to predict them: the way the released TAEHV was made from Wan's VAE.

Letters: B batch, V video frames, R RGB, T latent frames, C latent channels, H W height and width in pixels.

    python -m train.tiny.codec basis --out out/tiny/basis.safetensors
    python -m train.tiny.codec taehv --basis out/tiny/basis.safetensors --part decoder --out out/tiny/decoder.st
    python -m train.tiny.codec taehv --basis out/tiny/basis.safetensors --part encoder --out out/tiny/encoder.st
    python -m train.tiny.codec join out/tiny/decoder.st out/tiny/encoder.st --out assets/tiny/taehv.safetensors
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.codecs.taehv import TAEHV
from selfforcing_core.config import TAEHVConfig
from selfforcing_core.generate.cli import Parser
from train.tiny.world import heldout, random_scene, render

log = logging.getLogger(__name__)
CONFIG = TAEHVConfig(encoder_width=24, decoder_widths=(64, 48, 24, 16))
LATENT_SPACE = "tiny"
DEVIATION = 1.2  # of the first latent channel; small enough that TAEHV's clamp at 3 touches little
# The others fall with the square root of their share of the picture. Giving all of them the same deviation, as a whole
# whitening would, puts eleven channels of fine detail beside five that say where the object is, and a small network
# then spends its effort on the eleven.
JITTER = 0.1  # deviation of the noise added to latents while the decoder trains


class PatchBasis:
    """Linear encoder: frames [B, V, R, H, W] in [0, 1], 4 n + 1 of them, to latents [B, T, C, H/8, W/8], n + 1."""

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        # Of patches of 4 x 3 x 8 x 8 = 768 numbers: latents = (patch - mean) @ basis.
        self.mean, self.basis = mean, basis

    @classmethod
    def load(cls, path: Path) -> PatchBasis:
        """Read a basis that the command wrote."""
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["basis"])

    def encode(self, frames_BVRHW: Tensor) -> Tensor:
        """Encode frames to latents, exactly and without anything learnt."""
        return rearrange((patches(frames_BVRHW) - self.mean) @ self.basis, "b t h w c -> b t c h w")


def patches(frames_BVRHW: Tensor) -> Tensor:
    """Cut frames into the 768 pixels that each latent position stands for, [B, T, H/8, W/8, 768]."""
    # Wan's VAE encodes the first frame by itself; three more of it make a whole group of four.
    padded = torch.cat([frames_BVRHW[:, :1].expand(-1, 3, -1, -1, -1), frames_BVRHW], 1)
    return rearrange(padded, "b (t f) r (h p) (w q) -> b t h w (f r p q)", f=4, p=8, q=8)


def clips(rng: np.random.Generator, batch: int, num_frames: int, banned: set[tuple[str, ...]]) -> Tensor:
    """Render clips [B, V, R, H, W] in [0, 1] of random scenes whose combination of words is not `banned`."""
    scenes = []
    while len(scenes) < batch:
        scene = random_scene(rng)
        if scene.words not in banned:
            scenes.append(scene)
    return torch.stack([render(scene, num_frames) for scene in scenes])


def fit_basis(num_clips: int, seed: int, channels: int = 16) -> PatchBasis:
    """Find the principal components of patches; the first is scaled to DEVIATION, the others as said beside it."""
    frames = clips(np.random.default_rng(seed), num_clips, 9, set(heldout()))
    flat = patches(frames).flatten(0, 3).double()  # small variances would drown in float32's rounding
    mean = flat.mean(0)
    variance, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    variance, vectors = variance.flip(0)[:channels], vectors.flip(1)[:, :channels]
    # A component's deviation becomes DEVIATION (variance / variance[0])^(1/4): the root of its share of the deviation.
    scale = DEVIATION * (variance[0] * variance) ** -0.25
    return PatchBasis(mean.float(), (vectors * scale).float())


def psnr(frames: Tensor, expected: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of values in [0, 1]."""
    return -10 * math.log10(float((frames - expected).square().mean()))


def decoder_loss(taehv: TAEHV, frames: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Return the error of frames decoded from jittered latents: squared for the picture, absolute for its edges."""
    jittered = latents + JITTER * torch.randn(latents.shape, generator=generator)
    # The decoder makes four frames of every latent frame; those before the video's first are not compared.
    error = taehv.decode_untrimmed(jittered)[:, taehv.frames_to_trim :] - frames
    # The squared term holds large errors down, the absolute one sharpens; at an error of 0.05 they are equal.
    return 20 * error.square().mean() + error.abs().mean()


def rescaled(half: dict[str, Tensor], part: str, old: PatchBasis, new: PatchBasis) -> dict[str, Tensor]:
    """Convert a decoder or encoder to a basis that differs from its own in the scale of the channels alone."""
    ratio = new.basis.norm(dim=0) / old.basis.norm(dim=0)
    # New latents are `ratio` times the old ones: the decoder's first layer divides, the encoder's last multiplies.
    if part == "decoder":
        return half | {"decoder.1.weight": half["decoder.1.weight"] / ratio[:, None, None]}
    last = max((name for name in half if name.endswith(".bias")), key=lambda name: int(name.split(".")[1]))
    weight = last.replace("bias", "weight")
    return half | {weight: half[weight] * ratio[:, None, None, None], last: half[last] * ratio}


def train(
    part: str,
    basis: PatchBasis,
    *,
    steps: int,
    batch: int,
    num_frames: int,
    lr: float,
    seed: int,
    init: dict[str, Tensor] | None = None,
) -> TAEHV:
    """Train "decoder" or "encoder" against the analytic latents, from scratch or from `init` (names as saved)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # No part of the bundle sees the held-out combinations, the codec as little as the video model.
    rng, banned = np.random.default_rng(seed), set(heldout())
    taehv = TAEHV(CONFIG)
    if init is not None:
        getattr(taehv, part).load_state_dict({name.removeprefix(f"{part}."): value for name, value in init.items()})
    parameters = list(getattr(taehv, part).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start = time.monotonic()
    for step in range(steps):
        frames = clips(rng, batch, num_frames, banned)
        latents = basis.encode(frames)
        if part == "decoder":
            loss = decoder_loss(taehv, frames, latents, generator)
        else:
            loss = (taehv.encode(frames) - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                quality = psnr(taehv.decode(latents), frames)
            log.info("step %d loss %.4f psnr %.1f dB, %.0f s", step, loss.item(), quality, time.monotonic() - start)
    return taehv


def join(decoder_file: Path, encoder_file: Path, out: Path) -> None:
    """Write one TAEHV checkpoint from the two halves."""
    from selfforcing_core.weights.checkpoint import save_checkpoint

    halves = {**load_file(decoder_file), **load_file(encoder_file)}
    save_checkpoint(out, {key: value.half() for key, value in halves.items()}, CONFIG, latent_space=LATENT_SPACE)


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("basis", help="fit the analytic latent space")
    fit.add_argument("--clips", type=int, default=1000)
    learn = commands.add_parser("taehv", help="train one half of the TAEHV")
    learn.add_argument("--basis", type=Path, required=True)
    learn.add_argument("--part", choices=("decoder", "encoder"), required=True)
    learn.add_argument("--steps", type=int, default=1500)
    learn.add_argument("--batch", type=int, default=4, help="clips per step")
    learn.add_argument("--frames", type=int, default=9, help="pixel frames per clip, 4n+1")
    learn.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    learn.add_argument("--init", type=Path, help="half to start from")
    learn.add_argument("--init-basis", type=Path, help="basis that half was trained on, where it is another one")
    both = commands.add_parser("join", help="join the halves into one checkpoint")
    both.add_argument("decoder", type=Path)
    both.add_argument("encoder", type=Path)
    for command in (fit, learn, both):
        command.add_argument("--out", type=Path, required=True, help="safetensors file to write")
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.command == "basis":
        basis = fit_basis(args.clips, args.seed)
        save_file({"mean": basis.mean, "basis": basis.basis.contiguous()}, args.out)
    elif args.command == "taehv":
        basis, init = PatchBasis.load(args.basis), load_file(args.init) if args.init else None
        if init is not None and args.init_basis is not None:
            init = rescaled(init, args.part, PatchBasis.load(args.init_basis), basis)
        taehv = train(
            args.part,
            basis,
            steps=args.steps,
            batch=args.batch,
            num_frames=args.frames,
            lr=args.lr,
            seed=args.seed,
            init=init,
        )
        half = {f"{args.part}.{key}": value for key, value in getattr(taehv, args.part).state_dict().items()}
        save_file({key: value.contiguous() for key, value in half.items()}, args.out)
    else:
        join(args.decoder, args.encoder, args.out)
    log.info("wrote %s", args.out)


if __name__ == "__main__":
    main()
