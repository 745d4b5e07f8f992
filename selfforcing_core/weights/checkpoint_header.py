"""What a checkpoint says of itself in the header of its safetensors file, ours and ComfyUI's entry, and its reading.

Our entry: "selfforcing" = JSON {"format": 1, "kind", "config", "causal", "steps", "latent_space"}; for Wan also
"config" = JSON {"transformer": {...}}, which ComfyUI merges into its own detection. Format 2 adds "bidirectional" and
"guidance", format 3 steps of the first chunk, a last step of 0 and the boundary of two networks. Each is written only
where it has something to say, so that older versions go on reading all other files and refuse those that they would
sample wrongly. A LoRA of our trainer has a header of kind "lora" with "base" and the same settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import BidirectionalConfig, CausalConfig, StepConfig, TAEHVConfig, WanConfig

HEADER_KEY = "selfforcing"
HEADER_FORMAT = 1
HEADER_FORMATS = (HEADER_FORMAT, 2, 3)  # what this version reads
PRESET_ENTRY = "preset"
COMFYUI_KEY = "config"  # comfy/sd.py hands this entry to its detection of models
LORA = "lora"
# Attention does not show how many heads its matrices are cut into, nor padding how long texts are: only a header can.
HEADER_SIZES = ("num_heads", "text_len")


@dataclass(frozen=True)
class SamplingSettings:
    """How a network wants to be run; what the file does not say is None. Never both causal and bidirectional."""

    causal: CausalConfig | None = None  # chunk by chunk, with a cache
    steps: StepConfig | None = None  # the noise levels
    bidirectional: BidirectionalConfig | None = None  # all frames together
    guidance: float | None = None  # scale above 0; distilled models take 1
    preset: str | None = None  # name of the release that it is a copy of

    def to_entries(self, latent_space: str | None) -> dict[str, Any]:
        """Return the entries of our header that say how the network is run, with the format that they need."""
        assert self.causal is None or self.bidirectional is None, "a network is causal or bidirectional, not both"
        entries: dict[str, Any] = {
            "format": HEADER_FORMAT,
            "causal": self.causal.to_dict() if self.causal else None,
            "steps": self.steps.to_dict() if self.steps else None,
            "latent_space": latent_space,
        }
        if self.bidirectional is not None or self.guidance is not None:
            bidirectional = self.bidirectional.to_dict() if self.bidirectional else None
            entries |= {"format": 2, "bidirectional": bidirectional, "guidance": self.guidance}
        steps = self.steps
        later = () if steps is None else (steps.first_chunk_steps, steps.boundary, steps.is_whole or None)
        if self.steps is not None and (any(value is not None for value in later) or self.steps.steps[-1] == 0):
            entries["format"] = 3
        if self.preset is not None:  # earlier versions pass over it, and read the settings
            entries[PRESET_ENTRY] = self.preset
        return entries


@dataclass(frozen=True)
class FileHeader:
    """What a header says, ours and ComfyUI's entry together; None and {} where it says nothing."""

    kind: str | None  # "wan" or "taehv"
    config: dict[str, Any]  # of our entry, checked only as far as no tensor can contradict it
    sizes: dict[str, int]  # those of HEADER_SIZES that a file made for ComfyUI gives
    settings: SamplingSettings
    latent_space: str | None


# ------------------------------------------------------------------ writing --
def file_header(
    config: WanConfig | TAEHVConfig, settings: SamplingSettings, latent_space: str | None
) -> dict[str, str]:
    """Return the metadata by which this project and ComfyUI recognise a network."""
    is_wan = isinstance(config, WanConfig)
    entries = settings.to_entries(latent_space)
    header = {HEADER_KEY: json.dumps({"kind": "wan" if is_wan else "taehv", "config": config.to_dict(), **entries})}
    if is_wan:
        # ComfyUI detects the other sizes from the shapes; `causal_ar` is what its own causal nodes ask for.
        sizes = {name: getattr(config, name) for name in ("num_heads", "text_dim", "freq_dim", "text_len")}
        header[COMFYUI_KEY] = json.dumps({"transformer": {"causal_ar": settings.causal is not None, **sizes}})
    return header


def lora_header(base: str, settings: SamplingSettings) -> dict[str, str]:
    """Return the metadata of a LoRA: the network it belongs on, and how the two together are sampled."""
    return {HEADER_KEY: json.dumps({"kind": LORA, "base": base, **settings.to_entries(None)})}


def comfyui_header(num_heads: Any) -> dict[str, str]:
    """Return ComfyUI's entry for a network of which nothing but the number of heads is known."""
    return {COMFYUI_KEY: json.dumps({"transformer": {"num_heads": num_heads}})}


