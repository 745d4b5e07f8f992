"""What our MODELs do inside ComfyUI's own sampling code, measured there by tests/comfyui/inside_checks.py."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.weights.preset_settings import read_with_preset
from selfforcing_core.weights.presets import PRESETS
from tests.comfyui.conftest import checkouts
from tests.comfyui.host_server import ROOT, Checkout
from tests.core.test_preset_settings import RUNS, SHIFTS, UNNAMED, WRITTEN_BY_LAST_STEP
from tests.support import fakes

WARPED = (1000, 937.5, 833.3, 625)
# By fake: how many latent frames a chunk has, its timesteps (of the first chunk, if others), weights, shift, kind, and
# what the cache holds. Written out from the sources, as in tests/core/test_preset_settings.py.
CAUSAL, WHOLE = "causal", "few-step bidirectional"
RELEASES: dict[str, tuple[int, tuple[float, ...], tuple[float, ...], str, float, str, tuple[int, int]]] = {
    **{
        name: (chunk, first, later, weights, SHIFTS.get(name, 5), CAUSAL, cache)
        for name, (chunk, first, later, weights, cache) in RUNS.items()
    },
    "lightx2v-t2v-14b": (6, WARPED, WARPED, "raw", 5, WHOLE, (-1, 0)),
    "lightx2v-i2v-14b": (6, WARPED, WARPED, "raw", 5, WHOLE, (-1, 0)),
}
# Of two networks: the passes of each chunk and of the whole video, and both sets of weights. 1000/850/.../125 through a
# shift of 12, which the folder says, against 0.875; LightX2V's third step is the second network's first.
PAIRS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[float, ...], str]] = {
    "causalwan2.2-i2v": (
        ((0, 1), (1, 4), (4, 7)),
        (1000, 985.5, 965.5, 936.2, 866.0, 819.9, 750.0, 631.6),
        CAUSAL,
    ),
    "lightx2v-wan2.2-i2v": (((0, 6),), WARPED, WHOLE),
}
ROUNDING = 1e-5  # share of the values' spread; both sides compute in float32, in another order


@pytest.fixture(scope="module", params=checkouts())
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkout: Checkout = request.param
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    folder = tmp_path_factory.mktemp("weights")
    (folder / "released.json").write_text(json.dumps([written(name, folder / "released") for name in fakes.NAMES]))
    scheduler = folder / "released/causalwan2.2-t2v/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({"shift": 9.0}))  # another than the default of widgets
    command = [checkout.python, Path(__file__).with_name("inside_checks.py"), ROOT, folder]
    process = subprocess.run(
        command, cwd=checkout.path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return {"folder": str(folder), **json.loads(process.stdout.splitlines()[-1])}


@pytest.fixture
def outcome(measured: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    """Return the result of the check that the test is named after."""
    result = measured[request.node.originalname.removeprefix("test_")]
    if isinstance(result, dict) and "failed" in result:
        pytest.fail(result["trace"])
    return result


def written(name: str, folder: Path) -> dict[str, Any]:
    """Write a fake and return how it is loaded: file and twin as ComfyUI's list names them, and the preset."""
    fake = fakes.make_fake(name)
    path = fakes.write_fake(fake, folder / name)
    low = path.parent / fakes.LIGHTX2V_PAIR[1]
    if path.is_dir():  # of a pipeline's folder that list has the files
        path, low = (path / part / "diffusion_pytorch_model.safetensors" for part in ("transformer", "transformer_2"))
    elif path.suffix == ".json":  # and of shards no index
        path = min(path.parent.glob("*.safetensors"))
    return {
        "name": name,
        "file": path.relative_to(folder).as_posix(),
        "low": low.relative_to(folder).as_posix() if name in PAIRS else None,
        "preset": preset_of(name),
        "runs": name in RELEASES or name in PAIRS,
    }


def preset_of(name: str) -> str:
    """Return the preset that a user has to choose for a fake, "auto" where Load Model recognises it."""
    release = fakes.FLAWS[name][0] if name in fakes.FLAWS else name
    is_named = release in UNNAMED or (release.startswith(("lightx2v", "causalwan")) and release != "lightx2v-t2v-14b")
    return release if is_named and release in PRESETS else "auto"


