"""Tiny files with the key names, containers and folders of released checkpoints, and the weights they stand for.

    python -m tests.support.fakes FOLDER [NAME ...]      # without names all of them, each in FOLDER/NAME

A fake has the tensors of a network of width 128, the same for the same name and seed. Where a release's container or
names were not read, the fake has the likeliest, and ASSUMED says so: no test may take it for a fact about the release.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_core.config import WanConfig
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights.keymap import from_wan
from selfforcing_core.weights.presets import (
    PRESETS,
    SIZES_1_3B,
    SIZES_5B,
    SIZES_I2V_14B,
    SIZES_WAN22_I2V,
    Preset,
    Sizes,
)

Weights = dict[str, Tensor]
RANK = 8
FLOAT8_MAX = 448.0  # the largest number of float8_e4m3fn


@dataclass(frozen=True)
class SafetensorsFile:
    """Tensors and header of a safetensors file."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Fake:
    """A release's files, and the plain weights that they stand for."""

    # By path in the folder: a SafetensorsFile, a dictionary for torch.save (.pt, .ckpt), or one for JSON (.json).
    files: dict[str, Any]
    # By Wan's names: "raw" and "ema" as the file holds them, "merged" with the LoRA, "high" and "low" noise; none where
    # the file is no network that this project knows.
    networks: dict[str, Weights]
    run: tuple[str, ...]  # those of them that the release is meant to be run with
    path: str  # what a user gives to a loader, "" for the folder
    partner: str | None = None  # the LoRA's or the twin's file


# --------------------------------------------------------------- networks --
@dataclass(frozen=True)
class Maker:
    """Draws the networks of one fake. On the device "meta" they have shapes and no numbers."""

    seed: int
    config: WanConfig
    device: str = "cpu"

    def draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return normal numbers that depend on seed, name and shape alone."""
        if self.device == "meta":
            return torch.empty(shape, device="meta")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5

    def network(self, label: str = "raw") -> Weights:
        """Return a network's weights by Wan's names; other labels, other numbers."""
        return {name: self.draw(f"{label} {name}", shape) for name, shape in wan_shapes(self.config).items()}

    def lora(self, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (A, B) for every Linear of the blocks, by the name of its module."""
        linears = {name.removesuffix(".weight"): shape for name, shape in wan_shapes(self.config).items()}
        linears = {name: shape for name, shape in linears.items() if is_linear(name, shape)}
        return {
            name: (self.draw(f"A {name}", (rank, inputs)), self.draw(f"B {name}", (outputs, rank)))
            for name, (outputs, inputs) in linears.items()
        }


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a module of this name and weight is a Linear of a block."""
    return name.startswith("blocks.") and len(shape) == 2


def merged(
    weights: Mapping[str, Tensor],
    lora: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rank: int = RANK,
    alpha: float = RANK,
    strength: float = 1.0,
) -> Weights:
    """Return W + (alpha / rank) * strength * B @ A for every module of a LoRA, the other weights as they are."""
    scale = alpha / rank * strength
    deltas = {f"{name}.weight": scale * (up @ down) for name, (down, up) in lora.items()}
    return {name: weight + deltas[name] if name in deltas else weight for name, weight in weights.items()}


# ------------------------------------------------------ names and containers --
def prefixed(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    """Return the tensors with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in weights.items()}


def model(weights: Mapping[str, Tensor]) -> Weights:
    """Return the names that Self Forcing's wrapper of the network has."""
    return prefixed("model.", weights)


def sharded(weights: Mapping[str, Tensor]) -> Weights:
    """Return the names of an average that was taken of a network wrapped by FSDP."""
    return prefixed("model._fsdp_wrapped_module.", weights)


def diffusers(weights: Mapping[str, Tensor]) -> Weights:
    """Return the names of diffusers."""
    return {from_wan(name, "diffusers"): tensor for name, tensor in weights.items()}


