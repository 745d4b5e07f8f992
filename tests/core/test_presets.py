"""Presets: every release is there with the numbers of its source, and a file is recognised or asked about."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig
from selfforcing_core.policy import RECACHE, RECACHE_SINK, CachePolicy, cache_policy
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.weights import recognise as recognise_module
from selfforcing_core.weights.checkpoint_header import HEADER_KEY
from selfforcing_core.weights.download import RELEASES
from selfforcing_core.weights.latent_space import LATENT_SPACES
from selfforcing_core.weights.preset_settings import PLAIN, preset_settings
from selfforcing_core.weights.presets import EXTRAS, NUMBERS, PRESETS, Preset, find_preset, missing_policies
from selfforcing_core.weights.recognise import FINGERPRINTS, fingerprint, recognise
from tests.support import fakes

# The releases of the family by the first cell of their row, and the presets that stand for them.
ROWS = {
    "Self Forcing": ("self-forcing-dmd", "self-forcing-sid"),
    "Self Forcing 10 s": ("self-forcing-10s",),
    "Self Forcing GAN, Self-Forcing++": ("self-forcing-gan", "self-forcing-plus-plus"),
    "Causal-Forcing chunkwise": ("causal-forcing",),
    "Causal-Forcing framewise": ("causal-forcing-framewise",),
    "Causal-Forcing++ 2 steps": ("causal-forcing-pp-2step",),
    "Causal-Forcing++ 1 step": ("causal-forcing-pp-1step",),
    "Causal-Forcing longvideo": ("causal-forcing-longvideo",),
    "Causal-Forcing stages": tuple(
        f"causal-forcing-{pace}{stage}"
        for stage in ("ar-diffusion", "causal-ode", "causal-cd")
        for pace in ("", "framewise-")
    ),
    "Rolling Forcing": ("rolling-forcing",),
    "Reward Forcing": ("reward-forcing",),
    "Infinite-Forcing": ("infinite-forcing",),
    "LongLive": ("longlive", "longlive-interactive"),
    "MemFlow": ("memflow",),
    "LongLive 2": ("longlive2", "longlive2-i2v", "longlive2-lora", "longlive2-nvfp4"),
    "Krea Realtime": ("krea",),
    "CausVid": ("causvid", "causvid-4step"),
    "StreamDiffusionV2": (
        "streamdiffusionv2",
        "streamdiffusionv2-fast",
        "streamdiffusionv2-14b",
        "streamdiffusionv2-t2v",
    ),
    "CausalWan 2.2": ("causalwan2.2-i2v", "causalwan2.2-t2v"),
    "SFWan 2.1": ("sfwan2.1",),
    "LightX2V Wan 2.1": ("lightx2v-t2v-14b", "lightx2v-i2v-14b"),
    "LightX2V Wan 2.2": ("lightx2v-wan2.2-i2v",),
    "LightX2V Self Forcing": (
        "lightx2v-self-forcing-fp8",
        "lightx2v-self-forcing-nvfp4",
        "lightx2v-self-forcing-14b",
    ),
    "Matrix-Game 2": ("matrix-game-2",),
    "Matrix-Game 3": ("matrix-game-3",),
    "Matrix-Game 3.5": ("matrix-game-3.5",),
    "LingBot-World 2": ("lingbot-world-2-1.3b", "lingbot-world-2-14b"),
    "LingBot-World 1": ("lingbot-world-1-fast",),
    "minWM": ("minwm-camera",),
    "HY-WorldPlay": ("hy-worldplay",),
}
FAMILY_STEPS, RAW_LIST = (1000, 750, 500, 250), False
# Written out from the sources, not computed: chunk, window, sink, policy; steps, shift, through the shift; weights.
EXPECTED = {
    "self-forcing-dmd": (3, 21, 0, "self-forcing", FAMILY_STEPS, 5, True, "ema"),
    "causal-forcing": (3, 21, 0, "self-forcing", FAMILY_STEPS, 5, True, "raw"),
    "causal-forcing-framewise": (1, 21, 0, "self-forcing", FAMILY_STEPS, 5, True, "ema"),
    "causal-forcing-pp-2step": (1, 21, 0, "self-forcing", (1000, 500), 5, True, "ema"),
    "causal-forcing-pp-1step": (1, 21, 0, "self-forcing", (1000,), 5, True, "ema"),
    "causal-forcing-framewise-causal-cd": (1, 21, 0, "self-forcing", FAMILY_STEPS, 5, True, "raw"),
    "rolling-forcing": (3, 21, 3, "rolling-forcing", (1000, 800, 600, 400, 200), 5, True, "ema"),
    "reward-forcing": (3, 9, 3, "reward", FAMILY_STEPS, 5, True, "as stored"),
    "infinite-forcing": (3, 6, 1, "infinite", FAMILY_STEPS, 5, True, None),
    "longlive": (3, 12, 3, "longlive", FAMILY_STEPS, 5, True, "raw"),
    "memflow": (3, 12, 3, "memflow", FAMILY_STEPS, 5, True, "raw"),
    "longlive2": (8, 32, 8, "longlive2", (999, 749.25, 499.5, 249.75), 5, True, "raw"),
    "krea": (3, 6, None, "krea", (1000, 937, 833, 625, 0), 5, RAW_LIST, "as stored"),
    "causvid": (3, 21, 0, "self-forcing", (1000, 757, 522), 8, RAW_LIST, "as stored"),
    "causvid-4step": (3, 21, 0, "self-forcing", FAMILY_STEPS, 8, True, "as stored"),
    "streamdiffusionv2": (1, 6, 3, "sdv2", (700, 500, 400, 200), 8, RAW_LIST, "as stored"),
    "streamdiffusionv2-fast": (1, 5, 2, "sdv2", (700, 500, 400, 200), 8, RAW_LIST, "as stored"),
    "streamdiffusionv2-t2v": (3, 21, 0, "self-forcing", (*FAMILY_STEPS, 0), 8, RAW_LIST, "as stored"),
    "causalwan2.2-i2v": (3, 21, 0, "self-forcing", (1000, 850, 700, 550, 350, 275, 200, 125), None, True, "as stored"),
    "sfwan2.1": (3, 21, 0, "self-forcing", FAMILY_STEPS, 5, True, "as stored"),
    "lightx2v-t2v-14b": (None, None, None, None, FAMILY_STEPS, 5, True, "as stored"),
    "matrix-game-2": (3, 6, 0, None, (1000, 908.84, 713.98), 5, None, "as stored"),
    "lingbot-world-2-14b": (4, 18, 6, "lingbot2", None, 5, None, "as stored"),
}
POLICIES = {"self-forcing", "sf++", "longlive", "longlive2", "infinite", "reward", "rolling-forcing"}
POLICIES |= {"memflow", "krea", "sdv2", "lingbot2", "longlive-interactive"}
make_fake = cache(fakes.make_fake)  # nothing here changes one
each_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


# ------------------------------------------------------------------- table --
def test_every_release_of_the_table_is_there_and_no_other() -> None:
    assert sorted(name for names in ROWS.values() for name in names) == sorted(PRESETS)
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_are_those_of_the_source(name: str) -> None:
    preset = PRESETS[name]
    causal = (preset.chunk, preset.window, preset.sink, preset.policy)
    assert (*causal, preset.steps, preset.shift, preset.warp, preset.weights) == EXPECTED[name]


def test_what_only_some_releases_have() -> None:
    assert PRESETS["causal-forcing-pp-2step"].first_chunk_steps == FAMILY_STEPS
    assert [name for name, preset in PRESETS.items() if preset.first_chunk_steps] == [
        "causal-forcing-pp-2step",
        "causal-forcing-pp-1step",
    ]
    loras = {name: (preset.lora.rank, preset.lora.alpha) for name, preset in PRESETS.items() if preset.lora}
    assert loras == {
        "longlive": (256, 256),
        "longlive-interactive": (256, 256),
        "memflow": (256, 256),
        "longlive2-lora": (128, 128),
    }
    twins = {name: (preset.twin.boundary, preset.twin.boundary_step) for name, preset in PRESETS.items() if preset.twin}
    assert twins == {
        "causalwan2.2-i2v": (0.875, None),
        "causalwan2.2-t2v": (None, None),
        "lightx2v-wan2.2-i2v": (None, 2),
    }
    assert {name for name, preset in PRESETS.items() if preset.cache_source == "last_step"} == {
        "streamdiffusionv2",
        "streamdiffusionv2-fast",
        "streamdiffusionv2-14b",
        "streamdiffusionv2-t2v",
    }
    assert {name for name, preset in PRESETS.items() if preset.independent_first_frame} == {
        "longlive2-i2v",
        "causalwan2.2-i2v",
        "causalwan2.2-t2v",
    }
    assert (PRESETS["longlive2"].fps, PRESETS["longlive2"].native_size) == (24, (704, 1280))
    longlive2 = preset_settings(PRESETS["longlive2"]).steps
    assert longlive2 is not None
    assert FlowSchedule(longlive2).timesteps == (999, 937, 833, 624)
    assert {name for name, preset in PRESETS.items() if preset.is_whole} == set(ROWS["LongLive 2"])
    assert PRESETS["longlive"].policy_options != PRESETS["longlive-interactive"].policy_options


@each_preset
def test_every_number_is_read_or_an_open_question(preset: Preset) -> None:
    """None is never an accident, and what is known is not asked."""
    for name in NUMBERS:
        reasons = [reasons[name] for reasons in (preset.open_questions, preset.not_used) if name in reasons]
        assert len(reasons) == (getattr(preset, name) is None), name
        assert all(len(reason) > 10 for reason in reasons)
    others = {"files": preset.files, "twin.boundary": preset.twin and preset.twin.boundary}
    others |= {"guidance": preset.guidance}
    for name in set(preset.open_questions) - set(NUMBERS):
        assert not others[name], name


@each_preset
def test_every_number_says_where_it_was_read(preset: Preset) -> None:
    numbers = {name for name in (*NUMBERS, *EXTRAS) if getattr(preset, name) not in (None, {})}
    assert preset.sources.keys() == numbers
    assert all(re.match(r"arXiv \d|[\w-]+/[\w.-]+ \S|the ", place) for place in preset.sources.values()), preset.sources
    assert set(preset.read_elsewhere) <= numbers, "a source for a number that is not there"


@each_preset
def test_numbers_agree_with_each_other(preset: Preset) -> None:
    if preset.chunk is not None and preset.window is not None:
        CausalConfig(preset.chunk, preset.window, preset.sink or 0, cache_source=preset.cache_source or "clean")
    for steps in (preset.steps, preset.first_chunk_steps):
        if steps is not None:
            noisy = steps[:-1] if steps[-1] == 0 else steps  # Krea's last pass is at t = 0
            StepConfig(noisy, preset.shift or 5.0, warp=bool(preset.warp), solver=preset.solver or "renoise")
    assert preset.is_whole in (True, None)
    assert preset.policy in POLICIES | {None}
    assert preset.weights in ("ema", "raw", "as stored", None)
    assert preset.task in ("t2v", "i2v", "v2v")
    assert preset.latent_space in (*LATENT_SPACES, None)
    assert preset.is_causal == (preset.chunk is not None or "chunk" in preset.open_questions)
    assert preset.task == "i2v" or preset.sizes is None or preset.sizes.in_dim == preset.sizes.out_dim
    if preset.native_size is not None and preset.latent_space == "wan2.1":
        assert all(size % 16 == 0 for size in preset.native_size)
    if preset.twin is not None and preset.twin.boundary is not None:
        assert 0 < preset.twin.boundary < 1
    assert re.fullmatch(r"[a-z0-9.-]+", preset.name)
    assert preset.repository is None or re.fullmatch(r"[\w.-]+/[\w.-]+", preset.repository)


# By the word of its source: what each number of a policy is in the table of policies, or in the preset itself.
OPTIONS_ARE: dict[str, Callable[[Preset, CachePolicy], Any]] = {
    "sink_decay": lambda _, policy: policy.sink_average,
    "bank": lambda _, policy: policy.bank,
    "record_every": lambda _, policy: policy.record_every,
    "adapt_sink_threshold": lambda _, policy: policy.refresh_below,
    "multi_shot_sink": lambda _, policy: policy.shot_offset is not None,
    "multi_shot_rope_offset": lambda _, policy: policy.shot_offset,
    # A change of the prompt writes the window again, and the sink with it only where it is no global one.
    "global_sink": lambda _, policy: {RECACHE: True, RECACHE_SINK: False}[policy.history],
    "context_frames": lambda preset, _: (preset.window or 0) - (preset.chunk or 0),
    "cache_frames": lambda preset, _: (preset.window or 0) + (preset.sink or 0),
    "joint_frames": lambda preset, _: len(preset.steps or ()) * (preset.chunk or 0),
    "caches": lambda preset, _: 1 if preset.twin is None else 2,
}
# Of what is not run here: a first chunk of another length, which only a given video has.
ONLY_OF_VIDEO_TO_VIDEO = {"first_chunk"}


@each_preset
def test_numbers_of_a_policy_are_those_that_it_runs_with(preset: Preset) -> None:
    """They are told where a preset is listed; the policy's own record is what runs."""
    if preset.unsupported is not None and not set(preset.policy_options) <= OPTIONS_ARE.keys():
        return  # a network of another kind, whose cache is not ours
    policy = cache_policy("self-forcing" if preset.policy in (None, PLAIN) else preset.policy)
    open_ones = {"joint_frames"} if "steps" in preset.open_questions else set()  # a line says it at the run
    other = ONLY_OF_VIDEO_TO_VIDEO if preset.task == "v2v" else set()
    names = set(preset.policy_options) - open_ones - other
    assert {name: OPTIONS_ARE[name](preset, policy) for name in names} == {
        name: preset.policy_options[name] for name in names
    }
    assert policy.is_joint == ("joint_frames" in preset.policy_options)


