"""Two networks on the command line: where they are found, what divides the steps, what is said, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfforcing_core.codecs.taehv import TAEHV
from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig, TAEHVConfig, WanConfig
from selfforcing_core.experts import HIGH, LOW, TakingTurns
from selfforcing_core.generate import pair as pair_module
from selfforcing_core.generate import run as run_module
from selfforcing_core.generate.cli import main
from selfforcing_core.generate.plan import plan_request
from selfforcing_core.generate.request import PromptBatch, Request
from selfforcing_core.model import CausalWan
from selfforcing_core.roofline.meter import Recipe
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.weights.bundles import bundle_path
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.pipeline_folder import PipelineFolder, read_pipeline
from selfforcing_core.weights.preset_settings import read_to_copy, read_with_preset
from selfforcing_core.weights.presets import PRESETS
from tests.core.test_cli import refusal
from tests.core.test_media import vae_weights
from tests.support.fakes import make_fake, tiny_presets, write_fake
from tests.support.tiny_wan import random_wan

SIZES: dict[str, Any] = {"dim": 32, "ffn_dim": 32, "num_heads": 1, "num_layers": 1}
SIZES |= {"text_dim": 128, "text_len": 16, "freq_dim": 16}  # of the bundled text encoder
STEPS = StepConfig((1000.0, 750.0, 500.0, 250.0))  # 1000, 937.5, 833.3, 625


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two networks, their autoencoder, and a copy of the first as both of a pair."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    config, causal = WanConfig(**SIZES), CausalConfig(3, window=9)
    for seed, name in enumerate(("high", "low")):
        weights = dict(random_wan(seed, config, torch.float32).state_dict())
        save_checkpoint(folder / f"{name}.safetensors", weights, config, causal=causal, steps=STEPS)
        if name == "high":
            save_checkpoint(folder / "same.safetensors", weights, config)
    larger = replace(config, num_layers=2)
    save_checkpoint(folder / "larger.safetensors", random_wan(0, larger, torch.float32).state_dict(), larger)
    small = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    save_checkpoint(folder / "taehv.safetensors", TAEHV(small).state_dict(), small)
    save_file(vae_weights(), folder / "vae.safetensors")
    Image.effect_noise((40, 30), 80).convert("RGB").save(folder / "start.png")
    return folder


def command(files: Path, model: Path, out: Path, *more: object) -> list[str]:
    given: list[object] = ["--model", model, "--taehv", files / "taehv.safetensors"]
    given += ["--taehv-latents", "wan2.1", "--text-encoder", bundle_path("tiny") / "text_encoder"]
    given += ["--prompt", "a", "--width", 32, "--height", 16, "--out", out / "a.mp4", "--overwrite", "--json"]
    return ["generate", *map(str, [*given, *more])]


def latents_of(options: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> torch.Tensor:
    assert main([*options, "--latents", str(out / "a.safetensors")]) == 0, capsys.readouterr().err
    return load_file(out / "a.safetensors")["latents"]


def test_two_equal_files_make_the_video_of_one(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In chunks, with guidance and a later prompt, and at once; taking turns or not, in 8 bits too."""
    high, same = files / "high.safetensors", files / "same.safetensors"
    later = ["--frames", 33, "--prompt", "0s: a; 1s: b", "--cfg", 2, "--negative", "c"]
    for more in (later, ["--chunk", 3, "--frames", 9, "--window", -1, "--fp8", "--cache-dtype", "int8"]):
        alone = latents_of(command(files, high, tmp_path, *more), tmp_path, capsys)
        two = ["--low-noise", same, "--boundary", 0.9]
        for turns in ([], ["--offload-expert"]):
            both = latents_of(command(files, high, tmp_path, *more, *two, *turns), tmp_path, capsys)
            assert torch.equal(both, alone)
    other = latents_of(
        command(files, high, tmp_path, *later, "--low-noise", files / "low.safetensors", "--boundary-step", 2),
        tmp_path,
        capsys,
    )
    assert not torch.equal(other, latents_of(command(files, high, tmp_path, *later), tmp_path, capsys))


