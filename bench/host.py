"""What ComfyUI costs: the same videos by the Stream Sampler node and by the command line, in turns, one thread each.

    COMFYUI_PATH=~/comfy/0.27 python -m bench.host --json --out bench/results/host.json

Speed: a network of random weights, large enough that a pass takes a good part of a second, and the bundled tiny model,
of which the host's work per pass is the largest share there is. Memory: Stream to File over 2,001 frames by the tiny
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
from selfforcing_core.checkpoint import save_checkpoint
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.shapes import wan_shapes
from tests.comfyui.graphs import SAMPLER, Prompt, fresh_seed, tiny_prompt
from tests.comfyui.host_server import Server, find_checkouts
from tests.comfyui.page import page

ROOT = Path(__file__).resolve().parent.parent
TINY, RANDOM = "tiny", "random.safetensors"
SIDES, FRAMES = {TINY: 64, RANDOM: 192}, {TINY: 129, RANDOM: 45}
LONG = 2001  # frames, of which the first tenth is not counted
CONFIG = WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=8, text_dim=64)


def write_network(path: Path, text_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    config = WanConfig(**{**CONFIG.__dict__, "text_dim": text_dim})
    weights = {
        name: torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        for name, shape in wan_shapes(config).items()
    }
    save_checkpoint(path, weights, config, causal=CausalConfig(chunk=3), steps=StepConfig())


def by_command_line(model: Path | str, side: int, frames: int, folder: Path) -> dict[str, float]:
    """Seconds to the first frame, and generated frames per second after the first chunk."""
    bundle = ["--taehv", TINY, "--text-encoder", TINY]
    command = [
        sys.executable, "-m", "selfforcing_core", "generate", "--model", str(model), *bundle, "--prompt", "a square",
        "--width", str(side), "--height", str(side), "--frames", str(frames), "--json", "--overwrite",
        "--out", str(folder / "video.mp4"),
    ]  # fmt: skip
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    return {"first_frame": told["seconds_to_first_frame"], "fps": 12 / told["seconds_per_chunk"]}


def by_node(server: Server, prompt: Prompt) -> dict[str, float]:
    with page(server) as seen:
        entry = server.result(server.submit(prompt, seen.client_id))
        assert entry["status"]["status_str"] == "success", entry
        stats = seen.until_done()[-1]["stats"]
    return {"first_frame": stats["first_frame_seconds"], "fps": stats["fps"]}


def graph(model: str, side: int, frames: int) -> Prompt:
    prompt = tiny_prompt("a red square", width=side, height=side, length=frames, seed=fresh_seed())
    if model != TINY:
        prompt["1"]["inputs"]["unet_name"] = model
    return prompt


def speed(server: Server, folder: Path, repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
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
        lost = statistics.median(1 - node["fps"] / line["fps"] for line, node in runs)
        found[model] = {"side": side, "frames": frames, "runs": runs, "median": mean, "fps_lost": lost}
    return found


def memory(server: Server) -> dict[str, Any]:
    prompt = graph(TINY, SIDES[TINY], LONG)
    inputs = {**prompt[SAMPLER]["inputs"], "filename_prefix": "long", "format": "mp4 (H.264)", "fps": 16.0}
    inputs = {**inputs, "window": 9, "sink": 3}
    prompt = {name: prompt[name] for name in ("1", "2", "3")}
    prompt["file"] = {"class_type": "SelfForcingStreamToFile", "inputs": inputs}
    seen: list[int] = []
    prompt_id = server.submit(prompt)
    while prompt_id not in server.get(f"/history/{prompt_id}"):
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        seen += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")]
        time.sleep(0.5)
    counted = seen[len(seen) // 10 :]
    return {
        "frames": LONG, "samples": len(seen), "resident_bytes": seen[:: max(1, len(seen) // 50)],
        "smallest": min(counted), "largest": max(counted), "grows": max(counted) / min(counted) - 1,
    }  # fmt: skip


def run(repeats: int) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
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
            found = {"speed": speed(server, Path(folder), repeats), "memory": memory(server)}
        finally:
            server.stop()
    return {
        **found, "comfyui": checkout.version, "threads": 1, "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.host", *sys.argv[1:]]),
        "date": now(),
    }  # fmt: skip


def main() -> None:
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
