"""What a page asks of a run. The server's thread writes it and the sampling thread waits for it, behind one lock."""

from __future__ import annotations

import threading

from ...selfforcing_core.prompt_schedule import Transition


class PageSteering:
    """The wishes of the page that steers a run. `changed` is the lock, and tells whoever waits of each new wish."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.prompt: tuple[str, Transition] | None = None  # what was typed, until the sampling thread reads it
        self.seed: int | None = None  # of the chunks that have not begun; None is the run's own
        self.is_reseeded = False  # since the last chunk began
        self.chunk_start = -1  # first latent frame of the chunk being made
        self.chunk_seed: int | None = None  # of its noise; None is the run's own
        self.next_seed: int | None = None  # with which the held chunk is to be made once more
        self.is_held = False  # every chunk waits when it is done
        self.is_released = False  # but this one goes on
        self.is_waiting = False  # for the page, at this moment
        self.is_finishing = False  # the present chunk is the last

    # ------------------------------------------------------ the server's loop --
    def type_prompt(self, text: str, transition: Transition) -> None:
        """Let a prompt begin with the next chunk; of several the last."""
        with self.changed:
            self.prompt = text, transition
            self.changed.notify_all()

    def reseed(self, seed: int) -> None:
        """Give the chunks that have not begun another seed."""
        with self.changed:
            self.seed, self.is_reseeded = seed, True
            self.changed.notify_all()

    def hold(self) -> None:
        """Let every chunk wait when it is done."""
        with self.changed:
            self.is_held = True
            self.changed.notify_all()

    def go_on(self) -> None:
        """Hold no longer."""
        with self.changed:
            # The chunk that waits goes on even if hold is pressed again before its thread looks: that is for the next.
            self.is_held, self.is_released = False, True
            self.changed.notify_all()

    def reroll(self, seed: int) -> None:
        """Make the held chunk once more. Raises ValueError if none is held."""
        with self.changed:
            if not self.is_waiting:
                raise ValueError("no chunk is held; press Hold first and wait until it is")
            self.next_seed = seed
            self.changed.notify_all()

    def finish(self) -> None:
        """End the video with the present chunk."""
        with self.changed:
            self.is_finishing = True
            self.changed.notify_all()

    # ---------------------------------------------------- the sampling thread --
    def take_prompt(self) -> tuple[str, Transition] | None:
        """Return the typed text and how it is to begin, once; None if nothing was typed."""
        with self.changed:
            prompt, self.prompt = self.prompt, None
            return prompt

    def begin(self, start_frame: int) -> tuple[int | None, bool]:
        """Return the seed of this chunk's noise, None for the run's own, and whether it was changed for this chunk.

        A chunk keeps the seed that it began with, however often it is asked for.
        """
        with self.changed:
            if start_frame == self.chunk_start:
                return self.chunk_seed, False
            self.chunk_start, self.chunk_seed = start_frame, self.seed
            is_reseeded, self.is_reseeded = self.is_reseeded, False
            return self.chunk_seed, is_reseeded
