"""Tests of `keep_decoded`: a later job with other settings uses the kept signals, does not read the recordings, and
makes the same shards as without kept signals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal as signals
import subprocess
import sys
import time
from pathlib import Path

import mne
import numpy as np
import pytest
import yaml

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import as_path
from data_sharding.corpora import CorpusConfig, list_items, open_item
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SplitConfig
from data_sharding.formats.kept.codec import pack, unpack
from data_sharding.formats.kept.info import info_from_json, info_to_json
from data_sharding.formats.kept.signal import KeepingSignal, KeptSignal, NotKept
from data_sharding.formats.kept.store import limit_size
from data_sharding.formats.signal import About, Segment, SignalInfo
from data_sharding.job.process_recording import process_recording
from data_sharding.job.request import ShardConfig, reduce_config, resolve_decoded
from data_sharding.job.run import main
from data_sharding.job.task import PartResult, Task
from data_sharding.processing import streaming
from data_sharding.processing.preprocess import PreprocessSpec
from data_sharding.processing.quality import QualitySpec

QUALITY = QualitySpec(leave_out_edges=False)
FIRST = PreprocessSpec(sfreq=100, highpass=1.0, lowpass=40.0, window=100, stride=100, quality=QUALITY)
OTHER = PreprocessSpec(sfreq=80, highpass=2.0, lowpass=30.0, window=120, stride=60, quality=QUALITY)


@pytest.fixture
def process(tmp_path: Path):
    """Return a function that processes all recordings of a corpus, as a job with its own working folder does."""

    def run(
        work: str, spec: PreprocessSpec, *, keep: bool = True, root: Path | str | None = None, **corpus
    ) -> list[PartResult]:
        config = CorpusConfig(root=str(root or tmp_path / "eeg"), name="c", **corpus)
        return [
            process_recording(
                Task(
                    item=item,
                    spec=spec,
                    split=SplitConfig(val_fraction=0, test_fraction=0),
                    labels=("cat", "dog"),
                    work=tmp_path / work,
                    timeout_s=60,
                    decoded=tmp_path / "decoded" if keep else None,
                )
            )
            for item in list_items(config)
        ]

    return run


def parts(work: Path) -> dict[str, bytes]:
    """Return the content of all files below a working folder, by relative path."""
    return {str(p.relative_to(work)): p.read_bytes() for p in sorted(work.rglob("*")) if p.is_file()}


def settle(root: Path) -> None:
    """Set the times of all files to yesterday, because checksums of files that have just changed are not stored."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 86400, time.time() - 86400))


def wipe(root: Path, keep: int = 0) -> None:
    """Replace the content of all files after the first `keep` bytes, without changing their sizes and times."""
    for path in (p for p in root.rglob("*") if p.is_file()):
        status = path.stat()
        with path.open("r+b") as stream:
            stream.seek(keep)
            stream.write(os.urandom(max(0, status.st_size - keep)))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def write_epochs(raw: mne.io.RawArray, path: Path) -> None:
    events = np.column_stack([np.arange(0, raw.n_times - 400, 400), np.zeros((1,), int).repeat(4), np.ones(4, int)])
    path.parent.mkdir(parents=True, exist_ok=True)
    mne.Epochs(raw, events, tmin=0, tmax=1.995, baseline=None, preload=True).save(path, overwrite=True)


@pytest.fixture
def recordings(tmp_path: Path, make_raw, write_raw) -> Path:
    root = tmp_path / "eeg"
    write_raw(make_raw(8, 200, 9, seed=1), root / "a.edf")
    cut = make_raw(19, 250, 8, seed=2)
    cut.set_annotations(mne.Annotations([2.5, 5.0], [0, 0.4], ["New Segment", "BAD_ACQ_SKIP"]))
    write_raw(cut, root / "b.vhdr")
    write_epochs(make_raw(6, 200, 10, seed=3), root / "c-epo.fif")
    write_raw(make_raw(5, 500, 8, seed=4), root / "d_raw.fif")
    write_raw(make_raw(6, 128, 8, seed=5), root / "e.set")
    settle(root)
    return root


