"""Draw workflows/*.json from their twins in workflows/api: python -m tests.comfyui.draw

The twins say what runs. This adds what a person sees: places (arrange.py), titles, links with both ends, a note and
where to get the models. Slots and widgets come from a running host, so a drawing cannot disagree with the nodes. Beside
each lies a picture for the list of templates: four moments of a video that the bundled tiny model made in that way, and
a line that says so. The 14B models work in a way that the tiny one cannot: theirs is a line of words.
"""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from selfforcing_core.codecs.video import read_video, write_contact_sheet
from selfforcing_core.generate.request import Request
from selfforcing_core.generate.run import generate
from tests.comfyui.arrange import SAMPLER_WIDTH, arrange
from tests.comfyui.host_server import ROOT, Server, find_checkouts

# TALLEST is that of web/panel.js. With less room than the player takes, nodes would lie over each other.
PLAYER_MARGIN, TALLEST, DESK = 20, 560, 230  # of the player: beside its picture; the picture; what is below it
PICTURE_ROOM = 240  # below Load Image's widgets
PACE, LIVE = 2.0, ("live_t2v_1.3b", "endless_1.3b", "tiny_endless")  # seconds that a run may be ahead of the player
# Dark amber. The light theme adds 0.5 to the lightness: text and links are read on both (test_layout.py measures it).
NOTE_COLOURS = {"color": "#3a310a", "bgcolor": "#251f04"}
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
CARD, TINY = 256, "sample of the tiny model"  # pixels; whose video a picture shows
CARDS = {  # what is written above and below a picture in the list of templates
    "tiny_t2v": ("Text to video, bundled", TINY),
    "tiny_prompt_schedule": ("Prompts over time, bundled", TINY),
    "tiny_endless": ("Endless video, bundled", TINY),
    "t2v_1.3b_stream": ("Text to video, streamed", TINY),
    "t2v_1.3b_native": ("With ComfyUI's own nodes", TINY),
    "live_t2v_1.3b": ("Live: type new prompts", TINY),
    "prompt_schedule_1.3b": ("Prompts over time", TINY),
    "endless_1.3b": ("Endless video to disk", TINY),
    "lora_fp8_1.3b": ("LoRA on fp8 weights", TINY),
    "extend_1.3b": ("Make a video longer", TINY),
    "i2v_1.3b_prefill": ("Picture as first frame", TINY),
    "few_step_t2v_14b": ("14B text to video, 4 steps", "no sample: a 14B model"),
    "few_step_i2v_14b": ("14B picture to video, 4 steps", "no sample: a 14B model"),
}
NOTES = {
    "tiny_t2v": """## Prompt in, video out

The tiny model is bundled: nothing to download. Press **Run** and watch the video in the sampler while it is made.

The model knows sentences like *a red square moving left slowly on a navy background*:

- colours: red, green, blue, yellow, magenta, white
- shapes: circle, square, triangle
- directions: left, right, up, down, slowly or quickly
- backgrounds: black, gray, brown, navy, purple, teal

Length 33 is 3 chunks of 3 latent frames; try 129.""",
    "t2v_1.3b_native": """## Text to video, chunk by chunk, with ComfyUI's own nodes

Guider, sampler and sigmas of this pack in the usual graph. Put LoRA nodes behind the model, TorchCompileModel too.

Longer videos: a higher length, and **Cache Options (Self Forcing)** with a window behind the model.""",
    "t2v_1.3b_stream": """## Text to video, shown while it is made

One node samples and decodes: each chunk is shown as soon as it is done.

Any length will do; it is rounded down to whole chunks (81, 93, 105, ...).""",
    "i2v_1.3b_prefill": """## A picture as the first frame of a text-to-video model

Choose your picture. It fills the KV cache as frame 0, then the model goes on in chunks.

Any length will do; it is rounded down to whole chunks behind the picture (73, 85, 97, ...).""",
    "extend_1.3b": """## Make a video longer, with another prompt

The first sampler makes 81 frames. **Image to Video** hands their latents to the second, which goes on to 129 with the
second prompt. Repeat as often as you like: the window keeps time and memory per chunk constant.""",
    "tiny_prompt_schedule": """## The prompt changes while the video is made

A red square becomes a blue one at 2.1 seconds. The chunk in which the moment lies is the first that follows the new
prompt. What becomes of the frames so far is left to the model's cache policy (*history*): here they are written into
the KV cache again under the new prompt.

The tiny model is bundled: nothing to download.""",
    "tiny_endless": """## As long as you like, written to disk while it is made

The tiny model is bundled: nothing to download. Press **Run**, then steer:

- Type another prompt below the player, such as *a blue square moving left slowly on a black background*. It shows
  within about 2 seconds: the run stays no further ahead of what you see (*pace*).
- **Finish here** ends the video after the current chunk and keeps all of it.
- **Stop** throws the run away, as ComfyUI's own does; the player names the file with what was written until then.

Set length to what you will need at most. The window keeps time and memory per chunk constant; without a sink, nothing
keeps the old scene.""",
    "live_t2v_1.3b": """## Live: watch the video being made, and steer it

Press **Run**, then, below the player:

- Type a new prompt. It shows within about 2 seconds and one chunk: the run stays no further ahead of what you see
  (*pace*).
- **Hold** a chunk and roll it again, or change the seed.
- **Finish here** ends the video after the current chunk and saves it. **Stop** throws it away.

clip is connected to the sampler because it reads what you type. What you did comes out as *schedule*: the text for a
Prompt Schedule that repeats the run.""",
    "prompt_schedule_1.3b": """## The prompt changes while the video is made

Each line holds from its second on. The chunk in which the moment lies is the first that follows the new prompt.""",
    "endless_1.3b": """## As long as you like, written to disk while it is made

- Set length to what you will need at most: 2001 frames are 2 minutes.
- Type another prompt below the player. It shows within about 2 seconds and one chunk (*pace*).
- **Finish here** ends the video after the current chunk and keeps all of it.
- **Stop** throws the run away, as ComfyUI's own does; the player names the file with what was written until then.

Window 12 keeps time and memory per chunk constant, sink 3 keeps the first frames in it.""",
    "lora_fp8_1.3b": """## A LoRA on weights in 8 bits

Any LoRA for Wan 2.1 1.3B goes behind the model: choose yours in the LoRA node. The one named there is what
*train.export form=lora* makes of your own training. fp8 weights take half the memory of 16-bit ones.""",
    "few_step_t2v_14b": """## 14B in four steps, all frames at once

**Not causal**: the distilled 14B models of Self-Forcing-Plus and lightx2v see the whole video in every step. Nothing
streams, and 81 frames is what they were trained for.""",
    "few_step_i2v_14b": """## 14B image to video in four steps, all frames at once

**Not causal**: the distilled image-to-video models see the whole video in every step. Choose your picture and say what
happens in it.""",
}
TITLES = {  # what a node does here, in plain words
    "SelfForcingModelLoader": "Load the video model",
    "SelfForcingTAEHVLoader": "Load the fast decoder (TAEHV)",
    "SelfForcingTextEncode": "Prompt",
    "SelfForcingPromptSchedule": "Prompts over time",
    "SelfForcingCacheOptions": "What a chunk remembers (Cache Options)",
    "SelfForcingImageToVideo": "Begin with what is given (Image to Video)",
    "SelfForcingStreamSampler": "Make and watch the video (Stream Sampler)",
    "SelfForcingStreamToFile": "Make, watch and write the video (Stream to File)",
    "SelfForcingGuider": "Model and prompt (Guider)",
    "SelfForcingSampler": "Chunk by chunk (Sampler)",
    "SelfForcingFewStepSampler": "All frames at once (Few-Step Sampler)",
    "SelfForcingSigmas": "Steps (Sigmas)",
    "CLIPLoader": "Load the text encoder",
    "CLIPVisionLoader": "Load the picture encoder",
    "CLIPVisionEncode": "Encode the picture",
    "CLIPTextEncode": "Prompt",
    "EmptyHunyuanLatentVideo": "Size and length",
    "LoadImage": "Your picture",
    "LoraLoaderModelOnly": "Your LoRA",
    "RandomNoise": "Seed",
    "SamplerCustomAdvanced": "Make the video",
    "SaveVideo": "Save the video",
    "VAEDecode": "Decode the frames",
    "VAELoader": "Load Wan's VAE",
}


