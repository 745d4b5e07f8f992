"""ComfyUI's guider as the one network that the rollout evaluates, the noise it draws, and who steers it.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ...selfforcing_core.attention import MERGING_DEVICES
from ...selfforcing_core.conditioning import Conditioning
from ...selfforcing_core.config import CausalConfig, WanConfig
from ...selfforcing_core.geometry import tokens_per_frame
from ...selfforcing_core.guided import new_caches
from ...selfforcing_core.kv_cache import KVCache
from ...selfforcing_core.noise import NoiseSource, SeededNoise
from ...selfforcing_core.prompt_schedule import seed_at
from ...selfforcing_core.roofline.policy_bytes import remembered_bytes
from ...selfforcing_core.schedule import TIMESTEPS
from . import host
from .causal_model import forget_extra_bytes
from .causal_pass import COMPILE_OPTIONS, CausalPass
from .guider_prompts import PromptSource, conditionings_of
from .model_settings import KEY, Settings
from .patches import has_wrappers
from .shared_network import config_of

LatentShape = tuple[int, int, int, int]  # T, C, H, W


class Steering(PromptSource, Protocol):
    """A person's hand on a rollout."""

    def seed_at(self, start_frame: int) -> int | None:
        """Return the seed of this chunk's noise; None is the run's own."""
        ...


class CachedNetwork(Protocol):
    """What the caches of a run depend on."""

    @property
    def config(self) -> WanConfig: ...
    @property
    def num_caches(self) -> int: ...
    @property
    def cache_dtype(self) -> torch.dtype: ...


def compute_dtype(model: Any) -> torch.dtype:
    """Return the type that activations of ComfyUI's model have."""
    return model.manual_cast_dtype or model.get_dtype()


