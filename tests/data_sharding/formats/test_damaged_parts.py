"""If a part of a header or marker file is damaged, the rest of the recording is read, and the ledger gets a note."""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import ReadError, open_signal
from data_sharding.formats.repair.brainvision import repair_header, repair_markers
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import sniff

NAMES = ["Fp1", "Fp2", "C3", "C4"]
START = "Mk1=New Segment,,1,1,0,20200101120000000000"
BAD = "Mk2=Comment,BAD_move,201,100,0"


def open_file(path: Path) -> Signal:
    recording = sniff(path)
    assert recording is not None
    return open_signal(recording)


class TestBrainVision:
    def write(self, folder: Path, *markers: str, edit: Callable[[str], str] = str) -> Path:
        (folder / "a.eeg").write_bytes(np.round(self.signal() * 10).T.astype("<i2").tobytes())
        channels = "\n".join(f"Ch{i}={name},,0.1,µV" for i, name in enumerate(NAMES, start=1))
        text = (
            "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
            f"MarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=4\n"
            f"SamplingInterval=10000\n[Binary Infos]\nBinaryFormat=INT_16\n[Channel Infos]\n{channels}\n"
        )
        (folder / "a.vhdr").write_text(edit(text), encoding="utf-8")
        lines = "\n".join(markers or (START, BAD))
        (folder / "a.vmrk").write_text(
            "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
            f"[Marker Infos]\n{lines}\n",
            encoding="utf-8",
        )
        return folder / "a.vhdr"

    def signal(self) -> np.ndarray:
        return np.random.default_rng(0).normal(0, 20, (4, 600))

    def check(self, signal: Signal, lost: list[str] | None = None, spans: bool = True) -> None:
        info = signal.info
        kept = [name for name in NAMES if name not in (lost or [])]
        assert info.ch_names == kept and info.ch_types == ["eeg"] * len(kept)
        x = signal.read(0, 600, list(range(len(kept))))
        np.testing.assert_allclose(x * 1e6, self.signal()[[NAMES.index(name) for name in kept]], atol=0.051)
        assert [(a, b) for a, b, _ in info.bad_spans] == ([(2.0, 3.0)] if spans else [])

    @pytest.mark.parametrize("row", ["C3,,abc,µV", "C3,,0,µV", "C3,,-0.1,µV", "C3,,nan,µV", "C3", "C3,"])
    def test_channel_without_a_scale_is_left_out(self, tmp_path: Path, row: str) -> None:
        signal = open_file(self.write(tmp_path, edit=lambda text: text.replace("C3,,0.1,µV", row)))
        self.check(signal, ["C3"])
        assert "no scale" in signal.info.left_out["C3"]
        assert any("channel C3 is left out" in note for note in signal.info.notes)

    def test_missing_row_of_a_channel(self, tmp_path: Path) -> None:
        signal = open_file(self.write(tmp_path, edit=lambda text: text.replace("Ch3=C3,,0.1,µV\n", "")))
        self.check(signal, ["C3"])
        assert list(signal.info.left_out) == ["Ch3"]

    def test_header_without_any_scale_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, edit=lambda text: text.replace(",0.1,", ",?,"))
        with pytest.raises(ReadError, match="damaged BrainVision header: no channel has a resolution"):
            open_file(path)

    def test_names_that_are_missing_or_exist_twice(self, tmp_path: Path) -> None:
        edit = lambda text: text.replace("Ch2=Fp2", "Ch2=Fp1").replace("Ch3=C3", "Ch3=")  # noqa: E731
        info = open_file(self.write(tmp_path, edit=edit)).info
        assert info.ch_names == ["Fp1", "Fp1-2", "Ch3", "C4"] and "two channels are named 'Fp1'" in info.notes[0]

    @pytest.mark.parametrize(
        ("rows", "placed", "words"),
        [
            ("Ch1=1,-90,-72\nCh2=1,90,72\nCh3=1,x,0\nCh4=1,45,0", [1, 1, 0, 1], "three numbers: C3 (1)"),
            ("Ch1=1,-90,-72\nCh2=1,90\nCh4=1,45,0", [1, 0, 0, 1], "three numbers: Fp2, C3 (2)"),
            ("Ch1=1,-90,-72\nCh2=1,90,72\nCh3=0,0,0\nCh4=1,45,0", [1, 1, 0, 1], ""),
        ],
    )
    def test_broken_coordinates_cost_the_place(self, tmp_path: Path, rows: str, placed: list[int], words: str) -> None:
        signal = open_file(self.write(tmp_path, edit=lambda text: f"{text}\n[Coordinates]\n{rows}\n"))
        self.check(signal)
        assert [place is not None for place in signal.info.positions] == [bool(here) for here in placed]
        assert words in " ".join(signal.info.notes) and bool(words) == bool(signal.info.notes)

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("Mk3=Stimulus,S  1", "1 entries of the marker file cannot be parsed"),
            ("Mk3=Stimulus,S  1,abc,1,0", "the first is 'Mk3=Stimulus,S  1,abc,1,0'"),
            ("Mk3=New Segment,,301,1,0,20209901120000000000", ""),
            ("Mk3=Comment,BAD_x,5000,100,0", ""),
            ("Mk3=", "cannot be parsed"),
        ],
    )
    def test_broken_line_of_the_marker_file(self, tmp_path: Path, line: str, words: str) -> None:
        signal = open_file(self.write(tmp_path, START, BAD, line))
        self.check(signal)
        assert words in " ".join(signal.info.notes)

    @pytest.mark.parametrize("date", ["20209901120000000000", "2020", "yesterday", "202001011200000000001"])
    def test_wrong_date_costs_the_date(self, tmp_path: Path, date: str) -> None:
        signal = open_file(self.write(tmp_path, f"Mk1=New Segment,,1,1,0,{date}", BAD))
        self.check(signal)
        assert f"an invalid date, which is not used, the first is '{date}'" in signal.info.notes[0]

    def test_text_of_another_encoding(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, START, BAD, "Mk3=Comment,Störung,400,1,0")
        marks = path.with_suffix(".vmrk")
        marks.write_bytes(marks.read_text(encoding="utf-8").encode("latin-1"))
        signal = open_file(path)
        self.check(signal)
        assert signal.info.notes == ["marker file: the text does not fit the code page 'UTF-8'"]
        path.write_text(path.read_text(encoding="utf-8").replace("=UTF-8", "=klingon"), encoding="utf-8")
        signal = open_file(path)
        self.check(signal)
        assert "header: the code page 'klingon' is unknown" in signal.info.notes

    def test_missing_marker_file(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, edit=lambda text: text.replace("MarkerFile=a.vmrk", "MarkerFile=b.vmrk"))
        recording = sniff(path)
        assert recording is not None and path.with_suffix(".vmrk") in recording.files
        signal = open_signal(recording)
        self.check(signal)
        assert signal.info.notes == ["the marker file 'b.vmrk' does not exist; a.vmrk is used"]
        path.with_suffix(".vmrk").unlink()
        signal = open_file(path)
        self.check(signal, spans=False)
        assert "interruptions and bad spans are unknown" in signal.info.notes[0]

    def test_sound_files_are_not_changed(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path, edit=lambda text: f"{text}[Coordinates]\nCh1=1,-90,-72\nCh2=1,90,72\nCh3=1,1,0\nCh4=1,2,0\n"
        )
        text = path.read_text(encoding="utf-8")
        assert repair_header(text).text == text and repair_header(text).notes == []
        marks = path.with_suffix(".vmrk").read_text(encoding="utf-8")
        assert repair_markers(marks).text == marks and open_file(path).info.notes == []