def test_released_files_run_by_their_presets(outcome: dict[str, Any]) -> None:
    """Six latent frames: the network is called as the release's source says, with its weights, and the node says so."""
    files = outcome["files"]
    for name in RELEASES:
        file, (chunk, first, later, weights, shift, kind, cache) = files[name], RELEASES[name]
        assert "refusal" not in file, file["refusal"]
        expected: list[list[float]] = []
        for start in range(0, 6, chunk):
            commit = (0,) if start + chunk < 6 and name not in WRITTEN_BY_LAST_STEP else ()
            expected += [[t, start, start + chunk] for t in (*(later if start else first), *commit)]
        assert file["calls"] == expected or kind != CAUSAL, name
        assert (file["kind"], file["shift"]) == (kind, shift), name
        assert (file["causal"]["window"], file["causal"]["sink"]) == cache, name
        assert file["sums"] == [sums_of(fakes.make_fake(name).networks[weights])], name
        says = [line for line in file["lines"] if f"run as {name} (" in line]
        assert len(says) == (preset_of(name) == "auto"), file["lines"]
    for name, (chunks, steps, kind) in PAIRS.items():
        file = files[name]
        assert "refusal" not in file, file["refusal"]
        commits = [(0.0,) * 2] * (len(chunks) - 1) + [()]
        calls = [[t, *chunk] for chunk, commit in zip(chunks, commits) for t in (*steps, *commit)]
        assert file["calls"] == calls or kind != CAUSAL, name
        assert file["kind"] == kind
        networks = fakes.make_fake(name).networks
        assert file["sums"] == [sums_of(networks["high"]), sums_of(networks["low"])]
    # The list of models has the other folder beside it, as `download` names it: there its LoRA is found.
    merged = fakes.make_fake("longlive").networks["merged"]
    assert files["longlive-without-lora"]["sums"] == [sums_of(merged)]
    steps = files["causalwan2.2-i2v"]["steps"]
    assert (steps["solver"], steps["boundary"], steps["shift"]) == ("phased", 0.875, 12)
    assert files["causalwan2.2-i2v"]["causal"]["independent_first_frame"]
    assert files["lightx2v-wan2.2-i2v"]["boundary_step"] == 2
    patched = outcome["patched"]
    assert patched["default"] == [3, -1, 5, [1000, 750, 500, 250]]
    assert patched["preset"] == [3, 21, 8, [1000, 757, 522]]
    assert patched["explicit"] == [2, 21, 8, [1000, 757, 522]]
    eights = [1000, 850, 700, 550, 350, 275, 200, 125]
    assert (patched["open"], patched["given"]) == ([3, 21, 5, eights], [7, 21, 12, eights])
    assert patched["folder"][:3] == [7, 21, 9]
    assert patched["experts"] == ["phased", True, 2]
    assert "is matrix-game-2" in patched["refusals"]["matrix-game-2"]
    assert "leaves steps, warp open" in patched["refusals"]["lightx2v-self-forcing-fp8"]


