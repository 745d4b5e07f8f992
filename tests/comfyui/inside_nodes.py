"""Run by ComfyUI's Python as inside.py is: every node that takes a MODEL and returns one, on ours and on ComfyUI's.

python inside_nodes.py PACK FOLDER

Each node is applied with its default inputs, or those of VALUES, to the same weights twice: as a MODEL that ComfyUI's
Euler samples, and as one that our sampler samples with Euler as a single chunk, which is the same function, and again
in chunks. What it did to each is printed as JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect as python_inspect
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path.cwd()))  # ComfyUI's own `nodes` comes first
import inside
import torch
from comfy_api.latest import io
from safetensors.torch import save_file

import nodes as host_nodes

# Other inputs than the defaults, which change nothing or are made for larger networks than the one here.
VALUES: dict[str, dict[str, Any]] = {
    "ScaleROPE": {"scale_x": 2.0, "shift_y": 1.0, "scale_t": 1.5},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "1", "start_percent": 0.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "1", "single_layers": "1", "start_percent": 0.0},
    "SkipLayerGuidanceSD3": {"layers": "1", "start_percent": 0.0},
    "LTXVSpatioTemporalGuidance": {"blocks": "1"},
    "UNetSelfAttentionMultiply": {"q": 1.5},
    "UNetCrossAttentionMultiply": {"q": 1.5},
    "UNetTemporalAttentionMultiply": {"self_structural": 1.5},
    "ModelMergeSimple": {"ratio": 0.5},
    "ModelMergeBlocks": {"input": 0.5, "middle": 0.5, "out": 0.5},
    "ModelMergeWAN2_1": {"blocks.0.": 0.5},
    "TorchCompileModel": {"backend": "cudagraphs"},
    "FreSca": {"freq_cutoff": 1},
    "LTXVModalityGuidance": {"modality_scale": 3.0},
    "VideoLinearCFGGuidance": {"min_cfg": 2.0},
    "VideoTriangleCFGGuidance": {"min_cfg": 2.0},
    "CFGOverride": {"cfg": 6.0},
    "TemporalScoreRescaling": {"tsr_k": 0.7},
    "ModelNoiseScale": {"noise_scale": 2.0},
    "ModelComputeDtype": {"dtype": "bf16"},
    "LoraModelLoader": {"bypass": False},
}
FILE = "change.safetensors"
SIGMAS = (1.0, 0.6, 0.0)


class NotBuilt(Exception):
    """A node needs what no default gives; the argument says what."""


def init_nodes() -> list[str]:
    """Import ComfyUI's own extra nodes; return files that could not be."""
    try:
        importlib.import_module("kornia")
    except ImportError:  # of nodes for pictures, which share a file with one for models
        for name in (
            "kornia",
            "kornia.filters",
            "kornia.morphology",
            "kornia.color",
            "kornia.enhance",
            "kornia.geometry",
        ):
            sys.modules[name] = MagicMock(__spec__=None)
    return asyncio.run(host_nodes.init_builtin_extra_nodes())


def kind_of(declared: Any) -> str:
    return "COMBO" if isinstance(declared[0], (list, tuple)) else str(declared[0])


def model_nodes() -> dict[str, Any]:
    nodes = {}
    for name, kind in sorted(host_nodes.NODE_CLASS_MAPPINGS.items()):
        try:
            inputs = kind.INPUT_TYPES()
            required = {**inputs.get("required", {}), **inputs.get("optional", {})}
        except FileNotFoundError:  # lists files of a folder that is not here
            continue
        has_model = any(kind_of(declared) == "MODEL" for declared in required.values())
        if has_model and "MODEL" in [str(output) for output in kind.RETURN_TYPES]:
            nodes[name] = kind
    return nodes


def material(patcher: Any, other: Any) -> dict[str, list[Any]]:
    """Return what is given for inputs that have no default, by their kind; models in their order."""
    latents = torch.zeros(1, inside.CHANNELS, inside.FRAMES, inside.HEIGHT, inside.WIDTH)
    return {
        "MODEL": [patcher, other],
        "CONDITIONING": [[[inside.text(3, 512), {}]], [[inside.text(4, 512), {}]]],
        "LATENT": [{"samples": latents}],
        "IMAGE": [torch.zeros(1, 32, 32, 3)],
        "MASK": [torch.ones(1, 32, 32)],
        "SIGMAS": [torch.tensor(SIGMAS)],
        "CLIP": [None],
        "VAE": [Vae()],
        "LORA_MODEL": [dict(LORA)],
        "LATENT_OPERATION": [lambda latent, **_: latent * 0.9],
    }


