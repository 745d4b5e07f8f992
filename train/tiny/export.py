"""Put a trained checkpoint into the bundle: bfloat16 weights, the header kept.

python -m train.tiny.export out/tiny/dmd.200.safetensors --out assets/tiny/model.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open

from selfforcing_core.generate.cli import Parser
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from train.tiny.codec import LATENT_SPACE
from train.tiny.diffusion import TRAINED_KEY


def export(source: Path, out: Path) -> None:
    """Write `source` in bfloat16 to `out`, with its causal settings, steps and list of training captions."""
    checkpoint = read_checkpoint(source)
    with safe_open(source, "pt") as file:
        trained = file.metadata()[TRAINED_KEY]
    # Half the bytes; the networks are read as float32 again where a CPU computes.
    state = {key: value.to(torch.bfloat16) for key, value in checkpoint.state_dict.items()}
    settings = {"causal": checkpoint.causal, "steps": checkpoint.steps}
    save_checkpoint(out, state, checkpoint.config, {TRAINED_KEY: trained}, **settings, latent_space=LATENT_SPACE)


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.source, args.out)


if __name__ == "__main__":
    main()
