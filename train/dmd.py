"""Self Forcing: a few-step student learns from a teacher on its own rollouts (arXiv 2506.08009, algorithm 1).

    torchrun --nproc-per-node 8 -m train.dmd config=self_forcing_dmd logdir=runs/dmd

The same command again goes on where the last checkpoint was written. Numbers do not depend on the number of processes.
Letters: B batch, T latent frames, C channels, H W latent size, P text tokens, E text width.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.geometry import SPATIAL_FACTOR, VideoGeometry, chunk_lengths, pixel_frames
from selfforcing_core.image import fit_image
from selfforcing_core.roofline import Work
from selfforcing_core.schedule import TIMESTEPS, nearest_sigma, sigma_table
from selfforcing_core.wan_vae import WanVAE, load_wan_vae
from train import distributed, engine, finite
from train.args import DmdArgs
from train.conditions import Pictures, read_texts
from train.data import ClipDatabase, Row, ShuffledRows
from train.draws import Draws, item, key_of
from train.engine import SAMPLED, STUDENT, Trainer
from train.footprint import estimate
from train.gan import Adversarial, Discriminator, Heads
from train.losses import score_timesteps
from train.networks import Source, build, read_on_first, wide
from train.roles import Levels, Matching, Score, ScoreDraw, Student, loss_window, score_bounds
from train.samples import Sampling
from train.work import copies_of, distillation_work

log = logging.getLogger(__name__)
CRITIC, TEACHER = "critic", "teacher"
FIRST_FRAMES = ("generated", "clips", "pictures")
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
    causal_of(args)
    engine.check_chunks(args)
    VideoGeometry(
        args.width, args.height, pixel_frames(args.latent_frames), chunk=args.chunk or args.latent_frames,
        independent_first_frame=args.independent_first_frame,
    )  # fmt: skip
    if args.max_latent_frames:
        _check_long(args)
    if args.first_frame != "generated":
        _check_first_frame(args)
    _check_steps(args)
    for name, betas in (("betas", args.betas), ("betas_critic", args.betas_critic or args.betas)):
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{name} {list(betas)} are not two numbers in [0, 1); use for instance [0.0, 0.999]")


def _check_long(args: DmdArgs) -> None:
    if args.max_latent_frames < args.latent_frames:
        raise ValueError(
            f"max_latent_frames {args.max_latent_frames} is less than the {args.latent_frames} latent_frames that are "
            "judged; leave it out, or use more"
        )
    VideoGeometry(
        args.width, args.height, pixel_frames(args.max_latent_frames), chunk=args.chunk or 1,
        independent_first_frame=args.independent_first_frame,
    )  # fmt: skip
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
    """Of the evaluation at which a chunk ends, and the timesteps at which the result is compared."""
    steps_of(args)
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
    return CausalConfig(
        args.chunk or args.latent_frames, args.window, args.sink, args.independent_first_frame, args.context_noise,
        args.cache_source,
    )  # fmt: skip


def steps_of(args: DmdArgs) -> StepConfig:
    return StepConfig(tuple(args.steps), shift=args.shift, warp=args.warp)


def context_sigma_of(args: DmdArgs) -> float:
    """The noise that a finished chunk has in training when it enters the cache."""
    if args.train_context_sigma == "last_table":
        return float(nearest_sigma(torch.tensor(args.context_noise), sigma_table(args.shift)))
    return args.context_noise / TIMESTEPS


# ------------------------------------------------------------------- order --
def trains_student(args: DmdArgs, step: int) -> bool:
    """Whether the student is trained in a step: every `critic_per_student` steps once the critic is warm."""
    return step >= args.critic_warmup and step % args.critic_per_student == 0


def first_number(args: DmdArgs, step: int, role: str) -> int:
    """How many clips all updates before this one took: the number of its first in the order of prompts.

    Each update takes those that follow the last one's, the student's of a step before the critic's.
    """
    every, warm = args.critic_per_student, args.critic_warmup
    students = max(0, -(-step // every) - -(-warm // every))  # updates of the student before this step
    return args.batch_size * (step + students + (role == CRITIC and trains_student(args, step)))


def check_networks(configs: Mapping[str, WanConfig]) -> None:
    """Raise ValueError for a teacher or critic that cannot judge the student's clips."""
    student = configs[STUDENT]
    for role, config in configs.items():
        for name in ("model_type", "in_dim", "out_dim", "text_dim"):
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

    def __init__(self, args: DmdArgs, world: distributed.World) -> None:
        super().__init__(args, world)
        self.settings, self.causal = args, causal_of(args)
        self.prefixes: Sequence[Tensor] = ()  # first frames of the clips that are sampled, where they are given
        sources = self.sources()
        config = read_on_first(sources[STUDENT], world).config  # its weights are mapped, not read
        assert isinstance(config, WanConfig)
        if config.model_type == "i2v":
            check_pictures(args)
        self.latent_shape = (
            args.latent_frames, config.out_dim, args.height // SPATIAL_FACTOR, args.width // SPATIAL_FACTOR
        )  # fmt: skip
        self.open_data(config.model_type == "i2v")
        self.built = built = build(sources, [STUDENT, CRITIC], args, world)
        check_networks({role: each.config for role, each in built.items()})
        self.student = Student(
            built[STUDENT].network, self.causal, steps_of(args), loss_frames=args.latent_frames,
            context_sigma=context_sigma_of(args),
        )  # fmt: skip
        self.add_role(STUDENT, built[STUDENT], args.lr)
        if args.score == "gan":
            self._add_discriminator(built[CRITIC])
        else:
            self._add_matching(built)

    def sources(self) -> dict[str, Source]:
        args = self.settings
        found = {
            STUDENT: Source(args.student, args.weights), CRITIC: Source(args.critic or args.teacher),
            TEACHER: Source(args.teacher),
        }  # fmt: skip
        if args.score == "gan":
            del found[TEACHER]
        return found

    def _add_matching(self, built: dict[str, Any]) -> None:
        args, levels = self.settings, Levels(rule=self.settings.score_levels)
        self.matching = Matching(
            Score(self.finite.watch(finite.TEACHER, built[TEACHER].network), levels),
            Score(self.finite.watch(finite.CRITIC, built[CRITIC].network), levels), guidance=args.guidance,
            levels=Levels(args.score_shift, args.score_levels), score=args.score, sid_alpha=args.sid_alpha,
            critic_guidance=args.guidance_critic, see=functools.partial(self.finite.see, finite.GUIDED),
        )  # fmt: skip
        self.add_role(CRITIC, built[CRITIC], args.lr_critic)

    def _add_discriminator(self, critic: Any) -> None:
        args = self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_of(args.seed, "heads"))
            heads: Any = Heads(critic.config, sees_time=args.gan_time, dtype=wide(args))
        if self.world.device.type != "cpu":  # drawn on the CPU, so that every device starts from the same heads
            heads = heads.to(self.world.device)
        heads = distributed.shard(heads, self.world, getattr(torch, args.dtype))
        self.adversarial = Adversarial(
            Discriminator(
                self.finite.watch(finite.CRITIC, critic.network), critic.module,
                self.finite.watch(finite.CRITIC, heads), sees_time=args.gan_time,
            ),
            Levels(args.score_shift, args.score_levels), args.gan_weight, args.gan_critic_weight,
            args.gan_relativistic, args.gan_r1, args.gan_r2, args.gan_sigma,
        )  # fmt: skip
        self.add_role(CRITIC, critic, args.lr_critic, heads, args.lr_heads)

    def open_data(self, takes_pictures: bool) -> None:
        args = self.settings
        size = (args.image_height, args.image_width) if args.image_height and args.image_width else None
        self.data = ClipDatabase(args.data, size) if args.data else None
        if self.data is not None:
            self.shuffled = ShuffledRows(self.data, args.seed)
        if self.data is not None and args.score == "gan" and self.data.shape[1:] != self.latent_shape:
            raise ValueError(
                f"{args.data}: real clips of {_described(self.data.shape[1:])}, but the student's have "
                f"{_described(self.latent_shape)}; set width, height and latent_frames as theirs, or give other clips"
            )
        self.texts = [] if self.data is not None else read_texts(args.prompts)
        self.vae: WanVAE | None = None
        if args.vae:
            narrow = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
            self.vae = load_wan_vae(args.vae, dtype=narrow, device=self.world.device)
        self.pictures: Pictures | None = None
        if takes_pictures:
            if self.vae is None or not args.clip or self.data is None:
                raise ValueError("an image-to-video student needs vae=..., clip=... and data=... with pictures")
            self.pictures = Pictures(self.vae, args.clip, (args.width, args.height, args.latent_frames), args,
                                     self.world)  # fmt: skip

        if args.first_frame == "clips" and self.data is not None:
            self._check_size(self.data)

    def _check_size(self, data: ClipDatabase) -> None:
        """Raise ValueError unless a clip's frames are of the run's size."""
        held = data.shape[2:]
        if held != self.latent_shape[1:]:
            raise ValueError(
                f"{self.settings.data}: frames of shape {held}, those of the run are {self.latent_shape[1:]}; set "
                "width and height to theirs"
            )

    def resume(self, checkpoint: Path) -> None:
        super().resume(checkpoint)
        stored = Path(self.args.logdir) / "config.yaml"
        is_older = stored.is_file() and "skip_bad_rows" not in stored.read_text(encoding="utf-8")
        if is_older and self.settings.critic_per_student > 1 and self.world.is_first:
            log.warning(
                "%s is of an earlier version, which left prompts out of every round: from step %d on the order is that "
                "of this version, in which each is seen once per round", checkpoint, self.step,
            )  # fmt: skip

    def betas(self, role: str) -> tuple[float, float]:
        if role != CRITIC or not self.settings.betas_critic:
            return super().betas(role)
        return self.settings.betas_critic[0], self.settings.betas_critic[1]

    def max_grad_norm(self, role: str) -> float:
        own = self.settings.max_grad_norm_critic if role == CRITIC else 0.0
        return own or super().max_grad_norm(role)

    # ---------------------------------------------------------------- step --
    def run_step(self) -> dict[str, float]:
        """The critic always, the student every `critic_per_student` steps once the critic is warm."""
        told: dict[str, float] = {}
        if trains_student(self.settings, self.step):
            told |= self.update(STUDENT)
        if self.settings.score == "gan":
            self._warm_heads(self.step >= self.settings.critic_warmup)
        told |= self.update(CRITIC)
        self.step += 1
        return told

    def _warm_heads(self, is_warm: bool) -> None:
        """At first the heads alone learn, with momentum."""
        network, heads = self.roles[CRITIC].optimiser.param_groups
        network["full_lr"] = self.settings.lr_critic if is_warm else 0.0
        first, second = self.betas(CRITIC)
        heads["betas"] = (first if is_warm else WARM_MOMENTUM, second)

    def loss(self, role: str, first: int, count: int) -> Tensor:
        """On clips that the student makes for this: with gradient through them, or without for the critic."""
        args, draws = self.settings, self.draws(role)
        number = first_number(args, self.step, role) + first
        texts, rows = self.rows(range(number, number + count))
        condition, negative = self.conditions(texts, rows)
        self.see_prompts(condition, negative)
        self.finite.see(finite.IMAGES, condition.image_BTCHW, condition.clip_BIY)
        is_student = role == STUDENT
        frames, exits = self.frames(draws), self.exits(draws)
        with torch.set_grad_enabled(is_student):
            clip = self.student.sample(
                condition, noise=draws.noise(first), latent_shape=(frames, *self.latent_shape[1:]), exit_steps=exits,
                with_gradient=is_student, prefix_BTCHW=self.first_frames(rows),
            )  # fmt: skip
            x = loss_window(clip, args.latent_frames, self.reencode)
        self.finite.see(finite.STUDENT, clip)
        if x is not clip:
            self.finite.see(finite.WINDOW, x)
        bounds = score_bounds(self.student.steps, exits[0], **_bounds_of(args))
        timesteps = score_timesteps(draws.uniform(first, count), args.score_shift, bounds=bounds)
        timesteps = timesteps.to(x.device, torch.float32)
        draw = ScoreDraw(timesteps, draws.normal(first, tuple(x.shape)).to(x))
        if args.score == "gan":
            real = torch.stack([row.states[-1] for row in rows]).to(x)
            if is_student:
                return self.adversarial.student_loss(x, real, draw, condition)
            near = self.draws("penalty").normal(first, tuple(x.shape))
            return self.adversarial.critic_loss(x, real, draw, condition, near)
        if is_student:
            return self.matching.student_loss(x, draw, condition, negative, self.counted(frames))[0]
        return self.matching.critic_loss(x, draw, condition)

    def counted(self, frames: int) -> Tensor | None:
        """Which frames of a student's clip of this length have a loss, [T]; None: all.

        Not a given one, nor the chunk that the re-encoded one before a long clip's window belongs to.
        """
        args, without = self.settings, 0
        if frames > args.latent_frames:
            without = 0 if args.score == "sid" else 1 if args.independent_first_frame else self.causal.chunk
        elif args.first_frame != "generated":
            without = 1
        return torch.arange(args.latent_frames, device=self.world.device) >= without if without else None

    def frames(self, draws: Draws) -> int:
        """Latent frames of this step's clips: as many as the teacher sees, or chunks more up to the longest."""
        args, chunk = self.settings, self.causal.chunk
        more = (args.max_latent_frames - args.latent_frames) // chunk if args.max_latent_frames else 0
        return args.latent_frames + draws.whole("frames", more + 1) * chunk

    def exits(self, draws: Draws) -> list[int]:
        """The evaluation at which each chunk ends that the student generates."""
        args, causal = self.settings, self.causal
        lengths = chunk_lengths(
            self.frames(draws), causal.chunk, independent_first_frame=causal.independent_first_frame
        )  # fmt: skip
        count = len(lengths) - (args.first_frame != "generated")
        if args.last_step_only:
            return [len(args.steps) - 1] * count
        return draws.exit_steps(count, len(args.steps), per_chunk=args.exit_per_chunk)

    def work(self, role: str) -> Work:
        configs = {name: built.config for name, built in self.built.items()}
        evaluations = [index + 1 for index in self.exits(self.draws(role))]
        copies = copies_of(self.args, self.world.size)
        return distillation_work(self.settings, role, configs, evaluations, copies=copies)

    def reencode(self, latents_BTCHW: Tensor) -> Tensor:
        """The latent that the last picture of a clip has as the first of a video."""
        assert self.vae is not None
        return self.vae.encode(self.vae.decode(latents_BTCHW)[:, -1:])

    # ---------------------------------------------------------------- data --
    def rows(self, numbers: range) -> tuple[list[str], list[Row]]:
        """Prompts, and rows where they come from a database."""
        if self.data is None:
            return [self.texts[item(self.args.seed, n, len(self.texts))] for n in numbers], []
        rows = self.take(self.shuffled, numbers)
        return [row.prompt for row in rows], rows

    @torch.no_grad()
    def first_frames(self, rows: list[Row]) -> Tensor | None:
        """Latents [B, 1, C, H, W] of the frames that clips of these rows begin with, where they are given."""
        args, kind = self.settings, self.settings.first_frame
        if kind == "generated":
            return None
        like = {"device": self.world.device, "dtype": wide(args)}
        if kind == "clips":
            return torch.stack([row.states[-1][:1] for row in rows]).to(**like)
        images = [fit_image((image + 1) / 2, args.width, args.height) for image in self.images(rows)]
        assert self.vae is not None
        return self.vae.encode(torch.stack(images)[:, None].to(self.world.device)).to(**like)

    def images(self, rows: list[Row]) -> list[Tensor]:
        """The rows' pictures [R, H, W] in [-1, 1]. Raises ValueError where one has none."""
        found = [row.image_RHW for row in rows if row.image_RHW is not None]
        if len(found) != len(rows):
            raise ValueError(f"{self.settings.data}: holds rows without pictures; make it with --video_path")
        return found

    def conditions(self, texts: list[str], rows: list[Row]) -> tuple[Conditioning, Conditioning]:
        """What the clips are conditioned on, and the same with the negative prompt."""
        pair = self.prompts.condition(texts), self.prompts.condition([self.settings.negative_prompt] * len(texts))
        if self.pictures is None:
            return pair
        seen = self.pictures.condition(pair[0], self.images(rows))
        return seen, Conditioning(pair[1].prompt_embeds_BPE, seen.image_BTCHW, seen.clip_BIY)

    def sampling(self) -> Sampling:
        args = self.settings
        return Sampling(
            self.causal, steps_of(args), self.latent_shape, is_bidirectional=not args.chunk, prefixes=self.prefixes
        )

    def examples(self, texts: list[str] | None) -> tuple[list[str], list[Conditioning]]:
        if self.pictures is not None or texts is None:
            found, rows = self.rows(range(SAMPLED))
        else:
            found, rows = texts, []
        given = self.first_frames(rows)
        self.prefixes = () if given is None else given.split(1)
        return found, [self.conditions([text], rows[n : n + 1])[0] for n, text in enumerate(found)]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return engine.command(
        "train.dmd", DmdArgs, check, Distillation, functools.partial(estimate, stage=Distillation), argv
    )


if __name__ == "__main__":
    sys.exit(main())
