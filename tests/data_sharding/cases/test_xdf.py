"""XDF files with lost packets, jitter and faulty clocks are read with the right sampling rate, segments and times.

The true signal is a function of the amplifier's time, that is, of the sample number divided by the sampling rate. The
time stamps come from the recording computer, and have jitter, drift and faults.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyxdf

from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.sniffing import sniff
from data_sharding.formats.stamps import fit_clock
from data_sharding.formats.xdf import read_markers
from data_sharding.processing.preprocess import PreprocessSpec
from data_sharding.processing.quality import QualitySpec

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SPEC = PreprocessSpec(window=256, stride=256, quality=QualitySpec(leave_out_edges=False))
"""Settings that do not leave out the windows at the ends of segments, so that the first window shows the onset of its
segment."""
SECONDS = 40
BEGIN = 1000.0
"""First time stamp in seconds."""


def write_xdf(
    path: Path,
    stamps: np.ndarray,
    uv: np.ndarray,
    nominal: float,
    *,
    chunks: list[int],
    own: np.ndarray | None = None,
    offsets: Sequence[tuple[float, float]] = (),
    markers: Sequence[tuple[float, str | float]] = (),
    marker_offsets: Sequence[tuple[float, float]] = (),
    marker_format: str = "string",
    marker_type: str = "Markers",
) -> None:
    """Write an XDF file with a stream of EEG [n, S] in microvolts.

    `own` is a mask of the samples whose time stamp is stored.

    `markers` contains the time stamps and texts (or numbers) of a second stream. `marker_offsets` contains the clock
    offsets of this second stream.
    """

    def chunk(tag: int, content: bytes) -> bytes:
        return b"\x04" + struct.pack("<IH", len(content) + 2, tag) + content

    channels = "".join(
        f"<channel><label>{name}</label><unit>microvolts</unit><type>EEG</type></channel>" for name in NAMES
    )
    xml = (
        f"<?xml version='1.0'?><info><name>amp</name><type>EEG</type><channel_count>{len(uv)}</channel_count>"
        f"<nominal_srate>{nominal:g}</nominal_srate><channel_format>float32</channel_format><created_at>1</created_at>"
        f"<desc><channels>{channels}</channels></desc></info>"
    )
    parts = [b"XDF:", chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>")]
    parts += [chunk(2, struct.pack("<I", 1) + xml.encode())]
    parts += [chunk(4, struct.pack("<Idd", 1, time, value)) for time, value in offsets]
    rows, at = uv.T.astype("<f4"), 0
    for size in chunks:
        body = b"".join(
            (b"\x08" + struct.pack("<d", stamps[i]) if own is None or own[i] else b"\0") + rows[i].tobytes()
            for i in range(at, at + size)
        )
        parts.append(chunk(3, struct.pack("<I", 1) + b"\x04" + struct.pack("<I", size) + body))
        at += size
    if markers:
        xml = (
            f"<?xml version='1.0'?><info><name>events</name><type>{marker_type}</type><channel_count>1</channel_count>"
            f"<nominal_srate>0</nominal_srate><channel_format>{marker_format}</channel_format>"
            "<created_at>1</created_at></info>"
        )
        parts.append(chunk(2, struct.pack("<I", 2) + xml.encode()))
        parts += [chunk(4, struct.pack("<Idd", 2, time, value)) for time, value in marker_offsets]

        def encode(value: str | float) -> bytes:
            if isinstance(value, str):
                return b"\x01" + bytes([len(value.encode())]) + value.encode()
            return np.array(value, {"double64": "<f8", "float32": "<f4"}.get(marker_format, marker_format)).tobytes()

        body = b"".join(b"\x08" + struct.pack("<d", time) + encode(value) for time, value in markers)
        parts.append(chunk(3, struct.pack("<I", 2) + b"\x04" + struct.pack("<I", len(markers)) + body))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(parts))


def make_chunks(n: int, size: int) -> list[int]:
    return [size] * (n // size) + ([n % size] if n % size else [])


def add_jitter(stamps: np.ndarray, kind: str, chunks: list[int], rate: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Return time stamps with jitter, and a mask of the samples whose time stamp is stored (None: all samples)."""
    random = np.random.default_rng(7)
    first = np.cumsum([0, *chunks])[:-1]
    own = np.zeros(len(stamps), bool)
    own[first] = True
    late = np.repeat(random.normal(0, 0.004, len(chunks)), chunks)
    if kind == "sample":
        return stamps + random.normal(0, 0.002, len(stamps)), None
    if kind == "chunk":
        return stamps + late, own
    if kind == "equal":  # All samples of a chunk have the same time stamp: the time at which the chunk arrived.
        return np.repeat((stamps + late)[first], chunks), None
    if kind == "drift":
        return BEGIN + (stamps - BEGIN) * (1 + 50e-6) + random.normal(0, 0.0003, len(stamps)), None
    return stamps, None


