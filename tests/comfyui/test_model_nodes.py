"""Every node of ComfyUI that takes a MODEL and returns one does to our video what it does to ComfyUI's, or is refused.

Measured by inside_nodes.py. A node that no list here names and that changes nothing, fails or cannot be built is a
decision to be made: that is why the test fails with its name.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.conftest import checkouts
from tests.comfyui.host_server import ROOT, Checkout

SAME = 5e-5  # share of the values' spread, where all frames are one chunk: rounding, which guidance enlarges
CHANGED = 1e-4

NEEDS_PATCH = "needs a patch network; what it sets between the layers is refused by name"
NOT_BUILT = {
    "AnimaLLLiteApply": NEEDS_PATCH,
    "QwenImageDiffsynthControlnet": NEEDS_PATCH,
    "SUPIRApply": NEEDS_PATCH,
    "USOStyleReference": NEEDS_PATCH,
    "WanInfiniteTalkToVideo": NEEDS_PATCH,
    "WanUni3CControlnetApply": NEEDS_PATCH,
    "ZImageFunControlnet": NEEDS_PATCH,
    "HypernetworkLoader": "needs a file; the patches that it sets between the layers are refused by name",
    "TrainLoraNode": "trains for a while; what it returns is a LoRA on the MODEL",
    "LTXVReferenceAudio": "needs LTX-Video's audio; sets a function after guidance, as LTXVModalityGuidance does",
}
FAILS_ON_WAN = {
    "FluxKVCache": "patches attention as Flux calls it",
    "FreeU": "asks for a UNet",
    "FreeU_V2": "asks for a UNet",
    "HiDreamO1PatchSeamSmoothing": "takes latents for an image's",
    "HyperTile": "patches attention as a UNet calls it",
    "RenormCFG": "asks for Lumina's channels",
    "TomePatchModel": "patches attention as a UNet calls it",
    "TripoSplatSamplingPreview": "asks for its own VAE",
}
OTHER_NETWORK = "changes what only another family of networks has"
NO_EFFECT = {
    "ARVideoI2V": "is read by ComfyUI's own causal sampler alone",
    "ChromaRadianceOptions": OTHER_NETWORK,
    "DifferentialDiffusion": "acts through a noise mask",
    "Mahiro": "acts on prompts that lead to other sides",
    "MiniMaxH3SigmaShift": OTHER_NETWORK,
    "ModelAttentionBackend": "another kernel, the same function",
    "ModelSamplingSD3": "acts through schedulers, and SIGMAS are given here",
    "MultiGPU_WorkUnits": "there is one device; with more it is refused",
    "NAGuidance": "patches what Wan never asks for",
    "PatchModelAddDownscale": OTHER_NETWORK,
    "SelectModelDevice": "there is one device",
    "SelfAttentionGuidance": "leaves alone what is no larger than 4 latents",
    "TorchCompileModel": "is compiled, the same function",
    "UNetCrossAttentionMultiply": OTHER_NETWORK,
    "UNetSelfAttentionMultiply": OTHER_NETWORK,
    "UNetTemporalAttentionMultiply": OTHER_NETWORK,
    "WanAnimate2Cache": OTHER_NETWORK,
    "wanBlockSwap": "does nothing in ComfyUI",
    **{
        f"ModelMerge{family}": "merges by names that only another family of networks has"
        for family in (
            "Auraflow", "Cosmos14B", "Cosmos7B", "CosmosPredict2_14B", "CosmosPredict2_2B", "Flux1", "Krea2", "LTXV",
            "MochiPreview", "QwenImage", "SD1", "SD2", "SD35_Large", "SD3_2B", "SDXL",
        )
    },
}  # fmt: skip
UNEQUAL = {  # changed in both, and not the same
    "ModelComputeDtype": "rounds to bfloat16, in another order",
    "ModelMergeAdd": "adds modulation too, which ComfyUI's own pass leaves out",
    "ModelMergeSubtract": "subtracts modulation too, which ComfyUI's own pass leaves out",
}
# Files of nodes that need a graphics library, or a server, and hold none for models.
WITHOUT_MODEL_NODES = {"nodes_glsl.py", "nodes_images.py", "nodes_replacements.py"}
REFUSAL = ("remove it", "remove the node")


def objection(name: str, native: dict[str, Any], own: dict[str, Any], in_chunks: dict[str, Any]) -> str:
    """Return what is wrong with a node on our model; "" if it is followed or refused."""
    if "not_built" in native:
        return "" if name in NOT_BUILT else f"is new here, and needs {native['not_built']}: give it, or say why not"
    if "error" in native:
        if "error" not in own:
            return f"fails on ComfyUI's own sampling ({native['sentence']}), and not on ours"
        return "" if name in FAILS_ON_WAN else f"is new here, and fails on Wan: {native['sentence']}"
    refusals = [result["sentence"] for result in (own, in_chunks) if result.get("error") == "ValueError"]
    if len(refusals) == 2:
        return (
            "" if all(any(word in sentence for word in REFUSAL) for sentence in refusals) else f"fails: {refusals[0]}"
        )
    if "error" in own or "error" in in_chunks:
        return f"fails in {'chunks' if 'error' in in_chunks else 'one chunk'}: {own} {in_chunks}"
    if not math.isfinite(in_chunks["changed"]):
        return "gives NaN or Inf in chunks"
    if name not in UNEQUAL and own["apart"] > SAME:
        return f"is {own['apart']:.2g} from ComfyUI's own pass, which it changes by {native['changed']:.2g}"
    if name in NO_EFFECT:
        return "" if max(own["changed"], in_chunks["changed"]) < SAME else "changes our video, and was not to"
    if native["changed"] < CHANGED:
        return "is new here, and changes nothing: give it other inputs, or say why"
    return "" if in_chunks["changed"] > CHANGED else "changes ComfyUI's video, and not ours in chunks"


@pytest.mark.parametrize("checkout", checkouts())
def test_nodes_for_models_are_followed_or_refused(checkout: Checkout, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [checkout.python, Path(__file__).with_name("inside_nodes.py"), ROOT, tmp_path]
    process = subprocess.run(
        command, cwd=checkout.path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["afterwards"] == 0, "a node has changed the model for good"
    assert report["plain"] < SAME
    assert set(report["failed"]) <= WITHOUT_MODEL_NODES, process.stderr[-3000:]
    nothing: dict[str, Any] = {}
    objections = {
        name: objection(name, results["theirs"], results.get("ours", nothing), results.get("in_chunks", nothing))
        for name, results in report["nodes"].items()
    }
    assert len(objections) > 40
    assert {name: sentence for name, sentence in objections.items() if sentence} == {}
