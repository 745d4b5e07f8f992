"""Settings of a run: defaults <- YAML file <- key=value, strict, with the flags of the reference's launch lines.

    torchrun --nproc-per-node 8 -m train.dmd config=self_forcing_dmd logdir=runs/dmd max_steps=600

A value is read by its setting's type: text letter for letter, whatever it looks like; numbers, `true` and `[1000,750]`
as they are. Every run writes what it resolved to `logdir`/config.yaml. The comments below are what --help says.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import logging
import math
import os
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent / "configs"
COMMAND_LINE = "the command line"
HELP = {"-h", "--help"}
# Flags of the launch lines of the reference and of what grew from it, dashes and underscores alike. With a value:
ALIASES = {"--config-path": "config", "--logdir": "logdir", "--max-iters": "max_steps"}
# without one:
SWITCHES = {
    "--no-visualize": "sample_every=0",
    "--no-save": "save_every=0",
    "--disable-wandb": "wandb=false",
    "--auto-resume": "resume=true",
    "--no-auto-resume": "resume=false",
    "--dry-run": "dry_run=true",
}
# accepted, and said to have no use; with a value, and without one:
UNUSED_VALUES = {
    "--wandb-save-dir": "curves for Weights & Biases go into logdir",
    "--wandb-name": "Weights & Biases names the run",
    "--experiment-name": "Weights & Biases names the run",
    "--local-rank": "torchrun says it in the environment",
}
UNUSED = {
    "--no-one-logger": "there is no such logger here",
    "--generate-before-train": "videos of fixed prompts come every sample_every steps",
}
TRUE, FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", list: "list"}


@dataclass
class NetworkArgs:
    """What everything has that loads networks."""

    seed: int = 0  # of every random number; the same seed gives the same run on any number of processes
    text_encoder: str = ""  # a bundle's name, a folder of transformers or a UMT5 file
    text_encoder_offload: bool = True  # in CPU memory; on the device only while it encodes
    embeddings: str = ""  # folder of prompts' embeddings: written when first needed, then read; empty: kept in memory
    device: str = "auto"  # auto: cuda if there is one
    dtype: str = "bfloat16"  # of the computation; what is trained and sums are float32 (float64 for float64)
    shard_group: int = 0  # processes that share one copy of the weights (hybrid sharding); 0: all


@dataclass
class TrainArgs(NetworkArgs):
    """What every stage of training has."""

    logdir: str = ""  # folder of everything the run writes
    max_steps: int = 600  # in train.dmd of the critic: the student learns in every critic_per_student-th of them
    resume: bool = True  # go on from the newest checkpoint in logdir; false starts anew and refuses an old one
    resume_changed: list[str] = field(default_factory=list)  # settings that may differ from those the run began with
    save_every: int = 50  # steps; 0: never
    keep_last: int = 2  # checkpoints
    tensorboard: bool = True  # curves in logdir, where the package tensorboard is installed
    wandb: bool = False  # curves to Weights & Biases as well; the key comes from the environment (WANDB_API_KEY)
    dry_run: bool = False  # print what the run would take, as train.plan does, and end

    size: str = "t2v-1.3b"  # of what is trained, for the plan: t2v-1.3b, t2v-14b, i2v-14b, tiny
    chunk: int = 3  # latent frames; 0: all, for bidirectional networks
    window: int = -1  # latent frames that a chunk sees, itself included; -1: the whole video
    independent_first_frame: bool = False  # frame 0 is a chunk of its own, the others follow in chunks
    activation_checkpointing: bool = True  # activations are computed again in the backward pass, not kept

    # of a database: another row takes the place of one that is damaged or holds NaN or Inf, and log.jsonl counts them
    # (rows_replaced); false: the first one that is drawn ends the run
    skip_bad_rows: bool = False

    # optimisation
    batch_size: int = 64  # clips per step over all processes
    micro_batch: int = 1  # clips at once
    lr: float = 2e-6  # of AdamW, as the next two; 2e-6 is Self Forcing's for 1.3B
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])  # no momentum
    weight_decay: float = 0.01
    warmup_steps: int = 0  # over which learning rates rise from 0
    lr_end: float = 1.0  # share of the learning rates that is left at max_steps, on half a cosine; 1: constant
    max_grad_norm: float = 10.0  # gradients of a role are scaled down to this norm
    max_loss: float = 1e4  # a loss beyond it, of either sign, stops the run
    ema_decay: float = 0.99  # share of the average of the weights that a step leaves
    ema_start: int = 200  # step from which the average is kept

    # LoRA in place of whole networks; roles that start from the same file share it, frozen
    lora_rank: int = 0  # 0: train whole networks
    lora_alpha: float = 0.0  # LoRA counts alpha / rank times; 0: as the rank

    # videos of fixed prompts, and a contact sheet of each, below logdir/samples
    sample_every: int = 0  # steps; 0: never
    sample_prompts: str = ""  # text file; empty: the first four training prompts
    sample_frames: int = 0  # latent frames; 0: as in training
    decoder: str = ""  # TAEHV (a bundle's name or a file) for these videos
    decoder_latent_space: str = ""  # whose latents it decodes, for instance wan2.1, where its file does not say


@dataclass
class DmdArgs(TrainArgs):
    """Distillation of a student with a teacher and a critic on the student's own clips."""

    # networks: a bundle's name, or a checkpoint of any layout
    student: str = ""
    teacher: str = ""
    teacher_size: str = ""  # for the plan; empty: as the student
    critic: str = ""  # empty: starts as the teacher
    critic_size: str = ""  # for the plan; empty: as the teacher, or as the student where critic is set
    weights: str = "auto"  # of a student file with both: auto, ema, raw

    # data
    prompts: str = ""  # text file, one prompt per line, or a folder of text files, one prompt each
    data: str = ""  # database of clips: real ones for score=gan, pictures for image-to-video; its prompts are used
    first_frame: str = "generated"  # of causal students; clips: the database's own, pictures: its pictures', encoded
    image_height: int = 0  # of a database's pictures where it does not record it
    image_width: int = 0
    negative_prompt: str = ""  # what the teacher's guidance keeps away from
    vae: str = ""  # Wan VAE: for image-to-video, and to make a long clip's window start like a video
    clip: str = ""  # image encoder, for image-to-video of Wan 2.1; that of Wan 2.2 reads channels alone

    # rollout
    width: int = 832  # pixels
    height: int = 480
    latent_frames: int = 21  # of the clip that teacher and critic see
    max_latent_frames: int = 0  # longest rollout; longer ones than latent_frames are judged by their end; 0: as it
    sink: int = 0  # first latent frames that never leave the window
    policy: str = "self-forcing"  # what the student's cache keeps and at which positions, as --policy of generate
    steps: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])  # timesteps, noisiest first
    first_chunk_steps: list[float] = field(default_factory=list)  # of the chunk that begins a clip; empty: as steps
    shift: float = 5.0  # of the noise levels: higher ones get more of the steps
    warp: bool = True  # both lists go through the shift; false: they are the timesteps themselves
    cache_source: str = "clean"  # clean, or last_step: students that sample without the clean pass
    train_context_sigma: str = "exact"  # exact: clean context; last_table: 0.005 of noise, as in the reference
    context_noise: float = 0.0  # timestep of the pass that writes a chunk into the cache; training adds that noise too
    exit_per_chunk: bool = False  # false: one exit step for all chunks of a step
    last_step_only: bool = False  # chunks always end at the last step, none is drawn

    # matching
    score: str = "dmd"  # dmd, sid or gan
    guidance: float = 4.0  # on the teacher, usual meaning: 1 is none. The reference's w = 3 is 4 here
    guidance_critic: float = 1.0  # on the critic, where the student is trained
    sid_alpha: float = 1.0  # of score=sid: alpha of its equation 23 (arXiv 2404.04057)
    score_shift: float = 5.0  # of the timesteps at which clips are compared
    score_levels: str = "exact"  # exact: sigma = t / 1000; table: nearest entry, as in the reference
    min_score_timestep: float = 0.0  # of them, before score_shift
    ts_schedule: bool = False  # none below the timestep to which the student's exit step leads
    ts_schedule_max: bool = False  # none above the timestep of the student's exit step
    critic_per_student: int = 5  # updates
    critic_warmup: int = 0  # steps in which the critic alone is trained; with gan: its heads alone
    lr_critic: float = 4e-7
    betas_critic: list[float] = field(default_factory=list)  # empty: as betas
    max_grad_norm_critic: float = 0.0  # 0: as max_grad_norm

    # score=gan
    gan_weight: float = 1e-2  # of the student's loss
    gan_critic_weight: float = 1e-2  # of the critic's loss
    gan_relativistic: bool = False  # real and generated clips are judged against each other, not each by itself
    gan_r1: float = 0.0  # weights of the gradient penalties on real and on generated clips
    gan_r2: float = 0.0
    gan_sigma: float = 0.01  # noise of their finite differences
    gan_time: bool = False  # the heads also see the timestep
    lr_heads: float = 1.0  # times lr_critic, for the heads


