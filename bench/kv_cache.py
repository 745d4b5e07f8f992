"""What the number type of the KV cache costs and saves: error, bytes, seconds, and the memory that attention takes.

    python -m bench.kv_cache --json --out bench/results/kv-cache-cpu.json

"rollout": videos of the bundled model for captions that its training never saw, computed in float32. Error is the norm
of the difference to the latents with a float32 cache, as a share of their norm; colour and shape are the share of
frames in which the detector reads what the caption says. Cases "own chunk too" read the current chunk's own keys and
values back from the cache, which attention otherwise takes as they were computed.
"layer": self-attention of one layer in the shape of Wan 2.1 1.3B to a full cache of normal random numbers (so that its
errors say nothing about a trained model), and the most memory that it held at once, the insides of the kernels
included. "at once" converts all keys and values before it multiplies, "by segments" one chunk's.

Letters: B batch, T latent frames, C latent channels, H W latent size, S cached tokens, N heads, K head width, V video
frames.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.attention import attend, attend_segments
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import NETWORK_SIZES, CausalConfig, StepConfig
from selfforcing_core.geometry import tokens_per_frame
from selfforcing_core.guided import Guided
from selfforcing_core.kv_cache import KVCache, Past, dequantise, quantise
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout
from selfforcing_core.weights.load import load_model, load_taehv, load_text_encoder
from train.tiny.data import LATENT_FRAMES
from train.tiny.world import SIZE, detect, heldout, named_scene

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
# Each with whether the current chunk's own keys and values are read back, too.
CACHES: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "float8_e4m3fn": (FLOAT8, False),
    "int8": (INT8, False),
    "bfloat16, own chunk too": (torch.bfloat16, True),
    "float8_e4m3fn, own chunk too": (FLOAT8, True),
    "int8, own chunk too": (INT8, True),
}
LAYER = (3, 21, 30, 52)  # chunk, frames of the cache, latent height and width: 416x240 pixels


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes that were allocated on the CPU at once while it ran, insides of operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


# ------------------------------------------------------------------ rollout --
@contextmanager
def own_chunk_read_back(is_on: bool) -> Iterator[None]:
    """Let attention see the current chunk as the cache would give it back, for as long as this lasts."""
    segments = Past.segments

    def rounded(self: Past, k: Tensor, v: Tensor, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        dtype = self.k_BSNK.dtype
        if self.k_scale is None:
            return segments(self, k.to(dtype).to(k), v.to(dtype).to(v), **options)
        return segments(self, dequantise(*quantise(k, dtype), k), dequantise(*quantise(v, dtype), v), **options)

    if is_on:
        Past.segments = rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Past.segments = segments  # type: ignore[method-assign]


@torch.no_grad()
def measure_rollouts(captions: int, seeds: int, num_frames: int) -> dict[str, Any]:
    """Measure every caption and seed with every cache in turn, so that a change of the machine's speed meets all."""
    model, checkpoint = load_model("tiny", dtype=torch.float32)
    taehv, _ = load_taehv("tiny", dtype=torch.float32)
    text_encoder, side = load_text_encoder("tiny"), SIZE // 8
    causal, steps = checkpoint.causal or CausalConfig(), checkpoint.steps or StepConfig()
    shape = (num_frames, model.config.in_dim, side, side)
    measured: dict[str, dict[str, list[float]]] = {
        name: {key: [] for key in ("error", "seconds", "colour", "shape")} for name in CACHES
    }
    for words in heldout()[:captions]:
        conditioning = Conditioning(text_encoder.encode([named_scene(words).caption()]).float())
        for seed in range(seeds):
            exact = None
            for name, (dtype, reads_own_back) in CACHES.items():
                model.cache_dtype = dtype
                guided, latents = Guided(model, conditioning), []
                chunks = rollout(guided, noise=SeededNoise(seed), latent_shape=shape, causal=causal, steps=steps)
                with own_chunk_read_back(reads_own_back):
                    for _ in range(num_frames // causal.chunk):
                        start = time.perf_counter()
                        latents.append(next(chunks).latents_BTCHW)
                        measured[name]["seconds"].append(time.perf_counter() - start)
                video = torch.cat(latents, 1)
                exact = video if exact is None else exact  # the first cache is float32
                measured[name]["error"].append(float((video - exact).norm() / exact.norm()))
                detection = detect(taehv.decode(video)[0].clamp(0, 1))
                measured[name]["colour"].append(float(np.mean([colour == words[0] for colour in detection.colours_V])))
                measured[name]["shape"].append(float(np.mean([word == words[1] for word in detection.shapes_V])))
    rows = []
    capacity = num_frames if causal.window == -1 else min(causal.window, num_frames)
    for name, (dtype, _) in CACHES.items():
        values, per_frame = measured[name], tokens_per_frame(side, side)
        size = KVCache.num_bytes(model.config, batch=1, tokens_per_frame=per_frame, capacity=capacity, dtype=dtype)
        row = {
            "cache": name,
            "cache_bytes": size,
            "error_mean": statistics.mean(values["error"]),
            "error_largest": max(values["error"]),
            "colour": statistics.mean(values["colour"]),
            "shape": statistics.mean(values["shape"]),
            "median_seconds_per_chunk": statistics.median(values["seconds"]),
        }
        rows.append(row)
    return {
        "model": "tiny",
        "captions": captions,
        "seeds": seeds,
        "latent_shape": shape,
        "chunk": causal.chunk,
        "window": causal.window,
        "sink": causal.sink,
        "caches": rows,
    }


# -------------------------------------------------------------------- layer --
@torch.no_grad()
def measure_layer(repeats: int, layer: tuple[int, int, int, int] = LAYER) -> dict[str, Any]:
    """Measure one layer's attention of the last chunk of a full cache, for each type of cache and of computation."""
    config = replace(NETWORK_SIZES["t2v-1.3b"], num_layers=1)
    chunk, num_frames, height, width = layer
    per_frame, rows = tokens_per_frame(height, width), []
    generator = torch.Generator().manual_seed(0)
    shape = (1, chunk * per_frame, config.num_heads, config.head_dim)
    past = [torch.randn(2, *shape, generator=generator) for _ in range(num_frames // chunk)]
    query = torch.randn(shape, generator=generator)
    for computed in (torch.float32, torch.bfloat16):
        expected = None
        for dtype in (torch.float32, torch.bfloat16, FLOAT8, INT8):
            if computed == torch.bfloat16 and dtype == torch.float32:
                continue  # nobody keeps more digits than were computed
            cache = KVCache(config, batch=1, tokens_per_frame=per_frame, capacity=num_frames, dtype=dtype)
            for index, (k, v) in enumerate(past):
                cache.stage(index * chunk, chunk)
                cache.write(0, k, v)
            q, k, v = query.to(computed), past[-1][0].to(computed), past[-1][1].to(computed)
            ways: dict[str, Callable[[], Tensor]] = {"at once": lambda: attend(q, *cache.update(0, k, v))}  # noqa: B023
            if cache.converts(k):
                ways["by segments"] = lambda: _by_segments(cache, q, k, v)  # noqa: B023
            for way, function in ways.items():
                output = function().float()
                expected = output if expected is None else expected
                row = {
                    "computed_in": str(computed).removeprefix("torch."),
                    "cache": str(dtype).removeprefix("torch."),
                    "way": way,
                    "error": float((output - expected).norm() / expected.norm()),
                    "cache_bytes": _num_bytes(cache),
                    "peak_bytes": peak_bytes(function),
                    "seconds": min(_seconds(function) for _ in range(repeats)),
                }
                rows.append(row)
    return {"config": "t2v-1.3b", "chunk": chunk, "frames": num_frames, "latent": (height, width), "cases": rows}


def _by_segments(cache: KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cache.write(0, k, v)
    return attend_segments(q, cache.past(0).segments(k, v))


def _num_bytes(cache: KVCache) -> int:
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ------------------------------------------------------------------- report --
def run(captions: int, seeds: int, num_frames: int, repeats: int) -> dict[str, Any]:
    """Measure videos and the layer on one thread."""
    torch.set_num_threads(1)
    return {
        "rollout": measure_rollouts(captions, seeds, num_frames),
        "layer": measure_layer(repeats),
        "threads": 1,
        "hardware": hardware(),
        "command": " ".join(["python", "-m", "bench.kv_cache", *sys.argv[1:]]),
        "date": now(),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=8, help="number of captions")
    parser.add_argument("--seeds", type=int, default=2, help="videos of each")
    parser.add_argument("--frames", type=int, default=2 * LATENT_FRAMES, help="latent frames of a video")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a layer; the fastest counts")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    result = run(args.captions, args.seeds, args.frames, args.repeats)
    text = write(result, args.out)
    if args.json:
        print(text)
        return
    for row in result["rollout"]["caches"]:
        print(
            f"{row['cache']}: error {row['error_mean']:.2%}, colour {row['colour']:.1%}, shape {row['shape']:.1%}, "
            f"{row['cache_bytes']} bytes, {row['median_seconds_per_chunk']:.3f} s per chunk"
        )
    for row in result["layer"]["cases"]:
        print(
            f"{row['computed_in']} with {row['cache']} {row['way']}: peak {row['peak_bytes'] / 1e6:.1f} MB, "
            f"{row['seconds']:.2f} s, error {row['error']:.2%}"
        )


if __name__ == "__main__":
    main()
