"""Flow-matching stages of the tiny bundle: the bidirectional teacher and the causal model by teacher forcing.

Three forms of the same loss, chosen by --forms and taken in turn:
    full     bidirectional, a whole clip under one timestep (the teacher)
    short    bidirectional, the first chunk alone (many more scenes for the same cost: shapes are learnt here)
    forced   causal: clean frames in front, every chunk with its own timestep (teacher forcing)

    torchrun --nproc-per-node 2 -m train.tiny.diffusion --clips out/tiny/clips.safetensors \
        --forms full,short,forced --steps 2400 --out out/tiny/joint.safetensors
    python -m train.tiny.diffusion --init out/tiny/joint.safetensors --forms full,short --decay ... # the teacher
    python -m train.tiny.diffusion --init out/tiny/joint.safetensors --forms forced --decay ...     # the causal model

Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig
from selfforcing_core.generate.cli import Parser
from selfforcing_core.masks import teacher_forcing_frames
from selfforcing_core.model import CausalWan
from selfforcing_core.schedule import TIMESTEPS, add_noise, shift_sigma
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from train.tiny.data import LATENT_FRAMES, Clips
from train.tiny.muon import Muon

log = logging.getLogger(__name__)
CAUSAL = CausalConfig(chunk=3, window=6)  # a chunk sees itself and the one before
STEPS = StepConfig()
SHIFT = 4.0  # of the timesteps drawn in training
TRAINED_KEY = "tiny.trained_combinations"  # header entry: indices into world.combinations()
BATCH = {"full": 12, "short": 36, "forced": 6}  # about the same number of tokens each


def flow_loss(model: CausalWan, form: str, clips: Clips) -> Tensor:
    """Return the mean squared error of the predicted flow, for one batch of a form (Self Forcing, eq. 1 and 2)."""
    generator = clips.generator
    batch = clips.batch(BATCH[form], CAUSAL.chunk if form == "short" else LATENT_FRAMES)
    clean = batch.latents_BTCHW
    rows, frames = clean.shape[:2]
    levels = frames // CAUSAL.chunk if form == "forced" else 1
    # Stratified: one draw in each of `rows` equal parts of [0, 1), so that a small batch covers all noise levels.
    uniform = (torch.arange(rows)[:, None] + torch.rand(rows, levels, generator=generator)) / rows
    sigma = shift_sigma(uniform[torch.randperm(rows, generator=generator)], SHIFT)
    sigma_BT = sigma.repeat_interleave(frames // levels, 1)  # type: ignore[union-attr]
    noise = torch.randn(clean.shape, generator=generator)
    noisy = add_noise(clean, noise, sigma_BT)
    forced = {}
    if form == "forced":
        # Each noisy chunk sees the clean ones before it and itself, in one pass over both copies of the clip.
        mask = teacher_forcing_frames((CAUSAL.chunk,) * levels, window=CAUSAL.window)
        forced = {"clean_BTCHW": clean, "mask_TT": mask}
    flow = model(noisy, sigma_BT * TIMESTEPS, batch.prompt_embeds_BPE, **forced)
    return (flow - (noise - clean)).square().mean()


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the hidden matrices of the blocks, AdamW for everything else."""
    hidden = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
    return [Muon(hidden, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average the gradients over all processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, piece in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(piece.view_as(gradient))


def save(model: CausalWan, ema: dict[str, Tensor], out: Path, clips: Clips) -> None:
    """Write averaged weights; the header lists the captions trained on, so that evaluation can refuse overlap."""
    state = {name: ema[name].contiguous() for name in model.state_dict()}
    metadata = {TRAINED_KEY: json.dumps(clips.labels.unique().tolist())}
    save_checkpoint(out, state, model.config, metadata, causal=CAUSAL, steps=STEPS)


def train(model: CausalWan, clips: Clips, args: argparse.Namespace, rank: int) -> None:
    """Train in place; the averaged weights are written to args.out every 200 steps and at the end."""
    parameters = list(model.parameters())
    optimisers = optimizers(model, args.lr)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    forms, losses, start = args.forms.split(","), {}, time.monotonic()
    for step in range(args.steps):
        decay = min(1.0, (args.steps - step) / max(1, args.steps * args.decay))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 50) * decay
        form = forms[step % len(forms)]
        loss = flow_loss(model, form, clips)
        model.zero_grad()
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        # A short memory at first, or the average would be of the random start.
        rate = min(args.ema, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            ema[name].lerp_(value, 1 - rate)
        losses[form] = loss.item() + 0.98 * (losses.get(form, loss.item()) - loss.item())
        if rank == 0 and (step % 20 == 19 or step + 1 == args.steps):
            text = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            log.info("step %d %s, %.0f s", step + 1, text, time.monotonic() - start)
        if rank == 0 and (step % 200 == 199 or step + 1 == args.steps):
            save(model, ema, args.out, clips)


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("out/tiny/clips.safetensors"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="checkpoint to start from")
    parser.add_argument("--forms", default="full,short,forced")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="last share of the steps over which lr falls to 0")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(args.seed)
    model = CausalWan(NETWORK_SIZES["tiny"])
    if args.init is not None:
        model.load_state_dict({key: value.float() for key, value in read_checkpoint(args.init).state_dict.items()})
    else:
        torch.nn.init.zeros_(model.head.head.weight)  # a flow of 0 is the best guess of a network that knows nothing
    train(model, Clips(args.clips, args.seed, rank), args, rank)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
