"""A procedural captioned world, and a detector that reads it back without learning.

One shape moves over a plain background at constant velocity; whatever leaves on one side enters on the other, so every
word of the caption stays true for as long as the video lasts. Size and starting point are not in the caption: a model
has to remember them.

Frames are float32 RGB in [0, 1], [V, R, H, W] with H = W = SIZE.

Letters: V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZE = 64  # pixels: 8 x 8 latent positions and 16 tokens a latent frame, small enough to train on a CPU
RADIUS = (8.0, 12.0)  # pixels, half of the shape's width
EDGE = 0.7  # pixels over which an outline fades

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "magenta": (0.95, 0.20, 0.90),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": 0.6, "quickly": 1.5}  # pixels per frame
BACKGROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.36, 0.36, 0.36),
    "brown": (0.34, 0.20, 0.08),
    "navy": (0.05, 0.07, 0.30),
    "purple": (0.28, 0.08, 0.34),
    "teal": (0.04, 0.32, 0.32),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
}
HELDOUT_FILE = Path(__file__).resolve().parents[2] / "assets" / "tiny" / "heldout.json"


@dataclass(frozen=True)
class Scene:
    """What is to be seen: five words of the caption, and what it leaves to chance."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    radius: float = 10.0  # pixels
    start: tuple[float, float] = (32.0, 32.0)  # centre in the first frame, x and y in pixels

    @property
    def words(self) -> tuple[str, str, str, str, str]:
        return self.colour, self.shape, self.direction, self.speed, self.background

    def caption(self, *, speed: bool = True, background: bool = True) -> str:
        """Write the sentence for this scene; speed and background may be left unsaid."""
        text = f"a {self.colour} {self.shape} moving {self.direction}"
        text += f" {self.speed}" if speed else ""
        return text + (f" on a {self.background} background" if background else "")


def combinations() -> list[tuple[str, ...]]:
    """List every combination of the five named attributes, in a fixed order."""
    return list(itertools.product(*ATTRIBUTES.values()))


def heldout() -> list[tuple[str, ...]]:
    """Read the combinations that training never sees, from the bundle's list; every word occurs among them.

    So that a score on them says whether a model composes words, and not whether it remembers its clips.
    """
    return [tuple(words) for words in json.loads(HELDOUT_FILE.read_text())]


def named_scene(words: tuple[str, ...]) -> Scene:
    """Make the scene of five words, with the default size and start."""
    colour, shape, direction, speed, background = words
    return Scene(colour, shape, direction, speed, background)


def random_scene(rng: np.random.Generator, words: tuple[str, ...] | None = None) -> Scene:
    """Draw a scene with the given words (drawn, too, if None), random size and start."""
    if words is None:
        words = tuple(str(rng.choice(values)) for values in ATTRIBUTES.values())
    radius = float(rng.uniform(*RADIUS))
    start = (float(rng.uniform(0, SIZE)), float(rng.uniform(0, SIZE)))
    return replace(named_scene(words), radius=radius, start=start)


@functools.cache
def _pixel_centres() -> Tensor:
    return torch.arange(SIZE, dtype=torch.float32) + 0.5


def _wrapped(offset: Tensor) -> Tensor:
    """Return the signed distance on a ring of SIZE pixels, in [-SIZE/2, SIZE/2)."""
    return (offset + SIZE / 2) % SIZE - SIZE / 2


def outline_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """Return the signed distance in pixels to the outline of a shape centred at 0; negative inside."""
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.886  # sqrt(pi) / 2: of the circle's area
    half = radius * 1.347  # of a side: equilateral, apex up, centroid at 0, of the circle's area
    slope = math.sqrt(3.0)
    return torch.maximum(dy - half * slope / 3, (dx.abs() * slope - dy) / 2 - half * slope / 3)


def render(scene: Scene, num_frames: int) -> Tensor:
    """Render frames [V, R, H, W] in [0, 1] of a scene, anti-aliased."""
    time = torch.arange(num_frames, dtype=torch.float32)[:, None, None]
    velocity = [SPEEDS[scene.speed] * axis for axis in DIRECTIONS[scene.direction]]
    dx = _wrapped(_pixel_centres()[None, None, :] - (scene.start[0] + velocity[0] * time))
    dy = _wrapped(_pixel_centres()[None, :, None] - (scene.start[1] + velocity[1] * time))
    dx, dy = torch.broadcast_tensors(dx, dy)
    distance = outline_distance(scene.shape, dx, dy, scene.radius)
    # From the exact distance: a shape moves by parts of a pixel, as slow speeds need.
    cover = (0.5 - distance / EDGE).clamp(0, 1)[:, None]
    ink = torch.tensor(COLOURS[scene.colour])[None, :, None, None]
    ground = torch.tensor(BACKGROUNDS[scene.background])[None, :, None, None]
    return ground + cover * (ink - ground)


