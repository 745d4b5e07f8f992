"""What all checks inside ComfyUI's own process share: its command line, the pack, random weights, one video of them.

Imported first, with sys.argv as PACK FOLDER [OPTION ...]. PACK: this repository; FOLDER: where random weights may be
written; OPTION: of ComfyUI's command line.

Letters: B batch, T latent frames, C latent channels, H W latent size.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
PACK, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
# ComfyUI reads its command line while it is imported, and would find this file's arguments there.
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

comfy.options.enable_args_parsing()  # without it, ComfyUI used as a library takes no options at all

import comfy.k_diffusion.sampling  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

import nodes as host_nodes  # noqa: E402, F401  ComfyUI's own, so that the pack's folder of that name cannot shadow it

torch.set_num_threads(1)  # tensors of this size gain nothing, and other tests want the cores


def load_pack() -> Any:
    """Import the pack under a name that is no identifier, as ComfyUI imports it."""
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
    """Return a module of the pack's nodes or of their adapter."""
    folder = "" if (PACK / f"nodes/{name}.py").is_file() else ".adapter"
    return importlib.import_module(f"{PACKAGE}{folder}.{name}")


autoencoder, causal_model, causal_pass, frame_stream, guided_network, host, loader = map(
    part, ("autoencoder", "causal_model", "causal_pass", "frame_stream", "guided_network", "host", "loader")
)
model_file, folders, model_settings, page, chunk_sampler, shared_network, text_nodes = map(
    part, ("model_file", "folders", "model_settings", "page", "chunk_sampler", "shared_network", "text_encode")
)
CORE = PACKAGE.rpartition(".")[0] + ".selfforcing_core."
core = {
    name.rpartition(".")[2]: importlib.import_module(CORE + name)
    for name in (
        "weights.checkpoint",
        "weights.bundles",
        "blending",
        "conditioning",
        "config",
        "experts",
        "geometry",
        "guided",
        "history",
        "model",
        "noise",
        "prompt_schedule",
        "rollout",
        "kv_cache",
        "snapshot",
    )
}
WanConfig, CausalConfig = core["config"].WanConfig, core["config"].CausalConfig
# Small, but with heads of 128 as all Wan models have: ComfyUI derives their number from the width.
SIZES = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
FRAMES, CHANNELS, HEIGHT, WIDTH = 6, 16, 4, 4
SHAPE = (FRAMES, CHANNELS, HEIGHT, WIDTH)
CHUNKS = CausalConfig(chunk=3)
STEPS = core["config"].StepConfig()


# ---------------------------------------------------------------- material --
def network(**more: Any) -> Any:
    """Return a random CausalWan whose output depends on everything: the usual start has no output at all."""
    # A new Wan's last layer is zero and its norms are one: such a network would agree with any other.
    torch.manual_seed(0)
    net = core["model"].CausalWan(WanConfig(**SIZES, **more))
    for parameter in net.parameters():
        if parameter.ndim < 2:
            parameter.data.normal_(1, 0.1) if parameter.mean() > 0.5 else parameter.data.normal_(0, 0.1)
    return net.eval().requires_grad_(False)


def saved(name: str, net: Any, causal: Any = CHUNKS) -> Path:
    path = FOLDER / f"{name}.safetensors"
    core["checkpoint"].save_checkpoint(path, net.state_dict(), net.config, causal=causal)
    return path


def loaded(path: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, **options}
    return model_file.model_from_checkpoint(core["checkpoint"].read_checkpoint(path), **options)


def text(seed: int, rows: int = 7) -> torch.Tensor:
    """Return rows of a prompt; 512 is what ComfyUI's own text encoder gives, of which the last are zero."""
    return torch.randn(1, rows, 4096, generator=torch.Generator().manual_seed(seed)) * (torch.arange(rows) < 9)[:, None]


def sampled(
    patcher: Any, *, cfg: float = 1.0, rows: int = 7, latent: Any = None, values: Any = None, chunk: int = 3, **run: Any
) -> Any:
    """Return normalised latents [1, T, C, H, W] through ComfyUI's guider; noise is that of the core for seed 5."""
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[text(1, rows if rows == 512 else 7), dict(values or {})]], [[text(2, rows), dict(values or {})]])
    guider.set_cfg(cfg)
    latent = {"samples": torch.zeros(1, CHANNELS, FRAMES, HEIGHT, WIDTH)} if latent is None else latent
    lengths = core["geometry"].chunk_lengths(latent["samples"].shape[2], chunk)
    noise = guided_network.SeededGraphNoise(5, lengths).generate_noise(latent)
    raw = guider.sample(
        noise,
        latent["samples"],
        chunk_sampler.ChunkSampler(chunk_sampler.Run(**run)),
        model_settings.sigmas_of(patcher, 0, 0.0)[0],
        denoise_mask=latent.get("noise_mask"),
        disable_pbar=True,
        seed=5,
    )
    return patcher.model.process_latent_in(raw).transpose(1, 2)


def core_rollout(
    net: Any, *, guidance: float = 1.0, rows: int = 7, causal: Any = CHUNKS, steps: Any = STEPS, **more: Any
) -> Any:
    condition = core["conditioning"].Conditioning
    chunks = core["rollout"].rollout(
        core["guided"].Guided(
            net, condition(text(1), **more), negative=condition(text(2, rows), **more), guidance=guidance
        ),
        noise=core["noise"].SeededNoise(5),
        latent_shape=SHAPE,
        causal=causal,
        steps=steps,
    )
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference as a share of the values' own spread."""
    return float((a - b).abs().max() / b.std())


# ------------------------------------------------------------------ checks --
def broken_packages() -> list[str]:
    """Return those of the planted packages that raise at import, while the pack is loaded."""
    broken = []
    for package in PLANTED:
        try:
            importlib.import_module(package)
        except ImportError as error:
            broken += [package] * (f"{package} is broken" in str(error))
    return broken


def once(
    patcher: Any, sampler: Any = None, *, values: Any = None, cfg: float = 3.0, sigmas: tuple[float, ...] = (1.0, 0.0)
) -> Any:
    """Return latents after one step from noise to nothing: by ComfyUI's Euler, or by a sampler of ours.

    ComfyUI attends to as many rows of text as it is given, our network to all of them: 512, as a text encoder gives.
    """
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[text(1, 512), dict(values or {})]], [[text(2, 512), dict(values or {})]])
    guider.set_cfg(cfg)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(7))
    euler = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler)
    latent = torch.zeros_like(noise)
    return guider.sample(noise, latent, sampler or euler, torch.tensor(sigmas), disable_pbar=True, seed=5)


SEVERAL = (1.0, 0.8, 0.5, 0.0)  # noise levels
