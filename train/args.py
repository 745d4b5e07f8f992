"""Settings of a run: defaults <- YAML file <- key=value, strict, with the flags of the reference's launch lines.

    torchrun --nproc-per-node 8 -m train.dmd config=self_forcing_dmd logdir=runs/dmd max_steps=600

Every run writes what it resolved to `logdir`/config.yaml.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parent / "configs"
ALIASES = {"--config_path": "config", "--logdir": "logdir"}
# Flags without a value.
SWITCHES = {"--no_visualize": "sample_every=0", "--no_save": "save_every=0", "--disable-wandb": "wandb=false"}


@dataclass
class NetworkArgs:
    """What everything has that loads networks."""

    seed: int = 0
    text_encoder: str = ""  # a bundle's name, a folder of transformers or a UMT5 file
    text_encoder_offload: bool = True  # in main memory; on the device only while it encodes
    embeddings: str = ""  # folder of prompts' embeddings: written when first needed, then read; empty: kept in memory
    device: str = "auto"  # auto: cuda if there is one
    dtype: str = "bfloat16"  # of the computation; what is trained and sums are float32 (float64 for float64)
    shard_group: int = 0  # processes that share one copy of the weights (hybrid sharding); 0: all


@dataclass
class TrainArgs(NetworkArgs):
    """What every stage of training has."""

    logdir: str = ""  # folder of everything the run writes
    max_steps: int = 600
    resume: bool = True  # go on from the newest checkpoint in logdir; false starts anew and refuses an old one
    resume_changed: list[str] = field(default_factory=list)  # settings that may differ from those the run began with
    save_every: int = 50  # steps; 0: never
    keep_last: int = 2  # checkpoints
    tensorboard: bool = True  # curves in logdir, where the package tensorboard is installed
    wandb: bool = False  # curves to Weights & Biases as well; the key comes from the environment (WANDB_API_KEY)
    dry_run: bool = False

    size: str = "t2v-1.3b"  # of what is trained, for the plan: t2v-1.3b, t2v-14b, i2v-14b, tiny
    chunk: int = 3  # latent frames; 0: all, for bidirectional networks
    window: int = -1
    activation_checkpointing: bool = True

    # optimisation
    batch_size: int = 64  # clips per step over all processes
    micro_batch: int = 1  # clips at once
    lr: float = 2e-6
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    weight_decay: float = 0.01
    warmup_steps: int = 0  # over which learning rates rise from 0
    lr_end: float = 1.0  # share of the learning rates that is left at max_steps, on half a cosine; 1: constant
    max_grad_norm: float = 10.0
    max_loss: float = 1e4  # a loss beyond it, of either sign, stops the run
    ema_decay: float = 0.99
    ema_start: int = 200  # step from which the average is kept

    # low-rank adapters in place of whole networks; roles that start from the same file share it, frozen
    lora_rank: int = 0  # 0: train whole networks
    lora_alpha: float = 0.0  # adapters count alpha / rank times; 0: as the rank

    # videos of fixed prompts, and a contact sheet of each, below logdir/samples
    sample_every: int = 0  # steps; 0: never
    sample_prompts: str = ""  # text file; empty: the first four training prompts
    sample_frames: int = 0  # latent frames; 0: as in training
    decoder: str = ""  # TAEHV (a bundle's name or a file) for these videos


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
    image_height: int = 0  # of a database's pictures where it does not record it
    image_width: int = 0
    negative_prompt: str = ""
    vae: str = ""  # Wan VAE: for image-to-video, and to make a long clip's window start like a video
    clip: str = ""  # image encoder, for image-to-video

    # rollout
    width: int = 832  # pixels
    height: int = 480
    latent_frames: int = 21  # of the clip that teacher and critic see
    max_latent_frames: int = 0  # longest rollout; longer ones than latent_frames are judged by their end; 0: as it
    sink: int = 0
    steps: list[float] = field(default_factory=lambda: [1000.0, 750.0, 500.0, 250.0])
    shift: float = 5.0
    cache_source: str = "clean"  # clean, or last_step: students that sample without the clean pass
    train_context_sigma: str = "exact"  # exact: clean context; last_table: 0.005 of noise, as in the reference
    exit_per_chunk: bool = False  # false: one exit step for all chunks of a step

    # matching
    score: str = "dmd"  # dmd, sid or gan
    guidance: float = 4.0  # on the teacher, usual meaning: 1 is none. The reference's w = 3 is 4 here
    sid_alpha: float = 1.0
    score_shift: float = 5.0  # of the timesteps at which clips are compared
    score_levels: str = "exact"  # exact: sigma = t / 1000; table: nearest entry, as in the reference
    critic_per_student: int = 5  # updates
    critic_warmup: int = 0  # steps in which the critic alone is trained; with gan: its heads alone
    lr_critic: float = 4e-7

    # score=gan
    gan_weight: float = 1e-2  # of the student's loss
    gan_critic_weight: float = 1e-2
    gan_relativistic: bool = False
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
    latent_frames: int = 21


@dataclass
class DiffusionArgs(ClipArgs):
    """Flow matching on clips."""

    forcing: str = "teacher"  # teacher, diffusion, or none (bidirectional: chunk=0)
    shift: float = 5.0  # of the noise levels


@dataclass
class OdeArgs(ClipArgs):
    """Regression on a teacher's trajectories, from which a few-step student starts."""

    timesteps: list[float] = field(default_factory=lambda: [1000.0, 937.5, 2500 / 3, 625.0, 0.0])  # of their states
    first_frame_clean: bool = False  # image-to-video: frame 0 is always the last state
    levels: str = "exact"  # exact: sigma = t / 1000; table: nearest entry, as in the reference
    shift: float = 5.0  # of the table


