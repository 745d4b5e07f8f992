"""A video by ComfyUI's guider, against the core's rollout of the same weights. Run by inside_checks.py."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
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
    core,
    core_rollout,
    guided_network,
    host,
    loaded,
    model_file,
    model_settings,
    network,
    part,
    sampled,
    saved,
    shared_network,
    text,
)
from safetensors.torch import save_file

FIRST = {"first_chunk_steps": (1000.0, 750.0, 500.0)}


def the_hosts_model_gives_the_cores_video() -> dict[str, float]:
    """Compare the two with one prompt; with two in one batch; with two that ComfyUI cannot batch; by policies."""
    net = network()
    patcher = loaded(saved("t2v", net))
    # One frame a chunk, a sink, and a past that is written with noise: all that a cache can do otherwise.
    window = CausalConfig(chunk=1, window=3, sink=1, context_noise=100.0)
    windowed = causal_model.with_settings(patcher, model_settings.Settings("causal", window, STEPS))
    # Passes over chunks of different noise, which leave the caches as they are; and passes that write them anew.
    joint, again = (
        CausalConfig(chunk=1, window=5, sink=1, policy="rolling-forcing"),
        CausalConfig(chunk=1, window=3, policy="krea-bias"),
    )
    by_policy: dict[str, float] = {}
    for name, causal in (("joint", joint), ("again", again)):
        each = causal_model.with_settings(patcher, model_settings.Settings("causal", causal, STEPS))
        by_policy[name] = apart(sampled(each, chunk=1), core_rollout(net, causal=causal))
        guided = apart(sampled(each, chunk=1, cfg=3.0), core_rollout(net, causal=causal, guidance=3.0))
        by_policy[f"{name}_cfg"] = guided
    return {
        **by_policy,
        "plain": apart(sampled(patcher), core_rollout(net)),
        "cfg": apart(sampled(patcher, cfg=3.0), core_rollout(net, guidance=3.0)),
        "cfg_split": apart(sampled(patcher, cfg=3.0, rows=9), core_rollout(net, guidance=3.0, rows=9)),
        "window": apart(sampled(windowed, chunk=1), core_rollout(net, causal=window)),
        "cfg_matters": apart(core_rollout(net, guidance=3.0), core_rollout(net)),
    }


def steps_of_the_first_chunk_and_a_last_one_of_0() -> dict[str, Any]:
    """Compare the two, and return SIGMAS for settings of the nodes, the calls that are counted, and a refusal."""
    net, config = network(), core["config"]
    own = config.StepConfig((1000.0, 500.0), first_chunk_steps=(1000.0, 750.0, 500.0))
    zero = config.StepConfig((1000.0, 750.0, 0.0), first_chunk_steps=(1000.0, 0.0))
    shorter = replace(zero, steps=(1000.0, 750.0))
    patcher = loaded(saved("t2v", net))

    def by(steps: Any, kind: str = "causal") -> Any:
        return causal_model.with_settings(patcher, model_settings.Settings(kind, CHUNKS, steps))

    counted: list[int] = []
    progress = part("progress")

    class Counting(progress.CallbackProgress):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            counted.append(args[-1])

        def finish(self) -> None:
            counted.append(self.num_calls)

    chunk_sampler = part("chunk_sampler")
    plain, chunk_sampler.CallbackProgress = chunk_sampler.CallbackProgress, Counting
    long, mask = torch.zeros(1, CHANNELS, 9, HEIGHT, WIDTH), torch.ones(1, 1, 9, HEIGHT, WIDTH)
    mask[:, :, :3] = 0
    holder = chunk_sampler.SnapshotHolder()
    try:
        video = sampled(by(own), keep=holder)
        sampled(by(own), latent={"samples": long}, resume=holder)
        sampled(by(own), latent={"samples": long, "noise_mask": mask})
    finally:
        chunk_sampler.CallbackProgress = plain
    sigmas = model_settings.sigmas_of(by(own), 0, 0.0)
    try:
        sampled(by(zero, "few-step bidirectional"), chunk=FRAMES, is_whole=True)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    cases = {
        "own": (own, {}),
        "raw": (own, {"warp": "as listed"}),
        "counted": (own, {"first_chunk_steps": 4}),
        "same": (own, {"first_chunk_steps": 2}),
        "zero": (zero, {}),
    }
    listed = {name: model_settings.sigmas_of(by(steps), 0, 0.0, **more) for name, (steps, more) in cases.items()}
    return {
        "own": apart(video, core_rollout(net, steps=own)),
        "zero": apart(sampled(by(zero)), core_rollout(net, steps=zero)),
        "zero_cfg": apart(sampled(by(zero), cfg=3.0), core_rollout(net, steps=zero, guidance=3.0)),
        "given": apart(sampled(by(STEPS), first_sigmas=sigmas[1]), core_rollout(net, steps=replace(STEPS, **FIRST))),
        "own_matters": apart(core_rollout(net, steps=own), core_rollout(net, steps=own.of_chunk(1))),
        "zero_matters": apart(core_rollout(net, steps=zero), core_rollout(net, steps=shorter)),
        "counted": counted,
        "refusal": refusal,
        "sigmas": {name: [None if each is None else each.tolist() for each in pair] for name, pair in listed.items()},
    }


def condition_channels_are_sliced_per_chunk() -> dict[str, float]:
    return _with_an_image("wan2.1", image_features=True)


def channels_alone_condition_wan_2_2() -> dict[str, float]:
    """By Load Model and by ComfyUI's own loader, with features beside them that ComfyUI does not read either."""
    return _with_an_image("wan2.2", image_features=False)


