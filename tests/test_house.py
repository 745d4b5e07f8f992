"""The house's structure: tests/house.py counts, and each broken rule fails here with its file and line."""

from __future__ import annotations

import pytest

from tests.house import (
    MAX_FORMAT_SKIPS,
    MIN_COMMENTS,
    PACKAGES,
    ROOT,
    RULES,
    Source,
    comments_per_thousand,
    format_skips,
    legend,
    read_sources,
    shape_suffix,
)

SOURCES = read_sources(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds_in_every_file(rule: str) -> None:
    assert len(SOURCES) > 50, "the search for sources found next to nothing"
    broken = list(RULES[rule](SOURCES))
    assert not broken, "\n".join(map(str, broken))


def test_formatting_is_rarely_overruled() -> None:
    assert len(format_skips([*SOURCES, *read_sources(ROOT, ("tests",))])) <= MAX_FORMAT_SKIPS


@pytest.mark.parametrize("package", PACKAGES)
def test_comments_say_why(package: str) -> None:
    assert comments_per_thousand([source for source in SOURCES if source.room == package]) >= MIN_COMMENTS


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        ("circle", {"train/a.py": "def f():\n    from train.b import g", "train/b.py": "from . import a"}),
        ("rooms", {"nodes/a.py": "from ..train import dmd"}),
        ("rooms", {"train/a.py": "import nodes.sampler"}),
        (
            "adapter",
            {"nodes/adapter/a.py": "from ..text import Encode", "nodes/text.py": "class Encode(io.ComfyNode): pass"},
        ),
        ("adapter", {"nodes/adapter/a.py": "class Encode(io.ComfyNode): pass"}),
        ("class name", {"train/a.py": "class A: pass", "train/b.py": "class A: pass"}),
        ("file name", {"train/text.py": "", "nodes/text.py": ""}),
        ("parameters", {"train/a.py": "def f(a, b, c, d, e, g, h, i, j): pass"}),
        ("parameters", {"train/a.py": "def f(*, a, b, c, d, e, g, h, i, j, k, l, m, n): pass"}),
        ("docstring", {"train/a.py": "def f():\n    '''The sum.'''"}),
        ("letters", {"train/a.py": "x_BT = 1"}),
        ("letters", {"train/a.py": '"""Letters: B batch, T text tokens."""\nx_BT = 1'}),
        ("letters", {"train/a.py": '"""Letters: B batch, T latent frames."""\nx_B = 1'}),
        ("unused", {"train/a.py": "def f():\n    return f()"}),
    ],
)
def test_planted_violation_is_found(rule: str, files: dict[str, str]) -> None:
    assert any(violation.path in files for violation in RULES[rule]([Source(*item) for item in files.items()]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("latents_BTCHW", "BTCHW"), ("x_1PE", "1PE"), ("MAX_BT", ""), ("do_POST", ""), ("num_frames", ""), ("_", "")],
)
def test_shapes_are_told_from_other_names(name: str, shape: str) -> None:
    assert shape_suffix(name) == shape


def test_legend_may_break_its_line_and_name_two_letters_at_once() -> None:
    source = Source(
        "train/a.py", '"""A.\n\nLetters: B batch, H W latent size,\nG = B times T. Values are in [0, 1].\n"""'
    )
    assert legend(source) == (3, {"B": "batch", "H": "latent size", "W": "latent size", "G": "B times T"})
