"""The player's run without a server, and what the nodes' lists, graphs and files hold. Run by inside_checks.py."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import folder_paths
import torch
from inside import CORE, FOLDER, folders, host, page, part


class Stage:
    """A live run without a server: its page is here, or gone, and its messages are kept."""

    def __init__(self, pace: float) -> None:
        self.waiting_modules = part("live"), part("outbox")
        record_module, prompts = part("steering_record"), part("guider_prompts")
        self.run, self.is_here, self.messages = None, True, []
        self.before = page.send, page.is_listening, self.waiting_modules[0].PATIENCE
        page.send = lambda event, data, client: self.receive(data)
        page.is_listening = lambda client: self.is_here
        for module in self.waiting_modules:
            module.PATIENCE = 0.4
        lengths = (8,) * 9
        record = record_module.SteeringRecord(prompts.Timeline("a"), lengths, 10.0)
        self.run = self.waiting_modules[0].Live(
            page.Audience("page", "prompt", "1"),
            record,
            fps=10.0,
            lengths=lengths,
            reader=lambda text: [],
            seed=0,
            pace=pace,
            hidden=None,
        )

    def receive(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if self.run is not None:
            self.run.command({"action": "ack", "number": message["number"]})

    def show(self, start: int, count: int) -> None:
        self.run.seed_at(start // 30 * 8)
        self.run.show(torch.zeros(count, 3, 8, 8), start, start // 30 + 1)

    def waited(self, *does: tuple[float, Callable[[], object]]) -> tuple[float, bool]:
        """Return seconds until the run goes on, and whether its chunk is made again; meanwhile things are done."""
        timers = [threading.Timer(after, do) for after, do in does]
        for timer in timers:
            timer.start()
        start = time.perf_counter()
        try:
            is_again = self.run.wants_again()
            return time.perf_counter() - start, is_again
        finally:
            for timer in timers:
                timer.join()

    def command(self, action: str, **more: Any) -> Callable[[], None]:
        return lambda: self.run.command({"action": action, **more})

    def close(self) -> None:
        self.run.close("stopped", [])
        self.run.outbox.thread.join(5)
        page.send, page.is_listening, patience = self.before
        for module in self.waiting_modules:
            module.PATIENCE = patience


def a_run_waits_for_its_viewer() -> dict[str, Any]:
    """Measure the seconds that a chunk waited: frames are 0.1 s long, and at most 1 s may be ahead."""
    stage, seconds = Stage(1.0), {}
    new_prompt, waited = {"action": "prompt", "text": "b", "history": "keep"}, stage.waited
    try:
        stage.show(0, 30)
        seconds["nobody has said what is shown"] = waited()[0]
        stage.run.command({"action": "shown", "frame": 0})
        seconds["until shown"] = waited((0.3, stage.command("shown", frame=20)))[0]
        stage.show(30, 30)
        still = waited((0.1, lambda: stage.run.command(new_prompt)), (0.4, stage.command("shown", frame=55)))
        seconds["a prompt does not break the bound"] = still[0]
        stage.show(60, 30)
        outcome = waited((0.1, stage.command("hold")), (0.3, stage.command("reroll", seed=7)))
        seconds["held while ahead"], seconds["is rolled again"] = outcome
        seconds["paused"] = stage.run.figures.pause_seconds
        stage.run.command({"action": "go_on"})
        comfy.model_management.interrupt_current_processing(True)
        try:
            waited()
            seconds["interrupt"] = ""
        except host.Interrupted:
            seconds["interrupt"] = "Interrupted"
        stage.is_here = False
        seconds["page gone"] = waited()[0]
        stage.show(90, 30)
        seconds["still gone"] = waited()[0]
        stage.is_here = True
        stage.run.command({"action": "shown", "frame": 0})
        pacing, usual = part("pacing"), 0.0
        usual, pacing.SILENT = pacing.SILENT, 0.4
        seconds["page silent"] = waited()[0]
        pacing.SILENT = usual
        stage.run.command({"action": "shown", "frame": 0})
        seconds["until finished"] = waited((0.3, stage.command("finish")))[0]
    finally:
        stage.close()
    seconds["states"] = list(dict.fromkeys(message["state"] for message in stage.messages))
    seconds["last"] = {name: stage.messages[-1].get(name) for name in ("ending", "files", "schedule", "pace")}
    return seconds


def a_new_loader_never_pairs_a_bundled_part_with_a_real_one() -> dict[str, list[str]]:
    """Return the first choices for model, decoder and text encoder, by the files that there are."""
    comfy_folders = folders.folder_paths
    before = comfy_folders.get_filename_list, folders._text_encoder_folders
    first_choices = {}
    model, decoder = {"diffusion_models": ["self_forcing_dmd.pt"]}, {"vae_approx": ["taew2_1.safetensors"]}
    for name, files, encoders in (
        ("model", model, []),
        ("no decoder", {**model, "vae": ["wan_2.1_vae.safetensors"]}, ["umt5"]),
        ("no encoder", {**model, **decoder}, []),
        ("all", {**model, **decoder}, ["umt5"]),
    ):
        comfy_folders.get_filename_list = lambda folder, files=files: files.get(folder, [])
        folders._text_encoder_folders = lambda encoders=encoders: encoders
        try:
            choices = (
                folders.file_choices(folders.MODEL_FOLDER, likely=folders.LIKELY_MODELS),
                folders.file_choices(*folders.TAEHV_FOLDERS, likely=folders.LIKELY_TAEHVS),
                folders.text_encoder_choices(),
            )
        finally:
            comfy_folders.get_filename_list, folders._text_encoder_folders = before
        first_choices[name] = [choice[0] for choice in choices]
    return first_choices


def a_picture_that_moves_is_taken_to_move_on() -> dict[str, float]:
    """Return seconds ahead 0.2 s and 1.2 s after the last word: only a while, and only if the picture moved before."""
    viewer, seconds = part("pacing").Viewer(10.0), {}
    clock = part("pacing").time
    now, clock_before = [100.0], clock.monotonic
    clock.monotonic = lambda: now[0]
    try:
        for name, words in (("still", [5, 5]), ("moving", [5, 6]), ("back", [9, 6])):
            for frame in words:
                viewer.tell(frame)
            for pause in (0.2, 1.0):
                now[0] += pause
                seconds[f"{name} {pause}"] = viewer.seconds_ahead(27)
    finally:
        clock.monotonic = clock_before
    return seconds


def the_first_prompt_is_found_in_the_graph_or_not_guessed() -> dict[str, str]:
    text_in_graph = part("guider_prompts").text_in_graph
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
        "2": {"class_type": "WanImageToVideo", "inputs": {"positive": ["1", 0]}},
        "3": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "b"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": ["3", 0]}},
        "5": {"class_type": "ConditioningConcat", "inputs": {"conditioning_to": ["1", 0]}},
    }
    ways = {"direct": "1", "behind a picture": "2", "linked": "4", "concat": "5"}
    texts = {way: text_in_graph({**graph, "9": {"inputs": {"positive": [node, 0]}}}, "9") for way, node in ways.items()}
    return {**texts, "none": text_in_graph(None, "9")}


def a_steered_run_is_kept_in_its_files() -> dict[str, Any]:
    """Write two rows with one sound; then the prompts are written into both."""
    to_file = part("stream_to_file")
    core_video = importlib.import_module(CORE + "codecs.video")
    sound = to_file._sounds({"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000}, 2)
    refusal = ""
    try:
        to_file._sounds({"waveform": torch.zeros(3, 1, 16000), "sample_rate": 16000}, 2)
    except ValueError as error:
        refusal = str(error)
    folder_paths.set_output_directory(str(FOLDER / "output"))
    files = to_file._Files("clips/a", "mp4 (H.264)", 16.0, -1, {"prompt": {"1": 2}}, (64, 64), sound)
    files.append(torch.rand(2, 9, 3, 64, 64))
    files.close()
    paths = [FOLDER / "output/clips" / each["filename"] for each in files.written()]
    before = [path.read_bytes() for path in paths]
    files.keep_schedule("")
    is_untouched = before == [path.read_bytes() for path in paths]
    files.keep_schedule("0s: a\n3s: b")
    unkept = files.finish("0s: half a character, \ud800")  # no file can hold it
    return {
        "unkept": unkept,
        "refusal": refusal,
        "written": files.written(),
        "is_untouched": is_untouched,
        "metadata": [core_video.read_metadata(path) for path in paths],
        "frames": [len(core_video.read_video(path)) for path in paths],
    }
