"""Cache policies in the student's own rollout: what is trained is what is sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selfforcing_core.config import StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.policy import POLICIES, CachePolicy
from selfforcing_core.rollout import rollout
from selfforcing_core.weights.checkpoint import read_checkpoint
from tests.core.test_policies import SMALL
from tests.support.tiny_wan import FRAME, random_text, random_wan
from tests.support.training import numbers, run, run_settings, student
from train import dmd
from train.args import DmdArgs
from train.roles import Student

STEPS = StepConfig((1000.0, 500.0))
PLAIN: dict[str, Any] = {"student": "tiny", "teacher": "tiny", "text_encoder": "tiny", "prompts": "p", "logdir": "run"}


def is_trained(name: str) -> bool:
    causal = SMALL[name]
    try:
        dmd.check(DmdArgs(**PLAIN, chunk=2, latent_frames=14, window=causal.window, sink=causal.sink, policy=name), 1)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in SMALL if is_trained(name)])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_students_clip_is_the_sampled_video_and_its_gradient_reaches_the_weights(name: str, recomputes: bool) -> None:
    """Bit-exact where every chunk ends at its last step, also with activations that are computed again."""
    causal, network = replace(SMALL[name], policy=name), random_wan()
    condition, frames = random_text(), 14
    with torch.no_grad():
        sampled = rollout(
            Guided(network, condition),
            noise=SeededNoise(4),
            latent_shape=(frames, *FRAME),
            causal=causal,
            steps=STEPS,
        )
        expected = torch.cat([chunk.latents_BTCHW for chunk in sampled], 1)
    gradients = []
    network.requires_grad_(True)
    for loss_frames in (frames, frames - 6):
        network.zero_grad()
        if recomputes:
            network.checkpoint_blocks()
        clip = Student(network, causal, STEPS, loss_frames=loss_frames).sample(
            condition, noise=SeededNoise(4), latent_shape=(frames, *FRAME), exit_steps=[1] * 7, with_gradient=True
        )
        assert torch.equal(clip.detach(), expected)
        clip[:, -4:].square().sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None]))
    assert gradients[0].abs().sum() > 0
    # frames that lie before carry no gradient into later ones (algorithm 1), whatever the cache makes of them
    assert torch.equal(gradients[0], gradients[1])


def test_activations_computed_again_change_no_gradient_where_a_sink_moves() -> None:
    """The backward pass comes when the cache holds later frames, and the sink stands elsewhere."""
    causal, condition, gradients = replace(SMALL["infinite"], policy="infinite"), random_text(), []
    for recomputes in (False, True):
        network = random_wan().requires_grad_(True)
        if recomputes:
            network.checkpoint_blocks()
        clip = Student(network, causal, STEPS).sample(
            condition, noise=SeededNoise(4), latent_shape=(14, *FRAME), exit_steps=[0] * 7, with_gradient=True
        )
        clip.square().sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None]))
    assert torch.equal(*gradients)


def test_a_policy_that_a_clip_cannot_follow_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd, "TRAINED_BY", ("name",))
    with pytest.raises(ValueError, match=r"policy infinite is not trained here: .* its is_rebased, history"):
        dmd.check(DmdArgs(**PLAIN, window=6, sink=1, policy="infinite"), 1)
    with pytest.raises(ValueError, match="policy infinite is of a cache"):
        dmd.causal_of(DmdArgs(chunk=0, policy="infinite"))
    with pytest.raises(ValueError, match="policy 'infinit' is unknown; use infinite"):
        dmd.causal_of(DmdArgs(policy="infinit"))
    assert isinstance(POLICIES["infinite"], CachePolicy)


def test_a_distillation_runs_under_a_policy_and_its_export_says_so(tmp_path: Path) -> None:
    options = ["max_steps=2", "save_every=2", "chunk=1", "window=2", "sink=1", "policy=infinite", "dtype=float32"]
    settings = [*run_settings(tmp_path), f"logdir={tmp_path / 'run'}", *options]
    run(settings)
    assert len(numbers(tmp_path / "run")) == 2
    student(tmp_path / "run", tmp_path)
    causal = read_checkpoint(tmp_path / "run-raw.safetensors").causal
    assert causal is not None
    assert (causal.policy, causal.window, causal.sink) == ("infinite", 2, 1)
