"""What other nodes set on a model's forward pass: followed chunk by chunk, or refused. Run by inside_checks.py."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.ldm.wan.model
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from inside import (
    CHANNELS,
    CHUNKS,
    FRAMES,
    HEIGHT,
    SEVERAL,
    SIZES,
    STEPS,
    WIDTH,
    CausalConfig,
    apart,
    causal_model,
    chunk_sampler,
    core_rollout,
    loaded,
    model_settings,
    network,
    once,
    sampled,
    saved,
)

TELLS_BLOCK = "block_index" in inspect.getsource(comfy.ldm.wan.model.WanModel)  # as newer versions do


def by_block(func: Any, *args: Any, **options: Any) -> Any:
    """Attend in another way, which looks at all that ComfyUI tells of where it stands."""
    layer_options = options["transformer_options"]
    # Patches tell prompts apart by these; one for each row of the batch, in ComfyUI's pass as in ours.
    assert len(layer_options["cond_or_uncond"]) == args[0].shape[0]
    if not TELLS_BLOCK:
        return func(*args, **options) * 1.5
    assert layer_options["total_blocks"] == SIZES["num_layers"]
    assert tuple(layer_options["grid_sizes"]) in ((FRAMES, HEIGHT // 2, WIDTH // 2), (3, HEIGHT // 2, WIDTH // 2))
    return func(*args, **options) * (1.5 + layer_options["block_index"])


def with_override(patcher: Any) -> Any:
    clone = patcher.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = by_block
    return clone


def with_rope(patcher: Any) -> Any:
    clone = patcher.clone()
    if not hasattr(clone, "set_model_rope_options"):
        return None
    clone.set_model_rope_options(scale_x=2.0, shift_x=1.0, scale_y=0.5, shift_y=0.0, scale_t=1.5, shift_t=3.0)
    return clone


def what_is_set_on_the_forward_pass_is_followed() -> dict[str, Any]:
    """Compare all frames as one chunk with ComfyUI's own pass, RoPE in chunks with the core's, attention from int8."""
    net = network()
    causal, whole = loaded(saved("t2v", net)), loaded(saved("whole", net, causal=None), kind="base")
    at_once = chunk_sampler.ChunkSampler(chunk_sampler.Run(causal=CausalConfig(chunk=FRAMES)))
    results: dict[str, Any] = {"plain": apart(once(causal, at_once), once(whole))}
    for name, with_patch in (("attention", with_override), ("rope", with_rope)):
        if with_patch(causal) is None:
            continue  # ComfyUI has no such option
        results[name] = apart(once(with_patch(causal), at_once), once(with_patch(whole)))
        results[f"{name}_matters"] = apart(once(with_patch(whole)), once(whole))
    if with_rope(causal) is not None:
        net.axes = ((1.5, 3.0), (0.5, 0.0), (2.0, 1.0))
        results["rope_in_chunks"] = apart(sampled(with_rope(causal)), core_rollout(net))
    narrow = causal_model.with_settings(
        causal, model_settings.Settings("causal", CHUNKS, STEPS, cache_dtype=torch.int8)
    )
    exact = sampled(with_override(causal))
    results["attention_from_int8"] = float((sampled(with_override(narrow)) - exact).abs().mean() / exact.std())
    compiled_one = with_override(causal)
    set_torch_compile_wrapper(compiled_one, backend="eager")
    results["attention_compiled"] = apart(sampled(compiled_one), exact)
    return results


def guided_to(module: Any) -> Any:
    """Return another forward of a cross-attention, which leads away from a text of its own, as NAG does."""
    # Four tokens of one value: any text that is not the prompt's will do.
    away = module.norm_k.weight.new_ones(1, 4, module.q.in_features) * 0.1
    own = type(module).forward

    def forward(self: Any, x: Any, context: Any, *args: Any, **options: Any) -> Any:
        assert context.shape[0] == 1
        assert x.shape[1] in (FRAMES * HEIGHT * WIDTH // 4, 3 * HEIGHT * WIDTH // 4), "rows of all frames"
        assert not TELLS_BLOCK or options["transformer_options"]["block_index"] in range(SIZES["num_layers"])
        attended = own(self, x, context, *args, **options)
        return (
            attended * 4
            - own(self, x, torch.cat([context[:, : context.shape[1] - 512], away], 1), *args, **options) * 3
        )

    return types.MethodType(forward, module)


def in_parts(module: Any) -> Any:
    """Return another forward of a feed-forward network: half of a row at a time, and half as much of it."""

    def forward(self: Any, x: Any) -> Any:
        return torch.cat([torch.nn.Sequential.forward(self, part) for part in x.chunk(2, 1)], 1) * 0.5

    return types.MethodType(forward, module)


def with_blocks(patcher: Any, name: str, make: Callable[[Any], Any]) -> Any:
    clone = patcher.clone()
    for index, block in enumerate(patcher.model.diffusion_model.blocks):
        clone.add_object_patch(f"diffusion_model.blocks.{index}.{name}.forward", make(getattr(block, name)))
    return clone


def with_fading_prompt(patcher: Any) -> Any:
    """Wrap the network so that it is given another text at every noise level."""

    def wrapper(executor: Any, x: Any, timestep: Any, context: Any, *args: Any, **options: Any) -> Any:
        return executor(x, timestep, context * (timestep[:, None, None] / 1000), *args, **options)

    clone = patcher.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "fading", wrapper)
    return clone


def modules_and_prompts_of_others_are_followed() -> dict[str, float]:
    """Replace cross-attention and feed-forward networks, and change texts: as one chunk it is ComfyUI's own pass."""
    text_net, image_net = network(), network(in_dim=36, model_type="i2v")
    euler = replace(STEPS, solver="euler")
    at_once = chunk_sampler.ChunkSampler(chunk_sampler.Run(causal=CausalConfig(chunk=FRAMES)))
    generator = torch.Generator().manual_seed(3)

    class Seen:
        penultimate_hidden_states = torch.randn(1, 257, 1280, generator=generator)

    values = {
        "concat_latent_image": torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator),
        "concat_mask": torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH),
        "clip_vision_output": Seen(),
    }
    ways = {
        "cross": lambda patcher: with_blocks(patcher, "cross_attn", guided_to),
        "feed": lambda patcher: with_blocks(patcher, "ffn", in_parts),
        "prompt": with_fading_prompt,
    }
    results: dict[str, float] = {}
    for kind, net, inputs in (("t2v", text_net, {}), ("i2v", image_net, values)):
        whole = loaded(saved(f"{kind} whole", net, causal=None), kind="base")
        causal = loaded(saved(kind, net))
        causal = causal_model.with_settings(causal, model_settings.Settings("causal", CHUNKS, euler))
        options: dict[str, Any] = {"values": inputs, "cfg": 1.0, "sigmas": SEVERAL}
        plain = once(whole, **options)
        results[f"{kind}_plain"] = apart(once(causal, at_once, **options), plain)
        for name, change in ways.items():
            native = once(change(whole), **options)
            results[f"{kind}_{name}"] = apart(once(change(causal), at_once, **options), native)
            results[f"{kind}_{name}_matters"] = min(
                apart(native, plain), apart(sampled(change(causal), values=inputs), sampled(causal, values=inputs))
            )
    compiled_one = ways["cross"](causal)
    set_torch_compile_wrapper(compiled_one, backend="eager")
    results["compiled"] = apart(sampled(compiled_one, values=values), sampled(ways["cross"](causal), values=values))
    return results


