"""The streaming sampler: one node from noise to video, chunk by chunk.

Letters: B batch, T latent frames, C channels, H W latent size, V video frames, R RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..selfforcing_core.config import CausalConfig, StepConfig
from ..selfforcing_core.geometry import (
    PIXEL_STEP,
    SPATIAL_FACTOR,
    VideoGeometry,
    chunk_lengths,
    pixel_frames,
    tokens_per_frame,
)
from ..selfforcing_core.kv_cache import KVCache
from ..selfforcing_core.rollout import SeededNoise, rollout
from . import host
from .adapter import (
    SelfForcingWan,
    TAEHVAutoencoder,
    compute_dtype,
    conditioning_from_graph,
    graph_images,
    graph_latents,
    self_forcing_model,
    taehv_autoencoder,
)

AUTO = 0
SINK_AUTO = -1
NO_FRAMES = "the sampler's IMAGE output needs an autoencoder; connect taehv, or decode the LATENT output instead"


@dataclass(frozen=True)
class _Plan:
    """What one run computes; (T, C, H, W) and batch of its latents."""

    latent_shape: tuple[int, int, int, int]
    batch: int
    causal: CausalConfig
    steps: StepConfig

    @property
    def num_calls(self) -> int:
        """Network calls: every step of every chunk, and a cache pass for all chunks but the last."""
        chunks = len(
            chunk_lengths(
                self.latent_shape[0],
                self.causal.chunk,
                independent_first_frame=self.causal.independent_first_frame,
            )
        )
        return chunks * (len(self.steps.steps) + 1) - 1

    def cache_bytes(self, model: SelfForcingWan) -> int:
        frames, _, height, width = self.latent_shape
        return KVCache.num_bytes(
            model.diffusion_model.config,
            batch=self.batch,
            tokens_per_frame=tokens_per_frame(height, width),
            capacity=frames if self.causal.window == -1 else min(frames, self.causal.window),
            dtype=compute_dtype(model),
        )


def _causal_settings(trained: CausalConfig, chunk: int, window: int, sink: int) -> CausalConfig:
    """The widgets' values, the checkpoint's own where they say auto."""
    return replace(
        trained,
        chunk=trained.chunk if chunk == AUTO else chunk,
        window=trained.window if window == AUTO else window,
        sink=trained.sink if sink == SINK_AUTO else sink,
    )


def _step_settings(trained: StepConfig, num_steps: int, shift: float, patched_shift: float) -> StepConfig:
    """The widgets' values; auto is the checkpoint's list, and the shift that a model node may have set."""
    spread = tuple(1000.0 * (num_steps - step) / num_steps for step in range(num_steps))
    keeps_list = num_steps in (AUTO, len(trained.steps))
    return replace(trained, steps=trained.steps if keeps_list else spread, shift=shift or patched_shift)


def _latent_shape(
    latent_image: dict[str, Any] | None, width: int, height: int, length: int, causal: CausalConfig, channels: int
) -> tuple[int, tuple[int, int, int, int]]:
    """(batch, (T, C, H, W)). Raises ValueError naming the nearest valid sizes."""
    batch = 1
    if latent_image is not None:
        samples = latent_image["samples"]
        if samples.ndim != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"latent_image of shape {tuple(samples.shape)} is not a Wan video's [batch, {channels}, frames, "
                "height, width]; use Empty HunyuanVideo Latent or Empty AR Video Latent"
            )
        batch, _, frames, latent_height, latent_width = samples.shape
        width, height, length = latent_width * SPATIAL_FACTOR, latent_height * SPATIAL_FACTOR, pixel_frames(frames)
    size = VideoGeometry(
        width, height, length, chunk=causal.chunk, independent_first_frame=causal.independent_first_frame
    )
    return batch, (size.latent_frames, channels, size.latent_height, size.latent_width)


def _generate(
    patcher: Any, positive: list[Any], seed: int, plan: _Plan, autoencoder: TAEHVAutoencoder | None
) -> tuple[Tensor, Tensor | None]:
    """Run the rollout; latents [B, T, C, H, W] and, with an autoencoder, frames [B, V, R, H, W] decoded on the way."""
    model = self_forcing_model(patcher)
    conditioning = conditioning_from_graph(
        positive,
        model.diffusion_model.config,
        batch=plan.batch,
        device=patcher.load_device,
        dtype=compute_dtype(model),
    )
    progress = host.Progress(plan.num_calls)

    def on_step(chunk: int, step: int) -> None:
        host.check_interrupted()
        progress.step()

    chunks = rollout(
        model.diffusion_model,
        conditioning,
        noise=SeededNoise(seed),
        latent_shape=plan.latent_shape,
        causal=plan.causal,
        steps=plan.steps,
        on_step=on_step,
    )
    stream = autoencoder.stream() if autoencoder else None
    latents, frames = [], []
    try:
        for chunk in chunks:
            latents.append(host.to_graph(chunk.latents_BTCHW))
            if stream is not None:
                frames.append(stream.decode(chunk.latents_BTCHW))
                progress.show(frames[-1][0, -1])
            else:
                progress.show_rough(latents[-1][0, -1], model.latent_format)
        progress.finish()
    finally:
        chunks.close()  # frees the KV cache also when a step was interrupted
    return torch.cat(latents, 1), torch.cat(frames, 1) if frames else None


class SelfForcingStreamSampler(io.ComfyNode):
    """Noise to LATENT and IMAGE with the Self Forcing rollout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingStreamSampler",
            display_name="Stream Sampler (Self Forcing)",
            category="SelfForcing",
            description="Generates a video chunk by chunk with a KV cache, each chunk in a few steps, and shows every "
            "chunk as soon as it is done. Settings at auto are those the checkpoint was trained with.",
            inputs=[
                io.Model.Input("model", tooltip="From the node Load Model (Self Forcing)."),
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
                    tooltip="An empty video latent. Its size, length and batch replace width, height and length; its "
                    "content is not used.",
                ),
                io.Vae.Input(
                    "taehv",
                    optional=True,
                    tooltip="From the node Load TAEHV (Self Forcing): decodes each chunk as soon as it is done, for "
                    "the preview and the IMAGE output.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The video's latents, for VAE Decode or Decode TAEHV."),
                io.Image.Output(tooltip="The video's frames. Needs taehv."),
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
    ) -> io.NodeOutput:
        ours = self_forcing_model(model)
        causal = _causal_settings(ours.causal, chunk, window, sink)
        patched_shift = getattr(model.get_model_object("model_sampling"), "shift", ours.steps.shift)
        channels = ours.diffusion_model.config.out_dim
        batch, shape = _latent_shape(latent_image, width, height, length, causal, channels)
        plan = _Plan(shape, batch, causal, _step_settings(ours.steps, steps, shift, patched_shift))
        autoencoder = taehv_autoencoder(taehv) if taehv is not None else None

        working = ours.memory_required([batch, channels, causal.chunk, *shape[2:]]) + plan.cache_bytes(ours)
        host.load([model] + ([autoencoder.patcher] if autoencoder else []), working_bytes=working)
        latents_BTCHW, frames_BVRHW = _generate(model, positive, seed, plan, autoencoder)
        images = ExecutionBlocker(NO_FRAMES) if frames_BVRHW is None else graph_images(frames_BVRHW)
        return io.NodeOutput({"samples": graph_latents(latents_BTCHW)}, images)
