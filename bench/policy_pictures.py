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

from selfforcing_core.atomic import replacing
from selfforcing_core.chosen_memory import CHOSEN
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.history import PromptChange
from selfforcing_core.memory import AVERAGE
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.policy import CUT, cache_policy
from selfforcing_core.rollout import rollout

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "policies"
SHEET = ROOT / "docs" / "policies.webp"
CELL, LEFT, TOP = 14, 166, 58  # pixels: of a frame; beside and above the cells
STEPS = StepConfig((1000.0, 750.0, 500.0, 250.0))  # as many as the tiny model has
SMALLEST = WanConfig(32, 32, 2, 1, in_dim=4, out_dim=4, text_dim=8, text_len=4, freq_dim=16)
# Text and lines are read on a light page and on a dark one, since the picture brings its own ground.
COLOURS = {
    "own": "#2f6fbb",
    "joint": "#5f97d6",
    "past": "#a9c7ea",
    "sink": "#e39a3b",
    "moved": "#c8693f",
    "first": "#4a9a8c",
    "pinned": "#b0607f",
    "average": "#8a63b8",
    "bank": "#6f9a3a",
    "chosen": "#8b8f96",
}
WORDS = {
    "own": "the chunk itself",
    "joint": "later chunks on the way, denoised in the same pass",
    "past": "earlier frames, where they were",
    "sink": "frames that never leave, where they were",
    "moved": "frames that stand elsewhere (their number inside)",
    "first": "read as a first frame: the window's first picture, or frame 0 without an autoencoder",
    "pinned": "the first frames of a shot, which stay while it lasts (their number inside)",
    "average": "an average of what left",
    "bank": "the bank: frames of earlier chunks, wherever they stand",
    "chosen": "what the device chose, layer by layer: slots of the cache, in no order",
}
NUMBERED = ("moved", "pinned")
MARK, MARK_WORDS = "#101418", "an earlier frame, written under the new prompt"


@dataclass(frozen=True)
class Seen:
    """What one pass over a chunk has before it."""

    frames: range  # of the chunk itself
    slots: tuple[tuple[int, float], ...]  # frame (or AVERAGE, CHOSEN) and place on the time axis of every visible slot
    num_joint: int = 0  # frames behind the chunk that are denoised in the same pass, the last ones of `slots`
    num_banked: int = 0  # frames beside the window
    pinned: range = range(0)  # frames that stay as long as a shot
    rewritten: frozenset[int] = frozenset()  # frames before the change that were written under the later prompt


def changed_chunk(causal: CausalConfig) -> int:
    """Return the chunk that begins another prompt in the drawn run: one behind the first that evicts."""
    return causal.window // causal.chunk + 2


def change_word(causal: CausalConfig) -> str:
    """Return what becomes of the frames so far at that change: the policy's own word, a cut where there are shots."""
    policy = cache_policy(causal.policy)
    return policy.history if policy.shot_offset is None else CUT


