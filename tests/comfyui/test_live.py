"""What the live player is sent and what it may ask for, in a real ComfyUI without a page."""

from __future__ import annotations

import json
import random
import string
import time
import urllib.error
import urllib.request
import uuid
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.comfyui.graphs import SAMPLER, SAVE, fresh_seed, latents_of, read_mp4, tiny_prompt
from tests.comfyui.host_server import ROOT, RUN_SECONDS, Server
from tests.comfyui.page import Page, page
from train.tiny.world import detect

REST = "square moving left slowly on a black background"
LENGTH, CHUNKS = 69, 6
SILENT = [{"when": {"number": -1}, "do": [], "acknowledge": False}]


def play(server: Server, reactions: list[dict[str, Any]], **inputs: Any) -> tuple[Page, dict[str, Any]]:
    """Run the tiny workflow as this page; what it saw and the history entry."""
    prompt = tiny_prompt(f"a red {REST}", **{"seed": fresh_seed(), "length": LENGTH, **inputs})
    with page(server, reactions) as seen:
        entry = server.result(server.submit(prompt, seen.client_id))
        assert entry["status"]["status_str"] == "success", entry
        seen.until_done()
        return seen, entry


def test_the_page_that_queued_gets_every_chunk_and_no_other_gets_any(server: Server) -> None:
    with page(server) as other:
        seen, _ = play(server, [])
        other.process.kill()
        other.process.wait()
        time.sleep(0.2)
        while not other.arrived.empty():
            assert other.arrived.get()["type"] != "live"
    messages = seen.live()
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
    assert not any(event.get("type") == "binary" for event in seen.seen), "the host's preview is not needed then"


def test_a_page_that_never_answers_gets_two_messages_with_pictures_and_the_hosts_preview(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, SILENT) as seen:
        server.result(server.submit(prompt, seen.client_id))
        seen.until("execution_success")
        time.sleep(0.5)
        while not seen.arrived.empty():
            seen.seen.append(seen.arrived.get())
        assert not any(message["indices"] for message in seen.live()[2:])
        assert len(seen.live()) <= 2 + RUN_SECONDS / 5
        assert sum(event.get("type") == "binary" for event in seen.seen) >= CHUNKS


def test_the_player_can_be_switched_off(server: Server) -> None:
    with page(server) as seen:
        server.result(server.submit(tiny_prompt(seed=fresh_seed(), player=False), seen.client_id))
        seen.until("execution_success")
        assert not seen.live()


def test_a_page_that_vanishes_in_the_middle_stalls_nothing(server: Server) -> None:
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, [{"when": {"chunk": 1}, "do": [{"action": "hold"}]}]) as seen:
        prompt_id = server.submit(prompt, seen.client_id)
        while not any(message["state"] == "held" for message in seen.live()):
            seen.seen.append(seen.arrived.get(timeout=RUN_SECONDS))
    assert server.result(prompt_id)["status"]["status_str"] == "success", "the held chunk is let go"


def test_a_typed_prompt_changes_the_later_chunks(server: Server) -> None:
    text = {"action": "prompt", "text": f"a blue {REST}", "history": "recode"}
    held = {"when": {"state": "held", "chunk": 2}, "do": [text, {"action": "go_on"}]}
    seen, entry = play(server, [{"when": {"chunk": 1}, "do": [{"action": "hold"}]}, held], seed=2)
    (file,) = server._files(entry["outputs"][SAVE])
    colours = detect(read_mp4(file)[0]).colours_V
    assert set(colours[:9]) == {"red"}
    assert colours[-1] == "blue"
    assert not [event for event in seen.seen if "refused" in event]


def test_a_page_that_comes_back_learns_that_a_chunk_is_held(server: Server) -> None:
    """Loaded anew by the same client, it hears of the run again without anything having happened."""
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}]) as first:
        prompt_id = server.submit(prompt, first.client_id)
        while not any(message["state"] == "held" for message in first.live()):
            first.seen.append(first.arrived.get(timeout=RUN_SECONDS))
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
            first.seen.append(first.arrived.get(timeout=30))
        assert not any(message["indices"] for message in first.live()[2:])
    with page(server, [{"when": {"state": "held"}, "do": [{"action": "go_on"}]}], first.client_id) as again:
        assert server.result(prompt_id)["status"]["status_str"] == "success"
        shown = {index for message in again.until_done() for index in message["indices"]}
        assert LENGTH - 12 in shown, "the last chunk's first frame, which is shown at any rate"


def test_messages_say_which_workflow_queued_the_run_and_scripts_without_one_are_played_too(server: Server) -> None:
    workflow = {"id": "5e1f", "extra": {"selfforcing_tab": "t7", "ds": {}}, "nodes": []}
    odd: list[Any] = [None, [], {"workflow": None}, {"workflow": {"id": 7, "extra": "x"}}]
    for pnginfo, told in [({"workflow": workflow}, ("5e1f", "t7")), *((each, (None, None)) for each in odd)]:
        with page(server) as seen:
            body = {"prompt": tiny_prompt(seed=fresh_seed(), length=9), "client_id": seen.client_id}
            prompt_id = server.post("/prompt", {**body, "extra_data": {"extra_pnginfo": pnginfo}})["prompt_id"]
            assert server.result(prompt_id)["status"]["status_str"] == "success"
            assert {(message.get("workflow"), message.get("tab")) for message in seen.until_done()} == {told}


