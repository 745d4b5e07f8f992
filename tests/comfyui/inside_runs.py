"""What a run holds in memory, gives back and goes on from. Run by inside_checks.py."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    SIZES,
    STEPS,
    WIDTH,
    CausalConfig,
    apart,
    causal_model,
    causal_pass,
    chunk_sampler,
    core,
    guided_network,
    host,
    loaded,
    loader,
    model_settings,
    network,
    part,
    sampled,
    saved,
    text,
)


def memory_estimate() -> dict[str, Any]:
    """Return the bytes that ComfyUI is told to keep free, and what it says itself of one chunk and of all frames."""
    patcher = loaded(saved("t2v", network()))
    long = {"samples": torch.zeros(1, CHANNELS, 12, HEIGHT, WIDTH)}
    bytes_asked = []

    def settings(**options: Any) -> Any:
        return causal_model.with_settings(patcher, model_settings.Settings("causal", CHUNKS, STEPS, **options))

    original = comfy.model_management.load_models_gpu

    def noted(models: Any, memory_required: float = 0, **options: Any) -> Any:
        bytes_asked.append(float(memory_required))
        return original(models, memory_required=memory_required, **options)

    comfy.model_management.load_models_gpu = noted
    try:
        sampled(patcher)
        sampled(patcher, cfg=3.0)
        sampled(patcher, latent=long, causal=CausalConfig(chunk=3, window=6))
        sampled(patcher, latent=long, causal=CausalConfig(chunk=3, window=6, sink=3, policy="infinite"))
        sampled(settings(cache_dtype=torch.bfloat16))
        sampled(settings(cache_device="cpu"))
        sampled(causal_model.with_settings(patcher, model_settings.Settings("unknown", CHUNKS, STEPS)), is_whole=True)
    finally:
        comfy.model_management.load_models_gpu = original
    names = ("one", "two", "long", "moving", "narrow", "elsewhere", "whole")
    return {
        "told": dict(zip(names, bytes_asked, strict=True)),
        "chunk": patcher.memory_required([2, CHANNELS, 3, HEIGHT, WIDTH]),  # ComfyUI counts each prompt twice
        "whole": patcher.memory_required([2, CHANNELS, FRAMES, HEIGHT, WIDTH]),
        "cache": 2 * SIZES["num_layers"] * FRAMES * (HEIGHT // 2) * (WIDTH // 2) * SIZES["dim"] * 4,
        "is_left": "memory_required" in patcher.model.__dict__,
    }


def out_of_memory() -> dict[str, Any]:
    patcher = loaded(saved("t2v", network()))
    before = sampled(patcher)
    alive, update = [], core["kv_cache"].KVCache.update

    def failing(self: Any, *args: Any) -> Any:
        alive.append(weakref.ref(self))
        if self.end_frame > 3:  # in the second chunk, when caches are allocated and in use
            raise torch.OutOfMemoryError("planted")
        return update(self, *args)

    core["kv_cache"].KVCache.update = failing
    try:
        sampled(patcher)
        message = ""
    except ValueError as error:
        message = str(error)
    finally:
        core["kv_cache"].KVCache.update = update
    gc.collect()
    return {
        "message": message,
        "caches_seen": len(alive),
        "caches_alive": sum(reference() is not None for reference in alive),
        "is_same_afterwards": bool(torch.equal(sampled(patcher), before)),
    }


def interrupts(count: int = 50) -> dict[str, int]:
    """Stop at random evaluations; each time the next run is bit-exact what it was before."""
    patcher = loaded(saved("t2v", network()))
    before, draw = sampled(patcher), random.Random(0)
    stopped = same = late = 0
    for _ in range(count):
        at, calls = draw.randrange(9), []
        evaluate = causal_pass.CausalPass.evaluate

        def counted(self: Any, *args: Any, at: int = at, calls: list[int] = calls, evaluate: Any = evaluate) -> Any:
            if len(calls) == at:
                comfy.model_management.interrupt_current_processing(True)
            calls.append(1)
            return evaluate(self, *args)

        causal_pass.CausalPass.evaluate = counted
        try:
            sampled(patcher)
        except comfy.model_management.InterruptProcessingException:
            stopped += 1
        finally:
            causal_pass.CausalPass.evaluate = evaluate
            comfy.model_management.interrupt_current_processing(False)
        # The evaluation in which it was pressed ends; no other may begin.
        late += len(calls) - at > 1
        same += bool(torch.equal(sampled(patcher), before))
    return {"count": count, "stopped": stopped, "same": same, "late": late}


def states() -> dict[str, Any]:
    """Go on from a state, also from a file, as if it had never been taken; it is never copied on the device."""
    patcher = loaded(saved("t2v", network()))
    long = {"samples": torch.zeros(1, CHANNELS, 9, HEIGHT, WIDTH)}
    whole = sampled(patcher, latent=long)
    holder, copied, moved = chunk_sampler.SnapshotHolder(), [], []
    cache, state = core["kv_cache"].KVCache, core["snapshot"].Snapshot
    snapshot, to = cache.snapshot, state.to
    cache.snapshot = lambda self, device=None: (copied.append(str(device)), snapshot(self, device))[1]
    state.to = lambda self, device: (moved.append(str(device)), to(self, device))[1]
    try:
        sampled(patcher, keep=holder)
        assert holder.snapshot is not None
        holder.snapshot.save(FOLDER / "state.safetensors")
        read = chunk_sampler.SnapshotHolder(state.load(FOLDER / "state.safetensors"))
        moved.clear()
        results = {
            "is_same": bool(torch.equal(sampled(patcher, latent=long, resume=holder), whole)),
            "is_same_from_file": bool(torch.equal(sampled(patcher, latent=long, resume=read), whole)),
        }
    finally:
        cache.snapshot, state.to = snapshot, to
    return {**results, "copied_to": copied, "moved_to": moved}


class Hand:
    """Somebody who types a prompt before the chunk that begins at `at`."""

    def __init__(self, at: int, history: str | None, blend: int = 1) -> None:
        self.at, self.history, self.blend, self.said, self.chunk = at, history, blend, [], -1

    def seed_at(self, start_frame: int) -> None:
        return None

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], Any] | None:
        self.chunk += 1
        if self.chunk != self.at:
            return None
        conditioning = [[text(3), {}]]
        check(conditioning)
        return conditioning, core["prompt_schedule"].Transition(self.history, self.blend)

    def took_prompt(self, start_frame: int, transition: Any) -> None:
        self.took = start_frame, transition

    def say(self, message: str) -> None:
        self.said.append(message)


def a_prompt_typed_into_a_resumed_run() -> dict[str, Any]:
    """Type into a run whose history cannot be written again: it stays as it is, with a word; a schedule is refused."""
    patcher = loaded(saved("t2v", network()))
    # Such a cache holds what noisy frames gave, which cannot be computed again from the clean video.
    last_step = CausalConfig(chunk=3, cache_source="last_step")
    long, holder = {"samples": torch.zeros(1, CHANNELS, 12, HEIGHT, WIDTH)}, chunk_sampler.SnapshotHolder()
    sampled(patcher, keep=holder, causal=last_step)
    hands = {history: Hand(1, history) for history in ("recode", "keep")}
    videos = [sampled(patcher, latent=long, resume=holder, causal=last_step, steering=hand) for hand in hands.values()]
    moment = part("guider_prompts").PromptStart

    def refusal(seconds: float) -> str:
        guider = comfy.samplers.CFGGuider(patcher)
        later = moment(seconds, 16.0, "recode")
        guider.inner_set_conds({"positive": [[text(1), {}], [text(3), {moment.KEY: later}]]})
        guider.set_cfg(1.0)
        run = chunk_sampler.Run(resume=holder, causal=last_step)
        noise = guided_network.SeededGraphNoise(5, (3, 3, 3, 3)).generate_noise(long)
        try:
            guider.sample(
                noise,
                long["samples"],
                chunk_sampler.ChunkSampler(run),
                model_settings.sigmas_of(patcher, 0, 0.0)[0],
                disable_pbar=True,
                seed=5,
            )
        except ValueError as error:
            return str(error)
        return ""

    return {
        "said": {history: hand.said for history, hand in hands.items()},
        "is_kept": bool(torch.equal(*videos)),
        "refused": [refusal(2.2), refusal(0.8)],
    }


def a_prompt_becomes_the_next_over_chunks() -> dict[str, Any]:
    """Blend over three of four chunks by a schedule, by hand and in a run that goes on from the middle of it."""
    net = network()
    patcher, frames = loaded(saved("t2v", net)), 12
    long = {"samples": torch.zeros(1, CHANNELS, frames, HEIGHT, WIDTH)}
    transition = core["prompt_schedule"].Transition("keep", 3)
    starts, first, other = range(0, frames, 3), *(core["conditioning"].Conditioning(text(seed)) for seed in (1, 3))
    blending = core["blending"].Blending(first, starts, core["blending"].blend_conditionings)
    changes = {}
    for start in starts:
        blending.begin(start)
        if start == 3:
            blending.change(other, transition)
        step = blending.step()
        if step is not None:
            changes[start] = core["history"].PromptChange(*step)
    chunks = core["rollout"].rollout(
        core["guided"].Guided(net, first),
        noise=core["noise"].SeededNoise(5),
        latent_shape=(frames, CHANNELS, HEIGHT, WIDTH),
        causal=CausalConfig(chunk=3),
        steps=STEPS,
        prompt_at=changes.get,
    )
    expected = torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)
    moment = part("guider_prompts").PromptStart

    def scheduled(latent: Any, **run: Any) -> Any:
        guider = comfy.samplers.CFGGuider(patcher)
        later = moment(0.8, 16.0, "keep", 3)
        guider.inner_set_conds({"positive": [[text(1), {}], [text(3), {moment.KEY: later}]]})
        guider.set_cfg(1.0)
        noise = guided_network.SeededGraphNoise(5, (3,) * (latent["samples"].shape[2] // 3)).generate_noise(latent)
        raw = guider.sample(
            noise,
            latent["samples"],
            chunk_sampler.ChunkSampler(chunk_sampler.Run(**run)),
            model_settings.sigmas_of(patcher, 0, 0.0)[0],
            disable_pbar=True,
            seed=5,
        )
        return patcher.model.process_latent_in(raw).transpose(1, 2)

    whole, holder, hand = scheduled(long), chunk_sampler.SnapshotHolder(), Hand(1, "keep", 3)
    scheduled({"samples": torch.zeros(1, CHANNELS, 9, HEIGHT, WIDTH)}, keep=holder)
    return {
        "off_core": apart(whole, expected),
        "is_resumed": bool(torch.equal(scheduled(long, resume=holder), whole)),
        "off_by_hand": apart(sampled(patcher, latent=long, steering=hand), whole),
        "took": [hand.took[0], hand.took[1].history, hand.took[1].blend],
    }


def a_network_that_had_to_leave_comes_back() -> dict[str, Any]:
    """Take room for the evaluation of a chunk, however long the video is."""
    patcher = loaded(saved("plain", network()))
    bytes_asked, kept_loaded, load = [], host.kept_loaded, host.load

    def noted(patcher: Any, *, working_bytes: float) -> Any:
        bytes_asked.append(working_bytes)
        return kept_loaded(patcher, working_bytes=working_bytes)

    host.kept_loaded = noted
    try:
        for frames in (6, 12):
            latent = {"samples": torch.zeros(1, CHANNELS, frames, HEIGHT, WIDTH)}
            sampled(patcher, latent=latent, steering=Hand(1, "recode"), working_bytes=1000)
    finally:
        host.kept_loaded = kept_loaded
    comfy.model_management.load_models_gpu([patcher])
    whole, bytes_given = patcher.loaded_size(), []
    host.load = lambda networks, *, working_bytes=0: (bytes_given.append(working_bytes), load(networks))
    try:
        with host.kept_loaded(patcher, working_bytes=bytes_asked[0]):
            comfy.model_management.unload_all_models()
            size_without = patcher.loaded_size()
    finally:
        host.load = load
    return {
        "came_back": [size_without < whole, patcher.loaded_size() == whole],
        "told": [sorted(set(bytes_asked)), bytes_given],
        "needed": patcher.memory_required([1, CHANNELS, 3, HEIGHT, WIDTH]) + 1000,
    }


def a_model_can_be_loaded_again() -> dict[str, Any] | None:
    """Load as ComfyUI does for a copy on another device, with LoRA, settings and wrappers."""
    sys.modules["folder_paths"].add_model_folder_path("diffusion_models", str(FOLDER))
    net = network()
    saved("again", net)
    patcher = loader.load_model("again.safetensors", "float32", "auto", "auto")
    if not hasattr(patcher, "deepclone_multigpu"):
        return None  # an older host, which never asks
    change = torch.randn(net.get_parameter("blocks.0.ffn.0.weight").shape, generator=torch.Generator().manual_seed(1))
    lora = {"diffusion_model.blocks.0.ffn.0.diff": change * 0.02}
    patched = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]
    settings = replace(model_settings.settings_of(patched), cache_dtype=torch.bfloat16)
    patched = causal_model.with_settings(patched, settings)
    expected = sampled(patched)
    copies = {
        "another device": patched.deepclone_multigpu(torch.device("cpu")),
        "deep": patched.clone(True, None, True),
    }
    results: dict[str, Any] = {name: apart(sampled(copy), expected) for name, copy in copies.items()}
    results["own weights"] = all(copy.model is not patched.model for copy in copies.values())
    results["matters"] = apart(expected, sampled(patcher))
    return results