# ------------------------------------------------------------------ reading --
def read_header(header: Mapping[str, str]) -> FileHeader:
    """Return what a safetensors file says of its network.

    Raises ValueError for a damaged header, for a format that this version does not read, and for that of a LoRA.
    """
    entries, sizes = read_entries(header), _comfyui_sizes(header)
    config, space = entries.get("config") or {}, entries.get("latent_space")
    try:
        _check_sizes(config or sizes)
        settings = _settings(entries)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"header is damaged ({one_line(error)})") from error
    if entries.get("kind") == LORA:
        raise ValueError(_lora_refusal(entries.get("base"), settings))
    return FileHeader(entries.get("kind"), config, sizes, settings, None if space is None else str(space))


def read_lora_header(header: Mapping[str, str]) -> tuple[str | None, SamplingSettings]:
    """Return what a LoRA belongs on, and how the two are sampled together; None where its file does not say so.

    Raises ValueError for a damaged header, for a format that this version does not read, and for that of a network.
    """
    entries = read_entries(header)
    if entries.get("kind", LORA) != LORA:
        raise ValueError(f"is a whole network of kind {entries['kind']!r} and no LoRA")
    try:
        settings = _settings(entries)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"header is damaged ({one_line(error)})") from error
    base = entries.get("base")
    return None if base is None else str(base), settings


def read_entries(header: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries of our own header, {} for a file of somebody else.

    Raises ValueError for a format that this version does not read.
    """
    if HEADER_KEY not in header:
        return {}
    entries = json_object(header[HEADER_KEY])
    if entries.get("format") not in HEADER_FORMATS:
        known = ", ".join(map(str, HEADER_FORMATS))
        raise ValueError(f"header has format {entries.get('format')!r}, this version reads {known}; update it")
    return entries


def _comfyui_sizes(header: Mapping[str, str]) -> dict[str, int]:
    """Return the sizes that a file made for ComfyUI gives in its header; {} where there are none."""
    if COMFYUI_KEY not in header:
        return {}
    sizes = json_object(header[COMFYUI_KEY]).get("transformer")
    return {name: sizes[name] for name in HEADER_SIZES if name in sizes} if isinstance(sizes, dict) else {}


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise ValueError for sizes that no tensor can contradict, because only the header gives them."""
    for name in HEADER_SIZES:
        if name in sizes and (type(sizes[name]) is not int or sizes[name] < 1):  # bool is a subclass of int
            raise ValueError(f"header is damaged ({name} is {sizes[name]!r}, not a positive number)")


def _settings(entries: Mapping[str, Any]) -> SamplingSettings:
    """Return how our header wants the network to be run.

    Headers of format 1 had no word for a bidirectional network: there it is one with steps and without chunks, which
    only exports of bidirectional runs and `convert --bidirectional` wrote. A network with neither is one that nothing
    is known about.
    """
    causal, steps, bidirectional = (entries.get(name) for name in ("causal", "steps", "bidirectional"))
    if causal and bidirectional is not None:
        raise ValueError("header is damaged (it says both causal and bidirectional)")
    is_older = entries.get("format") == HEADER_FORMAT and entries.get("kind") == "wan"
    if bidirectional is None and is_older and steps and not causal:
        bidirectional = {}
    guidance = _guidance(entries)
    return SamplingSettings(
        causal=CausalConfig.from_dict(causal) if causal else None,
        steps=StepConfig.from_dict(steps) if steps else None,
        bidirectional=None if bidirectional is None else BidirectionalConfig.from_dict(bidirectional),
        guidance=guidance,
        preset=None if entries.get(PRESET_ENTRY) is None else str(entries[PRESET_ENTRY]),
    )


def _guidance(entries: Mapping[str, Any]) -> float | None:
    scale = entries.get("guidance")
    if scale is None:
        return None
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):  # NaN, which JSON of Python may hold, fails too
        raise ValueError(f"header is damaged (guidance is {scale!r}, not a positive number)")
    return float(scale)


def _lora_refusal(base: Any, settings: SamplingSettings) -> str:
    """Return the sentence that refuses a LoRA of our trainer: where it belongs, and how it is sampled there."""
    causal, steps = settings.causal, settings.steps
    chunks = "bidirectional" if causal is None else f"chunk {causal.chunk}, window {causal.window}"
    levels = "" if steps is None else f"{steps.count_in_words()}, {steps.solver}, shift {steps.shift:g}"
    summary = ", ".join(part for part in (chunks, levels) if part)
    return (
        f"is a LoRA, to be loaded on top of {base} ({summary}), in ComfyUI by a LoRA loader, elsewhere with "
        "--lora; where a whole network is needed, export the run with form=whole"
    )


# --------------------------------------------------------------------- text --
def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a header entry or an index is. Raises ValueError where it is none."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:  # nested a thousand deep, Python's reader gives up
        raise ValueError(f"header is damaged ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError("header is damaged (not a JSON object)")
    return values


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 300 characters, its class where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
