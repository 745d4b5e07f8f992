"""Which prompts ComfyUI's guider evaluates, and what takes their place while a video is made.

A CONDITIONING may carry, in the options beside its embeddings, from when it holds and how further text is read.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import comfy.conds

from ...selfforcing_core.conditioning import Conditioning
from ...selfforcing_core.config import WanConfig
from ...selfforcing_core.history import PromptChange
from ...selfforcing_core.policy import RECACHE, RECACHE_SINK, RECODE, cache_policy
from ...selfforcing_core.prompt_schedule import Entry, start_frames

UNKNOWN_PAST = "the state that this run goes on from does not hold what was written into the cache"
# Options beside the embeddings travel with them through ComfyUI's nodes, which copy what they do not know.
READER = "selfforcing_reader"  # entry of a CONDITIONING's options: text to CONDITIONING, as this one was made
WORDS = "selfforcing_words"  # entry of a CONDITIONING's options: the text, and the embeddings that were made of it
# With an area, a mask or a range of steps ComfyUI evaluates a prompt for some pixels or steps alone, which would leave
# holes in its cache; a ControlNet acts on the whole video between the layers.
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
IMAGE = "concat_latent_image"  # where nodes for image-to-video models put theirs
GuiderConditioning = dict[str, Any]  # a prompt as ComfyUI's samplers see it
Reader = Callable[[str], list[Any]]  # text to CONDITIONING
WRITTEN_AGAIN = (RECODE, RECACHE, RECACHE_SINK)  # histories for which the frames so far have to be known


@dataclass(frozen=True)
class PromptStart:
    """From when a prompt holds, and what becomes of the frames before it: an entry of a CONDITIONING's options."""

    KEY: ClassVar[str] = "selfforcing_moment"
    seconds: float  # of the video
    fps: float  # at which these seconds are read
    history: str  # one of HISTORIES


@dataclass(frozen=True)
class SeedStart:
    """From when noise is of another seed: the options of a schedule's first CONDITIONING hold a tuple of these."""

    KEY: ClassVar[str] = "selfforcing_seeds"
    seconds: float  # of the video
    fps: float  # at which these seconds are read
    seed: int  # OWN_SEED for the sampler's


@dataclass(frozen=True)
class ClipReader:
    """Further text by ComfyUI's CLIP."""

    clip: Any

    def __call__(self, text: str) -> list[Any]:
        # As CLIP Text Encode does it, weights in brackets and all.
        return with_words(text, self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)))


def with_words(text: str, conditioning: list[Any]) -> list[Any]:
    """Return the CONDITIONING made of a text so that it carries the text along."""
    return [[embeddings, {**options, WORDS: (text, embeddings)}] for embeddings, options in conditioning]


def reader_of(conditioning: list[Any], clip: Any = None) -> Reader | None:
    """Return how further text is read for this CONDITIONING: by `clip`, else as it was made itself, if it says so."""
    return ClipReader(clip) if clip is not None else conditioning[0][1].get(READER) if conditioning else None


@dataclass(frozen=True)
class Timeline:
    """What a CONDITIONING says beforehand, by latent frames at which chunks begin.

    A text is "" where it is not known, since another node made or changed the embeddings.
    """

    first: str = ""  # the text from the beginning on
    prompts: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # later texts, and what becomes of history
    seeds: Mapping[int, int] = field(default_factory=dict)  # of the noise from there on


def timeline_of(positive: list[Any], lengths: Sequence[int]) -> Timeline:
    """Return what a CONDITIONING says beforehand of a video of these chunks. Raises ValueError as the run would."""
    later: dict[PromptStart, str] = {}
    for embeddings, options in positive:
        if PromptStart.KEY in options:
            later[options[PromptStart.KEY]] = _text_of(embeddings, options)
    starts = sorted(later, key=lambda start: start.seconds)
    seeds = _seed_starts([options for _, options in positive])
    prompts = {frame: (later[start], start.history) for frame, start in zip(_starts(starts, lengths), starts)}
    texts = {_text_of(embeddings, options) for embeddings, options in positive if PromptStart.KEY not in options}
    first = texts.pop() if len(texts) == 1 else ""
    return Timeline(first, prompts, _seeds_by_start(seeds, lengths))


