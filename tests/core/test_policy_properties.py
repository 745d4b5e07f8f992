"""Properties that hold for a cache policy at any window, sink and chunk, without weights that were trained for it.

They are numbered as in the survey of the family that the policies were written from; number 10 is of a policy (Deep
Forcing) that is not here. A policy that is not here yet skips its own.

Letters: B batch, T latent frames, C latent channels, H W latent size, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.memory import AVERAGE
from selfforcing_core.noise import SeededNoise
from selfforcing_core.policy import POLICIES, RECACHE, RECODE, SELF_FORCING, cache_policy
from selfforcing_core.rollout import rollout
from selfforcing_core.schedule import FlowSchedule
from tests.support.tiny_wan import CONFIG, FRAME, random_text, random_wan

SMALL = replace(CONFIG, num_layers=2)
MODEL, TEXT = random_wan(config=SMALL), random_text()  # in float64
STEPS = StepConfig((1000.0, 500.0))
# What a policy of one ring may say that shows nothing before the first eviction.
RING_ALONE = {"name", "is_rebased", "history", "kept", "cut_at", "sink_average", "means", "replays"}
OF_ONE_RING = [
    name
    for name, policy in POLICIES.items()
    if all(
        getattr(policy, each.name) == getattr(SELF_FORCING, each.name)
        for each in fields(policy)
        if each.name not in RING_ALONE
    )
]
sizes = {"chunk": st.integers(1, 3), "sink": st.integers(0, 3), "room": st.integers(0, 4)}


def run(
    causal: CausalConfig, frames: int, *, steps: StepConfig = STEPS, seed: int = 4, **options: Any
) -> tuple[Tensor, KVCache]:
    """Return a video [B, T, C, H, W] and the cache that it was made with."""
    (cache,) = new_caches(MODEL, TEXT, 1, (frames, *FRAME), causal)
    with torch.no_grad():
        chunks = rollout(
            Guided(MODEL, TEXT, caches=[cache]),
            noise=SeededNoise(seed),
            latent_shape=(frames, *FRAME),
            causal=causal,
            steps=steps,
            commit_last=True,
            **options,
        )
        return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1), cache


def ring(causal: CausalConfig) -> KVCache:
    """Return an empty cache of one token a frame, to be staged without a network."""
    cache = KVCache(SMALL, batch=1, tokens_per_frame=1, capacity=causal.window, sink=causal.sink, dtype=torch.float64)
    cache.follow(cache_policy(causal.policy), (1, 1))
    return cache


def accepted(*values: Any, **named: Any) -> CausalConfig:
    """Return settings, or leave the example out where the policy was not made for them."""
    try:
        return CausalConfig(*values, **named)
    except ValueError:
        assume(False)
        raise


def places(cache: KVCache) -> list[tuple[int, float]]:
    """Return frame and place of every visible slot, by place."""
    slots = range(len(cache.frames()))
    return sorted(((cache.slot_frames[slot], cache.slot_positions[slot]) for slot in slots), key=lambda slot: slot[1])


# ----------------------------------------------------------- one ring (1 to 4) --
@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(OF_ONE_RING), **sizes)
def test_1_a_window_as_long_as_the_video_is_the_baseline(name: str, chunk: int, sink: int, room: int) -> None:
    frames = 4 * chunk
    window = frames + room * chunk if POLICIES[name].replays else frames + room
    causal = accepted(chunk, window, min(sink, frames - chunk), policy=name)
    assert torch.equal(run(causal, frames)[0], run(CausalConfig(chunk), frames)[0])


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from([name for name in OF_ONE_RING if POLICIES[name].is_rebased]), **sizes)
def test_2_a_million_frames_on_a_rebased_policy_computes_the_same(name: str, chunk: int, sink: int, room: int) -> None:
    causal = accepted(chunk, sink + chunk + room + POLICIES[name].num_means, sink, policy=name)
    flows = []
    for first in (0, 10**6):
        (cache,) = new_caches(MODEL, TEXT, 1, (10 * causal.window, *FRAME), causal)
        cache.restart(first + cache.head, sink_start=first)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for index in range(causal.window // chunk + 3):
                x_BTCHW = torch.randn(1, chunk, *FRAME, generator=generator, dtype=torch.float64)
                flow = MODEL(
                    x_BTCHW,
                    torch.zeros(1, chunk),
                    TEXT.prompt_embeds_BPE[:1],
                    cache=cache,
                    start_frame=first + index * chunk,
                )
        flows.append(flow)
    torch.testing.assert_close(flows[0], flows[1], atol=1e-6, rtol=0)


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(OF_ONE_RING), **sizes)
def test_3_until_a_frame_leaves_every_policy_is_the_baseline(name: str, chunk: int, sink: int, room: int) -> None:
    window = sink + chunk * (1 + room) + POLICIES[name].num_means
    window -= window % chunk if POLICIES[name].replays else 0
    causal = accepted(chunk, window, sink, policy=name)
    assume(causal.sink == 0 or causal.sink % chunk == 0)  # else the ring has fewer whole chunks than the window
    whole = (window - POLICIES[name].num_means) // chunk * chunk
    frames = whole + 2 * chunk
    assert torch.equal(run(causal, frames)[0][:, :whole], run(CausalConfig(chunk), frames)[0][:, :whole])


@settings(max_examples=40, deadline=None)
@given(chunks=st.integers(1, 20), **sizes)
def test_4_a_chunk_sees_the_sink_and_the_last_frames(chunks: int, chunk: int, sink: int, room: int) -> None:
    """Absolute: where they were; rebased: the sink right before the others."""
    for name in ("self-forcing", "infinite"):
        causal = CausalConfig(chunk, sink + chunk + room, sink, policy=name)
        cache = ring(causal)
        for index in range(chunks):
            cache.stage(index * chunk, chunk)
        end = chunks * chunk
        start = max(sink, end - (causal.window - sink))
        state = [*range(min(sink, end)), *range(start, end)]
        assert [frame for frame, _ in places(cache)] == state
        shift = start - sink if name == "infinite" and end > sink else 0
        assert [place for _, place in places(cache)] == [frame + shift * (frame < sink) for frame in state]


@settings(max_examples=30, deadline=None)
@given(chunk=st.integers(1, 4), periods=st.integers(2, 5), chunks=st.integers(1, 30))
def test_4_a_replayed_window_walks_to_and_fro(chunk: int, periods: int, chunks: int) -> None:
    """Rolling Sink: older places show the first window less a chunk, there and back; the last two chunks themselves."""
    causal = CausalConfig(chunk, chunk * (periods + 1), policy="rolling-sink")
    cache, period = ring(causal), chunk * periods
    for index in range(chunks):
        cache.stage(index * chunk, chunk)
    end = chunks * chunk
    for frame, place in places(cache):
        place = int(place)
        lap, left = divmod(place - place % chunk, period)
        inside = left + place % chunk
        is_replayed = period <= place < end - 2 * chunk
        assert frame == (place if not is_replayed else inside if lap % 2 == 0 else period - 1 - inside)


@settings(max_examples=15, deadline=None)
@given(chunks=st.integers(1, 14), **sizes)
def test_4_averages_stand_between_the_sink_and_the_window(chunks: int, chunk: int, sink: int, room: int) -> None:
    """MemRoPE: two places of the window are theirs once a frame has left it."""
    causal = CausalConfig(chunk, sink + 2 + chunk + room, sink, policy="memrope")
    cache, end = ring(causal), chunks * chunk
    for index in range(chunks):
        cache.stage(index * chunk, chunk)
        for layer in range(SMALL.num_layers):
            cache.write(layer, *[torch.ones(1, chunk, SMALL.num_heads, SMALL.head_dim, dtype=torch.float64)] * 2)
    if end <= causal.window - 2:
        assert [frame for frame, _ in places(cache)] == [*range(end)]
        return
    num_recent = causal.window - sink - 2
    recent = [*range(end - num_recent, end)]
    state = places(cache)
    assert [frame for frame, _ in state][-num_recent:] == recent
    if cache.memory is not None and cache.memory.tensors and end > causal.window:
        assert [frame for frame, _ in state] == [*range(sink), AVERAGE, AVERAGE, *recent]
        assert [place for _, place in state] == [*range(end - causal.window, end)]


@settings(max_examples=15, deadline=None)
@given(chunks=st.integers(2, 14), bank=st.integers(1, 4), every=st.integers(1, 4), **sizes)
def test_4_a_bank_lies_beside_sink_and_window(
    chunks: int, bank: int, every: int, chunk: int, sink: int, room: int
) -> None:
    """MemFlow: the first frame of every so many chunks, up to the bank's size; the window is a plain one."""
    window = sink + chunk + room
    policy = cache_policy(f"memflow,bank={bank},record_every={every}")
    cache = KVCache(SMALL, batch=1, tokens_per_frame=1, capacity=window + bank, sink=sink, dtype=torch.float64)
    cache.follow(policy, (1, 1))
    shape = (1, chunk, SMALL.num_heads, SMALL.head_dim)
    for index in range(chunks):
        cache.stage(index * chunk, chunk)
        for layer in range(SMALL.num_layers):
            cache.write(layer, *[torch.full(shape, float(index), dtype=torch.float64)] * 2)
            assert cache.memory is not None
            cache.memory.read_text(layer, torch.ones(1, 1, SMALL.num_heads, SMALL.head_dim))
    end = chunks * chunk
    start = max(sink, end - (window - sink))
    assert [frame for frame, _ in places(cache)] == [*range(min(sink, end)), *range(start, end)]
    entered = [*range(0, chunks - 1, every)]  # the latest chunk is not final
    first, bank_end = cache._bank()
    assert bank_end - first == min(bank, len(entered))
    # keys of a later chunk answer more to this text, so that the latest stay
    assert cache.v[0, 0, first:bank_end, 0, 0].tolist() == entered[-bank:]


