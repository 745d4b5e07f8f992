"""What the rollout promises, on random tiny networks in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import chunk_lengths
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.history import PromptChange
from selfforcing_core.masks import block_causal_frames
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import CONTEXT, SeededNoise
from selfforcing_core.rollout import BackpropSpec, Chunk, rollout
from selfforcing_core.schedule import FlowSchedule, add_noise, x0_from_flow
from tests.support.golden_fixture import GivenNoise
from tests.support.host_reads import NoHostReads
from tests.support.tiny_wan import FRAME, guided, ordered, random_text, random_wan

STEPS = StepConfig((1000.0, 500.0))


def video(
    model: CausalWan, frames: int, causal: CausalConfig, *, text: Conditioning | None = None, **options: Any
) -> Tensor:
    options = {"noise": SeededNoise(0), "steps": STEPS, **options}
    text = random_text() if text is None else text
    chunks = rollout(guided(model, text, options), latent_shape=(frames, *FRAME), causal=causal, **options)
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def draws(frames: int, lengths: tuple[int, ...], num_steps: int, seed: int = 0) -> dict[tuple[int, int], Tensor]:
    """Noise of a whole rollout, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return {
        (start, step): torch.randn(1, length, *FRAME, generator=generator)
        for start, length in zip(starts, lengths)
        for step in range(num_steps)
    }


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, CausalConfig]:
    chunk, first = draw(st.integers(1, 3)), draw(st.booleans())
    sink = draw(st.integers(0, 2))
    window = draw(st.sampled_from([-1, sink + chunk, sink + chunk + 1, sink + 2 * chunk]))
    frames = int(first) + chunk * draw(st.integers(1, 4))
    return frames, CausalConfig(chunk, window, sink, first)


@settings(max_examples=25)
@given(layouts())
def test_cached_rollout_equals_uncached(layout: tuple[int, CausalConfig]) -> None:
    """One step per chunk and a clean pass, against one pass over clean and noisy frames under the block mask."""
    frames, causal = layout
    model, text = random_wan(), random_text()
    lengths = chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    noise = draws(frames, lengths, 1)
    result = video(model, frames, causal, text=text, noise=GivenNoise(noise), steps=StepConfig((1000.0,))).double()

    own = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()
    clean = block_causal_frames(lengths, window=causal.window, sink=causal.sink)
    mask = torch.cat([torch.cat([clean, torch.zeros_like(clean)], 1), torch.cat([clean & ~own, own], 1)])
    noisy = torch.cat([noise[key] for key in sorted(noise)], 1).double()
    timesteps = torch.full((1, frames), 1000.0)
    flow = model(noisy, timesteps, text.prompt_embeds_BPE, clean_BTCHW=result, mask_TT=mask)
    torch.testing.assert_close(noisy - flow, result, atol=1e-5, rtol=1e-5)  # the rollout keeps latents in float32


def test_no_gradient_reaches_a_frame_from_later_noise() -> None:
    model, lengths = random_wan().requires_grad_(True), (2, 2, 2)
    noise = {key: value.requires_grad_() for key, value in draws(6, lengths, 2).items()}
    plan = BackpropSpec([1, 1, 1])
    result = list(
        rollout(
            Guided(model, random_text()),
            noise=GivenNoise(noise),
            latent_shape=(6, *FRAME),
            causal=CausalConfig(2),
            steps=STEPS,
            backprop=plan,
        )
    )
    leaves = list(noise.values())
    for chunk in result:
        gradients = torch.autograd.grad(
            chunk.latents_BTCHW.square().sum(), leaves, retain_graph=True, allow_unused=True
        )
        for (start, _), gradient in zip(noise, gradients):
            if start > chunk.start_frame:
                assert gradient is None or not gradient.any()


