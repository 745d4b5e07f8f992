"""Two experts in place of one network: which pass asks which, what each remembers, and where their weights lie.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.experts import HIGH, LOW, Experts, TakingTurns, boundary_behind, check_boundary, check_pair
from selfforcing_core.guided import Guided
from selfforcing_core.history import PromptChange
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import CONTEXT, SeededNoise
from selfforcing_core.rollout import Chunk, rollout
from selfforcing_core.schedule import FlowSchedule, add_noise
from selfforcing_core.snapshot import Snapshot
from selfforcing_core.solver import new_solver
from selfforcing_core.weights.presets import PRESETS
from tests.support.tiny_wan import CONFIG, FRAME, random_text, random_wan

CAUSAL = CausalConfig(2, window=4, sink=0)
STEPS = StepConfig((1000.0, 750.0, 500.0, 250.0), shift=5.0)  # 1000, 937.5, 833.3, 625
BOUNDARY = 0.875
WHOLE = CausalConfig(6)


def chunks_of(
    model: Any, frames: int = 6, causal: CausalConfig = CAUSAL, steps: StepConfig = STEPS, **options: Any
) -> list[Chunk]:
    guided = {name: options.pop(name) for name in ("negative", "guidance", "caches") if name in options}
    return list(
        rollout(
            Guided(model, random_text(), **guided),
            noise=SeededNoise(0),
            latent_shape=(frames, *FRAME),
            causal=causal,
            steps=steps,
            **options,
        )
    )


def video(*args: Any, **options: Any) -> Tensor:
    return torch.cat([chunk.latents_BTCHW for chunk in chunks_of(*args, **options)], 1)


def pair(high: int = 0, low: int = 0, boundary: float = BOUNDARY, **options: Any) -> Experts:
    return Experts(random_wan(high), random_wan(low), boundary, **options)


# ---------------------------------------------------------------- the rollout --
@pytest.mark.parametrize("causal", [CAUSAL, WHOLE, CausalConfig(2, independent_first_frame=True, context_noise=50.0)])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_two_equal_experts_are_one_network(causal: CausalConfig, guidance: float, cache_dtype: Any) -> None:
    """Bit for bit, with guidance, in chunks and at once, with caches of 8 bits, and when the prompt changes."""
    options: dict[str, Any] = {"negative": random_text(seed=5), "guidance": guidance}
    frames = 5 if causal.independent_first_frame else 6
    if causal != WHOLE:
        change = PromptChange(random_text(seed=7), "recode")
        options["prompt_at"] = {3 if causal.independent_first_frame else 4: change}.get
    alone, experts = random_wan(), pair()
    for network in (alone, *experts.networks):
        network.cache_dtype = cache_dtype
    assert torch.equal(video(experts, frames, causal, **options), video(alone, frames, causal, **options))


def logged(model: CausalWan, name: str, log: list[tuple[str, float, int, bool]]) -> CausalWan:
    """Return a network that writes down each pass: its name, timestep, first frame, whether it writes a clean chunk."""
    forward = model.forward

    def logging_forward(x: Tensor, timesteps_BT: Tensor, *args: Any, **options: Any) -> Tensor:
        log.append((name, round(float(timesteps_BT[0, 0]), 2), options["start_frame"], options["cache"] is not None))
        return forward(x, timesteps_BT, *args, **options)

    model.forward = logging_forward  # type: ignore[method-assign]
    return model


# The steps of CausalWan 2.2 and which network sees each, by hand: s t / (1 + (s - 1) t) against 0.875. The release
# leaves open which shift it is run with, so that both are written out.
CAUSALWAN_PASSES = {
    12.0: [
        *(("high", timestep) for timestep in (1000.0, 985.51, 965.52, 936.17)),
        *(("low", timestep) for timestep in (865.98, 819.88, 750.0, 631.58)),
    ],
    5.0: [
        *(("high", timestep) for timestep in (1000.0, 965.91, 921.05)),
        *(("low", timestep) for timestep in (859.38, 729.17, 654.76, 555.56, 416.67)),
    ],
}


@pytest.mark.parametrize("shift", CAUSALWAN_PASSES)
def test_each_pass_of_causalwan_asks_the_network_of_the_releases_table(shift: float) -> None:
    preset = PRESETS["causalwan2.2-i2v"]
    assert preset.steps is not None
    assert preset.twin is not None
    assert preset.twin.boundary is not None
    steps = StepConfig(preset.steps, shift=shift, solver="phased", boundary=preset.twin.boundary)
    check_boundary(steps)
    log: list[tuple[str, float, int, bool]] = []
    experts = Experts(logged(random_wan(0), "high", log), logged(random_wan(1), "low", log), preset.twin.boundary)
    causal = CausalConfig(2, window=-1, independent_first_frame=True)
    video(experts, 5, causal, steps)
    passes = CAUSALWAN_PASSES[shift]
    expected = []
    for start_frame in (0, 1, 3):
        expected += [(name, timestep, start_frame, True) for name, timestep in passes]
        if start_frame < 3:  # the clean chunk, into the caches of both; nobody reads the last one
            expected += [("low", 0.0, start_frame, True), ("high", 0.0, start_frame, True)]
    assert log == expected


def test_a_boundary_step_is_the_first_of_the_low_noise_network() -> None:
    """LightX2V's Wan 2.2: four steps, boundary_step_index 2, all frames at once and no cache."""
    preset = PRESETS["lightx2v-wan2.2-i2v"]
    assert preset.twin is not None
    assert preset.twin.boundary_step is not None
    log: list[tuple[str, float, int, bool]] = []
    experts = Experts(
        logged(random_wan(0), "high", log),
        logged(random_wan(1), "low", log),
        boundary_behind(STEPS, preset.twin.boundary_step),
    )
    video(experts, 6, WHOLE)
    assert log == [
        ("high", 1000.0, 0, False),
        ("high", 937.5, 0, False),
        ("low", 833.33, 0, False),
        ("low", 625.0, 0, False),
    ]


