"""What the live player is sent and what it may ask for, in a real ComfyUI without a page."""

from __future__ import annotations

import http.client
import json
import random
import string
import time
import uuid
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfforcing_core.codecs.video import read_metadata
from tests.comfyui.graphs import SAMPLER, SAVE, TEXT, fresh_seed, latents_of, read_mp4, tiny_prompt
from tests.comfyui.host_server import ROOT, RUN_SECONDS, Server
from tests.comfyui.page import Page, page
from train.tiny.world import detect

REST = "square moving left slowly on a black background"
LENGTH, CHUNKS = 69, 6  # 18 latent frames, of which the first is one frame and each other four
SILENT = [{"when": {"number": -1}, "do": [], "acknowledge": False}]


def play(server: Server, reactions: list[dict[str, Any]], **inputs: Any) -> tuple[Page, dict[str, Any]]:
    """Run the tiny workflow as this page; what it saw and the history entry."""
    prompt = tiny_prompt(f"a red {REST}", **{"seed": fresh_seed(), "length": LENGTH, **inputs})
    with page(server, reactions) as viewer:
        entry = server.result(server.submit(prompt, viewer.client_id))
        assert entry["status"]["status_str"] == "success", entry
        viewer.until_done()
        return viewer, entry


def test_the_page_that_queued_gets_every_chunk_and_no_other_gets_any(server: Server) -> None:
    with page(server) as other:
        viewer, _ = play(server, [])
        other.process.kill()
        other.process.wait()
        time.sleep(0.2)  # its last lines are on their way through the pipe
        while not other.arrived.empty():
            assert other.arrived.get()["type"] != "live"
    messages = viewer.live()
    assert [message["number"] for message in messages] == list(range(len(messages)))
    first, last = messages[0], messages[-1]
    assert (first["state"], first["chunk"], first["indices"], first["can_prompt"]) == ("sampling", 0, [], True)
    assert (last["state"], last["chunk"], last["num_chunks"], last["num_frames"]) == ("done", CHUNKS, CHUNKS, LENGTH)
    indices = [index for message in messages for index in message["indices"]]
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert indices[-1] >= LENGTH - 12
    assert {tuple(size) for message in messages for size in message["sizes"]} == {(64, 64)}
    stats = last["stats"]
    assert stats["first_frame_seconds"] > 0
    assert stats["real_time"] == pytest.approx(stats["fps"] / 16)
    assert not any(event.get("type") == "binary" for event in viewer.events), "ComfyUI's preview is not needed then"


def test_a_page_that_never_answers_gets_two_messages_with_pictures_and_the_hosts_preview(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, SILENT) as viewer:
        server.result(server.submit(prompt, viewer.client_id))
        viewer.until("execution_success")
        time.sleep(0.5)  # ComfyUI's own events come before what the outbox still sends
        while not viewer.arrived.empty():
            viewer.events.append(viewer.arrived.get())
        assert not any(message["indices"] for message in viewer.live()[2:])
        assert len(viewer.live()) <= 2 + RUN_SECONDS / 5
        assert sum(event.get("type") == "binary" for event in viewer.events) >= CHUNKS


def test_the_player_can_be_switched_off(server: Server) -> None:
    with page(server) as viewer:
        server.result(server.submit(tiny_prompt(seed=fresh_seed(), player=False), viewer.client_id))
        viewer.until("execution_success")
        assert not viewer.live()


def test_a_page_that_vanishes_in_the_middle_stalls_nothing(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, [{"when": {"chunk": 1}, "do": [{"action": "hold"}]}]) as viewer:
        prompt_id = server.submit(prompt, viewer.client_id)
        while not any(message["state"] == "held" for message in viewer.live()):
            viewer.events.append(viewer.arrived.get(timeout=RUN_SECONDS))
    assert server.result(prompt_id)["status"]["status_str"] == "success", "the held chunk is let go"


