"""The streaming sampler: one node from noise to video, chunk by chunk.

Letters: B batch, T latent frames, C channels, H W latent size, V video frames, R RGB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..selfforcing_core.config import CausalConfig
from ..selfforcing_core.geometry import PIXEL_STEP, SPATIAL_FACTOR, VideoGeometry, pixel_frames
from ..selfforcing_core.rollout import Chunk
from ..selfforcing_core.roofline import Meter, Recipe
from . import host
from .autoencoder import graph_images
from .causal_model import AUTO, SINK_AUTO, causal_settings, config_of, settings_of, sigmas_of
from .frame_stream import FrameStream, frame_stream
from .live import Live, open_live, times_steered
from .prompts import reader_of
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

State = io.Custom("SELFFORCING_STATE")
NO_FRAMES = "the sampler's IMAGE output needs an autoencoder; connect taehv, or decode the LATENT output instead"
# Where words are not in a name, ComfyUI's search prefers aliases that begin with them, then nodes with short names. So
# no other node of the pack has an alias that begins with one of these.
SEARCH_ALIASES = (
    "self forcing", "realtime", "real time video", "live", "live video", "streaming", "streaming video", "endless",
    "endless video", "text to video", "t2v", "wan", "wan 2.1", "causal", "causal video", "autoregressive video",
    "long video",
)  # fmt: skip
NO_STATE = "the sampler's state output is empty; switch keep_state on"


def _empty_latent(
    latent_image: dict[str, Any] | None, width: int, height: int, length: int, causal: CausalConfig, channels: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A LATENT of the video's size and the chunks it is cut into. Raises ValueError naming the nearest valid sizes."""
    if latent_image is not None:
        samples = latent_image["samples"]
        if samples.ndim != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"latent_image of shape {tuple(samples.shape)} is not a Wan video's [batch, {channels}, frames, "
                "height, width]; use Empty HunyuanVideo Latent or Empty AR Video Latent"
            )
        frames, latent_height, latent_width = samples.shape[2:]
        width, height, length = latent_width * SPATIAL_FACTOR, latent_height * SPATIAL_FACTOR, pixel_frames(frames)
        causal = layout(known_frames(latent_image.get("noise_mask")), causal)
    size = VideoGeometry(
        width, height, length, chunk=causal.chunk, independent_first_frame=causal.independent_first_frame
    )
    if latent_image is not None:
        return latent_image, size.chunk_lengths
    empty = torch.zeros(1, channels, size.latent_frames, size.latent_height, size.latent_width)
    return {"samples": empty}, size.chunk_lengths


log = logging.getLogger(__name__)
Take = Callable[[Tensor], object]  # what becomes of a chunk's frames [B, V, R, H, W] in [0, 1]


class _StreamProgress(host.Progress):
    """Counts network calls, decodes each chunk as soon as it is there, shows it, and waits while it is held."""

    def __init__(
        self, total: int, num_frames: int, stream: FrameStream | None, latent_format: Any, live: Live | None, take: Take
    ) -> None:
        super().__init__(total)
        self.num_frames, self.stream, self.latent_format = num_frames, stream, latent_format
        self.live, self.take = live, take
        self.taken = self.calls = 0

    def resumed(self, video_BTCHW: Tensor) -> None:
        """What a run that goes on from a state has already."""
        if self.stream is not None:
            for latent_BTCHW in video_BTCHW.split(1, 1):  # a file takes them one by one, however many there are
                host.check_interrupted()
                self._accept(self.stream.decode(latent_BTCHW, is_last=False))

    def chunk(self, chunk: Chunk) -> bool:
        is_last = chunk.start_frame + chunk.latents_BTCHW.shape[1] == self.num_frames
        may_repeat = self.live is not None and not chunk.is_given
        before = self.stream.state() if self.stream is not None and may_repeat else None
        if self.stream is None:
            frames_BVRHW = chunk.latents_BTCHW[:, :0]
        else:
            frames_BVRHW = self.stream.decode(chunk.latents_BTCHW, is_last=is_last)
        self._show(frames_BVRHW, chunk)
        if self.live is not None and may_repeat and self.live.wants_again():
            if self.stream is not None:
                self.stream.restore(before)
            self.back_to(self.calls)
            return True
        self.calls = self.done
        self._accept(frames_BVRHW)
        return False

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
                    tooltip="Width of the video in pixels, multiples of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Height of the video in pixels, multiples of 16.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=100001,
                    step=4,
                    tooltip="Length in video frames (16 per second), of the form 4n+1 with a whole number of chunks: "
                    "for chunks of 3 latent frames 9, 21, 33, ... 81, 93.",
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
            ],
            outputs=[
                io.Latent.Output(tooltip="The video's latents, for VAE Decode or Decode TAEHV."),
                io.Image.Output(tooltip="The video's frames. Needs taehv."),
                State.Output(display_name="state", tooltip="Where the run ended. Needs keep_state."),
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(
        cls, width: int | None = None, height: int | None = None, length: int | None = None
    ) -> bool | str:
        """What holds for every checkpoint; an input that comes over a link is None here, its value not known yet.

        Whole chunks are checked when the node runs, when the checkpoint's chunk and latent_image are known.
        """
        try:
            VideoGeometry(
                PIXEL_STEP if width is None else width,
                PIXEL_STEP if height is None else height,
                1 if length is None else length,
                chunk=1,
            )
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, seed: int | None = None, **_: Any) -> int:
        """A result that was steered is not what these inputs give; the seed is None where it comes over a link."""
        return times_steered(seed)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        frames: list[Tensor] = []
        samples, kept = sample(take=frames.append, hidden=cls.hidden, **inputs)
        images = graph_images(torch.cat(frames, 1)) if frames else host.blocked(NO_FRAMES)
        return io.NodeOutput({"samples": samples}, images, kept)


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
    fps: float = 16.0,
    hidden: Any = None,
) -> tuple[Tensor, Any]:
    """LATENT samples and where the run ended; `take` gets every chunk's frames as soon as they are decoded.

    The arguments are the inputs of the nodes; fps is the clock of the player, hidden what the host adds to them.
    """
    causal = causal_settings(settings_of(model).causal, chunk, window, sink)
    channels = config_of(model.model.diffusion_model).out_dim
    latent, lengths = _empty_latent(latent_image, width, height, length, causal, channels)
    stream = None if taehv is None else frame_stream(taehv)
    sigmas = sigmas_of(model, steps, shift)
    guider = ChunkGuider(host.with_companions(model, stream.patchers if stream else []))
    guider.set_prompts(positive, negative, cfg)
    meter = _meter(model, stream, lengths, latent["samples"], sigmas, causal, cfg)
    predicted = meter.predicted()
    log.info("%s", meter.in_words())
    working = stream.working_bytes(*latent["samples"].shape[-2:]) if stream else 0
    live = None
    if player:
        live = open_live(
            fps=fps, num_chunks=len(lengths), num_frames=pixel_frames(sum(lengths)), read=reader_of(positive, clip),
            seed=seed, hidden=hidden,
        )  # fmt: skip

    def progress(total: int) -> _StreamProgress:
        made = _StreamProgress(total, sum(lengths), stream, model.model.latent_format, live, take)
        if state is not None:
            made.resumed(state.filled().video_BTCHW)
        return made

    kept = StateHolder() if keep_state else None
    run = Run(causal=causal, progress=progress, resume=state, keep=kept, steering=live, working_bytes=working)
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
    finally:
        if live is not None:
            live.close()
    return host.to_graph(samples), host.blocked(NO_STATE) if kept is None else kept


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
