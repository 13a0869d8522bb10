"""The report and the tables count every recording of a dataset, whether it has eight recordings or 100,000."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_sharding.audit.inspect_dataset import main as inspect
from data_sharding.audit.report import find_warnings, sum_hours_by_fate, write_report
from data_sharding.audit.report_figures import Window, compute_spectrum, measure_mains_peaks, sample_windows
from data_sharding.common.reason import Reason
from data_sharding.dataset.ledger import STATUSES, LedgerRow, count_by_status, read_ledger, write_ledger
from data_sharding.dataset.manifest import Manifest

CORPORA = ("lab", "<script>alert('clinic')</script>")


@pytest.fixture(scope="module")
def dataset(publish, make_raw, make_row, tmp_path_factory) -> Path:
    """A dataset with four sharded recordings of two corpora, and one recording for each status except "sharded"."""
    path = tmp_path_factory.mktemp("report") / "set"
    recordings = [
        {"key": f"r{i}", "subject": f"<script>alert({i})</script>", "corpus": CORPORA[i % 2], "split": split}
        | {"raw": make_raw(6, 200, 8, seed=i)}
        for i, split in enumerate(["train", "train", "val", "test"])
    ]
    publish(path, recordings)
    rows = [
        *read_ledger(path),
        make_row("copy", status="duplicate", reason=Reason("duplicate of r1"), duplicate_of="r1", seconds=8.0),
        make_row("bad", status="quarantined", reason=Reason("unreadable", "<script>alert(1)</script>"), seconds=0.0),
        make_row("short", status="excluded", reason=Reason("too short", "0.45 s"), seconds=0.45),
        make_row(
            "mine", status="held back", reason=Reason("held back", "subject x"), held_back="subject x", seconds=60.0
        ),
    ]
    write_ledger(path / "ledger.parquet", rows)
    return path


def render(dataset: Path, tmp_path: Path, rows: list[LedgerRow] | None = None, **extra) -> str:
    import dataclasses

    rows = read_ledger(dataset) if rows is None else rows
    counts, hours = count_by_status(rows)
    hours["written"] = sum(row.seconds_written for row in rows) / 3600
    manifest = dataclasses.replace(Manifest.read(dataset), counts=counts, hours=hours, extra=extra)
    write_report(tmp_path / "report.html", rows, manifest, root=dataset)
    return (tmp_path / "report.html").read_text()


class TagChecker(html.parser.HTMLParser):
    """Parser that stores a list of open tags, to find tags that are never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "img", "html", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestPage:
    def test_page_is_complete_and_self_contained(self, dataset: Path, tmp_path: Path) -> None:
        page = render(dataset, tmp_path)
        assert page == render(dataset, tmp_path), "the same page for the same dataset"
        parser = TagChecker()
        parser.feed(page)
        assert parser.open == []
        text = " ".join(parser.text)
        for title in (
            "Hours",
            "Corpora",
            "Splits",
            "Recordings set aside, and why",
            "Held back",
            "Spectra",
            "Examples",
        ):
            assert title in text
        assert page.count("data:image/png;base64,") == 3 + 2 + 2, "overview, spectra and traces"
        assert "http" not in page and "<script" not in page and 'src="/' not in page
        assert "<script>alert(1)</script>" in text and CORPORA[1] in text, "names are shown as text"
        assert "No subject appears in more than one split" in text and "subject x" in text

    def test_page_opens_in_a_browser(self, dataset: Path, tmp_path: Path, open_in_browser) -> None:
        render(dataset, tmp_path)
        assert {view["pictures"] for view in open_in_browser(tmp_path / "report.html")} == {3 + 2 + 2}

    def test_missing_shards_are_mentioned(self, dataset: Path, tmp_path: Path) -> None:
        write_report(tmp_path / "report.html", read_ledger(dataset), Manifest.read(dataset))
        page = (tmp_path / "report.html").read_text()
        assert page.count("data:image/png;base64,") == 3 and page.count("Not drawn") == 2

    def test_block_design_gives_a_warning(self, dataset: Path, tmp_path: Path) -> None:
        corpora = [
            {"name": "lab", "kind": "eeg_imagenet", "design": "block", "evidence": "runs of 50 trials of one class"},
            {"name": CORPORA[1], "kind": "events", "design": "random", "evidence": ""},
        ]
        text = render(dataset, tmp_path, corpora=corpora)
        assert "lab: block design" in text and "runs of 50 trials" in text and "script&gt;: block" not in text

    def test_page_of_100_000_recordings_stays_small(self, dataset: Path, tmp_path: Path, make_row) -> None:
        """The tables on the page are short, and state how many rows are not shown."""
        rng = np.random.default_rng(0)
        rows = []
        for i in range(100_000):
            status = STATUSES[int(rng.integers(5))]
            row = make_row(f"r{i:06d}", corpus=f"corpus-{i % 300}", subject=f"s{i % 5000}", seconds=600.0)
            row.sfreq, row.n_kept = float(rng.integers(100, 1000)), int(rng.integers(1, 128))
            row.amplitude_uv = 9.0
            if status == "sharded":
                row.seconds_written, row.windows, row.split = 500.0, 500, "train"
            else:
                row.set_reason(status, Reason(f"fault {i % 70}", f"of file {i}"))
            rows.append(row)
        page = render(dataset, tmp_path, rows)
        assert len(page) < 2e6 and "... and 275 more." in page
        parser = TagChecker()
        parser.feed(page)
        assert re.search(r"\.\.\. and \d+ more\.", page[page.index('id="recordings-set-aside') :])


