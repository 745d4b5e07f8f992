"""What each cache policy makes of a video much longer than its training clips, and what it costs.

    python -m bench.policies --out bench/results/policies-cpu-1thread.json --docs
    python -m bench.policies --chunks 2000 --out bench/results/policies-2000-chunks.json
    python -m bench.policies --pictures
    python -m bench.policies --costs --out bench/results/policy-costs.json --docs

The first makes videos of 16 times the training length with the bundled tiny model, which was trained for none of the
policies, and reads them back with the detector of its world. The second makes 2,000 chunks in one denoising step each,
since their number changes nothing here, and says whether time and memory stay flat and all numbers finite. The third
draws which frames a chunk sees, from the cache itself. The fourth counts passes and plans bytes. Policies are those of
selfforcing_core/policy.py.

Letters: B batch, T latent frames, C latent channels, V video frames, R RGB, H W height and width.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.endless import resident_bytes
from bench.policy_costs import costs, costs_table
from bench.policy_pictures import SHEET, contact_sheet, draw, seen_by_chunks
from bench.report import now, write
from bench.rollout import hardware
from selfforcing_core.atomic import replacing
from selfforcing_core.codecs.taehv import StreamingDecoder
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.geometry import pixel_frames
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.noise import SeededNoise
from selfforcing_core.policy import POLICIES
from selfforcing_core.rollout import Chunk, rollout
from selfforcing_core.roofline.policy_bytes import held_bytes
from selfforcing_core.weights.load import load_model, load_taehv, load_text_encoder
from train.tiny.data import LATENT_FRAMES
from train.tiny.evaluate import Videos, choose_captions, pair_differences, real_videos
from train.tiny.world import Detection, detect, named_scene

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "policies.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COSTS = ("<!-- costs: begin -->", "<!-- costs: end -->")
TIMES, SEED = 16, 11  # training lengths of a video
SIDE, CHANNELS = 8, 16  # of the tiny model's latents
# Chunk, window and sink: the first that a policy takes. All but the last two are the training length.
SIZES = ((3, 9, 3), (3, 9, 0), (3, 9, 1), (1, 9, 3), (3, 12, 3), (3, 15, 3))


def sizes_for(name: str) -> CausalConfig:
    """Return the first of SIZES that a policy runs with in as many steps as the model has.

    Raises its own ValueError if there is none.
    """
    refusal = ValueError(f"policy {name} takes none of {SIZES}")
    for chunk, window, sink in SIZES:
        try:
            causal = CausalConfig(chunk, window, sink, policy=name)
            seen_by_chunks(causal, 1)  # some refuse only when they begin
        except ValueError as error:
            refusal = error
        else:
            return causal
    raise refusal


class Maker:
    """The bundled model under any policy."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model, checkpoint = load_model("tiny", dtype=torch.float32)
        self.taehv = load_taehv("tiny", dtype=torch.float32)[0]
        self.text_encoder = load_text_encoder("tiny", dtype=torch.float32)
        self.steps = checkpoint.steps or StepConfig()

    def chunks(
        self, causal: CausalConfig, captions: list[str], frames: int, *, steps: StepConfig | None = None
    ) -> tuple[Iterator[Chunk], Any]:
        """Return the chunks of a video for each caption, row b of the noise for the b-th, and their cache."""
        conditioning = Conditioning(self.text_encoder.encode(captions).float())
        shape = (frames, CHANNELS, SIDE, SIDE)
        (cache,) = new_caches(self.model, conditioning, 1, shape, causal)
        guided = Guided(self.model, conditioning, caches=[cache])
        chunks = rollout(guided, noise=SeededNoise(SEED), latent_shape=shape, causal=causal, steps=steps or self.steps)
        return chunks, cache

    @torch.no_grad()
    def frames(self, causal: CausalConfig, captions: list[str], frames: int) -> Tensor:
        """Return the frames [B, V, R, H, W] of a video for each caption."""
        decoder = StreamingDecoder(self.taehv)
        chunks, _ = self.chunks(causal, captions, frames)
        return torch.cat([decoder.decode(chunk.latents_BTCHW) for chunk in chunks], 1)


