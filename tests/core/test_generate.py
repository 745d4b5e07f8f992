"""Whatever a video starts from, it holds together: pictures, extensions, batches, prompt files, decoders."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfforcing_core.codecs.taehv import TAEHV, StreamingDecoder, StreamingEncoder
from selfforcing_core.codecs.text import TextEncoder
from selfforcing_core.codecs.video import read_metadata, read_video, to_integers
from selfforcing_core.config import CausalConfig, StepConfig, TAEHVConfig, WanConfig
from selfforcing_core.generate import plan as plan_module
from selfforcing_core.generate import run as generate_module
from selfforcing_core.generate import write as write_module
from selfforcing_core.generate.cli import _own_device, main
from selfforcing_core.generate.plan import _dtype, plan_request
from selfforcing_core.generate.request import PromptBatch, Request
from selfforcing_core.generate.start import context_frames, read_latents
from selfforcing_core.model import CausalWan
from selfforcing_core.noise import SeededNoise
from selfforcing_core.weights.bundles import bundle_path
from selfforcing_core.weights.checkpoint import read_checkpoint, save_checkpoint
from selfforcing_core.weights.load import load_taehv
from tests.core.test_cli import refusal
from tests.core.test_media import vae_weights
from tests.core.test_video_reader import STEP, constant, heard, lie, make
from tests.support.golden_media import clip_shapes
from train.tiny.world import detect

SIZES = {"dim": 32, "ffn_dim": 32, "num_heads": 1, "num_layers": 1, "text_dim": 128, "text_len": 16, "freq_dim": 16}
STEPS = StepConfig(steps=(1000.0, 500.0))
CAUSAL = CausalConfig(chunk=3, window=9)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small random networks: text-to-video, image-to-video, TAEHV, VAE, CLIP."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    i2v = WanConfig(**SIZES, in_dim=36, model_type="i2v")
    configs = {"t2v": WanConfig(**SIZES), "i2v": i2v, "i2v-2.2": replace(i2v, image_features=False)}
    for name, config in configs.items():
        weights = CausalWan(config).state_dict()
        weights["head.head.weight"] = torch.randn(weights["head.head.weight"].shape) / 6
        save_checkpoint(folder / f"{name}.safetensors", weights, config, causal=CAUSAL, steps=STEPS)
    small = TAEHVConfig(encoder_width=8, decoder_widths=(8, 8, 8, 8))
    decoder = TAEHV(small).state_dict()
    decoder["decoder.22.weight"] *= 100  # a random decoder is nearly black
    save_checkpoint(folder / "taehv.safetensors", decoder, small)
    save_file(vae_weights(), folder / "vae.safetensors")
    sizes = {"image_size": 28, "patch_size": 14, "dim": 1280, "mlp_ratio": 1, "out_dim": 8, "num_layers": 2}
    clip = {name: 0.02 * torch.randn(shape) for name, shape in clip_shapes(sizes).items()}
    save_file(clip, folder / "clip.safetensors")
    Image.effect_noise((40, 30), 80).convert("RGB").save(folder / "start.png")
    return folder


@pytest.fixture
def options(models: Path) -> list[str]:
    return [
        *("generate", "--model", str(models / "t2v.safetensors"), "--taehv", str(models / "taehv.safetensors")),
        *("--text-encoder", str(bundle_path("tiny") / "text_encoder"), "--width", "32", "--height", "16", "--json"),
    ]


def run(options: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict]:
    assert main(options) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ----------------------------------------------------------------- pictures --
def test_a_picture_is_the_first_frame(
    options: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "a.safetensors"
    more = ["--prompt", "a", "--image", str(models / "start.png"), "--frames", "25"]
    report = run([*options, *more, "--out", str(tmp_path / "a.mp4"), "--latents", str(kept)], capsys)[0]
    assert report["causal"]["independent_first_frame"] is True
    assert read_video(tmp_path / "a.mp4").shape == (25, 3, 16, 32)
    taehv, _ = load_taehv(models / "taehv.safetensors")
    first = load_file(kept)["latents"][:1]
    from selfforcing_core.codecs.image import fit_image, read_image

    wanted = taehv.encode(fit_image(read_image(models / "start.png"), 32, 16)[None, None])[0]
    torch.testing.assert_close(first, wanted)


@pytest.mark.parametrize("model", ["i2v", "i2v-2.2"])
def test_image_to_video_models_get_the_picture_as_a_condition(
    options: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    options = [*options, "--model", str(models / f"{model}.safetensors"), "--prompt", "a", "--frames", "9"]
    options += ["--vae", str(models / "vae.safetensors")]
    clip = ["--clip", str(models / "clip.safetensors")]
    options += clip if model == "i2v" else []
    Image.new("RGB", (32, 16), "red").save(tmp_path / "red.png")
    latents = []
    for image in (models / "start.png", tmp_path / "red.png"):
        kept = tmp_path / f"{image.stem}.safetensors"
        out = str(tmp_path / f"{image.stem}.mp4")
        report = run([*options, "--image", str(image), "--out", out, "--latents", str(kept)], capsys)[0]
        assert (report["frames"], report["decoder"]) == (9, "taehv")
        latents.append(load_file(kept)["latents"])
    assert (latents[0] - latents[1]).abs().mean() > 0.01
    out = ["--out", str(tmp_path / "b.mp4")]
    needed = "--image, --vae and --clip" if model == "i2v" else "--image and --vae"
    assert f"give it {needed}" in refusal([*options, *out], capsys)
    if model == "i2v-2.2":
        assert "leave out --clip" in refusal([*options, *out, *clip, "--image", str(tmp_path / "red.png")], capsys)


# --------------------------------------------------------------- extensions --
def test_a_video_goes_on_and_on(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([*options, "--prompt", "a", "--frames", "33", "--out", str(tmp_path / "0.mp4")], capsys)
    for turn in (1, 2):
        more = ["--prompt", "a", "--extend", str(tmp_path / f"{turn - 1}.mp4"), "--frames", "12", "--seed", str(turn)]
        report = run([*options[:7], "--json", *more, "--out", str(tmp_path / f"{turn}.mp4")], capsys)[0]
        assert report["frames"] == 33 + 12 * turn
    before, after = read_video(tmp_path / "0.mp4"), read_video(tmp_path / "2.mp4")
    assert after.shape == (57, 3, 16, 32)
    assert (after[:33] - before).abs().mean() < 0.05, "what was there stays"


def test_several_videos_go_on_from_one(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*options, "--prompt", "a"]
    run([*options, "--frames", "33", "--out", str(tmp_path / "a.mp4")], capsys)
    more = ["--extend", str(tmp_path / "a.mp4"), "--frames", "12", "--samples", "2", "--out", str(tmp_path / "more")]
    assert [metrics["frames"] for metrics in run([*options, *more], capsys)] == [45, 45]


def test_what_is_extended_keeps_its_time_its_sound_and_its_place(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Thirty frames a second from a phone held upright, with sound, under a name that looks like an address."""
    given, out = tmp_path / "take1:cat.mp4", tmp_path / "b.mp4"
    make(
        given,
        constant(30, 62),
        pictures=[np.full((32, 16, 3), STEP * (index // 2), np.uint8) for index in range(62)],
        sound="aac",
    )
    lie(given, (0, 1, -1, 0))
    more = ["--prompt", "a", "--extend", str(given), "--frames", "12", "--out", str(out), "--window", "-1"]
    kept = tmp_path / "b.safetensors"
    report = run([*options, *more, "--latents", str(kept)], capsys)[0]
    assert report["frames"] == 33 + 12
    frames = read_video(out)
    assert frames.shape == (45, 3, 16, 32)
    shown = (frames[:33].mean((1, 2, 3)) * 255 / STEP).tolist()
    assert shown == pytest.approx([math.ceil(index * 30 / 16 - 0.5) // 2 for index in range(33)], abs=1.1)
    name, begin, end = heard(out)
    assert name == "aac"
    assert (begin, end) == (pytest.approx(0, abs=0.05), pytest.approx(33 / 16, abs=0.06))
    for words in (
        "its 62 frames are read as 33 at 16 fps",
        "its sound is kept for its 2.06 s; what is added is silent",
        "b.safetensors keeps no sound",
    ):
        assert words in caplog.text
    caplog.clear()
    run([*options, *more[:-4], "--out", str(tmp_path / "c.mkv"), "--fps", "30", "--window", "-1"], capsys)
    assert len(read_video(tmp_path / "c.mkv")) == 62 + 12
    assert "Wan models know motion at 16" in caplog.text


def test_a_long_video_is_extended_without_holding_it(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a window no more pictures are alive at once than it and a chunk hold."""
    run([*options, "--prompt", "a", "--frames", "93", "--out", str(tmp_path / "a.mp4")], capsys)
    most = 0
    stack = torch.stack

    def spy(tensors: list[torch.Tensor], *rest: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, len(tensors))
        return stack(tensors, *rest)

    monkeypatch.setattr(torch, "stack", spy)
    more = ["--prompt", "a", "--extend", str(tmp_path / "a.mp4"), "--frames", "12", "--window", "6"]
    report = run([*options, *more, "--out", str(tmp_path / "b.mp4")], capsys)[0]
    assert report["frames"] == 93 + 12
    assert 0 < most <= 4 * 6


def test_the_same_command_twice_gives_the_same_file(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ending in ("mp4", "mkv"):
        for index in (1, 2):
            run([*options, "--prompt", "a", "--frames", "33", "--out", str(tmp_path / f"{index}.{ending}")], capsys)
        assert (tmp_path / f"1.{ending}").read_bytes() == (tmp_path / f"2.{ending}").read_bytes()


def test_latents_go_on_without_a_seam(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With no window, nine frames and three more from their latents are what twelve at once would have been."""
    options = [*options, "--prompt", "a", "--window", "-1"]
    whole, part, joined = (tmp_path / f"{name}.safetensors" for name in ("whole", "part", "joined"))
    run([*options, "--frames", "45", "--out", str(tmp_path / "whole.mp4"), "--latents", str(whole)], capsys)
    run([*options, "--frames", "33", "--out", str(tmp_path / "part.mp4"), "--latents", str(part)], capsys)
    more = ["--extend", str(part), "--frames", "12", "--out", str(tmp_path / "joined.mp4"), "--latents", str(joined)]
    report = run([*options, *more], capsys)[0]
    assert report["frames"] == 45
    torch.testing.assert_close(load_file(joined)["latents"], load_file(whole)["latents"])
    assert len(read_video(tmp_path / "joined.mp4")) == 45


@pytest.mark.parametrize(
    ("available", "window", "expected"), [(9, 9, 6), (21, -1, 21), (20, -1, 18), (7, 21, 6), (3, 6, 3)]
)
def test_an_extension_sees_whole_chunks_and_leaves_room(available: int, window: int, expected: int) -> None:
    assert context_frames(available, CausalConfig(chunk=3, window=window)) == expected


@pytest.mark.parametrize(
    ("available", "chunk", "window", "expected"),
    [(7, 3, -1, 7), (9, 3, -1, 7), (2, 3, -1, 1), (7, 3, 9, 4), (7, 3, 4, 1), (5, 1, -1, 5)],
)
def test_an_extension_begins_with_a_first_frame_that_stands_alone(
    available: int, chunk: int, window: int, expected: int
) -> None:
    causal = CausalConfig(chunk=chunk, window=window, independent_first_frame=True)
    assert context_frames(available, causal) == expected
    if expected == 1:
        with pytest.raises(ValueError, match="needs 1 frames and a window of 4"):
            context_frames(available, replace(causal, window=3))


def test_a_model_whose_first_frame_stands_alone_goes_on(
    options: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read_checkpoint(models / "t2v.safetensors")
    causal = CausalConfig(chunk=3, window=-1, independent_first_frame=True)
    save_checkpoint(tmp_path / "own.safetensors", checkpoint.state_dict, checkpoint.config, causal=causal, steps=STEPS)
    options = [*options, "--model", str(tmp_path / "own.safetensors"), "--prompt", "a"]
    latents = {}
    for name, frames, more in (
        ("whole", "37", []),
        ("part", "25", []),
        ("joined", "12", ["--extend", str(tmp_path / "part.safetensors")]),
    ):
        kept = tmp_path / f"{name}.safetensors"
        report = run(
            [*options, "--frames", frames, *more, "--out", str(tmp_path / f"{name}.mp4"), "--latents", str(kept)],
            capsys,
        )[0]
        latents[name] = load_file(kept)["latents"]
    assert report["frames"] == 37
    torch.testing.assert_close(latents["joined"], latents["whole"])
    more = ["--extend", str(tmp_path / "part.mp4"), "--window", "7", "--frames", "12"]
    assert run([*options, *more, "--out", str(tmp_path / "b.mp4")], capsys)[0]["frames"] == 37


@pytest.mark.parametrize("source", ["video", "latents"])
def test_an_extension_repeats_no_noise(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The window is shorter than the video, so that each extension is given no more than its end."""
    draws: list[set[tuple[float, ...]]] = []
    draw = SeededNoise.draw

    def spy(noise: SeededNoise, start_frame: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        result = draw(noise, start_frame, step, shape)
        assert tuple(result.flatten()[:8].tolist()) not in draws[-1]
        draws[-1].add(tuple(result.flatten()[:8].tolist()))
        return result

    monkeypatch.setattr(SeededNoise, "draw", spy)
    for turn in range(3):
        draws.append(set())
        before = tmp_path / f"{turn - 1}.{'mp4' if source == 'video' else 'safetensors'}"
        more = ["--extend", str(before), "--frames", "12"] if turn else ["--frames", "33"]
        more += ["--latents", str(tmp_path / f"{turn}.safetensors")] if source == "latents" else []
        run([*options, "--prompt", "a", *more, "--out", str(tmp_path / f"{turn}.mp4")], capsys)
    assert [len(result) for result in draws] == [6, 2, 2]
    assert len(set.union(*draws)) == 10


@pytest.mark.parametrize("source", ["video", "latents"])
def test_an_earlier_video_passes_in_pieces_and_none_is_lost(
    options: list[str],
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    """No call sees more than a chunk, and yet latents and frames are those of the whole video in one call."""
    kept = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b")}
    options = [*options, "--prompt", "a", "--window", "-1"]
    run([*options, "--frames", "45", "--out", str(tmp_path / "a.mp4"), "--latents", str(kept["a"])], capsys)
    sizes: list[int] = []

    def spy(kind: Any, name: str) -> None:
        call = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda stream, piece: sizes.append(piece.shape[1]) or call(stream, piece))

    spy(StreamingDecoder, "decode")
    spy(StreamingEncoder, "encode")
    pieces: list[torch.Tensor] = []
    monkeypatch.setattr(write_module, "write_video", lambda path, frames, **_: pieces.extend(frames))
    extend = tmp_path / "a.mp4" if source == "video" else kept["a"]
    report = run(
        [
            *options,
            "--extend",
            str(extend),
            "--frames",
            "12",
            "--out",
            str(tmp_path / "b.mp4"),
            "--latents",
            str(kept["b"]),
        ],
        capsys,
    )[0]
    assert max(sizes) == (12 if source == "video" else 3)
    assert max(len(piece) for piece in pieces) == 12
    assert min(report[name] for name in ("seconds_to_first_frame", "seconds_per_chunk")) > 0
    monkeypatch.undo()
    taehv, _ = load_taehv(models / "taehv.safetensors")
    before, result = load_file(kept["a"])["latents"], load_file(kept["b"])["latents"]
    frames = read_video(tmp_path / "a.mp4")
    if source == "video":
        before = taehv.encode(frames[None])[0]
    torch.testing.assert_close(result[:12], before)
    whole = taehv.decode(result[None])[0]
    shown = torch.cat([frames, whole[45:]]) if source == "video" else whole
    # a number near the middle between two integers may fall to either side
    torch.testing.assert_close(torch.cat(pieces).float(), to_integers(shown, 8).float(), atol=1, rtol=0)


def test_latents_of_an_extension_never_lack_its_beginning(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*options, "--prompt", "a", "--frames", "33", "--out", str(tmp_path / "a.mp4")], capsys)
    more = ["--prompt", "a", "--extend", str(tmp_path / "a.mp4"), "--frames", "12", "--out", str(tmp_path / "b.mp4")]
    more += ["--latents", str(tmp_path / "b.safetensors")]
    assert "only with the last 21 of the 33 frames" in refusal([*options, *more], capsys)
    assert os.listdir(tmp_path) == ["a.mp4"]
    run([*options, *more, "--window", "-1"], capsys)
    assert len(load_file(tmp_path / "b.safetensors")["latents"]) == 12


def test_what_cannot_be_extended_is_said(
    options: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*options, "--prompt", "a", "--frames", "9", "--out", str(tmp_path / "a.mp4")], capsys)
    out = ["--out", str(tmp_path / "b.mp4"), "--prompt", "a"]
    extend = [*options[:7], *out, "--extend", str(tmp_path / "a.mp4")]
    assert "use 12" in refusal([*extend, "--frames", "10"], capsys)
    assert "leave --width and --height out" in refusal([*extend, "--width", "64", "--frames", "12"], capsys)
    with pytest.raises(ValueError, match="2 latent frames cannot be extended in chunks of 3"):
        context_frames(2, CAUSAL)
    assert "holds no latents" in refusal([*options, *out, "--extend", str(models / "clip.safetensors")], capsys)
    assert "give one of them" in refusal([*extend, "--image", str(models / "start.png")], capsys)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_file_that_is_no_safetensors_is_left_to_the_video_reader(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"junk")
    assert read_latents(tmp_path / "a") is None


# ------------------------------------------------------------- many at once --
def test_prompts_of_a_file_get_safe_names(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("../../etc/passwd\n\n  CON \na/b:c*?\n", encoding="utf-8")
    (tmp_path / "long.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    options = [*options, "--prompt-file", str(tmp_path / "p.txt"), "--samples", "2", "--frames", "9"]
    options += ["--extended-prompt-file", str(tmp_path / "long.txt")]
    report = run([*options, "--out", str(tmp_path / "one")], capsys)
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == [
        "0000-etc-passwd-0.mp4",
        "0000-etc-passwd-1.mp4",
        "0001-con--0.mp4",
        "0001-con--1.mp4",
        "0002-a-b-c-0.mp4",
        "0002-a-b-c-1.mp4",
    ]
    assert [Path(row["out"]).name for row in report] == names
    assert read_metadata(tmp_path / "one" / names[0])["comment"] == "../../etc/passwd"
    assert json.loads(read_metadata(tmp_path / "one" / names[0])["selfforcing"])["extended_prompt"] == "one"


def test_any_batch_makes_the_same_videos(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared before encoding, as the integers of the files."""
    frames: dict[str, torch.Tensor] = {}

    def keep(path: Path, chunks: Any, **_: Any) -> None:
        frames["/".join(path.parts[-2:])] = torch.cat(list(chunks)).float()

    monkeypatch.setattr(write_module, "write_video", keep)
    options = [*options, "--prompt", "a", "--samples", "3", "--frames", "9"]
    for folder, batch in (("one", "1"), ("two", "2")):
        run([*options, "--batch", batch, "--out", str(tmp_path / folder)], capsys)
    for sample in range(3):
        one, two = frames[f"one/0000-a-{sample}.mp4"], frames[f"two/0000-a-{sample}.mp4"]
        assert (one - two).abs().max() <= 1, "no further apart than rounding to integers"
        assert (one != two).float().mean() < 0.001
    assert not torch.allclose(frames["one/0000-a-0.mp4"], frames["one/0000-a-1.mp4"], atol=3)


def test_torchrun_splits_a_prompt_file(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n", encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*options, "--prompt-file", str(tmp_path / "p.txt"), "--frames", "9", "--out", str(tmp_path / "out")]
    assert _own_device("cuda", {"LOCAL_RANK": "1"}) == "cuda:1"
    assert [_own_device(name, {"LOCAL_RANK": "1"}) for name in ("cuda:3", "cpu")] == ["cuda:3", "cpu"]
    assert _own_device("cuda", {}) == "cuda"
    for rank, expected in ((0, ["0000-a-0.mp4", "0002-c-0.mp4"]), (1, ["0001-b-0.mp4"])):
        monkeypatch.setenv("RANK", str(rank))
        assert [Path(row["out"]).name for row in run(options, capsys)] == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "a", "--samples", "2", "--out", "x.mp4"], "several videos need a folder"),
        (["--out", "x.mp4"], "give either --prompt or --prompt-file"),
        (["--prompt", "a", "--samples", "0", "--out", "x"], "samples 0"),
        (["--prompt", "a", "--out", "x.mp4", "--decoder", "vae"], "give it as --vae"),
        (["--prompt", "a", "--out", "x.mp4", "--decoder", "magic"], "use taehv or vae"),
        (["--prompt", "a", "--out", "x.mp4", "--attention", "none"], "attention 'none' is unknown"),
        (["--prompt", "a", "--out", "x.mp4", "--solver", "none"], "solver 'none' is unknown"),
        (["--prompt", "a", "--out", "x.mp4", "--image", "absent.png"], "cannot be read as an image"),
        (["--prompt", "a", "--out", "x.mp4", "--extend", "absent.mp4"], "cannot be read"),
        (["--prompt", "a", "--out", "x.mp4", "--extend-prompt"], "needs a language model"),
        (["--prompt", "a", "--out", "x.mp4", "--extend-prompt", "absent"], "is neither a folder of a chat model"),
        (["--prompt-file", "absent.txt", "--out", "x"], "cannot be read as text"),
        (["--prompt", "a", "--samples", "2", "--out", "x", "--frames", "34"], "34 frames"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: list[str],
    more: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refusal([*options, *more], capsys)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------- how it computes --
def test_the_vae_decodes_on_request(
    options: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--prompt", "a", "--frames", "21", "--vae", str(models / "vae.safetensors"), "--decoder", "vae"]
    report = run([*options, *more, "--out", str(tmp_path / "a.mp4")], capsys)[0]
    assert report["decoder"] == "vae"
    assert read_video(tmp_path / "a.mp4").shape == (21, 3, 16, 32)


def test_float8_is_close_to_the_stored_weights(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = []
    for index, more in enumerate(([], ["--fp8"], ["--seed", "5"])):
        kept = tmp_path / f"{index}.safetensors"
        run(
            [
                *options,
                "--prompt",
                "a",
                "--frames",
                "9",
                *more,
                "--out",
                str(tmp_path / f"{index}.mp4"),
                "--latents",
                str(kept),
            ],
            capsys,
        )
        latents.append(load_file(kept)["latents"])
    exact, float8, other = latents
    assert 0 < (exact - float8).abs().mean() < 0.2 * (exact - other).abs().mean()


def test_compiled_blocks_make_the_same_video_and_their_failure_is_one_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CausalWan.compile_blocks
    monkeypatch.setattr(CausalWan, "compile_blocks", lambda model: whole(model, backend="aot_eager"))
    latents = []
    for index, more in enumerate(([], ["--compile"])):
        kept = tmp_path / f"{index}.safetensors"
        run(
            [
                *options,
                "--prompt",
                "a",
                "--frames",
                "9",
                *more,
                "--out",
                str(tmp_path / f"{index}.mp4"),
                "--latents",
                str(kept),
            ],
            capsys,
        )
        latents.append(load_file(kept)["latents"])
    torch.testing.assert_close(*latents)

    def broken(*_: Any) -> None:
        raise OSError("no compiler here\nsecond line")

    monkeypatch.setattr(CausalWan, "compile_blocks", lambda model: whole(model, backend=broken))
    torch._dynamo.reset()
    assert main([*options, "--prompt", "a", "--compile", "--out", str(tmp_path / "b.mp4")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # behind the progress bar
    assert "--compile failed" in said
    assert "no compiler here" in said
    assert not (tmp_path / "b.mp4").exists()


def test_a_foreign_taehv_is_refused_and_an_unknown_one_asked_about(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read_checkpoint(models / "t2v.safetensors")
    named = {"causal": CAUSAL, "steps": STEPS, "latent_space": "wan2.1"}
    save_checkpoint(tmp_path / "wan.safetensors", checkpoint.state_dict, checkpoint.config, **named)
    taehv = read_checkpoint(models / "taehv.safetensors")
    save_checkpoint(tmp_path / "hunyuan.safetensors", taehv.state_dict, taehv.config, latent_space="hunyuanvideo")
    options = ["generate", "--model", str(tmp_path / "wan.safetensors"), "--prompt", "a", "--frames", "9"]
    options += ["--text-encoder", str(bundle_path("tiny") / "text_encoder"), "--width", "32", "--height", "16"]
    out = ["--out", str(tmp_path / "a.mp4")]
    assert "latents of hunyuanvideo" in refusal(
        [*options, *out, "--taehv", str(tmp_path / "hunyuan.safetensors")], capsys
    )
    unknown = [*options, *out, "--taehv", str(models / "taehv.safetensors")]
    assert "does not say which latents" in refusal(unknown, capsys)
    assert main([*unknown, "--taehv-latents", "wan2.1"]) == 0


@pytest.mark.parametrize(
    "more", [["--cache-dtype", "int8"], ["--attention", "measured"], ["--cache-source", "last_step"]]
)
def test_other_ways_to_compute_make_a_video_of_the_same_scene(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """Measured kernels change rounding alone; the others change the video a little, and say so in no other place."""
    options = ["generate", "--prompt", "a red square moving left slowly on a black background", "--frames", "33"]
    for name, extra in (("plain", []), ("other", more)):
        assert main([*options, "--seed", "2", "--out", str(tmp_path / f"{name}.mp4"), "--json", *extra]) == 0
    plain, other = (read_video(tmp_path / f"{name}.mp4") for name in ("plain", "other"))
    assert (detect(other).colour, detect(other).shape) == ("red", "square")
    difference = float((plain - other).abs().mean())
    if "measured" in more:
        assert difference < 1e-3
    else:
        assert 1e-4 < difference < 0.1
    capsys.readouterr()


def test_a_cache_type_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["generate", "--prompt", "a", "--out", str(tmp_path / "a.mp4"), "--cache-dtype", "int4"]
    assert "use float32, bfloat16, float16, float8_e4m3fn, int8" in refusal(options, capsys)


def test_the_kernel_is_chosen_for_the_video_model_alone(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text encoders attend with masks, and VAEs with heads so wide, that most kernels refuse them."""
    log: dict[str, set[bool]] = {}

    def spy(kind: Any, name: str) -> None:
        run = getattr(kind, name)

        def noticed(*args: Any, **kwargs: Any) -> Any:
            log.setdefault(kind.__name__, set()).add(torch.backends.cuda.flash_sdp_enabled())
            return run(*args, **kwargs)

        monkeypatch.setattr(kind, name, noticed)

    for kind, name in ((TextEncoder, "encode"), (StreamingDecoder, "decode"), (CausalWan, "forward")):
        spy(kind, name)
    run([*options, "--prompt", "a", "--frames", "33", "--attention", "math", "--out", str(tmp_path / "a.mp4")], capsys)
    assert log == {"TextEncoder": {True}, "StreamingDecoder": {True}, "CausalWan": {False}}


def test_kernels_are_measured_once_for_all_videos(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfforcing_core import attention

    shapes: list[tuple[int, ...]] = []

    def measure(q_BNLK: torch.Tensor, k_BNSK: torch.Tensor, *_: Any) -> str:
        shapes.append((*q_BNLK.shape, *k_BNSK.shape))
        return "auto"

    monkeypatch.setattr(attention, "_measure", measure)
    options = [*options, "--prompt", "a", "--samples", "2", "--frames", "33", "--attention", "measured"]
    run([*options, "--out", str(tmp_path / "many")], capsys)
    assert shapes
    assert len(shapes) == len(set(shapes))


# ---------------------------------------------------------- memory and types --
def planned(**options: Any) -> tuple[Any, Request]:
    request = Request("a", **{"out": Path("out.mp4"), **options})
    return plan_request(request, [PromptBatch("a", "a", (request.out,))]), request


def test_a_plan_refuses_joint_chunks_in_a_window_without_room() -> None:
    with pytest.raises(
        ValueError, match="window 9 has no room for 12 frames and the sink; use window -1 or 15 or more"
    ):
        planned(model="tiny", policy="rolling-forcing", window=9, sink=3, frames=297)


@pytest.mark.parametrize(
    ("device", "stored", "expected"),
    [
        ("cpu", "bfloat16", "float32"),
        ("cuda", "float32", "bfloat16"),
        ("cuda", "bfloat16", "bfloat16"),
        ("mps", "float16", "float16"),
        ("cuda", "float8_e4m3fn", "bfloat16"),
    ],
)
def test_off_the_cpu_numbers_have_16_bits_unless_more_are_asked_for(device: str, stored: str, expected: str) -> None:
    checkpoint = replace(read_checkpoint(bundle_path("tiny") / "model.safetensors"), dtype=stored)
    assert _dtype(None, checkpoint, torch.device(device)) == getattr(torch, expected)
    assert _dtype("float32", checkpoint, torch.device(device)) == torch.float32


def test_the_text_encoder_is_counted_and_gone_before_the_model_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, request = planned(embeddings=tmp_path / "kept", out=tmp_path / "a.mp4")
    alive: list[Any] = []
    load_text, build_model = generate_module.build_text_encoder, generate_module.build_model

    def load_cyclic(*args: Any, **kwargs: Any) -> Any:
        encoder: Any = load_text(*args, **kwargs)
        encoder.model.itself = [encoder]
        alive.append(weakref.ref(encoder))
        stored = sum(weight.nbytes for weight in encoder.model.parameters())
        assert stored == generate_module._PromptEncoding(plan).encoder_bytes > 0
        return encoder

    def build_alone(*args: Any, **kwargs: Any) -> Any:
        assert [encoder() for encoder in alive] == [None]
        return build_model(*args, **kwargs)

    monkeypatch.setattr(generate_module, "build_text_encoder", load_cyclic)
    monkeypatch.setattr(generate_module, "build_model", build_alone)
    gc.disable()
    try:
        generate_module.generate(replace(request, frames=33))
    finally:
        gc.enable()
    assert "text encoder 11.4 GB, gone before" in plan.memory_in_words(11_400_000_000)
    known = generate_module._PromptEncoding(plan).encoder_bytes
    assert known == 0, "the prompt's embeddings are kept, no encoder is loaded"
    assert "text encoder" not in plan.memory_in_words(known)


def test_8_bit_floats_are_refused_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_device", torch.device)
    for options in ({"fp8": True}, {"cache_dtype": "float8_e4m3fn"}):
        with pytest.raises(ValueError, match="that mps does not have; use --cache-dtype int8"):
            planned(device="mps", **options)
    assert planned(device="mps", cache_dtype="int8")[0].cache_dtype == torch.int8
