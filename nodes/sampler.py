"""The streaming sampler: one node from noise to video, chunk by chunk.

Letters: B batch, T latent frames, C channels, H W latent size, V video frames, R RGB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..selfforcing_core.config import CausalConfig
from ..selfforcing_core.geometry import (
    PIXEL_STEP,
    SPATIAL_FACTOR,
    VideoGeometry,
    pixel_frames,
    rounded_length,
    rounded_side,
    whole_chunks,
)
from ..selfforcing_core.meter import Meter, Recipe
from ..selfforcing_core.rollout import Chunk
from . import host
from .autoencoder import check_latent, check_space, graph_clips, graph_latent, space_of
from .causal_model import AUTO, SINK_AUTO, causal_settings, config_of, settings_of, show_left_out, sigmas_of
from .frame_stream import FrameStream, frame_stream
from .live import Live, open_live, times_steered
from .prompts import planned, reader_of, text_in_graph
from .sampling import (
    ChunkGuider,
    ChunkSampler,
    Run,
    SeededHostNoise,
    StateHolder,
    compute_dtype,
    known_frames,
    layout,
)
from .steering_record import SteeringRecord

State = io.Custom("SELFFORCING_STATE")
NO_FRAMES = "the sampler's IMAGE output needs an autoencoder; connect taehv, or decode the LATENT output instead"
IMAGE_OUTPUT = 1  # its place among the outputs
# Where words are not in a name, ComfyUI's search prefers aliases that begin with them, then nodes with short names. So
# no other node of the pack has an alias that begins with one of these.
SEARCH_ALIASES = (
    "self forcing", "realtime", "real time video", "live", "live video", "streaming", "streaming video", "endless",
    "endless video", "text to video", "t2v", "wan", "wan 2.1", "causal", "causal video", "autoregressive video",
    "long video",
)  # fmt: skip
SCHEDULE_KEY = "selfforcing_schedule"  # of saved files: the Prompt Schedule text that repeats a steered run
NO_STATE = "the sampler's state output is empty; switch keep_state on"


def _empty_latent(
    latent_image: dict[str, Any] | None, width: int, height: int, length: int, causal: CausalConfig, channels: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A LATENT of the video's size and the chunks it is cut into. What is rounded to get whole ones is shown.

    Raises ValueError for a LATENT that is no Wan video, or shorter than a chunk.
    """
    if latent_image is not None:
        samples = latent_image["samples"]
        if samples.ndim != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"latent_image of shape {tuple(samples.shape)} is not a Wan video's [batch, {channels}, frames, "
                "height, width]; use Empty HunyuanVideo Latent or Empty AR Video Latent"
            )
        causal = layout(known_frames(latent_image.get("noise_mask")), causal)
        latent_image = _of_whole_chunks(latent_image, causal)
        frames, latent_height, latent_width = latent_image["samples"].shape[2:]
        width, height, length = latent_width * SPATIAL_FACTOR, latent_height * SPATIAL_FACTOR, pixel_frames(frames)
        size = VideoGeometry(width, height, length, causal.chunk, causal.independent_first_frame)
        return latent_image, size.chunk_lengths
    size = rounded_size(width, height, length, causal.chunk, causal.independent_first_frame)
    empty = torch.zeros(1, channels, size.latent_frames, size.latent_height, size.latent_width)
    return {"samples": empty}, size.chunk_lengths


def rounded_size(
    width: int, height: int, length: int, chunk: int, independent_first_frame: bool = False
) -> VideoGeometry:
    """The largest size up to this one that is whole chunks and tokens, at least one of each; what changes is shown."""
    size = VideoGeometry(
        rounded_side(width), rounded_side(height),
        rounded_length(length, chunk, independent_first_frame=independent_first_frame), chunk, independent_first_frame,
    )  # fmt: skip
    first = "1 and then " if independent_first_frame else ""
    for name, given, used, rule in (
        ("width", width, size.width, f"multiples of {PIXEL_STEP} pixels"),
        ("height", height, size.height, f"multiples of {PIXEL_STEP} pixels"),
        ("length", length, size.frames, f"whole chunks ({first}{chunk} latent frames, 4 frames each but the first, 1)"),
    ):
        if given != used:
            host.show_text(f"{name} {given} is rounded to {used}: {rule}")
    return size