def _with_an_image(name: str, *, image_features: bool) -> dict[str, float]:
    net = network(in_dim=36, model_type="i2v", image_features=image_features)
    patcher = loaded(saved(name, net))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    foreign = comfy.sd.load_diffusion_model_state_dict(state)
    patched = part("host").with_shift(
        causal_model.with_settings(foreign, model_settings.Settings("causal", CHUNKS, STEPS)), 5.0
    )
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    mask = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH)
    mask[:, :, :1] = 0
    clip = torch.randn(1, 257, 1280, generator=generator)

    class Seen:
        penultimate_hidden_states = clip

    values = {"concat_latent_image": raw.clone(), "concat_mask": mask, "clip_vision_output": Seen()}
    # As ComfyUI lays the condition out: four channels of the mask, 1 where it is known, then the latents.
    image = torch.cat([(1 - mask).repeat(1, 4, 1, 1, 1), patcher.model.process_latent_in(raw.clone())], 1)
    condition = {"image_BTCHW": image.transpose(1, 2), "clip_BIY": clip if image_features else None}
    other = {**condition, "image_BTCHW": condition["image_BTCHW"].flip(1)}
    return {
        "plain": apart(sampled(patcher, values=values), core_rollout(net, **condition)),
        "cfg": apart(sampled(patcher, cfg=3.0, values=values), core_rollout(net, guidance=3.0, **condition)),
        "patched": apart(sampled(patched, values=values), core_rollout(net, **condition)),
        "order_matters": apart(core_rollout(net, **other), core_rollout(net, **condition)),
    }


def a_model_of_the_hosts_loader_is_patched() -> dict[str, Any]:
    """Load plain weights through ComfyUI's loader with foreign layers, as GGUF and quantised packs put in."""
    net = network()
    calls = []

    class Counting(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return super().forward(*args, **kwargs)

    state = {name: value.clone() for name, value in net.state_dict().items()}
    foreign = comfy.sd.load_diffusion_model_state_dict(state, model_options={"custom_operations": Counting})
    before = {name: id(module) for name, module in foreign.model.diffusion_model.named_modules()}
    patched = causal_model.with_settings(foreign, model_settings.Settings("causal", CHUNKS, STEPS))
    with_shift = part("host").with_shift
    video = sampled(with_shift(patched, 5.0))
    after = {name: id(module) for name, module in foreign.model.diffusion_model.named_modules()}
    try:
        model_settings.settings_of(foreign)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "difference": apart(video, core_rollout(net)),
        "foreign_calls": len(calls),
        "is_untouched": before == after,
        "refusal": refusal,
    }


