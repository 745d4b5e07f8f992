"""Draw workflows/*.json from their twins in workflows/api: python -m tests.comfyui.draw

The twins say what runs. This adds what a person sees: places, sizes, links with both ends, a note and where to get the
models. Slots and widgets come from a running host, so a drawing cannot disagree with the nodes. Beside each lies a
picture for the list of templates: four moments of a video that the bundled tiny model made in that way. The 14B models
work in a way that the tiny one cannot, and have none.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from selfforcing_core.generate import Request, generate
from selfforcing_core.video import read_video, write_contact_sheet
from tests.comfyui.host_server import ROOT, Server, find_checkouts

COLUMN, ROW, LEFT, TOP = 400, 40, 40, 60  # pixels
PLAYER_ROWS = 4  # as high as so many texts
HUB = "https://huggingface.co/"
COMFY = HUB + "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
DISTILLED = HUB + "lightx2v/Wan2.1-Distill-Models/resolve/main/"
MODELS = {  # file: (address, folder below ComfyUI/models)
    "self_forcing_dmd.pt": (
        HUB + "gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt", "diffusion_models",
    ),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
        COMFY + "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders",
    ),
    "wan_2.1_vae.safetensors": (COMFY + "vae/wan_2.1_vae.safetensors", "vae"),
    "clip_vision_h.safetensors": (COMFY + "clip_vision/clip_vision_h.safetensors", "clip_vision"),
    "taew2_1.safetensors": (HUB + "Kijai/WanVideo_comfy/resolve/main/taew2_1.safetensors", "vae_approx"),
    "wan2.1_t2v_14b_lightx2v_4step.safetensors": (
        DISTILLED + "wan2.1_t2v_14b_lightx2v_4step.safetensors", "diffusion_models",
    ),
    "wan2.1_i2v_480p_lightx2v_4step.safetensors": (
        DISTILLED + "wan2.1_i2v_480p_lightx2v_4step.safetensors", "diffusion_models",
    ),
}  # fmt: skip
SCENE = "moving left slowly on a black background"
PICTURES: dict[str, dict[str, Any]] = {  # what the tiny model is asked for
    "tiny_t2v": {"prompt": "a red square moving left slowly on a navy background"},
    "tiny_prompt_schedule": {"prompt": f"0s: a red square {SCENE}; 2.1s: a blue square {SCENE}", "frames": 69},
    "tiny_endless": {"prompt": f"a red square {SCENE}", "frames": 321, "window": 9, "sink": 0},
    "t2v_1.3b_stream": {"prompt": "a green circle moving up slowly on a gray background"},
    "t2v_1.3b_native": {"prompt": "a yellow triangle moving right slowly on a purple background"},
    "live_t2v_1.3b": {"prompt": f"0s: a yellow circle {SCENE}; 2.1s: a green circle {SCENE}", "frames": 69},
    "prompt_schedule_1.3b": {
        "prompt": "0s: a white square moving up slowly on a navy background; "
        "2.1s: a white square moving up slowly on a brown background", "frames": 69,
    },
    "endless_1.3b": {"prompt": f"a magenta square {SCENE}", "frames": 321, "window": 9, "sink": 3},
    "lora_fp8_1.3b": {"prompt": f"a blue circle {SCENE}", "fp8": True},
    "extend_1.3b": {"prompt": "a red circle moving down slowly on a teal background", "frames": 129, "window": 9},
    "i2v_1.3b_prefill": {
        "prompt": "a green square moving right slowly on a navy background", "frames": 37, "image": Path("first.png"),
    },
}  # fmt: skip
NOTES = {
    "tiny_t2v": """## Prompt in, video out

The tiny model is bundled: nothing to download. It knows sentences like

*a red square moving left slowly on a navy background*

- colours: red, green, blue, yellow, magenta, white
- shapes: circle, square, triangle
- directions: left, right, up, down, slowly or quickly
- backgrounds: black, gray, brown, navy, purple, teal

Length 33 is 3 chunks of 3 latent frames; try 129.""",
    "t2v_1.3b_native": """## Text to video, chunk by chunk, with ComfyUI's own nodes

Guider, sampler and sigmas of this pack in the usual graph: put LoRA nodes behind the loader, TorchCompileModel too.
Longer videos: a length of 12n-3 (81, 93, 105, ...), and **Cache Options (Self Forcing)** with a window.""",
    "t2v_1.3b_stream": """## Text to video, shown while it is made

