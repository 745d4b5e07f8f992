"""Run by the host's Python with its checkout on the path: what cannot be asked over HTTP, measured and printed as JSON.

python inside.py PACK FOLDER [OPTION ...]
PACK: this repository; FOLDER: where random weights may be written; OPTION: of the host's command line
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import logging
import random
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
PACK, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["inside", "--cpu", *sys.argv[3:]]

# Optional packages that are installed but broken, as flash-attn often is, must not keep the pack from loading.
BROKEN = FOLDER / "broken"
BROKEN.mkdir(parents=True, exist_ok=True)
PLANTED = ("flash_attn", "lmdb", "omegaconf", "diffusers")
for package in PLANTED:
    if package not in sys.modules:
        (BROKEN / f"{package}.py").write_text(f'raise ImportError("{package} is broken")')
sys.path.insert(0, str(BROKEN))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.k_diffusion.sampling  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import nodes as host_nodes  # noqa: E402, F401  the host's own, so that the pack's folder of that name cannot shadow it

torch.set_num_threads(1)


def load_pack() -> Any:
    """The pack under a name that is no identifier, as ComfyUI imports it."""
    name = "custom_nodes.self-forcing"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return importlib.import_module(name + ".nodes.extension").__package__


PACKAGE = load_pack()


def part(name: str) -> Any:
    """A module of the pack's nodes or, in a folder of its own, of what they stand on."""
    folder = "" if (PACK / f"nodes/{name}.py").is_file() else ".adapter"
    return importlib.import_module(f"{PACKAGE}{folder}.{name}")


autoencoder, causal_model, causal_pass, frame_stream, guided_network, host, loader = map(
    part, ("autoencoder", "causal_model", "causal_pass", "frame_stream", "guided_network", "host", "loader")
)
model_file, model_settings, sampling, shared_network, text_nodes = map(
    part, ("model_file", "model_settings", "sampling", "shared_network", "text")
)
CORE = PACKAGE.rpartition(".")[0] + ".selfforcing_core."
core = {
    name: importlib.import_module(CORE + name)
    for name in ("checkpoint", "conditioning", "config", "hub", "model", "rollout", "kv_cache", "snapshot")
}
WanConfig, CausalConfig = core["config"].WanConfig, core["config"].CausalConfig
SIZES = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
FRAMES, CHANNELS, HEIGHT, WIDTH = 6, 16, 4, 4
SHAPE = (FRAMES, CHANNELS, HEIGHT, WIDTH)
CHUNKS = CausalConfig(chunk=3)
STEPS = core["config"].StepConfig()


# ---------------------------------------------------------------- material --
def network(**more: Any) -> Any:
    """Random CausalWan whose output depends on everything: the usual start has no output at all."""
    torch.manual_seed(0)
    made = core["model"].CausalWan(WanConfig(**SIZES, **more))
    for parameter in made.parameters():
        if parameter.ndim < 2:
            parameter.data.normal_(1, 0.1) if parameter.mean() > 0.5 else parameter.data.normal_(0, 0.1)
    return made.eval().requires_grad_(False)


def saved(name: str, made: Any, causal: Any = CHUNKS) -> Path:
    path = FOLDER / f"{name}.safetensors"
    core["checkpoint"].save_checkpoint(path, made.state_dict(), made.config, causal=causal)
    return path


def loaded(path: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, **options}
    return model_file.model_from_checkpoint(core["checkpoint"].read_checkpoint(path), **options)


def text(seed: int, rows: int = 7) -> torch.Tensor:
    """Rows of a prompt; 512 is what the host's own text encoder gives, of which the last are zero."""
    return torch.randn(1, rows, 4096, generator=torch.Generator().manual_seed(seed)) * (torch.arange(rows) < 9)[:, None]


def sampled(
    patcher: Any, *, cfg: float = 1.0, rows: int = 7, latent: Any = None, values: Any = None, chunk: int = 3, **run: Any
) -> Any:
    """Normalised latents [1, T, C, H, W] through the host's guider; noise is that of the core for seed 5."""
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[text(1, rows if rows == 512 else 7), dict(values or {})]],
                     [[text(2, rows), dict(values or {})]])  # fmt: skip
    guider.set_cfg(cfg)
    latent = {"samples": torch.zeros(1, CHANNELS, FRAMES, HEIGHT, WIDTH)} if latent is None else latent
    lengths = core["rollout"].chunk_lengths(latent["samples"].shape[2], chunk)
    noise = guided_network.SeededGraphNoise(5, lengths).generate_noise(latent)
    raw = guider.sample(
        noise, latent["samples"], sampling.ChunkSampler(sampling.Run(**run)), model_settings.sigmas_of(patcher, 0, 0.0),
        denoise_mask=latent.get("noise_mask"), disable_pbar=True, seed=5,
    )  # fmt: skip
    return patcher.model.process_latent_in(raw).transpose(1, 2)


def core_rollout(
    made: Any, *, guidance: float = 1.0, rows: int = 7, causal: Any = CHUNKS, steps: Any = STEPS, **more: Any
) -> Any:
    condition = core["conditioning"].Conditioning
    chunks = core["rollout"].rollout(
        made, condition(text(1), **more), noise=core["rollout"].SeededNoise(5), latent_shape=SHAPE, causal=causal,
        steps=steps, negative=condition(text(2, rows), **more), guidance=guidance,
    )  # fmt: skip
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference as a share of the values' own spread."""
    return float((a - b).abs().max() / b.std())


# ------------------------------------------------------------------ checks --
def broken_packages() -> list[str]:
    """Those of the planted packages that raise at import, while the pack is loaded."""
    found = []
    for package in PLANTED:
        try:
            importlib.import_module(package)
        except ImportError as error:
            found += [package] * (f"{package} is broken" in str(error))
    return found


def the_hosts_model_gives_the_cores_video() -> dict[str, float]:
    """With one prompt; with two in one batch; with two that the host cannot batch; with a window."""
    made = network()
    patcher = loaded(saved("t2v", made))
    window = CausalConfig(chunk=1, window=3, sink=1, context_noise=100.0)
    windowed = causal_model.with_settings(patcher, model_settings.Settings("causal", window, STEPS))
    return {
        "plain": apart(sampled(patcher), core_rollout(made)),
        "cfg": apart(sampled(patcher, cfg=3.0), core_rollout(made, guidance=3.0)),
        "cfg_split": apart(sampled(patcher, cfg=3.0, rows=9), core_rollout(made, guidance=3.0, rows=9)),
        "window": apart(sampled(windowed, chunk=1), core_rollout(made, causal=window)),
        "cfg_matters": apart(core_rollout(made, guidance=3.0), core_rollout(made)),
    }