EMPTY = np.zeros((0, 0))


class TestEEGLAB:
    def write(self, folder: Path, channels: list[dict] | None = None, events: list[dict] | None = None) -> Path:
        from scipy.io import savemat

        def structure(rows: list[dict], fields: tuple[str, ...]) -> np.ndarray:
            return np.array([tuple(row.get(f, EMPTY) for f in fields) for row in rows], [(f, object) for f in fields])

        events = events or [{"type": "bad_x", "latency": 201, "duration": 100}]
        eeg = {"setname": "a", "nbchan": 4, "trials": 1, "pnts": 600, "srate": 100.0, "xmin": 0.0, "xmax": 5.99}
        eeg |= {"data": "a.fdt", "icawinv": [], "icaweights": [], "icasphere": []}
        eeg["chanlocs"] = structure(channels or self.channels(), ("labels", "X", "Y", "Z", "type"))
        eeg["event"] = structure(events, ("type", "latency", "duration"))
        savemat(folder / "a.set", {"EEG": eeg}, appendmat=False)
        (folder / "a.fdt").write_bytes(self.signal().T.astype("<f4").tobytes())
        return folder / "a.set"

    def channels(self) -> list[dict]:
        places = [(80, 28, 20), (80, -28, 20), (0, 64, 60), (0, -64, 60)]
        return [
            {"labels": name, "X": float(x), "Y": float(y), "Z": float(z), "type": "EEG"}
            for name, (x, y, z) in zip(NAMES, places, strict=True)
        ]

    def signal(self) -> np.ndarray:
        return np.random.default_rng(0).normal(0, 20, (4, 600))

    def check(self, signal: Signal, words: str, names: list[str] | None = None) -> list[bool]:
        info = signal.info
        assert info.ch_names == (names or NAMES) and len(info.segments) == 1
        np.testing.assert_allclose(signal.read(0, 600, [0, 1, 2, 3]) * 1e6, self.signal(), atol=1e-4)
        assert [(a, b) for a, b, _ in info.bad_spans] == [(2.0, 3.0)]
        assert words in " ".join(info.notes) and len(info.notes) == bool(words)
        return [place is not None for place in info.positions]

    def test_sound_file_is_not_changed(self, tmp_path: Path) -> None:
        assert self.check(open_file(self.write(tmp_path)), "") == [True] * 4

    @pytest.mark.parametrize("value", ["abc", np.array([1.0, 2.0]), 1e6])
    def test_broken_position_costs_this_position(self, tmp_path: Path, value: object) -> None:
        channels = self.channels()
        channels[2]["X"] = value
        note = "positions that are not numbers, or that are far from the head: C3"
        placed = self.check(open_file(self.write(tmp_path, channels)), note)
        assert placed == [True, True, False, True]

    @pytest.mark.parametrize(("label", "name"), [("", "Ch3"), (EMPTY, "Ch3"), (7.0, "7"), ("Fp1", "Fp1-2")])
    def test_broken_label_costs_this_label(self, tmp_path: Path, label: object, name: str) -> None:
        channels = self.channels()
        channels[2]["labels"] = label
        self.check(open_file(self.write(tmp_path, channels)), "channels with", ["Fp1", "Fp2", name, "C4"])

    @pytest.mark.parametrize("count", [3, 5])
    def test_wrong_number_of_labels_costs_all_labels(self, tmp_path: Path, count: int) -> None:
        """The file stores the values of all channels for each sample. If the number of labels were taken as the number
        of channels, most values would be assigned to wrong channels."""
        channels = [*self.channels(), {"labels": "Cz", "X": 0.0, "Y": 0.0, "Z": 85.0}][:count]
        signal = open_file(self.write(tmp_path, channels))
        names = ["EEG 000", "EEG 001", "EEG 002", "EEG 003"]
        assert not any(self.check(signal, f"the file names {count} channels, but contains 4", names))

    @pytest.mark.parametrize(
        ("event", "words"),
        [
            ({"type": "x", "latency": "abc", "duration": 1}, "1 events without a latency"),
            ({"type": "x", "latency": EMPTY, "duration": 1}, "1 events without a latency"),
            ({"type": "x", "latency": 5, "duration": "abc"}, "1 events have a duration that is not a number"),
            ({"type": "boundary", "latency": 90_000.5, "duration": 1}, ""),
            ({"type": EMPTY, "latency": 5, "duration": EMPTY}, ""),
        ],
    )
    def test_broken_event_costs_this_event(self, tmp_path: Path, event: dict, words: str) -> None:
        events = [{"type": "bad_x", "latency": 201, "duration": 100}, event]
        self.check(open_file(self.write(tmp_path, events=events)), words)