@each_preset
def test_presets_are_plain_frozen_values(preset: Preset) -> None:
    json.dumps(asdict(preset))
    assert hash(preset) == hash(replace(preset))
    with pytest.raises(FrozenInstanceError):
        preset.chunk = 4  # type: ignore[misc]


def test_sizes_are_those_of_the_networks_that_are_built_here() -> None:
    pairs = {"self-forcing-dmd": "t2v-1.3b", "krea": "t2v-14b", "lightx2v-i2v-14b": "i2v-14b"}
    for name, size in pairs.items():
        sizes, config = asdict(PRESETS[name].sizes), NETWORK_SIZES[size]  # type: ignore[call-overload]
        assert sizes.pop("has_image_features") == (config.model_type == "i2v")
        assert sizes == {field: getattr(config, field) for field in sizes}


def test_downloads_have_the_preset_s_files_and_those_beside_them() -> None:
    for name in PRESETS.keys() & RELEASES.keys():
        preset, release = PRESETS[name], RELEASES[name]
        assert preset.repository == release.repo
        assert {*preset.files, *preset.partner_files} <= set(release.files)
    offered = {name for name, preset in PRESETS.items() if preset.repository and preset.files}
    assert offered - RELEASES.keys() == {name for name in offered if PRESETS[name].unsupported}
    assert RELEASES["longlive"].files == ("models/longlive_base.pt", "models/lora.pt")


