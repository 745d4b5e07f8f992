"""A configuration of the reference becomes one that means the same, or is refused by key and value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.weights.download import RELEASES
from train import import_config
from train.args import CONFIGS, DiffusionArgs, DmdArgs, OdeArgs, parse
from train.dmd import steps_of
from train.import_config import main, translate
from train.import_distillation import VAE
from train.reference_config import RELEASED
from train.reference_keys import ANY, NO_OPS

# configs/default_config.yaml of Self-Forcing, which its own configurations are laid over
DEFAULTS: dict[str, Any] = {
    "independent_first_frame": False,
    "warp_denoising_step": False,
    "weight_decay": 0.01,
    "same_step_across_blocks": True,
    "discriminator_lr_multiplier": 1.0,
    "last_step_only": False,
    "i2v": False,
    "num_training_frames": 21,
    "gc_interval": 100,
    "context_noise": 0,
    "causal": True,
    "ckpt_step": 0,
    "prompt_name": "MovieGenVideoBench",
    "prompt_path": "prompts/MovieGenVideoBench.txt",
    "eval_first_n": 64,
    "num_samples": 1,
    "height": 480,
    "width": 832,
    "num_frames": 81,
}
WRAPS = {f"{role}_fsdp_wrap_strategy": "size" for role in ("generator", "real_score", "fake_score", "text_encoder")}
WANDB = {f"wandb_{name}": name for name in ("host", "key", "entity", "project")}
DMD: dict[str, Any] = {
    **WRAPS,
    **WANDB,
    "generator_ckpt": "checkpoints/ode_init.pt",
    "real_name": "Wan2.1-T2V-14B",
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "ts_schedule": False,
    "num_train_timestep": 1000,
    "timestep_shift": 5.0,
    "guidance_scale": 3.0,
    "denoising_loss_type": "flow",
    "mixed_precision": True,
    "seed": 0,
    "sharding_strategy": "hybrid_full",
    "lr": 2.0e-6,
    "lr_critic": 4.0e-7,
    "beta1": 0.0,
    "beta2": 0.999,
    "beta1_critic": 0.0,
    "beta2_critic": 0.999,
    "data_path": "prompts/vidprom_filtered_extended.txt",
    "batch_size": 1,
    "ema_weight": 0.99,
    "ema_start_step": 200,
    "total_batch_size": 64,
    "log_iters": 50,
    "negative_prompt": "bad",
    "dfake_gen_update_ratio": 5,
    "image_or_video_shape": [1, 21, 16, 60, 104],
    "distribution_loss": "dmd",
    "trainer": "score_distillation",
    "gradient_checkpointing": True,
    "num_frame_per_block": 3,
    "load_raw_video": False,
    "model_kwargs": {"timestep_shift": 5.0},
}
SID = {**DMD, "real_name": "Wan2.1-T2V-1.3B", "lr_critic": 2.0e-6, "weight_decay": 0.0, "sid_alpha": 1.0}
PLUS: dict[str, Any] = {
    **{key: value for key, value in DMD.items() if key != "generator_ckpt"},
    "i2v": False,
    "fake_name": "Wan2.1-T2V-14B",
    "generator_type": "bidirectional",
    "generator_name": "Wan2.1-T2V-14B",
    "text_encoder_cpu_offload": False,
    "guidance_scale": 5.0,
    "sharding_strategy": "full",
    "data_type": "text_folder",
    "data_path": "prompts/accvideo/",
    "log_iters": 200,
}
PLUS_I2V = {
    **PLUS,
    "i2v": True,
    "guidance_scale": 6.0,
    "text_encoder_cpu_offload": True,
    "data_path": "/data/output_lmdb/",
    "image_encoder_fsdp_wrap_strategy": "size",
    "log_iters": 100,
    **dict.fromkeys(("real_name", "fake_name", "generator_name"), "Wan2.1-I2V-14B-480P"),
}
CAUSVID: dict[str, Any] = {
    **WRAPS,
    **WANDB,
    "model_name": "wan",
    "generator_name": "causal_wan",
    "generator_ckpt": "ode_003000/model.pt",
    "generator_grad": {"model": True},
    "real_score_grad": {"model": False},
    "fake_score_grad": {"model": True},
    "denoising_step_list": [1000, 757, 522, 0],
    "num_train_timestep": 1000,
    "timestep_shift": 8.0,
    "real_guidance_scale": 3.5,
    "generator_task": "causal_video",
    "real_task_type": "bidirectional_video",
    "fake_task_type": "bidirectional_video",
    "denoising_loss_type": "flow",
    "mixed_precision": True,
    "seed": 0,
    "wandb_name": "x",
    "sharding_strategy": "hybrid_full",
    "lr": 2.0e-6,
    "beta1": 0.9,
    "beta2": 0.999,
    "data_path": "mixkit_latents_lmdb",
    "batch_size": 1,
    "log_iters": 200,
    "negative_prompt": "bad",
    "dfake_gen_update_ratio": 5,
    "image_or_video_shape": [1, 21, 16, 60, 104],
    "output_path": "/mnt/x",
    "distillation_loss": "dmd",
    "gradient_checkpointing": True,
    "num_frame_per_block": 3,
    "warp_denoising_step": False,
}
PUBLISHED = {
    "self_forcing_dmd": DMD,
    "self_forcing_sid": SID,
    "self_forcing_14b_dmd": PLUS,
    "self_forcing_14b_i2v_dmd": PLUS_I2V,
    "causvid": CAUSVID,
}
SHARED = (
    *("seed", "mixed_precision", "lr", "beta1", "beta2", "batch_size", "log_iters", "gradient_checkpointing"),
    *("num_frame_per_block", "model_kwargs", "generator_ckpt"),
)
CAUSAL_ODE = {
    **{key: DMD[key] for key in SHARED},
    "generator_grad": {"model": True},
    "generator_task": "causal_video",
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "trainer": "ode",
    "data_path": "dataset/ODE6KCausal_chunkwise",
}
CAUSAL_TF = {
    **{key: value for key, value in DMD.items() if key not in ("generator_ckpt", "denoising_step_list")},
    "trainer": "diffusion",
    "teacher_forcing": True,
    "data_path": "dataset/clean_data",
    "ema_start_step": 2000000000,
}


def ours(theirs: dict[str, Any], *ignored: str) -> Any:
    """The settings as the stage's command reads them."""
    actual = translate(theirs, ignored)
    kind = import_config.STAGES[actual.stage][0]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), actual.settings))


