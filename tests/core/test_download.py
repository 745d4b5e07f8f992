"""Released weights by name: asked for they come, with their size known first; unasked nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from selfforcing_core.generate.cli import main
from selfforcing_core.weights import download as download_module
from selfforcing_core.weights.download import (
    RELEASES,
    download,
    downloaded_path,
    file_sizes,
    find_release,
    list_releases,
)

REPO = {"a.safetensors": 5, "checkpoints/self_forcing_dmd.pt": 7, "taew2_1.safetensors": 3}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub as every repository having the files REPO; the list tells what was fetched."""
    fetched: list[str] = []

    class Api:
        def model_info(self, repo: str, **_: Any) -> Any:
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in REPO.items()])

    def fetch(repo: str, file: str, *, local_dir: Path) -> str:
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * REPO[file])
        fetched.append(f"{repo}/{file}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return fetched


def test_a_release_comes_into_its_folder(hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "self-forcing-dmd", "--to", str(tmp_path)]) == 0
    wanted = tmp_path / "self-forcing-dmd" / "checkpoints" / "self_forcing_dmd.pt"
    assert capsys.readouterr().out.strip() == str(wanted)
    assert wanted.stat().st_size == 7
    assert hub == ["gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"]


def test_what_belongs_to_a_release_comes_with_it(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA beside its base, once for all presets of the same files; of a pipeline's folder what says how it runs."""
    monkeypatch.setitem(REPO, "models/longlive_base.pt", 4)
    monkeypatch.setitem(REPO, "models/lora.pt", 2)
    for name in ("longlive", "longlive-interactive"):
        paths = download(name, tmp_path)
        assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
            "longlive/models/longlive_base.pt",
            "longlive/models/lora.pt",
        ]
    files = set(find_release("causalwan2.2-i2v").files)
    assert files == {"transformer/*", "transformer_2/*", "scheduler/*", "model_index.json"}


def test_of_several_versions_one_is_asked_for(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of a pair has them; a part of the names chooses one of each, and nothing else is fetched."""
    stem = "wan2.2_i2v_A14b_{}_noise_lightx2v_4step{}.safetensors"
    for half in ("high", "low"):
        for version in ("", "_1030", "_720p"):
            monkeypatch.setitem(REPO, stem.format(half, version), 2_000_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e12))
    command = ["download", "lightx2v-wan2.2-i2v", "--to", str(tmp_path)]
    for more in ([], ["--only", "0"], ["--only", "fp8"]):
        assert main([*command, *more]) == 2
        line = capsys.readouterr().err
        assert "has 3 versions of one file" in line
        assert "4step_1030.safetensors (2.0 GB)" in line
        assert "--only" in line
        assert line.count("\n") == 1
    assert not hub
    for half in ("high", "low"):
        REPO[stem.format(half, "_1030")] = 3
    assert main([*command, "--only", "_1030"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == [stem.format("high", "_1030"), stem.format("low", "_1030")]
    assert downloaded_path("lightx2v-wan2.2-i2v", tmp_path).name == names[0]


def test_a_part_of_a_name_that_is_a_wildcard_finds_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "lightx2v-wan2.2-i2v"
    folder.mkdir()
    high, low = (folder / f"wan2.2_i2v_A14b_{noise}_noise_lightx2v_4step_v1.safetensors" for noise in ("high", "low"))
    high.touch()
    low.touch()
    assert downloaded_path("lightx2v-wan2.2-i2v", tmp_path) == high


def test_what_has_no_files_or_no_use_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matrix-game-2 cannot be fetched: networks that are steered by keyboard"):
        download("matrix-game-2", tmp_path)
    with pytest.raises(ValueError, match="causvid-4step cannot be fetched: where its files are was not read"):
        download("causvid-4step", tmp_path)


def test_sizes_are_those_of_the_hub(hub: list[str]) -> None:
    assert file_sizes(find_release("taehv")) == {"taew2_1.safetensors": 3}
    sizes = {row["name"]: row["bytes"] for row in list_releases(with_sizes=True)}
    assert sizes["taehv"] == 3
    assert sizes["clip"] is None
    assert not hub, "asking for sizes fetches nothing"


def test_the_list_is_there_without_a_connection(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One line says why no size is known, and the hub is asked no more; every name ends in a space."""
    asked: list[str] = []

    def refuse(release: Any) -> dict[str, int]:
        asked.append(release.repo)
        raise ValueError("the hub cannot be asked (offline); check the connection")

    monkeypatch.setattr(download_module, "file_sizes", refuse)
    assert main(["download", "--list", "--sizes"]) == 0
    shown = capsys.readouterr().out.splitlines()[::2]
    assert [line.split()[0] for line in shown] == list(RELEASES)
    assert all(line.endswith("size unknown") for line in shown)
    assert len(asked) == 1
    assert caplog.text.count("sizes stay unknown") == 1


def test_listing_names_licence_and_source_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)  # would raise when called
    assert main(["download", "--list"]) == 0
    output = capsys.readouterr().out
    for name, release in RELEASES.items():
        assert name in output
        assert release.licence in output
        assert release.source in output


def test_what_goes_wrong_is_one_line(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no release 'x'; use one of self-forcing-dmd"):
        download("x", tmp_path)
    with pytest.raises(ValueError, match=r"has no file .* any more"):
        download("clip", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match="choose another --to"):
        download("taehv", tmp_path)
    monkeypatch.undo()

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", offline)
    assert main(["download", "taehv", "--to", str(tmp_path)]) == 2
    assert "cannot be asked (no route)" in capsys.readouterr().err
    assert main(["download"]) == 2
    assert not list(tmp_path.iterdir())
