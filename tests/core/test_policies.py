"""What each cache policy promises, without weights that were trained for it.

Letters: B batch, T latent frames.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.noise import SeededNoise
from selfforcing_core.policy import CUT, HISTORIES, POLICIES, cache_policy
from selfforcing_core.rollout import rollout
from tests.support.golden_fixture import FOLDER
from tests.support.golden_rings import LATENTS, POLICY_OF
from tests.support.host_reads import NoHostReads
from tests.support.tiny_wan import CONFIG, FRAME, guided, random_text, random_wan

STEPS = StepConfig((1000.0, 500.0))
MODEL = random_wan(dtype=torch.float32)
SMALLEST = random_wan(config=replace(CONFIG, num_layers=1), dtype=torch.float32)
# Every policy in a size in which it evicts within a few chunks.
SMALL = {
    "self-forcing": CausalConfig(2, 6, 2),
    "longlive": CausalConfig(2, 6, 2),
    "longlive-interactive": CausalConfig(2, 6, 2),
    "longlive-infinity": CausalConfig(2, 6, 2),
    "infinite": CausalConfig(2, 5, 1),
    "infinity-rope": CausalConfig(2, 7, 1),
    "flashdreams": CausalConfig(2, 7, 3),
    "lingbot2": CausalConfig(2, 6, 2),
    "reward": CausalConfig(2, 6, 2),
    "memrope": CausalConfig(2, 8, 2),
    "rolling-sink": CausalConfig(2, 6, 0),
    "rolling-forcing": CausalConfig(2, 8, 2),
    "krea": CausalConfig(2, 4, 0),
    "krea-bias": CausalConfig(2, 6, 0),
    "memflow": CausalConfig(2, 6, 2),
    "memflow-plain": CausalConfig(2, 6, 2),
    "sdv2": CausalConfig(1, 5, 2),
    "longlive2": CausalConfig(2, 8, 2),
}


def config(name: str, **more: Any) -> CausalConfig:
    return replace(SMALL[name], policy=name, **more)


def start(causal: CausalConfig, frames: int, **options: Any) -> Any:
    options = {"noise": SeededNoise(4), "steps": STEPS, **options}
    text = options.pop("text", random_text(dtype=torch.float32))
    model = options.pop("model", MODEL)
    return rollout(guided(model, text, options), latent_shape=(frames, *FRAME), causal=causal, **options)


def video(causal: CausalConfig, frames: int, **options: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([chunk.latents_BTCHW for chunk in start(causal, frames, **options)], 1)


def ring(causal: CausalConfig) -> KVCache:
    """Return an empty cache of one token a frame, to be staged without a network."""
    cache = KVCache(
        CONFIG,
        batch=1,
        tokens_per_frame=1,
        capacity=causal.cache_frames(10**7),
        sink=causal.sink,
        dtype=torch.float64,
    )
    cache.follow(cache_policy(causal.policy), (1, 1))
    return cache


def seen(cache: KVCache) -> set[tuple[float, int]]:
    """Return each visible frame and how far it stands from the staged chunk's first."""
    frames = len(cache.frames())
    return {(cache.slot_positions[slot] - cache.position, cache.slot_frames[slot]) for slot in range(frames)}


def test_every_policy_is_tried_here() -> None:
    assert set(SMALL) == set(POLICIES)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"rolling-forcing", "krea-bias"}))
def test_without_eviction_every_policy_is_the_baseline(name: str) -> None:
    """The two left out differ from the first chunks on; see test_windows.py."""
    causal = replace(config(name), window=-1 if name != "rolling-sink" else 12)
    assert torch.equal(video(causal, 8), video(CausalConfig(causal.chunk), 8))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_shows_once_frames_are_evicted(name: str) -> None:
    """Those that differ from plain window and sink only at a change of the prompt show nothing here."""
    plain, policy = video(replace(config(name), policy="self-forcing"), 12), video(config(name), 12)
    changes_nothing = name in ("self-forcing", "longlive", "longlive-interactive", "lingbot2", "longlive2")
    assert torch.equal(plain, policy) == changes_nothing


@pytest.mark.parametrize("name", POLICIES)
def test_a_video_of_any_length_is_finite_and_costs_the_same_memory(name: str) -> None:
    causal = config(name)
    text = random_text(dtype=torch.float32)
    small = random_wan(config=replace(CONFIG, num_layers=1), dtype=torch.float32)
    sizes = set()
    with torch.no_grad():
        chunks = start(causal, 200, text=text, model=small, steps=StepConfig((1000.0,)), commit_last=True)
        for index, chunk in enumerate(chunks):
            assert chunk.latents_BTCHW.isfinite().all()
            if index > 8:
                sizes.add(chunk.snapshot().num_bytes)
    assert len(sizes) == 1