def condition_channels_are_sliced_per_chunk() -> dict[str, float]:
    made = network(in_dim=36, model_type="i2v")
    patcher = loaded(saved("i2v", made))
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    mask = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH)
    mask[:, :, :1] = 0
    clip = torch.randn(1, 257, 1280, generator=generator)

    class Seen:
        penultimate_hidden_states = clip

    values = {"concat_latent_image": raw.clone(), "concat_mask": mask, "clip_vision_output": Seen()}
    image = torch.cat([(1 - mask).repeat(1, 4, 1, 1, 1), patcher.model.process_latent_in(raw.clone())], 1)
    given = {"image_BTCHW": image.transpose(1, 2), "clip_BIX": clip}
    other = {**given, "image_BTCHW": given["image_BTCHW"].flip(1)}
    return {
        "plain": apart(sampled(patcher, values=values), core_rollout(made, **given)),
        "cfg": apart(sampled(patcher, cfg=3.0, values=values), core_rollout(made, guidance=3.0, **given)),
        "order_matters": apart(core_rollout(made, **other), core_rollout(made, **given)),
    }


def a_model_of_the_hosts_loader_is_patched() -> dict[str, Any]:
    """Plain weights through the host's loader with foreign layers, as GGUF and quantised packs put in."""
    made = network()
    calls = []

    class Counting(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return super().forward(*args, **kwargs)

    state = {name: value.clone() for name, value in made.state_dict().items()}
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
        "difference": apart(video, core_rollout(made)),
        "foreign_calls": len(calls),
        "is_untouched": before == after,
        "refusal": refusal,
    }


def exports_are_what_they_say() -> dict[str, Any]:
    """The kind and class of a file by its header, and how far its video is from the one it should be."""
    made, config, kinds = network(), core["config"], {}
    whole, teacher = config.BidirectionalConfig(FRAMES), config.StepConfig.even(3, shift=STEPS.shift)
    files = {
        "few-step": {"bidirectional": whole, "steps": STEPS},
        "older": {"steps": STEPS},
        "teacher": {"bidirectional": whole, "steps": teacher, "guidance": 5.0},
        "causal teacher": {"causal": CHUNKS, "steps": teacher, "guidance": 5.0},
        "nothing": {},
    }
    for name, header in files.items():
        core["checkpoint"].save_checkpoint(FOLDER / f"{name}.safetensors", made.state_dict(), made.config, **header)
        patcher = loaded(FOLDER / f"{name}.safetensors")
        kinds[name] = [model_settings.settings_of(patcher).kind, type(patcher.model).__name__]
    told = loaded(FOLDER / "nothing.safetensors", kind=model_settings.FEW_STEP)
    expected = sampled(told, chunk=FRAMES, is_whole=True)
    found = sampled(loaded(FOLDER / "few-step.safetensors"), chunk=FRAMES, is_whole=True)
    euler, chosen = (
        loaded(FOLDER / "causal teacher.safetensors"),
        loaded(FOLDER / "few-step.safetensors", kind="causal"),
    )
    return {
        "kinds": kinds, "explicit": model_settings.settings_of(chosen).kind,
        "few-step": apart(found, expected), "euler": apart(sampled(euler), core_rollout(made, steps=teacher)),
        "solver_matters": apart(sampled(euler), core_rollout(made, steps=replace(teacher, solver="renoise"))),
        "guidance": model_settings.settings_of(euler).guidance,
    }  # fmt: skip


def number_types() -> dict[str, float]:
    """float8 and bfloat16 weights, and a narrow cache: near the exact video, and not the same."""
    made = network()
    path, exact = saved("t2v", made), core_rollout(made)
    found = {
        "bfloat16": sampled(loaded(path, dtype=torch.bfloat16)),
        "float8": sampled(loaded(path, dtype=torch.float8_e4m3fn)),
    }
    narrow = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
    for name, dtype in narrow.items():
        settings = model_settings.Settings("causal", CHUNKS, STEPS, cache_dtype=dtype, cache_device="cpu")
        found[f"cache_{name}"] = sampled(causal_model.with_settings(loaded(path), settings))
    apart_by = {name: float((video - exact).abs().mean() / exact.std()) for name, video in found.items()}
    for name, dtype in narrow.items():
        made.cache_dtype = dtype
        apart_by[f"cache_{name}_as_in_the_core"] = apart(found[f"cache_{name}"], core_rollout(made))
    return apart_by


def layers_without_casting_compute_in_bfloat16() -> float:
    """On a card that computes in bfloat16 the host's layers do not cast, and the patch embedding stays float32."""
    made = network()
    patcher = loaded(saved("t2v", made))
    native = type(patcher.model.diffusion_model)(
        operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.bfloat16, image_model="wan2.1",
        **{name: getattr(made.config, name) for name in SIZES}, text_dim=4096, in_dim=16, out_dim=16,
    )  # fmt: skip
    native.load_state_dict(made.state_dict())
    shared = shared_network.SharedNetwork(native.eval().requires_grad_(False))
    x = torch.randn(1, 3, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    times = torch.full((1, 3), 500.0)
    found = shared(x.bfloat16(), times, text(1).bfloat16())
    assert found.dtype == torch.bfloat16
    return float((found.float() - made(x, times, text(1))).abs().mean() / made(x, times, text(1)).std())


def compiled() -> dict[str, Any]:
    made = network()
    patcher = loaded(saved("t2v", made))
    plain = sampled(patcher)
    compiled_one = patcher.clone()
    set_torch_compile_wrapper(compiled_one, backend="eager")
    graphs = core["model"].CausalWan.compile_blocks
    seen = []

    def noted(self: Any, **options: Any) -> Any:
        seen.append(options.get("backend"))
        return graphs(self, **options)

    core["model"].CausalWan.compile_blocks = noted
    try:
        video = sampled(compiled_one)
    finally:
        core["model"].CausalWan.compile_blocks = graphs
    return {"difference": apart(video, plain), "backend": seen}


def memory_estimate() -> dict[str, Any]:
    """What the host is told to keep free, in bytes, and what it would say itself of one chunk and of all frames."""
    patcher = loaded(saved("t2v", network()))
    long = {"samples": torch.zeros(1, CHANNELS, 12, HEIGHT, WIDTH)}
    told = []

    def settings(**options: Any) -> Any:
        return causal_model.with_settings(patcher, model_settings.Settings("causal", CHUNKS, STEPS, **options))

    original = comfy.model_management.load_models_gpu

    def noted(models: Any, memory_required: float = 0, **options: Any) -> Any:
        told.append(float(memory_required))
        return original(models, memory_required=memory_required, **options)

    comfy.model_management.load_models_gpu = noted
    try:
        sampled(patcher)
        sampled(patcher, cfg=3.0)
        sampled(patcher, latent=long, causal=CausalConfig(chunk=3, window=6))
        sampled(settings(cache_dtype=torch.bfloat16))
        sampled(settings(cache_device="cpu"))
        sampled(causal_model.with_settings(patcher, model_settings.Settings("unknown", CHUNKS, STEPS)), is_whole=True)
    finally:
        comfy.model_management.load_models_gpu = original
    names = ("one", "two", "long", "narrow", "elsewhere", "whole")
    return {
        "told": dict(zip(names, told, strict=True)),
        "chunk": patcher.memory_required([2, CHANNELS, 3, HEIGHT, WIDTH]),  # the host counts each prompt twice
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
        if self.end_frame > 3:
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
    """Stopped at random evaluations; each time the next run is bitwise what it was before."""
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
        late += len(calls) - at > 1
        same += bool(torch.equal(sampled(patcher), before))
    return {"count": count, "stopped": stopped, "same": same, "late": late}


def states() -> dict[str, Any]:
    """A state, also from a file, goes on as if it had never been taken, and is never copied on the device."""
    patcher = loaded(saved("t2v", network()))
    long = {"samples": torch.zeros(1, CHANNELS, 9, HEIGHT, WIDTH)}
    whole = sampled(patcher, latent=long)
    kept, copied, moved = sampling.SnapshotHolder(), [], []
    cache, state = core["kv_cache"].KVCache, core["snapshot"].Snapshot
    snapshot, to = cache.snapshot, state.to
    cache.snapshot = lambda self, device=None: (copied.append(str(device)), snapshot(self, device))[1]
    state.to = lambda self, device: (moved.append(str(device)), to(self, device))[1]
    try:
        sampled(patcher, keep=kept)
        assert kept.snapshot is not None
        kept.snapshot.save(FOLDER / "state.safetensors")
        read = sampling.SnapshotHolder(state.load(FOLDER / "state.safetensors"))
        moved.clear()
        found = {
            "is_same": bool(torch.equal(sampled(patcher, latent=long, resume=kept), whole)),
            "is_same_from_file": bool(torch.equal(sampled(patcher, latent=long, resume=read), whole)),
        }
    finally:
        cache.snapshot, state.to = snapshot, to
    return {**found, "copied_to": copied, "moved_to": moved}


class Hand:
    """Somebody who types a prompt before the chunk that begins at `at`."""

    def __init__(self, at: int, history: str) -> None:
        self.at, self.history, self.said, self.chunk = at, history, [], -1

    def seed_at(self, start_frame: int) -> None:
        return None

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], str] | None:
        self.chunk += 1
        if self.chunk != self.at:
            return None
        made = [[text(3), {}]]
        check(made)
        return made, self.history

    def took_prompt(self, start_frame: int, history: str) -> None:
        self.took = start_frame, history

    def say(self, message: str) -> None:
        self.said.append(message)