@dataclass
class ClipArgs(TrainArgs):
    """Training of one network on the rows of a database."""

    network: str = ""  # where to start: a bundle's name, or a checkpoint of any layout
    weights: str = "auto"  # of a file with both: auto, ema, raw
    data: str = ""  # database, or folder of shards
    width: int = 832  # of its clips, for the plan: pixels
    height: int = 480
    latent_frames: int = 21  # 81 frames of video


@dataclass
class DiffusionArgs(ClipArgs):
    """Flow matching on clips."""

    forcing: str = "teacher"  # teacher, diffusion, or none (bidirectional: chunk=0)
    shift: float = 5.0  # of the noise levels

    # how the network is sampled, while it is trained and by what reads its export
    sampling_steps: int = 30
    solver: str = "euler"  # euler, or unipc (needs the package diffusers)
    guidance: float = 5.0  # usual meaning: 1 is none; 5 is Wan's own
    negative_prompt: str = ""  # what guidance keeps away from


@dataclass
class OdeArgs(ClipArgs):
    """Regression on a teacher's trajectories, from which a few-step student starts."""

    timesteps: list[float] = field(default_factory=lambda: [1000.0, 937.5, 2500 / 3, 625.0, 0.0])  # of their states
    first_frame_clean: bool = False  # image-to-video: frame 0 is always the last state
    levels: str = "exact"  # exact: sigma = t / 1000; table: nearest entry, as in the reference
    shift: float = 5.0  # of the table


