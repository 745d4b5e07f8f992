"""Settings of a distillation's rollout and of what it is compared under do what they say, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from selfforcing_core.codecs.image import fit_image
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import StepConfig
from selfforcing_core.noise import CONTEXT
from selfforcing_core.schedule import add_noise, sigma_table, x0_from_flow
from selfforcing_core.weights.checkpoint import read_checkpoint
from tests.support.training import run_settings, write_database, write_encoders
from train import distributed
from train.args import DmdArgs, OdeArgs, parse
from train.data import DatabaseWriter
from train.dmd import CRITIC, Distillation, context_sigma_of, main
from train.engine import STUDENT
from train.export import ExportArgs, export, sampled_as
from train.losses import dmd_gradient, dmd_loss, score_timesteps, sid_loss
from train.ode import Regression
from train.roles import DistributionMatching, ScoreDraw, score_bounds
from train.sample import SampleArgs, sample

FIRST = ["first_frame=clips", "independent_first_frame=true", "chunk=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    actual = [entry for entry in run_settings(folder) if not entry.startswith(("batch_size", "dtype"))]
    return [*actual, "batch_size=2", "dtype=float32", f"logdir={folder}/run"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """For one trainer: a process opens a database once."""
    return f"data={write_database(tmp_path / 'clips')}"


@pytest.fixture(scope="module")
def world() -> Iterator[distributed.World]:
    yield distributed.join("cpu")
    dist.destroy_process_group()


class Spy:
    """A network that remembers what it is called with and what it answers."""

    def __init__(self, network: Any) -> None:
        self.network, self.calls = network, []

    def __call__(self, x: Tensor, timesteps: Tensor, *rest: Any, **options: Any) -> Tensor:
        flow = self.network(x, timesteps, *rest, **options)
        self.calls.append((x.detach(), float(timesteps.flatten()[0]), flow.detach(), flow.requires_grad))
        return flow

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


class Compared:
    """In place of `DistributionMatching`: remembers what was to be compared."""

    def student_loss(
        self, x: Tensor, draw: ScoreDraw, positive: Any, negative: Any, counted: Any
    ) -> tuple[Tensor, Any]:
        self.x, self.draw, self.counted = x, draw, counted
        return x.sum(), None

    def critic_loss(self, x: Tensor, draw: ScoreDraw, condition: Any) -> Tensor:
        self.x, self.draw = x, draw
        return x.sum()


def compared(trainer: Distillation, role: str = STUDENT) -> Compared:
    """What the first clip of a step is compared by."""
    actual: Any = Compared()
    trainer.matching = actual
    trainer.loss(role, 0, 1)
    return actual


# ------------------------------------------------------------------- rollout --
def test_a_student_of_first_frames_is_trained_sampled_and_exported(
    settings: list[str], data: str, tmp_path: Path
) -> None:
    """First, since a run needs the process to itself, which the fixture `world` of the others holds on to."""
    more = [data, *FIRST, "max_steps=1", "save_every=1", "sample_every=1", "decoder=tiny", f"logdir={tmp_path / 'run'}"]
    assert main([*settings, *more, "context_noise=50"]) == 0
    assert len(list((tmp_path / "run/samples/step_000001").glob("*.mp4"))) == 4
    with pytest.raises(ValueError, match="give image=FILE"):
        sample(SampleArgs(logdir=str(tmp_path / "run"), taehv="tiny"))
    out = tmp_path / "student.safetensors"
    export(ExportArgs(logdir=str(tmp_path / "run"), out=str(out)))
    causal = read_checkpoint(out).causal
    assert causal is not None
    assert (causal.chunk, causal.independent_first_frame, causal.context_noise) == (3, True, 50.0)


def test_steps_end_and_context_are_as_set(settings: list[str], world: distributed.World) -> None:
    """Timesteps as listed without warp, chunks that always end at the last, and the noise that enters the cache."""
    more = ["steps=[900,300]", "warp=false", "last_step_only=true", "context_noise=100", "chunk=2"]
    trainer = Distillation(parse(DmdArgs, [*settings, *more]), world)
    spy = Spy(trainer.student.network)
    trainer.student = replace(trainer.student, network=spy)
    clip = compared(trainer).x
    assert [call[1] for call in spy.calls] == [900.0, 300.0, 100.0, 900.0, 300.0]
    assert [call[3] for call in spy.calls] == [False, True, False, False, True]
    noisy, _, flow, _ = spy.calls[1]
    x0 = x0_from_flow(noisy, flow, 0.3)
    torch.testing.assert_close(clip[:, :2], x0)
    noise = trainer.draws(STUDENT).noise(0).draw(0, CONTEXT, tuple(x0.shape))
    torch.testing.assert_close(spy.calls[2][0], add_noise(x0, noise, 0.1))
    warped = Distillation(parse(DmdArgs, [*settings, "steps=[900,300]"]), world)
    assert warped.student.steps == StepConfig((900.0, 300.0), shift=5.0)


def test_the_first_chunk_is_trained_on_its_own_steps(settings: list[str], world: distributed.World) -> None:
    """Its exit is drawn among them, and where clips are compared follows the exit that the others share."""
    more = ["steps=[1000,500]", "first_chunk_steps=[1000,750,500,250]", "chunk=2", "ts_schedule=true"]
    trainer = Distillation(parse(DmdArgs, [*settings, *more]), world)
    assert trainer.sampling().steps == StepConfig((1000.0, 500.0), first_chunk_steps=(1000.0, 750.0, 500.0, 250.0))
    assert sampled_as(trainer.args).steps == trainer.sampling().steps, "an export says it too"
    first, later = (1000.0, 937.5, 2500 / 3, 625.0), (1000.0, 2500 / 3)
    spy = Spy(trainer.student.network)
    trainer.student = replace(trainer.student, network=spy)
    drawn = set()
    for trainer.step in range(16):
        own, *others = trainer.exits(trainer.draws(STUDENT))
        spy.calls.clear()
        lowest = float(compared(trainer).draw.timesteps_B)
        assert len(set(others)) == 1
        passes = [*first[: own + 1], 0.0, *later[: others[0] + 1]]
        assert [call[1] for call in spy.calls] == pytest.approx(passes)
        assert lowest >= (later[1] if others[0] == 0 else 20) - 1e-3
        drawn.add((own, others[0]))
    assert {own for own, _ in drawn} == {0, 1, 2, 3}
    assert {other for _, other in drawn} == {0, 1}
    last = Distillation(parse(DmdArgs, [*settings, *more, "last_step_only=true"]), world)
    assert last.exits(last.draws(STUDENT)) == [3, 1]


def test_a_student_may_be_trained_with_a_last_step_of_0(settings: list[str], world: distributed.World) -> None:
    trainer = Distillation(parse(DmdArgs, [*settings, "steps=[1000,500,0]", "chunk=2", "last_step_only=true"]), world)
    spy = Spy(trainer.student.network)
    trainer.student = replace(trainer.student, network=spy)
    clip = compared(trainer).x
    noisy, timestep, flow, has_gradient = spy.calls[2]
    assert (timestep, has_gradient) == (0.0, True)
    torch.testing.assert_close(clip[:, :2], x0_from_flow(noisy, flow, float(sigma_table(5.0)[-1])))


def test_context_noise_is_the_tables_nearest_on_request() -> None:
    table = sigma_table(5.0)
    assert context_sigma_of(parse(DmdArgs, [])) == 0.0
    assert context_sigma_of(parse(DmdArgs, ["context_noise=250"])) == 0.25
    assert context_sigma_of(parse(DmdArgs, ["train_context_sigma=last_table"])) == float(table[-1])
    actual = context_sigma_of(parse(DmdArgs, ["train_context_sigma=last_table", "context_noise=250"]))
    assert actual == float(table[(table - 0.25).abs().argmin()])


def test_a_given_first_frame_is_the_rows_and_has_no_loss(
    settings: list[str], data: str, world: distributed.World
) -> None:
    """The scores see the whole clip; what is generated sees the frame through the cache."""
    trainer = Distillation(parse(DmdArgs, [*settings, data, *FIRST]), world)
    assert trainer.exits(trainer.draws(STUDENT)) == trainer.exits(trainer.draws(STUDENT))[:1]
    spy = Spy(trainer.student.network)
    trainer.student = replace(trainer.student, network=spy)
    actual = compared(trainer)
    first = trainer.rows(range(1))[0].states[-1][:1]
    assert actual.x.shape == (1, 4, 16, 4, 4)
    assert torch.equal(actual.x[0, :1], first)
    assert actual.counted.tolist() == [False, True, True, True]
    assert torch.equal(spy.calls[0][0][0], first)
    assert spy.calls[0][1] == 0.0, "a clean pass on the given frame alone"
    assert not spy.calls[0][3]
    actual.x[:, 1:].sum().backward()
    before = actual.x[:, 1:].detach()
    trainer.first_frames = lambda rows: torch.zeros(len(rows), 1, 16, 4, 4)  # type: ignore[method-assign]
    assert not torch.equal(compared(trainer).x[:, 1:], before)
    plain = Distillation(parse(DmdArgs, [*settings, "independent_first_frame=true", "chunk=3"]), world)
    assert len(plain.exits(plain.draws(STUDENT))) == 2, "the first frame is a chunk of its own"
    assert compared(plain).counted is None


def test_first_frames_come_from_pictures_too(
    settings: list[str], data: str, folder: Path, world: distributed.World
) -> None:
    vae, _ = write_encoders(folder)
    more = [data, *FIRST, "first_frame=pictures", f"vae={vae}"]
    trainer = Distillation(parse(DmdArgs, [*settings, *more]), world)
    rows = trainer.rows(range(2))
    assert trainer.vae is not None
    actual = trainer.first_frames(rows)
    assert actual is not None
    for row, latent in zip(rows, actual):
        assert row.image_RHW is not None
        picture = fit_image((row.image_RHW + 1) / 2, 32, 32)
        torch.testing.assert_close(latent[None], trainer.vae.encode(picture[None, None]))
    bare = DatabaseWriter(folder / "bare")
    bare.add("a", torch.zeros(4, 16, 4, 4))
    bare.close()
    without = Distillation(parse(DmdArgs, [*settings, *more, f"data={folder}/bare"]), world)
    with pytest.raises(ValueError, match="rows without pictures"):
        without.loss(STUDENT, 0, 1)


def test_long_rollouts_may_begin_with_a_given_frame(
    settings: list[str], data: str, folder: Path, world: distributed.World
) -> None:
    vae, _ = write_encoders(folder)
    trainer = Distillation(parse(DmdArgs, [*settings, data, *FIRST, "max_latent_frames=7", f"vae={vae}"]), world)
    trainer.frames = lambda draws: 7  # type: ignore[method-assign]
    assert len(trainer.exits(trainer.draws(STUDENT))) == 2
    actual = compared(trainer)
    assert actual.x.shape[1] == 4
    assert actual.counted.tolist() == [False, True, True, True], "the window's first frame is a re-encoded one"


def test_clips_that_are_sampled_begin_with_their_own_frames(
    settings: list[str], data: str, world: distributed.World
) -> None:
    trainer = Distillation(parse(DmdArgs, [*settings, data, *FIRST]), world)
    texts, conditions = trainer.examples(None)
    prefixes = trainer.sampling().prefixes
    assert len(texts) == len(conditions) == len(prefixes) == 4
    database = trainer.shuffled.data
    state = {row.prompt: row.states[-1][:1] for row in (database[index] for index in range(len(database)))}
    for text, prefix in zip(texts, prefixes):
        assert torch.equal(prefix[0], state[text])


# ------------------------------------------------------------------- scores --
def test_score_timesteps_follow_the_exit_step() -> None:
    """Numbers of the reference: exit 0 is between 1000 and 750, ..., 3 between 250 and 0, before the shift."""
    steps = StepConfig((1000.0, 750.0, 500.0, 250.0), shift=5.0)
    both = [score_bounds(steps, index, is_floored=True, is_capped=True) for index in range(4)]
    assert both == [pytest.approx(pair) for pair in ((750, 1000), (500, 750), (250, 500), (0, 250))]
    assert score_bounds(steps, 1, is_floored=True) == pytest.approx((500, 1000))
    assert score_bounds(steps, 1, lowest=100, is_capped=True) == pytest.approx((100, 750))
    assert score_bounds(steps, 1) == (0, 1000)
    raw = StepConfig((1000.0, 937.5, 625.0), shift=5.0, warp=False)  # as timesteps themselves
    assert score_bounds(raw, 1, is_floored=True, is_capped=True) == pytest.approx((250, 750))
    uniform = torch.linspace(0, 0.99, 34, dtype=torch.float64)
    assert torch.equal(score_timesteps(uniform, 5.0), score_timesteps(uniform, 5.0, bounds=(0.0, 1000.0)))
    actual = score_timesteps(torch.tensor([0.0, 0.04]).double(), 5.0, bounds=(250.0, 500.0))
    assert actual.tolist() == pytest.approx([625.0, 637.2549])  # 250 and 260, shifted


@pytest.mark.parametrize("role", [STUDENT, CRITIC])
def test_a_run_draws_score_timesteps_between_its_exit_step_and_the_next(
    settings: list[str], world: distributed.World, role: str
) -> None:
    trainer = Distillation(parse(DmdArgs, [*settings, "ts_schedule=true", "ts_schedule_max=true"]), world)
    warped = (1000.0, 937.5, 2500 / 3, 625.0, 0.0)
    exits = set()
    for trainer.step in range(12):
        exit_step = trainer.exits(trainer.draws(role))[0]
        timestep = float(compared(trainer, role).draw.timesteps_B)
        low, high = max(warped[exit_step + 1], 20), min(warped[exit_step], 980)
        assert low - 1e-3 <= timestep <= high + 1e-3
        exits.add(exit_step)
    assert len(exits) > 2
    high = Distillation(parse(DmdArgs, [*settings, "min_score_timestep=900", "score_shift=1"]), world)
    for high.step in range(4):
        assert 900 <= float(compared(high, role).draw.timesteps_B) <= 980


def test_teacher_and_critic_are_guided_by_scales_of_their_own() -> None:
    class Score:
        def __init__(self, with_prompt: float, without: float) -> None:
            self.answers = {1.0: with_prompt, 0.0: without}

        def x0(self, noisy: Tensor, timesteps: Tensor, condition: Conditioning) -> Tensor:
            return torch.full_like(noisy, self.answers[float(condition.prompt_embeds_BPE.max())])

    teacher: Any = Score(5.0, 2.0)
    critic: Any = Score(3.0, 1.0)
    matching = DistributionMatching(teacher, critic, guidance=4.0, critic_guidance=1.5)
    x = torch.zeros(1, 2, 1, 1, 1)
    draw = ScoreDraw(torch.tensor([500.0]), torch.zeros_like(x))
    conditions = [Conditioning(torch.full((1, 1, 1), value)) for value in (1.0, 0.0)]
    fake, real = matching.predictions(x, draw, *conditions)
    assert (float(fake.max()), float(real.max())) == (1 + 1.5 * 2, 2 + 4 * 3)
    fake, _ = replace(matching, critic_guidance=1.0).predictions(x, draw, *conditions)
    assert float(fake.max()) == 3.0


def test_losses_leave_out_frames_that_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    x, fake, real = (torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    counted = torch.tensor([False, True, True, True])
    x.requires_grad_(True)
    gradient = dmd_gradient(x.detach(), fake, real)
    dmd_loss(x, gradient, counted).backward()
    assert x.grad is not None
    assert not x.grad[:, 0].any()
    torch.testing.assert_close(x.grad[:, 1:], gradient[:, 1:] / (x.numel() * 3 / 4))
    size = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    error = (real - fake) * ((real - x) - (real - fake)) / size
    torch.testing.assert_close(sid_loss(x, fake, real, 1.0, counted), error[:, 1:].mean())
    torch.testing.assert_close(sid_loss(x, fake, real), error.mean())


# --------------------------------------------------------------- optimisers --
def test_the_critic_has_betas_and_a_norm_of_its_own(
    settings: list[str], world: distributed.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def betas(trainer: Distillation) -> dict[str, Any]:
        return {role: state.optimiser.param_groups[0]["betas"] for role, state in trainer.roles.items()}

    shared = Distillation(parse(DmdArgs, [*settings, "betas=[0.5,0.9]"]), world)
    assert betas(shared) == {STUDENT: (0.5, 0.9), CRITIC: (0.5, 0.9)}
    more = ["betas_critic=[0.1,0.99]", "max_grad_norm=7", "max_grad_norm_critic=0.001"]
    trainer = Distillation(parse(DmdArgs, [*settings, *more]), world)
    assert betas(trainer) == {STUDENT: (0.0, 0.999), CRITIC: (0.1, 0.99)}
    norms: list[float] = []
    cut = torch.nn.utils.clip_grad_norm_

    def spied(parameters: Any, max_norm: float, **options: Any) -> Tensor:
        norms.append(max_norm)
        return cut(parameters, max_norm, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spied)
    trainer.run_step()
    assert norms == [7.0, 0.001]


# ------------------------------------------------------------------ stages --
def test_regression_may_have_a_first_frame_of_its_own_and_an_end_that_is_only_the_target(
    settings: list[str], folder: Path, world: distributed.World
) -> None:
    writer, generator = DatabaseWriter(folder / "ode"), torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 16, 4, 4, generator=generator).half().float()
    writer.add("clip", states)
    writer.close()
    kept = [entry for entry in settings if entry.startswith(("text_encoder", "batch_size", "micro", "dtype", "logdir"))]
    more = [f"data={folder}/ode", settings[0].replace("student=", "network="), "chunk=3", "device=cpu"]
    args = parse(OdeArgs, [*kept, *more, "timesteps=[1000,500]", "independent_first_frame=true"])
    trainer = Regression(args, world)
    spy = Spy(trainer.roles[STUDENT].network)
    log = set()
    for trainer.step in range(8):
        trainer.loss_of(spy, trainer.rows(range(1)), trainer.prompts.condition(["clip"]), trainer.draws(STUDENT), 0)
        noisy = spy.calls[-1][0][0]
        actual = [next(i for i in range(3) if torch.equal(noisy[t], states[i, t])) for t in range(4)]
        assert actual[1:] == [actual[1]] * 3
        log.add((actual[0], actual[1]))
    assert {index for pair in log for index in pair} == {0, 1}, "never the end"
    assert any(first != rest for first, rest in log), "the first frame has a level of its own"
    assert trainer.sampling().causal.independent_first_frame
    trainer.args.timesteps = [1000.0, 0.0]
    with pytest.raises(ValueError, match="3 states, not 2"):
        trainer.check_rows(trainer.built[STUDENT].config)


# ------------------------------------------------------------------ mistakes --
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["first_frame=mine"], "use generated, clips, pictures"),
        (["first_frame=clips"], "independent_first_frame=true, or chunk=1"),
        (["first_frame=clips", "chunk=1"], "needs data="),
        (["first_frame=pictures", "chunk=1", "data=x"], "needs vae="),
        (["first_frame=clips", "chunk=1", "data=x", "sample_prompts=y"], "leave it out"),
        (["independent_first_frame=true"], "1 plus a multiple of chunk 2"),
        (["independent_first_frame=true", "chunk=0"], "chunk=0 has none"),
        (["context_noise=10", "chunk=0"], "chunk=0 has none"),
        (["context_noise=1000"], "not a timestep"),
        (["context_noise=10", "cache_source=last_step"], "context_noise has to be 0"),
        (["last_step_only=true", "exit_per_chunk=true"], "leave exit_per_chunk out"),
        (["ts_schedule=true", "exit_per_chunk=true"], "leave exit_per_chunk out"),
        (["ts_schedule=true", "min_score_timestep=10"], "leave min_score_timestep out"),
        (["ts_schedule_max=true", "min_score_timestep=250"], "not in [0, 250)"),
        (["min_score_timestep=-1"], "not in [0, 1000)"),
        (["first_chunk_steps=[250,500]"], "first_chunk_steps [250.0, 500.0] must fall"),
        (["first_chunk_steps=[1000]", "chunk=0"], "chunk=0 makes a clip one chunk"),
        (["first_chunk_steps=[1000]", "first_frame=clips", "chunk=1", "data=x"], "a given one does"),
        (["steps=[1000,0]", "ts_schedule_max=true"], "after a last step of 0"),
        (["betas_critic=[0.9]"], "betas_critic [0.9] are not two numbers"),
        (["betas=[0.0,1.0]"], "betas [0.0, 1.0] are not two numbers"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(
    settings: list[str], more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*settings, *more]) == 2
    stderr = capsys.readouterr().err
    assert words in stderr
    assert stderr.count("\n") == 1


def test_clips_of_another_size_are_refused(settings: list[str], data: str, world: distributed.World) -> None:
    with pytest.raises(ValueError, match="set width and height to theirs"):
        Distillation(parse(DmdArgs, [*settings, data, *FIRST, "width=64"]), world)
