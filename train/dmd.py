"""Self Forcing: a few-step student learns from a teacher on its own rollouts (arXiv 2506.08009, algorithm 1).

    torchrun --nproc-per-node 8 -m train.dmd config=self_forcing_dmd logdir=runs/dmd

The same command again goes on where the last checkpoint was written. Numbers do not depend on the number of processes.
Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width, I image tokens,
Y image-feature width, R RGB.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.codecs.image import fit_image
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, VideoGeometry, chunk_lengths, pixel_frames
from selfforcing_core.policy import SELF_FORCING, cache_policy
from selfforcing_core.roofline.work import Work
from selfforcing_core.schedule import TIMESTEPS, nearest_sigma, sigma_table
from train import distributed, engine, finite
from train.args import DmdArgs
from train.data import Row
from train.engine import SAMPLED, STUDENT, Trainer
from train.footprint import estimate
from train.gan import Adversarial, Discriminator, Heads
from train.losses import score_timesteps
from train.networks import Source, build, wide
from train.randomness import Draws, key_of
from train.roles import DistributionMatching, Levels, ScoreDraw, ScoreNetwork, Student, loss_window, score_bounds
from train.supply import Supply, text_row
from train.update_cost import copies_of, distillation_work
from train.validation import Sampling

log = logging.getLogger(__name__)
CRITIC, TEACHER = "critic", "teacher"  # the reference's fake score and real score
FIRST_FRAMES = ("generated", "clips", "pictures")
# What a policy may say for its cache to be followed chunk by chunk in training as in sampling; a clip's prompt never
# changes, so that what happens then does not matter.
TRAINED_BY = ("name", "is_rebased", "sink_average", "means", "replays", "history", "kept", "cut_at")
WARM_MOMENTUM = 0.9  # beta1 of the adversarial heads while they learn alone


def check(args: DmdArgs, processes: int) -> None:
    """Raise ValueError for settings that cannot work, before anything is read or allocated."""
    engine.check(args, processes, ("student", "teacher", "text_encoder", *(["data"] if args.score == "gan" else [])))
    if not args.prompts and not args.data:
        raise ValueError("neither prompts nor data is set; give prompts=FILE, or data=DATABASE")
    if args.score not in ("dmd", "sid", "gan"):
        raise ValueError(f"score {args.score!r} is unknown; use dmd, sid or gan")
    if args.score_levels not in ("exact", "table"):
        raise ValueError(f"score_levels {args.score_levels!r} is unknown; use exact or table")
    if args.train_context_sigma not in ("exact", "last_table"):
        raise ValueError(f"train_context_sigma {args.train_context_sigma!r} is unknown; use exact or last_table")
    if args.critic_per_student < 1 or args.critic_warmup < 0:
        raise ValueError(
            f"critic_per_student {args.critic_per_student} with critic_warmup {args.critic_warmup} are no numbers of "
            "updates; use 1 or more, and 0 or more"
        )
    for name in ("guidance", "guidance_critic", "lr_critic", "lr_heads", "max_grad_norm_critic", "gan_weight"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} {getattr(args, name)} is not a number from 0 on; give one that is")
    if not 0.01 <= args.score_shift <= 100:
        raise ValueError(f"score_shift {args.score_shift} is not between 0.01 and 100; the reference's is 5")
    _check_policy(args)
    engine.check_chunks(args)
    _check_geometry(args, args.latent_frames, args.chunk or args.latent_frames)
    if args.max_latent_frames:
        _check_long(args)
    if args.first_frame != "generated":
        _check_first_frame(args)
    _check_steps(args)
    for name, betas in (("betas", args.betas), ("betas_critic", args.betas_critic or args.betas)):
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{name} {list(betas)} are not two numbers in [0, 1); use for instance [0.0, 0.999]")


def _check_policy(args: DmdArgs) -> None:
    """Raise ValueError for a cache policy that a student's clip cannot follow."""
    causal_of(args)
    policy = cache_policy(args.policy)
    others = [
        field.name
        for field in fields(policy)
        if field.name not in TRAINED_BY and getattr(policy, field.name) != getattr(SELF_FORCING, field.name)
    ]
    if others:
        raise ValueError(
            f"policy {policy.name} is not trained here: the student's clips do not follow its {', '.join(others)}; use "
            "one that keeps window, sink and averages"
        )


