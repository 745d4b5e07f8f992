"""Settings: text arrives letter for letter, numbers are what they look like, launch lines and --help work."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from train.args import (
    ClipArgs,
    DiffusionArgs,
    DmdArgs,
    OdeArgs,
    TrainArgs,
    described,
    parse,
    to_dict,
    to_yaml,
)
from train.export import ExportArgs
from train.export import main as export_main
from train.sample import SampleArgs
from train.trajectories import TrajectoryArgs

ROOT = Path(__file__).resolve().parents[2]
KINDS = (DmdArgs, DiffusionArgs, OdeArgs, ExportArgs, SampleArgs, TrajectoryArgs)
# Text that YAML, a shell or an interpolation would take for something else.
AWKWARD = [
    "runs/a #1", "#", "a: b", "a:", ": a", "[", "[1, 2]", "{", "{a: b}", "$HOME", "${lr}", "${", "\\${lr}", "\\", "a\\",
    "'", '"', "'a'", '"a"', "007", "0x10", "1_000", "1e5", "1:30", ".5", ".inf", "nan", "null", "~", "true", "no", "",
    " ", " a", "a ", "\ta", "a\n", "a\r\nb", "a\rb", "- a", "-", "--", "? a", "!a", "&a", "*a", "%a", "@a", "`a`", "|",
    ">", "<<", "=", "a=b", "2024-01-01", "\x00", "\x07", "\x7f", "\x85", "a\x85b", "\u2028", "a\u2029b", "\ufeff",
    "\ufeffa", "\u732b", "\U0001f600", "e\u0301", "\u200b", "\ufffe", "\udcff", "a" * 300, "a " * 200, "a\n\n b\n",
]  # fmt: skip


def reread(args: Any, folder: Path) -> Any:
    """What a run's own config.yaml gives back."""
    file = folder / "config.yaml"
    file.write_text(to_yaml(args), encoding="utf-8")
    return parse(type(args), [f"config={file}"])


# -------------------------------------------------------------------- text --
@pytest.mark.parametrize("text", AWKWARD)
def test_text_arrives_letter_for_letter(text: str, tmp_path: Path) -> None:
    args = parse(DmdArgs, [f"logdir={text}", f"negative_prompt={text}"])
    assert (args.logdir, args.negative_prompt) == (text, text)
    assert reread(args, tmp_path) == args


@given(st.lists(st.text(), min_size=3, max_size=3), st.lists(st.floats(allow_nan=False), max_size=3))
@example(["0", "0.", "-0"], [1e-300, float("inf"), -0.0])
def test_a_runs_own_file_gives_back_every_setting(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], numbers: list[float]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    args = parse(DmdArgs, [f"logdir={texts[0]}", f"student={texts[1]}", f"steps={[*numbers]}".replace("inf", ".inf")])
    assert (args.logdir, args.student, args.steps) == (texts[0], texts[1], numbers)
    changed = dataclasses.replace(args, prompts=texts[2], lr=1e-06, seed=-3, resume=False)
    assert reread(changed, folder) == changed


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("007", "007"),
        ("1e5", "1e5"),
        ("null", "null"),
        ("true", "true"),
        ("No", "No"),
        ("~/runs", "~/runs"),
        ("", ""),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("${lr}", "${lr}"),
        ("$HOME/a", "$HOME/a"),
        ("a:b#c", "a:b#c"),
        ("'a # b'", "a # b"),
        ('"a\\tb"', "a\tb"),
        ("2024-01-01", "2024-01-01"),
        ("a  # a comment", "a"),
        ("\u732b", "\u732b"),
        ("C:\\runs\\a", "C:\\runs\\a"),
    ],
)
def test_a_files_text_is_as_it_is_written(written: str, text: str, tmp_path: Path) -> None:
    """A comment is YAML's own; what is no scalar has to stand in quotes."""
    file = tmp_path / "ours.yaml"
    file.write_text(f"logdir: {written}\nseed: 3\n", encoding="utf-8")
    args = parse(DmdArgs, [f"config={file}"])
    assert (args.logdir, args.seed) == (text, 3)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_every_editor_are_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_bytes("# notes\r\nlogdir: \u732b\r\nlr: 1e-6\r\n".encode(encoding))
    args = parse(DmdArgs, [f"config={tmp_path / 'ours.yaml'}"])
    assert (args.logdir, args.lr) == ("\u732b", 1e-6)