class Vae:
    """As far as nodes for models ask: a picture's latents, of which there are those of one frame."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, inside.CHANNELS, 1, pixels.shape[-3] // 8, pixels.shape[-2] // 8)


LORA: dict[str, torch.Tensor] = {}  # what LoRA files hold here


def arguments(kind: Any, name: str, values_by_kind: dict[str, list[Any]]) -> dict[str, Any]:
    """Return inputs of a node. Raises NotBuilt."""
    if name == "TrainLoraNode":  # all its inputs have defaults, so it would begin
        raise NotBuilt("time to train")
    inputs: dict[str, Any] = {}
    rest = {key: list(values) for key, values in values_by_kind.items()}
    for key, declared in kind.INPUT_TYPES().get("required", {}).items():
        sort, options = kind_of(declared), declared[1] if len(declared) > 1 else {}
        if key in VALUES.get(name, {}):
            inputs[key] = VALUES[name][key]
        elif rest.get(sort):
            inputs[key] = rest[sort].pop(0)
        elif sort == "COMBO":
            choices = declared[0] if isinstance(declared[0], (list, tuple)) else options.get("options") or []
            if options.get("default") is None and not choices:
                raise NotBuilt(f"a file for {key}")
            inputs[key] = options.get("default") or choices[0]
        elif "default" in options:
            inputs[key] = options["default"]
        else:
            raise NotBuilt(sort)
    return inputs


def apply(kind: Any, name: str, patcher: Any, other: Any) -> Any:
    """Return the MODEL that the node returns."""
    inputs = arguments(kind, name, material(patcher, other))
    if python_inspect.isclass(kind) and issubclass(kind, io.ComfyNode):
        # Nodes of the newer kind are class methods, called on a copy of the class that ComfyUI locks.
        prepared = kind.PREPARE_CLASS_CLONE(None) if hasattr(kind, "PREPARE_CLASS_CLONE") else kind
        result = prepared.execute(**inputs)
        outputs = result.args if hasattr(result, "args") else result
    else:
        outputs = getattr(kind(), kind.FUNCTION)(**inputs)
    return outputs[[str(output) for output in kind.RETURN_TYPES].index("MODEL")]


def tried(sample: Callable[[], Any], plain: Any) -> dict[str, Any]:
    """Return the video, and how far it is from the one without the node; or the error."""
    try:
        video = sample()
    except NotBuilt as reason:
        return {"not_built": str(reason)}
    except Exception as error:
        return {"error": type(error).__name__, "sentence": str(error)[:300]}
    return {"video": video, "changed": inside.apart(video.float(), plain)}


def main() -> None:
    failed = init_nodes()
    logging.disable(logging.CRITICAL)
    net = inside.network()
    torch.manual_seed(1)
    another = inside.core["model"].CausalWan(net.config).eval().requires_grad_(False)
    for name, parameter in another.named_parameters():  # which ComfyUI's own pass leaves as it is, and ours does not
        if name.endswith("modulation"):
            parameter.data.copy_(net.get_parameter(name))
    weight = net.get_parameter("blocks.0.ffn.0.weight")
    LORA["diffusion_model.blocks.0.ffn.0.diff"] = torch.randn_like(weight) * 0.05
    save_file(LORA, inside.FOLDER / FILE)
    sys.modules["folder_paths"].add_model_folder_path("loras", str(inside.FOLDER), is_default=True)  # type: ignore[attr-defined]
    # With Euler and all frames in one chunk our sampler computes what ComfyUI's does: any difference is the node's.
    euler = replace(inside.STEPS, solver="euler")
    settings = inside.model_settings.Settings("causal", inside.CHUNKS, euler)

    def model(kind: str, net: Any) -> Any:
        """Return what ComfyUI's own loader makes of the weights, for our sampler with Patch Model behind it."""
        state = {key: value.clone() for key, value in net.state_dict().items()}
        patcher = inside.comfy.sd.load_diffusion_model_state_dict(state)
        return inside.causal_model.with_settings(patcher, settings) if kind == "causal" else patcher

    whole, causal = model("whole", net), model("causal", net)
    whole_other, causal_other = model("whole", another), model("causal", another)
    at_once = inside.chunk_sampler.ChunkSampler(
        inside.chunk_sampler.Run(causal=inside.CausalConfig(chunk=inside.FRAMES))
    )
    in_chunks = inside.chunk_sampler.ChunkSampler(inside.chunk_sampler.Run())
    options: dict[str, Any] = {"sigmas": SIGMAS}
    plain = inside.once(whole, **options)
    plain_in_chunks = inside.once(causal, in_chunks, **options)
    report: dict[str, Any] = {}
    for name, kind in model_nodes().items():
        VALUES.setdefault(name, {})
        if "lora_name" in kind.INPUT_TYPES().get("required", {}):
            VALUES[name]["lora_name"] = FILE
        native = tried(
            lambda kind=kind, name=name: inside.once(apply(kind, name, whole, whole_other), **options), plain
        )
        results = {"theirs": native}
        if "not_built" not in native:
            for title, sampler, expected in (("ours", at_once, plain), ("in_chunks", in_chunks, plain_in_chunks)):
                results[title] = tried(
                    lambda kind=kind, name=name, sampler=sampler: inside.once(
                        apply(kind, name, causal, causal_other), sampler, **options
                    ),
                    expected,
                )
            if "video" in native and "video" in results["ours"]:
                results["ours"]["apart"] = inside.apart(results["ours"]["video"].float(), native["video"].float())
        for result in results.values():
            result.pop("video", None)
        report[name] = results
    # A node may have changed the weights that all MODELs share, and not only the clone that it returned.
    afterwards = inside.apart(inside.once(whole, **options), plain)
    rounding = inside.apart(inside.once(causal, at_once, **options), plain)
    print("\n" + json.dumps({"nodes": report, "failed": failed, "afterwards": afterwards, "plain": rounding}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