def _check_geometry(args: DmdArgs, latent_frames: int, chunk: int) -> None:
    first = args.independent_first_frame
    VideoGeometry(args.width, args.height, pixel_frames(latent_frames), chunk=chunk, independent_first_frame=first)


def _check_long(args: DmdArgs) -> None:
    if args.max_latent_frames < args.latent_frames:
        raise ValueError(
            f"max_latent_frames {args.max_latent_frames} is less than the {args.latent_frames} latent_frames that are "
            "judged; leave it out, or use more"
        )
    _check_geometry(args, args.max_latent_frames, args.chunk or 1)
    if not args.chunk or not args.vae:
        raise ValueError("rollouts longer than latent_frames need chunks (chunk=3) and vae=... to re-encode with")


def _check_first_frame(args: DmdArgs) -> None:
    if args.first_frame not in FIRST_FRAMES:
        raise ValueError(f"first_frame {args.first_frame!r} is unknown; use {', '.join(FIRST_FRAMES)}")
    if args.chunk != 1 and not args.independent_first_frame:
        raise ValueError(
            f"first_frame={args.first_frame} gives frame 0 alone, which is no chunk of {args.chunk or 'all frames'}; "
            "set independent_first_frame=true, or chunk=1"
        )
    if args.latent_frames < 2:
        raise ValueError(f"first_frame={args.first_frame} with latent_frames 1 leaves none to generate; use more")
    if not args.data:
        raise ValueError(f"first_frame={args.first_frame} needs data=DATABASE to take it from")
    if args.first_frame == "pictures" and not args.vae:
        raise ValueError("first_frame=pictures needs vae=... to encode them with")
    if args.sample_prompts:
        raise ValueError("sample_prompts come without a first frame; leave it out, the database's own are sampled")


def _check_steps(args: DmdArgs) -> None:
    """Check the evaluation at which a chunk ends, and the timesteps at which the result is compared."""
    steps_of(args)
    chunk, first = args.chunk or args.latent_frames, args.independent_first_frame
    if args.first_chunk_steps and len(chunk_lengths(args.latent_frames, chunk, independent_first_frame=first)) == 1:
        raise ValueError(
            f"first_chunk_steps are those of the first of several chunks, and chunk={args.chunk} makes a clip one "
            "chunk; set steps"
        )
    if args.first_chunk_steps and args.first_frame != "generated":
        raise ValueError(
            f"first_chunk_steps are those of a chunk that begins a clip, and with first_frame={args.first_frame} a "
            "given one does; leave them out"
        )
    if args.context_noise and not args.chunk:
        raise ValueError("context_noise is about a cache, and chunk=0 has none; leave it out")
    if args.last_step_only and args.exit_per_chunk:
        raise ValueError("last_step_only leaves nothing to draw per chunk; leave exit_per_chunk out")
    if args.exit_per_chunk and (args.ts_schedule or args.ts_schedule_max):
        raise ValueError("ts_schedule follows the one exit step of all chunks; leave exit_per_chunk out")
    if args.ts_schedule and args.min_score_timestep:
        raise ValueError("ts_schedule sets the lowest timestep itself; leave min_score_timestep out")
    for exit_step in range(len(args.steps)):
        low, high = score_bounds(steps_of(args), exit_step, **_bounds_of(args))
        if not high:
            raise ValueError("ts_schedule_max leaves no noise to compare clips at after a last step of 0; leave it out")
        if not 0 <= low < high:
            raise ValueError(f"min_score_timestep {low:g} is not in [0, {high:g}); use less")


def _bounds_of(args: DmdArgs) -> dict[str, Any]:
    return {"lowest": args.min_score_timestep, "is_floored": args.ts_schedule, "is_capped": args.ts_schedule_max}


