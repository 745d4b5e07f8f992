"""The workflow that users get makes the video they asked for, in a real ComfyUI, and survives the stop button."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from selfforcing_core.codecs.video import read_metadata, read_video
from selfforcing_core.generate.request import Request
from selfforcing_core.generate.run import generate
from tests.comfyui.graphs import (
    CREATE,
    EXPLICIT_CHUNK,
    SAMPLER,
    SAVE,
    TAEHV,
    TEXT,
    add,
    fresh_seed,
    latents_of,
    read_mp4,
    tiny_prompt,
)
from tests.comfyui.host_server import Refused, Server, failure
from train.tiny.world import detect

NUM_CHUNKS, NUM_STEPS, NUM_FRAMES = 3, 4, 33  # of workflows/api/tiny_t2v.json
SCENES = [
    ("red", "square", "a red square moving left slowly on a black background"),
    ("green", "circle", "a green circle moving down slowly on a black background"),
]


@pytest.mark.parametrize(("colour", "shape", "text"), [pytest.param(*SCENES[0], marks=pytest.mark.smoke), *SCENES[1:]])
def test_saved_video_shows_what_the_prompt_says(server: Server, colour: str, shape: str, text: str) -> None:
    saved = server.run(tiny_prompt(text, seed=1))[SAVE]
    frames, fps = read_mp4(saved[0])
    assert frames.shape == (NUM_FRAMES, 3, 64, 64)
    assert fps == 16
    detection = detect(frames)
    assert (detection.colour, detection.shape) == (colour, shape), (
        detection.colours_V,
        detection.shapes_V,
    )  # of most frames


def test_video_is_that_of_the_command_line(server: Server, tmp_path: Path) -> None:
    text, seed = "a blue circle moving up quickly on a teal background", fresh_seed()
    frames, _ = read_mp4(server.run(tiny_prompt(text, seed=seed))[SAVE][0])
    generate(Request(prompt=text, out=tmp_path / "same.mp4", frames=NUM_FRAMES, seed=seed))
    # The two encode H.264 with different settings, and the hosts' torch may round differently from ours.
    assert (read_video(tmp_path / "same.mp4") - frames).abs().mean() < 0.02


REST = "square moving left slowly on a black background"


@pytest.mark.parametrize("history", ["recode", "keep"])
def test_a_schedule_is_that_of_the_command_line(server: Server, tmp_path: Path, history: str) -> None:
    text, seed = f"0s: a red {REST}\n2.1s: a blue {REST}", 2
    prompt = tiny_prompt(seed=seed, length=57, positive=["schedule", 0])
    add(
        prompt,
        "schedule",
        "SelfForcingPromptSchedule",
        text=text,
        history=history,
        fps=16.0,
        text_encoder=prompt[TEXT]["inputs"]["text_encoder"],
    )
    frames, _ = read_mp4(server.run(prompt)[SAVE][0])
    generate(Request(prompt=text, out=tmp_path / "same.mp4", frames=57, seed=seed, history=history))
    assert (read_video(tmp_path / "same.mp4") - frames).abs().mean() < 0.02
    colours = detect(frames).colours_V
    assert set(colours[:33]) == {"red"}
    assert "red" not in colours[-8:]


def test_a_schedule_of_one_prompt_is_the_prompt_bitwise(server: Server) -> None:
    seed, text = fresh_seed(), f"a red {REST}"
    plain = latents_of(server, tiny_prompt(text, seed=seed))
    prompt = tiny_prompt(seed=seed, positive=["schedule", 0])
    options = {"history": "recode", "fps": 16.0, "text_encoder": prompt[TEXT]["inputs"]["text_encoder"]}
    add(prompt, "schedule", "SelfForcingPromptSchedule", text=text, **options)
    assert torch.equal(latents_of(server, prompt), plain)
    prompt["schedule"]["inputs"]["text"] = f"0s: {text}\n9s: a blue {REST}"
    prompt_id = server.submit(prompt)
    assert "the video ends at 2.0625s" in failure(server.result(prompt_id))
    prompt["schedule"]["inputs"]["text"] = "2s: late\n3s: later"
    with pytest.raises(Refused, match="begins at 2s"):
        server.submit(prompt)
    prompt["schedule"]["inputs"]["text"] = f"1990s: a red {REST}"
    assert latents_of(server, prompt).isfinite().all()
    assert "'1990s:' is read as a part of the prompt" in server.log()


def test_progress_counts_network_calls_and_every_chunk_is_previewed(server: Server) -> None:
    with server.events() as events:
        server.submit(tiny_prompt(seed=fresh_seed()), events.client_id)
        received = events.until("execution_success", "execution_error")
    assert received[-1]["type"] == "execution_success"
    counts = [e["data"] for e in received if e["type"] == "progress" and e["data"]["node"] == SAMPLER]
    calls = NUM_CHUNKS * (NUM_STEPS + 1) - 1  # each chunk is also written into the cache, but for the last
    assert {count["max"] for count in counts} == {calls}
    assert counts[-1]["value"] == calls
    assert sum(e["type"] == "binary" for e in received) >= NUM_CHUNKS


def test_interrupted_run_leaves_the_next_one_as_if_it_had_never_been(server: Server) -> None:
    sampler_inputs = {"seed": fresh_seed(), "length": 129}
    prompt = tiny_prompt(**sampler_inputs)
    with server.events() as events:
        prompt_id = server.submit(prompt, events.client_id)
        # Pressed while it samples; loaders report progress as well.
        while events.until("progress")[-1]["data"]["node"] != SAMPLER:
            pass
        server.post("/interrupt")
        events.until("execution_interrupted")
    entry = server.result(prompt_id)
    assert entry["status"]["status_str"] == "error"
    kind, stopped = entry["status"]["messages"][-1]
    assert (kind, stopped["node_type"]) == ("execution_interrupted", "SelfForcingStreamSampler")
    assert not entry["outputs"]

    again = latents_of(server, prompt)
    assert torch.equal(again, latents_of(server, tiny_prompt(**{**sampler_inputs, "chunk": EXPLICIT_CHUNK})))
    assert len(read_mp4(server.run(prompt)[SAVE][0])[0]) == 129


def test_streamed_frames_are_those_that_decoding_the_latents_gives(server: Server) -> None:
    """As PNG, which loses nothing: the trip through raw VAE space may round a value to its neighbour."""
    prompt = tiny_prompt(seed=fresh_seed(), length=21)
    add(prompt, "ours", "SelfForcingTAEHVDecode", samples=[SAMPLER, 0], taehv=[TAEHV, 0])
    add(prompt, "native", "VAEDecode", samples=[SAMPLER, 0], vae=[TAEHV, 0])
    for name, source in (("stream", [SAMPLER, 1]), ("a", ["ours", 0]), ("b", ["native", 0])):
        add(prompt, "png_" + name, "SaveImage", images=source, filename_prefix=f"frames/{name}")
    saved = server.run(prompt)
    stream, own, native = (
        torch.stack([pil_to_tensor(path) for path in saved["png_" + name]]) for name in ("stream", "a", "b")
    )
    assert stream.shape == (21, 64, 64, 3)
    for decoded in (own, native):
        assert (decoded - stream).abs().max() <= 1


def to_file(prompt: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the workflow with Stream to File in place of its sampler and what follows."""
    inputs = {**prompt[SAMPLER]["inputs"], "filename_prefix": "streamed/clip", "format": "mkv (lossless)", "fps": 16.0}
    nodes = {name: node for name, node in prompt.items() if name not in (SAMPLER, CREATE, SAVE)}
    return {**nodes, "file": {"class_type": "SelfForcingStreamToFile", "inputs": {**inputs, **more}}}


