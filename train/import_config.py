"""A configuration of the reference to one of ours: python -m train.import_config THEIRS.yaml > ours.yaml

Reads those of Self-Forcing, Self-Forcing-Plus, CausVid and what keeps their keys. The translation goes to standard
output, with the command that takes it; what had no use, and what is other than it may seem, to standard error. A key
that is missing has the reference's default, or that of a default_config.yaml beside the file. A key or value that
would change what is trained and has no counterpart here is refused by name. Where we differ from the reference on
purpose (noise in the training context, sigma by table), our default is kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_core.atomic import print_result
from selfforcing_core.cli import Parser
from selfforcing_core.geometry import SPATIAL_FACTOR
from selfforcing_core.schedule import TIMESTEPS, shift_sigma
from train import diffusion, dmd, ode
from train.args import DiffusionArgs, DmdArgs, OdeArgs, dump, mistake

Settings = dict[str, Any]
NEVER = 1_000_000_000  # a step that no run reaches
FRAMES, CHANNELS = 21, 16  # latent frames that the reference judges, and channels of a Wan 2.1 latent
STAGES: dict[str, tuple[type[Any], Callable[[Any, int], None]]] = {
    "dmd": (DmdArgs, dmd.check), "ode": (OdeArgs, ode.check), "diffusion": (DiffusionArgs, diffusion.check),
}  # fmt: skip
TRAINERS = {"score_distillation": "dmd", "gan": "dmd", "ode": "ode", "diffusion": "diffusion"}

# Folders below the reference's wan_models/, and what `download` calls them
RELEASED = {
    "wan2.1-t2v-1.3b": "models/wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b": "models/wan2.1-t2v-14b",
    "wan2.1-i2v-14b-480p": "models/wan2.1-i2v-14b",
}
CLASSES = ("wan", "causal_wan", "wandiffusionwrapper", "causalwanmodel", "wanmodel")  # of CausVid's code, with its 1.3B
SMALL, LARGE = "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"
TEXT_ENCODER = "models/umt5/models_t5_umt5-xxl-enc-bf16.pth"
VAE = "models/vae/Wan2.1_VAE.pth"
CLIP = "models/clip/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
PICTURE = (480, 832)  # of the reference's databases, which do not record it

_LOGGING = "wandb=true logs; the key comes from the environment"
_PLACE = "says where weights lie, which changes no number; shard_group=8 is the hybrid form"
_UNREAD = "no code of the reference reads it"
_OURS = "logdir=FOLDER names ours"
ANY: tuple[Any, ...] = ()
# Keys that change nothing, why, and the values for which that is so (ANY: all)
NO_OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("wandb_host", "wandb_key", "wandb_entity", "wandb_project", "wandb_name"), (_LOGGING, ANY)),
    **dict.fromkeys(("wandb_save_dir", "disable_wandb"), (_LOGGING, ANY)),
    **dict.fromkeys(
        [f"{role}_fsdp_wrap_strategy" for role in
         ("generator", "real_score", "fake_score", "text_encoder", "image_encoder")], (_PLACE, ANY),
    ),
    "image_encoder_cpu_offload": (_PLACE, ANY),
    "sharding_strategy": (_PLACE, ("full", "hybrid_full", "hybrid_zero2")),
    "gc_interval": ("is about the interpreter's memory", ANY),
    **dict.fromkeys(
        ("ckpt_step", "prompt_name", "prompt_path", "eval_first_n", "num_samples", "height", "width", "num_frames"),
        (_UNREAD, ANY),
    ),
    **dict.fromkeys(("output_path", "logdir", "config_name", "no_save", "no_visualize"), (_OURS, ANY)),
    "causal": (_UNREAD, (True,)),
    "num_train_timestep": ("ours is the same", (1000,)),
    "denoising_loss_type": ("ours is the same", ("flow",)),
    "load_raw_video": ("ours are latents, too", (False,)),
    "real_task_type": ("ours is the same", ("bidirectional_video",)),
    "fake_task_type": ("ours is the same", ("bidirectional_video",)),
    "generator_grad": ("ours trains the same", ({"model": True},)),
    "real_score_grad": ("ours trains the same", ({"model": False},)),
    "fake_score_grad": ("ours trains the same", ({"model": True},)),
    "backward_simulation": ("the student's own rollout is what ours trains on", (True,)),
    "teacher_forcing": ("is of another stage", (False,)),
    "noise_augmentation_max_timestep": ("ours adds no noise to the clean context", (0,)),
    "max_pair": ("ours takes all rows", (100_000_000,)),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), ("batch_size counts all parts", (1,))),
}  # fmt: skip
# Keys that only trainer: gan reads
ADVERSARIAL = (
    "gen_lr", "critic_lr", "gan_g_weight", "gan_d_weight", "r1_weight", "r2_weight", "r1_sigma", "r2_sigma",
    "relativistic_discriminator", "concat_time_embeddings", "critic_timestep_shift", "discriminator_warmup_steps",
    "discriminator_lr_multiplier", "num_class", "loss_scale", "load", "force_start_w_ema", "force_reset_zero_step",
    "force_reinit_ema", "skip_optimizer_scheduler",
)  # fmt: skip
# Keys of the distillation that the reference's trainers of the other stages do not read
DISTILLATION = (
    "real_name", "fake_name", "guidance_scale", "real_guidance_scale", "fake_guidance_scale", "lr_critic",
    "beta1_critic", "beta2_critic", "ts_schedule", "ts_schedule_max", "min_score_timestep", "timestep_shift",
    "denoising_loss_type", "dfake_gen_update_ratio", "num_training_frames", "same_step_across_blocks",
    "last_step_only", "context_noise", "sid_alpha", "negative_prompt", "discriminator_lr_multiplier", "data_type",
    "max_grad_norm_generator", "max_grad_norm_critic", *ADVERSARIAL,
)  # fmt: skip
SAMPLED = ("guidance_scale", "timestep_shift", "negative_prompt")  # of its videos: trainer: diffusion makes some
UNREAD = {
    "ode": (*DISTILLATION, "ema_weight", "ema_start_step", "image_or_video_shape", "teacher_forcing"),
    "diffusion": (
        *(key for key in DISTILLATION if key not in SAMPLED), "denoising_step_list", "warp_denoising_step",
        "distribution_loss",
    ),
}  # fmt: skip
# Why some keys of forks are refused
REFUSED = {
    "denoising_step_list_first_chunk": "other steps for the first chunk are not trained here",
    "boundary_step": "Wan 2.2's halves are not trained here",
    "training_target": "Wan 2.2's halves are not trained here",
    "backward_simulation": "it trains on noised clips of a database, train.dmd on the student's own rollouts",
    "load_raw_video": "make latents with train.make_latents and train.make_lmdb",
}


@dataclass
class Translation:
    """What a configuration becomes: a stage's settings, keys without use by reason, and lines to read."""

    stage: str
    ours: Settings = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave(self, key: str, reason: str) -> None:
        self.unused.setdefault(reason, []).append(key)


