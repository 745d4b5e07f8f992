"""Small random networks on disk, and runs of the trainer on them, that tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from selfforcing_core.codecs.wan_vae import new_network
from selfforcing_core.config import CLIP_DIM, WanConfig
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from tests.support.forks import Program, finish, ranks
from train.data import DatabaseWriter
from train.export import ExportArgs, export

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_dim": 128, "text_len": 16, "freq_dim": 32}
PICTURE = (20, 30)  # height and width of the database's pictures


def write_network(path: Path, seed: int, **more: object) -> Path:
    """A Wan network with random weights."""
    config, generator = WanConfig(**{**SIZES, **more}), torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
    weights = {
        key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in wan_shapes(config).items()
    }
    save_checkpoint(path, weights, config)
    return path


def write_database(folder: Path) -> Path:
    """Seven clips of four latent frames, with pictures."""
    writer, generator = DatabaseWriter(folder), torch.Generator().manual_seed(0)
    for name in "abcdefg":
        picture = torch.randint(0, 255, (*PICTURE, 3), generator=generator, dtype=torch.uint8)
        writer.add(f"clip {name}", torch.randn(4, 16, 4, 4, generator=generator), picture)
    writer.close()
    return folder


def write_encoders(folder: Path) -> tuple[Path, Path]:
    """A Wan VAE and a CLIP image encoder with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    generator, network = torch.Generator().manual_seed(0), new_network(8, 1)
    drawn = {
        key: torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        for key, value in network.state_dict().items()
    }
    save_file(drawn, folder / "vae.safetensors")
    config = CLIPVisionConfig(
        hidden_size=CLIP_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=16,
        patch_size=14,
        image_size=28,
        hidden_act="gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPVisionModel(config).to(torch.bfloat16)
    save_file(clip.state_dict(), folder / "clip.safetensors")
    return folder / "vae.safetensors", folder / "clip.safetensors"


def run_settings(folder: Path) -> list[str]:
    """A distillation of small random networks, in float64; writes the networks and prompts."""
    student = write_network(folder / "student.safetensors", 0)
    teacher = write_network(folder / "teacher.safetensors", 1)
    (folder / "prompts.txt").write_text("a red square\n\na green circle\na blue triangle\n", encoding="utf-8")
    return [
        f"student={student}", f"teacher={teacher}", "text_encoder=tiny", f"prompts={folder}/prompts.txt",
        "width=32", "height=32", "latent_frames=4", "chunk=2", "batch_size=6", "micro_batch=1",
        "critic_per_student=2", "lr=1e-3", "lr_critic=1e-3", "ema_start=2", "ema_decay=0.5", "dtype=float64",
        "device=cpu", "max_steps=4", "save_every=2", "keep_last=5", "tensorboard=false",
    ]  # fmt: skip


def launch(arguments: list[str], processes: int = 1, stage: str = "train.dmd") -> subprocess.Popen[str]:
    """Start a stage as users do: its own interpreter, or torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", stage, *arguments]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(arguments: list[str], processes: int = 1, stage: str = "train.dmd") -> None:
    """Run a stage to the end, which must be good, in processes that cost no new interpreter."""
    store = None
    if processes == 1:
        programs = [Program(stage, arguments, ROOT)]
    else:
        programs, store = ranks(stage, arguments, ROOT, processes)
    with TemporaryDirectory() as folder:
        statuses, outputs = finish(programs, Path(folder), timeout=300)
    del store
    assert statuses == [0] * processes, [output[-3000:] for output in outputs]


def numbers(folder: Path) -> list[dict[str, float]]:
    """What each step told, without what depends on the machine."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "share_of_limit", "time_by_group")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def student(folder: Path, tmp_path: Path, weights: str = "raw") -> dict[str, torch.Tensor]:
    """The weights that a run exports."""
    out = tmp_path / f"{folder.name}-{weights}.safetensors"
    export(ExportArgs(logdir=str(folder), out=str(out), weights=weights, dtype="float32"))
    return read_checkpoint(out).state_dict
