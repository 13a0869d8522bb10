"""Every row of the table of interruptions in docs/formats.md is tested with small files of the formats in this row. The
segments and bad spans must be exact to the sample."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.marks.interruptions import TABLE
from data_sharding.formats.mne_signal import RawSignal
from data_sharding.formats.open_signal import ReadError, open_signal
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import sniff

NAMES = ["Fp1", "Fp2", "C3", "C4"]
HZ = 100


@dataclass(frozen=True)
class Example:
    """A function that writes a file of at least 6 seconds at 100 Hz; and the expected segments, bad spans and notes."""

    write: Callable[[Path], Path | Signal]
    segments: list[tuple[int, int, float]]
    spans: list[tuple[float, float]] = field(default_factory=list)


def open_file(path: Path) -> Signal:
    recording = sniff(path)
    assert recording is not None
    return open_signal(recording)


def noise(samples: int = 600, n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 20, (n, samples))


def make_raw(marks: Sequence[tuple[float, float, str]] = (), samples: int = 600):
    import mne

    raw = mne.io.RawArray(noise(samples) * 1e-6, mne.create_info(NAMES, HZ, "eeg"), verbose="ERROR")
    if marks:
        raw.set_annotations(mne.Annotations(*zip(*marks, strict=True)))
    return raw


def memory(format_: str, marks: list[tuple[float, float, str]]) -> Callable[[Path], Signal]:
    """Return a function that makes a recording in memory. This recording is treated as a file of the format
    `format_`."""
    return lambda folder: RawSignal(make_raw(marks), format_=format_)


def brainvision(*markers: str, samples: int = 600, more: str = "") -> Callable[[Path], Path]:
    """Return a function that writes a BrainVision file. A marker is a text "type,description,position,size,channel"."""

    def write(folder: Path) -> Path:
        (folder / "a.eeg").write_bytes((noise(samples) * 10).T.astype("<i2").tobytes())
        channels = "\n".join(f"Ch{i}={name},,0.1,µV" for i, name in enumerate(NAMES, start=1))
        (folder / "a.vhdr").write_text(
            "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
            f"MarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=4\n"
            f"SamplingInterval=10000\n{more}[Binary Infos]\nBinaryFormat=INT_16\n[Channel Infos]\n{channels}\n"
        )
        lines = "\n".join(f"Mk{i}={line}" for i, line in enumerate(markers, start=1))
        (folder / "a.vmrk").write_text(
            "Brain Vision Data Exchange Marker File, Version 1.0\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
            f"[Marker Infos]\n{lines}\n"
        )
        return folder / "a.vhdr"

    return write


def eeglab(events: list[tuple[object, float, float]], trials: int = 1, **fields: object) -> Callable[[Path], Path]:
    """Return a function that writes an EEGLAB file. An event is (type, latency, duration); sample 1 has latency 1.

    `fields` replaces fields of the structure EEG in the EEGLAB file.
    """

    def write(folder: Path) -> Path:
        from scipy.io import savemat

        dtype = [("type", object), ("latency", object), ("duration", object)]
        if trials > 1:
            dtype.append(("epoch", object))
        length = 600 // trials
        rows = [
            (kind, latency, duration, *([int((latency - 1) // length) + 1] if trials > 1 else []))
            for kind, latency, duration in events
        ]
        data = noise() if trials == 1 else noise().reshape(4, trials, length).transpose(0, 2, 1)
        eeg = {"setname": "a", "nbchan": 4, "trials": trials, "pnts": length, "srate": float(HZ), "xmin": 0.0}
        eeg |= {
            "xmax": (length - 1) / HZ,
            "data": data,
            "event": np.array(rows, dtype),
            "icawinv": [],
            "icaweights": [],
        }
        eeg |= {"chanlocs": np.array([(name,) for name in NAMES], [("labels", object)]), "icasphere": []}
        if trials > 1:
            eeg["epoch"] = np.array([(i + 1,) for i in range(trials)], [("event", object)])
        savemat(folder / "a.set", {"EEG": eeg | fields}, appendmat=False)
        return folder / "a.set"

    return write


def edf_header(
    suffix: str, kind: str, labels: list[str], per_record: list[int], n_records: int, record_s: float
) -> str:
    n = len(labels)
    bits = 24 if suffix == ".bdf" else 16
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    limits = [(low, high)] * n
    columns = [
        *(label.ljust(16) for label in labels),
        *["".ljust(80)] * n,
        *(("" if "Annot" in label else "Boolean" if label == "Status" else "uV").ljust(8) for label in labels),
        *[str(low / 10).ljust(8)[:8]] * n,
        *[str(high / 10).ljust(8)[:8]] * n,
        *(str(a).ljust(8) for a, _ in limits),
        *(str(b).ljust(8) for _, b in limits),
        *["".ljust(80)] * n,
        *(str(count).ljust(8) for count in per_record),
        *["".ljust(32)] * n,
    ]
    version = "\xffBIOSEMI" if suffix == ".bdf" else "0       "
    fixed = version + "X X X X".ljust(80) + "Startdate X X X X".ljust(80) + "01.01.2000.00.00"
    fixed += f"{256 * (n + 1):<8}{kind:<44}{n_records:<8}{record_s:<8g}{n:<4}"
    return fixed + "".join(columns)


def edf(
    times: list[float],
    notes: dict[tuple[int, int], str] | None = None,
    *,
    kind: str = "EDF+C",
    signals: int = 1,
    suffix: str = ".edf",
    n_records: int | None = None,
    status: np.ndarray | None = None,
    name: str = "a",
) -> Callable[[Path], Path]:
    """Return a function that writes an EDF or BDF file with records of 1 s. `times` contains the onsets of the records,
    and `status` contains the values of the Status channel. `notes` maps a pair (index of a record, index of an
    annotation signal) to the text of its annotations."""

    def write(folder: Path) -> Path:
        width, count = (3, len(times)) if suffix == ".bdf" else (2, len(times))
        labels = [*NAMES, *(["Status"] if status is not None else [])]
        labels += [f"{suffix[1:].upper()} Annotations"] * signals
        per_record = [HZ] * (len(labels) - signals) + [60] * signals
        x = np.round(noise(HZ * count) * 10).astype(int)
        rows = list(x) + ([status] if status is not None else [])
        text = edf_header(suffix, kind, labels, per_record, count if n_records is None else n_records, 1.0)
        data = bytearray(text.encode("latin-1"))
        for record in range(count):
            for row in rows:
                part = np.asarray(row[HZ * record : HZ * (record + 1)], "<i4")
                data += part.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
            for signal in range(signals):
                tal = f"+{times[record]:g}\x14\x14\x00" if signal == 0 else ""
                tal += (notes or {}).get((record, signal), "")
                data += tal.encode().ljust(60 * width, b"\0")
        path = folder / f"{name}{suffix}"
        path.write_bytes(data)
        return path

    return write


def biosemi(changes: dict[int, int], seconds: int = 6) -> Callable[[Path], Path]:
    """Return a function that writes a BDF file. `changes` maps a sample number to the value
    that the Status channel has from this sample on."""
    status = np.zeros(HZ * seconds, int)
    for at, value in changes.items():
        status[at:] = value
    return edf([float(i) for i in range(seconds)], kind="24BIT", signals=0, suffix=".bdf", status=status)


def gdf(
    events: Sequence[tuple[int, int, int]] = (),
    *,
    x: np.ndarray | None = None,
    code: int = 3,
    mode: int = 3,
    rate: int = HZ,
    n_records: int | None = None,
) -> Callable[[Path], Path]:
    """Return a function that writes GDF 2.2 with records of 1 s. An event is (sample, code, duration in samples)."""

    def write(folder: Path) -> Path:
        y = np.clip(noise() * 10, -32767, 32766) if x is None else x
        n, count = len(y), y.shape[1] // HZ
        head = bytearray(256)
        head[:8] = b"GDF 2.20"
        struct.pack_into("<H", head, 184, n + 1)
        struct.pack_into("<qIIH", head, 236, count if n_records is None else n_records, 1, 1, n)
        names = b"".join(name.encode().ljust(16) for name in NAMES)
        limits = struct.pack(f"<{4 * n}d", *[-3276.8] * n, *[3276.7] * n, *[-32768.0] * n, *[32767.0] * n)
        units = bytes(80 * n) + bytes(6 * n) + struct.pack(f"<{n}H", *[4275] * n)
        rest = bytes(64 * n) + bytes(12 * n) + bytes(12 * n)
        rest = rest[: 88 * n - 0]
        columns = names + units + limits + bytes(216 * n - len(names) - len(units) - len(limits))
        columns += struct.pack(f"<{2 * n}i", *[HZ] * n, *[code] * n)
        columns += bytes(256 * n - len(columns))
        dtype = {3: "<i2", 16: "<f4"}[code]
        data = y.reshape(n, count, HZ).transpose(1, 0, 2).astype(dtype).tobytes()
        table = bytes([mode]) + len(events).to_bytes(3, "little") + struct.pack("<f", rate)
        table += b"".join(struct.pack("<I", at + 1) for at, _, _ in events)
        table += b"".join(struct.pack("<H", kind) for _, kind, _ in events)
        if mode == 3:
            table += bytes(2 * len(events)) + b"".join(struct.pack("<I", length) for _, _, length in events)
        (folder / "a.gdf").write_bytes(bytes(head) + columns + data + (table if n_records is None else b""))
        return folder / "a.gdf"

    return write


def fif(marks: list[tuple[float, float, str]], *, crop: float = 0.0, dated: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        raw = make_raw(marks)
        if dated:
            raw.set_meas_date(1_600_000_000)
        raw.crop(crop).save(folder / "a_raw.fif", verbose="ERROR")
        return folder / "a_raw.fif"

    return write


def mff(epochs: list[tuple[int, int]]) -> Callable[[Path], Path]:
    """Return a function that writes MFF at 250 Hz. An epoch is (begin, end) in milliseconds."""

    def write(folder: Path) -> Path:
        from mffpy import Writer
        from mffpy.bin_writer import BinWriter

        writer, signal = Writer(str(folder / "a.mff")), BinWriter(sampling_rate=250, data_type="EEG")
        for begin, end in epochs:
            signal.add_block(noise((end - begin) // 4, 257).astype(np.float32))
        writer.addxml("fileInfo", recordTime=datetime(2020, 1, 1, tzinfo=UTC))
        writer.add_coordinates_and_sensor_layout("HydroCel GSN 256 1.0")
        writer.addbin(signal)
        writer.write()
        rows = "".join(
            f"<epoch><beginTime>{1000 * begin}</beginTime><endTime>{1000 * end}</endTime><firstBlock>{i}</firstBlock>"
            f"<lastBlock>{i}</lastBlock></epoch>"
            for i, (begin, end) in enumerate(epochs, start=1)
        )
        xml = f"<?xml version='1.0'?><epochs xmlns='http://www.egi.com/epochs_mff'>{rows}</epochs>"
        (folder / "a.mff" / "epochs.xml").write_text(xml)
        return folder / "a.mff"

    return write


def ant(triggers: list[tuple[int, str]], segments: str = "") -> Callable[[Path], Path]:
    """Return a function that writes an ANT file. A trigger is (sample, code). `segments` is the text of a .seg file."""

    def write(folder: Path) -> Path:
        from antio.libeep import pyeep

        path = folder / "a.cnt"
        channels = pyeep.create_channel_info()
        for name in NAMES:
            pyeep.add_channel(channels, name, "REF", "uV")
        handle = pyeep.write_cnt(str(path), HZ, channels, 0)
        pyeep.add_samples(handle, noise().T.ravel().tolist(), len(NAMES))
        pyeep.close(handle)
        data = bytearray(path.read_bytes())
        info = b"[StartDate]\n45541.5\n[StartFraction]\n0.25\n[MachineMake]\neego\n[MachineModel]\nEE_226\n"
        info += b"[SubjectName]\na\n[SubjectDateOfBirth]\n0 0 0 14 7 124 0 0 0\n\0"
        info += b"\0" * (len(info) % 2)
        table = b"".join(struct.pack("<I8s", sample, code.encode()) for sample, code in triggers)
        for tag, content in ((b"evt ", table), (b"info", info)):
            data += tag + struct.pack("<I", len(content)) + content
        struct.pack_into("<I", data, 4, len(data) - 8)
        path.write_bytes(data)
        if segments:
            (folder / "a.seg").write_text(segments)
        return path

    return write


def neuroscan(events: list[tuple[int, int]], kind: int = 1) -> Callable[[Path], Path]:
    """Return a function that writes a Neuroscan file. An event is (sample, code); code 0xe is a discontinuity."""

    def write(folder: Path) -> Path:
        head = bytearray(900 + 75 * 4)
        head[:11] = b"Version 3.0"
        for at, layout, value in ((370, "<H", 4), (376, "<H", HZ), (864, "<I", 600)):
            struct.pack_into(layout, head, at, value)
        for i, name in enumerate(NAMES):
            at = 900 + 75 * i
            head[at : at + len(name)] = name.encode()
            struct.pack_into("<f", head, at + 59, 1.0)
            struct.pack_into("<f", head, at + 71, 204.8)
        data = np.round(noise()).T.astype("<i2").tobytes()
        struct.pack_into("<I", head, 886, len(head) + len(data))
        table = b""
        for sample, code in events:
            offset = sample if kind == 3 else len(head) + 8 * sample
            table += struct.pack("<HBBi", 0, 0, code << 4, offset) + bytes(0 if kind == 1 else 11)
        (folder / "a.cnt").write_bytes(
            bytes(head) + data + struct.pack("<Bii", kind, len(table), 0) + table + bytes(100)
        )
        return folder / "a.cnt"

    return write


def persyst(times: str, comments: str = "") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        names = "\n".join(f"{name}-Ref={i}" for i, name in enumerate(NAMES, start=1))
        (folder / "a.lay").write_text(
            "[FileInfo]\nFile=a.dat\nFileType=Interleaved\nSamplingRate=100\nHeaderLength=0\nCalibration=0.1\n"
            f"WaveformCount=4\nDataType=0\n[ChannelMap]\n{names}\n[SampleTimes]\n{times}[Comments]\n{comments}[Patient]\n"
            "First=a\nLast=b\nSex=M\nHand=R\nID=1\nBirthDate=01/01/1980\nTestDate=01/01/2020\nTestTime=00:00:00\n"
        )
        (folder / "a.dat").write_bytes((noise() * 10).T.astype("<i2").tobytes())
        return folder / "a.lay"

    return write


def nihon(lengths: list[int]) -> Callable[[Path], Path]:
    """Return a function that writes a Nihon Kohden file. `lengths` contains the number of samples of each data
    block."""

    def write(folder: Path) -> Path:
        data = bytearray(0x1800)
        data[:16] = data[0x81:0x91] = b"EEG-1100C V01.00"
        data[0x91], data[0x17FE] = 1, 1
        struct.pack_into("<I", data, 0x92, 0x400)
        data[0x411] = len(lengths)
        for i, length in enumerate(lengths):
            struct.pack_into("<I", data, 0x412 + 20 * i, len(data))
            head = bytearray(0x27 + 20)
            struct.pack_into("<HIxxxxxxB", head, 0x1A, HZ, length // 10, 2)
            head[0x27], head[0x31] = 0, 1
            data += head + (np.round(noise(length, 3)).T + 0x8000).astype("<u2").tobytes()
        (folder / "a.EEG").write_bytes(data)
        return folder / "a.EEG"

    return write


def xdf(stamps: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        def chunk(tag: int, content: bytes) -> bytes:
            return b"\x04" + struct.pack("<IH", len(content) + 2, tag) + content

        x = noise(len(stamps)).T.astype("<f4")
        channels = "".join(f"<channel><label>{c}</label><unit>uV</unit><type>EEG</type></channel>" for c in NAMES)
        xml = (
            "<?xml version='1.0'?><info><name>s</name><type>EEG</type><channel_count>4</channel_count><nominal_srate>"
            "100</nominal_srate><channel_format>float32</channel_format><created_at>1</created_at><desc><channels>"
            f"{channels}</channels></desc></info>"
        )
        rows = b"".join(b"\x08" + struct.pack("<d", t) + row.tobytes() for t, row in zip(stamps, x, strict=True))
        data = b"XDF:" + chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>")
        data += chunk(2, struct.pack("<I", 1) + xml.encode())
        data += chunk(3, struct.pack("<I", 1) + b"\x04" + struct.pack("<I", len(x)) + rows)
        (folder / "a.xdf").write_bytes(data)
        return folder / "a.xdf"

    return write


def fif_epochs(folder: Path) -> Path:
    import mne

    epochs = mne.make_fixed_length_epochs(make_raw(), 2.0, preload=True, verbose="ERROR")
    epochs.save(folder / "a-epo.fif", verbose="ERROR")
    return folder / "a-epo.fif"


def fif_marked_epochs(folder: Path) -> Path:
    """Write epochs of 2 s that begin at 0.5, 3.0 and 5.5 s, with marks from 1.0 to 1.5 s and from 4.5 to 5.75 s.

    The epochs have half the sampling rate of the recording. The first sample of the recording has the number 1000.
    """
    import mne

    raw = mne.io.RawArray(noise(1600) * 1e-6, mne.create_info(NAMES, 2 * HZ, "eeg"), first_samp=1000, verbose="ERROR")
    marks = mne.Annotations([1.0, 4.5, 3.5, 2.6], [0.5, 1.25, 0.2, 0.2], ["BAD", "bad_move", "nod", "BAD"])
    events = np.column_stack([1000 + np.array([200, 700, 1200]), np.zeros(3, int), np.ones(3, int)])
    options = {"baseline": None, "preload": True, "reject_by_annotation": False, "decim": 2, "verbose": "ERROR"}
    epochs = mne.Epochs(raw.set_annotations(marks), events, tmin=-0.5, tmax=1.495, **options)
    epochs.save(folder / "a-epo.fif", verbose="ERROR")
    return folder / "a-epo.fif"


def other(writer: str, name: str, **more: list) -> Callable[[Path], Path]:
    """Return a function that uses a writer of test_neo_readers.py to write a recording that has a pause."""

    def write(folder: Path) -> Path:
        spec = importlib.util.spec_from_file_location("others", Path(__file__).with_name("test_neo_readers.py"))
        assert spec is not None and spec.loader is not None
        others = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(others)
        pytest.importorskip("h5py" if writer == "write_nwb" else "neo", reason="an extra is not installed")
        uv, stamps = others.make_uv(2048 / others.RATE), np.arange(2000) / others.RATE
        if writer == "write_blackrock":
            others.write_blackrock(folder / name, [(0, uv[:, :1000]), (300_000, uv[:, 1000:2000])], ["uV"] * 4)
        elif writer == "write_nwb":
            others.write_nwb(folder / name, uv[:, :2000], stamps=stamps + 7.0 * (stamps >= 2.4), **more)
        else:
            others.write_neuralynx(folder, uv, ["Cz", "Fp1", "Oz"], gap_at=2)
        return folder / name if name else folder / "Cz.ncs"

    return write


def missing(a: int, b: int, value: float, channels: int = 4) -> np.ndarray:
    x = np.clip(noise() * 10, -32767, 32766)
    x[:channels, a:b] = value
    return x


NWB_PARTS = [(0, 1200, 0.0), (1200, 2000, 9.4)]
TIMES, JUMP = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 73.0, 74.0, 75.0]
WHOLE = [(0, 600, 0.0)]
HALVES = [(0, 300, 0.0), (300, 600, 3.0)]
START = "New Segment,,1,1,0,20200101120000000000"
SKIPPED = [(0, 200, 0.0), (300, 600, 3.0)]
CMS = 1 << 20
KINDS = ["x", "a on", "b_begin", "A OFF", "b_stop"]
STARTS = [(1.0, "start"), (2.0, "start"), (3.0, "end"), (4.0, "end")]
TRIALS = [(0, 200, 0.0), (200, 400, 2.0), (400, 600, 4.0)]
CUT_TRIALS = [(0, 200, 0.0), (200, 250, 2.0), (250, 400, 2.5), (400, 600, 4.0)]

EXAMPLES: dict[str, dict[str, Example]] = {
    "acquisition skip": {
        "fif": Example(fif([(2.0, 1.0, "BAD_ACQ_SKIP")]), SKIPPED),
        "fif, cropped": Example(fif([(3.0, 1.0, "BAD_ACQ_SKIP")], crop=1.0), [(0, 200, 0.0), (300, 500, 3.0)]),
        "fif, cropped, dated": Example(
            fif([(3.0, 1.0, "BAD_ACQ_SKIP")], crop=1.0, dated=True), [(0, 200, 0.0), (300, 500, 3.0)]
        ),
        "brainvision": Example(brainvision(START, "Comment,BAD_ACQ_SKIP,201,100,0"), SKIPPED),
        "edf": Example(edf(TIMES, {(2, 0): "+2\x151\x14bad_acq_skip\x14\0"}), SKIPPED),
        "without duration": Example(edf(TIMES, {(2, 0): "+3\x14BAD_ACQ_SKIP\x14\0"}), HALVES),
    },
    "join": {
        "edf": Example(edf(TIMES, {(2, 0): "+3\x14BAD boundary\x14EDGE boundary\x14\0"}), HALVES),
        "brainvision": Example(brainvision(START, "Comment,BAD boundary,201,100,0"), SKIPPED),
    },
    "boundary": {
        "eeglab": Example(eeglab([("boundary", 300.5, 7000)]), HALVES),
        "eeglab, upper case": Example(eeglab([("Boundary", 301, 50), ("x", 400, 1)]), HALVES),
        "fif, between samples": Example(fif([(2.995, 70.0, "boundary")]), HALVES),
    },
    "new segment": {
        "brainvision": Example(brainvision(START, "New Segment,,301,1,0,20200101130000000000"), HALVES),
        "brainvision, without dates": Example(
            brainvision("New Segment,,1,1,0", "Stimulus,S  1,50,1,0", "New Segment,,301,1,0"), HALVES
        ),
        "edf export": Example(edf(TIMES, {(2, 0): "+3\x14New Segment/\x14\0"}), HALVES),
    },
    "recording stopped": {
        "edf": Example(edf(TIMES, {(2, 0): "+3\x14Rec. paused\x14\0"}), HALVES),
        "brainvision": Example(brainvision(START, "Comment,LostSamples: 20,301,1,0"), HALVES),
        "eeglab": Example(eeglab([("Recording resumed", 301, 0)]), HALVES),
    },
    "bad span": {
        "brainvision comment": Example(brainvision(START, "Comment,BAD_move,201,100,0"), WHOLE, [(2.0, 3.0)]),
        "brainvision type": Example(brainvision(START, "Bad Interval,Gradient,201,100,0"), WHOLE, [(2.0, 3.0)]),
        "eeglab": Example(eeglab([("bad_blink", 201, 100)]), WHOLE, [(2.0, 3.0)]),
        "eeglab, in an epoch": Example(eeglab([("bad_blink", 351, 100)], trials=3), TRIALS, [(3.5, 4.0)]),
        "fif, in epochs": Example(fif_marked_epochs, TRIALS, [(0.5, 1.0), (3.5, 4.0), (4.0, 4.25)]),
        "fif, dated": Example(fif([(2.0, 1.0, "BAD")], crop=1.0, dated=True), [(0, 500, 0.0)], [(1.0, 2.0)]),
        "second annotation signal": Example(
            edf(TIMES, {(4, 1): "+2\x151\x14BAD_move\x14\0"}, signals=2), WHOLE, [(2.0, 3.0)]
        ),
        "third annotation signal, EDF+D": Example(
            edf(JUMP, {(4, 2): "+74\x150.5\x14BAD_move\x14\0"}, signals=3, kind="EDF+D"),
            [(0, 300, 0.0), (300, 600, 73.0)],
            [(74.0, 74.5)],
        ),
        "bdf": Example(edf(TIMES, {(1, 0): "+2\x151\x14BAD\x14\0"}, kind="BDF+C", suffix=".bdf"), WHOLE, [(2.0, 3.0)]),
        "persyst": Example(persyst("0=3600.0\n", "2.0,1.0,0,100,BAD seizure\n"), WHOLE, [(2.0, 3.0)]),
    },
    "bad span with two marks": {
        "brainvision": Example(
            brainvision(START, "Comment,BAD_move start,201,0,0", "Comment,BAD_move end,301,0,0"), WHOLE, [(2.0, 3.0)]
        ),
        "edf, two kinds": Example(
            edf(TIMES, {(1, i): f"+{i}\x14bad {text}\x14\0" for i, text in enumerate(KINDS)}, signals=5),
            WHOLE,
            [(1.0, 3.0), (2.0, 4.0)],
        ),
        "two starts": Example(memory("xdf", [(t, 0.0, f"BAD_x/{w}") for t, w in STARTS]), WHOLE, [(2.0, 3.0)]),
        "other text": Example(memory("fif", [(2.0, 0.0, "BAD start"), (3.0, 0.0, "BAD_x end")]), WHOLE),
        "not bad": Example(memory("xdf", [(2.0, 0.0, "start"), (3.0, 0.0, "end")]), WHOLE),
    },
    "numeric boundary": {
        "between samples": Example(eeglab([(1, 20, 1), (-99, 300.5, 17500), (1, 400, 1)]), HALVES),
        "on a sample": Example(eeglab([(-99, 301, 0)]), HALVES),
        "inside an epoch": Example(eeglab([(1, 50, 0), (-99, 250.5, 30)], trials=3), CUT_TRIALS),
        "text, inside an epoch": Example(eeglab([("a", 50, 0), ("boundary", 250.5, 30)], trials=3), CUT_TRIALS),
    },
    "rejected epoch": {
        "by hand": Example(eeglab([], trials=3, reject={"rejmanual": [0, 1, 0]}), TRIALS, [(2.0, 4.0)]),
        "two kinds, one of the components": Example(
            eeglab([], trials=3, reject={"rejthresh": [1, 0, 0], "icarejkurt": [[0.0, np.nan, 1.0]], "rejjp": []}),
            TRIALS,
            [(0.0, 2.0), (4.0, 6.0)],
        ),
        "no mark": Example(
            eeglab(
                [], trials=3, reject={"rejglobal": [0, 0, 0], "rejmanualcol": [1, 1, 0.8], "icarejconstE": [[1] * 3]}
            ),
            TRIALS,
        ),
        "one recording": Example(eeglab([], reject={"rejmanual": 1}), WHOLE),
    },
    "record times": {
        "EDF+C": Example(edf(JUMP), [(0, 300, 0.0), (300, 600, 73.0)]),
        "EDF+D": Example(edf(JUMP, kind="EDF+D"), [(0, 300, 0.0), (300, 600, 73.0)]),
        "BDF+C": Example(edf(JUMP, kind="BDF+C", suffix=".bdf"), [(0, 300, 0.0), (300, 600, 73.0)]),
        "first onset is not 0": Example(
            edf([0.25, 1.25, 2.25, 3.75, 4.75, 5.75], kind="EDF+D"), [(0, 300, 0.0), (300, 600, 3.5)]
        ),
        "a gap of 0.1 s": Example(edf([0.0, 1.0, 2.0, 3.1, 4.1, 5.1]), [(0, 300, 0.0), (300, 600, 3.1)]),
        "onsets go back": Example(edf([0.0, 1.0, 2.0, 1.0, 2.0, 3.0]), HALVES),
        "onsets of no use in EDF+C": Example(edf([0.0] * 6), WHOLE),
    },
    "new epoch": {
        "one sample": Example(biosemi({0: CMS | 1 << 16, 1: CMS, 300: CMS | 1 << 16, 301: CMS}), HALVES),
        "long, with triggers": Example(
            biosemi({0: CMS | 1 << 16, 90: CMS | 5, 300: CMS | 1 << 16 | 7, 450: CMS | 9}), HALVES
        ),
        "triggers of another program": Example(biosemi({0: 0, 100: 5, 200: 0, 300: 1 << 16, 310: 0}), HALVES),
    },
    "CMS out of range": {
        "in the middle": Example(biosemi({0: CMS, 200: 0, 300: CMS}), SKIPPED),
        "at the beginning": Example(biosemi({0: 0, 150: CMS}), [(150, 600, 1.5)]),
        "at the end, low battery": Example(biosemi({0: CMS, 100: CMS | 1 << 22, 450: 1 << 22}), [(0, 450, 0.0)]),
        "bits of another program": Example(biosemi({0: 0, 100: 3, 200: 0}), WHOLE),
        "low battery alone": Example(biosemi({0: CMS, 200: CMS | 1 << 22, 300: CMS}), WHOLE),
    },
    "GDF new segment": {
        "with durations": Example(gdf([(0, 0x7FFE, 0), (300, 0x7FFE, 0)]), HALVES),
        "without durations": Example(gdf([(0, 0x7FFE, 0), (300, 0x7FFE, 0)], mode=1), HALVES),
        "other rate of the events": Example(gdf([(750, 0x7FFE, 0)], rate=250), HALVES),
    },
    "GDF artefact": {
        "with duration": Example(gdf([(200, 0x0101, 100), (400, 0x0300, 50)]), WHOLE, [(2.0, 3.0)]),
        "with end event": Example(gdf([(200, 0x0103, 0), (300, 0x8103, 0)], mode=1), WHOLE, [(2.0, 3.0)]),
        "rejected trial": Example(gdf([(200, 0x03FF, 100)]), WHOLE, [(2.0, 3.0)]),
        "without length": Example(gdf([(200, 0x0105, 0)]), WHOLE),
    },
    "GDF missing samples": {
        "at the lower limit": Example(gdf(x=missing(200, 300, -32768)), SKIPPED),
        "at the upper limit, over records": Example(gdf(x=missing(150, 350, 32767)), [(0, 150, 0.0), (350, 600, 3.5)]),
        "NaN": Example(gdf(x=missing(200, 300, np.nan), code=16), SKIPPED),
        "beyond the range": Example(gdf(x=missing(200, 300, 1e9), code=16), SKIPPED),
        "one clipped channel": Example(gdf(x=missing(200, 300, 32767, channels=1)), WHOLE),
    },
    "MFF pause": {
        "even": Example(mff([(0, 2000), (4000, 6000)]), [(0, 500, 0.0), (1000, 1500, 4.0)]),
        "odd": Example(mff([(0, 2004), (4008, 6000)]), [(0, 501, 0.0), (1002, 1500, 4.008)]),
        "two, one without length": Example(
            mff([(0, 2004), (2004, 4000), (4404, 6000)]), [(0, 501, 0.0), (501, 1000, 2.004), (1101, 1500, 4.404)]
        ),
        "begins late": Example(mff([(500, 2500)]), [(125, 625, 0.5)]),
    },
    "ANT restart": {
        "discontinuity": Example(ant([(0, "__"), (100, "7"), (300, "__")]), HALVES),
        "reset": Example(ant([(300, "Rs"), (400, "12")]), HALVES),
    },
    "ANT segment table": {
        "true onset": Example(
            ant([(300, "__")], "NumberSegments=2\n45541.501 0.5 300\n"), [(0, 300, 0.0), (300, 600, 86.65)]
        ),
        "three": Example(
            ant([], "NumberSegments=3\n45541.501 0.25 100\n45541.502 0.75 300\n"),
            [(0, 200, 0.0), (200, 300, 86.4), (300, 600, 173.3)],
        ),
        "no interruption": Example(ant([], "; segments\r\nNumberSegments=1\r\n"), [(0, 600, 0.0)]),
    },
    "ANT disconnection": {
        "span": Example(memory("ant", [(2.0, 1.0, "BAD_disconnection")]), SKIPPED),
        "without pair": Example(memory("ant", [(3.0, 0.0, "Amplifier reconnected")]), HALVES),
    },
    "Neuroscan stop": {
        "type 1": Example(neuroscan([(100, 0x0), (300, 0xE)]), [(0, 299, 0.0), (300, 600, 3.0)]),
        "type 2": Example(neuroscan([(300, 0xE)], kind=2), [(0, 299, 0.0), (300, 600, 3.0)]),
        "type 3, DC offset": Example(neuroscan([(300, 0xB)], kind=3), [(0, 299, 0.0), (300, 600, 3.0)]),
    },
    "Neuroscan rejection": {
        "span": Example(neuroscan([(100, 0xD), (201, 0xC), (301, 0xD)]), WHOLE, [(2.0, 3.0)]),
        "two spans": Example(
            neuroscan([(201, 0xC), (301, 0xD), (401, 0xC), (421, 0xC), (451, 0xD)], kind=2),
            WHOLE,
            [(2.0, 3.0), (4.0, 4.2), (4.2, 4.5)],
        ),
        "without end": Example(neuroscan([(101, 0xC), (201, 0xD), (301, 0xC)]), WHOLE, [(1.0, 2.0)]),
    },
    "Persyst sample times": {
        "jump": Example(persyst("0=3600.0\n100=3601.0\n300=3663.5\n"), HALVES),
        "no jump": Example(persyst("0=3600.0\n100=3601.0\n300=3603.0\n"), WHOLE),
        "midnight": Example(persyst("0=86398.0\n300=1.0\n"), WHOLE),
    },
    "Nihon Kohden block": {
        "two": Example(nihon([100, 200]), [(0, 100, 0.0), (100, 300, 1.0)]),
        "three": Example(nihon([100, 50, 100]), [(0, 100, 0.0), (100, 150, 1.0), (150, 250, 1.5)]),
    },
    "XDF time stamps": {
        "12 s": Example(xdf(np.r_[np.arange(300), 1500 + np.arange(300)] / HZ + 50), [(0, 300, 0.0), (300, 600, 15.0)]),
        "none": Example(xdf(np.arange(600) / HZ + 50), WHOLE),
    },
    "parts with times": {
        "blackrock": Example(other("write_blackrock", "a.ns2"), [(0, 1000, 0.0), (1000, 2000, 10.0)]),
        "neuralynx": Example(other("write_neuralynx", ""), [(0, 1024, 0.0), (1024, 2048, 7.048)]),
    },
    "NWB time stamps": {"jump": Example(other("write_nwb", "a.nwb"), NWB_PARTS)},
    "NWB invalid times": {"span": Example(other("write_nwb", "a.nwb", invalid=[(1, 2)]), NWB_PARTS, [(1.0, 2.0)])},
    "epochs": {
        "brainvision": Example(
            brainvision(START, more="SegmentationType=MARKERBASED\nSegmentDataPoints=200\n"),
            TRIALS,
        ),
        "eeglab": Example(eeglab([(1, 50, 0)], trials=3), TRIALS),
        "fif": Example(fif_epochs, TRIALS),
    },
}
"""Examples for each row of the table of interruptions."""
CASES = [(mark.name, label) for mark in TABLE for label in EXAMPLES.get(mark.name) or {"no example": None}]


@pytest.mark.parametrize(("row", "label"), CASES, ids=[f"{row}: {label}" for row, label in CASES])
def test_row_of_the_table(tmp_path: Path, row: str, label: str) -> None:
    examples = EXAMPLES.get(row)
    assert examples, f"the row '{row}' has no example"
    example = examples[label]
    made = example.write(tmp_path)
    info = (open_file(made) if isinstance(made, Path) else made).info
    assert [(s.start, s.stop, round(s.onset, 4)) for s in info.segments] == example.segments
    assert [(round(a, 4), round(b, 4)) for a, b, _ in info.bad_spans] == example.spans


def test_epochs_with_marks_of_single_channels(tmp_path: Path) -> None:
    table = np.zeros((4, 3))
    table[[1, 3], 1], table[0, 2] = 1, 1
    reject = {"rejmanual": [0, 0, 1], "rejmanualE": table.T, "rejkurt": [0, 1], "rejjp": [0, 0]}
    info = open_file(eeglab([], trials=3, reject=reject)(tmp_path)).info
    assert info.bad_spans == [(4.0, 6.0, "rejected epoch")]
    assert sorted(info.bad_channel_spans) == sorted((2.0, 4.0, NAMES[i]) for i in (1, 3))
    assert info.notes == ["EEG.reject.rejkurt does not fit 3 epochs, so its marks are not used"]


def test_samples_of_segments_are_those_of_the_file(tmp_path: Path) -> None:
    signal = open_file(mff([(0, 2004), (4008, 6000)])(tmp_path))
    for segment, samples in zip(signal.info.segments, (501, 498), strict=True):
        x = signal.read(segment.start, segment.stop, [0, 5])
        np.testing.assert_allclose(x, noise(samples, 257)[[0, 5]] * 1e-6, rtol=1e-5)


def test_bad_mark_without_duration_gives_a_note(tmp_path: Path) -> None:
    signal = open_file(
        brainvision(START, "Comment,BAD_a,201,0,0", "Comment,BAD_a,301,0,0", "Comment,bad b,9,0,0")(tmp_path)
    )
    assert signal.info.bad_spans == []
    assert signal.info.notes == [
        "2 marks 'Comment/BAD_a' have no duration, so no span is left out",
        "the mark 'Comment/bad b' has no duration, so no span is left out",
    ]


def test_recording_that_is_marked_as_a_whole_has_no_signal(tmp_path: Path) -> None:
    path = biosemi({0: 1 << 23})(tmp_path)
    with pytest.raises(ReadError, match="no signal: the whole recording is marked: CMS out of range"):
        open_file(path)


@pytest.mark.parametrize(
    ("events", "noted"),
    [
        (None, False),
        ([], False),
        ("not a table", True),
    ],
)
def test_epochs_with_unreadable_events_get_a_note(tmp_path: Path, events: object, noted: bool) -> None:
    more = {} if events is None else {"event": events}
    info = open_file(eeglab([("boundary", 101.0, 0.0)], 3, **more)(tmp_path)).info
    assert any("the events cannot be read" in note for note in info.notes) is noted
    assert len(info.segments) == (4 if events is None else 3)