@pytest.mark.parametrize("index", [-1, 0, 4, 9])
def test_a_boundary_step_leaves_both_networks_a_step(index: int) -> None:
    with pytest.raises(ValueError, match=r"it is 1 to 3"):
        boundary_behind(STEPS, index)


@pytest.mark.parametrize(("boundary", "name"), [(0.6, "low-noise"), (0.625, "low-noise"), (0.7, None), (0.99, None)])
def test_a_boundary_leaves_both_networks_a_step(boundary: float, name: str | None) -> None:
    steps = replace(STEPS, boundary=boundary)
    if name is None:
        check_boundary(steps)
    else:
        with pytest.raises(ValueError, match=f"leaves the {name} network without a step"):
            check_boundary(steps)
    with pytest.raises(ValueError, match="leaves the high-noise network without a step"):
        check_boundary(StepConfig((500.0, 250.0), warp=False, boundary=0.9))


def test_a_pass_at_the_boundary_itself_is_the_high_noise_networks() -> None:
    for share in (0.9, 0.875, 0.7, 0.3):
        experts = pair(boundary=share)
        assert [experts.index_at(round(1000 * share) + delta) for delta in (0, -1)] == [HIGH, LOW]


def test_each_expert_reads_the_past_by_its_own_cache() -> None:
    """As if each network had watched the whole video alone: a loop by hand with a cache for each."""
    high, low = random_wan(0), random_wan(1)
    text, schedule, noise = random_text(), FlowSchedule(STEPS), SeededNoise(0)
    caches = [
        network.new_cache(
            batch=1, latent_height=FRAME[1], latent_width=FRAME[2], capacity=4, like=text.prompt_embeds_BPE
        )
        for network in (high, low)
    ]
    result = []
    for start in (0, 2, 4):
        shape = (1, 2, *FRAME)
        x = noise.draw(start, 0, shape)
        for step, (timestep, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas)):
            index = HIGH if timestep >= 875 else LOW
            times = torch.full((1, 2), timestep)
            flow = (high, low)[index](x, times, text.prompt_embeds_BPE, cache=caches[index], start_frame=start)
            x = x - sigma * flow.float()
            if step < 3:
                x = add_noise(x, noise.draw(start, step + 1, shape), schedule.sigmas[step + 1])
        result.append(x)
        for network, cache in zip((high, low), caches):
            network(x, torch.zeros(1, 2), text.prompt_embeds_BPE, cache=cache, start_frame=start)
    assert torch.equal(video(Experts(high, low, BOUNDARY)), torch.cat(result, 1))