def test_other_settings_give_the_same_parts_without_reading_the_files(
    tmp_path: Path, recordings: Path, process, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = list_items(CorpusConfig(root=str(recordings), name="c"))
    fresh = process("fresh", OTHER, keep=False)
    assert [result.row.status for result in fresh] == ["sharded"] * 5
    assert parts(tmp_path / "fresh") != {}
    process("plain", FIRST, keep=False)
    process("first", FIRST)
    assert parts(tmp_path / "first") == parts(tmp_path / "plain")
    assert len(list((tmp_path / "decoded" / "signals").rglob("*.kept"))) == 5
    # Overwrite the complete content of the recordings. The test has listed the items of the corpus before this, because
    # listing reads the headers.
    wipe(recordings)
    monkeypatch.setitem(process.__globals__, "list_items", lambda _: items)
    assert process("other", OTHER) == fresh
    assert parts(tmp_path / "other") == parts(tmp_path / "fresh")
    # Without the kept signals, the job must read the recordings, and these recordings are damaged now.
    shutil.rmtree(tmp_path / "decoded")
    assert {result.row.status for result in process("gone", OTHER)} != {"sharded"}


def test_blocks_of_any_size(tmp_path: Path, recordings: Path, process, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = process("fresh", OTHER, keep=False)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 8 * 19 * 1024)
    process("first", FIRST)
    monkeypatch.undo()
    assert process("other", OTHER) == fresh and parts(tmp_path / "other") == parts(tmp_path / "fresh")


def test_trials(tmp_path: Path, events_corpus: Path, process, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(events_corpus, tmp_path / "copy")
    settle(tmp_path / "copy")
    corpus = {"kind": "events", "images": str(tmp_path / "copy" / "images")}
    root = tmp_path / "copy" / "eeg"
    fresh = process("fresh", OTHER, keep=False, root=root, tmax=1.7, **corpus)
    assert all(sum(result.samples.values()) == 6 for result in fresh)
    process("first", FIRST, root=root, **corpus)
    for path in root.rglob("*.eeg"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert process("other", OTHER, root=root, tmax=1.7, **corpus) == fresh
    assert parts(tmp_path / "other") == parts(tmp_path / "fresh")


def test_arrays(tmp_path: Path, process) -> None:
    root = tmp_path / "eeg"
    root.mkdir()
    x = np.random.default_rng(0).normal(0, 10, (3, 4, 400)).astype(np.float32)
    np.save(root / "a.npy", x)
    sidecar = {"sfreq": 200, "unit": "uV", "ch_names": ["Fz", "Cz", "Pz", "Oz"], "labels": ["cat", "dog", "cat"]}
    (root / "a.json").write_text(json.dumps(sidecar))
    settle(root)
    (fresh,) = process("fresh", OTHER, keep=False, kind="arrays")
    process("first", FIRST, kind="arrays")
    status = (root / "a.npy").stat()
    (root / "a.npy").write_bytes((root / "a.npy").read_bytes()[:128] + bytes(x.nbytes))
    os.utime(root / "a.npy", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fresh.row.status == "sharded" and process("other", OTHER, kind="arrays") == [fresh]
    assert parts(tmp_path / "other") == parts(tmp_path / "fresh")


def test_other_channels_are_read_from_the_files(tmp_path: Path, make_raw, write_raw, process) -> None:
    root = tmp_path / "eeg"
    raw = make_raw(4, 200, 6, names=["Fz", "Cz", "Pz", "M1"])
    raw.set_channel_types({"M1": "misc"})
    write_raw(raw, root / "a_raw.fif")
    settle(root)
    linked = dataclasses.replace(OTHER, reference=["M1"])
    (fresh,) = process("fresh", linked, keep=False)
    process("first", FIRST)
    assert process("other", linked) == [fresh] and fresh.row.status == "sharded" and not fresh.row.notes
    assert parts(tmp_path / "other") == parts(tmp_path / "fresh")
    # The second job stored the signal of the reference channel M1, but the signals that the first job stored are still
    # used.
    wanted = process("plain", dataclasses.replace(FIRST, stride=50), keep=False)
    (kept,) = (tmp_path / "decoded" / "signals").rglob("*.kept")
    inode = kept.stat().st_ino
    assert process("third", dataclasses.replace(FIRST, stride=50)) == wanted
    assert kept.stat().st_ino == inode, "the file of the signals was not written again"


def test_changed_and_moved_recordings(tmp_path: Path, make_raw, write_raw, process) -> None:
    root = tmp_path / "eeg"
    write_raw(make_raw(4, 200, 6, seed=1), root / "a_raw.fif")
    settle(root)
    (first,) = process("first", FIRST)
    # A file that was moved is recognised by its content.
    shutil.move(root, tmp_path / "moved")
    process("moved", FIRST, root=tmp_path / "moved")
    assert len(list((tmp_path / "decoded" / "signals").rglob("*.kept"))) == 1
    # A file with different content of the same size is noticed by its modification time.
    write_raw(make_raw(4, 200, 6, seed=2), root / "a_raw.fif")
    (changed,) = process("changed", FIRST)
    assert changed.row.sha256 != first.row.sha256 and changed.row.fingerprint != first.row.fingerprint
    assert len(list((tmp_path / "decoded" / "signals").rglob("*.kept"))) == 2


def test_the_checksum_of_a_file_that_has_just_changed_is_not_stored(
    tmp_path: Path, make_raw, write_raw, process
) -> None:
    write_raw(make_raw(4, 200, 6), tmp_path / "eeg" / "a_raw.fif")
    process("first", FIRST)
    assert not (tmp_path / "decoded" / "checksums").exists()
    settle(tmp_path / "eeg")
    process("second", FIRST)
    assert len(list((tmp_path / "decoded" / "checksums").rglob("*.json"))) == 1


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "footer", "tail", "other", "folder"])
def test_damaged_kept_signals_are_decoded_again(tmp_path: Path, make_raw, write_raw, process, damage: str) -> None:
    root = tmp_path / "eeg"
    write_raw(make_raw(4, 200, 6, seed=1), root / "a.edf")
    settle(root)
    (fresh,) = process("fresh", OTHER, keep=False)
    process("first", FIRST)
    (kept,) = (tmp_path / "decoded" / "signals").rglob("*.kept")
    data = kept.read_bytes()
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    elif damage == "other":
        write_raw(make_raw(4, 200, 6, seed=2), tmp_path / "second" / "a.edf")
        process("second", FIRST, root=tmp_path / "second")
        (another,) = set((tmp_path / "decoded" / "signals").rglob("*.kept")) - {kept}
        shutil.copyfile(another, kept)
    else:
        flip = {"bit": 500, "footer": len(data) - 100, "tail": len(data) - 1}.get(damage)
        if flip:
            data = data[:flip] + bytes([data[flip] ^ 1]) + data[flip + 1 :]
        kept.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    if damage == "folder":
        with pytest.raises(OSError, match="directory"):
            process("other", OTHER)
        return
    (result,) = process("other", OTHER)
    assert len(result.row.notes) == 1 and f"kept signal {kept.name} is damaged" in result.row.notes[0]
    assert dataclasses.replace(result.row, notes=[]) == fresh.row and result.part == fresh.part
    tar = Path("parts") / result.part[:2] / result.part / "train.tar"
    assert (tmp_path / "other" / tar).read_bytes() == (tmp_path / "fresh" / tar).read_bytes()
    # The job has replaced the damaged file of the kept signal, so the next job has no note.
    assert process("third", FIRST)[0].row.notes == []


def test_damaged_checksums_are_computed_again(tmp_path: Path, make_raw, write_raw, process) -> None:
    write_raw(make_raw(4, 200, 6, seed=1), tmp_path / "eeg" / "a.edf")
    settle(tmp_path / "eeg")
    (first,) = process("first", FIRST)
    (table,) = (tmp_path / "decoded" / "checksums").rglob("*.json")
    good = table.read_bytes()
    for text in ("", "[", "{}", "[[1, 2]]", "[[[1, 2, 3], 5]]", good.decode().replace('"', '"0', 3), "[" * 10**5):
        table.write_text(text)
        assert process(f"other{hash(text)}", FIRST) == [first] and table.read_bytes() == good


def test_signals_that_were_not_used_longest_are_deleted_first(tmp_path: Path, make_raw, write_raw, process) -> None:
    for number in range(3):
        write_raw(make_raw(4, 200, 6, seed=number), tmp_path / str(number) / "a.edf")
        process("first", FIRST, root=tmp_path / str(number))
    signals_ = sorted((tmp_path / "decoded" / "signals").rglob("*.kept"), key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(reversed(signals_), start=1):
        os.utime(path, (time.time() - 100 * age, time.time() - 100 * age))
    process("other", OTHER, root=tmp_path / "0")  # Now the oldest kept signal is the last one that was used.
    sizes = [path.stat().st_size for path in signals_]
    assert limit_size(tmp_path / "decoded", sum(sizes)) == (0, sum(sizes))
    assert limit_size(tmp_path / "decoded", sum(sizes) - 1) == (1, sizes[0] + sizes[2])
    assert [path.is_file() for path in signals_] == [True, False, True]
    assert limit_size(tmp_path / "decoded", sizes[0]) == (1, sizes[0]) and signals_[0].is_file()
    # A deleted signal is decoded and kept again.
    process("third", OTHER, root=tmp_path / "1")
    assert [path.is_file() for path in signals_] == [True, True, False]
    assert limit_size(tmp_path / "nothing", 1) == (0, 0)


def test_an_object_store_is_not_read_twice(tmp_path: Path, make_raw, write_raw, process) -> None:
    write_raw(make_raw(4, 200, 6, seed=1), tmp_path / "eeg" / "a.edf")
    store = as_path("memory://kept-decoded/eeg")
    store.mkdir(parents=True, exist_ok=True)
    (store / "a.edf").write_bytes((tmp_path / "eeg" / "a.edf").read_bytes())
    entry = store.fs.store[(store / "a.edf").path]
    entry.created = entry.modified = entry.created.replace(year=2020)
    (fresh,) = process("fresh", OTHER, keep=False, root=str(store))
    process("first", FIRST, root=str(store))
    reads = []
    real, store.fs.__class__.get_file = store.fs.__class__.get_file, lambda self, *args, **more: reads.append(args)
    try:
        assert process("other", OTHER, root=str(store)) == [fresh] and not reads
    finally:
        store.fs.__class__.get_file = real


def test_a_recording_that_is_not_read_to_its_end_is_not_kept(tmp_path: Path, make_raw, write_raw) -> None:
    write_raw(make_raw(4, 200, 6), tmp_path / "eeg" / "a.edf")
    (item,) = list_items(CorpusConfig(root=str(tmp_path / "eeg"), name="c"))
    keeping = KeepingSignal(open_item(item), tmp_path / "x.tmp")
    keeping.read(0, 600, [0, 1])
    assert keeping.finish(tmp_path / "x.kept") == "" and not list(tmp_path.glob("x.*"))
    keeping = KeepingSignal(open_item(item), tmp_path / "x.tmp")
    wanted = np.concatenate([keeping.read(0, 600, [2, 1]), keeping.read(600, 1200, [2, 1])], axis=1)
    assert keeping.finish(tmp_path / "x.kept") == "" and list(tmp_path.glob("x.*")) == [tmp_path / "x.kept"]
    kept = KeptSignal(tmp_path / "x.kept")
    assert kept.info == keeping.info
    found = kept.read(100, 1150, [1, 2])
    assert found.dtype == wanted.dtype and (found == wanted[::-1, 100:1150]).all()
    for start, stop, picks in ((0, 10, [0]), (1190, 1210, [1])):
        with pytest.raises(NotKept):
            kept.read(start, stop, picks)


VALUES = {
    "16 bits": np.random.default_rng(0).integers(-3000, 3000, 9000) * 0.0488281e-6 + 1e-9,
    "24 bits": np.random.default_rng(1).normal(0, 1e6, 90000).round() * 2.3e-12,
    "float32": np.random.default_rng(2).normal(0, 1, 500).astype(np.float32).astype(float),
    "float32 in microvolts": np.random.default_rng(2).normal(0, 30, 500).astype(np.float32).astype(float) * 1e-6,
    "float64": np.random.default_rng(3).normal(0, 1, 500),
    "constant": np.zeros(500),
    "negative zero": np.array([0.0, -0.0] * 50),
    "not finite": np.array([np.nan, np.inf, -np.inf, 1.0] * 50),
    "two kinds of NaN": np.array([0x7FF8000000000000, 0x7FF8000000000001] * 50, np.uint64).view(float),
    "tiny and huge": np.array([5e-324, 1.7e308, 1e-45] * 40),
    "one": np.array([1.5]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_bit_comes_back(kind: str) -> None:
    x = np.stack([VALUES[kind], VALUES[kind][::-1]])
    data = pack(x)
    for rows in ([0, 1], [1], [1, 0]):
        assert (unpack(data, x.shape, rows).view(np.uint64) == np.ascontiguousarray(x[rows]).view(np.uint64)).all()
    for bad in (b"", data[: len(data) // 2], data[8:], bytes(len(data))):
        with pytest.raises(ValueError, match=r"."):
            unpack(bad, x.shape, [0])
    for shape in ((1, x.shape[1]), (2, x.shape[1] + 1), (3, x.shape[1]), (2**14, 2**14)):
        with pytest.raises(ValueError, match="block"):
            unpack(data, shape, [0])
    narrow = np.stack([VALUES["float32"]]).astype(np.float32)
    assert (unpack(pack(narrow), narrow.shape, [0]).astype(np.float32) == narrow).all()


def test_values_take_no_more_space_than_in_the_file() -> None:
    steps = np.cumsum(np.random.default_rng(0).normal(0, 20, (4, 50000)), axis=1).round() % 20000
    assert len(pack(steps * 0.1e-6)) < 2 * steps.size
    microvolts = np.random.default_rng(1).normal(0, 30, (4, 50000)).astype(np.float32).astype(float)
    assert len(pack(microvolts * 1e-6)) < 4 * steps.size


def test_metadata_comes_back() -> None:
    info = SignalInfo(
        ch_names=["Fz", "Cz"],
        ch_types=["eeg", "misc"],
        positions=[[0.1, 1 / 3, -0.0], None],
        sfreq=1000 / 3,
        n_samples=900,
        segments=[Segment(start=0, stop=400, onset=0.0), Segment(start=500, stop=900, onset=1.7)],
        line_freq=50.0,
        unit_known=True,
        scale=1e-6,
        reference="Cz",
        bads=["Cz"],
        named_units={"Fz": 1e-6},
        assumed_units={"Cz": 1.0},
        unknown_units={"Cz": "µ°"},
        bad_spans=[(0.5, float("inf"), "BAD")],
        epoched=True,
        intracranial=True,
        tmin=-0.2,
        left_out={"X": "other rate"},
        about=About(age=33.0, sex="F", year=2020, device="d", filters="f"),
        notes=["n"],
    )
    values = json.loads(json.dumps(info_to_json(info)))
    assert info_from_json(values, "x") == info
    for name in values:
        for wrong in (None, 7.5, "text", [1], {"a": []}, [[{}]]):
            changed = {**values, name: wrong}
            try:
                found = info_from_json(changed, "x")
            except (RequestError, ValueError):
                continue
            assert type(getattr(found, name)) in (type(getattr(info, name)), type(wrong))
        with pytest.raises(ValueError, match="the fields are not exactly about"):
            info_from_json({key: value for key, value in values.items() if key != name}, "x")


def test_where_the_signals_lie(tmp_path: Path) -> None:
    def config(output: str, decoded: str = "", keep: bool = True) -> ShardConfig:
        corpora = [CorpusConfig(root=str(tmp_path / "eeg"))]
        return ShardConfig(corpora=corpora, output=output, keep_decoded=keep, decoded=decoded)

    out = str(tmp_path / "runs" / "a")
    assert resolve_decoded(config(out)) == tmp_path / "runs" / "decoded"
    assert resolve_decoded(config(out, str(tmp_path / "kept"))) == tmp_path / "kept"
    assert resolve_decoded(config(out, keep=False)) is None
    for wrong, message in (
        (config("s3://bucket/a"), "keep_decoded: the output is on an object store; set the key 'decoded'"),
        (config(out, "s3://bucket/b"), "decoded 's3://bucket/b': decoded signals are kept on a disk"),
        (config(out, out + "/decoded"), "is inside output"),
        (config(out, str(tmp_path / "eeg" / "x")), "is inside corpora: root"),
    ):
        with pytest.raises(RequestError, match=message):
            resolve_decoded(wrong)
    assert reduce_config(config(out)) == reduce_config(config(out, keep=False, decoded="x"))


def write_job(tmp_path: Path, spec: PreprocessSpec, keep: bool) -> str:
    values = {
        "corpora": [{"root": str(tmp_path / "eeg"), "name": "c"}],
        "preprocess": json.loads(json.dumps(spec.to_dict())),
        "split": {"val_fraction": 0, "test_fraction": 0},
        "keep_decoded": keep,
        "ray": {"num_cpus": 2, "memory_gb": 0.5},
    }
    path = tmp_path / f"{spec.window}-{keep}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.timeout(600)
def test_whole_jobs(tmp_path: Path, make_raw, write_raw) -> None:
    for number in range(4):
        write_raw(make_raw(6, 200, 60, seed=number), tmp_path / "eeg" / f"sub-{number}" / "a.edf")
    settle(tmp_path / "eeg")
    first, decoded = tmp_path / "runs" / "first", tmp_path / "runs" / "decoded"
    command = [sys.executable, "-m", "data_sharding", write_job(tmp_path, FIRST, True), "--output", str(first)]
    # Kill the job after it has stored the first signal. Every stored signal must be complete, and the same command must
    # resume the job.
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while killed.poll() is None and not any(decoded.rglob("*.kept")):
        time.sleep(0.02)
    if killed.poll() is None:
        os.killpg(killed.pid, signals.SIGKILL)
    killed.wait()
    for path in decoded.rglob("*.kept"):
        KeptSignal(path).close()
    assert main(command[3:]) == 0
    assert decoded.stat().st_mode & 0o777 == 0o700
    assert len(list(decoded.rglob("*.kept"))) == 4 and not list(decoded.rglob("*.tmp"))
    fresh, other = tmp_path / "fresh" / "other", tmp_path / "runs" / "other"
    assert main([write_job(tmp_path, OTHER, False), "--output", str(fresh)]) == 0
    for path in (tmp_path / "eeg").rglob("*.edf"):
        wipe(path.parent, keep=256 * 20)
    assert main([write_job(tmp_path, OTHER, True), "--output", str(other)]) == 0
    assert Manifest.read(fresh).dataset_id == Manifest.read(other).dataset_id
    assert read_ledger(fresh) == read_ledger(other)
    tars = sorted(p.relative_to(fresh) for p in fresh.rglob("*.tar"))
    assert tars and all((fresh / p).read_bytes() == (other / p).read_bytes() for p in tars)
    # The size limit of kept signals is not a setting of the dataset, so the job writes no new version of the dataset.
    assert main([write_job(tmp_path, OTHER, True), "--output", str(other), "--decoded_gb", "0.000001"]) == 0
    assert not list(decoded.rglob("*.kept")) and Manifest.read(other).version == 1
