"""Self Forcing with distribution matching for the tiny bundle (arXiv 2506.08009, algorithm 1).

The student rolls out its own video with the core's `rollout`, one random denoising step per rollout carries gradient,
and the difference between a critic (trained meanwhile on what the student makes) and the bidirectional teacher pushes
whole clips towards what the teacher finds likely.

    torchrun --nproc-per-node 2 -m train.tiny.dmd --generator out/tiny/causal.safetensors \
        --teacher out/tiny/teacher.safetensors --out out/tiny/dmd.safetensors

Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.generate.cli import Parser
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.weights.checkpoint import read_checkpoint
from train.losses import score_timesteps
from train.roles import DistributionMatching, ScoreDraw, ScoreNetwork, Student
from train.tiny.data import LATENT_FRAMES, Clips
from train.tiny.diffusion import CAUSAL, SHIFT, STEPS, average_gradients, save

log = logging.getLogger(__name__)


def load(path: Path) -> CausalWan:
    """Load a network in float32 from a checkpoint of an earlier stage."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.config, WanConfig):
        raise ValueError(f"{path} holds a {checkpoint.kind}, not a video model")
    model = CausalWan(checkpoint.config)
    model.load_state_dict({key: value.float() for key, value in checkpoint.state_dict.items()})
    return model


class TinyDistillation:
    """The three roles, their optimisers and the average of the student's weights."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank = args, rank
        self.student, self.teacher = load(args.student), load(args.teacher).requires_grad_(False)
        # At the start the critic is the teacher, so that their difference is 0 and grows as the student's clips differ.
        self.critic = copy.deepcopy(self.teacher).requires_grad_(True)
        self.ema = {name: value.clone() for name, value in self.student.state_dict().items()}
        self.clips = Clips(args.clips, args.seed, rank)
        self.shared = torch.Generator().manual_seed(args.seed)  # the same numbers in every process
        betas = (0.0, 0.99)  # no momentum: each network's target moves with the other
        self.optimiser = torch.optim.AdamW(self.student.parameters(), args.lr, betas, weight_decay=0.01)
        self.critic_optimiser = torch.optim.AdamW(self.critic.parameters(), args.lr_critic, betas, weight_decay=0.01)
        self.sampler = Student(self.student, CAUSAL, STEPS, loss_frames=LATENT_FRAMES)
        self.matching = DistributionMatching(
            ScoreNetwork(self.teacher), ScoreNetwork(self.critic), guidance=args.guidance
        )
        self.rollouts = 0

    def sample(self, condition: Conditioning, *, with_gradient: bool) -> Tensor:
        """Sample clips [B, T, C, H, W], stopped at one random step that all chunks and processes share."""
        self.rollouts += 1
        exit_step = int(torch.randint(len(STEPS.steps), (1,), generator=self.shared))
        rows = len(condition.prompt_embeds_BPE)
        channels, height, width = self.clips.latents.shape[2:]
        with torch.set_grad_enabled(with_gradient):
            return self.sampler.sample(
                condition,
                # Times a prime, so that seeds next to each other share no rollout; every process has rows of its own.
                noise=SeededNoise(self.args.seed * 1_000_003 + self.rollouts, first_row=self.rank * rows),
                latent_shape=(LATENT_FRAMES, channels, height, width),
                exit_steps=[exit_step] * (LATENT_FRAMES // CAUSAL.chunk),
                with_gradient=with_gradient,
            )

    def condition(self) -> Conditioning:
        """Draw captions; their clips are not used, since the student makes its own."""
        return Conditioning(self.clips.batch(self.args.batch, CAUSAL.chunk).prompt_embeds_BPE)

    def draw(self, x: Tensor) -> ScoreDraw:
        """Draw the timesteps and the noise with which clips are compared."""
        uniform = torch.rand(len(x), generator=self.clips.generator)
        return ScoreDraw(score_timesteps(uniform, SHIFT), torch.randn(x.shape, generator=self.clips.generator))

    def student_step(self) -> float:
        """Update the student once, and return the mean size of the matching gradient."""
        condition = self.condition()
        x = self.sample(condition, with_gradient=True)
        # Guidance pushes the teacher's prediction away from that for the empty caption.
        empty = Conditioning(self.clips.captions.empty.expand_as(condition.prompt_embeds_BPE))
        loss, gradient = self.matching.student_loss(x, self.draw(x), condition, empty)
        loss.backward()
        self.step(self.student, self.optimiser)
        for name, value in self.student.state_dict().items():
            self.ema[name].lerp_(value, 1 - self.args.ema)  # the average is steadier than any of its moments
        self.last = (x.detach(), condition)
        return float(gradient.abs().mean())

    def critic_step(self, *, reuse: bool = False) -> float:
        """Update the critic once on new clips of the student, or on those of its last update, and return the loss."""
        if reuse:
            x, condition = self.last
        else:
            condition = self.condition()
            x = self.sample(condition, with_gradient=False)
        loss = self.matching.critic_loss(x, self.draw(x), condition)
        loss.backward()
        self.step(self.critic, self.critic_optimiser)
        return loss.item()

    def step(self, model: CausalWan, optimiser: torch.optim.Optimizer) -> None:
        """Take a step with the gradients of all processes, and clear them."""
        average_gradients(model.parameters())
        # After averaging, so that every process scales by the same norm.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        model.zero_grad()

    def run(self) -> None:
        """Warm up the critic, then alternate; the averaged student is saved every --save-every iterations."""
        start, loss = time.monotonic(), 0.0
        # A critic that lags behind the student points the gradient the wrong way (DMD2, arXiv 2405.14867, section 4.2),
        # which is also why it is updated several times for each update of the student.
        for _ in range(self.args.warmup):
            loss = self.critic_step()
        for iteration in range(1, self.args.iterations + 1):
            size = self.student_step()
            for turn in range(self.args.critic_steps):
                loss = self.critic_step(reuse=turn == 0)  # a rollout is the dear part of a step
            if self.rank == 0 and iteration % 5 == 0:
                seconds = time.monotonic() - start
                log.info("iteration %d gradient %.4f critic %.4f, %.0f s", iteration, size, loss, seconds)
            if self.rank == 0 and (iteration % self.args.save_every == 0 or iteration == self.args.iterations):
                save(self.student, self.ema, self.args.out.with_suffix(f".{iteration}.safetensors"), self.clips)


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("out/tiny/clips.safetensors"), help="only captions are used")
    parser.add_argument("--generator", dest="student", type=Path, required=True, help="causal checkpoint to start from")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="bidirectional checkpoint; the critic starts here too"
    )
    parser.add_argument("--out", type=Path, required=True, help="written as OUT stem + iteration")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--batch", type=int, default=6, help="videos per process")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--lr-critic", type=float, default=4e-4)
    parser.add_argument("--critic-steps", type=int, default=3, help="critic updates per student update")
    parser.add_argument("--warmup", type=int, default=24, help="critic updates before the first student update")
    parser.add_argument("--guidance", type=float, default=1.2, help="scale on the teacher; 1 is no guidance")
    parser.add_argument("--ema", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    TinyDistillation(args, dist.get_rank() if dist.is_initialized() else 0).run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
