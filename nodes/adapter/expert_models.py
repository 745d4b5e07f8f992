"""Two MODELs in place of one, for high and for low noise: how they hang together, and how a rollout asks them in turn.

The one for low noise travels with the other as an attachment. ComfyUI loads it when it is asked, and sends the other
away where both do not fit.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers

from ...selfforcing_core.conditioning import Conditioning
from ...selfforcing_core.config import CausalConfig, StepConfig
from ...selfforcing_core.experts import HIGH, LOW, Experts, boundary_behind, check_boundary, check_pair
from ...selfforcing_core.kv_cache import KVCache
from .causal_model import with_settings
from .guided_network import GuidedNetwork, LatentShape
from .model_settings import LOW_NOISE, Settings, low_noise_of, settings_of
from .shared_network import config_of


def with_low_noise(high: Any, low: Any, *, boundary: float, boundary_step: int) -> Any:
    """Return a clone of the MODEL for high noise that brings the one for low noise along.

    boundary: share of noise from which on the first is asked; boundary_step: or how many of the steps are its own. With
    both 0 the file says it. Raises ValueError for MODELs that are no pair, or where nothing says what divides them.
    """
    settings = settings_of(high)
    check_pair(*(config_of(patcher.model.diffusion_model) for patcher in (high, low)))
    if boundary and boundary_step:
        raise ValueError("boundary and boundary_step both say which model is asked when; leave one of them at 0")
    if boundary or boundary_step:
        steps = replace(settings.steps, boundary=boundary or None)
        settings = replace(settings, steps=steps, boundary_step=boundary_step)
    check_pair_is_whole(settings, has_low_noise=True)
    # The settings of one, since both make the same video; LoRA and all else stay those of each.
    clone = with_settings(high, settings)
    clone.set_attachments(LOW_NOISE, with_settings(low, settings))
    return clone


def check_pair_is_whole(settings: Settings, *, has_low_noise: bool) -> None:
    """Raise ValueError where nothing says which of two MODELs is asked when, and for one of two without the other."""
    is_divided = settings.steps.boundary is not None or settings.boundary_step > 0
    if is_divided and not has_low_noise:
        raise ValueError(
            "this model is one of two, for high noise, as its file or its preset says; load the one for low noise as "
            "well and join both with Two Experts (Self Forcing)"
        )
    if has_low_noise and not is_divided:
        raise ValueError(
            "nothing says from which noise on the high-noise model is asked; set boundary in Two Experts (Self "
            "Forcing), for Wan 2.2's own A14B 0.875 (text to video) or 0.9 (image to video), or boundary_step, and put "
            "that node behind those that set how the model is sampled"
        )


def divided(settings: Settings, steps: StepConfig) -> StepConfig:
    """Return the steps of a run with the boundary. Raises ValueError where one MODEL is left without a step."""
    boundary_step = settings.boundary_step
    steps = replace(steps, boundary=boundary_behind(steps, boundary_step) if boundary_step else settings.steps.boundary)
    check_boundary(steps)
    return steps


def each_guider(guider: Any, extra_args: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the guider with what ComfyUI gives a sampler function; of two MODELs, then the same of the second."""
    low = low_noise_of(guider.model_patcher)
    if low is None:
        return [(guider, extra_args)]
    # As CFGGuider.sample makes a MODEL's options ready. The prompts stay those that were prepared for the other MODEL:
    # what ComfyUI makes of them depends on the kind and the sizes of a network, which are the same.
    options = comfy.model_patcher.create_model_options_clone(low.model_options)
    transformer_options = options.setdefault("transformer_options", {})
    given = extra_args.get("model_options", {}).get("transformer_options", {})
    transformer_options |= {name: given[name] for name in ("sample_sigmas",) if name in given}
    comfy.sampler_helpers.prepare_model_patcher(low, guider.conds, options)
    second = copy.copy(guider)  # shares the dictionary of prompts, so that a change holds for both
    second.model_patcher, second.inner_model, second.model_options = low, low.model, options
    return [(guider, extra_args), (second, {**extra_args, "model_options": options})]


class GuidedExperts(Experts):
    """Two GuidedNetworks as the pair that `rollout` asks, with what a single one offers its user."""

    def __init__(self, high: GuidedNetwork, low: GuidedNetwork, boundary: float) -> None:
        super().__init__(high, low, boundary)
        self.at_hand = HIGH  # ComfyUI loads the guider's own MODEL before it calls a sampler
        low.guider.model_patcher.pre_run()  # as CFGGuider does for the MODEL that it knows

    @property
    def guider(self) -> Any:
        return self.networks[HIGH].guider

    @property
    def conditioning(self) -> Conditioning:
        return self.networks[HIGH].conditioning

    @property
    def cache_dtype(self) -> Any:
        return self.networks[HIGH].cache_dtype

    @property
    def settings(self) -> Settings:
        return self.networks[HIGH].settings

    @property
    def num_caches(self) -> int:
        return sum(network.num_caches for network in self.networks)

    def allocate(self, shape: LatentShape, causal: CausalConfig) -> list[KVCache]:
        """Make the caches of both, first those of the one for high noise."""
        return [cache for network in self.networks for cache in network.allocate(shape, causal)]

    def renew(self) -> Conditioning:
        """Take the guider's prompts anew, for both."""
        self.networks[LOW].renew()
        return self.networks[HIGH].renew()

    def kept_loaded(self) -> AbstractContextManager[None]:
        """Keep the MODEL at hand loaded over work that may bring in other networks of ComfyUI."""
        return self.networks[HIGH if self.at_hand is None else self.at_hand].kept_loaded()

    def release(self) -> None:
        """Let go of the caches, and of what sampling has set on the MODEL for low noise."""
        for network in self.networks:
            network.release()
        self.networks[LOW].guider.model_patcher.cleanup()

    def network(self, index: int) -> GuidedNetwork:
        """Return one of the two, after ComfyUI has loaded its MODEL where the other one was asked before."""
        if self.at_hand != index:
            # what came with the guider's MODEL stays: without it, loading this one might send the decoder away
            self.networks[index].load(beside=self.networks[HIGH].companions)
        return super().network(index)
