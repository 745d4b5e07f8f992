"""What a user finds in ComfyUI after installing the pack."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.comfyui.graphs import of_one_codec
from tests.comfyui.host_server import PACK_NAME, ROOT, Server

# Saved workflows store widget values by position: new inputs go to the end of their group, and nothing ever moves.
INPUT_ORDER = {
    "SelfForcingModelLoader": {"required": ["unet_name", "weight_dtype", "weights"], "optional": ["kind", "preset"]},
    "SelfForcingTextEncode": {"required": ["text_encoder", "text"]},
    "SelfForcingStreamSampler": {
        "required": [
            "model", "positive", "width", "height", "length", "seed", "steps", "shift", "chunk", "window", "sink",
        ],
        "optional": [
            "latent_image", "taehv", "negative", "cfg", "state", "keep_state", "clip", "player", "pace",
            "warp", "first_chunk_steps",
        ],
    },
    "SelfForcingTAEHVLoader": {"required": ["vae_name"], "optional": ["latents"]},
    "SelfForcingTAEHVDecode": {"required": ["samples", "taehv"]},
    "SelfForcingPatchModel": {"required": ["model", "kind", "chunk", "shift"], "optional": ["preset"]},
    "SelfForcingCacheOptions": {
        "required": ["model", "chunk", "window", "sink", "context_noise", "cache_dtype", "cache_device"],
        "optional": ["cache_source", "policy", "policy_settings"],
    },
    "SelfForcingSampler": {"optional": ["state", "keep_state", "first_chunk_sigmas"]},
    "SelfForcingFewStepSampler": {},
    "SelfForcingSigmas": {"required": ["model", "steps", "shift"], "optional": ["warp", "first_chunk_steps"]},
    "SelfForcingGuider": {"required": ["model", "positive", "cfg"], "optional": ["negative"]},
    "SelfForcingImageToVideo": {
        "required": ["model", "positive", "width", "height", "length", "batch_size"],
        "optional": ["negative", "vae", "start_image", "latent", "clip_vision_output"],
    },
    "SelfForcingTAEHVEncode": {"required": ["pixels", "taehv"]},
    "SelfForcingSnapshot": {"required": ["state", "filename_prefix"], "optional": ["after"]},
    "SelfForcingResume": {"required": ["state_name"]},
    "SelfForcingPromptSchedule": {"required": ["text", "history", "fps"], "optional": ["clip", "text_encoder"]},
    "SelfForcingTwoExperts": {"required": ["high_noise", "low_noise", "boundary", "boundary_step"]},
}  # fmt: skip
INPUT_ORDER["SelfForcingStreamToFile"] = {
    "required": [*INPUT_ORDER["SelfForcingStreamSampler"]["required"], "filename_prefix", "format", "fps"],
    "optional": [
        *(name for name in INPUT_ORDER["SelfForcingStreamSampler"]["optional"][:-2] if name != "keep_state"),
        "quality", "audio",
    ],
}  # fmt: skip
OUTPUTS = {
    "SelfForcingModelLoader": ["MODEL"],
    "SelfForcingTextEncode": ["CONDITIONING"],
    "SelfForcingStreamSampler": ["LATENT", "IMAGE", "SELFFORCING_STATE", "STRING"],
    "SelfForcingTAEHVLoader": ["VAE"],
    "SelfForcingTAEHVDecode": ["IMAGE"],
    "SelfForcingPatchModel": ["MODEL"],
    "SelfForcingCacheOptions": ["MODEL"],
    "SelfForcingSampler": ["SAMPLER", "SELFFORCING_STATE"],
    "SelfForcingFewStepSampler": ["SAMPLER"],
    "SelfForcingSigmas": ["SIGMAS", "SIGMAS"],
    "SelfForcingGuider": ["GUIDER"],
    "SelfForcingImageToVideo": ["CONDITIONING", "CONDITIONING", "LATENT"],
    "SelfForcingTAEHVEncode": ["LATENT"],
    "SelfForcingSnapshot": ["SELFFORCING_STATE"],
    "SelfForcingResume": ["SELFFORCING_STATE"],
    "SelfForcingPromptSchedule": ["CONDITIONING"],
    "SelfForcingStreamToFile": ["LATENT", "STRING", "STRING"],
    "SelfForcingTwoExperts": ["MODEL"],
}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a combo whose choice brings inputs of its own
# Lists that offer the bundle's parts, which lie in the pack and not in ComfyUI's folders.
LISTS = {
    "SelfForcingModelLoader": "unet_name",
    "SelfForcingTextEncode": "text_encoder",
    "SelfForcingTAEHVLoader": "vae_name",
}


def schema(server: Server, node: str) -> dict[str, Any]:
    return server.get(f"/object_info/{node}")[node]


def inputs_of(description: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    groups = description["input"]
    every = {**groups.get("required", {}), **groups.get("optional", {})}
    return {name: (entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in every.items()}


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    kinds = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
    return (isinstance(kind, list) or kind in kinds) and not options.get("forceInput")


def chosen_inputs(name: str, kind: Any, options: dict[str, Any], value: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the inputs that a widget brings with it once it holds a value, as a dynamic combo does."""
    if kind != DYNAMIC:
        return {}
    (option,) = [option for option in options["options"] if option["key"] == value]
    return {f"{name}.{inner}": entry for inner, entry in inputs_of({"input": option["inputs"]}).items()}


