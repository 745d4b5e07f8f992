"""Videos of any writer are read upright, in time and in their own colours, and what was changed on the way is said."""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from selfforcing_core.codecs.cuts import SIDE, CutDetector
from selfforcing_core.codecs.sound import Sound
from selfforcing_core.codecs.video import VideoStream, write_video
from selfforcing_core.codecs.video_reader import VideoReader, given_video, read_video

STEP = 6  # grey levels between one frame and the next


def flat(level: int, width: int = 32, height: int = 16) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def make(
    path: Path,
    times: Sequence[Fraction | float],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    pictures: Sequence[np.ndarray] = (),
    sound: str | None = None,
    context: dict[str, Any] | None = None,
    options: dict[str, str] | None = None,
    picture_format: str = "rgb24",
) -> Path:
    """Write a video of one picture at each time; without pictures, frame i is grey of level STEP * i."""
    pictures = pictures or [flat(STEP * index) for index in range(len(times))]
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as file:
        stream: Any = file.add_stream(
            codec, rate=1000, options={"crf": "10", **(options or {})} if "x264" in codec else {}
        )
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 12000)
        for name, value in (context or {}).items():
            setattr(stream.codec_context, name, value)
        audio: Any = None if sound is None else file.add_stream(sound, rate=48000)
        for time, picture in zip(times, pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=picture_format)
            frame.pts, frame.time_base = round(time * 12000), Fraction(1, 12000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if audio is not None:
            samples = int(48000 * (float(times[-1]) + 0.1))
            for start in range(0, samples, 960):
                wave = (8000 * np.sin(np.arange(start, start + 960) / 20)).astype(np.int16)[None]
                heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
                heard.rate, heard.pts, heard.time_base = 48000, start, Fraction(1, 48000)
                file.mux(audio.encode(heard))
            file.mux(audio.encode(None))
    return path


def numbers(frames_VRHW: Tensor) -> list[int]:
    """Which of the pictures of `make` these are."""
    return (frames_VRHW.mean((1, 2, 3)) * 255 / STEP).round().int().tolist()


def constant(rate: float, count: int) -> list[Fraction]:
    return [Fraction(index) / Fraction(rate).limit_denominator(1001) for index in range(count)]


# --------------------------------------------------------------------- time --
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", [8, 12, 16, 24, 30, 29.97, 60])
def test_every_rate_is_read_at_the_asked_one_and_lasts_as_long(tmp_path: Path, rate: float, ending: str) -> None:
    path = make(tmp_path / f"a.{ending}", constant(rate, 25))
    frames, findings = VideoReader(path, 16).first_frames(1000)
    shown = numbers(frames)
    assert abs(len(shown) / 16 - 25 / rate) <= 1 / 32 + 0.003
    for index, number in enumerate(shown):  # no other frame of a constant rate is nearer in time
        assert abs(number / rate - index / 16) <= 0.5 / rate + 0.002
    notes = " ".join(findings.in_words())
    assert ("fps" in notes) == (rate != 16)
    if rate != 16:
        assert f"its 25 frames are read as {len(shown)} at 16 fps" in notes
    assert numbers(VideoReader(path).frames()) == list(range(25))


def test_a_variable_rate_is_read_by_its_time_stamps(tmp_path: Path) -> None:
    times = [Fraction(value, 16) for value in (0, 1, 2, 6, 7, 11)]
    path = make(tmp_path / "a.mp4", [Fraction(3, 2) + time for time in times])
    frames, findings = VideoReader(path, 16).first_frames(100)
    assert numbers(frames)[:12] == [0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]
    assert "variable rate (4 to 16 fps)" in " ".join(findings.in_words())


def test_no_pause_ends_before_its_time(tmp_path: Path) -> None:
    """So that what is seen stays with what is heard."""
    path = make(tmp_path / "a.mp4", [0, 4, Fraction(65, 16), Fraction(66, 16)])
    assert numbers(VideoReader(path, 16).frames()).index(1) == 64
    assert numbers(VideoReader(make(tmp_path / "b.mp4", constant(1, 3)), 16).frames()) == [0] * 16 + [1] * 16 + [2] * 16


@pytest.mark.parametrize("rate", [15, 16.5, 17])
def test_another_rate_is_named_though_no_frame_is_left_out(tmp_path: Path, rate: float) -> None:
    findings = VideoReader(make(tmp_path / "a.mkv", constant(rate, 5)), 16).survey()
    assert (findings.num_given, findings.num_repeated, findings.num_skipped) == (5, 0, 0)
    assert f"has {rate:g}" in " ".join(findings.in_words())


def test_a_late_first_frame_is_no_missing_end(tmp_path: Path) -> None:
    findings = VideoReader(make(tmp_path / "a.mkv", [5 + time for time in constant(16, 10)]), 16).survey()
    assert "cut off" not in " ".join(findings.in_words())


def test_frames_that_refer_to_later_ones_come_in_the_order_in_which_they_are_shown(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.mp4", constant(16, 30), options={"bf": "3", "g": "12", "b_strategy": "0", "sc_threshold": "0"}
    )
    assert numbers(VideoReader(path, 16).frames()) == list(range(30))
    with av.open(str(path)) as file:
        kinds = {frame.pict_type for frame in file.decode(video=0)}
    assert len(kinds) == 3, "the file has such frames"


def test_a_part_is_what_the_whole_has_there(tmp_path: Path) -> None:
    reader = VideoReader(make(tmp_path / "a.mp4", constant(30, 33)), 16)
    whole = reader.frames()
    assert reader.survey().num_given == len(whole) == 18
    assert torch.equal(reader.frames(7), whole[7:])
    assert torch.equal(reader.frames(2, 5), whole[2:7])


def test_decoding_ends_with_what_is_asked_for(tmp_path: Path) -> None:
    reader = VideoReader(make(tmp_path / "a.mp4", constant(16, 40)), 16)
    findings = reader.findings()
    assert len(list(reader.iter_frames(0, 5, findings))) == 5
    assert findings.num_read < 8


def test_a_video_without_time_stamps_is_taken_at_its_rate_and_said(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h264", constant(25, 20), options={"bf": "0"})
    frames, findings = VideoReader(path, 25).first_frames(100)
    assert numbers(frames) == list(range(20))
    assert "have no time stamp" in " ".join(findings.in_words())


def test_a_jump_of_the_time_stamps_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", [0, Fraction(1, 16), Fraction(1, 8), 5000])
    with pytest.raises(ValueError, match=r"a\.mkv: its time stamps jump by 4999\.9 s after 0\.12 s"):
        VideoReader(path, 16).survey()


# ------------------------------------------------------------ the way it lies --
def quarters() -> np.ndarray:
    """Red, green, blue and white quarters of a picture 64 wide and 32 high."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:] = (255, 0, 0), (0, 255, 0)
    picture[16:, :32], picture[16:, 32:] = (0, 0, 255), (255, 255, 255)
    return picture


def lie(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Write (a, b, c, d) of the display matrix into the track's header of an mp4."""
    data = path.read_bytes()
    start = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    path.write_bytes(data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[start + 36 :])


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), "RG/BW"),
        ((0, 1, -1, 0), "BR/WG"),  # a quarter to the right, as phones that are held upright write it
        ((-1, 0, 0, -1), "WB/GR"),
        ((0, -1, 1, 0), "GW/RB"),
        ((-1, 0, 0, 1), "GR/WB"),
        ((1, 0, 0, -1), "BW/RG"),
        ((0, 1, 1, 0), "RB/GW"),
        ((0, -1, -1, 0), "WG/BR"),
    ],
)
def test_every_display_matrix_turns_the_picture_upright(
    tmp_path: Path, matrix: tuple[float, float, float, float], shown: str
) -> None:
    path = make(tmp_path / "a.mp4", constant(16, 3), pictures=[quarters()] * 3)
    lie(path, matrix)
    frames, findings = VideoReader(path, 16).first_frames(3)
    height, width = frames.shape[-2:]
    assert (width, height) == (findings.width, findings.height) == ((64, 32) if matrix[0] else (32, 64))
    colours = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    corners = [frames[0, :, y, x].round().int().tolist() for y in (4, height - 5) for x in (4, width - 5)]
    assert "{}{}/{}{}".format(*(colours[tuple(corner)] for corner in corners)) == shown
    assert [note for note in findings.in_words() if "colours" not in note] == [], "upright is nothing to be warned of"