def test_every_fake_is_loaded_as_the_command_line_reads_it(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, settings, lines and refusals are those of the core, of each release, dialect and broken file."""
    for name, preset in fakes.tiny_presets().items():
        monkeypatch.setitem(PRESETS, name, preset)
    folder = Path(measured["folder"]) / "released"
    for entry in json.loads((folder.parent / "released.json").read_text()):
        file = measured["released_files_run_by_their_presets"]["files"][entry["name"]]
        reading, refusal = None, ""
        try:
            given = ("low_noise", "guidance", "boundary")
            reading = read_with_preset(folder / entry["file"], entry["preset"], given=given, folders=[folder])
        except ValueError as error:
            refusal = str(error)
        if reading is None:
            # In ComfyUI a remedy puts what is missing into the first of its own folders.
            assert file.get("refusal", "").startswith(refusal.partition(" --to ")[0]), (entry, file)
            continue
        checkpoint = reading.checkpoint
        assert "refusal" not in file, file["refusal"]
        assert file["causal"] == (checkpoint.causal or CausalConfig()).to_dict(), entry
        assert file["steps"] == json.loads(json.dumps((checkpoint.steps or StepConfig()).to_dict())), entry
        assert file["sums"][0] == sums_of(checkpoint.state_dict), entry
        assert [line.removeprefix("the file ") for line in file["lines"] if line.startswith("the file ")][
            : len(reading.notes)
        ] == list(reading.notes), entry


def sums_of(weights: Mapping[str, torch.Tensor]) -> Any:
    """Return what shows which weights these are."""
    return pytest.approx(
        [float(weights[name].double().sum()) for name in ("head.head.weight", "blocks.0.ffn.0.weight")], abs=1e-3
    )


def test_the_hosts_model_gives_the_cores_video(outcome: dict[str, float]) -> None:
    """Also with guidance, batched by ComfyUI or split by it: as two separate rollouts combined in the core."""
    matters = outcome.pop("cfg_matters")
    assert max(outcome.values()) < ROUNDING < matters / 100


def test_steps_of_the_first_chunk_and_a_last_one_of_0(outcome: dict[str, Any]) -> None:
    """As in the core, by the MODEL's own lists or by SIGMAS of the graph, in which a pass at timestep 0 is a zero."""
    assert max(outcome[name] for name in ("own", "zero", "zero_cfg", "given")) < ROUNDING
    assert min(outcome["own_matters"], outcome["zero_matters"]) > 100 * ROUNDING
    # Totals and what was made: from noise, from a state of two chunks, from a given chunk.
    from_noise, from_state, from_frames = 3 + 1 + 2, 2, 1 + 2 + 1 + 2
    assert outcome["counted"] == [from_noise] * 2 + [from_state] * 2 + [from_frames] * 2
    assert "two zeros" in outcome["refusal"]
    sigmas = {name: [each and pytest.approx(each) for each in pair] for name, pair in outcome["sigmas"].items()}
    common, first = [1.0, 2500 / 3000, 0.0], [1.0, 0.9375, 2500 / 3000, 0.0]
    assert sigmas["own"] == [common, first]
    assert sigmas["raw"] == [[1.0, 0.5, 0.0], [1.0, 0.75, 0.5, 0.0]]
    assert sigmas["counted"] == [common, [1.0, 0.9375, 2500 / 3000, 0.625, 0.0]]
    assert sigmas["same"] == [common, None]
    assert sigmas["zero"] == [[1.0, 0.9375, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_condition_channels_are_sliced_per_chunk(outcome: dict[str, float]) -> None:
    matters = outcome.pop("order_matters")
    assert max(outcome.values()) < ROUNDING < matters / 100


def test_channels_alone_condition_wan_2_2(outcome: dict[str, float]) -> None:
    matters = outcome.pop("order_matters")
    assert max(outcome.values()) < ROUNDING < matters / 100


def test_a_model_of_the_hosts_loader_is_patched(outcome: dict[str, Any]) -> None:
    assert outcome["difference"] < ROUNDING
    assert outcome["foreign_calls"] > 0
    assert outcome["is_untouched"]
    assert "Patch Model (Self Forcing)" in outcome["refusal"]


def test_exports_are_what_they_say(outcome: dict[str, Any]) -> None:
    """Few-step and causal files are of their kind without being told, and sampled with the file's solver."""
    kinds = {name: kind for name, (kind, _) in outcome["kinds"].items()}
    whole = "few-step bidirectional"
    assert kinds == {
        "few-step": whole,
        "older": whole,
        "teacher": "base",
        "causal teacher": "causal",
        "nothing": "unknown",
    }
    assert [name for name, (_, network_class) in outcome["kinds"].items() if "Causal" in network_class] in (
        [],
        ["causal teacher"],
    )
    assert (outcome["explicit"], outcome["guidance"]) == ("causal", 5.0)
    assert max(outcome["few-step"], outcome["euler"]) < ROUNDING < outcome["solver_matters"] / 100


def test_two_models_give_the_cores_video(outcome: dict[str, float]) -> None:
    matters = min(outcome.pop("matters"), outcome.pop("solver_matters"))
    assert max(outcome.values()) < ROUNDING < matters / 100


def test_two_models_with_36_channels_read_a_picture(outcome: dict[str, float]) -> None:
    assert max(outcome.values()) < ROUNDING


def test_a_released_pair_is_joined_by_its_preset(outcome: dict[str, Any]) -> None:
    assert outcome["difference"] < ROUNDING
    assert (outcome["kind"], outcome["solver"]) == ("few-step bidirectional", "euler")
    assert 0.8333 < outcome["boundary"] < 0.8334, "just above the third of four steps"


def test_two_models_go_on_and_change_their_prompt(outcome: dict[str, Any]) -> None:
    assert outcome["is_same"]
    assert "taken with 2 networks, this rollout has 1" in outcome["refusal"]
    assert min(outcome["prompt_matters"], outcome["history_matters"]) > 10 * ROUNDING


def test_one_of_two_models_is_loaded_at_a_time(outcome: dict[str, Any]) -> None:
    """Two changes a chunk: the low-noise model writes the chunk that it finished, then the other does and goes on."""
    assert outcome["asked"] == outcome["held"] == [["high"], ["low"], ["high"], ["low"]]
    assert outcome["is_same"]


def test_two_models_and_their_loras(outcome: dict[str, float]) -> None:
    assert max(outcome.values()) < ROUNDING


def test_what_does_not_go_with_two_models_is_refused(outcome: dict[str, str]) -> None:
    words = {
        "sizes": "different sizes (num_layers 2 and 3)",
        "no_boundary": "set boundary in Two Experts",
        "both": "leave one of them at 0",
        "one_side": "leaves the low-noise network without a step",
        "step_behind": "it is 1 to 3",
        "samplers_of_others": "only samplers of this pack ask both",
        "patched_behind": "put that node behind",
        "last_step": "cache_source last_step",
        "alone": "join both with Two Experts",
    }
    assert outcome.keys() == words.keys()
    assert all(word in outcome[name] for name, word in words.items()), outcome


def test_a_trained_lora_is_the_merged_network(outcome: dict[str, float]) -> None:
    assert outcome["difference"] < ROUNDING < outcome["matters"] / 100


def test_broken_packages(outcome: list[str]) -> None:
    """Everything here was measured while these raised at import, as flash-attn often does."""
    assert outcome == ["flash_attn", "lmdb", "omegaconf", "diffusers"]


def test_number_types(outcome: dict[str, float]) -> None:
    same = [outcome.pop(f"cache_{name}_as_in_the_core") for name in ("bfloat16", "float8", "int8")]
    assert all(value > 0 for value in outcome.values())
    assert max(outcome["bfloat16"], outcome["cache_bfloat16"], outcome["cache_float8"], outcome["cache_int8"]) < 0.005
    assert outcome["float8"] < 0.05
    assert max(same) < 100 * ROUNDING, "a number at the edge of a step may be rounded to its other side"


def test_layers_without_casting_compute_in_bfloat16(outcome: float) -> None:
    assert 0 < outcome < 0.02


def test_compiled(outcome: dict[str, Any]) -> None:
    """ComfyUI's TorchCompileModel compiles the blocks of the causal pass, with its own backend."""
    assert outcome == {"difference": 0.0, "backend": ["eager"]}


def test_memory_estimate(outcome: dict[str, Any]) -> None:
    """That of one chunk and of the caches, whatever the length; beside a cache elsewhere, of one layer's copies."""
    asked, chunk, cache = outcome["told"], outcome["chunk"], outcome["cache"]
    assert asked["whole"] == outcome["whole"] > chunk > 0
    assert asked["one"] == chunk + cache
    assert asked["two"] == chunk + 2 * cache
    assert asked["long"] == asked["one"], "twice as long, in a window of the same size"
    assert asked["moving"] == asked["long"] + cache // 4, "the keys of the sink, half of the window, once more"
    layer = cache // 2
    assert asked["narrow"] == chunk + cache // 2 + 2 * layer
    assert asked["elsewhere"] == chunk + 2 * layer
    assert not outcome["is_left"]


def test_out_of_memory(outcome: dict[str, Any]) -> None:
    assert outcome["caches_seen"] > 0
    assert outcome["caches_alive"] == 0
    assert outcome["is_same_afterwards"]
    for setting in ("window", "cache_dtype float8_e4m3fn 73344", "cache_device cpu 98304"):
        assert setting in outcome["message"]


def test_interrupts(outcome: dict[str, int]) -> None:
    assert outcome["stopped"] == outcome["same"] == outcome["count"] == 50
    assert outcome["late"] == 0, "at most the evaluation that was running is finished"


def test_states(outcome: dict[str, Any]) -> None:
    assert outcome == {"is_same": True, "is_same_from_file": True, "copied_to": ["cpu"], "moved_to": []}


def test_a_prompt_typed_into_a_resumed_run(outcome: dict[str, Any]) -> None:
    assert outcome["said"]["keep"] == []
    (sentence,) = outcome["said"]["recode"]
    assert "history 'keep'" in sentence
    assert outcome["is_kept"]
    later, earlier = outcome["refused"]
    assert "2.2s is to recode history" in later
    assert "use history 'keep'" in later
    assert not earlier, "its moment lies before the state's end"


def test_a_prompt_becomes_the_next_over_chunks(outcome: dict[str, Any]) -> None:
    assert outcome["off_core"] < ROUNDING
    assert outcome["is_resumed"], "from a state in the middle of the blend"
    assert outcome["off_by_hand"] < ROUNDING
    assert outcome["took"] == [3, "keep", 3]


def test_the_hosts_own_causal_sampler(outcome: float | None) -> None:
    if outcome is None:
        pytest.skip("this version of ComfyUI has no causal sampler of its own")
    assert outcome < ROUNDING


def test_vaes_of_the_host_stream(outcome: dict[str, Any]) -> None:
    """Bitwise the decode of the whole, also after a chunk was taken back; others say that they come at the end.

    But for the rounding of the one convolution that ComfyUI applies to all latents together: 3e-6 where MKL keeps to
    AVX2 (MKL_ENABLE_INSTRUCTIONS=AVX2), in ComfyUI 0.27 as in 0.33, and nothing where it uses AVX-512.
    """
    rounded = outcome["as_it_is"]
    assert max(value for name, value in rounded.items() if name.startswith("difference")) < 1e-4
    outcome = outcome["frame_by_frame"]
    kinds, spread = outcome.pop("kinds"), outcome.pop("spread")
    assert rounded["kinds"] == kinds
    assert set(outcome.values()) == {0.0}
    assert spread > 0
    assert [note for note, _ in kinds] == [False, True, False, True]
    by_one, at_the_end, by_three, _ = (counts for _, counts in kinds)
    assert by_one[0] == 1
    assert sum(by_one) == 25
    assert at_the_end == [0] * 6 + [25]
    assert by_three[0] > 0
    assert sum(by_three) == 33


def test_taehv_streams_latent_by_latent(outcome: dict[str, Any]) -> None:
    assert set(outcome["is_same"]) == {"2", "3", "7", "resumed"}
    assert all(outcome["is_same"].values())
    assert outcome["shape"] == [1, 25, 3, 64, 64]
    assert outcome["largest"] == 4


def test_text_encoders(outcome: dict[str, Any]) -> None:
    """Large ones in the type of ComfyUI, small ones in float32; what a graph gets is float32 either way."""
    assert outcome.pop("small") == "torch.float32"
    types = {name: dtype for name, (dtype, _, _) in outcome.items()}
    assert types == {"default": "torch.float16", "float8_e4m3fn": "torch.float16", "bfloat16": "torch.bfloat16"}
    for name, (_, difference, graph_dtype) in outcome.items():
        assert 0 < difference < (0.1 if name == "bfloat16" else 0.02), name
        assert graph_dtype == "torch.float32"


def test_a_network_that_had_to_leave_comes_back(outcome: dict[str, Any]) -> None:
    assert outcome["came_back"] == [True, True]
    assert outcome["told"] == [[outcome["needed"]], [outcome["needed"]]]


def test_what_is_set_on_the_forward_pass_is_followed(outcome: dict[str, Any]) -> None:
    """Another attention and RoPE scaling: as one chunk exactly what ComfyUI's own pass makes of them."""
    assert outcome["attention_matters"] > 0.01
    assert max(outcome["plain"], outcome["attention"]) < 2 * ROUNDING
    assert 0 < outcome["attention_from_int8"] < 0.05
    assert outcome["attention_compiled"] == 0, "the attention goes before compiled blocks"
    if "rope" in outcome:
        assert outcome["rope_matters"] > 0.01
        assert max(outcome["rope"], outcome["rope_in_chunks"]) < 2 * ROUNDING


def test_modules_and_prompts_of_others_are_followed(outcome: dict[str, float]) -> None:
    """NAG-type cross-attention, feed-forward networks and changing texts: as one chunk exactly ComfyUI's own pass."""
    assert outcome.pop("compiled") < ROUNDING, "they go before compiled blocks"
    matters = {name: outcome.pop(name) for name in list(outcome) if name.endswith("_matters")}
    assert max(outcome.values()) < ROUNDING < min(matters.values()) / 100
    assert len(matters) == 6


def test_a_model_can_be_loaded_again(outcome: dict[str, Any] | None) -> None:
    """The copies that ComfyUI makes for other devices give the same video, with LoRA and settings."""
    if outcome is None:
        pytest.skip("this version of ComfyUI never loads a model again")
    assert outcome.pop("own weights")
    assert outcome.pop("matters") > 0.01
    assert outcome == {"another device": 0.0, "deep": 0.0}


def test_what_cannot_be_followed_is_refused(outcome: dict[str, str]) -> None:
    assert outcome.pop("afterwards") == "same"
    assert outcome.pop("layer") == outcome.pop("without effect") == outcome.pop("cross alone") == ""
    words = {
        "block": "replacement of block 1", "block in a step": "replacement of block 0", "attn1": "attn1_patch",
        "unknown": "a_new_one", "cross": "set cfg to 1", "self": "Patch Sage Attention",
        "whole": "another forward_orig of the network", "rope table": "another rope_embedder: torch.nn",
        "norm": "another forward of blocks.1.norm1", "skip": "was skipped", "skip the cache": "was skipped",
        "context windows": "window and sink", "rope": "scale_z", "joined frames": "time_dim_concat",
        "skip around": "was skipped", "skip by function": "was skipped", "twice": "twice in one step",
        "longer": "1 x 6 frames", "another prompt": "not the sampler's", "devices": "choose one device",
        "noise": "not of flow matching",
        "easycache": "EasyCache, which skips", "hook": "a forward hook on blocks.0.self_attn",
    }  # fmt: skip
    assert outcome.keys() == words.keys()
    for name, word in words.items():
        assert word in outcome[name], name


def test_a_loras_modulation_is_the_merged_network(outcome: dict[str, float]) -> None:
    assert outcome["matters"] > 0.01
    assert max(outcome[name] for name in ("ours", "hosts", "ours_without", "hosts_without")) < ROUNDING


def test_a_file_with_base_and_lora_is_the_merged_network(outcome: dict[str, Any]) -> None:
    """Its LoRA is ComfyUI's patches: the same weights as the command line's, bit-exact, and gone when unloaded."""
    for dtype in ("torch.float32", "torch.bfloat16"):
        weights = outcome[dtype]
        assert weights["different"] == ["blocks.0.modulation"], "which the causal pass applies itself"
        assert weights["left"] == []
    assert max(outcome["video"], outcome["on_top"]) < ROUNDING < outcome["matters"] / 100


def test_lora_and_its_kin_are_as_in_the_host(outcome: dict[str, list[float]]) -> None:
    """Every kind at three strengths, and in a MODEL of ours: the same float32 weight as ComfyUI's loader makes."""
    assert len(outcome) == 17 * 4
    assert all(distance == 0 < changed for distance, changed in outcome.values()), outcome


def test_first_and_last_frame_models_are_not_made_causal(outcome: dict[str, str]) -> None:
    assert "img_emb.emb_pos" in outcome["causal"]
    assert outcome["unknown"] == outcome["causal"]
    assert outcome["few-step bidirectional"] == ""


def test_a_scaled_8_bit_file_is_the_network_it_stands_for(outcome: dict[str, Any]) -> None:
    assert outcome["ours"] < ROUNDING
    assert 0 < outcome["bfloat16"] < 0.05
    assert outcome["weights"] == "torch.bfloat16"
    assert any("weight_dtype asks for float32; default keeps them" in line for line in outcome["lines"])
    for form, each in outcome["kept"].items():
        assert each["difference"] < ROUNDING, form
        # Layers of ComfyUI's own where it has them, but for what they cannot hold; else widened, and that is said.
        assert each["is_8_bit"] == (outcome["has_layers"] and form != "per row"), form
        widened = [line for line in each["lines"] if "widened" in line]
        assert len(widened) == (not each["is_8_bit"]), form


def test_files_of_other_kinds_are_refused_by_name(outcome: dict[str, str]) -> None:
    for name, sentence in outcome.items():
        assert "\n" not in sentence
        assert name.partition(",")[0] in sentence
        if "GGUF" in name:
            assert "load it with a GGUF loader and put Patch Model (Self Forcing) behind it" in sentence
    for name in ("5B", "VACE", "HunyuanVideo", "NVFP4"):
        assert "is not supported" in outcome[name]


def test_a_run_waits_for_its_viewer(outcome: dict[str, Any]) -> None:
    """While more than its pace is ahead of what the page shows; never for a page that says nothing, or is gone."""
    states, last = outcome.pop("states"), outcome.pop("last")
    assert outcome.pop("is rolled again")
    assert outcome.pop("interrupt") == "Interrupted"
    bounds = {
        "nobody has said what is shown": (0, 0.1),
        "until shown": (0.3, 0.6),
        "a prompt does not break the bound": (0.4, 0.7),
        "held while ahead": (0.3, 0.6),
        "paused": (1.0, 2.2),
        "page gone": (0.4, 0.9),
        "still gone": (0, 0.1),
        "page silent": (0.2, 0.6),
        "until finished": (0.3, 0.6),
    }
    assert outcome.keys() == bounds.keys()
    for name, (least, most) in bounds.items():
        # Under load the clock of whoever shows starts up to a tenth before that of the one that waits.
        assert least - 0.1 <= outcome[name] < most + 0.5, (name, outcome[name])
    assert set(states) == {"sampling", "ahead", "held", "done"}
    assert last == {
        "ending": "stopped",
        "files": [],
        "schedule": "0s [10 fps]: a\n6.1s [seed 7]:\n9.3s [seed own]:",
        "pace": 1.0,
    }


def test_a_new_loader_never_pairs_a_bundled_part_with_a_real_one(outcome: dict[str, list[str]]) -> None:
    real = outcome.pop("all")
    assert real == ["self_forcing_dmd.pt", "taew2_1.safetensors", "umt5"]
    assert set(map(tuple, outcome.values())) == {("tiny (bundled)",) * 3}


def test_a_picture_that_moves_is_taken_to_move_on(outcome: dict[str, float]) -> None:
    expected = {
        "still 0.2": 2.1,
        "still 1.0": 2.1,
        "moving 0.2": 1.8,
        "moving 1.0": 1.5,
        "back 0.2": 2.0,
        "back 1.0": 2.0,
    }
    assert outcome == pytest.approx(expected)


def test_the_first_prompt_is_found_in_the_graph_or_not_guessed(outcome: dict[str, str]) -> None:
    assert outcome == {"direct": "a", "behind a picture": "a", "linked": "b", "concat": "", "none": ""}


def test_lighttaew2_1_decodes_as_in_the_host(outcome: dict[str, Any]) -> None:
    """Wan's latents either way; its own are unscaled, which makes another video."""
    assert outcome.pop("spaces") == ["wan2.1", "wan2.1"]
    assert outcome.pop("matters") > 0.1
    assert max(outcome.values()) < 0.01


def test_vaes_of_other_spaces(outcome: dict[str, Any]) -> None:
    assert outcome.pop("unknown") == ["", ""]
    on_wan, on_tiny = outcome.pop("wan")
    assert on_wan == ""
    assert "made for latents of wan2.1, but the model makes those of tiny" in on_tiny
    for name, word in {
        "picture": "AutoencoderKL",
        "cosmos": "CausalContinuousVideoTokenizer",
        "float16": "hunyuan",
    }.items():
        assert all(word in sentence for sentence in outcome.get(name, [word])), name


def test_a_steered_run_is_kept_in_its_files(outcome: dict[str, Any]) -> None:
    """The prompts stand beside the workflow in every row's file; a run that nobody steered changes none."""
    listed = [{"filename": f"a_0000{n}_.mp4", "subfolder": "clips", "type": "output"} for n in (1, 2)]
    assert outcome["written"] == listed
    assert outcome["unkept"] == listed, "what cannot be written beside a video costs no video"
    assert outcome["is_untouched"]
    assert outcome["frames"] == [9, 9]
    for metadata in outcome["metadata"]:
        assert (metadata["selfforcing_schedule"], json.loads(metadata["prompt"])) == ("0s: a\n3s: b", {"1": 2})
    assert "audio has 3 rows for 2 videos" in outcome["refusal"]