@settings(max_examples=15, deadline=None)
@given(chunks=st.integers(1, 14), cut=st.integers(1, 14), chunk=st.integers(1, 3), room=st.integers(0, 4))
def test_4_a_shots_first_frames_stay_beside_the_sink(chunks: int, cut: int, chunk: int, room: int) -> None:
    """LongLive 2: as many as the sink has, from the chunk behind the cut until the next one; all farther on."""
    sink = chunk
    causal = CausalConfig(chunk, 2 * sink + chunk + room, sink, policy="longlive2")
    cache = ring(causal)
    for index in range(chunks):
        if index == cut:
            cache.begin_shot(index * chunk)
        cache.stage(index * chunk, chunk)
    end = chunks * chunk
    pinned = [*range(cut * chunk, cut * chunk + sink)] if cut < chunks - 1 else []
    shown = {*range(min(sink, end)), *pinned}
    for frame in range(end - 1, -1, -1):  # the others are the latest
        shown |= {frame} if len(shown) < causal.window else set()
    state = places(cache)
    assert {frame for frame, _ in state} == shown
    assert all(place == frame + 8 * (frame >= cut * chunk) for frame, place in state)


@settings(max_examples=6, deadline=None)
@given(chunk=st.integers(1, 2), count=st.integers(1, 3), sink=st.integers(0, 2), room=st.integers(0, 2))
def test_4_a_joint_pass_sees_the_sink_right_before_the_last_frames(
    chunk: int, count: int, sink: int, room: int
) -> None:
    """Rolling Forcing: sink and last frames, as many as the window has beside the frames of the pass itself."""
    steps = StepConfig(tuple(1000.0 - 100 * step for step in range(count)))
    causal = CausalConfig(chunk, count * chunk + sink + room, sink, policy="rolling-forcing")
    for frames, slots in joint_passes(causal, steps, chunks=count + 5):
        start, before = frames.start, causal.window - sink - len(frames)
        first = max(sink, start - before)
        head = [*range(min(sink, start))]
        assert [frame for frame, _ in slots] == [*head, *range(first, start)]
        moved = first - sink if start > sink else 0
        assert [place for _, place in slots] == [*(frame + moved for frame in head), *range(first, start)]