# Another value of each type of setting.
OTHERS: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda _: 7,
    float: lambda _: 7,
    list: lambda _: [7.0],
    dict: lambda _: {"x": 1},
    str: lambda _: "another",
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_key_is_translated_a_named_no_op_or_refused(name: str) -> None:
    """With the defaults beneath: each is either named as unused with its reason, or changing it has an effect."""
    theirs = {**({} if name == "causvid" else DEFAULTS), **PUBLISHED[name]}
    actual = translate(theirs)
    unused = {key for keys in actual.unused.values() for key in keys}
    assert {"wandb_key", "generator_fsdp_wrap_strategy"} <= unused
    for key, value in theirs.items():
        other = OTHERS[type(value)](value)
        if key in NO_OPS and NO_OPS[key][1] is ANY:
            assert key in unused
            continue
        try:
            changed = translate({**theirs, key: other})
        except ValueError:
            continue
        is_named = key in {each for keys in changed.unused.values() for each in keys}
        assert is_named or changed.settings != actual.settings, f"{key} is dropped in silence"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "causvid"])
def test_published_configurations_become_the_shipped_ones(name: str) -> None:
    """But for what is the user's: folders, prompts, steps; and for what a shipped file leaves to the defaults."""
    actual, shipped = ours({**DEFAULTS, **PUBLISHED[name]}), parse(DmdArgs, [f"config={name}"])
    known = OmegaConf.load(CONFIGS / f"{name}.yaml")
    own = ("student", "prompts", "data", "negative_prompt", "max_steps", "text_encoder_offload", "score")
    for key in map(str, known):
        if key not in own:
            assert getattr(actual, key) == getattr(shipped, key), key
    assert (actual.size, actual.chunk) == (shipped.size, shipped.chunk)