def test_gradient_stays_inside_the_chunks_own_exit_step() -> None:
    model = random_wan().requires_grad_(True)
    noise = {key: value.requires_grad_() for key, value in draws(4, (2, 2), 2).items()}
    chunks = list(
        rollout(
            Guided(model, random_text()),
            noise=GivenNoise(noise),
            latent_shape=(4, *FRAME),
            causal=CausalConfig(2),
            steps=STEPS,
            backprop=BackpropSpec([0, 0]),
        )
    )
    second = torch.autograd.grad(
        chunks[1].latents_BTCHW.sum(), list(noise.values()), retain_graph=True, allow_unused=True
    )
    reached = {key for key, gradient in zip(noise, second) if gradient is not None and gradient.any()}
    assert reached == {(2, 0)}
    chunks[1].latents_BTCHW.sum().backward()
    for name in ("cross_attn.k", "cross_attn.v", "self_attn.k"):
        assert model.get_parameter(f"blocks.0.{name}.weight").grad.abs().sum() > 0
    assert model.text_embedding[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("window", [-1, 4])
def test_recomputed_activations_give_the_same_gradients(window: int) -> None:
    """With a cache that keeps all frames, and with one that evicts some before the backward pass."""
    actual = []
    for is_recomputed in (False, True):
        model = random_wan().requires_grad_(True)
        if is_recomputed:
            model.checkpoint_blocks()
        chunks = rollout(
            Guided(model, random_text()),
            noise=SeededNoise(0),
            latent_shape=(8, *FRAME),
            causal=CausalConfig(2, window),
            steps=StepConfig((1000.0, 500.0)),
            backprop=BackpropSpec([1, 1, 1, 1]),
        )
        torch.cat([chunk.latents_BTCHW for chunk in chunks], 1).square().mean().backward()
        actual.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*actual):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


def test_rollout_with_gradients_gives_the_same_video() -> None:
    model = random_wan().requires_grad_(True)
    plan = BackpropSpec([len(STEPS.steps) - 1] * 4)
    with_gradient = video(model, 8, CausalConfig(2, window=5, sink=1), backprop=plan)
    torch.testing.assert_close(with_gradient, video(model, 8, CausalConfig(2, window=5, sink=1)))


@pytest.mark.parametrize("sigma", ["exact", "table"])
def test_no_tensor_is_read_back_inside_the_loop(sigma: str) -> None:
    model, causal = random_wan(), CausalConfig(2, window=5, sink=1)
    chunks = rollout(
        Guided(model, random_text()),
        noise=SeededNoise(0),
        latent_shape=(12, *FRAME),
        causal=causal,
        steps=StepConfig((1000.0, 500.0), sigma=sigma),
    )
    first = next(chunks)
    with NoHostReads():
        rest = list(chunks)
    assert len([first, *rest]) == 6


def test_a_chunk_draws_its_noise_before_its_first_evaluation() -> None:
    """A copy to a device in between would wait for the evaluation before it."""
    rows: list[str] = []

    class Told(SeededNoise):
        def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
            rows.append("draw")
            return super().draw(start_frame, step, shape)

    video(random_wan(), 4, CausalConfig(2), noise=Told(0), on_step=lambda *_: rows.append("evaluate"))
    chunk = ["draw"] * len(STEPS.steps) + ["evaluate"] * len(STEPS.steps)
    assert rows == [*chunk, "evaluate", *chunk], "a clean pass between them"


def test_the_guard_against_host_reads_can_fail() -> None:
    with pytest.raises(AssertionError, match="reads a tensor back"), NoHostReads():
        torch.ones(1).item()


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", range(9))
def test_stopping_between_any_two_calls_leaves_everything_reusable(stop_at: int) -> None:
    model, causal = random_wan(), CausalConfig(2, window=4)
    fresh = video(model, 6, causal)
    cache = model.new_cache(
        batch=1, latent_height=FRAME[1], latent_width=FRAME[2], capacity=4, like=random_text().prompt_embeds_BPE
    )
    calls = 0

    def stop(chunk: int, step: int) -> None:
        nonlocal calls
        if calls == stop_at:
            raise Stop
        calls += 1

    try:
        video(model, 6, causal, caches=[cache], on_step=stop, noise=SeededNoise(9), text=random_text(seed=3))
    except Stop:
        pass
    else:
        assert stop_at == 8, "the callback was never asked"
    assert torch.equal(video(model, 6, causal, caches=[cache]), fresh)