# ---------------------------------------------------------------- phased steps --
def test_phased_noise_keeps_the_level_that_it_says() -> None:
    """From exact latents at the boundary the next level's share of data and of noise is what that level has."""
    schedule = FlowSchedule(replace(STEPS, solver="phased", boundary=BOUNDARY))
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((1, 1, 1, 1, 1 << 20), 2.0)
    first, second = (torch.randn(clean.shape, generator=generator) for _ in range(2))
    solver = new_solver("phased", schedule, [first, second, second, second])
    # with the true flow, noise - data, as a perfect network has it
    moved = solver.advance(add_noise(clean, first, 1.0), first - clean, 0)
    sigma = schedule.sigmas[1]
    assert abs(float(moved.mean()) - (1 - sigma) * 2) < 0.005
    assert abs(float(moved.std()) - sigma) < 0.005
    # across the boundary nothing is added: the low-noise network begins with the latents at the boundary
    torch.testing.assert_close(
        solver.advance(add_noise(clean, first, sigma), first - clean, 1), add_noise(clean, first, BOUNDARY)
    )
    below = solver.advance(add_noise(clean, first, 0.8), first - clean, 2)
    torch.testing.assert_close(
        below,
        new_solver("renoise", schedule, [first, second, second, second]).advance(
            add_noise(clean, first, 0.8), first - clean, 2
        ),
    )


def test_phased_steps_need_a_boundary_and_older_headers_have_none() -> None:
    with pytest.raises(ValueError, match="needs their boundary"):
        video(random_wan(), steps=replace(STEPS, solver="phased"))
    with pytest.raises(ValueError, match="boundary 875"):
        StepConfig(boundary=875)
    assert "boundary" not in STEPS.to_dict()
    steps = replace(STEPS, solver="phased", boundary=BOUNDARY)
    assert StepConfig.from_dict(steps.to_dict()) == steps
    assert StepConfig.from_dict(STEPS.to_dict()) == STEPS


# ------------------------------------------------------------ going on, again --
def test_a_rollout_of_experts_goes_on_from_a_file(tmp_path: Path) -> None:
    experts = pair(0, 1)
    whole = video(experts, 8)
    for index in range(3):  # the last of six frames is written into no cache yet
        snapshots = []
        for chunk in rollout(
            Guided(experts, random_text()), noise=SeededNoise(0), latent_shape=(6, *FRAME), causal=CAUSAL, steps=STEPS
        ):
            snapshots.append(chunk.snapshot())
        snapshots[index].save(tmp_path / "state.safetensors")
        state = Snapshot.load(tmp_path / "state.safetensors")
        assert state.num_networks == 2
        assert torch.equal(video(experts, 8, start=state), whole[:, state.end_frame :])
    with pytest.raises(ValueError, match="taken with 2 networks, this rollout has 1"):
        video(random_wan(), 8, start=state, negative=random_text(seed=5), guidance=2.0)
    with pytest.raises(ValueError, match="taken with 1 conditions, this rollout has 2"):
        video(experts, 8, start=state, negative=random_text(seed=5), guidance=2.0)


