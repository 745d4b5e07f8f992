"""Sizes: whatever is asked for is either right, or refused with the nearest values that are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import (
    VideoGeometry,
    chunk_lengths,
    latent_frames,
    pixel_frames,
    rounded_length,
    rounded_side,
)
from selfforcing_core.schedule import FlowSchedule


def remedies(error: ValueError) -> list[int]:
    """The numbers after the last 'use'."""
    return [int(number) for number in re.findall(r"\d+", str(error).rpartition("use ")[2])]


def check_remedies(error: ValueError, asked: int, is_valid: list[bool], actual: list[int]) -> None:
    """Every value named is valid, and no valid one lies nearer on its side."""
    assert actual, f"no remedy in {error}"
    for value in actual:
        assert is_valid[value], f"{error}: {value} is not valid"
        between = range(max(0, min(value, asked) + 1), max(value, asked))
        assert not any(is_valid[other] for other in between), f"{error}: {value} is not the nearest"


def accepts(**sizes: int | bool) -> bool:
    try:
        VideoGeometry(**{"width": 64, "height": 64, "frames": 1, "chunk": 1, **sizes})  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


@given(st.integers(-5, 400))
def test_a_width_is_right_or_refused_with_the_nearest(width: int) -> None:
    valid = [accepts(width=value) for value in range(450)]
    try:
        assert VideoGeometry(width, 64, 1, chunk=1).latent_width * 8 == width
    except ValueError as error:
        check_remedies(error, width, valid, remedies(error))


@given(st.integers(-5, 200), st.integers(1, 7), st.booleans())
def test_a_length_is_right_or_refused_with_the_nearest(frames: int, chunk: int, first: bool) -> None:
    valid = [accepts(frames=value, chunk=chunk, independent_first_frame=first) for value in range(260)]
    try:
        geometry = VideoGeometry(64, 64, frames, chunk, first)
    except ValueError as error:
        check_remedies(error, frames, valid, remedies(error))
        return
    lengths = geometry.chunk_lengths
    assert sum(lengths) == geometry.latent_frames
    assert pixel_frames(geometry.latent_frames) == frames
    assert set(lengths[int(first) :]) <= {chunk}
    assert [start + length for start, length in zip(geometry.chunk_starts, lengths)][-1] == sum(lengths)


@given(st.integers(1, 10_000))
def test_latent_frames_invert_pixel_frames(count: int) -> None:
    assert latent_frames(pixel_frames(count)) == count


@given(st.integers(-3, 60), st.integers(1, 8), st.booleans())
def test_chunks_fill_the_video_or_name_the_nearest_counts(frames: int, chunk: int, first: bool) -> None:
    try:
        lengths = chunk_lengths(frames, chunk, independent_first_frame=first)
    except ValueError as error:
        named = remedies(error)
        lengths = tuple(sum(chunk_lengths(value, chunk, independent_first_frame=first)) for value in named)
        assert named
        assert lengths == tuple(named)
        return
    assert sum(lengths) == frames
    assert all(length > 0 for length in lengths)


STEP_LISTS = st.lists(st.floats(0.5, 1000.0), min_size=1, max_size=8, unique=True).map(
    lambda steps: tuple(sorted(steps, reverse=True))
)


@given(STEP_LISTS, st.floats(0.5, 12.0), st.booleans())
def test_schedules_fall_from_noise_to_data(steps: tuple[float, ...], shift: float, warp: bool) -> None:
    schedule = FlowSchedule(StepConfig(steps, shift, warp))
    assert all(0 < sigma <= 1 for sigma in schedule.sigmas)
    assert all(later < earlier for earlier, later in zip(schedule.sigmas, schedule.sigmas[1:]))
    assert [round(1000 * sigma, 6) for sigma in schedule.sigmas] == [round(time, 6) for time in schedule.timesteps]


@settings(max_examples=30)
@given(STEP_LISTS.filter(lambda steps: len(steps) > 1))
def test_step_lists_out_of_order_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="descending order"):
        StepConfig(tuple(reversed(steps)))


@given(st.integers(1, 60), st.floats(1.0, 8.0))
def test_even_steps_start_at_noise_and_have_the_asked_number(count: int, shift: float) -> None:
    schedule = FlowSchedule(StepConfig.even(count, shift=shift))
    assert len(schedule.timesteps) == count
    assert schedule.timesteps[0] == 1000


@given(st.integers(1, 6), st.integers(-1, 20), st.integers(0, 6))
def test_a_window_holds_sink_and_chunk_or_is_refused(chunk: int, window: int, sink: int) -> None:
    try:
        causal = CausalConfig(chunk, window, sink)
    except ValueError as error:
        assert window != -1
        smallest = max(remedies(error))
        assert replace(CausalConfig(chunk), window=smallest, sink=sink).window == smallest
        return
    assert causal.window == -1 or causal.window >= causal.sink + causal.chunk


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("is_independent", [False, True])
def test_a_rounded_length_is_the_largest_valid_one_below_and_at_least_one_chunk(
    chunk: int, is_independent: bool
) -> None:
    def is_valid(length: int) -> bool:
        try:
            VideoGeometry(64, 64, length, chunk, is_independent)
        except ValueError:
            return False
        return True

    for length in range(-3, 120):
        actual = rounded_length(length, chunk, independent_first_frame=is_independent)
        valid = [at for at in range(1, max(length, 4 * chunk + 1) + 1) if is_valid(at)]
        assert actual == max([at for at in valid if at <= length], default=valid[0])


def test_a_rounded_side_is_a_multiple_of_16_and_at_least_one() -> None:
    assert [rounded_side(pixels) for pixels in (-1, 5, 16, 31, 832, 847)] == [16, 16, 16, 16, 832, 832]
