"""What became of each key of a reference's configuration: a setting, nothing for a reason, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train.reference_config import ReferenceConfig, Settings

_LOGGING = "wandb=true logs; the key comes from the environment"
_PLACE = "says where weights lie, which changes no number; shard_group=8 is the hybrid form"
_UNREAD = "no code of the reference reads it"
_OURS = "logdir=FOLDER names ours"
_SAME = "ours is the same"
ANY: tuple[Any, ...] = ()
_WRAPPED = ("generator", "real_score", "fake_score", "text_encoder", "image_encoder")
_DEMO = ("ckpt_step", "prompt_name", "prompt_path", "eval_first_n", "num_samples", "height", "width", "num_frames")

# Keys that change nothing, why, and the values for which that is so (ANY: all). With any other value a key is refused:
# it would change what is trained.
NO_OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("wandb_host", "wandb_key", "wandb_entity", "wandb_project", "wandb_name"), (_LOGGING, ANY)),
    **dict.fromkeys(("wandb_save_dir", "disable_wandb"), (_LOGGING, ANY)),
    **dict.fromkeys([f"{role}_fsdp_wrap_strategy" for role in _WRAPPED], (_PLACE, ANY)),
    "image_encoder_cpu_offload": (_PLACE, ANY),
    "sharding_strategy": (_PLACE, ("full", "hybrid_full", "hybrid_zero2")),
    "gc_interval": ("is about the interpreter's memory", ANY),
    **dict.fromkeys(_DEMO, (_UNREAD, ANY)),
    **dict.fromkeys(("output_path", "logdir", "config_name", "no_save", "no_visualize"), (_OURS, ANY)),
    "causal": (_UNREAD, (True,)),
    "num_train_timestep": (_SAME, (1000,)),
    "denoising_loss_type": (_SAME, ("flow",)),
    "load_raw_video": ("ours are latents, too", (False,)),
    "real_task_type": (_SAME, ("bidirectional_video",)),
    "fake_task_type": (_SAME, ("bidirectional_video",)),
    "generator_grad": ("ours trains the same", ({"model": True},)),
    "real_score_grad": ("ours trains the same", ({"model": False},)),
    "fake_score_grad": ("ours trains the same", ({"model": True},)),
    "backward_simulation": ("the student's own rollout is what ours trains on", (True,)),
    "teacher_forcing": ("is of another stage", (False,)),
    "noise_augmentation_max_timestep": ("ours adds no noise to the clean context", (0,)),
    "max_pair": ("ours takes all rows", (100_000_000,)),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), ("batch_size counts all parts", (1,))),
}

# Keys that only trainer: gan reads.
ADVERSARIAL = (
    *("gen_lr", "critic_lr", "gan_g_weight", "gan_d_weight", "r1_weight", "r2_weight", "r1_sigma", "r2_sigma"),
    *("relativistic_discriminator", "concat_time_embeddings", "critic_timestep_shift", "discriminator_warmup_steps"),
    *("discriminator_lr_multiplier", "num_class", "loss_scale", "load", "force_start_w_ema", "force_reset_zero_step"),
    *("force_reinit_ema", "skip_optimizer_scheduler"),
)
# Keys of the distillation that the reference's trainers of the other stages do not read.
DISTILLATION = (
    *("real_name", "fake_name", "guidance_scale", "real_guidance_scale", "fake_guidance_scale", "lr_critic"),
    *("beta1_critic", "beta2_critic", "ts_schedule", "ts_schedule_max", "min_score_timestep", "timestep_shift"),
    *("denoising_loss_type", "dfake_gen_update_ratio", "num_training_frames", "same_step_across_blocks"),
    *("last_step_only", "context_noise", "sid_alpha", "negative_prompt", "discriminator_lr_multiplier", "data_type"),
    *("max_grad_norm_generator", "max_grad_norm_critic", "denoising_step_list_first_chunk", *ADVERSARIAL),
)
SAMPLED = ("guidance_scale", "timestep_shift", "negative_prompt")  # of its videos: trainer: diffusion makes some
# By our stage, what the reference's trainer of the same name does not read, so that it changes nothing.
UNREAD = {
    "ode": (*DISTILLATION, "ema_weight", "ema_start_step", "image_or_video_shape", "teacher_forcing"),
    "diffusion": (
        *(key for key in DISTILLATION if key not in SAMPLED),
        *("denoising_step_list", "warp_denoising_step", "distribution_loss"),
    ),
}
# Why some keys of forks are refused.
REFUSED = {
    "boundary_step": "Wan 2.2's halves are not trained here",
    "training_target": "Wan 2.2's halves are not trained here",
    "backward_simulation": "it trains on noised clips of a database, train.dmd on the student's own rollouts",
    "load_raw_video": "make latents with train.make_latents and train.make_lmdb",
}


@dataclass
class Translation:
    """What a configuration becomes."""

    stage: str  # dmd, ode or diffusion
    settings: Settings = field(default_factory=dict)  # of that stage, by our names
    unused: dict[str, list[str]] = field(default_factory=dict)  # keys without use, by reason
    notes: list[str] = field(default_factory=list)  # what is other than it may seem

    def leave(self, key: str, reason: str) -> None:
        """Record that a key has no use, and why."""
        self.unused.setdefault(reason, []).append(key)


def leave_rest(reference: ReferenceConfig, translation: Translation) -> None:
    """Record of the keys that nobody took why they have no use. Raises ValueError for what may have one."""
    stage, is_gan = translation.stage, translation.settings.get("score") == "gan"
    unread = UNREAD.get(stage, () if is_gan else ADVERSARIAL)
    refused = []
    for key in [key for key in reference.values if key in reference.untaken]:  # in the order of the file
        value = reference.values[key]
        reason, harmless = NO_OPS.get(key, ("", None))
        if key in unread:
            translation.leave(
                key, f"the reference's trainer {reference.values.get('trainer') or stage} does not read it"
            )
        # Types are compared too: in Python True == 1 and 0 == False.
        elif harmless is ANY or (harmless and any(value == each and type(value) is type(each) for each in harmless)):
            translation.leave(key, reason)
        else:
            rule = "only " + ", ".join(map(str, harmless)) + " is ours" if harmless else "unknown"
            refused.append(f"{key}: {str(value)[:60]} ({REFUSED.get(key) or rule})")
    if refused:
        names = ",".join(entry.split(":", 1)[0] for entry in refused)
        raise ValueError(f"no translation of {'; '.join(refused)}. Leave out what does not matter: --ignore {names}")
