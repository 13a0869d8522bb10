"""MFF recordings whose times are microseconds or nanoseconds have the same samples and segments."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.open_signal import open_signal
from data_sharding.formats.sniffing import find_recordings

RATE = 250
EPOCHS = [(400, 2404), (4408, 6000), (6004, 8000)]
"""Begin and end of each epoch in milliseconds."""


def make_uv(seconds: np.ndarray) -> np.ndarray:
    """Return the signal [257, S] in microvolts; each channel has another frequency."""
    return 30 * np.sin(2 * np.pi * np.linspace(3, 30, 257)[:, None] * seconds)


def write_mff(path: Path, *, nanoseconds: bool) -> None:
    from mffpy import Writer
    from mffpy.bin_writer import BinWriter

    writer, signal = Writer(str(path)), BinWriter(sampling_rate=RATE, data_type="EEG")
    for begin, end in EPOCHS:
        signal.add_block(make_uv(np.arange(begin // 4, end // 4) / RATE).astype(np.float32))
    writer.addxml("fileInfo", recordTime=datetime(2020, 1, 1, microsecond=4, tzinfo=UTC))
    writer.add_coordinates_and_sensor_layout("HydroCel GSN 256 1.0")
    writer.addbin(signal)
    writer.write()
    unit = 1_000_000 if nanoseconds else 1000
    rows = "".join(
        f"<epoch><beginTime>{unit * begin}</beginTime><endTime>{unit * end}</endTime><firstBlock>{i}</firstBlock>"
        f"<lastBlock>{i}</lastBlock></epoch>"
        for i, (begin, end) in enumerate(EPOCHS, start=1)
    )
    (path / "epochs.xml").write_text(
        f"<?xml version='1.0'?><epochs xmlns='http://www.egi.com/epochs_mff'>{rows}</epochs>"
    )
    if nanoseconds:
        # The number of digits of the recording time says whether the times of a file are nanoseconds.
        about = (path / "info.xml").read_text()
        (path / "info.xml").write_text(re.sub(r"(\.\d{6})([+-])", r"\g<1>000\2", about))


@pytest.mark.parametrize("nanoseconds", [False, True])
def test_pauses_are_cut_out_to_the_sample(tmp_path: Path, nanoseconds: bool) -> None:
    write_mff(tmp_path / "a.mff", nanoseconds=nanoseconds)
    (recording,) = find_recordings(tmp_path)
    signal = open_signal(recording)
    assert signal.info.sfreq == RATE
    assert [(s.start, s.stop, round(s.onset, 4)) for s in signal.info.segments] == [
        (100, 601, 0.4),
        (1102, 1500, 4.408),
        (1501, 2000, 6.004),
    ]
    for segment in signal.info.segments:
        seconds = segment.onset + np.arange(segment.stop - segment.start) / RATE
        read = 1e6 * signal.read(segment.start, segment.stop, list(range(257)))
        np.testing.assert_allclose(read, make_uv(seconds), atol=1e-3)
    signal.close()
