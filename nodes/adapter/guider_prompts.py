"""Which prompts ComfyUI's guider evaluates, and what takes their place while a video is made.

A CONDITIONING may carry, in the options beside its embeddings, from when it holds and how further text is read.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import comfy.conds

from ...selfforcing_core.blending import Blending, blend_embeds, history_on_the_way
from ...selfforcing_core.conditioning import Conditioning
from ...selfforcing_core.config import WanConfig
from ...selfforcing_core.geometry import chunk_starts
from ...selfforcing_core.history import PromptChange
from ...selfforcing_core.policy import KEEP, RECACHE, RECACHE_SINK, RECODE, CachePolicy
from ...selfforcing_core.prompt_schedule import TimedPrompt, Transition, start_frames
from . import page

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
    history: str | None  # one of HISTORIES; None is what the policy says
    blend: int = 1  # chunks over which the prompt before becomes this one


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
    prompts: Mapping[int, tuple[str, Transition]] = field(default_factory=dict)  # later texts, and how they begin
    seeds: Mapping[int, int] = field(default_factory=dict)  # of the noise from there on


def timeline_of(positive: list[Any], lengths: Sequence[int]) -> Timeline:
    """Return what a CONDITIONING says beforehand of a video of these chunks. Raises ValueError as the run would."""
    later: dict[PromptStart, str] = {}
    for embeddings, options in positive:
        if PromptStart.KEY in options:
            later[options[PromptStart.KEY]] = _text_of(embeddings, options)
    starts = sorted(later, key=lambda start: start.seconds)
    seeds = _seed_starts([options for _, options in positive])
    prompts = {
        frame: (later[start], Transition(start.history, start.blend))
        for frame, start in zip(_starts(starts, lengths), starts)
    }
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
    entries = [TimedPrompt(each.seconds, "") for each in times]
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

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], Transition] | None:
        """Return the CONDITIONING of a prompt that passes `check`, and how it is to begin; None without."""
        ...

    def took_prompt(self, start_frame: int, transition: Transition) -> None:
        """Note that the prompt that was read begins here, and how."""
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
        policy: CachePolicy,
        fixed_frames: int = 0,
        resumed_at: int = 0,
    ) -> None:
        entries = [TimedPrompt(0, ""), *(TimedPrompt(start.seconds, "") for start, _ in later)]
        starts = start_frames(entries, lengths, later[0][0].fps) if later else [0]
        self.network, self.typed, self.can_recode = network, typed, not fixed_frames
        self.resumed_at = resumed_at
        self.rewritten = 0, KEEP  # the chunk before which the history was last changed, and how
        self.at_frame = dict(zip(starts[1:], later))
        begins = chunk_starts(lengths)
        first = network.guider.conds.get("positive", [])
        self.blending: Blending[list[GuiderConditioning]] = Blending(
            first, begins, _blend_prompts, on_the_way=history_on_the_way(policy)
        )
        self.policy = policy
        counts = {len(conditionings) for conditionings in (first, *(each for _, each in later))}
        for frame, (start, _) in self.at_frame.items():
            self._check_start(start, is_past_fixed=frame >= fixed_frames > 0, is_paired=len(counts) == 1)
        if resumed_at:
            # The state's last chunk may not be in the cache yet, and is written under the prompt it was made with.
            step = self._scheduled(max(start for start in begins if start < resumed_at))
            if step is not None:
                network.guider.conds["positive"] = step[0]

    def _check_start(self, start: PromptStart, *, is_past_fixed: bool, is_paired: bool) -> None:
        """Raise ValueError, now and not when its time has come, for a prompt that cannot begin as it is to."""
        policy, history = self.policy, self.policy.with_history(start.history).history
        if is_past_fixed and history in WRITTEN_AGAIN:
            raise ValueError(
                f"the prompt at {start.seconds:g}s is to {history} history, but {UNKNOWN_PAST}; use history 'keep'"
            )
        if start.blend > 1 and not is_paired:
            raise ValueError(
                f"the prompt at {start.seconds:g}s is to blend, but prompts of this schedule are combined of different "
                "numbers of entries; give each the same number, or leave blend out"
            )
        if start.history == RECODE != policy.history:
            # Workflows of before the policies have stored this word, which was the widget's first.
            page.show_text(
                f"the prompt at {start.seconds:g}s says history 'recode', which is used; policy {policy.name} would "
                f"say {policy.history!r}: choose 'as the policy says' for that"
            )

    def at(self, start_frame: int) -> PromptChange | None:
        """Put the prompts that hold from this frame on into the guider; to the rollout all of them look alike."""
        step = self._scheduled(start_frame)
        if self.typed is not None:
            with self.network.kept_loaded():  # reading it brings in the text encoder
                typed_prompt = self.typed.read_prompt(
                    lambda conditioning: _check_text(conditioning[0][0], self.network.config)
                )
            if typed_prompt is not None:
                conditioning, transition = typed_prompt
                # before the first chunk there is no prompt to blend from
                blend = transition.blend if start_frame else 1
                transition = replace(transition, history=self._possible(transition, start_frame), blend=blend)
                self.typed.took_prompt(start_frame, transition)
                embeddings = conditioning[0][0]
                prompts = [_with_text(each, embeddings) for each in self.blending.current]
                self.blending.change(prompts, transition)
                step = self.blending.step()
        return None if step is None else self._change(*step, start_frame)

    def _scheduled(self, start_frame: int) -> tuple[list[GuiderConditioning], str | None] | None:
        """Return the prompt that begins here, or began in frames that this run did not make, and its history."""
        blending, latest = self.blending, None
        skipped = blending.starts[bisect_right(blending.starts, blending.chunk) :]
        for start in [start for start in skipped if start < start_frame] + [start_frame]:
            blending.begin(start)
            if start in self.at_frame:
                moment, conditionings = self.at_frame.pop(start)
                blending.change(conditionings, Transition(moment.history, moment.blend))
            step = blending.step()
            if step is not None:  # of several, as after resuming, only the last still holds
                latest = step if start >= self.resumed_at else (step[0], KEEP)  # the past was made under it
        return latest

    def _possible(self, transition: Transition, start_frame: int) -> str:
        """Return what can become of the history for a typed prompt; say so where it is not what was asked for."""
        assert self.typed is not None
        policy = self.policy
        try:
            history = policy.with_history(transition.history).history
        except ValueError as error:  # a long run does not end because of a word chosen in its player
            self.typed.say(f"the new prompt holds from here on, with history '{policy.history}': {error}")
            return policy.history
        if transition.history == RECODE != policy.history:
            self.typed.say(f"history 'recode' is used; its policy {policy.name} would say {policy.history!r}")
        if history in WRITTEN_AGAIN and not self.can_recode:
            self.typed.say(f"the new prompt holds from here on, with history 'keep': {UNKNOWN_PAST}")
            return KEEP
        return self._as_rewritten(history, start_frame) if transition.blend == 1 else history

    def _as_rewritten(self, history: str, start_frame: int) -> str:
        """Return another history where that of this chunk was changed for an attempt that was thrown away."""
        frame, former = self.rewritten
        if history != KEEP or frame != start_frame or former == KEEP:
            return history
        if self.typed is not None:
            self.typed.say(f"history {former!r} is used, as of the prompt that this chunk was first made with")
        return former

    def _change(self, conditionings: list[GuiderConditioning], history: str | None, start_frame: int) -> PromptChange:
        history = self._as_rewritten(history or self.policy.history, start_frame)
        if start_frame > 0:  # before the first chunk there is no history
            self.rewritten = start_frame, history
        self.network.guider.conds["positive"] = conditionings
        return PromptChange(self.network.renew(), history)


def _blend_prompts(
    one: list[GuiderConditioning], other: list[GuiderConditioning], weight: float
) -> list[GuiderConditioning]:
    return [_with_text(new, blend_embeds(_words(old), _words(new), weight)) for old, new in zip(one, other)]


def _words(conditioning: GuiderConditioning) -> Any:
    """Return a prompt's embeddings, as ComfyUI prepared them where it did."""
    prepared = conditioning["model_conds"].get("c_crossattn")
    return conditioning["cross_attn"] if prepared is None else prepared.cond


def _with_text(conditioning: GuiderConditioning, text: Any) -> GuiderConditioning:
    """Return the same prompt, its image and all, with other words."""
    # A UUID of its own: by it the causal pass tells which cache is meant, and whether its text is still the same.
    inputs = {**conditioning["model_conds"], "c_crossattn": comfy.conds.CONDRegular(text)}
    return {**conditioning, "cross_attn": text, "model_conds": inputs, "uuid": uuid.uuid4()}
