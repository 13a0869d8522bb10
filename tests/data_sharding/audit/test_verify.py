"""``dreamscale verify`` finds missing and changed bytes of a dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_sharding.audit.inspect_dataset import main as inspect
from data_sharding.audit.verify import main
from data_sharding.dataset.manifest import Manifest


@pytest.fixture
def copy(unpaired_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unpaired_dataset, tmp_path / "copy"))


def test_intact_dataset_passes(unpaired_dataset: Path, capsys) -> None:
    assert main([str(unpaired_dataset)]) == 0
    assert "all bytes and counts agree" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_flipped_bit_is_found(copy: Path, capsys, suffix: str) -> None:
    path = copy / "train" / f"000001{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"train/000001{suffix}: its sha256" in out and "1 faults" in out


def test_missing_truncated_and_extra_shards_are_found(copy: Path, capsys) -> None:
    (copy / "val" / "000000.tar").unlink()
    tar = copy / "train" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    shutil.copy(copy / "train" / "000001.tar", copy / "train" / "000009.tar")
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert (
        "val/000000.tar: missing" in out
        and "train/000000.tar: " in out
        and "train/000009.tar: the manifest does not list this shard" in out
    )


def test_wrong_sample_count_is_found(copy: Path, capsys) -> None:
    text = (copy / "manifest.json").read_text()
    number = Manifest.read(copy).splits["train"][0].samples
    (copy / "manifest.json").write_text(text.replace(f'"samples": {number}', f'"samples": {number + 1}', 1))
    assert main([str(copy)]) == 1
    assert "the manifest says" in capsys.readouterr().out


def test_missing_dataset_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2 and main([str(tmp_path / "gone")]) == 2
    assert inspect([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
