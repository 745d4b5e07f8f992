"""What a user asks for on the command line: every option of `generate` that describes the videos, beside its help text.

Nothing here imports torch, so that `--help` is there at once.
"""

# ruff: noqa: RUF009 - `_option` makes a dataclass field, and nothing that several requests would share
from __future__ import annotations

from argparse import Action, BooleanOptionalAction
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from ..policy import HISTORIES, POLICIES

# Width, height and frames that a bundle was trained on; anything else is taken for a Wan 2.1 model.
BUNDLE_SIZES = {"tiny": (64, 64, 33)}
WAN_SIZE = (832, 480, 81)
MODEL_NAMES = "a bundle's name, that of a download in models/, or a checkpoint"
SAME = "same"  # of the first chunk's steps: those of every chunk
AS_STORED = "(default: what preset or checkpoint say)"
# The groups of --help, in its order.
SHOWN, WRITTEN, MODELS, SAMPLED, COMPUTED = GROUPS = (
    "what to show",
    "files to write",
    "models",
    "how to sample",
    "where to compute",
)


def _option(default: Any, group: str, help: str, **argument: Any) -> Any:
    """Return a field that is an option, with its group in --help and what argparse is told of it."""
    return field(default=default, metadata={"group": group, "argument": {"help": help, **argument}})


def _steps(text: str) -> tuple[float, ...] | int:
    """Return a list of timesteps; a single number below 1000 without a point is how many there are."""
    if text.isdecimal() and int(text) < 1000:
        return int(text)
    return tuple(float(part) for part in text.split(","))


def _first_steps(text: str) -> tuple[float, ...] | int:
    """Return the same for the first chunk; () for the word that stands for no steps of its own."""
    return () if text == SAME else _steps(text)


class LoraAction(Action):
    """Collects FILE [STRENGTH] of an option that is repeated, as pairs."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add one pair to those before it. What is no such pair ends in the parser's line."""
        file, *strengths = values
        try:
            pair = file, float(*strengths or (1.0,))
        except (TypeError, ValueError):
            given = " ".join(values)
            parser.error(f"{option_string} {given}: a file and at most one number can follow; 1 is the usual strength")
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), pair))


LORA_ARGUMENT: dict[str, Any] = {"action": LoraAction, "nargs": "+", "metavar": ("FILE", "STRENGTH")}
LORA_HELP = "LoRA to merge into the weights, at strength 1 or another; may be repeated"