def test_what_cannot_run_here_says_why() -> None:
    unsupported = {name for name, preset in PRESETS.items() if preset.unsupported}
    worlds = ("Matrix-Game 2", "Matrix-Game 3", "Matrix-Game 3.5", "LingBot-World 2", "LingBot-World 1", "minWM")
    rows = ("Self Forcing GAN, Self-Forcing++", "LongLive 2", "HY-WorldPlay", *worlds)
    assert unsupported == {name for row in rows for name in ROWS[row]} | {"lightx2v-self-forcing-nvfp4"}


# ------------------------------------------------------------------- names --
def test_unknown_names_are_answered_with_near_ones() -> None:
    assert find_preset("krea") is PRESETS["krea"]
    for name, near in (("longlve", "longlive"), ("Self-Forcing-DMD", "self-forcing-dmd"), ("wan2.2", "causalwan2.2")):
        with pytest.raises(ValueError) as caught:
            find_preset(name)
        assert f"there is no preset {name!r}" in str(caught.value)
        assert near in str(caught.value)
    with pytest.raises(ValueError) as caught:
        find_preset("zzz")
    assert all(name in str(caught.value) for name in PRESETS), "nothing is near, so all of them"


def test_presets_that_need_a_policy_which_the_cache_does_not_have() -> None:
    missing = missing_policies({"self-forcing"})
    assert missing["longlive"] == "longlive"
    assert missing["causal-forcing-longvideo"] == "rolling-forcing"
    assert not {"self-forcing-dmd", "causvid", "lightx2v-t2v-14b", "matrix-game-2"} & missing.keys()
    assert missing_policies(POLICIES) == {}


