"""The keys of a reference's distillation (its trainers score_distillation and gan) as settings of `train.dmd`."""

from __future__ import annotations

from train.reference_config import (
    LARGE,
    SMALL,
    ReferenceConfig,
    as_count,
    as_number,
    as_numbers,
    as_switch,
    as_text,
    network_file,
    size_of_name,
)
from train.reference_keys import Translation

FRAMES = 21  # latent frames that teacher and critic of the reference judge, whatever the student's clip is long
VAE = "models/vae/Wan2.1_VAE.pth"
CLIP = "models/clip/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
PICTURE = (480, 832)  # height and width of the pictures in the reference's databases, which do not record it


def translate_distillation(reference: ReferenceConfig, translation: Translation, *, is_causvid: bool) -> None:
    """Translate what only the distillation has; what all stages share is translated before."""
    settings, is_gan = translation.settings, reference.values.get("trainer") == "gan"
    loss = "gan" if is_gan else reference.values.get("distribution_loss") or "dmd"
    settings["score"] = loss
    if is_causvid:
        translation.notes.append(
            "CausVid's student becomes one that train.dmd trains on its own rollouts (Self Forcing)"
        )
    _translate_scores(reference, translation, is_causvid)
    _translate_steps(reference, translation, is_causvid)
    _translate_guidance(reference, translation, is_gan)
    _translate_optimisers(reference, translation, is_gan, is_causvid)
    _translate_data(reference, translation, is_gan, is_causvid)
    if is_gan:
        _translate_adversarial(reference, translation)
    alpha = reference.take("sid_alpha", as_number)
    if loss == "sid":
        settings["sid_alpha"] = 1.0 if alpha is None else alpha
    elif alpha is not None:
        translation.leave("sid_alpha", "is for distribution_loss: sid; say score=sid if that is meant")


def translate_betas(reference: ReferenceConfig, translation: Translation, name: str, suffix: str) -> None:
    """Translate both betas of one AdamW; the keys of the critic's have a suffix."""
    betas = [reference.need(f"{beta}{suffix}", as_number) for beta in ("beta1", "beta2")]
    if None not in betas:
        translation.settings[name] = betas
    elif betas != [None, None]:
        raise ValueError(f"beta1{suffix} and beta2{suffix}: one of them is missing")


def note_size(translation: Translation, key: str, role: str, name: str) -> None:
    """Set the size that a network's name tells, or note that it tells none: only the plan reads it."""
    if size := size_of_name(name):
        translation.settings[key] = size
    else:
        translation.notes.append(f"{role} {name!r} does not tell its size, which the plan wants: set {key}")


def _translate_scores(reference: ReferenceConfig, translation: Translation, is_causvid: bool) -> None:
    """Translate the names of teacher (real score) and critic (fake score)."""
    is_plus = "generator_type" in reference.values  # a key of Self-Forcing-Plus, whose default networks are large
    for key, role in (("real_name", "teacher"), ("fake_name", "critic")):
        name = reference.take(key, as_text, LARGE if is_plus and not is_causvid else SMALL)
        translation.settings[role] = network_file(name)
        note_size(translation, f"{role}_size", key, name)


