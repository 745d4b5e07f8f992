"""Every dialect's names become Wan names and come back, and no two keys are taken for one parameter in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfforcing_core.config import PRESETS, TAEHVConfig
from selfforcing_core.keymap import (
    DIALECT_PREFIXES,
    WRAPPER_INFIXES,
    describe_dialect,
    from_wan,
    to_wan,
    wan_names,
)
from selfforcing_core.layout import mismatch, taehv_config, taehv_shapes, wan_config, wan_shapes

NAMES = sorted(wan_shapes(PRESETS["tiny"])) + sorted(wan_shapes(PRESETS["i2v-14b"]))


@given(st.sampled_from(NAMES), st.sampled_from(sorted(DIALECT_PREFIXES)))
def test_every_dialect_comes_back_to_the_wan_name(name: str, dialect: str) -> None:
    assert to_wan(from_wan(name, dialect)) == name
    assert describe_dialect([from_wan(name, dialect)]) == dialect


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


def test_two_keys_for_one_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="are both head\\.modulation"):
        wan_names(["head.modulation", "model.head.modulation"])


def test_adversarial_companions_are_left_out() -> None:
    assert wan_names(["model.head.modulation", "_cls_pred_branch.0.weight", "_gan_ca_blocks.1.x"]) == {
        "head.modulation": "model.head.modulation"
    }


def test_unknown_dialect_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="self-forcing"):
        from_wan("head.modulation", "elvish")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_wan_shapes_and_config_determine_each_other(preset: str) -> None:
    config = PRESETS[preset]
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


@pytest.mark.skipif("SELFFORCING_GOLDEN" not in os.environ, reason="SELFFORCING_GOLDEN names no fixture folder")
@pytest.mark.parametrize("network", ["wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "wan2.1_i2v_14b", "taehv_wan2.1"])
def test_layout_is_that_of_the_released_networks(network: str) -> None:
    folder = Path(os.environ["SELFFORCING_GOLDEN"])
    recorded = json.loads((folder / "checkpoints_layout.json").read_text(encoding="utf-8"))[network]
    found = {name: tuple(shape) for name, shape in recorded["top"].items()}
    for group, repeated in recorded["repeated"].items():
        for index in range(repeated["count"]):
            found |= {f"{group}.{index}.{name}": tuple(shape) for name, shape in repeated["params"].items()}
    assert len(found) == recorded["num_tensors"]
    if network.startswith("taehv"):
        assert mismatch(taehv_shapes(TAEHVConfig()), found) is None
        assert taehv_config(found) == TAEHVConfig()
    else:
        config = wan_config(found)
        assert mismatch(wan_shapes(config), found) is None
        assert config in PRESETS.values()
        assert {key: value for key, value in config.to_dict().items() if key in recorded["config"]} == {
            key: value for key, value in recorded["config"].items() if key in config.to_dict()
        }