def what_cannot_be_followed_is_refused() -> dict[str, str]:
    """Return the sentence with which each is refused, "" if it is not; and that the MODEL runs as before without it."""
    patcher = loaded(saved("t2v", network()))
    before, blocks = sampled(patcher), patcher.model.diffusion_model.blocks

    def refusal(change: Callable[[Any], Any], **options: Any) -> str:
        clone = patcher.clone()
        change(clone)
        try:
            sampled(clone, **options)
        except ValueError as error:
            return str(error)
        return ""

    def method(name: str, module: Any) -> Callable[[Any], Any]:
        own = getattr(type(module), name.rpartition(".")[2])
        other = types.MethodType(lambda self, *args, **options: own(self, *args, **options), module)
        return lambda clone: clone.add_object_patch(f"diffusion_model.{name}", other)

    def in_a_step(clone: Any) -> None:
        def post_cfg(args: dict[str, Any]) -> Any:
            replaced = comfy.model_patcher.set_model_options_patch_replace(
                args["model_options"].copy(), lambda args, extra: args, "dit", "double_block", 0
            )
            comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], replaced)
            return args["denoised"]

        clone.set_model_sampler_post_cfg_function(post_cfg)

    def skipping(every: int) -> Callable[[Any], Any]:
        calls: list[int] = []

        def wrapper(executor: Any, x: Any, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return executor(x, *args, **options) if len(calls) % every else torch.zeros_like(x)

        return lambda clone: clone.add_wrapper_with_key(diffusion_model, "another", wrapper)

    diffusion_model = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL

    def skipping_around(kind: str) -> Callable[[Any], Any]:
        """Add a wrapper of another kind that returns what it likes for every third evaluation."""
        calls: list[int] = []

        def wrapper(executor: Any, x: Any, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return executor(x, *args, **options) if len(calls) % 3 else torch.zeros_like(x)

        return lambda clone: clone.add_wrapper_with_key(kind, "another", wrapper)

    def skipping_function(clone: Any) -> None:
        calls: list[int] = []

        def function(apply: Any, args: dict[str, Any]) -> Any:
            calls.append(1)
            tensors = args["input"], args["timestep"]
            return apply(*tensors, **args["c"]) if len(calls) % 3 else torch.zeros_like(args["input"])

        clone.set_model_unet_function_wrapper(function)

    def twice(clone: Any) -> None:
        def wrapper(executor: Any, x: Any, *args: Any, **options: Any) -> Any:
            return executor(x, *args, **options) - executor(x * 0.5, *args, **options)

        clone.add_wrapper_with_key(diffusion_model, "another", wrapper)

    def longer(clone: Any) -> None:
        def wrapper(executor: Any, x: Any, *args: Any, **options: Any) -> Any:
            return executor(torch.cat([x, x], 2), *args, **options)[:, :, : x.shape[2]]

        clone.add_wrapper_with_key(diffusion_model, "another", wrapper)

    def another_prompt(clone: Any) -> None:
        def post_cfg(args: dict[str, Any]) -> Any:
            conds = [[{**cond, "uuid": "another"} for cond in args["cond"]]]
            comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])
            return args["denoised"]

        clone.set_model_sampler_post_cfg_function(post_cfg)

    def other_sampling(kind: Any) -> Any:
        class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, kind):
            pass

        return Sampling(patcher.model.model_config)

    def put(key: str, value: Any) -> Callable[[Any], Any]:
        return lambda clone: clone.model_options.__setitem__(key, value)

    refusals = {
        "block": refusal(lambda clone: clone.set_model_patch_replace(lambda a, e: a, "dit", "double_block", 1)),
        "block in a step": refusal(in_a_step),
        "attn1": refusal(lambda clone: clone.set_model_patch(lambda args: args["x"], "attn1_patch")),
        "unknown": refusal(lambda clone: clone.set_model_patch(lambda args: args["x"], "a_new_one")),
        "without effect": refusal(lambda clone: clone.set_model_patch(lambda x, extra: x * 2, "attn1_output_patch")),
        "cross": refusal(method("blocks.0.cross_attn.forward", blocks[0].cross_attn), cfg=3.0),
        "cross alone": refusal(method("blocks.0.cross_attn.forward", blocks[0].cross_attn)),
        "self": refusal(method("blocks.0.self_attn.forward", blocks[0].self_attn)),
        "whole": refusal(method("forward_orig", patcher.model.diffusion_model)),
        "rope table": refusal(
            lambda clone: clone.add_object_patch("diffusion_model.rope_embedder", torch.nn.Identity().to("cpu"))
        ),
        "norm": refusal(method("blocks.1.norm1.forward", blocks[1].norm1)),
        "layer": refusal(method("blocks.1.ffn.0.forward", blocks[1].ffn[0])),  # is called, so it is followed
        "skip": refusal(skipping(3)),
        "skip the cache": refusal(skipping(5)),  # the last of a chunk's passes
        "skip around": refusal(skipping_around(comfy.patcher_extension.WrappersMP.APPLY_MODEL)),
        "skip by function": refusal(skipping_function),
        "twice": refusal(twice),
        "longer": refusal(longer),
        "another prompt": refusal(another_prompt),
        "noise": refusal(
            lambda clone: clone.add_object_patch("model_sampling", other_sampling(comfy.model_sampling.EPS))
        ),
        "devices": refusal(put("multigpu_clones", {"cuda:0": None, "cuda:1": None})),
        "easycache": refusal(
            lambda clone: clone.add_wrapper_with_key(diffusion_model, "easycache", lambda call, *a: call(*a))
        ),
        "context windows": refusal(put("context_handler", object())),
        "rope": refusal(put("transformer_options", {"rope_options": {"scale_z": 2.0}})),
        "joined frames": refusal(lambda clone: None, values={"time_dim_concat": torch.zeros(1, 16, 1, HEIGHT, WIDTH)}),
    }
    hook = blocks[0].self_attn.register_forward_hook(lambda *args: None)
    refusals["hook"] = refusal(lambda clone: None)
    hook.remove()
    refusals["afterwards"] = "same" if torch.equal(sampled(patcher), before) else "other"
    return refusals