def exports_are_what_they_say() -> dict[str, Any]:
    """Return the kind and class of a file by its header, and how far its video is from the one it should be."""
    net, config, kinds = network(), core["config"], {}
    whole, teacher = config.BidirectionalConfig(FRAMES), config.StepConfig.even(3, shift=STEPS.shift)
    files = {
        "few-step": {"bidirectional": whole, "steps": STEPS},
        "older": {"steps": STEPS},
        "teacher": {"bidirectional": whole, "steps": teacher, "guidance": 5.0},
        "causal teacher": {"causal": CHUNKS, "steps": teacher, "guidance": 5.0},
        "nothing": {},
    }
    for name, header in files.items():
        core["checkpoint"].save_checkpoint(FOLDER / f"{name}.safetensors", net.state_dict(), net.config, **header)
        patcher = loaded(FOLDER / f"{name}.safetensors")
        kinds[name] = [model_settings.settings_of(patcher).kind, type(patcher.model).__name__]
    few_step = loaded(FOLDER / "nothing.safetensors", kind=model_settings.FEW_STEP)
    expected = sampled(few_step, chunk=FRAMES, is_whole=True)
    video = sampled(loaded(FOLDER / "few-step.safetensors"), chunk=FRAMES, is_whole=True)
    euler, chosen = (
        loaded(FOLDER / "causal teacher.safetensors"),
        loaded(FOLDER / "few-step.safetensors", kind="causal"),
    )
    return {
        "kinds": kinds,
        "explicit": model_settings.settings_of(chosen).kind,
        "few-step": apart(video, expected),
        "euler": apart(sampled(euler), core_rollout(net, steps=teacher)),
        "solver_matters": apart(sampled(euler), core_rollout(net, steps=replace(teacher, solver="renoise"))),
        "guidance": model_settings.settings_of(euler).guidance,
    }


def number_types() -> dict[str, float]:
    """Measure float8 and bfloat16 weights, and a narrow cache: near the exact video, and not the same."""
    net = network()
    path, exact = saved("t2v", net), core_rollout(net)
    videos = {
        "bfloat16": sampled(loaded(path, dtype=torch.bfloat16)),
        "float8": sampled(loaded(path, dtype=torch.float8_e4m3fn)),
    }
    narrow = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
    for name, dtype in narrow.items():
        settings = model_settings.Settings("causal", CHUNKS, STEPS, cache_dtype=dtype, cache_device="cpu")
        videos[f"cache_{name}"] = sampled(causal_model.with_settings(loaded(path), settings))
    apart_by = {name: float((video - exact).abs().mean() / exact.std()) for name, video in videos.items()}
    for name, dtype in narrow.items():
        net.cache_dtype = dtype
        apart_by[f"cache_{name}_as_in_the_core"] = apart(videos[f"cache_{name}"], core_rollout(net))
    return apart_by


