"""Names, kinds and positions of channels, and the choice of 128 channels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data_sharding.formats.channels import Channels, canonical_name, choose, is_grid, is_site, kind_of, pick_channels
from data_sharding.formats.signal import Segment, SignalInfo

Places = Sequence[list[float] | None]


def make_info(names: Sequence[str], types: Sequence[str] = (), positions: Places = (), **more: Any) -> SignalInfo:
    return SignalInfo(
        ch_names=list(names),
        ch_types=list(types) or ["eeg"] * len(names),
        positions=list(positions) or [None] * len(names),
        sfreq=100.0,
        n_samples=100,
        segments=[Segment(start=0, stop=100, onset=0.0)],
        **more,
    )


def pick(names: Sequence[str], types: Sequence[str] = (), positions: Places = ()) -> Channels:
    return pick_channels(make_info(names, types, positions))


# For each channel: its name in the file, its canonical name, and True if the canonical name is an electrode (or a
# bipolar pair of electrodes) of the 10-05 system.
NAMES = [
    ("Fc5.", "FC5", True),  # BCI2000
    ("Cz..", "Cz", True),
    ("Iz..", "Iz", True),
    ("EEG FP1-REF", "Fp1", True),  # Temple University
    ("EEG T3-LE", "T7", True),
    ("EEG T6-LE", "P8", True),
    ("EEG CZ-REF", "Cz", True),
    ("EEG Fp2-Ref", "Fp2", True),  # Nihon Kohden
    ("POL Fp1", "Fp1", True),
    ("POL $A2", "$A2", False),
    ("EEG C3-A2", "C3", True),  # sleep laboratories
    ("C4-M1", "C4", True),
    ("C4:M1", "C4", True),
    ("O2-A1", "O2", True),
    ("F3-A1A2", "F3", True),
    ("Fz-AVG", "Fz", True),
    ("EEG Fpz-Cz", "Fpz-Cz", True),  # Sleep-EDF
    ("EEG Pz-Oz", "Pz-Oz", True),
    ("FP1-F7", "Fp1-F7", True),  # CHB-MIT
    ("T7-P7", "T7-P7", True),
    ("FT9-FT10", "FT9-FT10", True),
    ("F7-T3", "F7-T7", True),
    ("T8-P8-0", "T8-P8", True),  # MNE adds a number to repeated names
    ("EEG Fp1 - A1", "Fp1", True),
    ("EEG A1", "A1", True),
    ("EEG-M2", "M2", True),
    ("EEG A2-Ref", "A2", True),
    ("T3", "T7", True),
    ("t5", "P7", True),
    ("FCZ", "FCz", True),
    ("fpz", "Fpz", True),
    ("POz", "POz", True),
    ("PO10", "PO10", True),
    ("AFF5h", "AFF5h", True),
    ("FFC1h", "FFC1h", True),
    ("TPP9h", "TPP9h", True),
    ("I1", "I1", True),
    ("  Oz ", "Oz", True),
    ("Pz\0\0", "Pz", True),
    ("EEG 012", "EEG 012", False),
    ("EEG 26-REF", "EEG 26", False),
    ("12", "12", False),
    ("E17", "E17", False),  # EGI
    ("E129", "E129", False),
    ("1Z", "1Z", False),  # equidistant caps
    ("LL5", "LL5", False),
    ("A32", "A32", False),  # BioSemi
    ("D12", "D12", False),
    ("CB1", "CB1", False),  # cerebellar electrodes of Neuroscan
    ("Ch1", "Ch1", False),
    ("", "", False),
]


@pytest.mark.parametrize(("name", "wanted", "site"), NAMES)
def test_canonical_name_of_a_channel(name: str, wanted: str, site: bool) -> None:
    assert canonical_name(name) == wanted
    assert canonical_name(wanted) == wanted
    assert is_site(wanted) is site


KINDS = {
    "eog": ["VEOGR", "HEOG", "EOG horizontal", "VEO", "HEOL", "LHEOG", "LOC", "ROC", "LO1", "IO2", "Eye left", "REYE"],
    "ecg": ["ECG", "EKG1", "ECG EKG"],
    "emg": ["EMGleft", "EMG submental", "Chin1", "Left Leg", "LAT"],
    "trigger": ["STI 014", "Status", "Trigger", "Event marker", "DC01", "Photic", "DIN1", "Gate In", "BDF Annotations"],
    "physiology": ["Ergo-Left", "SpO2", "Resp oro-nasal", "Temp rectal", "GSR1", "Plet", "Airflow", "THOR RES", "H.R."],
    "movement": ["accX", "GYROX", "Battery", "GND", "Position", "SOUND"],
    "quality": ["CQ_AF3", "RAW_CQ", "TIME_STAMP_s", "IBI", "SUPPR"],
    "reference": ["A1", "M2", "LEFT_EAR", "Ref", "CMS"],
    "external": ["$A1", "EXG3", "AUX1", "Right AUX", "Misc", "X5", "-", "--1", "BN2", "Mark1"],
}
EEG = ["Fp1", "E1", "Cz", "TP9", "A12", "P10", "1Z", "Z2", "EEG 000", "LL5", "113", "Fpz-Cz", "EXG Channel 0", "Ch7"]


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for k, names in KINDS.items() for n in names] + [(n, None) for n in EEG]
)
def test_kind_of_a_channel_is_recognised_by_its_name(name: str, kind: str | None) -> None:
    assert kind_of(canonical_name(name)) == kind


def test_no_electrode_of_a_montage_is_taken_for_another_kind() -> None:
    import mne

    for montage in ("standard_1005", "biosemi64", "biosemi256", "GSN-HydroCel-257", "easycap-M1"):
        names = mne.channels.make_standard_montage(montage).ch_names
        lost = {name: kind_of(canonical_name(name), grid=montage == "biosemi256") for name in names}
        assert {name for name, kind in lost.items() if kind} <= {"A1", "A2", "M1", "M2"}, montage


class TestSleepAndClinic:
    def test_eye_channels_e1_and_e2_are_not_an_egi_net(self) -> None:
        channels = pick(["F3-M2", "C4-M1", "O1-M2", "E1-M2", "E2-M2", "ECG", "Chin1-Chin2"])
        assert channels.names == ["F3", "C4", "O1"] and channels.montage == "standard_1005"
        assert channels.left_out == {"eog": ["E1-M2", "E2-M2"], "ecg": ["ECG"], "emg": ["Chin1-Chin2"]}

    def test_bipolar_channels_have_no_position(self) -> None:
        channels = pick(["FP1-F7", "F7-T7", "T7-P7", "Cz"])
        assert channels.names == ["Fp1-F7", "F7-T7", "T7-P7", "Cz"] and channels.confidence == 0.25
        assert channels.positions[:3] == [None] * 3 and channels.positions[3] is not None
        assert channels.notes == ["bipolar, without a position: Fp1-F7, F7-T7, T7-P7 (3)"]
        assert pick(["FP1-F7", "F7-T7"]).montage == "none"

    def test_electrode_with_two_references_has_two_names(self) -> None:
        channels = pick(["C3-A1", "C3-A2", "C4-A1"])
        assert channels.names == ["C3", "C3-A2", "C4"]


def compute_mne_positions(montage: str, names: list[str]) -> list[Any]:
    """Compute the positions that the electrodes `names` have in MNE's montage `montage`."""
    import mne

    with warnings.catch_warnings():
        # Ignore MNE's warning that names of montages change in MNE 1.14.
        warnings.simplefilter("ignore", FutureWarning)
        raw = mne.io.RawArray(np.zeros((len(names), 10)), mne.create_info(names, 100.0, "eeg"), verbose="error")
        raw.set_montage(montage, verbose="error")
    return [channel["loc"][:3] for channel in raw.info["chs"]]