def test_the_last_clean_pass_is_saved_unless_asked_for() -> None:
    log: list[tuple[int, int]] = []
    model = random_wan()
    video(model, 4, CausalConfig(2), on_step=lambda chunk, step: log.append((chunk, step)))
    assert log == [(0, 0), (0, 1), (0, CONTEXT), (1, 0), (1, 1)]
    log.clear()
    video(model, 4, CausalConfig(2), on_step=lambda chunk, step: log.append((chunk, step)), commit_last=True)
    assert log[-1] == (1, CONTEXT)


@pytest.mark.parametrize("is_snapshot_taken", [False, True])
def test_a_chunk_is_handed_out_before_the_pass_that_writes_it(is_snapshot_taken: bool) -> None:
    """With four steps after 4, 9 and 14 passes; a snapshot asks for that pass at once, which is not made twice."""
    passes: list[int] = []
    chunks = rollout(
        Guided(random_wan(), random_text()),
        noise=SeededNoise(1),
        latent_shape=(6, *FRAME),
        causal=CausalConfig(2),
        steps=StepConfig(),
        on_step=lambda chunk, step: passes.append(step),
    )
    handed_out = []
    for chunk in chunks:
        handed_out.append(len(passes))
        if is_snapshot_taken:
            chunk.snapshot()
    assert handed_out == [4, 9, 14]
    assert passes == 2 * [0, 1, 2, 3, CONTEXT] + [0, 1, 2, 3]


def test_a_chunk_that_is_made_again_is_written_once() -> None:
    passes: list[int] = []
    chunks = rollout(
        Guided(random_wan(), random_text()),
        noise=SeededNoise(1),
        latent_shape=(4, *FRAME),
        causal=CausalConfig(2),
        steps=StepConfig((1000.0, 500.0)),
        on_step=lambda chunk, step: passes.append(step),
    )
    first = next(chunks)
    assert torch.equal(chunks.send(True).latents_BTCHW, first.latents_BTCHW)
    next(chunks)
    assert passes == [0, 1, 0, 1, CONTEXT, 0, 1]


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    model = random_wan()
    both = random_text(batch=2)
    together = video(model, 4, CausalConfig(2), text=both)
    alone = Conditioning(both.prompt_embeds_BPE[1:])
    torch.testing.assert_close(together[1:], video(model, 4, CausalConfig(2), text=alone, noise=SeededNoise(0, 1)))


def test_seeded_noise_depends_on_seed_row_chunk_and_step() -> None:
    keys = [
        (seed, row, start, step) for seed in (0, 1) for row in (0, 1) for start in (0, 3) for step in (CONTEXT, 0, 1)
    ]
    drawn = [SeededNoise(seed, row).draw(start, step, (1, 2, 3)) for seed, row, start, step in keys]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(keys)
    assert torch.equal(SeededNoise(5).draw(3, 1, (2, 4, 4)), SeededNoise(5).draw(3, 1, (2, 4, 4)))
    assert torch.equal(SeededNoise(5).draw(3, 1, (2, 4, 4))[:1], SeededNoise(5).draw(3, 1, (1, 4, 4)))


@settings(max_examples=25)
@given(layouts(), st.data(), st.sampled_from([1, 2]))
def test_continuing_from_a_prefix_is_the_uninterrupted_video(
    layout: tuple[int, CausalConfig], data: st.DataObject, rows: int
) -> None:
    """Given any number of its own first chunks, a rollout goes on exactly as before, for a batch of 1 or B."""
    frames, causal = layout
    lengths = chunk_lengths(frames, causal.chunk, independent_first_frame=causal.independent_first_frame)
    given_chunks = data.draw(st.integers(0, len(lengths) - 1)) if len(lengths) > 1 else 0
    model, text = random_wan(), random_text(batch=rows)
    whole = video(model, frames, causal, text=text)
    if not given_chunks:
        return
    prefix = whole[:, : sum(lengths[:given_chunks])]
    torch.testing.assert_close(video(model, frames, causal, text=text, start=prefix), whole)
    shared = video(model, frames, causal, text=text, start=prefix[:1])
    torch.testing.assert_close(shared[:1], whole[:1])


