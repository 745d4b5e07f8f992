"""Presets as users meet them: a released file runs as its source says, by itself, and every obstacle is one line."""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from selfforcing_core.codecs.taehv import TAEHV
from selfforcing_core.config import CausalConfig, StepConfig, TAEHVConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.memory import AVERAGE
from selfforcing_core.model import CausalWan
from selfforcing_core.weights import preset_settings
from selfforcing_core.weights.bundles import bundle_path, resolve_model, resolve_taehv
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.preset_settings import obstacle, partner_path, read_with_preset, unable
from selfforcing_core.weights.presets import PRESETS
from selfforcing_core.weights.recognise import Recognition
from tests.core.test_media import vae_weights
from tests.support import fakes
from tests.support.golden_media import clip_shapes

make_fake = cache(fakes.make_fake)
WARPED, BY_COMMIT = (1000, 937.5, 833.3, 625), 0
# Written out from the sources: latent frames of a chunk; timesteps of the first chunk and of the later ones as the
# network sees them, without the pass at 0 that writes; which of the file's weights; what the cache holds.
RUNS: dict[str, tuple[int, tuple[float, ...], tuple[float, ...], str, tuple[int, int]]] = {
    "self-forcing-dmd": (3, WARPED, WARPED, "ema", (21, 0)),
    "self-forcing-sid": (3, WARPED, WARPED, "ema", (21, 0)),
    "causal-forcing": (3, WARPED, WARPED, "raw", (21, 0)),
    "causal-forcing-framewise": (1, WARPED, WARPED, "ema", (21, 0)),
    # [1000, 500] through a shift of 5: 5 * 0.5 / (1 + 4 * 0.5) = 0.8333
    "causal-forcing-pp-2step": (1, WARPED, (1000, 833.3), "ema", (21, 0)),
    "causal-forcing-pp-1step": (1, WARPED, (1000,), "ema", (21, 0)),
    "causal-forcing-causal-ode": (3, WARPED, WARPED, "raw", (21, 0)),
    "causal-forcing-framewise-causal-ode": (1, WARPED, WARPED, "raw", (21, 0)),
    "causal-forcing-causal-cd": (3, WARPED, WARPED, "raw", (21, 0)),
    "causal-forcing-framewise-causal-cd": (1, WARPED, WARPED, "raw", (21, 0)),
    "longlive": (3, WARPED, WARPED, "merged", (12, 3)),
    "longlive-interactive": (3, WARPED, WARPED, "merged", (12, 3)),
    "memflow": (3, WARPED, WARPED, "merged", (12, 3)),
    "infinite-forcing": (3, WARPED, WARPED, "raw", (6, 1)),
    "reward-forcing": (3, WARPED, WARPED, "raw", (9, 3)),
    "causvid": (3, (1000, 757, 522), (1000, 757, 522), "raw", (21, 0)),
    # [1000, 750, 500, 250] through a shift of 8: 8 s / (1 + 7 s)
    "causvid-4step": (3, (1000, 960, 888.9, 727.3), (1000, 960, 888.9, 727.3), "raw", (21, 0)),
    # its last step is the pass that writes
    "streamdiffusionv2-t2v": (3, (1000, 750, 500, 250, 0), (1000, 750, 500, 250, 0), "raw", (21, 0)),
    "sfwan2.1": (3, WARPED, WARPED, "raw", (21, 0)),
}
WINDOWED = ("rolling-forcing", "krea")  # whose passes are of another kind
# Of which not all was read: the options that then have to be given, and the run as above.
INDICES = ("--steps", "1000,750,500,250", "--warp-steps")
UNREAD = ("--chunk", "3", "--window", "21", "--sink", "0", "--policy", "self-forcing", "--cache-source", "clean")
GIVEN: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "lightx2v-self-forcing-14b": (INDICES, (3, WARPED, WARPED, "raw", (21, 0))),
    "lightx2v-self-forcing-fp8": (INDICES, (3, WARPED, WARPED, "raw", (21, 0))),
    "self-forcing-10s": (
        (*INDICES, *UNREAD, "--shift", "5", "--solver", "renoise", "--weights", "ema"),
        (3, WARPED, WARPED, "ema", (21, 0)),
    ),
}
# How many chunks were made, and which frame the last one sees at which distance from its own first frame: by absolute
# positions the sink stays behind, by positions counted in the cache it stands right before the window.
SEEN: dict[str, tuple[int, dict[int, int]]] = {
    "self-forcing-dmd": (8, {frame - 21: frame for frame in range(3, 24)}),
    "causal-forcing-framewise": (22, {frame - 21: frame for frame in range(1, 22)}),
    "longlive": (5, {-12: 0, -11: 1, -10: 2} | {frame - 12: frame for frame in range(6, 15)}),
    "infinite-forcing": (5, {-3: 0, -2: 10, -1: 11, 0: 12, 1: 13, 2: 14}),
    "reward-forcing": (5, dict.fromkeys((-6, -5, -4), AVERAGE) | {frame - 12: frame for frame in range(9, 15)}),
}
# Whose file names tell them apart; the others have to be named.
UNNAMED = ("longlive", "longlive-interactive", "streamdiffusionv2-t2v", "sfwan2.1", "lightx2v-i2v-14b", "causvid-4step")
SHIFTS = {"causvid": 8, "causvid-4step": 8, "streamdiffusionv2-t2v": 8}  # others: 5
WRITTEN_BY_LAST_STEP = ("streamdiffusionv2-t2v",)