def check_pictures(args: DmdArgs) -> None:
    """Raise ValueError for settings that cannot work with an image-to-video student, whose file says that it is one."""
    if args.first_frame != "generated":
        raise ValueError(
            "an image-to-video network sees its picture in channels of its own; leave first_frame out, which is for "
            "text-to-video networks"
        )
    for name in ("max_latent_frames", "sample_frames"):
        if getattr(args, name) not in (0, args.latent_frames):
            raise ValueError(
                f"{name} {getattr(args, name)} is another length than the {args.latent_frames} latent_frames for which "
                f"an image-to-video student's pictures are encoded; leave {name} out"
            )


def causal_of(args: DmdArgs) -> CausalConfig:
    """Return how the student's clips are cut into chunks, and what it sees of earlier ones."""
    chunk = args.chunk or args.latent_frames
    first, noise = args.independent_first_frame, args.context_noise
    causal = CausalConfig(chunk, args.window, args.sink, first, noise, args.cache_source, args.policy)
    if not args.chunk and cache_policy(args.policy) != SELF_FORCING:
        raise ValueError(f"policy {args.policy} is of a cache, which chunk=0 has none of; use chunks, or leave it out")
    return causal


def steps_of(args: DmdArgs) -> StepConfig:
    """Return the few steps that the student learns to sample in."""
    first = tuple(args.first_chunk_steps) or None
    return StepConfig(tuple(args.steps), shift=args.shift, warp=args.warp, first_chunk_steps=first)


def context_sigma_of(args: DmdArgs) -> float:
    """Return the noise that a finished chunk has in training when it enters the cache."""
    # The reference noises by the table's nearest entry, and the table has no 0: its last entry is 0.005.
    if args.train_context_sigma == "last_table":
        return float(nearest_sigma(torch.tensor(args.context_noise), sigma_table(args.shift)))
    return args.context_noise / TIMESTEPS


# ------------------------------------------------------------------- order --
def trains_student(args: DmdArgs, step: int) -> bool:
    """Return whether the student is trained in a step: every `critic_per_student` steps once the critic is warm."""
    # Two time scales (DMD2, arXiv 2405.14867, section 4.2): the critic must catch up with the student to judge it.
    return step >= args.critic_warmup and step % args.critic_per_student == 0


