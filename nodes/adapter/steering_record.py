"""What was done by hand while a video was made, and the Prompt Schedule text that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...selfforcing_core.geometry import chunk_starts, pixel_frames
from ...selfforcing_core.prompt_schedule import OWN_SEED, TimedPrompt, Transition, moment_of, schedule_text, seed_at
from .guider_prompts import Timeline

USUAL_FPS = 16.0  # of Wan; a schedule in other frames per second says so
TEXT_LETTERS = 120  # of a prompt in the list of events


class SteeringRecord:
    """Of one run: begins with what its CONDITIONING says beforehand; every change is noted with its chunk.

    Chunks are named by their first latent frame. lengths: latent frames of all chunks. fps: the video's clock.
    """

    def __init__(self, timeline: Timeline, lengths: Sequence[int], fps: float) -> None:
        self.timeline, self.fps = timeline, fps
        self.starts = chunk_starts(lengths)
        self.prompts = dict(timeline.prompts)  # later ones, and how they begin, by their first chunk
        # A seed is kept for each chunk and not from a chunk on: re-rolling one leaves those behind it as they are.
        self.seeds: dict[int, int] = {}  # by hand: of every chunk that had one
        self.first = timeline.first
        self.events: list[dict[str, Any]] = []
        self.latest = self.starts[-1]  # the last chunk that was begun; a run that nobody follows makes them all

    def prompt(self, start: int, text: str, transition: Transition) -> None:
        """Note that a typed prompt begins with this chunk; of several for one chunk the last."""
        if start == 0:
            self.first = text
        else:
            self.prompts[start] = (text, transition)
        blend = {"blend": transition.blend} if transition.blend > 1 else {}
        self._note("prompt", start, text=_shortened(text), history=transition.history, **blend)

    def seed(self, start: int, seed: int) -> None:
        """Note that another seed holds from this chunk on."""
        self._note("seed", start, seed=seed)

    def reroll(self, start: int, seed: int) -> None:
        """Note that this chunk is made once more with a seed."""
        self._note("reroll", start, seed=seed)

    def use(self, start: int, seed: int | None) -> None:
        """Note that this chunk is being made with a seed given by hand; None: with that of the run or its schedule."""
        self.latest = start
        if seed is not None:
            self.seeds[start] = seed

    def text(self) -> str:
        """Return the Prompt Schedule text that repeats the run as far as it was begun, with its seed and other inputs.

        The first prompt is empty where its text is not known, which Prompt Schedule refuses.
        """
        entries, previous_seed = [], None
        rate = None if self.fps == USUAL_FPS else self.fps
        for start in (start for start in self.starts if start <= self.latest):
            seed = self.seeds.get(start, seed_at(self.timeline.seeds, start))
            is_changed = start in self.prompts
            prompt, transition = self.prompts[start] if is_changed else (self.first if start == 0 else "", Transition())
            # A seed of the text holds until the next one, so it is written where it changes, and undone by "own".
            new_seed = None if seed == previous_seed else OWN_SEED if seed is None else seed
            if start == 0 or is_changed or new_seed is not None:
                moment, fps = moment_of(start, self.fps), None if start else rate
                entries.append(TimedPrompt(moment, prompt, transition.history, new_seed, fps, transition.blend))
            previous_seed = seed
        return schedule_text(entries)

    def _note(self, kind: str, start: int, **details: Any) -> None:
        frame = pixel_frames(start)
        place = {"chunk": self.starts.index(start), "frame": frame, "seconds": frame / self.fps}
        # A new list: the outbox's thread may be sending the old one.
        self.events = [*self.events, {"kind": kind, **place, **details}]


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_LETTERS else text[: TEXT_LETTERS - 3] + "..."