# Those that say where frames stand by themselves, and those that choose among frames.
# Of memflow only its first chunks: it scores frames by keys that are turned by their own number, as published, so that
# a full bank may choose other frames a million frames on.
SHIFTED = [name for name, policy in POLICIES.items() if policy.is_rebased]
SHIFTED += ["memflow", "sdv2,reset_at=0", "longlive2", "rolling-sink"]


@pytest.mark.parametrize("name", SHIFTED)
def test_frame_numbers_do_not_matter(name: str) -> None:
    """A stream a million frames on computes what it did at its beginning, to rounding."""
    causal = replace(config(name.partition(",")[0]), policy=name)
    flows = []
    for first in (0, 10**6):
        cache = MODEL.new_cache(
            batch=1,
            latent_height=FRAME[1],
            latent_width=FRAME[2],
            capacity=causal.cache_frames(10**7),
            sink=causal.sink,
            like=random_text(dtype=torch.float32).prompt_embeds_BPE,
        )
        cache.follow(cache_policy(causal.policy), (FRAME[1] // 2, FRAME[2] // 2))
        cache.restart(first + cache.head, sink_start=first)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for index in range(14):
                if index == 4:
                    cache.begin_shot(first + index * causal.chunk)
                x = torch.randn(1, causal.chunk, *FRAME, generator=generator)
                embeds = random_text(dtype=torch.float32).prompt_embeds_BPE
                frame = first + index * causal.chunk
                flow = MODEL(x, torch.zeros(1, causal.chunk), embeds, cache=cache, start_frame=frame)
        flows.append(flow)
    torch.testing.assert_close(flows[0], flows[1], atol=1e-6, rtol=0)


@settings(max_examples=30)
@given(chunk=st.integers(1, 4), sink=st.integers(0, 5), room=st.integers(0, 6), chunks=st.integers(1, 14))
def test_a_rebased_sink_stands_right_before_the_window(chunk: int, sink: int, room: int, chunks: int) -> None:
    causal = CausalConfig(chunk, sink + chunk + room, sink, policy="infinite")
    cache = ring(causal)
    for index in range(chunks):
        cache.stage(index * chunk, chunk)
        positions = sorted(cache.slot_positions[slot] for slot in range(len(cache.frames())))
        assert positions == [positions[0] + step for step in range(len(positions))]
        assert positions[-1] == (index + 1) * chunk - 1
        assert set(cache.frames()) >= set(range(min(sink, (index + 1) * chunk)))


def test_an_average_of_constant_frames_is_the_geometric_one() -> None:
    """After n evictions of x from a sink s: a^n s + (1 - a^n) x, for values; keys stand where the policy puts them."""
    causal = replace(config("reward"), policy="reward,sink_average=0.75")
    cache = ring(causal)
    for index in range(7):
        cache.stage(2 * index, 2)
        ones = torch.ones(CONFIG.num_layers, 1, 2, CONFIG.num_heads, CONFIG.head_dim, dtype=torch.float64)
        for layer in range(CONFIG.num_layers):
            cache.write(layer, ones[layer], ones[layer] * (5.0 if index == 0 else 1.0))
    evictions = 7 - 3
    value = 0.75**evictions * 5 + (1 - 0.75**evictions)
    torch.testing.assert_close(cache.v[:, :, :2], torch.full_like(cache.v[:, :, :2], value))


def test_a_flush_keeps_the_sink_and_the_last_frames() -> None:
    cache = ring(config("infinity-rope"))
    for index in range(5):
        cache.stage(2 * index, 2)
    cache.forget_window(10, 2)
    cache.stage(10, 2)
    assert cache.frames() == (0, 8, 9, 10, 11)
    assert seen(cache) == {(-3.0, 0), (-2.0, 8), (-1.0, 9), (0.0, 10), (1.0, 11)}


def test_a_cut_puts_one_chunk_far_away_and_the_next_back() -> None:
    cache = ring(config("infinity-rope"))
    for index in range(5):
        cache.stage(2 * index, 2)
    cache.forget_window(10, 2)
    cache.jump_to(45)
    cache.stage(10, 2)
    assert seen(cache) == {(-45.0, 0), (-44.0, 8), (-43.0, 9), (0.0, 10), (1.0, 11)}
    cache.stage(10, 2)  # its later passes
    assert seen(cache) == {(-45.0, 0), (-44.0, 8), (-43.0, 9), (0.0, 10), (1.0, 11)}
    cache.stage(12, 2)
    assert seen(cache) == {(-5.0, 0), (-4.0, 8), (-3.0, 9), (-2.0, 10), (-1.0, 11), (0.0, 12), (1.0, 13)}


@pytest.mark.parametrize("name", POLICIES)
def test_a_word_that_a_policy_cannot_follow_is_refused(name: str) -> None:
    for history in set(HISTORIES) - set(POLICIES[name].histories):
        with pytest.raises(ValueError, match=f"policy {name} cannot {history}"):
            POLICIES[name].with_history(history)


@pytest.mark.parametrize("at", [2, 4], ids=["early", "late"])
@pytest.mark.parametrize(("name", "history"), [(name, word) for name in POLICIES for word in POLICIES[name].histories])
def test_a_chunk_made_once_more_is_what_it_would_have_been(name: str, history: str, at: int) -> None:
    """With another prompt from chunk `at` on, before the first eviction or behind it.

    The chunk there and others are each made twice, of other noise at first.
    """
    causal = config(name)
    change = {at * causal.chunk: PromptChange(random_text(seed=1, dtype=torch.float32), history)}
    noise, twice = SteeredNoise(), []
    once = video(causal, 8 * causal.chunk, prompt_at=change.get, model=SMALLEST)
    with torch.no_grad():
        chunks = start(causal, 8 * causal.chunk, prompt_at=change.get, noise=noise, model=SMALLEST)
        for chunk in chunks:
            if noise.seed == 4:
                twice.append(chunk.latents_BTCHW)
            elif POLICIES[name].is_joint:  # the later chunks have seen it
                with pytest.raises(ValueError, match="makes none of them once more"):
                    chunks.send(True)
                return
            else:
                noise.seed = 4
                twice.append(chunks.send(True).latents_BTCHW)
            # of the chunks after this one, which begin with another seed and are made again
            noise.seed = 4 if chunk.index + 1 not in (1, 2, 4, 5) else 5
    torch.testing.assert_close(torch.cat(twice, 1), once, atol=1e-5, rtol=0)


class SteeredNoise:
    """Noise of a seed that is set on the way."""

    seed = 4

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return SeededNoise(self.seed).draw(start_frame, step, shape)


# Settings that change what is kept between chunks, beside the policies as they are.
READINGS = [
    *POLICIES,
    "memflow,published=yes,record_every=1",
    "sdv2,published=yes,reset_at=7",
    "infinity-rope,published=yes",
]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, None) for name in READINGS), *((name, torch.int8) for name in ("memflow", "sdv2"))]
)
def test_resuming_is_bit_exact_after_every_chunk(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """With another prompt from frame 8 on, and a cut where the policy knows one; through a file."""
    causal = replace(config(name.partition(",")[0]), policy=name)
    model = random_wan(dtype=torch.float32)
    model.cache_dtype = dtype
    history = CUT if CUT in cache_policy(name).histories else None
    change = PromptChange(random_text(seed=1, dtype=torch.float32), history)

    def prompt_at(start_frame: int) -> PromptChange | None:
        return change if start_frame == 8 else None

    with torch.no_grad():
        chunks = [(chunk, chunk.snapshot()) for chunk in start(causal, 20, prompt_at=prompt_at, model=model)]
        latents = torch.cat([chunk.latents_BTCHW for chunk, _ in chunks], 1)
        for chunk, snapshot in chunks[:-1]:
            snapshot.save(tmp_path / "state.safetensors")
            again = type(snapshot).load(tmp_path / "state.safetensors")
            end = chunk.start_frame + causal.chunk
            text = {"text": change.conditioning} if end > 8 else {}
            rest = video(causal, 20, start=again, prompt_at=prompt_at, model=model, **text)
            assert torch.equal(rest, latents[:, end:]), f"after frame {end}"


@pytest.mark.parametrize("name", READINGS)
def test_no_policy_reads_a_tensor_back(name: str) -> None:
    """Neither in a chunk, nor at a change of the prompt, nor where a chunk is made once more."""
    causal = replace(config(name.partition(",")[0]), policy=name)
    history = CUT if CUT in cache_policy(name).histories else None
    change = PromptChange(random_text(seed=1, dtype=torch.float32), history)
    chunks = start(causal, 20, prompt_at=lambda frame: change if frame in (8, 12) else None)
    with torch.no_grad():
        first = next(chunks)
        with NoHostReads():
            rest = [chunks.send(True) if chunk.index == 6 and not chunk.is_final else chunk for chunk in chunks]
    assert len([first, *rest]) == 20 // causal.chunk


@pytest.mark.parametrize(("name", "history"), [(name, word) for name in POLICIES for word in POLICIES[name].histories])
def test_resuming_around_a_change_is_bit_exact(name: str, history: str) -> None:
    """After every chunk from two before a change on, whatever its word; `recode` and the like need the clean frames."""
    causal = config(name)
    at, frames = 4 * causal.chunk, 8 * causal.chunk
    change = PromptChange(random_text(seed=1, dtype=torch.float32), history)
    options = {"prompt_at": {at: change}.get, "model": SMALLEST}
    with torch.no_grad():
        chunks = [(chunk, chunk.snapshot()) for chunk in start(causal, frames, **options)]
        latents = torch.cat([chunk.latents_BTCHW for chunk, _ in chunks], 1)
        for chunk, snapshot in chunks[2:-1]:
            end = chunk.start_frame + causal.chunk
            text = {"text": change.conditioning} if end > at else {}
            known = replace(snapshot, video_BTCHW=latents[:, :end])
            rest = video(causal, frames, start=known, **options, **text)
            assert torch.equal(rest, latents[:, end:]), f"after frame {end}"


def test_a_state_of_another_policy_is_refused() -> None:
    with torch.no_grad():
        snapshots = [chunk.snapshot() for chunk in start(config("infinite"), 12)]
        with pytest.raises(ValueError, match="follows policy infinite, this one self-forcing"):
            next(start(replace(config("infinite"), policy="self-forcing"), 12, start=snapshots[4]))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_hold_what_a_policy_keeps(name: str, dtype: torch.dtype) -> None:
    model = random_wan(dtype=torch.float32)
    exact = video(config(name), 12, model=model)
    model.cache_dtype = dtype
    error = (video(config(name), 12, model=model) - exact).abs().mean() / exact.std()
    assert 0 < error < (0.02 if dtype == torch.int8 else 0.06)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("infinit", "policy 'infinit' is unknown; use infinite"),
        ("reward,alpha=1", "policy reward has no setting 'alpha=1'"),
        ("reward,sink_average=x", "sink_average=x cannot be read"),
        ("reward,sink_average=2", r"leave \[0, 1\]"),
        ("infinite,history=forget", "history 'forget' is unknown"),
        ("infinite,published=yes", "policy infinite has no setting 'published=yes'"),
        ("sdv2,published=true", "published=true cannot be read"),
        ("sdv2,history=recode", "policy sdv2 cannot recode: each layer has chosen"),
        ("longlive2,history=flush", "policy longlive2 cannot flush: .* use keep or cut"),
        ("memflow,record_every=0", "record_every 0 is a count of chunks; use 1 or more"),
        ("memflow,bank=-1", "bank -1, .* are counts of frames"),
    ],
)
def test_what_no_policy_is_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cache_policy(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk": 3, "window": 9, "sink": 1, "policy": "reward"},
        {"chunk": 3, "window": 7, "sink": 3, "policy": "memrope"},
        {"chunk": 3, "window": 10, "policy": "rolling-sink"},
        {"chunk": 3, "window": 9, "sink": 3, "policy": "sdv2"},
        {"chunk": 1, "window": 9, "policy": "sdv2"},
        {"chunk": 3, "window": 8, "sink": 3, "policy": "longlive2"},
        {"chunk": 3, "window": 9, "sink": 3, "policy": "rolling-sink"},
    ],
)
def test_a_policy_refuses_sizes_for_which_it_was_not_made(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=settings["policy"]):
        CausalConfig(**settings)