Args = TypeVar("Args")


def parse(kind: type[Args], argv: Sequence[str] | None = None) -> Args:
    """The settings of a command line. Raises ValueError naming the nearest valid keys for an unknown one."""
    pairs = _pairs(list(sys.argv[1:] if argv is None else argv))
    config = OmegaConf.structured(kind)
    named = [value for key, value in pairs if key == "config"]
    if len(named) > 1:
        raise ValueError(f"{len(named)} configurations are named ({', '.join(named)}); give one")
    if named:
        config = _merged(config, _read(config_path(named[0]), kind), named[0])
    rest = [(key, value) for key, value in pairs if key != "config"]
    for key, _ in rest:
        _check_key(key, kind, "the command line")
    config = _merged(config, OmegaConf.from_dotlist([f"{key}={value}" for key, value in rest]), "the command line")
    made = OmegaConf.to_object(config)
    assert isinstance(made, kind)
    return made


def config_path(name: str) -> Path:
    """The file behind a name: as it stands, or in train/configs (also written configs/x.yaml, or x)."""
    for path in (Path(name), CONFIGS / Path(name).name, CONFIGS / f"{Path(name).name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(path.stem for path in sorted(CONFIGS.glob("*.yaml")))
    raise ValueError(f"config {name!r} is no file and not in train/configs; use one of {known}")


def to_dict(args: Any) -> dict[str, Any]:
    """Plain Python types."""
    made = OmegaConf.to_container(OmegaConf.structured(args))
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items()}


def to_yaml(args: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(args))


def mistake(name: str, error: Exception, *, is_told: bool = True) -> int:
    """Say a user's mistake as one line on stderr, unless another process does; the exit status of a command line."""
    if is_told:
        print(f"{name}: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return 2


def _pairs(argv: list[str]) -> list[tuple[str, str]]:
    """(key, value) of every argument, flags of the reference included."""
    found: list[tuple[str, str]] = []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ALIASES:
            found.append((ALIASES[name], value if equals else next(rest, "")))
        elif word in SWITCHES:
            found += _pairs([SWITCHES[word]])
        elif word == "--dry-run":
            found.append(("dry_run", "true"))
        elif equals and not name.startswith("-"):
            found.append((name, value))
        else:
            raise ValueError(f"{word!r} is no setting; write key=value, for instance max_steps=100")
    return found


def _read(path: Path, kind: type[Any]) -> DictConfig:
    try:
        found = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(found, DictConfig):
        raise ValueError(f"{path}: is no mapping of settings")
    for key in found:
        _check_key(str(key), kind, str(path))
    return found


def _check_key(key: str, kind: type[Any], where: str) -> None:
    known = [item.name for item in fields(kind)]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        raise ValueError(f"{where}: {key!r} is no setting of {kind.__name__}; nearest are {', '.join(near)}")


def _merged(config: Any, more: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(config, more)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())[:300]}") from error