def note_text(name: str, files: list[str]) -> str:
    """Return the note of a workflow, with every file and the folder it belongs in."""
    if not files:
        return NOTES[name]
    rows = [f"- [{file}]({MODELS[file][0]}) in models/{MODELS[file][1]}" for file in files]
    return "\n".join([NOTES[name], "", "Files to download:", "", *rows])


def note_height(text: str) -> int:
    """Return a height that is enough for the text at the width of a note, in the renderer that sets it largest."""
    lines = sum(1 + len(line) // 48 for line in re.sub(r"\(http.*?\)", "", text).splitlines() if line)
    return 40 + 25 * lines + 10 * text.count("\n\n")


def slots(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, type and options of a node's inputs in ComfyUI's order."""
    groups = description["input"]
    entries = [item for group in ("required", "optional") for item in groups.get(group, {}).items()]
    return [
        (name, "COMBO" if isinstance(entry[0], list) else entry[0], entry[1] if len(entry) > 1 else {})
        for name, entry in entries
    ]


def is_widget(kind: str) -> bool:
    return kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget_values(inputs: dict[str, Any], description: dict[str, Any]) -> list[Any]:
    """Return values by position, as the front end stores them; a seed is followed by what happens to it after a run.

    Widgets behind the last that the twin names are left to their defaults: hosts differ in how many they have.
    """
    # A widget that another version has in addition would shift all values behind it: ComfyUI reads them by position.
    values: list[Any] = []
    widgets = [entry for entry in slots(description) if is_widget(entry[1])]
    named = [place for place, (name, *_) in enumerate(widgets) if name in inputs]
    for name, _, options in widgets[: 1 + max(named, default=-1)]:
        values.append(inputs.get(name, options.get("default")))
        if options.get("control_after_generate"):
            values.append("fixed")  # a workflow gives the same video each time, until the user wants another
        if options.get("image_upload"):
            values.append("image")  # the front end's own entry for the button that uploads
    return values


def height(description: dict[str, Any], values: dict[str, Any]) -> int:
    """Return the height with which a node is saved. values: its inputs in the twin."""
    rows = sum(not is_widget(kind) for _, kind, _ in slots(description))
    tall = sum(bool(options.get("multiline")) for _, _, options in slots(description))
    widgets = num_widgets(description)
    player = 0
    if any(slot == "player" for slot, _, _ in slots(description)):
        player = min(TALLEST, round((SAMPLER_WIDTH - PLAYER_MARGIN) * values["height"] / values["width"])) + DESK
    return 40 + 20 * max(rows, len(description["output"])) + 26 * widgets + 90 * tall + player


def num_widgets(description: dict[str, Any]) -> int:
    return sum(is_widget(kind) + bool(options.get("control_after_generate")) for _, kind, options in slots(description))


def room(description: dict[str, Any], values: dict[str, Any]) -> int:
    """Return the height that a node may grow to.

    Nodes 2.0 has taller widgets, badges and a line for errors below them.
    """
    if any(slot == "player" for slot, *_ in slots(description)):
        return height(description, values) + 40
    has_picture = any(options.get("image_upload") for _, _, options in slots(description))
    return height(description, values) + 24 + 12 * num_widgets(description) + (PICTURE_ROOM if has_picture else 0)


def draw(name: str, twin: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the UI format of one twin."""
    described = {key: known[node["class_type"]] for key, node in twin.items()}
    nodes, links = [], []
    for order, (key, node) in enumerate(twin.items()):
        entries = []
        for slot, kind, _ in slots(described[key]):
            entry: dict[str, Any] = {"name": slot, "type": kind}
            if is_widget(kind):
                entry["widget"] = {"name": slot}
            value = node["inputs"].get(slot)
            entry["link"] = None
            if isinstance(value, list):
                link = len(links) + 1
                source = described[value[0]]
                links.append([link, int(value[0]), value[1], int(key), len(entries), source["output"][value[1]]])
                entry["link"] = link
            entries.append(entry)
        nodes.append(
            {
                "id": int(key),
                "type": node["class_type"],
                "pos": [],
                "size": [],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": entries,
                "outputs": outputs(described[key]),
                "properties": properties(node),
                "widgets_values": widget_values(node["inputs"], described[key]),
            }
        )
        if node["class_type"] in TITLES:
            nodes[-1]["title"] = TITLES[node["class_type"]]
    by_id = {node["id"]: node for node in nodes}
    for link, source, slot, *_ in links:
        by_id[source]["outputs"][slot]["links"].append(link)
    text = note_text(name, [model["name"] for node in nodes for model in node["properties"].get("models", [])])
    note = {
        "id": max(by_id) + 1,
        "type": "MarkdownNote",
        "pos": [],
        "size": [],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Read me",
        "properties": {},
        "widgets_values": [text],
        **NOTE_COLOURS,
    }
    plan = arrange(
        twin,
        {key: height(description, twin[key]["inputs"]) for key, description in described.items()},
        {key: room(description, twin[key]["inputs"]) for key, description in described.items()},
        (str(note["id"]), note_height(text)),
    )
    for node in (note, *nodes):
        node["pos"], node["size"] = plan.boxes[str(node["id"])]
    return {
        # The same id each time that it is drawn: the front end keeps what it knows of a workflow under it.
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"selfforcing-stream/{name}")),
        "revision": 0,
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": [note, *nodes],
        "links": links,
        "groups": plan.groups,
        "config": {},
        "extra": {"ds": {"scale": plan.scale, "offset": plan.offset}},
        "version": 0.4,
    }


