"""The picture at the top of the README: one row of frames per prompt, evenly spaced over a long video.

python -m train.tiny.strip --out docs/strip.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from selfforcing_core.codecs.video import write_contact_sheet
from selfforcing_core.generate.cli import Parser
from selfforcing_core.weights.bundles import bundle_path
from train.tiny.evaluate import Generator

PROMPTS = (
    "a red square moving left slowly on a navy background",
    "a yellow triangle moving down quickly on a purple background",
    "a white circle moving right slowly on a brown background",
)
FRAMES, COLUMNS = 141, 12  # four times the length that the model was trained on


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    bundle = bundle_path("tiny")
    generator = Generator(bundle / "model.safetensors", bundle / "taehv.safetensors", bundle / "text_encoder")
    videos = generator.frames(list(PROMPTS), FRAMES, args.seed)
    shown = torch.linspace(0, FRAMES - 1, COLUMNS).round().long()
    write_contact_sheet(args.out, videos[:, shown].flatten(0, 1), columns=COLUMNS, overwrite=True)


if __name__ == "__main__":
    main()
