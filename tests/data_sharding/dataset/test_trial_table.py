"""The table of trials contains the same values as the JSON of every sample. A stored table is checked before use."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.dataset.trials import LISTS, NUMBERS, TEXTS
from data_sharding.processing.preprocess import PreprocessSpec

SPEC = PreprocessSpec(sfreq=100.0, highpass=0.5, lowpass=20.0, window=50, stride=50)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trials"


def write(path: Path, count: int = 30, **more: object) -> list[dict]:
    """Write trials with metadata of every kind. Some trials have no image id, electrode position, label or caption."""
    rng, metas = np.random.default_rng(0), []
    for i in range(count):
        n = 2 + i % 3
        meta = {
            "n": n,
            "sfreq": 100.0,
            "start": 0.5 * i,
            "onset": 10 if i % 5 else 0,
            "subject": f"s{i % 4}",
            "corpus": "größe",
            "image_id": "" if i == 7 else f"image {i % 6}",
            "ch_names": [f"E{k}" for k in range(n)],
            "positions": [None if k == i % 7 else [0.1 * k, 0.0, 0.2] for k in range(n)],
        }
        meta |= {"label": i % 6, "caption": f"a {i % 6}"} if i != 11 else {}
        metas.append(meta | more)
    samples = [
        Sample(key=f"t{i:03d}", eeg=rng.normal(0, 9, (m["n"], 50 + m["onset"])), meta=m) for i, m in enumerate(metas)
    ]
    write_dataset(path, {"train": samples}, SPEC, samples_per_shard=8)
    return metas


def check(data: EEGDataset, metas: list[dict]) -> None:
    assert len(data.trials) == len(data) == len(metas)
    for name in (*TEXTS, *LISTS):
        found = [data.trials.values(name)[code] for code in data.trials.codes(name)]
        assert [json.loads(v) if v and name in LISTS else v for v in found] == [meta.get(name) for meta in metas]
        assert found[3] == data.trials.text(name, 3)
    for name, (_, missing) in NUMBERS.items():
        assert data.trials.numbers(name).tolist() == [meta.get(name, missing) for meta in metas]


def test_the_table_says_what_the_json_says(tmp_path: Path) -> None:
    metas = write(tmp_path / "d")
    check(EEGDataset(tmp_path / "d"), metas)
    part = EEGDataset(tmp_path / "d", tmin=-0.1, tmax=0.5)
    assert part.left_out == 6
    check(part, [meta for meta in metas if meta["onset"]])


def test_the_part_can_be_read_first(tmp_path: Path) -> None:
    metas = write(tmp_path / "d")
    check(EEGDataset(tmp_path / "d", tmin=-0.1, tmax=0.5), [meta for meta in metas if meta["onset"]])
    check(EEGDataset(tmp_path / "d"), metas)


def test_combinations_of_texts_are_numbered(tmp_path: Path) -> None:
    metas = write(tmp_path / "d")
    names = ("corpus", "subject", "image_id", "ch_names")
    group = EEGDataset(tmp_path / "d").trials.group(*names)
    plain = [json.dumps([meta.get(name) for name in names]) for meta in metas]
    assert set(group.tolist()) == set(range(len(set(plain))))
    for a in range(30):
        assert [g == group[a] for g in group] == [text == plain[a] for text in plain]


def test_the_file_is_made_once_and_mapped(tmp_path: Path, cache: Path) -> None:
    metas = write(tmp_path / "d")
    check(EEGDataset(tmp_path / "d"), metas)
    (file,) = cache.glob("*.arrow")
    before = file.stat().st_ino
    data = EEGDataset(tmp_path / "d")
    check(data, metas)
    assert [path.stat().st_ino for path in cache.glob("*.arrow")] == [before]
    if sys.platform == "linux":
        assert str(file) in Path("/proc/self/maps").read_text()
    # A dataset is pickled without its table of trials. The process that receives the dataset opens the table's file
    # itself.
    check(pickle.loads(pickle.dumps(data)), metas)


BUILD = """
import sys, time
from pathlib import Path
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.trials import open_table
data, log = EEGDataset(sys.argv[1]), Path(sys.argv[2])
def source():
    with log.open("a") as stream:
        stream.write("built\\n")
    time.sleep(1)
    return data
print(open_table("0" * 64, len(data), source).num_rows)
"""


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    write(tmp_path / "d")
    command = [sys.executable, "-c", BUILD, str(tmp_path / "d"), str(tmp_path / "log")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in running] == ["30\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"


@pytest.mark.parametrize("fault", ["cut", "empty", "index out of range", "other digest", "other columns"])
def test_a_damaged_file_is_made_again(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture, fault: str) -> None:
    metas = write(tmp_path / "d")
    check(EEGDataset(tmp_path / "d"), metas)
    (file,) = cache.glob("*.arrow")
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    if fault == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif fault == "empty":
        file.write_bytes(b"")
    else:
        if fault == "index out of range":
            data = bytearray(file.read_bytes())
            codes = table.column("subject").chunk(0).indices.to_numpy().tobytes()
            at = data.index(codes)
            data[at : at + 4] = np.int32(1000).tobytes()
            file.write_bytes(data)
        else:
            if fault == "other digest":
                table = table.replace_schema_metadata({"dreamscale_trials": "0" * 64})
            else:
                table = table.drop_columns(["caption"])
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    check(EEGDataset(tmp_path / "d"), metas)
    assert "is damaged" in capsys.readouterr().out
    check(EEGDataset(tmp_path / "d"), metas)
    assert not capsys.readouterr().out


def test_a_changed_dataset_gets_another_table(tmp_path: Path, cache: Path) -> None:
    for more in ({}, {"caption": "another"}):
        metas = write(tmp_path / "d", **more)
        check(EEGDataset(tmp_path / "d"), metas)
    # Replace the shards but not the manifest, as another person may do. The old and new shards have equal sizes, so the
    # dataset opens.
    write(tmp_path / "e", caption="ANOTHER")
    for name in ("000000.tar", "000000.idx"):
        (tmp_path / "d" / "train" / name).write_bytes((tmp_path / "e" / "train" / name).read_bytes())
    found = EEGDataset(tmp_path / "d").trials
    assert [found.text("caption", number) for number in (7, 8)] == ["ANOTHER", "another"]
    assert len(list(cache.glob("*.arrow"))) == 3


def test_old_files_are_deleted(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "d")
    assert len(EEGDataset(tmp_path / "d").trials) == 30
    (file,) = cache.glob("*.arrow")
    os.utime(file, (0, 0))
    write(tmp_path / "e")
    assert len(EEGDataset(tmp_path / "e").trials) == 30
    assert not file.exists() and len(list(cache.glob("*.arrow"))) == 1


def test_without_a_folder_every_process_makes_its_own(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    metas = write(tmp_path / "d")
    cache.parent.mkdir()
    cache.write_text("a file in place of the folder")
    check(EEGDataset(tmp_path / "d"), metas)
    assert "cannot be kept" in capsys.readouterr().out


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    write(tmp_path / "d", label=2**70)
    with pytest.raises(RequestError, match=r"000000\.tar: sample 0: its JSON has a number that is too large"):
        EEGDataset(tmp_path / "d").trials  # noqa: B018 - the property reads the samples