class _Watched:
    """A network that notes what its denoising passes find in the cache, and under which prompt its frames are."""

    def __init__(self, network: Any, chunk: int, changed: int) -> None:
        self.network, self.chunk, self.changed = network, chunk, changed  # changed: the first frame of another prompt
        self.seen: dict[int, Seen] = {}
        self.rewritten: frozenset[int] = frozenset()
        self.is_changed = False

    def __call__(
        self, x_BTCHW: Tensor, timesteps_BT: Tensor, *rest: Any, cache: Any, start_frame: int = 0, **options: Any
    ) -> Tensor:
        flow = self.network(x_BTCHW, timesteps_BT, *rest, cache=cache, start_frame=start_frame, **options)
        end_frame, is_joint = start_frame + x_BTCHW.shape[1], cache.looks_at is not None
        if cache.writes and start_frame < self.changed:
            written = frozenset(range(start_frame, end_frame))
            self.rewritten = self.rewritten | written if self.is_changed else self.rewritten - written
        # of a chunk's own passes the first, for all see the same; of joint ones the last, which finishes the oldest
        if is_joint or (timesteps_BT.max() == STEPS.steps[0] and start_frame not in self.seen):
            self.seen[start_frame] = self._found(cache, start_frame, end_frame, is_joint=is_joint)
        return flow

    def _found(self, cache: Any, start_frame: int, end_frame: int, *, is_joint: bool) -> Seen:
        tokens = cache.tokens_per_frame
        hidden = {
            slot for _, first, length in cache._hidden for slot in range(first // tokens, (first + length) // tokens)
        }
        used = [slot for slot in range(cache._num_visible() // tokens) if slot not in hidden]
        slots = [(cache.slot_frames[slot], cache.slot_positions[slot]) for slot in used]
        chunk = range(start_frame, start_frame + self.chunk if is_joint else end_frame)
        if CHOSEN in cache.slot_frames:  # one of them is the chunk's own
            earlier = range(start_frame - len(used) + len(chunk), start_frame)
            slots = [*((CHOSEN, float(place)) for place in earlier), *((frame, float(frame)) for frame in chunk)]
        if is_joint:  # its own frames are in no slot
            slots += [(frame, float(frame)) for frame in range(start_frame, end_frame)]
        bank, bank_end = cache._bank()
        return Seen(
            chunk,
            tuple(sorted(slots, key=lambda slot: slot[1])),
            num_joint=end_frame - chunk.stop,
            num_banked=(bank_end - bank) // tokens,
            pinned=getattr(cache.memory, "pinned", range(0)),
            rewritten=self.rewritten,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


@torch.no_grad()
def seen_by_chunks(causal: CausalConfig, chunks: int | None = None) -> list[Seen]:
    """Return what the first pass over each chunk sees, by running the rollout on the smallest network.

    Of chunks that are denoised together: the pass that finishes each. Half way another prompt begins.
    chunks: how many; None for four from that change on.
    """
    number = changed_chunk(causal) + 4 if chunks is None else chunks
    changed = changed_chunk(causal) * causal.chunk
    network = _Watched(CausalWan(SMALLEST).eval(), causal.chunk, changed)
    conditioning = Conditioning(torch.zeros(1, 1, SMALLEST.text_dim))

    def prompt_at(start_frame: int) -> PromptChange | None:
        if start_frame != changed:
            return None
        network.is_changed = True
        return PromptChange(conditioning, change_word(causal))

    # more chunks than are shown, so that the last one writes itself as all do, and is not alone in a joint pass
    shape = ((number + len(STEPS.steps)) * causal.chunk, SMALLEST.out_dim, 2, 2)
    caches = new_caches(network, conditioning, 1, shape, causal)
    guided = Guided(network, conditioning, caches=caches)
    options = {"latent_shape": shape, "causal": causal, "steps": STEPS, "prompt_at": prompt_at}
    for _ in rollout(guided, noise=SeededNoise(0), **options):
        pass
    return [network.seen[start] for start in sorted(network.seen)][:number]


def picture(name: str, causal: CausalConfig) -> str:
    """Return the SVG of one policy: a row per chunk, a column per place on the time axis, a bank in front of them."""
    rows, word = seen_by_chunks(causal), change_word(causal)
    places = [place for row in rows for _, place in row.slots]
    first, columns = int(min(places)), int(max(places)) - int(min(places)) + 1
    num_banked = max(row.num_banked for row in rows)
    left = LEFT + (num_banked * CELL + 10 if num_banked else 0)
    changed = changed_chunk(causal)
    title = f"{name}: chunk {causal.chunk}, window {causal.window}, sink {causal.sink}"
    below = TOP + len(rows) * (CELL + 4) + 10
    parts = [
        f'<text x="12" y="20" font-size="13" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="12" y="40">what each chunk sees, by its place on the time axis (from {first}); another prompt at '
        f"frame {changed * causal.chunk}: {word}</text>",
        f'<path d="M12 {TOP + changed * (CELL + 4) - 2}H{left + columns * CELL}" stroke="{MARK}" '
        'stroke-dasharray="3 3"/>',
    ]
    kinds = set()
    for index, row in enumerate(rows):
        y = TOP + index * (CELL + 4)
        said = f", {word}" if index == changed else ""
        parts.append(f'<text x="12" y="{y + CELL - 3}">frames {row.frames[0]}-{row.frames[-1]}{said}</text>')
        parts += [_rectangle("bank", LEFT + each * CELL, y) for each in range(row.num_banked)]
        for frame, place in row.slots:
            kind = _kind(row, causal, frame, place)
            kinds.add(kind)
            parts += _cell(row, kind, frame, left + (place - first) * CELL, y)
    kinds |= {"bank"} if num_banked else set()
    lines = [kind for kind in WORDS if kind in kinds]
    for index, kind in enumerate(lines):
        parts += [_rectangle(kind, 12, below + 22 * index), _words(WORDS[kind], below + 22 * index)]
    height = below + 22 * len(lines) + 2
    if any(row.rewritten for row in rows):
        parts += [_rectangle("past", 12, height - 2), _mark(12, height - 2), _words(MARK_WORDS, height - 2)]
        height += 22
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(left + columns * CELL + 16, 560)}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{html.escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _kind(row: Seen, causal: CausalConfig, frame: int, place: float) -> str:
    """Return which of COLOURS a visible slot has."""
    if frame in (AVERAGE, CHOSEN):
        return "average" if frame == AVERAGE else "chosen"
    if frame in row.frames:
        return "own"
    if frame >= row.frames.stop:
        return "joint"
    if frame in row.pinned:
        return "pinned"
    # the first frame of a window that is computed again is not that frame
    if cache_policy(causal.policy).recomputes and 0 < frame == row.slots[0][0]:
        return "first"
    if place != frame:
        return "moved"
    return "sink" if frame < causal.sink else "past"


def _cell(row: Seen, kind: str, frame: int, x: float, y: int) -> list[str]:
    parts = [_rectangle(kind, x, y)]
    if kind in NUMBERED:
        middle = f'x="{x + (CELL - 1) / 2:g}" y="{y + CELL - 4}"'
        parts.append(f'<text {middle} font-size="9" text-anchor="middle" fill="#ffffff">{frame}</text>')
    if frame in row.rewritten:
        parts.append(_mark(x, y))
    return parts


def _rectangle(kind: str, x: float, y: int) -> str:
    return f'<rect x="{x:g}" y="{y}" width="{CELL - 1}" height="{CELL}" fill="{COLOURS[kind]}"/>'


def _mark(x: float, y: int) -> str:
    return f'<rect x="{x:g}" y="{y + CELL - 2}" width="{CELL - 1}" height="2" fill="{MARK}"/>'


def _words(words: str, y: int) -> str:
    return f'<text x="34" y="{y + 11}">{words}</text>'


def draw(policies: Mapping[str, CausalConfig]) -> None:
    """Write docs/policies/NAME.svg for each policy."""
    FOLDER.mkdir(exist_ok=True)
    for name, causal in policies.items():
        with replacing(FOLDER / f"{name}.svg") as file:
            file.write_text(picture(name, replace(causal, policy=name)), encoding="utf-8")


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
    with replacing(file) as part:
        sheet.save(part, format=file.suffix[1:], quality=80, method=6)