def _text_of(embeddings: Any, options: dict[str, Any]) -> str:
    """Return the text of embeddings that are still those it was read into."""
    text, source = options.get(WORDS, ("", None))  # a node that changes embeddings makes another tensor
    return text if source is embeddings else ""


def text_in_graph(prompt: Any, node: str) -> str:
    """Return the text that a node's positive prompt is encoded from by CLIP Text Encode; "" where that is not told.

    prompt: the graph as ComfyUI queued it. Nodes on the way are passed by their own input of that name.
    """
    # As many steps as there are nodes: a graph that somebody sends may go in a circle.
    for _ in range(len(prompt) if isinstance(prompt, dict) else 0):
        entry = prompt.get(node, {})
        link = entry.get("inputs", {}).get("positive")
        # By habit a node's first output is its positive prompt; of any other nothing can be said.
        if not isinstance(link, list) or link[1] != 0:
            break
        node = str(link[0])
        if prompt.get(node, {}).get("class_type") == "CLIPTextEncode":
            return _literal(prompt, prompt[node]["inputs"].get("text"))
    return ""


def _literal(prompt: dict[str, Any], value: Any) -> str:
    """Return a text, or that of ComfyUI's node for texts behind a link."""
    if isinstance(value, list):
        source = prompt.get(str(value[0]), {})
        value = source["inputs"].get("value") if str(source.get("class_type")).startswith("PrimitiveString") else ""
    return value if isinstance(value, str) else ""


def _starts(times: Sequence[PromptStart] | Sequence[SeedStart], lengths: Sequence[int]) -> list[int]:
    entries = [Entry(each.seconds, "") for each in times]
    return start_frames(entries, lengths, times[0].fps) if times else []


def _seed_starts(conditionings: Sequence[dict[str, Any]]) -> tuple[SeedStart, ...]:
    return next((conditioning[SeedStart.KEY] for conditioning in conditionings if SeedStart.KEY in conditioning), ())


def _seeds_by_start(seeds: Sequence[SeedStart], lengths: Sequence[int]) -> dict[int, int]:
    return dict(zip(_starts(seeds, lengths), (each.seed for each in seeds)))


def scheduled_seeds(guider: Any, lengths: Sequence[int]) -> dict[int, int]:
    """Return the seeds of the guider's prompts by the latent frames from which they hold.

    Raises ValueError for one beyond the end.
    """
    return _seeds_by_start(_seed_starts(guider.conds.get("positive", [])), lengths)


class PromptSource(Protocol):
    """What somebody types while the video is made."""

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], str] | None:
        """Return the CONDITIONING of a prompt that passes `check`, and what becomes of the history; None without."""
        ...

    def took_prompt(self, start_frame: int, history: str) -> None:
        """Note that the prompt that was read holds from here on, and what becomes of the history."""
        ...

    def say(self, message: str) -> None:
        """Show a line to whoever types."""
        ...


class PromptedNetwork(Protocol):
    """What evaluates the guider's prompts."""

    guider: Any
    config: WanConfig

    def renew(self) -> Conditioning:
        """Take the guider's prompts anew; return what is computed with them."""
        ...

    def kept_loaded(self) -> AbstractContextManager[None]:
        """Keep the network loaded over work that may bring in others."""
        ...


# ------------------------------------------------------------------- guider --
def conditionings_of(guider: Any) -> list[GuiderConditioning]:
    """Return the prompts that the guider evaluates at first, positive ones before others.

    At cfg 1 negative ones are left out, unless a node on the MODEL needs them there too.

    Once a later prompt's time has come it is the only positive one, whatever it carries.
    """
    # Guiders name their prompts as they like; "positive" is what CFGGuider and BasicGuider call the one to be followed.
    conditionings = {name: _at_first(each) for name, each in guider.conds.items() if each}
    needs_all = getattr(guider, "model_options", {}).get("disable_cfg1_optimization", False)
    if getattr(guider, "cfg", None) == 1 and "positive" in conditionings and not needs_all:
        conditionings.pop("negative", None)
    return [
        conditioning
        for name in sorted(conditionings, key=lambda name: name != "positive")
        for conditioning in conditionings[name]
    ]