@dataclass(frozen=True)
class Detection:
    """What the detector read in one video; words are None where most frames show none.

    A colour needs something that stands out from the background, a shape something that looks like one.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    background: str
    radius: float  # pixels, the median over frames; NaN without a shape
    start: tuple[float, float]  # centre in the first frame that shows a shape, pixels
    shape_share: float  # of the frames, that show a shape
    colours_V: tuple[str | None, ...]
    shapes_V: tuple[str | None, ...]


@functools.cache
def _templates() -> tuple[Tensor, Tensor]:
    """Return masks of the three shapes at all sizes, centred: their areas and themselves, by shape and size."""
    offset = _pixel_centres() - SIZE / 2
    dx, dy = offset[None, :].expand(SIZE, SIZE), offset[:, None].expand(SIZE, SIZE)
    radii = torch.arange(4.0, 18.0, 0.25)
    masks = torch.stack([torch.stack([outline_distance(s, dx, dy, r) < 0 for r in radii]) for s in SHAPES])
    return masks.float().sum((-1, -2)), masks.float()


def _nearest(rgb: Tensor, palette: dict[str, tuple[float, float, float]]) -> str:
    distance = (torch.tensor(list(palette.values())) - rgb).norm(dim=-1)
    return list(palette)[int(distance.argmin())]


def _ring_mean(weight: Tensor) -> float:
    """Return the centre of mass on a ring of SIZE pixels."""
    pixels_per_radian = SIZE / (2 * math.pi)
    # The circular mean: a shape half over the edge has its centre at the edge, not in the middle.
    angle = _pixel_centres() / pixels_per_radian
    mean = math.atan2(float((weight * angle.sin()).sum()), float((weight * angle.cos()).sum()))
    return mean % (2 * math.pi) * pixels_per_radian


Reading = tuple[str, float, float, float]  # shape, x, y, radius of one frame


def _read_frame(frame_RHW: Tensor, ground: Tensor) -> tuple[str | None, Reading | None]:
    """Read the colour of what stands out in one frame, and (shape, x, y, radius) if that has a shape."""
    # About half of the least distance between a colour and a background, 0.55 (green on teal).
    mask = ((frame_RHW - ground[:, None, None]).norm(dim=0) > 0.3).float()
    area = float(mask.sum())
    if not 60 <= area <= 1200:  # circles of the world have 201 to 452 pixels
        return None, None
    colour = _nearest(frame_RHW[:, mask > 0].median(dim=1).values, COLOURS)
    x, y = _ring_mean(mask.sum(0)), _ring_mean(mask.sum(1))
    shift = (round(SIZE / 2 - y), round(SIZE / 2 - x))
    centred = torch.roll(mask, shift, (0, 1))
    areas, masks = _templates()
    size = (areas - area).abs().argmin(-1)
    candidates = torch.stack([masks[k, int(size[k])] for k in range(len(SHAPES))])
    # Intersection over union with each shape at the mask's own area; below 0.6 it looks like none of them.
    overlap = (candidates * centred).sum((-1, -2)) / torch.maximum(candidates, centred).sum((-1, -2))
    best = int(overlap.argmax())
    if float(overlap[best]) < 0.6:
        return colour, None
    return colour, (SHAPES[best], x, y, math.sqrt(area / math.pi))


def _majority(words: list[str | None]) -> str | None:
    """Return the word of more than half of the frames, else None."""
    best = max(set(words), key=words.count)
    return best if best is not None and words.count(best) * 2 > len(words) else None


def detect(frames_VRHW: Tensor) -> Detection:
    """Read a video [V, R, H, W] in [0, 1]: per-frame colour and shape, and motion from the shape's path."""
    # A shape covers at most a ninth of a frame, so that the median pixel is of the background.
    grounds = frames_VRHW.flatten(2).median(dim=-1).values
    ground = grounds.median(dim=0).values
    readings = [_read_frame(frame, own) for frame, own in zip(frames_VRHW.float(), grounds)]
    path = [(index, reading) for index, (_, reading) in enumerate(readings) if reading is not None]
    colours = [colour for colour, _ in readings]
    shapes = [reading[0] if reading else None for _, reading in readings]
    direction = speed = None
    if len(path) * 2 > len(readings) and len(path) > 1:
        direction, speed = _read_motion(path)
    return Detection(
        colour=_majority(colours),
        shape=_majority(shapes),
        direction=direction,
        speed=speed,
        background=_nearest(ground, BACKGROUNDS),
        radius=float(np.median([reading[3] for _, reading in path])) if path else math.nan,
        start=(path[0][1][1], path[0][1][2]) if path else (math.nan, math.nan),
        shape_share=len(path) / len(readings),
        colours_V=tuple(colours),
        shapes_V=tuple(shapes),
    )


def _read_motion(path: list[tuple[int, Reading]]) -> tuple[str | None, str | None]:
    """Read the words for direction and speed from wrapped displacements between frames that show a shape."""
    steps = torch.tensor([later[0] - earlier[0] for earlier, later in zip(path, path[1:])], dtype=torch.float32)
    moves = torch.tensor([[b[1][1] - a[1][1], b[1][2] - a[1][2]] for a, b in zip(path, path[1:])])
    velocity = _wrapped(moves).sum(0) / steps.sum()
    length = float(velocity.norm())
    if length < 0.15:  # pixels per frame, a quarter of the slow speed: it stands still
        return None, None
    along = {word: float((velocity * torch.tensor(axis)).sum()) for word, axis in DIRECTIONS.items()}
    return max(along, key=lambda word: along[word]), min(SPEEDS, key=lambda word: abs(SPEEDS[word] - length))