def a_prompt_typed_into_a_resumed_run() -> dict[str, Any]:
    """Of a state whose history cannot be written again: it is left as it is, and said so; a schedule is refused."""
    patcher = loaded(saved("t2v", network()))
    last_step = CausalConfig(chunk=3, cache_source="last_step")
    long, kept = {"samples": torch.zeros(1, CHANNELS, 12, HEIGHT, WIDTH)}, sampling.SnapshotHolder()
    sampled(patcher, keep=kept, causal=last_step)
    hands = {history: Hand(1, history) for history in ("recode", "keep")}
    videos = [sampled(patcher, latent=long, resume=kept, causal=last_step, steering=hand) for hand in hands.values()]
    moment = part("prompts").Moment

    def refusal(seconds: float) -> str:
        guider = comfy.samplers.CFGGuider(patcher)
        later = moment(seconds, 16.0, "recode")
        guider.inner_set_conds({"positive": [[text(1), {}], [text(3), {moment.KEY: later}]]})
        guider.set_cfg(1.0)
        run = sampling.Run(resume=kept, causal=last_step)
        noise = guided_network.SeededGraphNoise(5, (3, 3, 3, 3)).generate_noise(long)
        try:
            guider.sample(
                noise, long["samples"], sampling.ChunkSampler(run), model_settings.sigmas_of(patcher, 0, 0.0),
                disable_pbar=True, seed=5,
            )  # fmt: skip
        except ValueError as error:
            return str(error)
        return ""

    return {
        "said": {history: hand.said for history, hand in hands.items()},
        "is_kept": bool(torch.equal(*videos)),
        "refused": [refusal(2.2), refusal(0.8)],
    }


class HostDraws:
    """The draws of the host's own causal sampler, chunk after chunk of three frames."""

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        torch.manual_seed(5 + start_frame // 3 * 1000 + step - 1)
        batch, frames, *rest = shape
        return torch.randn(batch, rest[0], frames, *rest[1:]).transpose(1, 2)


def the_hosts_own_causal_sampler() -> float | None:
    """None where the host has none."""
    if not hasattr(comfy.k_diffusion.sampling, "sample_ar_video"):
        return None
    patcher = loaded(saved("t2v", network()))
    ours = sampled(patcher, noise=HostDraws(), rows=512)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[text(1, 512), {}]], [[text(2, 512), {}]])
    guider.set_cfg(1.0)
    latent = {"samples": torch.zeros(1, CHANNELS, FRAMES, HEIGHT, WIDTH)}
    noise = guided_network.SeededGraphNoise(5, (3, 3)).generate_noise(latent)
    theirs = guider.sample(
        noise, latent["samples"], comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3}),
        model_settings.sigmas_of(patcher, 0, 0.0), disable_pbar=True, seed=5,
    )  # fmt: skip
    return apart(ours, patcher.model.process_latent_in(theirs).transpose(1, 2))


def a_trained_lora_is_the_merged_network() -> dict[str, float]:
    """Adapters under the names of train.export, through the host's LoRA loader."""
    made, rank, alpha = network(), 2, 3.0
    plain = sampled(loaded(saved("plain", made)))
    generator, held = torch.Generator().manual_seed(7), {}
    for name, weight in made.named_parameters():
        if name.startswith("blocks.") and weight.ndim == 2:
            layer = name.removesuffix(".weight")
            down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], rank, generator=generator) / 4
            held |= {f"diffusion_model.{layer}.lora_down.weight": down, f"diffusion_model.{layer}.lora_up.weight": up,
                     f"diffusion_model.{layer}.alpha": torch.tensor(alpha)}  # fmt: skip
            weight.data += alpha / rank * up @ down
    patched, _ = comfy.sd.load_lora_for_models(loaded(FOLDER / "plain.safetensors"), None, held, 1.0, 0.0)
    merged = core_rollout(made)
    return {"difference": apart(sampled(patched), merged), "matters": apart(plain, merged)}


def wan_vae() -> Any:
    """A random Wan VAE, as narrow as this host's loader takes it."""
    config = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
              "temperal_downsample": [False, True, True], "dropout": 0.0}  # fmt: skip
    for dim in (16, 96):  # earlier hosts know one width only
        weights = comfy.ldm.wan.vae.WanVAE(dim=dim, **config).state_dict()
        try:
            return comfy.sd.VAE(
                sd={name: torch.randn_like(tensor) * (0.4 / dim**0.5) for name, tensor in weights.items()},
                dtype=torch.float32,
            )
        except RuntimeError:
            continue
    raise AssertionError("the host loads no Wan VAE of ours")