class Refused(Exception):
    """What the command line wrote on its way out."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fakes' sizes for the releases' own."""
    for name, preset in fakes.tiny_presets().items():
        monkeypatch.setitem(PRESETS, name, preset)


@pytest.fixture(scope="module")
def taehv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    path = tmp_path_factory.mktemp("decoder") / "taehv.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, TAEHV(config).state_dict(), config)
    return path


@pytest.fixture
def generate(taehv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return what makes a small video of a model file and gives its settings. It raises Refused."""

    def make(model: Path, *more: str, frames: int = 21) -> dict[str, Any]:
        arguments = ["generate", "--model", str(model), "--taehv", str(taehv), "--prompt", "a", "--json"]
        arguments += ["--text-encoder", str(bundle_path("tiny") / "text_encoder"), "--width", "32", "--height", "16"]
        arguments += ["--frames", str(frames), "--out", str(tmp_path / "a.mp4"), "--overwrite", *more]
        capsys.readouterr()
        code = main(arguments)
        output = capsys.readouterr()
        if code:
            raise Refused(output.err)
        return json.loads(output.out)

    return make


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int, CausalWan]]:
    """The calls of the network: timestep, first frame, frame behind the last, and the network."""
    log: list[tuple[float, int, int, CausalWan]] = []
    forward = CausalWan.forward

    def logged(self: CausalWan, x: torch.Tensor, timesteps: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        start = more.get("start_frame", 0)
        log.append((round(float(timesteps.flatten()[0]), 1), start, start + x.shape[1], self))
        return forward(self, x, timesteps, *rest, **more)

    monkeypatch.setattr(CausalWan, "forward", logged)
    return log


def written(name: str, folder: Path) -> Path:
    return fakes.write_fake(make_fake(name), folder / name)


def weights_of(network: CausalWan, networks: dict[str, fakes.Weights]) -> str:
    """Return which of a fake's networks this is."""
    stored = dict(network.named_parameters())
    (label,) = [
        label
        for label, weights in networks.items()
        if all(torch.equal(stored[name], tensor.float()) for name, tensor in weights.items())
    ]
    return label


# ---------------------------------------------------------------------- runs --
def test_every_release_that_runs_is_in_the_table() -> None:
    runnable = {name for name, preset in PRESETS.items() if unable(preset) is None and preset.is_causal}
    assert runnable == {*RUNS, *WINDOWED}


def test_a_release_of_another_kind_of_window_runs_as_its_source_says(
    tmp_path: Path, passes: list[Any], generate: Callable[..., dict[str, Any]]
) -> None:
    """Rolling Forcing: all chunks on the way in a pass, each a step behind the one before. Krea: no commit."""
    measured = generate(written("rolling-forcing", tmp_path), frames=4 * 15 - 3)  # five chunks
    # [1000, 800, 600, 400, 200] through a shift of 5
    listed = (1000, 952.4, 882.4, 769.2, 555.6)
    coming_in = [(listed[index], 0, 3 * index + 3) for index in range(5)]
    going_out = [(listed[4], 3 * index, 15) for index in range(1, 5)]
    commits = [(BY_COMMIT, 3 * index, 3 * index + 3) for index in range(4)]
    expected = [*coming_in, *(entry for pair in zip(commits, going_out) for entry in pair)]
    assert [entry[:3] for entry in passes] == expected
    assert measured["causal"] == {**measured["causal"], "policy": "rolling-forcing", "window": 21, "sink": 3}
    assert weights_of(passes[0][3], make_fake("rolling-forcing").networks) == "ema"
    passes.clear()
    measured = generate(written("krea", tmp_path), frames=4 * 9 - 3)  # three chunks
    steps = (1000, 937, 833, 625, 0)
    expected = [
        *((t, 0, 3) for t in steps),
        (0, 0, 3),
        *((t, 3, 6) for t in steps),
        (0, 3, 6),
        *((t, 6, 9) for t in steps),
    ]
    assert [entry[:3] for entry in passes] == expected
    assert measured["causal"] == {**measured["causal"], "policy": "krea", "window": 6, "sink": 0}


def test_another_joint_window_than_the_releases_own_is_said(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Of 12 frames, which with chunks of 3 are 4 steps; which steps was not read, so that any number may be given."""
    given = ("--preset", "causal-forcing-longvideo", "--window", "21", "--sink", "3", "--steps")
    path = written("causal-forcing-longvideo", tmp_path)
    line = "was trained with 12 frames denoised together; 5 steps and chunks of 3 make 15: give 4 steps for its own"
    generate(path, *given, "1000,750,500,250", frames=45)
    assert "denoised together" not in caplog.text
    generate(path, *given, "1000,800,600,400,200", frames=57)
    assert line in caplog.text


@pytest.mark.parametrize("name", [*RUNS, *GIVEN])
def test_a_release_runs_as_its_source_says(
    name: str, tmp_path: Path, passes: list[Any], generate: Callable[..., dict[str, Any]]
) -> None:
    """Three chunks: what the network is called with is the source's list, chunk by chunk, and nothing else."""
    options, (chunk, first, later, weights, (window, sink)) = GIVEN[name] if name in GIVEN else ((), RUNS[name])
    path = written(name, tmp_path)
    named = ["--preset", name] if name in (*UNNAMED, *GIVEN) else []
    measured = generate(path, *named, *options, frames=4 * 3 * chunk - 3)
    commit = () if name in WRITTEN_BY_LAST_STEP else (BY_COMMIT,)
    expected = [
        *((t, 0, chunk) for t in (*first, *commit)),
        *((t, chunk, 2 * chunk) for t in (*later, *commit)),
        *((t, 2 * chunk, 3 * chunk) for t in later),  # nothing follows that would see it
    ]
    assert [entry[:3] for entry in passes] == expected
    assert all(entry[3] is passes[0][3] for entry in passes)
    assert weights_of(passes[0][3], make_fake(name).networks) == weights
    assert (measured["causal"]["window"], measured["causal"]["sink"]) == (window, sink)
    assert (measured["preset"], measured["steps"]["shift"]) == (name, SHIFTS.get(name, 5))


@pytest.mark.parametrize("name", SEEN)
def test_frames_stand_where_the_releases_source_puts_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate: Callable[..., dict[str, Any]]
) -> None:
    """Of every frame that a network's last pass sees: the position that its keys are turned to, beside the queries'."""
    stood: list[dict[float, int]] = []
    forward = CausalWan.forward

    def logged(self: CausalWan, *inputs: Any, cache: KVCache, **more: Any) -> torch.Tensor:
        result = forward(self, *inputs, cache=cache, **more)
        slots = range(len(cache.frames()))
        stood.append({cache.slot_positions[slot] - cache.position: cache.slot_frames[slot] for slot in slots})
        return result

    monkeypatch.setattr(CausalWan, "forward", logged)
    num_chunks, log = SEEN[name]
    named = ["--preset", name] if name in UNNAMED else []
    generate(written(name, tmp_path), *named, frames=4 * num_chunks * RUNS[name][0] - 3)
    assert stood[-1] == log


def test_a_bidirectional_release_makes_all_frames_at_once(
    tmp_path: Path, passes: list[Any], generate: Callable[..., dict[str, Any]]
) -> None:
    generate(written("lightx2v-t2v-14b", tmp_path), frames=9)
    assert [entry[:3] for entry in passes] == [(t, 0, 3) for t in WARPED]


def test_a_bidirectional_release_with_a_picture_makes_all_frames_at_once(
    tmp_path: Path, passes: list[Any], generate: Callable[..., dict[str, Any]]
) -> None:
    save_file(vae_weights(), tmp_path / "vae.safetensors")
    sizes = {"image_size": 28, "patch_size": 14, "dim": 1280, "mlp_ratio": 1, "out_dim": 8, "num_layers": 2}
    save_file({name: torch.ones(shape) for name, shape in clip_shapes(sizes).items()}, tmp_path / "clip.safetensors")
    Image.new("RGB", (40, 30)).save(tmp_path / "start.png")
    more = ["--image", str(tmp_path / "start.png"), "--preset", "lightx2v-i2v-14b"]
    more += [word for name in ("vae", "clip") for word in (f"--{name}", str(tmp_path / f"{name}.safetensors"))]
    measured = generate(written("lightx2v-i2v-14b", tmp_path), *more, frames=9)
    assert [entry[:3] for entry in passes] == [(t, 0, 3) for t in WARPED]
    assert {weights_of(entry[3], make_fake("lightx2v-i2v-14b").networks) for entry in passes} == {"raw"}
    assert measured["preset"] == "lightx2v-i2v-14b"


def test_a_preset_brings_size_and_rate_where_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfforcing_core.generate.plan import plan_request
    from selfforcing_core.generate.request import PromptBatch, Request

    changed = replace(PRESETS["causvid"], fps=24.0, native_size=(64, 96), open_questions={})
    monkeypatch.setitem(PRESETS, "causvid", changed)
    out = tmp_path / "a.mp4"
    request = Request("a", out, str(written("causvid", tmp_path)), taehv="tiny", text_encoder="tiny")
    batches = [PromptBatch("a", "a", (out,))]
    plan = plan_request(request, batches)
    assert (plan.fps, plan.extent.geometry.width, plan.extent.geometry.height) == (24, 96, 64)
    plan = plan_request(replace(request, fps=8, width=32, height=16), batches)
    assert (plan.fps, plan.extent.geometry.width, plan.extent.geometry.height) == (8, 32, 16)


# ---------------------------------------------------------------- precedence --
def test_explicit_comes_before_preset_before_header_and_each_is_said(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = read_checkpoint(written("causvid", tmp_path))
    path, header = tmp_path / "m.safetensors", CausalConfig(chunk=1, window=5)
    save_checkpoint(path, dict(checkpoint.state_dict), checkpoint.config, causal=header, steps=StepConfig(shift=3.0))
    assert generate(path)["causal"]["chunk"] == 1
    measured = generate(path, "--preset", "causvid", "--window", "6")
    assert (measured["causal"]["chunk"], measured["causal"]["window"]) == (3, 6)
    assert measured["steps"] | {"steps": [1000, 757, 522], "shift": 8, "warp": False} == measured["steps"]
    lines = caplog.text
    assert f"{path} says chunk 1; causvid's 3 is used" in lines
    assert "says shift 3; causvid's 8 is used" in lines
    assert f"{path} (causvid) says window 21; --window 6 is used" in lines
    assert generate(path, "--preset", "none")["causal"]["window"] == 5


def test_recognised_files_say_what_they_are_taken_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reading = read_with_preset(written("causal-forcing-framewise", tmp_path))
    assert reading.preset is PRESETS["causal-forcing-framewise"]
    (note,) = reading.notes
    assert "run as causal-forcing-framewise (Causal Forcing 1.3B, frame by frame), by its file name" in note


def test_a_file_that_any_release_fits_runs_as_before_and_says_so(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(dict(read_checkpoint(written("causvid", tmp_path)).state_dict), path)
    measured = generate(path)
    assert measured["causal"]["window"] == -1
    assert measured["steps"] == StepConfig().to_dict()
    assert "preset" not in measured
    lines = [record.message for record in caplog.records if "shapes of" in record.message]
    assert len(lines) == 1
    assert "self-forcing-dmd, self-forcing-sid" in lines[0]


def test_releases_that_run_differently_are_asked_about(tmp_path: Path) -> None:
    stored = dict(read_checkpoint(written("causvid", tmp_path)).state_dict)
    path = tmp_path / "causal_cd.pt"
    torch.save({"generator": fakes.model(stored)}, path)
    names = "causal-forcing-causal-cd, causal-forcing-framewise-causal-cd"
    with pytest.raises(ValueError, match=f"may be {names}, which run differently; say which"):
        read_with_preset(path)
    assert read_with_preset(path, "none").preset is None
    assert read_with_preset(path, "causal-forcing-causal-cd").preset is PRESETS["causal-forcing-causal-cd"]
    (note,) = read_with_preset(path, given={"chunk"}).notes  # by which alone they differ
    assert note == f"may be {names}, which run alike"


def test_a_training_file_of_no_name_is_asked_about_and_a_plain_one_is_not(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Its containers are those of the family's trainers, whose models run in many ways; a base model has none."""
    stored = dict(read_checkpoint(written("causvid", tmp_path)).state_dict)
    path = tmp_path / "model.pt"
    torch.save({"generator": fakes.model(stored)}, path)
    with pytest.raises(
        Refused, match=r"may be self-forcing-dmd, .* which run differently; say which by preset, or none"
    ):
        generate(path)
    for explicit in (["--preset", "none"], ["--chunk", "3"], ["--policy", "self-forcing"]):
        assert "preset" not in generate(path, *explicit, frames=9)
    assert "it is run as if it were none of them" in caplog.text
    assert read_with_preset(path, given={"kind"}).preset is None
    torch.save({"model": stored}, path)
    assert "preset" not in generate(path, frames=9)


def test_another_size_another_release_and_an_unread_picture_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, generate: Callable[..., dict[str, Any]]
) -> None:
    checkpoint, path = read_checkpoint(written("krea", tmp_path)), tmp_path / "m.safetensors"
    save_checkpoint(path, dict(checkpoint.state_dict), checkpoint.config, preset="causal-forcing")
    notes = read_with_preset(path, "causvid").notes
    assert "says that it is causal-forcing; it is run as causvid" in notes
    sizes = PRESETS["causvid"].sizes
    assert sizes is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "causvid", replace(PRESETS["causvid"], sizes=replace(sizes, num_layers=30)))
        assert any("does not have the shapes of causvid" in note for note in read_with_preset(path, "causvid").notes)
    generate(path, "--preset", "causvid")
    assert "has no rate that was read; it makes 32x16 at 16 frames a second" in caplog.text


def test_weights_are_those_of_the_preset_unless_others_are_asked_for(tmp_path: Path) -> None:
    fake = make_fake("causal-forcing-both")
    path = fakes.write_fake(fake, tmp_path)

    def network(**options: Any) -> str:
        reading = read_with_preset(path, "causal-forcing", **options)
        head = reading.checkpoint.state_dict["head.head.weight"]
        (label,) = [label for label, weights in fake.networks.items() if torch.equal(weights["head.head.weight"], head)]
        return label

    assert network() == "raw"
    assert network(weights="ema") == "ema"
    notes = read_with_preset(path, "causal-forcing", weights="ema").notes
    assert any("is run with its raw weights; ema ones are used" in note for note in notes)


# ------------------------------------------------------------------ refusals --
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("self-forcing-10s", r"self-forcing-10s leaves chunk, .* policy, .* open \(its .* is not public.*--policy"),
        ("causal-forcing-ar-diffusion", r"leaves steps, warp, shift, solver, guidance open .* give --steps, .* --cfg"),
        ("self-forcing-dmd-without-ema", "self-forcing-dmd is run with ema weights: .* has no ema weights"),
    ],
)
def test_what_cannot_run_as_released_is_one_line(
    name: str, sentence: str, tmp_path: Path, generate: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(Refused, match=sentence) as caught:
        generate(written(name, tmp_path))
    assert str(caught.value).count("\n") == 1
    assert not (tmp_path / "a.mp4").exists()


def test_a_release_of_a_policy_that_there_is_not_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setattr(preset_settings, "POLICIES", ("self-forcing",))
    sentence = "rolling-forcing .* cache policy 'rolling-forcing' this version does not have; preset none"
    with pytest.raises(Refused, match=sentence) as caught:
        generate(written("rolling-forcing", tmp_path))
    assert str(caught.value).count("\n") == 1


def test_open_settings_are_asked_for_only_where_they_are_not_given(tmp_path: Path) -> None:
    path = written("lightx2v-self-forcing-fp8", tmp_path)
    with pytest.raises(ValueError, match="give --steps, --warp-steps or --no-warp-steps, or in ComfyUI"):
        read_with_preset(path, "lightx2v-self-forcing-fp8")
    reading = read_with_preset(path, "lightx2v-self-forcing-fp8", given={"steps", "warp"})
    assert reading.preset is not None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("self-forcing-10s", "run it on the command line, since no node sets a solver"),
        ("causal-forcing-longvideo", "set window and sink in Cache Options, steps in Sigmas, and what"),
        ("causal-forcing-ar-diffusion", "run it on the command line"),
    ],
)
def test_a_recognised_release_is_never_run_as_another_model(name: str, remedy: str, tmp_path: Path) -> None:
    """As Load Model reads it, where nothing is explicit; preset none is what runs it as whatever it is."""
    path = written(name, tmp_path)
    with pytest.raises(ValueError, match=rf"leaves .* in ComfyUI .*{remedy}.*; preset none runs it by its header"):
        read_with_preset(path, given=("low_noise",))
    assert read_with_preset(path, "none").preset is None


