"""Which prompts the host's guider evaluates, and what takes their place while a video is made.

A CONDITIONING may carry, in the options beside its embeddings, from when it holds and how further text is read.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import comfy.conds

from ..selfforcing_core.conditioning import Conditioning
from ..selfforcing_core.config import WanConfig
from ..selfforcing_core.prompt_schedule import Entry, start_frames
from ..selfforcing_core.rollout import PromptChange

UNKNOWN_PAST = "the state that this run goes on from does not hold what was written into the cache"
READER = "selfforcing_reader"  # entry of a CONDITIONING's options: text to CONDITIONING, as this one was made
WORDS = "selfforcing_words"  # entry of a CONDITIONING's options: the text, and the embeddings that were made of it
REFUSED = {  # what a prompt may carry for other samplers, and where it comes from
    "area": "Conditioning (Set Area)",
    "mask": "Conditioning (Set Mask)",
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "timestep_start": "Conditioning Set Timestep Range",
    "timestep_end": "Conditioning Set Timestep Range",
}
FOREIGN = {  # what a prompt may carry for Wan models of other kinds, and where it comes from
    "vace_frames": "WanVaceToVideo",
    "camera_conditions": "WanCameraImageToVideo",
    "audio_embed": "WanSoundImageToVideo",
}
PICTURE = "concat_latent_image"
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
class Reseeding:
    """From when noise is of another seed: the options of a schedule's first CONDITIONING hold a tuple of these."""

    KEY: ClassVar[str] = "selfforcing_seeds"
    seconds: float
    fps: float
    seed: int


@dataclass(frozen=True)
class ClipReader:
    """Further text by the host's CLIP."""

    clip: Any

    def __call__(self, text: str) -> list[Any]:
        return worded(text, self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)))


def worded(text: str, conditioning: list[Any]) -> list[Any]:
    """The CONDITIONING made of a text, which it carries along."""
    return [[embeds, {**options, WORDS: (text, embeds)}] for embeds, options in conditioning]


def reader_of(conditioning: list[Any], clip: Any = None) -> Reader | None:
    """How further text is read for this CONDITIONING: by `clip`, else as it was made itself, if it says so."""
    return ClipReader(clip) if clip is not None else conditioning[0][1].get(READER) if conditioning else None


@dataclass(frozen=True)
class Planned:
    """What a CONDITIONING says beforehand, by latent frames at which chunks begin.

    A text is "" where it is not known, since another node made or changed the embeddings.
    """

    first: str = ""
    prompts: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # text and history
    seeds: Mapping[int, int] = field(default_factory=dict)


def planned(positive: list[Any], lengths: Sequence[int]) -> Planned:
    """The texts, moments and seeds of a CONDITIONING for a video of these chunks. Raises ValueError as the run would"""
    later: dict[Moment, str] = {}
    for embeds, options in positive:
        if Moment.KEY in options:
            later[options[Moment.KEY]] = _words(embeds, options)
    moments = sorted(later, key=lambda moment: moment.seconds)
    seeds = _reseedings([options for _, options in positive])
    prompts = {start: (later[moment], moment.history) for start, moment in zip(_starts(moments, lengths), moments)}
    texts = {_words(embeds, options) for embeds, options in positive if Moment.KEY not in options}
    first = texts.pop() if len(texts) == 1 else ""
    return Planned(first, prompts, _seeds_by_start(seeds, lengths))


def _words(embeds: Any, options: dict[str, Any]) -> str:
    """The text of embeddings that are still those it was read into."""
    text, made = options.get(WORDS, ("", None))
    return text if made is embeds else ""


def text_in_graph(prompt: Any, node: str) -> str:
    """The text that a node's positive prompt is encoded from by CLIP Text Encode; "" where the graph does not tell.

    prompt: the graph as the host queued it. Nodes on the way are passed by their own input of that name.
    """
    for _ in range(len(prompt) if isinstance(prompt, dict) else 0):
        entry = prompt.get(node, {})
        link = entry.get("inputs", {}).get("positive")
        if not isinstance(link, list) or link[1] != 0:
            break
        node = str(link[0])
        if prompt.get(node, {}).get("class_type") == "CLIPTextEncode":
            return _literal(prompt, prompt[node]["inputs"].get("text"))
    return ""


def _literal(prompt: dict[str, Any], value: Any) -> str:
    """A text, or that of the host's node for texts behind a link."""
    if isinstance(value, list):
        source = prompt.get(str(value[0]), {})
        value = source["inputs"].get("value") if str(source.get("class_type")).startswith("PrimitiveString") else ""
    return value if isinstance(value, str) else ""


def _starts(moments: Sequence[Moment] | Sequence[Reseeding], lengths: Sequence[int]) -> list[int]:
    entries = [Entry(moment.seconds, "") for moment in moments]
    return start_frames(entries, lengths, moments[0].fps) if moments else []


def _reseedings(conds: Sequence[dict[str, Any]]) -> tuple[Reseeding, ...]:
    return next((cond[Reseeding.KEY] for cond in conds if Reseeding.KEY in cond), ())


def _seeds_by_start(seeds: Sequence[Reseeding], lengths: Sequence[int]) -> dict[int, int]:
    return dict(zip(_starts(seeds, lengths), (each.seed for each in seeds)))


def scheduled_seeds(guider: Any, lengths: Sequence[int]) -> dict[int, int]:
    """The seeds of the guider's prompts, by the latent frames from which they hold. Raises ValueError beyond the end"""
    return _seeds_by_start(_reseedings(guider.conds.get("positive", [])), lengths)