class FrameByFrame(torch.nn.Module):
    """A pointwise convolution that rounds the same for any number of frames."""

    def __init__(self, convolution: torch.nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.convolution(frame) for frame in x_BCTHW.split(1, 2)], 2)


def vaes_of_the_host_stream() -> dict[str, Any]:
    """A small random Wan VAE, chunk by chunk and with a chunk taken back, against its decode of the whole video.

    The host's decode gives all latents at once to a pointwise convolution, whose sums a CPU may round in another order
    for other lengths. So it is compared as it is, and again with that convolution frame by frame: nothing differs.
    """
    torch.manual_seed(0)
    vae = wan_vae()
    as_it_is = vae_streams(vae)
    vae.first_stage_model.conv2 = FrameByFrame(vae.first_stage_model.conv2)
    return {"as_it_is": as_it_is, "frame_by_frame": vae_streams(vae)}


def vae_streams(vae: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"kinds": []}
    for length in (1, 3):
        latents = torch.randn(1, 7 if length == 1 else 9, 16, 2, 2, generator=torch.Generator().manual_seed(1))
        whole = vae.decode(autoencoder.graph_latents(latents)).permute(0, 1, 4, 2, 3)
        without_parts = types.SimpleNamespace(latent_channels=16, first_stage_model=None, decode=vae.decode)
        for made in (vae, without_parts):
            stream, frames = frame_stream.frame_stream(made), []
            for start in range(0, latents.shape[1], length):
                chunk, is_last = latents[:, start : start + length], start + length == latents.shape[1]
                before = stream.state()
                stream.decode(-chunk, is_last=is_last)
                stream.restore(before)
                frames.append(stream.decode(chunk, is_last=is_last))
            found["kinds"].append([bool(stream.note), [part.shape[1] for part in frames]])
            found[f"difference_{length}_{bool(stream.note)}"] = apart(torch.cat(frames, 1), whole)
    found |= {f"difference_ended_early_{bool(made is vae)}": ended_early(made, vae) for made in (vae, without_parts)}
    found["spread"] = float(whole.std())
    return found


def ended_early(made: Any, vae: Any) -> float:
    """Two chunks of what might have been more, and then only the word that they were the last."""
    latents = torch.randn(1, 6, 16, 2, 2, generator=torch.Generator().manual_seed(3))
    stream = frame_stream.frame_stream(made)
    frames = [stream.decode(chunk, is_last=False) for chunk in latents.split(3, 1)]
    frames.append(stream.decode(latents[:, :0], is_last=True))
    keeps_back = getattr(stream, "group", None) != 1  # a host that decodes latent by latent gives each at once
    assert bool(frames[-1].shape[1]) == keeps_back
    return apart(torch.cat(frames, 1), vae.decode(autoencoder.graph_latents(latents)).permute(0, 1, 4, 2, 3))


def taehv_streams_latent_by_latent() -> dict[str, Any]:
    """Bitwise the same however the latents are cut; what a resumed run has already comes in small pieces."""
    checkpoint = core["checkpoint"].read_checkpoint(core["hub"].resolve_taehv("tiny"))
    vae = autoencoder.TAEHVAutoencoder(checkpoint)
    latents = torch.randn(1, 7, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2))
    one, found = frame_stream.frame_stream(vae), {}
    whole = torch.cat([one.decode(latent, is_last=False) for latent in latents.split(1, 1)], 1)
    for length in (2, 3, 7):
        stream = frame_stream.frame_stream(vae)
        chunks = (*latents.split(length, 1), latents[:, :0])
        frames = torch.cat([stream.decode(chunk, is_last=not chunk.shape[1]) for chunk in chunks], 1)
        found[str(length)] = bool(torch.equal(frames, whole))
    pieces: list[torch.Tensor] = []
    progress = part("progress").StreamProgress
    progress(1, 9, frame_stream.frame_stream(vae), None, None, pieces.append).resumed(latents)
    found["resumed"] = bool(torch.equal(torch.cat(pieces, 1), whole))
    return {"is_same": found, "largest": max(piece.shape[1] for piece in pieces), "shape": list(whole.shape)}


def text_encoders() -> dict[str, Any]:
    """The bundled encoder, and the same as if it were large: in the host's number type, and near it."""
    sys.path.remove(str(BROKEN))  # transformers does not load beside a flash_attn that raises
    folder, calls = host.text_encoder_folder("tiny" + host.BUNDLE_MARK), {}
    wanted, original = "a red square moving left slowly on a navy background", text_nodes.SMALL
    chosen = comfy.model_management.text_encoder_dtype
    exact = text_nodes.TextReader("tiny" + host.BUNDLE_MARK)(wanted)[0][0]
    text_nodes.SMALL = 0
    try:
        for name in ("default", "float8_e4m3fn", "bfloat16"):
            text_nodes._load.cache_clear()
            if name != "default":
                comfy.model_management.text_encoder_dtype = lambda device=None, name=name: getattr(torch, name)
            encoder = text_nodes._load(folder, "").encoder
            text_nodes._load.cache_clear()
            embeds = text_nodes.TextReader("tiny" + host.BUNDLE_MARK)(wanted)[0][0]
            calls[name] = [str(encoder.model.shared.weight.dtype), apart(embeds, exact), str(embeds.dtype)]
    finally:
        text_nodes.SMALL, comfy.model_management.text_encoder_dtype = original, chosen
        text_nodes._load.cache_clear()
    small = text_nodes._load(folder, "").encoder
    sys.path.insert(0, str(BROKEN))
    return {**calls, "small": str(small.model.shared.weight.dtype)}


def a_network_that_had_to_leave_comes_back() -> dict[str, Any]:
    """With room for the evaluation of a chunk, however long the video is."""
    patcher = loaded(saved("plain", network()))
    told, kept_loaded, load = [], host.kept_loaded, host.load

    def noted(patcher: Any, *, working_bytes: float) -> Any:
        told.append(working_bytes)
        return kept_loaded(patcher, working_bytes=working_bytes)

    host.kept_loaded = noted
    try:
        for frames in (6, 12):
            latent = {"samples": torch.zeros(1, CHANNELS, frames, HEIGHT, WIDTH)}
            sampled(patcher, latent=latent, steering=Hand(1, "recode"), working_bytes=1000)
    finally:
        host.kept_loaded = kept_loaded
    comfy.model_management.load_models_gpu([patcher])
    whole, given = patcher.loaded_size(), []
    host.load = lambda networks, *, working_bytes=0: (given.append(working_bytes), load(networks))
    try:
        with host.kept_loaded(patcher, working_bytes=told[0]):
            comfy.model_management.unload_all_models()
            gone = patcher.loaded_size()
    finally:
        host.load = load
    return {
        "came_back": [gone < whole, patcher.loaded_size() == whole],
        "told": [sorted(set(told)), given],
        "needed": patcher.memory_required([1, CHANNELS, 3, HEIGHT, WIDTH]) + 1000,
    }


