"""The streaming sampler: one node from noise to video, chunk by chunk.

Letters: B batch, T latent frames, C channels, H W latent size, V video frames, R RGB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..selfforcing_core.config import CausalConfig
from ..selfforcing_core.geometry import PIXEL_STEP, SPATIAL_FACTOR, VideoGeometry, pixel_frames
from ..selfforcing_core.rollout import Chunk
from . import host
from .autoencoder import FrameStream, TAEHVAutoencoder, graph_images, taehv_autoencoder
from .causal_model import AUTO, SINK_AUTO, causal_settings, config_of, settings_of, sigmas_of
from .sampling import ChunkGuider, ChunkSampler, Run, SeededHostNoise, StateHolder, known_frames, layout

State = io.Custom("SELFFORCING_STATE")
NO_FRAMES = "the sampler's IMAGE output needs an autoencoder; connect taehv, or decode the LATENT output instead"
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


Take = Callable[[Tensor], object]  # what becomes of a chunk's frames [B, V, R, H, W] in [0, 1]


class _StreamProgress(host.Progress):
    """Counts network calls, decodes each chunk as soon as it is there, and shows its newest frame."""

    def __init__(self, total: int, stream: FrameStream | None, latent_format: Any, take: Take) -> None:
        super().__init__(total)
        self.stream, self.latent_format, self.take = stream, latent_format, take

    def chunk(self, chunk: Chunk) -> None:
        if self.stream is None:
            self.show_rough(chunk.latents_BTCHW[0, -1], self.latent_format)
            return
        frames_BVRHW = self.stream.decode(chunk.latents_BTCHW)
        self.take(frames_BVRHW)
        self.show(frames_BVRHW[0, -1])


class SelfForcingStreamSampler(io.ComfyNode):
    """Noise to LATENT and IMAGE with the Self Forcing rollout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingStreamSampler",
            display_name="Stream Sampler (Self Forcing)",
            category="SelfForcing",
            search_aliases=["self forcing", "causal video", "autoregressive video", "streaming video", "long video"],
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
                    tooltip="From the node Load TAEHV (Self Forcing): decodes each chunk as soon as it is done, for "
                    "the preview and the IMAGE output.",
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
            ],
            outputs=[
                io.Latent.Output(tooltip="The video's latents, for VAE Decode or Decode TAEHV."),
                io.Image.Output(tooltip="The video's frames. Needs taehv."),
                State.Output(display_name="state", tooltip="Where the run ended. Needs keep_state."),
            ],
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
    def execute(
        cls,
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
        latent_image: dict[str, Any] | None = None,
        taehv: Any = None,
        negative: list[Any] | None = None,
        cfg: float = 1.0,
        state: StateHolder | None = None,
        keep_state: bool = False,
    ) -> io.NodeOutput:
        frames: list[Tensor] = []
        samples, kept = sample(
            model, positive, width, height, length, seed, steps, shift, chunk, window, sink, latent_image, taehv,
            negative, cfg, state, keep_state, frames.append,
        )  # fmt: skip
        images = graph_images(torch.cat(frames, 1)) if frames else host.blocked(NO_FRAMES)
        return io.NodeOutput({"samples": samples}, images, kept)


def sample(
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
    latent_image: dict[str, Any] | None,
    taehv: Any,
    negative: list[Any] | None,
    cfg: float,
    state: StateHolder | None,
    keep_state: bool,
    take: Take,
) -> tuple[Tensor, Any]:
    """LATENT samples and where the run ended; `take` gets every chunk's frames as soon as they are decoded."""
    causal = causal_settings(settings_of(model).causal, chunk, window, sink)
    channels = config_of(model.model.diffusion_model).out_dim
    latent, lengths = _empty_latent(latent_image, width, height, length, causal, channels)
    autoencoder = taehv_autoencoder(taehv) if taehv is not None else None
    working = autoencoder.working_bytes(*latent["samples"].shape[-2:]) if autoencoder else 0
    guider = ChunkGuider(host.with_companions(model, [autoencoder.patcher] if autoencoder else []))
    guider.set_prompts(positive, negative, cfg)
    run = Run(
        causal=causal,
        progress=lambda total: _progress(total, autoencoder, model, state, take),
        resume=state,
        keep=StateHolder() if keep_state else None,
        working_bytes=working,
    )
    samples = guider.sample(
        SeededHostNoise(seed, lengths).generate_noise(latent),
        latent["samples"],
        ChunkSampler(run),
        sigmas_of(model, steps, shift),
        denoise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=seed,
    )
    return host.to_graph(samples), run.keep if run.keep is not None else host.blocked(NO_STATE)


def _progress(
    total: int, autoencoder: TAEHVAutoencoder | None, model: Any, state: StateHolder | None, take: Take
) -> _StreamProgress:
    """What follows a run; the frames before a resumed state are taken first."""
    stream = autoencoder.stream() if autoencoder else None
    if state is not None and stream is not None:
        video = state.filled().video_BTCHW
        assert video is not None
        take(stream.decode(video))
    return _StreamProgress(total, stream, model.model.latent_format, take)
