"""Where the nodes of a workflow stand: the note first, then groups from left to right in the order of the work.

Left of the sampler every node stands as far right as what it feeds allows, so that its wires reach over no other
column. What grows (a picture, a player, a saved video) stands last in its column, or has the room that it will need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WIDTH, NOTE_WIDTH, SAMPLER_WIDTH = 320, 430, 380  # pixels of the canvas at 100 %
COLUMN_GAP, ROW_GAP, GROUP_GAP = 70, 24, 40
TITLE = 30  # above a node's place
PADDING, HEADER = 20, 46  # between a group's frame and its nodes; above them
WINDOW = (1500, 770)  # of a 1600 x 1000 browser: what menus and side bars leave of the canvas
LEFT, TOP = 75, 95  # where that begins
SCALES = (0.6, 0.9)  # smaller is not read, larger wastes the window

MODELS, PROMPT, PICTURE, SAMPLE, SAVE = "Models", "Prompt", "Picture", "Sample", "Save"
COLOURS = {MODELS: "#3f789e", PROMPT: "#b06634", PICTURE: "#a1309b", SAMPLE: "#b58b2a", SAVE: "#88aa88"}
SECTIONS = {
    "SelfForcingModelLoader": MODELS, "LoraLoaderModelOnly": MODELS, "SelfForcingCacheOptions": MODELS,
    "SelfForcingTAEHVLoader": MODELS, "VAELoader": MODELS, "CLIPLoader": MODELS, "CLIPVisionLoader": MODELS,
    "CLIPTextEncode": PROMPT, "SelfForcingTextEncode": PROMPT, "SelfForcingPromptSchedule": PROMPT,
    "LoadImage": PICTURE, "CLIPVisionEncode": PICTURE, "SelfForcingImageToVideo": PICTURE,
    "VAEDecode": SAVE, "CreateVideo": SAVE, "SaveVideo": SAVE,
}  # fmt: skip
STREAMING = ("SelfForcingStreamSampler", "SelfForcingStreamToFile")


@dataclass(frozen=True)
class Plan:
    """pos and size of each node by its id, the groups, and how the canvas opens: its scale and offset."""

    boxes: dict[str, tuple[list[int], list[int]]]
    groups: list[dict[str, Any]]
    scale: float
    offset: list[float]


def arrange(twin: dict[str, Any], heights: dict[str, int], rooms: dict[str, int], note: tuple[str, int]) -> Plan:
    """Return places for every node of a twin and its note (id and height).

    heights: of each node as it is saved. rooms: what it may need below its title in any renderer; never less.
    """
    sections = _sections(twin)
    # Loaders and prompts as far right as they may, work as far left: both then lie close to the sampler.
    left = _columns(twin, [key for key, name in sections.items() if name in (MODELS, PROMPT, PICTURE)], late=True)
    work = _columns(twin, [key for key, name in sections.items() if name == SAMPLE], late=False)
    left_x, work_x = NOTE_WIDTH + COLUMN_GAP, 0
    num_left, num_work = 1 + max(left.values()), 1 + max(work.values())
    work_x = left_x + num_left * (WIDTH + COLUMN_GAP)
    boxes: dict[str, tuple[list[int], list[int]]] = {note[0]: ([0, HEADER], [NOTE_WIDTH, note[1]])}
    y = 0
    for name in (MODELS, PROMPT, PICTURE):
        band = {key: column for key, column in left.items() if sections[key] == name}
        y = _stack(band, left_x, y, heights, rooms, WIDTH, boxes)
    width = SAMPLER_WIDTH if any(twin[key]["class_type"] in STREAMING for key in work) else WIDTH
    _stack(work, work_x, 0, heights, rooms, width, boxes)
    saved = dict.fromkeys((key for key, name in sections.items() if name == SAVE), 0)
    _stack(saved, work_x + num_work * (width + COLUMN_GAP), 0, heights, rooms, WIDTH, boxes)
    groups = _groups(sections, boxes, rooms)
    return Plan(boxes, groups, *_view(boxes, rooms, note))


def _sections(twin: dict[str, Any]) -> dict[str, str]:
    """A picture that comes out of a sampler is part of the sampling that follows."""
    sections: dict[str, str] = {}
    for key in _in_order(twin):
        sections[key] = SECTIONS.get(twin[key]["class_type"], SAMPLE)
        if sections[key] == PICTURE and any(sections[source] == SAMPLE for source in _sources(twin, key)):
            sections[key] = SAMPLE
    return sections


def _sources(twin: dict[str, Any], key: str) -> list[str]:
    return [value[0] for value in twin[key]["inputs"].values() if isinstance(value, list)]


def _in_order(twin: dict[str, Any]) -> list[str]:
    """Each node behind those it reads from."""
    order: list[str] = []

    def visit(key: str) -> None:
        if key not in order:
            for source in _sources(twin, key):
                visit(source)
            order.append(key)

    for key in twin:
        visit(key)
    return order


def _columns(twin: dict[str, Any], keys: list[str], *, late: bool) -> dict[str, int]:
    """The column of each of these nodes: as far right (late) or left as their links among themselves allow."""
    # The longest path: a node is one column behind the last of those that feed it.
    edges = [(source, key) for key in keys for source in _sources(twin, key) if source in keys]
    columns = dict.fromkeys(keys, 0)
    for key in [key for key in _in_order(twin) if key in keys]:
        columns[key] = max((columns[source] + 1 for source, target in edges if target == key), default=0)
    if late:
        last = max(columns.values(), default=0)
        for key in reversed([key for key in _in_order(twin) if key in keys]):
            columns[key] = min((columns[target] - 1 for source, target in edges if source == key), default=last)
    return columns


def _stack(
    columns: dict[str, int],
    x: int,
    y: int,
    heights: dict[str, int],
    rooms: dict[str, int],
    width: int,
    boxes: dict[str, tuple[list[int], list[int]]],
) -> int:
    """Put nodes below each other in their columns; where the next band may begin."""
    if not columns:
        return y
    tops: dict[int, int] = {}
    for key, column in columns.items():
        top = tops.get(column, y + HEADER) + TITLE
        boxes[key] = ([x + column * (width + COLUMN_GAP), top], [width, heights[key]])
        tops[column] = top + rooms[key] + ROW_GAP
    return max(tops.values()) - ROW_GAP + PADDING + GROUP_GAP


def _groups(
    sections: dict[str, str], boxes: dict[str, tuple[list[int], list[int]]], rooms: dict[str, int]
) -> list[dict[str, Any]]:
    groups = []
    for name in (MODELS, PROMPT, PICTURE, SAMPLE, SAVE):
        frame = _around((boxes[key], rooms[key]) for key, section in sections.items() if section == name)
        if frame is None:
            continue
        left, top, right, bottom = frame
        bounding = [
            left - PADDING,
            top - TITLE - HEADER,
            right - left + 2 * PADDING,
            bottom - top + TITLE + HEADER + PADDING,
        ]
        groups.append(
            {
                "id": len(groups) + 1,
                "title": name,
                "bounding": bounding,
                "color": COLOURS[name],
                "font_size": 24,
                "flags": {},
            }
        )
    return groups


def _around(items: Iterable[tuple[tuple[list[int], list[int]], int]]) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of these places with their rooms."""
    edges = [(pos[0], pos[1], pos[0] + size[0], pos[1] + room) for (pos, size), room in items]
    if not edges:
        return None
    lefts, tops, rights, bottoms = zip(*edges)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _view(
    boxes: dict[str, tuple[list[int], list[int]]], rooms: dict[str, int], note: tuple[str, int]
) -> tuple[float, list[float]]:
    """The scale at which everything is seen, if it can be read then, and the offset that begins at the top left."""
    frame = _around((box, {**rooms, note[0]: note[1]}[key]) for key, box in boxes.items())
    assert frame is not None
    scale = min(WINDOW[0] / (frame[2] + 2 * PADDING), WINDOW[1] / (frame[3] + 2 * PADDING))
    # Two digits, as the front end saves it: another drawing of the same graph changes nothing.
    scale = round(min(max(scale, SCALES[0]), SCALES[1]), 2)
    return scale, [LEFT / scale + PADDING / 2, TOP / scale]
