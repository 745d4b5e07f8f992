"""A configuration of the reference to one of ours: python -m train.import_config THEIRS.yaml > ours.yaml

Reads those of Self-Forcing, Self-Forcing-Plus, CausVid and what keeps their keys. The translation goes to standard
output, with the command that takes it; what had no use, and what is other than it may seem, to standard error. A key
that is missing has the reference's default, or that of a default_config.yaml beside the file. A key or value that
would change what is trained and has no counterpart here is refused by name. Where we differ from the reference on
purpose (noise in the training context, sigma by table), our default is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_core.atomic import print_result
from selfforcing_core.generate.cli import Parser
from selfforcing_core.geometry import SPATIAL_FACTOR
from selfforcing_core.schedule import TIMESTEPS, shift_sigma
from train import diffusion, dmd, ode
from train.args import DiffusionArgs, DmdArgs, OdeArgs, dump, mistake
from train.import_distillation import FRAMES, note_size, translate_betas, translate_distillation
from train.reference_config import (
    CLASSES,
    LARGE,
    SMALL,
    ReferenceConfig,
    Settings,
    as_count,
    as_number,
    as_numbers,
    as_switch,
    as_text,
    network_file,
    read_config,
)
from train.reference_keys import Translation, leave_rest

NEVER = 1_000_000_000  # a step that no run reaches
CHANNELS = 16  # of a Wan 2.1 latent
# Settings and check of each of our stages, and which one each trainer of the reference becomes.
STAGES: dict[str, tuple[type[Any], Callable[[Any, int], None]]] = {
    "dmd": (DmdArgs, dmd.check),
    "ode": (OdeArgs, ode.check),
    "diffusion": (DiffusionArgs, diffusion.check),
}
TRAINERS = {"score_distillation": "dmd", "gan": "dmd", "ode": "ode", "diffusion": "diffusion"}
TEXT_ENCODER = "models/umt5/models_t5_umt5-xxl-enc-bf16.pth"


def translate(values: Settings, ignored: Sequence[str] = ()) -> Translation:
    """Translate a configuration to our settings, with what is to be said of them.

    ignored: keys to go without. Raises ValueError for whatever ours cannot take, by key and value.
    """
    if unknown := [key for key in ignored if key not in values]:
        raise ValueError(f"--ignore {','.join(unknown)}: the file has no such key")
    values = {key: value for key, value in values.items() if key not in ignored}
    reference, is_causvid = ReferenceConfig(values), _is_causvid(values)
    stage = _stage_of(reference, is_causvid)
    translation = Translation(stage)
    if ignored:
        translation.notes.append(f"ignored as asked: {', '.join(ignored)}")
    _translate_shared(reference, translation, is_causvid)
    if stage == "dmd":
        translate_distillation(reference, translation, is_causvid=is_causvid)
    else:
        _translate_clips(reference, translation)
    leave_rest(reference, translation)
    _check(translation)
    if reference.missing:
        names = ", ".join(reference.missing)
        translation.notes.append(f"not in the file, and without a default of the reference, so that ours hold: {names}")
    translation.notes.append(
        "the reference never stops and ours does after max_steps; its readmes say 600 for 1.3B, 3000 for 14B and 1000 "
        "for image-to-video"
    )
    return translation


def _is_causvid(values: Settings) -> bool:
    # CausVid has one trainer for each loss, which is named by the script that is started, not by a key.
    return "trainer" not in values and bool({"distillation_loss", "model_name"} & set(values))


def _stage_of(reference: ReferenceConfig, is_causvid: bool) -> str:
    """Decide which of our commands this is for.

    Raises ValueError for trainers and losses of which ours have no counterpart.
    """
    loss = reference.take("distillation_loss" if is_causvid else "distribution_loss", as_text)
    if is_causvid:
        if loss not in (None, "dmd", "ode"):
            raise ValueError(f"distillation_loss: {loss!r} is none of ours; dmd and ode are")
        return "ode" if loss == "ode" else "dmd"
    trainer = reference.take("trainer", as_text, "ode" if loss == "ode" else "score_distillation")
    if trainer not in TRAINERS:
        raise ValueError(f"trainer: {trainer!r} is none of ours; {', '.join(TRAINERS)} are")
    stage = TRAINERS[trainer]
    losses = {"score_distillation": (None, "dmd", "sid"), "ode": (None, "ode")}.get(trainer)
    if loss == "causvid":
        raise ValueError("distribution_loss: 'causvid' trains on noised clips, train.dmd on the student's own rollouts")
    if losses and loss not in losses:  # the trainers gan and diffusion read no loss
        names = ", ".join(name for name in losses if name)
        raise ValueError(f"distribution_loss: {loss!r} is none of ours with trainer {trainer}; {names} are")
    return stage


def _translate_shared(reference: ReferenceConfig, translation: Translation, is_causvid: bool) -> None:
    """Translate what all stages have."""
    settings = translation.settings
    settings["text_encoder"] = TEXT_ENCODER
    for key, name in (("seed", "seed"), ("log_iters", "save_every")):  # log_iters counts the steps between checkpoints
        if (value := reference.need(key, as_count)) is not None:
            settings[name] = value
    if settings.get("seed") == 0:
        translation.notes.append("seed 0 is a random one in the reference, here it is the number")
    for key, name, kind in (
        ("gradient_checkpointing", "activation_checkpointing", as_switch),
        ("batch_size", "micro_batch", as_count),  # of one process and one part, in the reference
        ("text_encoder_cpu_offload", "text_encoder_offload", as_switch),
    ):
        if (value := reference.take(key, kind)) is not None:
            settings[name] = value
    total = reference.take("total_batch_size", as_count)
    if total is None:
        translation.notes.append(
            "the reference's batch is batch_size on each of its processes; ours is 64 clips, set batch_size"
        )
    else:
        settings["batch_size"] = total
    if (is_mixed := reference.take("mixed_precision", as_switch)) is not None:
        settings["dtype"] = "bfloat16" if is_mixed else "float32"  # of the computation; weights are float32 in both
    if reference.values.get("sharding_strategy") == "no_shard":
        reference.untaken.discard("sharding_strategy")
        settings["shard_group"] = 1
    settings["weight_decay"] = reference.take("weight_decay", as_number, 0.01)
    settings["chunk"] = _chunk(reference, translation, is_causvid)
    if reference.take("independent_first_frame", as_switch, False):
        settings["independent_first_frame"] = True
    translate_betas(reference, translation, "betas", "")
    _translate_student(reference, translation, is_causvid)
    if translation.stage != "ode":
        _translate_shape(reference, translation)
        _translate_average(reference, translation)
    else:
        settings["ema_start"] = NEVER  # the reference's trainer of trajectories keeps no average


def _chunk(reference: ReferenceConfig, translation: Translation, is_causvid: bool) -> int:
    """Return the chunk in latent frames; 0: a bidirectional student."""
    count = reference.take("num_frame_per_block", as_count, 1)
    kind, task = reference.take("generator_type", as_text), reference.take("generator_task", as_text)
    for key, value, choices in (
        ("generator_type", kind, ("causal", "bidirectional")),
        ("generator_task", task, ("causal_video", "bidirectional_video")),
    ):
        if value not in (None, *choices):
            raise ValueError(f"{key}: {value!r} is none of ours; {' and '.join(choices)} are")
    if kind != "bidirectional" and not (is_causvid and task == "bidirectional_video"):
        return count
    if "num_frame_per_block" in reference:
        translation.leave("num_frame_per_block", "a bidirectional generator has no blocks")
    return 0


def _translate_student(reference: ReferenceConfig, translation: Translation, is_causvid: bool) -> None:
    """Translate where the trained network starts: a checkpoint if there is one; the name beside it tells its size."""
    settings, stage = translation.settings, translation.stage
    # A generator_type is Self-Forcing-Plus's, where networks are large unless they are named.
    default = LARGE if "generator_type" in reference.values and stage == "dmd" else SMALL
    class_name = reference.take("model_name", as_text) if is_causvid else None
    if class_name is not None and class_name.lower() not in CLASSES:
        raise ValueError(f"model_name: {class_name!r} is none of ours; {', '.join(CLASSES[:2])} are")
    options = dict(reference.take("model_kwargs", dict, {}))
    names = [name for name in (options.pop("model_name", None), reference.take("generator_name", as_text)) if name]
    if len(set(names)) > 1:
        raise ValueError(f"generator_name: {names[1]!r} and model_kwargs.model_name {names[0]!r} differ; leave one out")
    name = names[0] if names else default
    # An empty generator_ckpt is none.
    checkpoint = reference.take("generator_ckpt", lambda value: value and as_text(value))
    settings["student" if stage == "dmd" else "network"] = checkpoint or network_file(name)
    if checkpoint:
        settings["weights"] = "raw"  # the reference takes those that were trained, not their average
    note_size(translation, "size", "the student's name", name)
    settings["shift"] = as_number(options.pop("timestep_shift", 8.0))  # CausVid's is always 8
    if (window := options.pop("local_attn_size", -1)) != -1:
        settings["window"] = as_count(window)
    if sink := options.pop("sink_size", 0):
        if stage != "dmd":
            raise ValueError(f"model_kwargs.sink_size: {sink!r} has no counterpart in train.{stage}")
        settings["sink"] = as_count(sink)
    if options:
        raise ValueError(f"model_kwargs: {', '.join(sorted(options))} inside is unknown")


def _translate_shape(reference: ReferenceConfig, translation: Translation) -> None:
    """Translate [batch, latent frames, latent channels, latent height, latent width] to frames and pixels."""
    shape = reference.need("image_or_video_shape", as_numbers)
    if shape is None:
        return
    if len(shape) != 5 or shape[2] != CHANNELS:
        raise ValueError(
            f"image_or_video_shape: {shape} is not [1, frames, {CHANNELS}, height, width] of a Wan 2.1 latent"
        )
    frames, height, width = (int(shape[index]) for index in (1, 3, 4))
    translation.settings |= {
        "latent_frames": frames,
        "height": height * SPATIAL_FACTOR,
        "width": width * SPATIAL_FACTOR,
    }
    if frames != FRAMES and translation.stage == "dmd" and translation.settings["chunk"]:
        translation.notes.append(
            f"image_or_video_shape has {frames} frames, which ours trains on; the reference's causal rollouts have "
            f"{FRAMES} all the same"
        )


def _translate_average(reference: ReferenceConfig, translation: Translation) -> None:
    """Translate the average of the weights, which the reference keeps only if its decay is set."""
    decay, start = reference.take("ema_weight", as_number, 0.0), reference.take("ema_start_step", as_count, 0)
    translation.settings |= {"ema_decay": decay, "ema_start": start} if decay > 0 else {"ema_start": NEVER}


def _translate_clips(reference: ReferenceConfig, translation: Translation) -> None:
    """Translate keys of the stages before the distillation."""
    settings = translation.settings
    if (lr := reference.need("lr", as_number)) is not None:
        settings["lr"] = lr
    if (path := reference.need("data_path", as_text)) is not None:
        settings["data"] = path
    is_image = reference.take("i2v", as_switch, False)
    if translation.stage == "diffusion":
        if is_image:
            raise ValueError("i2v: true has no counterpart in train.diffusion; the first frame is given in train.dmd")
        settings["forcing"] = "teacher" if reference.take("teacher_forcing", as_switch, False) else "diffusion"
        _translate_sampling(reference, translation)
        return
    settings["first_frame_clean"] = is_image
    is_warped = reference.take("warp_denoising_step", as_switch, False)
    steps = reference.need("denoising_step_list", as_numbers)
    if steps is not None:
        # Our list of a trajectory's timesteps holds them as its states have them, behind the shift.
        settings["timesteps"] = [_warped(step, settings["shift"]) for step in steps] if is_warped else steps
        if steps[-1:] != [0.0]:
            translation.notes.append(
                "the list does not end with 0, so that a trajectory's last state is only its target"
            )


def _translate_sampling(reference: ReferenceConfig, translation: Translation) -> None:
    """Translate how the reference's trainer of flow matching samples its videos.

    Its guidance is the usual one there, as ours, unlike that of the distillation.
    """
    for key, name, kind in (
        ("guidance_scale", "guidance", as_number),
        ("negative_prompt", "negative_prompt", as_text),
    ):
        if (value := reference.take(key, kind)) is not None:
            translation.settings[name] = value
    shift, own = reference.take("timestep_shift", as_number), translation.settings["shift"]
    if shift not in (None, own):
        translation.notes.append(
            f"timestep_shift {shift:g} is of the reference's videos alone; ours have shift {own:g}"
        )


def _warped(step: float, shift: float) -> float:
    return TIMESTEPS * float(shift_sigma(step / TIMESTEPS, shift))


def _check(translation: Translation) -> None:
    """Raise ValueError where the stage itself would refuse the result."""
    # What is printed is to run as it is: a combination that ours refuses fails here, not on 64 GPUs.
    kind, check = STAGES[translation.stage]
    filled: Settings = {"logdir": "unnamed", **translation.settings}
    if not {"data", "prompts"} & set(filled):  # left to the user, which is said and no mistake
        filled["prompts" if translation.stage == "dmd" else "data"] = "unnamed"
    check(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), filled)), 1)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(prog="python -m train.import_config", description=str(__doc__).splitlines()[0])
    parser.add_argument("file", type=Path, help="a configuration of Self-Forcing, Self-Forcing-Plus or CausVid")
    parser.add_argument("--ignore", default="", metavar="KEY[,KEY]", help="keys to go without, which may be unknown")
    options = parser.parse_args(argv)
    ignored, notes = [key for key in options.ignore.split(",") if key], []
    try:
        # The reference lays every configuration over this file.
        defaults = options.file.with_name("default_config.yaml")
        if defaults.is_file() and defaults.resolve() != options.file.resolve():
            values = read_config(defaults, options.file)
            notes.append(f"read with {defaults}, as the reference does")
        else:
            values = read_config(options.file)
        translation = translate(values, ignored)
    except Exception as error:  # a YAML reader that is fed anything else may raise anything
        print(f"train.import_config: {options.file}: " + " ".join(str(error).split())[:600], file=sys.stderr)
        return 2
    for reason, keys in translation.unused.items():
        print(f"no use for: {', '.join(keys)} ({reason})", file=sys.stderr)
    for note in (*notes, *translation.notes):
        print(f"note: {note}", file=sys.stderr)
    head = f"# For python -m train.{translation.stage} config=THIS_FILE logdir=FOLDER; from {options.file.name}\n"
    try:
        print_result(head + dump(translation.settings).rstrip("\n"))
    except ValueError as error:
        return mistake("train.import_config", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
