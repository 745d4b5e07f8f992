"""The house's structure: tests/support/house.py counts, and each broken rule fails here with its file and line.

Who imports whom is in tests/repo/test_imports.py: nodes and train never meet, machinery imports no node, no circles.
"""

from __future__ import annotations

import inspect
import re

import pytest

from selfforcing_core.rollout import rollout
from tests.support.house import (
    ALPHABET,
    COMMENTS_GOAL,
    PACKAGES,
    ROOT,
    RULES,
    Source,
    Violation,
    comments_per_thousand,
    format_skips,
    legend,
    read_sources,
    shape_suffix,
)
from tests.support.trace import hops

# They only go down, towards none.
MAX_FORMAT_SKIPS = 14
MAX_HOPS = 152  # from file to file before the first line of the rollout; docs/decisions.md says what they are

SOURCES = read_sources(ROOT)
BROKEN = [violation for rule in RULES.values() for violation in rule(SOURCES)]


def lines(violations: list[Violation]) -> str:
    return "\n".join(map(str, violations))


def test_sources_are_read() -> None:
    assert {source.room for source in SOURCES} == {"", *PACKAGES, "bench", "workflows"}
    assert len(SOURCES) > 100, "the search for sources found next to nothing"


@pytest.mark.parametrize("path", [source.path for source in SOURCES])
def test_every_rule_holds_in_file(path: str) -> None:
    violations = [violation for violation in BROKEN if violation.path == path]
    assert not violations, lines(violations)


def test_no_rule_finds_anything_outside_the_files() -> None:
    """So that a file name that is listed as shared, and no longer is, fails here."""
    known = {source.path for source in SOURCES}
    violations = [violation for violation in BROKEN if violation.path not in known]
    assert not violations, lines(violations)


def test_a_run_goes_from_file_to_file_no_more_often_than_before() -> None:
    entered = hops()
    assert len(entered) <= MAX_HOPS, "\n".join(f"{name} {function}" for name, function in entered)
    assert {"generate/plan.py", "weights/checkpoint.py", "model.py"} <= {name for name, _ in entered}


def test_the_rollout_fits_on_a_page() -> None:
    """So that it reads like algorithm 1."""
    assert len(inspect.getsource(rollout).splitlines()) <= 50
    assert len(inspect.signature(rollout).parameters) <= 10


def test_formatting_is_overruled_no_more_often_than_before() -> None:
    skips = format_skips([*SOURCES, *read_sources(ROOT, ("tests",))])
    assert len(skips) <= MAX_FORMAT_SKIPS, lines(skips)


@pytest.mark.parametrize("package", PACKAGES)
def test_comments_say_why(package: str) -> None:
    assert comments_per_thousand([source for source in SOURCES if source.room == package]) >= COMMENTS_GOAL


def test_alphabet_is_that_of_the_map() -> None:
    text = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    sentence = re.search(r"Letters of tensors: (.*?)\.\n", text, re.DOTALL)
    assert sentence is not None
    _, meanings = legend(Source("map.py", f'"""Letters: {sentence[1]}."""'))
    assert meanings == {letter: words[0] for letter, words in ALPHABET.items()}


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        ("class name", {"train/a.py": "class A: pass", "train/tiny/b.py": "class A: pass"}),
        ("file name", {"train/text.py": "", "nodes/text.py": ""}),
        ("parameters", {"train/a.py": "def f(a, b, c, d, e, g, h, i, j): pass"}),
        ("parameters", {"train/a.py": "def f(*, a, b, c, d, e, g, h, i, j, k, l, m, n): pass"}),
        ("docstring", {"train/a.py": "def f():\n    '''The sum.'''"}),
        ("letters", {"train/a.py": "x_BT = 1"}),
        ("letters", {"train/a.py": '"""Letters: B batch, T text tokens."""\nx_BT = 1'}),
        ("letters", {"train/a.py": '"""Letters: B batch, T latent frames."""\nx_B = 1'}),
        ("letters", {"train/a.py": '"""Letters: B batch, X text tokens."""\nx_BX = 1'}),
        ("unused", {"train/a.py": "def f():\n    return f()"}),
        ("unused", {"train/a.py": "class A:\n    def f(self): pass\nA()", "train/b.py": "def f(): pass\nf()"}),
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


def test_shapes_in_prose_use_their_letters() -> None:
    source = Source("train/a.py", '"""Letters: B batch."""\ndef f():\n    "Return weights, [B, 3]."')
    assert not list(RULES["letters"]([source]))


def test_what_comfyui_dictates_may_be_long() -> None:
    names = ", ".join("abcdefghijklm")
    node = f"class A(io.ComfyNode):\n    def execute(cls, {names}): pass\n    def other(cls, {names}): pass"
    violations = list(RULES["parameters"]([Source("nodes/a.py", node)]))
    assert [violation.line for violation in violations] == [3]


def test_the_formatter_is_kept_off_by_comments_alone() -> None:
    # Assembled, so that this file does not count itself.
    text = f"x = 1  # {'fmt'}: skip\n# {'fmt'}: off\ny = '# {'fmt'}: skip'\n"
    assert [violation.line for violation in format_skips([Source("train/a.py", text)])] == [1, 2]