def layers_without_casting_compute_in_bfloat16() -> float:
    """Compute as on a GPU where ComfyUI's layers are bfloat16 and do not cast, and its patch embedding is float32."""
    net = network()
    patcher = loaded(saved("t2v", net))
    native = type(patcher.model.diffusion_model)(
        operations=comfy.ops.disable_weight_init,
        device="cpu",
        dtype=torch.bfloat16,
        image_model="wan2.1",
        **{name: getattr(net.config, name) for name in SIZES},
        text_dim=4096,
        in_dim=16,
        out_dim=16,
    )
    native.load_state_dict(net.state_dict())
    shared = shared_network.SharedNetwork(native.eval().requires_grad_(False))
    x = torch.randn(1, 3, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    times = torch.full((1, 3), 500.0)
    flow = shared(x.bfloat16(), times, text(1).bfloat16())
    assert flow.dtype == torch.bfloat16
    return float((flow.float() - net(x, times, text(1))).abs().mean() / net(x, times, text(1)).std())


def compiled() -> dict[str, Any]:
    net = network()
    patcher = loaded(saved("t2v", net))
    plain = sampled(patcher)
    compiled_one = patcher.clone()
    set_torch_compile_wrapper(compiled_one, backend="eager")
    graphs = core["model"].CausalWan.compile_blocks
    backends = []

    def noted(self: Any, **options: Any) -> Any:
        backends.append(options.get("backend"))
        return graphs(self, **options)

    core["model"].CausalWan.compile_blocks = noted
    try:
        video = sampled(compiled_one)
    finally:
        core["model"].CausalWan.compile_blocks = graphs
    return {"difference": apart(video, plain), "backend": backends}


class HostDraws:
    """The draws of ComfyUI's own causal sampler, chunk after chunk of three frames."""

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        # SamplerARVideo seeds torch's global generator for each block and step, and draws [B, C, T, H, W].
        torch.manual_seed(5 + start_frame // 3 * 1000 + step - 1)
        batch, frames, *rest = shape
        return torch.randn(batch, rest[0], frames, *rest[1:]).transpose(1, 2)


def the_hosts_own_causal_sampler() -> float | None:
    """Compare it with ours; None where ComfyUI has none."""
    if not hasattr(comfy.k_diffusion.sampling, "sample_ar_video"):
        return None
    patcher = loaded(saved("t2v", network()))
    own = sampled(patcher, noise=HostDraws(), rows=512)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[text(1, 512), {}]], [[text(2, 512), {}]])
    guider.set_cfg(1.0)
    latent = {"samples": torch.zeros(1, CHANNELS, FRAMES, HEIGHT, WIDTH)}
    noise = guided_network.SeededGraphNoise(5, (3, 3)).generate_noise(latent)
    native = guider.sample(
        noise,
        latent["samples"],
        comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3}),
        model_settings.sigmas_of(patcher, 0, 0.0)[0],
        disable_pbar=True,
        seed=5,
    )
    return apart(own, patcher.model.process_latent_in(native).transpose(1, 2))


def a_trained_lora_is_the_merged_network() -> dict[str, float]:
    """Load LoRA matrices under the names of train.export, through ComfyUI's LoRA loader."""
    net, rank, alpha = network(), 2, 3.0
    plain = sampled(loaded(saved("plain", net)))
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, weight in net.named_parameters():
        if name.startswith("blocks.") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], rank, generator=generator) / 4
            weights |= {
                f"diffusion_model.{layer}.lora_down.weight": down,
                f"diffusion_model.{layer}.lora_up.weight": up,
                f"diffusion_model.{layer}.alpha": torch.tensor(alpha),
            }
            weight.data += alpha / rank * up @ down
    patched, _ = comfy.sd.load_lora_for_models(loaded(FOLDER / "plain.safetensors"), None, weights, 1.0, 0.0)
    merged = core_rollout(net)
    return {"difference": apart(sampled(patched), merged), "matters": apart(plain, merged)}


def a_loras_modulation_is_the_merged_network() -> dict[str, Any]:
    """Load it by both loaders, since ComfyUI does not apply what a LoRA has for a block's own parameters."""
    net = network()
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in net.named_parameters() if name.endswith("modulation")]
    change = {name: torch.randn(net.get_parameter(name).shape, generator=generator) * 0.2 for name in names}
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    first = core_rollout(net)
    path = saved("lora", net)
    net.load_state_dict({**plain, **{name: plain[name] + 0.5 * value for name, value in change.items()}})
    expected = core_rollout(net)
    lora = {f"diffusion_model.{name}.diff": value for name, value in change.items()}
    settings = model_settings.Settings("causal", CHUNKS, STEPS)
    foreign = comfy.sd.load_diffusion_model_state_dict(dict(plain))
    results: dict[str, Any] = {"matters": apart(expected, first)}
    for name, patcher in (("ours", loaded(path)), ("hosts", causal_model.with_settings(foreign, settings))):
        patched = host.with_shift(comfy.sd.load_lora_for_models(patcher, None, dict(lora), 0.5, 0)[0], 5.0)
        results[name] = apart(sampled(patched), expected)
        results[f"{name}_without"] = apart(sampled(host.with_shift(patcher.clone(), 5.0)), first)
    return results


