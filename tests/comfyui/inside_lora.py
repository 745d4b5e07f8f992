"""LoRA and its kin, merged by the core and patched by ComfyUI's loader, weight by weight. Run by inside_checks.py."""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from inside import CORE, FOLDER, WanConfig, core, host, importlib, loaded
from safetensors.torch import save_file
from torch import Tensor

HEAD, NAME = "diffusion_model.", "blocks.0.ffn.0"
ROWS, COLUMNS, RANK = 256, 128, 4


def _draw(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + sum(shape))
    return torch.randn(shape, generator=generator) / 4


def _files() -> dict[str, dict[str, Tensor]]:
    """Return one file of each kind, all for one weight of 256 rows and 128 columns."""
    draw, rows, columns = _draw, ROWS, COLUMNS
    pair = {"lora_up.weight": draw("B", rows, RANK), "lora_down.weight": draw("A", RANK, columns)}
    loha = {f"hada_w{n}_a": draw(f"a{n}", rows, RANK) for n in "12"}
    loha |= {f"hada_w{n}_b": draw(f"b{n}", RANK, columns) for n in "12"}
    lokr = {"lokr_w1_a": draw("w1a", 8, 2), "lokr_w1_b": draw("w1b", 2, 16)}
    whole = {"lokr_w1": draw("w1", 8, 16), "lokr_w2": draw("w2", 32, 8)}
    glora = {"a1.weight": draw("a1", columns, RANK), "a2.weight": draw("a2", RANK, columns)}
    glora |= {"b1.weight": draw("b1", rows, RANK), "b2.weight": draw("b2", RANK, columns)}
    older = {"a1.weight": draw("o1", RANK, columns), "a2.weight": draw("o2", columns, RANK)}
    older |= {"b1.weight": draw("p1", RANK, columns), "b2.weight": draw("p2", rows, RANK)}
    by_row, by_column = {"dora_scale": draw("r", rows, 1)}, {"dora_scale": draw("c", 1, columns)}
    alpha = {"alpha": torch.tensor(3.0)}
    files = {
        "LoRA": pair | alpha,
        "LoRA without alpha": pair,
        "LoHa": loha | alpha,
        "LoHa without alpha": loha,
        "LoKr of products": lokr | {"lokr_w2_a": draw("w2a", 32, 3), "lokr_w2_b": draw("w2b", 3, 8)} | alpha,
        "LoKr of one product": lokr | {"lokr_w2": draw("w2", 32, 8)} | alpha,
        "LoKr of the other": {"lokr_w1": whole["lokr_w1"], "lokr_w2_a": draw("x", 32, 3), "lokr_w2_b": draw("y", 3, 8)},
        "LoKr, whole": whole | alpha,
        "GLoRA": glora | alpha,
        "GLoRA, older": older | alpha,
        "DoRA": pair | alpha | by_row,
        "DoRA by columns": pair | alpha | by_column,
        "DoRA of LoHa": loha | alpha | by_row,
        "DoRA of LoKr": whole | by_column,
        "DoRA of GLoRA": glora | alpha | by_column,
        "difference": {"diff": draw("d", rows, columns), "diff_b": draw("e", rows)},
        "replacement": {"set_weight": draw("s", rows, columns)},
    }
    return {kind: {f"{HEAD}{NAME}.{ending}": tensor for ending, tensor in file.items()} for kind, file in files.items()}


def lora_and_its_kin_are_as_in_the_host() -> dict[str, Any]:
    """Return by kind and strength how far the core's weight is from that of ComfyUI's LoRA loader, and what it changed.

    Also of a MODEL that Load Model makes of a file with base and LoRA, whose patches are ComfyUI's.
    """
    lora_files = importlib.import_module(CORE + "weights.lora_files")
    net, results = core["model"].CausalWan(WanConfig(dim=COLUMNS, ffn_dim=ROWS, num_heads=1, num_layers=1)), {}
    for parameter in net.parameters():  # a new one's last layer is zero
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    keys = {f"{HEAD}{NAME}": f"{HEAD}{NAME}.weight"}
    for kind, file in _files().items():
        save_file(file, FOLDER / "kin-lora.safetensors")
        lora = lora_files.read_lora(FOLDER / "kin-lora.safetensors")
        for strength in (1.0, 0.5, -0.7):
            ours, changed, distances = lora_files.merge(dict(weights), lora, strength), [], []
            for key, patch in comfy.lora.load_lora(dict(file), keys).items():
                name, patches = key.removeprefix(HEAD), [(strength, patch, 1.0, None, None)]
                theirs = comfy.lora.calculate_weight(patches, weights[name].clone(), key)
                distances.append(float((theirs - ours[name]).abs().max()))
                changed.append(float((theirs - weights[name]).abs().max()))
            results[f"{kind} {strength:g}"] = [max(distances), min(changed)]
        torch.save({"generator": dict(weights), "generator_lora": file}, FOLDER / "kin.pt")
        patcher = loaded(FOLDER / "kin.pt")
        host.load([patcher])
        state = patcher.model.diffusion_model.state_dict()[f"{NAME}.weight"]
        merged = lora_files.merge(dict(weights), lora, 1.0)[f"{NAME}.weight"]
        results[f"{kind} in a MODEL"] = [float((state - merged).abs().max()), 1.0]
        patcher.unpatch_model()
    return results