def test_what_is_open_is_given_on_the_command_line(
    tmp_path: Path, passes: list[Any], generate: Callable[..., dict[str, Any]]
) -> None:
    fp8 = ["--preset", "lightx2v-self-forcing-fp8", "--steps", "1000,500"]
    generate(written("lightx2v-self-forcing-fp8", tmp_path), *fp8, "--warp-steps", frames=9)
    assert [entry[0] for entry in passes] == [1000, 833.3]
    passes.clear()
    # a number of steps goes through the shift
    open_ones = ("--steps", "2", "--shift", "5", "--solver", "euler", "--cfg", "1")
    generate(written("causal-forcing-ar-diffusion", tmp_path), *open_ones, frames=9)
    assert [entry[0] for entry in passes] == [1000, 833.3]


@pytest.mark.parametrize("flaw", fakes.FLAWS)
def test_a_fake_with_one_thing_wrong_ends_in_one_line(
    flaw: str, tmp_path: Path, generate: Callable[..., dict[str, Any]]
) -> None:
    name = fakes.FLAWS[flaw][0]
    with pytest.raises(Refused) as caught:
        generate(written(flaw, tmp_path), *(["--preset", name] if name in PRESETS else []))
    assert str(caught.value).startswith("selfforcing: ")
    assert str(caught.value).count("\n") == 1
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("flaw", ["longlive-without-lora", "lightx2v-wan2.2-i2v-without-twin"])
def test_a_partner_that_is_missing_comes_with_the_line_that_fetches_it(
    flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once the cache has the policy: what keeps it from running then is the file."""
    monkeypatch.setattr(preset_settings, "POLICIES", (*preset_settings.POLICIES, "longlive"))
    name = fakes.FLAWS[flaw][0]
    path = written(flaw, tmp_path)
    with pytest.raises(ValueError, match=rf"needs \S+ beside it; fetch it with: .* download {name}"):
        read_with_preset(path, name)
    whole = written(name, tmp_path)
    assert "beside it" not in (obstacle(PRESETS[name], whole) or "")


@pytest.mark.parametrize("folder", ["models", "elsewhere"])
def test_the_line_that_fetches_a_partner_is_all_that_is_missing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base lies where it lay; what the command puts into its folder is found, in whatever folder that is."""
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / folder] if folder == "elsewhere" else []
    fake, path = make_fake("longlive"), written("longlive-without-lora", tmp_path)
    fetched_from(fake, monkeypatch)
    with pytest.raises(ValueError, match="fetch it with: python -m selfforcing_core download") as caught:
        read_with_preset(path, "longlive", folders=folders)
    line = str(caught.value).partition("fetch it with: python -m selfforcing_core ")[2].partition(";")[0]
    assert main(shlex.split(line)) == 0, capsys.readouterr().err
    assert (tmp_path / folder / "longlive/models/lora.pt").is_file()
    for name in ("longlive", "longlive-interactive"):  # which share their files
        merged = read_with_preset(path, name, folders=folders).checkpoint.state_dict["blocks.0.ffn.0.weight"]
        assert torch.equal(merged, fake.networks["merged"]["blocks.0.ffn.0.weight"])


