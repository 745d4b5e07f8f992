"""The state of a rollout after a chunk: what is needed to go on as if it had never stopped, or to branch off.

Letters: B batch, T latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import replacing
from .kv_cache import CacheState

HEADER_KEY = "selfforcing.snapshot"
# 2: the numbers of the caches have scales; 3: half of the caches are another network's; 4: frames stand elsewhere than
# at their own number, or a policy remembers more. Readers of 1 would see none of it.
HEADER_FORMAT, SCALED_FORMAT, EXPERTS_FORMAT, POLICY_FORMAT = HEADER_FORMATS = 1, 2, 3, 4
MEMORY = "memory."  # before the names of what a policy remembers in a cache
LATENTS = "latents."  # before the names of what it remembers beside them


@dataclass(frozen=True)
class Snapshot:
    """Copies of every cache after a chunk.

    Prompt, noise, schedule and model are not part of it: resume with the same ones for the same video, with others for
    another continuation.
    """

    start_frame: int  # of the chunk, in latent frames
    end_frame: int  # one behind its last
    caches: tuple[CacheState, ...]  # one for each conditioning; of two experts first the high-noise network's
    pending_BTCHW: Tensor | None = None  # the chunk where it was not yet written into the caches (a video's last one)
    pending_timestep: float = 0.0  # at which it is to be written
    video_BTCHW: Tensor | None = None  # all clean latents up to end_frame, where somebody kept them
    num_networks: int = 1  # 2 for experts
    latents: Mapping[str, Tensor] = field(default_factory=dict)  # beside the caches: of some policies, by name
    steps_ahead: tuple[int, ...] = ()  # taken by each chunk that was begun together with the finished one
    policy: str = ""  # with its settings, where no cache is here to say it

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device | str) -> Snapshot:
        """Return the same state on another device, for instance in CPU memory."""
        caches = tuple(
            _with_tensors(state, {name: tensor.to(device) for name, tensor in _tensors_of(state).items()})
            for state in self.caches
        )
        pending, video = (None if x is None else x.to(device) for x in (self.pending_BTCHW, self.video_BTCHW))
        latents = {name: x.to(device) for name, x in self.latents.items()}
        return replace(self, caches=caches, pending_BTCHW=pending, video_BTCHW=video, latents=latents)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, complete or not at all. Raises ValueError if the path cannot be written."""
        own_format = POLICY_FORMAT if self.latents else EXPERTS_FORMAT if self.num_networks > 1 else HEADER_FORMAT
        header: dict[str, Any] = {
            "format": max([own_format, *(_format(state) for state in self.caches)]),
            "start_frame": self.start_frame,
            "end_frame": self.end_frame,
            "pending_timestep": self.pending_timestep,
            "caches": [_cursors(state) for state in self.caches],
            "num_networks": self.num_networks,
        }
        if self.steps_ahead:
            header["steps_ahead"] = self.steps_ahead
        if self.policy:
            header["policy"] = self.policy
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {HEADER_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Snapshot:
        """Read what `save` wrote. Raises ValueError, one line, for any other file."""
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = json.loads((file.metadata() or {})[HEADER_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it has no __iter__
            return cls._from_parts(header, tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is no snapshot of a rollout ({reason}); give a file saved as one") from error

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Snapshot:
        if header["format"] not in HEADER_FORMATS:
            raise ValueError(
                f"format {header['format']!r}, this version reads {HEADER_FORMATS[0]} to {HEADER_FORMATS[-1]}"
            )
        caches = []
        for index, cursors in enumerate(header["caches"]):
            prefix = f"cache{index}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            # older files have no base: it is the sink until a prompt changes
            values = {name: tuple(x) if isinstance(x, list) else x for name, x in cursors.items()}
            state = CacheState(own["k"], own["v"], **{"base": cursors["sink"], **values})
            caches.append(_with_tensors(state, own))
        return cls(
            header["start_frame"],
            header["end_frame"],
            tuple(caches),
            tensors.get("pending"),
            header["pending_timestep"],
            tensors.get("video"),
            header.get("num_networks", 1),
            {name.removeprefix(LATENTS): x for name, x in tensors.items() if name.startswith(LATENTS)},
            tuple(header.get("steps_ahead", ())),
            header.get("policy", ""),
        )

    def _tensors(self) -> dict[str, Tensor]:
        latents = {"pending": self.pending_BTCHW, "video": self.video_BTCHW}
        tensors = {name: tensor for name, tensor in latents.items() if tensor is not None}
        tensors |= {f"{LATENTS}{name}": tensor for name, tensor in self.latents.items()}
        for index, state in enumerate(self.caches):
            tensors |= {f"cache{index}.{name}": tensor for name, tensor in _tensors_of(state).items()}
        return tensors


def _tensors_of(state: CacheState) -> dict[str, Tensor]:
    """Return keys, values and, of 8 bits, their scales."""
    tensors = {name: getattr(state, name) for name in ("k", "v", "k_scale", "v_scale")}
    tensors |= {f"{MEMORY}{name}": tensor for name, tensor in state.memory.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _with_tensors(state: CacheState, tensors: dict[str, Tensor]) -> CacheState:
    """Return a state with these tensors, named as `_tensors_of` names them."""
    memory = {name.removeprefix(MEMORY): x for name, x in tensors.items() if name.startswith(MEMORY)}
    return replace(state, **{name: x for name, x in tensors.items() if not name.startswith(MEMORY)}, memory=memory)


def _format(state: CacheState) -> int:
    """Return the lowest format whose readers understand a state."""
    plain = CacheState(state.k, state.v, 0, 0, 0, 0, 0)
    if any(getattr(state, name) != getattr(plain, name) for name in ("sink_start", "jump", "policy", "memory")):
        return POLICY_FORMAT
    return HEADER_FORMAT if state.k_scale is None else SCALED_FORMAT


def _cursors(state: CacheState) -> dict[str, Any]:
    names = ["start_frame", "end_frame", "capacity", "sink", "base"]
    if _format(state) == POLICY_FORMAT:
        names += ["sink_start", "jump", "slot_frames", "slot_positions", "policy"]
    return {name: getattr(state, name) for name in names}