def test_a_chunk_of_experts_is_made_again_from_the_same_past() -> None:
    experts = pair(0, 1)
    plain = video(experts)
    chunks, again = (
        rollout(
            Guided(experts, random_text()), noise=SeededNoise(0), latent_shape=(6, *FRAME), causal=CAUSAL, steps=STEPS
        ),
        [],
    )
    for chunk in chunks:
        again.append(chunks.send(True).latents_BTCHW if chunk.index == 1 else chunk.latents_BTCHW)
    assert torch.equal(torch.cat(again, 1), plain)


def test_what_only_one_expert_could_write_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_source last_step"):
        video(pair(), causal=replace(CAUSAL, cache_source="last_step"))


def test_networks_of_different_sizes_are_no_pair() -> None:
    check_pair(CONFIG, CONFIG)
    with pytest.raises(ValueError, match=r"different sizes \(num_layers 2 and 3, in_dim 4 and 9\)"):
        check_pair(CONFIG, replace(CONFIG, num_layers=3, in_dim=9))


# --------------------------------------------------------- one on the device --
def test_a_chunk_costs_two_changes_however_many_steps_it_has() -> None:
    experts = pair()
    moves: list[int] = []
    experts.bring = moves.append
    changes: list[int] = []
    chunks_of(
        experts,
        8,
        steps=StepConfig(PRESETS["causalwan2.2-i2v"].steps or ()),
        on_step=lambda chunk, step: changes.append(len(moves)) if step == 0 else None,
    )
    # of four chunks each begins with the network that wrote the one before, and the last is written by none
    assert moves == [HIGH, LOW] * 4
    assert changes == [0, 3, 5, 7]


def test_a_prompt_change_brings_each_expert_once_a_chunk_at_most() -> None:
    experts = pair()
    moves: list[int] = []
    experts.bring = moves.append
    chunks_of(experts, 6, prompt_at={4: PromptChange(random_text(seed=5), "recode")}.get)
    assert all(before != after for before, after in zip(moves, moves[1:]))
    assert len(moves) <= 2 * 3 + 2


def test_the_network_that_is_asked_takes_the_place_of_the_other() -> None:
    """The other's weights are back where they were before a single one comes, and are never copied back."""
    experts = pair(0, 1)
    turns = TakingTurns(experts.networks, torch.device("cpu"))
    copies: list[int] = []

    class Copied(torch.Tensor):
        """A stored weight that says when it goes to the device, and what lies there then."""

        def to(self, *args: Any, **options: Any) -> Any:
            resident = [sum(tensor.data_ptr() != stored.data_ptr() for tensor, stored in kept) for kept in turns.kept]
            assert min(resident) == 0, "weights of both networks on the device"
            copies.append(1)
            return torch.Tensor.clone(self.as_subclass(torch.Tensor))

    turns.kept = [[(tensor, stored.as_subclass(Copied)) for tensor, stored in kept] for kept in turns.kept]
    experts.bring = turns
    result = video(experts)
    count = len(turns.kept[0])
    assert len(copies) == 6 * count  # three chunks, each network once in each
    assert torch.equal(result, video(pair(0, 1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to count its memory")
def test_one_expert_on_a_gpu_at_a_time() -> None:
    networks = (random_wan(0), random_wan(1))
    size = sum(parameter.nbytes for parameter in networks[0].parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    turns = TakingTurns(networks, torch.device("cuda"))
    for index in (HIGH, LOW, HIGH):
        turns(index)
        assert size <= torch.cuda.memory_allocated() - before < 1.5 * size


def test_context_steps_are_told_once_for_both() -> None:
    steps: list[tuple[int, int]] = []
    chunks_of(pair(), on_step=lambda *step: steps.append(step))
    assert [step for step in steps if step[1] == CONTEXT] == [(0, CONTEXT), (1, CONTEXT)]
