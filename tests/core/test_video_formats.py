"""Every format that is offered shows the frames and plays the sound that it was given, again and again the same."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from selfforcing_core.codecs import video_formats
from selfforcing_core.codecs.sound import Samples, sound_of
from selfforcing_core.codecs.video import VideoStream, read_metadata, read_video, retag, write_video
from selfforcing_core.codecs.video_formats import FORMATS, check_video
from tests.core.test_video import moving_gradient
from tests.core.test_video_reader import SWATCHES
from tests.support.training import ROOT

# Largest and mean difference of a flat colour, in 255ths: 256 colours are exact for ten of them.
LIKENESS = {
    "h264": (4, 1),
    "h265": (4, 1),
    "av1": (4, 1),
    "prores": (2, 0.5),
    "ffv1": (0, 0),
    "webp": (6, 1.5),
    "gif": (6, 1.5),
}
CASES = [(name, ending) for name, each in FORMATS.items() for ending in each.endings]
GROWING = [(name, each.endings[0]) for name, each in FORMATS.items() if each.grows is not None]
WITH_SOUND = [(name, each.endings[0]) for name, each in FORMATS.items() if each.sound is not None]
RATE = 32_000


def tone(seconds: float, channels: int = 2, rate: int = RATE) -> Samples:
    """A sine that rises from 200 Hz by 1500 Hz a second, the same in all channels: like itself at one place only."""
    times = torch.arange(round(seconds * rate)) / rate
    wave = 0.5 * torch.sin(2 * torch.pi * (200 * times + 750 * times**2))
    return Samples(wave.expand(channels, -1), rate)


def frames_of(path: Path) -> Tensor:
    """Frames [V,R,H,W]; FFmpeg reads no moving webp, so Pillow does."""
    if path.suffix != ".webp":
        return read_video(path)
    file: Any
    with Image.open(path) as file:
        pictures = []
        for index in range(file.n_frames):
            file.seek(index)
            pictures.append(torch.from_numpy(np.array(file.convert("RGB"))))
    return torch.stack(pictures).permute(0, 3, 1, 2) / 255


def written(path: Path, frames: Tensor, *, grows: bool = False, **options: Any) -> Path:
    path.unlink(missing_ok=True)
    if not grows:
        write_video(path, frames, **options)
        return path
    with VideoStream(path, **options) as stream:
        for chunk in frames.split(4):
            stream.write(chunk)
    return path


@pytest.mark.parametrize(("codec", "ending"), CASES)
@pytest.mark.parametrize("grows", [False, True])
def test_the_colours_are_those_that_were_given(tmp_path: Path, codec: str, ending: str, grows: bool) -> None:
    colours = torch.tensor(SWATCHES).float() / 255
    frames = colours[:, :, None, None].expand(-1, -1, 64, 64)
    path = written(tmp_path / f"a{ending}", frames, grows=grows, codec=codec, metadata={"comment": "\u00e4: b"})
    decoded = frames_of(path).mean((-1, -2))
    assert decoded.shape == colours.shape
    most, mean = LIKENESS[codec]
    assert (decoded - colours).abs().max() * 255 <= most + 1e-3
    assert (decoded - colours).abs().mean() * 255 <= mean + 1e-3
    assert {name.lower(): value for name, value in read_metadata(path).items()}["comment"] == "\u00e4: b"
    if ending in (".mp4", ".mov", ".mkv"):
        with av.open(str(path)) as file:
            context = file.streams.video[0].codec_context
            assert next(file.decode(video=0)) is not None
            expected = (0, 1, 1, 2) if codec == "ffv1" else (1, 1, 1, 1)
            said = context.colorspace, context.color_primaries, context.color_trc, context.color_range
            is_unsaid = codec == "prores" and said[3] == 0  # by FFmpeg 7: ProRes has one range only
            assert (*said[:3], 1 if is_unsaid else said[3]) == expected
            if codec == "h265" and ending != ".mkv":
                assert context.codec_tag == "hvc1", "Apple's players ask for it"


@pytest.mark.parametrize(("codec", "ending"), [(name, each.endings[0]) for name, each in FORMATS.items()])
@pytest.mark.parametrize("grows", [False, True])
def test_moving_pictures_come_back_and_equal_ones_become_equal_files(
    tmp_path: Path, codec: str, ending: str, grows: bool
) -> None:
    """With sound where there is one; gif has 256 colours a frame, which costs most."""
    frames = moving_gradient(20, 96, 64)
    sound = tone(0.9) if FORMATS[codec].sound else None
    files = set()
    for _ in range(3):
        path = written(tmp_path / f"a{ending}", frames, grows=grows, codec=codec, sound=sound, metadata={"a": "b"})
        files.add(path.read_bytes())
    assert len(files) == 1
    decoded = frames_of(path)
    assert decoded.shape == frames.shape
    assert (decoded - frames).abs().mean() * 255 < (5 if codec == "gif" else 2)


def test_prores_holds_more_than_eight_bits(tmp_path: Path) -> None:
    ramp = torch.linspace(0.4, 0.6, 512).view(1, 1, 1, -1).expand(3, 3, 64, -1)
    write_video(tmp_path / "a.mov", ramp, codec="prores")
    with av.open(str(tmp_path / "a.mov")) as file:
        frame = next(file.decode(video=0))
        assert frame.format.name == "yuv422p10le"
        luma = np.frombuffer(bytes(frame.planes[0]), np.uint16).reshape(64, -1)[32, :512]
    assert len(np.unique(luma)) > 0.2 * 256 * 2, "8 bits have 45 of these levels"


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.quality is not None])
def test_a_better_quality_is_a_larger_file_and_the_default_is_one_of_them(tmp_path: Path, name: str) -> None:
    video_format = FORMATS[name]
    assert video_format.quality is not None
    if av.library_versions["libavcodec"][0] < video_format.quality.libavcodec:
        with pytest.raises(ValueError, match="in its default only"):
            video_format.check_quality(video_format.quality.worst)
        return
    frames = torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(0))

    def size(quality: int | None, grows: bool) -> int:
        path = written(tmp_path / f"a{video_format.endings[0]}", frames, grows=grows, codec=name, quality=quality)
        return path.stat().st_size

    for grows in (False, True):
        assert size(video_format.quality.worst, grows) < size(None, grows) <= size(video_format.quality.best, grows)
    assert size(video_format.quality.default, False) == size(-1, False) == size(None, False)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.mp4", {"codec": "ffv1"}, "FFV1 is not written into .mp4; use .mkv"),
        ("a.mp4", {"codec": "prores"}, "ProRes is not written into .mp4; use .mov or .mkv"),
        ("a.mkv", {"codec": "gif"}, "use .gif"),
        ("a.mp4", {"codec": "vp9"}, "codec 'vp9' is unknown; use h264, h265"),
        ("a.mp4", {"quality": 52}, "crf from 51 (worst) to 1 (best), 18 by default"),
        ("a.mp4", {"quality": 0}, "crf from 51 (worst) to 1 (best), 18 by default"),
        ("a.mkv", {"codec": "ffv1", "quality": 3}, "FFV1 has no such choice"),
        ("a.gif", {"fps": 60}, "slow gif down beyond 50"),
        ("a.gif", {"has_sound": True}, "gif has no sound; leave the audio out"),
    ],
)
def test_codec_quality_and_rate_that_do_not_fit_a_file_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], words: str
) -> None:
    asked = {"codec": None, "quality": None, "fps": 16, **options}
    with pytest.raises(ValueError) as refusal:
        check_video(tmp_path / name, **asked)
    assert words in str(refusal.value)


def test_a_codec_that_is_not_there_is_refused_with_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_formats, "_has_encoder", lambda name: name in ("libx264", "gif"))
    with pytest.raises(ValueError, match="this FFmpeg has no libsvtav1; it has h264, gif"):
        write_video(tmp_path / "a.mp4", moving_gradient(), codec="av1")
    assert list(tmp_path.iterdir()) == []


def test_a_narrow_video_is_refused_where_the_encoder_would_crash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a width of 64"):
        write_video(tmp_path / "a.mp4", moving_gradient(5, 48, 64), codec="h265")


# ------------------------------------------------------------------- growing --
def test_what_was_written_can_be_played_after_a_crash(tmp_path: Path) -> None:
    """One process writes one file of each kind, with sound where there is one, and is killed in the middle."""
    code = (
        "import sys, time, torch; from selfforcing_core.codecs.video import VideoStream; torch.manual_seed(0)\n"
        "from tests.core.test_video_formats import GROWING, tone\n"
        "from selfforcing_core.codecs.video_formats import FORMATS\n"
        "for name, ending in GROWING:\n"
        "    stream = VideoStream(f'{sys.argv[1]}/{name}{ending}', codec=name, sound=FORMATS[name].sound and tone(1))\n"
        "    for _ in range(5): stream.write(torch.rand(12, 3, 64, 96))\n"
        "    globals()[name] = stream\n"
        "print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name, ending in GROWING:
        path = tmp_path / f"{name}{ending}"
        assert len(read_video(path)) >= 36, (name, "all but the last fragments")
        if FORMATS[name].sound:
            assert heard(path)[1] >= 36 / 16 - 0.1, name


# --------------------------------------------------------------------- sound --
def heard(path: Path) -> tuple[np.ndarray, float]:
    """The first channel at RATE from the first frame's moment on, and when it ends."""
    with av.open(str(path)) as file:
        begin = float(next(file.decode(video=0)).time or 0)
    resampler = av.AudioResampler("fltp", "mono", RATE)
    with av.open(str(path)) as file:
        track = file.streams.audio[0]
        frames: list[Any] = list(file.decode(track))
        first = float(frames[0].time)
        parts = [part.to_ndarray()[0] for frame in [*frames, None] for part in resampler.resample(frame)]
    samples = np.concatenate(parts)
    shift = round((first - begin) * RATE)
    samples = samples[-shift:] if shift < 0 else np.concatenate([np.zeros(shift, np.float32), samples])
    return samples, len(samples) / RATE