def test_prefix_chunks_are_yielded_and_marked() -> None:
    prefix = torch.randn(1, 2, *FRAME)
    chunks: list[Chunk] = list(
        rollout(
            Guided(random_wan(), random_text()),
            noise=SeededNoise(0),
            latent_shape=(4, *FRAME),
            causal=CausalConfig(2),
            steps=STEPS,
            start=prefix,
        )
    )
    assert [chunk.is_given for chunk in chunks] == [True, False]
    assert torch.equal(chunks[0].latents_BTCHW, prefix)


@pytest.mark.parametrize(
    ("frames", "causal", "prefix", "message"),
    [
        (7, CausalConfig(3), None, "7 latent frames is not a multiple of chunk 3; use 6 or 9"),
        (9, CausalConfig(3, independent_first_frame=True), None, "use 7 or 10"),
        (6, CausalConfig(3), torch.zeros(1, 2, *FRAME), "takes a prefix of 3"),
        (6, CausalConfig(3), torch.zeros(2, 3, *FRAME), "batch of 1"),
        (6, CausalConfig(3), torch.zeros(1, 3, 4, 8, 8), "encode it at the size of the video"),
    ],
)
def test_bad_lengths_are_refused_before_any_work(
    frames: int, causal: CausalConfig, prefix: Tensor | None, message: str
) -> None:
    def never(chunk: int, step: int) -> None:
        raise AssertionError("the network was about to be called")

    with pytest.raises(ValueError, match=message):
        video(random_wan(), frames, causal, start=prefix, on_step=never)


def test_text_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="use the text encoder that the model was trained with"):
        video(random_wan(), 2, CausalConfig(2), text=Conditioning(torch.zeros(1, 3, 99)))


def test_compiled_blocks_are_compiled_once_however_long_the_video() -> None:
    """Neither the cache's fill nor its eviction compiles anything again, and all blocks share the code."""
    causal = CausalConfig(chunk=1, window=3, sink=1)
    expected = video(random_wan(), 8, causal)
    pieces: list[Any] = []

    def counted(piece: Any, inputs: list[Tensor]) -> Any:
        pieces.append(piece)
        return piece

    torch.compiler.reset()
    compiled = random_wan().compile_blocks(backend=counted)
    assert torch.equal(video(compiled, 8, causal), expected)
    assert len(pieces) == 2, "one piece before attention, one behind it"


def test_unmasked_forward_of_one_chunk_is_the_bidirectional_network() -> None:
    model, text = random_wan(), random_text()
    noisy, timesteps = torch.randn(1, 3, *FRAME, dtype=torch.float64), torch.full((1, 3), 700.0)
    cache = model.new_cache(
        batch=1, latent_height=FRAME[1], latent_width=FRAME[2], capacity=3, like=text.prompt_embeds_BPE
    )
    with torch.no_grad():
        cached = model(noisy, timesteps, text.prompt_embeds_BPE, cache=cache)
        torch.testing.assert_close(cached, model(noisy, timesteps, text.prompt_embeds_BPE))


# ------------------------------------------------------------ last step kept --
LAST = CausalConfig(2, window=4, sink=1, cache_source="last_step")


