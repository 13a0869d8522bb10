"""Manipulated manifests, indices and tars: the error is one line, and no file outside the named folder is changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_sharding.common.errors import RequestError
from data_sharding.common.files import sha256_file
from data_sharding.common.untrusted import check_key, check_path, check_sha256, parse_json
from data_sharding.dataset.batch import collate
from data_sharding.dataset.cache import ShardCache
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import decode_eeg, encode_eeg
from launch.cli import main

FOREIGN = [
    "../../x",
    "/etc/passwd",
    "a/../b",
    "..",
    "a\\b",
    "C:/x",
    "a\0b",
    "a\nb",
    ".hidden",
    "a//b",
    "e\u0301",
    "",
    5,
]
FOREIGN += [None, "\u202egnp.exe", "a/" * 40 + "b", "~/x", "$HOME", "-rf", "aux\u2024tar"]


@pytest.mark.parametrize("check", [check_key, check_path, check_sha256])
def test_names_that_lead_elsewhere_are_refused(check: Callable[[Any, str], str]) -> None:
    for value in FOREIGN:
        if value != "-rf" or check is not check_key:
            with pytest.raises(RequestError, match=r"file\.json: damaged"):
                check(value, "file.json")
    assert check_path("train/000000.tar", "") and check_key("lab-a_B-000001", "") and check_sha256("0a" * 32, "")


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", "1e999", "1" * 400 + ".0", '{"a": 1, "a": 2}', '"\\ud800"'])
def test_json_that_readers_understand_differently_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)
    assert parse_json('["\\ud83e\\udde0", 1e200, 0.5]') == ["\N{BRAIN}", 1e200, 0.5]


def test_deep_and_huge_json_end_in_one_line(
    dataset: Any, capsys: pytest.CaptureFixture[str], run_command: Any, assert_refused: Any
) -> None:
    dataset.manifest.write_text("[" * 100_000)
    assert main(["verify", str(dataset.root)]) == 2
    assert "nested too deeply" in capsys.readouterr().err
    with dataset.manifest.open("wb") as stream:
        stream.truncate(10**10)  # a sparse file, which takes no space on the disk
    assert_refused(run_command("verify", dataset.root), "manifest.json", "larger than")


CHANGES = {
    "path": [{"path": path} for path in ("../../other/000000.tar", "/etc/shadow", "train/../../x.tar", "train\\0.tar")],
    "sha256": [{"sha256": value} for value in ("*", "../../x", "0" * 63 + "g", "A" * 64, None)],
    "index_sha256": [{"index_sha256": "../" * 22}],
    "samples": [{"samples": value} for value in (10**12, -5, 1.5, "4", True, None)],
    "bytes": [{"bytes": value} for value in (-1, 10**30, "x")],
    "kind": [{"path": "manifest.json"}, {"unknown": 1}],
}


@pytest.mark.parametrize("values", [value for values in CHANGES.values() for value in values], ids=str)
def test_changed_shard_in_a_manifest_is_refused(dataset: Any, values: dict[str, Any], capfd: Any) -> None:
    dataset.change_shard(**values)
    for words in (["verify"], ["inspect"], ["verify", "--content", "false"]):
        assert main([words[0], str(dataset.root), *words[1:]]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "manifest.json" in error
    with pytest.raises(RequestError, match=r"manifest\.json"):
        EEGDataset(dataset.root)


@pytest.mark.parametrize(
    "values",
    [
        {"splits": []},
        {"splits": {"../x": []}},
        {"splits": {"train": [[]]}},
        {"splits": None},
        {"labels": [1]},
        {"counts": {"found": "many"}},
        {"hours": {"found": None}},
        {"preprocess": {"window": 10**9}},
        {"preprocess": {"highpass": 1e-12}},
        {"preprocess": {"notch": 1e-9}},
        {"preprocess": {"notch_width_hz": 1e-9}},
        {"preprocess": []},
        {"extra": 1},
        {"extra": {"corpora": 5}},
        {"extra": {"corpora": [5]}},
        {"config": {"split": 5}},
        {"config": {"corpora": "x"}},
        {"config": {"corpora": [None]}},
        {"config": {"hold_back": "x"}},
        {"schema": "\x1b[31m" * 10**5},
        {"preprocess": {"quality": 5}},
        {"preprocess": {"scaling": "x"}},
        {"dataset_id": 5},
    ],
    ids=str,
)
def test_changed_manifest_is_refused(dataset: Any, values: dict[str, Any], capfd: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        spec = {**manifest["preprocess"], **values["preprocess"]} if values.get("preprocess") else None
        manifest.update({**values, **({"preprocess": spec} if spec else {})})

    dataset.change_manifest(change)
    assert main(["verify", str(dataset.root)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "manifest.json" in error and len(error) < 600


def test_checksum_cannot_delete_files_of_another_folder(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / ".precious.txt").write_text("x")
    cache = ShardCache(1.0, tmp_path / "cache")
    for sha256 in ("../../other/.precious", f"{other}/", "*", "a" * 64 + "/..", ""):
        with pytest.raises(RequestError, match="is not a SHA-256 checksum"):
            cache.open(tmp_path / "x.tar", sha256, 10)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".precious.txt"]


def test_cache_reserves_no_space_for_a_size_that_the_store_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x" * 100)
    cache = ShardCache(100.0, tmp_path / "cache")
    with pytest.raises(RequestError, match="the file has 100 bytes, the manifest says 50000000000"):
        cache.open(tmp_path / "x.tar", "0" * 64, 50 * 10**9)


def _places(name: str, place: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda entries: entries[1]["members"].update({name: place})


@pytest.mark.parametrize(
    "change",
    [
        _places("eeg.npy.zst", [2560, 3 * 10**9]),
        _places("json", [2560, 3 * 10**9]),
        _places("json", [2**63, 5]),
        _places("json", [-512, 5]),
        _places("json", [10**40, 5]),
        _places("eeg.npy.zst", [512]),
        _places("eeg.npy.zst", [1, 2, 3, 4]),
        _places("eeg.npy.zst", {"a": 1}),
        _places("../x", [512, 10]),
        lambda entries: entries[0].update(n=10**9),
        lambda entries: entries[0].update(samples=2**40, onset=0),
        lambda entries: entries[0].update(key="../../x"),
        lambda entries: entries[0].pop("members"),
        lambda entries: entries.append(3),
        lambda entries: entries.clear(),
    ],
)
def test_changed_index_is_refused(dataset: Any, change: Callable[..., object], capfd: Any) -> None:
    dataset.change_index(change)
    assert main(["verify", str(dataset.root)]) == 1
    output = capfd.readouterr()
    assert "000000.idx" in output.out and "Traceback" not in output.err
    try:
        collate(EEGDataset(dataset.root), [0, 1, 2, 3])
    except RequestError as error:
        assert "000000" in str(error)
    else:
        assert "'../" in output.out  # Training accepts such keys and unknown members, because it does not use them.


def test_index_that_claims_3_gb_takes_no_memory(dataset: Any, run_limited: Any) -> None:
    """The tar is a sparse file of 3 GB, so the sizes in the index agree with the size of the file."""
    with dataset.tar.open("r+b") as stream:
        stream.truncate(3 * 10**9 + 10**6)
    entries = json.loads(dataset.idx.read_text())
    _places("json", [2560, 3 * 10**9])(entries)
    dataset.idx.write_text(json.dumps(entries))
    dataset.change_shard(bytes=dataset.tar.stat().st_size, index_sha256=sha256_file(dataset.idx))
    code = (
        "from data_sharding.dataset.dataset import EEGDataset\nfrom data_sharding.common.errors import run_main\n"
        "code = run_main(lambda words: EEGDataset(words[0])[1])\n"
        # The peak memory is read from /proc, because the peak in getrusage includes that of the parent process.
        "status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())\n"
        "assert int(status['VmHWM'].split()[0]) < 1e6, 'more than 1 GB'\nsys.exit(code)"
    )
    done = run_limited(code, dataset.root)
    assert done.returncode == 2 and "000000.idx" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"rec-000001", b"../../../x"),
        (b"rec-000001", b"/tmp/abcde"),
        (b"rec-000001", b"re\x1b[31mm01"),
        (b"rec-000001", b"rec.000001"),
    ],
)
def test_changed_key_in_a_tar_is_refused(dataset: Any, old: bytes, new: bytes) -> None:
    dataset.replace_in_tar(old, new)
    data = EEGDataset(dataset.root)
    for read in (lambda: data.key(1), lambda: data[1], lambda: collate(data, [1])):
        with pytest.raises(RequestError, match="no valid key") as caught:
            read()
        assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"n":2', b'"n":0'),
        (b'"n":2', b'"n":x'),
        (b'"start":0.5', b'"start":NaN'),
        (b'"start":0.5', b'"start":[5]'),
        (b'"sfreq":100.0', b'"sfreq":1e999'),
        (b'"sfreq":100.0', b'"sfreq":-1000'),
        (b'"ch_names":["Cz","Pz"]', b'"ch_names":[[],[],[],0]'[:22]),
        (b'"ch_names":["Cz","Pz"]', b'"ch_names":["Cz",[[]]]'),
        (b'"positions":[null,null]', b'"positions":[[1,2],"a" ]'[:23]),
        (b'"subject":"s"', b'"subject":[1]'),
    ],
)
def test_changed_metadata_are_refused(dataset: Any, old: bytes, new: bytes) -> None:
    dataset.replace_in_tar(old, new.ljust(len(old)))
    data = EEGDataset(dataset.root)
    with pytest.raises(RequestError, match=r"000000\.tar: sample \S+: its JSON is damaged"):
        [data[i] for i in range(4)]


@pytest.mark.parametrize("name", ["manifest.json", "train/000000.idx", "train/000000.tar"])
def test_named_pipes_do_not_make_a_command_wait(dataset: Any, name: str, run_command: Any, run_limited: Any) -> None:
    (dataset.root / name).unlink()
    os.mkfifo(dataset.root / name)
    done = run_command("verify", dataset.root)
    assert done.returncode in (1, 2) and name in done.stdout + done.stderr.replace("no manifest", "manifest")
    code = (
        "from data_sharding.dataset.dataset import EEGDataset\nfrom data_sharding.common.errors import run_main\n"
        "sys.exit(run_main(lambda words: EEGDataset(words[0])[1]))"
    )
    done = run_limited(code, dataset.root)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_compressed_windows_unpack_to_no_more_than_a_window() -> None:
    import numpy as np
    import zstandard

    window = np.ones((2, 50))
    packed = encode_eeg(window)
    assert (decode_eeg(packed, 2, 50) == 1).all()
    plain = zstandard.ZstdDecompressor().decompress(packed)
    bomb = plain + bytes(10**9)
    stated = zstandard.ZstdCompressor().compress(bomb)
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(bomb)
    assert len(stated) < 10**6
    claims = bytearray(zstandard.ZstdCompressor().compress(plain))
    for data, samples in ((stated, 50), (unstated, 50), (stated, None), (packed, 49), (packed[:-9], 50), (b"", 50)):
        with pytest.raises(ValueError, match=r"\w"):
            decode_eeg(data, 2, samples)
    # An attacker can choose every value in the header of the Zstandard frame, including the size of the content.
    for at in range(4, 14):
        changed = bytes(claims[:at]) + b"\xff" + bytes(claims[at + 1 :])
        try:
            decode_eeg(changed, 2, 50)
        except ValueError:
            continue


def test_generate_writes_only_into_its_output(tmp_path: Path, paired_dataset: Path) -> None:
    """Without checks, a key such as ../x in a tar would be used as the name of an image file."""
    import shutil

    import numpy as np

    from finetune.generation.images import generate_images
    from finetune.generation.partial import PartialFolder
    from finetune.generation.trials import list_trials
    from finetune.images import open_paired

    root = tmp_path / "paired"
    shutil.copytree(paired_dataset, root)
    tar = root / "test" / "000000.tar"
    data = bytearray(tar.read_bytes().replace(b"test-00001", b"../../../x"))
    tar.write_bytes(data)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["test"][0]["sha256"] = sha256_file(tar)
    (root / "manifest.json").write_text(json.dumps(manifest))

    out = tmp_path / "deep" / "out"
    folder = PartialFolder(out, {})
    folder.open()
    data = open_paired(root, "test")
    with pytest.raises(RequestError, match="no valid key"):
        trials = list_trials(data, [[0], [1]], [[0], [1]])
        generate_images(
            lambda batch, number: np.full((len(batch), 8, 8, 3), 128, np.uint8),
            data,
            trials,
            folder,
            texts={"control": "none"},
            batch_size=2,
        )
    assert not [path for path in tmp_path.rglob("*.png") if folder.path not in path.parents]