def fastvideo(weights: Mapping[str, Tensor]) -> Weights:
    """Return the names of diffusers with FastVideo's of the feed-forward layers."""
    names = {".ffn.net.0.proj.": ".ffn.fc_in.", ".ffn.net.2.": ".ffn.fc_out."}
    renamed = diffusers(weights)
    for written, kept in names.items():
        renamed = {name.replace(written, kept): tensor for name, tensor in renamed.items()}
    return renamed


def fused(weights: Mapping[str, Tensor]) -> Weights:
    """Return the weights with q, k and v of self-attention, and k and v of cross-attention, as one matrix each."""
    fused_weights: Weights = {}
    for name, tensor in weights.items():
        head, _, tail = name.rpartition(".")
        module, _, part = head.rpartition(".")
        parts = {"self_attn": ("q", "k", "v"), "cross_attn": ("k", "v")}.get(module.rpartition(".")[2], ())
        if part not in parts:
            fused_weights[name] = tensor
        elif part == parts[0]:
            rows = [weights[f"{module}.{each}.{tail}"] for each in parts]
            fused_weights[f"{module}.to_{''.join(parts)}.{tail}"] = torch.cat(rows)
    return fused_weights


def peft(lora: Mapping[str, tuple[Tensor, Tensor]], head: str = "base_model.model.") -> Weights:
    """Return a LoRA by PEFT's names; another head makes them those of ComfyUI or of diffusers."""
    return {
        f"{head}{name}.lora_{letter}.weight": matrix
        for name, pair in lora.items()
        for letter, matrix in zip("AB", pair)
    }


def kohya(lora: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> Weights:
    """Return a LoRA by the names of kohya's trainers, which store alpha beside each pair."""
    tensors: Weights = {}
    for name, (down, up) in lora.items():
        module = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def scaled(weights: Mapping[str, Tensor], form: str) -> tuple[Weights, Weights]:
    """Return weights in 8 bits with scales and their companions, and the float32 products that they stand for.

    form: "scale_weight" (ComfyUI's older files), "weight_scale" (a scale for every row, LightX2V) or "comfy_quant".
    """
    stored: Weights = {}
    exact: Weights = {}
    for name, weight in weights.items():
        stored[name] = exact[name] = weight
        if not (name.endswith(".weight") and is_linear(name.removesuffix(".weight"), tuple(weight.shape))):
            continue
        layer = name.removesuffix(".weight")
        largest = weight.abs().amax(1, keepdim=True) if form == "weight_scale" else weight.abs().max()
        scale = largest / FLOAT8_MAX
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        exact[name] = stored[name].float() * scale
        stored[f"{layer}.{'scale_weight' if form == 'scale_weight' else 'weight_scale'}"] = scale
        if form == "scale_weight":
            stored[f"{layer}.scale_input"] = torch.ones((), device=weight.device)
        if form == "comfy_quant":
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8, device=weight.device)
    if form == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, device=next(iter(weights.values())).device).to(torch.float8_e4m3fn)
    return stored, exact


# ------------------------------------------------------------ one network --
def torch_file(path: str, weights: str, containers: Mapping[str, Any], networks: dict[str, Weights]) -> Fake:
    """Return the fake of one torch file. weights: which of the networks is meant to be run."""
    return Fake({path: dict(containers)}, networks, (weights,), path)


def both(path: str, weights: str, wrap_average: Callable[[Mapping[str, Tensor]], Weights] = model):
    """Return how to make a file with weights as trained and their average."""

    def make(maker: Maker) -> Fake:
        raw, ema = maker.network("raw"), maker.network("ema")
        containers = {"generator": model(raw), "generator_ema": wrap_average(ema)}
        return torch_file(path, weights, containers, {"raw": raw, "ema": ema})

    return make


def alone(path: str, container: str | None = "generator"):
    """Return how to make a file with one network, below a container or flat."""

    def make(maker: Maker) -> Fake:
        raw = maker.network()
        contents = {container: model(raw)} if container else model(raw)
        return torch_file(path, "raw", contents, {"raw": raw})

    return make


def bare(path: str, dtype: torch.dtype = torch.bfloat16):
    """Return how to make a safetensors file with Wan's own names and nothing else."""

    def make(maker: Maker) -> Fake:
        raw = {name: tensor.to(dtype) for name, tensor in maker.network().items()}
        return Fake({path: SafetensorsFile(raw)}, {"raw": raw}, ("raw",), path)

    return make


