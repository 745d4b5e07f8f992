"""Objectives: closed-form gradients, and the adversarial heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfforcing_core.conditioning import Conditioning
from tests.support.tiny_wan import CONFIG, FRAME, random_text, random_wan
from tests.support.training import numbers, run_settings, write_database
from train.dmd import main
from train.gan import Adversarial, Discriminator, Heads, tapped
from train.losses import (
    dmd_gradient,
    dmd_loss,
    gan_critic_loss,
    gan_generator_loss,
    mean_count,
    regression_loss,
    sid_loss,
)
from train.roles import Levels, ScoreDraw

SHAPE = (2, 3, *FRAME)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_dmd_loss_has_the_matching_gradient() -> None:
    x, fake, real = draw(0).requires_grad_(True), draw(1), draw(2)
    gradient = dmd_gradient(x.detach(), fake, real)
    dmd_loss(x, gradient).backward()
    torch.testing.assert_close(x.grad, gradient / x.numel())
    scale = (x.detach() - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient, (fake - real) / scale)


def test_the_sid_loss_has_its_closed_gradient() -> None:
    """For predictions that are fixed, d/dx of (real - fake) (real - x) / w is -(real - fake) / w."""
    x, fake, real = draw(0).requires_grad_(True), draw(1), draw(2)
    sid_loss(x, fake, real).backward()
    scale = (x.detach() - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x.grad, -(real - fake) / scale / x.numel())


def test_adversarial_losses_have_their_closed_gradients() -> None:
    fake, real = (draw(seed).flatten()[:5].requires_grad_(True) for seed in (0, 1))
    gan_generator_loss(fake).backward()
    torch.testing.assert_close(fake.grad, -torch.sigmoid(-fake.detach()) / 5)
    fake.grad = None
    gan_critic_loss(fake, real, is_relativistic=True).backward()
    expected = torch.sigmoid(fake.detach() - real.detach()) / 5
    torch.testing.assert_close(fake.grad, expected)
    torch.testing.assert_close(real.grad, -expected)


def test_the_regression_loss_is_the_mean_over_the_counted_frames_of_the_batch() -> None:
    """Uneven counts: in one part, in parts of one clip, and by hand over the boolean selection."""
    x, target = torch.cat([draw(0), draw(2)]).requires_grad_(True), torch.cat([draw(1), draw(3)])
    counted = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [False, True, False]])
    by_hand = torch.nn.functional.mse_loss(x[counted], target[counted])
    (expected,) = torch.autograd.grad(by_hand, x)
    parts = [slice(n, n + 1) for n in range(4)]
    whole = regression_loss(x, target, counted)
    mean = torch.stack([regression_loss(x[n], target[n], counted[n], mean_count(counted)) for n in parts]).mean()
    for loss in (whole, mean):
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
    assert regression_loss(x, target, torch.zeros_like(counted)) == 0


def test_the_dmd_loss_is_the_mean_over_the_counted_frames() -> None:
    x, gradient, counted = draw(0), draw(1), torch.tensor([False, True, True])
    torch.testing.assert_close(dmd_loss(x, gradient, counted), dmd_loss(x[:, counted], gradient[:, counted]))


def test_heads_read_the_published_blocks() -> None:
    assert tapped(30) == [13, 21, 29]
    assert tapped(2) == [0, 0, 1]


def discriminator(*, sees_time: bool = False) -> Discriminator:
    network = random_wan()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = Heads(CONFIG, sees_time=sees_time, dtype=torch.float64)
    return Discriminator(network, network, heads, sees_time=sees_time)


@pytest.mark.parametrize("is_relativistic", [False, True])
def test_heads_learn_to_tell_clips_apart_and_the_student_is_led_to_the_real_ones(is_relativistic: bool) -> None:
    judge = discriminator(sees_time=True)
    part = Adversarial(judge, Levels(), 1.0, 1.0, is_relativistic, r1=0.1, r2=0.1)
    noise = ScoreDraw(torch.tensor([300.0, 500.0]), draw(9))
    condition = Conditioning(random_text().prompt_embeds_BPE.expand(2, -1, -1))
    fake, real = draw(1), draw(2) + 1
    optimiser = torch.optim.AdamW(judge.heads.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = part.critic_loss(fake, real, noise, condition, draw(3))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    x = fake.clone().requires_grad_(True)
    before = part.student_loss(x, real, noise, condition)
    before.backward()
    with torch.no_grad():
        after = part.student_loss(x - 0.5 * x.grad / x.grad.abs().max(), real, noise, condition)
    assert after < before


def test_a_logit_depends_on_clip_time_and_prompt() -> None:
    judge = discriminator(sees_time=True)
    condition = Conditioning(random_text().prompt_embeds_BPE.expand(2, -1, -1))
    other = Conditioning(random_text(seed=5).prompt_embeds_BPE.expand(2, -1, -1))
    actual = judge.logits(draw(0), torch.tensor([300.0, 300.0]), condition)
    assert actual.shape == (2,)
    assert not torch.equal(judge.logits(draw(1), torch.tensor([300.0, 300.0]), condition), actual)
    assert not torch.equal(judge.logits(draw(0), torch.tensor([500.0, 300.0]), condition)[0], actual[0])
    assert not torch.equal(judge.logits(draw(0), torch.tensor([300.0, 300.0]), other), actual)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["lora_rank=2"],
        ["gan_relativistic=true", "gan_r1=1", "gan_r2=1", "gan_time=true", "critic_warmup=1", "critic_per_student=1"],
    ],
)
def test_adversarial_training_takes_steps_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, more: list[str]
) -> None:
    settings = run_settings(tmp_path)
    data = write_database(tmp_path / "clips")
    options = [*settings, *more, "score=gan", f"data={data}", "micro_batch=3", "max_steps=2"]
    assert main([*options, f"logdir={tmp_path / 'run'}"]) == 0
    rows = numbers(tmp_path / "run")
    assert ("student_loss" in rows[0]) != ("critic_warmup=1" in more)
    assert all(row["critic_grad_norm"] > 0 for row in rows)
    for steps in (1, 2):
        halves = [*options, f"max_steps={steps}", "save_every=1", f"logdir={tmp_path / 'halves'}"]
        assert main(halves) == 0
    assert numbers(tmp_path / "halves") == rows
