"""Tests on real recordings from devices of ten manufacturers.

The reader must recognise each format, and the ledger must have exactly one row for each recording.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_sharding.audit.verify import find_faults
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.formats.channels import choose, pick_channels
from data_sharding.formats.open_signal import NotContinuous, ReadError, open_signal
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import sniff
from data_sharding.job.run import main

CONFIG = Path(__file__).parents[3] / "configs" / "data_sharding" / "real_corpus.yaml"

CORPUS = Path(os.environ.get("DREAMSCALE_EEG_CORPUS") or "/nonexistent")

pytestmark = pytest.mark.skipif(
    not CORPUS.is_dir(),
    reason="DREAMSCALE_EEG_CORPUS does not name a folder with the real recordings",
)

LAY = "persyst/sub-pt1_ses-02_task-monitor_acq-ecog_run-01_clip2.lay"
CDT = "curry/test_bdf_stim_channel Curry 8.cdt"
# Expected values for each file: format, number of channels, number of EEG channels according to their names, sampling
# rate in Hz, number of samples, montage, and confidence of the montage.
OPENED = {
    "physionet/test_edf_overlapping_annotations.edf": ("edf", 64, 64, 128, 15872, "standard_1005", 1.0),
    "biosemi/test_reduced.edf": ("edf", 138, 136, 512, 3072, "none", 0.0),
    "biosemi/test_bdf_stim_channel.bdf": ("bdf", 4, 3, 500, 5000, "standard_1005", 1.0),
    "eeglab/test_raw.set": ("eeglab", 32, 32, 128, 30504, "none", 0.0),
    "eeglab/test_raw_h5.set": ("eeglab", 32, 32, 128, 30504, "none", 0.0),
    "eeglab/test_raw_chanloc_fids.set": ("eeglab", 129, 129, 500, 501, "file", 1.0),
    "eeglab/test_epochs.set": ("eeglab", 2, 2, 50, 32, "standard_1005", 1.0),
    "brainvision/test_NO.vhdr": ("brainvision", 65, 63, 5000, 2238, "none", 0.0),
    "brainvision/test_VAmp.ahdr": ("brainvision", 6, 6, 500, 4352, "standard_1005", 1.0),
    "egi/test_egi_pns.mff": ("mff", 265, 257, 250, 3488, "file", 1.0),
    "neuroscan/scan41_short.cnt": ("neuroscan", 128, 124, 400, 3070, "none", 0.0),
    "ant/test-na-271.cnt": ("ant", 128, 128, 500, 2295, "none", 0.0),
    "ant/test-na-271.vhdr": ("brainvision", 128, 128, 500, 2295, "none", 0.0),
    "ant/test-user-annotation.vhdr": ("brainvision", 64, 64, 500, 8216, "none", 0.0),
    "nihon-kohden/MB0400FU.EEG": ("nihon", 25, 19, 200, 5800, "standard_1005", 1.0),
    "nihon-kohden/MB0400FU.EDF": ("edf", 25, 19, 200, 5800, "standard_1005", 1.0),
    CDT: ("curry", 3, 3, 500, 5000, "file", 1.0),
    "gdf/test_1ch.gdf": ("gdf", 1, 0, 150, 4500, "none", 0.0),
    "eximia/test_eximia.nxe": ("eximia", 64, 60, 1450, 15678, "standard_1005", 1.0),
    LAY: ("persyst", 83, 23, 200, 847, "standard_1005", 1.0),
    "nedf/testdata.nedf": ("nedf", 33, 32, 500, 32538, "standard_1005", 1.0),
}
REFUSED = {
    "broken/SC4001EC-Hypnogram.edf": (NotContinuous, "no signal: the file holds annotations only"),
    "broken/test_egi.mff": (ReadError, "sidecar missing: the MFF folder has no signal"),
    "broken/truncated.edf": (ReadError, "truncated: the header states 600 records, but the file has 199.2"),
    "broken/header_without_data.vhdr": (ReadError, "sidecar missing: the header names 'test_NO.eeg'"),
    "broken/garbage.bdf": (ReadError, "unreadable: not BDF"),
    "broken/empty.edf": (ReadError, "unreadable: an empty file"),
}


def opened(path: Path) -> Signal:
    recording = sniff(path)
    assert recording is not None
    return open_signal(recording)


class TestReaders:
    @pytest.mark.parametrize("path", OPENED)
    def test_format_is_recognised_and_opened(self, path: str) -> None:
        recording = sniff(CORPUS / path)
        assert recording is not None
        signal = open_signal(recording)
        info, channels = signal.info, pick_channels(signal.info)
        got = (recording.format, len(info.ch_names), len(channels.picks), info.sfreq, info.n_samples)
        assert (*got, channels.montage, channels.confidence) == OPENED[path]
        # A block that is read from the middle of the signal must equal the same samples of the whole signal.
        picks = channels.picks[:5] or [0]
        whole = signal.read(0, info.n_samples, picks)
        assert whole.shape == (len(picks), info.n_samples) and np.isfinite(whole).all()
        middle = info.n_samples // 3
        np.testing.assert_array_equal(signal.read(middle, middle + 7, picks[::-1]), whole[::-1, middle : middle + 7])
        signal.close()

    @pytest.mark.parametrize("path", REFUSED)
    def test_refused_with_a_reason(self, path: str) -> None:
        kind, reason = REFUSED[path]
        with pytest.raises(ReadError) as error:
            opened(CORPUS / path)
        assert type(error.value) is kind and str(error.value).startswith(reason)

    def test_every_recording_is_in_a_table(self) -> None:
        from data_sharding.formats.sniffing import find_recordings

        assert {Path(str(r.path)).relative_to(CORPUS).as_posix() for r in find_recordings(CORPUS)} == {
            *OPENED,
            *REFUSED,
        }

    @pytest.mark.parametrize("path", [path for path in OPENED if path not in ("eeglab/test_raw_h5.set",)])
    def test_truncated_files_are_reported(self, path: str, tmp_path: Path) -> None:
        """Cut off a tenth of the signal file. The reader of every format must report the missing data."""
        recording = sniff(CORPUS / path)
        assert recording is not None
        if (CORPUS / path).is_dir():
            shutil.copytree(CORPUS / path, tmp_path / (CORPUS / path).name)
        else:
            for file in recording.files:
                shutil.copy(Path(str(file)), tmp_path)
        apart = [f for f in tmp_path.rglob("*") if f.suffix in (".eeg", ".fdt", ".dat") or f.name == "signal1.bin"]
        data = (apart or [tmp_path / (CORPUS / path).name])[0]
        data.chmod(0o600)
        # In the Neuroscan file, the signal ends at byte 796420; events and other data follow the signal.
        size = 796420 if recording.format == "neuroscan" else data.stat().st_size
        with data.open("r+b") as stream:
            stream.truncate(size - size // 10 - 1)
        with pytest.raises(ReadError) as error:
            opened(tmp_path / (CORPUS / path).name)
        assert str(error.value).startswith("truncated: "), error.value

    @pytest.mark.parametrize(
        ("one", "other", "within_uv"),
        [
            ("ant/test-na-271.cnt", "ant/test-na-271.vhdr", 0.02),
            ("eeglab/test_raw.set", "eeglab/test_raw_h5.set", 0.001),
            ("nihon-kohden/MB0400FU.EEG", "nihon-kohden/MB0400FU.EDF", 0.01),
            ("biosemi/test_bdf_stim_channel.bdf", CDT, 0.01),
        ],
    )
    def test_one_recording_in_two_formats(self, one: str, other: str, within_uv: float) -> None:
        x = []
        for path in (one, other):
            signal = opened(CORPUS / path)
            channels = pick_channels(signal.info)
            at = dict(zip(channels.names, channels.picks, strict=True))
            x.append((sorted(at), signal.read(0, signal.info.n_samples, [at[name] for name in sorted(at)])))
        assert x[0][0] == x[1][0]
        assert 1e6 * np.abs(x[0][1] - x[1][1]).max() < within_uv


class TestChannels:
    def test_biosemi_grid(self) -> None:
        """In this file, the names A1 to I8 mean electrodes of a BioSemi cap, not earlobes.

        Electrodes with a low sampling rate are marked as bad, so that they are the first to be left out if a recording
        has more than 128 channels.
        """
        info = opened(CORPUS / "biosemi/test_reduced.edf").info
        channels = pick_channels(info)
        assert {"A1", "A2", "B16"} <= set(channels.names) and channels.left_out["physiology"] == ["Ergo-Left"]
        assert channels.left_out["another rate: 32 Hz"] == ["Ergo-Right"]
        assert info.bads == ["A1", "A2", "A3", "A4", "A5", "I8", "A6", "A7"] and "A1 1 Hz" in info.notes[0]

    def test_more_than_128_channels(self) -> None:
        channels = pick_channels(opened(CORPUS / "egi/test_egi_pns.mff").info)
        rows, rule = choose(channels, [])
        assert len(rows) == 128 and rule == "128 of 257 by scalp coverage"
        assert channels.by_type["eeg"] == 257 and sum(channels.by_type.values()) == 265

    def test_nihon_kohden_markers(self) -> None:
        for path in ("nihon-kohden/MB0400FU.EDF", "nihon-kohden/MB0400FU.EEG"):
            channels = pick_channels(opened(CORPUS / path).info)
            assert {"Fp1", "Fp2", "T7", "P8"} <= set(channels.names) and not any("$" in name for name in channels.names)

    def test_neuroscan(self) -> None:
        info = opened(CORPUS / "neuroscan/scan41_short.cnt").info
        channels = pick_channels(info)
        assert info.bads == ["LEFT_EAR", "VEOGR"] and channels.left_out.keys() == {"reference", "eog"}

    def test_unnamed_and_equidistant(self) -> None:
        names = pick_channels(opened(CORPUS / "brainvision/test_NO.vhdr").info).names
        assert names[:2] == ["1", "2"]
        assert {"1Z", "2Z"} <= set(pick_channels(opened(CORPUS / "ant/test-user-annotation.vhdr").info).names)

    def test_eximia(self) -> None:
        info = opened(CORPUS / "eximia/test_eximia.nxe").info
        assert info.ch_types.count("stim") == 3 and info.ch_types.count("eog") == 1 and info.scale == 1e-6
        assert "corrected" in info.notes[0]


def test_epochs_are_segments() -> None:
    info = opened(CORPUS / "eeglab/test_epochs.set").info
    assert info.epoched and [(s.start, s.stop) for s in info.segments] == [(i, i + 8) for i in range(0, 32, 8)]


SHARDED = {
    "physionet/test_edf_overlapping_annotations.edf": 119,
    "biosemi/test_reduced.edf": 2,
    "eeglab/test_raw.set": 234,
    "eeglab/test_raw_chanloc_fids.set": 1,
    "egi/test_egi_pns.mff": 10,
    "neuroscan/scan41_short.cnt": 3,
    "ant/test-na-271.cnt": 4,
    "nihon-kohden/MB0400FU.EDF": 23,
    "eximia/test_eximia.nxe": 6,
    "nedf/testdata.nedf": 61,
}
SET_ASIDE = {
    "ant/test-na-271.vhdr": ("duplicate", "duplicate of ant-test-na-271-cnt"),
    "eeglab/test_raw_h5.set": ("duplicate", "duplicate of eeglab-test_raw-set"),
    "nihon-kohden/MB0400FU.EEG": ("duplicate", "duplicate of nihon-kohden-MB0400FU-EDF"),
    "biosemi/test_bdf_stim_channel.bdf": ("quarantined", "no usable channel: 3 test tone"),
    CDT: ("quarantined", "no usable channel: 3 test tone"),
    "ant/test-user-annotation.vhdr": ("quarantined", "no usable channel"),
    "brainvision/test_VAmp.ahdr": ("quarantined", "no usable channel: 6 flat"),
    "broken/empty.edf": ("quarantined", "unreadable: an empty file"),
    "broken/garbage.bdf": ("quarantined", "unreadable: not BDF"),
    "broken/header_without_data.vhdr": ("quarantined", "sidecar missing: the header names 'test_NO.eeg'"),
    "broken/test_egi.mff": ("quarantined", "sidecar missing"),
    "broken/truncated.edf": ("quarantined", "truncated: the header states 600 records"),
    "broken/SC4001EC-Hypnogram.edf": ("excluded", "no signal"),
    "brainvision/test_NO.vhdr": ("excluded", "too short: 0.45 s"),
    "eeglab/test_epochs.set": ("excluded", "too short: 4 epochs of at most 0.16 s"),
    "gdf/test_1ch.gdf": ("excluded", "no EEG channel: only ECG"),
    LAY: ("excluded", "intracranial"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "dataset"
    assert main([str(CONFIG), "--output", str(output), "--ray.num_cpus", "2"]) == 0
    return output


def test_every_file_has_its_verdict(dataset: Path) -> None:
    rows = {row.path: row for row in read_ledger(dataset)}
    assert set(rows) == set(SHARDED) | set(SET_ASIDE)
    assert {p: r.windows for p, r in rows.items() if r.status == "sharded"} == SHARDED
    for path, (status, reason) in SET_ASIDE.items():
        assert rows[path].status == status and rows[path].reason.startswith(reason), path


def test_amplitudes_are_those_of_eeg(dataset: Path) -> None:
    for split in ("train", "val", "test"):
        samples = EEGDataset(dataset, split)
        for i in range(0, len(samples), 7):
            sample = samples[i]
            good = [j for j, name in enumerate(sample.meta["ch_names"]) if name not in sample.meta["bads"]]
            assert 0.1 < np.median(sample.eeg[good].astype(float).std(axis=1)) < 300, sample.key
            assert sample.meta["n"] <= 128


def test_recordings_with_traps(dataset: Path) -> None:
    rows = {row.path: row for row in read_ledger(dataset)}
    biosemi = rows["biosemi/test_reduced.edf"]
    # Channels A1 and A10 are electrodes of the cap. The file stores A1 at 1 Hz, and A10 at the full rate.
    assert biosemi.n_eeg == 136 and biosemi.n_kept <= 128 and biosemi.montage == "none"
    assert "A10" in biosemi.channels and "A1" not in biosemi.channels and "A1 1 Hz" in biosemi.notes[0]
    assert rows["eeglab/test_raw_chanloc_fids.set"].channel_selection == "128 of 129 by scalp coverage"
    assert "$A1" not in " ".join(rows["nihon-kohden/MB0400FU.EDF"].channels)
    assert rows["physionet/test_edf_overlapping_annotations.edf"].channels[0] == "FC5"
    assert rows["eximia/test_eximia.nxe"].unit_factor == 1e-6 and rows["neuroscan/scan41_short.cnt"].n_eeg == 124
    assert rows["ant/test-na-271.cnt"].line_freq == 50.0
    curry, bdf = (rows[p] for p in SET_ASIDE if "test_bdf_stim_channel" in p)
    assert f"the same signal as {bdf.key}" in curry.notes or f"the same signal as {curry.key}" in bdf.notes


def test_manifest(dataset: Path) -> None:
    counts = Manifest.read(dataset).counts
    assert counts["found"] == 27 == sum(counts[s] for s in ("sharded", "duplicate", "quarantined", "excluded"))
    assert find_faults(dataset) == []
