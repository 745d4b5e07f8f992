"""What a cache policy costs a chunk: its passes, counted in the rollout, and the bytes of its cache.

Passes do not depend on the network and are counted on the smallest one; bytes are those of the 1.3B network at 480x832,
planned without allocating them.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bench.policy_pictures import SMALLEST, change_word
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.history import PromptChange
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.roofline.policy_bytes import planned_bytes

NETWORK, LATENT = "t2v-1.3b", (16, 60, 104)  # C, H, W of 480x832
FOUR = StepConfig((1000.0, 750.0, 500.0, 250.0))
STEPS = {"rolling-forcing": StepConfig((1000.0, 800.0, 600.0, 400.0, 200.0))}  # where the released file has others
# Chunk, window and sink of the files that each was released with.
PUBLISHED = {
    "self-forcing": (3, 21, 0),
    "longlive": (3, 12, 3),
    "longlive-interactive": (3, 12, 3),
    "longlive-infinity": (3, 12, 3),
    "infinite": (3, 6, 1),
    "infinity-rope": (3, 6, 1),
    "flashdreams": (3, 12, 5),
    "lingbot2": (4, 18, 6),
    "reward": (3, 9, 3),
    "memrope": (3, 12, 3),
    "rolling-sink": (3, 21, 0),
    "rolling-forcing": (3, 21, 3),
    "krea": (3, 6, 0),
    "krea-bias": (3, 6, 0),
    "memflow": (3, 12, 3),
    "memflow-plain": (3, 12, 3),
    "sdv2": (1, 6, 3),
    "longlive2": (8, 32, 8),
}


class _Counted:
    """A network that notes over how many frames each of its passes goes."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.frames: list[int] = []

    def __call__(self, x_BTCHW: Tensor, *rest: Any, **options: Any) -> Tensor:
        self.frames.append(x_BTCHW.shape[1])
        return self.network(x_BTCHW, *rest, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


@torch.no_grad()
def passes(causal: CausalConfig, steps: StepConfig) -> tuple[list[int], list[int]]:
    """Return over how many frames each pass of a chunk goes, once frames are evicted, and those a new prompt adds."""
    index = causal.window // causal.chunk + 4  # of the chunk that begins another prompt
    network = _Counted(CausalWan(SMALLEST).eval())
    conditioning = Conditioning(torch.zeros(1, 1, SMALLEST.text_dim))
    change = {index * causal.chunk: PromptChange(conditioning, change_word(causal))}
    shape = ((index + 2 + len(steps.steps)) * causal.chunk, SMALLEST.out_dim, 2, 2)
    guided = Guided(network, conditioning, caches=new_caches(network, conditioning, 1, shape, causal))
    options = {"latent_shape": shape, "causal": causal, "steps": steps, "prompt_at": change.get}
    by_chunk = []
    for _ in rollout(guided, noise=SeededNoise(0), **options):
        by_chunk.append(network.frames)  # the pass that writes a chunk is made with the next one
        network.frames = []
    plain, changed = sorted(by_chunk[index - 1]), sorted(by_chunk[index])
    for frames in plain:
        changed.remove(frames)
    return plain, changed


def costs(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return sizes, passes and bytes of each policy in its published sizes."""
    rows = {}
    for name in names:
        chunk, window, sink = PUBLISHED[name]
        source = "last_step" if name == "sdv2" else "clean"  # its released files write no chunk once more
        causal = CausalConfig(chunk, window, sink, policy=name, cache_source=source)
        steps = STEPS.get(name, FOUR)
        plain, changed = passes(causal, steps)
        shape = (4 * window // chunk * chunk, *LATENT)
        planned = planned_bytes(NETWORK_SIZES[NETWORK], causal, shape, steps=steps)
        ring = planned_bytes(NETWORK_SIZES[NETWORK], replace(causal, policy="self-forcing"), shape, steps=steps)
        rows[name] = {
            "chunk": chunk,
            "window": window,
            "sink": sink,
            "steps": len(steps.steps),
            "frames_of_passes": plain,
            "frames_of_passes_at_a_new_prompt": changed,
            "history": change_word(causal),
            "ring_bytes": planned.ring,
            "memory_bytes": planned.memory,
            "bytes_beside_window_and_sink": planned.ring + planned.memory - ring.ring - ring.memory,
        }
        print(name, rows[name], flush=True)
    return rows


def costs_table(report: dict[str, Any], link: str) -> str:
    """Return the section of the page that a report fills."""
    lines = [
        "Passes of one chunk once frames are evicted, as number x latent frames, that which writes it included;",
        f"gigabytes of the cache of the 1.3B network at 480x832 in bf16 ({link}, `{report['command']}`).",
        "Sizes are those that each was published with, so that rows differ by them too: beside a window and a sink of",
        "that size, a policy costs what the last column says.",
        "",
        "| policy | chunk, window, sink | passes | a new prompt | GB | of it the policy's |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["policies"].items():
        whole = (row["ring_bytes"] + row["memory_bytes"]) / 1e9
        cells = [
            f"{row['chunk']}, {row['window']}, {row['sink']}",
            _counts(row["frames_of_passes"]),
            f"`{row['history']}`: {_counts(row['frames_of_passes_at_a_new_prompt']) or 'none'}",
            f"{whole:.2f}",
            f"{row['bytes_beside_window_and_sink'] / 1e9:.2f}",
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(frames: Sequence[int]) -> str:
    return " + ".join(f"{len([*group])} x {length}" for length, group in groupby(sorted(frames)))
