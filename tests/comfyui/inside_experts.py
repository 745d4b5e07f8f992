"""Two MODELs in turn in ComfyUI's sampling, against the core's rollout of the same pair. Run by inside_checks.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import comfy.sd
import torch
from inside import (
    CHANNELS,
    CHUNKS,
    FOLDER,
    FRAMES,
    HEIGHT,
    STEPS,
    WIDTH,
    CausalConfig,
    apart,
    causal_model,
    chunk_sampler,
    core,
    core_rollout,
    loaded,
    model_settings,
    network,
    once,
    part,
    sampled,
    saved,
    text,
)
from inside_runs import Hand

BOUNDARY = 0.9  # of 1000, 937.5, 833.3, 625: two steps each


def two_networks(**more: Any) -> tuple[Any, Any]:
    """Return two random networks of one size."""
    high, low = network(**more), network(**more)
    generator = torch.Generator().manual_seed(9)
    for parameter in low.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator) * parameter.std())
    return high, low


def joined(high: Any, low: Any, *, boundary: float = BOUNDARY, boundary_step: int = 0) -> Any:
    return part("expert_models").with_low_noise(high, low, boundary=boundary, boundary_step=boundary_step)


def experts(high: Any, low: Any) -> Any:
    return core["experts"].Experts(high, low, BOUNDARY)


def two_models_give_the_cores_video() -> dict[str, float]:
    """In chunks, with guidance, a window, all at once, phased, and of two loaders."""
    nets = two_networks()
    high, low = loaded(saved("high", nets[0])), loaded(saved("low", nets[1]))
    pair, both = joined(high, low), experts(*nets)
    window = CausalConfig(chunk=1, window=3, sink=1, context_noise=100.0)
    phased = replace(STEPS, solver="phased", boundary=BOUNDARY)
    whole = model_settings.Settings("few-step bidirectional", CHUNKS, STEPS)
    state = {name: value.clone() for name, value in nets[1].state_dict().items()}
    foreign = comfy.sd.load_diffusion_model_state_dict(state)

    def settled(settings: Any, low: Any = low) -> Any:
        return joined(causal_model.with_settings(high, settings), low)

    # ComfyUI's own pass attends to as many rows of text as it is given, ours to 512.
    rows = core["conditioning"].Conditioning(text(1, 512))
    at_once = core["rollout"].rollout(
        core["guided"].Guided(both, rows),
        noise=core["noise"].SeededNoise(5),
        latent_shape=(FRAMES, CHANNELS, HEIGHT, WIDTH),
        causal=CausalConfig(chunk=FRAMES),
        steps=STEPS,
    )
    return {
        "plain": apart(sampled(pair), core_rollout(both)),
        "step": apart(sampled(joined(high, low, boundary=0, boundary_step=2)), core_rollout(both)),
        "cfg": apart(sampled(pair, cfg=3.0), core_rollout(both, guidance=3.0)),
        "cfg_split": apart(sampled(pair, cfg=3.0, rows=9), core_rollout(both, guidance=3.0, rows=9)),
        "window": apart(
            sampled(settled(model_settings.Settings("causal", window, STEPS)), chunk=1),
            core_rollout(both, causal=window),
        ),
        "phased": apart(
            sampled(settled(model_settings.Settings("causal", CHUNKS, phased))), core_rollout(both, steps=phased)
        ),
        "whole": apart(sampled(settled(whole), rows=512, chunk=FRAMES, is_whole=True), next(at_once).latents_BTCHW),
        "loaders": apart(
            sampled(settled(model_settings.Settings("causal", CHUNKS, STEPS), foreign)), core_rollout(both)
        ),
        "equal": apart(sampled(joined(high, loaded(saved("high", nets[0])))), sampled(high)),
        "matters": apart(core_rollout(both), core_rollout(nets[0])),
        "solver_matters": apart(core_rollout(both, steps=phased), core_rollout(both)),
    }


def two_models_with_36_channels_read_a_picture() -> dict[str, float]:
    """Wan 2.2 image to video: channels of an image, and no features of it."""
    nets = two_networks(in_dim=36, model_type="i2v", image_features=False)
    pair = joined(*(loaded(saved(name, net)) for name, net in zip(("high", "low"), nets)))
    raw = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH)
    mask[:, :, :1] = 0
    values = {"concat_latent_image": raw.clone(), "concat_mask": mask}
    image = torch.cat([(1 - mask).repeat(1, 4, 1, 1, 1), pair.model.process_latent_in(raw.clone())], 1).transpose(1, 2)
    return {"plain": apart(sampled(pair, values=values), core_rollout(experts(*nets), image_BTCHW=image))}


def a_released_pair_is_joined_by_its_preset() -> dict[str, Any]:
    """LightX2V's Wan 2.2 image to video, both by ComfyUI's own loader, the first with the preset in Patch Model."""
    nets = two_networks(in_dim=36, model_type="i2v", image_features=False)
    states = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    high, low = (comfy.sd.load_diffusion_model_state_dict(state) for state in states)
    patched = part("loader").SelfForcingPatchModel.execute(high, "causal", 3, 5.0, "lightx2v-wan2.2-i2v")[0]
    pair = joined(patched, low, boundary=0.0)
    raw = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH)
    mask[:, :, :1] = 0
    image = torch.cat([(1 - mask).repeat(1, 4, 1, 1, 1), pair.model.process_latent_in(raw.clone())], 1).transpose(1, 2)
    rollout = core["rollout"].rollout(
        core["guided"].Guided(experts(*nets), core["conditioning"].Conditioning(text(1, 512), image)),
        noise=core["noise"].SeededNoise(5),
        latent_shape=(FRAMES, CHANNELS, HEIGHT, WIDTH),
        causal=CausalConfig(chunk=FRAMES),
        steps=replace(STEPS, solver="euler"),
    )
    values = {"concat_latent_image": raw.clone(), "concat_mask": mask}
    video = sampled(pair, rows=512, chunk=FRAMES, is_whole=True, values=values)
    settings = model_settings.settings_of(pair)
    return {
        "difference": apart(video, next(rollout).latents_BTCHW),
        "kind": settings.kind,
        "solver": settings.steps.solver,
        "boundary": settings.steps.boundary,
    }


def two_models_go_on_and_change_their_prompt() -> dict[str, Any]:
    pair = joined(*(loaded(saved(name, net)) for name, net in zip(("high", "low"), two_networks())))
    long = {"samples": torch.zeros(1, CHANNELS, 9, HEIGHT, WIDTH)}
    holder = chunk_sampler.SnapshotHolder()
    whole = sampled(pair, latent=long)
    sampled(pair, keep=holder)
    assert holder.snapshot is not None
    holder.snapshot.save(FOLDER / "experts.safetensors")
    read = chunk_sampler.SnapshotHolder(core["snapshot"].Snapshot.load(FOLDER / "experts.safetensors"))
    try:
        sampled(loaded(saved("high", network())), latent=long, resume=read, cfg=3.0)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    typed = {history: sampled(pair, steering=Hand(1, history)) for history in ("recode", "keep")}
    return {
        "is_same": bool(torch.equal(sampled(pair, latent=long, resume=read), whole)),
        "refusal": refusal,
        "prompt_matters": min(apart(video, whole[:, :FRAMES]) for video in typed.values()),
        "history_matters": apart(typed["recode"], typed["keep"]),
    }


def one_of_two_models_is_loaded_at_a_time() -> dict[str, Any]:
    """Let ComfyUI load nothing beside what is asked for, as where memory is short, and note what it is asked for."""
    high, low = (loaded(saved(name, net)) for name, net in zip(("high", "low"), two_networks()))
    names = {id(high.model): "high", id(low.model): "low"}
    original, asked, state = comfy.model_management.load_models_gpu, [], []

    def short_of_memory(models: Any, **options: Any) -> Any:
        comfy.model_management.unload_all_models()
        asked.append([names[id(model.model)] for model in models])
        result = original(models, **options)
        state.append([names[id(each.model.model)] for each in comfy.model_management.current_loaded_models])
        return result

    pair = joined(high, low)
    plain = sampled(pair)
    comfy.model_management.load_models_gpu = short_of_memory
    try:
        video = sampled(pair)
    finally:
        comfy.model_management.load_models_gpu = original
    return {"asked": asked, "held": state, "is_same": bool(torch.equal(video, plain))}


def two_models_and_their_loras() -> dict[str, float]:
    """Patch each model before they are joined: as the merged weights of each."""
    nets = two_networks()
    patchers, merged = [], []
    for index, (name, net) in enumerate(zip(("high", "low"), nets)):
        patcher = loaded(saved(name, net)).clone()
        key = "blocks.0.ffn.0.weight"
        change = 0.05 * torch.randn(net.get_parameter(key).shape, generator=torch.Generator().manual_seed(index))
        patcher.add_patches({f"diffusion_model.{key}": ("diff", (change,))}, 1.0)
        patchers.append(patcher)
        net.get_parameter(key).data.add_(change)
        merged.append(net)
    return {"merged": apart(sampled(joined(*patchers)), core_rollout(experts(*merged)))}


def what_does_not_go_with_two_models_is_refused() -> dict[str, str]:
    high, low = (loaded(saved(name, net)) for name, net in zip(("high", "low"), two_networks()))
    deeper = core["model"].CausalWan(replace(network().config, num_layers=3))
    pair = joined(high, low)
    patch = part("loader").SelfForcingPatchModel.execute(pair, "causal", 3, 5.0)[0]
    cache = causal_model.with_settings(
        pair, replace(model_settings.settings_of(pair), causal=CausalConfig(3, cache_source="last_step"))
    )
    euler = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler)
    attempts = {
        "sizes": lambda: joined(high, loaded(saved("deeper", deeper))),
        "no_boundary": lambda: joined(high, low, boundary=0.0),
        "both": lambda: joined(high, low, boundary=0.9, boundary_step=2),
        "one_side": lambda: sampled(joined(high, low, boundary=0.1)),
        "step_behind": lambda: sampled(joined(high, low, boundary=0, boundary_step=4)),
        "samplers_of_others": lambda: once(pair, euler),
        "patched_behind": lambda: sampled(patch),
        "last_step": lambda: sampled(cache),
        "alone": lambda: sampled(causal_model.with_settings(high, model_settings.settings_of(pair))),
    }
    refusals = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            refusals[name] = ""
        except ValueError as error:
            refusals[name] = str(error)
    return refusals
