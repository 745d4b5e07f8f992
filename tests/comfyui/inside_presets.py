"""Checks inside ComfyUI's own process: released files through Load Model, run as their presets say.

The files are fakes, which the test writes into FOLDER/released before this process starts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import inside
from inside import CORE, FOLDER, causal_pass, importlib, loader, model_settings, page, sampled

RELEASED = FOLDER / "released"


@contextmanager
def small_releases() -> Iterator[None]:
    """Take the fakes' sizes for the releases' own, and texts as narrow as theirs."""
    presets = importlib.import_module(CORE + "weights.presets").PRESETS
    before, text = dict(presets), inside.text
    for name, preset in before.items():
        sizes = preset.sizes and replace(preset.sizes, dim=128, ffn_dim=256, num_heads=1, num_layers=2)
        presets[name] = replace(preset, sizes=sizes)
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
        calls.append((round(float(t.flatten()[0]), 1), self.start_frame, self.start_frame + x.shape[2]))
        return evaluate(self, native, x, t, *rest)

    results: dict[str, Any] = {}
    page.show_text, causal_pass.CausalPass.evaluate = lines.append, logged
    try:
        with small_releases():
            for path in sorted(RELEASED.rglob("*.*")):
                name = path.relative_to(RELEASED).as_posix()
                lines.clear()
                calls.clear()
                results[name.partition("/")[0]] = _loaded(name, calls) | {"lines": list(lines)}
            patched = _patched()
    finally:
        page.show_text, causal_pass.CausalPass.evaluate = show, evaluate
    return {"files": results, "patched": patched}


def _loaded(name: str, calls: list[Any]) -> dict[str, Any]:
    named = name.partition("/")[0]
    preset = named if named.startswith("streamdiffusion") else "auto"
    try:
        patcher = loader.load_model(name, "float32", "auto", "auto", preset)
    except ValueError as error:
        return {"refusal": str(error)}
    settings = model_settings.settings_of(patcher)
    is_whole = settings.kind == model_settings.FEW_STEP
    chunk = inside.FRAMES if is_whole else settings.causal.chunk
    sampled(patcher, chunk=chunk, is_whole=is_whole)
    weights = patcher.model.diffusion_model.state_dict()
    return {
        "kind": settings.kind,
        "cache": [settings.causal.window, settings.causal.sink],
        "shift": patcher.get_model_object("model_sampling").shift,
        "sum": float(weights["head.head.weight"].double().sum()),
        "calls": list(calls),
    }


def _patched() -> dict[str, Any]:
    """Return how Patch Model prepares a MODEL that another loader might have given."""
    patcher = loader.load_model("causvid/autoregressive_checkpoint/model.pt", "float32", "auto", "auto", "none")
    execute = loader.SelfForcingPatchModel.execute
    prepared = {
        "default": execute(patcher, "causal", 3, 5.0),
        "preset": execute(patcher, "causal", 3, 5.0, "causvid"),
        "explicit": execute(patcher, "causal", 2, 5.0, "causvid"),
    }
    settings = {name: model_settings.settings_of(output.args[0]) for name, output in prepared.items()}
    results: dict[str, Any] = {
        name: [each.causal.chunk, each.causal.window, each.steps.shift, list(each.steps.steps)]
        for name, each in settings.items()
    }
    try:
        execute(patcher, "causal", 3, 5.0, "matrix-game-2")
    except ValueError as error:
        results["refusal"] = str(error)
    return results
