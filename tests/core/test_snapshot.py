"""Going on from a snapshot is going on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.snapshot import Snapshot
from tests.support.tiny_wan import FRAME, guided, random_text, random_wan

STEPS = StepConfig((1000.0, 500.0))
MODEL = random_wan(dtype=torch.float32)
POLICIES = [
    CausalConfig(2),
    CausalConfig(1, window=3),
    CausalConfig(2, window=5, sink=1),
    CausalConfig(2, window=4, independent_first_frame=True),
    CausalConfig(2, window=6, sink=3, context_noise=40.0),
    CausalConfig(2, window=5, sink=1, policy="infinite"),
    CausalConfig(2, window=6, sink=2, policy="reward,sink_average=0.5"),
    CausalConfig(1, window=5, sink=1, policy="memrope,means=0.2/0.6"),
    CausalConfig(2, window=6, policy="rolling-sink"),
]


def start(causal: CausalConfig, frames: int, **options: Any) -> Any:
    options = {"noise": SeededNoise(4), "steps": STEPS, **options}
    text = options.pop("text", random_text(dtype=torch.float32))
    return rollout(guided(MODEL, text, options), latent_shape=(frames, *FRAME), causal=causal, **options)


def latents(chunks: Any) -> Tensor:
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def length(causal: CausalConfig, chunks: int) -> int:
    return causal.chunk * chunks + int(causal.independent_first_frame)


@pytest.mark.parametrize("causal", POLICIES)
@pytest.mark.parametrize("is_guided", [False, True])
def test_resuming_after_any_chunk_is_bit_exact(causal: CausalConfig, is_guided: bool, tmp_path: Path) -> None:
    frames = length(causal, 5)
    guided: dict[str, Any] = (
        {"negative": random_text(seed=7, dtype=torch.float32), "guidance": 3.0} if is_guided else {}
    )
    whole, snapshots = [], []
    for chunk in start(causal, frames, **guided):
        whole.append(chunk)
        snapshots.append(chunk.snapshot())
    for index, snapshot in enumerate(snapshots[:-1]):
        rest = latents(whole[index + 1 :])
        assert torch.equal(latents(start(causal, frames, start=snapshot, **guided)), rest)
        path = tmp_path / f"{index}.safetensors"
        snapshot.save(path)
        assert torch.equal(latents(start(causal, frames, start=Snapshot.load(path), **guided)), rest)


@pytest.mark.parametrize("causal", [POLICIES[0], POLICIES[2]])
def test_a_finished_video_goes_on_as_the_longer_one(causal: CausalConfig) -> None:
    """The last chunk was never written into the cache; resuming writes it first."""
    short, long = length(causal, 3), length(causal, 5)
    window = CausalConfig(causal.chunk, causal.window, causal.sink)
    *_, last = start(window, short)
    result = latents(start(window, long, start=last.snapshot()))
    assert torch.equal(result, latents(start(window, long))[:, short:])


def test_a_single_chunk_goes_on_too() -> None:
    (only,) = start(CausalConfig(2), 2)
    assert torch.equal(
        latents(start(CausalConfig(2), 4, start=only.snapshot())), latents(start(CausalConfig(2), 4))[:, 2:]
    )


@settings(max_examples=15)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_branches_do_not_disturb_each_other(turns: list[int]) -> None:
    """Two continuations with other noise, advanced in any order, are those that run alone."""
    causal = CausalConfig(2, window=4)
    chunks = start(causal, 10)
    snapshot = next(chunks).snapshot()
    alone = [list(start(causal, 10, start=snapshot, noise=SeededNoise(seed))) for seed in (1, 2)]
    branches = [start(causal, 10, start=snapshot, noise=SeededNoise(seed)) for seed in (1, 2)]
    result: list[list[Any]] = [[], []]
    for turn in turns:
        result[turn].extend(chunk for chunk in [next(branches[turn], None)] if chunk is not None)
    for branch, expected in zip(result, alone):
        for chunk, reference in zip(branch, expected):
            assert torch.equal(chunk.latents_BTCHW, reference.latents_BTCHW)
    assert torch.equal(latents(chunks), latents(start(causal, 10))[:, 2:])


def test_a_snapshot_goes_on_with_another_prompt() -> None:
    causal, other = CausalConfig(2), random_text(seed=9, dtype=torch.float32)
    snapshot = next(start(causal, 4)).snapshot()
    changed = latents(start(causal, 4, start=snapshot, text=other))
    assert not torch.equal(changed, latents(start(causal, 4))[:, 2:])
    assert not torch.equal(changed, latents(start(causal, 4, text=other))[:, 2:])


@pytest.mark.parametrize(
    ("causal", "frames", "options", "message"),
    [
        (CausalConfig(4), 8, {}, "chunks of this video of 8 frames end at 4, 8"),
        (CausalConfig(2, window=4), 8, {}, "resume with the window and sink it was saved with"),
        (CausalConfig(2), 8, {"text": random_text(2, dtype=torch.float32)}, "model, size and batch it was saved with"),
        (CausalConfig(2), 8, {"guidance": 2.0, "negative": random_text(dtype=torch.float32)}, "same guidance"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(
    causal: CausalConfig, frames: int, options: dict[str, Any], message: str
) -> None:
    chunks = start(CausalConfig(2), 8)
    snapshot = [next(chunks) for _ in range(3)][-1].snapshot()
    snapshot = Snapshot(snapshot.start_frame, snapshot.end_frame, snapshot.caches)
    with pytest.raises(ValueError, match=message):
        next(start(causal, frames, start=snapshot, **options))


def test_a_snapshot_is_taken_in_time_or_not_at_all() -> None:
    chunks = start(CausalConfig(2), 6)
    first = next(chunks)
    next(chunks)
    with pytest.raises(AssertionError, match="too late"):
        first.snapshot()


def test_files_that_are_no_snapshots_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no snapshot of a rollout"):
        Snapshot.load(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="no snapshot of a rollout"):
        Snapshot.load(path)
    with pytest.raises(ValueError, match="no snapshot of a rollout"):
        Snapshot.load(tmp_path / "missing.safetensors")