@dataclass(frozen=True)
class Request:
    """What to generate and where to; None means what preset or checkpoint say, or the size its model was trained on.

    Each field is the option of the same name, explained by its help. Sizes are pixels, `frames` video frames, `chunk`,
    `window` and `sink` latent frames (see CausalConfig).
    """

    prompt: str = _option(
        MISSING,
        SHOWN,
        "what the video shows; '0s: a red square; 3s: a blue circle' changes it on the way, '3s cut: ...' (or another "
        "word of --history) with that history, '3s blend 4: ...' over 4 chunks",
    )
    out: Path = _option(
        MISSING,
        WRITTEN,
        "video file (.mp4, .mov, .mkv; .webp and .gif loop, without sound); a folder for several videos",
        required=True,
    )

    # models
    model: str = _option("tiny", MODELS, f"{MODEL_NAMES} (default: tiny)")
    low_noise: str | None = _option(
        None,
        MODELS,
        "network for low noise, where --model is for high noise (Wan 2.2 A14B; a folder has its own)",
    )
    boundary: float | None = _option(
        None, MODELS, f"share of noise, such as 0.875, from which on --model is asked and not --low-noise {AS_STORED}"
    )
    boundary_step: int | None = _option(None, MODELS, "or how many of the steps are --model's")
    weights: str = _option("auto", MODELS, "of a training file", choices=["auto", "ema", "raw"])
    lora: tuple[tuple[str | Path, float], ...] = _option((), MODELS, LORA_HELP, **LORA_ARGUMENT)
    low_noise_lora: tuple[tuple[str | Path, float], ...] = _option(
        (), MODELS, "the same for the weights of --low-noise, which --lora does not reach", **LORA_ARGUMENT
    )
    preset: str = _option(
        "auto",
        MODELS,
        "released checkpoint whose settings the model is run with, one of those that `presets` lists; none: what the "
        "file says (default: auto, which recognises it)",
    )
    taehv: str | None = _option(None, MODELS, "bundle or file of the tiny autoencoder (default: the model's bundle)")
    taehv_latents: str | None = _option(None, MODELS, "whose latents the TAEHV decodes, if its file does not say")
    vae: Path | None = _option(None, MODELS, "file or diffusers folder of the Wan VAE")
    decoder: str | None = _option(None, MODELS, "taehv or vae (default: taehv, or vae if only that is given)")
    clip: Path | None = _option(None, MODELS, "image encoder, for image-to-video models")
    text_encoder: str | None = _option(None, MODELS, "bundle, folder or UMT5 file (default: the model's bundle)")

    # what to show
    history: str | None = _option(
        None,
        SHOWN,
        "where the prompt changes: recode writes the frames so far into the cache again under the new one, recache in "
        "one pass, keep leaves them, flush forgets all but sink and last frames, cut does and puts the next chunk far "
        "away; a word in the schedule wins (default: as the policy says)",
        choices=HISTORIES,
    )
    negative: str = _option("", SHOWN, "what to keep away from, with --cfg")
    image: Path | None = _option(None, SHOWN, "picture that is the first frame")
    extend: Path | None = _option(None, SHOWN, "video, or file of --latents, that goes on for --frames more")
    frames: int | None = _option(None, SHOWN, "length in video frames (default: as trained, if known; else 81)")
    width: int | None = _option(None, SHOWN, "in pixels (default: the bundle's or preset's; 832 for Wan)")
    height: int | None = _option(None, SHOWN, "in pixels (default: the bundle's or preset's; 480 for Wan)")
    seed: int = _option(0, SHOWN, "equal seeds give equal videos (default: 0)")

    # files to write
    codec: str | None = _option(
        None,
        WRITTEN,
        "h264, h265, av1, prores (10 bit, .mov), ffv1 (lossless, .mkv), webp, gif (256 colours a frame) "
        "(default: h264; in .webp and .gif their own)",
    )
    quality: int | None = _option(
        None,
        WRITTEN,
        "crf of h264 (1 best to 51, default 18), h265 (1 to 51, 21) and av1 (1 to 63, 25); of webp 0 to 100 "
        "(best, 85); of prores 0 proxy to 3 HQ (3); ffv1 and gif have none",
    )
    audio: Path | None = _option(
        None, WRITTEN, "file whose sound the video gets, from its beginning on, cut at the video's end"
    )
    sheet: Path | None = _option(None, WRITTEN, "also write a contact sheet of the frames (PNG)")
    latents: Path | None = _option(None, WRITTEN, "also keep the latents (safetensors), for --extend")
    overwrite: bool = _option(False, WRITTEN, "replace files that exist")
    fps: float | None = _option(None, WRITTEN, "frames per second of the file (default: the preset's, else 16)")

    # how to sample
    chunk: int | None = _option(None, SAMPLED, f"latent frames denoised together {AS_STORED}")
    window: int | None = _option(None, SAMPLED, f"latent frames a chunk sees, itself included; -1: all {AS_STORED}")
    sink: int | None = _option(None, SAMPLED, f"first latent frames that stay visible for ever {AS_STORED}")
    policy: str | None = _option(
        None,
        SAMPLED,
        "what the cache keeps of a long video and at which positions, NAME[,key=value]: "
        + ", ".join(POLICIES)
        + " "
        + AS_STORED,
        metavar="NAME",
    )
    cache_source: str | None = _option(
        None,
        SAMPLED,
        "clean: a pass writes each finished chunk into the cache; last_step: its last step's is kept " + AS_STORED,
    )
    steps: tuple[float, ...] | int | None = _option(
        None,
        SAMPLED,
        "timesteps, for instance 1000,750,500,250, or their number; a last one of 0 is a pass over nearly clean frames "
        + AS_STORED,
        type=_steps,
    )
    first_chunk_steps: tuple[float, ...] | int | None = _option(
        None,
        SAMPLED,
        f"those of the video's first chunk, likewise; {SAME}: as every chunk {AS_STORED}",
        type=_first_steps,
    )
    warp_steps: bool | None = _option(
        None,
        SAMPLED,
        f"whether listed timesteps go through the shift, or are what the model sees {AS_STORED}",
        action=BooleanOptionalAction,
    )
    shift: float | None = _option(None, SAMPLED, f"flow-matching shift of the steps {AS_STORED}")
    solver: str | None = _option(None, SAMPLED, f"renoise or phased (few steps), euler or unipc (many) {AS_STORED}")
    cfg: float | None = _option(
        None,
        SAMPLED,
        "classifier-free guidance; 1 is none (default: what preset or checkpoint say; 1 where they say nothing)",
    )

    # where to compute
    device: str = _option("auto", COMPUTED, "auto: cuda if there is one, else cpu; or mps (default: auto)")
    dtype: str | None = _option(
        None,
        COMPUTED,
        "float32, bfloat16 or float16 (default: float32 on a CPU, else the stored one of 16 bits, else bfloat16)",
    )
    attention: str = _option(
        "auto", COMPUTED, "auto, math, flash, efficient, cudnn, or measured: the fastest of them here (default: auto)"
    )
    cache_dtype: str | None = _option(
        None,
        COMPUTED,
        "number type of the KV cache: float32, bfloat16, float16, float8_e4m3fn, int8 (default: the model's)",
    )
    compile: bool = _option(False, COMPUTED, "compile the model's blocks; the first chunk waits for it")
    fp8: bool = _option(False, COMPUTED, "keep the model's weights in 8 bits")
    offload_expert: bool = _option(
        False,
        COMPUTED,
        "keep --model and --low-noise on the GPU in turns (default: where both do not fit)",
    )
    embeddings: Path | None = _option(
        None, COMPUTED, "keep the prompts' embeddings there; known ones are read again", metavar="FOLDER"
    )
    roofline: bool = _option(
        False,
        COMPUTED,
        "measure the device for two seconds; say what it can reach and what share of that the run did reach",
    )


@dataclass(frozen=True)
class PromptBatch:
    """Videos of one prompt that are computed together: row b of the noise is `first_row` + b."""

    prompt: str  # as the user wrote it
    text: str  # what the model reads; may be a schedule
    outs: tuple[Path, ...]  # one file a video
    first_row: int = 0
