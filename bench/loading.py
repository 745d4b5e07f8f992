"""From a checkpoint of real size to the first chunk: seconds, and memory that never holds the weights twice.

    python -m bench.loading --json --out bench/results/loading-cpu-1thread.json
    python -m bench.loading --lora 256 --json --out bench/results/loading-lora-cpu-1thread.json

A file with random weights in the shapes of Wan 2.1 1.3B is written first. Each measurement is a process of its own.
Anonymous memory is what a process really allocates; pages mapped from the file are counted apart, the system takes them
back when it needs them. The frame is small: the figures are about loading, not about speed. With
--lora, one of that rank on every matrix of the blocks is merged, and the base is also read from a file that cannot be
mapped, where every copy would be allocated; the chunk then takes one step, since only memory is asked about.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig
from selfforcing_core.guided import Guided
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import save_checkpoint
from selfforcing_core.weights.load import load_model

LATENT_SHAPE = (3, 16, 8, 8)  # one chunk of 64x64 pixels
# As stored, weights may stay mapped; converted, each is read once and its bfloat16 form let go.
CASES = ("bfloat16 as stored", "bfloat16 to float32")
UNMAPPED = "bfloat16 that cannot be mapped"


def write_checkpoint(path: Path, preset: str, *, is_also_pickled: bool) -> int:
    """Write random bfloat16 weights, and return their bytes."""
    generator = torch.Generator().manual_seed(0)
    # Small numbers, so that thirty layers of them give no NaN.
    shapes = wan_shapes(NETWORK_SIZES[preset])
    state = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    save_checkpoint(path, state, NETWORK_SIZES[preset], causal=CausalConfig(), steps=StepConfig())
    if is_also_pickled:  # as torch wrote files before its archives
        torch.save(state, path.with_suffix(".pt"), _use_new_zipfile_serialization=False)
    return sum(tensor.nbytes for tensor in state.values())


def write_lora(path: Path, preset: str, rank: int) -> int:
    """Write a random LoRA of every matrix of the blocks in bfloat16, and return its bytes."""
    shapes = {name: shape for name, shape in wan_shapes(NETWORK_SIZES[preset]).items() if name.startswith("blocks.")}
    sizes = {
        f"{name.removesuffix('weight')}lora_{letter}.weight": size
        for name, shape in shapes.items()
        if len(shape) == 2
        for letter, size in (("A", (rank, shape[1])), ("B", (shape[0], rank)))
    }
    generator = torch.Generator().manual_seed(1)
    lora = {name: torch.randn(size, generator=generator).mul_(0.01).bfloat16() for name, size in sizes.items()}
    torch.save({"generator_lora": lora}, path)
    return sum(tensor.nbytes for tensor in lora.values())


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
def measure(path: Path, case: str, lora: Path | None) -> dict[str, Any]:
    """Load and make one chunk, in this process."""
    torch.set_num_threads(1)
    dtype = torch.float32 if case.endswith("float32") else torch.bfloat16
    before, watch, start = Watch().stop(), Watch(), time.perf_counter()
    path = path.with_suffix(".pt") if case == UNMAPPED else path
    loras = [] if lora is None else [(lora, 1.0)]
    model, checkpoint = load_model(path, dtype=dtype, loras=loras)
    end_of_loading, loading = time.perf_counter(), watch.stop()
    watch = Watch()
    conditioning = Conditioning(torch.zeros(1, 8, model.config.text_dim, dtype=dtype))
    chunks = rollout(
        Guided(model, conditioning),
        noise=SeededNoise(0),
        latent_shape=LATENT_SHAPE,
        causal=checkpoint.causal or CausalConfig(),
        steps=StepConfig() if lora is None else StepConfig(steps=(1000.0,)),
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


def run(preset: str, rank: int) -> dict[str, Any]:
    """Write the file, and measure each case in a process of its own, whose memory nothing before it has grown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        size = write_checkpoint(path, preset, is_also_pickled=rank > 0)
        lora, results = path.with_name("lora.pt"), []
        lora_size = write_lora(lora, preset, rank) if rank else 0
        for case in (*CASES, UNMAPPED) if rank else CASES:
            command = [sys.executable, "-m", "bench.loading", "--measure", str(path), "--case", case]
            command += ["--measure-lora", str(lora)] if rank else []
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(process.stdout))
    return {
        "preset": preset,
        "file_bytes": size,
        "lora_rank": rank,
        "lora_bytes": lora_size,
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
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="merge a LoRA of this rank (default: none)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=(*CASES, UNMAPPED), help=argparse.SUPPRESS)
    parser.add_argument("--measure-lora", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.case, args.measure_lora)))
        return
    result = run(args.preset, args.lora)
    text = write(result, args.out)
    if args.json:
        print(text)
        return
    for case in result["cases"]:
        peak, weights = case["while_loading"]["anonymous_bytes"] / 1e9, case["weight_bytes_in_memory"] / 1e9
        print(f"{case['case']}: {weights:.2f} GB of weights, peak {peak:.2f} GB, {case['seconds_to_load']:.1f} s")


if __name__ == "__main__":
    main()
