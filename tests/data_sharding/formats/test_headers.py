"""A damaged header is read or refused. A damaged header never causes an unexpected exception, an endless loop or too
much memory."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_sharding.formats.sniffing import Recording, find_recordings, sniff

CORPUS = Path(os.environ.get("DREAMSCALE_EEG_CORPUS") or "/nonexistent")
SEEDS = [
    "edf",
    "bdf",
    "edfplus",
    "vhdr",
    "set",
    "fif",
    "egi",
    "cnt",
    "ant",
    "lay",
    "cdt",
    "gdf",
    "nihon",
    "nedf",
    "xdf",
]
FALSE_VALUES = [
    b"-1",
    b"0",
    b"99999999",
    b"1e308",
    b"nan",
    b"inf",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\0" * 16,
    b"1_0",
    b" " * 64,
]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
MEMORY = 24 << 20
"""Memory limit in bytes. The data in the files need far less memory. A reader without checks would need far more, if
the numbers in a header are too large."""


def make_gdf() -> bytes:
    """Make a GDF 1.25 file of two channels, 16 bits and 4 records of 100 samples."""
    n, head = 2, bytearray(256 * 3)
    head[:8] = b"GDF 1.25"
    struct.pack_into("<q", head, 184, 256 * (n + 1))
    struct.pack_into("<qIII", head, 236, 4, 1, 1, n)
    for i in range(n):
        struct.pack_into("<i", head, 256 + 216 * n + 4 * i, 100)
        struct.pack_into("<i", head, 256 + 220 * n + 4 * i, 3)
    return bytes(head) + bytes(4 * n * 100 * 2)


def make_nihon() -> bytes:
    """Make a Nihon Kohden file: one control block, and one data block of two channels with 1 s at 100 Hz."""
    data = bytearray(0x2000)
    data[:16] = data[0x81:0x91] = b"EEG-1100C V01.00"
    data[0x91], data[0x17FE] = 1, 1
    struct.pack_into("<I", data, 0x92, 0x400)
    data[0x411] = 1
    struct.pack_into("<I", data, 0x412, 0x1800)
    struct.pack_into("<HI", data, 0x181A, 100, 10)
    data[0x1826] = 2
    return bytes(data)


def make_nedf() -> bytes:
    xml = (
        "<nedf><NEDFversion>1.3</NEDFversion><EEGSettings><TotalNumberOfChannels>2</TotalNumberOfChannels>"
        "<EEGSamplingRate>500</EEGSamplingRate><EEGMontage><C1>Fp1</C1><C2>Cz</C2></EEGMontage>"
        "<NumberOfRecordsOfEEG>50</NumberOfRecordsOfEEG></EEGSettings></nedf>"
    )
    return xml.encode().ljust(10240, b"\0") + bytes(50 * 10)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, make_raw: Callable, write_raw: Callable) -> dict[str, Path]:
    """Return small intact files of every format, each in its own folder; also real files, if the real corpus is
    installed."""
    import mne

    root = tmp_path_factory.mktemp("seeds")
    raw = make_raw(2, 100, 4)
    plus = raw.copy().set_annotations(mne.Annotations([1.0], [0.5], ["BAD x"]))
    paths = {
        "edf": write_raw(raw, root / "edf" / "a.edf"),
        "bdf": write_raw(raw, root / "bdf" / "a.bdf"),
        "edfplus": write_raw(plus, root / "edfplus" / "a.edf"),
        "vhdr": write_raw(raw, root / "vhdr" / "a.vhdr"),
        "set": write_raw(raw, root / "set" / "a.set"),
        "fif": write_raw(raw, root / "fif" / "a_raw.fif"),
    }
    neuroscan = bytearray(900 + 150)
    neuroscan[:11] = b"Version 3.0"
    struct.pack_into("<HxxxxH", neuroscan, 370, 2, 250)
    struct.pack_into("<I", neuroscan, 886, 1050 + 400)
    lay = (
        "[FileInfo]\nFile=a.dat\nSamplingRate=100\nCalibration=1\nWaveformCount=2\nDataType=0\n[ChannelMap]\nA=1\nB=2\n"
    )
    tag = b"\x04" + struct.pack("<IH", 30, 1) + bytes(28)
    for name, files in {
        "egi": {"a.raw": struct.pack(">i6hi5hih", 2, 2020, 1, 1, 1, 1, 1, 0, 250, 2, 1, 16, 0, 100, 0) + bytes(400)},
        "cnt": {"a.cnt": bytes(neuroscan) + bytes(500)},
        "ant": {"a.cnt": b"RIFF" + struct.pack("<I", 104) + b"CNT LIST" + bytes(96)},
        "lay": {"a.lay": lay.encode(), "a.dat": bytes(400)},
        "cdt": {"a.cdt": bytes(800), "a.cdt.dpa": b"NumSamples = 100\nNumChannels = 2\nDataFormat = FLOAT\n"},
        "gdf": {"a.gdf": make_gdf()},
        "nihon": {"a.EEG": make_nihon()},
        "nedf": {"a.nedf": make_nedf()},
        "xdf": {"a.xdf": b"XDF:" + tag + tag},
    }.items():
        (root / name).mkdir()
        for file, data in files.items():
            (root / name / file).write_bytes(data)
        paths[name] = root / name / next(iter(files))
    for recording in find_recordings(CORPUS) if CORPUS.is_dir() else []:
        if recording.path.is_file() and not recording.problem:
            folder = root / f"real-{len(paths)}"
            folder.mkdir()
            for file in recording.files:
                # Copy only the first bytes of a file, because the tests damage only these bytes.
                (folder / file.name).write_bytes(Path(str(file)).read_bytes()[: 1 << 16])
            paths[folder.name] = folder / recording.path.name
    return paths


@st.composite
def draw_damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Choose a random damage: changed, removed, repeated or wrong bytes, mostly in headers."""
    kind = draw(st.sampled_from(["flip", "cut", "splice", "lie", "digits", "double"]))
    seed = draw(st.integers(0, 2**32 - 1))
    near = draw(st.sampled_from([64, 256, 1024, 4096, 1 << 20]))

    def damage(data: bytes) -> bytes:
        rng, out = random.Random(seed), bytearray(data)
        end = max(1, min(len(out), near))
        if kind == "cut":
            return bytes(out[: rng.randrange(end)])
        if kind == "splice":
            a, b = sorted(rng.randrange(end) for _ in range(2))
            return bytes(out[:a] + out[b:])
        if kind == "double":
            a, b = sorted(rng.randrange(end) for _ in range(2))
            return bytes(out[:b] + out[a:b] * rng.randrange(1, 20) + out[b:])
        for _ in range(rng.randrange(1, 12)):
            at = rng.randrange(end)
            if kind == "flip":
                out[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == "lie":
                lie = rng.choice(FALSE_VALUES)
                out[at : at + len(lie)] = lie
            elif out[at : at + 1].isdigit():
                out[at : at + 1] = b"9"
        return bytes(out)

    return damage


def check_recording(recording: Recording | None, path: Path) -> None:
    assert recording is None or path in recording.files
    if recording is not None and recording.problem is not None:
        assert recording.problem == " ".join(recording.problem.split()) and len(recording.problem) < 500


class TestSniff:
    @pytest.mark.parametrize("name", SEEDS)
    def test_undamaged_file_has_no_problem(self, seeds: dict[str, Path], name: str) -> None:
        recording = sniff(seeds[name])
        assert recording is not None and recording.problem is None

    @settings(max_examples=600, deadline=None, suppress_health_check=SLOW, derandomize=True)
    @given(st.data())
    def test_damaged_file_gets_a_result_within_limited_memory(
        self, seeds: dict[str, Path], data: st.DataObject
    ) -> None:
        path = seeds[data.draw(st.sampled_from(sorted(seeds)))]
        sound = path.read_bytes()
        for damage in data.draw(st.lists(draw_damage(), min_size=1, max_size=3)):
            sound = damage(sound)
        # Write the damaged file into the folder of the intact file, so that its sidecar files are found.
        broken = path.with_name(f"broken{path.suffix}")
        broken.write_bytes(sound)
        tracemalloc.start()
        try:
            check_recording(sniff(broken), broken)
            assert tracemalloc.get_traced_memory()[1] < MEMORY
        finally:
            tracemalloc.stop()
            broken.unlink()

    @settings(max_examples=300, deadline=None, suppress_health_check=SLOW, derandomize=True)
    @example(b"0       " + b" " * 244 + b"-1  ", ".edf")
    @example(b"\xffBIOSEMI" + b"9" * 248, ".bdf")
    @example(b"GDF 2.20" + b"\xff" * 300, ".gdf")
    @example(b"Brain Vision Data Exchange Header File Version 1.0\n" + b" \n" * 60_000, ".vhdr")
    @example(b"[FileInfo]\nFile" + b" " * 100_000 + b"x\n", ".lay")
    @example(b'<!DOCTYPE a [<!ENTITY b "c">]><NEDFversion>&b;</NEDFversion>', ".nedf")
    @example(b"EEG-1100C V01.00" + b"\xff" * 600, ".eeg")
    @given(
        st.binary(max_size=600),
        st.sampled_from([".edf", ".bdf", ".gdf", ".vhdr", ".cnt", ".fif", ".set", ".eeg", ".lay", ".nedf", ".xdf"]),
    )
    def test_arbitrary_bytes_get_a_result(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
    ) -> None:
        path = tmp_path_factory.getbasetemp() / f"anything{suffix}"
        path.write_bytes(data)
        check_recording(sniff(path), path)


READ = """
import faulthandler, resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
from data_sharding.formats.open_signal import ReadError, open_signal, unreadable
from data_sharding.formats.sniffing import find_recordings
for recording in find_recordings(sys.argv[2]):
    print("open", recording.path.name, flush=True)
    faulthandler.dump_traceback_later(20, exit=True)
    try:
        signal = open_signal(recording)
    except ReadError as error:
        print("reason", error, flush=True)
        continue
    try:
        assert all(0 <= s.start < s.stop <= signal.info.n_samples for s in signal.info.segments)
        picks = list(range(min(2, len(signal.info.ch_names))))
        if picks and signal.info.n_samples:
            x = signal.read(0, min(200, signal.info.n_samples), picks)
            assert x.shape == (len(picks), min(200, signal.info.n_samples)), x.shape
        print("read", signal.info.n_samples, flush=True)
    except AssertionError:
        raise
    except Exception as error:
        print("reason", unreadable(error), flush=True)
"""


def test_damaged_files_are_opened_or_refused(seeds: dict[str, Path], tmp_path: Path) -> None:
    """A child process opens all damaged files with limited memory and time. Formats whose readers are written in C are
    left out."""
    rng = np.random.default_rng(0)
    for name in ("edf", "bdf", "edfplus", "vhdr", "set", "fif", "egi", "lay", "gdf", "nihon", "nedf", "xdf", "cnt"):
        for i in range(4):
            folder = tmp_path / f"{name}-{i}"
            folder.mkdir()
            for file in seeds[name].parent.iterdir():
                data = bytearray(file.read_bytes())
                if file == seeds[name] or i == 3:
                    for at in rng.integers(0, min(len(data), 2000), 6):
                        data[at] = rng.integers(256) if i else ord("9")
                (folder / file.name).write_bytes(data)
    (tmp_path / "read.py").write_text(READ)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "read.py"), str(3 << 30), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    words = [line.split()[0] for line in result.stdout.splitlines()]
    assert words.count("open") == words.count("reason") + words.count("read") >= 45
    assert words.count("read") > 3 and words.count("reason") > 3
