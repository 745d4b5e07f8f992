"""Clips on disk: databases in the reference's layouts, and the .pt files they are made from.

A database maps `latents_<i>_data` to float16 bytes, `prompts_<i>_data` to UTF-8, optionally `img_<i>_data` to RGB bytes
(uint8, [H, W, 3]), and `<array>_shape` to decimal numbers, the first of which is the number of rows. The reference does
not record the picture's size; ours does, under `img_size` ("H W"). The latents of a row are a clip, [T, C, H, W], or
the states of a trajectory, one such clip for each of its noise levels, noisiest first.

Letters: T latent frames, C latent channels, H W height and width of latents or of a picture, R RGB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch import Tensor

from selfforcing_core.atomic import replacing_folder
from train.randomness import item

GROWTH = 1 << 30  # bytes: LMDB wants to know how large a file may become, and is given more when that is reached
UNWRITTEN = 1 << 20  # bytes at a database's end that may be missing: pages that were freed before they were written
ARRAYS = ("latents", "prompts", "img")


@dataclass(frozen=True)
class Row:
    """One example."""

    prompt: str
    states: Tensor  # float32, clips [T, C, H, W] stacked: those of a trajectory, or one
    image_RHW: Tensor | None = None  # in [-1, 1]


class BadRow(ValueError):
    """One row that cannot be used, while others of its database may. kind: the reason in a word or two."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


class ClipDatabase:
    """One database, or a folder of shards, as one list of rows.

    image_size: (H, W) of the pictures, for databases that do not record it.
    Raises ValueError, naming the file, for whatever is not such a database, and BadRow for a row that cannot be used.
    """

    def __init__(self, path: str | Path, image_size: tuple[int, int] | None = None) -> None:
        path = Path(path)
        folders = [path] if (path / "data.mdb").is_file() else sorted(p.parent for p in path.glob("*/data.mdb"))
        if not folders:
            raise ValueError(f"{path}: holds no data.mdb, neither itself nor in folders below; give a database")
        self.path = path
        self.shards = [_Shard(folder, image_size) for folder in folders]
        if not len(self):
            raise ValueError(f"{path}: holds no row; make it with train.make_lmdb or train.make_latents")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of every row: states, latent frames, channels, height, width. Raises ValueError if shards differ in it."""
        first = self.shards[0]
        for shard in self.shards:
            if shard.shape != first.shape:
                raise ValueError(
                    f"{shard.folder}: has rows of {_times(shard.shape)}, but {first.folder} of {_times(first.shape)}; "
                    "give shards of one shape"
                )
        return (1, *first.shape) if len(first.shape) == 4 else first.shape  # type: ignore[return-value]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, index: int) -> Row:
        shard, place = self.place(index)
        return shard.row(place)

    def prompt(self, index: int) -> str:
        """Return the prompt of a row alone, without reading its latents."""
        shard, place = self.place(index)
        return shard.prompt(place)

    def place(self, index: int) -> tuple[_Shard, int]:
        """Return the shard in which a row lies, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for shard in self.shards:
            if index < len(shard):
                return shard, index
            index -= len(shard)
        raise AssertionError


class ShuffledRows:
    """A database's rows as a run sees them: every one once per epoch, in another order in each.

    In place of a bad row comes the next good one of the same epoch: which one that is depends on the row's number
    alone, not on what was read before, so that a resumed run and every number of processes see the same rows.
    """

    def __init__(self, data: ClipDatabase, seed: int) -> None:
        self.data, self.seed = data, seed
        self.bad: list[str] = []  # why rows were replaced, since the list was last cleared

    def take(self, numbers: Iterable[int]) -> list[Row]:
        """Read the rows that a run sees as these numbers, counted over all its epochs.

        Raises ValueError if no row of the database is good.
        """
        return [self._row(number) for number in numbers]

    def _row(self, number: int) -> Row:
        count = len(self.data)
        epoch, place = divmod(number, count)
        mistake = ""
        for more in range(count):
            try:
                row = self.data[item(self.seed, epoch * count + (place + more) % count, count)]
            except BadRow as error:
                mistake = mistake or str(error)
                continue
            if mistake:
                self.bad.append(mistake)
            return row
        raise ValueError(f"{self.data.path}: no row can be used; python -m train.check_data {self.data.path} says why")