# ------------------------------------------------------------------- quality --
def scores(videos_BVRHW: Tensor, captions: list[tuple[str, ...]], real_diversity: dict[str, float]) -> dict[str, float]:
    """Return shares of frames that agree with their caption, how far backgrounds went, and how far pairs are apart.

    Rows 2 i and 2 i + 1 are of caption i. Diversity is that of the last training length of each video, as a share of
    that of real ones; the background's drift is the mean change of a channel of its colour, which goes from 0 to 1.
    """
    length = pixel_frames(LATENT_FRAMES)
    whole, last = ([detect(part) for part in parts] for parts in (videos_BVRHW, videos_BVRHW[:, -length:]))
    words = [caption for caption in captions for _ in range(2)]
    pairs: list[tuple[Detection, Detection]] = list(zip(last[::2], last[1::2]))
    first_BR, last_BR = (_ground(part) for part in (videos_BVRHW[:, :length], videos_BVRHW[:, -length:]))
    apart = pair_differences(Videos(captions, pairs))
    return {
        "colour": _share([c == word[0] for word, each in zip(words, whole) for c in each.colours_V]),
        "shape": _share([s == word[1] for word, each in zip(words, whole) for s in each.shapes_V]),
        "last_colour": _share([c == word[0] for word, each in zip(words, last) for c in each.colours_V]),
        "last_shape": _share([s == word[1] for word, each in zip(words, last) for s in each.shapes_V]),
        "last_background": _share([each.background == word[4] for word, each in zip(words, last)]),
        "background_drift": float((last_BR - first_BR).abs().mean()),
        # where no shape is left in any pair there is nothing to be apart
        "diversity": min(float(np.nan_to_num(apart[name] / real_diversity[name])) for name in real_diversity),
    }


def _share(values: list[bool]) -> float:
    return float(np.mean(values))


def _ground(videos_BVRHW: Tensor) -> Tensor:
    """Return the colour of each background: shapes cover a small part of a frame."""
    return videos_BVRHW.flatten(3).median(-1).values.median(1).values


