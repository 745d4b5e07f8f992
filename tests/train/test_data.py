"""Databases of clips: the reference's are read, ours are the same and record what the reference forgets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from train.data import ClipDatabase, DatabaseWriter, read_pairs, write_shards
from train.make_lmdb import main

SHAPE = (3, 16, 4, 6)


def latents(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four files, the last a prompt that was there before; one of them with latents that are no numbers."""
    folder = tmp_path / "pt"
    (folder / "below").mkdir(parents=True)
    for name, prompt, seed in (("0", "a", 0), ("1", "b", 1), ("below/2", "c", 2), ("below/3", "a", 3)):
        torch.save({prompt: latents(seed)}, folder / f"{name}.pt")
    torch.save({"broken": latents(4) / 0}, folder / "4.pt")
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_written_is_read_back(
    pairs: Path, tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--data_path", str(pairs), "--lmdb_path", str(out), "--num_shards", str(shards)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["written"], report["duplicate_prompts"], report["not_numbers"]) == (3, 1, 1)
    rows = [ClipDatabase(out)[index] for index in range(len(ClipDatabase(out)))]
    actual = {row.prompt: row.states for row in rows}
    for prompt, seed in (("a", 0), ("b", 1), ("c", 2)):
        assert torch.equal(actual[prompt], latents(seed).half().float())


def test_pictures_come_with_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("pt", "mp4", "txt"):
        (tmp_path / folder).mkdir()
    for name in ("x", "y"):
        torch.save({"held": latents(0)}, tmp_path / "pt" / f"{name}.pt")
    (tmp_path / "txt/x.txt").write_text("a long prompt", encoding="utf-8")
    with av.open(str(tmp_path / "mp4/x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 255, np.uint8), format="rgb24")
        container.mux([*stream.encode(picture), *stream.encode(None)])
    paths = ["--video_path", str(tmp_path / "mp4"), "--prompt_path", str(tmp_path / "txt")]
    assert main(["--data_path", str(tmp_path / "pt"), "--lmdb_path", str(tmp_path / "out"), *paths]) == 0
    assert json.loads(capsys.readouterr().out)["missing_files"] == 1
    (row,) = [ClipDatabase(tmp_path / "out")[0]]
    assert row.prompt == "a long prompt"
    assert row.image_RHW is not None
    assert row.image_RHW.shape == (3, 16, 32)
    assert row.image_RHW.min() > 0.9


def test_mistakes_are_named(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/a.pt").write_bytes(b"junk")
    (tmp_path / "tensor").mkdir()
    torch.save(latents(0), tmp_path / "tensor/a.pt")
    for folder, words in (("empty", "holds no .pt file"), ("junk", "cannot be read"), ("tensor", "no dictionary")):
        assert main(["--data_path", str(tmp_path / folder), "--lmdb_path", str(tmp_path / f"o{folder}")]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "mixed").mkdir()
    for name, shape in (("a", SHAPE), ("b", (2, 16, 4, 6))):
        torch.save({name: latents(0, shape)}, tmp_path / "mixed" / f"{name}.pt")
    assert main(["--data_path", str(tmp_path / "mixed"), "--lmdb_path", str(tmp_path / "omixed")]) == 2
    assert "among others" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "omixed" in path.name], "no half-written database"
    assert main(["--data_path", str(pairs), "--lmdb_path", str(tmp_path / "two")]) == 0
    assert main(["--data_path", str(pairs), "--lmdb_path", str(tmp_path / "two")]) == 2
    assert "already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds no data\.mdb"):
        ClipDatabase(tmp_path / "empty")
    writer = DatabaseWriter(tmp_path / "shapes")
    writer.add("a", latents(0)[0])
    with pytest.raises(ValueError, match="among others"):
        writer.add("b", latents(0, (2, 16, 4, 6))[0])
    writer.close()


def test_a_row_that_is_not_numbers_is_named(tmp_path: Path) -> None:
    writer = DatabaseWriter(tmp_path / "nan")
    writer.add("bad row", latents(0)[0] / 0)
    writer.close()
    with pytest.raises(ValueError, match="'bad row'"):
        ClipDatabase(tmp_path / "nan")[0]


def test_trajectories_keep_their_states(tmp_path: Path) -> None:
    torch.save({"p": latents(0, (5, *SHAPE))}, tmp_path / "a.pt")
    ((prompt, states),) = read_pairs(tmp_path / "a.pt")
    writer = DatabaseWriter(tmp_path / "ode")
    writer.add(prompt, states)
    writer.close()
    assert ClipDatabase(tmp_path / "ode")[0].states.shape == (5, *SHAPE)


def test_images_of_several_sizes_lie_beside_each_other(tmp_path: Path) -> None:
    """Two orientations have the same number of bytes: the size is each row's own."""
    writer = DatabaseWriter(tmp_path / "clips")
    wide, upright = torch.zeros(4, 6, 3, dtype=torch.uint8), torch.zeros(6, 4, 3, dtype=torch.uint8)
    wide[:, :3], upright[:3] = 255, 255
    for name, image in (("wide", wide), ("upright", upright), ("small", upright[:3])):
        writer.add(name, torch.zeros(1, 16, 2, 2), image)
    writer.close()
    data = ClipDatabase(tmp_path / "clips")
    for index, image in enumerate((wide, upright, upright[:3])):
        actual = data[index].image_RHW
        assert actual is not None
        assert torch.equal(actual, image.permute(2, 0, 1).float() / 127.5 - 1)


def test_a_small_database_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    writer = DatabaseWriter(tmp_path / "clips")
    for index in range(8):
        writer.add(f"prompt {index}", torch.zeros(2, 16, 32, 32))
    writer.close()
    file = tmp_path / "clips" / "data.mdb"
    assert len(ClipDatabase(tmp_path / "clips")) == 8
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="is cut off"):
        ClipDatabase(tmp_path / "clips")


def test_shards_without_rows_are_left_out(tmp_path: Path) -> None:
    rows = [(0, "one", torch.zeros(1, 16, 2, 2), None), (3, "two", torch.zeros(1, 16, 2, 2), None)]
    assert write_shards(rows, tmp_path / "shards", 5)["written"] == 2
    assert {row.prompt for row in map(ClipDatabase(tmp_path / "shards").__getitem__, range(2))} == {"one", "two"}