def _of_whole_chunks(latent_image: dict[str, Any], causal: CausalConfig) -> dict[str, Any]:
    """The same without the latent frames at its end that are no whole chunk."""
    samples, mask = latent_image["samples"], latent_image.get("noise_mask")
    count = whole_chunks(samples.shape[2], causal.chunk, independent_first_frame=causal.independent_first_frame)
    if count >= samples.shape[2]:
        return latent_image
    show_left_out(samples.shape[2], count)
    masks = {} if mask is None else {"noise_mask": mask[:, :, :count]}
    return {**latent_image, "samples": samples[:, :, :count], **masks}


log = logging.getLogger(__name__)
Take = Callable[[Tensor], object]  # what becomes of a chunk's frames [B, V, R, H, W] in [0, 1]
# Closes what was written, with the Prompt Schedule text of a run that was steered, else ""; names it as the host does.
Written = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Sampled:
    """What a run of a streaming node gave.

    samples: LATENT samples [B, C, T, H, W], T shorter than asked for where the run was finished early. kept: where it
    ended, or what stands for that. schedule: Prompt Schedule text that repeats it. ending: "whole" or "early".
    """

    samples: Tensor
    kept: Any
    schedule: str
    ending: str


class _StreamProgress(host.Progress):
    """Counts network calls, decodes each chunk as soon as it is there, shows it, and waits while it is held."""

    def __init__(
        self, total: int, num_frames: int, stream: FrameStream | None, latent_format: Any, live: Live | None, take: Take
    ) -> None:
        super().__init__(total)
        self.num_frames, self.stream, self.latent_format = num_frames, stream, latent_format
        self.live, self.take = live, take
        self.taken = self.calls = 0
        self.is_finished = False

    def resumed(self, video_BTCHW: Tensor) -> None:
        """What a run that goes on from a state has already."""
        if self.stream is not None:
            for latent_BTCHW in video_BTCHW.split(1, 1):  # a file takes them one by one, however many there are
                host.check_interrupted()
                self._accept(self.stream.decode(latent_BTCHW, is_last=False))

    def chunk(self, chunk: Chunk) -> bool:
        may_repeat = self.live is not None and not chunk.is_given
        is_end = chunk.start_frame + chunk.latents_BTCHW.shape[1] == self.num_frames
        self.is_finished = is_end or (may_repeat and self._is_finishing())
        before = self.stream.state() if self.stream is not None and may_repeat else None
        if self.stream is None:
            frames_BVRHW = chunk.latents_BTCHW[:, :0]
        else:
            frames_BVRHW = self.stream.decode(chunk.latents_BTCHW, is_last=self.is_finished)
        self._show(frames_BVRHW, chunk)
        if self._wants_again(frames_BVRHW, may_repeat):
            if self.stream is not None:
                self.stream.restore(before)
            self.back_to(self.calls)
            return True
        self.calls = self.done
        self._accept(frames_BVRHW)
        if may_repeat and not self.is_finished and self._is_finishing():
            self.is_finished = True
            self._flush(chunk)
        return False

    def _wants_again(self, frames_BVRHW: Tensor, may_repeat: bool) -> bool:
        """Waits as long as the page wishes; a chunk that it waits with is kept where the run is interrupted."""
        if self.live is None:
            return False
        try:
            return self.live.wants_again(can_hold=may_repeat, is_last=self.is_finished)
        except host.Interrupted:
            self._accept(frames_BVRHW)
            raise

    def _is_finishing(self) -> bool:
        return self.live is not None and self.live.is_finishing

    def _flush(self, chunk: Chunk) -> None:
        """The frames that the decoder kept back for a chunk that does not come."""
        if self.stream is not None:
            frames_BVRHW = self.stream.decode(chunk.latents_BTCHW[:, :0], is_last=True)
            if frames_BVRHW.shape[1]:
                self._show(frames_BVRHW, chunk)
                self._accept(frames_BVRHW)

    def _show(self, frames_BVRHW: Tensor, chunk: Chunk) -> None:
        first = self.taken
        if not frames_BVRHW.shape[1] and (self.stream is None or self.stream.note):  # no pictures before the end
            frames_BVRHW = host.rough_frames(chunk.latents_BTCHW[:1, -1:], self.latent_format)
            first = pixel_frames(chunk.start_frame + chunk.latents_BTCHW.shape[1]) - 1
        if self.live is not None:
            self.live.show(frames_BVRHW[0], first, chunk.index + 1)
        if frames_BVRHW.shape[1] and (self.live is None or not self.live.has_page):
            self.show(frames_BVRHW[0, -1])

    def _accept(self, frames_BVRHW: Tensor) -> None:
        self.taken += frames_BVRHW.shape[1]
        if frames_BVRHW.shape[1] and self.stream is not None:
            self.take(frames_BVRHW)


