"""Real recordings of ten makers: every file gets its verdict, none is lost, none is written twice."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_sharding.dataset import EEGDataset
from data_sharding.job import main
from data_sharding.ledger import read_ledger
from data_sharding.manifest import Manifest
from data_sharding.verify import find_faults

CONFIG = Path(__file__).parents[2] / "configs" / "data_sharding" / "real_corpus.yaml"

pytestmark = pytest.mark.skipif(
    not Path(os.environ.get("DREAMSCALE_EEG_CORPUS") or "/nonexistent").is_dir(),
    reason="DREAMSCALE_EEG_CORPUS does not name a folder with the real recordings",
)

SHARDED = {
    "physionet/test_edf_overlapping_annotations.edf": 124,
    "biosemi/test_reduced.edf": 6,
    "eeglab/test_raw.set": 238,
    "eeglab/test_raw_chanloc_fids.set": 1,
    "egi/test_egi_pns.mff": 13,
    "neuroscan/scan41_short.cnt": 7,
    "ant/test-na-271.cnt": 4,
    "nihon-kohden/MB0400FU.EDF": 29,
    "biosemi/test_bdf_stim_channel.bdf": 10,
    "eximia/test_eximia.nxe": 10,
    "nedf/testdata.nedf": 65,
}
SET_ASIDE = {
    "ant/test-na-271.vhdr": ("duplicate", "duplicate of ant-test-na-271-cnt"),
    "eeglab/test_raw_h5.set": ("duplicate", "duplicate of eeglab-test_raw-set"),
    "nihon-kohden/MB0400FU.EEG": ("duplicate", "duplicate of nihon-kohden-MB0400FU-EDF"),
    "curry/test_bdf_stim_channel Curry 8.cdt": ("duplicate", "duplicate of biosemi-test_bdf_stim_channel-bdf"),
    "ant/test-user-annotation.vhdr": ("quarantined", "no usable channel"),
    "brainvision/test_VAmp.ahdr": ("quarantined", "no usable channel: 6 flat"),
    "broken/empty.edf": ("quarantined", "unreadable: an empty file"),
    "broken/garbage.bdf": ("quarantined", "unreadable: not BDF"),
    "broken/header_without_data.vhdr": ("quarantined", "sidecar missing: the header names 'test_NO.eeg'"),
    "broken/test_egi.mff": ("quarantined", "sidecar missing"),
    "broken/truncated.edf": ("quarantined", "truncated: the header promises 600 records"),
    "broken/SC4001EC-Hypnogram.edf": ("excluded", "no signal"),
    "brainvision/test_NO.vhdr": ("excluded", "too short: 0.45 s"),
    "eeglab/test_epochs.set": ("excluded", "epoched: 4 trials"),
    "gdf/test_1ch.gdf": ("excluded", "no EEG channel: only ECG"),
    "persyst/sub-pt1_ses-02_task-monitor_acq-ecog_run-01_clip2.lay": ("excluded", "intracranial"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "dataset"
    assert main([str(CONFIG), "--output", str(output), "--ray.num_cpus", "2"]) == 0
    return output


def test_every_file_has_its_verdict(dataset: Path) -> None:
    rows = {row["path"]: row for row in read_ledger(dataset)}
    assert set(rows) == set(SHARDED) | set(SET_ASIDE)
    assert {p: r["windows"] for p, r in rows.items() if r["status"] == "sharded"} == SHARDED
    for path, (status, reason) in SET_ASIDE.items():
        assert rows[path]["status"] == status and rows[path]["reason"].startswith(reason), path


def test_amplitudes_are_those_of_eeg(dataset: Path) -> None:
    for split in ("train", "val", "test"):
        samples = EEGDataset(dataset, split)
        for i in range(0, len(samples), 7):
            sample = samples[i]
            good = [j for j, name in enumerate(sample.meta["ch_names"]) if name not in sample.meta["bads"]]
            assert 0.1 < np.median(sample.eeg[good].astype(float).std(axis=1)) < 300, sample.key
            assert sample.meta["n"] <= 128


def test_traps(dataset: Path) -> None:
    rows = {row["path"]: row for row in read_ledger(dataset)}
    biosemi = rows["biosemi/test_reduced.edf"]
    assert (
        biosemi["n_eeg"] == 136
        and biosemi["n_kept"] == 128
        and biosemi["montage"] == "none"
        and "A1" in biosemi["channels"]
    )
    assert rows["eeglab/test_raw_chanloc_fids.set"]["channel_selection"] == "128 of 129 by scalp coverage"
    assert "$A1" not in " ".join(rows["nihon-kohden/MB0400FU.EDF"]["channels"])
    assert rows["physionet/test_edf_overlapping_annotations.edf"]["channels"][0] == "FC5"
    assert rows["eximia/test_eximia.nxe"]["unit_factor"] == 1e-6 and rows["neuroscan/scan41_short.cnt"]["n_eeg"] == 124
    assert rows["ant/test-na-271.cnt"]["line_freq"] == 50.0


def test_manifest(dataset: Path) -> None:
    counts = Manifest.read(dataset).counts
    assert counts["found"] == 27 == sum(counts[s] for s in ("sharded", "duplicate", "quarantined", "excluded"))
    assert find_faults(dataset) == []