def test_every_open_setting_is_asked_for_at_once(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What `presets` and `inspect` list is all that a run needs: weights of a file with both, and a boundary, too."""
    path = written("self-forcing-10s", tmp_path)
    answers = "--chunk 3 --window 21 --sink 0 --policy self-forcing --cache-source clean --steps 2 --warp-steps"
    answers += " --shift 5 --solver renoise"
    with pytest.raises(Refused, match=r"leaves weights open .* give --weights ema or raw"):
        generate(path, *answers.split(), frames=9)
    assert generate(path, *answers.split(), "--weights", "raw", frames=9)["preset"] == "self-forcing-10s"
    assert main(["inspect", str(path)]) == 0
    (line,) = json.loads(capsys.readouterr().out)["preset"]["missing"]
    assert "--weights ema or raw" in line
    (line,) = [line for line in preset_settings.lacking(PRESETS["causalwan2.2-t2v"]) if "--boundary" in line]
    assert "read the folder" in line
    assert not any("--boundary" in line for line in preset_settings.lacking(PRESETS["causalwan2.2-t2v"], ("boundary",)))


def test_what_nobody_has_said_is_not_said_to_give_way(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    path = written("causal-forcing-longvideo", tmp_path)
    generate(path, "--window", "21", "--sink", "3", "--steps", "1000,500,250,100", "--shift", "6", frames=4 * 12 - 3)
    assert "says shift 5; --shift 6 is used" in caplog.text
    assert not any(f"says {name}" in caplog.text for name in ("window", "sink", "steps"))
    caplog.clear()
    fp8 = written("lightx2v-self-forcing-fp8", tmp_path)
    more = ("--preset", "lightx2v-self-forcing-fp8", "--steps", "1000,500", "--no-warp-steps")
    generate(fp8, *more, frames=9)
    assert not any(f"says {name}" in caplog.text for name in ("steps", "that its steps"))


def test_a_folder_of_two_networks_is_asked_about_or_known_by_its_class(
    tmp_path: Path, generate: Callable[..., dict[str, Any]]
) -> None:
    folder = written("causalwan2.2-t2v", tmp_path)
    with pytest.raises(Refused, match=r"is one of two networks and may be causalwan2\.2-t2v or a base model; say"):
        generate(folder)
    assert "preset" not in generate(folder, "--preset", "none")
    assert "preset" not in generate(folder, "--chunk", "3", frames=21)
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "WanCausalDMDPipeline", "boundary_ratio": 0.875}))
    with pytest.raises(Refused, match=r"preset causalwan2\.2-t2v leaves chunk open"):
        generate(folder)
    measured = generate(folder, "--chunk", "3", frames=13)
    assert (measured["preset"], measured["steps"]["solver"]) == ("causalwan2.2-t2v", "phased")
    single = written("sfwan2.1", tmp_path)
    (single / "model_index.json").write_text(json.dumps({"_class_name": "WanCausalDMDPipeline"}))
    reading = read_with_preset(single)
    assert (reading.preset, reading.notes[0].endswith("by its pipeline's class")) == (PRESETS["sfwan2.1"], True)


def test_a_network_with_a_pictures_channels_is_asked_about(tmp_path: Path) -> None:
    path = written("wan2.2-i2v-alone", tmp_path)
    with pytest.raises(ValueError, match=r"has 36 input channels and may be .*lightx2v-wan2\.2-i2v.*; say which"):
        read_with_preset(path, given=("low_noise",))
    assert read_with_preset(path, given=("low_noise", "kind")).preset is None


def test_lines_speak_in_the_words_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = read_checkpoint(written("causvid", tmp_path))
    steps, path = StepConfig(first_chunk_steps=(1000.0, 500.0)), tmp_path / "m.safetensors"
    save_checkpoint(path, dict(checkpoint.state_dict), checkpoint.config, causal=CausalConfig(), steps=steps)
    assert "says first chunk steps 1000,500; causvid's same is used" in read_with_preset(path, "causvid").notes
    with pytest.raises(ValueError, match=r"no ema weights, .*; use --weights raw \(in ComfyUI: weights in Load"):
        read_checkpoint(written("causal-forcing", tmp_path), weights="ema")
    average, copy = written("self-forcing-dmd", tmp_path), tmp_path / "copy.safetensors"
    assert main(["convert", str(average), str(copy)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(copy)]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == ["as stored"], "which are the average"
    assert main(["inspect", str(average)]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == ["raw", "ema"]
    with pytest.MonkeyPatch.context() as patch:
        only = Recognition((PRESETS["causvid"],), "names and shapes")
        patch.setattr(preset_settings, "recognise", lambda *_: only)
        plain = tmp_path / "mine.safetensors"
        save_file(dict(checkpoint.state_dict), plain)
        assert "nothing says that it is this one; it is run as if it were not" in read_with_preset(plain).notes[0]


STYLED = "blocks.0.ffn.0.weight"


def style(path: Path, **tensors: torch.Tensor) -> Path:
    """Write a LoRA of a rank that no release has; else these parts of it."""
    parts = tensors or {"lora_down.weight": torch.ones(2, 128), "lora_up.weight": torch.ones(256, 2)}
    save_file({f"diffusion_model.{STYLED.removesuffix('.weight')}.{name}": each for name, each in parts.items()}, path)
    return path


def test_another_lora_or_one_of_no_strength_is_not_a_presets_own(
    tmp_path: Path, generate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    base = written("longlive-without-lora", tmp_path)
    own = written("longlive", tmp_path / "whole").parent / "lora.pt"
    for file, strength in ((style(tmp_path / "style.safetensors"), "1"), (own, "0")):
        with pytest.raises(Refused, match=r"needs models/lora\.pt beside it; fetch it with: .* download longlive"):
            generate(base, "--preset", "longlive", "--lora", str(file), strength)
        assert main(["inspect", str(base), "--preset", "longlive", "--lora", str(file), strength]) == 0
        assert len(json.loads(capsys.readouterr().out)["preset"]["missing"]) == 1
    assert generate(base, "--preset", "longlive", "--lora", str(own), frames=9)["preset"] == "longlive"


def test_a_presets_own_lora_that_is_given_once_more_is_said(tmp_path: Path) -> None:
    path, lora = written("longlive-one-file", tmp_path), written("longlive", tmp_path).parent / "lora.pt"
    reading = read_with_preset(path, "longlive", loras=[(lora, 1.0)])
    assert any("has the LoRA of longlive already; " in note and str(lora) in note for note in reading.notes)
    plain = read_with_preset(path, "longlive", loras=[(style(tmp_path / "style.safetensors"), 1.0)])
    assert not any("already" in note for note in plain.notes)


def test_a_presets_own_lora_is_merged_before_those_that_are_given(tmp_path: Path) -> None:
    """As ComfyUI does, whose loader has it already: of what replaces a weight nothing else is left."""
    path, whole = written("longlive", tmp_path), torch.full((256, 128), 0.5)
    lora = style(tmp_path / "style.safetensors", set_weight=whole)
    for reading in (
        read_with_preset(path, "longlive", loras=[(lora, 1.0)]),
        preset_settings.read_to_copy(path, "longlive", loras=[(lora, 1.0)]),
    ):
        assert torch.equal(reading.checkpoint.state_dict[STYLED].float(), whole)
        assert [Path(each["file"]).name for each in reading.checkpoint.loras] == ["lora.pt", "style.safetensors"]


def test_a_partner_by_a_common_name_is_nobodys_own_in_a_folder_of_many(tmp_path: Path) -> None:
    """lora.pt among a user's other LoRA may be that of any release; the twin's name is its own."""
    loras, base = tmp_path / "loras", written("longlive-without-lora", tmp_path)
    loras.mkdir()
    (loras / "lora.pt").touch()
    assert partner_path(PRESETS["longlive"], base, "models/lora.pt", [loras]) is None
    high = written("lightx2v-wan2.2-i2v-without-twin", tmp_path)
    twin = loras / fakes.LIGHTX2V_PAIR[1]
    twin.touch()
    preset = PRESETS["lightx2v-wan2.2-i2v"]
    assert preset.twin is not None
    assert partner_path(preset, high, preset.twin.file, [loras]) == twin


def test_a_release_of_one_torch_file_in_a_folder_is_found_where_it_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake = make_fake("streamdiffusionv2-14b")
    with pytest.raises(ValueError, match="fetch it with: download streamdiffusionv2-14b"):
        resolve_model("streamdiffusionv2-14b")
    fetched_from(fake, monkeypatch)
    assert main(["download", "streamdiffusionv2-14b"]) == 0
    stored = read_checkpoint(resolve_model("streamdiffusionv2-14b")).state_dict
    assert torch.equal(stored["head.head.weight"], fake.networks["raw"]["head.head.weight"])


def fetched_from(fake: fakes.Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub have the files of a fake."""

    class Api:
        def model_info(self, repo: str, **_: Any) -> Any:
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1) for name in fake.files])

    def fetch(repo: str, file: str, *, local_dir: Path) -> str:
        fakes.write_fake(replace(fake, files={file: fake.files[file]}), Path(local_dir))
        return str(Path(local_dir) / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)


