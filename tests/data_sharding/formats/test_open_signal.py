"""Files are recognised by their content, and their gaps are found. Every file that may be a recording is listed."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import NotContinuous, ReadError, neuroscan_data_format, open_signal
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import find_recordings, sniff

N_LISTINGS = [0]
sys.addaudithook(lambda event, _: N_LISTINGS.__setitem__(0, N_LISTINGS[0] + (event in ("os.scandir", "os.listdir"))))


def open_file(path: Path) -> Signal:
    recording = sniff(path)
    assert recording is not None
    return open_signal(recording)


def read_all(signal: Signal, picks: list[int] | None = None) -> np.ndarray:
    return signal.read(0, signal.info.n_samples, picks or list(range(len(signal.info.ch_names))))


def list_segments(signal: Signal) -> list[tuple[int, int, float]]:
    return [(s.start, s.stop, round(s.onset, 6)) for s in signal.info.segments]


def make_cnt_header(n_channels: int, n_samples: int, events: int) -> bytearray:
    head = bytearray(900 + 75 * n_channels)
    head[:11] = b"Version 3.0"
    head[370:372] = n_channels.to_bytes(2, "little")
    head[376:378] = (250).to_bytes(2, "little")
    head[864:868] = n_samples.to_bytes(4, "little")
    head[886:890] = events.to_bytes(4, "little")
    return head


def write_egi(path: Path, x: np.ndarray, rate: int = 250, version: int = 4) -> Path:
    """Write an EGI simple binary file of 32-bit floats (version 4): all channels of the first sample, then of the
    second, and so on."""
    n = len(x)
    head = struct.pack(">i6hi5hih", version, 2020, 1, 2, 3, 4, 5, 0, rate, n, 1, 0, 0, x.shape[1], 0)
    path.write_bytes(head + x.T.astype(">f4").tobytes())
    return path


def write_persyst(path: Path, x: np.ndarray, times: str = "") -> Path:
    names = "\n".join(f"{name}-Ref={i}" for i, name in enumerate(["Fp1", "Fp2", "Cz", "Pz"][: len(x)], start=1))
    path.write_text(
        f"[FileInfo]\nFile=C:\\data\\{path.stem}.dat\nFileType=Interleaved\nSamplingRate=100\nHeaderLength=0\n"
        f"Calibration=0.1\nWaveformCount={len(x)}\nDataType=0\n[ChannelMap]\n{names}\n[SampleTimes]\n{times}"
        "[Patient]\nFirst=a\nLast=b\nSex=M\nHand=R\nID=1\nBirthDate=01/01/1980\nTestDate=01/01/2020\nTestTime=00:00:00\n"
    )
    path.with_suffix(".dat").write_bytes(x.T.astype("<i2").tobytes())
    return path


def write_xdf(path: Path, streams: list[tuple[str, str, np.ndarray, np.ndarray]]) -> Path:
    """Write an XDF file. Each stream is a tuple (type, unit, time stamps, samples [S, n])."""

    def chunk(tag: int, content: bytes) -> bytes:
        return b"\x04" + struct.pack("<IH", len(content) + 2, tag) + content

    data = b"XDF:" + chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>")
    for number, (kind, unit, stamps, x) in enumerate(streams, start=1):
        channels = "".join(
            f"<channel><label>{label}</label><unit>{unit}</unit><type>{kind}</type></channel>"
            for label in ["Fp1", "Cz", "Pz"][: x.shape[1]]
        )
        rate = 0 if kind == "Markers" else 100
        xml = (
            f"<?xml version='1.0'?><info><name>s{number}</name><type>{kind}</type><channel_count>{x.shape[1]}"
            f"</channel_count><nominal_srate>{rate}</nominal_srate><channel_format>float32</channel_format>"
            f"<created_at>1</created_at><desc><channels>{channels}</channels></desc></info>"
        )
        data += chunk(2, struct.pack("<I", number) + xml.encode())
        samples = b"".join(
            b"\x08" + struct.pack("<d", t) + row.astype("<f4").tobytes() for t, row in zip(stamps, x, strict=True)
        )
        data += chunk(3, struct.pack("<I", number) + b"\x04" + struct.pack("<I", len(x)) + samples)
        footer = f"<?xml version='1.0'?><info><first_timestamp>{stamps[0]}</first_timestamp></info>"
        data += chunk(6, struct.pack("<I", number) + footer.encode())
    path.write_bytes(data)
    return path


def write_gdf(path: Path, x: np.ndarray, runs: list[int]) -> Path:
    """Write a GDF 1.25 file of 16 bits, with records of 50 samples (0.5 s), and an event 0x7ffe at each sample in
    `runs`."""
    n, n_records = len(x), x.shape[1] // 50
    head = bytearray(256)
    head[:8] = b"GDF 1.25"
    struct.pack_into("<q", head, 184, 256 * (n + 1))
    struct.pack_into("<qIII", head, 236, n_records, 1, 2, n)
    names = b"".join(name.encode().ljust(16) for name in ["EEG-Fz", "EEG-Cz", "EOG-left"][:n])
    ranges = struct.pack(f"<{4 * n}d", *[-3276.8] * n, *[3276.7] * n, *[0.0] * 2 * n)
    ranges = ranges[: 16 * n] + struct.pack(f"<{2 * n}q", *[-32768] * n, *[32767] * n)
    rest = bytes(80 * n) + struct.pack(f"<{2 * n}i", *[50] * n, *[3] * n) + bytes(32 * n)
    data = x.reshape(n, n_records, 50).transpose(1, 0, 2).astype("<i2").tobytes()
    events = b"\x01" + (100).to_bytes(3, "little") + struct.pack("<I", len(runs))
    events += struct.pack(f"<{len(runs)}I", *[r + 1 for r in runs]) + struct.pack(
        f"<{len(runs)}H", *[0x7FFE] * len(runs)
    )
    path.write_bytes(bytes(head) + names + bytes(80 * n) + b"uV      " * n + ranges + rest + data + events)
    return path


class TestSniff:
    @pytest.mark.parametrize("suffix", [".edf", ".bdf", ".vhdr", ".set", "_raw.fif"])
    def test_written_recording_is_read_back(self, tmp_path: Path, make_raw, write_raw, suffix: str) -> None:
        raw = make_raw(4, 200, 3)
        path = write_raw(raw, tmp_path / f"a{suffix}")
        found = find_recordings(tmp_path)
        assert [r.path for r in found] == [path] and found[0].problem is None
        assert set(found[0].files) == set(tmp_path.iterdir())
        back = open_signal(found[0])
        assert back.info.ch_names[:4] == raw.ch_names and back.info.sfreq == 200
        assert list_segments(back) == [(0, back.info.n_samples, 0.0)] and not back.info.epoched
        np.testing.assert_allclose(back.read(0, 600, [0, 1, 2, 3]), raw.get_data(), atol=0.05e-6)
        np.testing.assert_allclose(back.read(123, 456, [2, 0]), raw.get_data()[[2, 0], 123:456], atol=0.05e-6)
        back.close()

    def test_format_is_recognised_by_content_and_not_by_name(self, tmp_path: Path, make_raw, write_raw) -> None:
        raw = make_raw(3, 100, 3)
        path = write_raw(raw, tmp_path / "a.edf")
        for name in ("a.bdf", "a.rec", "a"):
            path = path.rename(tmp_path / name)
            recording = sniff(path)
            assert recording is not None and recording.format == "edf"
            np.testing.assert_allclose(read_all(open_signal(recording), [0, 1, 2]), raw.get_data(), atol=0.05e-6)

    def test_cnt_files_of_neuroscan_and_ant_are_distinguished(self, tmp_path: Path) -> None:
        (tmp_path / "neuroscan.cnt").write_bytes(make_cnt_header(2, 10, 0) + bytes(40))
        (tmp_path / "ant.cnt").write_bytes(b"RIFF" + struct.pack("<I", 104) + b"CNT LIST" + bytes(100))
        (tmp_path / "ant64.cnt").write_bytes(b"RF64" + struct.pack("<Q", 104) + b"CNT LIST" + bytes(100))
        (tmp_path / "other.cnt").write_bytes(b"something else")
        got = {r.path.stem: (r.format, r.problem) for r in find_recordings(tmp_path)}
        assert got["neuroscan"] == ("neuroscan", None) and got["ant"] == got["ant64"] == ("ant", None)
        assert got["other"][1] is not None

    def test_sidecars_are_not_listed_as_recordings(self, tmp_path: Path) -> None:
        for name in ("x.EEG", "x.PNT", "x.LOG", "x.21E"):
            (tmp_path / name).write_bytes(b"EEG-1100C V01.00" + bytes(200))
        (tmp_path / "y.cdt").write_bytes(bytes(80))
        (tmp_path / "y.cdt.dpa").write_text("DATA_PARAMETERS START\n NumSamples = 10\n NumChannels = 2\n")
        write_persyst(tmp_path / "z.lay", np.zeros((2, 5)))
        got = {r.path.name: (r.format, len(r.files), r.problem) for r in find_recordings(tmp_path)}
        assert got == {"x.EEG": ("nihon", 4, None), "y.cdt": ("curry", 2, None), "z.lay": ("persyst", 2, None)}

    def test_missing_sidecars_are_reported(self, tmp_path: Path, make_raw, write_raw) -> None:
        write_raw(make_raw(2, 100, 2), tmp_path / "a.vhdr").with_suffix(".eeg").unlink()
        (tmp_path / "y.cdt").write_bytes(bytes(100))
        (tmp_path / "z.lay").write_text("[FileInfo]\nFile=z.dat\n")
        (tmp_path / "f.mff").mkdir()
        (tmp_path / "f.mff" / "info.xml").write_text("<x/>")
        (tmp_path / "alone.eeg").write_bytes(bytes(100))
        found = {r.path.name: r.problem or "" for r in find_recordings(tmp_path)}
        assert set(found) == {"a.vhdr", "y.cdt", "z.lay", "f.mff", "alone.eeg"}
        assert all("missing" in problem or "without its header" in problem for problem in found.values())
        with pytest.raises(ReadError, match=r"sidecar missing: the header names 'a\.eeg'"):
            open_file(tmp_path / "a.vhdr")

    def test_empty_and_foreign_files_are_reported_and_hidden_files_are_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "empty.bdf").write_bytes(b"")
        (tmp_path / "garbage.edf").write_bytes(b"not an EEG file at all")
        (tmp_path / "notes.txt").write_text("nothing")
        (tmp_path / "._cut.edf").write_bytes(b"\x00\x05\x16\x07")
        (tmp_path / "data.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
        (tmp_path / "clinic.trc").write_bytes(bytes(200))
        found = {r.path.name: r for r in find_recordings(tmp_path)}
        got = {name: r.problem or "" for name, r in found.items()}
        assert set(got) == {"empty.bdf", "garbage.edf", "data.mat", "clinic.trc"}
        assert "empty" in got["empty.bdf"] and "unreadable" in got["garbage.edf"] and "Micromed" in got["clinic.trc"]
        assert "kind arrays" in got["data.mat"] and not found["data.mat"].continuous

    def test_broken_link_is_reported_and_pipe_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "gone.edf").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "pipe.bdf")
        got = {r.path.name: r.problem for r in find_recordings(tmp_path)}
        assert got == {"gone.edf": "unreadable: No such file or directory"}

    def test_object_store_gives_the_same_recordings(self, tmp_path: Path, make_raw, write_raw) -> None:
        from upath import UPath

        write_raw(make_raw(2, 100, 3), tmp_path / "sub" / "a.edf")
        write_raw(make_raw(2, 100, 3), tmp_path / "b.vhdr")
        write_egi(tmp_path / "c.raw", np.zeros((3, 50)))
        (tmp_path / "net.mff").mkdir()
        (tmp_path / "net.mff" / "signal1.bin").write_bytes(bytes(10))
        (tmp_path / "broken.gdf").write_bytes(b"GDF 2.20" + bytes(300))
        remote = UPath("memory://sniffed")
        for file in (f for f in tmp_path.rglob("*") if f.is_file()):
            target = remote / file.relative_to(tmp_path).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

        def describe(root: Path | UPath) -> list[tuple]:
            prefix = len(root.as_posix())
            return [
                (r.path.as_posix()[prefix:], r.format, [f.as_posix()[prefix:] for f in r.files], r.problem)
                for r in find_recordings(root)
            ]

        assert describe(remote) == describe(tmp_path) and len(describe(remote)) == 5

    def test_folder_is_listed_only_once(self, tmp_path: Path, make_raw, write_raw) -> None:
        source = write_raw(make_raw(2, 100, 2), tmp_path / "source.vhdr")
        text = source.read_text()
        for i in range(200):
            (tmp_path / f"{i}.vhdr").write_text(text)
            (tmp_path / f"{i}_raw.fif").write_bytes(b"\0\0\0\x64" + bytes(60))
        before = N_LISTINGS[0]
        assert len(find_recordings(tmp_path)) == 401
        assert N_LISTINGS[0] - before < 5


class TestTruncated:
    """A file is refused as truncated if its header states more data than the file contains."""

    def get_reason(self, path: Path) -> str:
        recording = sniff(path)
        assert recording is not None
        if recording.problem:
            return recording.problem
        with pytest.raises(ReadError) as error:
            open_signal(recording)
        return str(error.value)

    @pytest.mark.parametrize("suffix", [".edf", ".bdf", ".vhdr", "_raw.fif"])
    def test_truncated_recording_is_refused(self, tmp_path: Path, make_raw, write_raw, suffix: str) -> None:
        path = write_raw(make_raw(4, 200, 10), tmp_path / f"a{suffix}")
        data = path.with_suffix(".eeg") if suffix == ".vhdr" else path
        data.write_bytes(data.read_bytes()[:-3001])
        assert self.get_reason(path).startswith("truncated: ")

    def test_truncated_edf_reports_the_number_of_records(self, tmp_path: Path, make_raw, write_raw) -> None:
        path = write_raw(make_raw(4, 200, 10), tmp_path / "a.edf")
        path.write_bytes(path.read_bytes()[:-3000])
        assert self.get_reason(path).startswith("truncated: the header states 10 records, but the file has 8.")

    def test_truncated_data_file_of_eeglab_is_refused(self, tmp_path: Path) -> None:
        from scipy.io import savemat

        eeg = {"setname": "a", "nbchan": 2, "trials": 1, "pnts": 400, "srate": 100.0, "xmin": 0.0, "xmax": 3.99}
        eeg |= {"data": "a.fdt", "chanlocs": [], "event": []}
        savemat(tmp_path / "a.set", {"EEG": eeg}, appendmat=False)
        x = np.random.default_rng(0).normal(0, 10, (400, 2)).astype("<f4")
        (tmp_path / "a.fdt").write_bytes(x.tobytes())
        np.testing.assert_allclose(read_all(open_file(tmp_path / "a.set")), x.T * 1e-6, rtol=1e-6)
        (tmp_path / "a.fdt").write_bytes(x.tobytes()[:-80])
        assert self.get_reason(tmp_path / "a.set") == "truncated: the header states 400 samples, but the file has 390"
        (tmp_path / "a.fdt").unlink()
        assert self.get_reason(tmp_path / "a.set").startswith("sidecar missing: ")

    def test_truncated_neuroscan_and_ant_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "n.cnt").write_bytes(make_cnt_header(2, 100, 900 + 150 + 400) + bytes(300))
        (tmp_path / "a.cnt").write_bytes(b"RIFF" + struct.pack("<I", 5000) + b"CNT LIST" + bytes(100))
        assert (
            self.get_reason(tmp_path / "n.cnt")
            == "truncated: the header states 1450 bytes of signal, but the file has 1350"
        )
        assert self.get_reason(tmp_path / "a.cnt").startswith("truncated: ")

    def test_truncated_files_of_other_formats_are_refused(self, tmp_path: Path) -> None:
        path = write_egi(tmp_path / "a.raw", np.zeros((3, 50)))
        path.write_bytes(path.read_bytes()[:-10])
        assert self.get_reason(path).startswith("truncated: ")
        path = write_persyst(tmp_path / "b.lay", np.zeros((3, 50)))
        path.with_suffix(".dat").write_bytes(bytes(3 * 2 * 50 - 1))
        assert self.get_reason(path).startswith("truncated: ")
        (tmp_path / "y.cdt").write_bytes(bytes(79))
        (tmp_path / "y.cdt.dpa").write_text("DATA_PARAMETERS START\n NumSamples = 10\n NumChannels = 2\n")
        assert self.get_reason(tmp_path / "y.cdt").startswith("truncated: ")
        path = write_xdf(tmp_path / "d.xdf", [("EEG", "uV", np.arange(50) / 100, np.zeros((50, 2)))])
        path.write_bytes(path.read_bytes()[:-20])
        assert self.get_reason(path).startswith("truncated: ")


class TestSegments:
    def test_gaps_of_edf_plus_start_new_segments(self, tmp_path: Path, make_raw, write_raw) -> None:
        import mne

        raw = make_raw(2, 100, 6)
        raw.set_annotations(mne.Annotations([0.5, 4.5], [0.25, 0.1], ["BAD blink", "word"]))
        path = write_raw(raw, tmp_path / "a.edf")
        data = bytearray(path.read_bytes())
        assert data[192:197] == b"EDF+C"
        data[192:197] = b"EDF+D"
        path.write_bytes(data)
        assert list_segments(open_file(path)) == [(0, 600, 0.0)]
        for second in (3, 4, 5):
            data = data.replace(f"+{second}\x14\x14".encode(), f"+{second + 4}\x14\x14".encode(), 1)
        path.write_bytes(data)
        signal = open_file(path)
        assert list_segments(signal) == [(0, 300, 0.0), (300, 600, 7.0)]
        assert signal.info.bad_spans == [(0.5, 0.75, "BAD blink")]
        np.testing.assert_allclose(read_all(signal), raw.get_data(), atol=0.05e-6)

    def test_edf_plus_record_without_onset_continues_the_record_before_it(
        self, tmp_path: Path, make_raw, write_raw
    ) -> None:
        path = write_raw(make_raw(2, 100, 5), tmp_path / "a.edf")
        data = path.read_bytes().replace(b"EDF+C", b"EDF+D", 1)
        path.write_bytes(data.replace(b"+1\x14\x14", b"xx\x14\x14", 1))
        signal = open_file(path)
        assert list_segments(signal) == [(0, 500, 0.0)] and "1 records of 5 have no onset" in signal.info.notes
        # A gap can be before or after the record without an onset, so this record becomes a separate segment.
        for second in (2, 3, 4):
            data = data.replace(f"+{second}\x14\x14".encode(), f"+{second + 5}\x14\x14".encode(), 1)
        path.write_bytes(data.replace(b"+1\x14\x14", b"xx\x14\x14", 1))
        assert list_segments(open_file(path)) == [(0, 100, 0.0), (100, 200, 1.0), (200, 500, 7.0)]
        path.write_bytes(data.replace(b"+0\x14\x14", b"xx\x14\x14", 1))
        with pytest.raises(ReadError, match="record 1 has no onset"):
            open_file(path)

    def test_boundaries_of_eeglab_start_new_segments(self, tmp_path: Path, make_raw, write_raw) -> None:
        import mne

        raw = make_raw(2, 100, 6)
        raw.set_annotations(mne.Annotations([1.995, 4.0, 5.0], [3.0, 0.5, 0.0], ["boundary", "BAD", "target"]))
        signal = open_file(write_raw(raw, tmp_path / "a.set"))
        # The duration of a boundary is the length of the removed signal, so the samples after the boundary are good.
        assert list_segments(signal) == [(0, 200, 0.0), (200, 600, 2.0)]
        assert [(round(a, 3), round(b, 3), word) for a, b, word in signal.info.bad_spans] == [(4.0, 4.5, "BAD")]
        np.testing.assert_allclose(signal.read(150, 450, [1, 0]), raw.get_data()[::-1, 150:450], atol=1e-9)

    def test_segments_bad_channels_and_mains_of_fif_are_read(self, tmp_path: Path, make_raw, write_raw) -> None:
        import mne

        raw = mne.concatenate_raws([make_raw(3, 100, 4, seed=1), make_raw(3, 100, 2, seed=2)], verbose="ERROR")
        raw.annotations.append(1.0, 0.5, "BAD_ACQ_SKIP")
        raw.info["bads"], raw.info["line_freq"] = ["Fp2"], 60
        signal = open_file(write_raw(raw, tmp_path / "a_raw.fif"))
        assert list_segments(signal) == [(0, 100, 0.0), (150, 400, 1.5), (400, 600, 4.0)]
        assert signal.info.bads == ["Fp2"] and signal.info.line_freq == 60.0 and signal.info.bad_spans == []

    @pytest.mark.parametrize("dated", [False, True])
    def test_time_is_counted_from_the_first_sample(self, tmp_path: Path, make_raw, dated: bool) -> None:
        raw = make_raw(2, 100, 8)
        if dated:
            raw.set_meas_date(1_600_000_000)
        for onset, duration, word in ((4.0, 1.0, "BAD_ACQ_SKIP"), (6.0, 0.5, "BAD_move")):
            raw.annotations.append(onset, duration, word)
        raw.crop(2.0)
        raw.save(tmp_path / "a_raw.fif", verbose="ERROR")
        signal = open_file(tmp_path / "a_raw.fif")
        assert list_segments(signal) == [(0, 200, 0.0), (300, 600, 3.0)]
        assert [(round(a, 6), round(b, 6)) for a, b, _ in signal.info.bad_spans] == [(4.0, 4.5)]

    def test_markers_of_brainvision_start_new_segments(self, tmp_path: Path, make_raw, write_raw) -> None:
        import mne

        raw = make_raw(2, 100, 4)
        path = write_raw(raw, tmp_path / "a.vhdr")
        marks = path.with_suffix(".vmrk")
        marks.write_text(
            "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nDataFile=a.eeg\n[Marker Infos]\n"
            "Mk1=New Segment,,1,1,0,20200101000000000000\nMk2=New Segment,,251,1,0,20200101000100000000\n"
        )
        assert list_segments(open_file(path)) == [(0, 250, 0.0), (250, 400, 2.5)]
        text = path.read_text().replace("[Binary", "SegmentationType=MARKERBASED\nSegmentDataPoints=100\n[Binary")
        path.write_text(text)
        epoched = open_file(path)
        # The recording was stopped inside the third epoch.
        assert epoched.info.epoched and [s.start for s in epoched.info.segments] == [0, 100, 200, 250, 300]
        assert mne.io.read_raw_brainvision(path, verbose="ERROR").n_times == 400

    def test_runs_of_gdf_are_segments(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).integers(-500, 500, (3, 400))
        signal = open_file(write_gdf(tmp_path / "a.gdf", x, [0, 150]))
        assert list_segments(signal) == [(0, 150, 0.0), (150, 400, 1.5)]
        np.testing.assert_allclose(read_all(signal), x * 0.1e-6, atol=1e-9)

    def test_data_blocks_of_nihon_kohden_are_segments(self, tmp_path: Path) -> None:
        """The samples are also right if the requested range crosses the border of two data blocks."""
        rng, n = np.random.default_rng(0), 2
        blocks = [rng.integers(-300, 300, (100, n + 1)), rng.integers(-300, 300, (200, n + 1))]
        data = bytearray(0x1800)
        data[:16] = data[0x81:0x91] = b"EEG-1100C V01.00"
        data[0x91], data[0x17FE] = 1, 1
        struct.pack_into("<I", data, 0x92, 0x400)
        data[0x411] = len(blocks)
        for i, block in enumerate(blocks):
            struct.pack_into("<I", data, 0x412 + 20 * i, len(data))
            head = bytearray(0x27 + 10 * n)
            struct.pack_into("<HIxxxxxxB", head, 0x1A, 100, len(block) // 10, n)
            head[0x27], head[0x31] = 0, 1
            data += head + (block + 0x8000).astype("<u2").tobytes()
        (tmp_path / "a.EEG").write_bytes(data)
        signal = open_file(tmp_path / "a.EEG")
        assert list_segments(signal) == [(0, 100, 0.0), (100, 300, 1.0)] and signal.info.ch_names == ["FP1", "FP2"]
        x = np.concatenate(blocks)[:, :2].T
        got = 1e6 * signal.read(50, 250, [1, 0])
        np.testing.assert_allclose(got, x[::-1, 50:250] * 6399.902 / 65535, atol=0.1)
        (tmp_path / "a.EEG").write_bytes(data[:-100])
        with pytest.raises(ReadError, match=r"^truncated: "):
            open_file(tmp_path / "a.EEG")

    def test_time_jumps_of_persyst_start_new_segments(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).integers(-500, 500, (3, 400))
        path = write_persyst(tmp_path / "a.lay", x, "0=3600.0\n100=3601.0\n250=3662.5\n")
        signal = open_file(path)
        assert [(s.start, s.stop) for s in signal.info.segments] == [(0, 250), (250, 400)]
        np.testing.assert_allclose(read_all(signal), x * 0.1e-6, atol=1e-12)
        # Names of patients may be in any character encoding.
        path.write_bytes(path.read_bytes().replace(b"First=a", b"First=Jos\xe9"))
        np.testing.assert_allclose(read_all(open_file(path)), x * 0.1e-6, atol=1e-12)


class TestEpochs:
    @pytest.mark.parametrize("suffix", ["-epo.fif", ".set"])
    def test_each_epoch_is_one_segment(self, tmp_path: Path, make_raw, suffix: str) -> None:
        import mne

        epochs = mne.make_fixed_length_epochs(make_raw(3, 100, 5), 1.0, preload=True, verbose="ERROR")
        path = tmp_path / f"a{suffix}"
        epochs.save(path, verbose="ERROR") if suffix == "-epo.fif" else epochs.export(str(path), verbose="ERROR")
        signal = open_file(path)
        assert signal.info.epoched and signal.info.n_samples == 500 and signal.info.ch_names == epochs.ch_names
        assert list_segments(signal) == [(100 * i, 100 * i + 100, float(i)) for i in range(5)]
        x = np.concatenate(list(epochs.get_data()), axis=1)
        np.testing.assert_allclose(signal.read(0, 500, [0, 1, 2]), x, atol=1e-9)
        np.testing.assert_allclose(signal.read(130, 410, [2, 0]), x[[2, 0], 130:410], atol=1e-9)
        np.testing.assert_allclose(signal.read(200, 300, [1]), x[[1], 200:300], atol=1e-9)

    def test_averages_are_refused(self, tmp_path: Path, make_raw) -> None:
        import mne

        epochs = mne.make_fixed_length_epochs(make_raw(3, 100, 4), 1.0, preload=True, verbose="ERROR")
        epochs.average().save(tmp_path / "a-ave.fif", verbose="ERROR")
        with pytest.raises(NotContinuous, match="averages"):
            open_file(tmp_path / "a-ave.fif")


class TestSeveralSamplingRates:
    def write(self, path: Path, rates: dict[str, tuple[float, str]]) -> dict[str, np.ndarray]:
        import edfio

        rng = np.random.default_rng(0)
        data = {label: rng.normal(0, 20, int(8 * rate)) for label, (rate, _) in rates.items()}
        edfio.Edf(
            [
                edfio.EdfSignal(x, rates[label][0], label=label, physical_dimension=rates[label][1])
                for label, x in data.items()
            ]
        ).write(path)
        return data

    def test_sampling_rate_is_that_of_the_eeg_channels(self, tmp_path: Path) -> None:
        rates = {"EEG Fpz-Cz": (100.0, "uV"), "EEG Pz-Oz": (100.0, "uV"), "Sound": (200.0, "uV"), "Temp": (1.0, "C")}
        data = self.write(tmp_path / "a.edf", rates | {"SaO2": (100.0, "%")})
        signal = open_file(tmp_path / "a.edf")
        assert signal.info.sfreq == 100.0 and signal.info.ch_names == ["EEG Fpz-Cz", "EEG Pz-Oz", "SaO2"]
        assert signal.info.ch_types == ["eeg", "eeg", "misc"]
        assert signal.info.left_out == {"Sound": "another rate: 200 Hz", "Temp": "another rate: 1 Hz"}
        x = np.stack([data["EEG Fpz-Cz"], data["EEG Pz-Oz"]]) * 1e-6
        blocks = [signal.read(a, min(a + 130, 800), [0, 1]) for a in range(0, 800, 130)]
        np.testing.assert_allclose(np.concatenate(blocks, axis=1), x, atol=0.01e-6)

    def test_eeg_channels_at_other_rates_are_resampled(self, tmp_path: Path) -> None:
        import edfio

        def make_sine(rate: float) -> np.ndarray:
            return 50 + 30 * np.sin(2 * np.pi * 7 * np.arange(int(9 * rate)) / rate)

        rates = {"Fp1": 200.0, "Fp2": 200.0, "Cz": 100.0, "Pz": 400.0, "Oz": 32.0, "Sound": 400.0}
        signals = [
            edfio.EdfSignal(make_sine(rate), rate, label=label, physical_dimension="uV", physical_range=(-100, 100))
            for label, rate in rates.items()
        ]
        edfio.Edf(signals).write(tmp_path / "a.edf")
        signal = open_file(tmp_path / "a.edf")
        info = signal.info
        assert info.ch_names == ["Fp1", "Fp2", "Oz", "Cz", "Pz"] and info.sfreq == 200 and info.bads == ["Oz"]
        assert info.left_out == {"Sound": "another rate: 400 Hz"} and "Oz 32 Hz" in info.notes[0]
        whole = read_all(signal)
        assert whole.shape == (5, 1800)
        # After resampling, all channels contain the same sine.
        np.testing.assert_allclose(whole[:, 200:1600], np.broadcast_to(whole[0, 200:1600], (5, 1400)), atol=0.5e-6)
        for block in (1, 37, 450):
            parts = [signal.read(a, min(a + block, 1800), [3, 0, 2, 4]) for a in range(0, 1800, block)][:40]
            joined = np.concatenate(parts, axis=1)
            np.testing.assert_allclose(joined, whole[[3, 0, 2, 4], : joined.shape[1]], atol=1e-12)


class TestOtherFormats:
    def test_brainvision_files_with_windows_paths_are_found(self, tmp_path: Path, make_raw, write_raw) -> None:
        raw = make_raw(2, 100, 3)
        path = write_raw(raw, tmp_path / "a.vhdr")
        path.with_suffix(".eeg").rename(tmp_path / "A.EEG")
        path.write_text(path.read_text().replace("DataFile=a.eeg", "DataFile=C:\\data\\a.eeg"))
        recording = sniff(path)
        assert recording is not None and len(recording.files) == 3
        signal = open_signal(recording)
        np.testing.assert_allclose(read_all(signal), raw.get_data(), atol=0.05e-6)

    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
    def test_brainvision_header_is_read_in_its_encoding(
        self, tmp_path: Path, make_raw, write_raw, encoding: str
    ) -> None:
        raw = make_raw(2, 100, 3)
        path = write_raw(raw, tmp_path / "müller.vhdr")
        text = path.read_text(encoding="utf-8")
        path.write_bytes(text.replace("UTF-8", encoding.upper()).encode(encoding))
        signal = open_file(path)
        np.testing.assert_allclose(read_all(signal), raw.get_data(), atol=0.05e-6)

    @pytest.mark.parametrize(("encoding", "end"), [("utf-16", "\n"), ("utf-16", "\r\n"), ("utf-8", "\r")])
    @pytest.mark.parametrize("page", ["UTF-8", "UTF-16"])
    def test_brainvision_texts_that_mne_does_not_read(
        self, tmp_path: Path, make_raw, write_raw, encoding: str, end: str, page: str
    ) -> None:
        import mne

        raw = make_raw(2, 100, 10)
        raw.set_annotations(mne.Annotations([4.0], [1.0], ["BAD"]))
        path = write_raw(raw, tmp_path / "a.vhdr")
        for file in (path, path.with_suffix(".vmrk")):
            text = file.read_text(encoding="utf-8").replace("UTF-8", page).replace("\n", end)
            file.write_bytes(text.encode(encoding))
        signal = open_file(path)
        np.testing.assert_allclose(read_all(signal), raw.get_data(), atol=0.05e-6)
        assert [(a, b) for a, b, _ in signal.info.bad_spans] == [(4.0, 5.0)]

    def test_big_endian_brainvision_is_refused(self, tmp_path: Path, make_raw, write_raw) -> None:
        path = write_raw(make_raw(2, 100, 3), tmp_path / "a.vhdr")
        path.write_text(path.read_text().replace("BinaryFormat", "UseBigEndianOrder=YES\nBinaryFormat"))
        with pytest.raises(ReadError, match="big-endian"):
            open_file(path)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"IEEE_FLOAT_32": "UINT_16"}, "the samples have the format UINT_16; export the recording again"),
            ({"BINARY": "ASCII", "MULTIPLEXED": "VECTORIZED"}, "each line is a channel"),
            ({"DataFormat=BINARY": "DataFormat=ASCII\nSkipColumns=1"}, "other columns come first"),
        ],
    )
    def test_brainvision_samples_without_a_reader_have_a_clear_reason(
        self, tmp_path: Path, make_raw, write_raw, changes: dict[str, str], reason: str
    ) -> None:
        path = write_raw(make_raw(2, 100, 3), tmp_path / "a.vhdr")
        text = path.read_text(encoding="utf-8")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ReadError, match=reason):
            open_file(path)

    @pytest.mark.parametrize("separator", [" ", "\t"])
    def test_brainvision_samples_as_text(self, tmp_path: Path, make_raw, write_raw, separator: str) -> None:
        raw = make_raw(2, 100, 3)
        path = write_raw(raw, tmp_path / "a.vhdr")
        text = path.read_text(encoding="utf-8").replace("DataFormat=BINARY", "DataFormat=ASCII")
        about = "[ASCII Infos]\nDecimalSymbol=.\nSkipLines=0\nSkipColumns=0\n\n"
        path.write_text(text.replace("[Channel Infos]", f"{about}[Channel Infos]"), encoding="utf-8")
        scale = float(text.split("Ch1=")[1].split(",")[2])
        rows = (1e6 * raw.get_data() / scale).T
        lines = [separator.join(f"{value:.6f}" for value in row) for row in rows]
        path.with_suffix(".eeg").write_text("\n".join(lines) + "\n")
        if separator == " ":
            np.testing.assert_allclose(read_all(open_file(path)), raw.get_data(), atol=1e-9)
        else:
            with pytest.raises(ReadError, match="neither spaces nor commas separate the numbers"):
                open_file(path)

    def test_egi_simple_binary_is_read(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).normal(0, 20, (3, 500)).astype(np.float32)
        signal = open_file(write_egi(tmp_path / "a.raw", x))
        assert signal.info.ch_names == ["E1", "E2", "E3"] and signal.info.sfreq == 250
        np.testing.assert_allclose(read_all(signal), x * 1e-6, rtol=1e-5)
        with pytest.raises(NotContinuous, match="segmented"):
            open_file(write_egi(tmp_path / "b.raw", x, version=5))

    def test_eeg_stream_of_xdf_is_read(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(0, 20, (600, 3))
        stamps = 1000 + np.arange(600) / 100 + rng.normal(0, 1e-4, 600)
        stamps[300:] += 12.0
        marks = ("Markers", "", stamps[::100], np.ones((6, 1)))
        signal = open_file(write_xdf(tmp_path / "a.xdf", [marks, ("EEG", "microvolts", stamps, x)]))
        assert signal.info.ch_names == ["Fp1", "Cz", "Pz"] and signal.info.sfreq == pytest.approx(100, rel=1e-3)
        assert [(s.start, s.stop, round(s.onset, 1)) for s in signal.info.segments] == [(0, 300, 0.0), (300, 600, 15.0)]
        np.testing.assert_allclose(signal.read(100, 500, [2, 0]), x.T[[2, 0], 100:500] * 1e-6, rtol=1e-5)
        with pytest.raises(NotContinuous, match="no stream of type EEG: only Markers"):
            open_file(write_xdf(tmp_path / "b.xdf", [marks]))
        with pytest.raises(ReadError, match="2 streams of type EEG"):
            open_file(write_xdf(tmp_path / "c.xdf", [("EEG", "uV", stamps, x), ("EEG", "uV", stamps, x)]))

    def test_missing_reader_package_is_reported(
        self, tmp_path: Path, make_raw, write_raw, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_xdf(tmp_path / "a.xdf", [("EEG", "uV", np.arange(50) / 100, np.zeros((50, 2)))])
        monkeypatch.setitem(sys.modules, "pyxdf", None)
        with pytest.raises(ReadError, match=r"^reader not installed: pip install pyxdf$"):
            open_file(path)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("counted", [True, False])
def test_number_of_bits_of_neuroscan_is_recognised(tmp_path: Path, bits: int, counted: bool) -> None:
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, 20, (500, 6)), axis=0).astype(f"<i{bits // 8}")
    size = 900 + 75 * 6 + x.nbytes
    path = tmp_path / "a.cnt"
    path.write_bytes(bytes(make_cnt_header(6, 500 if counted else 7, size)) + x.tobytes() + bytes(60))
    assert neuroscan_data_format(path) == f"int{bits}"


def test_parts_of_a_split_fif_are_one_recording(tmp_path: Path, make_raw) -> None:
    raw = make_raw(8, 1000, 60)
    raw.save(tmp_path / "long_raw.fif", split_size="2MB", buffer_size_sec=1, verbose="ERROR")
    assert len(list(tmp_path.iterdir())) > 1
    found = find_recordings(tmp_path)
    assert len(found) == 1 and set(found[0].files) == set(tmp_path.iterdir())
    assert open_signal(found[0]).info.n_samples == raw.n_times


def test_subfolders_are_searched_and_hidden_folders_are_ignored(tmp_path: Path, make_raw, write_raw) -> None:
    path = write_raw(make_raw(2, 100, 2), tmp_path / "deep" / "er" / "a.edf")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(path, tmp_path / ".hidden" / "b.edf")
    assert [r.path for r in find_recordings(tmp_path)] == [path]


def test_circular_link_does_not_repeat_recordings(tmp_path: Path, make_raw, write_raw) -> None:
    path = write_raw(make_raw(2, 100, 2), tmp_path / "sub" / "a.edf")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [r.path for r in find_recordings(tmp_path)] == [path]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read everything")
def test_unreadable_file_gets_a_reason(tmp_path: Path, make_raw, write_raw) -> None:
    path = write_raw(make_raw(2, 100, 2), tmp_path / "a.edf")
    path.chmod(0)
    assert (find_recordings(tmp_path)[0].problem or "").startswith("unreadable")