class _Theirs:
    """Their keys, each of which is taken once; what is left at the end had no translation."""

    def __init__(self, values: Settings) -> None:
        self.values, self.left = values, {key for key, value in values.items() if value is not None}
        self.missing: list[str] = []

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def take(self, key: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
        """The value as `kind` makes it, or the default. Raises ValueError naming key and value."""
        self.left.discard(key)
        if key not in self:
            return default
        value = self.values[key]
        try:
            return kind(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {value!r} cannot be translated ({error})") from error

    def need(self, key: str, kind: Callable[[Any], Any]) -> Any:
        """As `take`; None, which is said, where the reference has no default."""
        if key not in self:
            self.missing.append(key)
        return self.take(key, kind)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("is no number")
    return float(value)


def _count(value: Any) -> int:
    if _number(value) != int(value):
        raise ValueError("is no whole number")
    return int(value)


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        raise ValueError("is no list")
    return [_number(value) for value in values]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


# ----------------------------------------------------------------- networks --
def _network(name: str) -> str:
    """The file behind one of the reference's names: a folder below wan_models/, which forks make a path."""
    if name.lower() in CLASSES:
        name = SMALL
    if name.lower() in RELEASED:
        return RELEASED[name.lower()]
    below = Path("wan_models") / name
    return str(below) if "/" not in name and below.exists() else name


def _size(name: str) -> str:
    """The preset that a name tells; empty: none."""
    lower = name.lower()
    if lower in CLASSES or "1.3b" in lower:
        return "t2v-1.3b"
    is_large = re.search(r"(?<![a-z0-9.])14b", lower)
    return next((f"{kind}-14b" for kind in ("t2v", "i2v") if is_large and kind in lower), "")


# -------------------------------------------------------------------- stages --
def translate(values: Settings, ignored: Sequence[str] = ()) -> Translation:
    """Our settings, and what is to be said. Raises ValueError for whatever ours cannot take, by key and value."""
    if unknown := [key for key in ignored if key not in values]:
        raise ValueError(f"--ignore {','.join(unknown)}: the file has no such key")
    values = {key: value for key, value in values.items() if key not in ignored}
    theirs, is_causvid = _Theirs(values), _is_causvid(values)
    stage = _stage_of(theirs, is_causvid)
    found = Translation(stage)
    if ignored:
        found.notes.append(f"ignored as asked: {', '.join(ignored)}")
    _shared(theirs, found, is_causvid)
    if stage == "dmd":
        _distillation(theirs, found, is_causvid)
    else:
        _clips(theirs, found)
    _leave_rest(theirs, found)
    _check(found)
    if theirs.missing:
        names = ", ".join(theirs.missing)
        found.notes.append(f"not in the file, and without a default of the reference, so that ours hold: {names}")
    found.notes.append(
        "the reference never stops and ours does after max_steps; its readmes say 600 for 1.3B, 3000 for 14B and 1000 "
        "for image-to-video"
    )
    return found


def _is_causvid(values: Settings) -> bool:
    return "trainer" not in values and bool({"distillation_loss", "model_name"} & set(values))


def _stage_of(theirs: _Theirs, is_causvid: bool) -> str:
    """Which of our commands this is for. Raises ValueError for trainers and losses that ours have no counterpart of."""
    loss = theirs.take("distillation_loss" if is_causvid else "distribution_loss", _text)
    if is_causvid:
        if loss not in (None, "dmd", "ode"):
            raise ValueError(f"distillation_loss: {loss!r} is none of ours; dmd and ode are")
        return "ode" if loss == "ode" else "dmd"
    trainer = theirs.take("trainer", _text, "ode" if loss == "ode" else "score_distillation")
    if trainer not in TRAINERS:
        raise ValueError(f"trainer: {trainer!r} is none of ours; {', '.join(TRAINERS)} are")
    stage = TRAINERS[trainer]
    known = {"score_distillation": (None, "dmd", "sid"), "ode": (None, "ode")}.get(trainer)
    if loss == "causvid":
        raise ValueError("distribution_loss: 'causvid' trains on noised clips, train.dmd on the student's own rollouts")
    if known and loss not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"distribution_loss: {loss!r} is none of ours with trainer {trainer}; {names} are")
    return stage


def _shared(theirs: _Theirs, found: Translation, is_causvid: bool) -> None:
    """What all stages have."""
    ours = found.ours
    ours["text_encoder"] = TEXT_ENCODER
    for key, name, kind in (("seed", "seed", _count), ("log_iters", "save_every", _count)):
        if (value := theirs.need(key, kind)) is not None:
            ours[name] = value
    if ours.get("seed") == 0:
        found.notes.append("seed 0 is a random one in the reference, here it is the number")
    for key, name, kind in (
        ("gradient_checkpointing", "activation_checkpointing", _switch),
        ("batch_size", "micro_batch", _count),
        ("text_encoder_cpu_offload", "text_encoder_offload", _switch),
    ):
        if (value := theirs.take(key, kind)) is not None:
            ours[name] = value
    total = theirs.take("total_batch_size", _count)
    if total is None:
        found.notes.append(
            "the reference's batch is batch_size on each of its processes; ours is 64 clips, set batch_size"
        )
    else:
        ours["batch_size"] = total
    if (is_mixed := theirs.take("mixed_precision", _switch)) is not None:
        ours["dtype"] = "bfloat16" if is_mixed else "float32"
    if theirs.values.get("sharding_strategy") == "no_shard":
        theirs.left.discard("sharding_strategy")
        ours["shard_group"] = 1
    ours["weight_decay"] = theirs.take("weight_decay", _number, 0.01)
    ours["chunk"] = _chunk(theirs, found, is_causvid)
    if theirs.take("independent_first_frame", _switch, False):
        ours["independent_first_frame"] = True
    _betas(theirs, found, "betas", "")
    _student(theirs, found, is_causvid)
    if found.stage != "ode":
        _shape(theirs, found)
        _average(theirs, found)
    else:
        ours["ema_start"] = NEVER


def _chunk(theirs: _Theirs, found: Translation, is_causvid: bool) -> int:
    count = theirs.take("num_frame_per_block", _count, 1)
    kind, task = theirs.take("generator_type", _text), theirs.take("generator_task", _text)
    for key, value, known in (
        ("generator_type", kind, ("causal", "bidirectional")),
        ("generator_task", task, ("causal_video", "bidirectional_video")),
    ):
        if value not in (None, *known):
            raise ValueError(f"{key}: {value!r} is none of ours; {' and '.join(known)} are")
    if kind != "bidirectional" and not (is_causvid and task == "bidirectional_video"):
        return count
    if "num_frame_per_block" in theirs:
        found.leave("num_frame_per_block", "a bidirectional generator has no blocks")
    return 0


def _betas(theirs: _Theirs, found: Translation, name: str, suffix: str) -> None:
    held = [theirs.need(f"{beta}{suffix}", _number) for beta in ("beta1", "beta2")]
    if None not in held:
        found.ours[name] = held
    elif held != [None, None]:
        raise ValueError(f"beta1{suffix} and beta2{suffix}: one of them is missing")


def _student(theirs: _Theirs, found: Translation, is_causvid: bool) -> None:
    """Where the trained network starts: a checkpoint if there is one; the name beside it is then its size's."""
    ours, stage = found.ours, found.stage
    default = LARGE if "generator_type" in theirs.values and stage == "dmd" else SMALL
    own = theirs.take("model_name", _text) if is_causvid else None
    if own is not None and own.lower() not in CLASSES:
        raise ValueError(f"model_name: {own!r} is none of ours; {', '.join(CLASSES[:2])} are")
    options = dict(theirs.take("model_kwargs", dict, {}))
    names = [name for name in (options.pop("model_name", None), theirs.take("generator_name", _text)) if name]
    if len(set(names)) > 1:
        raise ValueError(f"generator_name: {names[1]!r} and model_kwargs.model_name {names[0]!r} differ; leave one out")
    name = names[0] if names else default
    checkpoint = theirs.take("generator_ckpt", lambda value: value and _text(value))
    ours["student" if stage == "dmd" else "network"] = checkpoint or _network(name)
    if checkpoint:
        ours["weights"] = "raw"  # the reference takes those that were trained, not their average
    _say_size(found, "size", "the student's name", name)
    ours["shift"] = _number(options.pop("timestep_shift", 8.0))  # CausVid's is always 8
    if (window := options.pop("local_attn_size", -1)) != -1:
        ours["window"] = _count(window)
    if sink := options.pop("sink_size", 0):
        if stage != "dmd":
            raise ValueError(f"model_kwargs.sink_size: {sink!r} has no counterpart in train.{stage}")
        ours["sink"] = _count(sink)
    if options:
        raise ValueError(f"model_kwargs: {', '.join(sorted(options))} inside is unknown")


def _say_size(found: Translation, key: str, what: str, name: str) -> None:
    if size := _size(name):
        found.ours[key] = size
    else:
        found.notes.append(f"{what} {name!r} does not tell its size, which the plan wants: set {key}")


def _shape(theirs: _Theirs, found: Translation) -> None:
    shape = theirs.need("image_or_video_shape", _numbers)
    if shape is None:
        return
    if len(shape) != 5 or shape[2] != CHANNELS:
        raise ValueError(
            f"image_or_video_shape: {shape} is not [1, frames, {CHANNELS}, height, width] of a Wan 2.1 latent"
        )
    frames, height, width = (int(shape[index]) for index in (1, 3, 4))
    found.ours |= {"latent_frames": frames, "height": height * SPATIAL_FACTOR, "width": width * SPATIAL_FACTOR}
    if frames != FRAMES and found.stage == "dmd" and found.ours["chunk"]:
        found.notes.append(
            f"image_or_video_shape has {frames} frames, which ours trains on; the reference's causal rollouts have "
            f"{FRAMES} all the same"
        )


def _average(theirs: _Theirs, found: Translation) -> None:
    decay, start = theirs.take("ema_weight", _number, 0.0), theirs.take("ema_start_step", _count, 0)
    found.ours |= {"ema_decay": decay, "ema_start": start} if decay > 0 else {"ema_start": NEVER}


def _clips(theirs: _Theirs, found: Translation) -> None:
    """Keys of the stages before the distillation."""
    ours = found.ours
    if (lr := theirs.need("lr", _number)) is not None:
        ours["lr"] = lr
    if (path := theirs.need("data_path", _text)) is not None:
        ours["data"] = path
    is_image = theirs.take("i2v", _switch, False)
    if found.stage == "diffusion":
        if is_image:
            raise ValueError("i2v: true has no counterpart in train.diffusion; the first frame is given in train.dmd")
        ours["forcing"] = "teacher" if theirs.take("teacher_forcing", _switch, False) else "diffusion"
        _samples(theirs, found)
        return
    ours["first_frame_clean"] = is_image
    is_warped, steps = theirs.take("warp_denoising_step", _switch, False), theirs.need("denoising_step_list", _numbers)
    if steps is not None:
        ours["timesteps"] = [_warped(step, ours["shift"]) for step in steps] if is_warped else steps
        if steps[-1:] != [0.0]:
            found.notes.append("the list does not end with 0, so that a trajectory's last state is only its target")


def _samples(theirs: _Theirs, found: Translation) -> None:
    """How the reference's trainer of flow matching samples its videos; its guidance counts as ours does there."""
    for key, name, kind in (("guidance_scale", "guidance", _number), ("negative_prompt", "negative_prompt", _text)):
        if (value := theirs.take(key, kind)) is not None:
            found.ours[name] = value
    shift = theirs.take("timestep_shift", _number)
    if shift not in (None, ours := found.ours["shift"]):
        found.notes.append(f"timestep_shift {shift:g} is of the reference's videos alone; ours have shift {ours:g}")


def _warped(step: float, shift: float) -> float:
    return TIMESTEPS * float(shift_sigma(step / TIMESTEPS, shift))


def _distillation(theirs: _Theirs, found: Translation, is_causvid: bool) -> None:
    ours, is_gan = found.ours, theirs.values.get("trainer") == "gan"
    loss = "gan" if is_gan else theirs.values.get("distribution_loss") or "dmd"
    ours["score"] = loss
    if is_causvid:
        found.notes.append("CausVid's student becomes one that train.dmd trains on its own rollouts (Self Forcing)")
    _scores(theirs, found, is_causvid)
    _steps(theirs, found, is_causvid)
    _guidance(theirs, found, is_gan)
    _optimisers(theirs, found, is_gan, is_causvid)
    _data(theirs, found, is_gan, is_causvid)
    if is_gan:
        _adversarial(theirs, found)
    alpha = theirs.take("sid_alpha", _number)
    if loss == "sid":
        ours["sid_alpha"] = 1.0 if alpha is None else alpha
    elif alpha is not None:
        found.leave("sid_alpha", "is for distribution_loss: sid; say score=sid if that is meant")


def _scores(theirs: _Theirs, found: Translation, is_causvid: bool) -> None:
    """Teacher and critic."""
    is_plus = "generator_type" in theirs.values
    for key, role in (("real_name", "teacher"), ("fake_name", "critic")):
        name = theirs.take(key, _text, LARGE if is_plus and not is_causvid else SMALL)
        found.ours[role] = _network(name)
        _say_size(found, f"{role}_size", key, name)


def _steps(theirs: _Theirs, found: Translation, is_causvid: bool) -> None:
    """Steps of the student, where a chunk ends, and where its clips are compared."""
    ours = found.ours
    steps = theirs.need("denoising_step_list", _numbers)
    if steps is not None:
        ours["steps"] = steps[:-1] if steps[-1:] == [0.0] else steps
    ours["score_shift"] = max(1.0, theirs.take("timestep_shift", _number, 1.0))  # below 1 the reference has none
    is_per_chunk = not theirs.take("same_step_across_blocks", _switch, True)
    is_last = theirs.take("last_step_only", _switch, False)
    is_ranged = False
    for key, default in (("ts_schedule", not is_causvid), ("ts_schedule_max", False)):
        if not theirs.take(key, _switch, default):
            continue
        if is_per_chunk:
            found.leave(key, "has no effect with same_step_across_blocks: false")
            continue
        ours[key] = is_ranged = True
        if key not in theirs:
            found.notes.append(f"{key} is not in the file and on by default, as in the reference")
    if is_per_chunk and is_last:
        found.leave("same_step_across_blocks", "has no effect with last_step_only: true")
    ours |= {"exit_per_chunk": is_per_chunk and not is_last, "last_step_only": is_last}
    lowest = theirs.take("min_score_timestep", _number, 0.0)
    if lowest and ours.get("ts_schedule"):
        found.leave("min_score_timestep", "has no effect with ts_schedule: true")
    elif lowest:
        ours["min_score_timestep"] = lowest
    if not theirs.take("warp_denoising_step", _switch, False):
        ours["warp"] = False
        if not is_ranged:
            ours["shift"] = 1.0  # says the same to whatever reads steps and shift alone
    if noise := theirs.take("context_noise", _number, 0.0):
        ours["context_noise"] = noise
    longest = theirs.take("num_training_frames", _count, FRAMES)
    frames = ours.get("latent_frames", FRAMES)
    if longest < min(frames, FRAMES):
        raise ValueError(f"num_training_frames: {longest} is less than the {FRAMES} that the reference judges")
    if longest > max(frames, FRAMES):
        ours |= {"max_latent_frames": longest, "vae": VAE}


def _guidance(theirs: _Theirs, found: Translation, is_gan: bool) -> None:
    """The reference counts guidance from the conditional prediction; ours is 1 more."""
    plain, real = theirs.take("guidance_scale", _number), theirs.take("real_guidance_scale", _number)
    fake = theirs.take("fake_guidance_scale", _number, 0.0)
    held = [key for key in ("guidance_scale", "real_guidance_scale", "fake_guidance_scale") if key in theirs]
    if is_gan:
        for key in held:
            found.leave(key, "trainer: gan has no teacher")
        return
    if real is not None and plain is not None:
        found.leave("guidance_scale", "real_guidance_scale holds")
    elif real is None and "fake_guidance_scale" in theirs:
        found.leave("fake_guidance_scale", "counts beside real_guidance_scale alone")
        fake = 0.0
    elif "fake_guidance_scale" in theirs and found.ours["score"] == "sid":
        found.leave("fake_guidance_scale", "distribution_loss: sid guides its teacher alone")
        fake = 0.0
    if (scale := plain if real is None else real) is None:
        theirs.missing.append("guidance_scale")
    else:
        found.ours["guidance"] = scale + 1
    if fake:
        found.ours["guidance_critic"] = fake + 1


def _optimisers(theirs: _Theirs, found: Translation, is_gan: bool, is_causvid: bool) -> None:
    ours = found.ours
    lr = theirs.need("gen_lr" if is_gan else "lr", _number)
    critic = theirs.take("critic_lr" if is_gan else "lr_critic", _number, lr)
    ours |= {key: value for key, value in (("lr", lr), ("lr_critic", critic)) if value is not None}
    if not is_causvid:
        _betas(theirs, found, "betas_critic", "_critic")
    if (norm := theirs.take("max_grad_norm" if is_causvid else "max_grad_norm_generator", _number)) is not None:
        ours["max_grad_norm"] = norm
    if not is_causvid and (norm is not None or "max_grad_norm_critic" in theirs):
        ours["max_grad_norm_critic"] = theirs.take("max_grad_norm_critic", _number, 10.0)
    if (ratio := theirs.need("dfake_gen_update_ratio", _count)) is not None:
        ours["critic_per_student"] = ratio
    if (words := theirs.need("negative_prompt", _text)) is not None:
        ours["negative_prompt"] = words


def _data(theirs: _Theirs, found: Translation, is_gan: bool, is_causvid: bool) -> None:
    """Prompts, or a database; and where pictures come from."""
    ours, is_image = found.ours, theirs.take("i2v", _switch, False)
    path, kind = theirs.need("data_path", _text), theirs.take("data_type", _text)
    if kind not in (None, "text_folder", "text_file"):
        raise ValueError(f"data_type: {kind!r} is none of ours; text_folder and text_file are")
    is_text = path is not None and path.endswith(".txt")
    if is_text and (is_image or is_gan):
        which = "i2v: true" if is_image else "trainer: gan"
        raise ValueError(f"data_path: {path!r} is a text file, and {which} needs a database (train.make_lmdb)")
    if path is not None:
        is_database = is_image or is_gan or (is_causvid and not is_text)
        ours["data" if is_database else "prompts"] = path
    if kind and is_image:
        found.leave("data_type", "i2v: true always reads a database")
    is_wide = ours.get("size") == "i2v-14b"
    if is_wide and not is_image:
        raise ValueError("i2v: false with an image-to-video generator, which needs pictures; set i2v: true")
    if is_wide:
        ours |= {"vae": VAE, "clip": CLIP, "image_height": PICTURE[0], "image_width": PICTURE[1]}
    elif is_image:
        ours["first_frame"] = "clips"


def _adversarial(theirs: _Theirs, found: Translation) -> None:
    found.notes.append(
        "the reference's trainer of trainer: gan does not run as published; ours is train.dmd's score=gan"
    )
    for key, name, kind in (
        ("gan_g_weight", "gan_weight", _number), ("gan_d_weight", "gan_critic_weight", _number),
        ("r1_weight", "gan_r1", _number), ("r2_weight", "gan_r2", _number), ("r1_sigma", "gan_sigma", _number),
        ("relativistic_discriminator", "gan_relativistic", _switch), ("concat_time_embeddings", "gan_time", _switch),
        ("discriminator_warmup_steps", "critic_warmup", _count), ("discriminator_lr_multiplier", "lr_heads", _number),
    ):  # fmt: skip
        if (value := theirs.take(key, kind)) is not None:
            found.ours[name] = value
    for key, only in (
        ("r2_sigma", found.ours.get("gan_sigma", 0.01)), ("loss_scale", 1.0), ("num_class", 1),
        ("critic_timestep_shift", found.ours["score_shift"]), ("load", False), ("force_start_w_ema", False),
        ("force_reset_zero_step", False), ("force_reinit_ema", False), ("skip_optimizer_scheduler", False),
        ("lr", theirs.values.get("lr")), ("lr_critic", theirs.values.get("lr_critic")),
    ):  # fmt: skip
        if key not in theirs:
            continue
        if theirs.values[key] != only:
            raise ValueError(f"{key}: {theirs.values[key]!r} has no counterpart in ours, which is the one of {only!r}")
        theirs.left.discard(key)
        found.leave(key, "ours is the same" if not key.startswith("lr") else "trainer: gan reads gen_lr and critic_lr")


# ---------------------------------------------------------------------- rest --
def _leave_rest(theirs: _Theirs, found: Translation) -> None:
    """Say of what is left why it has no use. Raises ValueError for what may have one."""
    refused, unread = [], UNREAD.get(found.stage, () if found.ours.get("score") == "gan" else ADVERSARIAL)
    for key in [key for key in theirs.values if key in theirs.left]:
        value = theirs.values[key]
        reason, only = NO_OPS.get(key, ("", None))
        if key in unread:
            found.leave(key, f"the reference's trainer {theirs.values.get('trainer') or found.stage} does not read it")
        elif only is ANY or (only and any(value == each and type(value) is type(each) for each in only)):
            found.leave(key, reason)
        else:
            known = REFUSED.get(key) or ("only " + ", ".join(map(str, only)) + " is ours" if only else "unknown")
            refused.append(f"{key}: {str(value)[:60]} ({known})")
    if refused:
        names = ",".join(entry.split(":", 1)[0] for entry in refused)
        raise ValueError(f"no translation of {'; '.join(refused)}. Leave out what does not matter: --ignore {names}")


def _check(found: Translation) -> None:
    """Raise ValueError where the stage itself would refuse the result."""
    kind, check = STAGES[found.stage]
    filled: Settings = {"logdir": "unnamed", **found.ours}
    if not {"data", "prompts"} & set(filled):
        filled["prompts" if found.stage == "dmd" else "data"] = "unnamed"
    check(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), filled)), 1)


