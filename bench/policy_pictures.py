"""Pictures of cache policies: which frames a chunk sees, drawn from the cache, and videos beside each other.

Letters: B batch, T latent frames, C latent channels, V video frames, R RGB, H W height and width.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.memory import AVERAGE
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.rollout import rollout

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "policies"
SHEET = ROOT / "docs" / "policies.webp"
CHUNKS = 9  # of a picture
CELL, LEFT, TOP = 14, 96, 58  # pixels: of a frame; beside and above the cells
STEPS = StepConfig((1000.0, 750.0, 500.0, 250.0))  # as many as the tiny model has
SMALLEST = WanConfig(32, 32, 2, 1, in_dim=4, out_dim=4, text_dim=8, text_len=4, freq_dim=16)
# Text and lines are read on a light page and on a dark one, since the picture brings its own ground.
COLOURS = {"own": "#2f6fbb", "past": "#a9c7ea", "sink": "#e39a3b", "moved": "#c8693f", "average": "#8a63b8"}
WORDS = {
    "own": "the chunk itself",
    "past": "earlier frames, where they were",
    "sink": "frames that never leave, where they were",
    "moved": "frames that stand elsewhere (their number inside)",
    "average": "an average of what left",
}


@dataclass(frozen=True)
class Seen:
    """What one pass over a chunk has before it."""

    frames: range  # of the chunk itself
    slots: tuple[tuple[int, float], ...]  # frame (or AVERAGE) and place on the time axis of every visible slot


class _Watched:
    """A network that notes what its passes find in the cache."""

    def __init__(self, network: Any) -> None:
        self.network, self.seen = network, {}

    def __call__(self, x_BTCHW: Tensor, *rest: Any, cache: Any = None, start_frame: int = 0, **options: Any) -> Tensor:
        flow = self.network(x_BTCHW, *rest, cache=cache, start_frame=start_frame, **options)
        used = cache._num_visible() // cache.tokens_per_frame
        slots = sorted(zip(cache.slot_frames[:used], cache.slot_positions[:used]), key=lambda slot: slot[1])
        frames = range(start_frame, start_frame + x_BTCHW.shape[1])
        self.seen.setdefault(start_frame, Seen(frames, tuple(slots)))  # the first pass: later ones see the same
        return flow

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


@torch.no_grad()
def seen_by_chunks(causal: CausalConfig, chunks: int = CHUNKS) -> list[Seen]:
    """Return what the first pass over each chunk sees, by running the rollout on the smallest network."""
    network = _Watched(CausalWan(SMALLEST).eval())
    conditioning = Conditioning(torch.zeros(1, 1, SMALLEST.text_dim))
    # one chunk more than is shown, so that the last one writes itself as all do
    shape = ((chunks + 1) * causal.chunk, SMALLEST.out_dim, 2, 2)
    caches = new_caches(network, conditioning, 1, shape, causal)
    guided = Guided(network, conditioning, caches=caches)
    for _ in rollout(guided, noise=SeededNoise(0), latent_shape=shape, causal=causal, steps=STEPS):
        pass
    return [network.seen[start] for start in sorted(network.seen)][:chunks]


def picture(name: str, causal: CausalConfig) -> str:
    """Return the SVG of one policy: a row per chunk, a column per place on the time axis."""
    rows = seen_by_chunks(causal)
    places = [place for row in rows for _, place in row.slots]
    first, columns = int(min(places)), int(max(places)) - int(min(places)) + 1
    size = (LEFT + columns * CELL + 16, TOP + len(rows) * (CELL + 4) + 22 * len(WORDS) + 12)
    title = f"{name}: chunk {causal.chunk}, window {causal.window}, sink {causal.sink}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(size[0], 420)}" height="{size[1]}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{html.escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="13" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="12" y="40">what each chunk sees, by its place on the time axis (from {first})</text>',
    ]
    for index, row in enumerate(rows):
        y = TOP + index * (CELL + 4)
        parts.append(f'<text x="12" y="{y + CELL - 3}">frames {row.frames[0]}-{row.frames[-1]}</text>')
        for frame, place in row.slots:
            parts.append(_cell(row, causal, frame, place, LEFT + (place - first) * CELL, y))
    for index, (kind, words) in enumerate(WORDS.items()):
        y = TOP + len(rows) * (CELL + 4) + 10 + 22 * index
        parts.append(f'<rect x="12" y="{y}" width="{CELL}" height="{CELL}" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="34" y="{y + 11}">{words}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _cell(row: Seen, causal: CausalConfig, frame: int, place: float, x: float, y: int) -> str:
    kind = "past"
    if frame == AVERAGE:
        kind = "average"
    elif frame in row.frames:
        kind = "own"
    elif place != frame:
        kind = "moved"
    elif frame < causal.sink:
        kind = "sink"
    cell = f'<rect x="{x:g}" y="{y}" width="{CELL - 1}" height="{CELL}" fill="{COLOURS[kind]}"/>'
    if kind != "moved":
        return cell
    number = f'<text x="{x + (CELL - 1) / 2:g}" y="{y + CELL - 4}" font-size="9" text-anchor="middle" fill="#ffffff">'
    return f"{cell}{number}{frame}</text>"


def draw(policies: Mapping[str, CausalConfig]) -> None:
    """Write docs/policies/NAME.svg for each policy."""
    FOLDER.mkdir(exist_ok=True)
    for name, causal in policies.items():
        (FOLDER / f"{name}.svg").write_text(picture(name, replace(causal, policy=name)), encoding="utf-8")


# -------------------------------------------------------------- contact sheet --
def contact_sheet(videos: Mapping[str, Tensor], file: Path = SHEET, *, columns: int = 9, side: int = 72) -> None:
    """Write a row of frames for each video [V, R, H, W] in [0, 1], from its first to its last."""
    font, label = ImageFont.load_default(13), 150
    sheet = Image.new("RGB", (label + columns * (side + 3), len(videos) * (side + 3)), (16, 20, 24))
    pen = ImageDraw.Draw(sheet)
    for row, (name, video_VRHW) in enumerate(videos.items()):
        y = row * (side + 3)
        pen.text((6, y + side // 2), name, fill="white", anchor="lm", font=font)
        for column in range(columns):
            frame_RHW = video_VRHW[round(column * (len(video_VRHW) - 1) / (columns - 1))]
            pixels = (frame_RHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            small = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(small, (label + column * (side + 3), y))
    sheet.save(file, quality=80, method=6)
