"""A run learns from all that it is given, and stops by name where it would learn nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from selfforcing_core import model
from selfforcing_core.codecs.wan_vae import WanVAE, new_network
from selfforcing_core.config import WanConfig
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from tests.support.forks import finish, ranks
from tests.support.operators import EveryOperator
from tests.support.training import numbers, run_settings, write_database, write_network
from train import check_data, diffusion, distributed, dmd, finite, ode
from train.args import DiffusionArgs, DmdArgs, OdeArgs, parse
from train.conditions import Prompts
from train.data import ClipDatabase, DatabaseWriter, ShuffledRows
from train.dry_supply import DrySupply
from train.randomness import Draws, item, key_of

SHAPE = (4, 16, 4, 4)  # of the rows of `write_database`


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*run_settings(tmp_path_factory.mktemp("networks")), "micro_batch=6"]


@pytest.fixture
def alone() -> Iterator[distributed.World]:
    yield distributed.join("cpu")
    dist.destroy_process_group()


def clip_settings(settings: list[str], data: Path) -> list[str]:
    """Those of a stage on clips."""
    shared = ("text_encoder", "chunk", "batch_size", "micro_batch", "ema", "dtype", "tensorboard", "device")
    kept = [entry for entry in settings if entry.startswith(shared)]
    return [*kept, settings[0].replace("student=", "network="), f"data={data}", "lr=1e-3", "max_steps=2"]


def write_rows(folder: Path, count: int, bad: tuple[int, ...] = (), states: int = 0) -> Path:
    """Clips, of which some hold a NaN."""
    writer, generator = DatabaseWriter(folder), torch.Generator().manual_seed(0)
    for number in range(count):
        latents = torch.randn(*((states,) if states else ()), *SHAPE, generator=generator)
        if number in bad:
            latents.view(-1)[7] = float("nan")
        writer.add(f"clip {number}", latents)
    writer.close()
    return folder


# ------------------------------------------------------------------ devices --
COPIES = ("aten::copy_", "aten::_to_copy")


class OneDevice(EveryOperator):
    """As an accelerator, which torch's "meta" is not quite: an operator with tensors of two devices raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(devices) < 2 or func.name() in COPIES, f"{func} takes tensors on {devices}"
        return func(*args, **(kwargs or {}))


def unsharded(network: Any, *_: Any) -> Any:
    network.set_requires_gradient_sync = lambda _: None
    return network


STAGES: list[tuple[type[Any], list[str]]] = [
    *((DmdArgs, more) for more in (
        [], ["score_levels=table", "train_context_sigma=last_table"], ["score=sid", "score_levels=table"],
        ["score=gan"], ["score=gan", "gan_relativistic=true", "gan_r1=1", "gan_r2=1", "gan_time=true"],
        ["max_latent_frames=6", "vae=x"], ["window=4", "sink=1"], ["cache_source=last_step", "exit_per_chunk=true"],
        ["chunk=0"], ["lora_rank=2"], ["activation_checkpointing=true"], ["size=i2v", "chunk=0"],
    )),
    *((OdeArgs, more) for more in (
        [], ["levels=table"], ["first_frame_clean=true", "window=4"], ["lora_rank=2"], ["activation_checkpointing=true"]
    )),
    *((DiffusionArgs, more) for more in (
        [], ["forcing=diffusion", "window=2"], ["forcing=none", "chunk=0"], ["lora_rank=2"],
        ["activation_checkpointing=true"],
    )),
]  # fmt: skip


STAGE_OF = {DmdArgs: dmd.Distillation, DiffusionArgs: diffusion.FlowMatching, OdeArgs: ode.Regression}