def in_dialect(path: str, rename: Callable[[Mapping[str, Tensor]], Weights]):
    """Return how to make a safetensors file with other names."""

    def make(maker: Maker) -> Fake:
        raw = maker.network()
        return Fake({path: SafetensorsFile(rename(raw))}, {"raw": raw}, ("raw",), path)

    return make


def with_scales(path: str, form: str):
    """Return how to make a safetensors file in 8 bits with scales of that form."""

    def make(maker: Maker) -> Fake:
        stored, exact = scaled(maker.network(), form)
        return Fake({path: SafetensorsFile(stored)}, {"raw": exact}, ("raw",), path)

    return make


def nvfp4(path: str):
    """Return how to make a file whose matrices are pairs of 4-bit numbers with two levels of scales."""

    def make(maker: Maker) -> Fake:
        stored: Weights = {}
        for name, weight in maker.network().items():
            stored[name] = weight
            if name.endswith(".weight") and is_linear(name.removesuffix(".weight"), tuple(weight.shape)):
                layer, (rows, columns) = name.removesuffix(".weight"), weight.shape
                stored[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=weight.device)
                stored[f"{layer}.weight_scale"] = torch.ones(rows, columns // 16, device=weight.device)
                stored[f"{layer}.weight_global_scale"] = torch.ones((), device=weight.device)
        return Fake({path: SafetensorsFile(stored)}, {}, (), path)

    return make


# ------------------------------------------------- LoRA, twins, other kinds --
def base_and_lora(base: str, lora: str):
    """Return how to make a base and the LoRA without which it is another model, in two files."""

    def make(maker: Maker) -> Fake:
        raw, matrices = maker.network(), maker.lora()
        files = {base: {"generator": model(raw)}, lora: {"generator_lora": peft(matrices)}}
        return Fake(files, {"raw": raw, "merged": merged(raw, matrices)}, ("merged",), base, lora)

    return make


def base_with_lora(path: str):
    """Return how to make one file that holds a base and its LoRA."""

    def make(maker: Maker) -> Fake:
        raw, matrices = maker.network(), maker.lora()
        containers = {"generator": model(raw), "generator_lora": peft(matrices)}
        return torch_file(path, "merged", containers, {"raw": raw, "merged": merged(raw, matrices)})

    return make


def bare_and_lora(spelling: str, alpha: float = RANK):
    """Return how to make a bare network and a LoRA beside it in one of the spellings of other trainers."""

    def make(maker: Maker) -> Fake:
        raw, matrices = maker.network(), maker.lora()
        if spelling == "kohya":
            tensors = kohya(matrices, alpha)
        elif spelling == "diffusers":
            renamed = {
                from_wan(f"{name}.weight", "diffusers").removesuffix(".weight"): p for name, p in matrices.items()
            }
            tensors = peft(renamed, "transformer.")
        else:
            tensors = peft(matrices, "diffusion_model.")
        files = {"model.safetensors": SafetensorsFile(raw), "lora.safetensors": SafetensorsFile(tensors)}
        networks = {"raw": raw, "merged": merged(raw, matrices, alpha=alpha)}
        return Fake(files, networks, ("merged",), "model.safetensors", "lora.safetensors")

    return make


def bare_pair(high: str, low: str):
    """Return how to make a network for high noise and its twin for low noise."""

    def make(maker: Maker) -> Fake:
        networks = {name: maker.network(name) for name in ("high", "low")}
        files = {high: SafetensorsFile(networks["high"]), low: SafetensorsFile(networks["low"])}
        return Fake(files, networks, ("high", "low"), high, low)

    return make


def diffusers_folder(rename: Callable[[Mapping[str, Tensor]], Weights], shift: float, boundary: float | None = None):
    """Return how to make a pipeline's folder; with a boundary it has a second transformer.

    The shift of its scheduler is an example of what such a folder says, not the release's.
    """

    def make(maker: Maker) -> Fake:
        config = maker.config
        sizes = {"num_attention_heads": config.num_heads, "attention_head_dim": config.head_dim}
        sizes |= {"num_layers": config.num_layers, "ffn_dim": config.ffn_dim, "in_channels": config.in_dim}
        parts = {"transformer": "raw"} if boundary is None else {"transformer": "high", "transformer_2": "low"}
        networks = {name: maker.network(name) for name in parts.values()}
        files: dict[str, Any] = {
            "model_index.json": {"_class_name": "WanPipeline", "boundary_ratio": boundary},
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "shift": shift,
            },
        }
        for folder, name in parts.items():
            files[f"{folder}/config.json"] = {"_class_name": "WanTransformer3DModel", **sizes}
            files[f"{folder}/diffusion_pytorch_model.safetensors"] = SafetensorsFile(rename(networks[name]))
        return Fake(files, networks, tuple(parts.values()), "", "transformer_2" if boundary is not None else None)

    return make