def test_a_header_of_a_later_version_is_named(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(written("causvid", tmp_path))
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, dict(checkpoint.state_dict), checkpoint.config, preset="causvid-2")
    with pytest.raises(ValueError, match=r"m.safetensors: there is no preset 'causvid-2'; did you mean causvid"):
        read_with_preset(path)
    assert read_with_preset(path, "none").preset is None


def test_a_low_noise_half_names_the_other_one_and_what_to_do(
    tmp_path: Path, generate: Callable[..., dict[str, Any]]
) -> None:
    high = written("lightx2v-wan2.2-i2v", tmp_path)
    low = high.parent / fakes.LIGHTX2V_PAIR[1]
    with pytest.raises(Refused, match=f"is the low-noise half of .*; give {high} as the model") as caught:
        generate(low)
    assert str(caught.value).count("\n") == 1
    high.unlink()
    with pytest.raises(Refused, match=r"give wan2.2_i2v_A14b_high_noise_lightx2v_4step.* as the model"):
        generate(low)
    folder = written("causalwan2.2-i2v", tmp_path)
    for half in (folder / "transformer_2", folder / "transformer_2/diffusion_pytorch_model.safetensors"):
        for more in ([], ["--preset", "causalwan2.2-i2v"]):
            with pytest.raises(Refused, match=f"low-noise half of .*; give {folder}/transformer as"):
                generate(half, *more)
    assert read_with_preset(low, given=("low_noise",)).preset is PRESETS["lightx2v-wan2.2-i2v"]