def test_one_of_two_networks_is_on_the_device_at_a_time(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[int] = []

    class Watched(TakingTurns):
        def __call__(self, index: int) -> None:
            super().__call__(index)
            brought.append(index)

    monkeypatch.setattr(run_module, "TakingTurns", Watched)
    two = ["--low-noise", files / "low.safetensors", "--boundary", 0.9, "--frames", 33]
    options = command(files, files / "high.safetensors", tmp_path, *two)
    apart = latents_of([*options, "--offload-expert"], tmp_path, capsys)
    assert brought == [HIGH, LOW] * 3  # three chunks
    brought.clear()
    assert torch.equal(latents_of(options, tmp_path, capsys), apart)
    assert not brought


@pytest.mark.parametrize(("free_bytes", "is_alternating"), [(60e9, True), (90e9, False)])
def test_networks_take_turns_where_both_do_not_fit(
    free_bytes: float, is_alternating: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of 14B in 16 bits weigh 57 GB, before caches."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 140e9))
    recipe = Recipe(NETWORK_SIZES["t2v-14b"], (3,) * 7, 60, 104, window=9, networks=2, resident=2)
    request = Request(prompt="a", out=Path("a.mp4"))
    assert (
        pair_module.takes_turns(
            request,
            recipe,
            torch.device("cuda"),
        )
        is is_alternating
    )
    assert ("take turns" in caplog.text) is is_alternating
    caplog.clear()
    assert pair_module.takes_turns(replace(request, offload_expert=True), recipe, torch.device("cuda"))
    assert not pair_module.takes_turns(request, recipe, torch.device("cpu"))
    assert not caplog.text
    # what the run is then said to need: the weights of one, the caches of both
    one, both = (replace(recipe, resident=count).peak_bytes() for count in (1, 2))
    alone = replace(recipe, networks=1, resident=1).peak_bytes()
    assert both["weights"] == 2 * one["weights"] == 2 * alone["weights"]
    assert both["caches"] == one["caches"] == 2 * alone["caches"]


def test_the_meter_counts_a_pass_into_each_cache() -> None:
    alone = Recipe(NETWORK_SIZES["t2v-14b"], (3, 3), 60, 104, decoder="none")
    both = replace(alone, networks=2)
    assert both.chunk(0).flops - alone.chunk(0).flops == alone.a_pass(0).flops
    assert both.chunk(1) == alone.chunk(1)  # the last is written by none
    assert both.until_shown(0) == alone.until_shown(0)


# ----------------------------------------------------------------- releases --
def pipeline(folder: Path, name: str) -> Path:
    return write_fake(make_fake(name), folder)


@pytest.mark.parametrize(("name", "shift"), [("causalwan2.2-i2v", 12.0), ("causalwan2.2-t2v", 5.0)])
def test_a_pipelines_folder_brings_both_networks_their_boundary_and_shift(
    name: str, shift: float, files: Path, tmp_path: Path
) -> None:
    folder = pipeline(tmp_path / "model", name)
    assert read_pipeline(folder).shift == shift
    plan = planned(files, folder, tmp_path)
    assert plan.pair is not None
    assert (plan.steps.boundary, plan.steps.shift) == (0.875, shift)
    networks = make_fake(name).networks
    for checkpoint, network in ((plan.checkpoint, networks["high"]), (plan.pair.low, networks["low"])):
        assert checkpoint.state_dict.keys() == network.keys()
        assert all(torch.equal(checkpoint.state_dict[key], weight) for key, weight in network.items())
    assert planned(files, folder, tmp_path, shift=8.0, boundary=0.9).steps.shift == 8


def test_every_reader_of_a_pipelines_folder_follows_its_shift_and_boundary(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for a file in it, which is all that ComfyUI's list of models can name."""
    folder = pipeline(tmp_path / "model", "causalwan2.2-t2v")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (folder, file, file.parent):
        reading = read_with_preset(path, given=("low_noise",))
        assert reading.checkpoint.steps == StepConfig(boundary=0.875), path
        assert read_pipeline(path).low_noise == folder / "transformer_2"
    low = folder / "transformer_2"
    assert (read_pipeline(low).low_noise, read_pipeline(low).high_noise) == (None, file.parent)
    assert read_pipeline(tmp_path) == read_pipeline(files / "high.safetensors") == PipelineFolder()
    report = inspected(folder, capsys)
    assert (report["folder"]["shift"], report["folder"]["boundary"]) == (5, 0.875)


@pytest.mark.usefixtures("tiny")
def test_a_presets_open_shift_is_its_folders_for_inspect_and_convert_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    name = "causalwan2.2-i2v"
    folder, copy = pipeline(tmp_path / "model", name), tmp_path / "copy.safetensors"
    entry = inspected(folder, capsys, "--preset", name)["preset"]
    assert (entry["steps"]["shift"], entry["steps"]["boundary"], entry["missing"]) == (12, 0.875, [])
    assert main(["convert", str(folder), str(copy), "--preset", name]) == 0
    assert "is sampled with shift 12, as its scheduler_config.json says" in caplog.text
    copied = read_with_preset(copy, given=("low_noise",)).checkpoint
    assert copied.settings == read_with_preset(folder, name).checkpoint.settings
    assert copied.steps is not None
    assert (copied.steps.shift, copied.steps.solver, copied.steps.boundary) == (12, "phased", 0.875)


def test_a_copy_of_a_folder_that_is_no_release_says_what_it_cannot_keep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pipeline(tmp_path / "model", "causalwan2.2-i2v")
    convert(folder, tmp_path / "copy.safetensors")
    assert "give the copy --shift 12" in caplog.text
    assert read_checkpoint(tmp_path / "copy.safetensors").steps is None
    convert(folder, tmp_path / "causal.safetensors", causal=True)
    steps = read_checkpoint(tmp_path / "causal.safetensors").steps
    assert steps is not None
    assert (steps.shift, steps.boundary) == (12, 0.875)


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), *more]) == 0
    return json.loads(capsys.readouterr().out)


