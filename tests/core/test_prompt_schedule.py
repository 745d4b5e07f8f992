"""Prompts that change on the way: the text, the cache, and what a video shows."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from selfforcing_core.codecs.video import read_metadata, read_video
from selfforcing_core.conditioning import Conditioning
from selfforcing_core.config import CausalConfig, StepConfig
from selfforcing_core.generate.cli import main
from selfforcing_core.geometry import pixel_frames
from selfforcing_core.guided import Guided, new_caches
from selfforcing_core.history import PromptChange
from selfforcing_core.kv_cache import KVCache
from selfforcing_core.noise import ScheduledNoise, SeededNoise
from selfforcing_core.policy import HISTORIES
from selfforcing_core.prompt_schedule import (
    OWN_SEED,
    TimedPrompt,
    Transition,
    moment_of,
    parse_schedule,
    schedule_note,
    schedule_text,
    seed_at,
    start_frames,
)
from selfforcing_core.rollout import Chunk, rollout
from tests.core.test_kv_cache import chunk, make_cache
from tests.support.tiny_wan import FRAME, ordered, random_text, random_wan
from train.tiny.world import detect

STEPS = StepConfig((1000.0, 500.0))


# -------------------------------------------------------------------- text --
def test_a_text_with_times_is_a_schedule_and_any_other_a_prompt() -> None:
    expected = (TimedPrompt(0, "a red square"), TimedPrompt(3.5, "a blue circle: round"))
    assert parse_schedule("0s: a red square\n 3.5s: a blue circle: round\n") == expected
    assert parse_schedule("0 s : a red square ;3.5s:a blue circle: round") == expected
    for plain in ("a clock says 3s: late", "0: zero", "a; b", "", "10 seconds: long"):
        assert parse_schedule(plain) == (TimedPrompt(0, plain),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1s: a; 3s: b", "begins at 1s"),
        ("1990s: a\n1991s: b", "begins at 1990s"),
        ("1990s: ", "begins at 1990s"),
        ("0s: a; 2s: b; 2s: c", "times must rise"),
        ("0s: a; 3s:  ", "no prompt at 3s"),
        ("0s:", "no prompt at 0s"),
        ("0s [seed 7]:", "no prompt at 0s"),
        ("0s: a; 3s [keep]:", "no prompt at 3s"),
        ("0s: a; 3s [keep, seed 7]:", "keep at 3s, where no prompt changes"),
        ("0s [recode]: a; 3s: b", "recode at 0s, where no prompt changes"),
        ("0s: a; 3s [keep, recode]: b", r"\[keep, recode\] at 3s; use one of"),
        ("0s: a; 3s [seed 1, seed own]: b", "one seed"),
        (f"0s: a; 3s [seed {2**64}]: b", "below 2"),
        ("0s: a; 3s [quoted]: b", "no JSON string"),
        ("0s: a; 3s [quoted]: 7", "no JSON string"),
        ("0s: a; 3s blend 1: b", "use 2 chunks or more"),
        ("0s: a; 3s blend 2 [blend 3]: b", "one blend"),
        ("0s: a; 3s cut [flush]: b", r"\[cut, flush\] at 3s; use one of"),
        ("0s blend 4: a; 3s: b", "blend 4 at 0s, where no prompt changes"),
        ("0s: a; 3s [24 fps]: b", "fps at another time than 0s"),
        ("0s [0 fps]: a", "or 0 fps"),
        ("0s [24 fps, 25 fps]: a", "one fps"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1990s: a neon street", "1990s:"),
        ("  2s: late \n", "2s:"),
        ("3.5s : a; b", "3.5s :"),
        ("a red square\n3s: a blue circle", "3s:"),
        ("Scene one; 0s: a; 3s: b", "0s:"),
        ("\ufeff0s: a\n3s: b", "3s:"),
    ],
)
def test_a_time_that_is_read_as_words_is_said(text: str, time: str) -> None:
    """One time alone that is not 0, and times behind other words."""
    assert parse_schedule(text) == (TimedPrompt(0, text),)
    note = schedule_note(text)
    assert note is not None
    assert note.startswith(repr(time))


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "",
        "at 3s: late",
        "0s: a; 3s later: b",
        "a: b; c",
        "0s: a",
        "0s: a; 3s: b",
        "0s: a clock, 3s: late",
        "10 seconds: long",
    ],
)
def test_nothing_is_said_of_texts_that_are_clear(text: str) -> None:
    assert schedule_note(text) is None


@pytest.mark.parametrize(
    "text",
    ["0s: a\n3s: b", "0s: a\r\n3s: b", "0s: a\r3s: b", "0s:\xa0a\n\u30003s\uff1ab\uff1b", "0s\uff1aa\uff1b3s\uff1ab"],
)
def test_schedules_of_every_keyboard_are_read(text: str) -> None:
    """Line ends of every system, blanks that are no spaces, full-width punctuation."""
    assert [(entry.seconds, entry.prompt.rstrip("\uff1b")) for entry in parse_schedule(text)] == [(0, "a"), (3, "b")]


def test_a_separator_that_is_no_line_end_begins_no_entry() -> None:
    text = "0s: a\u20283s: b"
    assert parse_schedule(text) == (TimedPrompt(0, "a\u20283s: b"),)


def test_times_may_bring_a_history_and_a_seed() -> None:
    text = (
        "0s [seed 5]: a\n1s[keep]: b\n2s [ keep , seed 7 ] : c\n3s [seed own]:\n4.5s [recode,seed 8]: d; 6s [seed 9]:"
    )
    assert parse_schedule(text) == (
        TimedPrompt(0, "a", None, 5),
        TimedPrompt(1, "b", "keep"),
        TimedPrompt(2, "c", "keep", 7),
        TimedPrompt(3, "", None, OWN_SEED),
        TimedPrompt(4.5, "d", "recode", 8),
        TimedPrompt(6, "", None, 9),
    )
    assert schedule_note(text) is None


def test_words_behind_a_time_say_the_same_as_brackets() -> None:
    text = (
        "0s 24 fps: a\n1s cut: b\n2s flush : c; 3s blend 4: d\n"
        "4s keep, blend 2 [seed 7]: e; 5s recache_sink seed own: f"
    )
    expected = (
        TimedPrompt(0, "a", fps=24),
        TimedPrompt(1, "b", "cut"),
        TimedPrompt(2, "c", "flush"),
        TimedPrompt(3, "d", blend=4),
        TimedPrompt(4, "e", "keep", 7, blend=2),
        TimedPrompt(5, "f", "recache_sink", OWN_SEED),
    )
    assert parse_schedule(text) == expected
    assert schedule_text(expected).split("\n")[1:4] == ["1s cut: b", "2s flush: c", "3s blend 4: d"]
    bracketed = "0s: a; 1s [cut]: b; 2s [blend 4, keep]: c"
    assert parse_schedule(bracketed) == parse_schedule("0s: a; 1s cut: b; 2s blend 4 keep: c")


@pytest.mark.parametrize("words", ["Cut", "blend", "blned 4", "recoded", "flush!", "Keep"])
def test_words_that_are_nearly_options_are_words_and_that_is_said(words: str) -> None:
    text = f"0s: a\n3s {words}: b"
    assert parse_schedule(text) == (TimedPrompt(0, f"a\n3s {words}: b"),)
    assert f"'3s {words}:' is read as a part of the prompt" in str(schedule_note(text))


def test_the_explicit_word_wins() -> None:
    assert TimedPrompt(3, "b").transition(None) == Transition(None, 1)
    assert TimedPrompt(3, "b").transition("keep") == Transition("keep", 1)
    assert TimedPrompt(3, "b", "cut", blend=2).transition("keep") == Transition("cut", 2)


@pytest.mark.parametrize("brackets", ["[late]", "[sed 7]", "[seed]", "[seed -1]", "[seed 7 keep]", "[]", "[Keep]"])
def test_other_brackets_behind_a_time_are_words_as_they_were_and_that_is_said(brackets: str) -> None:
    text = f"0s: a\n3s {brackets}: b"
    assert parse_schedule(text) == (TimedPrompt(0, f"a\n3s {brackets}: b"),)
    assert f"'3s {brackets}:' is read as a part of the prompt" in str(schedule_note(text))


PIECES = [
    "a",
    " ",
    ";",
    "\uff1b",
    "\n",
    "\r",
    "3s:",
    "3s",
    " cut",
    " blend 4",
    ":",
    "0s [keep]: ",
    '"',
    "\\",
    "[",
    "\u2028",
]
PROMPTS = st.lists(st.sampled_from(PIECES)).map("".join)


@given(
    st.lists(
        st.tuples(
            PROMPTS,
            st.sampled_from([None, *HISTORIES]),
            st.sampled_from([None, OWN_SEED, 0, 2**64 - 1]),
            st.sampled_from([1, 2, 9999]),
        )
    )
)
def test_a_schedule_that_is_written_is_read_as_it_was(later: list[tuple[str, str | None, int | None, int]]) -> None:
    """Whatever the prompts hold: line ends, marks of their own, blanks at their ends."""
    entries = [TimedPrompt(0, " a; 3s: b\n", fps=23.976)]
    for number, (prompt, history, seed, blend) in enumerate(later, 1):
        if prompt:
            entries.append(TimedPrompt(number / 16, prompt, history, seed, blend=blend))
        elif seed is not None:
            entries.append(TimedPrompt(number / 16, "", None, seed))
    assert parse_schedule(schedule_text(entries)) == tuple(entries)


@given(
    st.integers(1, 9), st.integers(1, 60), st.sampled_from([1.0, 7.5, 10.0, 16.0, 23.976, 24.0, 29.97, 100.0, 240.0])
)
def test_the_written_moment_of_a_chunk_is_found_in_it(chunk: int, index: int, fps: float) -> None:
    lengths = (chunk,) * (index + 1)
    text = schedule_text([TimedPrompt(0, "a"), TimedPrompt(moment_of(chunk * index, fps), "a")])
    *_, entry = parse_schedule(text)
    assert start_frames([entry], lengths, fps) == [chunk * index]
    assert entry.seconds - pixel_frames(chunk * index) / fps < 0.003


def test_scheduled_seeds_hold_until_the_next_one() -> None:
    noise = ScheduledNoise(SeededNoise(0), {2: 7, 6: OWN_SEED}, SeededNoise)
    for start, seed in ((0, 0), (2, 7), (4, 7), (6, 0), (8, 0)):
        assert torch.equal(noise.draw(start, 1, (1, 2, 3)), SeededNoise(seed).draw(start, 1, (1, 2, 3)))
    assert seed_at({}, 5) is None


@given(st.text())
def test_any_text_is_a_schedule_or_a_prompt_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_schedule(text)[0].seconds == 0


def test_a_moment_belongs_to_the_chunk_in_which_it_lies() -> None:
    lengths = (3, 3, 3)  # of 9, 12 and 12 frames
    moments = [(0, 0), (8 / 16, 0), (9 / 16, 3), (20 / 16, 3), (21 / 16, 6), (32 / 16, 6)]
    for seconds, start in moments:
        assert start_frames([TimedPrompt(seconds, "a")], lengths, 16) == [start]
    with pytest.raises(ValueError, match=r"the video ends at 2\.0625s"):
        start_frames([TimedPrompt(0, "a"), TimedPrompt(33 / 16, "b")], lengths, 16)
    with pytest.raises(ValueError, match=r"leave 0\.75s between"):
        start_frames([TimedPrompt(0, "a"), TimedPrompt(0.6, "b"), TimedPrompt(1, "c")], lengths, 16)


# ------------------------------------------------------------------- cache --
def made(
    prompts: dict[int, Conditioning], causal: CausalConfig, frames: int = 8, history: str = "recode"
) -> tuple[Tensor, list[KVCache], list[Chunk]]:
    network, first = random_wan(), prompts[0]
    caches = new_caches(network, first, 1, (frames, *FRAME), causal)
    with torch.no_grad():
        chunks = list(
            rollout(
                Guided(network, first, caches=caches),
                noise=SeededNoise(0),
                latent_shape=(frames, *FRAME),
                causal=causal,
                steps=STEPS,
                commit_last=True,
                prompt_at=lambda start: PromptChange(prompts[start], history) if start and start in prompts else None,
            )
        )
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1), caches, chunks


def test_a_schedule_of_one_prompt_is_bit_exact_with_the_plain_run() -> None:
    causal, text = CausalConfig(2, window=4, sink=1), random_text()
    plain = rollout(
        Guided(random_wan(), text), noise=SeededNoise(0), latent_shape=(8, *FRAME), causal=causal, steps=STEPS
    )
    with torch.no_grad():
        expected = torch.cat([chunk.latents_BTCHW for chunk in plain], 1)
    assert torch.equal(made({0: text}, causal)[0], expected)
    assert torch.equal(made({0: text, 4: text}, CausalConfig(2))[0], made({0: text}, CausalConfig(2))[0])


@pytest.mark.parametrize(("window", "sink"), [(6, 1), (6, 2), (7, 3), (8, 0)])
def test_the_same_prompt_again_before_anything_is_evicted_changes_nothing(window: int, sink: int) -> None:
    """Also where the sink ends inside a chunk."""
    causal, text = CausalConfig(2, window=window, sink=sink), random_text()
    expected, *_ = made({0: text}, causal, frames=10)
    assert torch.equal(made({0: text, 4: text}, causal, frames=10)[0], expected)


def test_frames_before_the_change_stay_and_later_ones_follow_the_new_prompt() -> None:
    one, other = random_text(), random_text(seed=1)
    plain, changed, kept = (
        made(prompts, CausalConfig(2), history=history)[0]
        for prompts, history in (({0: one}, "recode"), ({0: one, 4: other}, "recode"), ({0: one, 4: other}, "keep"))
    )
    assert torch.equal(changed[:, :4], plain[:, :4])
    assert not torch.allclose(changed[:, 4:], plain[:, 4:], atol=1e-3)
    assert not torch.allclose(changed[:, 4:], kept[:, 4:], atol=1e-3)


@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (4, 0), (5, 1), (6, 3), (12, 3)])
def test_recoded_history_is_that_of_a_run_under_the_new_prompt(window: int, sink: int) -> None:
    """The cache after the change holds what writing its frames, and no others, under the new prompt gives."""
    causal, one, other = CausalConfig(2, window, sink), random_text(), random_text(seed=1)
    video, caches, _ = made({0: one, 8: other}, causal, frames=10)
    network, (cache,) = random_wan(), caches
    naive = network.new_cache(
        batch=1, latent_height=FRAME[1], latent_width=FRAME[2], capacity=10, like=other.prompt_embeds_BPE
    )
    if not -1 < window < 10:  # nothing is evicted
        sink, ring = 0, 10
    else:
        ring = window - sink
    shown = [*range(sink), *range(max(sink, 8 - ring), 8)]  # when the prompt changes
    expected_k: list[Tensor] = []
    # frame by frame groups as the rollout had them: the sink's parts, then whole or cut chunks
    groups: list[list[int]] = []
    for frame in shown:
        is_same = groups and groups[-1][-1] == frame - 1 and frame // 2 == groups[-1][-1] // 2
        crosses = groups and frame == sink
        groups[-1].append(frame) if is_same and not crosses else groups.append([frame])
    with torch.no_grad():
        for place, group in zip([sum(map(len, groups[:i])) for i in range(len(groups))], groups):
            frames = video[:, group[0] : group[-1] + 1]
            expected_k.append(_write(network, naive, frames, other, place, group[0]))
    still = [frame for frame in cache.frames() if frame < 8]
    actual, _ = ordered(cache, 0)
    actual = actual.unflatten(1, (-1, 6))[:, [cache.frames().index(frame) for frame in still]]
    expected = torch.cat(expected_k, 1).unflatten(1, (-1, 6))[:, [shown.index(frame) for frame in still]]
    torch.testing.assert_close(actual, expected)


def _write(network, cache, frames, prompt, place, start) -> Tensor:  # type: ignore[no-untyped-def]
    """Keys of layer 0 for frames whose place in the cache is not their place in the video."""

    class Placed:
        position = start

        def __getattr__(self, name: str) -> object:
            return getattr(cache, name)

        def stage(self, start_frame: int, num_frames: int, **options: bool) -> None:
            cache.stage(place, num_frames, **options)

    network(frames, torch.zeros(1, frames.shape[1]), prompt.prompt_embeds_BPE, cache=Placed(), start_frame=start)
    return cache.k[0][:, place * 6 : (place + frames.shape[1]) * 6].clone()


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(2, 5), st.integers(0, 9), st.lists(st.integers(1, 2), min_size=1, max_size=5))
def test_a_restarted_ring_shows_the_sink_and_the_latest_frames(
    sink: int, ring: int, base: int, more: list[int]
) -> None:

    cache, numbers = make_cache(sink + ring, sink), list(range(sink))
    cache.restart(base)
    start = max(base, sink)
    with torch.no_grad():
        for frame in range(sink):
            cache.stage(frame, 1)
            cache.update(0, chunk(0, 1), chunk(0, 1))
        for length in more:
            cache.stage(start, length)
            k = torch.full_like(chunk(0, length), float(start))
            visible, _ = cache.update(0, k, k)
            numbers += range(start, start + length)
            start += length
            expected = numbers[:sink] + numbers[sink:][-ring:]
            assert cache.frames() == tuple(expected)
            assert visible.shape[1] == len(expected) * 6
    state = cache.snapshot()
    other = make_cache(sink + ring, sink)
    other.restore(state)
    assert other.frames() == cache.frames()
    assert torch.equal(ordered(other, 0)[0], ordered(cache, 0)[0])


# ------------------------------------------------------------------- video --
@pytest.mark.parametrize("history", ["recode", "keep"])
def test_the_video_changes_its_colour_where_the_prompt_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], history: str
) -> None:
    out = tmp_path / "video.mp4"
    rest = "square moving left slowly on a black background"
    prompt = f"0s: a red {rest}; 2.1s: a blue {rest}"
    options = ["generate", "--prompt", prompt, "--frames", "69", "--seed", "2", "--out", str(out), "--json"]
    assert main([*options, "--history", history]) == 0
    assert json.loads(capsys.readouterr().out)["history"] == history
    colours = detect(read_video(out)).colours_V
    assert set(colours[:33]) == {"red"}
    assert set(colours[-4:]) == {"blue"}, "by way of magenta, since the history is red"
    assert json.loads(read_metadata(out)["selfforcing"])["history"] == history


def test_a_schedules_seeds_are_those_of_the_command_line(tmp_path: Path) -> None:
    """A seed at 0s is --seed; a later one changes its chunk and what follows; one that goes back is the run's own."""
    rest = "a red square moving left slowly on a black background"

    def latents(prompt: str, seed: int) -> Tensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        options = [
            "--frames",
            "33",
            "--seed",
            str(seed),
            "--latents",
            str(path),
            "--out",
            str(path.with_suffix(".mp4")),
        ]
        assert main(["generate", "--prompt", prompt, *options]) == 0
        return load_file(path)["latents"]

    plain = latents(rest, 3)
    assert torch.equal(latents(f"0s [seed 3]: {rest}", 4), plain)
    again = latents(f"0s: {rest}; 0.6s [seed 4]:; 1.4s [seed own]:", 3)
    assert torch.equal(again[:3], plain[:3])
    assert not torch.equal(again[3:6], plain[3:6])
    assert torch.equal(again, latents(f"0s [seed 3, 8 fps]: {rest}; 1.2s [seed own]:; 2.8s [seed 3]:", 4))