# -------------------------------------------------------------- recognition --
def shapes_of(fake: fakes.Fake) -> dict[str, tuple[int, ...]]:
    name = fake.path or next(file for file in fake.files if file.endswith(".safetensors"))
    return fakes.key_shapes(fake.files[name])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Preset]:
    """The presets as if the fakes were the releases."""
    presets = fakes.tiny_presets()
    for name, preset in presets.items():
        monkeypatch.setitem(PRESETS, name, preset)
    return presets


def candidates(name: str, path: str) -> tuple[list[str], str | None]:
    """Return the names that a fake of the real sizes is recognised as below that path, and by what."""
    actual = recognise(shapes_of(make_fake(name, is_real_size=True)), path)
    return [preset.name for preset in actual.presets], actual.by


def test_a_header_says_what_a_file_is_whatever_it_is_called() -> None:
    header = {HEADER_KEY: json.dumps({"format": 1, "preset": "krea"})}
    recognition = recognise({}, "self_forcing_dmd.pt", header)
    assert (recognition.preset, recognition.by) == (PRESETS["krea"], "header")
    with pytest.raises(ValueError, match=r"no preset 'kreaa'.*krea"):
        recognise({}, "m.safetensors", {HEADER_KEY: json.dumps({"format": 1, "preset": "kreaa"})})
    assert recognise({}, "m.safetensors", {HEADER_KEY: json.dumps({"format": 1})}).presets == ()


