"""What our MODELs do inside ComfyUI's own sampling code, measured there by tests/comfyui/inside_checks.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.conftest import checkouts
from tests.comfyui.host_server import ROOT, Checkout

ROUNDING = 1e-5  # share of the values' spread; both sides compute in float32, in another order


@pytest.fixture(scope="module", params=checkouts())
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkout: Checkout = request.param
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [checkout.python, Path(__file__).with_name("inside_checks.py"), ROOT, tmp_path_factory.mktemp("weights")]
    done = subprocess.run(
        command, cwd=checkout.path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def found(measured: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    """The result of the check that the test is named after."""
    result = measured[request.node.originalname.removeprefix("test_")]
    if isinstance(result, dict) and "failed" in result:
        pytest.fail(result["trace"])
    return result


def test_the_hosts_model_gives_the_cores_video(found: dict[str, float]) -> None:
    """Also with guidance, batched by ComfyUI or split by it: as two separate rollouts combined in the core."""
    matters = found.pop("cfg_matters")
    assert max(found.values()) < ROUNDING < matters / 100


def test_condition_channels_are_sliced_per_chunk(found: dict[str, float]) -> None:
    matters = found.pop("order_matters")
    assert max(found.values()) < ROUNDING < matters / 100


def test_a_model_of_the_hosts_loader_is_patched(found: dict[str, Any]) -> None:
    assert found["difference"] < ROUNDING
    assert found["foreign_calls"] > 0
    assert found["is_untouched"]
    assert "Patch Model (Self Forcing)" in found["refusal"]


def test_exports_are_what_they_say(found: dict[str, Any]) -> None:
    """Few-step and causal files are of their kind without being told, and sampled with the file's solver."""
    kinds = {name: kind for name, (kind, _) in found["kinds"].items()}
    whole = "few-step bidirectional"
    assert kinds == {
        "few-step": whole, "older": whole, "teacher": "base", "causal teacher": "causal", "nothing": "unknown",
    }  # fmt: skip
    assert [name for name, (_, made) in found["kinds"].items() if "Causal" in made] in ([], ["causal teacher"])
    assert (found["explicit"], found["guidance"]) == ("causal", 5.0)
    assert max(found["few-step"], found["euler"]) < ROUNDING < found["solver_matters"] / 100


def test_a_trained_lora_is_the_merged_network(found: dict[str, float]) -> None:
    assert found["difference"] < ROUNDING < found["matters"] / 100


def test_broken_packages(found: list[str]) -> None:
    """Everything here was measured while these raised at import, as flash-attn often does."""
    assert found == ["flash_attn", "lmdb", "omegaconf", "diffusers"]


def test_number_types(found: dict[str, float]) -> None:
    same = [found.pop(f"cache_{name}_as_in_the_core") for name in ("bfloat16", "float8", "int8")]
    assert all(value > 0 for value in found.values())
    assert max(found["bfloat16"], found["cache_bfloat16"], found["cache_float8"], found["cache_int8"]) < 0.005
    assert found["float8"] < 0.05
    assert max(same) < 100 * ROUNDING, "a number at the edge of a step may be rounded to its other side"


def test_layers_without_casting_compute_in_bfloat16(found: float) -> None:
    assert 0 < found < 0.02


def test_compiled(found: dict[str, Any]) -> None:
    """ComfyUI's TorchCompileModel compiles the blocks of the causal pass, with its own backend."""
    assert found == {"difference": 0.0, "backend": ["eager"]}


def test_memory_estimate(found: dict[str, Any]) -> None:
    """That of one chunk and of the caches, whatever the length; beside a cache elsewhere, of one layer's copies."""
    told, chunk, cache = found["told"], found["chunk"], found["cache"]
    assert told["whole"] == found["whole"] > chunk > 0
    assert told["one"] == chunk + cache
    assert told["two"] == chunk + 2 * cache
    assert told["long"] == told["one"], "twice as long, in a window of the same size"
    layer = cache // 2
    assert told["narrow"] == chunk + cache // 2 + 2 * layer
    assert told["elsewhere"] == chunk + 2 * layer
    assert not found["is_left"]


def test_out_of_memory(found: dict[str, Any]) -> None:
    assert found["caches_seen"] > 0
    assert found["caches_alive"] == 0
    assert found["is_same_afterwards"]
    for setting in ("window", "cache_dtype float8_e4m3fn 73344", "cache_device cpu 98304"):
        assert setting in found["message"]


def test_interrupts(found: dict[str, int]) -> None:
    assert found["stopped"] == found["same"] == found["count"] == 50
    assert found["late"] == 0, "at most the evaluation that was running is finished"