def test_a_missing_critic_is_the_references_small_one_and_the_plan_knows_the_sizes() -> None:
    actual = ours(DMD)
    assert (actual.student, actual.weights) == ("checkpoints/ode_init.pt", "raw")
    assert (actual.teacher, actual.critic) == ("models/wan2.1-t2v-14b", "models/wan2.1-t2v-1.3b")
    assert (actual.size, actual.teacher_size, actual.critic_size) == ("t2v-1.3b", "t2v-14b", "t2v-1.3b")
    plus = ours({key: value for key, value in PLUS.items() if key not in ("fake_name", "generator_name")})
    assert (plus.student, plus.critic, plus.size) == ("models/wan2.1-t2v-14b",) * 2 + ("t2v-14b",)


def test_causvid_keeps_its_timesteps_checkpoint_and_guidance() -> None:
    actual = ours(CAUSVID)
    assert actual.student == "ode_003000/model.pt"
    assert FlowSchedule(steps_of(actual)).timesteps == (1000.0, 757.0, 522.0)
    assert (actual.guidance, actual.guidance_critic) == (4.5, 1.0)
    assert (actual.data, actual.prompts, actual.score_shift) == ("mixkit_latents_lmdb", "", 8.0)
    assert (actual.betas, actual.betas_critic, actual.lr_critic) == ([0.9, 0.999], [], 2e-6)
    assert actual.ema_start > 1e6, "it keeps no average"
    warped = ours({**CAUSVID, "denoising_step_list": [1000, 750, 500, 250, 0], "warp_denoising_step": True})
    assert FlowSchedule(steps_of(warped)).timesteps == pytest.approx((1000, 960, 888.8889, 727.2727), abs=1e-3)
    assert ours({**CAUSVID, "generator_task": "bidirectional_video"}).chunk == 0
    with pytest.raises(ValueError, match=r"backward_simulation: False .*the student's own rollouts"):
        translate({**CAUSVID, "backward_simulation": False})
    assert ours({**CAUSVID, "backward_simulation": False}, "backward_simulation") == actual