def once(
    patcher: Any, sampler: Any = None, *, values: Any = None, cfg: float = 3.0, sigmas: tuple[float, ...] = (1.0, 0.0)
) -> Any:
    """Latents after one step from noise to nothing: by the host's Euler, or by a sampler of ours.

    The host attends to as many rows of text as it is given, our network to all of them: 512, as a text encoder gives.
    """
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[text(1, 512), dict(values or {})]], [[text(2, 512), dict(values or {})]])
    guider.set_cfg(cfg)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(7))
    euler = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler)
    latent = torch.zeros_like(noise)
    return guider.sample(noise, latent, sampler or euler, torch.tensor(sigmas), disable_pbar=True, seed=5)


TELLS_BLOCK = "block_index" in inspect.getsource(comfy.ldm.wan.model.WanModel)  # as newer hosts do


def by_block(func: Any, *args: Any, **options: Any) -> Any:
    """Another attention, which looks at all that the host tells of where it stands."""
    told = options["transformer_options"]
    assert len(told["cond_or_uncond"]) == args[0].shape[0]
    if not TELLS_BLOCK:
        return func(*args, **options) * 1.5
    assert told["total_blocks"] == SIZES["num_layers"]
    assert tuple(told["grid_sizes"]) in ((FRAMES, HEIGHT // 2, WIDTH // 2), (3, HEIGHT // 2, WIDTH // 2))
    return func(*args, **options) * (1.5 + told["block_index"])


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
    """All frames as one chunk are the host's own pass; in chunks RoPE is the core's, attention also from int8."""
    made = network()
    causal, whole = loaded(saved("t2v", made)), loaded(saved("whole", made, causal=None), kind="base")
    at_once = sampling.ChunkSampler(sampling.Run(causal=CausalConfig(chunk=FRAMES)))
    found: dict[str, Any] = {"plain": apart(once(causal, at_once), once(whole))}
    for name, patched in (("attention", with_override), ("rope", with_rope)):
        if patched(causal) is None:
            continue  # the host has no such option
        found[name] = apart(once(patched(causal), at_once), once(patched(whole)))
        found[f"{name}_matters"] = apart(once(patched(whole)), once(whole))
    if with_rope(causal) is not None:
        made.axes = ((1.5, 3.0), (0.5, 0.0), (2.0, 1.0))
        found["rope_in_chunks"] = apart(sampled(with_rope(causal)), core_rollout(made))
    narrow = causal_model.with_settings(
        causal, model_settings.Settings("causal", CHUNKS, STEPS, cache_dtype=torch.int8)
    )
    exact = sampled(with_override(causal))
    found["attention_from_int8"] = float((sampled(with_override(narrow)) - exact).abs().mean() / exact.std())
    compiled_one = with_override(causal)
    set_torch_compile_wrapper(compiled_one, backend="eager")
    found["attention_compiled"] = apart(sampled(compiled_one), exact)
    return found


SEVERAL = (1.0, 0.8, 0.5, 0.0)  # noise levels


def guided_to(module: Any) -> Any:
    """Another forward of a cross-attention, which leads away from a text of its own, as NAG of other packs does."""
    away = module.norm_k.weight.new_ones(1, 4, module.q.in_features) * 0.1
    own = type(module).forward

    def forward(self: Any, x: Any, context: Any, *args: Any, **options: Any) -> Any:
        assert context.shape[0] == 1
        assert x.shape[1] in (FRAMES * HEIGHT * WIDTH // 4, 3 * HEIGHT * WIDTH // 4), "rows of all frames"
        assert not TELLS_BLOCK or options["transformer_options"]["block_index"] in range(SIZES["num_layers"])
        told = own(self, x, context, *args, **options)
        return told * 4 - own(self, x, torch.cat([context[:, : context.shape[1] - 512], away], 1), *args, **options) * 3

    return types.MethodType(forward, module)


def in_parts(module: Any) -> Any:
    """Another forward of a feed-forward network: half of a row at a time, and half as much of it."""

    def forward(self: Any, x: Any) -> Any:
        return torch.cat([torch.nn.Sequential.forward(self, part) for part in x.chunk(2, 1)], 1) * 0.5

    return types.MethodType(forward, module)


def with_blocks(patcher: Any, name: str, make: Callable[[Any], Any]) -> Any:
    clone = patcher.clone()
    for index, block in enumerate(patcher.model.diffusion_model.blocks):
        clone.add_object_patch(f"diffusion_model.blocks.{index}.{name}.forward", make(getattr(block, name)))
    return clone


def with_fading_prompt(patcher: Any) -> Any:
    """A wrapper gives the network another text at every noise level."""

    def wrapper(executor: Any, x: Any, timestep: Any, context: Any, *args: Any, **options: Any) -> Any:
        return executor(x, timestep, context * (timestep[:, None, None] / 1000), *args, **options)

    clone = patcher.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "fading", wrapper)
    return clone


def modules_and_prompts_of_others_are_followed() -> dict[str, float]:
    """Cross-attention and feed-forward networks replaced, and texts that change: as one chunk the host's own pass."""
    made, image = network(), network(in_dim=36, model_type="i2v")
    euler = replace(STEPS, solver="euler")
    at_once = sampling.ChunkSampler(sampling.Run(causal=CausalConfig(chunk=FRAMES)))
    generator = torch.Generator().manual_seed(3)

    class Seen:
        penultimate_hidden_states = torch.randn(1, 257, 1280, generator=generator)

    values = {
        "concat_latent_image": torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator),
        "concat_mask": torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH), "clip_vision_output": Seen(),
    }  # fmt: skip
    ways = {
        "cross": lambda patcher: with_blocks(patcher, "cross_attn", guided_to),
        "feed": lambda patcher: with_blocks(patcher, "ffn", in_parts),
        "prompt": with_fading_prompt,
    }
    found: dict[str, float] = {}
    for kind, net, given in (("t2v", made, {}), ("i2v", image, values)):
        whole = loaded(saved(f"{kind} whole", net, causal=None), kind="base")
        causal = loaded(saved(kind, net))
        causal = causal_model.with_settings(causal, model_settings.Settings("causal", CHUNKS, euler))
        options: dict[str, Any] = {"values": given, "cfg": 1.0, "sigmas": SEVERAL}
        plain = once(whole, **options)
        found[f"{kind}_plain"] = apart(once(causal, at_once, **options), plain)
        for name, change in ways.items():
            theirs = once(change(whole), **options)
            found[f"{kind}_{name}"] = apart(once(change(causal), at_once, **options), theirs)
            found[f"{kind}_{name}_matters"] = min(
                apart(theirs, plain), apart(sampled(change(causal), values=given), sampled(causal, values=given))
            )
    compiled_one = ways["cross"](causal)
    set_torch_compile_wrapper(compiled_one, backend="eager")
    found["compiled"] = apart(sampled(compiled_one, values=values), sampled(ways["cross"](causal), values=values))
    return found