def _at_first(conditionings: list[GuiderConditioning]) -> list[GuiderConditioning]:
    return [conditioning for conditioning in conditionings if PromptStart.KEY not in conditioning] or conditionings


def later_conditionings(guider: Any) -> list[tuple[PromptStart, list[GuiderConditioning]]]:
    """Take the positive prompts that hold only from a later time on out of the guider's; return them by that time."""
    later: dict[PromptStart, list[GuiderConditioning]] = {}
    for conditioning in guider.conds.get("positive", []):
        if PromptStart.KEY in conditioning:
            later.setdefault(conditioning[PromptStart.KEY], []).append(conditioning)
    if later:
        guider.conds["positive"] = [
            conditioning for conditioning in guider.conds["positive"] if PromptStart.KEY not in conditioning
        ]
    return sorted(later.items(), key=lambda item: item[0].seconds)


def check_conditionings(conditionings: Sequence[GuiderConditioning], config: WanConfig) -> None:
    """Raise ValueError for prompts that a cached rollout would get wrong, or that carry what this model ignores.

    Asked twice: before ComfyUI has prepared them, when nothing is loaded yet, and of what is typed or comes later.
    """
    for conditioning in conditionings:
        option = next((name for name in REFUSED if conditioning.get(name) is not None), None)
        if option is not None:
            raise ValueError(
                f"the prompt comes from {REFUSED[option]}, which does not go with generating chunk by chunk"
            )
        _check_image(conditioning, config)
        # ComfyUI's name for embeddings once it has prepared them for the network, padded and on its device.
        prepared = conditioning["model_conds"].get("c_crossattn")
        text = conditioning.get("cross_attn") if prepared is None else prepared.cond
        if text is not None:
            _check_text(text, config)


def _check_image(conditioning: GuiderConditioning, config: WanConfig) -> None:
    """Raise ValueError for what comes with a prompt and this model does not read, and for what is missing."""
    foreign = next((name for name in FOREIGN if conditioning.get(name) is not None), None)
    if foreign is not None:
        raise ValueError(
            f"the prompt comes from {FOREIGN[foreign]}, whose {foreign} this model does not read; connect the prompt "
            "itself, without that node"
        )
    # Image-to-video models have 36 input channels: 16 of noise, 4 of the mask, 16 of the picture's latents.
    reads_images, has_image = config.in_dim > config.out_dim, conditioning.get(IMAGE) is not None
    if reads_images and not has_image:
        raise ValueError(
            f"this is an image-to-video model ({config.in_dim} input channels), but no image comes with the prompt; "
            "put Image to Video (Self Forcing) or WanImageToVideo with a start_image before the sampler"
        )
    if not reads_images and (has_image or conditioning.get("clip_vision_output") is not None):
        raise ValueError(
            "an image comes with the prompt (from WanImageToVideo or a node like it), but this is a text-to-video "
            "model, which does not read it that way; use Image to Video (Self Forcing), which makes it the first "
            "frame, or load an image-to-video model"
        )


def _check_text(text: Any, config: WanConfig) -> None:
    rows, width = text.shape[1:]  # Wan's encoder gives 512 rows; what lies behind the prompt is zero
    if width != config.text_dim:
        raise ValueError(
            f"the prompt's embeddings are {width} wide, but this model reads {config.text_dim}; "
            "encode the prompt with the text encoder that belongs to the model"
        )
    if rows > config.text_len and bool(text[:, config.text_len :].any()):
        raise ValueError(f"the prompt has {rows} rows of text, but this model reads {config.text_len}; shorten it")