def test_a_file_written_while_it_is_made_holds_the_same_frames(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), length=21)
    (path,) = server.run(to_file(prompt))["file"]
    add(prompt, "png", "SaveImage", images=[SAMPLER, 1], filename_prefix="frames/whole")
    whole = torch.stack([pil_to_tensor(path) for path in server.run(prompt)["png"]])
    streamed = (read_video(path) * 255).round().short().permute(0, 2, 3, 1)
    assert streamed.shape == (21, 64, 64, 3)
    # SaveImage cuts what we round
    assert (streamed - whole).abs().max() <= 1
    metadata = {name.lower(): value for name, value in read_metadata(path).items()}
    assert json.loads(metadata["prompt"])["file"]["class_type"] == "SelfForcingStreamToFile"
    again = server.run(to_file(prompt, format="mp4 (H.264)"))["file"][0]
    assert (again.name, again.parent.name) == ("clip_00002_.mp4", "streamed")
    assert (read_video(again) - read_video(path)).abs().mean() < 0.03


def test_every_video_of_a_batch_has_a_file_of_its_own(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), latent_image=["latent", 0])
    add(prompt, "latent", "EmptyHunyuanLatentVideo", width=64, height=64, length=21, batch_size=2)
    for kind, ending in (("mkv (lossless)", ".mkv"), ("mp4 (H.264)", ".mp4")):
        paths = server.run(to_file(prompt, filename_prefix=f"batch{ending}/a", format=kind))["file"]
        assert [path.name for path in paths] == [f"a_00001_{ending}", f"a_00002_{ending}"]
        first, second = map(read_video, paths)
        assert first.shape == second.shape == (21, 3, 64, 64)
        assert (first - second).abs().max() > 0.1