def _read(*files: Path) -> Settings:
    """Later files over earlier ones, with what they take from each other filled in."""
    merged = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files)), resolve=True)
    if not isinstance(merged, dict):
        raise ValueError("is no mapping of settings")
    return {str(key): value for key, value in merged.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser(prog="python -m train.import_config", description=str(__doc__).splitlines()[0])
    parser.add_argument("file", type=Path, help="a configuration of Self-Forcing, Self-Forcing-Plus or CausVid")
    parser.add_argument("--ignore", default="", metavar="KEY[,KEY]", help="keys to go without, which may be unknown")
    options = parser.parse_args(argv)
    ignored, notes = [key for key in options.ignore.split(",") if key], []
    try:
        defaults = options.file.with_name("default_config.yaml")
        if defaults.is_file() and defaults.resolve() != options.file.resolve():
            theirs = _read(defaults, options.file)
            notes.append(f"read with {defaults}, as the reference does")
        else:
            theirs = _read(options.file)
        found = translate(theirs, ignored)
    except Exception as error:  # a YAML reader that is fed anything else may raise anything
        print(f"train.import_config: {options.file}: " + " ".join(str(error).split())[:600], file=sys.stderr)
        return 2
    for reason, keys in found.unused.items():
        print(f"no use for: {', '.join(keys)} ({reason})", file=sys.stderr)
    for note in (*notes, *found.notes):
        print(f"note: {note}", file=sys.stderr)
    head = f"# For python -m train.{found.stage} config=THIS_FILE logdir=FOLDER; from {options.file.name}\n"
    try:
        print_result(head + dump(found.ours).rstrip("\n"))
    except ValueError as error:
        return mistake("train.import_config", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
