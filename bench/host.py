"""What ComfyUI costs: the same videos by the Stream Sampler node and by the command line, in turns, one thread each.

    COMFYUI_PATH=~/comfy/0.27 python -m bench.host --json --out bench/results/host.json

Speed: a network of random weights, large enough that a pass takes a good part of a second, and the bundled tiny model,
of which ComfyUI's work per pass is the largest share there is. Memory: Stream to File over 2,001 frames by the tiny
model, resident bytes of the whole server.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.checkpoint import save_checkpoint
from tests.comfyui.graphs import SAMPLER, Prompt, fresh_seed, tiny_prompt
from tests.comfyui.host_server import Server, find_checkouts
from tests.comfyui.page import page

ROOT = Path(__file__).resolve().parent.parent
TINY, RANDOM = "tiny", "random.safetensors"
SIDES, FRAMES = {TINY: 64, RANDOM: 192}, {TINY: 129, RANDOM: 45}
LONG = 2001  # frames, of which the first tenth is not counted
CONFIG = WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=8, text_dim=64)


def write_network(path: Path, text_dim: int) -> None:
    """Write a network of random weights that reads the tiny bundle's text encoder."""
    generator = torch.Generator().manual_seed(0)
    config = WanConfig(**{**CONFIG.__dict__, "text_dim": text_dim})
    weights = {
        name: torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        for name, shape in wan_shapes(config).items()
    }
    save_checkpoint(path, weights, config, causal=CausalConfig(chunk=3), steps=StepConfig())


def by_command_line(model: Path | str, side: int, frames: int, folder: Path) -> dict[str, float]:
    """Measure seconds to the first frame, and generated frames per second after the first chunk."""
    bundle = ["--taehv", TINY, "--text-encoder", TINY]
    size = ["--width", str(side), "--height", str(side), "--frames", str(frames)]
    request = ["--model", str(model), *bundle, "--prompt", "a square", *size, "--out", str(folder / "video.mp4")]
    command = [sys.executable, "-m", "selfforcing_core", "generate", *request, "--json", "--overwrite"]
    metrics = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    # A chunk of three latent frames is twelve frames of video.
    return {"first_frame": metrics["seconds_to_first_frame"], "fps": 12 / metrics["seconds_per_chunk"]}


def by_node(server: Server, prompt: Prompt) -> dict[str, float]:
    """Measure the same by the node, as its page is told it."""
    with page(server) as client:
        entry = server.result(server.submit(prompt, client.client_id))
        assert entry["status"]["status_str"] == "success", entry
        stats = client.until_done()[-1]["stats"]
    return {"first_frame": stats["first_frame_seconds"], "fps": stats["fps"]}


def graph(model: str, side: int, frames: int) -> Prompt:
    """Build a graph with a new seed, so that nothing of it is cached."""
    prompt = tiny_prompt("a red square", width=side, height=side, length=frames, seed=fresh_seed())
    if model != TINY:
        prompt["1"]["inputs"]["unet_name"] = model
    return prompt


def speed(server: Server, folder: Path, repeats: int) -> dict[str, Any]:
    """Measure each network by the command line and by the node in turns, since a shared machine's speed changes."""
    results: dict[str, Any] = {}
    for model in (RANDOM, TINY):
        side, frames = SIDES[model], FRAMES[model]
        path = TINY if model == TINY else server.folder / "models/diffusion_models" / model
        by_node(server, graph(model, side, frames))  # the first run loads
        runs = [
            (by_command_line(path, side, frames, folder), by_node(server, graph(model, side, frames)))
            for _ in range(repeats)
        ]
        mean = {
            name: {kind: statistics.median(pair[place][kind] for pair in runs) for kind in ("first_frame", "fps")}
            for place, name in enumerate(("command_line", "node"))
        }
        # Of pairs that ran one after the other, and not of the medians, which may be from different minutes.
        lost = statistics.median(1 - node["fps"] / line["fps"] for line, node in runs)
        results[model] = {"side": side, "frames": frames, "runs": runs, "median": mean, "fps_lost": lost}
    return results


def memory(server: Server) -> dict[str, Any]:
    """Watch the server's resident memory while it writes a long video."""
    prompt = graph(TINY, SIDES[TINY], LONG)
    inputs = {**prompt[SAMPLER]["inputs"], "filename_prefix": "long", "format": "mp4 (H.264)", "fps": 16.0}
    inputs = {**inputs, "window": 9, "sink": 3}
    prompt = {name: prompt[name] for name in ("1", "2", "3")}
    prompt["file"] = {"class_type": "SelfForcingStreamToFile", "inputs": inputs}
    resident: list[int] = []
    prompt_id = server.submit(prompt)
    while prompt_id not in server.get(f"/history/{prompt_id}"):
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        resident += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")]
        time.sleep(0.5)
    counted = resident[len(resident) // 10 :]  # before that, models are loaded and caches made
    return {
        "frames": LONG,
        "samples": len(resident),
        "resident_bytes": resident[:: max(1, len(resident) // 50)],
        "smallest": min(counted),
        "largest": max(counted),
        "grows": max(counted) / min(counted) - 1,
    }


def run(repeats: int) -> dict[str, Any]:
    """Start ComfyUI in a folder of its own, and measure speed and memory."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server and of the command line, which both inherit it
    checkout = find_checkouts()[0]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(checkout, Path(folder) / "base")
        try:
            server.wait_until_up()
            text_dim = json.loads((ROOT / "assets/tiny/text_encoder/config.json").read_text())["d_model"]
            models = server.folder / "models/diffusion_models"
            models.mkdir(parents=True)
            write_network(models / RANDOM, text_dim)
            server.get("/object_info/SelfForcingModelLoader")
            results = {"speed": speed(server, Path(folder), repeats), "memory": memory(server)}
        finally:
            server.stop()
    return {
        **results,
        "comfyui": checkout.version,
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.host", *sys.argv[1:]]),
        "date": now(),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    result = run(args.repeats)
    text = write(result, args.out)
    print(text if args.json else {k: v["fps_lost"] for k, v in result["speed"].items()})


if __name__ == "__main__":
    main()
