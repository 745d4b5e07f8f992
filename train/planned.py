"""The training step as the plan runs it: networks of a size in place of files, no data, no random draw that is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CLIP_DIM, CLIP_TOKENS, PRESETS
from selfforcing_core.image import MASK_CHANNELS
from train import state
from train.args import DmdArgs
from train.data import Row
from train.distributed import World
from train.dmd import CRITIC, Distillation
from train.engine import STUDENT
from train.networks import Source
from train.plan import config_of, sizes_of


@dataclass(frozen=True)
class _PlannedDraws:
    """Zeros for everything; every chunk ends at its first evaluation, since earlier ones leave nothing behind."""

    def exit_steps(self, count: int, num_steps: int, *, per_chunk: bool) -> list[int]:
        return [0] * count

    def whole(self, name: str, count: int) -> int:
        return count - 1  # the longest clip

    def noise(self, first: int) -> _PlannedDraws:
        return self

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)

    def uniform(self, first: int, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def normal(self, first: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


class PlannedDistillation(Distillation):
    """As the real one, on networks of the presets."""

    def __init__(self, args: DmdArgs, world: World, num_layers: int) -> None:
        self.num_layers = num_layers
        super().__init__(args, world)

    def sources(self) -> dict[str, Source]:
        sizes = sizes_of(self.settings)
        return {
            role: Source(
                source.name or role, source.weights, replace(config_of(sizes[role]), num_layers=self.num_layers)
            )
            for role, source in super().sources().items()
        }

    def open_data(self, takes_pictures: bool) -> None:
        self.data, self.texts, self.vae, self.pictures = None, [""], None, None
        self.takes_pictures = takes_pictures

    def draws(self, purpose: str) -> Any:
        return _PlannedDraws()

    def parts(self) -> Iterator[tuple[int, int]]:
        return itertools.islice(super().parts(), 2)  # the second one adds to gradients that are there

    def rows(self, numbers: range) -> tuple[list[str], list[Row]]:
        empty = Row("", torch.zeros(1, *self.latent_shape))
        return [""] * len(numbers), [empty] * len(numbers)

    def conditions(self, texts: list[str], rows: list[Row]) -> tuple[Conditioning, Conditioning]:
        config = PRESETS[self.settings.size]
        like: dict[str, Any] = {"dtype": getattr(torch, self.args.dtype), "device": self.world.device}
        embeds = torch.zeros(len(texts), config.text_len, config.text_dim, **like)
        if not self.takes_pictures:
            return Conditioning(embeds), Conditioning(embeds)
        frames, channels, *size = self.latent_shape
        image = torch.zeros(len(texts), frames, MASK_CHANNELS + channels, *size, **like)
        seen = Conditioning(embeds, image, torch.zeros(len(texts), CLIP_TOKENS, CLIP_DIM, **like))
        return seen, seen

    def reencode(self, latents_BTCHW: Tensor) -> Tensor:
        return latents_BTCHW[:, :1]


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


def tracked(trainer: Distillation) -> dict[str, int]:
    """Peak bytes of this process in an update of the student and in one of the critic, everything included.

    Also for a real trainer: then it is what was really used.
    """
    for role in trainer.roles.values():
        state.moments(role)
    trainer.start_average()
    modules = [module for role in trainer.roles.values() for module in role.modules]
    modules += [built.module for built in trainer.built.values()]
    optimisers = [role.optimiser for role in trainer.roles.values()]
    found = {}
    for name in (STUDENT, CRITIC):
        tracker = _Tracker()
        tracker.track_external(*dict.fromkeys(modules), *optimisers, *trainer.ema.values())
        with tracker:
            trainer.accumulate(name)
            trainer.apply(name)
        peak = tracker.get_tracker_snapshot("peak")
        found[name] = next(held["Total"] for device, held in peak.items() if device.type == trainer.world.device.type)
    return found