@dataclass
class GuidedNetwork:
    """ComfyUI's guider in the shape that `rollout` calls a network in: flow from latents and timesteps."""

    guider: Any
    extra_args: dict[str, Any]  # what ComfyUI gives a sampler function: model_options, seed
    settings: Settings
    chunk_shape: tuple[int, ...]  # [B, C, T, H, W] of the largest evaluation
    working_bytes: float = 0  # what whoever follows the progress needs on the device
    least_sigma: float = 0.0  # noise of what a denoising pass at timestep 0 is given; 0: there is none
    causal_pass: CausalPass | None = field(default=None, init=False)  # None: the bidirectional pass is ComfyUI's own
    # Of the last call: its first frame, and which conditionings were evaluated.
    latest: tuple[int, set[int]] | None = field(default=None, init=False)
    evaluated: set[int] = field(default_factory=set, init=False)  # conditionings that were evaluated at all

    def __post_init__(self) -> None:
        patcher = self.guider.model_patcher
        native = config_of(patcher.model.diffusion_model)
        # Condition channels and CLIP features are ComfyUI's: to the rollout this is a text-to-video network
        self.config = replace(native, model_type="t2v", in_dim=native.out_dim)
        self.device, self.dtype = patcher.load_device, compute_dtype(patcher.model)
        self.cache_dtype = self.settings.cache_dtype or self.dtype
        self.num_caches = max(1, len(conditionings_of(self.guider)))
        self.model_options = self.extra_args.get("model_options", {})

    @property
    def conditioning(self) -> Conditioning:
        """Return rows, type and place of what is computed; the prompts themselves are the guider's."""
        # A stand-in of one token: the rollout hands it back to __call__, which does not look at it.
        return Conditioning(
            torch.zeros(self.chunk_shape[0], 1, self.config.text_dim, device=self.device, dtype=self.dtype)
        )

    def allocate(self, shape: LatentShape, causal: CausalConfig) -> list[KVCache]:
        """Make a cache for every prompt that the guider evaluates."""
        caches = new_caches(self, self.conditioning, self.num_caches, shape, causal)
        # From here on the caches are counted by the device itself; counted twice, ComfyUI would offload for nothing.
        forget_extra_bytes(self.guider.model_patcher.model)
        patcher = self.guider.model_patcher
        self.causal_pass = CausalPass(
            caches,
            self._index_of(),
            self.model_options.get(COMPILE_OPTIONS),
            patcher,
            is_watched=has_wrappers(self.model_options),
        )
        # One object and no dictionary: ComfyUI copies nested ones at every call, and a copy would stay empty.
        options = {**self.model_options.get("transformer_options", {}), KEY: self.causal_pass}
        self.causal_pass.share(patcher.model.diffusion_model, options)  # now, so that a refusal costs no evaluation
        self.model_options = {**self.model_options, "transformer_options": options}
        return caches

    def renew(self) -> Conditioning:
        """Take the guider's prompts anew, since they have changed: their caches are those of the ones before."""
        assert self.causal_pass is not None
        self.causal_pass.index_of = self._index_of()
        self.latest, self.evaluated = None, set()  # another prompt may have other conditionings
        return self.conditioning

    @property
    def companions(self) -> list[Any]:
        """Return the networks that are loaded together with the MODEL."""
        return self.guider.model_patcher.get_additional_models_with_key(host.COMPANIONS)

    def load(self, *, beside: Sequence[Any]) -> None:
        """Bring the MODEL to its device, in the midst of a run; `beside`: networks that are to stay there."""
        host.load([self.guider.model_patcher, *beside], working_bytes=self._evaluation_bytes())

    def kept_loaded(self) -> AbstractContextManager[None]:
        """Keep the MODEL loaded over work that may bring in other networks of ComfyUI."""
        return host.kept_loaded(self.guider.model_patcher, working_bytes=self._evaluation_bytes())

    def _evaluation_bytes(self) -> float:
        # ComfyUI evaluates all conditionings in one batch where it can.
        shape = (self.num_caches * self.chunk_shape[0], *self.chunk_shape[1:])
        return self.guider.model_patcher.memory_required(shape) + self.working_bytes

    def _index_of(self) -> dict[Any, int]:
        return {conditioning["uuid"]: index for index, conditioning in enumerate(conditionings_of(self.guider))}

    def new_cache(
        self, *, batch: int, latent_height: int, latent_width: int, capacity: int, sink: int, like: Tensor
    ) -> KVCache:
        """Make a cache for one prompt, where the settings want it; `rollout` asks for it by this name."""
        device = like.device if self.settings.cache_device is None else torch.device(self.settings.cache_device)
        return KVCache(
            self.config,
            batch=batch,
            tokens_per_frame=tokens_per_frame(latent_height, latent_width),
            capacity=capacity,
            sink=sink,
            device=device,
            dtype=self.cache_dtype,
            by_segments=like.device.type in MERGING_DEVICES,
        )

    def release(self) -> None:
        """Let go of the caches, also where ComfyUI keeps the options of a run that failed."""
        if self.causal_pass is not None:
            self.causal_pass.caches, self.causal_pass.patcher = (), None
            self.causal_pass.start_frame = None

    def __call__(
        self,
        x_BTCHW: Tensor,
        timesteps_BT: Tensor,
        *_: Any,
        cache: Any = None,
        start_frame: int = 0,
        writes: bool = True,
    ) -> Tensor:
        # All frames of a chunk have the same noise level; of several chunks the last has the most.
        sigma_B = timesteps_BT[:, -1] / TIMESTEPS
        if self.causal_pass is not None:
            self.causal_pass.begin_call(start_frame, x_BTCHW.shape[1], writes=writes)
        if self.least_sigma or not writes:
            # At sigma 0 the guider's x0 would be x, whatever the network says: it is asked at the noise that x has,
            # and the network gets its timestep beside it. So it does where chunks of different noise are asked for:
            # the guider's x0 at the noise of one of them implies the flow of each.
            assert self.causal_pass is not None
            self.causal_pass.timesteps_BT = timesteps_BT
            sigma_B = sigma_B.masked_fill(sigma_B == 0, self.least_sigma) if self.least_sigma else sigma_B
        x0_BCTHW = self.guider(
            rearrange(x_BTCHW, "b t c h w -> b c t h w"),
            sigma_B,
            model_options=self.model_options,
            seed=self.extra_args.get("seed"),
        )
        x0_BTCHW = rearrange(x0_BCTHW, "b c t h w -> b t c h w")
        if self.causal_pass is not None:
            self._check_evaluated(start_frame, self.causal_pass.evaluated)
        # The guider answers with x0, the rollout asks for the flow: x = (1 - sigma) x0 + sigma noise.
        sigma = sigma_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None, None, None]
        return (x_BTCHW - x0_BTCHW) / sigma  # at sigma 0, a pass into the cache, nobody reads it

    def _check_evaluated(self, start_frame: int, evaluated: set[int]) -> None:
        """Raise ValueError where a node kept the network from being asked.

        A step may leave out a prompt, but the last pass over a chunk, which the cache keeps, has to have them all.
        """
        # A new chunk begins: the latest call was the last one over the chunk before.
        has_begun = self.latest is not None and self.latest[0] != start_frame
        is_whole = not has_begun or (self.latest is not None and self.latest[1] == self.evaluated)
        if not evaluated or not is_whole or (has_begun and not evaluated <= self.evaluated):
            raise ValueError(
                "an evaluation of the model was skipped by a node that saves steps (such as EasyCache, TeaCache or a "
                "cfg that ends early), which leaves a hole in the cache of a video made chunk by chunk; remove it"
            )
        self.latest = start_frame, evaluated
        self.evaluated |= evaluated