ACTION_MODULES = {  # of Matrix-Game 2: names and (rows, columns) of a block's action model, hidden width 128
    "keyboard_embed.0": (128, 4),
    "keyboard_embed.2": (128, 128),
    "mouse_mlp.0": (128, 34),
    "mouse_mlp.2": (128, 128),
    "t_qkv": (384, 128),
    "proj_mouse": (128, 128),
    "mouse_attn_q": (128, 128),
    "keyboard_attn_kv": (256, 128),
    "proj_keyboard": (128, 128),
}


def action_model(path: str):
    """Return how to make an image-to-video network whose first half of blocks has an action model."""

    def make(maker: Maker) -> Fake:
        network = maker.network()
        for index in range((maker.config.num_layers + 1) // 2):
            for name, shape in ACTION_MODULES.items():
                key = f"blocks.{index}.action_model.{name}.weight"
                network[key] = maker.draw(key, shape)
        return Fake({path: SafetensorsFile(network)}, {}, (), path)

    return make


def camera_model(path: str):
    """Return how to make LingBot-World's network: its camera's embedding, and four layers in every block."""

    def make(maker: Maker) -> Fake:
        network, D = maker.network(), maker.config.dim
        layers = {"patch_embedding_wancamctrl": (D, 6 * 64 * 4)}  # six numbers for each of 64 pixels in four frames
        layers |= {f"c2ws_hidden_states_layer{number}": (D, D) for number in (1, 2)}
        names = ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer")
        blocks = range(maker.config.num_layers)
        layers |= {f"blocks.{index}.{name}": (D, D) for index in blocks for name in names}
        for name, (rows, columns) in layers.items():
            network |= {f"{name}.weight": maker.draw(name, (rows, columns)), f"{name}.bias": maker.draw(name, (rows,))}
        return Fake({path: SafetensorsFile(network)}, {}, (), path)

    return make


def vace(path: str):
    """Return how to make a VACE network: a plain one with an embedding and blocks for its controls."""

    def make(maker: Maker) -> Fake:
        network, D = maker.network(), maker.config.dim
        network["vace_patch_embedding.weight"] = maker.draw("vace", (D, 96, 1, 2, 2))
        network["vace_blocks.0.before_proj.weight"] = maker.draw("before", (D, D))
        network["vace_blocks.0.after_proj.weight"] = maker.draw("after", (D, D))
        return Fake({path: SafetensorsFile(network)}, {}, (), path)

    return make


def hunyuan(path: str):
    """Return how to make a file with the names of HunyuanVideo's blocks."""

    def make(maker: Maker) -> Fake:
        D = maker.config.dim
        names = ("double_blocks.0.img_attn_q", "double_blocks.0.txt_attn_q", "final_layer.linear")
        return Fake({path: SafetensorsFile({f"{n}.weight": maker.draw(n, (D, D)) for n in names})}, {}, (), path)

    return make


# ---------------------------------------------------------------- dialects --
def trainer_file(path: str, container: str, prefix: str, beside: Mapping[str, Any]):
    """Return how to make the file of a trainer: one container, a prefix, and what it keeps beside."""

    def make(maker: Maker) -> Fake:
        raw = maker.network()
        return torch_file(path, "raw", {container: prefixed(prefix, raw), **beside}, {"raw": raw})

    return make


def in_shards(index: str):
    """Return how to make a network in two safetensors files with their index, in diffusers' layout."""

    def make(maker: Maker) -> Fake:
        raw = maker.network()
        named = diffusers(raw)
        keys = list(named)
        halves = {
            f"{index.split('.')[0]}-00001-of-00002.safetensors": keys[: len(keys) // 2],
            f"{index.split('.')[0]}-00002-of-00002.safetensors": keys[len(keys) // 2 :],
        }
        files: dict[str, Any] = {
            shard: SafetensorsFile({key: named[key] for key in half}) for shard, half in halves.items()
        }
        places = {key: shard for shard, half in halves.items() for key in half}
        files[index] = {"metadata": {}, "weight_map": places}
        return Fake(files, {"raw": raw}, ("raw",), index)

    return make


def with_strays(path: str):
    """Return how to make a flat torch file with the rotary table that some trainers save."""

    def make(maker: Maker) -> Fake:
        raw = maker.network()
        table = maker.draw("freqs", (1024, maker.config.head_dim // 2))
        return torch_file(path, "raw", {**model(raw), "model.freqs": table.to(torch.complex64)}, {"raw": raw})

    return make


# ------------------------------------------------------------------- table --
LIGHTNING = {"epoch": 3, "global_step": 1200, "pytorch-lightning_version": "2.4.0", "optimizer_states": []}
DEEPSPEED = {"ds_version": "0.16.4", "global_steps": 1200, "dp_world_size": 8, "optimizer": None}
LONGLIVE_FILES = ("models/longlive_base.pt", "models/lora.pt")
LIGHTX2V_PAIR = tuple(f"wan2.2_i2v_A14b_{noise}_noise_lightx2v_4step.safetensors" for noise in ("high", "low"))

# By preset: the releases.
RELEASES: dict[str, Callable[[Maker], Fake]] = {
    "self-forcing-dmd": both("checkpoints/self_forcing_dmd.pt", "ema"),
    "self-forcing-sid": both("checkpoints/self_forcing_sid.pt", "ema"),
    "self-forcing-10s": both("checkpoints/self_forcing_10s.pt", "ema"),
    "causal-forcing": alone("chunkwise/causal_forcing.pt"),
    "causal-forcing-framewise": both("framewise/causal_forcing.pt", "ema", sharded),
    "causal-forcing-pp-2step": both("causal-forcing++/framewise-2step.pt", "ema"),
    "causal-forcing-pp-1step": both("causal-forcing++/framewise-1step.pt", "ema"),
    "causal-forcing-longvideo": both("chunkwise/longvideo.pt", "ema"),
    "causal-forcing-ar-diffusion": alone("chunkwise/ar_diffusion.pt"),
    "causal-forcing-framewise-ar-diffusion": alone("framewise/ar_diffusion.pt"),
    "causal-forcing-causal-ode": alone("chunkwise/causal_ode.pt"),
    "causal-forcing-framewise-causal-ode": alone("framewise/causal_ode.pt"),
    "causal-forcing-causal-cd": alone("chunkwise/causal_cd.pt"),
    "causal-forcing-framewise-causal-cd": alone("framewise/causal_cd.pt"),
    "rolling-forcing": both("checkpoints/rolling_forcing_dmd.pt", "ema"),
    "reward-forcing": alone("rewardforcing.pt", None),
    "infinite-forcing": alone("ema_model.pt", "generator_ema"),
    "longlive": base_and_lora(*LONGLIVE_FILES),
    "longlive-interactive": base_and_lora(*LONGLIVE_FILES),
    "memflow": base_and_lora("base.pt", "lora.pt"),
    "krea": bare("krea-realtime-video-14b.safetensors"),
    "longlive2": alone("model_bf16.pt"),
    "longlive2-i2v": alone("model_bf16.pt"),
    "longlive2-lora": base_with_lora("model.pt"),
    "causvid": alone("autoregressive_checkpoint/model.pt"),
    "causvid-4step": alone("model.pt"),
    "streamdiffusionv2": alone("wan_causal_dmd_v2v/model.pt"),
    "streamdiffusionv2-fast": alone("wan_causal_dmd_v2v/model.pt"),
    "streamdiffusionv2-14b": alone("wan_causal_dmd_v2v_14b/model.pt"),
    "streamdiffusionv2-t2v": alone("model.pt"),
    "causalwan2.2-i2v": diffusers_folder(diffusers, 12.0, 0.875),
    "causalwan2.2-t2v": diffusers_folder(fastvideo, 5.0, 0.875),
    "sfwan2.1": diffusers_folder(diffusers, 5.0),
    "lightx2v-t2v-14b": bare("distill_models/distill_model.safetensors"),
    "lightx2v-i2v-14b": bare("distill_model.safetensors"),
    "lightx2v-wan2.2-i2v": bare_pair(*LIGHTX2V_PAIR),
    "lightx2v-self-forcing-fp8": with_scales("self_forcing_fp8.safetensors", "weight_scale"),
    "lightx2v-self-forcing-nvfp4": nvfp4("self_forcing_nvfp4.safetensors"),
    "lightx2v-self-forcing-14b": bare("self_forcing_14b.safetensors"),
    "matrix-game-2": action_model("base_distill.safetensors"),
    "matrix-game-3": bare("matrix_game_3.safetensors"),
    "matrix-game-3.5": bare("matrix_game_3.5.safetensors"),
    "lingbot-world-2-1.3b": camera_model("model.safetensors"),
    "lingbot-world-2-14b": camera_model("model.safetensors"),
    "lingbot-world-1-fast": camera_model("model.safetensors"),
    "hy-worldplay": hunyuan("model.safetensors"),
}
# Ways in which people and trainers write the same networks, and files that two readings fit.
DIALECTS: dict[str, tuple[Sizes, Callable[[Maker], Fake]]] = {
    "causal-forcing-both": (SIZES_1_3B, both("chunkwise/causal_forcing.pt", "raw")),
    "longlive-one-file": (SIZES_1_3B, base_with_lora("longlive.pt")),
    "ddp": (SIZES_1_3B, trainer_file("model.pt", "generator", "module.model.", {})),
    "compiled": (SIZES_1_3B, trainer_file("model.pt", "generator", "_orig_mod.model.", {})),
    "deepspeed": (SIZES_1_3B, trainer_file("mp_rank_00_model_states.pt", "module", "model.", DEEPSPEED)),
    "lightning": (SIZES_1_3B, trainer_file("last.ckpt", "state_dict", "generator.model.", LIGHTNING)),
    "stray-buffers": (SIZES_1_3B, with_strays("model.pt")),
    "comfyui": (SIZES_1_3B, in_dialect("m.safetensors", lambda weights: prefixed("model.diffusion_model.", weights))),
    "shards": (SIZES_1_3B, in_shards("diffusion_pytorch_model.safetensors.index.json")),
    "fused-qkv": (SIZES_1_3B, in_dialect("m.safetensors", fused)),
    "fastvideo-names": (SIZES_1_3B, in_dialect("m.safetensors", fastvideo)),
    "comfyui-fp8-scaled": (SIZES_1_3B, with_scales("m.safetensors", "scale_weight")),
    "comfyui-comfy-quant": (SIZES_1_3B, with_scales("m.safetensors", "comfy_quant")),
    "lora-kohya": (SIZES_1_3B, bare_and_lora("kohya", alpha=RANK / 2)),
    "lora-diffusers": (SIZES_1_3B, bare_and_lora("diffusers")),
    "lora-comfyui": (SIZES_1_3B, bare_and_lora("comfyui")),
    "wan2.2-i2v-alone": (SIZES_WAN22_I2V, bare("wan2.2_i2v_high_noise.safetensors")),
    "wan2.2-5b": (SIZES_5B, bare("wan2.2_ti2v_5B.safetensors")),
    "wan2.1-i2v": (SIZES_I2V_14B, bare("wan2.1_i2v_480p.safetensors")),
    "vace": (SIZES_1_3B, vace("wan2.1_vace.safetensors")),
}


# --------------------------------------------------------------- one thing wrong --
def without_file(name: str) -> Callable[[Fake], Fake]:
    """Return how to lose a file, and with it the networks that need it."""

    def lose(fake: Fake) -> Fake:
        files = {file: contents for file, contents in fake.files.items() if file != name}
        if fake.path not in files:  # what is left is a LoRA or a twin
            return replace(fake, files=files, networks={}, run=(), path=fake.partner or "", partner=None)
        networks = {label: network for label, network in fake.networks.items() if label in ("raw", "high")}
        return replace(fake, files=files, networks=networks, run=(), partner=None)

    return lose


def without_average(fake: Fake) -> Fake:
    """Return a training file that was saved before its average began."""
    contents = {name: tensors for name, tensors in fake.files[fake.path].items() if name != "generator_ema"}
    return replace(fake, files={fake.path: contents}, networks={"raw": fake.networks["raw"]}, run=())


def without_a_weight(fake: Fake) -> Fake:
    """Return a file in 8 bits where a scale has lost its weight."""
    tensors = dict(fake.files[fake.path].tensors)
    del tensors["blocks.0.ffn.0.weight"]
    return replace(fake, files={fake.path: SafetensorsFile(tensors)}, networks={}, run=())


def without_a_scale(fake: Fake) -> Fake:
    """Return a file in 8 bits where a weight has lost its scale."""
    tensors = dict(fake.files[fake.path].tensors)
    del tensors["blocks.0.ffn.0.scale_weight"]
    return replace(fake, files={fake.path: SafetensorsFile(tensors)}, networks={}, run=())


def without_a_shard(fake: Fake) -> Fake:
    """Return a network of which only the first shard was fetched."""
    files = {name: contents for name, contents in fake.files.items() if "00002-of-" not in name}
    return replace(fake, files=files, networks={}, run=())


# Fakes that must end in one line once a preset asks for what is gone: which fake, and what happens to it.
FLAWS: dict[str, tuple[str, Callable[[Fake], Fake]]] = {
    "longlive-without-lora": ("longlive", without_file("models/lora.pt")),
    "longlive-without-base": ("longlive", without_file("models/longlive_base.pt")),
    "lightx2v-wan2.2-i2v-without-twin": ("lightx2v-wan2.2-i2v", without_file(LIGHTX2V_PAIR[1])),
    "self-forcing-dmd-without-ema": ("self-forcing-dmd", without_average),
    "comfyui-fp8-scaled-without-weight": ("comfyui-fp8-scaled", without_a_weight),
    "comfyui-fp8-scaled-without-scale": ("comfyui-fp8-scaled", without_a_scale),
    "shards-without-second": ("shards", without_a_shard),
}
NAMES = (*RELEASES, *DIALECTS, *FLAWS)
NOT_FAKED = {
    "self-forcing-gan": "no weights were released",
    "self-forcing-plus-plus": "no weights were released",
    "longlive2-nvfp4": "its names (TransformerEngine) were not read",
    "minwm-camera": "its names were not read",
}
ASSUMED = {
    "self-forcing-10s": "the containers",
    "infinite-forcing": "the container",
    "causal-forcing": "that it holds raw weights alone; causal-forcing-both is the other reading",
    "longlive2-lora": "the file, and that base and LoRA lie in one",
    "causvid-4step": "the file",
    "streamdiffusionv2-14b": "the file below the folder",
    "streamdiffusionv2-t2v": "the file",
    "causalwan2.2-i2v": "which of the two FastVideo folders has ffn.fc_in, and the shifts",
    "causalwan2.2-t2v": "which of the two FastVideo folders has ffn.fc_in, the shifts, and the boundary",
    "lightx2v-i2v-14b": "the file",
    "lightx2v-self-forcing-fp8": "the file, and one scale for every row",
    "lightx2v-self-forcing-nvfp4": "the file, and the names of the scales",
    "lightx2v-self-forcing-14b": "the file",
    "matrix-game-2": "that it has text and image embeddings as Wan has",
    "matrix-game-3": "the file; only its channels are the release's",
    "matrix-game-3.5": "the file; only its channels are the release's",
    "lingbot-world-2-1.3b": "the file",
    "lingbot-world-2-14b": "the file",
    "lingbot-world-1-fast": "the file, and the sizes",
    "hy-worldplay": "all names",
    "fused-qkv": "the names",
}


def sizes_of(name: str) -> Sizes:
    """Return the sizes of the real network behind a fake; where they were not read, those of Wan 2.1 1.3B."""
    sizes = DIALECTS[name][0] if name in DIALECTS else PRESETS[name].sizes
    # LingBot-World 1's were not read, and its fake is one of an image-to-video network.
    return sizes or replace(SIZES_1_3B, in_dim=36)


def tiny_sizes(sizes: Sizes) -> Sizes:
    """Return sizes of a network of the same kind that takes no time."""
    return replace(sizes, dim=128, ffn_dim=256, num_heads=1, num_layers=2)


def tiny_presets() -> dict[str, Preset]:
    """Return the presets as they would be if the fakes were the releases: their sizes and their LoRA's rank."""

    def tiny(preset: Preset) -> Preset:
        lora = preset.lora and replace(preset.lora, rank=RANK, alpha=RANK)
        return replace(preset, sizes=preset.sizes and tiny_sizes(preset.sizes), lora=lora)

    return {name: tiny(preset) for name, preset in PRESETS.items()}


def make_fake(name: str, seed: int = 0, *, is_real_size: bool = False) -> Fake:
    """Return the fake of that name. is_real_size: with the release's own shapes, on the device "meta"."""
    if name not in NAMES:
        raise ValueError(f"there is no fake {name!r}; use one of {', '.join(NAMES)}")
    if name in FLAWS:
        whole, spoil = FLAWS[name]
        return spoil(make_fake(whole, seed, is_real_size=is_real_size))
    sizes = sizes_of(name)
    sizes = sizes if is_real_size and sizes.ffn_dim else tiny_sizes(sizes)
    assert sizes.ffn_dim is not None
    config = WanConfig(
        dim=sizes.dim,
        ffn_dim=sizes.ffn_dim,
        num_heads=sizes.num_heads,
        num_layers=sizes.num_layers,
        in_dim=sizes.in_dim,
        out_dim=sizes.out_dim,
        text_dim=4096 if is_real_size else 128,  # the width of the bundled text encoder, so that fakes make videos
        freq_dim=256 if is_real_size else 32,
        model_type="t2v" if sizes.has_image_features is False else "i2v",
    )
    maker = Maker(zlib.crc32(name.encode()) + seed, config, "meta" if is_real_size else "cpu")
    return DIALECTS[name][1](maker) if name in DIALECTS else RELEASES[name](maker)


def key_shapes(contents: Any, place: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shapes of every tensor in a file by its name, containers before it, as `recognise` wants them."""
    if isinstance(contents, SafetensorsFile):
        contents = contents.tensors
    shapes: dict[str, tuple[int, ...]] = {}
    for key, entry in contents.items():
        if isinstance(entry, Tensor):
            shapes[place + key] = tuple(entry.shape)
        elif isinstance(entry, Mapping):
            shapes |= key_shapes(entry, f"{place}{key}.")
    return shapes


def write_fake(fake: Fake, folder: Path) -> Path:
    """Write a fake's files into a folder and return the path that a user would give."""
    for name, contents in fake.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, SafetensorsFile):
            tensors = {key: tensor.contiguous() for key, tensor in contents.tensors.items()}
            save_file(tensors, path, dict(contents.header) if contents.header else None)
        elif PurePosixPath(name).suffix == ".json":
            path.write_text(json.dumps(contents, indent=2), encoding="utf-8")
        else:
            torch.save(contents, path)
    return folder / fake.path if fake.path else folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the fakes that the command line names, each into a folder of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in options.names or NAMES:
        try:
            print(write_fake(make_fake(name, options.seed), options.folder / name))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
