"""Write recordings in five file formats. If the same signal is written again, the file has the same bytes."""

from __future__ import annotations

import datetime
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEASURED = datetime.datetime(2024, 5, 6, 9, 0, tzinfo=datetime.UTC)


def write_recording(
    path: Path,
    data_nT: NDArray[np.float32],
    positions: dict[str, NDArray[np.float64]],
    sfreq: float,
    format_: str,
    rng: np.random.Generator,
    markers: list[dict[str, Any]] | None = None,
) -> None:
    """Write one recording.

    Parameters
    ----------
    path : Path
        File to write, with the extension of the format. If the format has several files, the other files are written to
        the same folder.
    data_nT : ndarray, shape (n, T)
        Signal in microvolts.
    positions : dict of str to ndarray
        Position of each channel on the head in metres, in the order of the rows.
    sfreq : float
        Sampling rate, Hz.
    format_ : str
        Format of the file: EDF, BDF, BrainVision, EEGLAB or FIF.
    rng : numpy.random.Generator
        Generator for the constant voltage offsets of the electrodes, which a BioSemi amplifier (BDF) records together
        with the EEG.
    markers : list of dict, optional
        BrainVision markers: onset and duration in samples, and a description.
    """
    names = list(positions)
    if format_ == "EDF":
        _write_edf(path, data_nT, names, sfreq)
    elif format_ == "BDF":
        offsets = rng.uniform(-8000, 8000, (len(names), 1))
        _write_bdf(path, data_nT + offsets, names, sfreq)
    elif format_ == "BrainVision":
        _write_brainvision(path, data_nT, names, sfreq, markers)
    elif format_ == "EEGLAB":
        _write_eeglab(path, data_nT, positions, sfreq)
    else:
        _write_fif(path, data_nT, positions, sfreq)


def _write_edf(path: Path, data_nT: NDArray[Any], names: list[str], sfreq: float) -> None:
    import edfio

    signals = [
        edfio.EdfSignal(row.astype(float), sfreq, label=name, physical_dimension="uV", physical_range=(-3200, 3200))
        for name, row in zip(names, data_nT, strict=True)
    ]
    edfio.Edf(signals, data_record_duration=1.0).write(path)


def _write_bdf(path: Path, data_nT: NDArray[Any], names: list[str], sfreq: float) -> None:
    import edfio

    signals = [
        edfio.BdfSignal(row.astype(float), sfreq, label=name, physical_dimension="uV", physical_range=(-262144, 262143))
        for name, row in zip(names, data_nT, strict=True)
    ]
    edfio.Bdf(signals, data_record_duration=1.0).write(path)


def _write_brainvision(
    path: Path, data_nT: NDArray[Any], names: list[str], sfreq: float, markers: list[dict[str, Any]] | None
) -> None:
    import pybv

    pybv.write_brainvision(
        data=data_nT.astype(float) * 1e-6,
        sfreq=sfreq,
        ch_names=names,
        fname_base=path.stem,
        folder_out=str(path.parent),
        events=markers,
        resolution=0.1,
        unit="µV",
        fmt="binary_int16",
        meas_date=MEASURED.strftime("%Y%m%d%H%M%S%f"),
    )


def _write_eeglab(path: Path, data_nT: NDArray[Any], positions: dict[str, NDArray[np.float64]], sfreq: float) -> None:
    import eeglabio.raw

    # In EEGLAB, positions are in millimetres, the x axis points to the nose, and the y axis to the left ear.
    places = np.stack([(y, -x, z) for x, y, z in positions.values()]) * 1e3
    eeglabio.raw.export_set(str(path), data=data_nT * 1e-6, sfreq=sfreq, ch_names=list(positions), ch_locs=places)
    # Replace the header text, which contains the time of writing, so that the file always has the same bytes.
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 5.0 MAT-file".ljust(116))


def _write_fif(path: Path, data_nT: NDArray[Any], positions: dict[str, NDArray[np.float64]], sfreq: float) -> None:
    import mne

    info = mne.create_info(list(positions), sfreq, "eeg")
    raw = mne.io.RawArray(data_nT.astype(float) * 1e-6, info, verbose="error")
    raw.set_montage(mne.channels.make_dig_montage(positions, coord_frame="head"))
    raw.set_meas_date(MEASURED)
    raw.save(path, fmt="single", verbose="error")
    _erase_identifiers(path)


def _erase_identifiers(path: Path) -> None:
    """Set the identifiers in a FIF file to zero, because they depend on the machine and the time of writing."""
    content = bytearray(path.read_bytes())
    place = 0
    while place + 16 <= len(content):
        _, kind, size, following = struct.unpack(">iiii", content[place : place + 16])
        if kind == 31:  # FIFFT_ID_STRUCT
            content[place + 20 : place + 16 + size] = bytes(size - 4)
        if following == -1:
            break
        place = following if following > 0 else place + 16 + size
    path.write_bytes(content)
