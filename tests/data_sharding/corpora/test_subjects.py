"""Subjects are found in tables, headers and paths. Names, birth dates and numbers of patients are never copied from a
header."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from data_sharding.audit.report import write_report
from data_sharding.audit.verify import main as verify
from data_sharding.common.errors import RequestError
from data_sharding.corpora import CorpusConfig, Item, list_items
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.formats.about import edf_about, hide, parse_patient, private_words
from data_sharding.job.announce import describe_subjects
from data_sharding.job.run import main as shard

HARRY = "MCH-0234567 F 02-MAY-1951 Haagse_Harry"
STARTED = "Startdate 12-MAR-2011 PSG-1234/2011 NN Telemetry03"


def write_records(
    path: Path,
    *,
    patient: str = "X X X X",
    recording: str = "Startdate X X X X",
    date: str = "12.03.11",
    filters: str = "HP:0.1Hz LP:75Hz",
    plus: bool = True,
    seed: int = 0,
    seconds: int = 6,
    encoding: str = "latin-1",
) -> Path:
    """Write a file of four channels at 200 Hz, in the format that its extension names (EDF or BDF)."""
    bdf, n, rate, plus = path.suffix == ".bdf", 4, 200, plus

    def field(text: str, size: int) -> bytes:
        return text.encode(encoding).ljust(size)[:size]

    names = ["Fz", "Cz", "Pz", "Oz"]
    x = np.random.default_rng(seed).normal(0, 10, (seconds, n, rate))
    top = (1 << 23) - 1 if bdf else (1 << 15) - 1
    head = [b"\xffBIOSEMI" if bdf else field("0", 8), field(patient, 80), field(recording, 80), field(date, 8)]
    kind = ("BDF" if bdf else "EDF") + "+C" if plus else ("24BIT" if bdf else "")
    head += [field("10.00.00", 8), field(str(256 * (n + 1)), 8), field(kind, 44), field(str(seconds), 8)]
    head += [field("1", 8), field(str(n), 4)]
    for values, size in (
        (names, 16), ([""] * n, 80), (["uV"] * n, 8), (["-500"] * n, 8), (["500"] * n, 8), ([str(-top - 1)] * n, 8),
        ([str(top)] * n, 8), ([filters] * n, 80), ([str(rate)] * n, 8), ([""] * n, 32),
    ):  # fmt: skip
        head += [field(value, size) for value in values]
    counts = np.clip(np.round(x / 500 * top), -top, top).astype("<i4").reshape(-1)
    data = counts.view(np.uint8).reshape(-1, 4)[:, :3].tobytes() if bdf else counts.astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(head) + data)
    return path


def find(root: Path, **keys) -> dict[str, Item]:
    return {item.path: item for item in list_items(CorpusConfig(root=str(root), name="c", **keys))}


def sources(items: dict[str, Item]) -> list[tuple[str, str]]:
    return [(item.subject if item.subject != item.key else "", item.subject_from) for item in items.values()]


class TestHeaders:
    @pytest.mark.parametrize("suffix", [".edf", ".bdf"])
    def test_recordings_of_one_patient_have_one_hashed_name(self, tmp_path: Path, suffix: str) -> None:
        for name, patient in {"a": HARRY, "b": HARRY, "c": HARRY.replace("67 F", "68 F")}.items():
            write_records(tmp_path / f"{name}{suffix}", patient=patient)
        a, b, c = find(tmp_path).values()
        assert a.subject == b.subject != c.subject and a.subject.startswith("id-") and len(a.subject) == 15
        assert {item.subject_from for item in (a, b, c)} == {"header"}

    def test_secret_changes_the_names_and_must_be_set(self, tmp_path: Path, monkeypatch) -> None:
        write_records(tmp_path / "a.edf", patient=HARRY)
        with pytest.raises(RequestError, match="CLINIC_SALT"):
            find(tmp_path, salt_variable="CLINIC_SALT")
        monkeypatch.setenv("CLINIC_SALT", "one")
        one = find(tmp_path, salt_variable="CLINIC_SALT")["a.edf"].subject
        monkeypatch.setenv("CLINIC_SALT", "two")
        names = {one, find(tmp_path, salt_variable="CLINIC_SALT")["a.edf"].subject, find(tmp_path)["a.edf"].subject}
        assert len(names) == 3

    @pytest.mark.parametrize(
        "patient",
        ["X X X X", "", "X F X Female_33yr", "anonymous", "0000 X X X", "XXXX M X X", "test", "- - - -", "Patient"],
    )
    @pytest.mark.parametrize("plus", [True, False])
    def test_field_that_names_nobody_is_not_a_subject(self, tmp_path: Path, patient: str, plus: bool) -> None:
        write_records(tmp_path / "a.edf", patient=patient, plus=plus)
        assert sources(find(tmp_path)) == [("", "unknown")]

    def test_free_text_counts_after_the_path_and_a_code_before_it(self, tmp_path: Path) -> None:
        write_records(tmp_path / "a.bdf", patient="H. Jansen 44", plus=False)
        write_records(tmp_path / "S01.bdf", patient="H. Jansen 44", plus=False)
        write_records(tmp_path / "S02.edf", patient=HARRY)
        found = find(tmp_path)
        assert [found[name].subject_from for name in ("a.bdf", "S01.bdf", "S02.edf")] == [
            "header",
            "recognised",
            "header",
        ]
        assert found["S01.bdf"].subject == "S01"

    @pytest.mark.parametrize(("code", "named"), [("7", True), ("12", True), ("0", False), ("X", False)])
    def test_short_codes(self, tmp_path: Path, code: str, named: bool) -> None:
        write_records(tmp_path / "a.edf", patient=f"{code} X X X")
        assert (find(tmp_path)["a.edf"].subject_from == "header") == named

    def test_code_that_the_path_shows_is_not_hashed(self, tmp_path: Path) -> None:
        write_records(tmp_path / "aaaaaaac_s001_t000.edf", patient="aaaaaaac M 01-JAN-1950 aaaaaaac Age:61", plus=False)
        item = find(tmp_path)["aaaaaaac_s001_t000.edf"]
        assert (item.subject, item.subject_from, item.info_patch) == ("aaaaaaac", "header", {})

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
    def test_names_in_other_letters(self, tmp_path: Path, encoding: str) -> None:
        path = write_records(tmp_path / "a.edf", patient="X M 02-MAY-1951 Müller_Jörg", encoding=encoding)
        assert find(tmp_path)["a.edf"].subject_from == "header"
        assert "***" in hide(f"cannot read {'Müller'.encode(encoding).decode('latin-1')}", private_words(path, "edf"))

    def test_age_sex_year_device_and_filters(self, tmp_path: Path) -> None:
        about = edf_about(write_records(tmp_path / "a.edf", patient=HARRY, recording=STARTED))
        assert (about.age, about.sex, about.year, about.device, about.filters) == (
            59, "F", 2011, "Telemetry03", "HP:0.1Hz LP:75Hz",
        )  # fmt: skip
        old = write_records(tmp_path / "b.edf", patient="X M 02-MAY-1911 X", date="01.04.11")
        assert edf_about(old).age == 90 and edf_about(old).device == ""
        said = write_records(tmp_path / "c.edf", patient="X F X Female_33yr", date="01.01.85")
        assert (edf_about(said).age, edf_about(said).sex, edf_about(said).year) == (33, "F", None)
        nothing = edf_about(write_records(tmp_path / "d.bdf", patient="someone 12", plus=False, recording="Dr. Who"))
        assert (nothing.age, nothing.sex, nothing.device) == (None, "", "")

    def test_values_that_were_filled_in_are_not_used(self, tmp_path: Path) -> None:
        assert edf_about(write_records(tmp_path / "a.edf", patient="X M 02-MAY-2015 X")).age is None
        assert edf_about(write_records(tmp_path / "b.edf", patient="X M 01-JAN-2011 No_Name")).age is None
        assert edf_about(write_records(tmp_path / "c.edf", filters="HP:0Hz LP:0Hz N:0Hz")).filters == ""

    def test_damaged_header_names_nobody(self) -> None:
        assert parse_patient(b"", "edf") is None and parse_patient(b"0" * 256, "gdf") is None


class TestTable:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("x/a.edf", "x/b.edf", "y/c.edf"):
            write_records(tmp_path / "root" / name, patient=HARRY if name == "y/c.edf" else "X X X X")
        return tmp_path / "root"

    def table(self, root: Path, text: str, name: str = "subjects.tsv") -> dict[str, Item]:
        path = root.parent / name
        path.write_text(text)
        return find(root, subjects=str(path))

    @pytest.mark.parametrize(("name", "comma"), [("s.tsv", "\t"), ("s.csv", ","), ("s.csv", ";")])
    def test_rows_name_and_describe_subjects(self, root: Path, name: str, comma: str) -> None:
        rows = ["path,subject,age,sex,group", "x/*,anna,34,f,control", "y/c.edf,bert,89+,male,n/a"]
        found = self.table(root, "\n".join(rows).replace(",", comma), name)
        assert sources(found) == [("anna", "table"), ("anna", "table"), ("bert", "table")]
        assert found["x/a.edf"].about == {"age": 34.0, "sex": "F", "group": "control"}
        assert found["y/c.edf"].about == {"age": 90.0, "sex": "M"}

    @pytest.mark.parametrize("patient", ["MCH-0234567", "mch-0234567", HARRY, "hash"])
    def test_patient_finds_recordings(self, root: Path, patient: str) -> None:
        patient = find(root)["y/c.edf"].subject if patient == "hash" else patient
        found = self.table(root, f"patient\tsubject\n{patient}\tharry\n")
        assert sources(found) == [("", "unknown"), ("", "unknown"), ("harry", "table")]

    def test_table_of_people_describes_subjects_of_the_paths(self, root: Path) -> None:
        path = root.parent / "people.tsv"
        path.write_text("participant_id\tage\nx\t31\nnobody\t40\n")
        found = find(root, subjects=str(path), subject_pattern=r"^(?P<subject>\w+)/")
        assert [item.about.get("age") for item in found.values()] == [31.0, 31.0, None]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("path\tsubject\nz/*\tanna\n", "line 2: path 'z/*' matches no recording"),
            ("path\tsubject\nx/*\tanna\nx/a.edf\tbert\n", "lines 3 and 2 both match the recording 'x/a.edf'"),
            ("path\tsubject\nx/a.edf\tanna\nx/a.edf\tanna\n", "lines 2 and 3 both match"),
            ("patient\tsubject\nMCH-999\tanna\n", "line 2: the patient matches no recording"),
            ("path\tpatient\tsubject\nx/*\tMCH-1\tanna\n", "either the column 'path' or the column 'patient'"),
            ("path\tage\nx/*\t3\n", "must have the column 'subject'"),
            ("path\tsubject\nx/*\t\n", "'subject' is empty"),
            ("path\tsubject\tage\nx/*\tanna\t02-MAY-1951\n", "is not a number of years"),
            ("path\tsubject\tsex\nx/*\tanna\t7\n", "is not M, F or O"),
            ("path\tsubject\nx/*\n", "1 cells, but the first line has 2 columns"),
            ("path\tsubject\n", "has no rows"),
            ("subject\tage\nnobody\t3\n", "no row has the name of a subject"),
        ],
    )
    def test_wrong_table_is_refused(self, root: Path, text: str, words: str) -> None:
        with pytest.raises(RequestError) as caught:
            self.table(root, text)
        assert words in str(caught.value) and "MCH-999" not in str(caught.value)

    def test_missing_table_is_refused(self, root: Path) -> None:
        with pytest.raises(RequestError, match="no such file"):
            find(root, subjects=str(root / "nowhere.tsv"))

    def test_arrays_take_a_table(self, tmp_path: Path) -> None:
        root = tmp_path / "arrays"
        root.mkdir()
        for name in ("a", "b"):
            np.save(root / f"{name}.npy", np.zeros((2, 500), np.float32))
            (root / f"{name}.json").write_text('{"sfreq": 100, "ch_names": ["Fz", "Cz"], "unit": "uV"}')
        (tmp_path / "t.csv").write_text("path,subject\na.npy,anna\n")
        found = list_items(CorpusConfig(kind="arrays", root=str(root), subjects=str(tmp_path / "t.csv")))
        assert (found[0].subject, found[0].subject_from) == ("anna", "table")
        assert found[1].subject_from == "unknown"


@pytest.mark.parametrize("pattern", [r"(?P<subject>Q\d+)", r"^(?P<subject>\d{8})/"])
def test_pattern_that_matches_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    write_records(tmp_path / "S01.edf")
    with pytest.raises(RequestError, match=r"matches no recording .* for example, 'S01\.edf'"):
        find(tmp_path, subject_pattern=pattern)


class TestAnnouncements:
    def lines(self, root: Path, **keys) -> list[str]:
        config = CorpusConfig(root=str(root), name="lab", **keys)
        return describe_subjects(config, list_items(config))

    def test_recognised_names_come_with_the_line_that_confirms_them(self, tmp_path: Path) -> None:
        for name in ("S01_a", "S01_b", "S02_a"):
            write_records(tmp_path / f"{name}.edf")
        first, second = self.lines(tmp_path)
        assert "lab: the names of 2 subjects of 3 recordings were recognised" in first
        assert "S01 (S01_a.edf), S02 (S02_a.edf)" in first
        pattern = second.split("subject_pattern: '")[1].split("'")[0]
        confirmed = find(tmp_path, subject_pattern=pattern)
        assert sources(confirmed) == [("S01", "config"), ("S01", "config"), ("S02", "config")]
        assert self.lines(tmp_path, subject_pattern=pattern) == []

    def test_unknown_subjects_are_said(self, tmp_path: Path) -> None:
        for name in ("anna/one", "anna/two", "bert/s13_S07"):
            write_records(tmp_path / f"{name}.edf")
        lines = self.lines(tmp_path)
        assert "lab: the subject of 3 of 3 recordings is not known, for example of anna/one.edf" in lines[0]
        assert "s13_S07.edf contains several names (s13, S07), so no name was used" in lines[1]
        assert "(anna, bert ...) is one person: subject_pattern: '^(?P<subject>[^/]+)/'" in lines[2]

    def test_similar_names_contradictions_and_names_in_paths_are_said(self, tmp_path: Path) -> None:
        write_records(tmp_path / "S1.edf", seed=1)
        write_records(tmp_path / "s01.edf", seed=2)
        write_records(tmp_path / "P04_Haagse.edf", patient=HARRY)
        write_records(tmp_path / "P05.edf", patient=HARRY)
        kept = find(tmp_path, intracranial=True)["P04_Haagse.edf"].info_patch
        assert kept["intracranial"] and "rename the file" in kept["notes"][0]
        text = "\n".join(self.lines(tmp_path))
        assert "the names S1, s01 look like one person" in text
        assert "the paths of 1 of these subjects name several people, for example P04, P05" in text
        assert "the paths of 1 recordings contain the patient's name or number" in text and "0234567" not in text

    def test_name_in_several_folders_is_questioned(self, tmp_path: Path) -> None:
        for name in ("anna/s1", "anna/s2", "bert/s1"):
            write_records(tmp_path / f"{name}.edf")
        assert "s1 is in 2 folders (anna, bert ...): if each folder is one person" in self.lines(tmp_path)[2]

    def test_beginning_of_the_names_is_proposed(self, tmp_path: Path) -> None:
        for name in ("x/anna_1", "x/anna_2", "y/bert_1"):
            write_records(tmp_path / f"{name}.edf")
        pattern = self.lines(tmp_path)[2].split("subject_pattern: '")[1].removesuffix("'")
        assert [item.subject for item in find(tmp_path, subject_pattern=pattern).values()] == ["anna", "anna", "bert"]

    def test_chb21_is_chb01(self, tmp_path: Path) -> None:
        write_records(tmp_path / "chb21_01.edf")
        assert "chb21 is a later recording of the person chb01" in self.lines(tmp_path)[2]


class TestJob:
    """Three jobs with six recordings of three people: the names of the people are unknown, recognised in the paths, or
    confirmed by the config."""

    def shard(self, folder: Path, names: list[str], **corpus) -> tuple[Path, str]:
        import yaml

        for i, name in enumerate(names):
            write_records(
                folder / "root" / f"{name}.edf", patient="X F 02-MAY-1951 X", recording=STARTED, seed=i, seconds=10
            )
        config = {
            "corpora": [{"root": str(folder / "root"), "name": "lab", **corpus}],
            "preprocess": {
                "sfreq": 100,
                "highpass": 1.0,
                "lowpass": 40.0,
                "window": 100,
                "stride": 100,
                "quality": {"leave_out_edges": False},
            },
            "split": {"val_fraction": 0.4, "test_fraction": 0.0},
            "ray": {"num_cpus": 2, "memory_gb": 1},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(config))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert shard([str(folder / "job.yaml"), "--output", str(folder / "set")]) == 0
        return folder / "set", said.getvalue()

    def test_nobody_is_called_clean_whose_identity_is_not_known(self, tmp_path: Path, capsys) -> None:
        output, said = self.shard(tmp_path, [f"{who}{i}" for who in ("anna", "bert", "carl") for i in (1, 2)])
        assert "the subject of 6 of 6 recordings is not known" in said
        assert said.count("test has no subjects: test_fraction is 0") == 2, "at the start and at the end"
        assert verify([str(output)]) == 3
        out = capsys.readouterr().out
        assert "it is not known whether a person is in several splits" in out.splitlines()[-1]
        assert "6 of 6 recordings are unknown" in out and "share nothing" not in out
        page = (output / "report.html").read_text()
        assert "It is not known whether a person appears in more than one split" in page and "message good" not in page
        rows = read_ledger(output)
        assert {(row.subject_from, row.age, row.sex, row.recording_year) for row in rows} == {
            ("unknown", 59, "F", 2011)
        }
        everything = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
        assert b"1951" not in everything and b"12-MAR" not in everything

    def test_recognised_names_keep_a_condition_until_they_are_confirmed(self, tmp_path: Path, capsys) -> None:
        names = [f"P0{i}_{run}" for i in (1, 2, 3) for run in "ab"]
        output, said = self.shard(tmp_path / "one", names)
        assert "the names of 3 subjects of 6 recordings were recognised in the paths" in said
        assert verify([str(output)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert "share nothing, if the subjects of 6 of 6 recordings are right" in last
        write_report(tmp_path / "report.html", read_ledger(output), Manifest.read(output))
        page = (tmp_path / "report.html").read_text()
        assert "recognised from the paths" in page and "message good" not in page
        table = tmp_path / "table.csv"
        table.write_text("path,subject,age,group\nP01*,P01,34,patient\nP02*,P02,40,\nP03*,P03,n/a,control\n")
        confirmed, said = self.shard(tmp_path / "two", names, subjects=str(table), license="CC0-1.0")
        assert "were recognised" not in said
        assert verify([str(confirmed)]) == 0
        assert "the splits share nothing; next" in capsys.readouterr().out.splitlines()[-1]
        rows = {row.path: row for row in read_ledger(confirmed)}
        first = rows["P01_a.edf"]
        assert (first.age, first.group, first.license, first.device) == (34.0, "patient", "CC0-1.0", "Telemetry03")
        assert rows["P03_a.edf"].age == 59, "the header's age, because the table has none"
        shas = [[shard.sha256 for shard in Manifest.read(path).splits["train"]] for path in (output, confirmed)]
        assert shas[0] == shas[1], "the same names give the same shards"