def a_file_with_base_and_lora_is_the_merged_network() -> dict[str, Any]:
    """Load one file that holds both, in float32 and bfloat16; put another LoRA on top; take all of it off again."""
    net = network()
    generator = torch.Generator().manual_seed(2)
    linears = [name for name, weight in net.named_parameters() if name.startswith("blocks.") and weight.ndim == 2]
    first, second = (
        {
            f"{name.removesuffix('weight')}lora_{letter}.weight": torch.randn(shape, generator=generator) / 8
            for name in linears
            for letter, shape in (
                ("A", (2, net.get_parameter(name).shape[1])),
                ("B", (len(net.get_parameter(name)), 2)),
            )
        }
        for _ in range(2)
    )
    first["blocks.0.modulation.diff"] = torch.randn(net.get_parameter("blocks.0.modulation").shape, generator=generator)
    first["blocks.1.ffn.0.diff_b"] = torch.randn(net.get_parameter("blocks.1.ffn.0.bias").shape, generator=generator)
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        path = FOLDER / f"both-{dtype}.pt"
        plain = {name: value.to(dtype) for name, value in net.state_dict().items()}
        torch.save({"generator": plain, "generator_lora": first}, path)
        merged = dict(core["checkpoint"].read_checkpoint(path).state_dict)
        patcher = loaded(path, dtype=dtype)
        host.load([patcher])
        state = patcher.model.diffusion_model.state_dict()
        # ComfyUI leaves a block's own parameters as they are; the causal pass takes them from the MODEL's patches.
        different = [name for name in merged if not torch.equal(state[name], merged[name])]
        patcher.unpatch_model()
        state = patcher.model.diffusion_model.state_dict()
        left = [name for name in plain if not torch.equal(state[name], plain[name])]
        results[str(dtype)] = {"different": different, "left": left}
    base = core_rollout(net)
    path = FOLDER / "both-torch.float32.pt"
    net.load_state_dict(dict(core["checkpoint"].read_checkpoint(path).state_dict))
    patcher = loaded(path)
    results |= {"video": apart(sampled(patcher), core_rollout(net)), "matters": apart(core_rollout(net), base)}
    named = {f"diffusion_model.{key}": tensor for key, tensor in second.items()}
    on_top = comfy.sd.load_lora_for_models(patcher, None, dict(named), 0.5, 0)[0]
    save_file(named, FOLDER / "second.safetensors")
    both = core["checkpoint"].read_checkpoint(path, loras=[(FOLDER / "second.safetensors", 0.5)])
    net.load_state_dict(dict(both.state_dict))
    return results | {"on_top": apart(sampled(on_top), core_rollout(net))}


def first_and_last_frame_models_are_not_made_causal() -> dict[str, str]:
    net = network(in_dim=36, model_type="i2v")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    foreign = comfy.sd.load_diffusion_model_state_dict({**state, "img_emb.emb_pos": torch.zeros(1, 514, 1280)})
    refusals = {}
    for kind in ("causal", "few-step bidirectional", "unknown"):
        try:
            patched = causal_model.with_settings(foreign, model_settings.Settings(kind, CHUNKS, STEPS))
            if kind == "unknown":
                sampled(patched)
            refusals[kind] = ""
        except ValueError as error:
            refusals[kind] = str(error)
    return refusals