class RunNoise:
    """The first draw of a chunk is its part of ComfyUI's noise; later ones come from another source.

    A chunk whose seed is steered, or else one of the schedule's `seeds`, has all its noise from that.
    """

    def __init__(
        self, x_BTCHW: Tensor, later: NoiseSource, steering: Steering | None, seeds: Mapping[int, int]
    ) -> None:
        self.x_BTCHW, self.later, self.steering, self.seeds = x_BTCHW, later, steering, seeds

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Return noise [B, T, C, H, W] of this shape for one step of a chunk."""
        seed = None if self.steering is None else self.steering.seed_at(start_frame)
        seed = seed_at(self.seeds, start_frame) if seed is None else seed
        if seed is not None:
            return SeededNoise(seed).draw(start_frame, step, shape).to(self.x_BTCHW)
        if step == 0:  # so that any NOISE node of the graph decides how a chunk begins
            return self.x_BTCHW[:, start_frame : start_frame + shape[1]]
        return self.later.draw(start_frame, step, shape)


class SeededGraphNoise:
    """NOISE of the graph that is, chunk by chunk, what the command line draws for this seed."""

    def __init__(self, seed: int, lengths: tuple[int, ...]) -> None:
        self.seed, self.lengths = seed, lengths

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Return noise [B, C, T, H, W] in the shape of a LATENT, as the graph's samplers ask for it."""
        batch, channels, _, height, width = latent["samples"].shape
        source, start, parts = SeededNoise(self.seed), 0, []
        for length in self.lengths:
            parts.append(source.draw(start, 0, (batch, length, channels, height, width)))
            start += length
        return rearrange(torch.cat(parts, 1), "b t c h w -> b c t h w").contiguous()


@contextmanager
def memory_explained(network: CachedNetwork, causal: CausalConfig, shape: LatentShape, batch: int) -> Iterator[None]:
    """Say what would help, and by how much, where memory runs out; whoever holds the caches lets go of them."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        # ComfyUI's own tip for this error is a smaller batch, which is of one video as a rule.
        raise ValueError(_remedies(network, causal, shape, batch)) from error


def _remedies(network: CachedNetwork, causal: CausalConfig, shape: LatentShape, batch: int) -> str:
    frames, _, height, width = shape
    config, count = network.config, network.num_caches
    capacity = causal.cache_frames(frames)
    small = min(capacity, causal.sink + 2 * causal.chunk)  # the least with a past: sink, one chunk before, this one

    def size(capacity: int, dtype: torch.dtype) -> int:
        tokens = tokens_per_frame(height, width)
        return count * KVCache.num_bytes(config, batch=batch, tokens_per_frame=tokens, capacity=capacity, dtype=dtype)

    ring_bytes = size(capacity, network.cache_dtype)
    saved_by_window = ring_bytes - size(small, network.cache_dtype)
    saved_by_dtype = ring_bytes - size(capacity, torch.float8_e4m3fn)
    policy_bytes = count * remembered_bytes(config, causal, shape, batch=batch, cache_dtype=network.cache_dtype)
    cache_bytes = ring_bytes + policy_bytes
    remembered = f", {policy_bytes} of them what policy {causal.policy} remembers" if policy_bytes else ""
    return (
        f"out of memory while generating; the KV cache alone takes {cache_bytes} bytes{remembered}. In Cache Options "
        f"(Self Forcing): window {small} saves {saved_by_window} bytes, cache_dtype float8_e4m3fn {saved_by_dtype}, "
        f"cache_device cpu {cache_bytes}; "
        "a smaller width and height save in proportion"
    )
