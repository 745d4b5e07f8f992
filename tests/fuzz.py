"""Damaged checkpoints and argument lines by the thousand: each is one line and exit status 2, and leaves no file.

Of numbers that may or may not do, the answer is that line or a video of finite latents that plays.

Videos, pictures and sounds are in fuzz_media.py, which can be run alone.

python -m tests.fuzz --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import av
import torch
from safetensors.torch import load_file

from selfforcing_core.checkpoint import save_checkpoint
from selfforcing_core.cli import main as command_line
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.hub import bundle_path
from selfforcing_core.layout import wan_shapes
from selfforcing_core.video import read_video
from tests.fuzz_media import MediaFuzzer

WAN = WanConfig(dim=32, ffn_dim=32, num_heads=1, num_layers=1, text_dim=128, text_len=16, freq_dim=16)
JUNK = ["", "-1", "0", "nan", "inf", "1e99", "\u2603", "a" * 300, "..", "/", "{}", "1,2", "x y", "-", "34"]
FLOATS = ["--shift", "--cfg", "--fps", "--steps"]
NUMBERS = ["nan", "-nan", "inf", "-inf", "-0.0", "1e-320", "1e-30", "1e-4", "0.5", "999.5", "1e9", "1e30", "1e99"]
VALUED = [
    "--frames", "--width", "--height", "--seed", "--steps", "--shift", "--chunk", "--window", "--sink", "--fps",
    "--cfg", "--solver", "--attention", "--dtype", "--device", "--decoder", "--model", "--taehv", "--text-encoder",
    "--vae", "--image", "--extend", "--samples", "--batch", "--weights", "--taehv-latents", "--sheet", "--prompt-file",
    "--out",
]  # fmt: skip


class Fuzzer:
    """Makes one damaged input after another and says what the command line answered."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(shape, generator=generator) for name, shape in wan_shapes(WAN).items()}
        save_checkpoint(folder / "a.safetensors", weights, WAN, causal=CausalConfig(), steps=StepConfig())
        torch.save({"generator": {f"model.{name}": tensor for name, tensor in weights.items()}}, folder / "b.pt")
        self.files = [(folder / name).read_bytes() for name in ("a.safetensors", "b.pt")]
        for name in ("a.safetensors", "b.pt"):
            (folder / name).unlink()
        self.media = MediaFuzzer(folder, self.random)

    # ------------------------------------------------------------- checkpoints --
    def damaged(self) -> bytes:
        """A checkpoint that can no longer be right: cut, with a broken header, or with foreign names or shapes."""
        pick, data = self.random, bytearray(self.random.choice(self.files))
        kind = pick.randrange(6)
        if kind == 0:
            return bytes(data[: pick.randrange(len(data))])
        if kind == 1:
            return bytes(pick.randbytes(pick.randrange(1, 400)))
        if kind == 2:  # the first bytes, which say how to read the rest
            for _ in range(pick.randrange(1, 9)):
                data[pick.randrange(8)] ^= pick.randrange(1, 256)
            return bytes(data)
        return self._other_header(kind)

    def _other_header(self, kind: int) -> bytes:
        """A safetensors file whose header lies about its tensors or holds something else."""
        pick, data = self.random, self.files[0]
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        name = pick.choice([key for key in header if key != "__metadata__"])
        if kind == 3:
            header[name + pick.choice(["x", ".lora_A", " "])] = header.pop(name)
        elif kind == 4:
            lies = {"dtype": ["I8", "Q4"], "shape": [[1], [-1], "x"], "data_offsets": [[0, 1]]}
            field = pick.choice(sorted(lies))
            header[name] = {**header[name], field: pick.choice(lies[field])}
        else:
            values = [
                "",
                "{",
                "[]",
                '{"format": 9}',
                '{"format": 1, "kind": "taehv"}',
                '{"format": 1, "config": {"dim": 7}}',
            ]
            header["__metadata__"]["selfforcing"] = pick.choice(values[1:])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    def checkpoint_command(self) -> list[str]:
        path = self.folder / self.random.choice(["x.safetensors", "x.pt", "x"])
        path.write_bytes(self.damaged())
        out = str(self.folder / "out.safetensors")
        video = ["generate", "--prompt", "a", "--out", str(self.folder / "out.mp4"), "--model", str(path),
                 "--taehv", "tiny", "--text-encoder", "tiny"]  # fmt: skip
        return self.random.choice([["inspect", str(path)], ["convert", str(path), out], video])

    # ---------------------------------------------------------- argument lines --
    def argument_command(self) -> list[str]:
        """A line with at least one part that cannot be right."""
        pick = self.random
        line = ["generate", "--model", "tiny", "--prompt", "a", "--out", str(self.folder / "out.mp4")]
        for _ in range(pick.randrange(1, 4)):
            line += [pick.choice(VALUED), pick.choice(JUNK)]
        wrong = pick.choice([["--frames", "34"], ["--nonsense"], ["--width", "7"], ["--steps", "0"], ["--chunk", "0"]])
        return [*line, *wrong]

    def number_command(self) -> list[str]:
        """A line in which everything is right but one number, which may be."""
        pick, out = self.random, self.folder / "out"
        line = ["generate", "--prompt", "a", "--frames", "9", "--steps", "1000,500", "--out", f"{out}.mp4"]
        number = f"{pick.choice(FLOATS)}={pick.choice(NUMBERS)}"
        return [*line, "--latents", f"{out}.safetensors", "--json", "--threads", "1", number]

    # ------------------------------------------------------------------- check --
    def try_one(self, index: int) -> str | None:
        """What was wrong with the answer to one damaged input; None if nothing was."""
        if index % 8 == 5:
            return self.media.try_one()
        may_do = index % 12 == 0
        arguments = self.checkpoint_command() if index % 2 else self.argument_command()
        if may_do:
            arguments = self.number_command()
        inputs = set(os.listdir(self.folder))
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = command_line(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        except BaseException as error:  # whatever escapes would have been a traceback
            return f"{arguments}: {type(error).__name__}: {error}"
        left = set(os.listdir(self.folder)) - inputs
        if may_do and status == 0:
            return self._useless(arguments)
        for name in os.listdir(self.folder):
            (self.folder / name).unlink()
        told = err.getvalue().rpartition("chunk/s]\n")[2]  # what stands behind the progress bar
        if status != 2 or told.count("\n") != 1 or "Traceback" in told or out.getvalue() or left:
            return f"{arguments}: status {status}, left {sorted(left)}, said {told!r} {out.getvalue()[:200]!r}"
        return None

    def _useless(self, arguments: list[str]) -> str | None:
        """What is wrong with a video that was made; it is removed."""
        latents, frames = self.folder / "out.safetensors", self.folder / "out.mp4"
        with av.open(str(frames)) as file:
            rate = file.streams.video[0].average_rate
        is_finite, count = bool(load_file(latents)["latents"].isfinite().all()), len(read_video(frames))
        for path in (latents, frames):
            path.unlink()
        return None if is_finite and count == 9 and rate else f"{arguments}: {is_finite=}, {count=}, {rate=}"


def fuzz(count: int, seed: int, folder: Path) -> list[str]:
    """Complaints about the answers to `count` damaged inputs; `folder` is an empty one to work in."""
    fuzzer = Fuzzer(folder, seed)
    found = (fuzzer.try_one(index) for index in range(count))
    return [complaint for complaint in found if complaint]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    assert bundle_path("tiny")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        complaints = fuzz(args.count, args.seed, Path(folder))
    for complaint in complaints[:20]:
        print(complaint)
    print(f"{args.count} damaged inputs, {len(complaints)} bad answers, {time.monotonic() - started:.0f} s")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