def test_states(found: dict[str, Any]) -> None:
    assert found == {"is_same": True, "is_same_from_file": True, "copied_to": ["cpu"], "moved_to": []}


def test_a_prompt_typed_into_a_resumed_run(found: dict[str, Any]) -> None:
    assert found["said"]["keep"] == []
    (said,) = found["said"]["recode"]
    assert "history 'keep'" in said
    assert found["is_kept"]
    later, earlier = found["refused"]
    assert "2.2s is to recode history" in later
    assert "use history 'keep'" in later
    assert not earlier, "its moment lies before the state's end"


def test_the_hosts_own_causal_sampler(found: float | None) -> None:
    if found is None:
        pytest.skip("this version of ComfyUI has no causal sampler of its own")
    assert found < ROUNDING


def test_vaes_of_the_host_stream(found: dict[str, Any]) -> None:
    """Bitwise the decode of the whole, also after a chunk was taken back; others say that they come at the end.

    But for the rounding of the one convolution that ComfyUI applies to all latents together: 3e-6 where MKL keeps to
    AVX2 (MKL_ENABLE_INSTRUCTIONS=AVX2), in ComfyUI 0.27 as in 0.33, and nothing where it uses AVX-512.
    """
    rounded = found["as_it_is"]
    assert max(value for name, value in rounded.items() if name.startswith("difference")) < 1e-4
    found = found["frame_by_frame"]
    kinds, spread = found.pop("kinds"), found.pop("spread")
    assert rounded["kinds"] == kinds
    assert set(found.values()) == {0.0}
    assert spread > 0
    assert [note for note, _ in kinds] == [False, True, False, True]
    by_one, at_the_end, by_three, _ = (counts for _, counts in kinds)
    assert by_one[0] == 1
    assert sum(by_one) == 25
    assert at_the_end == [0] * 6 + [25]
    assert by_three[0] > 0
    assert sum(by_three) == 33


def test_taehv_streams_latent_by_latent(found: dict[str, Any]) -> None:
    assert set(found["is_same"]) == {"2", "3", "7", "resumed"}
    assert all(found["is_same"].values())
    assert found["shape"] == [1, 25, 3, 64, 64]
    assert found["largest"] == 4


def test_text_encoders(found: dict[str, Any]) -> None:
    """Large ones in the type of ComfyUI, small ones in float32; what a graph gets is float32 either way."""
    assert found.pop("small") == "torch.float32"
    types = {name: dtype for name, (dtype, _, _) in found.items()}
    assert types == {"default": "torch.float16", "float8_e4m3fn": "torch.float16", "bfloat16": "torch.bfloat16"}
    for name, (_, difference, given) in found.items():
        assert 0 < difference < (0.1 if name == "bfloat16" else 0.02), name
        assert given == "torch.float32"


def test_a_network_that_had_to_leave_comes_back(found: dict[str, Any]) -> None:
    assert found["came_back"] == [True, True]
    assert found["told"] == [[found["needed"]], [found["needed"]]]


def test_what_is_set_on_the_forward_pass_is_followed(found: dict[str, Any]) -> None:
    """Another attention and RoPE scaling: as one chunk exactly what ComfyUI's own pass makes of them."""
    assert found["attention_matters"] > 0.01
    assert max(found["plain"], found["attention"]) < 2 * ROUNDING
    assert 0 < found["attention_from_int8"] < 0.05
    assert found["attention_compiled"] == 0, "the attention goes before compiled blocks"
    if "rope" in found:
        assert found["rope_matters"] > 0.01
        assert max(found["rope"], found["rope_in_chunks"]) < 2 * ROUNDING


def test_modules_and_prompts_of_others_are_followed(found: dict[str, float]) -> None:
    """NAG-type cross-attention, feed-forward networks and changing texts: as one chunk exactly ComfyUI's own pass."""
    assert found.pop("compiled") < ROUNDING, "they go before compiled blocks"
    matters = {name: found.pop(name) for name in list(found) if name.endswith("_matters")}
    assert max(found.values()) < ROUNDING < min(matters.values()) / 100
    assert len(matters) == 6


def test_a_model_can_be_loaded_again(found: dict[str, Any] | None) -> None:
    """The copies that ComfyUI makes for other devices give the same video, with LoRA and settings."""
    if found is None:
        pytest.skip("this version of ComfyUI never loads a model again")
    assert found.pop("own weights")
    assert found.pop("matters") > 0.01
    assert found == {"another device": 0.0, "deep": 0.0}


def test_what_cannot_be_followed_is_refused(found: dict[str, str]) -> None:
    assert found.pop("afterwards") == "same"
    assert found.pop("layer") == found.pop("without effect") == found.pop("cross alone") == ""
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
    assert found.keys() == words.keys()
    for name, word in words.items():
        assert word in found[name], name


