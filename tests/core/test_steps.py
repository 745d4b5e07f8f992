"""Lists of steps: those of the first chunk, a last step of 0, through the shift or not, from file to rollout."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.generate.plan import plan_request
from selfforcing_core.generate.request import PromptBatch, Request
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import CONTEXT, SeededNoise
from selfforcing_core.rollout import BackpropSpec, rollout
from selfforcing_core.roofline.meter import Recipe
from selfforcing_core.schedule import FlowSchedule, sigma_table
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from selfforcing_core.weights.convert import convert
from tests.support.golden_fixture import FOLDER, GivenNoise, read_fixture
from tests.support.tiny_wan import CONFIG, FRAME, guided, random_text, random_wan

OWN = StepConfig((1000.0, 500.0), first_chunk_steps=(1000.0, 750.0, 500.0, 250.0))  # as Causal-Forcing++
ENDS_IN_ZERO = StepConfig((1000.0, 750.0, 500.0, 250.0, 0.0))  # as Krea Realtime, written before the shift
WARPED = {1000: 1000.0, 750: 937.5, 500: 2500 / 3, 250: 625.0, 0: 0.0}


class Calls:
    """A network that notes the chunk and the timestep of every call."""

    def __init__(self) -> None:
        self.model, self.passes = random_wan(), []
        self.config, self.new_cache = self.model.config, self.model.new_cache

    def __call__(self, x: Tensor, timesteps: Tensor, *rest: Any, **options: Any) -> Tensor:
        self.passes.append((options.get("start_frame", 0), float(timesteps.flatten()[0])))
        return self.model(x, timesteps, *rest, **options)


def chunks_of(steps: StepConfig, frames: int = 6, model: Any = None, **options: Any) -> Any:
    options = {"causal": CausalConfig(2, window=4), "noise": SeededNoise(0), **options}
    guide = guided(random_wan() if model is None else model, random_text(), options)
    return rollout(guide, latent_shape=(frames, *FRAME), steps=steps, **options)


def video(steps: StepConfig, **options: Any) -> Tensor:
    return torch.cat([chunk.latents_BTCHW for chunk in chunks_of(steps, **options)], 1)


# ------------------------------------------------------------------- rollout --
def test_the_first_chunk_has_its_own_steps_and_no_other_has_them() -> None:
    calls, passes = Calls(), []
    video(OWN, model=calls, on_step=lambda chunk, step: passes.append((chunk, step)))
    first, later = ([WARPED[step] for step in steps] for steps in ((1000, 750, 500, 250), (1000, 500)))
    expected = [(0, [*first, 0.0]), (2, [*later, 0.0]), (4, later)]
    assert [start for start, _ in calls.passes] == [start for start, steps in expected for _ in steps]
    torch.testing.assert_close([t for _, t in calls.passes], [t for _, steps in expected for t in steps])
    assert passes == [*((0, step) for step in range(4)), (0, CONTEXT), (1, 0), (1, 1), (1, CONTEXT), (2, 0), (2, 1)]


def test_behind_given_frames_no_chunk_is_the_first() -> None:
    """What follows sees frames, as in training every chunk did that had the common steps; so an extension is exact."""
    whole = video(OWN)
    torch.testing.assert_close(video(OWN, start=whole[:, :2]), whole)
    calls = Calls()
    video(OWN, model=calls, start=torch.zeros(1, 2, *FRAME))
    assert len(calls.passes) == 1 + 3 + 2


def test_a_rollout_with_steps_for_the_first_chunk_resumes_and_repeats_exactly() -> None:
    result = chunks_of(OWN)
    first = next(result)
    assert torch.equal(result.send(True).latents_BTCHW, first.latents_BTCHW), "made once more it has the same steps"
    snapshot = first.snapshot()
    rest = torch.cat([chunk.latents_BTCHW for chunk in result], 1)
    assert torch.equal(video(OWN, start=snapshot), rest)


def test_exit_steps_are_those_of_each_chunks_own_list() -> None:
    calls = Calls()
    video(OWN, model=calls, backprop=BackpropSpec([3, 0, 1]))
    assert [start for start, _ in calls.passes] == [0] * 5 + [2] * 2 + [4] * 2
    assert torch.equal(video(OWN, backprop=BackpropSpec([3, 1, 1])), video(OWN))


@pytest.mark.parametrize("solver", ["renoise", "euler", "unipc"])
def test_a_last_step_of_0_is_one_more_pass_at_timestep_0(solver: str) -> None:
    calls = Calls()
    with_pass = replace(ENDS_IN_ZERO, solver=solver)
    result = video(with_pass, model=calls, frames=2)
    assert [t for _, t in calls.passes][-2:] == [625.0, 0.0]
    without = video(replace(with_pass, steps=with_pass.steps[:-1]), frames=2)
    assert (result - without).abs().max() > 1e-3, "a pass at timestep 0 changes something"


def test_a_step_of_0_has_the_last_entry_of_the_table_under_either_rule() -> None:
    for shift, sigma in ((5.0, 0.0049801), (8.0, 0.0079444)):
        exact, table = (FlowSchedule(replace(ENDS_IN_ZERO, shift=shift, sigma=rule)) for rule in ("exact", "table"))
        assert exact.timesteps[-1] == 0
        assert exact.sigmas[-1] == table.sigmas[-1] == float(sigma_table(shift)[-1]) == pytest.approx(sigma, rel=1e-4)
        torch.testing.assert_close(exact.sigmas, table.sigmas)


def test_krea_s_first_chunk_is_what_its_own_code_made() -> None:
    """Later chunks see a window that is computed again; the first sees itself alone."""
    path = FOLDER / "policy_krea.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there; the larger set of recorded numbers has it")
    fixture = read_fixture(path)
    fixture.check("denoising_steps", torch.tensor(FlowSchedule(ENDS_IN_ZERO).timesteps), atol=1e-3)
    noise = {(0, 0): fixture["noise"][:, :3]}
    noise |= {(0, step + 1): fixture[f"chunk0.step{step}.renoise"][None] for step in range(4)}
    options: dict[str, Any] = {"noise": GivenNoise(noise), "causal": CausalConfig(3)}
    result = rollout(
        guided(fixture.wan(), replace(random_text(), prompt_embeds_BPE=fixture["prompt_embeds.0"]), options),
        latent_shape=(3, *noise[0, 0].shape[2:]),
        steps=ENDS_IN_ZERO,
        **options,
    )
    torch.testing.assert_close(next(result).latents_BTCHW, fixture["latents"][:, :3], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": (0.0,)}, "only the last of several may be 0"),
        ({"steps": (1000.0, 0.0, 0.0)}, "must fall"),
        ({"steps": (1000.0, -1.0)}, "steps .1000.0, -1.0. leave"),
        ({"first_chunk_steps": ()}, "first_chunk_steps is empty"),
        ({"first_chunk_steps": (500.0, 750.0)}, "first_chunk_steps .500.0, 750.0. must fall"),
        ({"first_chunk_steps": (1001.0,)}, "first_chunk_steps .1001.0. leave"),
    ],
)
def test_lists_that_no_chunk_can_be_denoised_by_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StepConfig(**values)


def test_the_estimate_counts_the_first_chunks_own_passes() -> None:
    recipe = Recipe(CONFIG, (2, 2, 2), 8, 12, decoder="none", steps=2)
    own, one = replace(recipe, first_chunk_steps=4), recipe.a_pass(0).flops
    assert own.chunk(0).flops == pytest.approx(recipe.chunk(0).flops + 2 * one)
    assert own.chunk(1).flops == recipe.chunk(1).flops


# -------------------------------------------------------------------- header --
SIZES = WanConfig(dim=32, ffn_dim=32, num_heads=1, num_layers=1, text_dim=128, text_len=16, freq_dim=16)


def saved(path: Path, steps: StepConfig) -> Path:
    torch.manual_seed(0)
    save_checkpoint(path, CausalWan(SIZES).state_dict(), SIZES, causal=CausalConfig(2, window=4), steps=steps)
    return path


def entries(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["selfforcing"])


@pytest.mark.parametrize(
    ("steps", "number"),
    [
        (StepConfig(), 1),
        (StepConfig((900.0, 100.0), shift=8.0, warp=False), 1),
        (OWN, 3),
        (ENDS_IN_ZERO, 3),
        (StepConfig((1000.0, 500.0), first_chunk_steps=(1000.0, 0.0), warp=False), 3),
    ],
)
def test_a_file_keeps_its_steps_and_only_new_ones_ask_for_a_new_version(
    steps: StepConfig, number: int, tmp_path: Path
) -> None:
    """Readers of formats 1 and 2 refuse another number, and would refuse an unknown name in every file."""
    path = saved(tmp_path / "a.safetensors", steps)
    assert read_checkpoint(path).steps == steps
    assert entries(path)["format"] == number
    assert ("first_chunk_steps" in entries(path)["steps"]) == (steps.first_chunk_steps is not None)
    convert(path, tmp_path / "b.safetensors", dtype="bfloat16")
    assert read_checkpoint(tmp_path / "b.safetensors").steps == steps
    assert entries(tmp_path / "b.safetensors")["format"] == number


def test_a_file_that_becomes_bidirectional_has_no_first_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(saved(tmp_path / "a.safetensors", OWN), tmp_path / "b.safetensors", causal=False)
    assert read_checkpoint(tmp_path / "b.safetensors").steps == OWN.of_chunk(1)
    assert "the steps of the first chunk are left out" in caplog.text


# -------------------------------------------------------------- command line --
def planned(path: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[StepConfig, str]:
    """The steps of a request, and what is said of them."""
    caplog.clear()
    sizes = {"width": 32, "height": 16, "frames": 13, "taehv": "tiny", "text_encoder": "tiny", "device": "cpu"}
    request = Request("a", path.with_name("never.mp4"), str(path), **{**sizes, **options})
    with caplog.at_level(logging.WARNING):
        steps = plan_request(request, [PromptBatch("a", "a", (request.out,))]).steps
    return steps, " ".join(record.getMessage() for record in caplog.records)


def test_options_win_over_the_files_steps_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "a.safetensors", OWN)
    steps, said = planned(path, caplog)
    assert (steps, "steps" in said) == (OWN, False)
    steps, said = planned(path, caplog, steps=(1000.0, 250.0))
    assert steps == replace(OWN, steps=(1000.0, 250.0))
    assert "says steps 1000,500; --steps 1000,250 is used" in said
    assert "of its own for the first chunk, which are kept" in said
    steps, said = planned(path, caplog, first_chunk_steps=())
    assert steps == StepConfig((1000.0, 500.0))
    assert "says first chunk steps 1000,750,500,250; --first-chunk-steps same is used" in said
    steps, said = planned(path, caplog, first_chunk_steps=3)
    assert steps.first_chunk_steps == StepConfig.even(3, shift=5.0).steps
    steps, said = planned(path, caplog, warp_steps=False)
    assert FlowSchedule(steps.of_chunk(0)).timesteps == (1000.0, 750.0, 500.0, 250.0)
    assert "says that its steps go through the shift; --no-warp-steps is used" in said
    _, said = planned(path, caplog, warp_steps=False, shift=3.0)
    assert "--shift 3 changes nothing" in said
    _, said = planned(path, caplog, image=image(tmp_path), frames=17)
    assert "no chunk takes the steps of the first one" in said


def image(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (32, 16)).save(folder / "a.png")
    return folder / "a.png"


def test_a_file_of_raw_steps_is_warped_on_request_and_counted_ones_always(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = StepConfig((900.0, 300.0), warp=False, first_chunk_steps=(900.0, 600.0, 300.0))
    path = saved(tmp_path / "a.safetensors", raw)
    steps, said = planned(path, caplog, warp_steps=True)
    assert steps == replace(raw, warp=True)
    assert "are what the model sees; --warp-steps is used" in said
    steps, _ = planned(path, caplog, steps=2)
    assert FlowSchedule(steps.of_chunk(1)).timesteps == FlowSchedule(StepConfig.even(2, shift=5.0)).timesteps
    assert FlowSchedule(steps.of_chunk(0)).timesteps == raw.first_chunk_steps, "a list of the file stays as it was"
    steps, _ = planned(path, caplog, steps=2, warp_steps=False)
    assert FlowSchedule(steps.of_chunk(1)).timesteps == (1000.0, 500.0)
    path = saved(tmp_path / "zero.safetensors", StepConfig((900.0, 0.0), warp=False))
    _, said = planned(path, caplog, shift=3.0)
    assert "changes nothing" not in said, "the noise of a pass at timestep 0 follows from the shift"


def test_the_command_line_takes_them_and_says_what_was_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a.safetensors", StepConfig())
    arguments = ["generate", "--model", str(path), "--taehv", "tiny", "--text-encoder", "tiny", "--prompt", "a"]
    arguments += ["--width", "32", "--height", "16", "--frames", "13", "--json", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "a.mp4"), "--overwrite"]
    for more, expected in (
        (["--steps", "1000,500,0", "--no-warp-steps"], {"steps": [1000, 500, 0], "warp": False}),
        (
            ["--steps", "2", "--first-chunk-steps", "3"],
            {"first_chunk_steps": list(StepConfig.even(3, shift=5.0).steps)},
        ),
        (["--first-chunk-steps", "1000,500", "--warp-steps"], {"first_chunk_steps": [1000, 500], "warp": True}),
    ):
        assert main([*arguments, *more]) == 0
        used = json.loads(capsys.readouterr().out)["steps"]
        assert {name: used[name] for name in expected} == expected
    assert main([*arguments, "--first-chunk-steps", "250,500"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
