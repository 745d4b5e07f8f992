"""Prompts that become the next over several chunks: which embeddings hold where, once more, and after a snapshot.

Letters: B batch, P text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from selfforcing_core.blending import Blending, blend_conditionings, blend_embeds
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.guided import Guided
from selfforcing_core.history import PromptChange
from selfforcing_core.noise import SeededNoise
from selfforcing_core.prompt_schedule import Transition
from selfforcing_core.rollout import Chunk, rollout
from selfforcing_core.snapshot import Snapshot
from tests.support.tiny_wan import FRAME, random_text, random_wan

STARTS = [0, 3, 6, 9, 12, 15, 18]


def numbers() -> Blending[float]:
    return Blending(0.0, STARTS, lambda one, other, weight: (1 - weight) * one + weight * other)


def held(blending: Blending[float], changes: dict[int, tuple[float, Transition]]) -> list[float]:
    """Return what holds in each chunk."""
    values = []
    for start in STARTS:
        blending.begin(start)
        if start in changes:
            blending.change(*changes[start])
        blending.step()
        values.append(blending.current)
    return values


def test_weights_are_those_that_krea_publishes() -> None:
    """A change at chunk 4 over 3 chunks, as recorded from its session: policy_krea, prompt_weight_at_chunk."""
    assert held(numbers(), {12: (1.0, Transition(blend=3))}) == [0, 0, 0, 0, 0, 0.5, 1]


def test_frames_are_kept_on_the_way_and_the_last_chunk_does_what_was_asked_for() -> None:
    blending = numbers()
    steps = []
    for start in STARTS:
        blending.begin(start)
        if start == 3:
            blending.change(1.0, Transition("flush", 3))
        steps.append(blending.step())
    assert steps == [None, (0.0, "keep"), (0.5, "keep"), (1.0, "flush"), None, None, None]


def test_a_change_on_the_way_goes_on_from_where_the_blend_is() -> None:
    changes = {3: (1.0, Transition(blend=3)), 9: (4.0, Transition(blend=3))}
    assert held(numbers(), changes) == [0, 0, 0.5, 0.5, 2.25, 4, 4]
    assert held(numbers(), {3: (1.0, Transition(blend=3)), 6: (4.0, Transition())}) == [0, 0, 4, 4, 4, 4, 4]
    assert held(numbers(), {15: (1.0, Transition(blend=4))})[-1] == pytest.approx(1 / 3), "the video ends first"


@given(st.lists(st.tuples(st.sampled_from(STARTS), st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3))
def test_a_chunk_made_once_more_is_changed_as_if_at_first(attempts: list[tuple[int, int, int]]) -> None:
    """Whatever was changed in attempts that were thrown away."""
    start, *_ = attempts[-1]
    expected = held(numbers(), {start: (float(attempts[-1][1]), Transition(blend=attempts[-1][2]))})
    blending, values = numbers(), []
    for each in STARTS:
        for _, prompt, blend in attempts if each == start else [(0, 0, 0)]:
            blending.begin(each)
            if blend:
                blending.change(float(prompt), Transition(blend=blend))
            blending.step()
        values.append(blending.current)
    assert values == expected


def test_a_shorter_text_counts_as_zeros_behind_its_end() -> None:
    one_BPE, other_BPE = torch.ones(1, 2, 4), torch.full((1, 3, 4), 3.0)
    blended = blend_embeds(one_BPE, other_BPE, 0.25)
    assert blended[0, :, 0].tolist() == [1.5, 1.5, 0.75]
    assert torch.equal(blend_embeds(other_BPE, one_BPE, 0.75), blended)


# ------------------------------------------------------------------- rollout --
def course() -> Callable[[int], PromptChange | None]:
    """Return what the first of two prompts becomes from frame 6 on, over 3 chunks of 2 frames."""
    blending = Blending(random_text(), range(0, 16, 2), blend_conditionings)
    changes = {}
    for start in range(0, 16, 2):
        blending.begin(start)
        if start == 6:
            blending.change(random_text(seed=1), Transition("recode", 3))
        step = blending.step()
        if step is not None:
            changes[start] = PromptChange(*step)
    return changes.get


def video(prompt_at: Callable[[int], PromptChange | None], *, once_more: int = -1, resume_at: int = -1) -> Tensor:
    causal, kept = CausalConfig(2, 6, 2), []

    def chunks(start: Snapshot | None, first: Conditioning) -> Generator[Chunk, bool | None, None]:
        return rollout(
            Guided(random_wan(), first),
            noise=SeededNoise(0),
            latent_shape=(16, *FRAME),
            causal=causal,
            steps=StepConfig((1000.0, 500.0)),
            prompt_at=prompt_at,
            start=start,
        )

    with torch.no_grad():
        running, first = chunks(None, random_text()), random_text()
        for chunk in running:
            if chunk.start_frame == once_more:
                chunk = running.send(True)
            kept.append(chunk.latents_BTCHW)
            if chunk.start_frame == resume_at:
                change = prompt_at(resume_at)
                first = first if change is None else change.conditioning
                rest = chunks(replace(chunk.snapshot(), video_BTCHW=torch.cat(kept, 1)), first)
                return torch.cat([*kept, *(each.latents_BTCHW for each in rest)], 1)
    return torch.cat(kept, 1)


@pytest.mark.parametrize("start", [6, 8, 10])
def test_a_blend_is_bit_exact_once_more_and_after_a_snapshot(start: int) -> None:
    whole = video(course())
    assert torch.equal(video(course(), once_more=start), whole)
    assert torch.equal(video(course(), resume_at=start - 2), whole)
    assert torch.equal(video(course(), resume_at=start), whole)


def test_the_command_line_blends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The chunk of the moment is that of the old prompt, and a blend that the video cuts short is said."""
    red, blue = (f"a {colour} square moving left slowly on a black background" for colour in ("red", "blue"))

    def latents(prompt: str) -> Tensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        options = ["--frames", "57", "--steps", "1000", "--latents", str(path), "--out", str(path.with_suffix(".mp4"))]
        assert main(["generate", "--prompt", prompt, *options]) == 0
        return load_file(path)["latents"]

    plain, blended = latents(f"0s: {red}; 1.4s keep: {blue}"), latents(f"0s: {red}; 1.4s [blend 3, keep]: {blue}")
    rest = latents(red)
    assert torch.equal(blended[:9], rest[:9]), "chunks of 3 frames; frame 6 begins the one at 1.4 s"
    assert not torch.equal(blended[9:12], rest[9:12])
    assert not torch.equal(blended[6:9], plain[6:9])
    assert "the video ends after" not in caplog.text
    latents(f"0s: {red}; 1.4s blend 9: {blue}")
    assert "is blended in over 9 chunks, but the video ends after 3 of them" in caplog.text