def test_a_loras_modulation_is_the_merged_network(found: dict[str, float]) -> None:
    assert found["matters"] > 0.01
    assert max(found[name] for name in ("ours", "hosts", "ours_without", "hosts_without")) < ROUNDING


def test_first_and_last_frame_models_are_not_made_causal(found: dict[str, str]) -> None:
    assert "img_emb.emb_pos" in found["causal"]
    assert found["unknown"] == found["causal"]
    assert found["few-step bidirectional"] == ""


def test_a_scaled_8_bit_file_is_the_network_it_stands_for(found: dict[str, Any]) -> None:
    assert found["ours"] < ROUNDING
    assert 0 < found["bfloat16"] < 0.05
    assert found["weights"] == "torch.bfloat16"
    assert any("Patch Model (Self Forcing) keeps them in 8 bits" in line for line in found["lines"])


def test_a_run_waits_for_its_viewer(found: dict[str, Any]) -> None:
    """While more than its pace is ahead of what the page shows; never for a page that says nothing, or is gone."""
    states, last = found.pop("states"), found.pop("last")
    assert found.pop("is rolled again")
    assert found.pop("interrupt") == "Interrupted"
    bounds = {
        "nobody has said what is shown": (0, 0.1), "until shown": (0.3, 0.6),
        "a prompt does not break the bound": (0.4, 0.7), "held while ahead": (0.3, 0.6), "paused": (1.0, 2.2),
        "page gone": (0.4, 0.9), "still gone": (0, 0.1), "page silent": (0.2, 0.6), "until finished": (0.3, 0.6),
    }  # fmt: skip
    assert found.keys() == bounds.keys()
    for name, (least, most) in bounds.items():
        assert least - 0.05 <= found[name] < most + 0.5, (name, found[name])
    assert set(states) == {"sampling", "ahead", "held", "done"}
    assert last == {
        "ending": "stopped",
        "files": [],
        "schedule": "0s [10 fps]: a\n6.1s [seed 7]:\n9.3s [seed own]:",
        "pace": 1.0,
    }


def test_a_new_loader_never_pairs_a_bundled_part_with_a_real_one(found: dict[str, list[str]]) -> None:
    real = found.pop("all")
    assert real == ["self_forcing_dmd.pt", "taew2_1.safetensors", "umt5"]
    assert set(map(tuple, found.values())) == {("tiny (bundled)",) * 3}


def test_a_picture_that_moves_is_taken_to_move_on(found: dict[str, float]) -> None:
    wanted = {
        "still 0.2": 2.1, "still 1.0": 2.1, "moving 0.2": 1.8, "moving 1.0": 1.5, "back 0.2": 2.0, "back 1.0": 2.0,
    }  # fmt: skip
    assert found == pytest.approx(wanted)


def test_the_first_prompt_is_found_in_the_graph_or_not_guessed(found: dict[str, str]) -> None:
    assert found == {"direct": "a", "behind a picture": "a", "linked": "b", "concat": "", "none": ""}


def test_lighttaew2_1_decodes_as_in_the_host(found: dict[str, Any]) -> None:
    """Wan's latents either way; its own are unscaled, which makes another video."""
    assert found.pop("spaces") == ["wan2.1", "wan2.1"]
    assert found.pop("matters") > 0.1
    assert max(found.values()) < 0.01


def test_vaes_of_other_spaces(found: dict[str, Any]) -> None:
    assert found.pop("unknown") == ["", ""]
    on_wan, on_tiny = found.pop("wan")
    assert on_wan == ""
    assert "made for latents of wan2.1, but the model makes those of tiny" in on_tiny
    for name, word in {
        "picture": "AutoencoderKL",
        "cosmos": "CausalContinuousVideoTokenizer",
        "float16": "hunyuan",
    }.items():
        assert all(word in sentence for sentence in found.get(name, [word])), name


def test_a_steered_run_is_kept_in_its_files(found: dict[str, Any]) -> None:
    """The prompts stand beside the workflow in every row's file; a run that nobody steered changes none."""
    listed = [{"filename": f"a_0000{n}_.mp4", "subfolder": "clips", "type": "output"} for n in (1, 2)]
    assert found["written"] == listed
    assert found["unkept"] == listed, "what cannot be written beside a video costs no video"
    assert found["is_untouched"]
    assert found["frames"] == [9, 9]
    for metadata in found["metadata"]:
        assert (metadata["selfforcing_schedule"], json.loads(metadata["prompt"])) == ("0s: a\n3s: b", {"1": 2})
    assert "audio has 3 rows for 2 videos" in found["refusal"]