class TestRecords:
    """EDF, BDF and GDF files whose header has invalid numbers, or other invalid fields."""

    @pytest.fixture(params=[".edf", ".bdf"])
    def path(self, request: pytest.FixtureRequest, tmp_path: Path, make_raw, write_raw) -> Path:
        return write_raw(make_raw(4, 200, 6, names=NAMES), tmp_path / f"a{request.param}")

    def edit(self, path: Path, at: int, content: str, width: int = 8) -> Path:
        data = bytearray(path.read_bytes())
        data[at : at + width] = content.ljust(width)[:width].encode("latin-1")
        path.write_bytes(data)
        return path

    def limit(self, path: Path, offset: int, channel: int) -> int:
        return 256 + offset * int(path.read_bytes()[252:256]) + 8 * channel

    @pytest.mark.parametrize("count", ["0", "-1", "", "many", "4"])
    def test_file_is_read_to_its_end(self, path: Path, count: str) -> None:
        x = open_file(path).read(0, 1200, [0, 1, 2, 3])
        signal = open_file(self.edit(path, 236, count))
        assert signal.info.n_samples == 1200 and any("the file holds 6" in note for note in signal.info.notes)
        np.testing.assert_array_equal(signal.read(0, 1200, [0, 1, 2, 3]), x)

    def test_incomplete_last_record_is_not_read(self, path: Path) -> None:
        path.write_bytes(self.edit(path, 236, "-1").read_bytes()[:-100])
        assert open_file(path).info.n_samples == 1000

    def test_size_of_the_header_that_is_no_number(self, path: Path) -> None:
        x = open_file(path).read(0, 1200, [0, 1])
        np.testing.assert_array_equal(open_file(self.edit(path, 184, "?")).read(0, 1200, [0, 1]), x)

    @pytest.mark.parametrize(("offset", "value"), [(104, "abc"), (112, ""), (120, "x"), (128, "nan"), (120, "32767")])
    def test_channel_without_a_scale_is_left_out(self, path: Path, offset: int, value: str) -> None:
        x = open_file(path).read(0, 1200, [0, 1, 2, 3])
        if value == "32767":
            self.edit(path, self.limit(path, 128, 2), value)
        signal = open_file(self.edit(path, self.limit(path, offset, 2), value))
        assert signal.info.ch_names == ["Fp1", "Fp2", "C4"] and list(signal.info.left_out) == ["C3"]
        assert any("C3" in note for note in signal.info.notes)
        np.testing.assert_array_equal(signal.read(0, 1200, [0, 1, 2]), x[[0, 1, 3]])

    def test_decimal_comma_is_a_number(self, path: Path) -> None:
        x = open_file(path).read(0, 1200, [2])
        at = self.limit(path, 112, 2)
        value = path.read_bytes()[at : at + 8].decode().strip()
        signal = open_file(self.edit(path, at, f"{float(value):g},0"))
        np.testing.assert_allclose(signal.read(0, 1200, [2]), x, atol=1e-12)

    def test_header_without_any_scale_is_refused(self, path: Path) -> None:
        for channel in range(4):
            self.edit(path, self.limit(path, 120, channel), "7")
            self.edit(path, self.limit(path, 128, channel), "7")
        with pytest.raises(ReadError, match="digital minimum equals its digital maximum"):
            open_file(path)

    @pytest.mark.parametrize(("at", "width"), [(8, 80), (88, 80), (168, 8), (176, 8)])
    def test_person_date_and_time_that_cannot_be_read(self, path: Path, at: int, width: int) -> None:
        assert open_file(self.edit(path, at, "99.99.\xff =a=b", width)).info.n_samples == 1200