Args = TypeVar("Args")


# ------------------------------------------------------------- command line --
def parse(kind: type[Args], argv: Sequence[str] | None = None, about: str | None = None) -> Args:
    """Return the settings of a command line; with --help print them, after what the command is about, and exit with 0.

    Raises ValueError naming the nearest valid keys for an unknown one, and for a value that its type cannot take.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if HELP & set(words):
        if is_first():
            print(described(kind, about))
        raise SystemExit(0)
    pairs = _pairs(words)
    configs = [value for key, value in pairs if key == "config"]
    if len(configs) > 1:
        raise ValueError(f"{len(configs)} configurations are named ({', '.join(configs)}); give one")
    values = read(config_path(configs[0]), kind) if configs else {}
    types = get_type_hints(kind)
    for key, text in pairs:
        if key != "config":
            _check_key(key, kind, COMMAND_LINE)
            values[key] = _from_text(text, types[key], f"{COMMAND_LINE}: {key}")
    return kind(**values)


def is_first() -> bool:
    """Return whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def config_path(name: str) -> Path:
    """Find the file behind a name: as it stands, or in train/configs (also written configs/x.yaml, or x)."""
    for path in (Path(name), CONFIGS / Path(name).name, CONFIGS / f"{Path(name).name}.yaml"):
        if os.path.isfile(path):  # unlike Path.is_file it also takes names that no file can have
            return path
    names = ", ".join(path.stem for path in sorted(CONFIGS.glob("*.yaml")))
    raise ValueError(f"config {name!r} is no file and not in train/configs; use one of {names}")


