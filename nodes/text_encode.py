"""Prompt to conditioning."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import torch
from comfy_api.latest import io

from ..selfforcing_core.codecs.text import TextEncoder
from .adapter import folders, host
from .adapter.guider_prompts import READER, with_words

log = logging.getLogger(__name__)
SMALL = 2**30  # bytes of a folder's weights: up to here, as the bundled encoder, they are kept in float32


@dataclass(frozen=True)
class _Loaded:
    encoder: TextEncoder
    patcher: Any


@functools.lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str) -> _Loaded:
    """Load an encoder; the last stays in memory under ComfyUI's management: a new prompt does not read it again."""
    device, offload = memory.text_encoder_device(), memory.text_encoder_offload_device()
    # One encoder only: full-size ones take 11 GB in 16 bits.
    encoder = TextEncoder.from_folder(folder, dtype=_dtype(folder, device))
    return _Loaded(encoder, host.patcher_of(encoder.model, device, offload, dynamic=False))


def _dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Return what ComfyUI takes for text encoders on this device; float32 for small ones, which lose nothing by it."""
    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= SMALL:
        return torch.float32
    dtype = memory.text_encoder_dtype(device)
    if dtype.itemsize > 1:
        return dtype
    log.warning("%s is asked for, but this encoder computes in the type of its weights; it takes float16", dtype)
    return torch.float16


@dataclass(frozen=True)
class TextReader:
    """Text to CONDITIONING by a choice of `folders.text_encoder_choices`; what it makes carries it along."""

    text_encoder: str

    def __call__(self, text: str) -> list[Any]:
        folder = folders.text_encoder_folder(self.text_encoder)
        loaded = _load(folder, folders.fingerprint(folder))
        host.load([loaded.patcher], whole=True)  # its layers are torch's, which ComfyUI cannot cast one by one
        return with_words(text, [[host.to_graph(loaded.encoder.encode([text])), {READER: self}]])


class SelfForcingTextEncode(io.ComfyNode):
    """Prompt to CONDITIONING with a UMT5 encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingTextEncode",
            display_name="Text Encode (Self Forcing)",
            category="SelfForcing",
            search_aliases=["umt5", "prompt for wan", "clip text encode"],
            description="Turns a prompt into conditioning. For a single-file Wan encoder use ComfyUI's Load CLIP "
            "(type wan) and CLIP Text Encode instead: both kinds of conditioning fit the sampler.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=folders.text_encoder_choices(),
                    tooltip="A bundled encoder, or a folder of models/text_encoders that holds config.json, "
                    "model.safetensors and tokenizer.json. It must be the one the video model was trained with.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video shows, in words. The tiny model knows sentences like "
                    "'a red square moving left slowly on a navy background'.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Text embeddings of the prompt.")],
        )

    @classmethod
    def execute(cls, text_encoder: str, text: str) -> io.NodeOutput:
        return io.NodeOutput(TextReader(text_encoder)(text))

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str = "", **_: object) -> str:
        return folders.fingerprint(folders.text_encoder_folder(text_encoder)) if text_encoder else ""