def test_warnings_about_montages_subjects_and_quarantine(dataset: Path, make_row) -> None:
    manifest = Manifest.read(dataset)
    fine = [make_row(f"r{i}", subject="s", montage_confidence=1.0) for i in range(30)]
    assert find_warnings(fine, manifest) == []
    unnamed = [*fine, make_row("r99", montage_confidence=0.2)]
    assert [w.split(" recordings")[0] for w in find_warnings(unnamed, manifest)] == ["1 of 31", "1"]
    broken = [*fine, *(make_row(f"b{i}", status="quarantined", reason=Reason("x"), subject="s") for i in range(9))]
    assert "9 of 39 recordings (23.1 %) are quarantined" in find_warnings(broken, manifest)[0]


def test_hours_by_fate_add_up(dataset: Path) -> None:
    steps = dict(sum_hours_by_fate(read_ledger(dataset)))
    assert steps["found"] == pytest.approx(sum(hours for name, hours in steps.items() if name != "found"))
    assert steps["held back"] == pytest.approx(60 / 3600) and steps["written"] == pytest.approx(32 / 3600)


def test_sampled_windows_are_spread_and_spectrum_ignores_bad_channels(dataset: Path) -> None:
    windows = sample_windows(dataset, read_ledger(dataset), Manifest.read(dataset).preprocess.window)
    assert {name: len(recordings) for name, recordings in windows.items()} == dict.fromkeys(CORPORA, 2)
    assert [w.meta["start"] for w in windows["lab"][0]] == [0.0, 4.0, 7.0]
    t = np.arange(400) / 100
    x = np.random.default_rng(0).normal(0, 1, (4, 400)) + 5 * np.sin(2 * np.pi * 10 * t)
    x[3] = 1e4 * np.sin(2 * np.pi * 30 * t)
    frequency, power = compute_spectrum([Window(eeg=x, meta={"ch_names": list("abcd"), "bads": ["d"]})], 100.0)
    assert frequency[power.argmax()] == 10.0 and power.max() < 100, "only good channels are used"


def test_mains_peaks_are_measured() -> None:
    frequency = np.arange(0, 101.0)
    power = np.ones(101)
    power[50] = 9.0
    assert (
        measure_mains_peaks(frequency, power) == {50.0: 9.0, 60.0: 1.0}
        and measure_mains_peaks(frequency[:40], power[:40]) == {}
    )


class TestInspect:
    def run(self, capsys, *args: str) -> str:
        assert inspect(list(args)) == 0
        return capsys.readouterr().out

    def test_tables_are_plain_text_without_a_terminal(self, dataset: Path, capsys) -> None:
        out = self.run(capsys, str(dataset))
        for word in ("lab", "held back", "recorded Hz", "channels kept", "too short", "subject x"):
            assert word in out
        assert "─" not in out and all(len(line) < 200 for line in out.splitlines()), "plain text without a terminal"

    def test_json_has_the_same_tables(self, dataset: Path, capsys) -> None:
        values = json.loads(self.run(capsys, str(dataset), "--json"))
        assert values["corpus"][-1]["corpus"] == "all" and values["corpus"][-1]["sharded"] == 4
        assert values["corpus"][-1]["hours found"] == pytest.approx((4 * 8 + 8 + 0.45 + 60) / 3600)
        assert values["recordings"] == [] and values["held back"] == [{"by": "subject x", "recordings": 1}]
        assert len(json.loads(self.run(capsys, str(dataset), "--json", "--recordings"))["recordings"]) == 8

    def test_ledger_row_of_one_recording_is_shown(self, dataset: Path, capsys) -> None:
        out = self.run(capsys, str(dataset), "--recording", "lab/copy.edf")
        assert re.search(r"duplicate_of +r1", out) and re.search(r"status +duplicate", out)
        row = json.loads(self.run(capsys, str(dataset), "--recording", "bad", "--json"))
        assert row["reason"] == "unreadable: <script>alert(1)</script>" and row["seconds"] == 0.0

    def test_unknown_recording_is_refused(self, dataset: Path, capsys) -> None:
        assert inspect([str(dataset), "--recording", "cop"]) == 2
        assert "did you mean copy?" in capsys.readouterr().err

    def test_markdown_tables_are_complete(self, dataset: Path, capsys) -> None:
        lines = [line for line in self.run(capsys, str(dataset), "--markdown").splitlines() if line.startswith("|")]
        assert all(line.endswith("|") for line in lines) and any("| all |" in line for line in lines)
