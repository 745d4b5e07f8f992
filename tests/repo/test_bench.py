"""The benchmark's arithmetic, and that its report is whole. No speed is asserted here."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import rollout as bench
from bench.needs import needs
from bench.policies import ROOT, Maker, endure, link_to, measure, sizes_for, table, update_page
from bench.policy_costs import FOUR, PUBLISHED, costs_table, passes
from bench.policy_pictures import COLOURS, FOLDER, MARK_WORDS, contact_sheet, picture, seen_by_chunks
from selfforcing_core.chosen_memory import CHOSEN
from selfforcing_core.config import NETWORK_SIZES, CausalConfig, WanConfig
from selfforcing_core.memory import AVERAGE
from selfforcing_core.policy import POLICIES

TINY = bench.Case(WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=8), 4, 4, 6, 2, 0.5)


def test_flops_of_a_pass_agree_with_counting_by_hand() -> None:
    """1.3B at 480x832: per token 30 blocks of 6 D^2 + 2 D F and 64 D at each end; attention 4 L S D per layer."""
    tokens, visible, D, F = 4680, 32760, 1536, 8960
    linear = 2 * tokens * (30 * (6 * D * D + 2 * D * F) + 2 * 64 * D)
    attention = 4 * tokens * (visible + 512) * D * 30
    assert bench.pass_flops(NETWORK_SIZES["t2v-1.3b"], tokens, visible) == linear + attention


def test_the_last_chunk_has_no_clean_pass_and_later_chunks_see_more() -> None:
    one = [bench.pass_flops(TINY.config, 12, visible) for visible in (12, 24)]
    assert bench.chunk_flops(TINY, 0, is_last=False) == 5 * one[0]
    assert bench.chunk_flops(TINY, 1, is_last=True) == 4 * one[1]
    assert one[1] - one[0] == 4 * 12 * 12 * 32 * 2


def test_a_share_is_the_flops_over_the_cpu_time_over_the_rate() -> None:
    flops = [bench.chunk_flops(TINY, i, is_last=i == 1) for i in range(2)]
    goals = zip(flops, (0.5, 0.25), (1e9, 2e9))
    timings = [{"seconds": 1.0, "cpu_seconds": n / rate / share, "matmul": rate} for n, share, rate in goals]
    actual = bench.shares(TINY, timings)
    assert [row["share_of_matmul"] for row in actual["chunks"]] == pytest.approx([0.5, 0.25], abs=1e-4)
    assert 0.25 < actual["share_of_matmul"] < 0.5


def test_a_case_reports_every_chunk_and_what_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", {"tiny": TINY})
    monkeypatch.setattr(bench, "MATMUL_SIZE", 64)
    threads = torch.get_num_threads()
    try:
        case = bench.measure("tiny")
    finally:
        torch.set_num_threads(threads)
    columns = {"seconds", "cpu_seconds", "gflop", "matmul_gflops", "share_of_matmul"}
    assert [set(row) for row in case["chunks"]] == [columns] * 2
    assert case["memory"]["kv_cache"] == 2 * 2 * 6 * 4 * 32 * 4
    assert {"cpu", "torch", "python"} <= set(bench.hardware())
    json.dumps(case)


def test_what_a_card_must_hold_is_counted_as_the_command_line_counts_it() -> None:
    """1.3B in 16 bits at 480x832 with 21 latent frames: 30 layers of keys and values of 1,560 tokens a frame."""
    case = needs("t2v-1.3b", 832, 480, 81, -1, 2)
    keys_and_values = 2 * 30 * (21 * 1560 + 512) * 1536 * 2
    assert case["gigabytes"]["caches"] == round(keys_and_values / 1e9, 2)
    halved = needs("t2v-1.3b", 832, 480, 81, -1, 1)
    assert halved["gigabytes"]["weights"] == pytest.approx(case["gigabytes"]["weights"] / 2, abs=0.01)
    assert needs("t2v-1.3b", 832, 480, 81, 9, 2)["gigabytes_together"] < case["gigabytes_together"]
    assert case["fps_at_most"]["rtx-4090"] < case["fps_at_most"]["h100"]


def test_policies_are_drawn_from_the_cache_itself() -> None:
    """The sink stands before the window, averages behind it, and the chunk sees as many frames as its window."""
    causal = CausalConfig(3, 9, 3, policy="memrope")
    last = seen_by_chunks(causal, 5)[-1]
    assert last.slots == ((0, 6), (1, 7), (2, 8), (AVERAGE, 9), (AVERAGE, 10), (11, 11), (12, 12), (13, 13), (14, 14))
    drawn = picture("memrope", causal)
    assert drawn.count(COLOURS["average"]) == 2 * 6 + 1, "in every chunk that evicts, and in the legend"
    ElementTree.fromstring(drawn)


def test_a_picture_shows_what_is_no_plain_window() -> None:
    """Joint passes with their frames, a bank, what the device chose, pinned shots, and a window's first picture."""
    joint = seen_by_chunks(CausalConfig(3, 15, 3, policy="rolling-forcing"), 7)[-1]
    assert joint.frames == range(18, 21)
    assert [frame for frame, _ in joint.slots] == [0, 1, 2, *range(18, 30)], "nothing that is hidden from the pass"
    assert joint.num_joint == 9
    chosen = seen_by_chunks(CausalConfig(1, 9, 3, policy="sdv2"), 11)[-1]
    assert [frame for frame, _ in chosen.slots] == [CHOSEN] * 8 + [10]
    assert [row.num_banked for row in seen_by_chunks(CausalConfig(3, 9, 3, policy="memflow"), 8)][::3] == [0, 1, 2]
    shot = seen_by_chunks(CausalConfig(3, 9, 3, policy="longlive2"))[-1]
    assert shot.slots[3:6] == ((15, 23), (16, 24), (17, 25))
    assert shot.pinned == range(15, 18)
    drawn = picture("krea", CausalConfig(3, 9, 0, policy="krea"))
    assert drawn.count(COLOURS["first"]) == 6 + 1, "in every chunk behind the first window, and in the legend"


