"""Adapters: several roles on one frozen network, and what they export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfforcing_core.weights.checkpoint import read_checkpoint
from tests.support.tiny_wan import FRAME, random_text, random_wan
from tests.support.training import numbers, run, run_settings
from train.dmd import main
from train.export import ExportArgs, export
from train.export import main as export_main
from train.lora import PART, Adapted, adapt, merged, recompute_as, starts

ROLES = ("student", "critic")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Student, critic and teacher from one file, with adapters of rank 2."""
    actual = run_settings(tmp_path_factory.mktemp("networks"))
    teacher = actual[1].removeprefix("teacher=")
    return [*actual, f"student={teacher}", "lora_rank=2", "ema_start=0"]


def adapted(*, is_random: bool) -> tuple[torch.nn.Module, dict[str | None, Adapted]]:
    network = random_wan()
    switch = adapt(network, ROLES, rank=2, alpha=3.0, dtype=torch.float64)
    network.checkpoint_blocks(context_fn=recompute_as(switch))
    values = starts({name: value.shape for name, value in network.named_parameters()}, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if PART in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn if is_random else values[name])
                parameter.requires_grad_(True)
    return network, {role: Adapted(network, switch, role) for role in (*ROLES, None)}


def evaluate(network: object) -> torch.Tensor:
    noisy = torch.randn(1, 2, *FRAME, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return network(noisy, torch.full((1, 2), 500.0), random_text().prompt_embeds_BPE)  # type: ignore[operator]


def test_adapters_at_their_start_and_switched_off_are_bit_exact_with_the_base() -> None:
    expected = evaluate(random_wan())
    _, views = adapted(is_random=False)
    assert all(torch.equal(evaluate(view), expected) for view in views.values())
    _, views = adapted(is_random=True)
    assert torch.equal(evaluate(views[None]), expected)
    student, critic = evaluate(views["student"]), evaluate(views["critic"])
    assert (student - expected).abs().max() > 1e-3
    assert (student - critic).abs().max() > 1e-3


def test_merged_weights_are_the_adapted_network() -> None:
    network, views = adapted(is_random=True)
    own = {name: value for name, value in network.named_parameters() if f"{PART}student." in name}
    plain = random_wan()
    base = plain.state_dict()
    plain.load_state_dict({name: value.detach() for name, value in merged(base, own, 3.0 / 2).items()})
    torch.testing.assert_close(evaluate(plain), evaluate(views["student"]), rtol=1e-5, atol=1e-5)


def test_gradients_belong_to_the_role_that_was_evaluated() -> None:
    """Although by the backward pass, which evaluates every block again, another role is switched on."""
    network, views = adapted(is_random=True)
    result = evaluate(views["student"])
    views["critic"].switch.role = "critic"
    result.square().mean().backward()
    actual = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    assert actual
    assert all(f"{PART}student." in name for name in actual)
    views["critic"].switch.role = None
    index = next(name for name in actual if name.endswith("ffn.0.lora.student.up"))
    parameter, step = dict(network.named_parameters())[index], 1e-6
    with torch.no_grad():
        parameter[0, 0] += step
        above = evaluate(views["student"]).square().mean()
        parameter[0, 0] -= 2 * step
        below = evaluate(views["student"]).square().mean()
    torch.testing.assert_close(actual[index][0, 0], (above - below) / (2 * step), rtol=1e-5, atol=1e-9)


def test_first_values_depend_on_the_name_alone() -> None:
    shapes = {"a.lora.student.down": torch.Size([2, 4]), "a.lora.student.up": torch.Size([4, 2]), "a.weight": (4, 4)}
    actual = starts(shapes, seed=0)
    assert set(actual) == {"a.lora.student.down", "a.lora.student.up"}
    assert not actual["a.lora.student.up"].any()
    assert torch.equal(
        starts({"a.lora.student.down": (2, 4)}, seed=0)["a.lora.student.down"], actual["a.lora.student.down"]
    )
    assert not torch.equal(starts(shapes, seed=1)["a.lora.student.down"], actual["a.lora.student.down"])


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*settings, "micro_batch=6", f"logdir={folder}"]) == 0
    return folder


def test_a_shared_base_gives_what_separate_networks_give(settings: list[str], whole: Path, tmp_path: Path) -> None:
    """The first step, in which all adapters are still zero, has the losses of whole networks."""
    assert main([*settings, "lora_rank=0", "micro_batch=6", "max_steps=1", f"logdir={tmp_path / 'run'}"]) == 0
    (expected,), actual = numbers(tmp_path / "run"), numbers(whole)[0]
    assert actual["student_loss"] == pytest.approx(expected["student_loss"], rel=1e-12)
    assert actual["critic_loss"] == pytest.approx(expected["critic_loss"], rel=1e-3)  # after the student's update


def test_numbers_do_not_depend_on_processes(settings: list[str], whole: Path, tmp_path: Path) -> None:
    run([*settings, "micro_batch=1", f"logdir={tmp_path / 'two'}"], 2)
    for actual, expected in zip(numbers(tmp_path / "two"), numbers(whole), strict=True):
        assert actual == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_a_run_goes_on_bit_exactly(settings: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "halves"
    for steps in (2, 4):
        assert main([*settings, "micro_batch=6", f"max_steps={steps}", f"logdir={folder}"]) == 0
    assert numbers(folder) == numbers(whole)


def test_the_export_is_whole_or_a_lora(settings: list[str], whole: Path, tmp_path: Path) -> None:
    files = {form: tmp_path / f"{form}.safetensors" for form in ("whole", "lora")}
    for form, out in files.items():
        export(ExportArgs(logdir=str(whole), out=str(out), form=form, weights="raw", dtype="float32"))
    base = read_checkpoint(Path(settings[-3].removeprefix("student="))).state_dict
    result, lora = read_checkpoint(files["whole"]).state_dict, load_file(files["lora"])
    layer = "blocks.1.ffn.2"
    named = {part: lora[f"diffusion_model.{layer}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert float(named["alpha"]) == 2.0
    change = named["lora_up.weight"] @ named["lora_down.weight"]
    assert change.any()
    torch.testing.assert_close(result[f"{layer}.weight"], base[f"{layer}.weight"] + change)
    assert torch.equal(result["head.head.weight"], base["head.head.weight"])


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main([f"logdir={tmp_path}", "out=x.safetensors"]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("student: x\n", encoding="utf-8")
    assert export_main([f"logdir={tmp_path}", "out=x.safetensors", "form=lora"]) == 2
    assert "trained whole networks" in capsys.readouterr().err
    assert export_main([f"logdir={tmp_path}", "out=x.safetensors", "form=tall"]) == 2
    assert "use one of whole, lora" in capsys.readouterr().err