@pytest.mark.smoke
def test_all_nodes_are_there_and_nothing_failed_to_import(server: Server) -> None:
    known = server.get("/object_info")
    assert {name for name in known if name.startswith("SelfForcing")} == set(INPUT_ORDER) == set(OUTPUTS)
    failed = [line for line in server.log().splitlines() if "IMPORT FAILED" in line and PACK_NAME in line]
    assert not failed


@pytest.mark.parametrize("node", INPUT_ORDER)
def test_ids_inputs_and_outputs_stay_as_saved_workflows_know_them(server: Server, node: str) -> None:
    declared = schema(server, node)
    order = {group: names for group, names in declared["input_order"].items() if names and group != "hidden"}
    assert order == INPUT_ORDER[node]
    assert declared["output"] == OUTPUTS[node]


@pytest.mark.parametrize("node", INPUT_ORDER)
def test_every_input_and_output_explains_itself(server: Server, node: str) -> None:
    declared = schema(server, node)
    assert all(options.get("tooltip") for _, options in inputs_of(declared).values())
    assert all(declared["output_tooltips"])
    assert declared["description"]


@pytest.mark.parametrize(("node", "name"), LISTS.items())
def test_bundled_model_is_offered_without_copying_a_file(server: Server, node: str, name: str) -> None:
    _, options = inputs_of(schema(server, node))[name]
    assert "tiny (bundled)" in options["options"]


def test_workflows_are_listed_and_served_as_templates(server: Server) -> None:
    assert "tiny_t2v" in server.get("/workflow_templates")[PACK_NAME]
    served = server.get(f"/api/workflow_templates/{PACK_NAME}/tiny_t2v.json")
    assert served == json.loads((ROOT / "workflows/tiny_t2v.json").read_text())


def _api_inputs(server: Server, node: dict[str, Any], links: dict[int, Any]) -> dict[str, Any]:
    """The inputs of a node of the UI format as a script would send them."""
    declared = inputs_of(schema(server, node["type"]))
    linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
    values = list(node["widgets_values"])
    inputs: dict[str, Any] = {}
    while declared:
        name = next(iter(declared))
        kind, options = declared.pop(name)
        if not is_widget(kind, options):
            continue
        if not values:
            assert name in schema(server, node["type"])["input_order"]["optional"]
            continue
        inputs[name] = values.pop(0)
        declared = chosen_inputs(name, kind, options, inputs[name]) | declared
        if options.get("control_after_generate"):
            assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        if options.get("image_upload"):
            assert values.pop(0) == "image"
    assert not values, f"{node['type']} has more widget values than widgets"
    return {**inputs, **linked}


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_dragged_workflow_means_what_its_twin_says(server: Server, path: Any) -> None:
    graph = json.loads(path.read_text())
    twin = json.loads((path.parent / "api" / path.name).read_text())
    links = {link: [str(source), slot] for link, source, slot, *_ in graph["links"]}
    drawn = [node for node in graph["nodes"] if node["type"] not in ("MarkdownNote", "Note")]
    converted = {str(node["id"]): _api_inputs(server, node, links) for node in drawn}
    assert {name: of_one_codec(inputs) for name, inputs in converted.items()} == {
        name: of_one_codec(node["inputs"]) for name, node in twin.items()
    }
    assert {str(node["id"]): node["type"] for node in drawn} == {n: node["class_type"] for n, node in twin.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_slots_of_a_dragged_workflow_are_those_of_its_nodes(server: Server, path: Any) -> None:
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        declared = inputs_of(schema(server, node["type"]))
        assert {entry["name"] for entry in node["inputs"]} <= set(declared), node["type"]
        assert [output["type"] for output in node["outputs"]] == schema(server, node["type"])["output"][
            : len(node["outputs"])
        ]