def test_names_are_released_ones_classes_or_paths_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/Data/Models/Wan2.1-I2V-14B-480P"
    actual = ours({**PLUS_I2V, "real_name": path, "fake_name": "Sub/Folder"})
    assert (actual.teacher, actual.critic, actual.student) == (path, "Sub/Folder", "models/wan2.1-i2v-14b")
    assert actual.teacher_size == "i2v-14b"
    (tmp_path / "wan_models" / "Mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ours({**DMD, "real_name": "Mine"}).teacher == "wan_models/Mine"
    assert ours({**DMD, "real_name": "Other"}).teacher == "Other"
    notes = "\n".join(translate({**DMD, "real_name": "Other"}).notes)
    assert "set teacher_size" in notes
    assert set(RELEASED.values()) <= {f"models/{name}" for name in RELEASES}


def test_shipped_configurations_name_what_download_makes() -> None:
    for file in CONFIGS.glob("*.yaml"):
        for key, value in OmegaConf.load(file).items():  # type: ignore[union-attr]
            if isinstance(value, str) and value.startswith("models/"):
                assert value.split("/")[1] in RELEASES or value.split("/")[1] == "umt5", f"{file.name}: {key}"


def test_pictures_come_from_a_database() -> None:
    actual = ours(PLUS_I2V)
    assert (actual.data, actual.prompts, actual.chunk) == ("/data/output_lmdb/", "", 0)
    assert (actual.image_height, actual.image_width, actual.first_frame) == (480, 832, "generated")
    assert actual.clip
    assert actual.vae
    framewise = {**DMD, "i2v": True, "data_path": "clips", "num_frame_per_block": 1}
    assert (ours(framewise).first_frame, ours(framewise).data) == ("clips", "clips")
    with pytest.raises(ValueError, match="is a text file, and i2v: true needs a database"):
        translate({**DMD, "i2v": True})
    with pytest.raises(ValueError, match="independent_first_frame=true, or chunk=1"):
        translate({**framewise, "num_frame_per_block": 3})
    assert ours({**framewise, "num_frame_per_block": 4, "independent_first_frame": True}).independent_first_frame


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"warp_denoising_step": False}, {"warp": False, "shift": 1.0}),
        ({"real_guidance_scale": 4.0}, {"guidance": 5.0, "guidance_critic": 1.0}),
        ({"real_guidance_scale": 4.0, "fake_guidance_scale": 1.0}, {"guidance": 5.0, "guidance_critic": 2.0}),
        ({"fake_guidance_scale": 1.0}, {"guidance": 4.0, "guidance_critic": 1.0}),
        ({"last_step_only": True}, {"last_step_only": True}),
        ({"context_noise": 100}, {"context_noise": 100.0}),
        ({"min_score_timestep": 200}, {"min_score_timestep": 200.0}),
        ({"ts_schedule": True, "min_score_timestep": 200}, {"ts_schedule": True, "min_score_timestep": 0.0}),
        ({"ts_schedule": None}, {"ts_schedule": True}),  # the code's default
        ({"ts_schedule_max": True}, {"ts_schedule_max": True, "ts_schedule": False}),
        ({"ts_schedule": True, "same_step_across_blocks": False}, {"ts_schedule": False, "exit_per_chunk": True}),
        ({"beta1_critic": 0.5}, {"betas": [0.0, 0.999], "betas_critic": [0.5, 0.999]}),
        ({"max_grad_norm_critic": 2.0}, {"max_grad_norm": 10.0, "max_grad_norm_critic": 2.0}),
        ({"max_grad_norm_generator": 2.0}, {"max_grad_norm": 2.0, "max_grad_norm_critic": 10.0}),
        ({"lr_critic": None}, {"lr_critic": 2e-6}),
        ({"timestep_shift": None, "model_kwargs": None}, {"shift": 8.0, "score_shift": 1.0}),
        ({"num_frame_per_block": None}, {"chunk": 1}),
        ({"num_training_frames": 27}, {"max_latent_frames": 27, "vae": VAE}),
        ({"ema_weight": 0.0}, {"ema_start": import_config.NEVER}),
        ({"sharding_strategy": "no_shard"}, {"shard_group": 1}),
        ({"distribution_loss": "sid", "sid_alpha": 0.5}, {"score": "sid", "sid_alpha": 0.5}),
        (
            {"model_kwargs": {"timestep_shift": 3.0, "local_attn_size": 9, "sink_size": 3}},
            {"shift": 3.0, "window": 9, "sink": 3},
        ),
        ({"model_kwargs": {"model_name": "Wan2.1-T2V-14B"}}, {"student": "checkpoints/ode_init.pt", "size": "t2v-14b"}),
        (
            {"trainer": "gan", "gen_lr": 1e-6, "critic_lr": 3e-6, "data_path": "clips", "r1_weight": 2.0},
            {"score": "gan", "lr": 1e-6, "lr_critic": 3e-6, "data": "clips", "gan_r1": 2.0},
        ),
        ({"gen_lr": 1.0}, {"lr": 2e-6}),
        (  # Causal-Forcing++; the reference drops a 0 at the end of either list
            {"denoising_step_list": [1000, 500, 0], "denoising_step_list_first_chunk": [1000, 750, 500, 250, 0]},
            {"steps": [1000.0, 500.0], "first_chunk_steps": [1000.0, 750.0, 500.0, 250.0], "warp": True},
        ),
        ({"denoising_step_list_first_chunk": None}, {"first_chunk_steps": []}),
    ],
)
def test_keys_that_change_the_method_are_translated(theirs: dict[str, Any], expected: dict[str, Any]) -> None:
    actual = ours({**DMD, **theirs})
    assert {key: getattr(actual, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"trainer": "rewarded_distillation"}, "trainer: 'rewarded_distillation' is none of ours"),
        ({"trainer": "consistency_distillation"}, "trainer: 'consistency_distillation' is none of ours"),
        ({"distribution_loss": "rewardeddmd"}, "distribution_loss: 'rewardeddmd' is none of ours"),
        ({"distribution_loss": "causvid"}, "trains on noised clips"),
        ({"trainer": "ode"}, "distribution_loss: 'dmd' is none of ours with trainer ode"),
        ({"generator_type": "both"}, "generator_type: 'both'"),
        ({"denoising_loss_type": "x0"}, "denoising_loss_type: x0 .only flow is ours"),
        ({"load_raw_video": True}, "load_raw_video: True .make latents"),
        ({"denoising_step_list_first_chunk": "few"}, "denoising_step_list_first_chunk: 'few' cannot be translated"),
        ({"beta": 2.0, "adapter": {"rank": 8}}, "--ignore beta,adapter"),
        ({"model_kwargs": {"qk_bias": 1}}, "model_kwargs: qk_bias inside is unknown"),
        ({"model_kwargs": {"model_name": "a"}, "generator_name": "b"}, "differ"),
        ({"lr": "fast"}, "lr: 'fast' cannot be translated"),
        ({"warp_denoising_step": "yes"}, "warp_denoising_step: 'yes'"),
        ({"image_or_video_shape": [1, 32, 48, 44, 80]}, "image_or_video_shape"),
        ({"data_type": "latents"}, "data_type"),
        ({"num_training_frames": 9}, "num_training_frames: 9"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(
    theirs: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "theirs.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**DMD, **theirs})), encoding="utf-8")
    assert main([str(tmp_path / "theirs.yaml")]) == 2
    captured = capsys.readouterr()
    assert re.search(words, captured.err), captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_stages_before_the_distillation_get_their_own_settings() -> None:
    actual = ours(CAUSAL_ODE)
    assert isinstance(actual, OdeArgs)
    assert actual.timesteps == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert (actual.network, actual.data, actual.betas) == (
        "checkpoints/ode_init.pt",
        CAUSAL_ODE["data_path"],
        [0, 0.999],
    )
    causvid = {key: CAUSVID[key] for key in CAUSVID if "guidance" not in key and key != "timestep_shift"}
    start = ours({**causvid, "distillation_loss": "ode", "model_name": "causal_wan", "generator_ckpt": None})
    assert (start.timesteps, start.network) == ([1000.0, 757.0, 522.0, 0.0], "models/wan2.1-t2v-1.3b")
    image = ours({**CAUSAL_ODE, "i2v": True, "independent_first_frame": True})
    assert (image.first_frame_clean, image.independent_first_frame) == (True, True)
    forced = ours(CAUSAL_TF)
    assert isinstance(forced, DiffusionArgs)
    assert (forced.forcing, forced.shift, forced.network) == ("teacher", 5.0, "models/wan2.1-t2v-1.3b")
    assert ours({**CAUSAL_TF, "teacher_forcing": False}).forcing == "diffusion"
    sampled = ours({**CAUSAL_TF, "guidance_scale": 3.0, "negative_prompt": "blurred", "timestep_shift": 8.0})
    assert (sampled.guidance, sampled.negative_prompt, sampled.shift) == (3.0, "blurred", 5.0)
    with pytest.raises(ValueError, match="noise_augmentation_max_timestep: 100"):
        translate({**CAUSAL_TF, "noise_augmentation_max_timestep": 100})
    with pytest.raises(ValueError, match="i2v: true has no counterpart"):
        translate({**CAUSAL_TF, "i2v": True})


def test_a_critic_that_the_reference_does_not_guide_is_not_guided() -> None:
    scales = {"guidance_scale": None, "real_guidance_scale": 5.0, "fake_guidance_scale": 1.5}
    actual = translate({**DMD, **scales, "distribution_loss": "sid"})
    assert "guidance_critic" not in actual.settings
    assert "fake_guidance_scale" in actual.unused["distribution_loss: sid guides its teacher alone"]
    assert translate({**DMD, **scales}).settings["guidance_critic"] == 2.5


def test_the_command_says_for_which_command_and_what_it_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    file.write_text(
        OmegaConf.to_yaml(OmegaConf.create({**DMD, "beta": 2.0, "data_path": "a: #1 [b], ${gc_interval}"})),
        encoding="utf-8",
    )
    (tmp_path / "default_config.yaml").write_text(
        "num_training_frames: 27\nlr: 1.0\ngc_interval: 9\n", encoding="utf-8"
    )
    assert main([str(file), "--ignore", "beta"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("# For python -m train.dmd ")
    out.write_text(captured.out, encoding="utf-8")
    args = parse(DmdArgs, [f"config={out}"])
    assert (args.max_latent_frames, args.lr, args.guidance) == (27, 2e-6, 4.0), "the file over its default_config.yaml"
    assert args.prompts == "a: #1 [b], 9"
    assert "no use for: wandb_host, wandb_key" in captured.err
    assert "ignored as asked: beta" in captured.err
    assert "default_config.yaml" in captured.err
    assert main([str(file), "--ignore", "beta,gamma"]) == 2
    assert "gamma" in capsys.readouterr().err
    file.write_text("- 1\n", encoding="utf-8")
    assert main([str(file)]) == 2
