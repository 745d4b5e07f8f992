"""Policies whose passes are not those of one chunk after another: joint windows, and windows computed again.

What they have in common with all policies is in test_policies.py.

Letters: B batch, T latent frames.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfforcing_core.codecs.first_picture import FirstPictures
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.experts import Experts
from selfforcing_core.guided import Guided
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.noise import CONTEXT, SeededNoise
from selfforcing_core.policy import HISTORIES, POLICIES, cache_policy
from selfforcing_core.rollout import BackpropSpec, rollout
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.snapshot import Snapshot
from tests.support.golden_fixture import FOLDER
from tests.support.golden_windows import seen_by
from tests.support.tiny_wan import CONFIG, FRAME, guided, random_text, random_wan

STEPS = StepConfig((1000.0, 750.0, 500.0))
MODEL = random_wan(dtype=torch.float32)
JOINT = CausalConfig(2, 10, 2, policy="rolling-forcing")  # three chunks together, the sink and a chunk of the past
KREA = CausalConfig(2, 6, policy="krea")  # four frames computed again, in two passes
BIASED = replace(KREA, window=4, policy="krea-bias")
ALL = {"rolling-forcing": JOINT, "krea": KREA, "krea-bias": BIASED}


def start(causal: CausalConfig, frames: int, **options: Any) -> Any:
    options = {"noise": SeededNoise(4), "steps": STEPS, **options}
    text = options.pop("text", random_text(dtype=torch.float32))
    model = options.pop("model", MODEL)
    return rollout(guided(model, text, options), latent_shape=(frames, *FRAME), causal=causal, **options)


def video(causal: CausalConfig, frames: int, **options: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([chunk.latents_BTCHW for chunk in start(causal, frames, **options)], 1)


class Counted:
    """Stands in for the network, keeping frames, timesteps and text of each pass."""

    def __init__(self) -> None:
        self.config, self.new_cache, self.calls = MODEL.config, MODEL.new_cache, []

    def __call__(self, x: Tensor, timesteps: Tensor, embeds: Tensor, **kwargs: Any) -> Tensor:
        first = kwargs["start_frame"]
        self.calls.append((first, first + x.shape[1], timesteps[0].tolist(), embeds))
        return MODEL(x, timesteps, embeds, **kwargs)


# ------------------------------------------------------------- every such policy --
def test_all_of_them_are_tried_here() -> None:
    assert set(ALL) == {name for name, policy in POLICIES.items() if policy.is_joint or policy.recomputes}


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_resuming_after_any_chunk_is_bit_exact(name: str, negative: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {"negative": random_text(seed=2, dtype=torch.float32), "guidance": 3.0} if negative else {}
    with torch.no_grad():
        chunks = [(chunk.latents_BTCHW, chunk.snapshot()) for chunk in start(ALL[name], 16, **more)]
        for index, (_, snapshot) in enumerate(chunks[:-1]):
            snapshot.save(tmp_path / "state.safetensors")
            again = Snapshot.load(tmp_path / "state.safetensors")
            rest = video(ALL[name], 16, start=again, **more)
            assert torch.equal(rest, torch.cat([later for later, _ in chunks[index + 1 :]], 1)), index


@pytest.mark.parametrize("name", ALL)
def test_a_finished_video_goes_on(name: str) -> None:
    """Behind the last chunk of a joint window a new one has to be begun, as at the start of a video."""
    with torch.no_grad():
        *_, last = start(ALL[name], 12)
        rest = video(ALL[name], 18, start=last.snapshot())
    assert rest.shape[1] == 6
    assert rest.isfinite().all()


def test_a_joint_window_that_ran_out_early_is_filled_again() -> None:
    """One chunk before the end only one is still on the way; a longer video lets others in behind it."""
    with torch.no_grad():
        snapshots = [chunk.snapshot() for chunk in start(JOINT, 12)]
        assert [len(snapshot.steps_ahead) for snapshot in snapshots] == [2, 2, 2, 2, 1, 0]
        chunks = [(chunk, chunk.snapshot()) for chunk in start(JOINT, 20, start=snapshots[4])]
        assert [chunk.index for chunk, _ in chunks] == [5, 6, 7, 8, 9]
        rest = video(JOINT, 20, start=chunks[1][1])
    assert torch.equal(rest, torch.cat([chunk.latents_BTCHW for chunk, _ in chunks[2:]], 1))


@pytest.mark.parametrize("name", ALL)
def test_guidance_with_the_same_prompt_twice_changes_nothing(name: str) -> None:
    same = random_text(dtype=torch.float32)
    twice = video(ALL[name], 14, negative=same, guidance=4.0)
    torch.testing.assert_close(twice, video(ALL[name], 14), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_a_given_prefix_is_seen(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randn(1, 8, *FRAME, generator=generator) for _ in range(2)]
    videos = [video(ALL[name], 14, start=prefix) for prefix in prefixes]
    assert torch.equal(videos[0][:, :8], prefixes[0])
    assert not torch.equal(videos[0][:, 8:], videos[1][:, 8:])


@pytest.mark.parametrize("name", ALL)
def test_steps_are_counted_as_passes_are_taken(name: str) -> None:
    model, steps = Counted(), []
    video(ALL[name], 12, model=model, on_step=lambda chunk, step: steps.append((chunk, step)))
    # of the window of KREA each step CONTEXT writes four frames, in two passes
    parts = sum(end - first == 2 and timesteps == [0.0, 0.0] for first, end, timesteps, _ in model.calls)
    written = sum(step == CONTEXT for _, step in steps)
    assert written == 5
    assert parts == {"krea": 9}.get(name, 5)
    assert len(model.calls) - parts == len(steps) - written


@pytest.mark.parametrize("name", ALL)
def test_training_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"policy {name} .* which training does not follow"):
        next(start(ALL[name], 12, backprop=BackpropSpec(exit_steps=(2,) * 6)))


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", ALL)
def test_a_history_word_is_followed_or_refused(name: str, history: str) -> None:
    policy = POLICIES[name]
    if history in policy.histories:
        assert policy.with_history(history).history == history
        return
    with pytest.raises(ValueError, match=f"policy {name} cannot {history}: it .*; use {policy.histories[0]}"):
        policy.with_history(history)


@pytest.mark.parametrize("name", ALL)
def test_a_state_of_another_policy_is_refused(name: str) -> None:
    with torch.no_grad():
        own = next(start(ALL[name], 12)).snapshot()
        with pytest.raises(ValueError, match="under another policy than self-forcing"):
            next(start(replace(ALL[name], policy="self-forcing"), 12, start=own))
        if POLICIES[name].recomputes:
            foreign = next(start(replace(ALL[name], policy="self-forcing"), 12)).snapshot()
            with pytest.raises(ValueError, match=f"clean frames that policy {name} computes"):
                next(start(ALL[name], 12, start=foreign))


@pytest.mark.parametrize("name", ALL)
def test_frame_numbers_do_not_matter(name: str) -> None:
    """A stream a million frames on computes what it did at its beginning, to rounding."""
    causal, embeds = ALL[name], random_text(dtype=torch.float32).prompt_embeds_BPE
    flows = []
    for first in (0, 10**6):
        generator = torch.Generator().manual_seed(0)
        cache = MODEL.new_cache(
            batch=1,
            latent_height=FRAME[1],
            latent_width=FRAME[2],
            capacity=causal.cache_frames(10**9),
            sink=causal.sink,
            like=embeds,
        )
        cache.follow(cache_policy(causal.policy), (FRAME[1] // 2, FRAME[2] // 2))
        cache.restart(first + cache.head, sink_start=first)
        if POLICIES[name].recomputes:
            cache.begin_again(first)
        for index in range(2 if POLICIES[name].recomputes else 7):
            x = torch.randn(1, 2, *FRAME, generator=generator)
            MODEL(x, torch.zeros(1, 2), embeds, cache=cache, start_frame=first + 2 * index)
        x, place = torch.randn(1, 2, *FRAME, generator=generator), cache.end_frame
        writes = not POLICIES[name].is_joint
        flows.append(MODEL(x, torch.ones(1, 2), embeds, cache=cache, start_frame=place, writes=writes))
    torch.testing.assert_close(flows[0], flows[1], atol=1e-6, rtol=0)


# ------------------------------------------------------------------ joint windows --
def test_a_chunk_takes_each_step_once_and_is_written_once() -> None:
    model = Counted()
    video(JOINT, 14, model=model)
    by_frame: dict[int, list[float]] = {}
    for first, end, timesteps, _ in model.calls:
        for frame, timestep in zip(range(first, end), timesteps):
            by_frame.setdefault(frame, []).append(timestep)
    listed = list(FlowSchedule(STEPS).timesteps)
    for frame, timesteps in by_frame.items():
        assert timesteps == pytest.approx([*listed, 0.0] if frame < 12 else listed), frame
    assert max(end - first for first, end, *_ in model.calls) == 6


def test_a_joint_window_of_one_step_is_the_baseline() -> None:
    one = StepConfig((1000.0,))
    assert torch.equal(video(replace(JOINT, window=-1), 8, steps=one), video(CausalConfig(2), 8, steps=one))


def test_what_a_joint_pass_sees() -> None:
    """Sink and last frames right before it, and nothing but the chunks before where its oldest chunk is written."""
    cache = KVCache(CONFIG, batch=1, tokens_per_frame=1, capacity=12, sink=2, dtype=torch.float64)
    cache.follow(cache_policy(JOINT.policy), (1, 1))
    for start_frame in range(0, 16, 2):
        cache.stage(start_frame, 6, writes=False)
        past = [(-1.0, start_frame - 1), (-2.0, start_frame - 2)] if start_frame > 2 else []
        sink = [(-4.0, 0), (-3.0, 1)] if start_frame > 2 else [(-2.0, 0), (-1.0, 1)][: 2 * (start_frame > 0)]
        assert seen_by(cache, 6) == {*sink, *past, *((float(own), start_frame + own) for own in range(6))}
        cache.stage(start_frame, 2)
        visible = range(max(0, start_frame - 8), start_frame + 2)
        assert seen_by(cache, 2) == {(float(frame - start_frame), frame) for frame in visible}


def test_a_joint_window_makes_no_chunk_once_more() -> None:
    with torch.no_grad():
        chunks = start(JOINT, 12)
        next(chunks)
        with pytest.raises(ValueError, match="makes none of them once more"):
            chunks.send(True)


def test_a_prompt_holds_from_the_pass_in_which_its_chunk_comes_in() -> None:
    model, other = Counted(), random_text(seed=1, dtype=torch.float32)
    asked = []

    def prompt_at(start_frame: int) -> PromptChange | None:
        asked.append(start_frame)
        return PromptChange(other) if start_frame == 8 else None

    video(JOINT, 14, model=model, prompt_at=prompt_at)
    assert asked == list(range(0, 14, 2))
    changed = [(first, end) for first, end, _, embeds in model.calls if embeds is other.prompt_embeds_BPE]
    assert changed[0] == (4, 10)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"steps": replace(STEPS, solver="unipc")}, "by solver renoise or euler, not unipc"),
        ({"steps": replace(STEPS, first_chunk_steps=(1000.0,))}, "cannot have 1 of its own"),
        ({"causal": replace(JOINT, window=7)}, "window 7 has no room for 6 frames and the sink; use window -1 or 8"),
        ({"model": Experts(MODEL, MODEL, 0.9)}, "of two networks"),
    ],
)
def test_a_joint_window_refuses_what_it_does_not_go_with(more: dict[str, Any], words: str) -> None:
    options = {"causal": JOINT, **more}
    with pytest.raises(ValueError, match=f"policy rolling-forcing denoises 3 chunks together, .*{words}"):
        next(start(options.pop("causal"), 14, **options))


def test_other_steps_than_those_of_a_state_are_refused() -> None:
    with torch.no_grad():
        snapshot = next(start(JOINT, 12)).snapshot()
        with pytest.raises(ValueError, match="takes step 3 next, and this rollout has 2"):
            next(start(JOINT, 12, start=snapshot, steps=StepConfig((1000.0, 500.0))))
        with pytest.raises(ValueError, match="holds 4 frames of 2 chunks that were begun, for which this video has 2"):
            next(start(JOINT, 4, start=snapshot))


# ----------------------------------------------------------- windows computed again --
def test_a_chunk_made_once_more_is_what_it_would_have_been() -> None:
    change = PromptChange(random_text(seed=1, dtype=torch.float32))

    def prompt_at(start_frame: int) -> PromptChange | None:
        return change if start_frame == 8 else None

    for causal in (KREA, BIASED):
        once, twice = video(causal, 14, prompt_at=prompt_at), []
        with torch.no_grad():
            chunks = start(causal, 14, prompt_at=prompt_at)
            for chunk in chunks:
                twice.append(chunks.send(True).latents_BTCHW if chunk.index in (0, 4, 5) else chunk.latents_BTCHW)
        assert torch.equal(torch.cat(twice, 1), once)


def test_a_chunk_depends_on_its_window_and_the_first_frame_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    prefix, other = (torch.randn(1, 8, *FRAME, generator=generator) for _ in range(2))
    other = torch.cat([prefix[:, :1], other[:, 1:5], prefix[:, 5:]], 1)
    assert not torch.equal(prefix, other)
    assert torch.equal(*(video(KREA, 10, start=each)[:, 8:] for each in (prefix, other)))


def test_the_window_begins_with_a_picture_encoded_again(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def encode_first(frame: int) -> Tensor:
        asked.append(frame)
        return torch.full((1, 1, *FRAME), float(frame))

    with torch.no_grad(), caplog.at_level(logging.WARNING):
        with_pictures = torch.cat(
            [
                chunk.latents_BTCHW
                for chunk in rollout(
                    Guided(MODEL, random_text(dtype=torch.float32), encode_first=encode_first),
                    noise=SeededNoise(4),
                    latent_shape=(12, *FRAME),
                    causal=KREA,
                    steps=STEPS,
                )
            ],
            1,
        )
        assert asked == [2, 4, 6]
        assert not caplog.records
        assert not torch.equal(video(KREA, 12), with_pictures)
        assert "policy krea begins its window with the video's first frame" in caplog.text
    assert torch.equal(video(KREA, 12), video(replace(KREA, policy="krea,keeps_first=yes"), 12))


@pytest.mark.parametrize("shown", [0, 2])
def test_a_decoder_encodes_the_last_picture_of_a_frame(shown: int) -> None:
    """In a stream of one latent frame, then chunks of two, two frames back; `shown` were decoded before the first."""

    class Numbered:
        """Decodes to pictures that hold their own number: latent frame 3 is pictures 9 to 12."""

        def __init__(self) -> None:
            self.count = 0

        def decode(self, latents_BTCHW: Tensor) -> Tensor:
            first, self.count = self.count, self.count + latents_BTCHW.shape[1]
            numbers = range(max(0, 4 * first - 3), 4 * self.count - 3)
            return torch.tensor(numbers, dtype=torch.float32)[None, :, None, None, None]

    pictures = FirstPictures(Numbered(), lambda frames: -frames, back=2, first_frame=shown)
    for end in (1, 3, 5, 7):
        pictures.decode(torch.zeros(1, 1 if end == 1 else 2, *FRAME))
        if end > 1:
            assert pictures.encode_first(end - 2 - shown).item() == -4 * (end - 2)


def test_without_a_bias_the_biased_policy_is_the_other() -> None:
    plain = replace(BIASED, policy="krea")
    assert torch.equal(video(replace(BIASED, policy="krea-bias,bias=1"), 12), video(plain, 12))
    assert not torch.equal(video(BIASED, 12), video(plain, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("writes", [True, False])
def test_a_bias_is_a_factor_on_the_weights_of_the_past_but_its_first_frame(writes: bool, dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, batch=1, tokens_per_frame=2, capacity=5, dtype=dtype, by_segments=True)
    cache.follow(cache_policy(BIASED.policy), (1, 2))
    cache.stage(0, 3)
    cache.bias = 0.3
    cache.stage(3, 2, writes=writes)
    mask = cache.mask(torch.zeros(1))
    assert mask is not None
    factors = torch.tensor([[1.0, 1.0, 0.3, 0.3, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(mask.exp(), factors)
    cache.begin_again(3)
    assert cache.mask(torch.zeros(1)) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("krea-bias,bias=0", "bias 0.0 is no finite factor above 0"),
        ("krea,published=1", "published=1 cannot be read .use yes or no"),
        ("infinite,bias=0.5", "policy infinite has no setting 'bias=0.5'"),
    ],
)
def test_what_no_policy_is_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cache_policy(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "krea", "window": 6, "sink": 1},
        {"policy": "krea", "window": 3},
        {"policy": "krea", "cache_source": "last_step"},
        {"policy": "rolling-forcing", "cache_source": "last_step"},
    ],
)
def test_a_policy_refuses_sizes_for_which_it_was_not_made(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"policy {settings['policy']} "):
        CausalConfig(**settings)


TABLES = FOLDER / "policy_tables_b.json"


@pytest.mark.skipif(not TABLES.is_file(), reason="the recorded tables are not in the folder of fixtures")
@pytest.mark.parametrize("preset", ["rolling_forcing", "krea"])
def test_frames_at_published_sizes_lie_where_they_were_recorded(preset: str) -> None:
    """Without weights: a ring of one token a frame is staged through every pass of the table."""
    table = json.loads(TABLES.read_text(encoding="utf-8"))[preset]
    sizes, compared = table["pipeline"], 0
    policy = cache_policy("krea" if preset == "krea" else "rolling-forcing")
    sink = sizes.get("sink", 0)
    cache = KVCache(CONFIG, batch=1, tokens_per_frame=1, capacity=sizes["window"] + sink, sink=sink)
    cache.follow(policy, (1, 1))
    # what is written of chunks that are not finished has no reader, and is left out
    latest = {row["frames"][0]: index for index, row in enumerate(table["rows"]) if row["kind"] == "context"}
    for index, row in enumerate(table["rows"]):
        first, count = row["frames"][0], len(row["frames"])
        if row["kind"] == "context" and latest[first] != index:
            continue
        if row["kind"] == "recompute":
            cache.begin_again(first)
        cache.stage(first, count, writes=row["kind"] != "joint")
        recorded = {(pos - row["query_pos"][0], frame) for pos, frame in zip(row["key_pos"], row["key_frame"])}
        assert seen_by(cache, count) == recorded, row
        compared += 1
    assert compared > 12