@pytest.mark.parametrize(("codec", "ending"), WITH_SOUND)
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("seconds", [0.6, 3.0])
def test_samples_are_heard_from_the_first_frame_to_the_end_of_the_video(
    tmp_path: Path, codec: str, ending: str, grows: bool, seconds: float
) -> None:
    """Cut where the video ends, silent where they are shorter."""
    given = tone(seconds)
    path = written(tmp_path / f"a{ending}", moving_gradient(20, 96, 64), grows=grows, codec=codec, sound=given)
    samples, end = heard(path)
    assert abs(end - 20 / 16) < 0.04, "to within a packet"
    count = round(min(seconds, 1.2) * RATE)
    wave = given.waveform[0, :count].numpy()
    alike = [np.corrcoef(wave, np.pad(samples, (64, 0))[at : at + count])[0, 1] for at in range(129)]
    assert max(alike) > 0.98, "the same wave"
    assert abs(int(np.argmax(alike)) - 64) <= 16, "within half a millisecond of its place"
    if seconds < 1:
        assert np.abs(samples[count + 2048 : round(1.2 * RATE)]).max() < 0.01


@pytest.mark.parametrize(
    ("source", "codec", "ending", "kept"),
    [
        ("a.wav", "pcm_s16le", ".mp4", "aac"),
        ("a.wav", "pcm_s16le", ".mov", "pcm_s16le"),
        ("a.mp3", "libmp3lame", ".mp4", "mp3"),
        ("a.flac", "flac", ".mkv", "flac"),
        ("a.m4a", "aac", ".mp4", "aac"),
    ],
)
def test_a_sound_file_is_muxed_in(tmp_path: Path, source: str, codec: str, ending: str, kept: str) -> None:
    given = tone(3)
    with av.open(str(tmp_path / source), "w") as file:
        stream: Any = file.add_stream(codec, rate=RATE)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(given.waveform.contiguous().numpy(), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    sound, seconds = sound_of(tmp_path / source)
    assert abs(seconds - 3) < 0.1
    path = tmp_path / f"b{ending}"
    write_video(path, moving_gradient(20, 96, 64), sound=video_sound(sound))
    with av.open(str(path)) as file:
        assert file.streams.audio[0].codec_context.name.startswith(kept)
    samples, end = heard(path)
    assert abs(end - 20 / 16) < 0.2, "to within a packet"
    wave = given.waveform[0, :RATE].numpy()
    alike = [np.corrcoef(wave, np.pad(samples, (1500, 0))[at : at + RATE])[0, 1] for at in range(0, 3001, 4)]
    assert max(alike) > 0.98
    assert abs(4 * int(np.argmax(alike)) - 1500) <= 0.005 * RATE


def video_sound(sound: Any) -> Any:
    return type(sound)(sound.path, sound.start, Fraction(20, 16))


def test_what_is_no_sound_is_one_line(tmp_path: Path) -> None:
    write_video(tmp_path / "silent.mp4", moving_gradient())
    (tmp_path / "junk.wav").write_bytes(b"junk" * 100)
    for name, words in (
        ("silent.mp4", "holds no sound"),
        ("junk.wav", "cannot be read"),
        ("absent.wav", "No such file"),
    ):
        with pytest.raises(ValueError, match=words):
            sound_of(tmp_path / name)
    with pytest.raises(ValueError, match="mix it down to stereo"):
        write_video(tmp_path / "a.mp4", moving_gradient(), sound=Samples(torch.zeros(3, 100), RATE))
    assert not (tmp_path / "a.mp4").exists()


# ------------------------------------------------------------------ metadata --
def packets(path: Path) -> list[tuple[Any, ...]]:
    if path.suffix in (".webp", ".gif"):
        return [(frame.numpy().tobytes(),) for frame in (frames_of(path) * 255).round().byte()]
    with av.open(str(path)) as file:
        demuxed: Any = file.demux()
        rows = [
            (packet.stream_index, float(packet.pts * packet.time_base), packet.is_keyframe, bytes(packet))
            for packet in demuxed
            if packet.size
        ]
        is_pcm = [stream.type == "audio" and stream.codec_context.name.startswith("pcm") for stream in file.streams]
    pcm = b"".join(data for index, *_, data in rows if is_pcm[index])  # which readers cut as they like
    return [*sorted(each for each in rows if not is_pcm[each[0]]), (pcm,)]


@pytest.mark.parametrize(("codec", "ending"), CASES)
@pytest.mark.parametrize("grows", [False, True])
def test_entries_are_added_to_a_finished_file_and_no_packet_changes(
    tmp_path: Path, codec: str, ending: str, grows: bool
) -> None:
    """Also what the file says of its pictures, their rate and their colours."""
    sound = tone(0.9) if FORMATS[codec].sound else None
    path = written(
        tmp_path / f"a{ending}",
        moving_gradient(20, 96, 64),
        grows=grows,
        codec=codec,
        sound=sound,
        fps=12,
        metadata={"prompt": {"1": "\u00e4"}, "comment": "b: c"},
    )
    before, said, frames = packets(path), about(path), frames_of(path)
    retag(path, {"selfforcing_schedule": "0s: a\n3s: \u00fc", "comment": "new"})
    retag(path, {"further": [1]})
    assert packets(path) == before
    assert about(path)[1:] == said[1:]
    assert float(about(path)[0]) == pytest.approx(float(said[0]), rel=0.01)  # Matroska rounds to milliseconds
    assert torch.equal(frames_of(path), frames)
    entries = {name.lower(): value for name, value in read_metadata(path).items()}
    assert entries["selfforcing_schedule"] == "0s: a\n3s: \u00fc"
    assert (entries["comment"], json.loads(entries["prompt"]), entries["further"]) == ("new", {"1": "\u00e4"}, "[1]")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def about(path: Path) -> Any:
    file: Any
    if path.suffix == ".webp":
        with Image.open(path) as file:
            return 0, file.n_frames, file.info["loop"], file.size
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        return (
            *(file.streams.video[0].average_rate, context.name, context.codec_tag, context.extradata),
            *(context.colorspace, context.color_range, context.pix_fmt, context.width, context.height),
        )


def test_a_file_that_cannot_be_retagged_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="cannot be read as a video"):
        retag(tmp_path / "a.mp4", {"a": "b"})
    assert (tmp_path / "a.mp4").read_bytes() == b"junk" * 100


