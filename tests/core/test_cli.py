"""A prompt becomes a video file; whatever cannot work is one line on stderr, exit status 2, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from selfforcing_core.codecs.taehv import TAEHV
from selfforcing_core.codecs.video import read_metadata, read_video
from selfforcing_core.config import CausalConfig, StepConfig, TAEHVConfig, WanConfig
from selfforcing_core.generate import cli, plan
from selfforcing_core.generate.cli import main
from selfforcing_core.generate.request import Request
from selfforcing_core.model import CausalWan
from selfforcing_core.weights.bundles import bundle_path
from selfforcing_core.weights.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red square moving left slowly"


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny random model and TAEHV, and the bundle's text encoder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = WanConfig(dim=32, ffn_dim=32, num_heads=1, num_layers=1, text_dim=128, text_len=16, freq_dim=16)
    causal, steps = CausalConfig(chunk=3, window=6), StepConfig(steps=(1000.0, 500.0))
    save_checkpoint(folder / "wan.safetensors", CausalWan(config).state_dict(), config, causal=causal, steps=steps)
    small = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    weights = TAEHV(small).state_dict()
    weights["decoder.22.weight"] *= 100  # a random decoder is nearly black
    save_checkpoint(folder / "taehv.safetensors", weights, small)
    return [
        *("--model", str(folder / "wan.safetensors"), "--taehv", str(folder / "taehv.safetensors")),
        *("--text-encoder", str(bundle_path("tiny") / "text_encoder"), "--width", "32", "--height", "16"),
    ]


@pytest.fixture
def options(random_models: list[str], tmp_path: Path) -> Iterator[list[str]]:
    """A command that works and writes a.mp4 into tmp_path."""
    threads = torch.get_num_threads()
    yield ["generate", *random_models, "--prompt", PROMPT, "--frames", "21", "--out", str(tmp_path / "a.mp4")]
    torch.set_num_threads(threads)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line is refused."""
    try:
        status = main(arguments)
    except SystemExit as exit_:  # argparse's own way out
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


def test_prompt_becomes_a_video(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--sheet", str(tmp_path / "a.png"), "--json", "--seed", "3", "--fps", "8"]) == 0
    captured = capsys.readouterr()
    measured = json.loads(captured.out)
    assert read_video(tmp_path / "a.mp4").shape == (21, 3, 16, 32)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (8 * 32, 3 * 16)
    assert (measured["frames"], measured["width"], measured["height"], measured["seed"]) == (21, 32, 16, 3)
    assert (measured["causal"]["window"], measured["steps"]["steps"]) == (6, [1000.0, 500.0])
    assert min(measured[name] for name in ("seconds_to_first_frame", "seconds_per_chunk", "generated_fps")) > 0
    assert "decoding" in measured["generated_fps_includes"]
    assert 0 < measured["written_fps"] <= measured["generated_fps"], "with the file it is no faster"
    assert "2/2" in captured.err, "the progress bar counts chunks"
    actual = read_metadata(tmp_path / "a.mp4")
    assert actual["comment"] == PROMPT
    assert json.loads(actual["selfforcing"])["seed"] == 3
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "a.png"]


def test_seed_and_options_decide_the_video(options: list[str], tmp_path: Path) -> None:
    """Compared as latents: the same frames do not always become the same H.264."""

    def latents(*more: str) -> torch.Tensor:
        kept = tmp_path / "a.safetensors"
        assert main([*options, "--overwrite", "--latents", str(kept), *more]) == 0
        return load_file(kept)["latents"].clone()

    first = latents("--seed", "1")
    torch.testing.assert_close(first, latents("--seed", "1", "--threads", "1"), atol=1e-3, rtol=1e-3)
    for change in (["--seed", "2"], ["--chunk", "1"], ["--steps", "1000"], ["--cfg", "3"], ["--solver", "euler"]):
        assert (first - latents("--seed", "1", *change)).abs().mean() > 0.05, change