def test_a_plain_config_is_written_as_before() -> None:
    assert "policy" not in CausalConfig().to_dict()
    causal = CausalConfig(3, 9, 3, policy="reward,sink_average=0.9")
    assert CausalConfig.from_dict(causal.to_dict()) == causal


TABLES = FOLDER / "policy_tables.json"


@pytest.mark.skipif(not TABLES.is_file(), reason="the recorded tables are not in the folder of fixtures")
@pytest.mark.parametrize("preset", [name for name in POLICY_OF if name != "flashdreams_long"])
def test_frames_at_published_sizes_lie_where_they_were_recorded(preset: str) -> None:
    """Without weights: a ring of one token a frame is staged through every chunk of the table."""
    table = json.loads(TABLES.read_text(encoding="utf-8"))[preset]
    sizes = table["pipeline"]
    chunk = sizes["num_frame_per_block"]
    policy = POLICY_OF[preset]({"memory": {"alpha": 0.999, "alpha_long": 0.01, "alpha_short": 0.1}})
    policy += ",published=yes" if preset in LATENTS else ""  # the tables are of the code as it is
    causal = CausalConfig(chunk, sizes["window"], sizes["sink"], policy=policy)
    cache, compared = ring(causal), 0
    for row in table["rows"]:
        first = row["frames"][0] if "frames" in row else row["chunk"] * chunk
        if row["kind"] != "chunk":
            _recache(cache, causal, row["chunk"] * chunk, moves_sink=preset == "longlive_moving_sink")
            continue
        if row["chunk"] in table.get("flush_at_chunk", ()):
            cache.forget_window(first, cache.policy.kept)
            if row["chunk"] in table.get("cut_at_chunk", ()):
                cache.jump_to(cache.policy.cut_at)
        cache.stage(first, chunk)
        query = row["query_pos"][0]
        recorded = {(position - query, frame) for position, frame in zip(row["key_pos"], row["key_frame"])}
        assert seen(cache) == recorded, f"chunk {row['chunk']}"
        compared += 1
    assert compared > 8