class TestCaps:
    def test_biosemi_names_are_not_taken_for_earlobes_or_10_20_names(self) -> None:
        names = [f"{letter}{i}" for letter in "ABCDEFGH" for i in range(1, 17)]
        channels = pick(names)
        assert is_grid(names) and channels.names == names
        assert channels.montage == "none" and not any(channels.positions)

    @pytest.mark.parametrize(("letters", "size"), [("ABCD", 128), ("ABCDE", 160), ("ABCDEFGH", 256)])
    def test_complete_biosemi_cap_has_positions(self, letters: str, size: int) -> None:
        names = [f"{letter}{i}" for letter in letters for i in range(1, 33)]
        channels = pick([*names, "EXG1", "Status"])
        assert channels.montage == f"biosemi{size}" and channels.confidence == 1.0 and len(channels.names) == size
        wanted = compute_mne_positions(f"biosemi{size}", names)
        np.testing.assert_allclose(channels.positions, wanted, atol=1e-5)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("names", "montage", "confidence"),
        [
            ([f"E{i}" for i in range(1, 129)], "GSN-HydroCel-128", 1.0),
            ([f"E{i}" for i in range(1, 130)], "GSN-HydroCel-128", 1.0),
            ([*(f"E{i}" for i in range(1, 129)), "Cz"], "GSN-HydroCel-128", 1.0),
            ([f"E{i:03d}" for i in range(1, 258)], "GSN-HydroCel-256", 1.0),
            ([*(f"E{i}" for i in range(1, 65)), "VREF"], "GSN-HydroCel-64", 1.0),
            ([f"E{i}" for i in range(1, 129) if i not in (17, 44, 126)], "GSN-HydroCel-128", 1.0),
            ([f"E{i}" for i in range(1, 129, 2)], "none", 0.0),
        ],
    )
    def test_egi_net_is_recognised_by_its_channel_names(
        self, names: list[str], montage: str, confidence: float
    ) -> None:
        channels = pick(names)
        assert (channels.montage, channels.confidence) == (montage, confidence)

    def test_e129_of_a_128_channel_net_is_the_vertex(self) -> None:
        names = [f"E{i}" for i in range(1, 130)]
        wanted = compute_mne_positions("GSN-HydroCel-129", [*names[:128], "Cz"])
        np.testing.assert_allclose(pick(names).positions, wanted, atol=1e-5)  # type: ignore[arg-type]

    def test_positions_by_name_equal_those_of_mne(self) -> None:
        names = ["Fp1", "Fp2", "C3", "Cz", "C4", "O1", "O2", "AF7h", "PPO5h"]
        names = [name for name in names if is_site(name)]
        wanted = compute_mne_positions("standard_1005", names)
        np.testing.assert_allclose(pick(names).positions, wanted, atol=1e-5)  # type: ignore[arg-type]


