"""What an update takes at least: closed forms against the operators of real ones, and what the log says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import flop_registry

from selfforcing_core.attention import attention_kernel
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import WanConfig
from selfforcing_core.roofline.device import Card
from selfforcing_core.roofline.work import Work, pass_work
from tests.support.operators import EveryOperator
from tests.support.training import write_network
from train import distributed, engine, update_cost
from train.args import DiffusionArgs, DmdArgs, OdeArgs, parse
from train.data import DatabaseWriter
from train.diffusion import FlowMatching
from train.dmd import Distillation, main
from train.ode import Regression
from train.update_cost import Network, clip_work, distillation_work, reached

# Six blocks and 64 tokens per frame, so that what is not counted (time embedding, a discriminator's heads) is little.
SIZES: dict[str, Any] = {
    "dim": 64,
    "ffn_dim": 256,
    "num_heads": 2,
    "num_layers": 6,
    "text_dim": 32,
    "text_len": 8,
    "freq_dim": 32,
}
CONFIG = WanConfig(**SIZES)
KEPT = "activation_checkpointing=false"


class NoText:
    """In place of a text encoder, whose operators are no part of an update."""

    def condition(self, texts: list[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(texts), CONFIG.text_len, CONFIG.text_dim))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("student", "teacher")):
        write_network(result / f"{name}.safetensors", seed, **SIZES)
    (result / "prompts.txt").write_text("a\nb\n", encoding="utf-8")
    writer = DatabaseWriter(result / "clips")
    for name in "abcd":
        writer.add(name, torch.zeros(3, 6, 16, 16, 16))
    writer.close()
    return result


@pytest.fixture
def world() -> Iterator[distributed.World]:
    yield distributed.join("cpu")
    dist.destroy_process_group()


class Operators(EveryOperator):
    """Counts by torch's own formulas, without the books per module of its FlopCounterMode, which cost twice the run."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def check(trainer: Any, rel: float) -> None:
    trainer.prompts = NoText()
    for role in trainer.roles:
        with attention_kernel("math"), Operators() as counter:
            trainer.accumulate(role)
        assert trainer.work(role).flops == pytest.approx(counter.flops, rel=rel), role


@pytest.mark.parametrize(
    ("more", "rel"),
    [
        ([KEPT], 0.001),
        (["exit_per_chunk=true", "guidance=1"], 0.005),
        (["score=sid"], 0.005),
        (["score=gan", "gan_r1=1", "gan_relativistic=true"], 0.02),
        (["chunk=0"], 0.005),
        (["window=4"], 0.01),
        (["lora_rank=8", KEPT], 0.01),
        (["lora_rank=8", "score=sid"], 0.01),
        (["latent_frames=7", "independent_first_frame=true", "last_step_only=true", "guidance_critic=2"], 0.005),
        (["latent_frames=7", "independent_first_frame=true", "first_frame=clips"], 0.005),
    ],
)
def test_flops_of_a_distillation_are_those_of_its_operators(
    folder: Path, world: distributed.World, more: list[str], rel: float
) -> None:
    """In the step that is asked about, whichever evaluations its chunks end at."""
    source = f"data={folder}/clips" if {"score=gan", "first_frame=clips"} & {*more} else f"prompts={folder}/prompts.txt"
    settings = [
        *(f"student={folder}/student.safetensors", f"teacher={folder}/teacher.safetensors", source, "dtype=float32"),
        *("width=128", "height=128", "latent_frames=6", "chunk=2", "steps=[1000,500]", "batch_size=2", "micro_batch=2"),
        *more,
    ]
    check(Distillation(parse(DmdArgs, settings), world), rel)


@pytest.mark.parametrize(
    ("kind", "make", "more"),
    [
        (DiffusionArgs, FlowMatching, [KEPT]),
        (DiffusionArgs, FlowMatching, ["lora_rank=8"]),
        (DiffusionArgs, FlowMatching, ["forcing=diffusion"]),
        (DiffusionArgs, FlowMatching, ["forcing=none", "chunk=0"]),
        (OdeArgs, Regression, ["timesteps=[1000,500,0]"]),
    ],
)
def test_flops_of_the_stages_before_are_those_of_their_operators(
    folder: Path, world: distributed.World, kind: Any, make: Any, more: list[str]
) -> None:
    """Sizes are those of the database, not those that the plan would take."""
    settings = [
        *(f"network={folder}/student.safetensors", f"data={folder}/clips", "chunk=2", "batch_size=2", "micro_batch=2"),
        *("dtype=float32", *more),
    ]
    check(make(parse(kind, settings), world), 0.01)


