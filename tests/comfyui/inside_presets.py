"""Checks inside ComfyUI's own process: released files through Load Model, run as their presets say.

The files are fakes, which the test writes into FOLDER/released before this process starts, with a list of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import inside
import torch
from inside import CORE, FOLDER, causal_pass, host, importlib, loader, model_settings, page, part, sampled

RELEASED = FOLDER / "released"
RANK = 8  # of the fakes' LoRA


@contextmanager
def small_releases() -> Iterator[None]:
    """Take the fakes' sizes for the releases' own, and texts as narrow as theirs."""
    presets = importlib.import_module(CORE + "weights.presets").PRESETS
    before, text = dict(presets), inside.text
    for name, preset in before.items():
        sizes = preset.sizes and replace(preset.sizes, dim=128, ffn_dim=256, num_heads=1, num_layers=2)
        lora = preset.lora and replace(preset.lora, rank=RANK, alpha=RANK)
        presets[name] = replace(preset, sizes=sizes, lora=lora)
    inside.text = lambda seed, rows=7: text(seed, rows)[..., :128]  # type: ignore[assignment]
    try:
        yield
    finally:
        inside.text = text
        presets.update(before)


def released_files_run_by_their_presets() -> dict[str, Any]:
    """Return of each file what Load Model says, how it is sampled, and the calls of the network in two chunks."""
    sys.modules["folder_paths"].add_model_folder_path("diffusion_models", str(RELEASED))
    lines: list[str] = []
    calls: list[tuple[float, int, int]] = []
    show, evaluate = page.show_text, causal_pass.CausalPass.evaluate

    def logged(self: Any, native: Any, x: Any, t: Any, *rest: Any) -> Any:
        timestep = t if self.timesteps_BT is None else self.timesteps_BT
        calls.append((round(float(timestep.flatten()[0]), 1), self.start_frame, self.start_frame + x.shape[2]))
        return evaluate(self, native, x, t, *rest)

    results: dict[str, Any] = {}
    page.show_text, causal_pass.CausalPass.evaluate = lines.append, logged
    try:
        with small_releases():
            for entry in json.loads((FOLDER / "released.json").read_text()):
                lines.clear()
                calls.clear()
                results[entry["name"]] = _loaded(entry, calls) | {"lines": list(lines)}
            patched = _patched()
    finally:
        page.show_text, causal_pass.CausalPass.evaluate = show, evaluate
    return {"files": results, "patched": patched}


def _loaded(entry: dict[str, Any], calls: list[Any]) -> dict[str, Any]:
    files = [entry["file"], *([entry["low"]] if entry["low"] else [])]
    try:
        patchers = [loader.load_model(file, "float32", "auto", "auto", entry["preset"]) for file in files]
    except ValueError as error:
        return {"refusal": str(error)}
    host.load(patchers)  # with its LoRA
    weights = [patcher.model.diffusion_model.state_dict() for patcher in patchers]
    settings = model_settings.settings_of(patchers[0])
    if entry["runs"]:
        patcher = patchers[0]
        if len(patchers) > 1:
            patcher = part("expert_models").with_low_noise(*patchers, boundary=0.0, boundary_step=0)
        _sample(patcher, settings)
    return {
        "kind": settings.kind,
        "causal": settings.causal.to_dict(),
        "steps": settings.steps.to_dict(),
        "boundary_step": settings.boundary_step,
        "shift": patchers[0].get_model_object("model_sampling").shift,
        "sums": [[float(each[name].double().sum()) for name in SUMMED] for each in weights],
        "calls": list(calls),
    }


SUMMED = ("head.head.weight", "blocks.0.ffn.0.weight")  # outside the blocks and, where a LoRA changes it, inside


def _sample(patcher: Any, settings: Any) -> None:
    """Sample two chunks, behind a first frame alone where the release has one; of image-to-video with a picture."""
    is_whole, frames = settings.kind == model_settings.FEW_STEP, inside.FRAMES + settings.causal.independent_first_frame
    values: dict[str, Any] = {}
    shape = (1, inside.CHANNELS, frames, inside.HEIGHT, inside.WIDTH)
    if patcher.model.diffusion_model.patch_embedding.in_channels > inside.CHANNELS:
        mask = torch.ones(1, 1, *shape[2:])
        mask[:, :, :1] = 0
        values = {"concat_latent_image": torch.randn(shape), "concat_mask": mask}
    sampled(
        patcher,
        latent={"samples": torch.zeros(shape)},
        chunk=frames if is_whole else 1,  # of the noise alone
        is_whole=is_whole,
        values=values,
        rows=512 if is_whole else 7,
    )


# Load Model's widgets: without a preset the folder's shift is its MODEL's, and 9 here.
PIPELINE = ("causalwan2.2-t2v/transformer/diffusion_pytorch_model.safetensors", "float32", "auto", "auto", "none")


def _patched() -> dict[str, Any]:
    """Return how Patch Model prepares a MODEL that another loader might have given."""
    patcher = loader.load_model("causvid/autoregressive_checkpoint/model.pt", "float32", "auto", "auto", "none")
    execute = loader.SelfForcingPatchModel.execute
    prepared = {
        "default": execute(patcher, "causal", 3, 5.0),
        "preset": execute(patcher, "causal", 3, 5.0, "causvid"),
        "explicit": execute(patcher, "causal", 2, 5.0, "causvid"),
        # what the release leaves open is as the widgets say, wherever they stand
        "open": execute(patcher, "causal", 3, 5.0, "causalwan2.2-t2v"),
        "given": execute(patcher, "causal", 7, 12.0, "causalwan2.2-t2v"),
        "folder": execute(loader.load_model(*PIPELINE), "causal", 7, 5.0, "causalwan2.2-t2v"),
        "counted": execute(patcher, "causal", 3, 5.0, "lightx2v-wan2.2-i2v"),
    }
    settings = {name: model_settings.settings_of(output.args[0]) for name, output in prepared.items()}
    results: dict[str, Any] = {
        name: [each.causal.chunk, each.causal.window, each.steps.shift, list(each.steps.steps)]
        for name, each in settings.items()
    }
    results["experts"] = [
        settings["given"].steps.solver,
        settings["given"].causal.independent_first_frame,
        settings["counted"].boundary_step,
    ]
    results["refusals"] = {}
    for name in ("matrix-game-2", "lightx2v-self-forcing-fp8"):
        try:
            execute(patcher, "causal", 3, 5.0, name)
        except ValueError as error:
            results["refusals"][name] = str(error)
    return results