@pytest.mark.parametrize(
    ("rate", "lost_s", "jitter"),
    [
        (128, 0.1, "none"),
        (250, 0.1, "chunk"),
        (250, 0.6, "equal"),
        (500, 0.1, "sample"),
        (500, 0.6, "drift"),
        (1000, 0.1, "chunk"),
        (2048, 0.1, "sample"),
        (2048, 7.0, "chunk"),
    ],
)
def test_lost_packets_end_a_segment(
    tmp_path: Path, shard_all, assert_true, true_uv, rate: int, lost_s: float, jitter: str
) -> None:
    cut = rate * SECONDS // 2
    lost = round(lost_s * rate)
    index = np.concatenate([np.arange(cut), np.arange(cut + lost, rate * SECONDS)])
    chunks = make_chunks(cut, rate // 16) + make_chunks(len(index) - cut, rate // 16)
    stamps, own = add_jitter(BEGIN + index / rate, jitter, chunks, rate)
    write_xdf(tmp_path / "x" / "a.xdf", stamps, true_uv(50, 8, index / rate), rate, chunks=chunks, own=own)
    sharded = shard_all(tmp_path / "x", SPEC)["a.xdf"]
    assert sharded.row.sfreq == rate
    assert not sharded.touches(cut / rate, (cut + lost) / rate - 0.0015)
    behind = [a for a, _ in sharded.spans if a > cut / rate]
    # The first window after the gap begins with the first sample after the gap. Because of the jitter, the time of this
    # window can be wrong by 1.5 ms.
    assert behind and abs(behind[0] - (cut + lost) / rate) <= max(1.01 / rate, 0.0015)
    assert sharded.row.seconds_written > SECONDS - lost_s - 4
    assert_true(sharded, 50)


def _without_ends(sharded, cut: float):
    """Remove the two windows next to a cut without a gap, because the filters have a transient at the ends of
    segments."""
    kept = [sample for sample, (a, b) in zip(sharded.samples, sharded.spans, strict=True) if a > cut or b < cut - 0.01]
    return dataclasses.replace(sharded, samples=kept)


def test_case_of_lost_packets(cases: Path, shard_all, assert_true) -> None:
    sharded = shard_all(cases / "xdf", SPEC)["x01_drop06.xdf"]
    assert sharded.row.sfreq == 250 and not sharded.touches(30, 30.6)
    assert 30.6 in [a for a, _ in sharded.spans]
    assert_true(sharded, 501)


def test_case_of_a_clock_that_is_set_back(cases: Path, shard_all, assert_true) -> None:
    sharded = shard_all(cases / "xdf", SPEC)["x05_back08.xdf"]
    assert sharded.row.sfreq == 250 and not any(a < 29.999 and b > 30.001 for a, b in sharded.spans)
    assert "jump back by 0.8 s at 30.0 s" in " ".join(sharded.row.notes)
    assert_true(_without_ends(sharded, 30), 505)


@pytest.mark.parametrize(("back_s", "jitter"), [(0.8, "chunk"), (2.0, "sample"), (40.0, "none")])
def test_clock_that_is_set_back_ends_a_segment(
    tmp_path: Path, shard_all, assert_true, true_uv, back_s: float, jitter: str
) -> None:
    index = np.arange(250 * SECONDS)
    chunks = make_chunks(len(index), 25)
    stamps, own = add_jitter(BEGIN + index / 250, jitter, chunks, 250)
    stamps = stamps - back_s * (index >= 5000)
    write_xdf(tmp_path / "x" / "a.xdf", stamps, true_uv(51, 8, index / 250), 250, chunks=chunks, own=own)
    sharded = shard_all(tmp_path / "x", SPEC)["a.xdf"]
    assert sharded.row.sfreq == 250 and not any(a < 19.999 and b > 20.001 for a, b in sharded.spans)
    assert f"jump back by {back_s:g} s at 20.0 s" in " ".join(sharded.row.notes)
    assert_true(_without_ends(sharded, 20), 51)


def _swap(index: np.ndarray, a: int, b: int, size: int) -> np.ndarray:
    blocks = index.reshape(-1, size).copy()
    blocks[[a, b]] = blocks[[b, a]]
    return blocks.ravel()


@pytest.mark.parametrize(
    ("what", "jitter", "note"),
    [
        ("two chunks exchanged", "sample", "chunks are stored in a wrong order"),
        ("a chunk far from its place", "none", "chunks are stored in a wrong order"),
        ("a chunk stored twice", "chunk", "25 samples are stored twice; each is used once"),
        ("zero stamps", "chunk", "25 samples have no valid time stamp"),
        ("no numbers", "none", "80 samples have no valid time stamp"),
        ("a chunk comes late", "sample", ""),
        ("a nominal rate of 0", "chunk", "the stream declares no rate; its time stamps give 250 Hz"),
        ("a wrong nominal rate", "chunk", "the stream declares 256 Hz; its time stamps give 250 Hz"),
        ("clock offsets", "sample", ""),
    ],
)
def test_other_faults_of_stamps_are_mended(
    tmp_path: Path, shard_all, assert_true, true_uv, what: str, jitter: str, note: str
) -> None:
    index = np.arange(250 * SECONDS)
    chunks, nominal, offsets = make_chunks(len(index), 25), 250.0, ()
    stamps, own = add_jitter(BEGIN + index / 250, jitter, chunks, 250)
    if what == "two chunks exchanged":
        index = _swap(index, 150, 151, 25)
    elif what == "a chunk far from its place":
        index = _swap(index, 150, 300, 25)
    elif what == "a chunk stored twice":
        index, chunks = np.insert(index, 5000, index[4975:5000]), [*chunks, 25]
    stamps = stamps[index]
    if own is not None and len(index) != len(own):
        own = np.arange(len(index)) % 25 == 0
    if what == "zero stamps":
        stamps[4000:4025], own = 0, None
    elif what == "no numbers":
        stamps[np.random.default_rng(3).choice(len(stamps), 80, replace=False)] = np.nan
        own = None
    elif what == "a chunk comes late":
        stamps[4000:4025] += 0.3
    elif what == "a nominal rate of 0":
        nominal = 0.0
    elif what == "a wrong nominal rate":
        nominal = 256.0
    elif what == "clock offsets":
        offsets = tuple((BEGIN + s, 100 + 0.01 * (-1) ** s) for s in range(0, SECONDS, 5))
    write_xdf(
        tmp_path / "x" / "a.xdf",
        stamps,
        true_uv(52, 8, index / 250),
        nominal,
        chunks=chunks,
        own=own,
        offsets=offsets,
    )
    sharded = shard_all(tmp_path / "x", SPEC)["a.xdf"]
    assert sharded.row.sfreq == 250 and len(sharded.samples) == 40
    assert note in " ".join(sharded.row.notes) and bool(note) == bool(sharded.row.notes), sharded.row.notes
    assert_true(sharded, 52)


def test_clock_set_anew_is_corrected_by_the_offsets(tmp_path: Path, shard_all, assert_true, true_uv) -> None:
    """The computer of the amplifier is restarted after 20 s, which takes 30 s. The clock offsets in the file show the
    pause."""
    index = np.concatenate([np.arange(5000), np.arange(12500, 17500)])
    stamps = BEGIN + index / 250
    stamps[5000:] -= 990.0
    offsets = [*((BEGIN + s, 5.0) for s in range(0, 20, 5)), *((60.0 + s, 995.0) for s in range(0, 20, 5))]
    write_xdf(tmp_path / "x" / "a.xdf", stamps, true_uv(53, 8, index / 250), 250, chunks=[25] * 400, offsets=offsets)
    sharded = shard_all(tmp_path / "x", SPEC)["a.xdf"]
    assert "was reset" in " ".join(sharded.row.notes) and not sharded.touches(20, 50)
    assert 50.0 in [a for a, _ in sharded.spans]
    assert_true(sharded, 53)


def test_many_gaps_are_all_found(tmp_path: Path, shard_all, assert_true, true_uv) -> None:
    random = np.random.default_rng(4)
    lost = np.zeros(250 * 60, int)
    places = np.sort(random.choice(np.arange(1, 12), 6, replace=False)) * 1250
    for place in places:
        lost[place:] += random.integers(25, 250)
    index = np.arange(len(lost)) + lost
    stamps = BEGIN + index / 250 + random.normal(0, 0.001, len(index))
    write_xdf(tmp_path / "x" / "a.xdf", stamps, true_uv(54, 8, index / 250), 250, chunks=make_chunks(len(index), 25))
    sharded = shard_all(tmp_path / "x", SPEC)["a.xdf"]
    for place in places:
        begin, end = index[place - 1] / 250, index[place] / 250
        assert not sharded.touches(begin + 0.004, end - 1e-5) and end in [a for a, _ in sharded.spans]
    assert_true(sharded, 54)


@pytest.mark.parametrize("what", ["random times", "rate changes", "no times"])
def test_streams_without_a_steady_clock_are_refused(tmp_path: Path, shard_all, true_uv, what: str) -> None:
    index = np.arange(250 * SECONDS)
    stamps = BEGIN + index / 250
    if what == "random times":
        stamps = BEGIN + np.sort(np.random.default_rng(0).uniform(0, SECONDS, len(index)))
    elif what == "rate changes":
        stamps[5000:] += (index[5000:] - 5000) / 500
    else:
        stamps[:] = np.nan
    write_xdf(tmp_path / "x" / "a.xdf", stamps, true_uv(55, 8, index / 250), 250, chunks=[25] * 400)
    row = shard_all(tmp_path / "x", SPEC)["a.xdf"].row
    assert row.status == "quarantined"
    assert row.category == ("no time stamps" if what == "no times" else "the stream has no steady rate")


def _add_stream(path: Path, number: int, uv: np.ndarray | None, label: str = "Fp1") -> None:
    """Append the header of a stream of type EEG to a file, and its samples if it has samples."""
    channel = f"<channel><label>{label}</label><unit>microvolts</unit><type>EEG</type></channel>"
    xml = (
        "<?xml version='1.0'?><info><name>second</name><type>EEG</type><channel_count>1</channel_count>"
        "<nominal_srate>250</nominal_srate><channel_format>float32</channel_format><created_at>1</created_at>"
        f"<desc><channels>{channel}</channels></desc></info>"
    )
    content = struct.pack("<I", number) + xml.encode()
    data = b"\x04" + struct.pack("<IH", len(content) + 2, 2) + content
    if uv is not None:
        body = b"".join(b"\x08" + struct.pack("<df", BEGIN + i / 250, value) for i, value in enumerate(uv))
        content = struct.pack("<I", number) + b"\x04" + struct.pack("<I", len(uv)) + body
        data += b"\x04" + struct.pack("<IH", len(content) + 2, 3) + content
    path.write_bytes(path.read_bytes() + data)


def test_streams_without_samples_do_not_count(tmp_path: Path, shard_all, assert_true, true_uv) -> None:
    index = np.arange(250 * SECONDS)
    for folder in ("silent", "both"):
        path = tmp_path / folder / "a.xdf"
        write_xdf(path, BEGIN + index / 250, true_uv(57, 8, index / 250), 250, chunks=[25] * 400)
        _add_stream(path, 9, None if folder == "silent" else np.ones(5000))
    sharded = shard_all(tmp_path / "silent", SPEC)["a.xdf"]
    assert sharded.row.notes == ["the stream second of type EEG has no samples"]
    assert_true(sharded, 57)
    row = shard_all(tmp_path / "both", SPEC)["a.xdf"].row
    assert row.reason == (
        "2 streams of type EEG (amp, second), and the reader cannot choose a stream; export one EEG stream"
    )


def test_equal_labels_have_a_note(tmp_path: Path, shard_all, assert_true, true_uv) -> None:
    index = np.arange(250 * SECONDS)
    path = tmp_path / "x" / "a.xdf"
    write_xdf(path, BEGIN + index / 250, true_uv(58, 8, index / 250), 250, chunks=[25] * 400)
    path.write_bytes(path.read_bytes().replace(b"<label>P4<", b"<label>P3<"))
    sharded = shard_all(path.parent, SPEC)["a.xdf"]
    note = "2 channels are named 'P3': the first keeps its name and position, the others get a number"
    assert sharded.row.notes == [note]
    assert_true(sharded, 58, names=[*NAMES[:7], "P3-1"])


class TestMarkerStreams:
    """A marker of a marker stream divides the recording at the sample with the time of the marker."""

    RATE = 250

    def write(self, folder: Path, true_uv, index: np.ndarray, markers: Sequence[tuple[float, Any]], **more) -> Path:
        """Write the samples with the numbers `index`, and markers. The times of markers are in seconds after the first
        sample."""
        later = more.pop("later", 0.0)
        stamps = BEGIN + index * (1 + more.pop("drift", 0.0)) / self.RATE
        write_xdf(
            folder / "x" / "a.xdf",
            stamps,
            true_uv(51, 8, index / self.RATE),
            self.RATE,
            chunks=make_chunks(len(index), 25),
            markers=[(BEGIN + later + time, text) for time, text in markers],
            **more,
        )
        return folder / "x" / "a.xdf"

    def segments(self, path: Path) -> tuple[list[tuple[int, int, float]], list[str]]:
        recording = sniff(path)
        assert recording is not None
        info = open_signal(recording).info
        return [(s.start, s.stop, round(s.onset, 4)) for s in info.segments], info.notes

    def test_on_the_same_clock(self, tmp_path: Path, true_uv) -> None:
        markers = [(3.0, "stimulus 1"), (8.002, "boundary"), (12.0, "BAD_ACQ_SKIP"), (16.0, "badge")]
        segments, notes = self.segments(self.write(tmp_path, true_uv, np.arange(5000), markers))
        assert segments == [(0, 2001, 0.0), (2001, 3000, 8.004), (3000, 5000, 12.0)] and not notes

    def test_on_the_clock_of_another_computer(self, tmp_path: Path, true_uv) -> None:
        every = np.arange(BEGIN, BEGIN + 40, 5.0)
        path = self.write(
            tmp_path,
            true_uv,
            np.arange(10_000),
            [(8.0, "boundary"), (32.0, "boundary")],
            later=500.0,
            offsets=[(t, 2.0 + 50e-6 * (t - BEGIN)) for t in every],
            marker_offsets=[(t + 500, -498.0) for t in every],
        )
        segments, _ = self.segments(path)
        # The clock of the EEG is 50 ppm slower than the clock of the markers, so the marker at 32 s comes 1.6 ms before
        # sample 8000.
        assert segments == [(0, 2000, 0.0), (2000, 8000, 8.0), (8000, 10_000, 32.0)]

    def test_after_a_gap_and_with_a_drifting_amplifier(self, tmp_path: Path, true_uv) -> None:
        index = np.concatenate([np.arange(2500), 2500 + 1000 + np.arange(5000)])
        drift = 50e-6
        times = [time * (1 + drift) for time in (5.0, 12.0, 20.0)]
        path = self.write(tmp_path, true_uv, index, [(time, "New Segment") for time in times], drift=drift)
        segments, _ = self.segments(path)
        # The marker at 12 s is in the gap, so it divides no segment.
        assert segments == [(0, 1250, 0.0), (1250, 2500, 5.0), (2500, 4000, 14.0), (4000, 7500, 20.0)]

    def test_bad_marks_without_duration_have_a_note(self, tmp_path: Path, true_uv, shard_all, assert_true) -> None:
        path = self.write(tmp_path, true_uv, np.arange(10_000), [(20.0, "BAD_move"), (21.0, "New Segment")])
        sharded = shard_all(path.parent, SPEC)["a.xdf"]
        assert sharded.row.notes == ["the mark 'BAD_move' has no duration, so no span is left out"]
        assert sharded.row.segments == 2 and not any(a < 20.999 and b > 21.001 for a, b in sharded.spans)
        assert_true(_without_ends(sharded, 21.0), 51)

    def test_only_markers(self, tmp_path: Path, true_uv) -> None:
        path = self.write(tmp_path, true_uv, np.arange(5000), [(3.0, ""), (8.0, "\u00fc" * 100)])
        assert self.segments(path) == ([(0, 5000, 0.0)], [])

    def test_two_marks_make_a_bad_span(self, tmp_path: Path, true_uv, shard_all, assert_true) -> None:
        markers = [
            (0.0, "start"),
            (20.0, "BAD_move start"),
            (21.0, "stimulus 1"),
            (22.5, "BAD_move end"),
            (39.0, "end"),
        ]
        path = self.write(tmp_path, true_uv, np.arange(10_000), markers)
        sharded = shard_all(path.parent, SPEC)["a.xdf"]
        assert not sharded.row.notes and sharded.row.segments == 1
        assert sharded.row.windows_left_out == {"overlaps a span marked as bad": 3} and not sharded.touches(20, 22.5)
        assert_true(sharded, 51)

    @pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "float32", "double64"])
    def test_codes_are_events_that_divide_nothing(self, tmp_path: Path, true_uv, kind: str) -> None:
        codes = [(3.0, 1), (8.002, -99), (16.0, 7 if kind.startswith("int") else np.nan)]
        path = self.write(tmp_path, true_uv, np.arange(5000), codes, marker_format=kind, marker_type="Stim")
        assert self.segments(path) == ([(0, 5000, 0.0)], [])
        streams, _ = pyxdf.load_xdf(str(path), synchronize_clocks=False, dejitter_timestamps=False)
        clock = fit_clock(BEGIN + np.arange(5000) / 250, 250.0, np.zeros((5000, 1)), [5000], ((), ()))
        events = read_markers(streams[1:], clock, ((), ()))
        texts = ["1", "-99", "7"] if kind.startswith("int") else ["1", "-99"]
        assert [event.text for event in events] == texts
        assert [round(event.onset, 6) for event in events] == [3.0, 8.002, 16.0][: len(texts)]
        assert not any(event.duration for event in events)

    def test_other_streams_of_numbers_are_not_read(self, tmp_path: Path, true_uv) -> None:
        """The second stream has an unknown number format. This causes no error, because the second stream contains no
        events."""
        path = self.write(tmp_path, true_uv, np.arange(5000), [(8.0, 1.0)], marker_format="int32", marker_type="Gaze")
        path.write_bytes(path.read_bytes().replace(b"<channel_format>int32<", b"<channel_format>int99<"))
        assert self.segments(path) == ([(0, 5000, 0.0)], [])