def test_runs_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Their files were written by OmegaConf."""
    args = DmdArgs(logdir="007", student="a #1", prompts="\u732b: [", critic="1e5", steps=[1000.0, 1e-6], lr=1e-06)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(args)), encoding="utf-8")
    assert parse(DmdArgs, [f"config={tmp_path / 'config.yaml'}"]) == args


def test_a_text_that_once_was_filled_in_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ours.yaml").write_text("logdir: runs/${seed}\nstudent: $HOME\n", encoding="utf-8")
    assert parse(DmdArgs, [f"config={tmp_path / 'ours.yaml'}"]).logdir == "runs/${seed}"
    assert "logdir 'runs/${seed}' is taken letter for letter" in caplog.text
    assert "student" not in caplog.text


def test_files_may_name_a_part_and_use_it_again(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("<<: {logdir: a, seed: 1}\nseed: 2\nsteps: &s [1000, 500]\nstudent: 'x'\n", encoding="utf-8")
    args = parse(DmdArgs, [f"config={file}"])
    assert (args.logdir, args.seed, args.steps, args.student) == ("a", 2, [1000.0, 500.0], "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("logdir: [a]\n", "logdir is a list, where one text belongs; put a text into quotes"),
        ("logdir: {a: b}\n", "logdir is a mapping"),
        ("steps: 1000\n", "steps '1000' is no list"),
        ("steps: [[1]]\n", "entry 1 is a list, where one number belongs"),
        ("lr: fast\n", "lr 'fast' is no number"),
        ("lr: null\n", "lr 'null' is no number"),
        ("seed: 010\n", "seed '010' is no whole number; write 10"),
        ("seed: 1\nseed: 2\n", "holds seed more than once"),
        ("sed: 1\n", "nearest are seed"),
        ("a\n", "is no mapping"),
        ("? [a]\n: b\n", "is no setting"),
        ("<<: 3\n", "cannot be read as YAML"),
        ("logdir: 'a\n", "cannot be read as YAML"),
        ("logdir: *a\n", "cannot be read as YAML"),
        (b"logdir: \xff\xfe\n", "cannot be read as YAML"),
        ("logdir: !!python/object/apply:os.getcwd []\n", "logdir is a list"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content: str | bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"ours\.yaml") as caught:
        parse(DmdArgs, [f"config={file}"])
    assert words in str(caught.value)


# ----------------------------------------------------------------- numbers --
def test_numbers_lists_and_switches_keep_their_forms() -> None:
    numbers = ["seed=0x10", "max_steps=1_000", "lr=1e-6", "lr_critic=4E-7", "max_loss=.inf", "window=-1", "shift=5"]
    words = [*numbers, "steps=[1000, 750,5e2]", "resume=no", "wandb=1", "gan_time=True", "tensorboard=off"]
    args = parse(DmdArgs, words)
    assert (args.seed, args.max_steps, args.lr, args.lr_critic) == (16, 1000, 1e-6, 4e-7)
    assert (args.max_loss, args.window, args.shift, args.steps) == (float("inf"), -1, 5.0, [1000.0, 750.0, 500.0])
    assert isinstance(args.shift, float)
    assert (args.resume, args.wandb, args.gan_time, args.tensorboard) == (False, True, True, False)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=1e3", "seed '1e3' is no whole number; write 1000"),
        ("max_steps=010", "write 10"),
        ("max_steps=1:30", "is no whole number"),
        ("max_steps=2.5", "is no whole number"),
        ("max_steps=", "is no whole number"),
        ("max_steps=null", "is no whole number"),
        ("lr=010", "begins with 0; write 10"),
        ("lr=1:30", "is no number"),
        ("lr=nan", "is no number"),
        ("lr=1e400", "is beyond what a number can hold"),
        ("lr=1e-400", "is beyond what a number can hold"),
        ("lr=1,5", "is no number"),
        ("wandb=2", "is neither true nor false"),
        ("steps=1000,750", "write for instance [1000,750]"),
        ("steps=[1000", "write for instance [1000,750]"),
        ("steps=[a]", "steps: entry 1 'a' is no number"),
    ],
)
def test_numbers_that_only_look_right_are_refused(word: str, said: str) -> None:
    with pytest.raises(ValueError, match="the command line: ") as caught:
        parse(DmdArgs, [word])
    assert said in str(caught.value)


def test_every_setting_has_a_type_that_can_be_read(tmp_path: Path) -> None:
    for kind in KINDS:
        args = kind()
        assert reread(args, tmp_path) == args
        assert {type(value) for value in to_dict(args).values()} <= {str, int, float, bool, list, type(None)}
        assert set(get_type_hints(kind)) == set(to_dict(args))


@dataclass
class Maybe:
    """Settings that may be absent."""

    count: int | None = None  # nothing
    names: list[str] = field(default_factory=lambda: ["a"])


def test_settings_may_be_absent_or_lists_of_text(tmp_path: Path) -> None:
    assert parse(Maybe, ["count=3", "names=[007, 'a b', no]"]) == Maybe(3, ["007", "a b", "no"])
    for args in (Maybe(), Maybe(4, ["null", "#", ""])):
        assert reread(args, tmp_path) == args
    assert "list of texts" in described(Maybe)


# ------------------------------------------------------------ launch lines --
@pytest.mark.parametrize(
    "line",
    [
        "--config_path configs/self_forcing_dmd.yaml --logdir L --disable-wandb",
        "--config_path configs/self_forcing_14b_dmd.yaml --logdir L --no_visualize --disable-wandb",
        "--config_path configs/self_forcing_dmd.yaml --logdir L --wandb-save-dir wandb --disable-wandb",
        "--config_path=configs/self_forcing_dmd.yaml --logdir=L --wandb-save-dir=wandb --no-one-logger",
        "-- --config_path configs/self_forcing_dmd.yaml --logdir L",
        "--config-path configs/self_forcing_dmd.yaml --logdir L --no-save --no-visualize --no-auto-resume",
        "--config_path configs/self_forcing_dmd.yaml --logdir L --max_iters 7 --wandb_name x --generate-before-train",
    ],
)
def test_launch_lines_of_the_family_are_taken(line: str, caplog: pytest.LogCaptureFixture) -> None:
    """What has no use here is said."""
    args = parse(DmdArgs, line.split())
    assert (args.logdir, args.wandb, args.size) == ("L", False, "t2v-14b" if "14b" in line else "t2v-1.3b")
    assert (args.save_every == 0) == ("--no-save" in line)
    assert args.resume is ("--no-auto-resume" not in line)
    assert args.max_steps == (7 if "max_iters" in line else args.max_steps)
    for flag in ("--wandb-save-dir", "--no-one-logger", "--wandb_name", "--generate-before-train"):
        assert (f"{flag} has no use here" in caplog.text) == (flag in line)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--logdir"], "--logdir needs a value"),
        (["--logdir", "--no_save"], "--logdir needs a value"),
        (["--fast"], "'--fast' is no setting"),
        (["fast"], "'fast' is no setting"),
        (["--no_save=1"], "'--no_save=1' is no setting"),
        (["--data_path", "x"], "'--data_path' is no setting"),
        (["config=a", "--config_path", "b"], "2 configurations are named"),
        ([f"config={'a' * 3000}"], "is no file and not in train/configs"),
        (["config=a\x00"], "is no file and not in train/configs"),
    ],
)
def test_a_launch_line_that_cannot_be_right_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(DmdArgs, words)


# -------------------------------------------------------------------- help --
COMMANDS = [
    f"train.{path.relative_to(ROOT / 'train').with_suffix('').as_posix().replace('/', '.')}"
    for path in sorted((ROOT / "train").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(
    name: str, rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all processes of torchrun, and without joining them."""
    for key, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "absent", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main()
    assert not caught.value.code
    captured = capsys.readouterr()
    assert captured.err == ""
    assert bool(captured.out) == (rank == "0")