def test_a_file_has_the_codec_the_quality_and_the_sound_that_were_asked_for(
    options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The sound is cut at the video's end, or ends before it, and that is said."""
    for seconds, words in (
        (2.0, "are cut at the video's end, 1.31 s"),
        (0.5, "the rest of the video's 1.31 s is silent"),
    ):
        with av.open(str(tmp_path / "a.wav"), "w") as file:
            stream = file.add_stream("pcm_s16le", rate=16000)
            stream.layout = "mono"
            silence = np.zeros((1, round(16000 * seconds)), np.int16)
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            frame.sample_rate = 16000
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        out = tmp_path / f"{seconds}.mov"
        more = ["--out", str(out), "--codec", "prores", "--quality", "3", "--audio", str(tmp_path / "a.wav")]
        assert main([*options, *more]) == 0
        with av.open(str(out)) as file:
            assert file.streams.video[0].codec_context.name == "prores"
            track: Any = file.streams.audio[0]
            assert abs(float(track.duration * track.time_base) - min(seconds, 21 / 16)) < 0.07
        assert words in caplog.text
        settings = json.loads(read_metadata(out)["selfforcing"])
        assert (settings["codec"], settings["quality"]) == ("prores", 3)


def test_several_videos_have_the_ending_of_their_codec(options: list[str], tmp_path: Path) -> None:
    more = ["--out", str(tmp_path / "all"), "--samples", "2", "--batch", "2", "--codec", "gif"]
    assert main([*options, *more]) == 0
    assert [path.suffix for path in (tmp_path / "all").iterdir()] == [".gif", ".gif"]


def test_last_words_are_the_measurements(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 0
    words = capsys.readouterr().out.splitlines()
    assert "21 frames of 32x16" in words[-2]
    assert all(word in words[-1] for word in ("first frame after", "s per chunk", "FPS", "not loading"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--frames", "34"], "use 33 or 45"),
        (["--frames", "0"], "use 9"),
        (["--width", "40"], "use 32 or 48"),
        (["--chunk", "0"], "chunk 0"),
        (["--window", "2"], "window 2"),
        (["--steps", "250,1000"], "descending"),
        (["--steps", "many"], "--steps"),
        (["--shift", "0"], "shift 0"),
        (["--shift", "nan"], "shift nan"),
        (["--shift", "inf", "--steps", "4"], "shift inf"),
        (["--shift", "1e-17"], "shift 1e-17"),
        (["--shift", "1e99"], "shift 1e+99"),
        (["--steps", "1000,nan"], "nan"),
        (["--cfg", "nan"], "cfg nan"),
        (["--cfg=-inf"], "cfg -inf"),
        (["--cfg", "0"], "cfg 0"),
        (["--fps", "0"], "fps 0"),
        (["--fps", "nan"], "fps nan"),
        (["--fps", "0.0001"], "fps 0.0001"),
        (["--fps", "1e99"], "fps 1e+99"),
        (["--threads", "0"], "threads 0"),
        (["--prompt", "  "], "prompt is empty"),
        (["--model", "huge"], "'huge' is neither"),
        (["--model", "JUNK"], "neither a safetensors nor a torch file"),
        (["--taehv", "JUNK"], "neither a safetensors nor a torch file"),
        (["--text-encoder", "FOLDER"], "not a text encoder folder"),
        (["--out", "FOLDER/absent/a.mp4"], "cannot be written"),
        (["--out", "FOLDER"], "unknown kind of video file"),
        (["--out", "FOLDER/a.avi"], "unknown kind of video file"),
        (["--out", "FOLDER/a.mp4", "--codec", "prores"], "ProRes is not written into .mp4; use .mov or .mkv"),
        (["--codec", "vp9"], "codec 'vp9' is unknown; use h264"),
        (["--codec", "h265"], "H.265 needs a width of 64 or more"),
        (["--quality", "52"], "crf from 51 (worst) to 1 (best), 18 by default"),
        (["--out", "FOLDER/a.gif", "--audio", "JUNK"], "gif has no sound"),
        (["--out", "FOLDER/a.gif", "--fps", "60"], "slow gif down beyond 50"),
        (["--audio", "JUNK"], "cannot be read as a sound"),
        (["--sheet", "FOLDER/absent/a.png"], "cannot be written"),
        (["--out", "FOLDER/a.mp4", "--sheet", "FOLDER/a.mp4"], "name two"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "cannot be used here"),
        (["--device", "hpu"], "cannot be used here"),
        (["--dtype", "int4"], "int4"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], word: str
) -> None:
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 9)
    change = [part.replace("JUNK", str(junk)).replace("FOLDER", str(tmp_path)) for part in change]
    assert word in refusal([*options, *change], capsys)
    assert os.listdir(tmp_path) == ["junk.safetensors"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nTwo lines of advice"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
        KeyboardInterrupt(),
    ],
)
def test_what_ends_in_the_middle_leaves_whole_files_and_one_line(
    random_models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    """The second video of a file of prompts fails in its second chunk."""
    (tmp_path / "p.txt").write_text("a\nb\n", encoding="utf-8")
    forward, starts = CausalWan.forward, []

    def fail(model: CausalWan, *args: Any, start_frame: int = 0, **kwargs: Any) -> torch.Tensor:
        starts.append(start_frame)
        if starts.count(0) == 6 and start_frame:  # two steps and a cache pass for each first chunk
            raise error
        return forward(model, *args, start_frame=start_frame, **kwargs)

    monkeypatch.setattr(CausalWan, "forward", fail)
    options = ["generate", *random_models, "--prompt-file", str(tmp_path / "p.txt"), "--frames", "21"]
    status = main([*options, "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert os.listdir(tmp_path / "out") == ["0000-a-0.mp4"]
    assert len(read_video(tmp_path / "out" / "0000-a-0.mp4")) == 21
    assert captured.out == ""
    last = captured.err.splitlines()[-1]  # behind the progress bars
    if isinstance(error, KeyboardInterrupt):
        assert (status, last) == (130, "selfforcing: stopped; what was not complete was not written")
    else:
        assert (status, last[:41]) == (2, "selfforcing: there is not enough memory; ")
        assert all(name in last for name in ("--fp8", "--cache-dtype", "--window", "--width", "--batch"))


def test_a_mistake_of_ours_is_not_taken_for_a_lack_of_memory(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(CausalWan, "forward", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(options)


def test_a_video_too_large_for_any_memory_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--width", "1600000000", "--height", "1600000"]) == 2
    assert "there is not enough memory" in capsys.readouterr().err.splitlines()[-1]


def test_numbers_that_overflow_on_the_way_make_no_black_video(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--cfg", "1e30"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # behind the progress bar
    assert "beyond float32; use a smaller --cfg than 1e+30, or another --dtype" in said
    assert os.listdir(tmp_path) == []


def test_existing_file_is_not_replaced(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"mine")
    assert "exists already" in refusal(options, capsys)
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"


def test_single_file_needs_its_companions(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    kept = [part for part in options if part != "--taehv" and not part.endswith("taehv.safetensors")]
    assert "give its --taehv" in refusal(kept, capsys)


def test_inspection_prints_json(random_models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", random_models[1]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["causal"]["window"], report["config"]["dim"]) == ("wan", 6, 32)
    assert "folder without a safetensors or .pt file" in refusal(["inspect", str(ROOT)], capsys)
    assert "'absent.pt' is neither a bundle nor a path" in refusal(["inspect", "absent.pt"], capsys)


def run_as_user(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selfforcing_core", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_bundle_works_from_a_shell(tmp_path: Path) -> None:
    out = str(tmp_path / "out.mp4")
    report = run_as_user(
        *("generate", "--model", "tiny", "--prompt", PROMPT, "--frames", "33", "--seed", "1", "--out", out, "--json")
    )
    assert report.returncode == 0, report.stderr
    assert json.loads(report.stdout)["frames"] == 33
    assert read_video(out).shape == (33, 3, 64, 64)


def test_shell_sees_one_line_and_status_2(tmp_path: Path) -> None:
    report = run_as_user(
        *("generate", "--model", "tiny", "--prompt", PROMPT, "--frames", "34", "--out", str(tmp_path / "out.mp4"))
    )
    assert (report.returncode, report.stdout, report.stderr.count("\n")) == (2, "", 1)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("has_cuda", [True, False])
def test_the_device_is_the_card_if_there_is_one(has_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun each process has its own; a device that is named is that device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    options = cli._parser().parse_args(["generate", "--prompt", "a", "--out", "a.mp4"])
    assert options.device == Request("a", Path("a.mp4")).device == "auto"
    assert cli._own_device("auto", {}) == "auto"
    assert cli._own_device("auto", {"LOCAL_RANK": "1"}) == ("cuda:1" if has_cuda else "auto")
    assert cli._own_device("cuda", {"LOCAL_RANK": "1"}) == "cuda:1"
    assert cli._own_device("cpu", {"LOCAL_RANK": "1"}) == "cpu"
    if not has_cuda:
        assert plan._device("auto") == torch.device("cpu")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_all_processes_the_first_explains_and_refuses(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    for words, status in ((["generate", "--help"], 0), (["generate", "--nonsense"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert (caught.value.code or 0) == status
        captured = capsys.readouterr()
        assert bool(captured.out + captured.err) == (rank == "0")


IMPORTED = """
import json, sys
from selfforcing_core.generate.cli import main
for names, arguments in json.loads(sys.argv[1]):
    try:
        status = main(arguments)
    except SystemExit as end:  # of --help
        status = end.code
    if status:
        sys.exit(status)
    print("imported:", *(name for name in names if name in sys.modules))
"""


def imported(*commands: tuple[str, list[str]]) -> list[str]:
    """Return which modules of a list are imported after each command, one after the other in a process of their own."""
    given = json.dumps([(names.split(","), arguments) for names, arguments in commands])
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [line.removeprefix("imported:").strip() for line in lines if line.startswith("imported:")]


def test_help_is_there_without_what_takes_long_to_import() -> None:
    names = "torch,numpy,av,PIL,safetensors,transformers,huggingface_hub"
    assert imported((names, ["generate", "--help"])) == [""]


def test_a_run_imports_of_the_text_encoder_only_the_tokenizer_and_with_kept_embeddings_nothing(
    options: list[str], tmp_path: Path
) -> None:
    """A model of transformers, and torch's compiler behind it, take longer to import than a short video takes."""
    kept = [*options, "--embeddings", str(tmp_path / "kept"), "--overwrite"]
    assert main(kept) == 0
    slow = "transformers.modeling_utils,diffusers,sympy,torch._dynamo,torch.distributed.tensor"
    known = f"{slow},transformers,tokenizers,huggingface_hub", kept
    new = f"{slow},tokenizers", [*options, "--overwrite"]
    assert imported(known, new) == ["", "tokenizers"]