# -------------------------------------------------------- inspect and convert --
def test_a_lora_that_is_given_is_not_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = written("longlive-without-lora", tmp_path)
    lora = written("longlive", tmp_path / "elsewhere").parent / "lora.pt"
    for more, count in (([], 1), (["--lora", str(lora)], 0)):
        assert main(["inspect", str(base), "--preset", "longlive", *more]) == 0
        assert len(json.loads(capsys.readouterr().out)["preset"]["missing"]) == count


@pytest.mark.parametrize("name", [*RUNS, "lightx2v-t2v-14b", "lightx2v-i2v-14b"])
def test_a_release_goes_through_inspect_and_convert_and_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, copy, back = written(name, tmp_path), tmp_path / "copy.safetensors", tmp_path / "back.pt"
    named = ["--preset", name] if name in UNNAMED else []
    chunk, weights = (RUNS[name][0], RUNS[name][3]) if name in RUNS else (None, "raw")
    assert main(["inspect", str(path), *named]) == 0
    entry = json.loads(capsys.readouterr().out)["preset"]
    assert (entry["name"], (entry["causal"] or {}).get("chunk"), entry["missing"]) == (name, chunk, [])
    assert main(["convert", str(path), str(copy), *named]) == 0
    capsys.readouterr()
    assert main(["inspect", str(copy)]) == 0
    entry = json.loads(capsys.readouterr().out)["preset"]
    assert (entry["name"], entry["by"]) == (name, "header")
    first, second = read_with_preset(path, name), read_with_preset(copy)
    assert second.preset is first.preset
    assert second.checkpoint.settings == first.checkpoint.settings == read_checkpoint(copy).settings
    convert(copy, back)
    network = make_fake(name).networks[weights]
    stored = read_checkpoint(back, weights="auto").state_dict
    assert all(torch.equal(stored[key], tensor) for key, tensor in network.items())


