"""The network as a rollout calls it: guided, and with a cache for each conditioning.

Letters: B batch, T latent frames, C latent channels, H W latent size, P text tokens, E text width, I image tokens,
Y image-feature width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .conditioning import Conditioning
from .config import CausalConfig
from .experts import Experts, check_cache_source
from .kv_cache import KVCache
from .policy import SELF_FORCING, cache_policy


def new_caches(
    model: Any,
    conditioning: Conditioning,
    count: int,
    latent_shape: tuple[int, int, int, int],
    causal: CausalConfig,
) -> list[KVCache]:
    """Return empty caches for a rollout of this size: one for the prompt, and with guidance one more (count 2).

    Of two experts each has so many, first those of the high-noise network.
    """
    # a cache for each, since keys and values of a chunk depend on what the network was told about it
    embeds, (num_frames, _, height, width) = conditioning.prompt_embeds_BPE, latent_shape
    # a window as long as the video never evicts, and then nothing has to be kept from eviction
    policy = cache_policy(causal.policy)
    evicts = -1 < causal.window < num_frames
    capacity, sink = causal.cache_frames(num_frames), causal.sink if evicts else 0
    if not evicts and policy != SELF_FORCING:
        sink = min(causal.sink, num_frames - 1)  # a change of the prompt may take the rest away
        policy = replace(policy, bank=0, refresh_below=None)  # nothing has to be chosen where nothing leaves
    caches = [
        network.new_cache(
            batch=embeds.shape[0], latent_height=height, latent_width=width, capacity=capacity, sink=sink, like=embeds
        )
        for network in _networks(model)
        for _ in range(count)
    ]
    rows, columns = height // model.config.patch_size[1], width // model.config.patch_size[2]
    for cache in caches:
        cache.follow(policy, (rows, columns))
        cache.keeps_all = not evicts and not policy.recomputes
    return caches


def _networks(model: Any) -> tuple[Any, ...]:
    return model.networks if isinstance(model, Experts) else (model,)


class Guided:
    """A network with all that a pass of it needs beside the chunk: conditioning, guidance, a cache for each.

    model: called as `CausalWan.forward`, or Experts, of which each pass asks one. negative, guidance: classifier-free
    guidance, negative + guidance * (positive - negative), each with a cache of its own; 1 leaves the negative out.
    caches: from `new_caches`, to use again; a rollout resets them, and makes its own where there are none.
    encode_first: where there is an autoencoder, called with the number of a finished latent frame; returns its last
    picture encoded as the first one of a video, [B or 1, 1, C, H, W]. Policies ask it that compute their window again.
    """

    def __init__(
        self,
        model: Any,
        conditioning: Conditioning,
        *,
        negative: Conditioning | None = None,
        guidance: float = 1.0,
        caches: Sequence[KVCache] | None = None,
        encode_first: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.model, self.guidance, self.encode_first = model, guidance, encode_first
        self.conditionings = [conditioning] if negative is None or guidance == 1 else [conditioning, negative]
        count = len(self.conditionings) * self.num_networks
        self.caches: list[KVCache | None] = [None] * count if caches is None else list(caches)

    @property
    def num_networks(self) -> int:
        return len(_networks(self.model))

    @property
    def device(self) -> torch.device:
        return self.conditionings[0].prompt_embeds_BPE.device

    @property
    def batch(self) -> int:
        return self.conditionings[0].prompt_embeds_BPE.shape[0]

    def check(self, latent_shape: tuple[int, int, int, int]) -> None:
        """Raise ValueError if a conditioning does not fit the network or the video (T, C, H, W)."""
        for conditioning in self.conditionings:
            conditioning.check(self.model.config, latent_shape)

    def opened(self, latent_shape: tuple[int, int, int, int], causal: CausalConfig, *, is_cached: bool) -> Guided:
        """Return the same for one rollout: its caches are empty, and a change of its prompt stays its own.

        is_cached: whether to make caches where none were given. Raises ValueError for settings that two experts do not
        go with.
        """
        if self.num_networks > 1:
            check_cache_source(causal)
        opened = copy.copy(self)
        # a list of its own, since prompts may change on the way, and the caller's rollouts start with theirs
        opened.conditionings = list(self.conditionings)
        if is_cached and self.caches[0] is None:
            opened.caches = list(
                new_caches(self.model, self.conditionings[0], len(self.conditionings), latent_shape, causal)
            )
        for cache in opened.caches:
            if cache is not None:
                cache.reset()
        return opened

    def flow(self, x_BTCHW: Tensor, timestep: float, start_frame: int, *, with_gradient: bool) -> Tensor:
        """Return the predicted flow, guided if there is a negative conditioning."""
        # the one place that decides: a pass that carries gradient writes nothing, any other writes as it goes
        with torch.set_grad_enabled(with_gradient):
            index = self.model.index_at(timestep) if isinstance(self.model, Experts) else 0
            timesteps = _timesteps(x_BTCHW, timestep)
            return self._guided(self._evaluate(index, x_BTCHW, timesteps, start_frame, writes=not with_gradient))

    def joint_flow(self, chunks: Sequence[tuple[Tensor, float]], start_frame: int) -> Tensor:
        """Return the flow of chunks [B, T, C, H, W] that follow each other, each at a timestep of its own, in one pass.

        They see each other and the caches, into which nothing is written.
        """
        assert self.num_networks == 1, "one of two networks would be asked for all of these timesteps"
        with torch.no_grad():
            timesteps = torch.cat([_timesteps(*chunk) for chunk in chunks], 1)
            x_BTCHW = torch.cat([x for x, _ in chunks], 1)
            return self._guided(self._evaluate(0, x_BTCHW, timesteps, start_frame, writes=False))

    def _guided(self, flows: list[Tensor]) -> Tensor:
        # classifier-free guidance (arXiv 2207.12598), in the usual meaning: at 1 the prompt alone is left
        return flows[0] if len(flows) == 1 else flows[1] + self.guidance * (flows[0] - flows[1])

    def commit(self, x_BTCHW: Tensor, timestep: float, start_frame: int) -> None:
        """Write a finished chunk into every cache."""
        with torch.no_grad():
            # of two experts each reads the past by its own keys and values, whichever of them made the chunk
            for index in self.model.in_turn() if isinstance(self.model, Experts) else (0,):
                self._evaluate(index, x_BTCHW, _timesteps(x_BTCHW, timestep), start_frame, writes=True)

    def change_prompt(self, conditioning: Conditioning) -> None:
        """Follow another prompt from the next pass on; what was kept of the former one's text is dropped."""
        self.conditionings[0] = conditioning  # the negative one stays
        for cache in self.caches:
            if cache is not None:
                cache.cross = {}

    def _evaluate(
        self, index: int, x_BTCHW: Tensor, timesteps_BT: Tensor, start_frame: int, *, writes: bool
    ) -> list[Tensor]:
        """Return the flow under each conditioning, by one of the networks."""
        network = self.model.network(index) if isinstance(self.model, Experts) else self.model
        count = len(self.conditionings)
        caches = self.caches[index * count : (index + 1) * count]
        flows = []
        for conditioning, cache in zip(self.conditionings, caches):
            image = conditioning.frames(start_frame, x_BTCHW.shape[1])
            images = {} if image is None else {"image_BTCHW": image, "clip_BIY": conditioning.clip_BIY}
            flow = network(
                x_BTCHW,
                timesteps_BT,
                conditioning.prompt_embeds_BPE,
                cache=cache,
                start_frame=start_frame,
                writes=writes,
                **images,
            )
            # the sampler's own arithmetic is float32, whatever the network computes in
            flows.append(flow.to(x_BTCHW.dtype))
        return flows


def _timesteps(x_BTCHW: Tensor, timestep: float) -> Tensor:
    # one for each frame, since the network may be shown frames of different noise levels (Diffusion Forcing)
    return torch.full(x_BTCHW.shape[:2], timestep, dtype=torch.float32, device=x_BTCHW.device)