def first_number(args: DmdArgs, step: int, role: str) -> int:
    """Return how many clips all updates before this one took: the number of its first in the order of prompts.

    Each update takes those that follow the last one's, the student's of a step before the critic's.
    """
    # -(-a // b) is a / b rounded up: multiples of b below a.
    every, warm = args.critic_per_student, args.critic_warmup
    students = max(0, -(-step // every) - -(-warm // every))  # updates of the student before this step
    return args.batch_size * (step + students + (role == CRITIC and trains_student(args, step)))


def check_networks(configs: Mapping[str, WanConfig]) -> None:
    """Raise ValueError for a teacher or critic that cannot judge the student's clips."""
    student = configs[STUDENT]
    for role, config in configs.items():
        for name in ("model_type", "in_dim", "image_features", "out_dim", "text_dim"):
            if getattr(config, name) != getattr(student, name):
                raise ValueError(
                    f"the {role}'s {name} is {getattr(config, name)}, the student's {getattr(student, name)}; all "
                    "networks of a distillation take the same clips, prompts and images: give another file"
                )


def _described(shape: Sequence[int]) -> str:
    frames, channels, height, width = shape
    size = f"{width * SPATIAL_FACTOR} x {height * SPATIAL_FACTOR}"
    return f"{frames} latent frames of {size} pixels in {channels} channels"


class Distillation(Trainer):
    """Student, critic and, except for adversarial training, teacher."""

    args: DmdArgs

    def __init__(self, args: DmdArgs, world: distributed.World, supply: Supply | None = None) -> None:
        super().__init__(args, world, supply)
        self.causal = causal_of(args)
        self.prefixes: Sequence[Tensor] = ()  # first frames of the clips that are sampled, where they are given
        sources = self.sources()
        config = self.supply.checkpoint(STUDENT, sources[STUDENT]).config
        assert isinstance(config, WanConfig)
        if config.model_type == "i2v":
            check_pictures(args)
        height, width = args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR
        self.latent_shape = (args.latent_frames, config.out_dim, height, width)
        self.shuffled = self.supply.rows()
        if args.data:
            self._check_rows(self.shuffled.data.shape[1:])
        self.vae = self.supply.vae()
        is_image = config.model_type == "i2v"
        self.pictures = self.supply.pictures(self.vae, reads_clip=config.reads_clip) if is_image else None
        self.built = built = build(sources, [STUDENT, CRITIC], args, world, self.supply.checkpoint)
        check_networks({role: each.config for role, each in built.items()})
        network, steps, sigma = built[STUDENT].network, steps_of(args), context_sigma_of(args)
        self.student = Student(network, self.causal, steps, sigma, loss_frames=args.latent_frames)
        self.add_role(STUDENT, built[STUDENT], args.lr)
        if args.score == "gan":
            self._add_discriminator(built[CRITIC])
        else:
            self._add_matching(built)

    def sources(self) -> dict[str, Source]:
        args = self.args
        # The critic starts as the teacher by default: its task is the teacher's, on the student's clips.
        sources = {STUDENT: Source(args.student, args.weights), CRITIC: Source(args.critic or args.teacher)}
        if args.score != "gan":  # there real clips take the teacher's place
            sources[TEACHER] = Source(args.teacher)
        return sources

    def _add_matching(self, built: dict[str, Any]) -> None:
        args, levels = self.args, Levels(rule=self.args.score_levels)
        self.matching = DistributionMatching(
            ScoreNetwork(self.finite.watch(finite.TEACHER, built[TEACHER].network), levels),
            ScoreNetwork(self.finite.watch(finite.CRITIC, built[CRITIC].network), levels),
            guidance=args.guidance,
            levels=Levels(args.score_shift, args.score_levels),
            score=args.score,
            sid_alpha=args.sid_alpha,
            critic_guidance=args.guidance_critic,
            see=functools.partial(self.finite.see, finite.GUIDED),
        )
        self.add_role(CRITIC, built[CRITIC], args.lr_critic)

    def _add_discriminator(self, critic: Any) -> None:
        args = self.args
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's own generator
            torch.manual_seed(key_of(args.seed, "heads"))  # alike in every process and run
            heads: Any = Heads(critic.config, sees_time=args.gan_time, dtype=wide(args))
        if self.world.device.type != "cpu":  # drawn on the CPU, so that every device starts from the same heads
            heads = heads.to(self.world.device)
        heads = distributed.shard(heads, self.world, getattr(torch, args.dtype))
        network, watched = (self.finite.watch(finite.CRITIC, part) for part in (critic.network, heads))
        self.adversarial = Adversarial(
            Discriminator(network, critic.module, watched, sees_time=args.gan_time),
            Levels(args.score_shift, args.score_levels),
            weight=args.gan_weight,
            critic_weight=args.gan_critic_weight,
            is_relativistic=args.gan_relativistic,
            r1=args.gan_r1,
            r2=args.gan_r2,
            sigma=args.gan_sigma,
        )
        self.add_role(CRITIC, critic, args.lr_critic, heads, args.lr_heads)

    def _check_rows(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError for clips [T, C, H, W] of a database that are not of the run's size, where they must be."""
        args = self.args
        if args.score == "gan" and shape != self.latent_shape:
            raise ValueError(
                f"{args.data}: real clips of {_described(shape)}, but the student's have "
                f"{_described(self.latent_shape)}; set width, height and latent_frames as theirs, or give other clips"
            )
        if args.first_frame == "clips" and shape[1:] != self.latent_shape[1:]:
            raise ValueError(
                f"{args.data}: frames of shape {shape[1:]}, those of the run are {self.latent_shape[1:]}; set "
                "width and height to theirs"
            )

    def resume(self, checkpoint: Path) -> None:
        super().resume(checkpoint)
        stored = Path(self.args.logdir) / "config.yaml"
        is_older = stored.is_file() and "skip_bad_rows" not in stored.read_text(encoding="utf-8")
        if is_older and self.args.critic_per_student > 1 and self.world.is_first:
            log.warning(
                "%s is of an earlier version, which left prompts out of every round: from step %d on the order is that "
                "of this version, in which each is seen once per round",
                checkpoint,
                self.step,
            )

    def betas(self, role: str) -> tuple[float, float]:
        if role != CRITIC or not self.args.betas_critic:
            return super().betas(role)
        return self.args.betas_critic[0], self.args.betas_critic[1]

    def max_grad_norm(self, role: str) -> float:
        own = self.args.max_grad_norm_critic if role == CRITIC else 0.0
        return own or super().max_grad_norm(role)

    # ---------------------------------------------------------------- step --
    def run_step(self) -> dict[str, float]:
        """Train the critic always, the student every `critic_per_student` steps once the critic is warm."""
        metrics: dict[str, float] = {}
        if trains_student(self.args, self.step):
            metrics |= self.update(STUDENT)
        if self.args.score == "gan":
            self._warm_heads(self.step >= self.args.critic_warmup)
        metrics |= self.update(CRITIC)
        self.step += 1
        return metrics

    def _warm_heads(self, is_warm: bool) -> None:
        """Let the heads alone learn at first, with momentum, since they start from nothing and the critic does not."""
        network, heads = self.roles[CRITIC].optimiser.param_groups
        network["full_lr"] = self.args.lr_critic if is_warm else 0.0
        first, second = self.betas(CRITIC)
        heads["betas"] = (first if is_warm else WARM_MOMENTUM, second)

    def loss(self, role: str, first: int, count: int) -> Tensor:
        """Return the loss on clips that the student makes for this; the critic's has no gradient through them."""
        args, draws = self.args, self.draws(role)
        number = first_number(args, self.step, role) + first
        rows = self.rows(range(number, number + count))
        condition, negative = self.conditions(rows)
        self.see_prompts(condition, negative)
        self.finite.see(finite.IMAGES, condition.image_BTCHW, condition.clip_BIY)
        is_student = role == STUDENT
        frames, exits = self.frames(draws), self.exits(draws)
        with torch.set_grad_enabled(is_student):
            clip = self.student.sample(
                condition,
                noise=draws.noise(first),
                latent_shape=(frames, *self.latent_shape[1:]),
                exit_steps=exits,
                with_gradient=is_student,
                prefix_BTCHW=self.first_frames(rows),
            )
            x = loss_window(clip, args.latent_frames, self.reencode)
        self.finite.see(finite.STUDENT, clip)
        # In this order the first bad part is the cause: a window with NaN may just show the student's.
        if x is not clip:
            self.finite.see(finite.WINDOW, x)
        # Of the last chunk's exit, as all chunks have it but for one with steps of its own; bounds that follow it are
        # refused where each chunk has its own.
        bounds = score_bounds(self.student.steps, exits[-1], **_bounds_of(args))
        timesteps = score_timesteps(draws.uniform(first, count), args.score_shift, bounds=bounds)
        timesteps = timesteps.to(x.device, torch.float32)  # in float64 they are drawn, in float32 networks take them
        draw = ScoreDraw(timesteps, draws.normal(first, tuple(x.shape)).to(x))
        if args.score == "gan":
            real = torch.stack([row.states[-1] for row in rows]).to(x)
            if is_student:
                return self.adversarial.student_loss(x, real, draw, condition)
            # Another purpose than the role's, under which this would be the draw's own noise again.
            nearby = self.draws("penalty").normal(first, tuple(x.shape))
            return self.adversarial.critic_loss(x, real, draw, condition, nearby)
        if is_student:
            return self.matching.student_loss(x, draw, condition, negative, self.counted(frames))[0]
        return self.matching.critic_loss(x, draw, condition)

    def counted(self, frames: int) -> Tensor | None:
        """Return which frames of a student's clip of this length have a loss, [T]; None: all.

        Not a given one, nor the chunk that the re-encoded one before a long clip's window belongs to.
        """
        args, skipped = self.args, 0
        if frames > args.latent_frames:
            skipped = 0 if args.score == "sid" else 1 if args.independent_first_frame else self.causal.chunk
        elif args.first_frame != "generated":
            skipped = 1
        return torch.arange(args.latent_frames, device=self.world.device) >= skipped if skipped else None

    def frames(self, draws: Draws) -> int:
        """Return how many latent frames this step's clips have: as many as the teacher sees, or some chunks more."""
        args, chunk = self.args, self.causal.chunk
        more_chunks = (args.max_latent_frames - args.latent_frames) // chunk if args.max_latent_frames else 0
        return args.latent_frames + draws.whole("frames", more_chunks + 1) * chunk

    def exits(self, draws: Draws) -> list[int]:
        """Return the evaluation at which each chunk ends that the student generates."""
        args, causal, frames = self.args, self.causal, self.frames(draws)
        # A given first frame is a chunk that nothing is evaluated for.
        lengths = chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
        count = len(lengths) - (args.first_frame != "generated")
        if args.last_step_only:
            exits = [len(args.steps) - 1] * count
        else:
            exits = draws.exit_steps(count, len(args.steps), per_chunk=args.exit_per_chunk)
        # A first chunk with steps of its own has an exit among them, whatever the others share (as Causal-Forcing++).
        if own := len(args.first_chunk_steps):
            exits[0] = own - 1 if args.last_step_only else draws.whole("first exit", own)
        return exits

    def work(self, role: str) -> Work:
        configs = {name: built.config for name, built in self.built.items()}
        # Drawn again from the same key, so they are those of the update itself.
        evaluations = [index + 1 for index in self.exits(self.draws(role))]
        copies = copies_of(self.args, self.world.size)
        return distillation_work(self.args, role, configs, evaluations, copies=copies)

    def reencode(self, latents_BTCHW: Tensor) -> Tensor:
        """Return the latent that the last picture of a clip has as the first of a video."""
        assert self.vae is not None
        # Decoded from the start, since Wan's VAE is causal: a picture depends on all latents before it.
        return self.vae.encode(self.vae.decode(latents_BTCHW)[:, -1:])

    # ---------------------------------------------------------------- data --
    def rows(self, numbers: range) -> list[Row]:
        return self.take(self.shuffled, numbers)

    @torch.no_grad()
    def first_frames(self, rows: list[Row]) -> Tensor | None:
        """Return the latents [B, 1, C, H, W] that clips of these rows begin with, where they are given."""
        args, kind = self.args, self.args.first_frame
        if kind == "generated":
            return None
        like = {"device": self.world.device, "dtype": wide(args)}
        if kind == "clips":
            return torch.stack([row.states[-1][:1] for row in rows]).to(**like)
        images = [fit_image((image + 1) / 2, args.width, args.height) for image in self.images(rows)]
        assert self.vae is not None
        return self.vae.encode(torch.stack(images)[:, None].to(self.world.device)).to(**like)

    def images(self, rows: list[Row]) -> list[Tensor]:
        """Return the rows' pictures, RGB in [-1, 1]. Raises ValueError where one has none."""
        images = [row.image_RHW for row in rows if row.image_RHW is not None]
        if len(images) != len(rows):
            raise ValueError(f"{self.args.data}: holds rows without pictures; make it with --video_path")
        return images

    def conditions(self, rows: list[Row]) -> tuple[Conditioning, Conditioning]:
        """Return what the clips are conditioned on, and the same with the negative prompt."""
        texts = [row.prompt for row in rows]
        pair = self.prompts.condition(texts), self.prompts.condition([self.args.negative_prompt] * len(texts))
        if self.pictures is None:
            return pair
        condition = self.pictures.condition(pair[0], self.images(rows))
        # The picture stays on both sides of guidance, as in Wan's own sampling: only the prompt is negated.
        return condition, Conditioning(pair[1].prompt_embeds_BPE, condition.image_BTCHW, condition.clip_BIY)

    def sampling(self) -> Sampling:
        args = self.args
        return Sampling(
            self.causal, steps_of(args), self.latent_shape, is_bidirectional=not args.chunk, prefixes=self.prefixes
        )

    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        if self.pictures is not None or texts is None:
            rows = self.rows(range(SAMPLED))
        else:
            rows = [text_row(text) for text in texts]
        first_BTCHW = self.first_frames(rows)
        self.prefixes = () if first_BTCHW is None else first_BTCHW.split(1)
        return [row.prompt for row in rows], [self.conditions([row])[0] for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return engine.command(
        "train.dmd", DmdArgs, check, Distillation, functools.partial(estimate, stage=Distillation), argv
    )


if __name__ == "__main__":
    sys.exit(main())
