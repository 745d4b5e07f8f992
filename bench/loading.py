"""From a checkpoint of real size to the first chunk: seconds, and memory that never holds the weights twice.

    python -m bench.loading --json --out bench/results/loading-cpu-1thread.json
    python -m bench.loading --preset t2v-14b --layers 2 --out bench/results/loading-14b-2layers-cpu-1thread.json

A file with random weights in the shapes of Wan 2.1 1.3B is written first, and one of them in 8 bits with scales. Each
measurement is a process of its own. Anonymous memory is what a process really allocates; pages mapped from the file are
counted apart, the system takes them back when it needs them. The frame is small: the figures are about loading, not
about speed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig, WanConfig
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import save_checkpoint
from selfforcing_core.weights.load import load_model

LATENT_SHAPE = (3, 16, 8, 8)  # one chunk of 64x64 pixels
# As stored, weights may stay mapped; converted, each is read once and its stored form let go.
SCALED = "8 bits with scales to bfloat16"
CASES = ("bfloat16 as stored", "bfloat16 to float32", SCALED)


def write_checkpoints(plain: Path, scaled: Path, config: WanConfig) -> int:
    """Write random bfloat16 weights, and the same in 8 bits with scales; return the bytes of the first."""
    generator = torch.Generator().manual_seed(0)
    # Small numbers, so that thirty layers of them give no NaN.
    shapes = wan_shapes(config)
    state = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    save_checkpoint(plain, state, config, causal=CausalConfig(), steps=StepConfig())
    size = sum(tensor.nbytes for tensor in state.values())
    header = read_header_entries(plain)
    for name in [name for name, tensor in state.items() if name.startswith("blocks.") and tensor.ndim == 2]:
        weight = state[name].float()
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        state[name] = (weight / scale).to(torch.float8_e4m3fn)
        state[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(state, scaled, header)
    return size


def read_header_entries(path: Path) -> dict[str, str]:
    """Return the entries of a safetensors file's header."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


class Watch:
    """Peak of a process's anonymous and mapped memory in bytes, sampled by a thread (Linux)."""

    def __init__(self) -> None:
        self.anonymous = self.mapped = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.01):  # seconds: a copy of a large matrix takes longer, and so is seen
            self._look()

    def _look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        self.anonymous = max(self.anonymous, kilobytes["RssAnon"] * 1024)
        self.mapped = max(self.mapped, kilobytes["RssFile"] * 1024)

    def stop(self) -> dict[str, int]:
        """End watching, and return the peaks."""
        self._look()
        self.done.set()
        self.thread.join()
        return {"anonymous_bytes": self.anonymous, "mapped_bytes": self.mapped}


@torch.no_grad()
def measure(path: Path, case: str) -> dict[str, Any]:
    """Load and make one chunk, in this process."""
    torch.set_num_threads(1)
    dtype = torch.float32 if case.endswith("float32") else torch.bfloat16
    before, watch, start = Watch().stop(), Watch(), time.perf_counter()
    model, checkpoint = load_model(path, dtype=dtype)
    end_of_loading, loading = time.perf_counter(), watch.stop()
    watch = Watch()
    conditioning = Conditioning(torch.zeros(1, 8, model.config.text_dim, dtype=dtype))
    assert checkpoint.causal is not None
    assert checkpoint.steps is not None
    chunks = rollout(
        Guided(model, conditioning),
        noise=SeededNoise(0),
        latent_shape=LATENT_SHAPE,
        causal=checkpoint.causal,
        steps=checkpoint.steps,
    )
    for _ in chunks:
        pass
    return {
        "case": case,
        "weight_bytes_in_memory": sum(parameter.nbytes for parameter in model.parameters()),
        "before": before,
        "while_loading": loading,
        "while_generating": watch.stop(),
        "seconds_to_load": end_of_loading - start,
        "seconds_from_start_to_first_chunk": time.perf_counter() - start,
    }


def run(preset: str, layers: int | None) -> dict[str, Any]:
    """Write the files, and measure each case in a process of its own, whose memory nothing before it has grown."""
    config = replace(NETWORK_SIZES[preset], num_layers=layers or NETWORK_SIZES[preset].num_layers)
    block = sum(math.prod(shape) for name, shape in wan_shapes(config).items() if name.startswith("blocks.0."))
    with tempfile.TemporaryDirectory() as folder:
        plain, scaled = Path(folder) / "model.safetensors", Path(folder) / "scaled.safetensors"
        size = write_checkpoints(plain, scaled, config)
        results = []
        for case in CASES:
            path = scaled if case == SCALED else plain
            command = [sys.executable, "-m", "bench.loading", "--measure", str(path), "--case", case]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(process.stdout))
    return {
        "preset": preset,
        "layers": config.num_layers,
        "file_bytes": size,
        "layer_bytes_in_bfloat16": 2 * block,
        "latent_shape": LATENT_SHAPE,
        "cases": results,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.loading", *sys.argv[1:]]),
        "date": now(),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(NETWORK_SIZES), default="t2v-1.3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has, where memory is short")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.case)))
        return
    result = run(args.preset, args.layers)
    text = write(result, args.out)
    if args.json:
        print(text)
        return
    for case in result["cases"]:
        peak, weights = case["while_loading"]["anonymous_bytes"] / 1e9, case["weight_bytes_in_memory"] / 1e9
        print(f"{case['case']}: {weights:.2f} GB of weights, peak {peak:.2f} GB, {case['seconds_to_load']:.1f} s")


if __name__ == "__main__":
    main()
