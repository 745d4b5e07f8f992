"""Which prompts the host's guider evaluates, and what takes their place while a video is made.

A CONDITIONING may carry, in the options beside its embeddings, from when it holds and how further text is read.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import comfy.conds

from ..selfforcing_core.conditioning import Conditioning
from ..selfforcing_core.config import WanConfig
from ..selfforcing_core.prompt_schedule import Entry, start_frames
from ..selfforcing_core.rollout import PromptChange

UNKNOWN_PAST = "the state that this run goes on from does not hold what was written into the cache"
READER = "selfforcing_reader"  # entry of a CONDITIONING's options: text to CONDITIONING, as this one was made
REFUSED = {  # what a prompt may carry for other samplers, and where it comes from
    "area": "Conditioning (Set Area)",
    "mask": "Conditioning (Set Mask)",
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "timestep_start": "Conditioning Set Timestep Range",
    "timestep_end": "Conditioning Set Timestep Range",
}
Cond = dict[str, Any]  # a prompt as the host's samplers see it
Reader = Callable[[str], list[Any]]


@dataclass(frozen=True)
class Moment:
    """From when a prompt holds, and what becomes of the frames before it: an entry of a CONDITIONING's options."""

    KEY: ClassVar[str] = "selfforcing_moment"
    seconds: float
    fps: float
    history: str


@dataclass(frozen=True)
class ClipReader:
    """Further text by the host's CLIP."""

    clip: Any

    def __call__(self, text: str) -> list[Any]:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


def reader_of(conditioning: list[Any], clip: Any = None) -> Reader | None:
    """How further text is read for this CONDITIONING: by `clip`, else as it was made itself, if it says so."""
    return ClipReader(clip) if clip is not None else conditioning[0][1].get(READER) if conditioning else None


class Typed(Protocol):
    """What somebody types while the video is made."""

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], str] | None:
        """CONDITIONING of a new prompt and what becomes of the history; None if there is none that passes `check`."""
        ...

    def say(self, message: str) -> None:
        """A line for whoever types."""
        ...


class Network(Protocol):
    """What evaluates the guider's prompts."""

    guider: Any
    config: WanConfig

    def renew(self) -> Conditioning: ...

    def kept_loaded(self) -> AbstractContextManager[None]: ...


# ------------------------------------------------------------------- guider --
def conditions(guider: Any) -> list[Cond]:
    """The prompts that the guider evaluates at first, positive ones before others.

    At cfg 1 negative ones are left out, unless a node on the MODEL needs them there too.

    Once a later prompt's time has come it is the only positive one, whatever it carries.
    """
    conds = {name: _at_first(found) for name, found in guider.conds.items() if found}
    needs_all = getattr(guider, "model_options", {}).get("disable_cfg1_optimization", False)
    if getattr(guider, "cfg", None) == 1 and "positive" in conds and not needs_all:
        conds.pop("negative", None)
    return [cond for name in sorted(conds, key=lambda name: name != "positive") for cond in conds[name]]


def _at_first(conds: list[Cond]) -> list[Cond]:
    return [cond for cond in conds if Moment.KEY not in cond] or conds


def later_prompts(guider: Any) -> list[tuple[Moment, list[Cond]]]:
    """Takes the positive prompts that hold only from a moment on out of the guider's; returns them by moment."""
    later: dict[Moment, list[Cond]] = {}
    for cond in guider.conds.get("positive", []):
        if Moment.KEY in cond:
            later.setdefault(cond[Moment.KEY], []).append(cond)
    if later:
        guider.conds["positive"] = [cond for cond in guider.conds["positive"] if Moment.KEY not in cond]
    return sorted(later.items(), key=lambda item: item[0].seconds)


def check_prompts(conds: Sequence[Cond], config: WanConfig) -> None:
    """Raise ValueError for prompts that a cached rollout would get wrong."""
    for cond in conds:
        found = next((name for name in REFUSED if cond.get(name) is not None), None)
        if found is not None:
            raise ValueError(
                f"the prompt comes from {REFUSED[found]}, which does not go with generating chunk by chunk"
            )
        _check_text(cond["model_conds"]["c_crossattn"].cond, config)


def _check_text(text: Any, config: WanConfig) -> None:
    rows, width = text.shape[1:]
    if width != config.text_dim:
        raise ValueError(
            f"the prompt's embeddings are {width} wide, but this model reads {config.text_dim}; "
            "encode the prompt with the text encoder that belongs to the model"
        )
    if rows > config.text_len and bool(text[:, config.text_len :].any()):
        raise ValueError(f"the prompt has {rows} rows of text, but this model reads {config.text_len}; shorten it")


class PromptPlan:
    """When which prompts hold: those with moments, and what is typed meanwhile, which comes first.

    fixed_frames: how many at the beginning cannot be written again under another prompt. If there are any, a typed one
    leaves the history as it is; raises ValueError for one with a moment behind them that is to recode it.
    """

    def __init__(
        self,
        network: Network,
        later: Sequence[tuple[Moment, list[Cond]]],
        lengths: tuple[int, ...],
        typed: Typed | None,
        *,
        fixed_frames: int = 0,
    ) -> None:
        entries = [Entry(0, ""), *(Entry(moment.seconds, "") for moment, _ in later)]
        starts = start_frames(entries, lengths, later[0][0].fps) if later else [0]
        self.network, self.typed, self.can_recode = network, typed, not fixed_frames
        self.at_frame = dict(zip(starts[1:], later))
        for start, (moment, _) in self.at_frame.items():
            if start >= fixed_frames > 0 and moment.history == "recode":
                raise ValueError(
                    f"the prompt at {moment.seconds:g}s is to recode history, but {UNKNOWN_PAST}; use history 'keep'"
                )

    def at(self, start_frame: int) -> PromptChange | None:
        """Puts the prompts that hold from this frame on into the guider; to the rollout all of them look alike."""
        scheduled = self.at_frame.pop(start_frame, None)
        if self.typed is not None:
            with self.network.kept_loaded():
                found = self.typed.read_prompt(lambda made: _check_text(made[0][0], self.network.config))
            if found is not None:
                made, history = found
                if history == "recode" and not self.can_recode:
                    self.typed.say(f"the new prompt holds from here on, with history 'keep': {UNKNOWN_PAST}")
                    history = "keep"
                shown = self.network.guider.conds["positive"]
                return self._change([_with_text(cond, made[0][0]) for cond in shown], history)
        if scheduled is not None:
            moment, conds = scheduled
            return self._change(conds, moment.history)
        return None

    def _change(self, conds: list[Cond], history: str) -> PromptChange:
        self.network.guider.conds["positive"] = conds
        return PromptChange(self.network.renew(), history)


def _with_text(cond: Cond, text: Any) -> Cond:
    """The same prompt, its image and all, with other words."""
    model_conds = {**cond["model_conds"], "c_crossattn": comfy.conds.CONDRegular(text)}
    return {**cond, "cross_attn": text, "model_conds": model_conds, "uuid": uuid.uuid4()}