class SelfForcingStreamSampler(io.ComfyNode):
    """Noise to LATENT and IMAGE with the Self Forcing rollout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingStreamSampler",
            display_name="Self Forcing Stream Sampler",  # begins with the method: that is how its search ranks first
            category="SelfForcing",
            search_aliases=SEARCH_ALIASES,
            description="Generates a video chunk by chunk with a KV cache, each chunk in a few steps, and shows every "
            "chunk as soon as it is done. Settings at auto are those the checkpoint was trained with.",
            inputs=[
                io.Model.Input("model", tooltip="From the node Load Model (Self Forcing), or Patch Model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt: from Text Encode (Self Forcing), or from CLIP Text Encode for full-size "
                    "models. These models were distilled without a negative prompt.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Width of the video in pixels; rounded down to a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height of the video in pixels; rounded down to a multiple of 16.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=100001,
                    step=4,
                    tooltip="Length in video frames (16 per second). Any number, rounded down to whole chunks, at "
                    "least one: for chunks of 3 latent frames 9, 21, 33, ... 81, 93. The node says what it took.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Number that fixes all noise; the same on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=AUTO,
                    min=0,
                    max=100,
                    tooltip="Denoising steps per chunk (a count). 0 is auto: the checkpoint's own list, 4 for Self "
                    "Forcing.",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Timestep shift of the schedule (a ratio, 5 for Self Forcing). 0 is auto: the model's own, "
                    "or what a ModelSamplingSD3 node set.",
                ),
                io.Int.Input(
                    "chunk",
                    default=AUTO,
                    min=0,
                    max=1000,
                    tooltip="Latent frames denoised together (one latent frame is 4 video frames). 0 is auto: as the "
                    "checkpoint was trained, 3 chunk-wise, 1 frame-wise.",
                ),
                io.Int.Input(
                    "window",
                    default=AUTO,
                    min=-1,
                    max=100000,
                    tooltip="Latent frames kept in the KV cache, the current chunk included. -1: the whole video; "
                    "0 is auto: as the checkpoint was trained.",
                ),
                io.Int.Input(
                    "sink",
                    default=SINK_AUTO,
                    min=-1,
                    max=100000,
                    tooltip="First latent frames that never leave the window (attention sink). 0: none; "
                    "-1 is auto: as the checkpoint was trained.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="A video latent whose size, length and batch replace width, height and length. From Image "
                    "to Video (Self Forcing) it also brings the first frames; otherwise its content is not used.",
                ),
                io.Vae.Input(
                    "taehv",
                    optional=True,
                    tooltip="Decodes each chunk as soon as it is done, for the player and the IMAGE output. From Load "
                    "TAEHV (Self Forcing), fast, or Load VAE with Wan's own VAE; other VAEs decode at the end.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to avoid; only used with cfg other than 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Classifier-free guidance scale (a ratio). 1 is none and what distilled models expect; "
                    "other values need negative and take twice the time and cache.",
                ),
                State.Input(
                    "state",
                    optional=True,
                    tooltip="Where another run ended, from Resume or from this node's own output: the video goes on "
                    "from there. length counts the frames that are already in it.",
                ),
                io.Boolean.Input(
                    "keep_state",
                    default=False,
                    optional=True,
                    tooltip="Keep the final state for the state output; it takes as much memory as the KV cache.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="From Load CLIP: reads the prompts typed into the player. Not needed where the prompt "
                    "comes from Text Encode or Prompt Schedule (Self Forcing), which bring their own reader.",
                ),
                io.Boolean.Input(
                    "player",
                    default=True,
                    optional=True,
                    tooltip="Show the chunks in the node's player while they are made, at most 512 pixels wide or "
                    "high. Off: the host's usual preview.",
                ),
                io.Float.Input(
                    "pace",
                    default=0.0,
                    min=0.0,
                    max=3600.0,
                    step=0.5,
                    optional=True,
                    tooltip="Seconds of video that may be made and not yet shown by the player: with 2 the run waits "
                    "for the player, and a typed prompt shows within 2 seconds and one chunk. 0: no limit. A paused "
                    "player makes the run wait; a page that is closed, loaded anew or shows another workflow does not.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The video's latents, for VAE Decode or Decode TAEHV."),
                io.Image.Output(
                    is_output_list=True, tooltip="The video's frames, one clip for each row of a batch. Needs taehv."
                ),
                State.Output(display_name="state", tooltip="Where the run ended. Needs keep_state."),
                io.String.Output(
                    display_name="schedule",
                    tooltip="Text for Prompt Schedule (Self Forcing) that repeats this run with its seed and other "
                    "settings: every prompt and seed, those typed into the player included.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, seed: int | None = None, **_: Any) -> int:
        """A result that was steered is not what these inputs give; the seed is None where it comes over a link."""
        return times_steered(seed)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        if inputs.get("taehv") is None and host.is_read(cls.hidden, IMAGE_OUTPUT):
            raise ValueError(NO_FRAMES)
        frames: list[Tensor] = []
        made = sample(take=frames.append, hidden=cls.hidden, **inputs)
        images = graph_clips(torch.cat(frames, 1)) if frames else [host.blocked(NO_FRAMES)]
        latent = graph_latent(made.samples, space_of(made.samples))
        return io.NodeOutput(latent, images, made.kept, made.schedule)


def sample(
    *,
    model: Any,
    positive: list[Any],
    width: int,
    height: int,
    length: int,
    seed: int,
    steps: int,
    shift: float,
    chunk: int,
    window: int,
    sink: int,
    take: Take,
    latent_image: dict[str, Any] | None = None,
    taehv: Any = None,
    negative: list[Any] | None = None,
    cfg: float = 1.0,
    state: StateHolder | None = None,
    keep_state: bool = False,
    clip: Any = None,
    player: bool = True,
    pace: float = 0.0,
    fps: float = 16.0,
    hidden: Any = None,
    written: Written = lambda schedule: [],
) -> Sampled:
    """What the run gave; `take` gets every chunk's frames as soon as they are decoded.

    The arguments are the inputs of the nodes; fps is the clock of the player, hidden what the host adds to them.
    written: called once when nothing more comes, however the run ended, before the page hears that it did.
    """
    causal = causal_settings(settings_of(model).causal, chunk, window, sink)
    channels = config_of(model.model.diffusion_model).out_dim
    space = settings_of(model).latent_space
    if taehv is not None:
        check_space(taehv, space, "the model makes")
    if latent_image is not None:
        check_latent(latent_image, space)
    latent, lengths = _empty_latent(latent_image, width, height, length, causal, channels)
    stream = None if taehv is None else frame_stream(taehv)
    sigmas = sigmas_of(model, steps, shift)
    guider = ChunkGuider(host.with_companions(model, stream.patchers if stream else []))
    guider.set_prompts(positive, negative, cfg)
    meter = _meter(model, stream, lengths, latent["samples"], sigmas, causal, cfg)
    predicted = meter.predicted()
    log.info("%s", meter.in_words())
    working = stream.working_bytes(*latent["samples"].shape[-2:]) if stream else 0
    record = _record(positive, lengths, fps, hidden)
    live = None
    if player:
        live = open_live(
            record, fps=fps, lengths=lengths, read=reader_of(positive, clip), seed=seed, pace=pace, hidden=hidden
        )  # fmt: skip

    def progress(total: int) -> _StreamProgress:
        made = _StreamProgress(total, sum(lengths), stream, model.model.latent_format, live, take)
        if state is not None:
            made.resumed(state.filled().video_BTCHW)
        return made

    kept = StateHolder() if keep_state else None
    run = Run(causal=causal, progress=progress, resume=state, keep=kept, steering=live, working_bytes=working)
    ending = "stopped"
    try:
        if live is not None:
            live.limit_fps = predicted["fps"] / latent["samples"].shape[0]  # of one video
            live.say(stream.note if stream is not None and stream.note else meter.in_words())
        samples = guider.sample(
            SeededHostNoise(seed, lengths).generate_noise(latent),
            latent["samples"],
            ChunkSampler(run),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            disable_pbar=True,
            seed=seed,
        )
        ending = "whole" if samples.shape[2] == sum(lengths) else "early"
        if record.events:
            host.add_metadata(hidden, **{SCHEDULE_KEY: record.text()})
    finally:
        _close(live, written, record, ending)
    return Sampled(host.to_graph(samples), host.blocked(NO_STATE) if kept is None else kept, record.text(), ending)


def _close(live: Live | None, written: Written, record: SteeringRecord, ending: str) -> None:
    """First what was written, then the page, which hears of that; a file that cannot be closed is no good ending."""
    files: list[dict[str, Any]] = []
    is_written = False
    try:
        files, is_written = written(record.text() if record.events else ""), True
    finally:
        if live is not None:
            live.close(ending if is_written else "stopped", files)


def _record(positive: list[Any], lengths: Sequence[int], fps: float, hidden: Any) -> SteeringRecord:
    """What the run begins with, to which is added what is done by hand."""
    plan, audience = planned(positive, lengths), host.audience()
    if not plan.first and audience is not None:
        plan = replace(plan, first=text_in_graph(getattr(hidden, "prompt", None), audience.node))
    return SteeringRecord(plan, lengths, fps)


def _meter(
    model: Any,
    stream: FrameStream | None,
    lengths: Sequence[int],
    samples: Tensor,
    sigmas: Tensor,
    causal: CausalConfig,
    cfg: float,
) -> Meter:
    """What this run should take on the MODEL's device."""
    dtype = compute_dtype(model.model)
    kept = settings_of(model).cache_dtype or dtype
    recipe = Recipe(
        config_of(model.model.diffusion_model), lengths, *samples.shape[-2:], steps=len(sigmas) - 1,
        window=causal.window, writes=causal.cache_source == "clean",
        decoder="none", guided=cfg != 1, batch=samples.shape[0], weight_bytes=model.model.get_dtype().itemsize,
        cache_bytes=kept.itemsize, activation_bytes=dtype.itemsize,
    )  # fmt: skip
    return Meter(recipe if stream is None else stream.counted(recipe), host.card(model.load_device, dtype))
