"""The tiny world's captions are true, its detector reads them back, and training never sees the held-out ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from train.losses import critic_loss, dmd_gradient, dmd_loss, guided, score_timesteps
from train.tiny.codec import PatchBasis, clips, fit_basis, patches
from train.tiny.diffusion import TRAINED_KEY
from train.tiny.evaluate import check_overlap
from train.tiny.muon import orthogonalise
from train.tiny.world import (
    ATTRIBUTES,
    DIRECTIONS,
    SIZE,
    Scene,
    combinations,
    detect,
    heldout,
    random_scene,
    render,
)


@pytest.mark.parametrize("seed", range(6))
def test_detector_reads_real_videos_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    actual = detect(render(scene, 21))
    assert (actual.colour, actual.shape, actual.direction, actual.speed, actual.background) == scene.words
    assert abs(actual.radius - scene.radius) < 1
    assert np.abs((np.subtract(actual.start, scene.start) + SIZE / 2) % SIZE - SIZE / 2).max() < 1


def test_detector_finds_nothing_in_an_empty_or_noisy_frame() -> None:
    assert detect(torch.full((5, 3, SIZE, SIZE), 0.3)).colour is None
    assert detect(torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))).shape is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_motion_stays_true_for_as_long_as_the_video_lasts(direction: str) -> None:
    frames = render(Scene("red", "circle", direction, "quickly", "black"), 200)
    assert detect(frames[-20:]).direction == direction


def test_rolling_a_video_is_another_scene_of_the_same_caption() -> None:
    scene = Scene("green", "triangle", "up", "slowly", "navy", start=(10.0, 50.0))
    moved = Scene("green", "triangle", "up", "slowly", "navy", start=(26.0, 58.0))
    torch.testing.assert_close(render(scene, 5).roll((8, 16), (-2, -1)), render(moved, 5))


def test_held_out_list_is_the_documented_choice_and_covers_every_word() -> None:
    """The list is the first 128 of all combinations in the order of numpy's permutation with seed 0, sorted."""
    every = combinations()
    order = np.random.default_rng(0).permutation(len(every))
    assert heldout() == sorted(every[index] for index in order[:128])
    assert len(set(heldout())) == 128
    for position, values in enumerate(ATTRIBUTES.values()):
        assert {words[position] for words in heldout()} == set(values)


def test_training_clips_leave_the_banned_scenes_out() -> None:
    allowed = combinations()[5]
    frames = clips(np.random.default_rng(0), 2, 5, set(combinations()) - {allowed})
    assert {detect(video).colour for video in frames} == {allowed[0]}


def test_evaluation_refuses_a_model_that_saw_its_captions(tmp_path: Path) -> None:
    def model_trained_on(labels: list[int]) -> Path:
        save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {TRAINED_KEY: json.dumps(labels)})
        return tmp_path / "m.safetensors"

    left_out = [combinations().index(words) for words in heldout()]
    others = sorted(set(range(len(combinations()))) - set(left_out))
    check_overlap(model_trained_on(others), heldout())
    with pytest.raises(ValueError, match="trained on 1 of the captions"):
        check_overlap(model_trained_on([*others, left_out[3]]), heldout())
    save_file({"x": torch.zeros(1)}, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="does not say"):
        check_overlap(tmp_path / "n.safetensors", heldout())


def test_patch_basis_is_causal_and_near_lossless_on_average() -> None:
    basis = fit_basis(24, seed=0)
    frames = clips(np.random.default_rng(1), 2, 9, set())
    latents = basis.encode(frames)
    assert latents.shape == (2, 3, 16, 8, 8)
    torch.testing.assert_close(basis.encode(frames[:, :5]), latents[:, :2])
    inverse = torch.linalg.pinv(basis.basis)
    error = latents.movedim(2, -1) @ inverse + basis.mean - patches(frames)
    assert error.square().mean() < 0.01
    assert isinstance(basis, PatchBasis)


def test_dmd_loss_has_the_matching_gradient() -> None:
    x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    fake, real = torch.randn_like(x), torch.randn_like(x)
    gradient = dmd_gradient(x.detach(), fake, real)
    dmd_loss(x, gradient).backward()
    torch.testing.assert_close(x.grad, gradient / x.numel())
    by_hand = (fake[0] - real[0]) / (x[0] - real[0]).abs().mean()
    torch.testing.assert_close(gradient[0], by_hand.detach())


def test_dmd_gradient_of_a_perfect_sample_is_zero() -> None:
    x = torch.randn(1, 1, 2, 2, 2)
    assert torch.equal(dmd_gradient(x, x, x), torch.zeros_like(x))


def test_guidance_scale_has_its_usual_meaning() -> None:
    conditional, unconditional = torch.tensor(3.0), torch.tensor(1.0)
    assert guided(conditional, unconditional, 1.0) == conditional
    assert guided(conditional, unconditional, 0.0) == unconditional
    assert guided(conditional, unconditional, 2.0) == 5


def test_score_timesteps_are_shifted_and_clamped() -> None:
    actual = score_timesteps(torch.tensor([0.0, 0.5, 0.999]), shift=5.0)
    torch.testing.assert_close(actual, torch.tensor([20.0, 5000 / 6, 980.0]))


def test_critic_loss_vanishes_for_the_true_flow() -> None:
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert critic_loss(noise - x0, x0, noise) == 0
    assert float(critic_loss(noise - x0 + 2, x0, noise)) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix, iterations=6))
    assert values.min() > 0.5
    assert values.max() < 1.3
