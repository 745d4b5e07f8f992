"""Prompts that change while a video is made: text with times in it to CONDITIONING."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..selfforcing_core.policy import HISTORIES
from ..selfforcing_core.prompt_schedule import TimedPrompt, parse_schedule, schedule_note
from .adapter import folders, host, page
from .adapter.guider_prompts import READER, ClipReader, PromptStart, Reader, SeedStart
from .text_encode import TextReader

AS_POLICY = "as the policy says"  # of the widget history; workflows store it


class SelfForcingPromptSchedule(io.ComfyNode):
    """One text to several prompts, each with the moment from which it holds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingPromptSchedule",
            display_name="Prompt Schedule (Self Forcing)",
            category="SelfForcing",
            search_aliases=["prompt travel", "prompt switch", "multi prompt", "timeline", "prompts over time"],
            description="Changes the prompt while a video is made. Goes where CLIP Text Encode goes, into the positive "
            "input of Stream Sampler, Guider or BasicGuider.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="0s: a red square moving left slowly\n1.5s: a blue square moving left slowly",
                    tooltip="One prompt per line, each behind the second from which it holds: '0s: ...', '3s: ...'. "
                    "The chunk in which the moment lies is the first that follows the new prompt. Behind a time: a "
                    "word in place of the widget history ('3s cut: ...'), the chunks over which the prompt becomes the "
                    "next ('3s blend 4: ...'), and in brackets a seed for the noise from there on: '3s [keep, seed 7]: "
                    "...'; '6s [seed own]:' goes back to the sampler's seed; '0s [24 fps]: ...' replaces the widget "
                    "fps. The streaming samplers put out such a text of all that was done by hand.",
                ),
                io.Combo.Input(
                    "history",
                    options=[AS_POLICY, *HISTORIES],
                    default=AS_POLICY,
                    tooltip="What becomes of the frames so far where the prompt changes, unless the text says it: as "
                    "the model's cache policy says, or by one of these words. recode: those in the window are written "
                    "into the KV cache again under the new prompt, one pass per chunk; recache: in one pass for all "
                    "(recache_sink: the sink too); keep: they stay, and the change is slower; flush: all but sink and "
                    "last frames are forgotten; cut: so too, and the next chunk stands far from them.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=240.0,
                    step=0.5,
                    tooltip="Frames per second of the video that the times refer to; Wan models are trained at 16.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="From Load CLIP (type wan), for full-size models."),
                io.Combo.Input(
                    "text_encoder",
                    options=folders.text_encoder_choices(),
                    optional=True,
                    tooltip="Where clip is not connected: as in Text Encode (Self Forcing).",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompts with their moments, for one sampler.")],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        """Check the text before anything runs, so that a mistake in its last line costs no video."""
        try:
            parse_schedule(text or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, text: str, history: str, fps: float, clip: Any = None, text_encoder: str | None = None
    ) -> io.NodeOutput:
        if clip is None and not text_encoder:
            raise ValueError("there is nothing to read the prompts with; connect clip, or choose a text_encoder")
        reader: Reader = TextReader(text_encoder) if clip is None else ClipReader(clip)  # type: ignore[arg-type]
        entries, note = parse_schedule(text), schedule_note(text)
        if note is not None:
            page.show_text(note)
        if entries[0].fps not in (None, fps):
            page.show_text(
                f"times are read at the {entries[0].fps:g} fps that the text says; the widget's {fps:g} are not used"
            )
        fps = entries[0].fps or fps  # the text was written down for a video of its own, and repeats that one
        conditioning = []
        # One CONDITIONING with several entries, as Conditioning (Combine) makes one: each holds from its own time on.
        # An entry without words changes the seed alone and needs no embeddings.
        for entry in entries:
            if entry.prompt or entry is entries[0]:
                times = _times(entry, entries, history, fps)
                conditioning += [
                    [embeddings, {**options, READER: reader, **times}] for embeddings, options in reader(entry.prompt)
                ]
        return io.NodeOutput(conditioning)

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str | None = None, **_: object) -> str:
        return folders.fingerprint(folders.text_encoder_folder(text_encoder)) if text_encoder else ""


def _times(entry: TimedPrompt, entries: Sequence[TimedPrompt], history: str, fps: float) -> dict[str, Any]:
    """Return when a prompt holds; the first also carries the seeds of all entries."""
    if entry is not entries[0]:
        transition = entry.transition(None if history == AS_POLICY else history)
        return {PromptStart.KEY: PromptStart(entry.seconds, fps, transition.history, transition.blend)}
    seeds = tuple(SeedStart(each.seconds, fps, each.seed) for each in entries if each.seed is not None)
    return {SeedStart.KEY: seeds} if seeds else {}
