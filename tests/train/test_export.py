"""What a run exports says how it is sampled; generate, train.sample and the run's own videos obey the same settings."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_saver

from selfforcing_core.codecs.taehv import TAEHV
from selfforcing_core.codecs.video import read_video
from selfforcing_core.config import BidirectionalConfig, CausalConfig, StepConfig, TAEHVConfig, WanConfig
from selfforcing_core.generate import run as generate_module
from selfforcing_core.generate.cli import main as core_main
from selfforcing_core.generate.plan import plan_request
from selfforcing_core.generate.request import PromptBatch, Request
from selfforcing_core.guided import Guided
from selfforcing_core.model import CausalWan
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.weights.bundles import bundle_path
from selfforcing_core.weights.checkpoint import inspect_checkpoint, read_checkpoint, save_checkpoint
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.load import load_model
from tests.support.training import ROOT, write_database, write_encoders, write_network
from train import diffusion, dmd, ode, validation
from train import sample as sample_module
from train.args import DiffusionArgs, DmdArgs, OdeArgs, to_yaml
from train.conditions import Prompts
from train.distributed import World
from train.engine import Trainer
from train.export import ExportArgs, export
from train.lora import starts
from train.roles import Levels
from train.sample import SampleArgs, in_keys

SHARED: dict[str, Any] = {"text_encoder": "tiny", "device": "cpu", "dtype": "float32", "chunk": 2}
DMD: dict[str, Any] = {**SHARED, "width": 32, "height": 32, "latent_frames": 4, "steps": [1000.0, 500.0]}
TIMES = [1000.0, 2500 / 3, 250.0, 0.0]
STAGES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dmd causal": (DmdArgs, {**DMD, "window": 4}),
    "dmd bidirectional": (DmdArgs, {**DMD, "chunk": 0}),
    "sid": (DmdArgs, {**DMD, "score": "sid", "cache_source": "last_step"}),
    "gan": (DmdArgs, {**DMD, "score": "gan", "shift": 3.0}),
    "ode": (OdeArgs, {**SHARED, "timesteps": TIMES}),
    "ode table": (OdeArgs, {**SHARED, "timesteps": TIMES, "levels": "table", "window": 2}),
    "teacher forcing": (DiffusionArgs, {**SHARED, "sampling_steps": 3}),
    "diffusion forcing": (DiffusionArgs, {**SHARED, "forcing": "diffusion", "guidance": 1.0, "solver": "unipc"}),
    "plain": (DiffusionArgs, {**SHARED, "forcing": "none", "chunk": 0, "shift": 8.0, "sampling_steps": 3}),
}
CHUNKS = {
    "dmd causal": CausalConfig(2, 4),
    "sid": CausalConfig(2, cache_source="last_step"),
    "ode table": CausalConfig(2, 2),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's start, a database of clips of four latent frames, and prompts."""
    folder = tmp_path_factory.mktemp("files")
    write_network(folder / "start.safetensors", 0)
    write_database(folder / "clips")
    (folder / "prompts.txt").write_text("a red square\na green circle\n", encoding="utf-8")
    return folder


def fake_run(files: Path, folder: Path, stage: str, **more: Any) -> Any:
    """A run's folder as one step leaves it, with weights of its own."""
    kind, settings = STAGES[stage]
    start = files / "start.safetensors"
    named = {"network": str(start), "data": str(files / "clips")}
    if kind is DmdArgs:
        named = {"student": str(start), "teacher": str(start), "prompts": str(files / "prompts.txt")}
    args = kind(**{"logdir": str(folder), **named, **settings, **more})
    weights = read_checkpoint(write_network(files / "trained.safetensors", 7)).state_dict
    if args.lora_rank:
        shapes = {
            f"blocks.0.ffn.0.lora.student.{part}": (2, 32) if part == "down" else (48, 2) for part in ("down", "up")
        }
        weights = {name: tensor + 0.01 for name, tensor in starts(shapes, 0).items()}  # up begins with zeros
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(args), encoding="utf-8")
    content = {"roles": {"student": {"weights": weights}}}
    state_dict_saver.save(content, checkpoint_id=str(folder / "checkpoints/step_000001"), no_dist=True)
    return args


def exported(files: Path, folder: Path, stage: str, **more: Any) -> tuple[Any, Path]:
    args = fake_run(files, folder / "run", stage, **more)
    out = folder / "out.safetensors"
    export(ExportArgs(logdir=str(folder / "run"), out=str(out), dtype="float32"))
    return args, out


