"""A folder of .pt files {prompt: latents} to one database, or to shards, in the reference's layout.

    python -m train.make_lmdb --data_path latents --lmdb_path clips --num_shards 16
    python -m train.make_lmdb --data_path latents --lmdb_path clips --video_path videos --prompt_path prompts

With --video_path the first frame of VIDEO/<stem>.mp4 is kept as well, and its size. With --prompt_path the prompt is
that of PROMPTS/<stem>.txt. Whatever is left out is counted.

Letters: H W height and width in pixels.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_core.atomic import print_result
from selfforcing_core.codecs.video_reader import VideoReader
from selfforcing_core.generate.cli import Parser
from selfforcing_core.generate.prompt_files import read_one
from train.args import mistake
from train.data import read_pairs, write_shards

log = logging.getLogger(__name__)


def files_of(folder: Path) -> list[Path]:
    """List the .pt files of a folder and of those below it, in the order of their paths."""
    files = sorted(folder.rglob("*.pt"))
    if not files:
        raise ValueError(f"{folder}: holds no .pt file; give the folder that a teacher's trajectories were written to")
    return files


def first_frame(path: Path) -> Tensor:
    """Return the first picture of a video, upright, uint8 [H, W, 3]."""
    frames, findings = VideoReader(path).first_frames(1)
    for note in findings.in_words():
        log.warning("%s: %s", path, note)
    # Bytes in rows of pixels, as the reference's databases keep pictures.
    return (frames[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def rows_of(
    files: list[Path], videos: Path | None, prompts: Path | None, min_prompt: int, counts: dict[str, int]
) -> Iterator[tuple[int, str, Tensor, Tensor | None]]:
    """Yield (file number, prompt, latents, picture) of every usable row; the others are counted in `counts`."""
    for number, path in enumerate(files):
        for stored_prompt, latents in read_pairs(path):
            text = None if prompts is None else prompts / f"{path.stem}.txt"
            video = None if videos is None else videos / f"{path.stem}.mp4"
            if (text is not None and not text.is_file()) or (video is not None and not video.is_file()):
                counts["missing_files"] += 1  # what belongs to one row came from several tools, and may be incomplete
                continue
            prompt = stored_prompt if text is None else read_one(text)
            if len(prompt) < max(min_prompt, 1):  # short ones say little of a clip; the reference drops those below 300
                counts["short_prompts"] += 1
                continue
            yield number, prompt, latents, None if video is None else first_frame(video)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(prog="python -m train.make_lmdb", description=str(__doc__).splitlines()[0])
    parser.add_argument("--data_path", type=Path, required=True, help="folder of .pt files, also in folders below")
    parser.add_argument("--lmdb_path", type=Path, required=True, help="new database, or folder of shards")
    parser.add_argument("--num_shards", type=int, default=1, help="databases to divide the files among (default: 1)")
    parser.add_argument("--video_path", type=Path, help="folder of the videos; their first frames are kept")
    parser.add_argument("--prompt_path", type=Path, help="folder of prompts, one .txt per file")
    parser.add_argument("--min_prompt", type=int, default=0, help="leave out shorter prompts (the reference: 300)")
    options = parser.parse_args(argv)
    counts = {"missing_files": 0, "short_prompts": 0}
    try:
        if options.num_shards < 1:
            raise ValueError(f"num_shards {options.num_shards} is no number of databases; use 1 or more")
        rows = rows_of(files_of(options.data_path), options.video_path, options.prompt_path, options.min_prompt, counts)
        # Rows are read while they are written, so that `counts` is complete only after this.
        counts |= write_shards(rows, options.lmdb_path, options.num_shards)
        print_result(json.dumps(counts))
    except (ValueError, OSError) as error:
        return mistake("train.make_lmdb", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