def test_help_says_every_settings_type_default_and_comment(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        text = described(kind, "What it does.")
        assert text.startswith("What it does.\n")
        for name in get_type_hints(kind):
            assert text.count(f"\n  {name}=") == 1, name
    flat = " ".join(described(DmdArgs).split())
    assert "lr_critic=4e-07 number" in flat
    assert "keep_last=2 whole number; checkpoints" in flat
    assert "-- networks: a bundle's name, or a checkpoint of any layout student= text teacher=" in flat
    assert (
        "max_steps=600 whole number; in train.dmd of the critic: the student learns in every critic_per_student" in flat
    )
    assert "steps=[1000,750,500,250] list of numbers" in flat
    with pytest.raises(SystemExit):
        export_main(["-h"])
    assert "train.export logdir=runs/dmd out=student.safetensors" in capsys.readouterr().out


def test_comments_of_settings_are_whole() -> None:
    """A comment at a setting's line reaches --help: none is lost between lines of code."""
    source = (ROOT / "train" / "args.py").read_text(encoding="utf-8")
    classes = [part for part in ast.parse(source).body if isinstance(part, ast.ClassDef)]
    kinds = {kind.__name__: kind for kind in (DmdArgs, DiffusionArgs, OdeArgs, ClipArgs, TrainArgs)}
    lines = source.splitlines()
    for part in classes:
        if part.name in kinds:
            flat = " ".join(described(kinds[part.name]).split())
            for line in lines[part.lineno : part.end_lineno]:
                assert " ".join(line.partition("  # ")[2].split()) in flat, line