class TestPersyst:
    TEXT = (
        "[FileInfo]\nFile=a.dat\nFileType=Interleaved\nSamplingRate=100\nHeaderLength=0\nCalibration=0.1\n"
        "WaveformCount=2\nDataType=0\n[ChannelMap]\nFp1-Ref=1\nFp2-Ref=2\n[SampleTimes]\n0=3600.0\n[Comments]\n"
        "2.0,1.0,0,100,BAD seizure\n[Patient]\nFirst=Ann\nSex=M\nHand=R\nBirthDate=01/01/80\nTestDate=01/01/2020\n"
        "TestTime=00:00:00\n"
    )

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("[Patient]", "3.0,x\n[Patient]", "1 lines of the header's section comments"),
            ("[Patient]", "soon,1,0,100,x\n[Patient]", "1 lines of the header's section comments"),
            ("Fp2-Ref=2", "Fp2-Ref", "1 lines of the header's section channelmap"),
            ("Hand=R", "Hand R", "1 lines of the header's section patient"),
            ("TestDate=01/01/2020", "TestDate=99/99/2020", "the header's TestDate cannot be read"),
            ("TestTime=00:00:00", "TestTime=noon", "the header's TestTime cannot be read"),
            ("BirthDate=01/01/80", "BirthDate=unknown", ""),
            (TEXT[TEXT.index("[Patient]") :], "", ""),
        ],
    )
    def test_broken_line_costs_this_line(self, tmp_path: Path, old: str, new: str, words: str) -> None:
        x = np.random.default_rng(0).integers(-500, 500, (2, 600))
        (tmp_path / "a.lay").write_text(self.TEXT.replace(old, new))
        (tmp_path / "a.dat").write_bytes(x.T.astype("<i2").tobytes())
        signal = open_file(tmp_path / "a.lay")
        assert signal.info.ch_names == ["FP1", "FP2"] and signal.info.bad_spans == [(2.0, 3.0, "BAD seizure")]
        np.testing.assert_allclose(signal.read(0, 600, [0, 1]), x * 0.1e-6, atol=1e-12)
        assert words in " ".join(signal.info.notes) and len(signal.info.notes) == bool(words)
        assert "Ann" not in " ".join(signal.info.notes)