def outputs(description: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": label, "type": kind, "links": []}
        for label, kind in zip(description["output_name"], description["output"])
    ]


def properties(node: dict[str, Any]) -> dict[str, Any]:
    """Return which pack a node is of, and where to get the files that it names."""
    is_ours = node["class_type"].startswith("SelfForcing")
    entries: dict[str, Any] = {
        "cnr_id": "selfforcing-stream" if is_ours else "comfy-core",
        "Node name for S&R": node["class_type"],
    }
    files = [value for value in node["inputs"].values() if isinstance(value, str) and value in MODELS]
    if files:
        entries["models"] = [{"name": file, "url": MODELS[file][0], "directory": MODELS[file][1]} for file in files]
    return entries


def paced(text: str, name: str, known: dict[str, Any]) -> str:
    """Add its pace, and its file's quality where it has one, to every streaming node in the text of a twin."""
    new = [("pace", '"player": true', PACE if name in LIVE else 0.0), ("quality", '"fps": 16.0', -1)]
    for slot, behind, value in new:
        nodes = [
            node for node in json.loads(text).values() if slot in known[node["class_type"]]["input"].get("optional", ())
        ]
        if any(slot not in node["inputs"] for node in nodes):
            text = text.replace(behind, f'{behind},\n      "{slot}": {value}')
    return text


