"""The training step as an estimate runs it: networks of a size in place of files, no data, no random draw that is read.

The stage itself comes from the caller, so that commands stand above this file and not below it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CLIP_DIM, CLIP_TOKENS
from selfforcing_core.image import MASK_CHANNELS
from train import run_checkpoints
from train.args import DmdArgs, OdeArgs, TrainArgs
from train.data import Row
from train.distributed import World
from train.engine import ClipTrainer, Trainer
from train.networks import Source
from train.work import config_of, latent_shape, sizes_of


@dataclass(frozen=True)
class _DryDraws:
    """Zeros for everything; every chunk ends at its first evaluation, since earlier ones leave nothing behind."""

    def exit_steps(self, count: int, num_steps: int, *, per_chunk: bool) -> list[int]:
        return [0] * count

    def whole(self, name: str, count: int) -> int:
        return count - 1  # the longest clip

    def noise(self, first: int) -> _DryDraws:
        return self

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)

    def uniform(self, first: int, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def uniforms(self, first: int, count: int, frames: int) -> Tensor:
        return torch.zeros(count, frames, dtype=torch.float64)

    def normal(self, first: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


class _Prompts:
    """No text's embedding, as the networks take it."""

    def __init__(self, args: TrainArgs, world: World) -> None:
        self.config = config_of(args.size)
        self.like: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "device": world.device}

    def condition(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(texts), self.config.text_len, self.config.text_dim, **self.like))


class _Dry(Trainer):
    """As the real one, on networks of the presets."""

    def __init__(self, args: Any, world: World, num_layers: int) -> None:
        self.num_layers = num_layers
        super().__init__(args, world)

    def sources(self) -> dict[str, Source]:
        sizes = sizes_of(self.args)
        return {
            role: Source(
                source.name or role, source.weights, replace(config_of(sizes[role]), num_layers=self.num_layers)
            )
            for role, source in super().sources().items()  # type: ignore[safe-super]
        }

    def open_data(self, takes_pictures: bool = False) -> None:
        self.prompts: Any = _Prompts(self.args, self.world)
        self.data, self.takes_pictures = None, takes_pictures

    def draws(self, purpose: str) -> Any:
        return _DryDraws()

    def parts(self) -> Iterator[tuple[int, int]]:
        return itertools.islice(super().parts(), 2)  # the second one adds to gradients that are there


class _DryDistillation(_Dry):
    """Of a student with teacher and critic; the stage comes after it in the order of bases."""

    settings: DmdArgs
    latent_shape: tuple[int, int, int, int]

    def open_data(self, takes_pictures: bool = False) -> None:
        super().open_data(takes_pictures)
        self.texts, self.vae, self.pictures = [""], None, None

    def rows(self, numbers: range) -> tuple[list[str], list[Row]]:
        return [""] * len(numbers), [Row("", torch.zeros(1, *self.latent_shape))] * len(numbers)

    def conditions(self, texts: list[str], rows: list[Row]) -> tuple[Conditioning, Conditioning]:
        pair = super().conditions(texts, rows)  # type: ignore[misc]
        if not self.takes_pictures:
            return pair
        embeds, (frames, channels, *size) = pair[0].prompt_embeds_BPE, self.latent_shape
        image = torch.zeros(len(texts), frames, MASK_CHANNELS + channels, *size).to(embeds)
        seen = Conditioning(embeds, image, torch.zeros(len(texts), CLIP_TOKENS, CLIP_DIM).to(embeds))
        return seen, seen

    def first_frames(self, rows: list[Row]) -> Tensor | None:
        is_given = self.settings.first_frame != "generated"
        return torch.zeros(len(rows), 1, *self.latent_shape[1:]) if is_given else None

    def reencode(self, latents_BTCHW: Tensor) -> Tensor:
        return latents_BTCHW[:, :1]


class _DryClips(_Dry, ClipTrainer):
    """Of one network; the stage comes after it in the order of bases."""

    def open_data(self, takes_pictures: bool = False) -> None:
        super().open_data(takes_pictures)
        self.shape = latent_shape(self.clips, config_of(self.clips.size))

    def rows(self, numbers: range) -> list[Row]:
        states = len(self.clips.timesteps) if isinstance(self.clips, OdeArgs) else 1
        return [Row("", torch.zeros(states, *self.shape)) for _ in numbers]


def dry_stage(stage: type[Trainer], args: TrainArgs, world: World, num_layers: int) -> Trainer:
    """Return a trainer of this stage on networks of this many layers, with zeros for whatever it would read or draw."""
    base = _DryDistillation if isinstance(args, DmdArgs) else _DryClips
    dry: Any = type(f"Dry{stage.__name__}", (base, stage), {})
    return dry(args, world, num_layers)


class _Tracker(MemTracker):
    """Torch's, without its books per module: those know neither frozen weights nor networks that are called twice."""

    def _pre_fw_hook(self, module: Any, inputs: Any) -> None:
        pass

    def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None:
        pass

    def _pre_bw_hook(self, module: Any, args: Any) -> None:
        pass

    def _post_bw_hook(self, module: Any, args: Any) -> None:
        pass


def tracked(trainer: Trainer) -> dict[str, int]:
    """Peak bytes of this process in an update of each role that is trained, everything included.

    Also for a real trainer: then it is what was really used.
    """
    for role in trainer.roles.values():
        run_checkpoints.moments(role)
    trainer.start_average()
    modules = [module for role in trainer.roles.values() for module in role.modules]
    modules += [built.module for built in trainer.built.values()]
    optimisers = [role.optimiser for role in trainer.roles.values()]
    found = {}
    for name in trainer.roles:
        tracker = _Tracker()
        tracker.track_external(*dict.fromkeys(modules), *optimisers, *trainer.ema.values())
        with tracker:
            trainer.accumulate(name)
            trainer.apply(name)
        peak = tracker.get_tracker_snapshot("peak")
        found[name] = next(held["Total"] for device, held in peak.items() if device.type == trainer.world.device.type)
    return found