def test_a_copy_of_what_cannot_run_says_what_it_is_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.safetensors"
    monkeypatch.setattr(preset_settings, "POLICIES", ("self-forcing",))
    with caplog.at_level(logging.WARNING):
        convert(written("rolling-forcing", tmp_path), copy)
    assert "cache policy 'rolling-forcing'" in caplog.text
    assert read_checkpoint(copy).preset == "rolling-forcing"
    with pytest.raises(ValueError, match="is rolling-forcing"):
        read_with_preset(copy)


# ---------------------------------------------------------------------- table --
def test_the_command_lists_every_preset_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == list(PRESETS)
    assert any("checkpoints/self_forcing_dmd.pt: fetch with download self-forcing-dmd" in line for line in lines)
    file = tmp_path / "models/self-forcing-dmd/checkpoints/self_forcing_dmd.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["self-forcing-dmd"]["missing"] == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preset_settings, "POLICIES", ("self-forcing",))
        assert "cache policy rolling-forcing" in preset_settings.lacking(PRESETS["rolling-forcing"])
    assert rows["streamdiffusionv2"]["missing"][0] == "a way to change a given video"
    assert "not supported" in rows["matrix-game-2"]["missing"][0]
    assert "--steps" in rows["causal-forcing-ar-diffusion"]["missing"][0]
    assert rows["causvid"]["sources"]["steps"] == "tianweiy/CausVid configs/wan_causal_dmd.yaml"