@pytest.mark.parametrize(
    ("kind", "more"),
    STAGES,
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "plain",
)
def test_every_loss_of_every_stage_stays_on_the_networks_device(
    kind: type[Any], more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every tensor that reaches attention lies there: masks, cache and conditions with it."""
    # one layer, as all are alike; a discriminator reads the second
    layers = 2 if "score=gan" in more else 1
    small = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 16, "text_len": 5, "freq_dim": 32}
    sizes = {"tiny": WanConfig(**small), "i2v": WanConfig(**small, in_dim=36, model_type="i2v")}  # type: ignore[arg-type]
    monkeypatch.setattr("train.dry_supply.config_of", sizes.__getitem__)
    monkeypatch.setattr(distributed, "shard", unsharded)
    attended: set[str] = set()
    attend = model.attend

    def spied(*tensors: Tensor | None) -> Tensor:
        attended.update(tensor.device.type for tensor in tensors if tensor is not None)
        return attend(*tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "attend", spied)
    words = [
        *("size=tiny", "width=32", "height=32", "latent_frames=4", "chunk=2", "batch_size=2", "micro_batch=2"),
        *("dtype=float32", "activation_checkpointing=false", *more),
    ]
    args, device = parse(kind, words), torch.device("meta")
    world = distributed.World(0, 1, device, None, None)  # type: ignore[arg-type]
    supply: Any = DrySupply(args, world, layers)
    supply.draws = lambda step, purpose: Draws(args.seed, step, purpose)
    if "vae=x" in more:
        supply.vae = lambda: WanVAE(new_network(8, 1).to(device))  # type: ignore[arg-type]
    trainer: Any = STAGE_OF[kind](args, world, supply)
    for role, state in trainer.roles.items():
        while "vae=x" in more and 2 * len(trainer.exits(trainer.draws(role))) == args.latent_frames:
            trainer.step += 1  # to a clip that is longer than the window
        with OneDevice():
            total = trainer.accumulate(role)
        assert total.device == device
        assert trainer.finite.counts(device).shape == (len(finite.PARTS),)
        gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
        assert gradients
        assert all(gradient.device == device for gradient in gradients)
    assert attended == {"meta"}
    assert set(trainer.roles) == ({"student", "critic"} if kind is DmdArgs else {"student"})


# --------------------------------------------------------------- not finite --
def broken(path: Path, seed: int) -> Path:
    """A network that predicts NaN."""
    write_network(path, seed)
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint.config, WanConfig)
    weights = {name: tensor.clone() for name, tensor in checkpoint.state_dict.items()}
    weights["head.head.bias"][0] = float("inf")
    path.unlink()
    save_checkpoint(path, weights, checkpoint.config)
    return path


@pytest.mark.parametrize(
    ("role", "score"), [("teacher", "dmd"), ("critic", "dmd"), ("student", "dmd"), ("teacher", "sid")]
)
def test_a_network_that_says_nan_stops_the_update_by_name(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, score: str
) -> None:
    """Though the loss, as in the reference, would be 0 with gradient 0."""
    network = broken(tmp_path / "broken.safetensors", 1)
    options = [*settings, f"score={score}", f"{role}={network}", f"logdir={tmp_path / 'run'}"]
    if role == "teacher":
        options.append(settings[1].replace("teacher=", "critic="))
    assert dmd.main(options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.dmd:")]
    words = "own prediction" if role == "student" else "prediction"
    assert f"the {role}'s {words} holds NaN or Inf, in step 1 (the student's update)" in line
    assert "the last good checkpoint is the start" in line
    assert "same command comes to the same numbers again" in line
    assert not (tmp_path / "run/log.jsonl").is_file()


def test_nothing_is_applied_of_an_update_that_stops(settings: list[str], alone: distributed.World) -> None:
    trainer = dmd.Distillation(parse(DmdArgs, settings), alone)
    before = {name: value.detach().clone() for name, value in trainer.roles["student"].parameters.items()}
    teacher = trainer.built["teacher"].module
    with torch.no_grad():
        next(teacher.parameters()).to_local().fill_(float("nan"))
    with pytest.raises(ValueError, match="the teacher's prediction holds NaN or Inf"):
        trainer.update("student")
    assert all(torch.equal(value, before[name]) for name, value in trainer.roles["student"].parameters.items())
    trainer.update("critic")  # which the teacher does not see


def test_clip_stages_and_adversarial_ones_stop_by_name_too(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, network = write_rows(tmp_path / "clips", 7), broken(tmp_path / "broken.safetensors", 1)
    options = [*clip_settings(settings, data), f"network={network}", f"logdir={tmp_path / 'run'}"]
    assert diffusion.main(options) == 2
    assert "the student's own prediction holds NaN or Inf" in capsys.readouterr().err
    gan = [*settings, "score=gan", f"data={data}", f"critic={network}", f"logdir={tmp_path / 'gan'}"]
    assert dmd.main(gan) == 2
    assert "the critic's prediction holds NaN or Inf" in capsys.readouterr().err


def test_a_prompt_whose_embeddings_are_nan_is_named(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Prompts._encode

    def spoilt(self: Prompts, text: str) -> Tensor:
        return encode(self, text) * (float("nan") if "circle" in text else 1)

    monkeypatch.setattr(Prompts, "_encode", spoilt)
    assert dmd.main([*settings, f"logdir={tmp_path / 'run'}"]) == 2
    stderr = capsys.readouterr().err
    assert "the embeddings of a prompt hold NaN or Inf ('a green circle'), in step 1" in stderr
    assert "prediction" not in stderr, "what follows from it is not told"


def test_an_error_begins_a_line_and_the_losses_are_shown(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "clips", 12, bad=(1,))
    sizes = ["critic_per_student=2", "batch_size=2", "micro_batch=2", "max_steps=40", "save_every=1"]
    run = [*settings, *sizes, f"data={data}", f"logdir={tmp_path / 'run'}"]
    assert dmd.main(run) == 2
    stderr = capsys.readouterr().err
    lines = stderr.replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "train.dmd:" in line]
    assert line.startswith("train.dmd:")
    assert stderr.endswith("\n")
    assert "cannot be used" in line
    assert "row 1 ('clip 1')" in line
    assert "train.check_data" in line
    assert "skip_bad_rows=true" in line
    good = numbers(tmp_path / "run")
    named = re.findall(r"/checkpoints/step_(\d+)", line)
    assert len(named) == 1
    assert 0 < int(named[0]) <= len(good)
    assert (tmp_path / f"run/checkpoints/step_{named[0]}").is_dir()
    bars = [line for line in lines if "_loss=" in line]
    assert bars
    assert all("student_loss=" in bar and "critic_loss=" in bar for bar in bars)


def test_a_bad_row_of_one_process_stops_all_of_them(settings: list[str], tmp_path: Path) -> None:
    count = 12
    bad = item(0, 3, count)  # the student's first batch is 0 to 5, of which the second process has the latter half
    data = write_rows(tmp_path / "clips", count, bad=(bad,))
    words = [*settings, "micro_batch=3", f"data={data}", f"logdir={tmp_path / 'run'}"]
    programs, store = ranks("train.dmd", words, tmp_path, 2)
    statuses, outputs = finish(programs, tmp_path, timeout=120)
    del store
    errors = "".join(outputs)
    assert all(statuses)
    assert errors.count("train.dmd: a row of the database cannot be used") == 1
    assert f"row {bad} ('clip {bad}')" in errors, "whichever process says it"
    assert "a process of the run is lost" not in errors
    assert "Traceback" not in errors


# -------------------------------------------------------------------- order --
def consumed(args: DmdArgs, updates: int) -> list[int]:
    """Numbers of the clips of this many updates."""
    actual: list[int] = []
    step = 0
    while len(actual) < updates * args.batch_size:
        roles = [*(["student"] if dmd.trains_student(args, step) else []), "critic"]
        for role in roles:
            first = dmd.first_number(args, step, role)
            actual += range(first, first + args.batch_size)
        step += 1
    return actual


@pytest.mark.parametrize(("every", "warmup"), [(5, 0), (1, 0), (5, 7), (3, 6), (2, 1)])
def test_each_prompt_is_seen_once_per_round(every: int, warmup: int) -> None:
    args = parse(DmdArgs, [f"critic_per_student={every}", f"critic_warmup={warmup}", "batch_size=64"])
    log = consumed(args, 60)
    assert log == list(range(len(log))), "no number is left out, and none comes twice"
    for first in range(0, 3000, 1000):
        assert len({item(3, number, 1000) for number in log[first : first + 1000]}) == 1000
    if every == 1 and not warmup:  # as in earlier versions
        assert [dmd.first_number(args, step, "critic") for step in range(3)] == [64, 192, 320]


def test_a_run_takes_each_prompt_once_per_round(
    settings: list[str], alone: distributed.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part by part and on any number of processes: the numbers are asked for, not counted along."""
    args = parse(DmdArgs, [*settings, "critic_per_student=3", "micro_batch=2"])
    trainer = dmd.Distillation(args, alone)
    asked: list[int] = []
    rows = trainer.rows
    monkeypatch.setattr(trainer, "rows", lambda numbers: asked.extend(numbers) or rows(numbers))
    for _ in range(4):
        trainer.run_step()
    assert asked == list(range(6 * 6))


def test_the_order_of_a_round_is_a_permutation_and_made_once() -> None:
    count = 200_000
    started = time.perf_counter()
    first = [item(5, number, count) for number in range(1000)]
    assert time.perf_counter() - started < 2, "0.04 s for each of them otherwise"
    order = torch.randperm(count, generator=torch.Generator().manual_seed(key_of(5, "order", 0)))
    assert first == order[:1000].tolist(), "as in earlier versions"
    small = [item(5, number, 31) for number in range(62)]
    assert sorted(small[:31]) == sorted(small[31:]) == list(range(31))
    assert small[:31] != small[31:]


# --------------------------------------------------------------------- rows --
def test_bad_rows_are_replaced_alike_wherever_they_are_read(tmp_path: Path) -> None:
    data = ClipDatabase(write_rows(tmp_path / "clips", 9, bad=(2, 3, 8)))
    rows = ShuffledRows(data, 0)
    whole = [row.prompt for row in rows.take(range(27))]
    assert len(rows.bad) == 3 * 3
    assert all(f"row {n}" in " ".join(rows.bad) for n in (2, 3, 8))
    assert not {"clip 2", "clip 3", "clip 8"} & set(whole)
    for first in range(0, 27, 9):
        assert len(set(whole[first : first + 9])) == 6, "the good ones of each round are all seen"
    again = ShuffledRows(data, 0)
    assert [again.take([number])[0].prompt for number in reversed(range(27))] == whole[::-1]
    with pytest.raises(ValueError, match="no row can be used"):
        ShuffledRows(ClipDatabase(write_rows(tmp_path / "all", 2, bad=(0, 1))), 0).take([0])


@pytest.mark.parametrize("stage", ["dmd", "diffusion"])
def test_bad_rows_are_skipped_and_counted_on_demand(
    settings: list[str], tmp_path: Path, alone: distributed.World, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """Alike in one run, and in one that goes on in parts; the first row, of which sizes are asked, may be bad."""
    data = write_rows(tmp_path / "clips", 9, bad=(0, 4))
    options = [*settings, f"data={data}"] if stage == "dmd" else clip_settings(settings, data)
    options += ["skip_bad_rows=true", f"logdir={tmp_path}"]

    def trained(steps: list[int], *more: str) -> list[dict[str, float]]:
        kind, make = (DmdArgs, dmd.Distillation) if stage == "dmd" else (DiffusionArgs, diffusion.FlowMatching)
        trainer: Any = make(parse(kind, [*options, *more]), alone)  # type: ignore[arg-type]
        rows = []
        for trainer.step in steps:
            rows.append(trainer.run_step())
        return rows

    rows = trained([0, 1])
    counts = [value for row in rows for name, value in row.items() if name.endswith("rows_replaced")]
    numbered = range(6 * (2 if stage == "diffusion" else 3))
    assert sum(counts) == sum(item(0, number, 9) in (0, 4) for number in numbered) > 0
    assert "cannot be used" in caplog.text
    assert "train.check_data" in caplog.text
    (later,) = trained([1], "micro_batch=2")
    replaced = {name: value for name, value in rows[1].items() if name.endswith("rows_replaced")}
    assert replaced
    assert {name: later[name] for name in replaced} == replaced


def test_check_data_finds_what_a_run_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data.main([str(write_database(tmp_path / "good"))]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "rows": 7,
        "shape": [1, *SHAPE],
        "good": 7,
        "bad": {},
        "doubtful": {},
        "duplicate_prompts": 0,
        "with_image": 7,
    }
    folder = write_rows(tmp_path / "bad", 12, bad=(2,))
    with lmdb.open(str(folder), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        transaction.put(b"latents_3_data", b"short")
        transaction.delete(b"latents_4_data")
        transaction.delete(b"prompts_5_data")
        transaction.put(b"prompts_6_data", b"\xff\xfe\xff")
        zeros = torch.zeros(SHAPE, dtype=torch.float16)
        transaction.put(b"latents_7_data", zeros.numpy().tobytes())
        transaction.put(b"latents_8_data", (zeros + torch.arange(4.0) * 1000).half().numpy().tobytes())
        transaction.put(b"prompts_9_data", b" ")
        transaction.put(b"prompts_10_data", b"clip 0")
        transaction.put(b"latents_12_data", zeros.numpy().tobytes())
    assert check_data.main([str(folder)]) == 1
    captured = capsys.readouterr()
    counts = json.loads(captured.out)
    assert counts["bad"] == {"NaN or Inf": 1, "wrong size": 1, "no latents": 1, "no prompt": 1, "no text": 1}
    assert counts["doubtful"] == {"constant": 1, "huge": 1, "empty prompt": 1, "more rows": 1}
    assert (counts["rows"], counts["good"], counts["duplicate_prompts"]) == (12, 7, 1)
    assert check_data.main([str(tmp_path / "absent")]) == 2
    assert "holds no data.mdb" in capsys.readouterr().err


def test_a_database_that_is_cut_off_is_named(tmp_path: Path) -> None:
    """To read beyond the end of its file would end the process without a word."""
    writer = DatabaseWriter(tmp_path / "cut")
    for number in range(5):
        writer.add(f"clip {number}", torch.randn(21, 16, 30, 52))
    writer.close()
    file = tmp_path / "cut/data.mdb"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(ValueError, match="is cut off"):
        ClipDatabase(tmp_path / "cut")


# -------------------------------------------------------------------- sizes --
def test_sizes_that_must_agree_are_refused_before_the_first_step(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_database(tmp_path / "clips")
    other = write_network(tmp_path / "other.safetensors", 0, in_dim=4, out_dim=4)
    text = write_network(tmp_path / "text.safetensors", 0, text_dim=64)
    i2v = write_network(tmp_path / "i2v.safetensors", 0, in_dim=36, model_type="i2v")
    clips = clip_settings(settings, data)
    cases: list[tuple[Any, list[str], str]] = [
        (dmd, ["score=gan", f"data={data}", "height=48"], "4 latent frames of 32 x 32 pixels in 16 channels, but"),
        (dmd, ["score=gan", f"data={data}", "width=64"], "of 64 x 32 pixels"),
        (dmd, ["score=gan", f"data={data}", "latent_frames=6"], "6 latent frames"),
        (dmd, ["score=gan", f"data={data}", f"student={other}", f"teacher={other}"], "in 4 channels"),
        (dmd, [f"teacher={other}"], "'s in_dim is 4, the student's 16"),
        (dmd, [f"critic={i2v}"], "the critic's model_type is i2v"),
        (dmd, [f"student={text}", f"teacher={text}"], "embeddings of width 128, the network takes 64"),
        (dmd, ["critic_per_student=0"], "use 1 or more"),
        (diffusion, [f"network={other}"], "the network takes 4 channels"),
        (diffusion, ["chunk=3"], "4 latent frames is not a multiple of chunk 3"),
        (diffusion, [f"network={text}"], "embeddings of width 128, the network takes 64"),
    ]
    for number, (stage, more, words) in enumerate(cases):
        options = [*(settings if stage is dmd else clips), *more, f"logdir={tmp_path / str(number)}"]
        assert stage.main(options) == 2, more
        stderr = capsys.readouterr().err
        assert words in stderr, (more, stderr)
        assert not (tmp_path / str(number) / "log.jsonl").exists()


# --------------------------------------------------------------- regression --
def test_regression_averages_over_the_counted_frames_of_the_whole_batch(
    settings: list[str], tmp_path: Path, alone: distributed.World
) -> None:
    """In one part, in six parts, and by hand, with uneven counts: mean over the boolean selection."""
    data = write_rows(tmp_path / "ode", 7, states=3)
    options = [*clip_settings(settings, data), "timesteps=[1000,500,0]", "seed=1"]
    args = parse(OdeArgs, options)
    trainer = ode.Regression(args, alone)
    losses, gradients = [], []
    for size in (1, 6):
        args.micro_batch = size
        losses.append(trainer.accumulate("student"))
        parameters = trainer.roles["student"].parameters.values()
        gradients.append([value.grad.to_local().clone() for value in parameters])  # type: ignore[union-attr]
        trainer.roles["student"].optimiser.zero_grad()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    kept: dict[str, Tensor] = {}

    def by_hand(x0: Tensor, target: Tensor, counted_BT: Tensor, _: Tensor) -> Tensor:
        kept["counts"] = counted_BT.sum(1)
        return torch.nn.functional.mse_loss(x0[counted_BT], target[counted_BT])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.forcing.regression_loss", by_hand)
        expected = trainer.accumulate("student")
    assert len(kept["counts"].unique()) > 1, "this test is about uneven counts"
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("guidance=inf", "guidance inf is not a number from 0 on"),
        ("guidance_critic=-3", "guidance_critic -3.0 is not a number from 0 on"),
        ("score_shift=0", "score_shift 0.0 is not between 0.01 and 100"),
        ("lr=-1", "lr -1.0 is out of range; use 0 to"),
        ("ema_decay=2", "ema_decay 2.0 is out of range; use 0 to 1"),
        ("steps=[]", "steps is empty"),
    ],
)
def test_settings_that_teach_nothing_are_refused(settings: list[str], more: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        dmd.check(parse(DmdArgs, [*settings, "logdir=x", more]), 1)


def test_a_guided_prediction_that_overflows_stops_the_update(settings: list[str], alone: distributed.World) -> None:
    trainer = dmd.Distillation(parse(DmdArgs, [*settings, "guidance=1e308", "critic_per_student=1"]), alone)
    with pytest.raises(ValueError, match="a guided prediction holds NaN or Inf"):
        trainer.update("student")
