"""Local paths and object-store paths behave in the same way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import as_path, commit_folder, file_state, is_remote, localised, put


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | UPath]:
    if request.param == "local":
        yield tmp_path / "place"
        return
    root = as_path(f"memory://{tmp_path.name}")
    yield root
    root.fs.store.clear()


def make_folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def test_local_path_or_file_url_becomes_a_path(tmp_path: Path) -> None:
    for text in (str(tmp_path), tmp_path, f"file://{tmp_path}", UPath(tmp_path)):
        path = as_path(text)
        assert type(path) is type(tmp_path) and path == tmp_path and not is_remote(path)
    assert as_path("~/x") == Path.home() / "x" and as_path("a/b") == Path("a/b")


def test_url_is_remote_and_unknown_protocol_is_refused() -> None:
    path = as_path("memory://a/b.edf")
    assert is_remote(path) and path.name == "b.edf" and as_path(path) is path
    with pytest.raises(RequestError, match="fsspec does not know the protocol 'nonsense://'"):
        as_path("nonsense://a/b")


def test_localised_keeps_names_and_layout(place: Path | UPath) -> None:
    for name in ("lab/rec.mff/signal1.bin", "lab/rec.mff/sub/info.xml", "lab/other.edf"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(name.encode())
    files = [place / "lab/rec.mff/signal1.bin", place / "lab/rec.mff/sub/info.xml"]
    with localised(files) as local:
        assert [p.read_bytes().decode()[4:] for p in local] == ["rec.mff/signal1.bin", "rec.mff/sub/info.xml"]
        assert local[0].parent == local[1].parent.parent and local[0].parent.name == "rec.mff"
    assert local[0].exists() != is_remote(place)
    with localised([place / "lab/rec.mff", place / "lab/other.edf"]) as (mff, edf):
        assert (mff / "sub" / "info.xml").is_file() and mff.name == "rec.mff" and edf.parent == mff.parent
    with pytest.raises(OSError), localised([as_path("memory://nowhere/a.edf")]):
        pass


def test_folder_is_committed_once_and_completely(place: Path | UPath, tmp_path: Path) -> None:
    target = place / "parts" / "ab"
    (target / "sub").mkdir(parents=True, exist_ok=True)
    (target / "left.tar").write_text("of an attempt that died")
    commit_folder(make_folder(tmp_path / "one", train_tar="first", result_json="{}"), target)
    assert sorted(p.name for p in target.iterdir()) == ["result.json", "train.tar"]
    commit_folder(make_folder(tmp_path / "two", train_tar="again", result_json="{}"), target)
    assert (target / "train.tar").read_text() == "first"
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()
    with pytest.raises(FileNotFoundError):
        commit_folder(make_folder(tmp_path / "three", train_tar="x"), place / "parts" / "cd")


def test_put_replaces_whole_files(place: Path | UPath, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    put(tmp_path / "a", place / "x" / "a.tar")
    (tmp_path / "a").write_text("three")
    put(tmp_path / "a", place / "x" / "a.tar")
    assert (place / "x" / "a.tar").read_text() == "three" and len(list((place / "x").iterdir())) == 1


def test_file_state_changes_when_the_file_changes(place: Path | UPath) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "a").write_text("1")
    before = file_state(place / "a")
    if isinstance(place, UPath):
        (place / "a").write_text("22")
    else:
        os.utime(place / "a", ns=(1, before[1] + 1))
    assert file_state(place / "a") != before and before[0] == 1
