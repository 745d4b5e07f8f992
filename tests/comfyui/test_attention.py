"""The attention that ComfyUI is started with is that of our causal passes, measured there by inside_attention.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.conftest import checkouts
from tests.comfyui.host_server import ROOT, Checkout
from tests.comfyui.test_inside import ROUNDING

OPTIONS = {
    "": ("attention_sub_quad", "torch"),  # what ComfyUI takes without a GPU; ours stays torch's
    "--use-sage-attention": ("attention_sage", "sage"),
    "--use-flash-attention": ("attention_flash", "flash"),
    "--use-split-cross-attention": ("attention_split", None),
    "--use-quad-cross-attention": ("attention_sub_quad", None),
}


@pytest.mark.parametrize("checkout", checkouts())
@pytest.mark.parametrize("option", OPTIONS)
def test_the_attention_of_the_command_line_is_used(checkout: Checkout, option: str, tmp_path: Path) -> None:
    """As one chunk ComfyUI's own pass, in chunks the core's video; the package is asked, torch's attention is not."""
    function, package = OPTIONS[option]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        checkout.python,
        Path(__file__).with_name("inside_attention.py"),
        ROOT,
        tmp_path,
        *filter(None, [option]),
    ]
    process = subprocess.run(
        command, cwd=checkout.path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    assert report["function"] == function
    assert max(report[name]["difference"] for name in ("t2v", "i2v")) < 2 * ROUNDING
    assert max(report["in_chunks"], report["compiled"]) < ROUNDING
    assert 0 < report["from_int8"] < 0.005
    assert len(set(report["lines"])) == 1
    named = "torch's scaled_dot_product_attention" if package == "torch" else f"ComfyUI's {function}"
    assert named in report["lines"][0]
    calls = [report["in_chunks_calls"], report["from_int8_calls"], report["compiled_calls"]]
    if package is None:
        assert calls == [{}, {}, {}]
    elif package == "torch":
        assert calls[0].keys() == {"torch"}
    else:  # 2 layers, 2 chunks of 4 steps and one pass into the cache between them, own tokens and text
        assert calls == [{package: 36}, {package: 36}, {package: 18}], "text is inside what is compiled"
        # both prompts in one batch there, one after the other here
        assert report["t2v"]["ours"] == {name: 2 * count for name, count in report["t2v"]["hosts"].items()}
        # ComfyUI 0.33 keeps the image to torch, where the package may make NaN; ours does so with older ones too
        assert sum(report["i2v"]["ours"].values()) == 2 * sum(report["i2v"]["hosts"].values())