One node samples and decodes: each chunk is shown as soon as it is done. Length 12n-3 (81, 93, 105, ...).""",
    "i2v_1.3b_prefill": """## A picture as the first frame of a text-to-video model

The picture fills the KV cache as frame 0, then the model goes on in chunks. Length 12n+1 (73, 85, 97, ...).""",
    "extend_1.3b": """## Make a video longer, with another prompt

The first sampler makes 81 frames; **Image to Video** hands their latents to the second, which goes on to 129. Repeat as
often as you like. The window keeps time and memory per chunk constant.""",
    "tiny_prompt_schedule": """## The prompt changes while the video is made

A red square becomes a blue one at 2.1 seconds. The chunk in which the moment lies is the first that follows the new
prompt; with history *recode* the frames so far are written into the KV cache again under it.""",
    "tiny_endless": """## As long as you like, written to disk while it is made

The window keeps time and memory per chunk constant. Press stop whenever you have enough: the file plays as far as it
was made. Meanwhile type another prompt below the player: without a sink, nothing keeps the old scene.""",
    "live_t2v_1.3b": """## Live: watch it being made and steer it

Type a new prompt below the player and the next chunk follows it; hold a chunk and roll it again; change the seed.
`clip` is connected to the sampler because it reads what you type.""",
    "prompt_schedule_1.3b": """## The prompt changes while the video is made

Each line holds from its second on. The chunk in which the moment lies is the first that follows the new prompt.""",
    "endless_1.3b": """## As long as you like, written to disk while it is made

Window 12 keeps time and memory per chunk constant, sink 3 keeps the first frames in it. Press stop whenever you have
enough: the file plays as far as it was made.""",
    "lora_fp8_1.3b": """## A LoRA on weights in 8 bits

Any LoRA for Wan 2.1 1.3B goes behind the loader; the one named here is what `train.export form=lora` makes of your own
training. fp8 weights take half the memory of 16-bit ones.""",
    "few_step_t2v_14b": """## 14B in four steps, all frames at once

**Not causal**: the distilled 14B models of Self-Forcing-Plus and lightx2v see the whole video in every step. Nothing
streams, and 81 frames is what they were trained for.""",
    "few_step_i2v_14b": """## 14B image to video in four steps, all frames at once

**Not causal**: the distilled image-to-video models see the whole video in every step.""",
}


def note_text(name: str, files: list[str]) -> str:
    """The note of a workflow, with every file and the folder it belongs in."""
    if not files:
        return NOTES[name]
    rows = [f"- [{file}]({MODELS[file][0]}) in `models/{MODELS[file][1]}`" for file in files]
    return "\n".join([NOTES[name], "", "Files:", *rows])


def slots(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of a node's inputs in the host's order."""
    groups = description["input"]
    entries = [item for group in ("required", "optional") for item in groups.get(group, {}).items()]
    return [
        (name, "COMBO" if isinstance(entry[0], list) else entry[0], entry[1] if len(entry) > 1 else {})
        for name, entry in entries
    ]


def is_widget(kind: str) -> bool:
    return kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget_values(inputs: dict[str, Any], description: dict[str, Any]) -> list[Any]:
    """By position, as the front end stores them; a seed is followed by what happens to it after a run."""
    values: list[Any] = []
    for name, kind, options in slots(description):
        if not is_widget(kind):
            continue
        values.append(inputs.get(name, options.get("default")))
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


def columns(twin: dict[str, Any]) -> dict[str, int]:
    """Each node one column behind the last of those it reads from."""
    found: dict[str, int] = {}

    def column(node: str) -> int:
        if node not in found:
            sources = [value[0] for value in twin[node]["inputs"].values() if isinstance(value, list)]
            found[node] = 1 + max((column(source) for source in sources), default=-1)
        return found[node]

    for node in twin:
        column(node)
    return found


def height(description: dict[str, Any]) -> int:
    rows = sum(not is_widget(kind) for _, kind, _ in slots(description))
    tall = sum(bool(options.get("multiline")) for _, _, options in slots(description))
    widgets = sum(
        is_widget(kind) + bool(options.get("control_after_generate")) for _, kind, options in slots(description)
    )
    tall += PLAYER_ROWS if any(slot == "player" for slot, _, _ in slots(description)) else 0
    return 40 + 20 * max(rows, len(description["output"])) + 26 * widgets + 90 * tall


