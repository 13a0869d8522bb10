"""Units are recognised in any spelling. Unknown units and missing scales are reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_sharding.formats.units import gdf_unit, names_no_unit, to_volts

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SECONDS = np.arange(40 * 250) / 250

SPELLINGS = {
    1.0: ["V", "v", "Volts", "Volt", "volts"],
    1e-3: ["mV", "MV", "mv", "millivolts", "milli volt", "mVolt", "10^-3 V", "мВ", "㎷"],
    1e-6: [
        *("uV", "UV", "uv", "µV", "μV", "microvolts", "Microvolt", "micro-volts", "uVolt", "uVolts", "µVolts"),
        *("uV_rms", "uVrms", "µV/bit", "10^-6V", "1e-6 V", "x10^-6 V", "muV", "mcV", "[uV]", "(µV)", "uV\0", "µ V"),
        *(
            "microvol",
            "uVpp",
            "uVp-p",
            "uV DC",
            "uV(rms)",
            "uV.",
            "(uV",
            "uV]",
            '"uV"',
            "u\0V\0",
            "V x 10^-6",
            "V*1e-6",
        ),
        *("$\\mu$V", "&micro;V", "μV".encode("big5").decode("latin-1"), "ÿþu\0V"),
        *("мкВ", "㎶", "Âµ" + "V", "Î¼V", "æV", "\x83ÊV", "¦ÌV", "�V", "?V", "мкВ".encode("cp1251").decode("latin-1")),
    ],
    1e-9: ["nV", "NV", "nanovolt", "nVolts", "нВ"],
    1e-12: ["pV"],
    1e-7: ["0.1uV"],
}


def test_every_spelling_of_a_voltage() -> None:
    for factor, units in SPELLINGS.items():
        for unit in units:
            assert to_volts(unit) == pytest.approx(factor, rel=1e-12), unit


def test_other_units_are_no_voltage() -> None:
    for unit in [
        "",
        "%",
        "degC",
        "foo",
        "counts",
        "V/m",
        "uV^2",
        "uV2/Hz",
        "mmHg",
        "kOhm",
        "n/a",
        "10e-6V",
        "Vs",
        "x",
        "1e-6V*1e-6",
        "V*s",
    ]:
        assert to_volts(unit) is None, unit
    assert all(names_no_unit(unit) for unit in ["", " ", "n/a", "N/A", "none", "-"])
    assert not any(names_no_unit(unit) for unit in ["V", "foo", "%"])
    assert [gdf_unit(code) for code in (4256, 4274, 4275, 4276, 0)] == ["V", "mV", "uV", "nV", "code 0"]


def test_the_cases_of_units(cases: Path, shard_all: Callable, assert_true: Callable) -> None:
    done = shard_all(cases / "edf")
    assert_true(done["e08_unit_nV.edf"], 122)
    assert_true(done["e08_unit_utf8.edf"], 130)
    row = done["e21_nophysrange.edf"].row
    assert (row.status, row.category) == ("quarantined", "no physical range")


@pytest.mark.parametrize("bdf", [False, True])
def test_units_mixed_in_one_edf_file(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable, bdf: bool
) -> None:
    units = [b"nV", "µV".encode(), b"mV", b"MV", b"V", "µV".encode("cp437"), b"uVolt", "μV".encode()]
    scale = [1e3, 1, 1e-3, 1e-3, 1e-6, 1, 1, 1]
    write_edf(
        tmp_path / "eeg" / f"a.{'bdf' if bdf else 'edf'}", true_uv(7, 8, SECONDS), units=units, scale=scale, bdf=bdf
    )
    (done,) = shard_all(tmp_path / "eeg").values()
    assert_true(done, 7)
    assert any("'MV' read as millivolts" in note for note in done.row.notes)


@pytest.mark.parametrize(
    ("version", "units"),
    [
        ("GDF 2.20", [4276, 4275, 4274, 4256, 4275, 4277, 4275, 4274]),
        ("GDF 1.25", ["nV", "uV", "mV", "V", "µV", "pV", "microV", "MV"]),
    ],
)
def test_units_mixed_in_one_gdf_file(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_gdf: Callable,
    version: str, units: list,
) -> None:  # fmt: skip
    signals = {name: (x, 250) for name, x in zip(NAMES, true_uv(8, 8, SECONDS), strict=True)}
    scale = [1e3, 1, 1e-3, 1e-6, 1, 1e6, 1, 1e-3]
    write_gdf(tmp_path / "eeg" / "a.gdf", signals, version=version, units=units, scale=scale)
    (done,) = shard_all(tmp_path / "eeg").values()
    assert_true(done, 8)


@pytest.mark.parametrize("rate", [50, 500])
def test_a_gdf_file_with_several_rates(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_gdf: Callable, rate: int
) -> None:
    """If a channel of a GDF file is left out, MNE reads wrong channels. This project's reader reads the right
    channels."""
    ramp = np.linspace(-400, 400, 40 * rate)
    signals = {"Resp": (ramp, rate)}
    signals |= {name: (x, 250) for name, x in zip(NAMES, true_uv(9, 8, SECONDS), strict=True)}
    write_gdf(tmp_path / "eeg" / "a.gdf", signals)
    (done,) = shard_all(tmp_path / "eeg").values()
    assert_true(done, 9)


def test_a_channel_without_a_scale_costs_only_itself(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable,
    write_gdf: Callable,
) -> None:  # fmt: skip
    uv = true_uv(10, 8, SECONDS)
    write_edf(
        tmp_path / "eeg" / "one.edf",
        uv,
        low=["-500"] * 3 + ["0"] + ["-500"] * 4,
        high=["500"] * 3 + ["0"] + ["500"] * 4,
    )
    write_edf(tmp_path / "eeg" / "words.bdf", uv, low=["-500"] * 7 + ["nan"], bdf=True)
    write_edf(tmp_path / "eeg" / "all.bdf", uv, low=["100"] * 8, high=["100"] * 8, bdf=True)
    signals = {name: (x, 250) for name, x in zip(NAMES, uv, strict=True)}
    write_gdf(tmp_path / "eeg" / "one.gdf", signals, flat=["F4"])
    write_gdf(tmp_path / "eeg" / "all.gdf", signals, flat=NAMES)
    done = shard_all(tmp_path / "eeg")
    for path, name in (("one.edf", "F4"), ("words.bdf", "P4"), ("one.gdf", "F4")):
        assert_true(done[path], 10, skip=[name])
        assert any("no scale" in note and name in note for note in done[path].row.notes)
        assert name not in done[path].row.channels
    for path in ("all.bdf", "all.gdf"):
        assert (done[path].row.status, done[path].row.category) == ("quarantined", "no physical range")


def test_unknown_units_of_electrodes_are_quarantined(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable
) -> None:
    uv = true_uv(11, 8, SECONDS)
    write_edf(tmp_path / "eeg" / "foo.edf", uv, units=[b"foo"] * 8)
    write_edf(tmp_path / "eeg" / "percent.bdf", uv, units=[b"%"] * 8, bdf=True)
    write_edf(tmp_path / "eeg" / "one.edf", uv, units=[b"uV"] * 5 + [b"degC"] + [b"uV"] * 2)
    other = [*NAMES[:6], "SaO2", "Box"]
    write_edf(tmp_path / "eeg" / "other.edf", uv, units=[b"uV"] * 6 + [b"%", b"degC"], labels=other)
    done = shard_all(tmp_path / "eeg")
    for path in ("foo.edf", "percent.bdf"):
        row = done[path].row
        assert (row.status, row.category) == ("quarantined", "unit unknown") and "unit_factors" in row.reason
    assert_true(done["one.edf"], 11, skip=["C4"])
    assert any("'degC' unknown" in note and "C4" in note for note in done["one.edf"].row.notes)
    assert done["other.edf"].row.channels == NAMES[:6]


def test_the_config_gives_an_unknown_unit(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable
) -> None:
    write_edf(tmp_path / "eeg" / "foo.edf", true_uv(12, 8, SECONDS), units=[b"counts"] * 8, scale=[10] * 8)
    (done,) = shard_all(tmp_path / "eeg", unit_factors={"*": 1e-7}).values()
    assert_true(done, 12)


def write_brainvision(
    path: Path, uv: np.ndarray, units: list[str], scale: list[float], encoding: str = "utf-8"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = uv * np.array(scale)[:, None]
    resolution = [float(f"{np.abs(row).max() / 30000:.6g}") for row in values]
    digital = np.round(values / np.array(resolution)[:, None]).astype("<i2")
    path.with_suffix(".eeg").write_bytes(digital.T.tobytes())
    lines = [
        f"Ch{i}={name},,{step},{unit}"
        for i, (name, step, unit) in enumerate(zip(NAMES, resolution, units, strict=True), 1)
    ]
    text = (
        "Brain Vision Data Exchange Header File Version 1.0\n[Common Infos]\n"
        f"DataFile={path.stem}.eeg\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=8\n"
        "SamplingInterval=4000\n[Binary Infos]\nBinaryFormat=INT_16\n[Channel Infos]\n"
    )
    path.write_bytes((text + "\n".join(lines) + "\n").encode(encoding))


def test_units_of_brainvision_headers(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable
) -> None:
    uv = true_uv(13, 8, SECONDS)
    units = ["nV", "µV", "mV", "MV", "V", "microvolts", "UV", ""]
    write_brainvision(tmp_path / "eeg" / "mixed.vhdr", uv, units, [1e3, 1, 1e-3, 1e-3, 1e-6, 1, 1, 1])
    write_brainvision(tmp_path / "eeg" / "latin.vhdr", uv, ["µV"] * 7 + ["mV"], [1.0] * 7 + [1e-3], "latin-1")
    write_brainvision(tmp_path / "eeg" / "odd.vhdr", uv, ["foo"] * 8, [1.0] * 8)
    done = shard_all(tmp_path / "eeg")
    assert_true(done["mixed.vhdr"], 13)
    assert_true(done["latin.vhdr"], 13)
    assert done["odd.vhdr"].row.category == "unit unknown" and done["odd.vhdr"].row.status == "quarantined"


def test_units_of_channels_tsv_where_the_header_has_none(
    tmp_path: Path, shard_all: Callable, assert_true: Callable, true_uv: Callable, write_edf: Callable
) -> None:
    root = tmp_path / "study"
    units = {"01": ([b""] * 8, "µV"), "02": ([b"uV"] * 8, "mV"), "03": ([b""] * 8, "foo"), "04": ([b"n/a"] * 8, "mV")}
    for subject, (own, sidecar) in units.items():
        folder = root / f"sub-{subject}" / "eeg"
        scale = [1e-3 if subject == "04" else 1.0] * 8
        write_edf(folder / f"sub-{subject}_task-rest_eeg.edf", true_uv(14, 8, SECONDS), units=own, scale=scale)
        rows = [f"{name}\tEEG\t{sidecar}" for name in NAMES]
        (folder / f"sub-{subject}_task-rest_channels.tsv").write_text("\n".join(["name\ttype\tunits", *rows]) + "\n")
    (root / "dataset_description.json").write_text('{"Name": "study", "BIDSVersion": "1.9.0"}')
    done = {path.split("/")[0]: sharded for path, sharded in shard_all(root, kind="bids").items()}
    for subject in ("sub-01", "sub-02", "sub-04"):
        assert_true(done[subject], 14)
    assert any("from the sidecar" in note for note in done["sub-01"].row.notes)
    assert any("the sidecar has the unit mV" in note for note in done["sub-02"].row.notes)
    assert (done["sub-03"].row.status, done["sub-03"].row.category) == ("quarantined", "unit unknown")


def test_units_of_xdf_streams() -> None:
    from data_sharding.formats.xdf import _channels

    units = ["microvolts", "nV", "mV", "Volts", "", "foo", "%"]
    labels = ["Fp1", "Fp2", "C3", "C4", "P3", "P4", "SaO2"]
    declared = [{"label": [label], "unit": [unit], "type": ["EEG"]} for label, unit in zip(labels, units, strict=True)]
    names, _, found, _ = _channels([{"channels": [{"channel": declared}]}], 7)
    assert names == labels and found.unknown == {"P4": "foo"} and found.ch_types[-1] == "misc"
    np.testing.assert_allclose(found.gains[:6], [1e-6, 1e-9, 1e-3, 1, 1, 1])
    assert found.assumed == {"P3": 1.0}