class Typed(Protocol):
    """What somebody types while the video is made."""

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], str] | None:
        """CONDITIONING of a new prompt and what becomes of the history; None if there is none that passes `check`."""
        ...

    def took_prompt(self, start_frame: int, history: str) -> None:
        """The prompt that was read holds from here on, and this is what becomes of the history."""
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
    """Raise ValueError for prompts that a cached rollout would get wrong, or that carry what this model ignores.

    Asked twice: before the host has prepared them, when nothing is loaded yet, and of what is typed or comes later.
    """
    for cond in conds:
        found = next((name for name in REFUSED if cond.get(name) is not None), None)
        if found is not None:
            raise ValueError(
                f"the prompt comes from {REFUSED[found]}, which does not go with generating chunk by chunk"
            )
        _check_picture(cond, config)
        prepared = cond["model_conds"].get("c_crossattn")
        text = cond.get("cross_attn") if prepared is None else prepared.cond
        if text is not None:
            _check_text(text, config)


def _check_picture(cond: Cond, config: WanConfig) -> None:
    """Raise ValueError for what comes with a prompt and this model does not read, and for what is missing."""
    foreign = next((name for name in FOREIGN if cond.get(name) is not None), None)
    if foreign is not None:
        raise ValueError(
            f"the prompt comes from {FOREIGN[foreign]}, whose {foreign} this model does not read; connect the prompt "
            "itself, without that node"
        )
    reads_pictures, has_picture = config.in_dim > config.out_dim, cond.get(PICTURE) is not None
    if reads_pictures and not has_picture:
        raise ValueError(
            f"this is an image-to-video model ({config.in_dim} input channels), but no picture comes with the prompt; "
            "put Image to Video (Self Forcing) or WanImageToVideo with a start_image before the sampler"
        )
    if not reads_pictures and (has_picture or cond.get("clip_vision_output") is not None):
        raise ValueError(
            "a picture comes with the prompt (from WanImageToVideo or a node like it), but this is a text-to-video "
            "model, which does not read it that way; use Image to Video (Self Forcing), which makes it the first "
            "frame, or load an image-to-video model"
        )


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
    resumed_at: how many were made before, under the prompts with moments before it.
    """

    def __init__(
        self,
        network: Network,
        later: Sequence[tuple[Moment, list[Cond]]],
        lengths: tuple[int, ...],
        typed: Typed | None,
        *,
        fixed_frames: int = 0,
        resumed_at: int = 0,
    ) -> None:
        entries = [Entry(0, ""), *(Entry(moment.seconds, "") for moment, _ in later)]
        starts = start_frames(entries, lengths, later[0][0].fps) if later else [0]
        self.network, self.typed, self.can_recode = network, typed, not fixed_frames
        self.resumed_at, self.recoded_at = resumed_at, 0
        self.at_frame = dict(zip(starts[1:], later))
        for start, (moment, _) in self.at_frame.items():
            if start >= fixed_frames > 0 and moment.history == "recode":
                raise ValueError(
                    f"the prompt at {moment.seconds:g}s is to recode history, but {UNKNOWN_PAST}; use history 'keep'"
                )

    def at(self, start_frame: int) -> PromptChange | None:
        """Puts the prompts that hold from this frame on into the guider; to the rollout all of them look alike."""
        scheduled = self._scheduled(start_frame)
        if self.typed is not None:
            with self.network.kept_loaded():
                found = self.typed.read_prompt(lambda made: _check_text(made[0][0], self.network.config))
            if found is not None:
                made, history = found
                history = self._possible(history, start_frame)
                self.typed.took_prompt(start_frame, history)
                shown = self.network.guider.conds["positive"]
                return self._change([_with_text(cond, made[0][0]) for cond in shown], history, start_frame)
        if scheduled is not None:
            conds, history = scheduled
            return self._change(conds, history, start_frame)
        return None

    def _scheduled(self, start_frame: int) -> tuple[list[Cond], str] | None:
        """The prompt whose moment has come, or came in frames that this run did not make, and its history."""
        due = sorted(frame for frame in self.at_frame if frame <= start_frame)
        found = [(frame, *self.at_frame.pop(frame)) for frame in due]
        if not found:
            return None
        frame, moment, conds = found[-1]
        return conds, "keep" if frame < self.resumed_at else moment.history

    def _possible(self, history: str, start_frame: int) -> str:
        """What can become of the history for a typed prompt, said where it is not what was asked for."""
        assert self.typed is not None
        if history == "recode" and not self.can_recode:
            self.typed.say(f"the new prompt holds from here on, with history 'keep': {UNKNOWN_PAST}")
            return "keep"
        if history == "keep" and start_frame == self.recoded_at > 0:
            self.typed.say("the new prompt recodes history too: the one that this chunk was first made with did")
            return "recode"
        return history

    def _change(self, conds: list[Cond], history: str, start_frame: int) -> PromptChange:
        if history == "recode":
            self.recoded_at = start_frame
        self.network.guider.conds["positive"] = conds
        return PromptChange(self.network.renew(), history)


def _with_text(cond: Cond, text: Any) -> Cond:
    """The same prompt, its image and all, with other words."""
    model_conds = {**cond["model_conds"], "c_crossattn": comfy.conds.CONDRegular(text)}
    return {**cond, "cross_attn": text, "model_conds": model_conds, "uuid": uuid.uuid4()}
