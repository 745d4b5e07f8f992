"""A configuration of the reference to one of ours: python -m train.import_config THEIRS.yaml > ours.yaml

The translation goes to standard output; every key it had no use for is named on standard error. Where we differ from
the reference on purpose (noise in the training context, sigma by table), our default is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_core.cli import Parser
from selfforcing_core.geometry import SPATIAL_FACTOR
from train.args import DmdArgs

Found = dict[str, Any]
WINDOW = 21  # latent frames that the reference judges


def _network(key: str) -> Callable[[Any], Found]:
    """A model's name in the reference is a folder below wan_models/; ours is what `download` makes of it."""
    return lambda name: {key: f"models/{str(name).lower()}"}


def _shape(shape: Any) -> Found:
    frames, _, height, width = list(shape)[1:]
    return {"latent_frames": frames, "height": height * SPATIAL_FACTOR, "width": width * SPATIAL_FACTOR}


def _as(key: str) -> Callable[[Any], Found]:
    return lambda value: {key: value}


def _model(options: Found) -> Found:
    """What the reference gives to its model's constructor."""
    names = {"timestep_shift": "shift", "local_attn_size": "window", "sink_size": "sink"}
    unknown = sorted(set(options) - set(names) - {"model_name"})
    if unknown:
        raise ValueError(f"{', '.join(unknown)} inside is unknown")
    network = _network("student")(options["model_name"]) if "model_name" in options else {}
    return {**network, **{names[key]: value for key, value in options.items() if key in names}}


KEYS: dict[str, Callable[[Any], Found]] = {
    "generator_ckpt": _as("student"),
    "generator_name": _network("student"),
    "real_name": _network("teacher"),
    "fake_name": _network("critic"),
    "data_path": _as("prompts"),
    "negative_prompt": _as("negative_prompt"),
    "denoising_step_list": lambda steps: {"steps": [float(step) for step in steps if step]},
    "timestep_shift": lambda shift: {"shift": float(shift), "score_shift": float(shift)},
    "guidance_scale": lambda scale: {"guidance": float(scale) + 1},  # it counts from the conditional prediction
    "distribution_loss": _as("score"),
    "sid_alpha": _as("sid_alpha"),
    "lr": _as("lr"),
    "lr_critic": _as("lr_critic"),
    "weight_decay": _as("weight_decay"),
    "max_grad_norm_generator": _as("max_grad_norm"),
    "total_batch_size": _as("batch_size"),
    "batch_size": _as("micro_batch"),
    "ema_weight": _as("ema_decay"),
    "ema_start_step": _as("ema_start"),
    "log_iters": _as("save_every"),  # there the interval of checkpoints
    "dfake_gen_update_ratio": _as("critic_per_student"),
    "image_or_video_shape": _shape,
    "num_frame_per_block": _as("chunk"),
    "same_step_across_blocks": lambda same: {"exit_per_chunk": not same},
    "gradient_checkpointing": _as("activation_checkpointing"),
    "mixed_precision": lambda on: {"dtype": "bfloat16" if on else "float32"},
    "seed": _as("seed"),
    "text_encoder_cpu_offload": _as("text_encoder_offload"),
    "num_training_frames": lambda frames: {"max_latent_frames": int(frames)} if int(frames) > WINDOW else {},
    "model_kwargs": lambda options: _model(dict(options)),
    "trainer": lambda kind: {"score": "gan"} if kind == "gan" else {},
    "gan_g_weight": _as("gan_weight"),
    "gan_d_weight": _as("gan_critic_weight"),
    "r1_weight": _as("gan_r1"),
    "r2_weight": _as("gan_r2"),
    "r1_sigma": _as("gan_sigma"),
    "relativistic_discriminator": _as("gan_relativistic"),
    "concat_time_embeddings": _as("gan_time"),
    "discriminator_warmup_steps": _as("critic_warmup"),
    "discriminator_lr_multiplier": _as("lr_heads"),
    "gen_lr": _as("lr"),
    "critic_lr": _as("lr_critic"),
}


def translate(theirs: Found) -> tuple[Found, list[str]]:
    """Our settings, and the keys that had no use. Raises ValueError for values that ours cannot take."""
    ours: Found = {}
    for key, rule in KEYS.items():
        if key in theirs:
            try:
                ours |= rule(theirs[key])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{key}: {theirs[key]!r} cannot be translated ({error})") from error
    used = set(KEYS)
    if "beta1" in theirs or "beta2" in theirs:
        ours["betas"] = [float(theirs.get("beta1", 0.0)), float(theirs.get("beta2", 0.999))]
        used |= {"beta1", "beta2"}
    if theirs.get("generator_type") == "bidirectional":
        ours["chunk"] = 0
        used.add("generator_type")
    OmegaConf.merge(OmegaConf.structured(DmdArgs), ours)  # raises where a value has the wrong type
    return ours, sorted(set(theirs) - used)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m train.import_config", description=str(__doc__).splitlines()[0])
    parser.add_argument("file", type=Path, help="a configuration of Self-Forcing or Self-Forcing-Plus")
    options = parser.parse_args(argv)
    try:
        theirs = OmegaConf.to_container(OmegaConf.load(options.file))
        if not isinstance(theirs, dict):
            raise ValueError("is no mapping of settings")
        ours, unused = translate({str(key): value for key, value in theirs.items()})
    except Exception as error:  # a YAML reader that is fed anything else may raise anything
        print(f"train.import_config: {options.file}: " + " ".join(str(error).split())[:300], file=sys.stderr)
        return 2
    print(OmegaConf.to_yaml(OmegaConf.create(ours)), end="")
    if unused:
        print(f"no use for: {', '.join(unused)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