def test_a_picture_marks_what_was_written_under_the_next_prompt() -> None:
    """Chunk by chunk with the sink, in one pass without it, with a sink that moves, or nothing."""
    expected = {
        "self-forcing": {0, 1, 2, *range(9, 15)},
        "longlive": {*range(9, 15)},
        "longlive-interactive": {*range(6, 15)},
        "infinite": set(),
    }
    for name, frames in expected.items():
        causal = CausalConfig(3, 9, 3, policy=name)
        assert seen_by_chunks(causal)[-1].rewritten == frames, name
        assert (MARK_WORDS in picture(name, causal)) == bool(frames)


def test_the_pictures_in_the_documents_are_those_of_the_code() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(POLICIES)
    for name in POLICIES:
        drawn = picture(name, sizes_for(name))
        message = f"{name}: draw it again, python -m bench.policies --pictures"
        assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn, message
        ElementTree.fromstring(drawn)


def test_passes_of_a_chunk_are_counted_in_the_rollout() -> None:
    """Four steps and the pass that writes; a joint pass goes over all chunks on the way."""
    plain = [3] * 5
    assert passes(CausalConfig(3, 9, 3), FOUR) == (plain, [3] * 3)
    assert passes(CausalConfig(3, 9, 3, policy="longlive"), FOUR) == (plain, [6])
    assert passes(CausalConfig(3, 9, 3, policy="longlive-interactive"), FOUR) == (plain, [9])
    assert passes(CausalConfig(3, 15, 3, policy="rolling-forcing"), FOUR) == ([3, 12], [])
    assert passes(CausalConfig(3, 9, policy="krea"), FOUR) == ([3] * 6, []), "two chunks before it are written again"
    assert set(PUBLISHED) == set(POLICIES)


def test_the_costs_in_the_document_are_those_of_the_result_file() -> None:
    file = ROOT / "bench" / "results" / "policy-costs.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert set(report["policies"]) == set(POLICIES)
    assert costs_table(report, link_to(file)) in (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


def test_a_section_of_a_page_needs_its_marks_and_a_link_a_file_of_the_repository(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n[old]\nb\n", encoding="utf-8")
    update_page("new", ("[", "]"), page)
    assert page.read_text(encoding="utf-8") == "a\n[\nnew\n]\nb\n"
    with pytest.raises(ValueError, match=r"page\.md lacks the marks <begin> and <end>"):
        update_page("new", ("<begin>", "<end>"), page)
    assert link_to(ROOT / "bench" / "results" / "x.json") == "[x.json](../bench/results/x.json)"
    with pytest.raises(ValueError, match="is outside of"):
        link_to(tmp_path / "x.json")


def test_every_policy_is_measured_in_a_size_that_it_takes(tmp_path: Path) -> None:
    """The short form of the long commands: finite, of equal size, and a row of the table for each."""
    maker = Maker()
    rows = endure(maker, ["self-forcing", "reward", "rolling-sink"], 14)["policies"]
    for name, row in rows.items():
        assert row["is_finite"], name
        assert row["bytes_grow"] == 0, name
    report, videos = measure(maker, ["infinite"], 1, 2)
    assert 0 <= report["policies"]["infinite"]["last_colour"] <= 1
    assert "| `infinite` | 3, 9, 3 |" in table(report, Path("bench/results/x.json"))
    contact_sheet(videos, tmp_path / "sheet.webp")
    assert (tmp_path / "sheet.webp").stat().st_size < 10**6
    assert all(sizes_for(name).policy == name for name in POLICIES)


def test_the_table_of_policies_has_the_costs_that_were_counted() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    counted = page[page.index("<!-- costs: begin -->") : page.index("<!-- costs: end -->")]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in counted.split("\n") if line.startswith("| `")
    ]
    assert [row[0] for row in rows] == [f"`{name}`" for name in POLICIES]
    table = page[: page.index("<!-- costs: begin -->")]
    for name, _, counted_passes, _, gigabytes, own in rows:
        (line,) = [line for line in table.split("\n") if line.startswith(f"| {name} |")]
        assert f"| {counted_passes}; {gigabytes} ({own}) |" in line