def draw(name: str, twin: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The UI format of one twin."""
    place, tops, nodes, links = columns(twin), {}, [], []
    for order, (key, node) in enumerate(twin.items()):
        description = known[node["class_type"]]
        top = tops.get(place[key], TOP)
        size = [COLUMN - 60, height(description)]
        tops[place[key]] = top + size[1] + ROW
        entries = []
        for slot, kind, _ in slots(description):
            entry: dict[str, Any] = {"name": slot, "type": kind}
            if is_widget(kind):
                entry["widget"] = {"name": slot}
            value = node["inputs"].get(slot)
            entry["link"] = None
            if isinstance(value, list):
                link = len(links) + 1
                source = known[twin[value[0]]["class_type"]]
                links.append([link, int(value[0]), value[1], int(key), len(entries), source["output"][value[1]]])
                entry["link"] = link
            entries.append(entry)
        is_ours = node["class_type"].startswith("SelfForcing")
        properties: dict[str, Any] = {
            "cnr_id": "selfforcing-stream" if is_ours else "comfy-core", "Node name for S&R": node["class_type"]
        }  # fmt: skip
        files = [value for value in node["inputs"].values() if isinstance(value, str) and value in MODELS]
        if files:
            properties["models"] = [
                {"name": file, "url": MODELS[file][0], "directory": MODELS[file][1]} for file in files
            ]
        outputs = [
            {"name": label, "type": kind, "links": []}
            for label, kind in zip(description["output_name"], description["output"])
        ]
        nodes.append({
            "id": int(key), "type": node["class_type"], "pos": [LEFT + COLUMN * place[key], top], "size": size,
            "flags": {}, "order": order, "mode": 0, "inputs": entries, "outputs": outputs, "properties": properties,
            "widgets_values": widget_values(node["inputs"], description),
        })  # fmt: skip
    by_id = {node["id"]: node for node in nodes}
    for link, source, slot, *_ in links:
        by_id[source]["outputs"][slot]["links"].append(link)
    files = [model["name"] for node in nodes for model in node["properties"].get("models", [])]
    note = {
        "id": max(by_id) + 1, "type": "MarkdownNote", "pos": [LEFT, tops.get(0, TOP)], "size": [COLUMN - 60, 300],
        "flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {},
        "widgets_values": [note_text(name, files)], "color": "#432", "bgcolor": "#653",
    }  # fmt: skip
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"selfforcing-stream/{name}")), "revision": 0,
        "last_node_id": note["id"], "last_link_id": len(links), "nodes": [*nodes, note], "links": links,
        "groups": [], "config": {}, "extra": {"ds": {"scale": 0.8, "offset": [0, 0]}}, "version": 0.4,
    }  # fmt: skip


def picture(name: str, folder: Path) -> None:
    """workflows/NAME.jpg from a run of the tiny model; a start picture is the first frame of another run."""
    request = Request(out=folder / "video.mp4", overwrite=True, seed=2, **PICTURES[name])
    if request.image is not None:
        generate(replace(request, image=None, frames=None))
        write_contact_sheet(folder / request.image.name, read_video(request.out)[:1])
        request = replace(request, image=folder / request.image.name)
    generate(request)
    frames = read_video(request.out)
    places = [round(place * (len(frames) - 1) / 3) for place in range(4)]
    write_contact_sheet(folder / "sheet.png", frames[places], columns=2, overwrite=True)
    with Image.open(folder / "sheet.png") as sheet:
        sheet.resize((256, 256), Image.Resampling.BICUBIC).save(ROOT / "workflows" / f"{name}.jpg", quality=85)


def main() -> None:
    checkout = find_checkouts()[0]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(checkout, Path(folder) / "base")
        try:
            server.wait_until_up()
            known = server.get("/object_info")
        finally:
            server.stop()
    for path in sorted((ROOT / "workflows" / "api").glob("*.json")):
        drawn = draw(path.stem, json.loads(path.read_text()), known)
        (ROOT / "workflows" / path.name).write_text(json.dumps(drawn, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in PICTURES:
            picture(name, Path(folder))


if __name__ == "__main__":
    main()