def _translate_steps(reference: ReferenceConfig, translation: Translation, is_causvid: bool) -> None:
    """Translate the student's steps, where a chunk ends, and the noise levels at which its clips are compared."""
    settings = translation.settings
    steps = reference.need("denoising_step_list", as_numbers)
    if steps is not None:
        # The reference drops a 0 at the end of the list: nothing is denoised from there.
        settings["steps"] = steps[:-1] if steps[-1:] == [0.0] else steps
    first = reference.take("denoising_step_list_first_chunk", lambda value: value and as_numbers(value))
    if first:  # of Causal-Forcing++; null is none
        settings["first_chunk_steps"] = first[:-1] if first[-1:] == [0.0] else first
    settings["score_shift"] = max(1.0, reference.take("timestep_shift", as_number, 1.0))  # below 1 it does not shift
    is_per_chunk = not reference.take("same_step_across_blocks", as_switch, True)
    is_last = reference.take("last_step_only", as_switch, False)
    is_ranged = False
    for key, default in (("ts_schedule", not is_causvid), ("ts_schedule_max", False)):
        if not reference.take(key, as_switch, default):
            continue
        if is_per_chunk:  # chunks that end at different steps have no common range
            translation.leave(key, "has no effect with same_step_across_blocks: false")
            continue
        settings[key] = is_ranged = True
        if key not in reference:
            translation.notes.append(f"{key} is not in the file and on by default, as in the reference")
    if is_per_chunk and is_last:
        translation.leave("same_step_across_blocks", "has no effect with last_step_only: true")
    settings |= {"exit_per_chunk": is_per_chunk and not is_last, "last_step_only": is_last}
    lowest = reference.take("min_score_timestep", as_number, 0.0)
    if lowest and settings.get("ts_schedule"):
        translation.leave("min_score_timestep", "has no effect with ts_schedule: true")
    elif lowest:
        settings["min_score_timestep"] = lowest
    if not reference.take("warp_denoising_step", as_switch, False):
        settings["warp"] = False
        # Without a range nothing else needs the shift, and 1 says the same to whatever reads steps and shift alone.
        if not is_ranged:
            settings["shift"] = 1.0
    if noise := reference.take("context_noise", as_number, 0.0):
        settings["context_noise"] = noise
    longest = reference.take("num_training_frames", as_count, FRAMES)
    frames = settings.get("latent_frames", FRAMES)
    if longest < min(frames, FRAMES):
        raise ValueError(f"num_training_frames: {longest} is less than the {FRAMES} that the reference judges")
    if longest > max(frames, FRAMES):
        # The window at the end of a long clip has to begin like a video, which takes the VAE.
        settings |= {"max_latent_frames": longest, "vae": VAE}


def _translate_guidance(reference: ReferenceConfig, translation: Translation, is_gan: bool) -> None:
    """Translate the guidance of teacher and critic.

    The reference counts from the conditional prediction, cond + w (cond - uncond); ours is the usual
    uncond + g (cond - uncond), so that g = w + 1.
    """
    plain, real = reference.take("guidance_scale", as_number), reference.take("real_guidance_scale", as_number)
    fake = reference.take("fake_guidance_scale", as_number, 0.0)
    present = [key for key in ("guidance_scale", "real_guidance_scale", "fake_guidance_scale") if key in reference]
    if is_gan:
        for key in present:
            translation.leave(key, "trainer: gan has no teacher")
        return
    if real is not None and plain is not None:
        translation.leave("guidance_scale", "real_guidance_scale holds")
    elif real is None and "fake_guidance_scale" in reference:
        translation.leave("fake_guidance_scale", "counts beside real_guidance_scale alone")
        fake = 0.0
    elif "fake_guidance_scale" in reference and translation.settings["score"] == "sid":
        translation.leave("fake_guidance_scale", "distribution_loss: sid guides its teacher alone")
        fake = 0.0
    if (scale := plain if real is None else real) is None:
        reference.missing.append("guidance_scale")
    else:
        translation.settings["guidance"] = scale + 1
    if fake:
        translation.settings["guidance_critic"] = fake + 1


def _translate_optimisers(reference: ReferenceConfig, translation: Translation, is_gan: bool, is_causvid: bool) -> None:
    """Translate learning rates, betas, gradient norms, and how often the student learns."""
    settings = translation.settings
    lr = reference.need("gen_lr" if is_gan else "lr", as_number)
    lr_critic = reference.take("critic_lr" if is_gan else "lr_critic", as_number, lr)  # the student's by default
    settings |= {key: value for key, value in (("lr", lr), ("lr_critic", lr_critic)) if value is not None}
    if not is_causvid:  # whose one pair of betas and one norm are for both
        translate_betas(reference, translation, "betas_critic", "_critic")
    if (norm := reference.take("max_grad_norm" if is_causvid else "max_grad_norm_generator", as_number)) is not None:
        settings["max_grad_norm"] = norm
    if not is_causvid and (norm is not None or "max_grad_norm_critic" in reference):
        # The critic's norm is 10 by default, and not the student's, which is what ours would fall back on.
        settings["max_grad_norm_critic"] = reference.take("max_grad_norm_critic", as_number, 10.0)
    if (ratio := reference.need("dfake_gen_update_ratio", as_count)) is not None:
        settings["critic_per_student"] = ratio
    if (prompt := reference.need("negative_prompt", as_text)) is not None:
        settings["negative_prompt"] = prompt


