"""The moving picture at the top of the README: the player while another prompt is typed.

SELFFORCING_FILM=docs/player.webp keeps it; what is kept is what the test saw.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.comfyui.host_server import PACK_NAME, Server

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FIRST = "a red square moving left slowly on a black background"
SECOND = "a blue square moving left slowly on a black background"
LARGEST = 2_000_000  # bytes, of a picture in a README
LAST_MILLISECONDS = 1500  # how long the last picture stays before the film begins again


def film_of(folder: Path, file: Path) -> None:
    """Write the pictures of a folder, each named by its milliseconds, as a looping WebP."""
    paths = sorted(folder.glob("*.png"))
    times = [int(path.stem) for path in paths]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    durations = [later - earlier for earlier, later in zip(times, times[1:])] + [LAST_MILLISECONDS]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=70, method=4)


def test_the_film_of_the_readme_shows_a_prompt_that_is_typed(server: Server, tmp_path: Path) -> None:
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium found: install the package chromium, or set CHROMIUM")
    if server.checkout.version.startswith("0.3."):
        pytest.skip("this front end draws no player in its Vue nodes")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    script = Path(__file__).with_name("film.py")
    command = [server.checkout.python, script, browser, server.address, PACK_NAME, pictures, FIRST, SECOND, "blue"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    record = json.loads(process.stdout.splitlines()[-1])
    assert record["errors"] == []
    assert record["before"] == "red"
    assert record["shown"] > record["sent"]
    file = tmp_path / "player.webp"
    film_of(pictures, file)
    with Image.open(file) as film:
        assert getattr(film, "n_frames", 1) > 20
    assert file.stat().st_size < LARGEST
    if target := os.environ.get("SELFFORCING_FILM"):
        shutil.copyfile(file, target)