def test_the_page_of_models_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    assert main(["presets", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in page


def test_of_two_versions_the_partner_is_that_of_the_same_version(tmp_path: Path) -> None:
    preset, names = PRESETS["lightx2v-wan2.2-i2v"], {}
    assert preset.twin is not None
    for half, version in itertools.product(("high", "low"), ("", "_1030")):
        path = tmp_path / f"wan2.2_i2v_A14b_{half}_noise_lightx2v_4step{version}.safetensors"
        path.touch()
        names[half, version] = path
    for version in ("", "_1030"):
        assert partner_path(preset, names["high", version], preset.twin.file) == names["low", version]
    names["low", ""].rename(tmp_path / "wan2.2_i2v_A14b_low_noise_lightx2v_4step_720.safetensors")
    nameless = names["high", ""].rename(tmp_path / "wan2.2_high_noise_4step.safetensors")
    with pytest.raises(ValueError, match="several files may belong to it"):
        partner_path(preset, nameless, preset.twin.file)


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("kind", ["taehv", "LoRA"])
def test_a_preset_of_what_is_no_video_model_is_refused(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be dropped without a word; the copy is not written either."""
    file = tmp_path / "file.safetensors"
    if kind == "LoRA":
        save_file(fakes.make_fake("longlive").files["models/lora.pt"]["generator_lora"], file)
    else:
        shutil.copyfile(resolve_taehv("tiny"), file)
    copy = tmp_path / "copy.safetensors"
    assert main([command, str(file), *([str(copy)] if command == "convert" else []), "--preset", "krea"]) == 2
    assert f"is a {kind}, and preset 'krea' is of a video model; leave it out" in capsys.readouterr().err
    assert not copy.exists()