def _translate_data(reference: ReferenceConfig, translation: Translation, is_gan: bool, is_causvid: bool) -> None:
    """Translate prompts, or a database, and where pictures come from."""
    settings, is_image = translation.settings, reference.take("i2v", as_switch, False)
    path, kind = reference.need("data_path", as_text), reference.take("data_type", as_text)
    if kind not in (None, "text_folder", "text_file"):
        raise ValueError(f"data_type: {kind!r} is none of ours; text_folder and text_file are")
    is_text = path is not None and path.endswith(".txt")
    if is_text and (is_image or is_gan):
        need = "i2v: true" if is_image else "trainer: gan"
        raise ValueError(f"data_path: {path!r} is a text file, and {need} needs a database (train.make_lmdb)")
    if path is not None:
        is_database = is_image or is_gan or (is_causvid and not is_text)
        settings["data" if is_database else "prompts"] = path
    if kind and is_image:
        translation.leave("data_type", "i2v: true always reads a database")
    # Two ways to begin with a picture: a network with channels for it, or a causal one given a finished first frame.
    has_image_channels = settings.get("size") == "i2v-14b"
    if has_image_channels and not is_image:
        raise ValueError("i2v: false with an image-to-video generator, which needs pictures; set i2v: true")
    if has_image_channels:
        settings |= {"vae": VAE, "clip": CLIP, "image_height": PICTURE[0], "image_width": PICTURE[1]}
    elif is_image:
        settings["first_frame"] = "clips"


def _translate_adversarial(reference: ReferenceConfig, translation: Translation) -> None:
    """Translate what only trainer: gan reads. Raises ValueError for values of which ours has no counterpart."""
    settings, values = translation.settings, reference.values
    translation.notes.append(
        "the reference's trainer of trainer: gan does not run as published; ours is train.dmd's score=gan"
    )
    for key, name, kind in (
        ("gan_g_weight", "gan_weight", as_number),
        ("gan_d_weight", "gan_critic_weight", as_number),
        ("r1_weight", "gan_r1", as_number),
        ("r2_weight", "gan_r2", as_number),
        ("r1_sigma", "gan_sigma", as_number),
        ("relativistic_discriminator", "gan_relativistic", as_switch),
        ("concat_time_embeddings", "gan_time", as_switch),
        ("discriminator_warmup_steps", "critic_warmup", as_count),
        ("discriminator_lr_multiplier", "lr_heads", as_number),
    ):
        if (value := reference.take(key, kind)) is not None:
            settings[name] = value
    # Keys with one value that ours can mean.
    only_values = {
        "r2_sigma": settings.get("gan_sigma", 0.01),  # ours has one noise for both penalties
        "loss_scale": 1.0,
        "num_class": 1,
        "critic_timestep_shift": settings["score_shift"],
        **dict.fromkeys(("load", "force_start_w_ema", "force_reset_zero_step"), False),
        **dict.fromkeys(("force_reinit_ema", "skip_optimizer_scheduler"), False),
        **{key: values.get(key) for key in ("lr", "lr_critic")},  # any: trainer: gan does not read them
    }
    for key, only in only_values.items():
        if key not in reference:
            continue
        if values[key] != only:
            raise ValueError(f"{key}: {values[key]!r} has no counterpart in ours, which is the one of {only!r}")
        reference.untaken.discard(key)
        reason = "trainer: gan reads gen_lr and critic_lr" if key.startswith("lr") else "ours is the same"
        translation.leave(key, reason)