def test_last_step_keeps_what_the_last_evaluation_wrote() -> None:
    """One pass fewer per chunk; the cache holds the keys of the noisy chunk at the last timestep."""
    network, text, calls = random_wan(), random_text(), []
    (cache,) = caches = new_caches(network, text, 1, (6, *FRAME), LAST)
    chunks = rollout(
        Guided(network, text, caches=caches),
        noise=SeededNoise(0),
        latent_shape=(6, *FRAME),
        causal=LAST,
        steps=STEPS,
        on_step=lambda chunk, step: calls.append((chunk, step)),
    )
    with torch.no_grad():
        first = next(chunks)
        kept = ordered(cache, 1)[0]
        assert calls == [(0, 0), (0, 1)]
        schedule = FlowSchedule(STEPS)
        (again,) = new_caches(network, text, 1, (6, *FRAME), LAST)
        noise = SeededNoise(0)
        x = noise.draw(0, 0, (1, 2, *FRAME)).double()
        at = torch.full((1, 2), schedule.timesteps[0])
        x0 = x0_from_flow(x, network(x, at, text.prompt_embeds_BPE, cache=again), schedule.sigmas[0])
        x = add_noise(x0, noise.draw(0, 1, (1, 2, *FRAME)).double(), schedule.sigmas[1])
        network(x, torch.full((1, 2), schedule.timesteps[1]), text.prompt_embeds_BPE, cache=again)
        torch.testing.assert_close(kept, ordered(again, 1)[0], rtol=1e-5, atol=1e-5)
        list(chunks)
    assert len(calls) == 3 * len(STEPS.steps)
    assert first.start_frame == 0


def test_last_step_resumes_and_differs_from_clean() -> None:
    network, text = random_wan(), random_text()
    with torch.no_grad():
        whole = video(network, 8, LAST, text=text)
        chunks = rollout(
            Guided(network, text), noise=SeededNoise(0), latent_shape=(4, *FRAME), causal=LAST, steps=STEPS
        )
        *_, last = chunks
        rest = video(network, 8, LAST, text=text, start=last.snapshot())
        clean = video(network, 8, replace(LAST, cache_source="clean"), text=text)
    assert torch.equal(rest, whole[:, 4:])
    assert torch.equal(clean[:, :2], whole[:, :2])
    assert not torch.allclose(clean[:, 2:], whole[:, 2:], atol=1e-3)


def test_training_with_last_step_is_inference_where_every_chunk_exits_last() -> None:
    """An earlier exit enters the cache with the last step's noise, as the last step would have seen it."""
    network, text = random_wan(), random_text()

    def trained(*exits: int) -> Tensor:
        return video(network, 6, LAST, text=text, backprop=BackpropSpec(exits, first_frame=2)).detach()

    with torch.no_grad():
        plain = video(network, 6, LAST, text=text)
    torch.testing.assert_close(trained(1, 1, 1), plain, rtol=1e-6, atol=1e-6)
    early = trained(0, 1, 1)
    assert not torch.allclose(early[:, 2:], plain[:, 2:], atol=1e-3)
    assert torch.equal(early, trained(0, 1, 1))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cache_source": "x"}, "use clean or last_step"),
        ({"cache_source": "last_step", "context_noise": 5.0}, "has to be 0"),
    ],
)
def test_cache_sources_that_make_no_sense_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CausalConfig(**more)


def test_last_step_cannot_write_a_resumed_history_again() -> None:
    """What was written is the noisy chunk, which a snapshot does not hold; kept as it is, nothing is missing."""
    network, text = random_wan(), random_text()
    with torch.no_grad():
        chunks = rollout(
            Guided(network, text), noise=SeededNoise(0), latent_shape=(4, *FRAME), causal=LAST, steps=STEPS
        )
        first, last = chunks
        state = replace(last.snapshot(), video_BTCHW=torch.cat([first.latents_BTCHW, last.latents_BTCHW], 1))

        def resumed(history: str) -> Tensor:
            change = {6: PromptChange(random_text(seed=1), history)}
            return video(network, 8, LAST, text=text, start=state, prompt_at=change.get)

        assert resumed("keep").shape[1] == 4
        with pytest.raises(ValueError, match="use history 'keep'"):
            resumed("recode")


def test_every_block_gets_tokens_without_strides() -> None:
    """A convolution's strides would make every layer norm copy."""
    network, text, log = random_wan(), random_text(), []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, args: log.append(args[0].is_contiguous()))
    with torch.no_grad():
        video(network, 4, CausalConfig(2), text=text)
    assert log
    assert all(log)
