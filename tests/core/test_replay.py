"""What a policy remembers is what it says: replayed frames those of their slots, a resumed state that of its settings.

Letters: B batch, T latent frames, L query tokens, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.history import PromptChange
from selfforcing_core.joint import check_joint
from selfforcing_core.kv_cache import KVCache
from tests.core.test_policies import config, ring, start, video
from tests.support.tiny_wan import CONFIG, random_text


def stage_numbered(cache: KVCache, start_frame: int, num_frames: int) -> None:
    """Stage a chunk whose keys are turned ones and whose values are the numbers of their frames."""
    cache.stage(start_frame, num_frames)
    shape = 1, num_frames, CONFIG.num_heads, CONFIG.head_dim
    frames_L = torch.arange(start_frame, start_frame + num_frames, dtype=torch.float64)
    k_BLNK = torch.cat([turned(cache, frame) for frame in range(start_frame, start_frame + num_frames)], 1)
    for layer in range(CONFIG.num_layers):
        cache.write(layer, k_BLNK, frames_L.view(1, -1, 1, 1).expand(shape).contiguous())


def turned(cache: KVCache, position: float) -> torch.Tensor:
    """Return keys of ones, turned by a position, [B, L, N, K]."""
    pairs = cache.table(int(position)).to(torch.complex128).reshape(1, 1, 1, -1)
    pairs = pairs * torch.complex(torch.tensor(1.0), torch.tensor(1.0)).to(torch.complex128)
    return torch.view_as_real(pairs.expand(1, 1, CONFIG.num_heads, -1)).flatten(-2)


@pytest.mark.parametrize("kept", [0, 2, 3])
@pytest.mark.parametrize("flushes", [(), (4,), (4, 22), (6,), (20,)])
def test_a_replayed_frame_is_the_one_that_its_slot_names(flushes: tuple[int, ...], kept: int) -> None:
    cache = ring(config("rolling-sink"))
    for first in range(0, 60, 2):
        if first in flushes:
            cache.forget_window(first, kept)
        stage_numbered(cache, first, 2)
        for slot, frame in enumerate(cache.slot_frames):
            if frame < 0:
                continue
            assert cache.v[0, 0, slot, 0, 0] == frame, f"chunk at {first}, slot {slot}"
            k_NK = turned(cache, cache.slot_positions[slot])[0, 0]
            torch.testing.assert_close(cache.k[0, 0, slot], k_NK, msg=f"chunk at {first}, slot {slot}")
    assert min(cache.slot_frames) < 12  # it does replay


@pytest.mark.parametrize("word", ["flush", "cut"])
def test_a_replay_behind_a_flush_resumes_bit_exact(word: str) -> None:
    causal, other = config("rolling-sink"), random_text(seed=9, dtype=torch.float32)

    def prompt_at(frame: int) -> Any:
        return PromptChange(other, word) if frame == 4 else None

    with torch.no_grad():
        chunks = [(chunk, chunk.snapshot()) for chunk in start(causal, 24, prompt_at=prompt_at)]
    whole = torch.cat([chunk.latents_BTCHW for chunk, _ in chunks], 1)
    for index in (4, 7):
        rest = video(causal, 24, text=other, start=chunks[index][1])
        assert torch.equal(rest, whole[:, chunks[index][1].end_frame :])


@pytest.mark.parametrize("window", [4, 8])
def test_a_window_that_is_computed_again_resumes_at_its_own_length(window: int) -> None:
    causal = config("krea", window=6)
    with torch.no_grad():
        state = next(each.snapshot() for index, each in enumerate(start(causal, 12)) if index == 4)
    with pytest.raises(ValueError, match=f"holds the 4 clean frames .* window {window} takes .*resume with the window"):
        video(config("krea", window=window), 12, start=state)


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        ("reward", "reward,sink_average=0.5"),
        ("reward,sink_average=0.5", "reward"),
        ("krea", "krea,keeps_first=yes"),
        ("krea-bias", "krea"),
        ("memrope", "memrope,means=0.5/0.9"),
        ("memflow,bank=3", "memflow,bank=2"),
    ],
)
def test_a_state_is_resumed_under_the_settings_it_was_saved_with(saved: str, other: str) -> None:
    causal = config(saved.partition(",")[0])
    with torch.no_grad():
        chunks = start(replace(causal, policy=saved), 16)
        state = next(each.snapshot() for index, each in enumerate(chunks) if index == 5)
    with pytest.raises(ValueError, match="resume with the policy and the settings it was saved with"):
        video(replace(causal, policy=other), 16, start=state)
    # what a later change of the prompt does is no part of what was saved
    again = f"{saved},history=keep"
    assert torch.equal(
        video(replace(causal, policy=again), 16, start=state), video(replace(causal, policy=saved), 16, start=state)
    )


def test_a_window_without_room_for_joint_chunks_is_refused_before_anything_runs() -> None:
    steps = StepConfig((1000.0, 750.0, 500.0, 250.0))
    causal = CausalConfig(2, 8, 2, policy="rolling-forcing")
    with pytest.raises(ValueError, match="window 8 has no room for 8 frames and the sink; use window -1 or 10 or more"):
        check_joint(causal, steps, 20)
    check_joint(causal, steps, 8)
    check_joint(replace(causal, policy="infinite"), steps, 20)