# ---------------------------------------------------------------------- cost --
@torch.no_grad()
def cost(maker: Maker, causal: CausalConfig, chunks: int, *, steps: StepConfig | None = None) -> dict[str, Any]:
    """Return seconds of the CPU per chunk and bytes of the cache of one video, and whether all numbers are finite."""
    video, cache = maker.chunks(causal, ["a red square moving left slowly"], chunks * causal.chunk, steps=steps)
    seconds, held, resident, is_finite, start = [], [], [], True, time.process_time()
    for chunk in video:
        seconds.append(time.process_time() - start)
        held.append(sum(vars(held_bytes(cache)).values()))
        resident.append(resident_bytes())
        is_finite &= bool(chunk.latents_BTCHW.isfinite().all())
        start = time.process_time()
    full = min(2 * causal.window // causal.chunk + 2, chunks - 1)  # from when the ring came round twice
    block = max(1, (chunks - full) // 10)
    first, last = (statistics.median(part) for part in (seconds[full : full + block], seconds[-block:]))
    return {
        "chunks": chunks,
        "cpu_seconds_per_chunk": statistics.median(seconds[full:]),
        "last_tenth_over_first": last / first,
        "cache_bytes": held[-1],
        "bytes_grow": held[-1] - held[full],
        "resident_memory_grows": resident[-1] / resident[full] - 1,
        "is_finite": is_finite,
    }


# ------------------------------------------------------------------- reports --
def measure(maker: Maker, names: list[str], captions: int, times: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the scores and costs of each policy, and its first video."""
    chosen = choose_captions("heldout", captions, SEED)
    texts = [named_scene(words).caption() for words in chosen for _ in range(2)]
    real = real_videos(chosen, pixel_frames(LATENT_FRAMES), SEED)
    diversity = pair_differences(real)
    rows, firsts = {}, {}
    for name in names:
        causal = sizes_for(name)
        videos = maker.frames(causal, texts, times * LATENT_FRAMES)
        spent = cost(maker, causal, max(4, times * LATENT_FRAMES // causal.chunk))
        spent = {key: spent[key] for key in ("cpu_seconds_per_chunk", "cache_bytes")}
        rows[name] = {**_sizes(causal), **scores(videos, chosen, diversity), **spent}
        firsts[name] = videos[0]
        print(name, {key: round(value, 3) for key, value in rows[name].items() if isinstance(value, float)}, flush=True)
    report = {"captions": captions, "videos": 2 * captions, "times_the_training_length": times, "seed": SEED}
    return {**report, "latent_frames": times * LATENT_FRAMES, "policies": rows, **_circumstances()}, firsts


def endure(maker: Maker, names: list[str], chunks: int) -> dict[str, Any]:
    """Return for each policy whether so many chunks cost what the first ones did."""
    rows = {}
    for name in names:
        causal = sizes_for(name)
        steps = maker.steps if causal.policy == "rolling-forcing" else replace(maker.steps, steps=(1000.0,))
        rows[name] = {**_sizes(causal), **cost(maker, causal, chunks, steps=steps)}
        print(name, rows[name], flush=True)
    return {"policies": rows, **_circumstances()}


def _sizes(causal: CausalConfig) -> dict[str, int]:
    return {"chunk": causal.chunk, "window": causal.window, "sink": causal.sink}


def _circumstances(model: str = "tiny") -> dict[str, Any]:
    command = " ".join(["python", "-m", "bench.policies", *sys.argv[1:]])
    return {"model": model, "threads": 1, "hardware": hardware(), "command": command, "date": now()}


def table(report: dict[str, Any], source: Path) -> str:
    """Return the section of the page that a report fills."""
    times, number = report["times_the_training_length"], report["videos"]
    where = f"{link_to(source)}, `{report['command']}`"
    lines = [
        f"{number} videos of {times} times the training length by the bundled tiny model, trained for none of these,",
        f"read back with the detector of its world ({where}).",
        "Colour and shape: share of frames that agree with the caption, of the whole video and of its last training",
        "length; background: videos whose ground is still the caption's at the end, and how far a channel of it went",
        "(0 to 1); diversity: how far two videos of a caption are apart at the end, 1 as real ones. Seconds of one CPU",
        "thread a chunk, without the decoder; megabytes of the cache, in float32. With so few videos, shares a tenth",
        "apart may be chance. Policies that differ at a change of the prompt alone make the same videos here.",
        "`krea` and `krea-bias` run without an autoencoder in the rollout, that is, as with `keeps_first=yes`: no",
        "picture of the window is encoded anew, neither in their videos nor in their seconds.",
        "",
        "| policy | chunk, window, sink | colour | at the end | shape | at the end | background | drift | diversity | "
        "s a chunk | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["policies"].items():
        shares = ("colour", "last_colour", "shape", "last_shape", "last_background")
        cells = [f"{row[share]:.2f}" for share in shares]
        cells += [f"{row['background_drift']:.4f}", f"{row['diversity']:.2f}"]
        sizes = f"{row['chunk']}, {row['window']}, {row['sink']}"
        cost_cells = [f"{row['cpu_seconds_per_chunk']:.3f}", f"{row['cache_bytes'] / 1e6:.1f}"]
        lines.append(f"| `{name}` | {' | '.join([sizes, *cells, *cost_cells])} |")
    lines += ["", "One video of each policy, from its beginning to its end:", "", f"![contact sheet]({SHEET.name})"]
    return "\n".join(lines)


def update_page(text: str, marks: tuple[str, str] = (BEGIN, END), page: Path = PAGE) -> None:
    """Put a section between two marks of a page. Raises ValueError unless it has each of them once, in this order."""
    whole = page.read_text(encoding="utf-8")
    begin, end = marks
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{page.name} lacks the marks {begin} and {end}, once each; put them where the table belongs")
    before, after = whole.split(begin)[0], whole.split(end)[1]
    with replacing(page) as file:
        file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def link_to(source: Path, page: Path = PAGE) -> str:
    """Return a link from a page to a file. Raises ValueError for one outside of the repository."""
    file = source.resolve()
    if not file.is_relative_to(ROOT):
        raise ValueError(f"{source} is outside of {ROOT}, where no page can link it; use a file in bench/results")
    return f"[{file.name}]({Path(os.path.relpath(file, page.parent)).as_posix()})"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), help="names (default: all)")
    parser.add_argument("--captions", type=int, default=6, help="of the videos; two of each")
    parser.add_argument("--times", type=int, default=TIMES, help="training lengths of a video")
    parser.add_argument("--chunks", type=int, help="instead: whether so many cost what the first did")
    parser.add_argument("--pictures", action="store_true", help="instead: draw which frames a chunk sees")
    parser.add_argument("--costs", action="store_true", help="instead: passes of a chunk, bytes of the 1.3B network")
    parser.add_argument("--docs", action="store_true", help="write table and contact sheet into docs/")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    if args.docs:  # before hours of measuring
        if args.out is None:
            parser.error("--docs links the file of the numbers; name it with --out")
        link_to(args.out)
    torch.set_num_threads(1)
    if args.costs:
        text = write({"policies": costs(args.policies), **_circumstances("t2v-1.3b, planned")}, args.out)
        if args.docs:
            update_page(costs_table(json.loads(text), link_to(args.out)), COSTS)
        return
    if args.pictures:
        draw({name: sizes_for(name) for name in args.policies})
        return
    maker = Maker()
    if args.chunks:
        print(write(endure(maker, args.policies, args.chunks), args.out))
        return
    report, videos = measure(maker, args.policies, args.captions, args.times)
    text = write(report, args.out)
    if args.docs:
        contact_sheet(videos)
        update_page(table(json.loads(text), args.out))


if __name__ == "__main__":
    main()