# ------------------------------------------------------------------ traffic --
def test_traffic_of_a_clip_is_that_of_its_passes_and_of_the_optimiser() -> None:
    """Of one clip of T frames: a pass and its backward pass, in bfloat16, and AdamW in float32."""
    args = parse(OdeArgs, ["batch_size=2", "micro_batch=1", KEPT])
    once, prompt = pass_work(CONFIG, 384, 384), Network(args, CONFIG).prompt()
    actual = clip_work(args, CONFIG, (6, 16, 16, 16))
    assert actual.linear_bytes == 2 * 3 * (once.linear_bytes + prompt.linear_bytes)
    assert actual.attention_bytes == 2 * 3 * once.attention_bytes
    optimiser = update_cost.OPTIMISER_MOVES * 4 * update_cost.parameters(CONFIG)
    passes = once.elementwise_bytes * (1 + update_cost.BACKWARD_MOVES / 21)
    assert actual.elementwise_bytes == pytest.approx(2 * passes + optimiser)
    copied = clip_work(args, CONFIG, (6, 16, 16, 16), copies=3)
    assert copied.elementwise_bytes == pytest.approx(2 * passes + 3 * optimiser)
    args.dtype = "float32"
    assert clip_work(args, CONFIG, (6, 16, 16, 16)).attention_bytes == 2 * actual.attention_bytes


def test_weights_are_read_once_by_all_clips_of_a_part() -> None:
    one, both = (
        clip_work(parse(OdeArgs, ["batch_size=2", f"micro_batch={count}"]), CONFIG, (6, 16, 16, 16)) for count in (1, 2)
    )
    assert one.flops == both.flops
    assert one.attention_bytes == both.attention_bytes
    weights = 6 * (6 * 64**2 + 2 * 64 * 256 + 6 * 64) + (32 + 64) * 64 + 2 * 64**2 * 6
    assert one.linear_bytes - both.linear_bytes == 2 * 4 * weights  # a pass, the same again, and twice backward


def test_a_plan_takes_the_mean_of_what_a_run_draws() -> None:
    """Over evaluations, in which the work is a straight line, and over the lengths of long rollouts."""
    settings = ["latent_frames=6", "chunk=2", "width=128", "height=128", "steps=[1000,500]"]
    configs: dict[str, WanConfig] = {"student": CONFIG, "teacher": CONFIG, "critic": CONFIG}
    args = parse(DmdArgs, settings)
    drawn = [distillation_work(args, "student", configs, [count] * 3).flops for count in (1, 2)]
    assert distillation_work(args, "student", configs).flops == pytest.approx(sum(drawn) / 2)
    args = parse(DmdArgs, [*settings, "first_chunk_steps=[1000,750,500]"])
    drawn = [distillation_work(args, "student", configs, [first, 1.5, 1.5]).flops for first in (1, 2, 3)]
    assert distillation_work(args, "student", configs).flops == pytest.approx(sum(drawn) / 3)
    args = parse(DmdArgs, [*settings, "max_latent_frames=8"])
    drawn = [distillation_work(args, "student", configs, [1.5] * chunks).flops for chunks in (3, 4)]
    assert distillation_work(args, "student", configs).flops == pytest.approx(sum(drawn) / 2)


# -------------------------------------------------------------------- meter --
def test_work_at_the_limit_has_all_of_it() -> None:
    card = Card(100.0, 10.0, 1.0, 1.0)
    done = Work(linear_flops=1000, attention_bytes=50, elementwise_bytes=50)
    assert reached(done, card, 20)["share_of_limit"] == 1
    assert reached(done, card, 40) == {
        "time_by_group/linears": 0.25,
        "time_by_group/attention": 0.125,
        "time_by_group/elementwise": 0.125,
        "time_by_group/above_limit": 0.5,
        "share_of_limit": 0.5,
    }


def test_a_run_logs_what_share_of_the_limit_it_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its division by group, in every step; beside the bar stands the share alone."""
    monkeypatch.setattr(engine, "measured_card", lambda device, dtype: Card(1e12, 1e11, 1.0, 1.0))
    assert main(["config=debug_cpu", "max_steps=2", "save_every=0", f"logdir={tmp_path}"]) == 0
    both, critic = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    for row in (both, critic):
        assert 0 < row["share_of_limit"] <= 1
        groups = [value for name, value in row.items() if name.startswith("time_by_group/")]
        assert len(groups) == 4
        assert sum(groups) == pytest.approx(1)
    durations = [row["share_of_limit"] * row["seconds"] for row in (both, critic)]
    assert durations[0] > 1.5 * durations[1], "the second step has no update of the student"
    bar = capfd.readouterr().err
    assert "share_of_limit=" in bar
    assert "time_by_group" not in bar