def test_a_typed_prompt_changes_the_later_chunks(server: Server) -> None:
    text = {"action": "prompt", "text": f"a blue {REST}", "history": "recode"}
    at_hold = {"when": {"state": "held", "chunk": 2}, "do": [text, {"action": "go_on"}]}
    viewer, entry = play(server, [{"when": {"chunk": 1}, "do": [{"action": "hold"}]}, at_hold], seed=2)
    (file,) = server._files(entry["outputs"][SAVE])
    colours = detect(read_mp4(file)[0]).colours_V
    assert set(colours[:9]) == {"red"}
    assert colours[-1] == "blue"
    assert not [event for event in viewer.events if "refused" in event]


def test_a_page_that_comes_back_learns_that_a_chunk_is_held(server: Server) -> None:
    """Loaded anew by the same client, it hears of the run again without anything having happened."""
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}]) as first:
        prompt_id = server.submit(prompt, first.client_id)
        while not any(message["state"] == "held" for message in first.live()):
            first.events.append(first.arrived.get(timeout=RUN_SECONDS))
    with page(server, [{"when": {"state": "held"}, "do": [{"action": "go_on"}]}], first.client_id) as again:
        assert server.result(prompt_id)["status"]["status_str"] == "success"
        assert again.until_done()[0]["state"] == "held"


def test_a_page_that_missed_the_first_messages_hears_of_the_run_when_it_is_back(server: Server) -> None:
    """As while another workflow was open: nobody answered, and then somebody does."""
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    away = {"when": {"number": 0}, "do": [{"action": "hold"}], "acknowledge": False}
    with page(server, [away]) as first:
        prompt_id = server.submit(prompt, first.client_id)
        while len(first.live()) < 4:
            first.events.append(first.arrived.get(timeout=30))
        assert not any(message["indices"] for message in first.live()[2:])
    with page(server, [{"when": {"state": "held"}, "do": [{"action": "go_on"}]}], first.client_id) as again:
        assert server.result(prompt_id)["status"]["status_str"] == "success"
        numbers = {index for message in again.until_done() for index in message["indices"]}
        assert LENGTH - 12 in numbers, "the last chunk's first frame, which is shown at any rate"


def test_messages_say_which_workflow_queued_the_run_and_scripts_without_one_are_played_too(server: Server) -> None:
    workflow = {"id": "5e1f", "extra": {"selfforcing_tab": "t7", "ds": {}}, "nodes": []}
    odd: list[Any] = [None, [], {"workflow": None}, {"workflow": {"id": 7, "extra": "x"}}]
    for pnginfo, origin in [({"workflow": workflow}, ("5e1f", "t7")), *((each, (None, None)) for each in odd)]:
        with page(server) as viewer:
            body = {"prompt": tiny_prompt(seed=fresh_seed(), length=9), "client_id": viewer.client_id}
            prompt_id = server.post("/prompt", {**body, "extra_data": {"extra_pnginfo": pnginfo}})["prompt_id"]
            assert server.result(prompt_id)["status"]["status_str"] == "success"
            assert {(message.get("workflow"), message.get("tab")) for message in viewer.until_done()} == {origin}


def made_by(server: Server, prompt: dict[str, Any], node: str, client_id: str) -> tuple[torch.Tensor, bool]:
    """Return the latents that a node's output has, and whether ComfyUI computed them this time."""
    inputs = {"samples": [node, 0], "filename_prefix": f"latents/{uuid.uuid4().hex}"}
    entry = server.result(
        server.submit({**prompt, "latents": {"class_type": "SaveLatent", "inputs": inputs}}, client_id)
    )
    assert entry["status"]["status_str"] == "success", entry
    cached = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
    return load_file(server._files(entry["outputs"]["latents"])[0])["latent_tensor"], node not in cached[0]