def joint_passes(
    causal: CausalConfig, steps: StepConfig, *, chunks: int
) -> list[tuple[range, list[tuple[int, float]]]]:
    """Return the frames of each joint pass of a video, and frame and place of what it sees besides them."""
    (cache,) = new_caches(MODEL, TEXT, 1, (chunks * causal.chunk, *FRAME), causal)
    passes, stage = [], cache.stage

    def watched(start_frame: int, num_frames: int, *, writes: bool = True) -> None:
        stage(start_frame, num_frames, writes=writes)
        if writes:
            return
        tokens = cache.tokens_per_frame
        hidden = {slot for _, at, length in cache._hidden for slot in range(at // tokens, (at + length) // tokens)}
        slots = [slot for slot in range(cache._num_visible() // tokens) if slot not in hidden]
        log = sorted(((cache.slot_frames[slot], cache.slot_positions[slot]) for slot in slots), key=lambda s: s[1])
        passes.append((range(start_frame, start_frame + num_frames), log))

    cache.stage = watched  # type: ignore[method-assign]
    with torch.no_grad():
        shape = (chunks * causal.chunk, *FRAME)
        guided = Guided(MODEL, TEXT, caches=[cache])
        for _ in rollout(guided, noise=SeededNoise(4), latent_shape=shape, causal=causal, steps=steps):
            pass
    return passes


@settings(max_examples=5, deadline=None)
@given(chunk=st.integers(1, 3), periods=st.integers(2, 3), chunks=st.integers(2, 6))
def test_4_a_window_computed_again_is_the_last_frames(chunk: int, periods: int, chunks: int) -> None:
    """Krea: as many as the window has beside the chunk, and no sink."""
    causal = CausalConfig(chunk, chunk * periods, policy="krea")
    _, cache = run(causal, (chunks + 1) * chunk)
    end = (chunks + 1) * chunk
    start = max(0, end - causal.window)
    assert places(cache) == [(frame, float(frame)) for frame in range(start, end)]


# ------------------------------------------------- what is kept (5 to 7) --------
@settings(max_examples=20, deadline=None)
@given(share=st.floats(0, 1), chunk=st.integers(1, 3), windows=st.integers(2, 4), evictions=st.integers(0, 9))
def test_5_an_average_of_equal_frames_is_the_geometric_one(
    share: float, chunk: int, windows: int, evictions: int
) -> None:
    causal = CausalConfig(chunk, chunk * windows, chunk, policy=f"reward,sink_average={share}")
    cache = ring(causal)
    shape = (1, chunk, SMALL.num_heads, SMALL.head_dim)
    for index in range(windows + evictions):
        cache.stage(index * chunk, chunk)
        for layer in range(SMALL.num_layers):
            cache.write(layer, torch.ones(shape), torch.full(shape, 1.0 if index else 5.0, dtype=torch.float64))
    value = share**evictions * 5 + (1 - share**evictions)
    torch.testing.assert_close(cache.v[:, :, :chunk], torch.full_like(cache.v[:, :, :chunk], value))


@settings(max_examples=40, deadline=None)
@given(kept=st.integers(0, 4), cut_at=st.integers(20, 90), chunks=st.integers(3, 12), is_cut=st.booleans(), **sizes)
def test_6_a_flush_keeps_sink_and_last_frames_and_a_cut_stands_far_behind(
    kept: int, cut_at: int, chunks: int, is_cut: bool, chunk: int, sink: int, room: int
) -> None:
    causal = CausalConfig(chunk, sink + 2 * chunk + kept + room, sink, policy=f"infinity-rope,kept={kept}")
    assume(chunks * chunk >= sink + kept)
    cache, end = ring(causal), chunks * chunk
    for index in range(chunks):
        cache.stage(index * chunk, chunk)
    cache.forget_window(end, kept)
    if is_cut:
        cache.jump_to(cut_at)
    cache.stage(end, chunk)
    stay = [*range(sink), *range(end - kept, end)]
    assert [frame for frame, _ in places(cache)] == [*stay, *range(end, end + chunk)]
    first = places(cache)[0][1]
    near = [place - first for _, place in places(cache)]
    begin = cut_at if is_cut and stay else len(stay)
    assert near == [*range(len(stay)), *(begin + step for step in range(chunk))]


@settings(max_examples=6, deadline=None)
@given(chunk=st.integers(1, 3), before=st.integers(2, 4))
def test_7_writing_again_under_the_same_prompt_changes_nothing(chunk: int, before: int) -> None:
    """Chunk by chunk; in one pass, where all frames see each other, it does."""
    frames = (before + 1) * chunk

    def at(history: str) -> Tensor:
        change = {before * chunk: PromptChange(TEXT, history)}
        return run(CausalConfig(chunk), frames, prompt_at=change.get)[0]

    plain = run(CausalConfig(chunk), frames)[0]
    assert torch.equal(at(RECODE), plain)
    assert not torch.allclose(at(RECACHE), plain, atol=1e-6)


# -------------------------------------------- policies of their own (8 to 12) --
def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in POLICIES, reason=f"policy {name} is not here")


@needs("krea")
@settings(max_examples=4, deadline=None)
@given(chunk=st.integers(1, 2), chunks=st.integers(4, 6), seed=st.integers(1, 9))
def test_8_a_window_computed_again_depends_on_its_own_frames_alone(chunk: int, chunks: int, seed: int) -> None:
    """And on the video's first one, where that is kept."""
    causal = CausalConfig(chunk, 3 * chunk, policy="krea")
    given_frames = chunks * chunk
    one_BTCHW = torch.randn(1, given_frames, *FRAME, generator=torch.Generator().manual_seed(seed))
    other_BTCHW = one_BTCHW.clone()
    other_BTCHW[:, 1 : given_frames - 2 * chunk] += 1.0
    videos = [run(causal, given_frames + 2 * chunk, start=start)[0] for start in (one_BTCHW, other_BTCHW)]
    assert torch.equal(videos[0][:, given_frames:], videos[1][:, given_frames:])


@needs("rolling-forcing")
@settings(max_examples=4, deadline=None)
@given(chunk=st.integers(1, 3), chunks=st.integers(2, 5))
def test_9_one_chunk_at_a_time_is_the_baseline_with_one_step(chunk: int, chunks: int) -> None:
    steps, causal = StepConfig((1000.0,)), CausalConfig(chunk, -1, policy="rolling-forcing")
    expected = run(CausalConfig(chunk), chunk * chunks, steps=steps)[0]
    torch.testing.assert_close(run(causal, chunk * chunks, steps=steps)[0], expected, atol=1e-6, rtol=0)


@needs("rolling-forcing")
@settings(max_examples=5, deadline=None)
@given(chunk=st.integers(1, 2), count=st.integers(1, 4), sink=st.integers(0, 2), room=st.integers(0, 2))
def test_9_every_chunk_takes_the_steps_of_the_list(chunk: int, count: int, sink: int, room: int) -> None:
    """Once each and in their order, whatever is denoised beside it."""
    steps = StepConfig(tuple(1000.0 - 100 * step for step in range(count)))
    causal = CausalConfig(chunk, count * chunk + sink + room, sink, policy="rolling-forcing")
    timesteps_of_frame: dict[int, list[float]] = {}
    (cache,) = new_caches(MODEL, TEXT, 1, ((count + 3) * chunk, *FRAME), causal)
    network = Watched(timesteps_of_frame)
    with torch.no_grad():
        shape = ((count + 3) * chunk, *FRAME)
        guided = Guided(network, TEXT, caches=[cache])
        for _ in rollout(guided, noise=SeededNoise(4), latent_shape=shape, causal=causal, steps=steps):
            pass
    schedule = FlowSchedule(steps).timesteps
    assert timesteps_of_frame == {frame: pytest.approx(list(schedule)) for frame in range(shape[0])}


class Watched:
    """The network, with the timesteps of every frame's passes noted but for those that write a clean chunk."""

    def __init__(self, timesteps_of_frame: dict[int, list[float]]) -> None:
        self.timesteps_of_frame = timesteps_of_frame

    def __call__(
        self, x_BTCHW: Tensor, timesteps_BT: Tensor, *rest: Any, start_frame: int = 0, **options: Any
    ) -> Tensor:
        for frame, timestep in enumerate(timesteps_BT[0].tolist(), start_frame):
            if timestep > 0:
                self.timesteps_of_frame.setdefault(frame, []).append(timestep)
        return MODEL(x_BTCHW, timesteps_BT, *rest, start_frame=start_frame, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(MODEL, name)


@needs("krea-bias")
@settings(max_examples=4, deadline=None)
@given(chunk=st.integers(1, 3), chunks=st.integers(2, 6))
def test_11_a_bias_of_one_is_none(chunk: int, chunks: int) -> None:
    one, none = (CausalConfig(chunk, 3 * chunk, policy=policy) for policy in ("krea-bias,bias=1", "krea"))
    assert torch.equal(run(one, chunk * chunks)[0], run(none, chunk * chunks)[0])


@needs("memflow")
@settings(max_examples=4, deadline=None)
@given(chunks=st.integers(3, 7), **sizes)
def test_12_a_bank_without_frames_is_longlive(chunks: int, chunk: int, sink: int, room: int) -> None:
    """At a change of the prompt too."""
    change = {2 * chunk: PromptChange(random_text(seed=1))}
    videos = [
        run(accepted(chunk, sink + chunk + room, sink, policy=policy), chunks * chunk, prompt_at=change.get)[0]
        for policy in ("memflow,bank=0", "longlive")
    ]
    assert torch.equal(*videos)