@pytest.mark.parametrize("name", [name for name in fakes.RELEASES if PRESETS[name].files])
@pytest.mark.usefixtures("tiny")
def test_a_release_where_the_hub_puts_it_is_recognised(name: str) -> None:
    fake, preset = make_fake(name), PRESETS[name]
    file = fake.path or next(file for file in fake.files if file.endswith(".safetensors"))
    repository = (preset.repository or "of/unknown").split("/")[1]
    recognition = recognise(shapes_of(fake), f"models/{repository}/{file}")
    # Two configurations of one file cannot be told apart by anything in it.
    same_files = {other.name for other in PRESETS.values() if other.files == preset.files}
    if preset.name.startswith(("causalwan", "sfwan")):
        same_files = {name}  # a folder of diffusers has its repository's name
    assert {actual.name for actual in recognition.presets} == same_files
    assert recognition.by == "file name"
    assert (recognition.preset is None) == (len(same_files) > 1)


@pytest.mark.parametrize(
    ("name", "path", "expected", "by"),
    [
        ("self-forcing-dmd", "self_forcing_dmd.pt", ["self-forcing-dmd"], "file name"),
        ("causal-forcing", "chunkwise/causal_forcing.pt", ["causal-forcing"], "file name"),
        # One name in two folders: FSDP's infix tells them apart.
        ("causal-forcing", "causal_forcing.pt", ["causal-forcing"], "file name"),
        ("causal-forcing-framewise", "causal_forcing.pt", ["causal-forcing-framewise"], "file name"),
        (
            "causal-forcing-causal-cd",
            "causal_cd.pt",
            ["causal-forcing-causal-cd", "causal-forcing-framewise-causal-cd"],
            "file name",
        ),
        ("causvid", "CausVid/autoregressive_checkpoint/model.pt", ["causvid"], "file name"),
        ("causvid-4step", "CausVid/model.pt", ["causvid", "causvid-4step"], "file name"),
        ("matrix-game-2", "renamed.safetensors", ["matrix-game-2"], "names and shapes"),
        (
            "lightx2v-wan2.2-i2v",
            "high.safetensors",
            ["causalwan2.2-i2v", "lightx2v-wan2.2-i2v"],
            "names and shapes",
        ),
        # A name of another size is not believed.
        (
            "wan2.2-i2v-alone",
            "self_forcing_dmd.pt",
            ["causalwan2.2-i2v", "lightx2v-wan2.2-i2v"],
            "names and shapes",
        ),
        ("vace", "self_forcing_dmd.pt", [], None),
        ("hy-worldplay", "model.safetensors", [], None),
    ],
)
def test_files_are_recognised_by_name_and_shapes(name: str, path: str, expected: list[str], by: str | None) -> None:
    assert candidates(name, path) == (expected, by)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("self-forcing-dmd", "RollingForcing/wan_models/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors"),
        ("self-forcing-dmd", "Infinite-Forcing/my_finetune.safetensors"),
        ("self-forcing-dmd", "StreamDiffusionV2/sdv2_v2v.pt"),
        ("self-forcing-dmd", "MemFlow/base.safetensors"),
        ("causvid", "CausVid/causvid_3step.pt"),
    ],
)
def test_a_repositorys_folder_alone_names_no_release(name: str, path: str) -> None:
    """Cloned code is called so too, and holds other networks."""
    names, by = candidates(name, path)
    assert by == "names and shapes"
    assert len(names) > 1


