"""Every dialect's names become Wan names and come back, and no two keys are taken for one parameter in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfforcing_core.config import NETWORK_SIZES, TAEHVConfig
from selfforcing_core.shapes import mismatch, taehv_config, taehv_shapes, wan_config, wan_shapes
from selfforcing_core.weights.keymap import (
    DIALECTS,
    WRAPPER_INFIXES,
    describe_dialect,
    from_wan,
    fused_parts,
    prefix_before,
    to_wan,
    wan_names,
)

NAMES = sorted(wan_shapes(NETWORK_SIZES["tiny"])) + sorted(wan_shapes(NETWORK_SIZES["i2v-14b"]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_comes_back_to_the_wan_name(dialect: str) -> None:
    theirs = {from_wan(name, dialect): name for name in NAMES}
    assert len(theirs) == len(set(NAMES)), "two parameters got one name"
    assert {to_wan(key): key for key in theirs} == {name: key for key, name in theirs.items()}
    assert describe_dialect(theirs) == dialect


@pytest.mark.parametrize("preset", ["t2v-1.3b", "i2v-14b"])
def test_diffusers_names_are_those_of_its_own_class(preset: str) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = NETWORK_SIZES[preset]
    image = {"image_dim": 1280, "added_kv_proj_dim": config.dim} if config.model_type == "i2v" else {}
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            **image,
        )
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {from_wan(name, "diffusers"): shape for name, shape in wan_shapes(config).items()} == expected


@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 6), st.sampled_from(WRAPPER_INFIXES)), max_size=5))
def test_wrapper_infixes_vanish_wherever_they_stand(name: str, infixes: list[tuple[int, str]]) -> None:
    parts = ["model.", *(f"{part}." for part in name.split(".")[:-1]), name.split(".")[-1]]
    for position, infix in infixes:
        parts.insert(min(position, len(parts) - 1), infix)
    assert to_wan("".join(parts)) == name


def test_ema_of_a_sharded_trainer_is_readable() -> None:
    key = "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q.weight"
    assert wan_names([key]) == {"blocks.0.self_attn.q.weight": key}
    assert describe_dialect([key]) == "self-forcing with wrapper infixes"


def test_a_network_is_found_below_any_prefix_and_two_are_refused() -> None:
    assert prefix_before(["vae.a.weight", "loss.b"], ["a.weight", "c"]) == "vae."
    assert prefix_before(["a.weight"], ["a.weight"]) == ""
    assert prefix_before(["xa.weight"], ["a.weight"]) is None
    with pytest.raises(ValueError, match=r"'vae\.' and 'vae_ema\.'"):
        prefix_before(["vae.a.weight", "vae_ema.a.weight"], ["a.weight"])


def test_two_keys_for_one_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="are both head\\.modulation"):
        wan_names(["head.modulation", "model.head.modulation"])


def test_adversarial_companions_are_left_out() -> None:
    assert wan_names(["model.head.modulation", "_cls_pred_branch.0.weight", "_gan_ca_blocks.1.x"]) == {
        "head.modulation": "model.head.modulation"
    }


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("model.blocks.3.self_attn.qkv.weight", [f"model.blocks.3.self_attn.{part}.weight" for part in "qkv"]),
        ("blocks.3.self_attn.to_qkv.bias", [f"blocks.3.self_attn.{part}.bias" for part in "qkv"]),
        ("blocks.3.cross_attn._fsdp_wrapped_module.kv.weight", [f"blocks.3.cross_attn.{part}.weight" for part in "kv"]),
        ("blocks.3.attn2.to_kv.weight", ["blocks.3.attn2.to_k.weight", "blocks.3.attn2.to_v.weight"]),
        ("decoder.middle.1.to_qkv.weight", []),  # of a VAE
        ("blocks.3.self_attn.norm_q.weight", []),
    ],
)
def test_a_fused_projection_is_told_by_its_attention(key: str, parts: list[str]) -> None:
    assert list(fused_parts(key)) == parts


def test_fastvideos_names_of_the_feed_forward_layers_are_read() -> None:
    assert to_wan("transformer.blocks.0.ffn.fc_in.weight".removeprefix("transformer.")) == "blocks.0.ffn.0.weight"
    assert to_wan("model.blocks.7.ffn.fc_out.bias") == "blocks.7.ffn.2.bias"


def test_unknown_dialect_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="self-forcing"):
        from_wan("head.modulation", "elvish")


@pytest.mark.parametrize("preset", sorted(NETWORK_SIZES))
def test_wan_shapes_and_config_determine_each_other(preset: str) -> None:
    config = NETWORK_SIZES[preset]
    assert wan_config(wan_shapes(config), num_heads=config.num_heads, text_len=config.text_len) == config


@pytest.mark.parametrize(
    "config",
    [
        TAEHVConfig(),
        TAEHVConfig(encoder_width=16, decoder_widths=(48, 32, 24, 16)),
        TAEHVConfig(latent_channels=48, patch_size=2),
        TAEHVConfig(encoder_time=(True, True, True), decoder_time=(True, True, True)),
    ],
)
def test_taehv_shapes_and_config_determine_each_other(config: TAEHVConfig) -> None:
    assert taehv_config(taehv_shapes(config)) == config


def test_mismatch_names_the_first_difference() -> None:
    assert mismatch({"a": (1,)}, {"a": (1,)}) is None
    assert "b" in str(mismatch({"a": (1,), "b": (2,)}, {"a": (1,)}))
    assert "b" in str(mismatch({"a": (1,)}, {"a": (1,), "b": (2,)}))
    assert "[3], expected [1]" in str(mismatch({"a": (1,)}, {"a": (3,)}))


RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "checkpoints_layout.json").read_text(encoding="utf-8"))


def recorded_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Every parameter of a released network with its shape."""
    recorded = RECORDED[network]
    shapes = {name: tuple(shape) for name, shape in recorded["top"].items()}
    for group, repeated in (recorded["repeated"] or {}).items():
        for index in range(repeated["count"]):
            shapes |= {f"{group}.{index}.{name}": tuple(shape) for name, shape in repeated["params"].items()}
    assert len(shapes) == recorded["num_tensors"]
    return shapes


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("network", ["wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "wan2.1_i2v_14b"])
def test_released_networks_are_understood_in_every_dialect(network: str, dialect: str) -> None:
    shapes = recorded_shapes(network)
    file = {from_wan(name, dialect): shape for name, shape in shapes.items()}
    file_shapes = {name: file[key] for name, key in wan_names(file).items()}
    assert file_shapes == shapes
    config = wan_config(file_shapes)
    assert mismatch(wan_shapes(config), file_shapes) is None
    assert config in NETWORK_SIZES.values()
    recorded = RECORDED[network]["config"]
    assert {key: value for key, value in config.to_dict().items() if key in recorded} == {
        key: value for key, value in recorded.items() if key in config.to_dict()
    }


def test_a_taehv_has_the_released_shapes_by_default() -> None:
    shapes = recorded_shapes("taehv_wan2.1")
    assert taehv_config(shapes) == TAEHVConfig()
    assert mismatch(taehv_shapes(TAEHVConfig()), shapes) is None
