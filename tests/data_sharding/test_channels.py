"""Names, kinds, positions and the choice of 128 channels."""

from __future__ import annotations

import numpy as np
import pytest

from data_sharding.channels import canonical_name, choose, is_grid, kind_of, pick_channels


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Fc5.", "FC5"),
        ("Cz..", "Cz"),
        ("EEG FP1-REF", "Fp1"),
        ("EEG Fp2-Ref", "Fp2"),
        ("T3", "T7"),
        ("EEG T6-LE", "P8"),
        ("POz", "POz"),
        ("EEG 012", "EEG 012"),
        ("E17", "E17"),
        ("1Z", "1Z"),
        ("POL $A2", "$A2"),
    ],
)
def test_canonical_name(name: str, wanted: str) -> None:
    assert canonical_name(name) == wanted
    assert canonical_name(wanted) == wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [("VEOGR", "eog"), ("ECG", "ecg"), ("EKG1", "ecg"), ("EMGleft", "emg"), ("STI 014", "trigger"), ("$A1", "external")]
    + [
        ("Status", "trigger"),
        ("A1", "reference"),
        ("M2", "reference"),
        ("Ergo-Left", "physiology"),
        ("EXG3", "external"),
    ]
    + [(name, None) for name in ("Fp1", "E1", "Cz", "TP9", "A12", "P10", "1Z", "Z2", "EEG 000", "LL5", "113")],
)
def test_kind(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_biosemi_names_are_no_earlobes_and_no_ten_twenty(make_raw) -> None:
    names = [f"{letter}{i}" for letter in "ABCDEFGH" for i in range(1, 17)]
    channels = pick_channels(make_raw(128, 100, 1, names=names))
    assert is_grid(names) and channels.names == names
    assert channels.montage == "none" and not any(channels.positions)


def test_a_whole_biosemi_cap_has_positions(make_raw) -> None:
    import mne

    names = [f"{letter}{i}" for letter in "ABCD" for i in range(1, 33)]
    channels = pick_channels(make_raw(128, 100, 1, names=names))
    assert channels.montage == "biosemi128" and channels.confidence == 1.0
    wanted = mne.channels.make_standard_montage("biosemi128").get_positions()["ch_pos"]["C7"]
    np.testing.assert_allclose(channels.positions[names.index("C7")], wanted, atol=1e-4)


def test_types_and_names_both_exclude(make_raw) -> None:
    raw = make_raw(6, 100, 1, names=["Fp1", "Cz", "HEOG", "trigger", "A1", "Pz"])
    raw.set_channel_types({"trigger": "stim"}, verbose="ERROR")
    channels = pick_channels(raw)
    assert channels.names == ["Fp1", "Cz", "Pz"] and channels.picks == [0, 1, 5]
    assert channels.left_out == {"eog": ["HEOG"], "reference": ["A1"]} and channels.by_type == {"eeg": 5, "stim": 1}


def test_positions_of_the_file_go_first(make_raw) -> None:
    raw = make_raw(3, 100, 1, names=["Fp1", "Cz", "Pz"])
    raw.info["chs"][1]["loc"][:3] = [0.01, 0.02, 0.1]
    channels = pick_channels(raw)
    assert channels.montage == "file" and channels.positions == [None, [0.01, 0.02, 0.1], None]


def test_names_that_meet_stay_apart(make_raw) -> None:
    assert pick_channels(make_raw(2, 100, 1, names=["T7", "T3"])).names == ["T7", "T3"]


class TestChoose:
    def net(self, make_raw, n: int = 256):
        import mne

        montage = mne.channels.make_standard_montage("GSN-HydroCel-256")
        raw = make_raw(n, 100, 1, names=montage.ch_names[:n])
        raw.set_montage(montage, verbose="ERROR")
        return pick_channels(raw)

    def test_coverage(self, make_raw) -> None:
        channels = self.net(make_raw)
        rows, rule = choose(channels, [])
        assert len(rows) == 128 and rows == sorted(set(rows)) and rule == "128 of 256 by scalp coverage"
        xyz = np.array(channels.positions)
        gap = np.linalg.norm(xyz[:, None] - xyz[rows][None], axis=-1).min(1)
        naive = np.linalg.norm(xyz[:, None] - xyz[:128][None], axis=-1).min(1)
        assert gap.max() < 0.5 * naive.max()

    def test_bad_channels_go_first(self, make_raw) -> None:
        channels = self.net(make_raw)
        rows, _ = choose(channels, list(range(0, 100)))
        assert len(rows) == 128 and min(rows) >= 100
        rows, rule = choose(channels, list(range(0, 200)))
        assert rows == list(range(200, 256)) and rule == "56 good of 256"

    def test_by_name_where_there_are_no_positions(self, make_raw) -> None:
        channels = pick_channels(make_raw(140, 100, 1, names=[f"ch{i}" for i in range(140, 0, -1)]))
        rows, rule = choose(channels, [])
        assert {channels.names[i] for i in rows} == {f"ch{i}" for i in range(1, 129)} and "by name" in rule