def test_a_turn_by_no_right_angle_is_said(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", constant(16, 3))
    lie(path, (0.8, 0.6, -0.6, 0.8))
    assert "slant" in " ".join(VideoReader(path, 16).survey().in_words())


def test_oblong_pixels_become_square(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", constant(16, 3), context={"sample_aspect_ratio": Fraction(2, 1)})
    frames, findings = VideoReader(path, 16).first_frames(3)
    assert frames.shape == (3, 3, 16, 64)
    assert "oblong pixels (2:1); it is read as 64x16" in " ".join(findings.in_words())


# ------------------------------------------------------------------ colours --
SWATCHES = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (20, 200, 90),
    (240, 200, 160),
    (90, 40, 10),
    (10, 60, 120),
]


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_players_are_told_the_colours_that_were_generated(tmp_path: Path, ending: str, is_streamed: bool) -> None:
    """The file's tags, and an independent conversion by BT.709's own equations from the decoded planes."""
    if is_streamed and ending == "mov":
        pytest.skip("is not streamed to")
    colours = torch.tensor(SWATCHES).float() / 255
    frames = colours[:, :, None, None].expand(-1, -1, 32, 32)
    path = tmp_path / f"a.{ending}"
    if is_streamed:
        with VideoStream(path) as stream:
            stream.write(frames)
    else:
        write_video(path, frames)
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        decoded = list(file.decode(video=0))
        is_rgb = context.pix_fmt == "bgr0"
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
    assert tags == ((0, 1, 1, 2) if is_rgb else (1, 1, 1, 1))
    if not is_rgb:
        planes = [
            [float(np.frombuffer(bytes(plane), np.uint8)[:8].mean()) for plane in frame.planes] for frame in decoded
        ]
        y, blue, red = ((torch.tensor(planes) - torch.tensor([16, 128, 128])) / torch.tensor([219, 224, 224])).unbind(1)
        r, b = y + 2 * (1 - 0.2126) * red, y + 2 * (1 - 0.0722) * blue
        shown = torch.stack([r, (y - 0.2126 * r - 0.0722 * b) / 0.7152, b], 1).clamp(0, 1)
        assert (shown - colours).abs().max() < 4 / 255
        assert (shown - colours).abs().mean() < 1 / 255
    read = read_video(path).mean((-1, -2))
    assert (read - colours).abs().max() < 4 / 255
    assert (read - colours).abs().mean() < 1 / 255


@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9])
@pytest.mark.parametrize("full", [False, True])
def test_the_reader_obeys_the_tags_of_others(tmp_path: Path, matrix: int, full: bool) -> None:
    """Planes computed by the standard's equations come back as the colour they stand for."""
    k_red, k_blue = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}.get(matrix, (0.299, 0.114))
    frames = []
    for red, green, blue in np.array(SWATCHES) / 255:
        y = k_red * red + (1 - k_red - k_blue) * green + k_blue * blue
        chroma = (blue - y) / (2 - 2 * k_blue), (red - y) / (2 - 2 * k_red)
        luma = 255 * y if full else 16 + 219 * y
        planes = [luma, *(128 + (255 if full else 224) * value for value in chroma)]
        picture = np.concatenate(
            [np.full((32, 32), planes[0]), np.full((8, 32), planes[1]), np.full((8, 32), planes[2])]
        )
        frames.append(picture.round().clip(0, 255).astype(np.uint8))
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=16)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    read = read_video(path).mean((-1, -2)) * 255
    assert (read - torch.tensor(SWATCHES)).abs().max() < 4