def a_model_can_be_loaded_again() -> dict[str, Any] | None:
    """As ComfyUI does for a copy on another device, which it takes along with LoRA, settings and wrappers."""
    sys.modules["folder_paths"].add_model_folder_path("diffusion_models", str(FOLDER))
    made = network()
    saved("again", made)
    patcher = loader.load_model("again.safetensors", "float32", "auto", "auto")
    if not hasattr(patcher, "deepclone_multigpu"):
        return None  # an older host, which never asks
    change = torch.randn(made.get_parameter("blocks.0.ffn.0.weight").shape, generator=torch.Generator().manual_seed(1))
    lora = {"diffusion_model.blocks.0.ffn.0.diff": change * 0.02}
    patched = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]
    settings = replace(model_settings.settings_of(patched), cache_dtype=torch.bfloat16)
    patched = causal_model.with_settings(patched, settings)
    wanted = sampled(patched)
    copies = {
        "another device": patched.deepclone_multigpu(torch.device("cpu")),
        "deep": patched.clone(True, None, True),
    }
    found: dict[str, Any] = {name: apart(sampled(copy), wanted) for name, copy in copies.items()}
    found["own weights"] = all(copy.model is not patched.model for copy in copies.values())
    found["matters"] = apart(wanted, sampled(patcher))
    return found


def what_cannot_be_followed_is_refused() -> dict[str, str]:
    """The sentence with which each is refused, "" if it is not; and that the MODEL runs as before without it."""
    patcher = loaded(saved("t2v", network()))
    before, blocks = sampled(patcher), patcher.model.diffusion_model.blocks

    def told(change: Callable[[Any], Any], **options: Any) -> str:
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
        """A wrapper of another kind that returns what it likes for every third evaluation."""
        calls: list[int] = []

        def wrapper(executor: Any, x: Any, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return executor(x, *args, **options) if len(calls) % 3 else torch.zeros_like(x)

        return lambda clone: clone.add_wrapper_with_key(kind, "another", wrapper)

    def skipping_function(clone: Any) -> None:
        calls: list[int] = []

        def function(apply: Any, args: dict[str, Any]) -> Any:
            calls.append(1)
            given = args["input"], args["timestep"]
            return apply(*given, **args["c"]) if len(calls) % 3 else torch.zeros_like(args["input"])

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

    found = {
        "block": told(lambda clone: clone.set_model_patch_replace(lambda a, e: a, "dit", "double_block", 1)),
        "block in a step": told(in_a_step),
        "attn1": told(lambda clone: clone.set_model_patch(lambda args: args["x"], "attn1_patch")),
        "unknown": told(lambda clone: clone.set_model_patch(lambda args: args["x"], "a_new_one")),
        "without effect": told(lambda clone: clone.set_model_patch(lambda x, extra: x * 2, "attn1_output_patch")),
        "cross": told(method("blocks.0.cross_attn.forward", blocks[0].cross_attn), cfg=3.0),
        "cross alone": told(method("blocks.0.cross_attn.forward", blocks[0].cross_attn)),
        "self": told(method("blocks.0.self_attn.forward", blocks[0].self_attn)),
        "whole": told(method("forward_orig", patcher.model.diffusion_model)),
        "rope table": told(
            lambda clone: clone.add_object_patch("diffusion_model.rope_embedder", torch.nn.Identity().to("cpu"))
        ),
        "norm": told(method("blocks.1.norm1.forward", blocks[1].norm1)),
        "layer": told(method("blocks.1.ffn.0.forward", blocks[1].ffn[0])),  # is called, so it is followed
        "skip": told(skipping(3)),
        "skip the cache": told(skipping(5)),  # the last of a chunk's passes
        "skip around": told(skipping_around(comfy.patcher_extension.WrappersMP.APPLY_MODEL)),
        "skip by function": told(skipping_function),
        "twice": told(twice),
        "longer": told(longer),
        "another prompt": told(another_prompt),
        "noise": told(lambda clone: clone.add_object_patch("model_sampling", other_sampling(comfy.model_sampling.EPS))),
        "devices": told(put("multigpu_clones", {"cuda:0": None, "cuda:1": None})),
        "easycache": told(
            lambda clone: clone.add_wrapper_with_key(diffusion_model, "easycache", lambda call, *a: call(*a))
        ),
        "context windows": told(put("context_handler", object())),
        "rope": told(put("transformer_options", {"rope_options": {"scale_z": 2.0}})),
        "joined frames": told(lambda clone: None, values={"time_dim_concat": torch.zeros(1, 16, 1, HEIGHT, WIDTH)}),
    }
    hook = blocks[0].self_attn.register_forward_hook(lambda *args: None)
    found["hook"] = told(lambda clone: None)
    hook.remove()
    found["afterwards"] = "same" if torch.equal(sampled(patcher), before) else "other"
    return found


def a_loras_modulation_is_the_merged_network() -> dict[str, Any]:
    """By both loaders, since ComfyUI does not apply what a LoRA has for a block's own parameters."""
    made = network()
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in made.named_parameters() if name.endswith("modulation")]
    change = {name: torch.randn(made.get_parameter(name).shape, generator=generator) * 0.2 for name in names}
    plain = {name: value.clone() for name, value in made.state_dict().items()}
    first = core_rollout(made)
    path = saved("lora", made)
    made.load_state_dict({**plain, **{name: plain[name] + 0.5 * value for name, value in change.items()}})
    wanted = core_rollout(made)
    lora = {f"diffusion_model.{name}.diff": value for name, value in change.items()}
    settings = model_settings.Settings("causal", CHUNKS, STEPS)
    foreign = comfy.sd.load_diffusion_model_state_dict(dict(plain))
    found: dict[str, Any] = {"matters": apart(wanted, first)}
    for name, patcher in (("ours", loaded(path)), ("hosts", causal_model.with_settings(foreign, settings))):
        patched = host.with_shift(comfy.sd.load_lora_for_models(patcher, None, dict(lora), 0.5, 0)[0], 5.0)
        found[name] = apart(sampled(patched), wanted)
        found[f"{name}_without"] = apart(sampled(host.with_shift(patcher.clone(), 5.0)), first)
    return found


def first_and_last_frame_models_are_not_made_causal() -> dict[str, str]:
    made = network(in_dim=36, model_type="i2v")
    state = {name: value.clone() for name, value in made.state_dict().items()}
    foreign = comfy.sd.load_diffusion_model_state_dict({**state, "img_emb.emb_pos": torch.zeros(1, 514, 1280)})
    found = {}
    for kind in ("causal", "few-step bidirectional", "unknown"):
        try:
            patched = causal_model.with_settings(foreign, model_settings.Settings(kind, CHUNKS, STEPS))
            if kind == "unknown":
                sampled(patched)
            found[kind] = ""
        except ValueError as error:
            found[kind] = str(error)
    return found