def picture(name: str, folder: Path) -> None:
    """Write workflows/NAME.jpg from a run of the tiny model; a start picture is the first frame of another run."""
    request = Request(out=folder / "video.mp4", overwrite=True, seed=2, **PICTURES[name])
    if request.image is not None:
        generate(replace(request, image=None, frames=None))
        write_contact_sheet(folder / request.image.name, read_video(request.out)[:1])
        request = replace(request, image=folder / request.image.name)
    generate(request)
    frames = read_video(request.out)
    # The first frame, the last, and two between: movement, or the change of a prompt, shows in four.
    places = [round(place * (len(frames) - 1) / 3) for place in range(4)]
    write_contact_sheet(folder / "sheet.png", frames[places], columns=2, overwrite=True)
    with Image.open(folder / "sheet.png") as sheet:
        save_card(name, sheet.convert("RGB").resize((CARD, CARD), Image.Resampling.BICUBIC))


def plain_card() -> Image.Image:
    """Return a card for models that work in a way that the tiny one cannot."""
    image = Image.new("RGB", (CARD, CARD), (29, 58, 74))
    words = "all frames\nat once,\nnot streamed"
    ImageDraw.Draw(image).multiline_text(
        (CARD / 2, CARD / 2), words, fill="white", anchor="mm", align="center", font=ImageFont.load_default(26)
    )
    return image


def save_card(name: str, image: Image.Image) -> None:
    """Write workflows/NAME.jpg: a picture and what the workflow is for. The list of templates shows file names."""
    draw = ImageDraw.Draw(image)
    title, sample = CARDS[name]
    for top, height, text, size in ((0, 30, title, 17), (CARD - 26, 26, sample, 15)):
        draw.rectangle((0, top, CARD, top + height), fill=(15, 27, 34))
        draw.text((CARD / 2, top + height / 2), text, fill="white", anchor="mm", font=ImageFont.load_default(size))
    image.save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def main() -> None:
    # The oldest: slots that it lacks are added when a later one loads the graph, and none would go missing there.
    checkout = min(find_checkouts(), key=lambda candidate: [int(part) for part in candidate.version.split(".")])
    with tempfile.TemporaryDirectory() as folder:
        server = Server(checkout, Path(folder) / "base")
        try:
            server.wait_until_up()
            known = server.get("/object_info")
        finally:
            server.stop()
    for path in sorted((ROOT / "workflows" / "api").glob("*.json")):
        path.write_text(paced(path.read_text(), path.stem, known))
        drawn = draw(path.stem, json.loads(path.read_text()), known)
        (ROOT / "workflows" / path.name).write_text(json.dumps(drawn, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in CARDS:
            if name in PICTURES:
                picture(name, Path(folder))
            else:
                save_card(name, plain_card())


if __name__ == "__main__":
    main()
