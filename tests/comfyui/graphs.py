"""Prompts for the tests, made from the workflow that users get, and what the videos they save look like."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import av
from safetensors.torch import load_file
from torch import Tensor

from selfforcing_core.codecs.video import read_video
from tests.comfyui.host_server import ROOT, Server

MODEL, TEXT, TAEHV, SAMPLER, CREATE, SAVE = "123456"
# What auto means for the bundle. Saying it outright asks for the same video in other words, so that the server computes
# it instead of answering from its cache.
EXPLICIT_CHUNK = 3
SEEDS = itertools.count(10**18)
Prompt = dict[str, Any]


def tiny_prompt(text: str | None = None, **sampler_inputs: Any) -> Prompt:
    """Return workflows/api/tiny_t2v.json, with another text or other inputs of its sampler."""
    prompt = json.loads((ROOT / "workflows/api/tiny_t2v.json").read_text())
    if text is not None:
        prompt[TEXT]["inputs"]["text"] = text
    prompt[SAMPLER]["inputs"].update(sampler_inputs)
    return prompt


def fresh_seed() -> int:
    """Return a seed that the server has not seen, or it would answer from its cache; the same ones in every session."""
    return next(SEEDS)


def add(prompt: Prompt, name: str, class_type: str, **inputs: Any) -> None:
    prompt[name] = {"class_type": class_type, "inputs": inputs}


def of_one_codec(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return SaveVideo's inputs with the codec under one name: later hosts call it `format.codec`; twins have both."""
    codecs = {inputs[name] for name in ("codec", "format.codec") if name in inputs}
    if not codecs:
        return inputs
    (codec,) = codecs
    return {name: value for name, value in inputs.items() if name != "format.codec"} | {"codec": codec}


def latents_of(server: Server, prompt: Prompt) -> Tensor:
    """Run a prompt and give what its sampler made, [B, C, T, H, W], exactly: H.264 under load is not repeatable."""
    prompt = {**prompt, "latents": {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0]}}}
    # The tensor is left in ComfyUI's raw space: tests compare two of the kind.
    prompt["latents"]["inputs"]["filename_prefix"] = "latents/test"
    return load_file(server.run(prompt)["latents"][0])["latent_tensor"]


def read_mp4(path: Path) -> tuple[Tensor, float]:
    """Return frames [V, R, H, W] in [0, 1] and frames per second of a saved video."""
    with av.open(str(path)) as container:
        fps = container.streams.video[0].average_rate
    assert fps is not None
    return read_video(path), float(fps)
