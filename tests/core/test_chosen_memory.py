"""Policies that choose which frames stay, against lists of Python that choose as the method says.

Letters: B batch, T latent frames.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfforcing_core.chosen_memory import CHOSEN
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.noise import SeededNoise
from selfforcing_core.policy import cache_policy
from selfforcing_core.rollout import BackpropSpec, rollout
from selfforcing_core.schedule import FlowSchedule
from selfforcing_core.weights.checkpoint_header import SamplingSettings
from tests.support.tiny_wan import CONFIG, FRAME, guided, random_text, random_wan

STEPS = StepConfig((1000.0, 500.0))
MODEL = random_wan(dtype=torch.float32)
MEMFLOW, SDV2, LONGLIVE2 = (
    CausalConfig(2, 6, 2, policy="memflow"),
    CausalConfig(1, 5, 2, policy="sdv2"),
    CausalConfig(2, 8, 2, policy="longlive2"),
)


def video(causal: CausalConfig, frames: int, **options: object) -> Tensor:
    text = options.pop("text", random_text(dtype=torch.float32))
    settings_of = {"noise": SeededNoise(4), "steps": STEPS, **options}
    with torch.no_grad():
        chunks = rollout(guided(MODEL, text, settings_of), latent_shape=(frames, *FRAME), causal=causal, **settings_of)  # type: ignore[arg-type]
        return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def ring(causal: CausalConfig, batch: int = 1, dtype: torch.dtype = torch.float64) -> KVCache:
    """Return an empty cache of one token a frame, to be staged without a network."""
    capacity = causal.cache_frames(10**7)
    cache = KVCache(CONFIG, batch=batch, tokens_per_frame=1, capacity=capacity, sink=causal.sink, dtype=dtype)
    cache.follow(cache_policy(causal.policy), (1, 1))
    return cache


def write(cache: KVCache, start: int, k_LBTNK: Tensor, v_LBTNK: Tensor) -> None:
    cache.stage(start, k_LBTNK.shape[2])
    for layer in range(CONFIG.num_layers):
        cache.write(layer, k_LBTNK[layer], v_LBTNK[layer])


def random_keys(generator: torch.Generator, batch: int, frames: int) -> Tensor:
    shape = (CONFIG.num_layers, batch, frames, CONFIG.num_heads, CONFIG.head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------ the bank --
@settings(max_examples=20, deadline=None)
@given(
    chunk=st.integers(1, 3),
    bank=st.integers(1, 4),
    every=st.integers(1, 4),
    sink=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_the_bank_keeps_what_answers_most_to_the_prompt(
    chunk: int, bank: int, every: int, sink: int, seed: int
) -> None:
    """Per layer and row, as a list of Python keeps it; the newest frame is always among them."""
    causal = CausalConfig(chunk, sink + 2 * chunk, sink, policy=f"memflow,bank={bank},record_every={every}")
    cache, generator = ring(causal, batch=2), torch.Generator().manual_seed(seed)
    text = random_keys(generator, 2, 3)
    written: list[Tensor] = []
    kept: dict[tuple[int, int], list[int]] = {(layer, row): [] for layer in range(CONFIG.num_layers) for row in (0, 1)}
    for index in range(14):
        if index and (index - 1) % every == 0:
            for (layer, row), frames in kept.items():
                if len(frames) == bank:
                    scores = {f: float((written[f][layer, row] * text[layer, row].mean(0)).sum()) for f in frames}
                    frames.remove(min(frames, key=lambda frame: scores[frame]))
                frames.append((index - 1) * chunk)
        k = random_keys(generator, 2, chunk)
        write(cache, index * chunk, k, k)
        written += k.unbind(2)
        for layer in range(CONFIG.num_layers):
            cache.cross_kv(layer, lambda layer=layer: ((text[layer], text[layer]),))
        first, end = cache._bank()
        assert end - first == min(bank, len(kept[0, 0]))
        for (layer, row), frames in kept.items():
            shown = cache.k[layer, row, first:end]
            assert torch.equal(shown, torch.stack([written[f][layer, row] for f in frames]) if frames else shown)


def test_a_bank_of_no_frames_is_longlive() -> None:
    change = PromptChange(random_text(seed=1, dtype=torch.float32))
    videos = [
        video(replace(MEMFLOW, policy=policy), 20, prompt_at=lambda frame: change if frame == 12 else None)
        for policy in ("memflow,bank=0", "longlive", "memflow")
    ]
    assert torch.equal(videos[0], videos[1])
    assert not torch.allclose(videos[1], videos[2])


def test_the_bank_outlives_what_is_written_again() -> None:
    """Also while nothing was evicted yet, where the sink is written again too."""
    cache = ring(MEMFLOW)
    generator = torch.Generator().manual_seed(0)
    k = random_keys(generator, 1, 4)
    write(cache, 0, k[:, :, :2], k[:, :, :2])
    write(cache, 2, k[:, :, 2:], k[:, :, 2:])
    cache.close(4)
    cache.restart(2)
    write(cache, 0, -k, -k)
    write(cache, 4, k[:, :, :2], k[:, :, :2])
    first, end = cache._bank()
    assert end - first == 1
    assert torch.equal(cache.k[:, :, first:end], k[:, :, :1]), "the frame as it was before"


# ------------------------------------------------------- the refreshed sink --
def test_a_sink_that_is_never_refreshed_is_the_plain_ring() -> None:
    plain = video(replace(SDV2, policy="self-forcing"), 14)
    assert torch.equal(video(replace(SDV2, policy="sdv2,refresh_below=-1,reset_at=0"), 14), plain)


@settings(max_examples=20, deadline=None)
@given(window=st.integers(2, 6), sink=st.integers(1, 3), passes=st.integers(1, 3), seed=st.integers(0, 99))
@pytest.mark.parametrize("reading", ["", ",published=yes"])
def test_slots_are_taken_in_the_order_of_a_queue(reading: str, window: int, sink: int, passes: int, seed: int) -> None:
    """Per layer and row, as a list of Python takes them."""
    window += sink
    causal = CausalConfig(1, window, sink, policy=f"sdv2,refresh_below=0{reading}")
    cache, generator = ring(causal, batch=2), torch.Generator().manual_seed(seed)
    places = [(layer, row) for layer in range(CONFIG.num_layers) for row in (0, 1)]
    queues = {place: list(range(sink, window)) for place in places}
    slots: dict[tuple[int, int], list[Tensor | None]] = {place: [None] * window for place in places}
    is_due = False
    for frame in range(3 * window):
        if not reading and frame > window:
            _move_on(queues, sink)
        for number in range(passes):
            if is_due:
                _move_on(queues, sink)
            x = random_keys(generator, 2, 1)
            write(cache, frame, x, x)
            for layer, row in places:
                own, state = x[layer, row, 0], slots[layer, row]
                likeness = [
                    0.0 if each is None else float(torch.cosine_similarity(each.flatten(), own.flatten(), dim=0))
                    for each in state[:sink]
                ]
                if min(likeness) < 0:
                    queues[layer, row].insert(0, likeness.index(min(likeness)))
                is_full = frame >= window or bool(reading and frame == window - 1 and number)
                state[queues[layer, row][0] if is_full else frame] = own
                shown = cache.k[layer, row]
                assert all(each is None or torch.equal(shown[slot], each) for slot, each in enumerate(state))
            is_due = bool(reading) and frame >= window and number == 0
    assert cache.slot_frames == [CHOSEN] * window


def _move_on(queues: dict[tuple[int, int], list[int]], sink: int) -> None:
    for queue in queues.values():
        slot = queue.pop(0)
        queue += [slot] if slot >= sink else []


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("reading", ["", ",published=yes"])
def test_an_attempt_that_is_made_once_more_leaves_nothing_in_its_slots(reading: str, dtype: torch.dtype) -> None:
    causal = CausalConfig(1, 5, 2, policy=f"sdv2,refresh_below=0{reading}")
    for seed in range(8):
        once, twice = ring(causal, batch=2, dtype=dtype), ring(causal, batch=2, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for frame in range(16):
            passes = [random_keys(generator, 2, 1) for _ in range(4)]
            for x in passes[:2]:
                write(twice, frame, x, x)
            twice.undo(frame)
            for cache in (once, twice):
                for x in passes[2:]:
                    write(cache, frame, x, x)
            visible = once._num_visible()
            for buffers in ((once.k, twice.k), (once.v, twice.v)):
                first, second = (buffer[:, :, :visible].to(torch.float64) for buffer in buffers)
                assert torch.equal(first, second), f"frame {frame}"


def test_positions_fall_back_and_have_no_end() -> None:
    cache = ring(replace(SDV2, policy="sdv2,reset_at=9"))
    positions = []
    for frame in range(20):
        cache.stage(frame, 1)
        positions.append(cache.position)
    assert positions == [*range(9), *range(4, 9), *range(4, 9), 4]


def test_a_pass_with_gradient_has_no_slot_to_choose() -> None:
    with pytest.raises(ValueError, match=r"policy sdv2 chooses where to write .* train with another policy"):
        video(SDV2, 8, backprop=BackpropSpec([1] * 8))


# -------------------------------------------------------------------- shots --
@settings(max_examples=40, deadline=None)
@given(
    chunk=st.integers(1, 4),
    sink=st.integers(0, 4),
    room=st.integers(0, 5),
    cuts=st.sets(st.integers(1, 15), max_size=6),
)
def test_the_first_frames_of_a_shot_stay_until_the_next(chunk: int, sink: int, room: int, cuts: set[int]) -> None:
    window = sink + min(sink, chunk) + chunk + room
    cache = ring(CausalConfig(chunk, window, sink, policy="longlive2,shot_offset=5"))
    pinned: list[int] = []
    ring_frames: list[int] = []
    stood: dict[int, int] = {}
    for index in range(16):
        start = index * chunk
        cache.close(start)
        if index in cuts:
            cache.begin_shot(start)
        cache.stage(start, chunk)
        if index - 1 in cuts:
            pinned = list(range(start - chunk, start - chunk + min(sink, chunk)))
        ring_frames += [frame for frame in range(start, start + chunk) if frame >= sink]
        while len(ring_frames) > window - sink:
            ring_frames.remove(next(frame for frame in ring_frames if frame not in pinned))
        stood |= {frame: frame + 5 * sum(cut <= index for cut in cuts) for frame in range(start, start + chunk)}
        assert cache.frames() == tuple(sorted([*range(min(sink, start + chunk)), *ring_frames]))
        for slot in range(len(cache.frames())):
            assert cache.slot_positions[slot] == stood[cache.slot_frames[slot]]
        assert cache.position == stood[start]


def test_a_shot_is_one_also_if_its_first_chunk_is_made_once_more_without() -> None:
    """A cut that is taken back leaves nothing of it."""
    change = random_text(seed=1, dtype=torch.float32)
    answers = iter([PromptChange(change, "cut"), PromptChange(change, "keep")])
    options = {"noise": SeededNoise(4), "steps": STEPS, "latent_shape": (16, *FRAME), "causal": LONGLIVE2}
    with torch.no_grad():
        chunks = rollout(
            guided(MODEL, random_text(dtype=torch.float32), {}),
            prompt_at=lambda frame: next(answers) if frame == 6 else None,
            **options,  # type: ignore[arg-type]
        )
        result = [chunks.send(True) if chunk.index == 3 else chunk for chunk in chunks]
    kept = video(LONGLIVE2, 16, prompt_at=lambda frame: PromptChange(change, "keep") if frame == 6 else None)
    torch.testing.assert_close(torch.cat([chunk.latents_BTCHW for chunk in result], 1), kept)


def test_shots_change_what_is_seen() -> None:
    text = random_text(seed=1, dtype=torch.float32)

    def changed(policy: str, history: str) -> Tensor:
        change = PromptChange(text, history)
        causal = replace(LONGLIVE2, policy=policy)
        return video(causal, 20, prompt_at=lambda frame: change if frame == 6 else None)

    shots = changed("longlive2", "cut")
    assert not torch.allclose(shots, changed("longlive2", "keep"))
    assert not torch.allclose(shots, changed("longlive2,shot_offset=0", "cut")), "another place on the time axis"


# ---------------------------------------------------------------- every one --
@pytest.mark.parametrize("causal", [MEMFLOW, SDV2, LONGLIVE2], ids=lambda causal: causal.policy)
def test_rows_choose_for_themselves(causal: CausalConfig) -> None:
    texts = [random_text(seed=seed, dtype=torch.float32) for seed in (0, 1)]
    both = Conditioning(torch.cat([text.prompt_embeds_BPE for text in texts]))

    class OneNoise:
        def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
            one = SeededNoise(4).draw(start_frame, step, (1, *shape[1:]))
            return one.expand(shape)

    together = video(causal, 16, text=both, noise=OneNoise())
    for row, text in enumerate(texts):
        alone = video(causal, 16, text=text, noise=OneNoise())
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [MEMFLOW, SDV2, LONGLIVE2], ids=lambda causal: causal.policy)
def test_guidance_between_equal_prompts_changes_nothing(causal: CausalConfig) -> None:
    """Each conditioning has a cache of its own, which chooses by its own keys."""
    text = random_text(dtype=torch.float32)
    same = video(causal, 16, negative=text, guidance=4.0)
    torch.testing.assert_close(same, video(causal, 16), atol=1e-4, rtol=1e-4)
    other = video(causal, 16, negative=random_text(seed=3, dtype=torch.float32), guidance=4.0)
    assert other.isfinite().all()
    assert not torch.allclose(other, same)


def test_whole_timesteps_leave_their_noise_as_it_is() -> None:
    steps = StepConfig((999.0, 749.25, 499.5, 249.75), solver="unipc", is_whole=True)
    schedule = FlowSchedule(steps)
    assert schedule.timesteps == (999.0, 937.0, 833.0, 624.0)
    assert schedule.sigmas == FlowSchedule(replace(steps, is_whole=False)).sigmas
    assert "is_whole" not in StepConfig().to_dict()
    assert SamplingSettings(steps=steps).to_entries(None)["format"] == 3, (
        "of which earlier versions say that it is newer"
    )
    assert StepConfig.from_dict(steps.to_dict()) == steps
