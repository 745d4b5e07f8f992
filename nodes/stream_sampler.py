"""The streaming sampler: one node from noise to video, chunk by chunk."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from .adapter import host, page
from .adapter.autoencoder import graph_clips, graph_latent, space_of
from .adapter.live import times_steered
from .adapter.model_settings import AUTO, SINK_AUTO, WARPS
from .adapter.stream_run import StreamInputs, sample

State = io.Custom("SELFFORCING_STATE")
NO_FRAMES = "the sampler's IMAGE output needs an autoencoder; connect taehv, or decode the LATENT output instead"
IMAGE_OUTPUT = 1  # its place among the outputs
# Where words are not in a name, ComfyUI's search prefers aliases that begin with them, then nodes with short names. So
# no other node of the pack has an alias that begins with one of these.
SEARCH_ALIASES = (
    "self forcing",
    "realtime",
    "real time video",
    "live",
    "live video",
    "streaming",
    "streaming video",
    "endless",
    "endless video",
    "text to video",
    "t2v",
    "wan",
    "wan 2.1",
    "causal",
    "causal video",
    "autoregressive video",
    "long video",
)

log = logging.getLogger(__name__)


def step_widgets() -> list[Any]:
    """Return the widgets of steps that stand behind steps and shift wherever these are."""
    return [
        io.Combo.Input(
            "warp",
            options=list(WARPS),
            default="auto",
            optional=True,
            tooltip="Whether the steps go through the shift, or are the timesteps that the model sees. auto: as the "
            "checkpoint's list was trained.",
        ),
        io.Int.Input(
            "first_chunk_steps",
            default=AUTO,
            min=0,
            max=100,
            optional=True,
            tooltip="Denoising steps of the chunk that begins the video (a count). 0 is auto: as trained, which is as "
            "every chunk but for models such as Causal-Forcing++. The number in steps: as every chunk.",
        ),
    ]


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
            # For ever in this order: saved workflows keep the values of widgets by position. New ones go to the end.
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
                    "high. Off: ComfyUI's usual preview.",
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
                *step_widgets(),
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
        """Return how often such a run was steered, which these inputs do not give; seed is None over a link."""
        return times_steered(seed)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        # Asked before anything is made: otherwise the graph would stop behind a video that took minutes.
        if inputs.get("taehv") is None and page.is_read(cls.hidden, IMAGE_OUTPUT):
            raise ValueError(NO_FRAMES)
        frames: list[Tensor] = []  # in CPU memory: 4.8 MB each at 832 x 480, which Stream to File does not keep
        result = sample(StreamInputs(hidden=cls.hidden, **inputs), on_frames=frames.append)
        images = graph_clips(torch.cat(frames, 1)) if frames else [host.blocker(NO_FRAMES)]
        latent = graph_latent(result.samples, space_of(result.samples))
        return io.NodeOutput(latent, images, result.state, result.schedule)