@pytest.mark.parametrize("case", ["prompt", "seed", "reroll", "seed to file", "linked seed"])
def test_a_steered_result_is_never_taken_for_that_of_its_inputs(server: Server, case: str) -> None:
    """Steered, queued again, and queued once more: ComfyUI's cache has the plain result then, and only that one."""
    # Below 2**53: the page's numbers are exact no further.
    seed, node, prompt = fresh_seed() % 2**53, SAMPLER, tiny_prompt(f"a red {REST}", length=33)
    if case == "seed to file":
        prompt = json.loads((ROOT / "workflows/api/tiny_endless.json").read_text())
        (node,) = (key for key, each in prompt.items() if each["class_type"] == "SelfForcingStreamToFile")
    inputs = prompt[node]["inputs"]
    inputs |= {"seed": seed, "length": 33}
    plain, _ = made_by(server, prompt, node, "")
    # ComfyUI's cache has the plain result by now and would answer with it: nothing would run, nothing be steered.
    inputs["shift"] = inputs["shift"] + 5.0 if inputs["shift"] == 0 else inputs["shift"]  # the same in other words
    if case == "linked seed":
        prompt["seed"] = {"class_type": "PrimitiveInt", "inputs": {"value": seed}}
        inputs["seed"] = ["seed", 0]
    steps: dict[str, list[dict[str, Any]]] = {
        "prompt": [{"action": "prompt", "text": f"a blue {REST}", "history": "recode"}, {"action": "go_on"}],
        "reroll": [{"action": "reroll", "seed": 7}],
    }
    at_hold = {"when": {"state": "held"}, "do": steps.get(case, [{"action": "seed", "seed": 7}, {"action": "go_on"}])}
    reactions = [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}, at_hold]
    reactions += [{"when": {"state": "held"}, "do": [{"action": "go_on"}]}] * (case == "reroll")
    with page(server, reactions) as viewer:
        steered, _ = made_by(server, prompt, node, viewer.client_id)
        assert not torch.equal(steered, plain)
    again, was_computed = made_by(server, prompt, node, "")
    assert torch.equal(again, plain)
    assert was_computed
    once_more, was_computed = made_by(server, prompt, node, "")
    assert torch.equal(once_more, plain)
    assert not was_computed


def test_a_chunk_rolled_again_is_what_its_seed_gives(server: Server) -> None:
    """Rolled twice with other seeds and then with its own, the video is the undisturbed one; with another it is not."""
    seed = fresh_seed() % 2**53
    plain = latents_of(server, tiny_prompt(f"a red {REST}", seed=seed, length=LENGTH))

    def rolled(*seeds: int) -> tuple[Page, torch.Tensor]:
        steps = [{"action": "reroll", "seed": each} for each in seeds]
        reactions: list[dict[str, Any]] = [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}]
        reactions += [{"when": {"state": "held"}, "do": [step]} for step in steps]
        reactions += [{"when": {"state": "held"}, "do": [{"action": "go_on"}]}]
        prompt = tiny_prompt(f"a red {REST}", seed=seed, length=LENGTH, chunk=3, cfg=1.0, shift=4.9 + 0.1)
        prompt["latents"] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0]}}
        prompt["latents"]["inputs"]["filename_prefix"] = f"latents/{uuid.uuid4().hex}"
        prompt[SAMPLER]["inputs"]["sink"] = 0 if len(seeds) == 1 else -1  # asks anew in place of ComfyUI's cache
        with page(server, reactions) as viewer:
            entry = server.result(server.submit(prompt, viewer.client_id))
            assert entry["status"]["status_str"] == "success", entry
            viewer.until_done()
        return viewer, load_file(server._files(entry["outputs"]["latents"])[0])["latent_tensor"]

    viewer, same = rolled(7, 8, seed)
    assert torch.equal(same, plain)
    assert sum(message["again"] for message in viewer.live()) == 3
    assert all(message["indices"][0] == 0 for message in viewer.live() if message["again"])
    _, other = rolled(7)
    assert not torch.equal(other[:, :, :3], plain[:, :, :3])