TABLES_B = FOLDER / "policy_tables_b.json"


@pytest.mark.skipif(not TABLES_B.is_file(), reason="the recorded tables are not in the folder of fixtures")
@pytest.mark.parametrize(("preset", "policy"), [("longlive2", "longlive2"), ("flashdreams_long", "flashdreams")])
def test_frames_of_the_second_table_lie_where_they_were_recorded(preset: str, policy: str) -> None:
    """Shots that are cut at published sizes, and a large rebased sink."""
    table = json.loads(TABLES_B.read_text(encoding="utf-8"))[preset]
    sizes = table["pipeline"]
    chunk = sizes["num_frame_per_block"]
    cache = ring(CausalConfig(chunk, sizes["window"], sizes["sink"], policy=policy))
    for row in table["rows"]:
        first, query = row["frames"][0], row["query_pos"][0]
        if row["chunk"] in table.get("cut_at_chunk", ()):
            cache.begin_shot(first)
        cache.stage(first, chunk)
        recorded = {(position - query, frame) for position, frame in zip(row["key_pos"], row["key_frame"])}
        assert seen(cache) == recorded, f"chunk {row['chunk']}"


def _recache(cache: KVCache, causal: CausalConfig, end_frame: int, *, moves_sink: bool) -> None:
    """Stage what History.write_jointly stages."""
    if end_frame <= causal.window:
        cache.restart(causal.sink)
        cache.stage(0, end_frame)
    elif moves_sink:
        cache.restart(end_frame - causal.window + causal.sink, sink_start=end_frame - causal.window)
        cache.stage(end_frame - causal.window, causal.window)
    else:
        cache.rewind(end_frame - causal.window + causal.sink)
        cache.stage(end_frame - causal.window + causal.sink, causal.window - causal.sink)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rolling-sink,bank=1", "policy rolling-sink has no setting 'bank=1'; use history=..., kept=..., cut_at=...$"),
        ("longlive2,bank=2", "policy longlive2 has no setting 'bank=2'; use history=..., shot_offset=...$"),
        ("krea,bank=2", "use history=..., keeps_first=..., bias=..., published=...$"),
        ("krea,shot_offset=8", "has no setting"),
        ("krea,means=0.1/0.2", "has no setting"),
        ("rolling-forcing,bank=2", "has no setting 'bank=2'; use history=...$"),
        ("rolling-forcing,refresh_below=0.2", "has no setting"),
        ("longlive,reset_at=50", "has no setting"),
        ("longlive,record_every=5", "has no setting"),
        ("reward,keeps_first=yes", "has no setting"),
        ("self-forcing,bank=2", "policy self-forcing has no setting 'bank=2'"),
        ("sdv2,refresh_below=nan", "refresh_below nan is no likeness; use -1 to 1"),
        ("sdv2,refresh_below=9", "refresh_below 9.0 is no likeness"),
        ("krea,bias=inf", "bias inf is no finite factor"),
        ("reward,sink_average=nan", "leave"),
    ],
)
def test_a_policy_refuses_what_it_does_not_look_at(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cache_policy(text)


def test_every_setting_is_of_some_policy_and_blanks_do_not_count() -> None:
    values = {"history": "keep", "means": "0.1/0.2", "keeps_first": "yes", "published": "yes", "sink_average": "0.5"}
    for name, policy in POLICIES.items():
        for key in policy.settings:
            assert cache_policy(f"{name}, {key} = {values.get(key, '1')} ,").name == name
    assert cache_policy("reward, sink_average = 0.5,") == cache_policy("reward,sink_average=0.5")
