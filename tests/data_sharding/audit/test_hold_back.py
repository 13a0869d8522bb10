"""Recordings and images of benchmarks are left out of a training dataset (held back): recordings by name, by a list, by
content or by subject, and trials by their image. An entry in the config that matches nothing is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from data_sharding.audit.duplicates import RecordingFingerprint, signature
from data_sharding.audit.hold_back import IMAGE_REASON, HoldBack, HoldBackConfig, read_list
from data_sharding.audit.inspect_dataset import main as inspect
from data_sharding.audit.verify import main as verify
from data_sharding.common.errors import RequestError
from data_sharding.corpora import CorpusConfig, list_items
from data_sharding.dataset.ledger import STATUSES, LedgerRow, read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.processing.survey import assess


@pytest.fixture(scope="module")
def items(folder_corpus: Path) -> list:
    return list_items(CorpusConfig(root=str(folder_corpus), name="lab"))


class Rows:
    """Makes, from signals in memory, ledger rows and fingerprints like the rows and fingerprints of workers."""

    def __init__(self, make_row, make_raw) -> None:
        self.make_row, self.make_raw = make_row, make_raw
        self.points: dict[str, np.ndarray] = {}
        self.rows: list[LedgerRow] = []
        self.prints: dict[str, RecordingFingerprint] = {}

    def add(self, key: str, seed: int, **columns) -> LedgerRow:
        raw = self.make_raw(6, 200, 8, seed=seed)
        raw.apply_function(lambda x: np.round(x * 1e7) / 1e7)
        self.points[key] = assess(1e6 * raw.get_data(), 200.0).fingerprint
        row = self.make_row(key, seconds=8.0, windows=8, **columns)
        self.prints[key] = RecordingFingerprint(
            key=key, sha256=row.sha256, seconds=row.seconds, signature=signature(self.points[key])
        )
        self.rows.append(row)
        return self.rows[-1]

    def mark(self, held: HoldBack) -> dict[str, int]:
        return held.mark(self.rows, self.prints, self.points.__getitem__)

    def status(self) -> dict[str, str]:
        return {row.key: row.status for row in self.rows}


@pytest.fixture
def rows(make_row, make_raw) -> Rows:
    return Rows(make_row, make_raw)


class TestNames:
    def test_subjects_and_recordings_are_held_back_by_name(self, items) -> None:
        held = HoldBack.plan(HoldBackConfig(subjects=["01", "lab/sub-02"], recordings=["lab/sub-04/*.fif"]), items)
        assert sorted(next(i.path for i in items if i.key == key) for key in held.named) == [
            "sub-01/sub-01_task-rest_eeg.edf",
            "sub-02/sub-02_task-rest_eeg.vhdr",
            "sub-04/sub-04_task-rest_raw.fif",
        ]
        assert set(held.named.values()) == {
            "subject 01 (hold_back.subjects)",
            "subject lab/sub-02 (hold_back.subjects)",
            "recording lab/sub-04/*.fif (hold_back.recordings)",
        }

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"subjects": ["sub-77"]}, ["hold_back.subjects", "sub-77", "the corpora have"]),
            ({"subjects": ["clinic/sub-01"]}, ["clinic/sub-01"]),
            ({"recordings": ["lab/sub-09/*"]}, ["hold_back.recordings", "lab/sub-09/*"]),
            ({"lists": ["/nowhere/list.txt"]}, ["hold_back.lists", "/nowhere/list.txt"]),
            ({"datasets": ["/nowhere/set"]}, ["/nowhere/set", "no such dataset"]),
        ],
    )
    def test_entry_without_a_match_is_refused(self, items, config, words) -> None:
        with pytest.raises(RequestError) as error:
            HoldBack.plan(HoldBackConfig(**config), items)
        assert all(word in str(error.value) for word in words)

    def test_lists_are_read_and_unmatched_lines_are_refused(self, items, tmp_path: Path) -> None:
        path = tmp_path / "benchmark.txt"
        path.write_text(f"# the test people\nsubject sub-03  # of 2019\n\nrecording lab/copies/*\nsha256 {'AB' * 32}\n")
        held = HoldBack.plan(HoldBackConfig(lists=[str(path)]), items)
        assert len(held.named) == 2 and held.sha256 == {"ab" * 32: "benchmark.txt, line 5"}
        path.write_text("subject sub-03\nsubject sub-88\n")
        with pytest.raises(RequestError, match=r"benchmark.txt, line 2: subject 'sub-88'"):
            HoldBack.plan(HoldBackConfig(lists=[str(path)]), items)

    @pytest.mark.parametrize("line", ["sub-03", "subjects sub-03", "sha256 12", "recording"])
    def test_bad_line_in_a_list_is_refused(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "list.txt"
        path.write_text(f"subject a\n{line}\n")
        with pytest.raises(RequestError, match=r"list.txt', line 2"):
            read_list(str(path))

    def test_empty_list_is_refused(self, items, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("# nothing yet\n")
        with pytest.raises(RequestError, match="the list is empty"):
            HoldBack.plan(HoldBackConfig(lists=[str(tmp_path / "list.txt")]), items)

    def test_identity_depends_on_the_content_of_a_list(self, items, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        path.write_text("subject sub-03\n")
        config = HoldBackConfig(lists=[str(path)])
        first = HoldBack.plan(config, items).identity
        path.write_text("subject sub-02\n")
        assert HoldBack.plan(config, items).identity != first and not HoldBackConfig() and config


class TestContent:
    def test_copies_of_a_named_recording_are_held_back(self, rows: Rows) -> None:
        """A copy of a held-back recording may have another name and another format."""
        rows.add("named", 1)
        rows.add("copy", 1)
        rows.add("bytes", 2, sha256="named")
        rows.add("other", 3)
        rows.add("broken", 1).status = "quarantined"
        held = HoldBack(named={"named": "subject x (hold_back.subjects)"}, sha256={}, datasets=[], identity={})
        assert rows.mark(held) == {"subject x (hold_back.subjects)": 3}
        assert rows.status() == {
            "named": "held back",
            "copy": "held back",
            "bytes": "held back",
            "other": "sharded",
            "broken": "quarantined",
        }
        assert rows.rows[0].reason == "held back: subject x (hold_back.subjects)"
        assert rows.rows[1].reason == "held back: copy of named, subject x (hold_back.subjects)"
        assert all(r.windows == 0 and r.seconds == 8.0 for r in rows.rows[:3])

    def test_recordings_are_held_back_by_checksum(self, rows: Rows) -> None:
        rows.add("a", 1, sha256="ab" * 32)
        rows.add("b", 2)
        held = HoldBack(named={}, sha256={"ab" * 32: "list.txt, line 3"}, datasets=[], identity={})
        assert rows.mark(held) == {"sha256 (list.txt, line 3)": 1} and rows.rows[0].held_back.startswith("sha256")

    def test_recordings_of_a_dataset_are_held_back_with_its_subjects(
        self, rows: Rows, publish, make_raw, items, tmp_path: Path
    ) -> None:
        benchmark = tmp_path / "benchmark"
        recordings = [
            {"key": f"b{i}", "subject": f"sub-0{i}", "corpus": "bench", "raw": make_raw(6, 200, 8, seed=20 + i)}
            for i in range(3)
        ]
        publish(benchmark, recordings)
        rows.add("signal", 20, subject="p9")
        rows.add("same-person", 30, subject="p9")
        rows.add("bytes", 31, sha256="b1")
        rows.add("subject", 32, subject="sub-02", corpus="bench")
        rows.add("namesake", 33, subject="sub-02", corpus="elsewhere")
        held = HoldBack.plan(HoldBackConfig(datasets=[str(benchmark)]), items)
        assert rows.mark(held) == {f"dataset {benchmark}": 4}
        assert {k for k, s in rows.status().items() if s == "sharded"} == {"namesake"}
        why = {row.key: row.reason for row in rows.rows}
        assert "same signal as b0" in why["signal"] and "has a recording in" in why["same-person"]
        assert "equal bytes" in why["bytes"] and "subject sub-02 of dataset" in why["subject"]

    def test_dataset_with_nothing_in_common_counts_zero(
        self, rows: Rows, publish, make_raw, items, tmp_path: Path
    ) -> None:
        publish(tmp_path / "b", [{"key": "b", "subject": "s", "corpus": "bench", "raw": make_raw(6, 200, 8, seed=40)}])
        rows.add("a", 1)
        held = HoldBack.plan(HoldBackConfig(datasets=[str(tmp_path / "b")]), items)
        assert rows.mark(held) == {f"dataset {tmp_path / 'b'}": 0} and rows.status() == {"a": "sharded"}


def test_trials_with_images_of_a_held_back_dataset_are_left_out(
    events_corpus: Path, publish, make_raw, make_row, tmp_path: Path
) -> None:
    """An image is held back if its bytes are equal, or if its name is the same in the same corpus."""
    roots = {"root": str(events_corpus / "eeg"), "images": str(events_corpus / "images")}
    items = list_items(CorpusConfig(kind="events", name="paired", **roots))
    picture = (events_corpus / "images" / "img-3.png").read_bytes()
    other = (events_corpus / "images" / "img-0.png").read_bytes()
    shown = {"starts": [0, 100], "images": [("bench-17", picture), ("bench-18", picture)]}
    publish(tmp_path / "b", [{"key": "b", "subject": "s", "corpus": "x", "raw": make_raw(4, 200, 8, seed=1), **shown}])
    held = HoldBack.plan(HoldBackConfig(datasets=[str(tmp_path / "b")]), items)
    kept = held.drop_held_back_images(items)
    assert [len(i.trials or ()) - len(k.trials or ()) for i, k in zip(items, kept, strict=True)] == [1, 1, 1]
    assert not any(t.image_id == "img-3" for item in kept for t in item.trials or ())
    row = make_row(items[0].key, windows_left_out={"a": 2})
    held.count_images([row, make_row("other")])
    assert row.windows_left_out == {"a": 2, IMAGE_REASON: 1}

    shown = {"starts": [0], "images": [("img-5", other)]}
    named = {"key": "b", "subject": "s", "corpus": items[0].corpus, "raw": make_raw(4, 200, 8, seed=1), **shown}
    publish(tmp_path / "c", [named])
    held = HoldBack.plan(HoldBackConfig(datasets=[str(tmp_path / "c")]), items)
    gone = {t.image_id for i in items for t in i.trials or ()} - {
        t.image_id for i in held.drop_held_back_images(items) for t in i.trials or ()
    }
    assert gone == {"img-0", "img-5"}


@pytest.fixture(scope="module")
def sharded(folder_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a benchmark dataset of one subject. Also make a training dataset of the whole corpus, from which the
    benchmark is held back."""
    from data_sharding.job.run import main as shard

    folder = tmp_path_factory.mktemp("jobs")
    common = {
        "preprocess": {
            "sfreq": 100,
            "highpass": 1.0,
            "lowpass": 40.0,
            "window": 100,
            "stride": 100,
            "quality": {"leave_out_edges": False},
        },
        "allowed_set_aside": 1.0,
        "ray": {"num_cpus": 1},
    }
    benchmark = common | {
        "corpora": [{"root": str(folder_corpus / "sub-01"), "name": "bench"}],
        "split": {"val_fraction": 0, "test_fraction": 0},
    }
    training = common | {
        "corpora": [{"root": str(folder_corpus), "name": "lab"}],
        "split": {"val_subjects": ["sub-03"], "test_subjects": ["sub-04"]},
        "hold_back": {"datasets": [str(folder / "benchmark")]},
    }
    for name, config in (("benchmark", benchmark), ("training", training)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert shard([str(folder / f"{name}.yaml"), "--output", str(folder / name)]) == 0
    return folder / "benchmark", folder / "training"


class TestJob:
    """The corpus contains the benchmark's recording twice: as equal bytes, and in another format."""

    def test_benchmark_and_its_copy_are_held_back(self, sharded: tuple[Path, Path]) -> None:
        rows = {row.path: row for row in read_ledger(sharded[1])}
        held = {path: row.reason for path, row in rows.items() if row.status == "held back"}
        assert set(held) == {"sub-01/sub-01_task-rest_eeg.edf", "copies/again_raw.fif"}
        assert "equal bytes" in held["sub-01/sub-01_task-rest_eeg.edf"]
        assert "same signal as" in held["copies/again_raw.fif"]
        counts = Manifest.read(sharded[1]).counts
        assert counts["held back"] == 2 and sum(counts[s] for s in STATUSES) == counts["found"] == 7

    def test_verify_finds_no_shared_data(self, sharded: tuple[Path, Path], folder_corpus: Path, capsys) -> None:
        benchmark, training = map(str, sharded)
        assert verify([training]) == 0 and verify([benchmark]) == 0
        assert verify([training, "--against", benchmark]) == 0
        out = capsys.readouterr().out
        assert "recordings by signal: 3 with 1" in out and "no shared data" in out and "shared: " not in out

    def test_report_and_inspect_name_the_benchmark(self, sharded: tuple[Path, Path], capsys) -> None:
        page = (sharded[1] / "report.html").read_text()
        assert "Held back" in page and f"dataset {sharded[0]}" in page and page.count("data:image/png") == 3 + 1 + 1
        assert inspect([str(sharded[1])]) == 0
        assert f"dataset {sharded[0]}" in capsys.readouterr().out