def test_a_file_of_a_common_size_and_name_may_be_any_and_is_asked_about() -> None:
    names, by = candidates("causvid", "model.pt")
    assert by == "names and shapes"
    assert {"self-forcing-dmd", "causvid", "streamdiffusionv2", "reward-forcing", "sfwan2.1"} <= set(names)
    assert not {"krea", "self-forcing-gan", "longlive2", "matrix-game-2"} & set(names)


def test_the_only_release_of_these_shapes_is_no_certainty() -> None:
    shapes = shapes_of(make_fake("wan2.1-i2v", is_real_size=True))
    recognition = recognise(shapes, "wan2.1_i2v_480p.safetensors")
    assert [preset.name for preset in recognition.presets] == ["lightx2v-i2v-14b"]
    assert recognition.preset is None, "the undistilled network has the same"


def test_a_lora_and_a_file_with_one_belong_to_releases_that_have_one(tiny: dict[str, Preset]) -> None:
    lora = fakes.key_shapes(make_fake("longlive").files["models/lora.pt"])
    names = [preset.name for preset in recognise(lora, "models/lora.pt").presets]
    assert {"longlive", "longlive-interactive", "memflow"} <= set(names)
    assert all(PRESETS[name].lora for name in names)
    assert recognise(lora, "MemFlow/lora.pt").preset == tiny["memflow"]
    one_file = shapes_of(make_fake("longlive-one-file"))
    names = [preset.name for preset in recognise(one_file, "longlive.pt").presets]
    assert names == ["longlive", "longlive-interactive", "memflow"]


def test_bytes_decide_where_names_do_not(
    tmp_path: Path, tiny: dict[str, Preset], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = make_fake("reward-forcing")
    path = tmp_path / "model.pt"
    fakes.write_fake(replace(fake, files={"model.pt": fake.files[fake.path]}, path="model.pt"), tmp_path)
    assert recognise(shapes_of(fake), path).by == "names and shapes"
    name = fingerprint(path)
    assert name is not None
    monkeypatch.setattr(recognise_module, "FINGERPRINTS", {name: "reward-forcing"})
    recognition = recognise(shapes_of(fake), path)
    assert (recognition.preset, recognition.by) == (tiny["reward-forcing"], "fingerprint")


def test_fingerprints_tell_sizes_and_beginnings_apart(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        fake = make_fake("krea", seed)
        save_file(fake.networks["raw"], tmp_path / name)
    (tmp_path / "longer").write_bytes((tmp_path / "a").read_bytes() + b"\0")
    names = [fingerprint(tmp_path / name) for name in ("a", "b", "longer")]
    assert len(set(names)) == 3
    assert fingerprint(tmp_path) is None
    assert all(re.fullmatch(r"\d+:[0-9a-f]{64}", name) for name in names if name)
    # Only what was at hand is listed.
    assert all(re.fullmatch(r"\d+:[0-9a-f]{64}", name) and preset in PRESETS for name, preset in FINGERPRINTS.items())