def _can_be_read(folder: Path) -> bool:
    """Return whether every entry of a database can be read.

    LMDB maps its file: reading beyond the end of a short one kills the process (SIGBUS), so that another process tries.
    """
    walk = (
        "import lmdb, sys\n"
        "with lmdb.open(sys.argv[1], readonly=True, lock=False).begin() as all:\n"
        "    sum(len(value) for _, value in all.cursor())"
    )
    return subprocess.run([sys.executable, "-c", walk, str(folder)], capture_output=True, check=False).returncode == 0


class _Shard:
    def __init__(self, folder: Path, image_size: tuple[int, int] | None) -> None:
        self.folder = folder
        try:
            self.database = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise ValueError(f"{folder}: is no LMDB database ({error})") from error
        # The file has to reach to the last page that the database knows. One that was copied while it was written, or
        # not to its end, is shorter.
        size = (self.database.info()["last_pgno"] + 1) * self.database.stat()["psize"]
        missing = size - (folder / "data.mdb").stat().st_size
        if missing > UNWRITTEN or (missing > 0 and not _can_be_read(folder)):
            raise ValueError(f"{folder}: data.mdb is cut off, {missing} of {size} bytes are missing; copy it again")
        shape = self._text("latents_shape").split()
        if len(shape) not in (5, 6) or not all(number.isdecimal() for number in shape):
            raise ValueError(f"{folder}: latents_shape is {' '.join(shape)!r}, not rows and the shape of one")
        self.count, self.shape = int(shape[0]), tuple(map(int, shape[1:]))
        recorded = self._get("img_size")
        self.is_size_recorded = recorded is not None
        self.image_size = tuple(map(int, recorded.split())) if recorded else image_size

    def __len__(self) -> int:
        return self.count

    def _get(self, key: str) -> bytes | None:
        try:
            with self.database.begin() as transaction:
                value = transaction.get(key.encode())
                return None if value is None else bytes(value)
        except lmdb.Error as error:
            raise BadRow("damaged", f"{self.folder}: {key} cannot be read ({error})") from error

    def _text(self, key: str) -> str:
        value = self._get(key)
        if value is None:
            raise ValueError(f"{self.folder}: has no {key}; the database is incomplete, make it again")
        return value.decode()

    def has_more(self) -> bool:
        """Return whether there are rows beyond the number that is recorded."""
        return self._get(f"latents_{self.count}_data") is not None

    def prompt(self, index: int) -> str:
        data = self._get(f"prompts_{index}_data")
        if data is None:
            raise BadRow("no prompt", f"{self.folder}: row {index} has no prompt")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadRow("no text", f"{self.folder}: the prompt of row {index} is not UTF-8 ({error})") from error

    def row(self, index: int) -> Row:
        prompt, data = self.prompt(index), self._get(f"latents_{index}_data")
        name, expected = f"row {index} ({prompt[:60]!r})", 2 * int(np.prod(self.shape))
        if data is None:
            raise BadRow("no latents", f"{self.folder}: {name} has no latents")
        if len(data) != expected:
            size = f"the {expected} of {_times(self.shape)} in float16"
            raise BadRow("wrong size", f"{self.folder}: {name} has {len(data)} bytes of latents, not {size}")
        latents = torch.from_numpy(np.frombuffer(data, np.float16).reshape(self.shape).astype(np.float32))
        if not latents.isfinite().all():
            raise BadRow("NaN or Inf", f"{self.folder}: the latents of {name} hold NaN or Inf")
        latents = latents[None] if latents.ndim == 4 else latents
        return Row(prompt, latents, self._image(index))

    def _image(self, index: int) -> Tensor | None:
        data = self._get(f"img_{index}_data")
        if data is None:
            return None
        own_size = self._get(f"img_{index}_size")  # of a picture that is unlike the database's first
        image_size = tuple(map(int, own_size.split())) if own_size else self.image_size
        if image_size is None or len(data) != 3 * image_size[0] * image_size[1]:
            if self.is_size_recorded:
                size = f"{len(data)} bytes, not the {_times(image_size or ())} x 3 that are recorded"
                raise BadRow("wrong size", f"{self.folder}: the picture of row {index} has {size}")
            raise ValueError(
                f"{self.folder}: a picture has {len(data)} bytes, and its size is not recorded or does not fit; give "
                "the pictures' height and width (the reference's are 480 x 832)"
            )
        pixels = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(*image_size, 3).copy())
        return pixels.permute(2, 0, 1).float() / 127.5 - 1  # [0, 255] to the [-1, 1] of VAE and CLIP


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


