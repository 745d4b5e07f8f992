"""A LoRA of any spelling is the same weights, whole or refused, and merging never holds a network twice."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfforcing_core.config import CausalConfig, StepConfig, WanConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.shapes import wan_shapes
from selfforcing_core.weights import preset_settings
from selfforcing_core.weights.checkpoint import inspect_checkpoint, read_checkpoint, save_checkpoint, with_lora
from selfforcing_core.weights.checkpoint_header import SamplingSettings, lora_header
from selfforcing_core.weights.convert import convert
from selfforcing_core.weights.keymap import from_wan
from selfforcing_core.weights.load import build_model
from selfforcing_core.weights.lora_files import OTHER_KINDS, read_lora
from tests.support.fakes import (
    RANK,
    Maker,
    kohya,
    make_fake,
    merged,
    model,
    peft,
    prefixed,
    scaled,
    tiny_presets,
    write_fake,
)
from tests.support.loading_memory import loading_memory

WAN = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=8, freq_dim=16)
MAKER = Maker(1, WAN)
BASE, PAIRS = MAKER.network(), MAKER.lora()
Q = "blocks.0.self_attn.q"
Pairs = Mapping[str, tuple[Tensor, Tensor]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_checkpoint(path, BASE, WAN, causal=CausalConfig(), steps=StepConfig())
    return path


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def written(folder: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, header)
    return path


def renamed(up: str, down: str, head: str = "diffusion_model.") -> Callable[[Pairs], dict[str, Tensor]]:
    def rename(pairs: Pairs) -> dict[str, Tensor]:
        ups = {f"{head}{name}{up}": pair[1] for name, pair in pairs.items()}
        return ups | {f"{head}{name}{down}": pair[0] for name, pair in pairs.items()}

    return rename


def in_diffusers(pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    return {from_wan(f"{name}.weight", "diffusers").removesuffix(".weight"): pair for name, pair in pairs.items()}


SPELLINGS: dict[str, Callable[[Pairs], dict[str, Tensor]]] = {
    "peft": peft,
    "peft with its adapter's name": renamed(".lora_B.default.weight", ".lora_A.default.weight", "base_model.model."),
    "peft inside FSDP": lambda pairs: peft(pairs, "model._fsdp_wrapped_module.base_model.model."),
    "comfyui": lambda pairs: peft(pairs, "diffusion_model."),
    "bare": lambda pairs: peft(pairs, ""),
    "without the last word": renamed(".lora_B", ".lora_A"),
    "up and down": renamed(".lora_up.weight", ".lora_down.weight"),
    "diffusers": lambda pairs: peft(in_diffusers(pairs), "transformer."),
    "diffusers, older": renamed(".lora.up.weight", ".lora.down.weight", ""),
    "diffusers, oldest": renamed("_lora.up.weight", "_lora.down.weight"),
    "transformers": renamed(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "kohya": lambda pairs: kohya(pairs, RANK),
    "kohya, two underscores": lambda pairs: {
        name.replace("unet_", "unet__"): tensor for name, tensor in kohya(pairs, RANK).items()
    },
    "lycoris with names of diffusers": lambda pairs: {
        name.replace("lora_unet_", "lycoris_"): tensor for name, tensor in kohya(in_diffusers(pairs), RANK).items()
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(tmp_path: Path, base: Path, spelling: str) -> None:
    lora = written(tmp_path, SPELLINGS[spelling](PAIRS))
    expected = merged(BASE, PAIRS)
    assert_same(dict(read_checkpoint(base, loras=[(lora, 1.0)]).state_dict), expected)
    torch.save({"generator_lora": SPELLINGS[spelling](PAIRS)}, tmp_path / "lora.pt")
    assert_same(dict(read_checkpoint(base, loras=[(tmp_path / "lora.pt", 1.0)]).state_dict), expected)


@pytest.mark.parametrize("name", ["longlive", "memflow", "lora-kohya", "lora-diffusers", "lora-comfyui"])
def test_base_and_lora_of_a_release_are_the_weights_that_it_is_run_with(tmp_path: Path, name: str) -> None:
    fake = make_fake(name)
    path = write_fake(fake, tmp_path)
    assert fake.partner is not None
    checkpoint = read_checkpoint(path, loras=[(tmp_path / fake.partner, 1.0)])
    assert_same(dict(checkpoint.state_dict), fake.networks["merged"])
    assert "LoRA merged at strength 1 (20 weights, rank 8)" in checkpoint.notes[0]
    assert_same(dict(read_checkpoint(path).state_dict), fake.networks["raw"])  # read again without it


def test_layers_outside_the_blocks_kernels_and_plain_differences_are_merged(tmp_path: Path, base: Path) -> None:
    kernel = tuple(BASE["patch_embedding.weight"].shape)
    down, up = MAKER.draw("A", (2, *kernel[1:])), MAKER.draw("B", (kernel[0], 2, 1, 1, 1))
    embed = MAKER.draw("C", (2, 8)), MAKER.draw("D", (128, 2))
    changes = {
        name: MAKER.draw(f"diff {name}", tuple(BASE[name].shape))
        for name in ("blocks.1.modulation", "blocks.0.norm3.weight", "blocks.0.norm3.bias", "head.head.bias")
    }
    lora = {
        "lora_unet_patch_embedding.lora_down.weight": down,
        "lora_unet_patch_embedding.lora_up.weight": up,
        "transformer.condition_embedder.text_embedder.linear_1.lora_A.weight": embed[0],
        "transformer.condition_embedder.text_embedder.linear_1.lora_B.weight": embed[1],
        "diffusion_model.blocks.1.modulation.diff": changes["blocks.1.modulation"],
        "lora_unet_blocks_0_norm3.w_norm": changes["blocks.0.norm3.weight"],
        "lora_unet_blocks_0_norm3.b_norm": changes["blocks.0.norm3.bias"],
        "diffusion_model.head.head.diff_b": changes["head.head.bias"],
    }
    expected = {name: weight + 0.5 * changes[name] if name in changes else weight for name, weight in BASE.items()}
    expected["patch_embedding.weight"] = BASE["patch_embedding.weight"] + 0.5 * (up.flatten(1) @ down.flatten(1)).view(
        kernel
    )
    expected["text_embedding.0.weight"] = BASE["text_embedding.0.weight"] + 0.5 * (embed[1] @ embed[0])
    assert_same(dict(read_checkpoint(base, loras=[(written(tmp_path, lora), 0.5)]).state_dict), expected)


# -------------------------------------------------------- strength and alpha --
def test_strength_0_is_the_base_bit_exact_and_said(tmp_path: Path) -> None:
    weights = {name: torch.where(weight > 0, weight, -0.0) for name, weight in BASE.items()}
    save_checkpoint(tmp_path / "zeros.safetensors", weights, WAN)
    checkpoint = read_checkpoint(tmp_path / "zeros.safetensors", loras=[(written(tmp_path, peft(PAIRS)), 0.0)])
    for name, weight in checkpoint.state_dict.items():
        assert weight.numpy().tobytes() == weights[name].numpy().tobytes(), name
    assert "not merged, its strength is 0" in checkpoint.notes[-1]
    assert checkpoint.loras == ()


def test_several_lora_add_up_and_are_rounded_once(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in BASE.items()}
    save_checkpoint(tmp_path / "base.safetensors", weights, WAN)
    other = Maker(2, WAN).lora()
    loras = [(written(tmp_path, peft(PAIRS)), 1.0), (tmp_path / "other.pt", -0.25)]
    torch.save(kohya(other, alpha=2), tmp_path / "other.pt")
    checkpoint = read_checkpoint(tmp_path / "base.safetensors", loras=loras)
    wide = merged({name: weight.float() for name, weight in weights.items()}, PAIRS)
    wide = merged(wide, other, alpha=2, strength=-0.25)
    assert_same(dict(checkpoint.state_dict), {name: weight.bfloat16() for name, weight in wide.items()})
    assert [each["strength"] for each in checkpoint.loras] == [1.0, -0.25]


def test_alpha_comes_from_the_caller_then_the_file_then_peft_and_is_else_guessed_aloud(tmp_path: Path) -> None:
    def alphas(path: Path, **options: Any) -> tuple[list[float], str]:
        summary = read_lora(path, **options).summary()
        return summary["alphas"], " ".join(summary["notes"])

    path = written(tmp_path, peft(PAIRS))
    guess, line = alphas(path)
    assert guess == [RANK]
    assert "says no alpha; it is taken for the rank (8)" in line
    assert alphas(path, alpha=2.0) == ([2.0], "")
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 32, "transformer.r": RANK})}
    assert alphas(written(tmp_path, peft(PAIRS), header)) == ([32.0], "")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK}))
    assert alphas(path) == ([16.0], "")
    assert alphas(tmp_path) == ([16.0], ""), "PEFT's folder"
    assert alphas(written(tmp_path, kohya(PAIRS, 4))) == ([4.0], "")
    overridden, line = alphas(path, alpha=2.0)
    assert overridden == [2.0]
    assert "says alpha 4 and 16; 2 is used" in line


def test_our_trainers_lora_brings_along_how_it_is_sampled(tmp_path: Path, base: Path) -> None:
    steps = StepConfig(steps=(1000.0, 500.0))
    header = lora_header("tiny", SamplingSettings(CausalConfig(chunk=1), steps))
    tensors = {
        f"diffusion_model.{name}.{part}": tensor
        for name, (down, up) in PAIRS.items()
        for part, tensor in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(4.0)))
    }
    lora = written(tmp_path, tensors, header)
    checkpoint = read_checkpoint(base, loras=[(lora, 1.0)])
    assert_same(dict(checkpoint.state_dict), merged(BASE, PAIRS, alpha=4))
    assert (checkpoint.causal, checkpoint.steps) == (CausalConfig(chunk=1), steps)
    assert "its causal, steps settings take the place of the model's" in checkpoint.notes[-1]
    assert inspect_checkpoint(lora)["base"] == "tiny"


# --------------------------------------------------------- base and LoRA in one --
@pytest.mark.parametrize("form", ["containers", "prefixes", "a flat base", "a LoRA of the critic beside"])
def test_a_file_with_base_and_lora_is_loaded_merged_and_says_so(tmp_path: Path, form: str) -> None:
    path = tmp_path / "both.pt"
    lora = peft(PAIRS)
    contents = {
        "containers": {"generator": model(BASE), "generator_lora": lora},
        "prefixes": prefixed("generator.", BASE) | prefixed("generator_lora.", lora),
        "a flat base": {**model(BASE), "generator_lora": lora},
        "a LoRA of the critic beside": {
            "generator": model(BASE),
            "generator_lora": lora,
            "critic_lora": prefixed("critic.", lora),
            "step": 7,
        },
    }[form]
    torch.save(contents, path)
    checkpoint = read_checkpoint(path)
    assert_same(dict(checkpoint.state_dict), merged(BASE, PAIRS))
    assert sum("LoRA merged at strength 1" in note for note in checkpoint.notes) == 1
    assert any("critic_lora left out" in note for note in checkpoint.notes) == ("critic" in form)
    assert [each["ranks"] for each in inspect_checkpoint(path)["loras"]] == [[RANK]]
    # As a LoRA of another base it is its LoRA.
    save_checkpoint(tmp_path / "base.safetensors", BASE, WAN)
    again = read_checkpoint(tmp_path / "base.safetensors", loras=[(path, 1.0)])
    assert_same(dict(again.state_dict), merged(BASE, PAIRS))


def test_a_lora_beside_raw_and_averaged_weights_asks_into_which(tmp_path: Path) -> None:
    average = MAKER.network("ema")
    contents = {"generator": model(BASE), "generator_ema": model(average), "generator_lora": peft(PAIRS)}
    torch.save(contents, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"a LoRA beside raw and averaged weights; .*: use --weights raw or ema"):
        read_checkpoint(tmp_path / "m.pt")
    assert_same(dict(read_checkpoint(tmp_path / "m.pt", weights="ema").state_dict), merged(average, PAIRS))


# ------------------------------------------------------------- what it is put on --
@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "comfy_quant"])
def test_8_bits_with_scales_are_merged_in_float32(tmp_path: Path, form: str) -> None:
    stored, exact = scaled(BASE, form)
    save_file(stored, tmp_path / "base.safetensors")
    loras = [(written(tmp_path, peft(PAIRS)), 1.0)]
    assert_same(dict(read_checkpoint(tmp_path / "base.safetensors", loras=loras).state_dict), merged(exact, PAIRS))


def test_8_bits_without_scales_are_widened_where_a_lora_changes_them(tmp_path: Path) -> None:
    narrow = {
        name: weight.to(torch.float8_e4m3fn) if f"{Q}.weight" in name else weight for name, weight in BASE.items()
    }
    save_file(narrow, tmp_path / "base.safetensors")
    weights = read_checkpoint(tmp_path / "base.safetensors", loras=[(written(tmp_path, peft(PAIRS)), 1.0)]).state_dict
    wide = {name: weight.float() for name, weight in narrow.items()}
    assert torch.equal(weights[f"{Q}.weight"], merged(wide, PAIRS)[f"{Q}.weight"])


def _storages() -> dict[int, int]:
    """Return the bytes of every tensor's memory that is alive and no older than `gc.freeze`, by its address."""
    alive = (each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter))
    return {each.data_ptr(): each.nbytes() for each in alive if each.device.type == "cpu"}