def test_channels_are_left_out_by_type_and_by_name() -> None:
    names = ["Fp1", "Cz", "HEOG", "trigger", "A1", "Pz", "MEG 0111", "LA1", "G12"]
    types = ["eeg", "eeg", "eeg", "stim", "eeg", "eeg", "mag", "seeg", "ecog"]
    channels = pick(names, types)
    assert channels.names == ["Fp1", "Cz", "Pz"] and channels.picks == [0, 1, 5]
    assert channels.left_out == {"eog": ["HEOG"], "reference": ["A1"]}
    assert channels.by_type == {"ecog": 1, "eeg": 5, "mag": 1, "seeg": 1, "stim": 1}


def test_channels_that_the_reader_left_out_are_listed() -> None:
    info = make_info(["Fp1", "Cz"], left_out={"Temp": "another rate: 1 Hz"})
    assert pick_channels(info).left_out == {"another rate: 1 Hz": ["Temp"]}


class TestPositionsOfTheFile:
    def test_positions_of_the_file_are_preferred(self) -> None:
        channels = pick(["Fp1", "Cz", "Pz"], positions=[None, [0.01, 0.02, 0.12], None])
        assert channels.montage == "file" and channels.positions == [None, [0.01, 0.02, 0.12], None]
        assert channels.confidence == 0.333

    def test_positions_are_ignored_if_all_are_the_same(self) -> None:
        assert pick(["Fp1", "Cz", "Pz"], positions=[[0.0, 0.0, 0.1]] * 3).montage == "standard_1005"


def test_channels_with_equal_canonical_names_stay_distinct() -> None:
    assert pick(["T7", "T3"]).names == ["T7", "T3"]
    assert pick(["T8-P8-0", "T8-P8-1"]).names == ["T8-P8", "T8-P8-1"]


def test_few_standard_names_give_no_montage() -> None:
    channels = pick(["C3", "C4", "ch1", "ch2", "ch3", "ch4", "ch5"])
    assert channels.montage == "none" and channels.confidence == 0.0


class TestChoose:
    def pick_net(self) -> Channels:
        return pick([f"E{i}" for i in range(1, 257)])

    def test_channels_are_chosen_by_scalp_coverage(self) -> None:
        channels = self.pick_net()
        rows, rule = choose(channels, [])
        assert len(rows) == 128 and rows == sorted(set(rows)) and rule == "128 of 256 by scalp coverage"
        xyz = np.array(channels.positions)
        gap = np.linalg.norm(xyz[:, None] - xyz[rows][None], axis=-1).min(1)
        naive = np.linalg.norm(xyz[:, None] - xyz[:128][None], axis=-1).min(1)
        assert gap.max() < 0.5 * naive.max()

    def test_bad_channels_are_dropped_first(self) -> None:
        channels = self.pick_net()
        rows, _ = choose(channels, list(range(0, 100)))
        assert len(rows) == 128 and min(rows) >= 100
        rows, rule = choose(channels, list(range(0, 200)))
        assert rows == list(range(200, 256)) and rule == "56 good of 256"

    def test_channels_without_positions_are_chosen_by_name(self) -> None:
        channels = pick([f"ch{i}" for i in range(140, 0, -1)])
        rows, rule = choose(channels, [])
        assert {channels.names[i] for i in rows} == {f"ch{i}" for i in range(1, 129)} and "by name" in rule