def warnings_in(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def host_header(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["config"])["transformer"]


# ------------------------------------------------------------------ headers --
@pytest.mark.parametrize("stage", STAGES)
def test_the_export_of_every_stage_says_how_it_is_sampled(files: Path, tmp_path: Path, stage: str) -> None:
    args, out = exported(files, tmp_path, stage)
    checkpoint = read_checkpoint(out)
    assert checkpoint.steps is not None
    if args.chunk:
        assert checkpoint.causal == CHUNKS.get(stage, CausalConfig(2))
        assert checkpoint.bidirectional is None
    else:
        assert (checkpoint.causal, checkpoint.bidirectional) == (None, BidirectionalConfig(4))
    assert host_header(out)["causal_ar"] is bool(args.chunk), "what ComfyUI's own nodes read"
    if isinstance(args, DmdArgs):
        assert (checkpoint.steps, checkpoint.guidance) == (StepConfig((1000.0, 500.0), shift=args.shift), None)
    elif isinstance(args, OdeArgs):
        assert (checkpoint.steps.steps, checkpoint.steps.shift, checkpoint.guidance) == (tuple(TIMES[:-1]), 5.0, None)
    else:
        assert checkpoint.steps == StepConfig.even(args.sampling_steps, shift=args.shift, solver=args.solver)
        assert checkpoint.guidance == args.guidance
    report = inspect_checkpoint(out)
    assert report["guidance"] == checkpoint.guidance
    assert report["bidirectional"] == (None if args.chunk else {"latent_frames": 4})


@pytest.mark.parametrize("stage", ["ode", "ode table"])
def test_a_regression_is_sampled_at_the_timesteps_and_levels_it_was_trained_at(
    files: Path, tmp_path: Path, stage: str
) -> None:
    args, out = exported(files, tmp_path, stage)
    steps = read_checkpoint(out).steps
    assert steps is not None
    schedule, trained = FlowSchedule(steps), torch.tensor(TIMES[:-1], dtype=torch.float64)
    assert schedule.timesteps == tuple(TIMES[:-1])
    assert schedule.sigmas == tuple(Levels(args.shift, args.levels).sigma(trained).tolist())
    if args.levels == "exact":
        assert schedule.sigmas == tuple(step / 1000 for step in TIMES[:-1])


def test_older_versions_read_what_they_can_sample_and_refuse_the_rest(files: Path, tmp_path: Path) -> None:
    """Format 1 is all that they know; whatever they would run in chunks or without guidance says 2."""
    for number, (stage, expected) in enumerate((("dmd causal", 1), ("ode", 1), ("dmd bidirectional", 2), ("plain", 2))):
        _, out = exported(files, tmp_path / str(number), stage)
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["selfforcing"])["format"] == expected