def test_no_moment_holds_the_weights_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tensors alive while a network is built, merged ones, originals and temporaries, those of real memory."""
    contents = {"generator": BASE, "generator_lora": peft(PAIRS)}
    torch.save(contents, tmp_path / "both.pt", _use_new_zipfile_serialization=False)  # a bare pickle cannot be mapped
    total = sum(weight.nbytes for weight in BASE.values())
    lora = sum(tensor.nbytes for tensor in peft(PAIRS).values())
    largest = max(weight.nbytes for weight in BASE.values())
    peaks: list[int] = []
    gc.freeze()  # the base, the LoRA and a million objects of tests before, but not what is read below
    checkpoint = read_checkpoint(tmp_path / "both.pt")
    weights = checkpoint.state_dict
    plain = type(weights).__getitem__

    def watched(self: Any, name: str) -> Tensor:
        tensor = plain(self, name)
        peaks.append(sum(_storages().values()))
        return tensor

    monkeypatch.setattr(type(weights), "__getitem__", watched)
    network = build_model(checkpoint)
    assert min(peaks) > total / 2, "what is alive was found"
    assert_same(dict(network.state_dict()), merged(BASE, PAIRS))
    assert len(peaks) == len(BASE)
    assert max(peaks) <= total + lora + 2 * largest
    assert not weights.loras[0][0], "nothing of the LoRA is left either"  # type: ignore[attr-defined]


# ----------------------------------------------------------------- its kin --
def draw(name: str, *shape: int) -> Tensor:
    return MAKER.draw(f"kin {name}", shape)


LOHA = {
    f"{Q}.hada_w{which}_{letter}": draw(f"{which}{letter}", *shape)
    for which in (1, 2)
    for letter, shape in (("a", (128, 2)), ("b", (2, 128)))
}
LOKR = {f"{Q}.lokr_w1": draw("w1", 4, 8), f"{Q}.lokr_w2_a": draw("w2a", 32, 2), f"{Q}.lokr_w2_b": draw("w2b", 2, 16)}
GLORA_A = {f"{Q}.a1.weight": draw("a1", 128, 2), f"{Q}.a2.weight": draw("a2", 2, 128)}
GLORA = GLORA_A | {f"{Q}.b1.weight": draw("b1", 128, 2), f"{Q}.b2.weight": draw("b2", 2, 128)}
OLDER = {key: tensor.T for key, tensor in GLORA.items()}
PAIR = {f"{Q}.lora_B.weight": draw("B", 128, 2), f"{Q}.lora_A.weight": draw("A", 2, 128)}
ALPHA = {f"{Q}.alpha": torch.tensor(3.0)}
W = BASE[f"{Q}.weight"]


def by_rows(change: Tensor, strength: float = 1.0) -> Tensor:
    total = (W + change) * (draw("rows", 128, 1) / W.norm(dim=1, keepdim=True))
    return W + strength * (total - W)


def by_columns(change: Tensor) -> Tensor:
    return (W + change) * (draw("columns", 1, 128) / (W + change).norm(dim=0, keepdim=True))


LOHA_CHANGE = (
    1.5 * (LOHA[f"{Q}.hada_w1_a"] @ LOHA[f"{Q}.hada_w1_b"]) * (LOHA[f"{Q}.hada_w2_a"] @ LOHA[f"{Q}.hada_w2_b"])
)
PAIR_CHANGE = 1.5 * PAIR[f"{Q}.lora_B.weight"] @ PAIR[f"{Q}.lora_A.weight"]
# Written out from the papers: what a file holds, and what becomes of the one weight that it changes, alpha 3 of rank 2.
KIN: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "LoHa": (LOHA | ALPHA, W + LOHA_CHANGE),
    "LoKr": (
        LOKR | ALPHA,
        W + 1.5 * torch.kron(LOKR[f"{Q}.lokr_w1"], LOKR[f"{Q}.lokr_w2_a"] @ LOKR[f"{Q}.lokr_w2_b"]),
    ),
    # of two whole matrices alpha says nothing
    "LoKr, whole": (
        {f"{Q}.lokr_w1": draw("w1", 4, 8), f"{Q}.lokr_w2": draw("w2", 32, 16)} | ALPHA,
        W + torch.kron(draw("w1", 4, 8), draw("w2", 32, 16)),
    ),
    "GLoRA": (
        GLORA | ALPHA,
        W + 1.5 * (W @ draw("a1", 128, 2) @ draw("a2", 2, 128) + draw("b1", 128, 2) @ draw("b2", 2, 128)),
    ),
    "GLoRA, older": (
        OLDER | ALPHA,
        W + 1.5 * (W @ draw("a2", 2, 128).T @ draw("a1", 128, 2).T + draw("b2", 2, 128).T @ draw("b1", 128, 2).T),
    ),
    "DoRA": (PAIR | ALPHA | {f"{Q}.dora_scale": draw("rows", 128, 1)}, by_rows(PAIR_CHANGE)),
    "DoRA by columns": (PAIR | ALPHA | {f"{Q}.dora_scale": draw("columns", 1, 128)}, by_columns(PAIR_CHANGE)),
    "DoRA of LoHa": (LOHA | ALPHA | {f"{Q}.dora_scale": draw("rows", 128, 1)}, by_rows(LOHA_CHANGE)),
    "replacement": ({f"{Q}.set_weight": draw("set", 128, 128)}, draw("set", 128, 128)),
}


@pytest.mark.parametrize("kind", KIN)
@pytest.mark.parametrize("head", ["diffusion_model.", "lora_unet_"])
def test_the_kin_of_lora_are_what_their_papers_say(tmp_path: Path, base: Path, kind: str, head: str) -> None:
    tensors, expected = KIN[kind]
    if head == "lora_unet_":  # LyCORIS writes paths with underscores
        tensors = {key.replace(Q, Q.replace(".", "_")): tensor for key, tensor in tensors.items()}
    lora = written(tmp_path, {head + key: tensor for key, tensor in tensors.items()})
    weights = read_checkpoint(base, loras=[(lora, 1.0)]).state_dict
    torch.testing.assert_close(weights[f"{Q}.weight"], expected, atol=1e-5, rtol=1e-5)
    assert_same(
        {n: w for n, w in weights.items() if n != f"{Q}.weight"}, {n: w for n, w in BASE.items() if n != f"{Q}.weight"}
    )
    (name,) = read_lora(lora).summary()["kinds"]
    assert name == kind.partition(",")[0].removesuffix(" by columns")
    # what convert writes of it means the same
    convert(lora, tmp_path / "copy.safetensors")
    again = read_checkpoint(base, loras=[(tmp_path / "copy.safetensors", 1.0)]).state_dict
    assert torch.equal(again[f"{Q}.weight"], weights[f"{Q}.weight"])


def test_half_a_strength_is_half_the_way_but_for_a_replacement(tmp_path: Path, base: Path) -> None:
    for kind, (tensors, expected) in KIN.items():
        weights = read_checkpoint(base, loras=[(written(tmp_path, tensors), 0.5)]).state_dict
        half = expected if kind == "replacement" else (W + expected) / 2
        torch.testing.assert_close(weights[f"{Q}.weight"], half, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "DoRA", "difference", "replacement"])
@pytest.mark.parametrize("fused", [f"{Q[:-1]}qkv", f"lora_unet_{Q[:-1]}qkv".replace(".", "_"), "blocks.0.attn1.to_qkv"])
def test_a_fused_projections_lora_is_that_of_its_parts(tmp_path: Path, base: Path, kind: str, fused: str) -> None:
    up, down, a2 = draw("B3", 384, 2), draw("A3", 2, 128), draw("C3", 384, 2)
    whole = torch.cat([BASE[f"{Q[:-1]}{each}.weight"] for each in "qkv"])
    pair = {f"{fused}.lora_B.weight": up, f"{fused}.lora_A.weight": down}
    changed = (whole + up @ down) * (draw("R3", 384, 1) / whole.norm(dim=1, keepdim=True))
    cases: dict[str, tuple[dict[str, Tensor], Tensor]] = {
        "LoRA": (pair, whole + up @ down),
        "LoHa": (
            {f"{fused}.hada_w{n}_{x}": t for n, x, t in ((1, "a", up), (1, "b", down), (2, "a", a2), (2, "b", down))},
            whole + (up @ down) * (a2 @ down),
        ),
        "DoRA": (pair | {f"{fused}.dora_scale": draw("R3", 384, 1)}, changed),
        "difference": ({f"{fused}.diff": up @ down}, whole + up @ down),
        "replacement": ({f"{fused}.set_weight": up @ down}, up @ down),
    }
    tensors, expected = cases[kind]
    weights = read_checkpoint(base, loras=[(written(tmp_path, tensors), 1.0)]).state_dict
    merged_rows = torch.cat([weights[f"{Q[:-1]}{each}.weight"] for each in "qkv"])
    torch.testing.assert_close(merged_rows, expected, atol=1e-5, rtol=1e-5)


def test_what_is_for_a_text_encoder_is_left_out_by_name(tmp_path: Path, base: Path) -> None:
    text = pair_of("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 8) | pair_of("text_encoders.umt5.q", 8, 8)
    checkpoint = read_checkpoint(base, loras=[(written(tmp_path, kohya(PAIRS, RANK) | text), 1.0)])
    assert_same(dict(checkpoint.state_dict), merged(BASE, PAIRS))
    assert "4 tensors for a text encoder are left out, the first is lora_te_text_model_encoder_" in checkpoint.notes[1]


# ------------------------------------------------------------------- refusals --
def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if key not in name}


def pair_of(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.zeros(4, columns), f"{name}.lora_B.weight": torch.zeros(rows, 4)}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "A without B": (without(peft(PAIRS), f"{Q}.lora_B"), f"{Q}.lora_A.weight has no B beside it: half of the LoRA"),
    "B without A": (without(peft(PAIRS), f"{Q}.lora_A"), f"{Q}.lora_B.weight has no A beside it: half of the LoRA"),
    "alpha alone": (peft(PAIRS) | {"head.head.alpha": torch.tensor(1.0)}, "head.head.alpha has no B beside it"),
    "another width": (
        pair_of(Q, 256, 256),
        "whose blocks.0.self_attn.q.weight is [128, 128] and the LoRA's [256, 256]",
    ),
    "more blocks": (pair_of("blocks.9.self_attn.q", 128, 128), "that this model does not have, the first is blocks.9."),
    "image layers": (peft(PAIRS) | pair_of("blocks.0.cross_attn.k_img", 128, 128), "1 of its 21 parts are for"),
    "a text encoder's": (pair_of("lora_te_text_model_encoder", 8, 8), "is a LoRA for a text encoder alone (lora_te_"),
    "half a LoHa": ({f"{Q}.hada_w1_a": torch.zeros(128, 2)}, "has no hada_w1_b beside it"),
    "half a LoKr": ({f"{Q}.lokr_w1": torch.zeros(2, 2)}, "has no lokr_w2_a beside it"),
    "ranks of LoHa": (LOHA | {f"{Q}.hada_w2_b": torch.zeros(3, 128)}, "do not fit each other"),
    "a kernel's LoHa": (LOHA | {f"{Q}.hada_t1": torch.zeros(2, 2, 1, 1)}, "is LoHa of kernels"),
    "two kinds": (LOHA | pair_of(Q, 128, 128), f"is not the only change of {Q}"),
    "magnitude alone": (peft(PAIRS) | {"head.head.dora_scale": torch.ones(4, 1)}, "dora_scale has no B beside it"),
    "magnitude of another": (pair_of(Q, 128, 128) | {f"{Q}.dora_scale": torch.ones(128)}, "does not fit this model"),
    "fused LoKr": (
        {f"{Q[:-1]}qkv.lokr_w1": torch.zeros(3, 1), f"{Q[:-1]}qkv.lokr_w2": torch.zeros(128, 128)},
        "holds LoKr for a fused projection",
    ),
    "fused and its part": (
        pair_of(f"{Q[:-1]}qkv", 384, 128) | pair_of(Q, 128, 128),
        "keep one of them",
    ),
    "another part": (peft(PAIRS) | {f"{Q}.lora_C.weight": torch.zeros(2)}, "1 of its 41 tensors are of no known part"),
    "a whole network": (BASE, "is no LoRA that is read here"),
    "ranks": ({"q.lora_A.weight": torch.zeros(3, 8), "q.lora_B.weight": torch.zeros(8, 4)}, "[3, 8] are no pair"),
    "twice": (peft(PAIRS) | peft(PAIRS, ""), "both change blocks."),
    "pair and difference": (peft(PAIRS) | {f"{Q}.diff": torch.zeros(128, 128)}, "both a pair and a difference"),
    "8 bits": ({"q.lora_A.weight": torch.zeros(3, 8, dtype=torch.int8)}, "only plain floating-point matrices"),
    "alpha of NaN": (peft(PAIRS) | {f"{Q}.alpha": torch.tensor(float("nan"))}, "nan, not a finite number"),
    "alpha of two": (peft(PAIRS) | {f"{Q}.alpha": torch.ones(2)}, "not a number"),
}


@pytest.mark.parametrize("flaw", REFUSED)
def test_what_does_not_fit_to_the_last_tensor_ends_in_one_line(tmp_path: Path, base: Path, flaw: str) -> None:
    tensors, words = REFUSED[flaw]
    lora = written(tmp_path, tensors)
    with pytest.raises(ValueError) as caught:
        read_checkpoint(base, loras=[(lora, 1.0)])
    assert str(caught.value).startswith(f"{lora}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sign", OTHER_KINDS)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path, sign: str) -> None:
    lora = written(tmp_path, peft(PAIRS) | {f"diffusion_model.{Q}.{sign}x": torch.zeros(2)})
    with pytest.raises(ValueError, match=f"is {OTHER_KINDS[sign]} "):
        read_lora(lora)


@pytest.mark.parametrize("setting", ["use_dora", "use_rslora", "alpha_pattern"])
def test_settings_of_peft_that_change_the_numbers_are_refused(tmp_path: Path, setting: str) -> None:
    lora = written(tmp_path, peft(PAIRS))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK, setting: {"q": 1}}))
    with pytest.raises(ValueError, match=f"is trained with {setting}, which is not read"):
        read_lora(lora)


def test_the_settings_of_another_lora_in_the_folder_are_not_taken(tmp_path: Path) -> None:
    lora = written(tmp_path, peft(PAIRS))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 64}))
    with pytest.raises(ValueError, match=r"has rank 8, but adapter_config\.json says 64: it belongs to another LoRA"):
        read_lora(lora)


def test_a_lora_alone_is_no_model(tmp_path: Path) -> None:
    torch.save({"generator_lora": peft(PAIRS)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="holds a LoRA alone; load its base, and it on top"):
        read_checkpoint(tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="looks like a LoRA; load its base, and it on top"):
        read_checkpoint(written(tmp_path, peft(PAIRS)))


def test_a_strength_that_is_no_number_and_a_taehv_are_refused(tmp_path: Path, base: Path) -> None:
    lora = read_lora(written(tmp_path, peft(PAIRS)))
    with pytest.raises(ValueError, match="strength nan is not a finite number"):
        with_lora(read_checkpoint(base), lora, float("nan"))
    with pytest.raises(ValueError, match="a taehv takes no LoRA; give it to the video model"):
        with_lora(read_checkpoint("assets/tiny/taehv.safetensors"), lora)


# -------------------------------------------------------------------- presets --
def test_a_presets_lora_is_merged_with_its_alpha_unless_one_is_there_or_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the cache had the policy of LongLive."""
    monkeypatch.setattr(preset_settings, "POLICIES", (*preset_settings.POLICIES, "longlive"))
    monkeypatch.setattr(preset_settings, "find_preset", lambda name: tiny_presets()[name])
    fake = make_fake("longlive")
    path = write_fake(fake, tmp_path)
    reading = preset_settings.read_with_preset(path, "longlive")
    assert_same(dict(reading.checkpoint.state_dict), fake.networks["merged"])
    assert not any("taken for the rank" in note for note in reading.checkpoint.notes), "the preset says alpha"
    convert(path, tmp_path / "copy.safetensors", preset="longlive")
    (tmp_path / "models/lora.pt").rename(tmp_path / "elsewhere.pt")
    copy = preset_settings.read_with_preset(tmp_path / "copy.safetensors", "longlive").checkpoint
    assert_same(dict(copy.state_dict), fake.networks["merged"])
    with pytest.raises(ValueError, match=r"needs models/lora\.pt beside it"):
        preset_settings.read_with_preset(path, "longlive")
    given = preset_settings.read_with_preset(path, "longlive", loras=[(tmp_path / "elsewhere.pt", 1.0)]).checkpoint
    assert_same(dict(given.state_dict), fake.networks["merged"])
    both = make_fake("longlive-one-file")
    own = preset_settings.read_with_preset(write_fake(both, tmp_path / "both"), "longlive").checkpoint
    assert_same(dict(own.state_dict), both.networks["merged"])