def planned(files: Path, model: Path, tmp_path: Path, **more: Any) -> Any:
    is_i2v = "i2v" in str(read_checkpoint(model).config.model_type)
    given: dict[str, Any] = {"image": files / "start.png", "vae": files / "vae.safetensors"} if is_i2v else {}
    request = Request(
        **{
            "prompt": "a",
            "out": tmp_path / "a.mp4",
            "model": str(model),
            "taehv": str(files / "taehv.safetensors"),
            "taehv_latents": "wan2.1",
            "text_encoder": str(bundle_path("tiny") / "text_encoder"),
            "width": 32,
            "height": 16,
            "frames": 9,
            "device": "cpu",
            **given,
            **more,
        }
    )
    return plan_request(request, [PromptBatch("a", "a", (request.out,))])


def test_a_pair_with_36_channels_runs_from_a_picture_at_once_and_in_chunks(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LightX2V's Wan 2.2 image to video: bare files, boundary_step_index 2, no CLIP."""
    high = pipeline(tmp_path / "model", "lightx2v-wan2.2-i2v")
    low = next(path for path in high.parent.iterdir() if path != high)
    more = [
        "--low-noise",
        low,
        "--boundary-step",
        2,
        "--image",
        files / "start.png",
        "--vae",
        files / "vae.safetensors",
    ]
    for chunks in (["--chunk", 3, "--frames", 9], ["--chunk", 3, "--frames", 21]):
        report = command(files, high, tmp_path, *more, *chunks)
        assert main(report) == 0, capsys.readouterr().err
        steps = json.loads(capsys.readouterr().out)["steps"]
        # just above 833.3, the first step of the low-noise network
        assert 0.8333 < steps["boundary"] < 0.8334


@pytest.mark.parametrize("shift", [5, 10])
def test_a_boundary_that_is_counted_in_steps_stays_there_at_another_shift(
    files: Path, tmp_path: Path, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightX2V's third step is the low-noise network's first, whatever noise it has."""
    for name, preset in tiny_presets().items():
        monkeypatch.setitem(PRESETS, name, preset)
    high = pipeline(tmp_path / "model", "lightx2v-wan2.2-i2v")
    plan = planned(files, high, tmp_path, preset="lightx2v-wan2.2-i2v", shift=shift)
    levels = [timestep / 1000 for timestep in FlowSchedule(plan.steps).timesteps]
    assert [level >= plan.steps.boundary for level in levels] == [True, True, False, False]


def test_each_of_two_networks_takes_its_own_lora(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, up, down = "blocks.0.ffn.0", torch.ones(32, 1), torch.ones(1, 32)
    save_file({f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}, tmp_path / "lora.safetensors")
    stored = {half: read_checkpoint(files / f"{half}.safetensors").state_dict for half in ("high", "low")}
    for high, low in ((1.0, 0.5), (1.0, 0.0), (0.0, 0.5), (0.0, 0.0)):
        options: dict[str, Any] = {"low_noise": str(files / "low.safetensors"), "boundary": 0.9}
        options |= {"lora": ((tmp_path / "lora.safetensors", high),)} if high else {}
        options |= {"low_noise_lora": ((tmp_path / "lora.safetensors", low),)} if low else {}
        caplog.clear()
        plan = planned(files, files / "high.safetensors", tmp_path, **options)
        for half, checkpoint, strength in (("high", plan.checkpoint, high), ("low", plan.pair.low, low)):
            assert torch.equal(checkpoint.state_dict[f"{key}.weight"], stored[half][f"{key}.weight"] + strength)
        alone = {name for name in ("high", "low") if f"is merged into that for {name} noise alone" in caplog.text}
        assert alone == ({"high"} if high > 0 == low else {"low"} if low > 0 == high else set())
    with pytest.raises(ValueError, match="--low-noise-lora is for two networks"):
        planned(files, files / "high.safetensors", tmp_path, low_noise_lora=((tmp_path / "lora.safetensors", 1.0),))


# ----------------------------------------------------------------- refusals --
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--low-noise", "low"], "nothing says from which noise on --model is asked"),
        (["--low-noise", "larger", "--boundary", 0.9], "different sizes (num_layers 1 and 2)"),
        (["--low-noise", "taehv", "--boundary", 0.9], "is a taehv, not a video model"),
        (["--low-noise", "high", "--boundary", 0.9], "they are two files"),
        (["--low-noise", "missing", "--boundary", 0.9], "neither a bundle nor a path"),
        (["--low-noise", "low", "--boundary", 0.9, "--boundary-step", 2], "give one of them"),
        (["--low-noise", "low", "--boundary", 0.5], "leaves the low-noise network without a step"),
        (["--low-noise", "low", "--boundary", 875], "boundary 875.0 is not a share"),
        (["--low-noise", "low", "--boundary-step", 4], "it is 1 to 3"),
        (["--low-noise", "low", "--boundary", 0.9, "--cache-source", "last_step"], "only one of two networks takes"),
        (["--boundary", 0.9], "--boundary is for two networks"),
        (["--boundary-step", 0], "--boundary-step is for two networks"),
        (["--solver", "phased"], "--solver phased is for two networks"),
        (["--offload-expert"], "--offload-expert is for two networks"),
    ],
)
def test_half_a_pair_ends_in_one_line(
    more: list[Any], message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [
        files / f"{word}.safetensors" if more[index - 1] == "--low-noise" else word for index, word in enumerate(more)
    ]
    assert message in refusal(command(files, files / "high.safetensors", tmp_path, *named), capsys)


def test_a_twin_that_is_gone_is_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipeline(tmp_path / "model", "causalwan2.2-i2v")
    (folder / "transformer_2").rename(tmp_path / "elsewhere")
    command_line = command(files, folder, tmp_path, "--image", files / "start.png", "--vae", files / "vae.safetensors")
    assert "give the one for low noise as --low-noise" in refusal(command_line, capsys)
    (folder / "model_index.json").write_text('{"boundary_ratio": "0.875"}')
    assert "boundary_ratio is '0.875', not a number" in refusal(command_line, capsys)
    (folder / "model_index.json").write_text("{")
    assert "model_index.json: cannot be read" in refusal(command_line, capsys)


def test_what_is_put_in_place_of_what_files_say_is_said(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pipeline(tmp_path / "model", "causalwan2.2-i2v")
    planned(files, folder, tmp_path, boundary=0.9, shift=8.0)
    assert "says boundary 0.875; 0.9 is used" in caplog.text
    assert "says shift 12; --shift 8 is used" in caplog.text
    caplog.clear()
    alone = files / "wan2.2_high_noise_14B.safetensors"
    alone.write_bytes((files / "high.safetensors").read_bytes())
    planned(files, alone, tmp_path)
    assert "is one of two networks by its name (high_noise)" in caplog.text


def test_a_copy_of_a_pipelines_folder_says_what_it_lacks(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", "causalwan2.2-i2v")
    (note,) = [note for note in read_to_copy(folder).notes if "second network" in note]
    assert "transformer_2, which is not part of the copy" in note
    assert not [note for note in read_to_copy(folder / "transformer_2").notes if "second network" in note]


def test_a_header_keeps_the_boundary(files: Path, tmp_path: Path) -> None:
    """A file that says its boundary is one of two, and needs no option for it."""
    source = read_checkpoint(files / "high.safetensors")
    path = tmp_path / "high.safetensors"
    steps = replace(STEPS, boundary=0.9, solver="phased")
    save_checkpoint(path, dict(source.state_dict), source.config, causal=source.causal, steps=steps)
    assert read_checkpoint(path).steps == steps
    plan = planned(files, path, tmp_path, low_noise=str(files / "low.safetensors"))
    assert (plan.steps.boundary, plan.steps.solver) == (0.9, "phased")
    with pytest.raises(ValueError, match="says a boundary, which is for two networks"):
        planned(files, path, tmp_path)


# ------------------------------------------------------------------ presets --
@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the fakes' sizes for the releases' own."""
    for name, preset in tiny_presets().items():
        monkeypatch.setitem(PRESETS, name, preset)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int, CausalWan]]:
    """The calls of a network: timestep, first frame, frame behind the last, and the network."""
    log: list[tuple[float, int, int, CausalWan]] = []
    forward = CausalWan.forward

    def logged(self: CausalWan, x: torch.Tensor, timesteps: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        start = more.get("start_frame", 0)
        log.append((round(float(timesteps.flatten()[0]), 1), start, start + x.shape[1], self))
        return forward(self, x, timesteps, *rest, **more)

    monkeypatch.setattr(CausalWan, "forward", logged)
    return log


def named(passes: list[tuple[float, int, int, CausalWan]], networks: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the passes with the name of the network by its weights."""

    def name_of(model: CausalWan) -> str:
        key = "blocks.0.ffn.0.weight"
        (name,) = [name for name, each in networks.items() if torch.equal(model.get_parameter(key), each[key].float())]
        return name

    return [(*each[:3], name_of(each[3])) for each in passes]


# 1000/850/700/550/350/275/200/125 through a shift of 12, which the fake's scheduler_config.json says, against 0.875.
HIGH_STEPS, LOW_STEPS = (1000.0, 985.5, 965.5, 936.2), (866.0, 819.9, 750.0, 631.6)


@pytest.mark.usefixtures("tiny")
def test_causalwan_runs_as_its_preset_and_its_folder_say(
    files: Path, tmp_path: Path, passes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipeline(tmp_path / "model", "causalwan2.2-i2v")
    more = ["--preset", "causalwan2.2-i2v", "--frames", 25]
    more += ["--image", files / "start.png", "--vae", files / "vae.safetensors"]
    assert main(command(files, folder, tmp_path, *more)) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"]["boundary"], report["steps"]["solver"], report["steps"]["shift"]) == (0.875, "phased", 12)
    assert (report["causal"]["window"], report["causal"]["independent_first_frame"]) == (21, True)
    expected = []
    for start, end in ((0, 1), (1, 4), (4, 7)):  # the first frame alone, then chunks of 3
        expected += [(t, start, end, "high") for t in HIGH_STEPS] + [(t, start, end, "low") for t in LOW_STEPS]
        if end < 7:  # into the caches of both, which the last chunk needs no more
            expected += [(0.0, start, end, "low"), (0.0, start, end, "high")]
    assert named(passes, make_fake("causalwan2.2-i2v").networks) == expected


@pytest.mark.usefixtures("tiny")
def test_causalwan_for_text_runs_with_the_chunk_that_is_given(
    files: Path, tmp_path: Path, passes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps go through a shift of 5, which the fake's folder says as its boundary of 0.875."""
    folder = pipeline(tmp_path / "model", "causalwan2.2-t2v")
    more = ["--preset", "causalwan2.2-t2v", "--chunk", 3, "--frames", 25]
    assert main(command(files, folder, tmp_path, *more)) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"]["boundary"], report["steps"]["solver"], report["steps"]["shift"]) == (0.875, "phased", 5)
    high, low = (1000.0, 965.9, 921.1), (859.4, 729.2, 654.8, 555.6, 416.7)
    expected = []
    for start, end in ((0, 1), (1, 4), (4, 7)):
        expected += [(t, start, end, "high") for t in high] + [(t, start, end, "low") for t in low]
        if end < 7:
            expected += [(0.0, start, end, "low"), (0.0, start, end, "high")]
    assert named(passes, make_fake("causalwan2.2-t2v").networks) == expected


@pytest.mark.usefixtures("tiny")
def test_a_presets_twin_is_found_beside_its_file(
    files: Path, tmp_path: Path, passes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    high = pipeline(tmp_path / "model", "lightx2v-wan2.2-i2v")
    more = ["--preset", "lightx2v-wan2.2-i2v", "--frames", 9]
    more += ["--image", files / "start.png", "--vae", files / "vae.safetensors"]
    assert main(command(files, high, tmp_path, *more)) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["steps"]["solver"] == "euler"
    networks = make_fake("lightx2v-wan2.2-i2v").networks
    assert named(passes, networks) == [
        *((t, 0, 3, "high") for t in (1000.0, 937.5)),
        *((t, 0, 3, "low") for t in (833.3, 625.0)),
    ]
    low = next(path for path in high.parent.iterdir() if path != high)
    elsewhere = low.rename(tmp_path / "low.safetensors")
    line = refusal(command(files, high, tmp_path, *more), capsys)
    assert "which needs wan2.2_i2v_A14b_low_noise_lightx2v_4step*.safetensors beside it" in line
    assert "download lightx2v-wan2.2-i2v" in line
    assert main(command(files, high, tmp_path, *more, "--low-noise", elsewhere)) == 0, capsys.readouterr().err


def test_networks_that_are_swapped_by_their_names_are_refused(files: Path, tmp_path: Path) -> None:
    swapped = {half: tmp_path / f"wan_{half}_noise.safetensors" for half in ("high", "low")}
    for path in swapped.values():
        path.write_bytes((files / "low.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not for high noise"):
        planned(files, swapped["low"], tmp_path, low_noise=str(swapped["high"]))