def test_a_stopped_file_plays_as_far_as_it_was_made(server: Server) -> None:
    with server.events() as events:
        server.submit(
            to_file(tiny_prompt(seed=fresh_seed(), length=417), filename_prefix="stopped/a"), events.client_id
        )
        while not list((server.folder / "output/stopped").glob("*.mkv")):
            events.until("progress")
        server.post("/interrupt")
        events.until("execution_interrupted")
    (path,) = (server.folder / "output/stopped").glob("*.mkv")
    assert 9 <= len(read_video(path)) < 417


def with_sound(server: Server, prompt: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the workflow with a tone as the sound of its file."""
    (server.folder / "input").mkdir(exist_ok=True)
    with av.open(str(server.folder / f"input/{seconds}.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=16000)
        stream.layout = "mono"
        tone = 0.5 * np.sin(np.arange(round(16000 * seconds), dtype=np.float32) / 6)
        frame = av.AudioFrame.from_ndarray((tone[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    prompt["file"]["inputs"]["audio"] = ["sound", 0]
    add(prompt, "sound", "LoadAudio", audio=f"{seconds}.wav")
    return prompt


def loudness(path: Path) -> list[float]:
    """Return the mean size of the samples of each packet of a file's sound."""
    with av.open(str(path)) as file:
        return [float(np.abs(frame.to_ndarray().astype(np.float64)).mean()) for frame in file.decode(audio=0)]


def test_every_format_of_the_list_is_written_and_sound_is_muxed_in(server: Server) -> None:
    kinds = server.get("/object_info/SelfForcingStreamToFile")["SelfForcingStreamToFile"]["input"]["required"]["format"]
    choices = kinds[0] if isinstance(kinds[0], list) else kinds[1]["options"]
    assert choices[:2] == ["mp4 (H.264)", "mkv (lossless)"]
    assert len(choices) == 7
    seed, frames = fresh_seed(), {}
    for choice in choices:
        prompt = to_file(tiny_prompt(seed=seed, length=21), format=choice, filename_prefix="kinds/a", quality=-1)
        is_silent = "loops" in choice  # webp and gif are pictures, which have no sound
        (path,) = server.run(prompt if is_silent else with_sound(server, prompt, 5.0))["file"]
        if path.suffix == ".webp":
            with Image.open(path) as file:
                assert file.n_frames == 21
            continue
        frames[choice] = read_video(path)
        assert "prompt" in {name.lower() for name in read_metadata(path)}
        if not is_silent:
            # Encoders fade in, and the last packet is filled up with silence.
            assert min(loudness(path)[2:-1]) > 0.1 * max(loudness(path))
    for choice, video in frames.items():
        assert video.shape == (21, 3, 64, 64)
        assert (video - frames["mkv (lossless)"]).abs().mean() < 0.03, choice
    assert "is cut at the video's end, 1.31 s" in server.log()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"quality": 60}, "crf from 51 (worst) to 1 (best), 18 by default"),
        ({"format": "mkv (lossless)", "quality": 18}, "FFV1 has no such choice"),
        ({"format": "mpg"}, "use mp4 (H.264)"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_anything_runs(
    server: Server, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refused) as refusal:
        server.submit(to_file(tiny_prompt(seed=fresh_seed()), **{"format": "mp4 (H.264)", **wrong}))
    assert words in json.dumps(json.loads(str(refusal.value))["node_errors"])


def test_a_sound_for_a_silent_format_is_refused_before_sampling(server: Server) -> None:
    prompt = to_file(tiny_prompt(seed=fresh_seed(), length=2001), format="gif (loops)")
    assert "gif has no sound" in failure(server.result(server.submit(with_sound(server, prompt, 1.0))))


def test_a_stopped_file_has_its_sound_and_is_named(server: Server) -> None:
    prompt = to_file(tiny_prompt(seed=fresh_seed(), length=417), filename_prefix="loud/a", format="mp4 (H.264)")
    with server.events() as events:
        server.submit(with_sound(server, prompt, 60.0), events.client_id)
        while not list((server.folder / "output/loud").glob("*.mp4")):
            events.until("progress")
        server.post("/interrupt")
        events.until("execution_interrupted")
    (path,) = (server.folder / "output/loud").glob("*.mp4")
    count = len(read_video(path))
    assert 9 <= count < 417
    # AAC has 1024 samples a packet; the sound of the frames that were made is there, but for one packet.
    assert len(loudness(path)) >= count / 16 * 16000 / 1024 - 1
    assert f"a_00001_.mp4 holds the {count} frames made so far" in server.log()


def test_streaming_to_a_file_needs_a_decoder(server: Server) -> None:
    prompt = to_file(tiny_prompt(seed=fresh_seed()))
    del prompt["file"]["inputs"]["taehv"]
    assert "connect taehv" in failure(server.result(server.submit(prompt)))


def pil_to_tensor(path: Path) -> torch.Tensor:
    """Return pixels 0 to 255, [H, W, R]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"), dtype=np.int16))


def test_size_may_come_from_an_empty_latent_of_the_host(server: Server) -> None:
    seed = fresh_seed()
    plain = latents_of(server, tiny_prompt(seed=seed, width=96, length=21))
    prompt = tiny_prompt(seed=seed, latent_image=["latent", 0])
    add(prompt, "latent", "EmptyHunyuanLatentVideo", width=96, height=64, length=21, batch_size=1)
    assert torch.equal(latents_of(server, prompt), plain)


def test_length_may_come_over_a_link_and_an_unused_length_does_no_harm(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), length=["number", 0], chunk=2)
    add(prompt, "number", "PrimitiveInt", value=13)
    assert latents_of(server, prompt).shape[2] == 4
    prompt = tiny_prompt(seed=fresh_seed(), length=33, chunk=2, latent_image=["latent", 0])
    add(prompt, "latent", "EmptyHunyuanLatentVideo", width=64, height=64, length=13, batch_size=1)
    assert latents_of(server, prompt).shape[2] == 4


def test_latents_of_another_model_are_refused_by_both_decoders(server: Server) -> None:
    for node, inputs in {"SelfForcingTAEHVDecode": {"taehv": [TAEHV, 0]}, "VAEDecode": {"vae": [TAEHV, 0]}}.items():
        prompt = {TAEHV: tiny_prompt()[TAEHV]}
        add(prompt, "latent", "EmptyLatentImage", width=64, height=64, batch_size=1)
        add(prompt, "decode", node, samples=["latent", 0], **inputs)
        add(prompt, "save", "PreviewImage", images=["decode", 0])
        assert "not a Wan 2.1 video's" in failure(server.result(server.submit(prompt)))


def test_a_window_that_cannot_hold_a_chunk_ends_with_a_remedy(server: Server) -> None:
    entry = server.result(server.submit(tiny_prompt(seed=fresh_seed(), window=2)))
    assert "use -1 (no limit) or at least 3" in failure(entry)


def test_images_without_an_autoencoder_say_what_to_connect(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed())
    del prompt[SAMPLER]["inputs"]["taehv"]
    with server.events() as events:
        server.submit(prompt, events.client_id)
        message = events.until("execution_error", "execution_success")[-1]["data"].get("exception_message", "")
    assert "connect taehv" in message


def test_batch_rows_are_different_videos_and_the_first_is_that_of_a_single_run(server: Server) -> None:
    seed = fresh_seed()
    alone = latents_of(server, tiny_prompt(seed=seed, length=21))
    prompt = tiny_prompt(seed=seed, latent_image=["latent", 0])
    add(prompt, "latent", "EmptyHunyuanLatentVideo", width=64, height=64, length=21, batch_size=2)
    both = latents_of(server, prompt)
    assert len(both) == 2
    assert (both[:1] - alone).abs().max() < 1e-3  # matrix products round differently by batch size
    assert (both[1:] - alone).abs().max() > 0.1
    clips = [read_mp4(path)[0] for path in server.run(prompt)[SAVE]]
    assert [len(clip) for clip in clips] == [21, 21], "a clip for each row, not one of both"
    assert (clips[0] - clips[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "length", "colours"), [("tiny_prompt_schedule", 69, "red blue"), ("tiny_endless", 321, "red red")]
)
def test_shipped_tiny_workflows_show_what_they_say(server: Server, name: str, length: int, colours: str) -> None:
    prompt = json.loads((Path(__file__).parents[2] / f"workflows/api/{name}.json").read_text())
    (saved,) = (files for files in server.run(prompt).values() if files)
    frames, fps = read_mp4(saved[0])
    assert (len(frames), fps) == (length, 16)
    detection = detect(frames)
    first, last = colours.split()
    assert (detection.colours_V[0], detection.colours_V[-1]) == (first, last)
    assert sum(shape == "square" for shape in detection.shapes_V) > length / 2
