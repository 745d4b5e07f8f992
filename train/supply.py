"""What a stage is made of and works on: networks, prompts, rows, encoders and random numbers, handed in from outside.

A run gets a `FileSupply`. An estimate runs the very same stages on the zeros of `train.dry_supply.DrySupply`, so that
what it counts is what a run does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from selfforcing_core.codecs.wan_vae import WanVAE, load_wan_vae
from selfforcing_core.weights.checkpoint import Checkpoint
from train.args import DmdArgs
from train.conditions import Pictures, Prompts, read_texts
from train.data import ClipDatabase, Row, ShuffledRows
from train.distributed import World
from train.networks import Source, read_on_first
from train.randomness import Draws


class Supply(Protocol):
    """Whatever a stage would read or draw. Annotated `Any` is what behaves like that of `FileSupply`."""

    prompts: Any

    def checkpoint(self, role: str, source: Source) -> Checkpoint: ...
    def rows(self) -> Any: ...
    def vae(self) -> Any: ...
    def pictures(self, vae: Any, *, reads_clip: bool) -> Any: ...
    def draws(self, step: int, purpose: str) -> Any: ...


class FileSupply:
    """The files that the settings name. Its methods raise ValueError for a file that cannot be used."""

    def __init__(self, args: Any, world: World) -> None:
        self.args, self.world = args, world
        self.prompts = Prompts(args, world)

    def checkpoint(self, role: str, source: Source) -> Checkpoint:
        """Return a network's config and, on the first process, its weights, which are mapped, not read."""
        return read_on_first(source, self.world)

    def rows(self) -> ShuffledRows:
        """Return the clips of the database or, without one, the prompts, in the order in which a run takes them."""
        args, size = self.args, None  # a database of ours records its pictures' size, the reference's does not
        if isinstance(args, DmdArgs):
            if not args.data:
                texts: Any = [text_row(text) for text in read_texts(args.prompts)]
                return ShuffledRows(texts, args.seed)
            size = (args.image_height, args.image_width) if args.image_height and args.image_width else None
        return ShuffledRows(ClipDatabase(args.data, size), args.seed)

    def vae(self) -> WanVAE | None:
        """Return Wan's VAE where the settings name one."""
        if not self.args.vae:
            return None
        # It is frozen, and float64 would only be slow: the type that the networks compute in, or the nearest to it.
        narrow = torch.bfloat16 if self.args.dtype == "bfloat16" else torch.float32
        return load_wan_vae(self.args.vae, dtype=narrow, device=self.world.device)

    def pictures(self, vae: WanVAE | None, *, reads_clip: bool) -> Pictures:
        """Return what encodes the pictures of an image-to-video network; its channels alone without `reads_clip`."""
        args = self.args
        if vae is None or not args.data or (reads_clip and not args.clip):
            encoders = "vae=..., clip=..." if reads_clip else "vae=..."
            raise ValueError(f"an image-to-video student needs {encoders} and data=... with pictures")
        if args.clip and not reads_clip:
            raise ValueError(
                "this image-to-video student reads its picture in channels alone (as Wan 2.2); leave clip out"
            )
        return Pictures(vae, args.clip, (args.width, args.height, args.latent_frames), args, self.world)

    def draws(self, step: int, purpose: str) -> Draws:
        """Return the random numbers of a step for a purpose."""
        return Draws(self.args.seed, step, purpose)


def text_row(text: str) -> Row:
    """Return a row that is a prompt alone, which is all that distillation needs."""
    return Row(text, torch.empty(0))