class TestNihonKohden:
    def write(self, folder: Path) -> Path:
        data = bytearray(0x1800)
        data[:16] = data[0x81:0x91] = b"EEG-1100C V01.00"
        data[0x91], data[0x17FE], data[0x411] = 1, 1, 1
        struct.pack_into("<I", data, 0x92, 0x400)
        struct.pack_into("<I", data, 0x412, len(data))
        head = bytearray(0x27 + 20)
        struct.pack_into("<HIxxxxxxB", head, 0x1A, 100, 20, 2)
        head[0x27], head[0x31] = 0, 1
        x = np.random.default_rng(0).integers(-300, 300, (200, 3))
        (folder / "a.EEG").write_bytes(data + head + (x + 0x8000).astype("<u2").tobytes())
        return folder / "a.EEG"

    @pytest.mark.parametrize("broken", [("LOG",), ("PNT",), ("LOG", "PNT")])
    @pytest.mark.parametrize("content", [b"", b"no such version" * 40])
    def test_broken_sidecar_is_not_used(self, tmp_path: Path, broken: tuple[str, ...], content: bytes) -> None:
        path = self.write(tmp_path)
        for suffix in broken:
            path.with_suffix(f".{suffix}").write_bytes(content)
        signal = open_file(path)
        assert signal.info.n_samples == 200 and signal.read(0, 200, [0, 1]).any()
        assert [f"a.{suffix} cannot be parsed, and is not used" in signal.info.notes for suffix in broken] == [
            True
        ] * len(broken)
        assert any("no .21E file" in note for note in signal.info.notes)