def test_colours_without_a_tag_are_guessed_aloud_and_hdr_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", constant(16, 3))
    assert "read as BT.601, as players do" in " ".join(VideoReader(path, 16).survey().in_words())
    for curve, name in ((16, "PQ"), (18, "HLG")):
        path = make(tmp_path / f"{name}.mp4", constant(16, 3), context={"color_trc": curve, "color_primaries": 9})
        with pytest.raises(ValueError, match=rf"high dynamic range \({name}\)"):
            VideoReader(path, 16).survey()


def test_ten_bits_grey_and_odd_sizes_are_read(tmp_path: Path) -> None:
    for name, options in {
        "ten": {"pixels": "yuv420p10le"},
        "grey": {"codec": "ffv1", "pixels": "gray"},
        "odd": {"codec": "ffv1", "pixels": "yuv444p", "pictures": [flat(STEP * i, 33, 17) for i in range(20)]},
        "rgb": {"codec": "ffv1", "pixels": "gbrp10le"},
    }.items():
        path = make(tmp_path / f"{name}.mkv", constant(16, 20), **options)
        frames = VideoReader(path, 16).frames()
        assert frames.shape[2:] == ((17, 33) if name == "odd" else (16, 32))
        assert numbers(frames) == list(range(20)), name


def test_transparency_is_over_white_as_in_pictures(tmp_path: Path) -> None:
    half = np.zeros((16, 32, 4), np.uint8)
    half[:, 16:] = (255, 0, 0, 255)
    path = make(
        tmp_path / "a.mkv", constant(16, 2), codec="ffv1", pixels="bgra", pictures=[half] * 2, picture_format="rgba"
    )
    frame = VideoReader(path, 16).frames()[0]
    assert frame[:, 8, 4].tolist() == [1, 1, 1]
    assert frame[:, 8, 28].tolist() == [1, 0, 0]