def a_scaled_8_bit_file_is_the_network_it_stands_for() -> dict[str, Any]:
    """By Load Model, and by the host's own loader with Patch Model, where the host multiplies in its own way."""
    made = network()
    stored, exact = {}, {}
    for name, weight in made.state_dict().items():
        stored[name] = exact[name] = weight
        if weight.ndim == 2 and name.startswith("blocks."):
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
            exact[name] = stored[name].float() * scale
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path = FOLDER / "scaled.safetensors"
    save_file(stored, path)
    made.load_state_dict(exact)
    wanted = core_rollout(made)
    lines: list[str] = []
    warning, model_file.log.warning = model_file.log.warning, lambda line, *args: lines.append(line % args)
    try:
        ours = loaded(path)
    finally:
        model_file.log.warning = warning
    narrow = loaded(path, dtype=torch.bfloat16)
    return {
        "ours": apart(sampled(ours), wanted),
        "bfloat16": float((sampled(narrow) - wanted).abs().mean() / wanted.std()),
        "weights": str(narrow.model.diffusion_model.blocks[0].ffn[0].weight.dtype),
        "lines": lines,
    }


class Stage:
    """A live run without a server: its page is here, or gone, and its messages are kept."""

    def __init__(self, pace: float) -> None:
        self.waiting_modules = part("live"), part("outbox")
        record_module, prompts = part("steering_record"), part("prompts")
        self.run, self.is_here, self.messages = None, True, []
        self.before = host.send, host.is_listening, self.waiting_modules[0].PATIENCE
        host.send = lambda event, data, client: self.receive(data)
        host.is_listening = lambda client: self.is_here
        for module in self.waiting_modules:
            module.PATIENCE = 0.4
        lengths = (8,) * 9
        record = record_module.SteeringRecord(prompts.Planned("a"), lengths, 10.0)
        self.run = self.waiting_modules[0].Live(
            host.Audience("page", "prompt", "1"), record, fps=10.0, lengths=lengths, read=lambda text: [], seed=0,
            pace=pace, hidden=None,
        )  # fmt: skip

    def receive(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if self.run is not None:
            self.run.command({"action": "ack", "number": message["number"]})

    def show(self, start: int, count: int) -> None:
        self.run.seed_at(start // 30 * 8)
        self.run.show(torch.zeros(count, 3, 8, 8), start, start // 30 + 1)

    def waited(self, *does: tuple[float, Callable[[], object]]) -> tuple[float, bool]:
        """Seconds until the run goes on, and whether its chunk is made again; meanwhile things are done."""
        timers = [threading.Timer(after, do) for after, do in does]
        for timer in timers:
            timer.start()
        began = time.perf_counter()
        try:
            is_again = self.run.wants_again()
            return time.perf_counter() - began, is_again
        finally:
            for timer in timers:
                timer.join()

    def command(self, action: str, **more: Any) -> Callable[[], None]:
        return lambda: self.run.command({"action": action, **more})

    def close(self) -> None:
        self.run.close("stopped", [])
        self.run.outbox.thread.join(5)
        host.send, host.is_listening, patience = self.before
        for module in self.waiting_modules:
            module.PATIENCE = patience


def a_run_waits_for_its_viewer() -> dict[str, Any]:
    """Seconds that a chunk waited: frames are 0.1 s long, and at most 1 s may be ahead."""
    stage, found = Stage(1.0), {}
    wanted, waited = {"action": "prompt", "text": "b", "history": "keep"}, stage.waited
    try:
        stage.show(0, 30)
        found["nobody has said what is shown"] = waited()[0]
        stage.run.command({"action": "shown", "frame": 0})
        found["until shown"] = waited((0.3, stage.command("shown", frame=20)))[0]
        stage.show(30, 30)
        still = waited((0.1, lambda: stage.run.command(wanted)), (0.4, stage.command("shown", frame=55)))
        found["a prompt does not break the bound"] = still[0]
        stage.show(60, 30)
        held = waited((0.1, stage.command("hold")), (0.3, stage.command("reroll", seed=7)))
        found["held while ahead"], found["is rolled again"] = held
        found["paused"] = stage.run.paused
        stage.run.command({"action": "go_on"})
        comfy.model_management.interrupt_current_processing(True)
        try:
            waited()
            found["interrupt"] = ""
        except host.Interrupted:
            found["interrupt"] = "Interrupted"
        stage.is_here = False
        found["page gone"] = waited()[0]
        stage.show(90, 30)
        found["still gone"] = waited()[0]
        stage.is_here = True
        stage.run.command({"action": "shown", "frame": 0})
        pacing, usual = part("pacing"), 0.0
        usual, pacing.SILENT = pacing.SILENT, 0.4
        found["page silent"] = waited()[0]
        pacing.SILENT = usual
        stage.run.command({"action": "shown", "frame": 0})
        found["until finished"] = waited((0.3, stage.command("finish")))[0]
    finally:
        stage.close()
    found["states"] = list(dict.fromkeys(message["state"] for message in stage.messages))
    found["last"] = {name: stage.messages[-1].get(name) for name in ("ending", "files", "schedule", "pace")}
    return found


def a_new_loader_never_pairs_a_bundled_part_with_a_real_one() -> dict[str, list[str]]:
    """The first choices for model, decoder and text encoder, by the files that there are."""
    folders, before = host.folder_paths, (host.folder_paths.get_filename_list, host._text_encoder_folders)
    found = {}
    model, decoder = {"diffusion_models": ["self_forcing_dmd.pt"]}, {"vae_approx": ["taew2_1.safetensors"]}
    for name, files, encoders in (
        ("model", model, []),
        ("no decoder", {**model, "vae": ["wan_2.1_vae.safetensors"]}, ["umt5"]),
        ("no encoder", {**model, **decoder}, []),
        ("all", {**model, **decoder}, ["umt5"]),
    ):
        folders.get_filename_list = lambda folder, files=files: files.get(folder, [])
        host._text_encoder_folders = lambda encoders=encoders: encoders
        try:
            choices = (
                host.file_choices(host.MODEL_FOLDER, likely=host.LIKELY_MODELS),
                host.file_choices(*host.TAEHV_FOLDERS, likely=host.LIKELY_TAEHVS), host.text_encoder_choices(),
            )  # fmt: skip
        finally:
            folders.get_filename_list, host._text_encoder_folders = before
        found[name] = [choice[0] for choice in choices]
    return found


def a_picture_that_moves_is_taken_to_move_on() -> dict[str, float]:
    """Seconds ahead 0.2 s and 1.2 s after the last word: only a while, and only if the picture moved before."""
    viewer, found = part("pacing").Viewer(10.0), {}
    clock = part("pacing").time
    now, clock_before = [100.0], clock.monotonic
    clock.monotonic = lambda: now[0]
    try:
        for name, words in (("still", [5, 5]), ("moving", [5, 6]), ("back", [9, 6])):
            for frame in words:
                viewer.tell(frame)
            for passed in (0.2, 1.0):
                now[0] += passed
                found[f"{name} {passed}"] = viewer.seconds_ahead(27)
    finally:
        clock.monotonic = clock_before
    return found


def the_first_prompt_is_found_in_the_graph_or_not_guessed() -> dict[str, str]:
    found = part("prompts").text_in_graph
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
        "2": {"class_type": "WanImageToVideo", "inputs": {"positive": ["1", 0]}},
        "3": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "b"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": ["3", 0]}},
        "5": {"class_type": "ConditioningConcat", "inputs": {"conditioning_to": ["1", 0]}},
    }
    ways = {"direct": "1", "behind a picture": "2", "linked": "4", "concat": "5"}
    made = {way: found({**graph, "9": {"inputs": {"positive": [node, 0]}}}, "9") for way, node in ways.items()}
    return {**made, "none": found(None, "9")}


def random_taehv() -> dict[str, torch.Tensor]:
    """Weights of the released shapes, whose outputs are of the usual size."""
    shapes = importlib.import_module(CORE + "layout").taehv_shapes(core["config"].TAEHVConfig())
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / max(torch.Size(shape[1:]).numel(), 1) ** 0.5
        for name, shape in shapes.items()
    }


def lighttaew2_1_decodes_as_in_the_host() -> dict[str, Any]:
    """By its name, under auto: its latents are unscaled. Apart from ComfyUI's own decode where it knows such files."""
    loader, weights = part("loader"), random_taehv()
    made, names = {}, ("lighttaew2_1", "taew2_1")
    latents = torch.randn(1, CHANNELS, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    for name, chosen in zip(names, ("auto", "wan2.1")):
        path = FOLDER / f"{name}.safetensors"
        save_file(weights, path)
        checkpoint = core["checkpoint"].read_checkpoint(path)
        space = loader._latent_space(checkpoint, chosen, path.name)
        made[name] = autoencoder.TAEHVAutoencoder(checkpoint, name=path.name, latent_space=space)
    light, usual = (made[name].decode(latents) for name in names)
    stream = frame_stream.frame_stream(made["lighttaew2_1"])
    normalised = autoencoder.network_latents(latents)
    streamed = torch.cat([stream.decode(normalised[:, at : at + 1], is_last=at == 2) for at in range(3)], 1)
    found = {
        "spaces": [made[name].latent_space for name in names], "matters": apart(usual, light),
        "streamed": apart(streamed.movedim(2, -1), light),
    }  # fmt: skip
    image = torch.rand(9, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    if hasattr(comfy, "taesd") and hasattr(comfy.taesd, "taehv"):
        theirs = comfy.sd.VAE(sd={name: value.clone() for name, value in weights.items()}, dtype=torch.float32)
        found["decoded"] = apart(theirs.decode(latents).cpu().clamp(0, 1), light)  # the host leaves that to its nodes
        found["encoded"] = apart(theirs.encode(image).cpu(), made["lighttaew2_1"].encode(image))
    return found


def vaes_of_other_spaces() -> dict[str, Any]:
    """The sentence for each VAE beside a model of Wan's latents and beside one of its own, "" where it fits."""
    narrow = {name: value.half() for name, value in random_taehv().items()}
    vaes = {"wan": wan_vae()}
    for name, home in (
        ("picture", "models.autoencoder.AutoencoderKL"),
        ("cosmos", "cosmos.vae.CausalContinuousVideoTokenizer"),
    ):
        module, _, kind = home.rpartition(".")
        network_class = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)
        network_ = network_class.__new__(network_class)
        vaes[name] = types.SimpleNamespace(first_stage_model=network_, latent_channels=16)
    vaes["unknown"] = types.SimpleNamespace(first_stage_model=torch.nn.Identity(), latent_channels=16)
    if hasattr(comfy, "taesd") and hasattr(comfy.taesd, "taehv"):
        vaes["float16"] = comfy.sd.VAE(sd=narrow)
    return {name: [refusal(autoencoder.check_space, vae, space, "the model makes") for space in ("wan2.1", "tiny")]
            for name, vae in vaes.items()}  # fmt: skip


def refusal(call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def a_steered_run_is_kept_in_its_files() -> dict[str, Any]:
    """Two rows with one sound, closed; then the prompts are written into both."""
    to_file = part("stream_to_file")
    core_video = importlib.import_module(CORE + "video")
    sound = to_file._sounds({"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000}, 2)
    refusal = ""
    try:
        to_file._sounds({"waveform": torch.zeros(3, 1, 16000), "sample_rate": 16000}, 2)
    except ValueError as error:
        refusal = str(error)
    folder_paths.set_output_directory(str(FOLDER / "output"))
    files = to_file._Files("clips/a", "mp4 (H.264)", 16.0, -1, {"prompt": {"1": 2}}, (64, 64), sound)
    files.take(torch.rand(2, 9, 3, 64, 64))
    files.close()
    paths = [FOLDER / "output/clips" / each["filename"] for each in files.written()]
    before = [path.read_bytes() for path in paths]
    files.keep_schedule("")
    is_untouched = before == [path.read_bytes() for path in paths]
    files.keep_schedule("0s: a\n3s: b")
    unkept = files.finished("0s: half a character, \ud800")  # no file can hold it
    return {
        "unkept": unkept,
        "refusal": refusal, "written": files.written(), "is_untouched": is_untouched,
        "metadata": [core_video.read_metadata(path) for path in paths],
        "frames": [len(core_video.read_video(path)) for path in paths],
    }  # fmt: skip


CHECKS: tuple[Callable[[], Any], ...] = (
    broken_packages,
    a_trained_lora_is_the_merged_network,
    vaes_of_the_host_stream,
    taehv_streams_latent_by_latent,
    text_encoders,
    a_network_that_had_to_leave_comes_back,
    the_hosts_model_gives_the_cores_video,
    condition_channels_are_sliced_per_chunk,
    a_model_of_the_hosts_loader_is_patched,
    exports_are_what_they_say,
    number_types,
    layers_without_casting_compute_in_bfloat16,
    compiled,
    memory_estimate,
    out_of_memory,
    interrupts,
    states,
    a_prompt_typed_into_a_resumed_run,
    the_hosts_own_causal_sampler,
    what_is_set_on_the_forward_pass_is_followed,
    modules_and_prompts_of_others_are_followed,
    a_model_can_be_loaded_again,
    what_cannot_be_followed_is_refused,
    a_loras_modulation_is_the_merged_network,
    first_and_last_frame_models_are_not_made_causal,
    a_scaled_8_bit_file_is_the_network_it_stands_for,
    a_run_waits_for_its_viewer,
    a_picture_that_moves_is_taken_to_move_on,
    a_new_loader_never_pairs_a_bundled_part_with_a_real_one,
    the_first_prompt_is_found_in_the_graph_or_not_guessed,
    lighttaew2_1_decodes_as_in_the_host,
    vaes_of_other_spaces,
    a_steered_run_is_kept_in_its_files,
)


def main() -> None:
    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for check in CHECKS:
            try:
                found[check.__name__] = check()
            except Exception as error:  # one check must not hide the others
                import traceback

                found[check.__name__] = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
