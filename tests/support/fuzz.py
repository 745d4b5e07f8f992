"""Damaged checkpoints and argument lines by the thousand: each is one line and exit status 2, and leaves no file.

Of numbers that may or may not do, the answer is that line or a video of finite latents that plays. Of text that people
type (settings, prompt files, schedules, launch lines), not a letter is changed on its way, or it is refused.

Videos, pictures and sounds are in fuzz_media.py, which can be run alone.

python -m tests.support.fuzz --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import struct
import sys
import tempfile
import time
from pathlib import Path

import av
import torch
from safetensors.torch import load_file

from selfforcing_core.codecs.text import clean_prompt
from selfforcing_core.codecs.video import read_video
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.generate.cli import main as command_line
from selfforcing_core.generate.prompt_files import read_lines
from selfforcing_core.prompt_schedule import parse_schedule, schedule_note
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.bundles import bundle_path
from selfforcing_core.weights.checkpoint import save_checkpoint
from tests.support.fuzz_media import MediaFuzzer
from train.args import DiffusionArgs, DmdArgs, OdeArgs, parse, to_dict, to_yaml
from train.conditions import read_texts
from train.export import ExportArgs

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


# What YAML, shells, editors and schedules take for more than letters.
PIECES = [
    "#", " #", ": ", ":", "[", "]", "{", "}", "$", "${", "${lr}", "'", '"', "\\", "007", "0", "1e5", "null", "~",
    "true", "- ", "? ", "!", "&", "*", "%", "@", "`", "|", ">", "<<", "=", "0s:", "3s: ", "\n1990s:", ";", "; 2.5s: ",
    "\uff1b3s\uff1a", " ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\xa0",
    "\ufeff", "\u200b", "\x07", "\u201c", "\u2019", "\uff08", "\ufb01", "&amp;", "&amp;amp;lt;", "<b>",
    "a red square", "\u732b", "\U0001f600", "--", "\u00c3\u00a9", "e\u0301", ",", "/", ".", "None", "0x1f", "-", "_",
]  # fmt: skip


class TextFuzzer:
    """Makes one odd text after another and says where a letter of it was changed."""

    def __init__(self, folder: Path, chooser: random.Random) -> None:
        self.folder, self.random = folder, chooser
        self.kinds = [self.setting, self.launch_line, self.prompt_file, self.schedule, self.cleaning]

    def text(self, length: int = 8) -> str:
        """Pieces, and printable letters from anywhere in Unicode."""
        letters = (chr(self.random.randrange(0x3000 if self.random.random() < 0.8 else 0x20000)) for _ in iter(int, 1))
        printable = (letter for letter in letters if letter.isprintable())
        count = self.random.randrange(length + 1)
        return "".join(
            self.random.choice(PIECES) if self.random.random() < 0.6 else next(printable) for _ in range(count)
        )

    def try_one(self, index: int) -> str | None:
        kind = self.kinds[index % len(self.kinds)]
        try:
            complaint = kind()
        except Exception as error:  # whatever escapes would have been a traceback
            complaint = f"{type(error).__name__}: {error}"
        for name in os.listdir(self.folder):
            (self.folder / name).unlink()
        return None if complaint is None else f"{kind.__name__}: {complaint}"

    def setting(self) -> str | None:
        """key=value -> settings -> the run's own file -> settings."""
        kind = self.random.choice([DmdArgs, DiffusionArgs, OdeArgs, ExportArgs])
        names = [name for name, value in to_dict(kind()).items() if isinstance(value, str)]
        typed = {name: self.text() for name in self.random.sample(names, 3)}
        args = parse(kind, [f"{name}={text}" for name, text in typed.items()])
        file = self.folder / "config.yaml"
        file.write_text(to_yaml(args), encoding="utf-8")
        if parse(kind, [f"config={file}"]) != args or any(getattr(args, name) != typed[name] for name in typed):
            return repr(typed)
        for name in typed:  # a file of one's own, in YAML's single quotes, which keep all of a line
            if typed[name].isprintable():
                file.write_text(f"{name}: '" + typed[name].replace("'", "''") + "' # a note\n", encoding="utf-8")
                if getattr(parse(kind, [f"config={file}"]), name) != typed[name]:
                    return repr(typed[name])
        return None

    def launch_line(self) -> str | None:
        """Anything at all, as arguments and as a file: settings, or one line that says why not."""
        names = [*to_dict(DmdArgs()), "config", self.text(2)]
        words = []
        for _ in range(3):
            setting = f"{self.random.choice(names)}={self.random.choice([*JUNK, *NUMBERS, self.text()])}"
            option = self.random.choice(["--logdir", "--no_save", "--", "--wandb-save-dir", self.text(3)])
            words.append(self.random.choice([setting, option]))
        file = self.folder / "ours.yaml"
        file.write_text("".join(f"{self.random.choice(names)}: {self.text()}\n" for _ in range(2)), "utf-8", "replace")
        for line in (words, [f"config={file}"]):
            try:
                args = parse(DmdArgs, [word for word in line if word not in ("-h", "--help")])
            except ValueError as error:
                if not str(error):
                    return repr(line)
            else:
                file.write_text(to_yaml(args), encoding="utf-8")
                if parse(DmdArgs, [f"config={file}"]) != args:
                    return repr(line)
        return None

    def prompt_file(self) -> str | None:
        """Lines end at line ends alone, and nothing between them is lost."""
        text = self.text(30)
        data = text.encode("utf-8", "replace")
        (self.folder / "prompts.txt").write_bytes(data)
        lines = re.split(r"\r\n|\n|\r", data.decode("utf-8-sig"))
        expected = [line.strip() for line in lines if line.strip()]
        if not expected:
            return None
        kept = read_lines(self.folder / "prompts.txt")
        is_same = kept in (lines, lines[:-1]) and read_texts(str(self.folder / "prompts.txt")) == expected
        (self.folder / "prompts.txt").rename(self.folder / "a.txt")
        return None if is_same and read_texts(str(self.folder)) == [" ".join(expected)] else repr(text)

    def schedule(self) -> str | None:
        """A prompt as it was typed, or entries that stand in it, or a refusal."""
        text = self.random.choice(["", "0s: a", "3s:"]) + self.text(12)
        try:
            entries = parse_schedule(text)
        except ValueError:
            return None
        if len(entries) == 1 and (schedule_note(text) is not None or entries[0].prompt == text):
            is_read = entries[0].prompt == text or text.strip().startswith("0s:")
            return None if is_read and entries[0].seconds == 0 else repr(text)
        at, last = 0, -1.0
        for entry in entries:
            at = text.find(entry.prompt, at)
            if at < 0 or entry.seconds <= last or not entry.prompt:
                return repr(text)
            at, last = at + len(entry.prompt), entry.seconds
        return None if entries[0].seconds == 0 else repr(text)

    def cleaning(self) -> str | None:
        """No text is too odd for the tokenizer's cleaning, and what comes out is on one line without ends."""
        text = self.text(20)
        cleaned = clean_prompt(text)
        return None if cleaned == " ".join(cleaned.split()) else repr(text)


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
        self.texts = TextFuzzer(folder, self.random)
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
        models = ["--model", str(path), "--taehv", "tiny", "--text-encoder", "tiny"]
        video = ["generate", "--prompt", "a", "--out", str(self.folder / "out.mp4"), *models]
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
        if index % 4 == 3:
            return self.texts.try_one(index // 4)
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
        report = err.getvalue().rpartition("chunk/s]\n")[2]  # what stands behind the progress bar
        if status != 2 or report.count("\n") != 1 or "Traceback" in report or out.getvalue() or left:
            return f"{arguments}: status {status}, left {sorted(left)}, said {report!r} {out.getvalue()[:200]!r}"
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
    actual = (fuzzer.try_one(index) for index in range(count))
    return [complaint for complaint in actual if complaint]


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