# -------------------------------------------------------------- command line --
def test_convert_writes_the_merged_weights_and_what_they_are(tmp_path: Path, base: Path) -> None:
    lora = written(tmp_path, peft(PAIRS))
    convert(base, tmp_path / "out.safetensors", loras=[(lora, 0.5)])
    checkpoint = read_checkpoint(tmp_path / "out.safetensors")
    assert_same(dict(checkpoint.state_dict), merged(BASE, PAIRS, strength=0.5))
    assert checkpoint.metadata["merged_loras"] == f"{lora} at strength 0.5"
    assert checkpoint.loras == ()
    assert (
        main(["convert", str(base), str(tmp_path / "cli.pt"), "--lora", str(lora), "0.25", "--lora", str(lora), "0.25"])
        == 0
    )
    twice = merged(merged(BASE, PAIRS, strength=0.25), PAIRS, strength=0.25)
    assert_same(dict(read_checkpoint(tmp_path / "cli.pt").state_dict), twice)


def test_convert_writes_a_lora_as_comfyuis_loaders_read_it(tmp_path: Path, base: Path) -> None:
    torch.save({"generator_lora": peft(PAIRS)}, tmp_path / "lora.pt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "lora.pt"), str(out)]) == 0
    names = set(load_file(out))
    assert {f"diffusion_model.{Q}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} < names
    assert_same(dict(read_checkpoint(base, loras=[(out, 1.0)]).state_dict), merged(BASE, PAIRS))
    with pytest.raises(ValueError, match=r"is a LoRA, which is written alone and as \.safetensors"):
        convert(tmp_path / "lora.pt", tmp_path / "out.pt")


def test_inspect_says_what_a_lora_is_alone_and_on_its_base(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = written(tmp_path, kohya(PAIRS, 4))
    assert main(["inspect", str(lora)]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (alone["kind"], alone["pairs"], alone["ranks"], alone["alphas"]) == ("lora", 20, [RANK], [4.0])
    assert alone["width"] == 128
    assert main(["inspect", str(base), "--lora", str(lora), "0.5"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["kind"] == "wan"
    assert [(each["file"], each["strength"]) for each in both["loras"]] == [(str(lora), 0.5)]
    assert main(["inspect", str(base), "--lora", str(base)]) == 2
    assert "no LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["x.pt", "much"], ["x.pt", "1", "2"]])
def test_an_option_with_more_than_a_file_and_a_number_ends_in_one_line(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "tiny", "--lora", *given])
    error = capsys.readouterr().err
    assert "a file and at most one number can follow" in error
    assert error.count("\n") == 1


def test_generate_makes_the_video_of_the_merged_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written as latents, which a codec cannot blur."""
    config = read_checkpoint("assets/tiny/model.safetensors").config
    assert isinstance(config, WanConfig)
    pairs = Maker(3, config).lora(rank=2)
    lora = written(tmp_path, peft(pairs))
    convert("tiny", tmp_path / "merged.safetensors", loras=[(lora, 0.5)])
    models = {"merged": ["--model", str(tmp_path / "merged.safetensors"), "--taehv", "tiny", "--text-encoder", "tiny"]}
    models |= {"lora": ["--lora", str(lora), "0.5"], "plain": []}
    result = {}
    for name, options in models.items():
        latents = tmp_path / f"latents-{name}.safetensors"
        out = ["--out", str(tmp_path / f"{name}.mp4"), "--latents", str(latents), "--frames", "9"]
        size = ["--width", "64", "--height", "64"]
        assert main(["generate", "--prompt", "a red square", *out, *size, *options]) == 0, capsys.readouterr().err
        result[name] = latents.read_bytes()[-1000:]
    assert result["lora"] == result["merged"] != result["plain"]


def test_fakes_cover_every_linear_of_the_blocks() -> None:
    linears = [name for name, shape in wan_shapes(WAN).items() if name.startswith("blocks.") and len(shape) == 2]
    assert {f"{name}.weight" for name in PAIRS} == set(linears)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merged_network_leaves_nothing_in_memory_but_its_weights(tmp_path: Path, dtype: str) -> None:
    """Matrices between which the allocator would keep what they pass through; measured in a process of its own."""
    config = WanConfig(dim=768, ffn_dim=4480, num_heads=6, num_layers=14, text_dim=8, freq_dim=16)
    shapes = wan_shapes(config)
    state = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_checkpoint(tmp_path / "m.safetensors", state, config)
    matrices = {name: shape for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2}
    lora = {}
    for name, (rows, columns) in matrices.items():
        module = name.removesuffix("weight")
        lora[f"{module}lora_A.weight"] = torch.full((128, columns), 0.01, dtype=torch.bfloat16)
        lora[f"{module}lora_B.weight"] = torch.full((rows, 128), 0.01, dtype=torch.bfloat16)
    save_file(lora, tmp_path / "lora.safetensors")
    peak, still = loading_memory(tmp_path / "m.safetensors", dtype, tmp_path / "lora.safetensors")
    weights = sum(math.prod(shape) for shape in shapes.values()) * getattr(torch, dtype).itemsize
    largest = 4 * max(math.prod(shape) for shape in matrices.values())  # one in float32
    assert peak < weights + 4 * largest, "a weight, what is added to it, and what the allocator keeps for a while"
    assert still < weights + 2 * largest