def test_interlaced_frames_are_said(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", constant(25, 5), options={"x264-params": "interlaced=1:tff=1"})
    assert "interlaced" in " ".join(VideoReader(path, 25).survey().in_words())


# ------------------------------------------------------------------- damage --
def test_a_video_that_ends_early_or_is_damaged_says_so(tmp_path: Path) -> None:
    pictures = list((torch.rand(48, 16, 32, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    whole = make(tmp_path / "a.mp4", constant(16, 48), pictures=pictures, options={"g": "8"})
    write_video(tmp_path / "front.mp4", VideoReader(whole, 16).frames())  # with its index at the front
    data = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    frames, findings = VideoReader(tmp_path / "cut.mp4", 16).first_frames(1000)
    assert 10 < len(frames) < 48
    assert "cut off" in " ".join(findings.in_words())
    broken = bytearray(data)
    broken[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    (tmp_path / "broken.mp4").write_bytes(broken)
    assert "damaged" in " ".join(VideoReader(tmp_path / "broken.mp4", 16).survey().in_words())


def test_a_sound_of_an_unknown_codec_is_said_and_left_out(tmp_path: Path) -> None:
    data = make(tmp_path / "a.mkv", constant(16, 3), sound="libopus").read_bytes()
    assert b"A_OPUS" in data
    (tmp_path / "b.mkv").write_bytes(data.replace(b"A_OPUS", b"A_OPUX"))
    findings = VideoReader(tmp_path / "b.mkv", 16).survey()
    assert findings.sound is None
    assert "holds a sound of an unknown codec, which is left out" in findings.in_words()


def test_what_is_no_video_is_one_line(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is an image, not a video"):
        read_video(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("words\n" * 100, encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["part2:cat.mp4", "take1:http.mp4", "file:a.mp4", "100% %03d #?&.mp4", "-dash.mp4"])
def test_a_name_is_a_file_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, torch.rand(5, 3, 16, 16))
    assert Path(name).is_file()
    assert len(read_video(name)) == len(given_video(name, 16)) == 5
    with VideoStream(f"s {name}") as stream:
        stream.write(torch.rand(5, 3, 16, 16))
    assert len(read_video(f"s {name}")) == 5


# --------------------------------------------------------------------- cuts --
def texture(seed: int, width: int = 96) -> np.ndarray:
    coarse = torch.rand(1, 3, 8, width // 8, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (64, width), mode="bicubic").clamp(0, 1)[0]
    return (fine.permute(1, 2, 0) * 255).byte().numpy()


def pan(seed: int, speed: int, count: int) -> list[np.ndarray]:
    wide = texture(seed, 96 + 40 * 32)
    return [wide[:, speed * index : speed * index + 96] for index in range(count)]


def cuts_of(pictures: Sequence[np.ndarray]) -> list[float]:
    detector = CutDetector()
    for index, picture in enumerate(pictures):
        thumb = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(picture.copy()).permute(2, 0, 1).float(), SIDE)
        detector.add(Fraction(index, 16), thumb.permute(1, 2, 0).byte().numpy())
    return detector.cuts()


@pytest.mark.parametrize("speed", [0, 1, 2, 3])
def test_a_cut_is_found_where_it_is(speed: int) -> None:
    for seed in range(10):
        assert cuts_of([*pan(seed, speed, 12), *pan(seed + 100, speed, 12)]) == [12 / 16]


@pytest.mark.parametrize("speed", [1, 3, 6, 12, 24, 40])
def test_fast_motion_is_no_cut(speed: int) -> None:
    for seed in range(10):
        assert cuts_of(pan(seed, speed, 24)) == []
        for hold in (2, 3, 4):  # animation that holds each drawing
            animation = list(itertools.chain.from_iterable([picture] * hold for picture in pan(seed, speed, 12)))
            assert cuts_of(animation) == []


def test_every_picture_of_a_slideshow_begins_a_scene(tmp_path: Path) -> None:
    for rate in (1, 2):
        path = make(tmp_path / "a.mp4", constant(rate, 5), pictures=[pan(seed, 0, 1)[0] for seed in range(5)])
        assert VideoReader(path, 16).survey().cuts == [index / rate for index in range(1, 5)]


def test_flashes_and_fades_are_no_cuts() -> None:
    for seed in range(10):
        still = pan(seed, 2, 24)
        still[12] = (still[12] * 0.3 + 178).astype(np.uint8)
        assert cuts_of(still) == []
        one, other = texture(seed).astype(float), texture(seed + 100)
        assert cuts_of([(one + (other - one) * min(1, index / 16)).astype(np.uint8) for index in range(24)]) == []


def test_a_cut_in_a_file_is_named_with_its_moment(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", constant(16, 24), pictures=[*pan(0, 1, 12), *pan(7, 1, 12)])
    assert "is cut at 0.75 s" in " ".join(VideoReader(path, 16).survey().in_words())


# -------------------------------------------------------------------- sound --
def heard(path: Path) -> tuple[str, float, float]:
    """The codec of a file's sound, when it begins and ends on the clock of its frames."""
    with av.open(str(path)) as file:
        track = file.streams.audio[0]
        frames: list[Any] = list(file.decode(track))
        begin, end = frames[0].time, frames[-1].time + frames[-1].samples / frames[-1].sample_rate
        name = track.codec_context.name
        assert max(np.abs(frame.to_ndarray()).max() for frame in frames[2:5]) > 0.05, "it is heard"
    with av.open(str(path)) as file:
        shift = next(file.decode(video=0)).time or 0.0
    return name, begin - shift, end - shift


@pytest.mark.parametrize(
    ("source", "codec", "target", "kept"),
    [
        ("mp4", "aac", "mp4", "aac"),
        ("mkv", "libopus", "mkv", "opus"),
        ("mkv", "flac", "mov", "aac"),
        ("mkv", "pcm_s16le", "mkv", "pcm_s16le"),
        ("mp4", "aac", "mkv", "aac"),
    ],
)
def test_the_sound_is_carried_as_long_as_it_was_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, codec: str, target: str, kept: str
) -> None:
    path = make(tmp_path / f"a.{source}", [Fraction(2) + time for time in constant(16, 33)], sound=codec)
    given = given_video(path, 16)
    assert given.findings.sound is not None
    seconds = 1.0
    write_video(
        tmp_path / f"b.{target}", torch.rand(32, 3, 16, 32), sound=Sound(path, given.findings.start, Fraction(seconds))
    )
    name, begin, end = heard(tmp_path / f"b.{target}")
    assert name.startswith(kept)
    assert abs(begin) < 0.05
    assert abs(end - seconds) < 0.09  # a packet of FLAC
    assert len(read_video(tmp_path / f"b.{target}", 16)) == 32
    if not codec.removeprefix("lib").startswith(kept):
        assert "encoded again as AAC" in caplog.text


def test_sound_that_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(tmp_path / "a.mp4", constant(16, 9), sound="aac")
    with caplog.at_level(logging.WARNING):
        read_video(path)
    assert "its sound is not read" in caplog.text


# ----------------------------------------------------------------- the same --
@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
def test_equal_frames_become_equal_files(tmp_path: Path, ending: str) -> None:
    frames = torch.rand(33, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    files, streams = set(), set()
    for index in range(6):
        write_video(tmp_path / f"{index}.{ending}", frames, metadata={"comment": "a"})
        files.add((tmp_path / f"{index}.{ending}").read_bytes())
        if ending != "mov":
            with VideoStream(tmp_path / f"s{index}.{ending}", metadata={"comment": "a"}) as stream:
                stream.write(frames)
            streams.add((tmp_path / f"s{index}.{ending}").read_bytes())
    assert len(files) == 1
    assert len(streams) <= 1


def test_x264_never_uses_what_makes_it_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a CPU has AVX2 the assembly is held to it; one without gets none of that code."""
    from selfforcing_core.codecs.video_formats import x264_options

    for has_avx2, expected in ((True, "asm=avx2"), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda value=has_avx2: value)
        assert x264_options().get("x264-params") == expected
    write_video(tmp_path / "a.mp4", torch.rand(3, 3, 64, 64))
    assert b" threads=1 " in (tmp_path / "a.mp4").read_bytes(), "more cores must not make another file"
