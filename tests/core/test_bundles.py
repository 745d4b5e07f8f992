"""Models by name: bundles, paths, and what is said about anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from selfforcing_core.codecs.taehv import TAEHV
from selfforcing_core.config import CausalConfig, StepConfig, TAEHVConfig, WanConfig
from selfforcing_core.model import CausalWan
from selfforcing_core.weights import bundles, load
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint

CONFIG = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, text_len=8, freq_dim=16)
TAEHV_CONFIG = TAEHVConfig(encoder_width=8, decoder_widths=(16, 8, 8, 8))
CAUSAL, STEPS = CausalConfig(chunk=3, window=9), StepConfig(steps=(1000.0, 500.0))


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An assets folder with the bundle "small" (random weights) and an empty folder beside it."""
    folder = tmp_path / "assets"
    (folder / "small").mkdir(parents=True)
    (folder / "nothing").mkdir()
    torch.manual_seed(0)
    wan, taehv = CausalWan(CONFIG), TAEHV(TAEHV_CONFIG)
    save_checkpoint(folder / "small" / bundles.MODEL_FILE, wan.state_dict(), CONFIG, causal=CAUSAL, steps=STEPS)
    save_checkpoint(folder / "small" / bundles.TAEHV_FILE, taehv.state_dict(), TAEHV_CONFIG)
    monkeypatch.setattr(bundles, "ASSETS", folder)
    return folder


def test_the_tiny_bundle_is_found_and_its_text_encoder_loads() -> None:
    assert "tiny" in bundles.list_bundles()
    assert bundles.bundle_path("tiny") == Path(bundles.__file__).resolve().parents[2] / "assets" / "tiny"
    assert load.load_text_encoder("tiny").encode(["a red square"]).shape == (1, 16, 128)


def test_a_folder_without_a_model_in_it_is_no_bundle(assets: Path) -> None:
    assert bundles.list_bundles() == ["small"]


def test_without_any_assets_there_are_no_bundles(assets: Path) -> None:
    shutil.rmtree(assets)
    assert bundles.list_bundles() == []
    with pytest.raises(ValueError, match="bundles: none"):
        bundles.bundle_path("tiny")


def test_an_unknown_name_is_answered_with_the_bundles_and_that_a_path_works(assets: Path) -> None:
    for call in (bundles.resolve_model, load.load_model, load.load_taehv, load.load_text_encoder):
        with pytest.raises(ValueError, match=r"'smal' is neither .* bundles: small; the path of a file .* works"):
            call("smal")
    with pytest.raises(ValueError, match="no bundle 'smal'; bundles: small"):
        bundles.bundle_path("smal")
    with pytest.raises(ValueError, match="neither"):
        bundles.resolve_model("")


def test_a_part_that_a_bundle_lacks_is_named(assets: Path) -> None:
    with pytest.raises(ValueError, match="bundle 'small' has no text_encoder"):
        load.load_text_encoder("small")


def test_a_model_loads_by_name_and_by_path_with_its_settings(assets: Path) -> None:
    by_name, checkpoint = load.load_model("small")
    by_path, _ = load.load_model(assets / "small" / bundles.MODEL_FILE)
    assert (checkpoint.config, checkpoint.causal, checkpoint.steps) == (CONFIG, CAUSAL, STEPS)
    assert not by_name.training
    stored = read_checkpoint(assets / "small" / bundles.MODEL_FILE).state_dict
    for name, parameter in by_name.named_parameters():
        assert torch.equal(parameter, stored[name])
        assert torch.equal(parameter, by_path.get_parameter(name))
        assert not parameter.requires_grad


def test_the_checkpoint_gives_its_weights_up_to_the_model(assets: Path) -> None:
    assert load.load_model("small", dtype=torch.bfloat16)[1].state_dict == {}


def test_a_loaded_model_computes_what_the_saved_one_did(assets: Path) -> None:
    torch.manual_seed(0)
    saved, (loaded, _) = CausalWan(CONFIG), load.load_model("small")
    inputs = (torch.randn(1, 2, 16, 4, 4), torch.full((1, 2), 500.0), torch.randn(1, 8, 24))
    with torch.no_grad():
        assert torch.equal(saved(*inputs), loaded(*inputs))


def test_dtype_defaults_to_the_stored_one_and_can_be_chosen(assets: Path) -> None:
    half = {name: tensor.half() for name, tensor in load.load_model("small")[0].state_dict().items()}
    save_checkpoint(assets / "half.safetensors", half, CONFIG)
    assert next(load.load_model(assets / "half.safetensors")[0].parameters()).dtype == torch.float16
    assert next(load.load_model("small")[0].parameters()).dtype == torch.float32
    chosen, _ = load.load_model("small", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in chosen.parameters()} == {torch.bfloat16}


def test_a_taehv_decodes_and_is_not_taken_for_a_video_model(assets: Path) -> None:
    taehv, _ = load.load_taehv("small")
    with torch.no_grad():
        assert taehv.decode(torch.randn(1, 2, 16, 2, 2)).shape == (1, 5, 3, 16, 16)
    with pytest.raises(ValueError, match="kind 'taehv', but kind 'wan' is needed"):
        load.load_model(assets / "small" / bundles.TAEHV_FILE)


def test_a_release_is_found_where_download_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file, the folder of shards, and what to do where it is not here; a path of that name wins."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="fetch it with: download self-forcing-dmd"):
        bundles.resolve_model("self-forcing-dmd")
    file = Path("models/self-forcing-dmd/checkpoints/self_forcing_dmd.pt")
    for place in (
        file,
        Path("models/wan2.1-t2v-1.3b/config.json"),
        Path("models/umt5/models_t5_umt5-xxl-enc-bf16.pth"),
    ):
        place.parent.mkdir(parents=True)
        place.write_bytes(b"")
    assert bundles.resolve_model("self-forcing-dmd") == file
    assert bundles.resolve_model("wan2.1-t2v-1.3b") == Path("models/wan2.1-t2v-1.3b")
    assert bundles.resolve_text_encoder("umt5") == Path("models/umt5/models_t5_umt5-xxl-enc-bf16.pth")
    Path("self-forcing-dmd").write_bytes(b"")
    assert bundles.resolve_model("self-forcing-dmd") == Path("self-forcing-dmd")