def mistake(name: str, error: Exception, *, is_told: bool = True) -> int:
    """Say a user's mistake as one line on stderr, unless another process does; return the exit status, 2."""
    if is_told:
        print(f"{name}: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return 2


def _pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Split arguments into (key, value), flags of launch lines included."""
    pairs: list[tuple[str, str]] = []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--":  # what stands before a script's flags in some launch lines
            continue
        if not word.startswith("-"):
            if not equals:
                raise ValueError(f"{word!r} is no setting; write key=value, for instance max_steps=100")
            pairs.append((name, value))
            continue
        flag = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        takes_value = flag in ALIASES or flag in UNUSED_VALUES
        if takes_value and not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ValueError(f"{word} needs a value; write {word}=VALUE, or {word} VALUE")
        if flag in ALIASES:
            pairs.append((ALIASES[flag], value))
        elif flag in SWITCHES and not equals:
            pairs += _pairs([SWITCHES[flag]])
        # Flags without use are accepted, so that a launch line of the reference runs as it is.
        elif flag in UNUSED_VALUES or (flag in UNUSED and not equals):
            if is_first():
                log.warning("%s has no use here: %s", name, {**UNUSED_VALUES, **UNUSED}[flag])
        else:
            raise ValueError(f"{word!r} is no setting; write key=value, for instance max_steps=100 (--help lists all)")
    return pairs


# -------------------------------------------------------------------- files --
def read(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Return the settings that a YAML file holds. Raises ValueError as `parse` does."""
    types, values = get_type_hints(kind), {}
    for key, node in _nodes(path):
        _check_key(key, kind, str(path))
        values[key] = _from_node(node, types[key], f"{path}: {key}")
        if "${" in str(values[key]) and is_first():  # earlier versions put another setting's value there
            log.warning("%s: %s %r is taken letter for letter; nothing is filled in for ${...}", path, key, values[key])
    return values


def read_known(path: Path, kind: type[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a YAML file that `kind` has, and as text those that it has not.

    Raises ValueError as `parse` does, for values alone.
    """
    types = get_type_hints(kind)
    settings, unknown = {}, {}
    for key, node in _nodes(path):
        if key in types:
            settings[key] = _from_node(node, types[key], f"{path}: {key}")
        else:
            unknown[key] = node.value if isinstance(node, yaml.ScalarNode) else yaml.serialize(node).strip()
    return settings, unknown


def keys(path: Path) -> set[str]:
    """Return the names of the settings in a YAML file, whoever knows them."""
    return {key for key, _ in _nodes(path)}


def to_dict(args: Any) -> dict[str, Any]:
    """Return settings as plain Python types."""
    return dataclasses.asdict(args)


def to_yaml(args: Any) -> str:
    """Return settings as a file that `read` understands, every letter of a text included."""
    return dump(to_dict(args))


def dump(values: dict[str, Any]) -> str:
    """Return YAML, one setting a line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


class _Dumper(yaml.SafeDumper):
    """Escapes what is not printable, since YAML folds some of it (NEL, line separators) into spaces."""

    def represent_str(self, data: str) -> yaml.Node:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _nodes(path: Path) -> list[tuple[str, yaml.Node]]:
    """Return keys and what is written behind them, not yet read as anything."""
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        try:
            node = loader.get_single_node()
            if node is None:  # an empty file
                return []
            if not isinstance(node, yaml.MappingNode):
                raise ValueError("is no mapping of settings")
            names = [key.value if isinstance(key, yaml.ScalarNode) else "" for key, _ in node.value]
            doubles = sorted({name for name in names if names.count(name) > 1})  # YAML would take the last in silence
            loader.flatten_mapping(node)  # fills in what "<<: *anchor" stands for
        finally:
            loader.dispose()
    except (OSError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if doubles:
        raise ValueError(f"{path}: holds {', '.join(doubles)} more than once; keep one of them")
    return list({str(key.value): (str(key.value), value) for key, value in node.value}.values())


def _check_key(key: str, kind: type[Any], where: str) -> None:
    names = [item.name for item in fields(kind)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=3, cutoff=0.4) or names
        raise ValueError(f"{where}: {key!r} is no setting of {kind.__name__}; nearest are {', '.join(near)}")


# ------------------------------------------------------------------- values --
def _from_node(node: yaml.Node, hint: Any, where: str) -> Any:
    """Read a setting from YAML. Its type says what a scalar is: YAML alone takes `007` for 7 and `no` for false."""
    if isinstance(node, yaml.ScalarNode):
        if _plain(hint) is list:
            raise ValueError(f"{where} {node.value!r} is no list; write for instance [1000, 750]")
        return _from_text(node.value, hint, where)
    if isinstance(node, yaml.SequenceNode) and _plain(hint) is list:
        inner = get_args(_without_none(hint))[0]
        return [_from_node(item, inner, f"{where}: entry {n}") for n, item in enumerate(node.value, 1)]
    node_kind = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    raise ValueError(f"{where} is {node_kind}, where one {WORDS[_plain(hint)]} belongs; put a text into quotes")


def _from_text(text: str, hint: Any, where: str) -> Any:
    """Read a setting from what was written for it."""
    plain = _plain(hint)
    if plain is str:
        return text
    if NoneType in get_args(hint) and text == "null":
        return None
    if plain is list:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            node = None
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError(f"{where} {text!r} is no list; write for instance [1000,750]")
        return _from_node(node, hint, where)
    return {bool: _truth, int: _whole, float: _number}[plain](text, where)


def _without_none(hint: Any) -> Any:
    return next((part for part in get_args(hint) if part is not NoneType), hint) if _is_optional(hint) else hint


def _is_optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


def _plain(hint: Any) -> Any:
    """Return str, int, float, bool or list."""
    hint = _without_none(hint)
    return get_origin(hint) or hint


def _truth(text: str, where: str) -> bool:
    word = text.strip().lower()
    if word not in (*TRUE, *FALSE):
        raise ValueError(f"{where} {text!r} is neither true nor false; write one of them")
    return word in TRUE


def _whole(text: str, where: str) -> int:
    try:
        return int(text, 0)  # takes 0x10, and refuses 010, which YAML takes for 8
    except ValueError:
        remedy = "write for instance 100"
    try:
        # Beyond 2**53 a float no longer holds every whole number, so that the advice might be another one.
        if abs(value := float(text)) < 2**53 and value.is_integer():
            remedy = f"write {int(value)}"
    except ValueError:
        pass
    raise ValueError(f"{where} {text!r} is no whole number; {remedy}")


def _number(text: str, where: str) -> float:
    word = text.strip().lower()
    try:
        value = float(re.sub(r"^([+-]?)\.inf$", r"\1inf", word))  # YAML writes .inf, Python inf
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"{where} {text!r} is no number; write for instance 0.5 or 2e-6")
    if re.fullmatch(r"[+-]?0[0-9_]+", word):  # YAML takes 010 for 8
        raise ValueError(f"{where} {text!r} begins with 0; write {value:g}")
    # 1e999 would become infinity and 1e-999 zero without a word.
    is_zero_meant = not re.search("[1-9]", word.partition("e")[0])
    if (math.isinf(value) and "inf" not in word) or (value == 0 and not is_zero_meant):
        raise ValueError(f"{where} {text!r} is beyond what a number can hold; write inf or 0 if that is meant")
    return value


# --------------------------------------------------------------------- help --
def described(kind: type[Any], about: str | None = None) -> str:
    """Return every setting with its type, default and the comment at its line."""
    names = ", ".join(path.stem for path in sorted(CONFIGS.glob("*.yaml")))
    lines = [about.strip(), ""] if about else []
    lines += [
        "Settings are written key=value; later ones win, and win over those of a file.",
        "  -h, --help  print this and end",
        *_row("config=FILE", f"a YAML file of settings, or one of train/configs: {names}"),
    ]
    listed: set[str] = set()
    for part in kind.__mro__:  # a stage's own settings first, what all stages share last
        if not dataclasses.is_dataclass(part) or not set(part.__annotations__) - listed:
            continue
        lines += ["", (part.__doc__ or part.__name__).partition("\n")[0]]
        comments = dict(_comments(part))
        for item in fields(part):
            if item.name in part.__annotations__ and item.name not in listed:
                heading, comment = comments.get(item.name, ("", ""))
                lines += textwrap.wrap(heading, 116, initial_indent="  -- ", subsequent_indent="     ")
                word = _word(get_type_hints(part)[item.name])
                lines += _row(f"{item.name}={_shown(item)}", f"{word}{comment and '; '}{comment}")
        listed |= set(part.__annotations__)
    return "\n".join(lines)


def _row(setting: str, words: str) -> list[str]:
    """Return lines of a setting with words in a column beside or below it."""
    setting = f"  {setting}"
    if len(setting) > 36:
        return [setting, *textwrap.wrap(words, 118, initial_indent=" " * 38, subsequent_indent=" " * 38)]
    return textwrap.wrap(words, 118, initial_indent=f"{setting:38}", subsequent_indent=" " * 38)


def _word(hint: Any) -> str:
    inner = get_args(_without_none(hint)) if _plain(hint) is list else ()
    return f"list of {WORDS[inner[0]]}s" if inner else WORDS[_plain(hint)]


def _shown(item: dataclasses.Field[Any]) -> str:
    """Return a default as one would write it."""
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if isinstance(value, list):
        return f"[{','.join(f'{entry:.6g}' if isinstance(entry, float) else str(entry) for entry in value)}]"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def _comments(kind: type[Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (name, (lines of comment above it, comment at its line)) of every setting of a class.

    Read from the source, so that a setting is explained in one place, which both readers and --help see.
    """
    source = textwrap.dedent(inspect.getsource(kind))
    notes: dict[int, tuple[bool, str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            notes[token.start[0]] = token.line.strip().startswith("#"), token.string.lstrip("# ")
    last = 0
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    for statement in definition.body:
        end = statement.end_lineno or statement.lineno
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            above = [notes[n][1] for n in range(last + 1, statement.lineno) if n in notes]
            beside = [notes[n][1] for n in range(statement.lineno, end + 1) if n in notes and not notes[n][0]]
            yield statement.target.id, (" ".join(above), " ".join(beside))
        last = end
