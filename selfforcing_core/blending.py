"""Prompts that become the next over several chunks, as Krea Realtime and Scope interpolate embeddings.

Letters: B batch, P text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .conditioning import Conditioning
from .policy import KEEP, CachePolicy
from .prompt_schedule import Transition

Prompt = TypeVar("Prompt")


def blend_embeds(one_BPE: Tensor, other_BPE: Tensor, weight: float) -> Tensor:
    """Return (1 - weight) * one + weight * other; the shorter text counts as zeros behind its end.

    Networks pad texts with zeros to one length, so that a row of nothing is what they would see there.
    """
    rows = max(one_BPE.shape[1], other_BPE.shape[1])
    one_BPE, other_BPE = (
        torch.nn.functional.pad(each_BPE, (0, 0, 0, rows - each_BPE.shape[1])) for each_BPE in (one_BPE, other_BPE)
    )
    return torch.lerp(one_BPE, other_BPE.to(one_BPE), weight)


def blend_conditionings(one: Conditioning, other: Conditioning, weight: float) -> Conditioning:
    """Return the second conditioning with the embeddings between both."""
    return replace(other, prompt_embeds_BPE=blend_embeds(one.prompt_embeds_BPE, other.prompt_embeds_BPE, weight))


def history_on_the_way(policy: CachePolicy) -> str | None:
    """Return what becomes of the frames so far while a prompt becomes the next: kept, unless the policy cannot."""
    try:
        policy.with_history(KEEP)
    except ValueError:
        return None  # such a policy says it for every change
    return KEEP


class Blending(Generic[Prompt]):
    """Which prompt holds for which chunk, where some become the next over several chunks.

    For each chunk in order: `begin`, perhaps `change`, `step`. A chunk that is made once more begins again, and what is
    changed then goes on from what held before the chunk, as if it had been changed so at first.

    first: the prompt from the beginning on. starts: the first latent frames of all chunks. mix(one, other, weight):
    what lies between two prompts. on_the_way: what becomes of the frames so far in a chunk between them.
    """

    def __init__(
        self,
        first: Prompt,
        starts: Sequence[int],
        mix: Callable[[Prompt, Prompt, float], Prompt],
        *,
        on_the_way: str | None = KEEP,
    ) -> None:
        self.starts, self.mix, self.on_the_way = list(starts), mix, on_the_way
        self.before = self.current = first  # what held before the chunk that was begun last, and what holds
        self.chunk = -1  # that chunk's first latent frame
        self.steps: dict[int, tuple[Prompt, str | None]] = {}  # what is still to come of the latest change

    def begin(self, start_frame: int) -> None:
        """Begin the chunk of this frame, or begin it again."""
        if start_frame != self.chunk:
            self.before, self.chunk = self.current, start_frame

    def change(self, prompt: Prompt, transition: Transition) -> None:
        """Let another prompt take over from the chunk that was begun on, in place of what was still to come.

        Of N chunks the first still has the former prompt whole and the last has the new one (weights i / (N - 1), as
        published). Frames are kept on the way; what the change does to them it does where the new prompt is whole.
        """
        index = self.starts.index(self.chunk)
        last = transition.blend - 1
        self.steps = {
            start: (self.mix(self.before, prompt, step / last) if step else self.before, self.on_the_way)
            for step, start in enumerate(self.starts[index : index + last])
        }
        if index + last < len(self.starts):  # else the video ends on the way
            self.steps[self.starts[index + last]] = prompt, transition.history

    def step(self) -> tuple[Prompt, str | None] | None:
        """Return the prompt that holds from this chunk on and what becomes of the frames so far; None: as before."""
        step = self.steps.pop(self.chunk, None)
        if step is not None:
            self.current = step[0]
        return step