@pytest.mark.parametrize("ending", [".webp", ".gif"])
def test_loops_go_on_for_ever_at_the_asked_rate_and_say_what_made_them(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"a{ending}", moving_gradient(16, 64, 48), metadata={"workflow": {"nodes": [1]}})
    file: Any
    with Image.open(path) as file:
        assert (file.n_frames, file.info["loop"]) == (16, 0)
        seconds = 0.0
        for index in range(file.n_frames):
            file.seek(index)
            file.load()
            seconds += file.info["duration"] / 1000
        assert abs(seconds - 1) < 0.02
        if ending == ".webp":
            assert file.getexif()[0x010F] == 'workflow:{"nodes": [1]}', "where ComfyUI's page looks for it"
    single = written(tmp_path / f"one{ending}", moving_gradient(1, 64, 48), metadata={"workflow": {"nodes": [1]}})
    assert json.loads(read_metadata(single)["workflow"]) == {"nodes": [1]}


@pytest.mark.parametrize(
    ("channels", "rate", "value", "words"),
    [(8, 48000, 0.0, "1, 2 or 6 channels"), (2, 8, 0.0, "4000 samples a second"), (2, 48000, math.nan, "NaN or Inf")],
)
def test_samples_that_are_no_sound_are_refused(channels: int, rate: int, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Samples(torch.full((channels, 100), value), rate).check()