def files_of_other_kinds_are_refused_by_name() -> dict[str, str]:
    """Return what Load Model says of networks that it cannot run, and of GGUF with and without its package."""
    net, five_b = network(), network(in_dim=48, out_dim=48)
    plain = dict(net.state_dict())
    files = {
        "5B": dict(five_b.state_dict()),
        "VACE": {**plain, "vace_patch_embedding.weight": torch.zeros(1)},
        "HunyuanVideo": {"double_blocks.0.img_attn_q.weight": torch.zeros(1)},
        "NVFP4": {**plain, "a.weight": torch.zeros(1, dtype=torch.uint8), "a.weight_scale_2": torch.zeros(1)},
    }
    for name, tensors in files.items():
        save_file(tensors, FOLDER / f"{name}.safetensors")
    (FOLDER / "GGUF.safetensors").write_bytes(b"GGUF" + bytes(100))
    answers = {name: _refusal(lambda at=FOLDER / f"{name}.safetensors": loaded(at)) for name in (*files, "GGUF")}
    # As it is read where the package is installed: matrices in GGML's blocks.
    checkpoint = core["checkpoint"].read_checkpoint(saved("t2v", net))
    packing = model_file.Packing(None, (1, 1))
    weights = model_file.ScaledWeights(dict(checkpoint.state_dict), {"blocks.0.ffn.0.weight": packing})
    read = replace(checkpoint, state_dict=weights)
    answers["GGUF, read"] = _refusal(lambda: model_file.model_from_checkpoint(read))
    return answers


def _refusal(load: Any) -> str:
    try:
        load()
    except ValueError as error:
        return str(error)
    return ""


def _kept_in_8_bits(stored: dict[str, torch.Tensor], expected: torch.Tensor) -> tuple[bool, dict[str, Any]]:
    """Load each form of the same products as the node does by default; return what is kept, said and generated."""
    forms: dict[str, dict[str, torch.Tensor]] = {"scale_weight": stored}
    for form in ("comfy_quant", "weight_scale", "per row"):
        forms[form] = tensors = {name: tensor for name, tensor in stored.items() if name != "scaled_fp8"}
        for name in [name for name in tensors if name.endswith("scale_weight")]:
            layer, scale = name.removesuffix(".scale_weight"), tensors.pop(name)
            rows = len(tensors[f"{layer}.weight"])
            tensors[f"{layer}.weight_scale"] = scale.expand(rows, 1).clone() if form == "per row" else scale
            if form == "comfy_quant":
                options = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
                tensors[f"{layer}.comfy_quant"] = torch.tensor(list(options.encode()), dtype=torch.uint8)
    kept: dict[str, Any] = {}
    for form, tensors in forms.items():
        path = FOLDER / f"kept {form}.safetensors"
        save_file(tensors, path)
        lines: list[str] = []
        log = model_file.page.log  # of the lines that nodes show
        warning, log.warning = log.warning, lambda line, *args, at=lines: at.append(line % args)
        try:
            patcher = loaded(path, dtype=None)
        finally:
            log.warning = warning
        weight = patcher.model.diffusion_model.blocks[0].ffn[0].weight
        kept[form] = {
            "is_8_bit": bool(getattr(weight, "_qdata", weight).dtype == torch.float8_e4m3fn),
            "lines": lines,
            "difference": apart(sampled(patcher), expected),
        }
    return hasattr(comfy.utils, "detect_layer_quantization"), kept


def a_scaled_8_bit_file_is_the_network_it_stands_for() -> dict[str, Any]:
    """Load it by Load Model, and by ComfyUI's own loader with Patch Model, where ComfyUI multiplies in its own way."""
    net = network()
    stored, exact = {}, {}
    for name, weight in net.state_dict().items():
        stored[name] = exact[name] = weight
        if weight.ndim == 2 and name.startswith("blocks."):
            scale = weight.abs().max() / 448  # the largest number of float8_e4m3fn
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
            exact[name] = stored[name].float() * scale
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path = FOLDER / "scaled.safetensors"
    save_file(stored, path)
    net.load_state_dict(exact)
    expected = core_rollout(net)
    lines: list[str] = []
    log = model_file.page.log
    warning, log.warning = log.warning, lambda line, *args: lines.append(line % args)
    try:
        own = loaded(path)
    finally:
        log.warning = warning
    narrow = loaded(path, dtype=torch.bfloat16)
    has_layers, kept = _kept_in_8_bits(stored, expected)
    return {
        "has_layers": has_layers,
        "kept": kept,
        "ours": apart(sampled(own), expected),
        "bfloat16": float((sampled(narrow) - expected).abs().mean() / expected.std()),
        "weights": str(narrow.model.diffusion_model.blocks[0].ffn[0].weight.dtype),
        "lines": lines,
    }