class GuiderTimeline:
    """When which prompts hold: the scheduled ones, and what is typed meanwhile, which comes first.

    fixed_frames: how many at the beginning cannot be written again under another prompt. If there are any, a typed one
    leaves the history as it is; raises ValueError for a scheduled one behind them that is to recode it.
    resumed_at: how many were made before, under the prompts scheduled before it.
    """

    def __init__(
        self,
        network: PromptedNetwork,
        later: Sequence[tuple[PromptStart, list[GuiderConditioning]]],
        lengths: tuple[int, ...],
        typed: PromptSource | None,
        *,
        fixed_frames: int = 0,
        resumed_at: int = 0,
    ) -> None:
        entries = [Entry(0, ""), *(Entry(start.seconds, "") for start, _ in later)]
        starts = start_frames(entries, lengths, later[0][0].fps) if later else [0]
        self.network, self.typed, self.can_recode = network, typed, not fixed_frames
        self.resumed_at, self.recoded_at = resumed_at, 0
        self.at_frame = dict(zip(starts[1:], later))
        for frame, (start, _) in self.at_frame.items():
            policy = cache_policy(network.settings.causal.policy)
            policy.with_history(start.history)  # refused now, not when the prompt's time has come
            if frame >= fixed_frames > 0 and start.history in WRITTEN_AGAIN:
                raise ValueError(
                    f"the prompt at {start.seconds:g}s is to recode history, but {UNKNOWN_PAST}; use history 'keep'"
                )

    def at(self, start_frame: int) -> PromptChange | None:
        """Put the prompts that hold from this frame on into the guider; to the rollout all of them look alike."""
        scheduled = self._scheduled(start_frame)
        if self.typed is not None:
            with self.network.kept_loaded():  # reading it brings in the text encoder
                typed_prompt = self.typed.read_prompt(
                    lambda conditioning: _check_text(conditioning[0][0], self.network.config)
                )
            if typed_prompt is not None:
                conditioning, history = typed_prompt
                history = self._possible(history, start_frame)
                self.typed.took_prompt(start_frame, history)
                embeddings = conditioning[0][0]
                current = self.network.guider.conds["positive"]
                return self._change([_with_text(each, embeddings) for each in current], history, start_frame)
        if scheduled is not None:
            conditionings, history = scheduled
            return self._change(conditionings, history, start_frame)
        return None

    def _scheduled(self, start_frame: int) -> tuple[list[GuiderConditioning], str] | None:
        """Return the prompt whose time has come, or came in frames that this run did not make, and its history."""
        due = sorted(frame for frame in self.at_frame if frame <= start_frame)
        due_prompts = [(frame, *self.at_frame.pop(frame)) for frame in due]
        if not due_prompts:
            return None
        frame, start, conditionings = due_prompts[-1]  # of several, as after resuming, only the last still holds
        return conditionings, "keep" if frame < self.resumed_at else start.history  # the past was made under it

    def _possible(self, history: str, start_frame: int) -> str:
        """Return what can become of the history for a typed prompt; say so where it is not what was asked for."""
        assert self.typed is not None
        policy = cache_policy(self.network.settings.causal.policy)
        if history == RECODE != policy.history and RECODE in policy.histories:
            self.typed.say(f"history 'recode' is used; its policy {policy.name} would say {policy.history!r}")
        if history not in policy.histories:
            self.typed.say(f"the new prompt holds from here on, with history '{policy.history}', as its policy says")
            return policy.history
        if history == "recode" and not self.can_recode:
            self.typed.say(f"the new prompt holds from here on, with history 'keep': {UNKNOWN_PAST}")
            return "keep"
        if history == "keep" and start_frame == self.recoded_at > 0:
            self.typed.say("the new prompt recodes history too: the one that this chunk was first made with did")
            return "recode"
        return history

    def _change(self, conditionings: list[GuiderConditioning], history: str, start_frame: int) -> PromptChange:
        if history == "recode":
            self.recoded_at = start_frame
        self.network.guider.conds["positive"] = conditionings
        return PromptChange(self.network.renew(), history)


def _with_text(conditioning: GuiderConditioning, text: Any) -> GuiderConditioning:
    """Return the same prompt, its image and all, with other words."""
    # A UUID of its own: by it the causal pass tells which cache is meant, and whether its text is still the same.
    inputs = {**conditioning["model_conds"], "c_crossattn": comfy.conds.CONDRegular(text)}
    return {**conditioning, "cross_attn": text, "model_conds": inputs, "uuid": uuid.uuid4()}