def made_by(server: Server, prompt: dict[str, Any], node: str, client_id: str) -> tuple[torch.Tensor, bool]:
    """The latents that a node's output has, and whether the host computed them this time."""
    inputs = {"samples": [node, 0], "filename_prefix": f"latents/{uuid.uuid4().hex}"}
    entry = server.result(
        server.submit({**prompt, "latents": {"class_type": "SaveLatent", "inputs": inputs}}, client_id)
    )
    assert entry["status"]["status_str"] == "success", entry
    cached = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
    return load_file(server._files(entry["outputs"]["latents"])[0])["latent_tensor"], node not in cached[0]


@pytest.mark.parametrize("what", ["prompt", "seed", "reroll", "seed to file", "linked seed"])
def test_a_steered_result_is_never_taken_for_that_of_its_inputs(server: Server, what: str) -> None:
    """Steered, queued again, and queued once more: the host's cache has the plain result then, and only that one."""
    seed, node, prompt = fresh_seed() % 2**53, SAMPLER, tiny_prompt(f"a red {REST}", length=33)
    if what == "seed to file":
        prompt = json.loads((ROOT / "workflows/api/tiny_endless.json").read_text())
        (node,) = (key for key, each in prompt.items() if each["class_type"] == "SelfForcingStreamToFile")
    inputs = prompt[node]["inputs"]
    inputs |= {"seed": seed, "length": 33}
    plain, _ = made_by(server, prompt, node, "")
    inputs["shift"] = inputs["shift"] + 5.0 if inputs["shift"] == 0 else inputs["shift"]  # the same in other words
    if what == "linked seed":
        prompt["seed"] = {"class_type": "PrimitiveInt", "inputs": {"value": seed}}
        inputs["seed"] = ["seed", 0]
    steps: dict[str, list[dict[str, Any]]] = {
        "prompt": [{"action": "prompt", "text": f"a blue {REST}", "history": "recode"}, {"action": "go_on"}],
        "reroll": [{"action": "reroll", "seed": 7}],
    }
    held = {"when": {"state": "held"}, "do": steps.get(what, [{"action": "seed", "seed": 7}, {"action": "go_on"}])}
    reactions = [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}, held]
    reactions += [{"when": {"state": "held"}, "do": [{"action": "go_on"}]}] * (what == "reroll")
    with page(server, reactions) as seen:
        steered, _ = made_by(server, prompt, node, seen.client_id)
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
        prompt[SAMPLER]["inputs"]["sink"] = 0 if len(seeds) == 1 else -1  # asks anew in place of the host's cache
        with page(server, reactions) as seen:
            entry = server.result(server.submit(prompt, seen.client_id))
            assert entry["status"]["status_str"] == "success", entry
            seen.until_done()
        return seen, load_file(server._files(entry["outputs"]["latents"])[0])["latent_tensor"]

    seen, same = rolled(7, 8, seed)
    assert torch.equal(same, plain)
    assert sum(message["again"] for message in seen.live()) == 3
    assert all(message["indices"][0] == 0 for message in seen.live() if message["again"])
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
    with page(server, reactions) as seen:
        prompt["latents"] = {
            "class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "latents/x"},
        }  # fmt: skip
        entry = server.result(server.submit(prompt, seen.client_id))
        seen.until_done()
    changed = load_file(server._files(entry["outputs"]["latents"])[0])["latent_tensor"]
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert not torch.equal(changed[:, :, 3:6], plain[:, :, 3:6])


# ---------------------------------------------------------------- bad input --
def post(server: Server, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{server.address}/selfforcing/live", body)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def malformed(generator: random.Random, run: str) -> bytes:
    values: list[Any] = [
        None, True, -1, 2**64, 1.5, 1e300, "", "x" * 20000, [], {}, [[]] * 50, "ack", "prompt", "seed", "reroll",
        "hold", generator.randrange(2**70), "".join(generator.choices(string.printable, k=30)),
    ]  # fmt: skip
    kind = generator.randrange(4)
    if kind == 0:
        return generator.randbytes(generator.randrange(200))
    if kind == 1:
        return b"[" * generator.randrange(60000)
    names = ["run", "action", "number", "seed", "text", "history", "extra"]
    body = {name: generator.choice(values) for name in names if generator.random() < 0.7}
    if kind == 3:
        body["run"] = run
        body["action"] = generator.choice(["ack", "prompt", "seed", "reroll", "jump", None, 7])
    return json.dumps(body).encode()


def test_ten_thousand_malformed_messages_leave_the_run_and_the_server_as_they_were(server: Server) -> None:
    generator, refused, before = random.Random(0), 0, len(server.log())
    prompt = tiny_prompt(seed=fresh_seed(), length=LENGTH)
    with page(server, [{"when": {"chunk": 0}, "do": [{"action": "hold"}]}]) as seen:
        prompt_id = server.submit(prompt, seen.client_id)
        while not any(message["state"] == "held" for message in seen.live()):
            seen.seen.append(seen.arrived.get(timeout=RUN_SECONDS))
        run = seen.live()[0]["run"]
        for _ in range(10000):
            body = malformed(generator, run)
            status, text = post(server, body)
            assert status in (200, 400, 404), (body[:200], status, text)
            if status != 200:
                refused += 1
                assert 0 < len(json.loads(text)["error"]) < 300
        assert refused > 9000
        assert post(server, json.dumps({"run": run, "action": "go_on"}).encode())[0] == 200
        assert server.result(prompt_id)["status"]["status_str"] == "success"
        seen.until_done()
    assert server.get("/system_stats")
    assert "Traceback" not in server.log()[before:]
    time.sleep(0.5)
    assert post(server, json.dumps({"run": run, "action": "hold"}).encode()) == (
        404, '{"error": "this run is over; queue it again"}',
    )  # fmt: skip
