"""Clips on disk: databases in the reference's layouts, and the .pt files they are made from.

A database maps `latents_<i>_data` to float16 bytes, `prompts_<i>_data` to UTF-8, optionally `img_<i>_data` to RGB bytes
(uint8, [H, W, 3]), and `<array>_shape` to decimal numbers, the first of which is the number of rows. The reference does
not record the picture's size; ours does, under `img_size` ("H W").

Letters: N rows, S states of a trajectory, T latent frames, C channels, H W size, R RGB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch import Tensor

from selfforcing_core.atomic import replacing_folder

GROWTH = 1 << 30  # bytes added to a database's room when it is full
ARRAYS = ("latents", "prompts", "img")


@dataclass(frozen=True)
class Row:
    """One example. latents_STCHW: float32; a clip is a trajectory of one state. image_RHW: in [-1, 1]."""

    prompt: str
    latents_STCHW: Tensor
    image_RHW: Tensor | None = None


class ClipDatabase:
    """One database, or a folder of shards, as one list of rows.

    image_size: (H, W) of the pictures, for databases that do not record it.
    Raises ValueError, naming the file, for whatever is not such a database, and for rows that are not numbers.
    """

    def __init__(self, path: str | Path, image_size: tuple[int, int] | None = None) -> None:
        path = Path(path)
        folders = [path] if (path / "data.mdb").is_file() else sorted(p.parent for p in path.glob("*/data.mdb"))
        if not folders:
            raise ValueError(f"{path}: holds no data.mdb, neither itself nor in folders below; give a database")
        self.shards = [_Shard(folder, image_size) for folder in folders]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for shard in self.shards:
            if index < len(shard):
                return shard.row(index)
            index -= len(shard)
        raise AssertionError


class _Shard:
    def __init__(self, folder: Path, image_size: tuple[int, int] | None) -> None:
        self.folder = folder
        try:
            self.database = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise ValueError(f"{folder}: is no LMDB database ({error})") from error
        shape = self._text("latents_shape").split()
        if len(shape) < 5 or not all(number.isdecimal() for number in shape):
            raise ValueError(f"{folder}: latents_shape is {' '.join(shape)!r}, not rows and the shape of one")
        self.count, self.shape = int(shape[0]), tuple(map(int, shape[1:]))
        recorded = self._get("img_size")
        self.image_size = tuple(map(int, recorded.split())) if recorded else image_size

    def __len__(self) -> int:
        return self.count

    def _get(self, key: str) -> bytes | None:
        with self.database.begin() as transaction:
            found = transaction.get(key.encode())
            return None if found is None else bytes(found)

    def _text(self, key: str) -> str:
        found = self._get(key)
        if found is None:
            raise ValueError(f"{self.folder}: has no {key}; the database is incomplete, make it again")
        return found.decode()

    def row(self, index: int) -> Row:
        prompt, data = self._text(f"prompts_{index}_data"), self._get(f"latents_{index}_data")
        if data is None or len(data) != 2 * int(np.prod(self.shape)):
            raise ValueError(f"{self.folder}: row {index} has {len(data or b'')} bytes of latents, not {self.shape}")
        latents = torch.from_numpy(np.frombuffer(data, np.float16).reshape(self.shape).astype(np.float32))
        if not latents.isfinite().all():
            raise ValueError(f"{self.folder}: the latents of row {index} ({prompt[:60]!r}) are not all numbers")
        latents = latents[None] if latents.ndim == 4 else latents
        return Row(prompt, latents, self._image(index))

    def _image(self, index: int) -> Tensor | None:
        data = self._get(f"img_{index}_data")
        if data is None:
            return None
        if self.image_size is None or len(data) != 3 * self.image_size[0] * self.image_size[1]:
            raise ValueError(
                f"{self.folder}: a picture has {len(data)} bytes, and its size is not recorded or does not fit; give "
                "the pictures' height and width (the reference's are 480 x 832)"
            )
        pixels = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(*self.image_size, 3).copy())
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


# -------------------------------------------------------------- .pt files --
def read_pairs(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(prompt, latents [S, T, C, H, W] or [T, C, H, W]) of a .pt file {prompt: tensor with a leading axis of one}."""
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that is fed damaged bytes may raise anything
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    is_pairs = isinstance(held, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items())
    if not is_pairs:
        raise ValueError(f"{path}: is no dictionary from prompts to latents")
    for prompt, latents in held.items():
        if latents.ndim not in (5, 6) or latents.shape[0] != 1:
            raise ValueError(f"{path}: latents of shape {tuple(latents.shape)} are not [1, (S,) T, C, H, W]")
        yield prompt, latents[0]


class DatabaseWriter:
    """Rows into a database; its room grows as needed, and its shape is that of the rows that were really written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "data.mdb").exists():
            raise ValueError(f"{folder}: holds a database already; choose another folder")
        # Without a lock file, which is mapped: where the disk is full, touching it would kill the process (SIGBUS).
        self.database = lmdb.open(str(folder), map_size=GROWTH, writemap=False, lock=False)
        self.count, self.shape = 0, ()

    def add(self, prompt: str, latents: Tensor, image_HWR: Tensor | None = None) -> None:
        """One row. image_HWR: uint8. Raises ValueError if its latents have another shape than those before."""
        if self.count and tuple(latents.shape) != self.shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)} among others of {self.shape}")
        self.shape = tuple(latents.shape)
        entries = {
            f"latents_{self.count}_data": latents.to(torch.float16).contiguous().numpy().tobytes(),
            f"prompts_{self.count}_data": prompt.encode(),
        }
        if image_HWR is not None:
            entries[f"img_{self.count}_data"] = image_HWR.contiguous().numpy().tobytes()
            entries["img_size"] = f"{image_HWR.shape[0]} {image_HWR.shape[1]}".encode()
        self.count += 1
        shape = " ".join(map(str, (self.count, *self.shape)))
        names = ARRAYS if image_HWR is not None else ARRAYS[:2]
        entries |= {f"{name}_shape": (shape if name == "latents" else str(self.count)).encode() for name in names}
        self._put(entries)

    def _put(self, entries: dict[str, bytes]) -> None:
        while True:
            try:
                with self.database.begin(write=True) as transaction:
                    for key, value in entries.items():
                        transaction.put(key.encode(), value)
                return
            except lmdb.MapFullError:
                self.database.set_mapsize(self.database.info()["map_size"] + GROWTH)

    def close(self) -> None:
        self.database.sync()
        self.database.close()


def write_shards(rows: Iterable[tuple[int, str, Tensor, Tensor | None]], out: Path, num_shards: int) -> dict[str, int]:
    """(file number, prompt, latents, picture) into a new database, or into shard_<i> of it by file number.

    The first row of a prompt wins; rows whose latents are not numbers are left out; both are counted. The folder
    appears whole or not at all. Raises ValueError if it is there already, NotWritten where it cannot be.
    """
    told = {"written": 0, "duplicate_prompts": 0, "not_numbers": 0}
    seen: set[str] = set()
    with replacing_folder(out) as partial:
        folders = [partial] if num_shards == 1 else [partial / f"shard_{index}" for index in range(num_shards)]
        writers = [DatabaseWriter(folder) for folder in folders]
        try:
            for number, prompt, latents, image in rows:
                if prompt in seen:
                    told["duplicate_prompts"] += 1
                elif not latents.isfinite().all():
                    told["not_numbers"] += 1
                else:
                    seen.add(prompt)
                    writers[number % num_shards].add(prompt, latents, image)
                    told["written"] += 1
        finally:
            for writer in writers:
                writer.close()
    return told