# -------------------------------------------------------------- .pt files --
def read_pairs(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (prompt, latents) of a .pt file {prompt: tensor with a leading axis of one}, latents as a row has them.

    Raises ValueError for whatever is no such file.
    """
    try:
        pairs: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that is fed damaged bytes may raise anything
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    is_pairs = isinstance(pairs, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs.items())
    if not is_pairs:
        raise ValueError(f"{path}: is no dictionary from prompts to latents")
    for prompt, latents in pairs.items():
        if latents.ndim not in (5, 6) or latents.shape[0] != 1:
            raise ValueError(f"{path}: latents of shape {tuple(latents.shape)} are not [1, (states,) T, C, H, W]")
        yield prompt, latents[0]


class DatabaseWriter:
    """Writes rows into a database that grows as needed.

    Its recorded shape is that of the rows that were really written, whenever the writer stops.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "data.mdb").exists():
            raise ValueError(f"{folder}: holds a database already; choose another folder")
        # Without a lock file, which is mapped: where the disk is full, touching it would kill the process (SIGBUS).
        self.database = lmdb.open(str(folder), map_size=GROWTH, writemap=False, lock=False)
        self.count, self.shape = 0, ()
        self.image_size: tuple[int, int] | None = None  # of the first image

    def add(self, prompt: str, latents: Tensor, image_HWR: Tensor | None = None) -> None:
        """Add a row. image_HWR: uint8. Raises ValueError if its latents have another shape than those before."""
        if self.count and tuple(latents.shape) != self.shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} among others of {self.shape}; keep one size in a database"
            )
        self.shape = tuple(latents.shape)
        entries = {
            # float16 as in the reference: latents lie within a few units of 0, where its steps are below 0.004
            f"latents_{self.count}_data": latents.to(torch.float16).contiguous().numpy().tobytes(),
            f"prompts_{self.count}_data": prompt.encode(),
        }
        if image_HWR is not None:
            entries[f"img_{self.count}_data"] = image_HWR.contiguous().numpy().tobytes()
            size = (image_HWR.shape[0], image_HWR.shape[1])
            self.image_size = self.image_size or size
            entries["img_size"] = "{} {}".format(*self.image_size).encode()
            if size != self.image_size:  # upright and wide ones lie beside each other
                entries[f"img_{self.count}_size"] = "{} {}".format(*size).encode()
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
            except lmdb.MapFullError:  # the transaction is undone, and the whole row is put again
                self.database.set_mapsize(self.database.info()["map_size"] + GROWTH)

    def close(self) -> None:
        self.database.sync()
        self.database.close()


def write_shards(rows: Iterable[tuple[int, str, Tensor, Tensor | None]], out: Path, num_shards: int) -> dict[str, int]:
    """Write (file number, prompt, latents, picture) into a new database, or into shard_<i> of it by file number.

    The first row of a prompt wins; rows whose latents hold NaN or Inf are left out; both are counted. The folder
    appears whole or not at all. Raises ValueError if it is there already, NotWritten where it cannot be.
    """
    counts = {"written": 0, "duplicate_prompts": 0, "not_numbers": 0}
    prompts: set[str] = set()
    with replacing_folder(out) as partial:
        folders = [partial] if num_shards == 1 else [partial / f"shard_{index}" for index in range(num_shards)]
        writers = [DatabaseWriter(folder) for folder in folders]
        try:
            for number, prompt, latents, image in rows:
                if prompt in prompts:
                    counts["duplicate_prompts"] += 1
                elif not latents.isfinite().all():
                    counts["not_numbers"] += 1
                else:
                    prompts.add(prompt)
                    # Dealt in turn, so that shards are of about the same size.
                    writers[number % num_shards].add(prompt, latents, image)
                    counts["written"] += 1
        finally:
            for writer in writers:
                writer.close()
        for folder, writer in zip(folders, writers):
            if counts["written"] and not writer.count:  # a shard without rows could not be opened
                shutil.rmtree(folder)
    return counts