class TestMFF:
    def write(self, folder: Path) -> Path:
        from mffpy import Writer
        from mffpy.bin_writer import BinWriter

        writer, signal = Writer(str(folder / "a.mff")), BinWriter(sampling_rate=250, data_type="EEG")
        signal.add_block(np.random.default_rng(0).normal(0, 20, (257, 500)).astype(np.float32))
        writer.addxml("fileInfo", recordTime=datetime(2020, 1, 1, tzinfo=UTC))
        writer.add_coordinates_and_sensor_layout("HydroCel GSN 256 1.0")
        writer.addbin(signal)
        writer.write()
        return folder / "a.mff"

    def test_broken_coordinates_cost_the_positions(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        x = open_file(path).read(0, 500, [0, 100])
        (path / "coordinates.xml").write_text("<coordinates")
        signal = open_file(path)
        assert signal.info.notes == ["coordinates.xml cannot be parsed, and is not used"]
        assert signal.info.positions == [None] * 257
        np.testing.assert_array_equal(signal.read(0, 500, [0, 100]), x)

    def test_broken_physiology_costs_the_physiology(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        x = open_file(path).read(0, 500, [0, 100])
        (path / "signal2.bin").write_bytes((path / "signal1.bin").read_bytes())
        (path / "info2.xml").write_text("<dataInfo")
        signal = open_file(path)
        assert "the physiology" in signal.info.notes[0] and all(place for place in signal.info.positions[:256])
        np.testing.assert_array_equal(signal.read(0, 500, [0, 100]), x)

    def test_recording_without_its_own_header_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        (path / "info1.xml").write_text("<dataInfo")
        with pytest.raises(ReadError, match="unreadable"):
            open_file(path)


class TestMissingValuesOfGDF:
    def write(self, folder: Path, x: np.ndarray) -> Path:
        """Write GDF 2.2 with 32-bit floats, records of 0.5 s at 100 Hz, and a digital range from -30000 to 30000."""
        n, count = len(x), x.shape[1] // 50
        head = bytearray(256)
        head[:8] = b"GDF 2.20"
        struct.pack_into("<H", head, 184, n + 1)
        struct.pack_into("<qIIH", head, 236, count, 1, 2, n)
        limits = struct.pack(f"<{4 * n}d", *[-3000.0] * n, *[3000.0] * n, *[-30000.0] * n, *[30000.0] * n)
        columns = b"".join(name.encode().ljust(16) for name in NAMES[:n]) + bytes(86 * n)
        columns += (
            struct.pack(f"<{n}H", *[4275] * n)
            + limits
            + bytes(80 * n)
            + struct.pack(f"<{2 * n}i", *[50] * n, *[16] * n)
        )
        data = x.reshape(n, count, 50).transpose(1, 0, 2).astype("<f4").tobytes()
        (folder / "a.gdf").write_bytes(bytes(head) + columns + bytes(256 * n - len(columns)) + data)
        return folder / "a.gdf"

    @pytest.mark.parametrize("value", [np.nan, 1e9, -40_000.0])
    def test_missing_values_of_one_channel_are_read_as_nan(self, tmp_path: Path, value: float) -> None:
        x = np.random.default_rng(0).normal(0, 200, (3, 400))
        y = x.copy()
        y[1, 130:260] = value
        signal = open_file(self.write(tmp_path, y))
        assert [(s.start, s.stop) for s in signal.info.segments] == [(0, 400)]
        x[1, 130:260] = np.nan
        for start, stop in ((0, 400), (120, 200), (255, 270), (399, 400)):
            np.testing.assert_allclose(
                signal.read(start, stop, [0, 1, 2]) * 1e6, x[:, start:stop] / 10, rtol=1e-4, atol=1e-3
            )
        np.testing.assert_allclose(signal.read(100, 300, [2, 1]) * 1e6, x[[2, 1], 100:300] / 10, rtol=1e-4, atol=1e-3)
