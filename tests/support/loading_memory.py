"""Memory that loading a network takes, measured in a process of its own, whose memory nothing before it has grown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, torch
from bench.loading import Watch
from selfforcing_core.weights.load import load_model
path, dtype, *loras = sys.argv[1:]
torch.set_num_threads(1)
before = Watch().stop()["anonymous_bytes"]
watch = Watch()
model, _ = load_model(path, dtype=getattr(torch, dtype), loras=[(lora, 1.0) for lora in loras])
peak = watch.stop()["anonymous_bytes"]
still = Watch().stop()["anonymous_bytes"]
print(json.dumps([peak - before, still - before]))
"""


def loading_memory(path: Path, dtype: str, *loras: Path) -> tuple[int, int]:
    """Return the anonymous bytes that loading takes at most, and those that the loaded network keeps (Linux)."""
    command = [sys.executable, "-c", SCRIPT, str(path), dtype, *map(str, loras)]
    root = Path(__file__).parents[2]
    process = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    peak, still = json.loads(process.stdout)
    return peak, still