def test_what_older_versions_exported_still_loads(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps without chunks were a bidirectional run's; a file with neither is one that nothing is known about."""
    checkpoint = read_checkpoint(files / "start.safetensors")
    save_checkpoint(tmp_path / "old.safetensors", checkpoint.state_dict, checkpoint.config, steps=StepConfig())
    assert read_checkpoint(tmp_path / "old.safetensors").bidirectional == BidirectionalConfig(None)
    assert read_checkpoint(files / "start.safetensors").bidirectional is None
    plan = planned(tmp_path / "old.safetensors", frames=13)
    assert plan.extent.geometry.chunk_lengths == (4,)
    assert "taken for a bidirectional model: all 4 latent frames are made at once" in warnings_in(caplog)
    assert planned(files / "start.safetensors", frames=21).extent.geometry.chunk_lengths == (3, 3)
    assert "does not say how it was trained" in warnings_in(caplog)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"bidirectional": {"latent_frames": 0}}, "latent_frames 0"),
        ({"bidirectional": {"latent_frames": 4, "colour": 1}}, "colour"),
        ({"bidirectional": [4]}, "header is damaged"),
        ({"bidirectional": {"latent_frames": 4}, "causal": CausalConfig().to_dict()}, "both causal and bidirectional"),
        ({"guidance": -1}, "guidance is -1"),
        ({"guidance": "5"}, "guidance is '5'"),
        ({"kind": "lora", "steps": 3}, "header is damaged"),
    ],
)
def test_damaged_settings_are_refused(files: Path, tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    file = tmp_path / "a.safetensors"
    with safe_open(files / "start.safetensors", "pt") as start:
        header = {**json.loads(start.metadata()["selfforcing"]), "format": 2, **entries}
    save_file(load_file(files / "start.safetensors"), file, {"selfforcing": json.dumps(header)})
    with pytest.raises(ValueError, match=re.escape(words)):
        read_checkpoint(file)


def test_converting_keeps_how_a_file_is_sampled(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, out = exported(files, tmp_path, "plain")
    before, kept = inspect_checkpoint(out), ("causal", "bidirectional", "steps", "guidance")
    for target in ("again.safetensors", "folder"):
        report = convert(out, tmp_path / target)
        assert {name: report[name] for name in kept} == {name: before[name] for name in kept}
    assert convert(out, tmp_path / "causal.safetensors", causal=True)["bidirectional"] is None
    report = convert(files / "start.safetensors", tmp_path / "whole.safetensors", causal=False)
    assert report["bidirectional"] == {"latent_frames": None}
    assert not warnings_in(caplog)
    convert(bundle_path("tiny") / "model.safetensors", tmp_path / "out.pt")
    assert "a torch file has no place for chunks, steps and guidance" in warnings_in(caplog)


def test_a_lora_says_what_it_belongs_on(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run(files, tmp_path / "run", "dmd causal", lora_rank=2)
    out = tmp_path / "lora.safetensors"
    export(ExportArgs(logdir=str(tmp_path / "run"), out=str(out), form="lora"))
    with safe_open(out, "pt") as file:
        header = json.loads(file.metadata()["selfforcing"])
    assert (header["kind"], header["base"]) == ("lora", str(files / "start.safetensors"))
    assert CausalConfig.from_dict(header["causal"]) == CausalConfig(2, 4)
    assert StepConfig.from_dict(header["steps"]) == StepConfig((1000.0, 500.0))
    options = ["--model", str(out), "--prompt", "a", "--taehv", "tiny", "--text-encoder", "tiny"]
    assert core_main(["generate", *options, "--out", str(tmp_path / "a.mp4")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert f"is a LoRA, to be loaded on top of {files / 'start.safetensors'} (chunk 2, window 4" in stderr
    assert "form=whole" in stderr
    assert core_main(["inspect", str(out)]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["kind"], actual["base"], actual["ranks"]) == ("lora", str(files / "start.safetensors"), [2])


def test_an_exported_lora_merged_by_the_command_line_is_the_whole_export(files: Path, tmp_path: Path) -> None:
    fake_run(files, tmp_path / "run", "dmd causal", lora_rank=2)
    whole, lora = tmp_path / "whole.safetensors", tmp_path / "lora.safetensors"
    for out, form in ((whole, "whole"), (lora, "lora")):
        export(ExportArgs(logdir=str(tmp_path / "run"), out=str(out), form=form, dtype="float32"))
    merged, expected = read_checkpoint(files / "start.safetensors", loras=[(lora, 1.0)]), read_checkpoint(whole)
    assert (merged.causal, merged.steps) == (expected.causal, expected.steps)
    for name, weight in expected.state_dict.items():
        torch.testing.assert_close(merged.state_dict[name], weight, rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------- generate --
def planned(model: Path, **more: Any) -> Any:
    sizes = {"width": 32, "height": 32, "taehv": "tiny", "text_encoder": "tiny", "device": "cpu", **more}
    request = Request("a", model.with_name("never.mp4"), str(model), **sizes)
    return plan_request(request, [PromptBatch("a", "a", (request.out,))])


def test_generate_makes_all_frames_of_a_bidirectional_student_at_once(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = exported(files, tmp_path, "dmd bidirectional")
    options = ["generate", "--model", str(out), "--taehv", "tiny", "--text-encoder", "tiny", "--prompt", "a", "--json"]
    options += ["--width", "32", "--height", "32", "--device", "cpu"]
    for more, frames in (([], 13), (["--frames", "21"], 21)):
        assert core_main([*options, *more, "--out", str(tmp_path / f"{frames}.mp4")]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["frames"], report["causal"]["chunk"], report["causal"]["window"]) == (
            frames,
            (frames + 3) // 4,
            -1,
        )
        assert report["steps"]["steps"] == [1000.0, 500.0]


def test_generate_samples_a_teacher_with_its_solver_steps_and_guidance(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = exported(files, tmp_path, "teacher forcing")
    used: list[tuple[Guided, dict[str, Any]]] = []
    real = generate_module.rollout
    spy = lambda guided, **options: used.append((guided, options)) or real(guided, **options)  # noqa: E731
    monkeypatch.setattr(generate_module, "rollout", spy)
    options = ["generate", "--model", str(out), "--taehv", "tiny", "--text-encoder", "tiny", "--prompt", "a", "--json"]
    options += ["--width", "32", "--height", "32", "--frames", "13", "--device", "cpu"]
    assert core_main([*options, "--out", str(tmp_path / "a.mp4")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["cfg"], report["causal"]["chunk"], report["steps"]["solver"]) == (5.0, 2, "euler")
    guided, settings = used[0]
    assert guided.guidance == 5.0
    assert len(guided.conditionings) == 2, "the negative prompt is left out"
    assert settings["steps"] == StepConfig.even(3, shift=5.0)


def test_an_explicit_setting_wins_and_what_it_replaces_is_said(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, teacher = exported(files, tmp_path / "teacher", "teacher forcing")
    plan = planned(teacher, frames=13, chunk=1, cfg=3.0, solver="unipc", steps=5, window=-1)
    assert (plan.causal.chunk, plan.cfg, plan.steps.solver, len(plan.steps.steps)) == (1, 3.0, "unipc", 5)
    for words in ("chunk 2; --chunk 1", "guidance 5; --cfg 3", "solver euler; --solver unipc", "--steps 1000,800,600"):
        assert words in warnings_in(caplog)
    assert "--window" not in warnings_in(caplog), "that is what the file says as well"
    caplog.clear()
    _, whole = exported(files, tmp_path / "whole", "dmd bidirectional")
    assert planned(whole, frames=17, chunk=1).extent.geometry.chunk_lengths == (1,) * 5
    assert "says that it is bidirectional; --chunk 1 is used" in warnings_in(caplog)
    caplog.clear()
    assert planned(whole, frames=17).extent.geometry.chunk_lengths == (5,)
    assert "was trained on 13 frames at once; --frames 17 is used" in warnings_in(caplog)
    caplog.clear()
    assert planned(whole).extent.geometry.frames == 13
    assert not warnings_in(caplog)
    with pytest.raises(ValueError, match="is bidirectional: it makes all frames of a video at once"):
        planned(whole, extend=tmp_path / "absent.mp4")


def test_steps_of_a_file_that_gives_its_timesteps_as_they_are(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, out = exported(files, tmp_path, "ode")
    even = planned(out, frames=13, steps=4).steps
    assert FlowSchedule(even).timesteps == FlowSchedule(StepConfig.even(4, shift=5.0)).timesteps
    assert FlowSchedule(planned(out, frames=13, steps=(900.0, 100.0)).steps).timesteps == (900.0, 100.0)
    assert "--steps are not warped" in warnings_in(caplog)
    planned(out, frames=13, shift=3.0)
    assert "--shift 3 changes nothing" in warnings_in(caplog)


# ------------------------------------------------------------- train.sample --
@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """Latents of every video, by who made it."""
    actual: dict[str, list[torch.Tensor]] = {"training": [], "sample": []}

    def recording(name: str, real: Any) -> Any:
        def rollout(*args: Any, **options: Any) -> Iterator[Any]:
            chunks = []
            for chunk in real(*args, **options):
                chunks.append(chunk.latents_BTCHW)
                yield chunk
            actual[name].append(torch.cat(chunks, 1))

        return rollout

    monkeypatch.setattr(validation, "rollout", recording("training", validation.rollout))
    monkeypatch.setattr(generate_module, "rollout", recording("sample", generate_module.rollout))
    return actual


@pytest.mark.parametrize("stage", ["dmd causal", "ode table", "teacher forcing", "plain"])
def test_validation_videos_and_train_sample_are_the_same(
    files: Path, tmp_path: Path, stage: str, recorded: dict[str, list[torch.Tensor]]
) -> None:
    """By the same network, with a setting of every kind: chunks, steps, solver, guidance, seed, noise, prompts."""
    more = {"sample_prompts": str(files / "prompts.txt"), "decoder": "tiny", "seed": 3}
    if stage in ("teacher forcing", "plain"):
        more["negative_prompt"] = "a blue triangle"
    args, out = exported(files, tmp_path, stage, **more)
    world = World(0, 1, torch.device("cpu"), None, None)  # type: ignore[arg-type]
    prompts = Prompts(args, world)
    trainer = SimpleNamespace(args=args, prompts=prompts, prefixes=(), shape=(4, 16, 4, 4), latent_shape=(4, 16, 4, 4))
    trainer.causal = dmd.causal_of(args) if isinstance(args, DmdArgs) else None
    stages = {DmdArgs: dmd.Distillation, OdeArgs: ode.Regression, DiffusionArgs: diffusion.FlowMatching}
    how = stages[type(args)].sampling(trainer)  # type: ignore[arg-type]
    texts = ["a red square", "a green circle"]
    conditions = [prompts.condition([text]) for text in texts]
    videos = validation.ValidationVideos(texts, conditions, "tiny", world, args.seed)
    videos.write(load_model(out)[0], how, tmp_path / "videos")
    sample_module.sample(SampleArgs(logdir=str(tmp_path / "run")))
    assert len(recorded["training"]) == len(recorded["sample"]) == 2
    torch.testing.assert_close(recorded["sample"], recorded["training"], rtol=1e-4, atol=1e-5)
    assert (recorded["training"][0] - recorded["training"][1]).abs().max() > 0.1


def test_validation_videos_of_another_length_are_whole_for_bidirectional_networks() -> None:
    how = validation.Sampling(CausalConfig(4), StepConfig(), (4, 16, 4, 4), is_bidirectional=True)
    assert how.of_length(6).causal == CausalConfig(6)
    assert replace(how, causal=CausalConfig(2, 4), is_bidirectional=False).of_length(6).causal == CausalConfig(2, 4)
    assert how.of_length(6).latent_shape == (6, 16, 4, 4)


def test_prompts_of_a_database_are_sampled_where_a_run_has_no_file(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_run(files, tmp_path / "run", "ode")
    assert sample_module.main([f"logdir={tmp_path / 'run'}", "taehv=tiny", "count=2"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["0000-clip-a-0.mp4", "0001-clip-b-0.mp4"]
    assert read_video(tmp_path / "run/samples" / names[0]).shape == (13, 3, 32, 32)
    assert not list((tmp_path / "run").glob(".sample-*"))


@pytest.mark.parametrize("own", [True, False])
def test_image_to_video_students_are_sampled(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    """By the pictures of the run's database, or by one that is given."""
    network = write_network(tmp_path / "i2v.safetensors", 0, in_dim=36, model_type="i2v")
    vae, clip = write_encoders(tmp_path)
    encoders = {"vae": str(vae), "clip": str(clip)} if own else {}
    more = {"student": str(network), "data": str(files / "clips"), "decoder": "tiny", **encoders}
    fake_run(files, tmp_path / "run", "dmd bidirectional", **more)
    weights = {"roles": {"student": {"weights": read_checkpoint(network).state_dict}}}
    state_dict_saver.save(weights, checkpoint_id=str(tmp_path / "run/checkpoints/step_000002"), no_dist=True)
    options = [f"logdir={tmp_path / 'run'}", "count=2"]
    if not own:
        (tmp_path / "start.png").write_bytes((ROOT / "docs/strip.png").read_bytes())
        assert sample_module.main([*options, f"image={tmp_path / 'start.png'}"]) == 2
        assert "give it image=..., vae=... and clip=..." in capsys.readouterr().err
        options += [f"image={tmp_path / 'start.png'}", f"vae={vae}", f"clip={clip}"]
    assert sample_module.main(options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_sampling_takes_device_and_type_of_the_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def asked(run_device: str, run_dtype: str, has_cuda: bool, **more: Any) -> tuple[str, str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
        run = DmdArgs(**{**DMD, "device": run_device, "dtype": run_dtype})
        request = sample_module._request(SampleArgs(taehv="tiny", **more), run)
        return request.device, str(request.dtype)

    assert asked("auto", "bfloat16", True) == ("cuda", "bfloat16")
    assert asked("auto", "bfloat16", False) == ("cpu", "float32")
    assert asked("auto", "float32", True) == ("cuda", "float32")
    assert asked("cpu", "bfloat16", True) == ("cpu", "float32")
    assert asked("cpu", "bfloat16", True, device="cuda", dtype="float16") == ("cuda", "float16")
    assert not warnings_in(caplog)
    assert asked("cuda", "bfloat16", False) == ("cpu", "float32")
    assert "the run's device cuda is not here" in warnings_in(caplog)


@pytest.mark.parametrize(
    ("dtype", "chosen", "stored"),
    [("bfloat16", "auto", "bfloat16"), ("float32", "auto", "float32"), ("bfloat16", "float32", "float32")],
)
def test_the_weights_to_sample_with_have_the_runs_type_and_lie_beside_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, chosen: str, stored: str
) -> None:
    fake_run(files, tmp_path / "run", "dmd causal", dtype=dtype)
    log: list[tuple[Path, str]] = []

    def generate_all(request: Request, takes: Any, **_: Any) -> list[Any]:
        log.append((Path(request.model), read_checkpoint(request.model).dtype))
        return []

    monkeypatch.setattr(sample_module, "generate_all", generate_all)
    monkeypatch.delenv("TMPDIR", raising=False)
    args = SampleArgs(logdir=str(tmp_path / "run"), taehv="tiny", dtype=chosen)
    sample_module.sample(args)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sample_module.sample(args)
    assert [kind for _, kind in log] == [stored, stored]
    assert [file.parent.parent for file, _ in log] == [tmp_path / "run", tmp_path]
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(sample_module.shutil, "disk_usage", lambda _: full)
    with pytest.raises(ValueError, match="set TMPDIR to a folder with more room"):
        sample_module.sample(args)


def test_messages_name_settings_of_train_sample() -> None:
    """Every flag that the core can name there has a setting; the others are of what train.sample never asks for."""
    assert in_keys("give it --image, --vae and --clip") == "give it image=..., vae=... and clip=..."
    assert in_keys("says chunk 2; --chunk 3 is used") == "says chunk 2; chunk=3 is used"
    assert (
        in_keys("a smaller --cfg than 5, or another --dtype") == "a smaller guidance=... than 5, or another dtype=..."
    )
    assert in_keys("say so (--taehv-latents=wan2.1)") == "say so (latent_space=wan2.1)"
    never = {"lora", "extend", "extend_prompt", "latents", "sheet", "roofline", "compile", "fps", "model"}
    known = {*SampleArgs.__dataclass_fields__}
    spoken = (*("generate/plan", "generate/run", "generate/write"), *("weights/load", "weights/bundles"))
    for file in (*spoken, "weights/latent_space"):
        source = (ROOT / f"selfforcing_core/{file}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", source):
            key = in_keys(flag).partition("=")[0]
            assert key in known | never, f"{file}.py names {flag}"


def test_a_decoder_of_an_unknown_latent_space_is_asked_about(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By train.sample and by a run that makes videos, each with its own setting to say it with."""
    decoder = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    config = WanConfig(dim=32, ffn_dim=32, num_heads=1, num_layers=1, freq_dim=16)
    save_checkpoint(tmp_path / "taehv.safetensors", TAEHV(decoder).state_dict(), decoder)
    weights = CausalWan(config).state_dict()
    save_checkpoint(tmp_path / "wan.safetensors", weights, config)
    run = fake_run(files, tmp_path / "run", "dmd causal", student=str(tmp_path / "wan.safetensors"))
    step = tmp_path / "run/checkpoints/step_000002"
    state_dict_saver.save({"roles": {"student": {"weights": weights}}}, checkpoint_id=str(step), no_dist=True)
    options = [f"logdir={run.logdir}", f"taehv={tmp_path / 'taehv.safetensors'}"]
    assert sample_module.main(options) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "say so (latent_space=wan2.1)" in stderr
    assert sample_module.main([*options, "latent_space=hunyuanvideo"]) == 2
    assert "decodes latents of hunyuanvideo" in capsys.readouterr().err

    checkpoint = read_checkpoint(tmp_path / "wan.safetensors")
    trainer: Any = SimpleNamespace(args=replace(run, decoder=str(tmp_path / "taehv.safetensors")))
    trainer.sources = lambda: {"student": None}
    trainer.supply = SimpleNamespace(checkpoint=lambda role, source: checkpoint)
    with pytest.raises(ValueError, match=r"say so \(decoder_latent_space=wan2.1\)"):
        Trainer.check_decoder(trainer)
    trainer.args.decoder_latent_space = "wan2.1"
    Trainer.check_decoder(trainer)
