"""Every knob that describes a network or a sampler, as frozen dataclasses. Sizes of released networks are data.

Nothing here knows torch, files or devices. A config travels as JSON in the header of our safetensors files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from .policy import SELF_FORCING, cache_policy

ConfigT = TypeVar("ConfigT", bound="_JsonConfig")


class _JsonConfig:
    """JSON round trip that refuses unknown keys, so that a newer file is never half understood."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; tuples become lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """Invert `to_dict`. Raises ValueError naming keys that this version does not know."""
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


CLIP_DIM = 1280  # width of the CLIP ViT-H/14 features that image-to-video networks read
CLIP_TOKENS = 257  # how many of them one picture has


@dataclass(frozen=True)
class WanConfig(_JsonConfig):
    """Sizes of a Wan 2.1 transformer. Names and defaults are those of the original repository (wan/configs)."""

    dim: int
    ffn_dim: int  # width inside the feed-forward network
    num_heads: int
    num_layers: int
    in_dim: int = 16  # channels: noisy latents; for "i2v" 4 of a mask and 16 of the image's latents more
    out_dim: int = 16
    text_dim: int = 4096  # of UMT5-xxl
    text_len: int = 512  # tokens; shorter texts are filled with zeros
    freq_dim: int = 256  # sinusoids of a timestep
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, height and width of a token
    eps: float = 1e-6  # of all norms
    model_type: str = "t2v"  # or "i2v"
    # of "i2v" alone: CLIP's features of the image, which Wan 2.1 reads beside the channels and Wan 2.2 does not
    image_features: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim {self.dim} with {self.num_heads} heads gives no even head width; "
                "rotary embedding needs dim divisible by 2 * num_heads"
            )
        if self.model_type not in ("t2v", "i2v"):
            raise ValueError(f"model_type {self.model_type!r} is unknown; use 't2v' or 'i2v'")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size} merges frames; causal chunks need a time patch of 1")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without what earlier versions do not know where it says what they assume."""
        values = super().to_dict()
        return {name: value for name, value in values.items() if (name, value) != ("image_features", True)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """Invert `to_dict`, of what earlier versions wrote too."""
        config = super().from_dict(values)
        if config.model_type == "t2v" and config.in_dim > config.out_dim:  # what they called a network without CLIP
            config = replace(config, model_type="i2v", image_features=False)
        return config

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def reads_clip(self) -> bool:
        """Return whether the network has layers for CLIP's features of an image."""
        return self.model_type == "i2v" and self.image_features


# What the keys and values of a finished chunk are made from; see `CausalConfig.cache_source`.
CACHE_SOURCES = ("clean", "last_step")


@dataclass(frozen=True)
class CausalConfig(_JsonConfig):
    """How a video is cut into chunks and what a chunk may see. All lengths in latent frames."""

    chunk: int = 3  # frames denoised together
    window: int = -1  # frames kept in the cache, the current chunk included; -1: the whole video
    sink: int = 0  # first frames of the video that never leave the window; counted inside it
    independent_first_frame: bool = False  # frame 0 is a chunk of its own
    context_noise: float = 0.0  # timestep in [0, 1000) of the pass that writes a finished chunk into the cache
    # "clean" takes that pass; "last_step" keeps what the last denoising step wrote, one pass fewer per chunk, for
    # models that were trained so
    cache_source: str = "clean"
    policy: str = SELF_FORCING.name  # of policy.POLICIES, settings behind it: "reward,sink_average=0.99"

    def __post_init__(self) -> None:
        if self.cache_source not in CACHE_SOURCES:
            raise ValueError(f"cache_source {self.cache_source!r} is unknown; use {' or '.join(CACHE_SOURCES)}")
        if self.cache_source == "last_step" and self.context_noise:
            raise ValueError("cache_source last_step takes no pass of its own, so context_noise has to be 0")
        if self.chunk < 1:
            raise ValueError(f"chunk {self.chunk} is not a number of latent frames; use 1 or more")
        if self.sink < 0:
            raise ValueError(f"sink {self.sink} is negative; use 0 or more latent frames")
        if self.window != -1 and self.window < self.sink + self.chunk:
            raise ValueError(
                f"window {self.window} cannot hold sink {self.sink} and one chunk of {self.chunk}; "
                f"use -1 (no limit) or at least {self.sink + self.chunk}"
            )
        self._check_policy()
        if not 0 <= self.context_noise < 1000:
            raise ValueError(
                f"context_noise {self.context_noise} is not a timestep in [0, 1000); use 0 for clean context"
            )

    def _check_policy(self) -> None:
        policy = cache_policy(self.policy)
        least = self.sink + policy.num_means + self.chunk
        if self.window != -1 and self.window < least:
            raise ValueError(f"window {self.window} has no room for policy {policy.name}; use {least} or more")
        if policy.sink_average is not None and self.sink != self.chunk:
            # one frame enters one slot: with another number the published code keeps no sink at all
            raise ValueError(f"policy {policy.name} averages chunks into the sink; use sink {self.chunk}, as the chunk")
        if (policy.is_joint or policy.recomputes) and self.cache_source == "last_step":
            raise ValueError(f"policy {policy.name} writes clean frames alone; use cache_source clean")
        if policy.recomputes and (self.sink or self.window == self.chunk):
            raise ValueError(
                f"policy {policy.name} computes the frames before a chunk again, of which none is a sink; use sink 0 "
                f"and window -1 or more than {self.chunk}"
            )
        if policy.refresh_below is not None and (self.chunk != 1 or not self.sink):
            raise ValueError(
                f"policy {policy.name} compares frame by frame with a sink; use chunk 1 and sink 1 or more"
            )
        least += min(self.sink, self.chunk)  # of a shot's frames that stay
        if policy.shot_offset is not None and -1 < self.window < least:
            raise ValueError(f"window {self.window} has no room for policy {policy.name}; use {least} or more")
        if policy.replays and (self.sink or self.window % self.chunk or self.window == -1 or self.context_noise):
            raise ValueError(
                f"policy {policy.name} replays whole clean chunks; use sink 0, context_noise 0 and a window that is a "
                f"multiple of {self.chunk}"
            )

    def cache_frames(self, num_frames: int) -> int:
        """Return how many latent frames a cache holds for a video of this length."""
        if not -1 < self.window < num_frames:
            return num_frames
        # What a policy holds beside the window: a bank; or the sink once more, since a chunk that is written sees a
        # whole window without it, and a joint pass needs both.
        policy = cache_policy(self.policy)
        return self.window + policy.bank + (self.sink if policy.is_joint else 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; the usual policy is left out, so that older versions read such files."""
        values = super().to_dict()
        if self.policy == SELF_FORCING.name:
            del values["policy"]
        return values


@dataclass(frozen=True)
class BidirectionalConfig(_JsonConfig):
    """A network that denoises all frames of a video together, without a cache."""

    latent_frames: int | None = None  # of the videos that it was trained on; None where that is not known

    def __post_init__(self) -> None:
        count = self.latent_frames
        if count is not None and (type(count) is not int or count < 1):
            raise ValueError(f"latent_frames {count!r} is not a number of latent frames; use 1 or more")


SOLVERS = ("renoise", "euler", "unipc", "phased")
FEW_STEP_SOLVERS = ("renoise", "phased")  # of distilled models, which are given fresh noise before every step


@dataclass(frozen=True)
class StepConfig(_JsonConfig):
    """Which timesteps the network sees, and how one noise level becomes the next.

    The defaults are those of the released Self Forcing checkpoints (configs/self_forcing_dmd.yaml).
    """

    # Timesteps on the 0-1000 scale, noisiest first. A last one of 0 is a pass over nearly clean frames (Krea Realtime;
    # see `FlowSchedule`).
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0  # flow-matching shift of the schedule
    warp: bool = True  # send the listed steps through the shift: 1000, 937.5, 833.3, 625
    sigma: str = "exact"  # sigma = t / 1000; or "table": the nearest entry of the reference's 1000-entry table
    # "renoise" predicts clean data and noises it afresh (few-step models); "euler" and "unipc" follow the
    # probability-flow equation (teachers, many steps); "phased" is "renoise" of two experts, the first of which
    # predicts data at the boundary
    solver: str = "renoise"
    # Those of the chunk that begins the video and sees no other, warped alike (Causal-Forcing++); None: as every chunk
    first_chunk_steps: tuple[float, ...] | None = None
    # of two networks that take turns: the share of noise at and above which the one for high noise is asked
    boundary: float | None = None
    # the network is told whole timesteps, 833 of 833.1, while sigma keeps its fraction (Wan's own UniPC, LongLive 2)
    is_whole: bool = False

    @classmethod
    def even(cls, count: int, *, shift: float, solver: str = "euler") -> StepConfig:
        """Return `count` evenly spaced steps, warped through the shift, as Wan's own samplers take them."""
        if count < 1:
            raise ValueError(f"{count} steps make no video; use 1 or more")
        return cls(tuple(1000.0 * (1 - index / count) for index in range(count)), shift=shift, solver=solver)

    def __post_init__(self) -> None:
        _check_steps("steps", self.steps)
        if self.first_chunk_steps is not None:
            _check_steps("first_chunk_steps", self.first_chunk_steps)
        if not 0.01 <= self.shift <= 100:  # beyond, all steps come to lie at one end
            raise ValueError(f"shift {self.shift} is not between 0.01 and 100; released Self Forcing checkpoints use 5")
        if self.sigma not in ("exact", "table"):
            raise ValueError(f"sigma {self.sigma!r} is unknown; use 'exact' or 'table'")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} is unknown; use {', '.join(SOLVERS)}")
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ValueError(
                f"boundary {self.boundary} is not a share of noise between 0 and 1; Wan 2.2 uses 0.875 or 0.9"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, as earlier versions wrote and read them where what they do not know says nothing."""
        later = {"first_chunk_steps": None, "boundary": None, "is_whole": False}
        return {key: value for key, value in super().to_dict().items() if key not in later or value != later[key]}

    def of_chunk(self, index: int) -> StepConfig:
        """Return the same with `steps` as this chunk of a video takes them, and no others."""
        own = self.first_chunk_steps if index == 0 else None
        return replace(self, steps=own or self.steps, first_chunk_steps=None)

    def count_in_words(self) -> str:
        """Return how many steps a chunk takes, and the first one where that has its own."""
        own = self.first_chunk_steps
        return f"{len(self.steps)} steps" + (f" ({len(own)} for the first chunk)" if own else "")


def _check_steps(name: str, steps: tuple[float, ...]) -> None:
    """Raise ValueError for a list of timesteps that no chunk can be denoised by."""
    if not steps:
        raise ValueError(f"{name} is empty; give at least one timestep, for instance 1000")
    if any(not 0 <= step <= 1000 for step in steps) or steps[0] == 0:
        raise ValueError(
            f"{name} {list(steps)} leave (0, 1000]; timesteps are on the 0-1000 scale, and only the last of several "
            "may be 0"
        )
    if any(later >= earlier for earlier, later in zip(steps, steps[1:])):
        raise ValueError(f"{name} {list(steps)} must fall from noisy to clean; sort them in descending order")


@dataclass(frozen=True)
class TAEHVConfig(_JsonConfig):
    """Sizes of a TAEHV tiny video autoencoder (github.com/madebyollin/taehv); the defaults are those for Wan 2.1."""

    latent_channels: int = 16
    image_channels: int = 3
    encoder_width: int = 64
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    patch_size: int = 1
    # whether each of the three stages changes time, or the size of a frame, by a factor of 2
    encoder_time: tuple[bool, bool, bool] = (True, True, False)
    decoder_time: tuple[bool, bool, bool] = (False, True, True)
    decoder_space: tuple[bool, bool, bool] = (True, True, True)


# Wan 2.1's own (wan/configs/wan_t2v_1_3B.py and its neighbours), and the small network that this project trains.
NETWORK_SIZES: dict[str, WanConfig] = {
    "t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "t2v-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "i2v-14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, model_type="i2v"),
    "tiny": WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=4, text_dim=128, text_len=16),
}