def test_a_changed_seed_holds_from_the_next_chunk_on(server: Server) -> None:
    seed = fresh_seed() % 2**53
    plain = latents_of(server, tiny_prompt(seed=seed, length=33))
    reactions = [
        {"when": {"chunk": 0}, "do": [{"action": "hold"}]},
        {"when": {"state": "held", "chunk": 1}, "do": [{"action": "seed", "seed": 11}, {"action": "go_on"}]},
    ]
    prompt = tiny_prompt(seed=seed, length=33, chunk=3)
    with page(server, reactions) as viewer:
        prompt["latents"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "latents/x"},
        }
        entry = server.result(server.submit(prompt, viewer.client_id))
        viewer.until_done()
    changed = load_file(server._files(entry["outputs"]["latents"])[0])["latent_tensor"]
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert not torch.equal(changed[:, :, 3:6], plain[:, :, 3:6])


# ------------------------------------------------------- finish, pace, record --
def with_outputs(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt with its latents and schedule saved, and a second sampler that goes on from its state."""
    prompt[SAMPLER]["inputs"] |= {"keep_state": True}  # so that the run can be checked by going on from it
    more = {**prompt[SAMPLER], "inputs": {**prompt[SAMPLER]["inputs"], "state": [SAMPLER, 2], "player": False}}
    save = {"class_type": "SaveLatent", "inputs": {"filename_prefix": f"latents/{uuid.uuid4().hex}"}}
    return {
        **prompt,
        "text": {"class_type": "PreviewAny", "inputs": {"source": [SAMPLER, 3]}},
        "latents": {**save, "inputs": {**save["inputs"], "samples": [SAMPLER, 0]}},
        "more": more,
        "more latents": {**save, "inputs": {**save["inputs"], "samples": ["more", 0]}},
    }


def saved_latents(server: Server, entry: dict[str, Any], node: str = "latents") -> torch.Tensor:
    return load_file(server._files(entry["outputs"][node])[0])["latent_tensor"]


def test_a_run_that_is_finished_early_keeps_exactly_the_chunks_made(server: Server) -> None:
    """Latents, frames and state go out, bitwise those of the whole run, which the state goes on to."""
    seed = fresh_seed() % 2**53
    prompt = with_outputs(tiny_prompt(f"a red {REST}", seed=seed, length=LENGTH))
    reactions = [{"when": {"chunk": 1}, "do": [{"action": "hold"}]}]
    reactions += [{"when": {"state": "held"}, "do": [{"action": "finish"}]}]
    with page(server, reactions) as viewer:
        entry = server.result(server.submit(prompt, viewer.client_id))
        assert entry["status"]["status_str"] == "success", entry
        last = viewer.until_done()[-1]
    part, whole = saved_latents(server, entry), saved_latents(server, entry, "more latents")
    num_chunks = last["chunk"]
    assert 1 <= num_chunks < CHUNKS
    assert (last["ending"], last["can_finish"], last["files"]) == ("early", True, [])
    assert torch.equal(part, whole[:, :, : 3 * num_chunks])
    assert torch.equal(whole, latents_of(server, tiny_prompt(f"a red {REST}", seed=seed, length=LENGTH, player=False)))
    (file,) = server._files(entry["outputs"][SAVE])
    assert len(read_mp4(file)[0]) == 12 * num_chunks - 3  # a chunk is 12 frames, and the video's first latent frame 1
    assert entry["outputs"]["text"]["text"] == [f"0s: a red {REST}"]
    again, was_computed = made_by(server, tiny_prompt(f"a red {REST}", seed=seed, length=LENGTH), SAMPLER, "")
    assert again.shape == whole.shape, "ComfyUI's cache never takes the part for the whole"
    assert was_computed


def test_what_was_done_by_hand_is_told_and_its_schedule_repeats_the_run_bitwise(server: Server) -> None:
    """A typed prompt, a seed from then on, and a chunk made twice: by Prompt Schedule, without anybody's hand."""
    seed, text = fresh_seed() % 2**53, f"a blue {REST}; 3s: no time"
    typed = {"action": "prompt", "text": text, "history": "keep"}
    reactions: list[dict[str, Any]] = [
        {"when": {"chunk": 0}, "do": [{"action": "hold"}]},
        {"when": {"state": "held", "chunk": 1}, "do": [typed, {"action": "go_on"}, {"action": "hold"}]},
        {
            "when": {"state": "held", "chunk": 2},
            "do": [{"action": "seed", "seed": 11}, {"action": "reroll", "seed": 7}],
        },
        {"when": {"state": "held", "chunk": 2, "again": False}, "do": [{"action": "go_on"}, {"action": "hold"}]},
        {"when": {"state": "held", "chunk": 3}, "do": [{"action": "reroll", "seed": seed}]},
        {"when": {"state": "held", "chunk": 3, "again": False}, "do": [{"action": "go_on"}]},
    ]
    prompt = with_outputs(tiny_prompt(f"a red {REST}", seed=seed, length=57))
    prompt = {name: node for name, node in prompt.items() if not name.startswith("more")}
    with page(server, reactions) as viewer:
        entry = server.result(server.submit(prompt, viewer.client_id))
        assert entry["status"]["status_str"] == "success", entry
        last = viewer.until_done()[-1]
    steered = saved_latents(server, entry)
    (schedule,) = entry["outputs"]["text"]["text"]
    assert schedule == last["schedule"]
    assert schedule.split("\n") == [
        f"0s: a red {REST}",
        f'0.563s [keep, seed 7, quoted]: "a blue {REST}\\u003b 3s: no time"',
        f"1.313s [seed {seed}]:",
        "2.063s [seed 11]:",
    ]
    place = {"chunk": 1, "frame": 9, "seconds": 9 / 16}
    assert last["events"] == [
        {"kind": "prompt", **place, "text": text, "history": "keep"},
        {"kind": "reroll", **place, "seed": 7},
        {"kind": "seed", "chunk": 2, "frame": 21, "seconds": 21 / 16, "seed": 11},
        {"kind": "reroll", "chunk": 2, "frame": 21, "seconds": 21 / 16, "seed": seed},
    ]
    assert last["ending"] == "whole"
    assert len({message["schedule"] for message in viewer.live() if "schedule" in message}) > 1, "told on the way"
    repeated = tiny_prompt(seed=seed, length=57, player=False)
    inputs = {"text": schedule, "history": "recode", "fps": 16.0, "text_encoder": "tiny (bundled)"}
    repeated[TEXT] = {"class_type": "SelfForcingPromptSchedule", "inputs": inputs}
    assert torch.equal(latents_of(server, repeated), steered)
    repeated[TEXT]["inputs"]["text"] = f"0s: a red {REST}"
    assert not torch.equal(latents_of(server, repeated), steered)


def test_a_steered_video_that_comfyui_saves_tells_what_was_done(server: Server) -> None:
    """Beside the workflow that a page sends; a run that nobody steered has no such entry."""
    typed = {"action": "prompt", "text": f"a blue {REST}", "history": "recode"}
    at_hold = {"when": {"state": "held", "chunk": 1}, "do": [typed, {"action": "go_on"}]}
    for reactions in ([{"when": {"chunk": 0}, "do": [{"action": "hold"}]}, at_hold], []):
        prompt = tiny_prompt(f"a red {REST}", seed=fresh_seed() % 2**53, length=57)
        with page(server, reactions) as viewer:
            entry = server.result(server.submit(prompt, viewer.client_id, workflow={"nodes": []}))
        assert entry["status"]["status_str"] == "success", entry
        (file,) = server._files(entry["outputs"][SAVE])
        metadata = {name.lower(): value for name, value in read_metadata(file).items()}
        assert json.loads(metadata["workflow"]) == {"nodes": []}
        assert (f"a blue {REST}" in metadata.get("selfforcing_schedule", "")) == bool(reactions)
        assert ("selfforcing_schedule" in metadata) == bool(reactions)


def endless(**inputs: Any) -> tuple[dict[str, Any], str]:
    """Stream to File of the bundled workflow, and the id of its node."""
    prompt = json.loads((ROOT / "workflows/api/tiny_endless.json").read_text())
    (node,) = (key for key, each in prompt.items() if each["class_type"] == "SelfForcingStreamToFile")
    prompt[node]["inputs"] |= {"seed": fresh_seed(), **inputs}
    return prompt, node


def test_an_interrupted_file_is_named_to_its_page(server: Server) -> None:
    prompt, _ = endless(length=321)
    with page(server, [{"when": {"chunk": 1}, "do": [{"action": "hold"}]}]) as viewer:
        prompt_id = server.submit(prompt, viewer.client_id)
        while not any(message["state"] == "held" for message in viewer.live()):
            viewer.events.append(viewer.arrived.get(timeout=RUN_SECONDS))
        server.post("/interrupt", {})
        assert server.result(prompt_id)["status"]["status_str"] == "error"
        last = viewer.until_done()[-1]
    assert last["ending"] == "stopped"
    (file,) = last["files"]
    frames, _ = read_mp4(server.folder / file["type"] / file["subfolder"] / file["filename"])
    assert len(frames) == 12 * last["chunk"] - 3


def test_a_paced_prompt_is_on_screen_within_the_pace_and_one_chunk(server: Server) -> None:
    """At 8 frames per second, which the bundled model makes faster, sent soon and late; no more than that is made."""
    prompt, pace, chunk = *endless(length=93, fps=8.0, pace=1.0)[:1], 1.0, 12 / 8
    typed = [{"action": "prompt", "text": f"a blue {REST}", "history": "recode"}]
    reactions = [{"when": {"chunk": 1}, "do": typed, "after": after} for after in (0.5, 5.0)]
    reactions[1]["when"] = {"chunk": 2}
    with page(server, reactions) as viewer:
        entry = server.result(server.submit(prompt, viewer.client_id))
        assert entry["status"]["status_str"] == "success", entry
        last = viewer.until_done()[-1]
        shown_frames = [event["data"]["shown"] for event in viewer.events if event.get("type") == "did"]
    events = [event["frame"] for event in last["events"]]
    assert len(events) == len(shown_frames) == 2
    for event, frame in zip(events, shown_frames):
        assert (event - (frame or 0)) / 8 <= pace + chunk + 0.25, "and how old the page's last word may be"
    figures = [message["ahead"] for message in viewer.live() if message["ahead"] is not None]
    assert any(message["state"] == "ahead" for message in viewer.live())
    assert max(figures) <= pace + chunk + 1.0
    assert viewer.live()[0]["pace"] == pace
    assert last["schedule"].startswith("0s [8 fps]: a red square")


def test_a_paused_page_holds_a_paced_run_until_it_is_finished(server: Server) -> None:
    prompt, _ = endless(length=93, fps=8.0, pace=0.5)
    reactions: list[dict[str, Any]] = [{"when": {"state": "ahead"}, "do": [{"action": "finish"}], "after": 1.0}]
    with page(server, [*reactions, {"when": {"number": -1}, "do": [], "plays": False}]) as viewer:
        entry = server.result(server.submit(prompt, viewer.client_id))
        assert entry["status"]["status_str"] == "success", entry
        last = viewer.until_done()[-1]
    assert last["ending"] == "early"
    assert last["chunk"] <= 4
    (file,) = server._files(next(iter(entry["outputs"].values())))
    assert [file.name] == [each["filename"] for each in last["files"]]
    assert len(read_mp4(file)[0]) == 12 * last["chunk"] - 3


def test_commands_are_taken_from_the_page_that_queued_the_run_alone(server: Server) -> None:
    """Not from another one that knows the run's name, and not from an old page, whose pictures go on coming."""
    other = {"action": "finish", "client": "another"}
    at_hold = {"when": {"state": "held"}, "do": [other, {"action": "prompt", "text": "a", "client": None}]}
    viewer, _ = play(
        server,
        [
            {"when": {"chunk": 0}, "do": [{"action": "hold"}]},
            {**at_hold, "do": [*at_hold["do"], {"action": "go_on"}]},
        ],
    )
    refused = [event for event in viewer.events if "refused" in event]
    assert [event["refused"] for event in refused] == [403, 403]
    assert "only the page that queued this run" in refused[0]["error"]
    assert "reload the page" in refused[1]["error"]
    assert (viewer.live()[-1]["ending"], viewer.live()[-1]["events"]) == ("whole", [])
    old, _ = play(server, [{"when": {"chunk": 1}, "do": [{"action": "seed", "seed": 1}], "speaks": False}], pace=0.1)
    assert [event["refused"] for event in old.events if "refused" in event] == [403]
    indices = [index for message in old.live() for index in message["indices"]]
    assert indices[-1] >= LENGTH - 12
    assert not any(message["state"] == "ahead" for message in old.live())


# ---------------------------------------------------------------- bad input --
class Wire:
    """One connection that is kept open, and opened anew where the server closes it, as after too long a message."""

    def __init__(self, server: Server) -> None:
        self.connection = http.client.HTTPConnection(server.address, timeout=30)

    def post(self, body: bytes) -> tuple[int, str]:
        try:
            self.connection.request("POST", "/selfforcing/live", body)
            answer = self.connection.getresponse()
            return answer.status, answer.read().decode()
        except (http.client.RemoteDisconnected, ConnectionError):
            self.connection.close()
            self.connection.request("POST", "/selfforcing/live", body)
            answer = self.connection.getresponse()
            return answer.status, answer.read().decode()


def malformed(generator: random.Random, run: str, client: str) -> bytes:
    values: list[Any] = [
        None,
        True,
        -1,
        2**64,
        1.5,
        1e300,
        "",
        "x" * 200,
        "x" * 20000,
        [],
        {},
        [[]] * 50,
        "ack",
        "prompt",
        "seed",
        "reroll",
        "hold",
        "finish",
        generator.randrange(2**70),
        "".join(generator.choices(string.printable, k=30)),
    ]
    kind = generator.randrange(4)
    if kind == 0:
        return generator.randbytes(generator.randrange(200))
    if kind == 1:
        return b"[" * generator.choice([1, 50, 5000, 70000])
    names = [
        "run",
        "action",
        "client",
        "number",
        "seed",
        "text",
        "history",
        "blend",
        "frame",
        "shown",
        "prompt_id",
        "extra",
    ]
    body = {name: generator.choice(values) for name in names if generator.random() < 0.7}
    if kind == 3:
        body |= {"run": run, "client": client}
        body["action"] = generator.choice(["ack", "shown", "prompt", "seed", "reroll", "jump", None, 7])
    return json.dumps(body).encode()


def test_ten_thousand_malformed_messages_leave_the_run_and_the_server_as_they_were(server: Server) -> None:
    generator, refused, before = random.Random(0), 0, len(server.log())
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}]) as viewer:
        prompt_id = server.submit(prompt, viewer.client_id)
        while not any(message["state"] == "held" for message in viewer.live()):
            viewer.events.append(viewer.arrived.get(timeout=RUN_SECONDS))
        run, wire = viewer.live()[0]["run"], Wire(server)
        for _ in range(10000):
            body = malformed(generator, run, viewer.client_id)
            status, text = wire.post(body)
            assert status in (200, 400, 403, 404), (body[:200], status, text)
            if status != 200:
                refused += 1
                assert 0 < len(json.loads(text)["error"]) < 300
        assert refused > 9000
        command = {"run": run, "client": viewer.client_id}
        assert wire.post(json.dumps({**command, "action": "go_on"}).encode())[0] == 200
        assert server.result(prompt_id)["status"]["status_str"] == "success"
        assert (viewer.until_done()[-1]["ending"], viewer.live()[-1]["chunk"]) == ("whole", CHUNKS)
    assert server.get("/system_stats")
    assert "Traceback" not in server.log()[before:]
    time.sleep(0.5)
    assert wire.post(json.dumps({**command, "action": "hold"}).encode()) == (
        404,
        '{"error": "this run is over; queue it again"}',
    )