def test_schedules_that_do_not_fit_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["generate", "--out", str(tmp_path / "x.mp4"), "--prompt"]
    for prompt, words in (
        ("0s: a; 9s: b", "the video ends"),
        ("2s: a; 3s: b", "begins at 2s"),
        ("0s: a; 0.1s: b", "same chunk"),
    ):
        assert main([*options, prompt]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()


def test_a_decade_is_a_prompt_and_the_command_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, however many videos are made of it."""
    (tmp_path / "prompts.txt").write_text("1990s: a neon street\n", encoding="utf-8")
    options = ["generate", "--frames", "9", "--steps", "1000", "--samples", "2", "--out", str(tmp_path / "out")]
    assert main([*options, "--prompt-file", str(tmp_path / "prompts.txt"), "--json"]) == 0
    assert caplog.messages.count(schedule_note("1990s: a neon street")) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [row["prompt"] for row in rows] == ["1990s: a neon street"] * 2


# -------------------------------------------------------------- once more --
class Reseeded:
    """Noise whose seed depends on the chunk, as a person changes it."""

    def __init__(self, seeds: dict[int, int]) -> None:
        self.seeds = seeds

    def draw(self, start_frame: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return SeededNoise(self.seeds.get(start_frame, 0)).draw(start_frame, step, shape)


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (6, 1)])
@pytest.mark.parametrize("history", [None, "recode", "keep"])
def test_a_chunk_made_once_more_is_as_if_made_so_at_first(
    length: int, window: int, sink: int, history: str | None
) -> None:
    """Other noise, or also another prompt, in the second attempt: later chunks and the cache are bit-exact."""
    causal, frames, target = CausalConfig(length, window, sink), 12, 6
    one, other = random_text(), random_text(seed=1)

    def run(seeds: dict[int, int], *, is_changed: bool) -> tuple[Any, list[KVCache]]:
        wanted = {target: PromptChange(other, history)} if history and is_changed else {}
        network = random_wan()
        caches = new_caches(network, one, 1, (frames, *FRAME), causal)
        chunks = rollout(
            Guided(network, one, caches=caches),
            noise=Reseeded(seeds),
            latent_shape=(frames, *FRAME),
            causal=causal,
            steps=STEPS,
            commit_last=True,
            prompt_at=wanted.get,
        )
        return (chunks, wanted), caches

    with torch.no_grad():
        (chunks, _), expected_caches = run({target: 7}, is_changed=True)
        expected = torch.cat([result.latents_BTCHW for result in chunks], 1)
        seeds = {target: 3}
        (chunks, wanted), caches = run(seeds, is_changed=False)
        actual = []
        for result in chunks:
            while result.start_frame == target and seeds[target] == 3:
                seeds[target] = 7
                if history:
                    wanted[target] = PromptChange(other, history)
                first, result = result, chunks.send(True)
                assert result.start_frame == target
                assert not torch.equal(result.latents_BTCHW, first.latents_BTCHW)
            actual.append(result.latents_BTCHW)
    assert torch.equal(torch.cat(actual, 1), expected)
    assert torch.equal(ordered(caches[0], 1)[0], ordered(expected_caches[0], 1)[0])


def test_a_history_that_is_no_history_is_refused() -> None:
    with pytest.raises(ValueError, match="use recode or keep"):
        PromptChange(random_text(), "forget")
